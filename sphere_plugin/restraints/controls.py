"""Controls for experiments: what SPHERE's effect would be if it were only a shorter step, or any subspace would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError
from sphere_plugin.files import fingerprint
from sphere_plugin.geometry import Factors
from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, norm, removed_share
from sphere_plugin.restraints.sphere import SphereConfig

Control = Literal["shrunk", "random"]


@dataclass(frozen=True)
class ControlConfig:
    """A restraint that resembles SPHERE in one thing only.

    Attributes:
        kind: "shrunk" writes the update in its own direction, as long as SPHERE would leave it. "random" projects it
            away from a random subspace of the dimension of SPHERE's, with SPHERE's alpha: a new one for every update
            of every weight, the same ones in every run.
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
        return _Bound(self, self.sphere.bind(pretrained), int(fingerprint([("", pretrained)])[:12], 16))


@dataclass
class _Bound:
    config: ControlConfig
    sphere: BoundRestraint
    seed: int
    _calls: int = field(default=0, repr=False)

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        like = self.sphere(weight, delta)
        if self.config.kind == "shrunk":
            kept = delta * _ratio(like.delta, delta)
        else:
            basis = self._basis(delta, like.rank)
            kept = delta - self.config.sphere.alpha * (delta @ basis) @ basis.T
        return Restrained(kept, removed_share(delta, kept), like.rank)

    def _basis(self, delta: Tensor, rank: int) -> Tensor:
        """Orthonormal columns in a random direction, [d_in, rank]."""
        generator = torch.Generator().manual_seed(self.seed + self._calls)
        self._calls += 1
        columns = torch.randn(delta.shape[1], rank, generator=generator).to(delta)
        basis: Tensor = torch.linalg.qr(columns).Q
        return basis

    def memory(self) -> dict[str, Tensor]:
        """How many random subspaces there have been, see `Remembering`."""
        return {"calls": torch.tensor(self._calls)} if self._calls else {}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """The reverse of `memory`."""
        self._calls = int(memory.get("calls", torch.tensor(0)))


def _ratio(kept: Tensor | Factors, delta: Tensor | Factors) -> float:
    whole = norm(delta)
    return norm(kept) / whole if whole else 1.0
