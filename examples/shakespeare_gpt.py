"""A GPT-2 with 16384 sub-words, from nothing, on Shakespeare; --quick: on Python's own reference.

    python -m examples.shakespeare_gpt [--quick] [--stock | --swapped | --both] [--dtype bf16]

What a small model with many words spends its memory on are the logits, here 134 MB of them, which
transformers holds more than once. `swap_(model, lm_loss=True)` makes the loss without them. All of
it takes about half an hour on two cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples._pictures import draw_text
from examples._run import SEED, Example, main
from examples._text_data import huggingface, plays, python_topics

VOCABULARY, LENGTH = 16384, 256


class Texts(NamedTuple):
    """Token ids of all training texts, and of those held out, one after another."""

    train: Tensor
    test: Tensor
    tokenizer: object
    steps: int  # an epoch


def learn_tokenizer(texts: list[str], vocabulary: int = VOCABULARY):
    """Byte-pair encoding; where the texts hold fewer pairs than asked for, fewer tokens."""
    huggingface()  # tokenizers comes with it
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class LanguageModel(nn.Module):
    """GPT2LMHeadModel, whose loss is the output."""

    def __init__(self, **sizes):
        super().__init__()
        library = huggingface()
        # Without dropout the curves of stock and swapped layers can be compared closely.
        config = library.GPT2Config(
            bos_token_id=0, eos_token_id=0, use_cache=False,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes,
        )  # fmt: skip
        self.gpt = library.GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(input_ids=ids, labels=ids).loss


class Shakespeare(Example):
    name = "shakespeare_gpt"
    title = "GPT-2 with 16384 sub-words on Shakespeare"
    epochs, quick_epochs = 10, 2
    batch = 8
    falling = ("validation_loss",)
    clip = 1.0
    # Rounding alone, but through hundreds of steps of Adam.
    curve_tolerance = 1e-3
    swap_options = {"lm_loss": True}
    sizes = {
        "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 256, "n_layer": 4, "n_head": 4,
    }  # fmt: skip

    def load(self, quick):
        texts = python_topics() if quick else plays()
        train = [text for index, text in enumerate(texts) if index % 20 != 10]
        tokenizer = learn_tokenizer(train, self.sizes["vocab_size"])
        joined = [
            [token for encoded in tokenizer.encode_batch(some) for token in [*encoded.ids, 0]]
            for some in (train, texts[10::20])
        ]
        return Texts(*map(torch.tensor, joined), tokenizer, 10 if quick else 120)

    def model(self, data):
        return LanguageModel(**self.sizes)

    def batches(self, data: Texts, epoch):
        """Passages that begin anywhere."""
        chance = torch.Generator().manual_seed(SEED + epoch)
        length = self.sizes["n_positions"]
        for _ in range(data.steps):
            starts = torch.randint(len(data.train) - length, (self.batch,), generator=chance)
            yield (torch.stack([data.train[start : start + length] for start in starts]),)

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def rate(self, done):
        return min(1.0, 0.05 + done * 20) * (1.0 - 0.9 * done)

    def metrics(self, model, data: Texts):
        """The loss on the first passages held out."""
        length = self.sizes["n_positions"]
        passages = data.test[: len(data.test) // length * length].view(-1, length)[:32]
        losses = [model(some).item() * len(some) for some in passages.split(self.batch)]
        return {"validation_loss": sum(losses) / len(passages)}

    def logits_bytes(self) -> int:
        """What the logits of a batch take in float32."""
        return 4 * self.batch * self.sizes["n_positions"] * self.sizes["vocab_size"]

    def failures(self, result):
        found = super().failures(result)
        peaks = [run["peak_bytes"] for run in result["runs"].values() if "peak_bytes" in run]
        if len(peaks) == 2 and not peaks[0] - peaks[1] > self.logits_bytes():
            found.append(
                f"the step's peak of {peaks[0] / 2**20:.0f} MB fell to {peaks[1] / 2**20:.0f} MB:"
                f" by less than the logits' {self.logits_bytes() / 2**20:.0f} MB"
            )
        return found

    def draw(self, folder, model, data: Texts):
        begin = self.sizes["n_positions"] // 8
        length = min(200, self.sizes["n_positions"] - begin)
        start = data.test[:begin].unsqueeze(0)
        torch.manual_seed(SEED)
        out = model.gpt.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, do_sample=True,
            top_k=50, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        parts = out[0].split([begin, length])
        before, after = (data.tokenizer.decode(ids.tolist()) for ids in parts)
        picture = f"{self.name}_text.png"
        draw_text(folder / picture, self.title, f"{before} \u2503{after}")
        return [picture]


if __name__ == "__main__":
    raise SystemExit(main(Shakespeare))
