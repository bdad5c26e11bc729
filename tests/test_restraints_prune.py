"""PRUNE: agreement with the authors' formula in full SVDs, bit-for-bit identity, the view, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import spectral
from sphere_plugin.geometry.spectral import exact_largest_singular_value
from sphere_plugin.restraints import prune
from sphere_plugin.restraints.prune import PruneConfig, prune_view

SHAPES = [(24, 60), (40, 40), (60, 24)]
IDS = ["wide", "square", "tall"]
FEW = settings(deadline=None, max_examples=25, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def official(pretrained, edited):
    """The authors' code computes this: two full SVDs, natural logarithms, everything put together again."""
    delta = edited - pretrained
    limit = torch.linalg.svdvals(pretrained).max()
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    compressed = torch.where(sizes > limit, torch.log(sizes) - torch.log(limit) + limit, sizes)
    return pretrained + left @ torch.diag(compressed) @ right


def looped(total, limit, base):
    """One singular value after another."""
    left, sizes, right = torch.linalg.svd(total, full_matrices=False)
    result = torch.zeros_like(total)
    for k, size in enumerate(sizes.tolist()):
        new = math.log(size, base) - math.log(limit, base) + limit if size > limit else size
        result += new * torch.outer(left[:, k], right[k])
    return result


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("scale", [1.1, 3.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_view_agrees_with_the_authors_formula(shape, scale):
    pretrained = normal(*shape, dtype=torch.float64)
    edited = pretrained + scale * normal(*shape, seed=1, dtype=torch.float64)
    assert relative(prune_view(pretrained, edited), official(pretrained, edited)) < 1e-12
    found = prune_view(pretrained.float(), edited.float())
    assert float((found - official(pretrained, edited)).norm() / edited.norm()) < 1e-6


@FEW
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 99), st.sampled_from([1.2, 1.5, 2, math.e]))
def test_agrees_with_a_plain_loop_on_any_shape_and_base(d_out, d_in, seed, base):
    pretrained, written, delta = (normal(d_out, d_in, seed=seed + s, dtype=torch.float64) for s in (0, 100, 200))
    weight, delta = pretrained + written, 3 * delta
    result = PruneConfig(base).bind(pretrained)(weight, delta)
    limit = float(torch.linalg.svdvals(pretrained)[0])
    expected = pretrained + looped(weight + delta - pretrained, limit, base)
    torch.testing.assert_close(weight + result.delta, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prune_view(pretrained, weight + delta, base), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_only_singular_values_above_the_limit_change(shape):
    pretrained = normal(*shape, dtype=torch.float64)
    limit = float(torch.linalg.svdvals(pretrained)[0])
    total = 1.3 * normal(*shape, seed=1, dtype=torch.float64)
    before = torch.linalg.svdvals(total)
    after = torch.linalg.svdvals(prune_view(pretrained, pretrained + total) - pretrained)
    above = before > limit
    assert 0 < int(above.sum()) < len(before)
    torch.testing.assert_close(after[~above], before[~above])
    torch.testing.assert_close(after[above], (before[above] / limit).log() + limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 0.9], ids=["by the Frobenius norm", "by the spectrum"])
def test_an_update_below_the_limit_comes_back_bit_for_bit(scale, dtype):
    pretrained, drift = normal(30, 40, dtype=dtype), 0.05 * normal(30, 40, seed=1, dtype=dtype)
    weight = pretrained + drift
    delta = scale * pretrained - drift
    result = PruneConfig().bind(pretrained)(weight, delta)
    assert torch.equal(result.delta, delta) and result.delta.dtype == dtype
    assert (result.removed_share, result.rank) == (0.0, 0)
    view = prune_view(pretrained, weight)
    assert torch.equal(view, weight) and view.data_ptr() != weight.data_ptr()


