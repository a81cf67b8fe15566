"""A small language model trained by several processes: its vocabulary and its sequences shared out.

    torchrun --nproc-per-node 2 -m examples.distributed [--quick] [--steps N]

Each process holds a part of every text and a part of the output layer's rows. Keys and values pass
around the ring of processes, and no logits are gathered. Every process also trains the same model
alone, with stock PyTorch; the program prints the differences, and fails where the loss does not
fall or the two trainings diverge. The words are those of Python's own language reference. Without
torchrun it starts two processes itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from fastnn.distributed import (
    context_parallel_attention,
    shard_sequence,
    unshard_sequence,
    vocab_parallel_linear_cross_entropy,
)
from fastnn.functional import linear_act

WIDTH, HEADS, LAYERS = 64, 4, 2
TEXTS, LENGTH = 4, 128
STEPS, QUICK_STEPS = 40, 8
RATE, MOMENTUM = 0.1, 0.9
# Of losses and parameters: 40 steps give 2e-6, gradients of the layers that are wrong by 1 % give
# 3e-2 within 8.
TOLERANCE = 2e-5


def words() -> tuple[Tensor, int]:
    """The language reference as (numbers of its words, size of the vocabulary)."""
    text = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)))
    vocabulary = {word: number for number, word in enumerate(sorted(set(text)))}
    return torch.tensor([vocabulary[word] for word in text]), len(vocabulary)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, attention: Callable, gelu_linear: Callable) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(gelu_linear(self.norm2(x), self.up.weight, self.up.bias))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, text: Tensor, places: Tensor, *kernels: Callable) -> Tensor:
        """The hidden states from which the head predicts the next words."""
        x = self.words(text) + self.places(places)
        for layer in self.layers:
            x = layer(x, *kernels)
        return self.norm(x)


def build(vocabulary: int, device: torch.device) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocabulary).to(device)


def loss_alone(model: LanguageModel, text: Tensor) -> Tensor:
    """Stock PyTorch, on one device."""
    places = torch.arange(LENGTH, device=text.device)

    def gelu_linear(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    logits = model.head(model(text, places, F.scaled_dot_product_attention, gelu_linear))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def loss_together(model: LanguageModel, text: Tensor) -> Tensor:
    """The same from this process's part of the sequence and of the head."""
    part = shard_sequence(text, 1)
    places = shard_sequence(torch.arange(LENGTH, device=text.device), 0)

    def gelu_linear(x, weight, bias):
        return linear_act(x, weight, bias, "gelu")

    hidden = unshard_sequence(model(part, places, context_parallel_attention, gelu_linear))
    return vocab_parallel_linear_cross_entropy(hidden, model.head.weight, text, shift=1)


def add_up_gradients(model: LanguageModel) -> None:
    """What all processes hold has had its gradient from each one's part of the sequence."""
    for parameter in model.parameters():
        if parameter is not model.head.weight:
            dist.all_reduce(parameter.grad)


def run(steps: int, device: torch.device) -> dict:
    """Trains twice; returns the losses of both and the largest differences, the same everywhere."""
    text, vocabulary = words()
    alone, together = build(vocabulary, device), build(vocabulary, device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    head = distribute_tensor(together.head.weight.detach(), mesh, [Shard(0)])
    together.head.weight = nn.Parameter(head)
    optimizers = [
        # Not by torch._foreach functions, which take no tensors of two kinds.
        torch.optim.SGD(model.parameters(), RATE, MOMENTUM, foreach=False)
        for model in (alone, together)
    ]
    losses = {"alone": [], "together": []}
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        first = torch.randint(len(text) - LENGTH, (TEXTS,), generator=order)
        batch = torch.stack([text[start : start + LENGTH] for start in first]).to(device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, shared = loss_alone(alone, batch), loss_together(together, batch)
        loss.backward()
        shared.backward()
        add_up_gradients(together)
        for optimizer in optimizers:
            optimizer.step()
        losses["alone"].append(loss.item())
        losses["together"].append(shared.item())
    together.head.weight = nn.Parameter(together.head.weight.detach().full_tensor())
    pairs = zip(alone.parameters(), together.parameters(), strict=True)
    differences = {
        "losses": max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True)),
        "parameters": max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs),
    }
    return {"vocabulary": vocabulary, "losses": losses, "differences": differences}


def failures(result: dict) -> list[str]:
    """What is wrong with a result, in words; empty when nothing is."""
    found = [
        f"the {what} differ by {difference:.1e} (relative), {TOLERANCE:.0e} is allowed"
        for what, difference in result["differences"].items()
        if not difference <= TOLERANCE
    ]
    for kind, losses in result["losses"].items():
        if not losses[-1] < losses[0]:
            found.append(f"the loss ({kind}) did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m examples.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    options = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:  # not under torchrun
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m".split()
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, *launcher, "examples.distributed", *given]
        return subprocess.run(command).returncode
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    try:
        result = run(options.steps or (QUICK_STEPS if options.quick else STEPS), device)
        wrong = failures(result)
        if dist.get_rank() == 0:
            report(result, wrong)
    finally:
        dist.destroy_process_group()
    return 1 if wrong else 0


def report(result: dict, wrong: list[str]) -> None:
    ranks = dist.get_world_size()
    print(f"{ranks} processes, {result['vocabulary']} words, {TEXTS} texts of {LENGTH} words")
    print("step   loss alone   together   difference")
    for step, (a, b) in enumerate(zip(*result["losses"].values(), strict=True), 1):
        print(f"{step:4}   {a:10.6f}   {b:8.6f}   {b - a:10.1e}")
    for what, difference in result["differences"].items():
        print(f"{what}: largest relative difference {difference:.1e}")
    for line in wrong:
        print(f"FAILED: {line}")


if __name__ == "__main__":
    raise SystemExit(main())
