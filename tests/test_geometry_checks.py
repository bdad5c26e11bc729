"""Errors come before work, and name the culprit, its value and a remedy."""

import pytest
import torch

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import PrincipalSpace
from sphere_plugin.geometry.checks import all_finite


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def spoiled(value):
    weight = normal(4, 6)
    weight[1, 2] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(3), r"shape: got \(3,\)"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\), expected two dimensions.*one expert"),
        (torch.empty(0, 5), r"\(0, 5\), expected at least one entry"),
        (torch.ones(3, 4, dtype=torch.int8), r"torch.int8, expected a floating point.*Dequantise"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), "float8_e4m3fn, expected a floating point.*Dequantise"),
        (spoiled(float("nan")), "NaN or infinite in 1 of 24 entries.*undo"),
        (spoiled(float("-inf")), "NaN or infinite in 1 of 24 entries"),
        (torch.zeros(3, 4), "zeros only"),
        (torch.ones(3, 4, device="meta"), "'meta'.*offloaded"),
        (torch.full((3, 4), 1e30), "squared norm.*float64"),
    ],
    ids=["vector", "experts", "empty", "int", "float8", "nan", "inf", "zeros", "meta", "overflow"],
)
def test_a_bad_weight_is_named_with_its_value_and_a_remedy(weight, said):
    with pytest.raises(ModelError, match=said):
        PrincipalSpace.fit(weight, row_normalize=False)


@pytest.mark.parametrize("eta", [0, -0.1, 1.01, 50, float("nan"), "0.5", None])
def test_eta_outside_its_range_is_refused_before_the_weight_is_read(eta):
    with pytest.raises(ConfigError, match=rf"eta: got {eta!r}, expected a number in \(0, 1\].*0.5"):
        PrincipalSpace.fit(torch.ones(3), eta)


@pytest.mark.parametrize("method", ["project", "removed_share"])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "0.8"])
def test_alpha_outside_its_range_is_refused(method, alpha):
    space = PrincipalSpace.fit(normal(4, 6))
    with pytest.raises(ConfigError, match=rf"alpha: got {alpha!r}, expected a number in \[0, 1\]"):
        getattr(space, method)(normal(4, 6), alpha)


@pytest.mark.parametrize("method", ["project", "removed_share"])
def test_a_mismatched_delta_prints_both_shapes(method):
    space = PrincipalSpace.fit(normal(4, 6), 1.0)
    with pytest.raises(ModelError, match=r"\(4, 7\), expected 6 columns.*\(6, 4\).*fitted on"):
        getattr(space, method)(normal(4, 7))
    with pytest.raises(ModelError, match=r"\(6, 4\).*transposed"):
        getattr(space, method)(normal(6, 4))
    with pytest.raises(ModelError, match="delta's dtype"):
        getattr(space, method)(torch.ones(4, 6, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_entry_that_is_not_finite_is_seen_wherever_it_is(dtype):
    weight = normal(7, 9).to(dtype)
    largest = torch.finfo(dtype).max
    weight[0, 0], weight[1, 1] = largest, largest  # their sum is infinite
    assert all_finite(weight) and all_finite(weight.T) and all_finite(weight[:, ::2])
    for value in (float("nan"), float("inf"), -float("inf")):
        for row, column in ((0, 0), (3, 5), (6, 8)):
            broken = weight.clone()
            broken[row, column] = value
            assert not all_finite(broken)
            assert not all_finite(broken.T)
    both = weight.clone()
    both[0, 0], both[0, 1] = float("inf"), -float("inf")
    assert not all_finite(both)
