"""Interference of an update with inputs it was not made for, against dense matrices and worked cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors
from sphere_plugin.geometry.interference import (
    EditingSpace,
    lengths,
    null_dimension,
    span,
    spectral_norm,
    split,
)

FEW = settings(deadline=None, max_examples=15, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(d_out=7, d_in=12, u=3, seed=0):
    return Factors(normal(d_out, u, seed=seed), normal(d_in, u, seed=seed + 1))


# ---- an update that comes as a matrix ----


@pytest.mark.parametrize("shape", [(7, 12), (9, 9), (12, 7)], ids=["wide", "square", "tall"])
def test_a_matrix_is_split_as_its_singular_value_decomposition(shape):
    delta = normal(*shape)
    found = split(delta)
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(found.dense(), delta)
    torch.testing.assert_close(lengths(found.right), sigma)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(len(sigma), dtype=torch.float64))
    torch.testing.assert_close((right @ found.right).abs(), torch.diag(sigma))
    torch.testing.assert_close((left.T @ found.left).abs(), torch.eye(len(sigma), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 30), (30, 7)])
def test_its_rank_is_that_of_the_update_and_what_rounding_made_is_left_out(shape):
    thin = normal(shape[0], 2) @ normal(2, shape[1], seed=1)
    assert split(thin).left.shape[1] == 2
    noise = 1e-5 * normal(*shape, seed=2)
    assert split(thin + noise).left.shape[1] == 7
    assert split(thin + noise, floor=1e-3).left.shape[1] == 2


def test_an_update_of_nothing_has_one_pair_of_zero_vectors():
    found = split(torch.zeros(4, 6))
    assert (found.left.shape, found.right.shape) == ((4, 1), (6, 1))
    space = EditingSpace.of(found)
    done = space.interference(normal(5, 6))
    assert space.basis.shape == (6, 0)
    assert not any(bool(one.any()) for one in (done.change, done.bound, done.spectral, done.inside))
    assert space.alignment(normal(5, 6)) == 0.0


def test_a_broken_update_is_refused():
    with pytest.raises(ModelError, match="NaN or infinity"):
        split(torch.tensor([[1.0, math.nan]]))


# ---- vectors and their span ----


def test_lengths_are_those_of_columns():
    assert lengths(torch.tensor([[3.0, 0.0], [4.0, 2.0]])).tolist() == [5.0, 2.0]


def test_a_span_has_the_rank_of_its_vectors():
    vectors = normal(12, 3)
    twice = torch.cat([vectors, vectors @ normal(3, 2, seed=1)], dim=1)
    basis = span(twice)
    assert basis.shape == (12, 3)
    torch.testing.assert_close(basis @ (basis.T @ vectors), vectors)
    assert span(twice.float()).shape == (12, 3)  # what float32 rounds away is no direction


def test_the_spectral_norm_needs_no_matrix():
    update = factors(u=9)
    assert spectral_norm(update) == pytest.approx(float(torch.linalg.matrix_norm(update.dense(), ord=2)))


# ---- what it does to inputs ----


def test_every_number_is_the_plain_one():
    update, keys = factors(), normal(5, 12, seed=7)
    done = EditingSpace.of(update).interference(keys)
    left, right, delta = update.left, update.right, update.dense()
    projector = right @ torch.linalg.inv(right.T @ right) @ right.T  # the paper's P, V (VᵀV)⁻¹ Vᵀ
    for n, z in enumerate(keys):
        assert float(done.change[n]) == pytest.approx(float((delta @ z).norm()))
        bound = torch.linalg.svdvals(left)[0] * (right.T @ z).norm()
        assert float(done.bound[n]) == pytest.approx(float(bound))
        assert float(done.inside[n]) == pytest.approx(float((projector @ z).norm() ** 2))
        spectral = torch.linalg.svdvals(delta)[0] * (projector @ z).norm()
        assert float(done.spectral[n]) == pytest.approx(float(spectral))


@FEW
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))
def test_no_change_is_beyond_its_bounds(d_out, d_in, u, seed):
    done = EditingSpace.of(factors(d_out, d_in, u, seed)).interference(normal(6, d_in, seed=seed + 5))
    assert bool((done.change <= done.bound * (1 + 1e-9)).all())
    assert bool((done.change <= done.spectral * (1 + 1e-9) + 1e-12).all())


def test_the_bound_is_an_equality_for_one_fact_and_for_singular_vectors():
    keys = normal(5, 12, seed=7)
    for update in (factors(u=1), split(factors().dense())):
        done = EditingSpace.of(update).interference(keys)
        torch.testing.assert_close(done.change, done.bound)


def test_inputs_outside_the_span_are_not_touched():
    update = factors()
    keys = normal(5, 12, seed=7)
    basis = span(update.right)
    outside = keys - keys @ basis @ basis.T
    done = EditingSpace.of(update).interference(outside)
    assert float(done.change.max()) < 1e-12
    assert float(done.inside.max()) < 1e-24


def test_bounds_do_not_depend_on_how_the_update_is_split_but_the_papers_does():
    keys, update = normal(5, 12, seed=7), factors()
    spread = Factors(update.left @ torch.diag(torch.tensor([1.0, 10.0, 100.0]).double()), update.right)
    spread = Factors(spread.left, update.right @ torch.diag(torch.tensor([1.0, 0.1, 0.01]).double()))
    one, other = (EditingSpace.of(each).interference(keys) for each in (update, spread))
    for name in ("change", "spectral", "inside"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert float((one.bound / other.bound).max()) < 0.9


def test_alignment_is_one_for_an_orthonormal_basis_which_is_assumption_one():
    update = factors()
    orthonormal = torch.linalg.qr(normal(12, 12, seed=3)).Q
    assert EditingSpace.of(update).alignment(orthonormal) == pytest.approx(1.0)
    assert EditingSpace.of(update).alignment(5.0 * orthonormal) == pytest.approx(1.0)
    along = split(update.dense()).right.T[:1]  # the direction it answers to most
    sigma = torch.linalg.svdvals(update.dense())
    assert EditingSpace.of(update).alignment(along) == pytest.approx(float(12 * sigma[0] ** 2 / (sigma**2).sum()))


def test_inputs_of_another_weight_are_refused():
    space = EditingSpace.of(factors())
    for call in (space.interference, space.alignment):
        with pytest.raises(ModelError, match=r"\(5, 7\), expected 12 columns"):
            call(normal(5, 7))


# ---- null spaces ----


def test_null_dimensions_are_counted_by_hand():
    turn = torch.linalg.qr(normal(6, 6)).Q
    moment = turn @ torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.01, 1e-3, 0.0]).double()) @ turn.T
    assert null_dimension(moment, 0.02) == (3, 5)
    assert null_dimension(moment, 1e-12) == (1, 5)
    assert null_dimension(moment.float(), 0.02) == (3, 5)
    assert null_dimension(moment, 10.0)[0] == 6
    with pytest.raises(ModelError, match="square"):
        null_dimension(normal(3, 4), 0.1)
