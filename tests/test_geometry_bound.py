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
from sphere_plugin.geometry.bound import bound_terms, step_factor

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


# ---- both sides of one update ----


@pytest.mark.parametrize("chunk", [None, 1, 5, 99])
def test_terms_are_those_of_the_functions_alone(weight, chunk):
    after = weight + 0.2 * normal(14, 6, seed=1)
    terms = bound_terms(weight, after, chunk)
    assert terms.change == pytest.approx(delta_he(weight, after), rel=1e-12)
    assert terms.constant == pytest.approx(bound_constant(weight), rel=1e-12)
    assert terms.perturbation == pytest.approx(output_perturbation(after - weight), rel=1e-12)
    assert terms.moved == pytest.approx(float(neuron_constants(weight, 2) @ (after - weight).norm(dim=1)), rel=1e-12)
    assert terms.ratio == pytest.approx(lower_bound(weight, after) / terms.perturbation, rel=1e-12)
    assert terms.neuron_ratio == pytest.approx(abs(terms.change) / 2 / terms.moved, rel=1e-12)


def test_steps_are_the_plain_loop_and_the_gradient(weight):
    delta = 0.2 * normal(14, 6, seed=1)
    terms = bound_terms(weight, weight + delta)
    pairs = [(i, j) for i in range(14) for j in range(14) if i != j]
    steps = [float((delta[i] - delta[j]).norm() / (weight[i] - weight[j]).norm()) for i, j in pairs]
    assert terms.largest_step == pytest.approx(max(steps), rel=1e-9)
    rows = weight.clone().requires_grad_()
    (2 * -(torch.pdist(rows) ** -2).sum()).backward()  # ΔHE is energy before less energy after, in both orders
    assert terms.first_order == pytest.approx(float((rows.grad * delta).sum()), rel=1e-9)


@FEW
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 999), st.floats(-3, 2))
def test_only_the_small_step_can_break_the_theorem(d_out, d_in, seed, magnitude):
    """For steps of any size: the linear part obeys it, a falling energy obeys it, a rising one by `step_factor`."""
    weight, noise = normal(d_out, d_in, seed=seed), normal(d_out, d_in, seed=seed + 1000)
    terms = bound_terms(weight, weight + 10**magnitude * noise)
    bound, slack = terms.constant * math.sqrt(terms.perturbation), 1 + 1e-9
    assert abs(terms.first_order) <= 2 * terms.moved * slack
    assert 2 * terms.moved <= bound * slack
    assert terms.change <= 2 * terms.moved * slack
    assert -terms.change <= step_factor(terms.largest_step) * 2 * terms.moved * slack


def test_the_step_factor_by_hand():
    assert step_factor(0.0) == 1.0
    assert step_factor(0.5) == pytest.approx(0.75 / 0.25)
    assert step_factor(1.0) == step_factor(2.0) == math.inf


def test_two_neurons_that_meet_break_the_theorem_and_attain_the_step_factor():
    """From a distance of 2 to one of 1: ΔHE = 2 (1/4 − 1) = −3/2, K = 4 sqrt(2)/8, ΔV = 1/2; ratio (3/2)² · 4 = 9."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    terms = bound_terms(weight, weight / 2)
    assert terms.change == pytest.approx(-1.5)
    assert terms.constant == pytest.approx(4 * math.sqrt(2) / 8)
    assert (terms.perturbation, terms.largest_step) == (pytest.approx(0.5), pytest.approx(0.5))
    assert terms.first_order == pytest.approx(-0.5)  # 2 · 2 · 2⁻⁴ · (2, 0)·(−1, 0)
    assert terms.ratio == pytest.approx(9.0)
    assert math.sqrt(terms.ratio) == pytest.approx(terms.neuron_ratio) == pytest.approx(step_factor(0.5))


def test_an_update_of_nothing_breaks_nothing(weight):
    terms = bound_terms(weight, weight.clone())
    assert (terms.change, terms.first_order, terms.ratio, terms.neuron_ratio) == (0.0, 0.0, 0.0, 0.0)


def test_terms_refuse_what_the_bound_refuses(weight):
    with pytest.raises(ModelError, match="expected the shape of before"):
        bound_terms(weight, weight[1:])
    with pytest.raises(ModelError, match="NaN"):
        bound_terms(weight, weight * float("nan"))
    met = weight.clone()
    met[3] = met[9]
    with pytest.raises(ModelError, match="rows 3 and 9"):
        bound_terms(weight, met)


# ---- theorem 4 and the chain of eq. 33-37 ----


@FEW
@given(st.integers(2, 16), st.integers(2, 16), st.integers(0, 999), st.floats(0.0, 2.0), st.floats(0.1, 1.0))
def test_every_bound_of_the_chain_shrinks_with_the_projection_up_to_alpha_two(d_out, d_in, seed, alpha, eta):
    weight, delta = normal(d_out, d_in, seed=seed), normal(d_out, d_in, seed=seed + 1000)
    basis = PrincipalSpace.fit(weight, eta).basis
    projected, slack = delta - alpha * (delta @ basis) @ basis.T, 1 + 1e-12
    lost = alpha * (2 - alpha) * (delta @ basis).square().sum(dim=1)
    torch.testing.assert_close(projected.square().sum(dim=1), delta.square().sum(dim=1) - lost, rtol=1e-6, atol=1e-9)
    constants = neuron_constants(weight, 2.0)
    assert float(constants @ projected.norm(dim=1)) <= float(constants @ delta.norm(dim=1)) * slack
    assert output_perturbation(projected) <= output_perturbation(delta) * slack


def test_what_the_projection_lowers_is_the_bound_not_the_energy():
    """Two neurons that turn, their distance kept: without the part along U they part, and the energy falls."""
    weight = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    space = PrincipalSpace.fit(weight)  # U is the first axis
    projected = space.project(after - weight, 1.0)
    assert output_perturbation(projected) < output_perturbation(after - weight)
    assert delta_he(weight, after) == pytest.approx(0.0, abs=1e-12)
    assert delta_he(weight, weight + projected) == pytest.approx(2 * (1 / 16 - 1 / 32))


def test_a_single_input_may_notice_more_of_a_projected_update():
    """Where the two parts of ΔW z have cancelled."""
    update, z = torch.tensor([[1.0, -1.0]]), torch.tensor([1.0, 1.0])
    space = PrincipalSpace.fit(torch.tensor([[1.0, 0.0]]))
    assert (update @ z).norm() == 0
    assert float((space.project(update, 1.0) @ z).norm()) == pytest.approx(1.0)


@FEW
@given(st.integers(0, 999), st.floats(-3, 3))
def test_a_neuron_turns_by_no_more_than_its_update_over_its_mean_length(seed, magnitude):
    """Which makes the theorem on the sphere one about the update: ‖ŵ' − ŵ‖ <= 2‖Δw‖ / (‖w‖ + ‖w'‖)."""
    before = normal(20, 4, seed=seed)
    after = before + 10**magnitude * normal(20, 4, seed=seed + 1)
    turned = (after / after.norm(dim=1, keepdim=True) - before / before.norm(dim=1, keepdim=True)).norm(dim=1)
    bound = 2 * (after - before).norm(dim=1) / (before.norm(dim=1) + after.norm(dim=1))
    assert bool((turned <= bound * (1 + 1e-9) + 1e-12).all())


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
