"""What a restraint is.

A restraint is configured once, bound to each weight it will guard, and then called with every update of that weight.
Binding is what lets one protocol serve restraints that look at the current weight only (RECT), at the weight as it was
before any edit (PRUNE, or SPHERE with ``basis="pretrained"``), or keep something between calls.

The closed forms return their updates in factors. A bound restraint that has a method ``factored`` gets them so; any
other is called with the dense matrix, which is all that a restraint has to know about. `restrain` does the asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from sphere_plugin.geometry import Factors

Update = TypeVar("Update", bound=Tensor | Factors, covariant=True)


@dataclass(frozen=True)
class Restrained(Generic[Update]):
    """What came out of a restraint.

    Attributes:
        delta: the update to write, [d_out, d_in], on the device of the update that went in: a matrix, or `Factors`
            where factors went in and a method ``factored`` kept them.
        removed_share: share of the update's squared Frobenius norm that was taken away; at most 1, and negative where
            a restraint lengthened the update (PRUNE, correcting earlier ones).
        rank: dimension of the space the update was held away from; 0 if the restraint has none.
    """

    delta: Update
    removed_share: float
    rank: int


class BoundRestraint(Protocol):
    """A restraint for one weight."""

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        """Restrain ``delta`` [d_out, d_in], an update of ``weight`` [d_out, d_in] as it is now."""
        ...


@runtime_checkable
class FactoredRestraint(Protocol):
    """What a bound restraint may have beside being called."""

    def factored(self, weight: Tensor, delta: Factors) -> Restrained[Tensor | Factors]:
        """Restrain ``delta`` in factors: the same update as the call would return, up to rounding."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a bound restraint has that remembers something of earlier calls which the weight does not tell."""

    def memory(self) -> dict[str, Tensor]:
        """Return what it remembers, by name; empty before the first call."""
        ...

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Remember what ``memory``, of a restraint configured alike, holds; the next call is as it would be there."""
        ...


class Restraint(Protocol):
    """A configured restraint, not yet tied to a weight."""

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie the restraint to a weight, given as it was before any edit, [d_out, d_in]."""
        ...


def restrain(bound: BoundRestraint, weight: Tensor, delta: Tensor | Factors) -> Restrained[Tensor | Factors]:
    """Restrain an update by ``bound``, in factors if it has them and ``bound`` takes them, as a matrix otherwise.

    Args:
        bound: the restraint.
        weight: [d_out, d_in], as it is now.
        delta: [d_out, d_in], an update of it.
    """
    if isinstance(delta, Tensor):
        return bound(weight, delta)
    return bound.factored(weight, delta) if isinstance(bound, FactoredRestraint) else bound(weight, delta.dense())


def memory_of(bound: BoundRestraint) -> dict[str, Tensor]:
    """Returns what ``bound`` remembers of earlier calls, see `Remembering`; empty where that is nothing."""
    return bound.memory() if isinstance(bound, Remembering) else {}


def recall(bound: BoundRestraint, memory: Mapping[str, Tensor]) -> None:
    """Gives ``bound`` what `memory_of` one configured alike returned."""
    if isinstance(bound, Remembering):
        bound.recall(memory)


def memories(bound: Mapping[Any, BoundRestraint]) -> dict[str, Tensor]:
    """Returns what several restraints remember, as "<key>/<name>"."""
    kept = {key: memory_of(one) for key, one in bound.items()}
    return {f"{key}/{name}": tensor for key, known in kept.items() for name, tensor in known.items()}


def recall_all(bound: Mapping[Any, BoundRestraint], memory: Mapping[str, Tensor]) -> None:
    """Gives restraints what `memories` returned for others with the same keys."""
    for key, one in bound.items():
        start = f"{key}/"
        recall(one, {name[len(start) :]: kept for name, kept in memory.items() if name.startswith(start)})


def norm(update: Tensor | Factors) -> float:
    """Returns the Frobenius norm of an update [d_out, d_in], summed in float64."""
    if isinstance(update, Factors):
        return update.norm()
    return float(torch.linalg.vector_norm(update.detach(), dtype=torch.float64))


def removed_share(before: Tensor | Factors, after: Tensor | Factors) -> float:
    """Returns 1 − ‖after‖² / ‖before‖² of two updates [d_out, d_in]; negative where ``after`` is the longer one.

    An update that was zero from the start lost nothing: 0.0.
    """
    whole = norm(before)
    return 1.0 - (norm(after) / whole) ** 2 if whole else 0.0
