"""The benchmark harness on tiny cases, the report from its results, and the set-up's messages."""

import base64
import copy
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import accuracy, common, gpu_cases, machine, memory, report, runner, timing

ROOT = Path(__file__).resolve().parent.parent
PREFLIGHT = ROOT / ".ci" / "preflight.py"
CPU = torch.device("cpu")
EAGER = common.PROVIDERS["eager"]
ROOFS = {
    "copy_bytes_per_s": 1e10,
    "gemm_flops_per_s": dict.fromkeys(("fp32", "bf16"), 1e11),
}
SETTINGS = runner.Settings(rounds=3, case_s=1.0, sample_s=1e-4, with_memory=False)
TINY = (
    common.linear_act("gelu", 8, 16, 12, "fp32", False, "gelu"),
    common.linear_act("relu+dropout", 8, 16, 12, "fp32", True, "relu", dropout_p=0.4),
    common.linear_act(
        "dropout+residual", 8, 16, 12, "fp32", True, "identity", dropout_p=0.4, residual=True
    ),
    common.linear_act("swiglu", 8, 16, 12, "bf16", True, "swiglu"),
    common.dropout(16, 24, "bf16", True, p=0.4),
    common.cross_entropy(8, 11, "fp32", True),
    common.linear_cross_entropy(8, 16, 11, "fp32", True),
    common.attention("causal", 1, 2, 8, 16, "fp32", True, is_causal=True),
    common.attention("dropout", 1, 2, 8, 16, "fp32", True, dropout_p=0.4),
    common.attention("decode", 1, 4, 1, 16, "bf16", False, keys=8, kv_heads=2),
)


@pytest.fixture(scope="module")
def rows():
    clock = timing.Clock(CPU)
    return [
        runner.run_case(case, common.serving(case, CPU, False), CPU, clock, ROOFS, SETTINGS)
        for case in TINY
    ]


@pytest.fixture(scope="module")
def results(rows):
    return {
        "schema": runner.SCHEMA,
        "machine": machine.describe(CPU),
        "roofs": ROOFS,
        "settings": {"rounds": 3, "sample_s": 1e-4},
        "rows": rows,
    }


def test_every_case_has_work_traffic_and_a_name_of_its_own():
    labels = [(case.family, case.label) for case in common.CASES]
    assert len(set(labels)) == len(labels)
    for case in common.CASES:
        assert case.amount(case.flops) > 0 and case.amount(case.bytes) > 0, case.label
    quick = {case.family for case in common.select(True)}
    assert quick == set(common.FAMILIES)


def test_formulas_give_the_numbers_they_say():
    gelu = common.linear_act("gelu", 2, 3, 5, "bf16", False, "gelu")
    assert gelu.amount(gelu.flops) == 2 * 2 * 3 * 5
    assert gelu.amount(gelu.bytes) == 2 * (2 * 3 + 5 * 3 + 2 * 5)
    causal = common.attention("causal", 2, 3, 4, 5, "fp32", True, is_causal=True)
    assert causal.amount(causal.flops) == 3.5 * 4 * 2 * 3 * 4 * 4 * 5 / 2


def test_rows_hold_what_the_report_shows(rows):
    for row in rows:
        json.dumps(row)
        assert row["floor_s"] > 0 and row["bound"] in ("copy", "gemm")
        for name, entry in row["providers"].items():
            assert len(entry["samples"]) >= 2 and min(entry["samples"]) > 0
            assert entry["ratio_p20"] <= entry["ratio"] <= entry["ratio_p80"]
            assert entry["rate_unit"] == ("GB/s" if row["bound"] == "copy" else "TFLOP/s")
            if name == "eager":
                assert entry["ratio"] == 1.0


def test_errors_are_measured_against_the_same_dropout_mask(rows):
    for row in rows:
        # A mask that is not the provider's own would show as an error of about 1.
        limit = 0.05 if row["dtype"] == "bf16" else 1e-5
        for name, entry in row["providers"].items():
            wanted = 1 + (row["pass"] != "forward") * (len(entry["errors"]) - 1)
            assert len(entry["errors"]) == wanted
            for what, error in entry["errors"].items():
                assert math.isfinite(error) and error < limit, (row["label"], name, what)


