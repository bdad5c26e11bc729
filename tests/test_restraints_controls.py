"""Controls resemble SPHERE in one thing only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.restraints import SphereConfig, memory_of, recall, restrain
from sphere_plugin.restraints.controls import ControlConfig

SPHERE = SphereConfig(eta=0.5, alpha=0.8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, DELTA = normal(24, 60) * torch.logspace(0, -1, 60), normal(24, 60, seed=1)


def removed(kept: Tensor) -> Tensor:
    """What was taken away, in float64."""
    return DELTA.double() - kept.double()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_shrunk_has_the_length_of_spheres_update_and_its_own_direction(factored: bool, alpha: float) -> None:
    sphere = SphereConfig(eta=0.5, alpha=alpha)
    delta = Factors(normal(24, 3, seed=2), normal(60, 3, seed=3)) if factored else DELTA
    dense = delta.dense() if isinstance(delta, Factors) else delta
    like = sphere.bind(WEIGHT)(WEIGHT, dense)
    found = restrain(ControlConfig("shrunk", sphere).bind(WEIGHT), WEIGHT, delta)
    assert float(found.delta.norm()) == pytest.approx(float(like.delta.norm()), rel=1e-5)
    torch.testing.assert_close(found.delta / found.delta.norm(), dense / dense.norm())
    assert (found.rank, found.removed_share) == (like.rank, pytest.approx(like.removed_share, rel=1e-4))
    again = restrain(ControlConfig("shrunk", sphere).bind(WEIGHT), WEIGHT, torch.zeros_like(WEIGHT))
    assert not again.delta.any() and again.removed_share == 0.0


@pytest.mark.parametrize("basis", ["current", "pretrained"])
def test_random_removes_a_subspace_of_spheres_dimension(basis: str) -> None:
    sphere = SphereConfig(eta=0.5, alpha=0.8, basis=basis)
    now = WEIGHT + 2.0 * DELTA  # of another rank
    bound = ControlConfig("random", sphere).bind(WEIGHT)
    space = PrincipalSpace.fit(WEIGHT if basis == "pretrained" else now, 0.5)
    spaces = []
    for _ in range(3):
        found = bound(now, DELTA)
        assert found.rank == space.rank
        gone = removed(found.delta)
        sizes = torch.linalg.svdvals(gone)
        assert int((sizes > 1e-5 * sizes[0]).sum()) == space.rank
        basis_of = torch.linalg.svd(gone, full_matrices=False).Vh[: space.rank].T
        torch.testing.assert_close(found.delta.double() @ basis_of, 0.2 * DELTA.double() @ basis_of, atol=1e-5, rtol=0)
        outside = torch.eye(60, dtype=torch.float64) - basis_of @ basis_of.T
        torch.testing.assert_close(found.delta.double() @ outside, DELTA.double() @ outside, atol=1e-5, rtol=0)
        spaces.append(basis_of)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        angles = torch.linalg.svdvals(spaces[one].T @ spaces[other])
        assert float(angles.square().mean()) < 0.7, "another subspace each time"
    overlap = torch.linalg.svdvals(spaces[0].T @ space.basis.double()).square().mean()
    assert float(overlap) < 0.7, "and not SPHERE's"


def test_every_weight_has_its_own_subspaces_and_every_run_the_same() -> None:
    config = ControlConfig("random", SPHERE)
    one, same, other = (config.bind(weight)(WEIGHT, DELTA).delta for weight in (WEIGHT, WEIGHT, WEIGHT + 1e-3))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_random_goes_on_where_it_stopped() -> None:
    config = ControlConfig("random", SPHERE)
    bound = config.bind(WEIGHT)
    assert memory_of(bound) == {}
    first, second, third = (bound(WEIGHT, DELTA).delta for _ in range(3))
    assert not torch.equal(first, second)
    later = config.bind(WEIGHT)
    recall(later, {"calls": torch.tensor(2)})
    assert torch.equal(later(WEIGHT, DELTA).delta, third)
    recall(later, {})
    assert torch.equal(later(WEIGHT, DELTA).delta, first)
    assert memory_of(ControlConfig("shrunk", SPHERE).bind(WEIGHT)) == {}


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="control: got 'long', expected shrunk or random"):
        ControlConfig("long", SPHERE)
