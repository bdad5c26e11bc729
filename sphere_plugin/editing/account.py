"""What a batch did: the reports of our own editor, and the line of the log for all methods alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphere_plugin.editing.aim import Aimed
from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, hyperspherical_energy

_LOG = logging.getLogger("sphere_plugin")


@dataclass(frozen=True)
class LayerReport:
    """What a batch did to one weight.

    Attributes:
        name: the parameter.
        rank: dimension of the principal space the update was held away from; 0 without SPHERE.
        removed_share: share of the update's squared norm that the restraints took away; negative where PRUNE's
            correction of earlier updates made it longer.
        solved_norm: Frobenius norm of the update before the restraints.
        update_norm: Frobenius norm of what was written, after rounding to the weight's dtype.
        weight_norm: Frobenius norm of the weight it was written to.
        update: what was added, [d_out, d_in] float32, before rounding to the weight's dtype.
        null_space: dimension of AlphaEdit's null space; None for another base method.
    """

    name: str
    rank: int
    removed_share: float
    solved_norm: float
    update_norm: float
    weight_norm: float
    update: Tensor | Factors = field(repr=False, compare=False)
    null_space: int | None = None

    @property
    def right_norm(self) -> float | None:
        """Mean norm of the update's right vectors; None where it is not in factors."""
        if not isinstance(self.update, Factors):
            return None
        return float(torch.linalg.vector_norm(self.update.right, dim=0).mean())


@dataclass(frozen=True)
class EditReport:
    """What a batch did.

    Attributes:
        facts: how many were written.
        layers: one report per edited weight.
        aimed: the targets, the loss each search ended with and its steps.
        keys: layer -> [d_in, facts], the keys a later batch will know these facts by; see `Editor.resume`.
    """

    facts: int
    layers: tuple[LayerReport, ...]
    aimed: Aimed
    keys: Mapping[int, Tensor] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Touched:
    """A weight that an edit was to change.

    Attributes:
        name: the parameter.
        rank: dimension of the principal space its update was held away from; 0 without SPHERE.
        removed_share: share of the update's squared norm that the restraints took away; see `Restrained`.
        before: the weight before the edit, [d_out, d_in], any dtype; None if it is not at hand.
        after: the weight after it, on the same device; None if it is not at hand.
        solved_norm: Frobenius norm of the update before the restraints. Its square is what ``removed_share`` counts
            for in the mean over weights; left at 1 everywhere, the mean is the plain one.
    """

    name: str
    rank: int
    removed_share: float
    before: Tensor | None
    after: Tensor | None
    solved_norm: float = 1.0


def log_apply(method: str, facts: int | None, touched: Sequence[Touched]) -> None:
    """Log what an edit did, in one line under the logger "sphere_plugin".

    At level INFO: the method, how many facts and weights, r, the removed share of the whole update, and the
    hyperspherical energy before and after, summed over the weights. Energy costs two products W Wᵀ in float64 for
    each weight, so nothing is measured unless the logger is enabled for INFO. A weight whose ``before`` or ``after``
    is None counts as changed, and the line then has no energy; one that has no energy (a row of zeros) is named.

    If no weight changed at all, there is a warning instead.

    Args:
        method: with its restraints, "MEMIT + RECT + SPHERE".
        facts: how many were to be written; None if it is not known.
        touched: the weights.
    """
    if not any(_changed(one) for one in touched):
        what = "its edit" if facts is None else _count(facts, "fact")
        _LOG.warning("%s changed no weight: the model is as it was before %s", method, what)
        return
    if not _LOG.isEnabledFor(logging.INFO):
        return
    weights = _count(len(touched), "weight")
    ranks = [one.rank for one in touched]
    _LOG.info(
        "%s %s: r %s, %.1f %% of the update removed, %s",
        method,
        f"changed {weights}" if facts is None else f"wrote {_count(facts, 'fact')} into {weights}",
        min(ranks) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
        round(100 * _removed(touched), 1) + 0.0,  # no -0.0
        _energies(touched),
    )


def _changed(one: Touched) -> bool:
    return one.before is None or one.after is None or bool((one.before != one.after).any())


def _removed(touched: Sequence[Touched]) -> float:
    """Returns the share of all updates together, by their squared norms; 0 if all of them are zero."""
    whole = sum(one.solved_norm**2 for one in touched)
    return sum(one.removed_share * one.solved_norm**2 for one in touched) / whole if whole else 0.0


def _energies(touched: Sequence[Touched]) -> str:
    sums = [0.0, 0.0]
    for one in touched:
        for number, weight in enumerate((one.before, one.after)):
            if weight is None:
                return "hyperspherical energy not measured"
            try:
                sums[number] += hyperspherical_energy(weight)
            except ModelError as error:
                return f"no hyperspherical energy ({one.name}, {error.culprit}: {error.got})"
    return f"hyperspherical energy {sums[0]:.8g} -> {sums[1]:.8g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