def test_the_limit_is_found_once_per_bind_and_exact(monkeypatch):
    calls = []
    found = exact_largest_singular_value
    monkeypatch.setattr(prune, "exact_largest_singular_value", lambda m: calls.append(1) or found(m))
    pretrained = normal(20, 30)
    bound = PruneConfig().bind(pretrained)
    for seed in range(3):
        bound(pretrained, 5 * normal(20, 30, seed=seed))
    assert len(calls) == 1
    for shape in SHAPES:
        weight = normal(*shape, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            exact = float(torch.linalg.svdvals(weight.to(dtype).double())[0])
            assert exact_largest_singular_value(weight.to(dtype)) == pytest.approx(exact, rel=1e-9)
    assert exact_largest_singular_value(torch.zeros(2, 3)) == 0.0


def test_gram_in_blocks_is_the_gram_matrix(monkeypatch):
    monkeypatch.setattr(spectral, "GRAM_BLOCK", 7)
    for shape in SHAPES:
        matrix = normal(*shape, dtype=torch.float64)
        expected = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
        torch.testing.assert_close(spectral.smaller_gram(matrix), expected)


def test_one_update_from_the_pretrained_weight_is_the_view_and_later_ones_are_not():
    pretrained = normal(20, 30, dtype=torch.float64)
    deltas = [4 * normal(20, 30, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    bound = PruneConfig().bind(pretrained)
    plain, written = pretrained.clone(), pretrained.clone()
    gaps = []
    for delta in deltas:
        plain = plain + delta
        written = written + bound(written, delta).delta
        gaps.append(relative(written, prune_view(pretrained, plain)))
    assert gaps[0] < 1e-12 and gaps[1] > 0.01


def test_what_is_above_the_limit_is_compressed_again_even_by_a_zero_update():
    pretrained = normal(20, 30)
    weight = pretrained + 5 * normal(20, 30, seed=1)
    result = PruneConfig().bind(pretrained)(weight, torch.zeros(20, 30))
    assert result.delta.norm() > 1.0 and result.removed_share == 0.0


def test_removed_share_is_positive_for_a_large_update_and_negative_where_old_ones_are_corrected():
    pretrained = normal(20, 30)
    bound = PruneConfig().bind(pretrained)
    assert 0.0 < bound(pretrained, 5 * normal(20, 30, seed=1)).removed_share < 1.0
    drifted = pretrained + 5 * normal(20, 30, seed=1)
    delta = 0.1 * normal(20, 30, seed=2)
    result = bound(drifted, delta)
    assert result.removed_share < 0.0
    expected = 1 - float(result.delta.double().square().sum() / delta.double().square().sum())
    assert result.removed_share == pytest.approx(expected, rel=1e-6)


def test_a_small_limit_lengthens_as_the_formula_says():
    pretrained, total = 0.5 * torch.eye(3, 4, dtype=torch.float64), 0.6 * torch.eye(3, 4, dtype=torch.float64)
    found = prune_view(pretrained, pretrained + total) - pretrained
    torch.testing.assert_close(found, (math.log(0.6 / 0.5) + 0.5) * torch.eye(3, 4, dtype=torch.float64))
    assert found[0, 0] > 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_in_float32_and_keeps_its_dtype(dtype):
    pretrained = normal(20, 30, dtype=dtype)
    weight = pretrained + normal(20, 30, seed=1, dtype=dtype)
    delta = 3 * normal(20, 30, seed=2, dtype=dtype)
    expected = official(pretrained.double(), weight.double() + delta.double())
    bound = PruneConfig().bind(pretrained)
    result = bound(weight, delta)
    assert result.delta.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert relative(result.delta, expected - weight.double()) < epsilon
    assert relative(weight.float() + bound(weight, delta.float()).delta, expected) < 1e-5
    assert relative(prune_view(pretrained, weight), official(pretrained.double(), weight.double())) < epsilon


def test_transposed_matrices_give_the_transposed_result_and_nothing_is_written():
    pretrained, delta = normal(12, 20), 4 * normal(12, 20, seed=1)
    weight = torch.nn.Parameter(pretrained + normal(12, 20, seed=2))
    before = weight.detach().clone(), delta.clone(), pretrained.clone()
    straight = PruneConfig().bind(pretrained)(weight, delta).delta
    turned = PruneConfig().bind(pretrained.T)(weight.T, delta.T).delta
    torch.testing.assert_close(turned.T, straight, rtol=1e-5, atol=1e-5)
    assert not straight.requires_grad and not prune_view(pretrained, weight).requires_grad
    assert all(torch.equal(*pair) for pair in zip((weight, delta, pretrained), before, strict=True))


@pytest.mark.parametrize("base", [1, 1.0, 0.5, -2, float("inf"), float("nan"), "e", None, True])
def test_base_outside_its_range_is_refused(base):
    said = rf"base: got {base!r}, expected a finite number above 1. Leave it out"
    with pytest.raises(ConfigError, match=said):
        PruneConfig(base)
    with pytest.raises(ConfigError, match=said):
        prune_view(normal(2, 3), normal(2, 3), base)


def test_bad_matrices_are_named_with_their_value_and_a_remedy():
    weight, spoiled = normal(4, 6), normal(4, 6)
    spoiled[0, 0] = float("nan")
    with pytest.raises(ModelError, match="pretrained: got 'zeros only'"):
        PruneConfig().bind(torch.zeros(4, 6))
    with pytest.raises(ModelError, match="pretrained: got 'NaN or infinite in 1 of 24"):
        PruneConfig().bind(spoiled)
    with pytest.raises(ModelError, match="edited: got 'NaN or infinite in 1 of 24"):
        prune_view(weight, spoiled)
    with pytest.raises(ModelError, match="delta: got 'NaN or infinite in 1 of 24.*diverged"):
        PruneConfig().bind(weight)(weight, spoiled)
    with pytest.raises(ModelError, match=r"delta's shape: got \(6, 4\)"):
        PruneConfig().bind(weight)(weight, weight.T)
    with pytest.raises(ModelError, match=r"pretrained's shape: got \(4, 6\), expected the weight's.*\(3, 3\).*first"):
        PruneConfig().bind(weight)(normal(3, 3), normal(3, 3))
    with pytest.raises(ModelError, match=r"pretrained's shape: got \(4, 6\)"):
        prune_view(weight, normal(3, 3))
