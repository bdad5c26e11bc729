"""The gradient of the energy against autograd and against the energy itself."""

import pytest
import torch

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import energy_gradient, hyperspherical_energy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(weight, s):
    """The sum over ordered pairs, for autograd."""
    rows = weight / weight.norm(dim=1, keepdim=True)
    apart = (rows[:, None] - rows[None]).square().sum(-1)[~torch.eye(len(rows), dtype=torch.bool)]
    return (-0.5 * apart.log()).sum() if s == 0 else apart.pow(-0.5 * s).sum()


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("chunk", [None, 1, 5, 40])
def test_it_is_autograds(s, chunk):
    weight = normal(11, 7) * torch.logspace(-1, 1, 11, dtype=torch.float64)[:, None]
    weight.requires_grad_()
    expected = torch.autograd.grad(plain(weight, s), weight)[0]
    torch.testing.assert_close(energy_gradient(weight, s, chunk), expected, rtol=1e-9, atol=1e-12)


def test_a_small_step_along_it_moves_the_energy_by_its_square():
    weight = normal(40, 16, seed=1).float()
    gradient = energy_gradient(weight, 2.0)
    step = 1e-6 / gradient.norm()
    before = hyperspherical_energy(weight, 2.0)
    after = hyperspherical_energy(weight.double() + step * gradient, 2.0)
    assert after - before == pytest.approx(float(step * gradient.square().sum()), rel=1e-3)


def test_no_neuron_is_lengthened():
    weight = normal(12, 5)
    assert float((energy_gradient(weight, 1.0) * weight).sum(dim=1).abs().max()) < 1e-10


def test_a_zero_row_has_no_gradient():
    with pytest.raises(ModelError, match="row 1"):
        energy_gradient(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
