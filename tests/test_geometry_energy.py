"""Hyperspherical energy against plain double loops, and its symmetries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import delta_he, energy_change, hyperspherical_energy

FEW = settings(deadline=None, max_examples=15, derandomize=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(rows, term):
    """The sum over i != j of ``term(‖row i − row j‖)``, pair by pair."""
    count = rows.shape[0]
    pairs = ((i, j) for i in range(count) for j in range(count) if i != j)
    return math.fsum(term(float(torch.linalg.vector_norm(rows[i] - rows[j]))) for i, j in pairs)


def unit(weight):
    return weight / weight.norm(dim=1, keepdim=True)


def riesz(s):
    return (lambda d: -math.log(d)) if s == 0 else (lambda d: d**-s)


@pytest.mark.parametrize("s", [0, 1, 2, 3])
@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
def test_energy_is_the_double_loop(s, chunk):
    weight = normal(13, 6)
    found = hyperspherical_energy(weight, s=s, chunk=chunk)
    assert found == pytest.approx(loop(unit(weight), riesz(s)), rel=1e-12)


@FEW
@given(st.integers(1, 12), st.integers(2, 8), st.integers(0, 99), st.floats(0, 4), st.integers(1, 13))
def test_energy_is_the_double_loop_on_any_shape(count, length, seed, s, chunk):
    weight = normal(count, length, seed=seed)
    found = hyperspherical_energy(weight, s, chunk)
    assert found == pytest.approx(loop(unit(weight), riesz(s)), rel=1e-9, abs=1e-12)


def test_known_configurations():
    pole = torch.tensor([[1.0, 0.0], [-5.0, 0.0]])
    assert hyperspherical_energy(pole) == pytest.approx(2 * 0.5)
    assert hyperspherical_energy(pole, s=0) == pytest.approx(-2 * math.log(2))  # the log form may be negative
    assert hyperspherical_energy(torch.eye(5), s=2) == pytest.approx(5 * 4 / 2)
    assert hyperspherical_energy(torch.ones(1, 4)) == 0.0


@pytest.mark.parametrize("s", [0.0, 1.0, 2.5])
def test_energy_ignores_the_scale_of_rows_and_rotations(s):
    weight = normal(30, 12)
    rotation = torch.linalg.qr(normal(12, 12, seed=1)).Q
    scaled = weight * torch.logspace(-3, 3, 30, dtype=torch.float64)[:, None]
    expected = hyperspherical_energy(weight, s)
    assert hyperspherical_energy(scaled, s) == pytest.approx(expected, rel=1e-12)
    assert hyperspherical_energy(weight @ rotation, s) == pytest.approx(expected, rel=1e-12)
    assert hyperspherical_energy(weight.flip(0), s) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_summed_in_float64(dtype):
    weight = torch.nn.Parameter(normal(40, 16).to(dtype))
    expected = loop(unit(weight.detach().double()), riesz(1))
    assert hyperspherical_energy(weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_near_neighbours_keep_their_precision(gap, chunk):
    """2 − 2 cos would give 0 or noise here: at a gap of 1e-10 the cosine is 1 to the last bit."""
    weight = torch.eye(5, dtype=torch.float64)
    weight = torch.cat([weight, weight[1:2] + gap * weight[3:4]])
    angle = math.atan(gap)  # of the new row to row 1; three rows are orthogonal to it
    distances = [2 * math.sin(angle / 2), 2 * math.sin((math.pi / 2 - angle) / 2), *[math.sqrt(2)] * 3]
    expected = 5 * 4 / math.sqrt(2) + 2 * sum(1 / distance for distance in distances)
    assert hyperspherical_energy(weight, chunk=chunk) == pytest.approx(expected, rel=1e-9 + 1e-15 / gap)


def test_collapsed_weights_are_still_measured():
    weight = 1.0 + 1e-5 * normal(30, 50)
    assert hyperspherical_energy(weight, s=2) == pytest.approx(loop(unit(weight), riesz(2)), rel=1e-9)


@pytest.mark.parametrize("s", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_rows_of_one_direction_are_named(s, chunk):
    weight = normal(8, 5)
    weight[6] = 3.7 * weight[2]
    with pytest.raises(ModelError, match="rows 2 and 6.*infinite energy"):
        hyperspherical_energy(weight, s, chunk)


def test_a_zero_row_is_named():
    weight = normal(8, 5)
    weight[[3, 7]] = 0.0
    with pytest.raises(ModelError, match="row 3 of the weight.*2 of 8 rows.*dead neurons"):
        hyperspherical_energy(weight)


@pytest.mark.parametrize("s", [-1.0, float("inf"), float("nan"), "1"])
def test_s_outside_its_range_is_refused(s):
    with pytest.raises(ConfigError, match=rf"s: got {s!r}, expected a finite number >= 0"):
        hyperspherical_energy(normal(3, 3), s)


@pytest.mark.parametrize("chunk", [0, -3, 1.5])
def test_chunk_must_be_a_number_of_rows(chunk):
    with pytest.raises(ConfigError, match="chunk: got"):
        hyperspherical_energy(normal(3, 3), chunk=chunk)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_energy_change_is_relative_zero_for_none_and_positive_for_crowding(s):
    weight = normal(20, 10)
    crowded = unit(weight) + 0.5
    assert energy_change(weight, 7 * weight, s) == pytest.approx(0.0, abs=1e-12)
    assert energy_change(weight, crowded, s) > 0 > energy_change(crowded, weight, s)


def test_energy_change_by_its_definition():
    before, after = normal(9, 5), normal(9, 5, seed=1)
    old, new = (hyperspherical_energy(w, 1.0) for w in (before, after))
    assert energy_change(before, after, 1.0, chunk=2) == pytest.approx(new / old - 1)
    means = [math.exp(hyperspherical_energy(w, 0.0) / 72) for w in (before, after)]  # geometric means of 1/distance
    assert energy_change(before, after, 0.0) == pytest.approx(means[1] / means[0] - 1)


def test_log_change_is_the_limit_of_small_orders():
    """(E_s(after) / E_s(before) − 1) / s tends to the mean change of the logarithms."""
    before, after = normal(9, 5), normal(9, 5, seed=1)
    assert energy_change(before, after, 1e-6) / 1e-6 == pytest.approx(
        math.log1p(energy_change(before, after, 0)), 1e-4
    )


def test_a_single_neuron_has_no_change():
    with pytest.raises(ModelError, match="before's rows: got 1"):
        energy_change(normal(1, 5), normal(1, 5))


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_delta_he_is_equation_26(chunk):
    before, after = normal(11, 6), normal(11, 6, seed=1)
    expected = loop(before, riesz(2)) - loop(after, riesz(2))
    assert delta_he(before, after, chunk) == pytest.approx(expected, rel=1e-11)


def test_delta_he_signs_and_scale():
    weight = normal(10, 6)
    assert delta_he(weight, weight) == 0.0
    assert delta_he(weight, 2 * weight) == pytest.approx(0.75 * loop(weight, riesz(2)))  # rows are not normalised
    assert delta_he(weight, 2 * weight) == pytest.approx(-delta_he(2 * weight, weight))
    shifted = weight + 5.0
    assert delta_he(weight, shifted) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("compare", [energy_change, delta_he])
def test_two_weights_must_agree_in_shape_and_be_finite(compare):
    with pytest.raises(ModelError, match=r"\(4, 3\), expected the shape of before, \(3, 4\)"):
        compare(normal(3, 4), normal(4, 3))
    broken = normal(3, 4)
    broken[0, 0] = float("nan")
    with pytest.raises(ModelError, match="after: got 'NaN or infinite in 1 of 12"):
        compare(normal(3, 4), broken)
