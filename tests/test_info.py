import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import host_library

from fastnn import _ops, backend, functional, info, use_backend


def test_collects_every_family_device_and_backend():
    collected = info.collect()
    assert collected["versions"]["torch"] == torch.__version__
    rows = {(r["family"], r["device"], r["backend"]): r for r in collected["availability"]}
    assert len(rows) == len(_ops.FAMILIES) * 2 * len(info.BACKENDS)
    for (family, device, name), row in rows.items():
        for dtype in info.DTYPES:
            reason = backend.refusal(name, family, device, dtype)
            assert (str(dtype)[6:] in row["dtypes"]) == (reason is None)
            assert reason is None or reason in row["reasons"]
        assert row["dtypes"] or row["reasons"]
        assert name != "reference" or len(row["dtypes"]) == len(info.DTYPES)


def test_asks_for_features(monkeypatch):
    assert info.FEATURES.keys() == _ops.FAMILIES.keys()
    real = backend.refusal

    def refusal(name, family, device, dtype, **features):
        if name == "reference" and features.get("head_dim") == 512:
            return "too wide"
        return real(name, family, device, dtype, **features)

    monkeypatch.setattr(backend, "refusal", refusal)
    collected = info.collect()
    refused = [row for row in collected["availability"] if "too wide" in row["refused"].values()]
    assert [(r["family"], r["device"], r["backend"]) for r in refused] == [
        ("attention", "cpu", "reference"), ("attention", "cuda", "reference"),
        ("varlen_attention", "cpu", "reference"), ("varlen_attention", "cuda", "reference"),
    ]  # fmt: skip
    assert "head dimension 512: too wide" in info.render(collected)


def test_features_are_those_that_the_functions_name(monkeypatch):
    """A name that no function passes would ask about nothing."""
    asked = {}

    def resolve(family, tensor, only_plain=None, **features):
        asked[family] = set(features)

    monkeypatch.setattr(backend, "resolve", resolve)
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    functional.linear_act(x, x)
    functional.dropout(x)
    functional.cross_entropy(x, y, z_loss=0.1)  # auto leaves the plain one to torch
    functional.linear_cross_entropy(x, x, y)
    functional.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True)
    functional.varlen_attention(*[x[:, None]] * 3, *[torch.tensor([0, 4])] * 2, 4, 4)
    assert asked.keys() == _ops.FAMILIES.keys()
    for family, features in info.FEATURES.items():
        assert {name for probe in features.values() for name in probe} <= asked[family]


def test_says_what_was_built():
    build = info.collect()["build"]
    assert build["extension"] is (_ops.NATIVE_MISSING is None)
    if build["extension"]:
        assert build["cpu_kernels"] in ("AVX2", "AVX512", "none")
        assert build["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    else:
        assert build["reason"]


def test_says_which_cuda_kernel_serves_a_call(monkeypatch, tmp_path):
    library = host_library(tmp_path, "paths")
    rules = {}
    for family in ("attention", "linear_act", "linear_cross_entropy"):
        rule = getattr(library, family)
        rule.restype = ctypes.c_char_p
        rules[family] = rule().decode()
    for family in ("linear_act", "linear_cross_entropy"):
        assert re.fullmatch(r"sm90: compute capability 9, .*; cublas", rules[family])
    build = {"extension": True, "cuda": "13.0"}
    monkeypatch.setattr(info, "_build", lambda: {**build, "cuda_paths": rules})
    collected = info.collect()
    assert collected["build"] == build and collected["cuda_paths"] == rules
    text = info.render(collected)
    assert all(rule in " ".join(text.split()) for rule in rules.values())
    assert max(map(len, text.splitlines())) <= 140


def test_shows_the_backend_in_use():
    with use_backend("reference"):
        assert info.collect()["settings"]["backend"] == "reference"


def test_text_lists_reasons(capsys):
    info.main([])
    text = capsys.readouterr().out
    for word in ("versions", "build", "settings", "devices", "what serves a call", *_ops.FAMILIES):
        assert word in text
    rows = info.collect()["availability"]
    reasons = {reason for row in rows for reason in (*row["reasons"], *row["refused"].values())}
    assert all(reason in text for reason in reasons)
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("settings", [{}, {"FASTNN_DISABLE": "1"}])
def test_program_prints_json(settings):
    root = str(Path(info.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTNN_")}
    environment |= {"PYTHONPATH": root, **settings}
    done = subprocess.run(
        [sys.executable, "-m", "fastnn.info", "--json"], env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    shown = json.loads(done.stdout)["settings"]
    assert shown["backend"] == ("reference" if settings else "auto")
    assert {k: v for k, v in shown.items() if k != "backend"} == settings
