"""The theorem: its constants against plain loops, and the inequality itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import (
    PrincipalSpace,
    bound_constant,
    delta_he,
    lower_bound,
    neuron_constants,
    output_perturbation,
)

FEW = settings(deadline=None, max_examples=15, derandomize=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weight():
    return normal(14, 6) + 0.5  # off centre: rows are not normalised here


def crowding(weight, power):
    """The sum over j != k of ‖wk − wj‖^-power for every k, pair by pair."""
    count = weight.shape[0]
    return [
        math.fsum(float((weight[k] - weight[j]).norm()) ** -power for j in range(count) if j != k)
        for k in range(count)
    ]


@pytest.mark.parametrize("s", [0.5, 1, 2, 3])
@pytest.mark.parametrize("chunk", [None, 1, 5, 14, 99])
def test_neuron_constants_are_the_plain_loop(weight, s, chunk):
    expected = torch.tensor([s * value for value in crowding(weight, s + 1)], dtype=torch.float64)
    torch.testing.assert_close(neuron_constants(weight, s, chunk), expected, rtol=1e-11, atol=0)


def test_constants_of_the_log_energy_have_factor_one(weight):
    expected = torch.tensor(crowding(weight, 1), dtype=torch.float64)
    torch.testing.assert_close(neuron_constants(weight, 0.0), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_bound_constant_is_the_plain_loop(weight, chunk):
    expected = 4 * math.sqrt(math.fsum(value**2 for value in crowding(weight, 3)))
    assert bound_constant(weight, chunk) == pytest.approx(expected, rel=1e-12)


def test_bound_constant_is_twice_the_norm_of_the_neuron_constants(weight):
    assert bound_constant(weight) == pytest.approx(2 * float(neuron_constants(weight, 2).norm()), rel=1e-12)


def test_units(weight):
    """Distances carry the weight's unit: K goes with its -3rd power, the bound with its square."""
    after = weight + 1e-3 * normal(14, 6, seed=1)
    assert bound_constant(10 * weight) == pytest.approx(1e-3 * bound_constant(weight))
    assert lower_bound(10 * weight, 10 * after) == pytest.approx(100 * lower_bound(weight, after), rel=1e-6)
    assert bound_constant(weight + 3.0) == pytest.approx(bound_constant(weight), rel=1e-9)


@FEW
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 999), st.floats(-9, -3))
def test_small_updates_obey_the_theorem(d_out, d_in, seed, magnitude):
    weight, noise = normal(d_out, d_in, seed=seed), normal(d_out, d_in, seed=seed + 1000)
    delta = noise / noise.norm() * torch.cdist(weight, weight).fill_diagonal_(math.inf).min() * 10**magnitude
    after = weight + delta
    moved = abs(delta_he(weight, after))
    assert moved <= bound_constant(weight) * math.sqrt(output_perturbation(delta)) * (1 + 1e-2)
    assert lower_bound(weight, after) <= output_perturbation(delta) * (1 + 1e-2)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_small_updates_obey_equation_33(weight, s):
    delta = 1e-5 * normal(14, 6, seed=1)
    energies = []
    for rows in (weight, weight + delta):
        distances = torch.pdist(rows)
        energies.append(float((-distances.log() if s == 0 else distances**-s).sum()))
    assert abs(energies[1] - energies[0]) <= float(neuron_constants(weight, s) @ delta.norm(dim=1))


def test_the_bound_is_attained_by_two_neurons_that_part():
    """With two rows moving straight apart every inequality of the proof is an equality, to first order."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    after = weight * (1 + 1e-6)
    assert lower_bound(weight, after) == pytest.approx(output_perturbation(after - weight), rel=1e-4)


def test_projection_lowers_what_the_theorem_bounds(weight):
    delta = normal(14, 6, seed=2)
    projected = PrincipalSpace.fit(weight).project(delta, 0.8)
    constants = neuron_constants(weight, 1.0)
    assert output_perturbation(projected) < output_perturbation(delta)
    assert float(constants @ projected.norm(dim=1)) <= float(constants @ delta.norm(dim=1))


def test_output_perturbation_is_the_change_over_an_orthonormal_basis(weight):
    basis = torch.linalg.qr(normal(6, 6, seed=3)).Q
    assert output_perturbation(weight) == pytest.approx(float((weight @ basis).square().sum()), rel=1e-12)
    assert output_perturbation(torch.zeros(3, 4)) == 0.0
    big = torch.full((4, 4), 1e4, dtype=torch.float16)  # its sum of squares does not fit float16
    assert output_perturbation(big) == pytest.approx(16e8, rel=1e-6)


def test_a_lone_neuron_is_bounded_by_nothing():
    assert bound_constant(normal(1, 4)) == 0.0
    assert lower_bound(normal(1, 4), normal(1, 4, seed=1)) == 0.0
    assert neuron_constants(normal(1, 4)).tolist() == [0.0]


def test_zero_rows_are_points_but_equal_rows_are_an_error(weight):
    weight[3] = 0.0
    assert math.isfinite(bound_constant(weight))
    weight[9] = 0.0
    for function in (bound_constant, neuron_constants, lambda rows: delta_he(rows, rows + 1)):
        with pytest.raises(ModelError, match="rows 3 and 9"):
            function(weight)


def test_bad_input_is_refused_before_work(weight):
    with pytest.raises(ConfigError, match="s: got -1"):
        neuron_constants(weight, -1)
    with pytest.raises(ConfigError, match="chunk: got 0"):
        bound_constant(weight, chunk=0)
    with pytest.raises(ModelError, match=r"\(3,\)"):
        output_perturbation(torch.ones(3))
    with pytest.raises(ModelError, match="NaN"):
        bound_constant(weight * float("nan"))
    with pytest.raises(ModelError, match="expected the shape of before"):
        lower_bound(weight, weight[1:])