def test_an_error_is_seen():
    case = common.cross_entropy(8, 11, "fp32", True)
    tensors = common.make_inputs(case, CPU)
    step = common.prepare(case, EAGER, tensors)
    wrong = accuracy.Oracle(case, tensors).errors(EAGER, lambda: tuple(t * 1.5 for t in step()))
    assert wrong == pytest.approx({"out": 0.5, "grad_input": 0.5}, rel=1e-3)


def test_ratios_are_formed_within_a_round():
    ratio = timing.ratio_to([1.0, 2.0, None, 9.0], [0.5, 0.5, 1.0, None])
    assert ratio["ratio"] == 3.0
    assert ratio["ratio_p20"] == pytest.approx(2.4) and ratio["ratio_p80"] == pytest.approx(3.6)


def test_rows_of_an_earlier_run_are_replaced(results):
    again = copy.deepcopy(results)
    again["rows"] = [results["rows"][1] | {"reason": "again"}]
    again["machine"]["commit"] = "later"
    merged = runner.replaced(results, again)
    assert [row["label"] for row in merged["rows"]] == [row["label"] for row in results["rows"]]
    assert merged["rows"][1]["reason"] == "again" and merged["rows"][1]["commit"] == "later"
    assert merged["rows"][0] == results["rows"][0]
    again["machine"]["threads"] += 1
    with pytest.raises(ValueError, match="earlier run"):
        runner.replaced(results, again)


class FakeClock:
    def __init__(self):
        self.order = []

    def sample(self, step, inner):
        self.order.append(step())
        return {"a": 0.25, "b": 0.25, "slow": 8.0}[self.order[-1]]


def test_rounds_rotate_and_slow_providers_sit_out():
    clock = FakeClock()
    steps = {name: (EAGER, lambda name=name: name) for name in ("a", "b", "slow")}
    times = timing.interleaved(steps, clock, rounds=4, case_s=9.0)
    assert times["slow"] == [8.0, 8.0, None, None]
    assert times["a"] == [0.25] * 4
    assert clock.order[-10:] == ["a", "b", "slow", "b", "slow", "a", "a", "b", "a", "b"]


def test_short_cases_get_more_rounds():
    steps = {name: (EAGER, lambda name=name: name) for name in ("a", "b")}
    for sample_s, rounds in ((0.25, 12), (0.1, 4)):
        times = timing.interleaved(steps, FakeClock(), 4, sample_s, short_factor=3)
        assert len(times["a"]) == len(times["b"]) == rounds


def test_memory_is_measured_beyond_inputs_and_results():
    case = common.linear_cross_entropy(512, 16, 8192, "fp32", True)
    logits = 512 * 8192 * 4
    measured = memory.measure(case, EAGER, CPU)
    assert measured["result_bytes"] == 4 * (1 + 512 * 16 + 8192 * 16)
    # eager holds the logits, their log-softmax and a gradient, two of them at a time at least
    assert 1.5 * logits < measured["extra_bytes"] < 6 * logits


def test_machine_rates_and_description():
    clock = timing.Clock(CPU)
    assert machine.copy_rate(CPU, clock, megabytes=1) > 1e6
    assert machine.gemm_rate("fp32", CPU, clock, size=64) > 1e6
    described = machine.describe(CPU)
    assert described["torch"] == torch.__version__ and described["threads"] >= 1
    known = described | {
        "name": "A (B) C", "date": "2026-01-02 03:04 UTC", "cores": 4, "threads": 4,
        "isa": "AVX512", "cpu_flags": ["avx512f"],
    }  # fmt: skip
    assert machine.slug(known) == "cpu-a-b-c-2026-01-02"
    assert machine.slug(known | {"threads": 1}) == "cpu-a-b-c-1-thread-2026-01-02"
    assert machine.slug(known | {"isa": "AVX2"}) == "cpu-a-b-c-avx2-2026-01-02"


