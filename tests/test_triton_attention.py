"""The Triton attention kernels, under the interpreter, against the reference in fp64."""

import math
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from conftest import assert_close_to_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from philox_oracle import dropout_mask

from fastnn import _ops, reference

pytestmark = pytest.mark.skipif(
    _ops.TRITON_MISSING is not None, reason=f"no Triton kernels: {_ops.TRITON_MISSING}"
)
SEED = (0x1234_5678_9ABC, 77)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1" else "cpu"


class Case:
    """The inputs of one call, and what each of three computations makes of them."""

    def __init__(
        self, seq_q=37, seq_k=45, *, batch=1, heads=2, heads_k=None, dim=16, value_dim=None,
        dtype=FP32, mask=None, mask_dtype=None, bottom_right=False, left=-1, right=-1,
        softcap=0.0, alibi=False, sinks=False, dropout_p=0.0, scale=None, grad_lse=True,
        layout="bhsd", spread=1.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seq_q * 1009 + seq_k * 31 + dim)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        def laid_out(tensor):
            if layout == "bshd":
                return tensor.transpose(1, 2).contiguous().transpose(1, 2)
            if layout == "columns":
                return tensor.transpose(2, 3).contiguous().transpose(2, 3)
            if layout == "offset":
                return torch.cat([tensor, tensor, tensor], -1)[..., 1 : 1 + tensor.size(-1)]
            return tensor

        heads_k = heads_k or heads
        value_dim = value_dim or dim
        self.query = laid_out((spread * normal(batch, heads, seq_q, dim)).to(dtype).to(DEVICE))
        self.key = laid_out(normal(batch, heads_k, seq_k, dim).to(dtype).to(DEVICE))
        self.value = laid_out(normal(batch, heads_k, seq_k, value_dim).to(dtype).to(DEVICE))
        self.grad_out = laid_out(normal(batch, heads, seq_q, value_dim).to(dtype).to(DEVICE))
        self.grad_lse = normal(batch, heads, seq_q).to(DEVICE) if grad_lse else None
        self.mask = mask
        if isinstance(mask, tuple):
            self.mask = normal(*mask).to(mask_dtype or dtype)
            if mask_dtype is torch.bool:
                self.mask = torch.rand(mask, generator=generator) < 0.6
        if self.mask is not None:
            self.mask = self.mask.to(DEVICE)
        self.alibi = torch.rand(heads, generator=generator).to(DEVICE) if alibi else None
        self.sinks = normal(heads).to(DEVICE) if sinks else None
        self.seed = torch.tensor(SEED, device=DEVICE)
        self.dropout_p, self.softcap = dropout_p, softcap
        self.scale = dim**-0.5 if scale is None else scale
        self.band = (bottom_right, left, right)
        self.keep = None
        if dropout_p:
            keep = dropout_mask(SEED, batch * heads * seq_q, seq_k, dropout_p)
            self.keep = torch.from_numpy(keep).view(batch, heads, seq_q, seq_k).to(DEVICE)
        self.mask_grad = self.mask is not None and self.mask.dtype.is_floating_point

    @property
    def output_mask(self):
        return [True, True, True, self.mask_grad, self.sinks is not None]

    def forward(self):
        return _ops.TRITON.attention_forward(
            self.query, self.key, self.value, self.mask, self.alibi, self.sinks, self.seed,
            self.dropout_p, self.scale, self.softcap, *self.band,
        )  # fmt: skip

    def backward(self, out, lse, output_mask=None):
        return _ops.TRITON.attention_backward(
            self.grad_out, self.grad_lse, self.query, self.key, self.value, self.mask, self.alibi,
            self.sinks, self.seed, out, lse, self.dropout_p, self.scale, self.softcap, *self.band,
            output_mask or self.output_mask,
        )  # fmt: skip

    def kernels(self):
        out, lse = self.forward()
        gradients = self.backward(out, lse)
        wanted = [g for g, want in zip(gradients, self.output_mask, strict=True) if want]
        return [out, lse, *wanted]

    def composed(self, dtype):
        """The same from the reference in `dtype`."""

        def cast(tensor):
            if tensor is None or not tensor.dtype.is_floating_point:
                return tensor
            return tensor.detach().to(dtype).requires_grad_()

        query, key, value, mask, alibi, sinks = (
            cast(t) for t in (self.query, self.key, self.value, self.mask, self.alibi, self.sinks)
        )
        bottom_right, left, right = self.band
        out, lse = reference.scaled_dot_product_attention(
            query, key, value, mask, self.dropout_p, False, self.scale, True,
            causal_alignment="bottom_right" if bottom_right else "top_left", window=(left, right),
            softcap=self.softcap or None, alibi_slopes=alibi, sinks=sinks, return_lse=True,
            keep=None if self.keep is None else self.keep.to(dtype),
        )  # fmt: skip
        inputs = [query, key, value]
        inputs += [mask] if self.mask_grad else []
        inputs += [sinks] if sinks is not None else []
        loss = (out * self.grad_out.to(dtype)).sum()
        if self.grad_lse is not None:
            seen = lse != -math.inf
            loss = loss + (lse.masked_fill(~seen, 0.0) * self.grad_lse.to(lse.dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def assert_as_good_as_torch(ours, same_dtype, oracle):
    for index, (got, plain, exact) in enumerate(zip(ours, same_dtype, oracle, strict=True)):
        # The composite casts a float32 mask, and so its gradient, to the queries' dtype.
        assert_close_to_oracle(got, plain.to(got.dtype), exact, what=f"result {index}")


def check(case):
    dtype = case.query.dtype
    assert_as_good_as_torch(case.kernels(), case.composed(dtype), case.composed(torch.float64))


def _rows_hidden():
    mask = torch.ones(37, 45, dtype=torch.bool)
    mask[::3] = False
    return mask


def _additive_with_hidden():
    mask = torch.randn(2, 37, 45, generator=torch.Generator().manual_seed(3))
    mask[:, :, ::4] = -math.inf
    mask[1, 5] = -math.inf
    return mask


CASES = {
    "ragged": dict(batch=2, dim=20, value_dim=12),
    "one_by_one": dict(seq_q=1, seq_k=1, dim=1),
    "one_query": dict(seq_q=1, seq_k=67, heads=4, heads_k=1, bottom_right=True, right=0),
    "aligned": dict(seq_q=64, seq_k=32, value_dim=32),
    "wide_heads": dict(seq_q=33, seq_k=17, heads=1, dim=130, value_dim=256),
    "causal": dict(seq_q=67, seq_k=67, right=0),
    "causal_more_queries": dict(seq_q=45, seq_k=37, right=0),
    "causal_bottom_right": dict(seq_q=37, seq_k=101, bottom_right=True, right=0),
    "causal_bottom_right_empty_rows": dict(seq_q=71, seq_k=37, bottom_right=True, right=0),
    "window": dict(seq_q=101, seq_k=131, heads=1, left=40, right=7, bottom_right=True),
    "window_narrower_than_a_tile": dict(seq_q=97, seq_k=97, heads=1, left=3, right=2),
    "window_left_only": dict(seq_q=97, seq_k=41, heads=1, left=10),
    "window_past_the_keys": dict(seq_q=97, seq_k=41, heads=1, left=5, right=5, grad_lse=False),
    "gqa": dict(heads=6, heads_k=2, seq_q=33, seq_k=40, right=0, bottom_right=True),
    "mask_bool": dict(batch=2, mask=(2, 2, 37, 45), mask_dtype=torch.bool),
    "mask_bool_keys": dict(batch=2, mask=(2, 1, 1, 45), mask_dtype=torch.bool),
    "mask_bool_empty_rows": dict(mask=_rows_hidden(), seq_q=37, seq_k=45),
    "mask_bool_queries": dict(batch=2, mask=(2, 1, 37, 1), mask_dtype=torch.bool, right=0),
    "mask_additive": dict(batch=2, mask=(2, 2, 37, 45)),
    "mask_additive_over_batch": dict(batch=2, mask=(2, 37, 45), left=20, right=9),
    "mask_additive_over_heads": dict(batch=2, mask=(2, 1, 37, 45), heads=4, heads_k=2),
    "mask_additive_keys": dict(batch=2, mask=(2, 1, 1, 45), right=0),
    "mask_additive_queries": dict(batch=2, mask=(37, 1)),
    "mask_additive_one": dict(mask=(1, 1)),
    "mask_additive_hidden": dict(mask=_additive_with_hidden(), batch=2),
    "softcap": dict(softcap=1.5, spread=3.0),
    "softcap_small_scores": dict(softcap=30.0, spread=0.1, mask=(37, 45)),
    "alibi": dict(alibi=True, bottom_right=True, right=0, seq_q=37, seq_k=50),
    "sinks": dict(sinks=True, bottom_right=True, right=0, seq_q=50, seq_k=37),
    "dropout": dict(dropout_p=0.3, batch=2, heads=4, heads_k=2, right=0),
    "dropout_all": dict(dropout_p=1.0, grad_lse=False),
    "dropout_mask": dict(dropout_p=0.1, mask=(1, 2, 1, 45), softcap=5.0, sinks=True),
    "negative_scale": dict(scale=-0.3, right=0),
    "large_scores": dict(spread=60.0),
    "low_scores": dict(mask=torch.full((1, 45), -120.0)),
    "offset_scores": dict(mask=torch.full((37, 45), 1e4), seq_q=37, seq_k=45),
    "layout_bshd": dict(layout="bshd", batch=2, right=0),
    "layout_columns": dict(layout="columns", batch=2),
    "layout_offset": dict(layout="offset", value_dim=7),
    "fp16": dict(dtype=FP16, batch=2, right=0, grad_lse=False),
    "fp16_mask": dict(dtype=FP16, mask=(1, 37, 45), value_dim=40, softcap=5.0),
    "bf16": dict(dtype=BF16, heads=4, heads_k=2, seq_q=67, seq_k=80, right=0, bottom_right=True),
    "bf16_mask": dict(dtype=BF16, mask=(45,), mask_dtype=FP32, batch=2, alibi=True, sinks=True),
    "bf16_dropout": dict(dtype=BF16, dropout_p=0.2, layout="bshd"),
    "decode": dict(seq_q=1, seq_k=700, heads=4, heads_k=1, bottom_right=True, right=0, sinks=True),
    "decode_hidden_parts": dict(seq_q=3, seq_k=600, heads=1, right=0, batch=2),
    "decode_everything": dict(
        seq_q=2,
        seq_k=520,
        heads=1,
        dtype=BF16,
        mask=(1, 520),
        softcap=5.0,
        alibi=True,
        dropout_p=0.2,
        value_dim=24,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_torchs(name):
    check(Case(**CASES[name]))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seq_q=st.integers(1, 70), seq_k=st.integers(1, 70), dim=st.integers(1, 33),
    group=st.integers(1, 3), left=st.integers(-1, 40), right=st.integers(-1, 40),
    bottom_right=st.booleans(), mask=st.sampled_from([None, "bool", "additive"]),
    broadcast=st.tuples(*[st.booleans()] * 3), softcap=st.sampled_from([0.0, 3.0]),
    dropout_p=st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_any_combination(
    seq_q, seq_k, dim, group, left, right, bottom_right, mask, broadcast, softcap, dropout_p
):
    heads = 2 * group
    shape = tuple(
        1 if drop else size for drop, size in zip(broadcast, (heads, seq_q, seq_k), strict=True)
    )
    check(
        Case(
            seq_q, seq_k, dim=dim, heads=heads, heads_k=2, left=left, right=right,
            bottom_right=bottom_right, softcap=softcap, dropout_p=dropout_p,
            mask=None if mask is None else shape,
            mask_dtype=torch.bool if mask == "bool" else None,
        )
    )  # fmt: skip


def _poisoned(case, keys):
    """The same call, with NaN in keys and values that nothing sees."""
    clean = case.kernels()
    case.key, case.value = case.key.clone(), case.value.clone()
    case.key[..., keys, :] = math.nan
    case.value[..., keys, :] = math.nan
    for got, expected in zip(case.kernels(), clean, strict=True):
        assert torch.equal(got, expected)


def test_nan_behind_a_key_mask_does_not_leak():
    mask = torch.ones(1, 1, 1, 45, dtype=torch.bool)
    mask[..., [3, 20, 44]] = False
    _poisoned(Case(mask=mask), [3, 20, 44])


def test_nan_behind_a_full_mask_does_not_leak():
    mask = torch.zeros(1, 1, 37, 45)
    mask[..., 40:] = -math.inf
    _poisoned(Case(mask=mask), slice(40, 45))


def test_nan_outside_the_band_does_not_leak():
    _poisoned(Case(20, 45, right=0), slice(20, 45))
    _poisoned(Case(20, 45, left=5, bottom_right=True), slice(0, 20))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
def test_a_nan_query_reaches_only_the_keys_that_it_sees(options):
    seen = torch.ones(37, 45, dtype=torch.bool)
    seen[20, 5:30] = False
    for case, wanted in (
        (Case(mask=(1, 1, 37, 45), **options), seen[20]),
        (Case(right=0, **options), torch.arange(45) <= 20),
    ):
        if case.mask is not None:
            case.mask = torch.zeros(1, 1, 37, 45).masked_fill(~seen, -math.inf)
        clean = case.kernels()
        case.query = case.query.clone()
        case.query[:, :, 20, 3] = math.nan
        for got, before in zip(case.kernels()[3:5], clean[3:5], strict=True):
            assert torch.equal(got[:, :, ~wanted], before[:, :, ~wanted])
            assert got[:, :, wanted].isnan().all(-1).all()


def test_results_are_the_same_bits_again_and_inputs_are_unchanged():
    case = Case(dropout_p=0.2, mask=(1, 2, 37, 45), heads=2, heads_k=1)
    inputs = [case.query, case.key, case.value, case.mask, case.grad_out, case.seed]
    before = [t.clone() for t in inputs]
    first, second = case.kernels(), case.kernels()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_upstream_gradients_may_be_expanded():
    case = Case(batch=2)
    case.grad_out = torch.ones(()).expand(case.grad_out.shape)
    case.grad_lse = torch.ones(()).expand(case.grad_lse.shape)
    check(case)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_wanted_gradient_is_made(wanted):
    case = Case(mask=(37, 45), sinks=True)
    out, lse = case.forward()
    everything = case.backward(out, lse)
    gradients = case.backward(out, lse, [index == wanted for index in range(5)])
    for index, (got, expected) in enumerate(zip(gradients, everything, strict=True)):
        if index == wanted:
            assert torch.equal(got, expected)
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 45, 1, 2), (37, 0, 1, 2), (37, 45, 0, 2), (37, 45, 1, 0)])
def test_empty(shape):
    seq_q, seq_k, batch, heads = shape
    # A mask of rows or of columns, whichever there are: its gradient is made all the same.
    mask = (1, 1, seq_q, 1) if seq_k == 0 else (1, 1, 1, seq_k)
    case = Case(seq_q, seq_k, batch=batch, heads=heads, heads_k=heads, mask=mask)
    out, lse, *gradients = case.kernels()
    assert out.shape == (batch, heads, seq_q, 16) and not out.any()
    assert (lse == -math.inf).all()
    inputs = (case.query, case.key, case.value, case.mask)
    for gradient, like in zip(gradients, inputs, strict=False):
        assert gradient.shape == like.shape and not gradient.any()


def test_results_are_contiguous_whatever_the_inputs_are():
    assert all(result.is_contiguous() for result in Case(layout="columns").kernels())


def test_few_queries_walk_parts_of_the_keys():
    from tritonops.attention import _part_of_keys

    assert _part_of_keys(1, 700, 4, False) == 256
    assert _part_of_keys(1, 700, 4, True) == _part_of_keys(17, 700, 4, False) == 700
    assert _part_of_keys(1, 5000, 16, False) >= 5000


def test_opcheck():
    case = Case(5, 7, mask=(5, 7), grad_lse=True)
    forward = (
        case.query, case.key, case.value, case.mask, None, None, None,
        0.0, case.scale, 0.0, *case.band,
    )  # fmt: skip
    torch.library.opcheck(_ops.TRITON.attention_forward, forward)
    out, lse = case.forward()
    backward = (
        case.grad_out, case.grad_lse, *forward[:7], out, lse, *forward[7:],
        [True, True, True, True, False],
    )  # fmt: skip
    torch.library.opcheck(_ops.TRITON.attention_backward, backward)


def test_refusal():
    from tritonops import attention

    served = {"head_dim": 256, "value_dim": 1, "mask_grad": True, "alibi": True, "sinks": True}
    assert attention.refusal(served) is None
    assert "head_dim up to 256, got 257" in attention.refusal(served | {"head_dim": 257})
    assert "value_dim up to 256, got 300" in attention.refusal(served | {"value_dim": 300})
