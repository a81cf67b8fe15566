"""What the README shows runs, and its generated parts are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_there_are_four_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet, tmp_path):
    if "transformers" in snippet:
        pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    program = tmp_path / "snippet.py"
    program.write_text(snippet)
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=ROOT,
                         env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_generated_parts_are_current():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run `python -m benchmarks.readme`"
