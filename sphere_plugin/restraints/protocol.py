"""What a restraint is.

A restraint is configured once, bound to each weight it will guard, and then called with every update of that weight.
Binding is what lets one protocol serve restraints that look at the current weight only (RECT), at the weight as it was
before any edit (PRUNE, or SPHERE with ``basis="pretrained"``), or keep something between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Restrained:
    """What came out of a restraint.

    Attributes:
        delta: the update to write, [d_out, d_in], on the device of the update that went in.
        removed_share: share of the update's squared Frobenius norm that was taken away; at most 1, and negative where
            a restraint lengthened the update (PRUNE, correcting earlier ones).
        rank: dimension of the space the update was held away from; 0 if the restraint has none.
    """

    delta: Tensor
    removed_share: float
    rank: int


class BoundRestraint(Protocol):
    """A restraint for one weight."""

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained:
        """Restrain ``delta`` [d_out, d_in], an update of ``weight`` [d_out, d_in] as it is now."""
        ...


class Restraint(Protocol):
    """A configured restraint, not yet tied to a weight."""

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie the restraint to a weight, given as it was before any edit, [d_out, d_in]."""
        ...