def test_command_writes_json_and_a_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "CASES", TINY[:1] + TINY[5:6])
    monkeypatch.setattr(machine, "roofs", lambda *arguments: ROOFS)
    out = tmp_path / "deep" / "results.json"
    arguments = ["--quick", "--rounds", "2", "--no-memory", "--device", "cpu", "--out", str(out)]
    assert command.main(arguments) == 0
    written = json.loads(out.read_text())
    assert [row["label"] for row in written["rows"]] == [TINY[0].label, TINY[5].label]
    printed = capsys.readouterr().out
    assert "[2/2] cross_entropy" in printed and "times faster" in printed
    with pytest.raises(SystemExit):
        command.main(["--quick", "--case", "no such case"])
    assert "no case has 'no such case'" in capsys.readouterr().err


def _losing(results):
    """The results with one case that fastnn loses and one that it does not serve."""
    changed = copy.deepcopy(results)
    for row in changed["rows"]:
        row["providers"]["native"] = copy.deepcopy(row["providers"]["eager"])
        row["providers"]["native"]["ratio"] = 1.25
        row["ours"], row["loses"] = "native", False
    slow = changed["rows"][0]
    slow.update(loses=True, reason="the <reason> for it")
    slow["providers"]["native"].update(ratio=0.8, ratio_p20=0.7, ratio_p80=0.9)
    unserved = changed["rows"][-1]
    del unserved["providers"]["native"]
    unserved.update(ours=None, missing={"native": "no kernel for it"})
    return changed


def test_report_has_its_pages_and_sections(results, tmp_path):
    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
        "gg=="
    )
    models = tmp_path / "models"
    models.mkdir()
    pictures = ["tiny_curves.png", "tiny_grid.png"]
    for name in pictures:
        (models / name).write_bytes(pixel)
    run = {
        "losses": [2.0, 0.5], "curve": [2.0, 0.5], "metrics": {"accuracy": [0.5, 0.98]},
        "step_seconds": 0.01, "total_seconds": 2.0,
    }  # fmt: skip
    swapped = run | {"peak_bytes": 2**20}
    content = {
        "name": "tiny", "title": "A <tiny> model", "quick": True, "dtype": "fp32", "epochs": 2,
        "machine": machine.describe(CPU), "runs": {"stock": run, "swapped": swapped},
        "speed_ratio": 1.75, "memory_ratio": None, "curve_gap": 3e-7, "step_error": 2e-6,
        "swapped": "0  Linear  LinearAct", "pictures": pictures, "failures": ["it <diverged>"],
    }  # fmt: skip
    (models / "tiny.json").write_text(json.dumps(content))
    source = tmp_path / "results.json"
    source.write_text(json.dumps(_losing(results)))
    arguments = ["--results", source, "--models", models, "--out", tmp_path / "report"]
    assert report.main([str(argument) for argument in arguments]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    for section in ("what", "summary", "ratios", "table", "roofline", "errors", "models"):
        assert f'<h2 id="{section}">' in page
    assert page.count("<svg") >= 2 and '<a href="models.html">1 example</a>' in page
    assert 'class="loses' in page and "the &lt;reason&gt; for it" in page
    assert "native: no kernel for it" in page
    trained = (tmp_path / "report" / "models.html").read_text()
    assert trained.count("data:image/png;base64,") == 2 and '<h2 id="tiny">' in trained
    assert "A &lt;tiny&gt; model" in trained and "it &lt;diverged&gt;" in trained
    for figure in ("1.75", "3.0e-07", "2.0e-06", "0.98", "10.00", "LinearAct", "–"):
        assert f"{figure}<" in trained, figure
    for text in (page, trained):
        assert 'src="http' not in text and "<link" not in text and "<script" not in text


def test_report_without_results_of_fastnn(results):
    unserved = copy.deepcopy(results)
    for row in unserved["rows"]:
        row.update(ours=None, loses=False)
    page = report.render(unserved)
    assert "fastnn served none of these cases" in page and '<h2 id="models">' not in page


def test_pytest_runs_the_same_cases(tmp_path):
    out = tmp_path / "benchmark.json"
    chosen = "64x10 and eager"
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/bench_cross_entropy.py", "-k", chosen,
            f"--benchmark-json={out}", "-p", "no:cacheprovider",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (measured,) = json.loads(out.read_text())["benchmarks"]
    assert measured["extra_info"]["case"] == "cross-entropy 64x10 fp32 fwd+bwd"
    assert measured["extra_info"]["errors"]["grad_input"] < 1e-5


def _preflight(torch_version="2.13.0", **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "MAKEFLAGS")}
    kept.pop("FASTNN_BUILD_EXT", None)
    return subprocess.run(
        [sys.executable, str(PREFLIGHT), torch_version],
        env=kept | environment, capture_output=True, text=True,
    )  # fmt: skip


