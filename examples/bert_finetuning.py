"""Spam or not: MiniLM (BERT, 6 layers, d = 384) fine-tuned on e-mails of up to 256 tokens.

    python -m examples.bert_finetuning [--quick] [--stock | --swapped | --both] [--dtype bf16]

A user's own module around a model of transformers: the mean of BERT's last hidden states, dropout
0.1, a linear layer. `swap_` changes the attention, the feed-forward's first layer with its GELU,
the dropout and residual sums, and the loss. What it has to beat is a logistic regression on the
same means of the model as it came. All of it takes about an hour on two cores.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from examples._run import SEED, Example, main
from examples._text_data import emails, huggingface, minilm, padded, shuffled

PAD, CUT = 0, 256  # the length that the model was made for


class MeanClassifier(nn.Module):
    """BERT, the mean over a text's tokens, dropout, a linear layer and softmax cross-entropy."""

    def __init__(self, encoder: nn.Module, classes: int = 2):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        self.criterion = nn.CrossEntropyLoss()

    def pooled(self, ids: Tensor) -> Tensor:
        mask = ids != PAD
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.head(self.dropout(self.pooled(ids))), labels)


class Mails:
    """Token ids and labels, split into training and test."""

    def __init__(self, folder: Path, texts: list[tuple[str, int]], cut: int):
        self.folder = folder
        tokenizer = huggingface().AutoTokenizer.from_pretrained(folder)
        ids = tokenizer([text for text, _ in texts], truncation=True, max_length=cut)["input_ids"]
        rows = list(zip(ids, [label for _, label in texts], strict=True))
        test = len(rows) // 5
        self.test, self.train = rows[:test], rows[test:]

    def encoder(self) -> nn.Module:
        kind = huggingface().AutoModel
        # Without the part that makes one vector of the first token.
        return kind.from_pretrained(self.folder, add_pooling_layer=False, dtype=torch.float32)

    @functools.cached_property
    def frozen(self) -> tuple[float, Tensor]:
        """The baseline: test accuracy of a logistic regression on the model's means as it came,
        and those of the test texts."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = MeanClassifier(self.encoder()).eval()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            train, test = (pool(model, rows) for rows in (self.train, self.test))
        baseline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        baseline.fit(train, labels_of(self.train))
        return float(baseline.score(test, labels_of(self.test))), test


def labels_of(rows) -> Tensor:
    return torch.tensor([label for _, label in rows])


def pool(model: MeanClassifier, rows) -> Tensor:
    """The means of texts, made in batches of like length; in the order of `rows`."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    means = [
        model.pooled(padded([rows[index][0] for index in order[start : start + 32]], PAD)).float()
        for start in range(0, len(rows), 32)
    ]
    result = torch.empty(len(rows), means[0].shape[1])
    result[order] = torch.cat(means)
    return result


class BertFinetuning(Example):
    name = "bert_finetuning"
    title = "Spam or not: MiniLM BERT fine-tuned on e-mails"
    # Half of the training texts each.
    epochs, quick_epochs = 4, 3
    batch = 16
    falling = ("test_loss",)
    # Of dropout's masks: three quick runs with stock layers and other seeds are up to 7e-3 apart in
    # the first two epochs; stock and swapped 6e-3, and 3.8e-2 in the third, whose loss falls fast.
    curve_tolerance = 0.1

    def load(self, quick):
        texts = emails(400 if quick else None)
        return Mails(minilm(), list(shuffled(texts, SEED)), 64 if quick else CUT)

    def model(self, data: Mails):
        return MeanClassifier(data.encoder())

    def batches(self, data: Mails, epoch):
        rows = list(shuffled(data.train, SEED + epoch // 2))
        half = len(rows) // 2
        rows = rows[half:] if epoch % 2 else rows[:half]
        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            yield padded([ids for ids, _ in some], PAD), labels_of(some)

    def optimizer(self, model):
        # The new layer starts from nothing and learns faster.
        return torch.optim.Adam([
            {"params": model.encoder.parameters(), "lr": 1e-5},
            {"params": model.head.parameters(), "lr": 5e-3},
        ])  # fmt: skip

    def metrics(self, model, data: Mails):
        logits = model.head(pool(model, data.test).to(model.head.weight.dtype)).float()
        labels = labels_of(data.test)
        return {
            "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
            "test_loss": nn.functional.cross_entropy(logits, labels).item(),
            "frozen_accuracy": data.frozen[0],
        }

    def failures(self, result):
        found = super().failures(result)
        for kind, run in result["runs"].items():
            accuracy, frozen = (run["metrics"][m][-1] for m in ("accuracy", "frozen_accuracy"))
            if not result["quick"] and not accuracy > frozen:
                found.append(
                    f"{kind}: accuracy {accuracy:.4f} is not above that of the frozen features,"
                    f" {frozen:.4f}"
                )
        return found

    def draw(self, folder, model, data: Mails):
        """The test texts' means on their two widest axes, before and after."""
        from matplotlib.figure import Figure

        labels = labels_of(data.test)
        means = pool(model, data.test)
        wrong = model.head(means.to(model.head.weight.dtype)).argmax(-1) != labels
        figure = Figure(figsize=(11, 5), layout="constrained")
        titles = (
            f"as it came: {data.frozen[0]:.1%} by logistic regression",
            f"fine-tuned: {1 - wrong.float().mean().item():.1%}",
        )
        for axis, title, x in zip(
            figure.subplots(1, 2), titles, (data.frozen[1], means), strict=True
        ):
            centred = x - x.mean(0)
            places = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
            for label, name in enumerate(("no spam", "spam")):
                axis.scatter(*places[labels == label].T, s=8, alpha=0.5, label=name)
            axis.set(title=title, xlabel="first axis", ylabel="second axis")
        axis.scatter(*places[wrong].T, s=40, facecolors="none", edgecolors="red", label="wrong")
        axis.legend()
        figure.suptitle("test e-mails: mean of the last hidden states")
        picture = f"{self.name}_features.png"
        figure.savefig(folder / picture, dpi=90)
        return [picture]


if __name__ == "__main__":
    raise SystemExit(main(BertFinetuning))
