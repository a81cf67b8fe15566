"""SmolLM2-135M (Llama, 9 query heads on 3 key heads) answers a question, stock and swapped.

    python -m examples.smollm2 [--quick] [--stock | --swapped | --both] [--dtype bf16]

Nothing is trained: greedy decoding with a KV cache has to give the same tokens, and the logits of
the whole text the same numbers but for rounding. `swap_` serves the attention and the gated
feed-forward; the rest of the time goes into reading the weights. It takes about two minutes on two
cores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine
from examples._data import Unavailable
from examples._pictures import draw_text
from examples._run import KINDS, Example, main, relative_gap
from examples._text_data import huggingface, smollm2
from fastnn import swap_, unswap_, use_backend

QUESTION = "How does a steam engine work? Explain it to a curious child, step by step."
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class SmolLM2:
    """What the command line and the report want to know of it."""

    name = "smollm2"
    title = "SmolLM2-135M: greedy decoding"
    tokens, quick_tokens = 200, 32
    rounds = 3


def load():
    """(tokenizer, model) in float32; the 4-bit weights are widened once."""
    library, file = huggingface(), smollm2()
    # Newer versions read the file themselves, and would compute in 4 bits where they can.
    itself = hasattr(library, "GgufConfig")
    needed = ["accelerate"] if itself else ["accelerate", "gguf"]
    missing = " ".join(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise Unavailable(f"to read a GGUF file transformers needs more: pip install {missing}")
    options = {"quantization_config": library.GgufConfig(dequantize=True)} if itself else {}
    tokenizer = library.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = library.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **options
    )
    return tokenizer, model.eval()


@contextlib.contextmanager
def layers(model: nn.Module, kind: str, dtype: str = "fp32", backend: str = "auto"):
    """The model with stock layers, or with fastnn's, within the block."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    report = swap_(model) if kind == "swapped" else None
    try:
        with use_backend(backend), autocast, torch.no_grad():
            yield report
    finally:
        if kind == "swapped":
            unswap_(model)


def generate(model: nn.Module, prompt: Tensor, tokens: int, **options) -> Tensor:
    """So many tokens after the prompt, the likeliest each time; none ends the text."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return out[:, prompt.shape[1] :]


def compare(
    model: nn.Module, prompt: Tensor, tokens: int, rounds: int, kinds=KINDS, dtype="fp32",
    backend="auto",
) -> tuple[dict, dict[str, Tensor]]:  # fmt: skip
    """The kinds take turns; what `examples._run.run` returns about runs, and their tokens."""
    texts, seconds, logits, report = {}, {kind: [] for kind in kinds}, {}, None
    for number in range(rounds + 1):
        for kind in kinds:
            with layers(model, kind, dtype, backend) as swapped:
                started = time.perf_counter()
                # The first time, a few tokens bring in libraries and fill the allocator.
                texts[kind] = generate(model, prompt, tokens if number else 4)
                if number:
                    seconds[kind].append(time.perf_counter() - started)
                report = swapped or report
    # All kinds judge the same text.
    text = torch.cat([prompt, texts[kinds[0]]], 1)
    for kind in kinds:
        with layers(model, kind, dtype, backend):
            logits[kind] = model(text).logits[:, prompt.shape[1] - 1 : -1].float()
    runs = {}
    for kind in kinds:
        differs = (texts[kind] != texts[kinds[0]])[0].nonzero()
        loss = nn.functional.cross_entropy(logits[kind].flatten(0, 1), texts[kinds[0]].flatten())
        runs[kind] = {
            "losses": [loss.item()],
            "metrics": {
                "tokens_per_second": [tokens / taken for taken in seconds[kind]],
                "same_tokens": [int(differs[0]) if len(differs) else tokens],
            },
            "step_seconds": statistics.median(seconds[kind]) / tokens,
            "total_seconds": sum(seconds[kind]),
        }
    result = {
        "runs": runs, "speed_ratio": None, "memory_ratio": None, "curve_gap": None,
        "step_error": None, "swapped": None if report is None else str(report),
    }  # fmt: skip
    if len(kinds) == 2:
        stock, ours = (logits[kind] for kind in kinds)
        pairs = zip(*seconds.values(), strict=True)
        result["speed_ratio"] = statistics.median(a / b for a, b in pairs)
        result["curve_gap"] = relative_gap(*(run["losses"] for run in runs.values()))
        result["step_error"] = ((ours - stock).norm() / stock.norm()).item()
    return result, texts


def failures(result: dict, tokens: int) -> list[str]:
    found = []
    for kind, run in result["runs"].items():
        same = run["metrics"]["same_tokens"][-1]
        # With half precision two nearly equal logits may change places.
        if result["dtype"] == "fp32" and same < tokens:
            found.append(f"{kind}: token {same} is another one than with stock layers")
    error, allowed = result["step_error"], Example.step_tolerance[result["dtype"]]
    if error is not None and not error <= allowed:
        found.append(f"the logits' relative error {error:.1e} is above {allowed:.0e}")
    return found


def run(
    example, out_dir, *, quick=False, which="both", epochs=None, dtype="fp32", backend=None,
    memory=False,
) -> dict:  # fmt: skip
    """As `examples._run.run`; an epoch is a round of generation, memory is not measured."""
    tokenizer, model = load()
    if dtype == "bf16":
        model.to(torch.bfloat16)
    tokens = example.quick_tokens if quick else example.tokens
    rounds = epochs or example.rounds
    kinds = KINDS if which == "both" else (which,)
    prompt = tokenizer(CHAT.format(QUESTION), return_tensors="pt")["input_ids"]
    compared, texts = compare(model, prompt, tokens, rounds, kinds, dtype, backend or "auto")
    result = {
        "name": example.name, "title": example.title, "quick": quick, "dtype": dtype,
        "machine": machine.describe(torch.device("cpu")), "epochs": rounds, **compared,
        "pictures": [f"{example.name}_text.png"],
    }  # fmt: skip
    result["failures"] = failures(result, tokens)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rates = ", ".join(
        f"{kind} {1 / taken['step_seconds']:.1f} tokens/s"
        for kind, taken in result["runs"].items()
    )  # fmt: skip
    draw_text(
        out / f"{example.name}_text.png", f"{example.title}, {rates}",
        f"{QUESTION}\n\n{tokenizer.decode(texts[kinds[-1]][0])}",
    )  # fmt: skip
    (out / f"{example.name}.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    raise SystemExit(main(SmolLM2, run=run))
