"""The principal space and the projection: invariants, and agreement with the formula of the official codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.geometry.principal import RANK_EPSILONS, gram, principal_rank

SHAPES = [(24, 60), (40, 40), (60, 24)]
FEW = settings(deadline=None, max_examples=15, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(d_out, d_in, power=1.0, dtype=torch.float32):
    """A weight whose k-th singular value is k^-power, as trained ones have."""
    size = min(d_out, d_in)
    left = torch.linalg.qr(normal(d_out, size, seed=1, dtype=torch.float64)).Q
    right = torch.linalg.qr(normal(d_in, size, seed=2, dtype=torch.float64)).Q
    return (left * torch.arange(1, size + 1, dtype=torch.float64) ** -power @ right.T).to(dtype)


def official(weight, delta, eta, alpha):
    """Both official codes, line by line: the d_in x d_in covariance, all its eigenvectors, the dense projector."""
    unit = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    covariance = unit.T @ unit / unit.shape[0]
    values, vectors = torch.linalg.eigh(covariance)
    values, order = values.sort(descending=True)
    rank = int((values.cumsum(0) / values.sum() <= eta).sum() + 1)
    top = vectors[:, order][:, :rank]
    return delta @ (torch.eye(weight.shape[1], dtype=weight.dtype) - alpha * top @ top.T), rank


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
@pytest.mark.parametrize("make", [normal, decaying])
@pytest.mark.parametrize("eta", [0.3, 0.5, 0.9])
def test_smaller_side_agrees_with_the_official_formula(shape, make, eta):
    weight, delta = make(*shape), normal(*shape, seed=9)
    space = PrincipalSpace.fit(weight, eta)
    expected, rank = official(weight, delta, eta, 0.8)
    assert space.rank == rank
    assert relative(space.project(delta, 0.8), expected) < 1e-5


@FEW
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 99), st.floats(0.05, 0.95))
def test_float64_agrees_with_the_official_formula_on_any_shape(d_out, d_in, seed, eta):
    weight, delta = (normal(d_out, d_in, seed=s, dtype=torch.float64) for s in (seed, seed + 100))
    space = PrincipalSpace.fit(weight, eta)
    expected, rank = official(weight, delta, eta, 0.5)
    assert (space.rank, space.basis.dtype) == (rank, torch.float64)
    assert relative(space.project(delta, 0.5), expected) < 1e-8


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
def test_alpha_one_projects_onto_the_complement_once_and_for_all(shape):
    space = PrincipalSpace.fit(normal(*shape))
    once = space.project(normal(*shape, seed=9), 1.0)
    assert float((once @ space.basis).abs().max()) < 1e-5
    torch.testing.assert_close(space.project(once, 1.0), once, rtol=0, atol=1e-5)
    assert space.removed_share(once, 1.0) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alpha_zero_is_the_identity_bit_for_bit(dtype):
    delta = normal(6, 30, dtype=dtype)
    projected = PrincipalSpace.fit(normal(12, 30)).project(delta, 0.0)
    assert projected.dtype == dtype
    assert torch.equal(projected, delta)
    assert projected is not delta


@FEW
@given(st.floats(0.0, 1.0), st.integers(0, 99), st.floats(-6, 6))
def test_norm_never_grows_and_the_removed_share_accounts_for_it(alpha, seed, magnitude):
    space = PrincipalSpace.fit(decaying(20, 50, dtype=torch.float64), 0.7)
    delta = normal(20, 50, seed=seed, dtype=torch.float64) * 10**magnitude
    left = float(space.project(delta, alpha).norm() / delta.norm())
    assert left <= 1 + 1e-12
    assert space.removed_share(delta, alpha) == pytest.approx(1 - left**2, abs=1e-12)


@FEW
@given(st.floats(-1.0, 3.0), st.floats(0.1, 1.0), st.integers(0, 99))
def test_theorem_four_holds_for_every_alpha_from_zero_to_two_and_no_other(alpha, eta, seed):
    """Eq. 53 needs P² = P, which α of 0 and 1 alone give; the inequality needs (1 − α)² <= 1 alone."""
    basis = PrincipalSpace.fit(normal(20, 50, dtype=torch.float64), eta).basis
    delta = normal(20, 50, seed=seed, dtype=torch.float64)
    projector = torch.eye(50, dtype=torch.float64) - alpha * basis @ basis.T
    projected, inside = delta @ projector, (delta @ basis).square().sum(dim=1)
    removed = delta.square().sum(dim=1) - projected.square().sum(dim=1)  # per neuron
    torch.testing.assert_close(removed, alpha * (2 - alpha) * inside)
    assert bool((removed >= -1e-9).all()) == (0.0 <= alpha <= 2.0) or abs(alpha * (2 - alpha)) < 1e-9
    idempotent = float((projector @ projector - projector).norm())
    assert idempotent == pytest.approx(abs(alpha * (alpha - 1)) * basis.shape[1] ** 0.5, abs=1e-9)
    outside = delta - (delta @ basis) @ basis.T  # eq. 58: equality where ΔwU = 0
    torch.testing.assert_close(outside @ projector, outside)


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
def test_the_space_ignores_the_scale_of_rows_only_if_normalised(shape):
    weight, delta = decaying(*shape, dtype=torch.float64), normal(*shape, dtype=torch.float64)
    scaled = weight * torch.linspace(0.5, 20, shape[0], dtype=torch.float64)[:, None]
    one, other = PrincipalSpace.fit(weight), PrincipalSpace.fit(scaled)
    assert one.rank == other.rank
    assert relative(other.project(delta), one.project(delta)) < 1e-5  # not 1e-12: the codes add 1e-8 to each norm
    raw, raw_scaled = (PrincipalSpace.fit(w, row_normalize=False) for w in (weight, scaled))
    assert relative(raw_scaled.project(delta, 1.0), raw.project(delta, 1.0)) > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
@pytest.mark.parametrize("power", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("eta", [0.5, 0.999, 1.0])
def test_basis_is_orthonormal_however_ill_conditioned_the_weight(shape, power, eta):
    space = PrincipalSpace.fit(decaying(*shape, power=power), eta, row_normalize=False)
    gram = space.basis.T @ space.basis
    torch.testing.assert_close(gram, torch.eye(space.rank), rtol=0, atol=1e-5)


def test_eigenvalues_fall_cover_eta_and_sum_to_one():
    weight = decaying(30, 80, dtype=torch.float64)
    space = PrincipalSpace.fit(weight, 0.6)
    unit = weight / weight.norm(dim=1, keepdim=True)
    assert space.total == pytest.approx(1.0, abs=1e-6)
    assert float(space.eigenvalues.sum()) >= 0.6 * space.total > float(space.eigenvalues[:-1].sum())
    assert (space.eigenvalues.diff() <= 0).all()
    variances = (unit @ space.basis).square().mean(dim=0)  # eq. 10: what each direction attains
    torch.testing.assert_close(variances, space.eigenvalues, rtol=1e-6, atol=0)
    assert repr(space) == f"PrincipalSpace(d_in=80, rank={space.rank}, eta=0.6)"


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])
def test_eta_one_takes_the_row_space_and_no_more(shape):
    full = PrincipalSpace.fit(normal(*shape, dtype=torch.float64), 1.0)
    assert full.rank == min(shape)
    thin = normal(shape[0], 7) @ normal(7, shape[1], seed=5)
    space = PrincipalSpace.fit(thin, 1.0)
    assert space.rank == 7
    assert float(space.project(thin, 1.0).norm() / thin.norm()) < 1e-5
    assert space.removed_share(thin, 1.0) == pytest.approx(1.0, abs=1e-5)


def test_one_neuron_and_zero_neurons_are_fine():
    assert PrincipalSpace.fit(normal(1, 9)).rank == 1
    weight = normal(6, 9)
    weight[2:5] = 0.0
    assert PrincipalSpace.fit(weight, 1.0).rank == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_comes_back_half(dtype):
    weight, delta = normal(24, 60).to(dtype), normal(24, 60, seed=4).to(dtype)
    half, single = PrincipalSpace.fit(weight), PrincipalSpace.fit(weight.float())
    assert torch.equal(half.basis, single.basis)
    assert half.basis.dtype == torch.float32
    projected = half.project(delta)
    assert projected.dtype == dtype
    assert torch.equal(projected, single.project(delta.float()).to(dtype))  # one rounding, at the end
    rounded = PrincipalSpace.fit(normal(24, 60)).project(normal(24, 60, seed=4))
    assert relative(projected.float(), rounded) < 16 * torch.finfo(dtype).eps


def test_a_wider_delta_keeps_its_precision():
    space = PrincipalSpace.fit(normal(24, 60))
    delta = normal(24, 60, dtype=torch.float64)
    basis = space.basis.double()
    torch.testing.assert_close(space.project(delta, 0.8), delta - 0.8 * (delta @ basis) @ basis.T)


def test_factors_of_an_adapter_can_be_projected_alone():
    space = PrincipalSpace.fit(normal(24, 60))
    down, up = normal(4, 60, seed=7), normal(24, 4, seed=8)
    torch.testing.assert_close(up @ space.project(down), space.project(up @ down), rtol=1e-4, atol=1e-4)


def test_parameters_are_read_not_tracked_or_written():
    weight = torch.nn.Parameter(normal(8, 20))
    before = weight.detach().clone()
    space = PrincipalSpace.fit(weight)
    assert not space.basis.requires_grad
    assert torch.equal(weight, before)
    delta = normal(8, 20, seed=1).requires_grad_()
    space.project(delta, 1.0).sum().backward()  # a fine-tuning loop may differentiate through it
    assert float((delta.grad @ space.basis).abs().max()) < 1e-5


def test_a_zero_update_loses_nothing():
    space = PrincipalSpace.fit(normal(4, 6))
    assert space.removed_share(torch.zeros(4, 6)) == 0.0
    assert not space.project(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("count", [1, 5, 255, 256, 257, 600])
def test_half_a_gram_matrix_and_its_mirror_are_the_whole(count):
    rows = normal(count, 30, dtype=torch.float64)
    for matrix in (rows, normal(30, count, dtype=torch.float64).T):
        found = gram(matrix)
        torch.testing.assert_close(found, matrix @ matrix.T)
        torch.testing.assert_close(found, found.T)


def plain(weight, eta, row_normalize):
    """The space of a wide weight without any economy of memory: every step gives a new tensor, and all are kept."""
    rows = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8 if row_normalize else 1.0)
    count = len(rows)
    values, vectors = torch.linalg.eigh(gram(rows) / count)
    floor = RANK_EPSILONS * torch.finfo(rows.dtype).eps * float(values[-1])
    values, vectors = values.flip(0).double(), vectors.flip(1)
    values = torch.where(values > floor, values, 0.0)
    rank = principal_rank(values, eta)
    kept = values[:rank].to(rows.dtype)
    factor = vectors[:, :rank].contiguous() / (count * kept).sqrt()
    return PrincipalSpace(factor, kept, float(values.sum()), eta, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_saving_memory_changes_no_bit(dtype, row_normalize, seed):
    weight = (normal(576, 1536, seed=seed) * torch.logspace(0, -seed, 1536)).to(dtype)
    update = Factors(normal(576, 20, seed=2).to(dtype), normal(1536, 20, seed=3).to(dtype))
    before = weight.clone()
    found, expected = PrincipalSpace.fit(weight, 0.5, row_normalize), plain(weight, 0.5, row_normalize)
    assert torch.equal(weight, before)
    assert (found.total, found.rank) == (expected.total, expected.rank)
    assert torch.equal(found.eigenvalues, expected.eigenvalues)
    assert torch.equal(found.project(update).right, expected.project(update).right)
    assert torch.equal(found.basis, expected.basis)
    assert torch.equal(found.project(weight), expected.project(weight))
