"""`python -m benchmarks`: run cases, print a summary, write the JSON.

To hold all of torch back to AVX2, set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2: its products are oneDNN's and MKL's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import common, machine, runner

RESULTS = Path(__file__).resolve().parent / "results"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}"


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _error_ratio(entry: dict) -> str:
    ratio = entry["error_ratio"]
    return "-" if ratio is None else f"{ratio:.2g}"


def summary(results: dict) -> Table:
    described, roofs = results["machine"], results["roofs"]
    gemms = ", ".join(f"{d} {r / 1e12:.2f}" for d, r in roofs["gemm_flops_per_s"].items())
    title = (
        f"fastnn {described['fastnn']} against torch {described['torch']} on {described['name']},"
        f" {described['isa']}, {described['threads']} threads; copy"
        f" {roofs['copy_bytes_per_s'] / 1e9:.1f} GB/s, GEMM {gemms} TFLOP/s"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for column in ("ms eager", "ms", "times faster", "% of floor", "extra MB (eager)", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in results["rows"]:
        eager = row["providers"]["eager"]
        first = row["ours"] or "eager"
        others = [name for name in row["providers"] if name not in (first, "eager")]
        for name in [first, *others]:
            entry = row["providers"][name]
            ours = name in common.OURS
            spread = f"{entry['ratio']:.2f} ({entry['ratio_p20']:.2f}..{entry['ratio_p80']:.2f})"
            loses = ours and entry["ratio"] < common.LOSES_BELOW
            note = f"LOSES {row['reason']}".strip() if loses else ""
            table.add_row(
                row["label"] if name == row["ours"] else f"  {entry['label']}: {row['label']}",
                milliseconds(eager["seconds"]),
                milliseconds(entry["seconds"]),
                spread,
                f"{entry['floor_percent']:.0f}",
                f"{megabytes(entry.get('extra_bytes'))} ({megabytes(eager.get('extra_bytes'))})",
                _error_ratio(entry),
                note,
                style="bold red" if loses else ("" if ours else "dim"),
            )
    return table


def _line(row: dict) -> str:
    if row["ours"] is None:
        return (
            f"{milliseconds(row['providers']['eager']['seconds'])} ms eager; fastnn serves it not"
        )
    ours = row["providers"][row["ours"]]
    verdict = "  LOSES" if row["loses"] else ""
    return f"{milliseconds(ours['seconds'])} ms, {ours['ratio']:.2f}x eager{verdict}"


def run_with_progress(cases: list, device: torch.device, settings: runner.Settings, console):
    """A progress bar on a terminal, one plain line a case elsewhere."""
    if not console.is_terminal:
        done = []

        def report(row):
            done.append(row)
            print(f"[{len(done)}/{len(cases)}] {row['family']}: {row['label']}: {_line(row)}")
            sys.stdout.flush()

        return runner.run(cases, device, settings, on_row=report)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("copy and GEMM rates", total=len(cases))
        return runner.run(
            cases,
            device,
            settings,
            on_start=lambda case: progress.update(task, description=case.label),
            on_row=lambda row: progress.advance(task),
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short table, few rounds")
    parser.add_argument("--family", choices=sorted(common.FAMILIES))
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose label has it")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--device", default=str(common.default_device()))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--case-seconds", type=float, help="time for the rounds of a case")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory runs")
    parser.add_argument(
        "--into", type=Path, help="put the rows in place of those of an earlier run's JSON"
    )
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes (a full run: benchmarks/results/)"
    )
    args = parser.parse_args(arguments)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = common.select(args.quick, args.family, args.case)
    if not cases:
        parser.error(f"no case has {args.case!r} in its label")
    settings = runner.QUICK if args.quick else runner.FULL
    settings = dataclasses.replace(
        settings,
        rounds=args.rounds or settings.rounds,
        case_s=args.case_seconds or settings.case_s,
        compiled=args.compile or settings.compiled,
        with_memory=not args.no_memory,
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.perf_counter()
    results = run_with_progress(cases, torch.device(args.device), settings, console)
    console.print(summary(results))
    out = args.out or args.into
    if out is None and not (args.quick or args.family or args.case):
        out = RESULTS / f"{machine.slug(results['machine'])}.json"
    if args.into is not None:
        results = runner.replaced(json.loads(args.into.read_text()), results)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"{len(cases)} cases in {time.perf_counter() - started:.0f} s: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
