"""Topics of Reuters news by a Transformer encoder: `python -m examples.text_classifier [--help]`.

Six pre-norm layers of nn.TransformerEncoder, d = 512, 8 heads, dropout 0.1, on words; the mean over
a text's words is classified. R8 has 8 topics, R52 has 52. With --quick the texts are few and short.

The stock encoder gets the texts of a batch padded to the longest. Once swapped it gets them packed,
one behind the other, as a jagged nested tensor: no layer then works on padding.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged

from examples._data import Documents, reuters
from examples._pictures import draw_attention, draw_confusion
from examples._run import SEED, Example, main
from fastnn import TransformerEncoderLayer

PADDING, UNKNOWN = 0, 1


class Texts(NamedTuple):
    """Documents as numbers of words and classes."""

    train: list[Tensor]
    train_y: Tensor
    test: list[Tensor]
    test_y: Tensor
    words: list[str]
    classes: list[str]


def encode(documents: Documents, length: int) -> Texts:
    """The first `length` words of each text, those seen in one training text only as UNKNOWN."""
    seen = Counter(word for _, text in documents.train for word in set(text))
    words = ["(padding)", "(unknown)", *(word for word, count in seen.items() if count > 1)]
    number = {word: index for index, word in enumerate(words)}
    classes = [label for label, _ in Counter(label for label, _ in documents.train).most_common()]

    def texts(part):
        return [
            torch.tensor([number.get(word, UNKNOWN) for word in text[:length]]) for _, text in part
        ]

    def labels(part):
        return torch.tensor([classes.index(label) for label, _ in part])

    train, test = documents
    return Texts(texts(train), labels(train), texts(test), labels(test), words, classes)


def padded(texts: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)


def buckets(texts: list[Tensor], size: int, random: torch.Generator) -> list[Tensor]:
    """Indices of `size` texts of about the same length each, in random order."""
    place = torch.randperm(len(texts), generator=random)
    lengths = torch.tensor([len(text) for text in texts])
    groups = place[lengths[place].argsort(stable=True)].split(size)
    return [groups[index] for index in torch.randperm(len(groups), generator=random)]


class Classifier(nn.Module):
    """Numbers of words (N, L) and classes (N,) to the loss; `logits` to (N, classes)."""

    def __init__(self, words: int, classes: int, length: int, width: int = 512, layers: int = 6):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=PADDING)
        self.places = nn.Embedding(length, width)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)
        self.criterion = nn.CrossEntropyLoss()
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=width**-0.5)
        for parameter in self.encoder.parameters():  # nn.TransformerEncoder copies its first layer
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.words(ids) + self.places.weight[: ids.shape[1]])

    def padded_sums(self, ids: Tensor, there: Tensor) -> Tensor:
        """What the encoder makes of the words, summed over each text's: (N, width)."""
        x = self.encoder(self.embed(ids), src_key_padding_mask=~there)
        return x.masked_fill(~there.unsqueeze(-1), 0.0).sum(1)

    def packed_sums(self, ids: Tensor, there: Tensor) -> Tensor:
        """The same, of the words alone."""
        text, place = there.nonzero(as_tuple=True)
        x = self.dropout(self.words(ids[there]) + self.places(place))
        starts = F.pad(there.sum(1).cumsum(0), (1, 0))
        packed = nested_tensor_from_jagged(x, starts, max_seqlen=ids.shape[1])
        x = self.encoder(packed).values()
        return F.one_hot(text, len(ids)).T.to(x.dtype) @ x

    def logits(self, ids: Tensor) -> Tensor:
        there = ids != PADDING
        packs = all(isinstance(layer, TransformerEncoderLayer) for layer in self.encoder.layers)
        sums = self.packed_sums(ids, there) if packs else self.padded_sums(ids, there)
        return self.head(sums / there.sum(1, keepdim=True))

    def forward(self, ids: Tensor, classes: Tensor) -> Tensor:
        return self.criterion(self.logits(ids), classes)

    def attention(self, ids: Tensor) -> Tensor:
        """How the words (L,) of one text attend to each other in the last layer, mean of heads."""
        x = self.embed(ids.unsqueeze(0))
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        last = self.encoder.layers[-1]
        x = last.norm1(x)
        return last.self_attn(x, x, x, need_weights=True)[1][0]


class R8(Example):
    name = "text_r8"
    title = "Reuters R8, Transformer encoder of 6 layers, d = 512"
    collection = "r8"
    epochs, quick_epochs = 4, 1
    goals = {"accuracy": 0.95}
    quick_goals = {"accuracy": 0.6}
    # Stock and swapped layers drop other elements.
    curve_tolerance = 0.1
    clip = 1.0
    batch, length = 32, 256
    learning_rate = 4e-4

    def load(self, quick):
        if not quick:
            return encode(reuters(self.collection), self.length)
        self.batch, self.length = 16, 32
        data = encode(reuters(self.collection), self.length)
        return data._replace(
            train=data.train[:480], train_y=data.train_y[:480],
            test=data.test[:160], test_y=data.test_y[:160],
        )  # fmt: skip

    def model(self, data: Texts):
        return Classifier(len(data.words), len(data.classes), self.length)

    def batches(self, data: Texts, epoch: int):
        random = torch.Generator().manual_seed(SEED + epoch)
        for chosen in buckets(data.train, self.batch, random):
            yield padded([data.train[index] for index in chosen]), data.train_y[chosen]

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), self.learning_rate, fused=True)

    def rate(self, done):
        """Warm-up over a tenth of the training, then down to zero."""
        return min(10 * done, (1 - done) / 0.9)

    def predicted(self, model, data: Texts) -> Tensor:
        found = torch.empty_like(data.test_y)
        for chosen in buckets(data.test, 64, torch.Generator().manual_seed(SEED)):
            found[chosen] = model.logits(padded([data.test[index] for index in chosen])).argmax(-1)
        return found

    def metrics(self, model, data: Texts):
        right = self.predicted(model, data) == data.test_y
        return {"accuracy": right.float().mean().item()}

    def draw(self, folder: Path, model, data: Texts):
        confusion, attention = f"{self.name}_confusion.png", f"{self.name}_attention.png"
        predicted = self.predicted(model, data)
        draw_confusion(folder / confusion, self.title, data.test_y, predicted, data.classes)
        text = next(text for text in data.test if 20 <= len(text) <= 40)
        words = [data.words[index] for index in text]
        weights = model.attention(text)
        draw_attention(folder / attention, "attention of the last layer", weights, words, words)
        return [confusion, attention]


class R52(R8):
    name = "text_r52"
    title = "Reuters R52, Transformer encoder of 6 layers, d = 512"
    collection = "r52"
    goals = {"accuracy": 0.90}
    quick_goals = {"accuracy": 0.4}


if __name__ == "__main__":
    raise SystemExit(main(R8, R52))
