"""Models that somebody changes after `swap_`."""

import copy

import pytest
import torch
from torch import nn

from fastnn import swap_, unswap_


class Adapter(nn.Module):
    """base(x) + x weight^T, as low-rank adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.more(x)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 6)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_part_turned_back_gets_its_activation_again():
    model, x = mlp()
    expected = model(x)
    swap_(model)
    unswap_(model[0])
    assert type(model[0]) is nn.Linear
    close(model(x), expected)
    unswap_(model)
    assert type(model[1]) is nn.GELU


def test_another_linear_gets_the_activation():
    model, x = mlp()
    stock, new = copy.deepcopy(model), nn.Linear(6, 8)
    swap_(model)
    model[0], stock[0] = new, copy.deepcopy(new)
    close(model(x), stock(x))
    swapped_again = swap_(model).swapped
    assert not swapped_again  # its slot is taken until unswap_
    unswap_(model)
    assert [row.name for row in swap_(model).swapped] == ["0"]
    close(model(x), stock(x))


def test_an_adapter_goes_in_before():
    model, x = mlp()
    model[0] = Adapter(model[0])
    expected = model(x)
    swap_(model)
    close(model(x), expected)
    unswap_(model)

    model, x = mlp()
    swap_(model)
    model[0] = Adapter(model[0])
    with pytest.raises(RuntimeError, match="a GELU to 0 of a Sequential, which changed since"):
        model(x)


def test_copies_look_at_their_own_layers():
    model, x = mlp()
    expected = model(x)
    swap_(model)
    copied = copy.deepcopy(model)
    unswap_(model[0])
    close(copied(x), expected)
    unswap_(copied[0])
    close(copied(x), expected)


def layer():
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoderLayer(8, 2, 16, **options), torch.randn(2, 5, 8)


def doubled(forward):
    return lambda *arguments, **options: 2 * forward(*arguments, **options)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["linear1", "linear2", "dropout", "dropout1"])
def test_a_replaced_forward_is_called(part, when):
    model, x = layer()
    if when == "after":
        swap_(model)
    owner = model.get_submodule(part)
    owner.forward = doubled(owner.forward)
    if when == "before":
        expected = model(x)
        swap_(model)
        close(model(x), expected)
    else:
        ours = model(x)
        unswap_(model)
        close(ours, model(x))


def test_a_replaced_method_keeps_the_layer():
    model, x = layer()
    model._ff_block = doubled(model._ff_block)
    expected = model(x)
    assert "its _ff_block was replaced" in str(swap_(model))
    close(model(x), expected)


def test_an_activation_need_not_be_hashable():
    class Twice:
        __hash__ = None

        def __call__(self, x):
            return 2 * x

    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, Twice(), batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    swap_(model)
    close(model(x), expected)
