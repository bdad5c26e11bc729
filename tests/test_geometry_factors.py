"""Updates in factors: the same matrix, norm and projection as when written out, on any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, PrincipalSpace

FEW = settings(deadline=None, max_examples=25, derandomize=True)
SHAPES = [(24, 60), (40, 40), (60, 24)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(d_out, d_in, facts, seed=0, dtype=torch.float32):
    return Factors(normal(d_out, facts, seed=seed, dtype=dtype), normal(d_in, facts, seed=seed + 1, dtype=dtype))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@FEW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.floats(-6, 6))
def test_norm_is_that_of_the_matrix_also_with_more_facts_than_dimensions(d_out, d_in, facts, seed, magnitude):
    update = factors(d_out, d_in, facts, seed, torch.float64)
    update = Factors(update.left * 10**magnitude, update.right)
    assert update.shape == tuple(update.dense().shape) == (d_out, d_in)
    torch.testing.assert_close(update.dense(), torch.einsum("ou,iu->oi", update.left, update.right))
    assert update.norm() == pytest.approx(float(update.dense().norm()), rel=1e-12)


def test_norm_keeps_its_digits_where_facts_cancel_and_where_squares_would_overflow():
    left, right = normal(30, 1), normal(50, 1, seed=1)
    nearly = right + 1e-4 * normal(50, 1, seed=2)
    update = Factors(torch.cat([left, -left], dim=1), torch.cat([right, nearly], dim=1))
    assert update.norm() == pytest.approx(float(left.double().norm() * (right.double() - nearly.double()).norm()))
    huge = Factors(torch.full((3, 1), 1e30), torch.full((4, 1), 1e8))
    assert huge.norm() == pytest.approx(12**0.5 * 1e38)
    assert Factors(torch.zeros(3, 2), torch.zeros(4, 2)).norm() == 0.0


def test_to_moves_both_factors():
    wide = factors(3, 4, 2).to(torch.float64)
    assert wide.left.dtype == wide.right.dtype == torch.float64 and wide.dense().dtype == torch.float64


def test_what_are_no_factors_is_refused():
    with pytest.raises(ModelError, match=r"factors' shapes: got '\(3, 2\) and \(4, 5\)', expected the same number"):
        Factors(torch.ones(3, 2), torch.ones(4, 5))
    with pytest.raises(ModelError, match="right factor's dtype"):
        Factors(torch.ones(3, 2), torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(ModelError, match="left factor's shape"):
        Factors(torch.ones(3), torch.ones(4, 1))


# ---- projected ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("facts", [1, 5, 30])  # 30 are more than r, and more than d_out of the wide weight
@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
def test_projection_and_share_are_those_of_the_matrix(shape, facts, row_normalize, dtype):
    weight, update = normal(*shape, seed=9, dtype=dtype), factors(*shape, facts, dtype=dtype)
    for alpha in (0.5, 1.0):
        space = PrincipalSpace.fit(weight, 0.4, row_normalize)
        projected, share = space.project(update, alpha), space.removed_share(update, alpha)
        basis = PrincipalSpace.fit(weight.double(), 0.4, row_normalize).basis
        dense = update.dense().double()
        expected = dense - alpha * (dense @ basis) @ basis.T
        assert isinstance(projected, Factors) and projected.right.dtype == dtype
        assert torch.equal(projected.left, update.left)
        assert relative(projected.dense(), expected) < (1e-5 if dtype == torch.float32 else 1e-10)
        assert share == pytest.approx(1 - float(expected.norm() / dense.norm()) ** 2, abs=1e-5)
        assert share == pytest.approx(space.removed_share(update.dense(), alpha), abs=1e-6)


def test_the_basis_may_be_asked_for_before_between_and_after():
    weight, update = normal(24, 60), factors(24, 60, 3)
    before, between = PrincipalSpace.fit(weight), PrincipalSpace.fit(weight)
    _ = before.basis
    through_neurons = between.project(update).right
    torch.testing.assert_close(through_neurons, before.project(update).right)
    assert torch.equal(between.basis, before.basis)
    torch.testing.assert_close(between.project(update).right, through_neurons)
    assert (between.rank, between.width, repr(between)) == (before.rank, before.width, repr(before))


@pytest.mark.parametrize("row_normalize", [True, False])
def test_the_space_stays_that_of_the_weight_it_was_fitted_on(row_normalize):
    weight, update = normal(24, 60), factors(24, 60, 3)
    space = PrincipalSpace.fit(weight, 0.5, row_normalize)
    expected = space.project(update).right
    weight += 5 * normal(24, 60, seed=7)
    assert torch.equal(space.project(update).right, expected)


@pytest.mark.parametrize("eta", [0.9, 0.9999, 1.0])
@pytest.mark.parametrize("power", [1.0, 3.0, 6.0])
def test_small_eigenvalues_do_no_harm(power, eta):
    left, right = (torch.linalg.qr(normal(size, 24, seed=s, dtype=torch.float64)).Q for size, s in ((24, 1), (60, 2)))
    weight = (left * torch.arange(1, 25, dtype=torch.float64) ** -power @ right.T).float()
    thin, formed = (PrincipalSpace.fit(weight, eta, row_normalize=False) for _ in range(2))
    u = formed.basis.double()
    update = factors(24, 60, 2)
    expected = update.right.double() - u @ (u.T @ update.right.double())
    assert relative(thin.project(update, 1.0).right, expected) < 1e-4


def test_alpha_zero_zero_updates_and_low_rank_weights():
    update = factors(24, 60, 3)
    space = PrincipalSpace.fit(normal(24, 5) @ normal(5, 60, seed=3), 1.0)
    assert space.rank == 5
    assert torch.equal(space.project(update, 0.0).right, update.right)
    inside = Factors(update.left, space.basis[:, :3].contiguous())
    assert space.removed_share(inside, 1.0) == pytest.approx(1.0, abs=1e-5)
    zero = Factors(update.left, torch.zeros(60, 3))
    assert space.removed_share(zero) == 0.0 and not space.project(zero).right.any()


def test_an_update_of_another_weight_is_refused():
    space = PrincipalSpace.fit(normal(24, 60))
    with pytest.raises(ModelError, match=r"delta's shape: got \(24, 50\), expected 60 columns"):
        space.project(factors(24, 50, 2))
    with pytest.raises(ModelError, match=r"\(60, 24\).*stored transposed"):
        space.removed_share(factors(60, 24, 2))
