"""Controls for experiments: what SPHERE's effect would be if it were only a shorter step, or any subspace would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, norm, removed_share
from sphere_plugin.restraints.sphere import SphereConfig

Control = Literal["shrunk", "random"]
_SEED: Final = 0


@dataclass(frozen=True)
class ControlConfig:
    """A restraint that resembles SPHERE in one thing only.

    Attributes:
        kind: "shrunk" writes the update in its own direction, as long as SPHERE would leave it. "random" projects it
            away from a random subspace of the dimension of SPHERE's, with SPHERE's alpha; a new one for every update.
        sphere: the projection that is resembled.

    Raises:
        ConfigError: another kind.
    """

    kind: Control
    sphere: SphereConfig

    def __post_init__(self) -> None:
        if self.kind not in get_args(Control):
            raise ConfigError("control", self.kind, " or ".join(get_args(Control)), "Leave it out for SPHERE itself.")

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie the control to a weight, given as it was before any edit, [d_out, d_in]."""
        return _Bound(self, self.sphere.bind(pretrained))


@dataclass
class _Bound:
    config: ControlConfig
    sphere: BoundRestraint
    _calls: int = field(default=0, repr=False)

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        if self.config.kind == "shrunk":
            like = self.sphere(weight, delta)
            kept = delta * _ratio(like.delta, delta)
            return Restrained(kept, removed_share(delta, kept), like.rank)
        space = PrincipalSpace.fit(weight, self.config.sphere.eta, row_normalize=self.config.sphere.row_normalize)
        basis = self._basis(weight, space.rank)
        kept = delta - self.config.sphere.alpha * (delta @ basis) @ basis.T
        return Restrained(kept, removed_share(delta, kept), space.rank)

    def _basis(self, weight: Tensor, rank: int) -> Tensor:
        """Orthonormal columns in a random direction, [d_in, rank]."""
        generator = torch.Generator().manual_seed(_SEED + self._calls)
        self._calls += 1
        columns = torch.randn(weight.shape[1], rank, generator=generator).to(weight)
        basis: Tensor = torch.linalg.qr(columns).Q
        return basis

    def memory(self) -> dict[str, Tensor]:
        """How many random subspaces there have been, see `Remembering`."""
        return {"calls": torch.tensor(self._calls)}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """The reverse of `memory`."""
        self._calls = int(memory.get("calls", torch.tensor(0)))


def _ratio(kept: Tensor | Factors, delta: Tensor | Factors) -> float:
    whole = norm(delta)
    return norm(kept) / whole if whole else 1.0
