"""Several restraints in a row: RECT, then PRUNE, then SPHERE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from sphere_plugin.errors import ConfigError
from sphere_plugin.geometry import Factors
from sphere_plugin.restraints.protocol import (
    BoundRestraint,
    Restrained,
    Restraint,
    memory_of,
    recall,
    removed_share,
    restrain,
)


@dataclass(frozen=True)
class Chain:
    """Restraints applied from first to last, each to what the one before let through; itself a restraint.

    All members see the same weight, as it is before the update is written. The order is yours, and it matters. Put
    RECT first, PRUNE after it, SPHERE last:

    - SPHERE's promise, of the update along U nothing but the share 1 − α, holds for what SPHERE returns. RECT's zeros
      or PRUNE's correction after it would break it. The authors' code, too, projects last.
    - PRUNE's promise is about W + ΔW. RECT after it would cut holes into its correction. SPHERE after it takes a share
      of the correction, too, so singular values along U may stay above what PRUNE made them.

    An empty chain returns every update as it is.

    Attributes:
        members: configured restraints, first to last; any sequence is taken and kept as a tuple.

    Raises:
        ConfigError: a member cannot be bound, so it is not a restraint.
    """

    members: Sequence[Restraint]

    def __post_init__(self) -> None:
        remedy = "Write Chain((RectConfig(), SphereConfig())), with the parentheses of each."
        if not isinstance(self.members, Sequence):
            raise ConfigError("members", self.members, "a sequence of restraints", remedy)
        for index, member in enumerate(self.members):
            if isinstance(member, type) or not callable(getattr(member, "bind", None)):
                raise ConfigError(f"members[{index}]", member, "a configured restraint, with a method bind", remedy)
        object.__setattr__(self, "members", tuple(self.members))

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie every member to a weight, given as it was before any edit, [d_out, d_in]."""
        return _BoundChain(tuple(member.bind(pretrained) for member in self.members))


@dataclass(frozen=True)
class _BoundChain:
    members: tuple[BoundRestraint, ...]

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        """Restrain ``delta``; the share is of the whole chain, the rank the largest of any member, so SPHERE's."""
        return cast(Restrained[Tensor], self._apply(weight, delta))  # no member makes factors of a matrix

    def factored(self, weight: Tensor, delta: Factors) -> Restrained[Tensor | Factors]:
        """The same for factors; dense from the first member on that does not take them."""
        return self._apply(weight, delta)

    def memory(self) -> dict[str, Tensor]:
        """What the members remember, see `Remembering`."""
        kept = [memory_of(member) for member in self.members]
        return {f"{number}/{name}": one for number, known in enumerate(kept) for name, one in known.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """The reverse of `memory`."""
        for number, member in enumerate(self.members):
            start = f"{number}/"
            recall(member, {name[len(start) :]: one for name, one in memory.items() if name.startswith(start)})

    def _apply(self, weight: Tensor, delta: Tensor | Factors) -> Restrained[Tensor | Factors]:
        passed, rank = delta, 0
        for member in self.members:
            step = restrain(member, weight, passed)
            passed, rank = step.delta, max(rank, step.rank)
        return Restrained(passed, removed_share=removed_share(delta, passed), rank=rank)
