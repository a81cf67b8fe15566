import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip(
    "transformers",
    minversion="5",
    reason="needs transformers 5: pip install 'fastnn[transformers]'",
)
import fastnn  # noqa: E402
from fastnn.integrations import transformers as integration  # noqa: E402

integration.register()
SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
# Name -> configuration, its options, model. Weights large enough for every part to matter.
MODELS = {
    "bert": ("BertConfig", {
        **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }, "BertForMaskedLM"),
    "gpt2": ("GPT2Config", {
        **SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
        "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    }, "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", DECODER, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", {**DECODER, "sliding_window": 4}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", DECODER, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**DECODER, "head_dim": 8}, "Qwen3ForCausalLM"),
    "t5": ("T5Config", {
        **SMALL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }, "T5ForConditionalGeneration"),
    "bart": ("BartConfig", {
        **SMALL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "init_std": 0.2, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }, "BartForConditionalGeneration"),
    "gemma2": ("Gemma2Config", {
        **DECODER, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.0,
    }, "Gemma2ForCausalLM"),
    "gpt_oss": ("GptOssConfig", {
        **DECODER, "head_dim": 8, "sliding_window": 4, "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }, "GptOssForCausalLM"),
}  # fmt: skip
ISSUE = ["bert", "gpt2", "llama", "t5", "bart"]
CAUSAL = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
SEQ2SEQ = ["t5", "bart"]


def build(kind, dtype=torch.float32, attention=None, **changes):
    torch.manual_seed(0)
    config, options, model = MODELS[kind]
    options = {**options, **changes}
    config = getattr(transformers, config)(**options, attn_implementation=attention)
    model = getattr(transformers, model)(config).to(dtype)
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the one that serves float64
    return model


def batch(kind, padding=None, seed=1):
    """Model inputs; the second of three texts is shorter where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (3, 9), generator=generator)
    inputs = {"input_ids": ids}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(6, None) if padding == "right" else slice(3)] = 0
        ids[mask == 0] = 0
        inputs["attention_mask"] = mask
    labels = ids.clone()
    if padding == "left":
        labels[1, 3] = 0  # would be predicted from padding
    if kind in SEQ2SEQ:
        labels = torch.randint(3, 97, (3, 7), generator=generator)
        labels[0, 5:] = 0
    inputs["labels"] = labels.masked_fill(labels == 0, -100)
    return inputs


def loss_of(kind, logits, labels):
    if kind not in [*SEQ2SEQ, "bert"]:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def step(model, inputs, loss=None):
    """Loss, logits and the gradients of all parameters."""
    model.zero_grad()
    out = model(**inputs)
    loss = out.loss if loss is None else loss(out.logits, inputs["labels"])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "logits": out.logits, **gradients}


def steps(model, inputs, loss=None):
    """`step` of several batches: one alone is one draw of the rounding errors."""
    return stacked([step(model, batch, loss) for batch in inputs])


def stacked(each):
    return {
        name: None if result is None else torch.stack([one[name] for one in each])
        for name, result in each[0].items()
    }


def oracle_steps(monkeypatch, kind, stock, inputs):
    """In float64 throughout: norms ask for torch.float32, losses for logits.float()."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        wide = copy.deepcopy(stock).double()
        return steps(wide, inputs, lambda logits, labels: loss_of(kind, logits, labels))


def assert_as_good(ours, stock, oracle):
    """The error of each result, a root mean square over all batches, is at most twice stock's.

    Not the largest error, as for one kernel: through a whole model a few of these small tensors'
    elements, and with T5 the kinks of its ReLU, decide it, and two runs of the same quality differ
    by factors. Over 32 batches the root mean squares of stock and of ours differ by up to 1.4.
    """
    assert list(ours) == list(oracle)
    for name, wanted in oracle.items():
        assert (wanted is None) == (ours[name] is None), name
        if wanted is None:
            continue
        assert ours[name].shape == wanted.shape and ours[name].dtype == stock[name].dtype, name
        error, allowed = (rms(result.double() - wanted) for result in (ours[name], stock[name]))
        allowed = 2 * allowed + EPSILON[ours[name].dtype] * rms(wanted)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def rms(x):
    return x.square().mean().sqrt().item()


def test_importing_registers_nothing():
    program = (
        "import sys, fastnn, fastnn.integrations.transformers as integration\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'fastnn' not in AttentionInterface().valid_keys()\n"
        "integration.register(), integration.register()\n"
        "assert 'fastnn' in AttentionInterface().valid_keys()\n"
        "assert 'fastnn' in AttentionMaskInterface().valid_keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_transformers_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5 or later.*fastnn\[transformers\]"):
        integration.register()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_attention_by_name(kind, padding, monkeypatch):
    """In float64 against transformers' own, so that only a bug differs."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    own = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    stock, ours = (build(kind, torch.float64, attention) for attention in (own, "fastnn"))
    assert ours.config._attn_implementation == "fastnn"
    inputs = batch(kind, padding)
    results = [step(model, inputs) for model in (ours, stock)]
    if own == "eager" and padding:
        # A query that sees no key gives 0 here, the mean of the values there; it is padding.
        for result in results:
            result["logits"] = result["logits"][inputs["attention_mask"] == 1]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def qkv(queries=5, keys=5, heads=4, kv_heads=2):
    torch.manual_seed(2)
    shapes = ((2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


class Caller(torch.nn.Module):
    num_key_value_groups = 2

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


BIAS = torch.randn(1, 4, 5, 7, dtype=torch.float64)
HIDDEN = torch.rand(2, 1, 5, 7) > 0.4


@pytest.mark.parametrize("options", [
    {}, {"is_causal": False}, {"scaling": 0.7}, {"position_bias": BIAS},
    {"position_bias": BIAS, "is_causal": False}, {"position_bias": BIAS, "attention_mask": HIDDEN},
    {"position_bias": BIAS, "attention_mask": torch.where(HIDDEN, 0.0, -1e4)},
    {"attention_mask": HIDDEN}, {"attention_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64)},
    {"queries": 1}, {"caller": Caller(False)}, {"caller": torch.nn.Module()},
    {"cache": None, "output_attentions": True},
])  # fmt: skip
def test_rules_are_those_of_sdpa(options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options = {"attention_mask": None, **options}
    module, inputs = options.pop("caller", Caller()), qkv(options.pop("queries", 5), 7)
    if not hasattr(module, "num_key_value_groups"):
        inputs = qkv(5, 7, kv_heads=4)
    ours, none = integration.attention_forward(module, *inputs, **options)
    stock, _ = sdpa_attention_forward(module, *inputs, **options)
    assert none is None and ours.is_contiguous()
    torch.testing.assert_close(ours, stock)


def test_sliding_window_without_a_mask():
    inputs = qkv(9, 9)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)
    expected = F.scaled_dot_product_attention(*inputs, seen, enable_gqa=True).transpose(1, 2)
    ours, _ = integration.attention_forward(Caller(), *inputs, None, sliding_window=3)
    torch.testing.assert_close(ours, expected)


def test_dropout_drops_in_training():
    query, key, _ = qkv(16, 64)
    ones = torch.ones_like(key)
    out, _ = integration.attention_forward(Caller(False), query, key, ones, None, dropout=0.5)
    assert abs(out[..., 0].mean() - 1) < 0.1 and out.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("kind", ISSUE)
def test_swapped_is_as_good_as_stock(kind, padding, dtype, monkeypatch):
    model, inputs = build(kind, dtype), [batch(kind, padding, seed) for seed in range(32)]
    oracle = oracle_steps(monkeypatch, kind, model, inputs)
    stock = steps(model, inputs)
    fastnn.swap_(model)
    assert_as_good(steps(model, inputs), stock, oracle)
    with torch.no_grad():
        logits = torch.stack([model.eval()(**one).logits for one in inputs])
    assert_as_good({"logits": logits}, stock, {"logits": oracle["logits"]})


@pytest.mark.parametrize("kind", MODELS)
def test_swapped_computes_the_same(kind, monkeypatch):
    """In float64, so that only a bug differs."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    model, inputs = build(kind, torch.float64), batch(kind, "right")
    stock = step(model, inputs)
    fastnn.swap_(model)
    torch.testing.assert_close(step(model, inputs), stock, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "t5", "bart"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_the_same_tokens(kind, use_cache):
    model, inputs = build(kind).eval(), batch(kind, "left")
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    tokens = model.generate(**inputs, **options)
    beams = model.generate(**inputs, **options, num_beams=2)
    fastnn.swap_(model)
    assert torch.equal(model.generate(**inputs, **options), tokens)
    assert torch.equal(model.generate(**inputs, **options, num_beams=2), beams)


def swapped_names(report):
    return {f"{row.name}: {row.source} -> {row.target}" for row in report.swapped}


def test_what_is_swapped():
    rows = {kind: swapped_names(fastnn.swap_(build(kind))) for kind in ISSUE}
    layer = "bert.encoder.layer.1"
    assert {
        ": BertForMaskedLM -> BertForMaskedLM",
        f"{layer}.intermediate.dense: Linear -> LinearAct",
        f"{layer}.attention.output: BertSelfOutput -> BertSelfOutput",
        f"{layer}.output: BertOutput -> BertOutput",
        f"{layer}.output.dropout: Dropout -> Dropout",
        "cls.predictions.transform.dense: Linear -> LinearAct",
    } <= rows["bert"]
    assert "transformer.h.1.mlp.c_fc: Conv1D -> Conv1D" in rows["gpt2"]
    assert "model.layers.1.mlp.gate_proj: Linear -> LinearAct" in rows["llama"]
    for stack, layer in (("encoder", "1"), ("decoder", "2")):
        dense = f"{stack}.block.1.layer.{layer}.DenseReluDense.wi: Linear -> LinearAct"
        assert {dense, f"{stack}: T5Stack -> T5Stack"} <= rows["t5"]
        assert f"model.{stack}.layers.1.fc1: Linear -> LinearAct" in rows["bart"]


def test_report_says_what_became_of_the_model():
    def row(model, **options):
        return next(row for row in fastnn.swap_(model, **options).rows if row.name == "")

    assert row(build("llama")).reason == "attention, was 'sdpa'; loss"
    assert row(build("t5"), lm_loss=True).reason == (
        "attention, was 'sdpa'; no loss without logits for this model"
    )
    assert row(build("t5")).reason == "attention, was 'sdpa'"
    assert "does not support 'sdpa'" in row(build("gemma2")).reason
    assert row(build("llama"), filter_fn=lambda module, name: name).target is None
    flash = build("llama")
    flash.config._attn_implementation_internal = "flex_attention"
    assert "it was chosen by name" in row(flash).reason
    loud = build("llama", attention="eager", output_attentions=True)
    assert "probabilities are asked for" in row(loud).reason


@pytest.mark.parametrize("kind", ISSUE)
def test_unswap_gives_the_stock_model_back(kind):
    def state(model):
        return [
            (module, type(module), set(module.__dict__),
             config and config._attn_implementation)
            for module in model.modules() for config in [getattr(module, "config", None)]
        ]  # fmt: skip

    model, inputs = build(kind), batch(kind, "right")
    before, stock = state(model), step(model, inputs)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    first = fastnn.swap_(model, lm_loss=True)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not fastnn.swap_(model, lm_loss=True).swapped
    undone = fastnn.unswap_(model)
    assert len(undone.rows) == len(first.swapped)
    assert state(model) == before
    again = step(model, inputs)
    assert all(torch.equal(again[name], stock[name]) for name in stock if stock[name] is not None)


@pytest.mark.parametrize("kind", ISSUE)
def test_checkpoints_and_copies(kind, tmp_path):
    stock = build(kind)
    swapped = build(kind)
    fastnn.swap_(swapped, lm_loss=True)
    inputs = batch(kind)
    del inputs["labels"]
    if kind in SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.mul_(1.1)
        expected = swapped.eval()(**inputs).logits
        stock.load_state_dict(swapped.state_dict())
        torch.testing.assert_close(stock.eval()(**inputs).logits, expected)
        swapped.save_pretrained(tmp_path)
        loaded = type(stock).from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == "sdpa" and type(loaded) is type(stock)
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        fresh = build(kind)
        fastnn.swap_(fresh)
        fresh.load_state_dict(stock.state_dict())
        torch.testing.assert_close(fresh.eval()(**inputs).logits, expected)
        copied = copy.deepcopy(swapped)
        assert torch.equal(copied(**inputs).logits, expected)
        fastnn.unswap_(copied)
        assert type(copied) is type(stock) and copied.config._attn_implementation == "sdpa"
        assert swapped.config._attn_implementation == "fastnn"


def test_pickles_load_in_another_process(tmp_path):
    model = build("gpt2").eval()
    fastnn.swap_(model, lm_loss=True)
    ids = batch("gpt2")["input_ids"]
    torch.save((model, ids, model(input_ids=ids).logits), tmp_path / "model.pt")
    program = (
        "import sys, torch, fastnn\n"
        "model, ids, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(input_ids=ids).logits, expected)\n"
        "assert model(input_ids=ids, labels=ids).logits is None\n"
        "fastnn.unswap_(model)\n"
        "torch.testing.assert_close(model(input_ids=ids).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_without_logits(kind, dtype, monkeypatch):
    model, inputs = build(kind, dtype), [batch(kind, "right", seed) for seed in range(32)]
    oracle = oracle_steps(monkeypatch, kind, model, inputs)
    stock = steps(model, inputs)
    report = fastnn.swap_(model, lm_loss=True)
    assert "loss without logits" in report.rows[0].reason
    out = model(**inputs[0])
    assert out.logits is None and out.loss.dtype == torch.float32
    for results in (oracle, stock):
        del results["logits"]

    ours = []
    for one in inputs:
        model.zero_grad()
        loss = model(**one).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        ours.append({"loss": loss.detach(), **gradients})
    assert_as_good(stacked(ours), stock, oracle)


def test_loss_options_and_outputs(monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    stock, model = build("llama", torch.float64).eval(), build("llama", torch.float64).eval()
    fastnn.swap_(model, lm_loss=True)
    inputs = batch("llama", "right")
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for options in (
        {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 7},
        {"shift_labels": shifted}, {"ignore_index": 5, "labels": inputs["labels"].clamp(min=5)},
        {"output_hidden_states": True},
    ):  # fmt: skip
        ours, theirs = model(**{**inputs, **options}), stock(**{**inputs, **options})
        assert ours.logits is None and ours.loss.dtype == theirs.loss.dtype
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
        assert (ours.hidden_states is None) == (theirs.hidden_states is None)
        assert ours.past_key_values.get_seq_length() == 9
    ids, labels = inputs["input_ids"], inputs["labels"]
    assert model(ids, None, None, None, None, labels).logits is None
    for options in ({}, {"labels": labels, "logits_to_keep": 9}):
        torch.testing.assert_close(model(ids, **options).logits, stock(ids, **options).logits)
    ours, theirs = (m(ids, labels=labels, return_dict=False) for m in (model, stock))
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[:2], theirs[:2])
    model.lm_head.register_forward_hook(lambda module, inputs, out: None)
    assert model(ids, labels=labels).logits is not None


def test_later_changes_are_respected():
    model = build("bert").eval()
    fastnn.swap_(model)
    seen = []
    layer = model.bert.encoder.layer[0]
    layer.output.dense.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model(**batch("bert"))
    assert len(seen) == 1
    model.set_attn_implementation("eager")
    fastnn.unswap_(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_of_the_users_own_is_kept(when):
    def loss_function(logits, labels, vocab_size, **options):
        return logits.sum() * 0.0 + 7.0

    model = build("llama").eval()
    if when == "after":
        fastnn.swap_(model, lm_loss=True)
    model.loss_function = loss_function
    report = fastnn.swap_(model, lm_loss=True)
    assert when == "after" or "no loss without logits" in str(report)
    assert model(**batch("llama")).loss == 7.0
    fastnn.unswap_(model)
    assert model.loss_function is loss_function and model(**batch("llama")).loss == 7.0


def test_frozen_and_tied_parameters():
    model = build("gpt2", tie_word_embeddings=True)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    fastnn.swap_(model, lm_loss=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(**batch("gpt2")).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is None
    assert model.transformer.h[0].mlp.c_fc.bias.grad is not None


def test_dropout_in_training():
    model = build("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    fastnn.swap_(model)
    inputs = batch("bert")
    first, second = model(**inputs), model(**inputs)
    assert not torch.equal(first.logits, second.logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


TEXTS = (5, 1, 9, 3)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("lm_loss", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_padding_free_batches(kind, use_cache, lm_loss, monkeypatch):
    """Loss and gradients of the texts one behind the other are those of each alone."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    model, calls = build(kind, torch.float64), []

    def counted(*arguments, **options):
        calls.append(options)
        return integration_varlen(*arguments, **options)

    integration_varlen = integration.varlen_attention
    monkeypatch.setattr(integration, "varlen_attention", counted)
    texts = [torch.randint(3, 97, (length,)) for length in TEXTS]
    total = 0.0
    for text in texts:
        if len(text) > 1:  # one word alone predicts none
            alone = model(input_ids=text[None], labels=text[None], use_cache=False)
            total += alone.loss * (len(text) - 1)
    wanted = total / (sum(TEXTS) - len(TEXTS))
    wanted = wanted, *torch.autograd.grad(wanted, list(model.parameters()))
    fastnn.swap_(model, lm_loss=lm_loss)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    loss = model(**collate([{"input_ids": text} for text in texts]), use_cache=use_cache).loss
    assert len(calls) == 2 and calls[0]["window"] == (3 if kind == "mistral" else -1, 0)
    got = loss, *torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("options", [
    {}, {"is_causal": False}, {"is_causal": False, "sliding_window": 3}, {"sliding_window": 3},
    {"scaling": 0.7, "softcap": 1.5}, {"s_aux": torch.randn(4, dtype=torch.float64)},
    {"attention_mask": torch.zeros(1, 1, 18, 18, dtype=torch.bool)},
])  # fmt: skip
def test_packed_sequences_follow_the_rules(options):
    """Those for one sequence; a mask beside them is not read."""
    inputs = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in qkv(9, 9)]
    packed = {
        "cu_seq_lens_q": starts(TEXTS), "cu_seq_lens_k": starts(TEXTS),
        "max_length_q": max(TEXTS), "max_length_k": max(TEXTS),
    }  # fmt: skip
    options = {"attention_mask": None, **options}
    out, none = integration.attention_forward(Caller(), *inputs, **options, **packed)
    assert none is None and out.is_contiguous()
    options["attention_mask"] = None
    if options.get("is_causal") is False and "sliding_window" in options:
        far = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 2
        options["attention_mask"] = ~far[None, None]
    alone = []
    for part in zip(*(x.split(TEXTS, 2) for x in inputs), strict=True):
        length = part[0].shape[2]
        mask = options["attention_mask"]
        mask = {"attention_mask": mask if mask is None else mask[..., :length, :length]}
        alone.append(integration.attention_forward(Caller(), *part, **{**options, **mask})[0])
    torch.testing.assert_close(out, torch.cat(alone, 1))
    with pytest.raises(NotImplementedError, match="position_bias must be None with cu_seq_lens_q"):
        integration.attention_forward(Caller(), *inputs, None, position_bias=BIAS, **packed)
