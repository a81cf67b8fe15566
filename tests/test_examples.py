import json

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the example draws with matplotlib")

from examples import digits_mlp  # noqa: E402
from examples._data import digits  # noqa: E402


def test_digits_split():
    data = digits()
    assert len(data.train_x) + len(data.test_x) == 1797 and len(data.test_x) == 359
    assert data.train_x.shape[1] == 64 and data.train_x.dtype == torch.float32
    assert data.train_x.min() == 0.0 and data.train_x.max() == 1.0
    assert set(data.test_y.tolist()) == set(range(10))


def test_digits_mlp(tmp_path):
    result = digits_mlp.run(tmp_path, quick=True)
    assert not digits_mlp.failures(result)
    assert set(result["accuracy"]) == {"stock", "swapped"}
    assert len(result["losses"]["swapped"]) == digits_mlp.QUICK_EPOCHS
    assert json.loads((tmp_path / "digits.json").read_text()) == result
    for name in ("digits_grid.png", "digits_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_digits_program_reports_failure(tmp_path, capsys):
    """One epoch is too few for the accuracy, and the program says so in its exit status."""
    assert digits_mlp.main(["--swapped", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED: swapped: test accuracy" in capsys.readouterr().out


def test_a_wrong_gradient_is_noticed():
    """The tolerance is narrow enough to see gradients that are wrong by 1 %."""
    data = digits()
    curves = []
    for error in (0.0, 0.01):
        model, criterion = digits_mlp.build()
        noise = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.register_hook(
                lambda g, error=error, noise=noise: (
                    g + error * g * torch.randn(g.shape, generator=noise)
                )
            )
        curves.append(list(digits_mlp.train(model, criterion, data, 3)))
    assert digits_mlp.relative_gap(*curves) > digits_mlp.TOLERANCE
