"""`python -m examples [--quick] [options]`: every example, each in a process of its own.

The options go to each of them, of which `distributed` knows only --quick. Ends with what became of
them; its exit status is 1 if one failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from examples._run import SKIPPED

ONLY_QUICK = ("distributed",)  # not one of _run.py's


def names() -> list[str]:
    """The modules here that are programs."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [file.stem for file in files if 'if __name__ == "__main__":' in file.read_text()]


def main(arguments: list[str]) -> int:
    outcomes = {}
    for name in names():
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        known = {"--quick"} if name in ONLY_QUICK else arguments
        options = [argument for argument in arguments if argument in known]
        status = subprocess.run([sys.executable, "-m", f"examples.{name}", *options]).returncode
        outcome = {0: "passed", SKIPPED: "skipped"}.get(status, "FAILED")
        outcomes[name] = (outcome, time.perf_counter() - started)
    print()
    for name, (outcome, seconds) in outcomes.items():
        print(f"{outcome:8} {name} ({seconds:.0f} s)")
    return 1 if any(outcome == "FAILED" for outcome, _ in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
