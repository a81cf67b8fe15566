"""From spelling to phonemes: an encoder-decoder Transformer whose decoder attends across.

    python -m examples.phonemes [--quick] [--stock | --swapped | --both] [--dtype bf16]

Letters in, phonemes out: two stacks of torch.nn's Transformer layers, d = 128, 3 layers each,
dropout 0.1; the cross-attention has other lengths for queries and keys, and padded keys. Part of
the pronouncing dictionary's words are held out. All of it takes about half an hour on two cores.
"""

from __future__ import annotations

import string
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples._pictures import draw_attention, draw_text
from examples._run import SEED, Example, main
from examples._text_data import padded, pronunciations, shuffled

LETTERS = " " + string.ascii_lowercase  # by index; 0 is padding
PAD, BEGIN, END = 0, 1, 2  # of the phonemes; their names follow
LONGEST = 40


class Words(NamedTuple):
    """Letters and phonemes as ids, and the phonemes' names."""

    train: list[tuple[list[int], list[int]]]
    test: list[tuple[list[int], list[int]]]
    names: list[str]


class Speller(nn.Module):
    """Letters (N, S) to phonemes (N, T): embeddings with learned positions, encoder, decoder."""

    def __init__(self, phonemes: int, width=128, heads=4, layers=3, rate=0.1):
        super().__init__()
        options = {"dropout": rate, "batch_first": True}
        self.letters = nn.Embedding(len(LETTERS), width, padding_idx=PAD)
        self.phonemes = nn.Embedding(phonemes, width, padding_idx=PAD)
        self.places = nn.Embedding(LONGEST, width)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **options),
            layers, enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, 4 * width, **options), layers
        )
        self.head = nn.Linear(width, phonemes)
        self.criterion = nn.CrossEntropyLoss(ignore_index=PAD)

    def embedded(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        return table(ids) + self.places.weight[: ids.shape[1]]

    def encode(self, letters: Tensor) -> Tensor:
        return self.encoder(
            self.embedded(self.letters, letters), src_key_padding_mask=letters == PAD
        )

    def decode(self, phonemes: Tensor, memory: Tensor, letters: Tensor) -> Tensor:
        """Logits of what follows each phoneme."""
        # What follows a word is hidden by the causal mask; its own padding counts nowhere.
        causal = nn.Transformer.generate_square_subsequent_mask(
            phonemes.shape[1], dtype=memory.dtype
        )
        return self.head(self.decoder(
            self.embedded(self.phonemes, phonemes), memory, tgt_mask=causal, tgt_is_causal=True,
            memory_key_padding_mask=letters == PAD,
        ))  # fmt: skip

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        logits = self.decode(phonemes[:, :-1], self.encode(letters), letters)
        return self.criterion(logits.flatten(0, 1), phonemes[:, 1:].flatten())

    def spell(self, letters: Tensor) -> Tensor:
        """The likeliest phoneme each time, until all words have ended."""
        memory = self.encode(letters)
        found = torch.full((len(letters), 1), BEGIN)
        while found.shape[1] < LONGEST and not (found == END).any(1).all():
            following = self.decode(found, memory, letters)[:, -1].argmax(-1, keepdim=True)
            found = torch.cat([found, following], 1)
        return found


def letter_ids(word: str) -> list[int]:
    return [LETTERS.index(letter) for letter in word]


def until_end(phonemes: list[int]) -> list[int]:
    """Without the beginning, the end and what follows it."""
    return phonemes[1 : phonemes.index(END) if END in phonemes else None]


def edits(a: list[int], b: list[int]) -> int:
    """The least number of insertions, deletions and replacements from one list to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


class Phonemes(Example):
    name = "phonemes"
    title = "Spelling to phonemes: encoder-decoder Transformer"
    epochs, quick_epochs = 5, 2
    batch = 256
    falling = ("validation_loss",)
    clip = 1.0
    # Of dropout's masks: three quick runs with stock layers and other seeds are up to 3.6e-3 apart.
    curve_tolerance = 1.5e-2

    def load(self, quick):
        words = [pair for pair in pronunciations() if max(map(len, pair)) < LONGEST - 1]
        names = ["", "<", ">", *sorted({name for _, phonemes in words for name in phonemes})]
        index = {name: place for place, name in enumerate(names)}
        rows = [
            (letter_ids(word), [BEGIN, *(index[name] for name in phonemes), END])
            for word, phonemes in shuffled(words, SEED)
        ]
        test, train = (500, 6000) if quick else (5000, len(rows))
        return Words(rows[test : test + train], rows[:test], names)

    def model(self, data: Words):
        return Speller(len(data.names))

    def batches(self, data: Words, epoch):
        rows = list(shuffled(data.train, SEED + epoch))
        for start in range(0, len(rows), self.batch):
            yield tensors(rows[start : start + self.batch])

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), 5e-4)

    def rate(self, done):
        return min(1.0, 0.05 + done * 20) * (1.0 - 0.9 * done)

    def metrics(self, model, data: Words):
        """Validation loss, and of greedy spelling wrong phonemes and wholly right words."""
        losses, wrong, right = [], 0, 0
        # 256 test words of like length at a time.
        rows = sorted(data.test, key=lambda row: len(row[0]))
        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            losses.append(model(*tensors(some)).item() * len(some))
        spelled = data.test[:300]
        for found, (_, wanted) in zip(
            model.spell(tensors(spelled)[0]).tolist(), spelled, strict=True
        ):
            wrong += edits(until_end(found), until_end(wanted))
            right += until_end(found) == until_end(wanted)
        return {
            "validation_loss": sum(losses) / len(rows),
            "phoneme_errors": wrong / sum(len(wanted) - 2 for _, wanted in spelled),
            "right_words": right / len(spelled),
        }

    def draw(self, folder, model, data: Words):
        """The last decoder layer's cross-attention for a long test word; and some words spelled."""
        word, _ = max(data.test[:200], key=lambda row: len(row[0]))
        letters = torch.tensor([word])
        found = model.spell(letters)
        pictures = [f"{self.name}_attention.png", f"{self.name}_words.png"]
        draw_attention(
            folder / pictures[0], "cross-attention, mean over heads",
            cross_attention(model, letters, found),
            [data.names[phoneme] for phoneme in found[0, 1:].tolist()],
            [LETTERS[letter] for letter in word],
        )  # fmt: skip
        samples, lines = data.test[:24], []
        for (word, wanted), row in zip(
            samples, model.spell(tensors(samples)[0]).tolist(), strict=True
        ):
            said = until_end(row)
            sign = " " if said == until_end(wanted) else "x"
            spelled = "".join(LETTERS[letter] for letter in word)
            lines.append(f"{sign} {spelled:20} {' '.join(data.names[p] for p in said)}")
        title = "test words; x: not as the dictionary has it"
        draw_text(folder / pictures[1], title, "\n".join(lines))
        return pictures


def tensors(rows) -> tuple[Tensor, Tensor]:
    return padded([letters for letters, _ in rows]), padded([phonemes for _, phonemes in rows])


def cross_attention(model: Speller, letters: Tensor, phonemes: Tensor) -> Tensor:
    """(T, S) probabilities of the last decoder layer, the heads' mean. A hook asks for them: a
    layer of fastnn calls a module with hooks as a module."""
    seen = []
    attention = model.decoder.layers[-1].multihead_attn
    hooks = (
        attention.register_forward_pre_hook(
            lambda module, args, options: (args, {**options, "need_weights": True}),
            with_kwargs=True,
        ),
        attention.register_forward_hook(lambda module, args, out: seen.append(out[1][0])),
    )
    try:
        model.decode(phonemes[:, :-1], model.encode(letters), letters)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


if __name__ == "__main__":
    raise SystemExit(main(Phonemes))
