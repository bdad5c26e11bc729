"""Orientation: views, both storages, types alone decide."""

import pytest
import torch
from torch import nn

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import PrincipalSpace, is_transposed, neurons, stored


class Conv1D(nn.Module):
    """Stores [d_in, d_out] as transformers' layer of this name does."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, generator=torch.Generator().manual_seed(0)))


class Adapted(Conv1D):
    """A subclass under another name."""


@pytest.mark.parametrize("transposed", [False, True])
def test_views_share_memory_and_invert_each_other(transposed):
    weight = torch.randn(3, 5)
    matrix = neurons(weight, transposed)
    assert matrix.shape == ((5, 3) if transposed else (3, 5))
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(stored(matrix, transposed), weight)
    stored(matrix, transposed)[0, 1] = 7.0
    assert weight[0, 1] == 7.0


def test_a_parameter_can_be_written_through_the_view():
    layer = Conv1D(4, 6)
    with torch.no_grad():
        neurons(layer.weight, is_transposed(layer)).zero_()
    assert not layer.weight.any()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(nn.Linear(3, 3), False), (Conv1D(3, 3), True), (Adapted(3, 3), True)],
    ids=["Linear", "Conv1D", "subclass"],
)
def test_the_type_decides_even_where_the_shape_cannot(layer, expected):
    assert is_transposed(layer) is expected


def test_transformers_own_conv1d():
    utils = pytest.importorskip("transformers.pytorch_utils")
    layer = utils.Conv1D(6, 4)  # nf, nx
    assert is_transposed(layer)
    assert neurons(layer.weight, True).shape == (6, 4)


def test_linear_and_conv1d_of_one_weight_have_one_space():
    conv = Conv1D(12, 30)
    linear = nn.Linear(30, 12)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
    delta = torch.randn(12, 30)
    one, other = (PrincipalSpace.fit(neurons(layer.weight, is_transposed(layer))) for layer in (linear, conv))
    assert one.rank == other.rank
    torch.testing.assert_close(one.project(delta), other.project(delta), rtol=1e-5, atol=1e-5)


def named(name, **attributes):
    module = type(name, (nn.Module,), {})()
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Embedding(4, 3), "Embedding"),
        (named("Conv1D", weight=torch.ones(2, 2)), "Conv1D"),  # no nf: some other library's layer
        (nn.Conv1d(2, 2, 3), "Conv1d"),
        (nn.ReLU(), "ReLU"),
    ],
    ids=["embedding", "namesake", "three-dimensional", "no-weight"],
)
def test_other_types_are_refused_by_name(module, said):
    with pytest.raises(ModelError, match=said) as caught:
        is_transposed(module)
    assert caught.value.remedy.startswith("Name ")


@pytest.mark.parametrize("turn", [neurons, stored])
def test_stacked_experts_are_refused_with_their_shape(turn):
    with pytest.raises(ModelError, match=r"\(2, 3, 4\)"):
        turn(torch.zeros(2, 3, 4), True)