def _sentence(run):
    assert run.returncode != 0
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastnn: "), run.stderr
    return lines[0]


def test_preflight_names_a_missing_compiler(tmp_path):
    sentence = _sentence(_preflight(PATH=str(tmp_path)))
    assert "no C++ compiler (c++)" in sentence and "install g++" in sentence
    assert "(my-own-c++)" in _sentence(_preflight(CXX="my-own-c++ -O2".split()[0]))
    assert _preflight(PATH=str(tmp_path), FASTNN_BUILD_EXT="0").returncode == 0


def test_preflight_names_an_unsupported_torch():
    for version in ("2.9.1", "3.0.0"):
        assert f"torch {version} is not supported" in _sentence(_preflight(version))
    assert "TORCH must be" in _sentence(_preflight("latest"))


def test_preflight_names_an_old_python_and_a_missing_venv(monkeypatch):
    spec = importlib.util.spec_from_file_location("preflight", PREFLIGHT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "ensurepip module is missing" in module.missing("2.13.0")
    monkeypatch.setattr(module, "PYTHON", (99, 1))
    assert "Python 99.1 or later is needed" in module.missing("2.13.0")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_a_missing_python():
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    run = subprocess.run(
        ["make", "-s", "preflight", "PYTHON=no-such-python"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert run.stderr.startswith("fastnn: no-such-python was not found: install Python 3.10")


def test_gpu_table():
    """What needs no GPU of it: the cases are sound, and the lower bounds do the work they bound."""
    labels = [(case.family, case.label) for case in gpu_cases.CASES]
    assert len(set(labels)) == len(labels)
    assert all(case.amount(case.flops) > 0 < case.amount(case.bytes) for case in gpu_cases.CASES)
    cpu, bound = torch.device("cpu"), gpu_cases.PROVIDERS[0]
    for case in (
        common.linear_cross_entropy(6, 4, 9, "fp32", True),
        common.linear_act("gelu", 6, 4, 9, "fp32", False, "gelu"),
        common.cross_entropy(6, 9, "fp32", True),
    ):
        tensors = common.make_inputs(case, cpu)
        results = gpu_cases._step(case, bound, tensors)()
        if case.family == "cross_entropy":
            assert 2 * results[0].nbytes == case.amount(case.bytes)
        else:
            wanted = tensors["input"] @ tensors["weight"].t()
            torch.testing.assert_close(results[0], wanted)
            shapes = [tuple(t.shape) for t in results[1:]]
            assert shapes == ([(6, 4), (9, 4)] if case.backward else [])
        assert bound.refusal(case, cpu) is None
    ignoring = next(case for case in gpu_cases.CASES if case.options.get("ignored"))
    small = dataclasses.replace(ignoring, sizes={"N": 8, "D": 4, "V": 9})
    assert (gpu_cases._inputs(small, cpu)["target"] == -100).sum() == 4
    product = next(p for p in gpu_cases.PROVIDERS if p.name == "portable")
    with product.context():
        assert os.environ["FASTNN_LINEAR_CROSS_ENTROPY"] == "portable"
    assert "FASTNN_LINEAR_CROSS_ENTROPY" not in os.environ
    row = {"label": "x", "providers": {"native": {"failed": "RuntimeError: no"}}}
    assert "no" in gpu_cases.line(row)
