"""Changes of a given size: what they move, and what they cannot."""

import pytest
import torch

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import energy_change
from sphere_plugin.geometry.perturb import along_energy, scattered, turned


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [0.01, 0.2])
@pytest.mark.parametrize("width", [12, 13])
def test_all_are_of_the_size_that_was_asked_for(size, width):
    weight = normal(30, width)
    raised = along_energy(weight, size)
    for delta in (raised, along_energy(weight, size, rising=False), turned(weight, size, random())):
        assert float(delta.norm() / weight.norm()) == pytest.approx(size, rel=1e-9)
    across = scattered(weight, raised, random(7))
    torch.testing.assert_close(across.norm(dim=1), raised.norm(dim=1))
    assert float((across * weight).sum(dim=1).abs().max()) < 1e-9


def test_the_energy_goes_where_it_was_sent_and_turning_leaves_it():
    weight = normal(60, 24, seed=1)
    up = energy_change(weight, weight + along_energy(weight, 0.05), 2.0)
    down = energy_change(weight, weight + along_energy(weight, 0.05, rising=False), 2.0)
    stays = energy_change(weight, weight + turned(weight, 0.05, random()), 2.0)
    aside = energy_change(weight, weight + scattered(weight, along_energy(weight, 0.05), random()), 2.0)
    assert up > 0 > down
    assert abs(stays) < 1e-12
    assert abs(aside) < 0.3 * min(up, -down)


def test_more_steps_get_further():
    weight = normal(60, 24, seed=2)
    few, many = (energy_change(weight, weight + along_energy(weight, 0.2, steps=n), 2.0) for n in (1, 20))
    assert many > few


def test_turning_is_a_rotation():
    weight = normal(40, 8)
    after = weight + turned(weight, 0.3, random(3))
    torch.testing.assert_close(after @ after.T, weight @ weight.T)


@pytest.mark.parametrize("size", [0, -0.1, 1.0, True, "big"])
def test_sizes_are_checked(size):
    with pytest.raises(ConfigError, match="size"):
        turned(normal(3, 4), size, random())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused(wrong):
    delta = normal(3, 4, seed=1)
    delta[1, 2] = wrong
    with pytest.raises(ModelError, match="delta: got 'NaN or infinity', expected finite entries"):
        scattered(normal(3, 4), delta, random())
