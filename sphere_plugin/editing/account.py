"""What a batch did: the reports of our own editor, and the line of the log for all methods alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.editing.aim import Aimed
from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, hyperspherical_energy

_LOG = logging.getLogger("sphere_plugin")

ROUNDING: Final = 0.1  # share of an update that rounding may take before a warning says so


@dataclass(frozen=True)
class LayerReport:
    """What a batch did to one weight.

    Attributes:
        name: the parameter.
        rank: dimension of the principal space the update was held away from; 0 without SPHERE.
        removed_share: share of the update's squared norm that the restraints took away; negative where PRUNE's
            correction of earlier updates made it longer.
        solved_norm: Frobenius norm of the update before the restraints.
        update_norm: Frobenius norm of what the weight has gained, after rounding to its dtype.
        weight_norm: Frobenius norm of the weight it was written to.
        update: what was added, [d_out, d_in] float32, before rounding to the weight's dtype.
        null_space: dimension of AlphaEdit's null space; None for another base method.
        rounding_loss: share of the update's norm that rounding took, see `Written`.
        master_gap: Frobenius norm of what the weight lacks of its master copy; None without one.
    """

    name: str
    rank: int
    removed_share: float
    solved_norm: float
    update_norm: float
    weight_norm: float
    update: Tensor | Factors = field(repr=False, compare=False)
    null_space: int | None = None
    rounding_loss: float = 0.0
    master_gap: float | None = None

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
        keys: layer -> [d_in, facts], the keys a later batch will know these facts by; see `Editor.resume`. None with
            MEMIT, which does not look at earlier edits.
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
        rounding_loss: share of the restrained update's norm that rounding took; None if it is not known.
    """

    name: str
    rank: int
    removed_share: float
    before: Tensor | None
    after: Tensor | None
    solved_norm: float = 1.0
    rounding_loss: float | None = None


def log_apply(method: str, facts: int | None, touched: Sequence[Touched]) -> None:
    """Log what an edit did, in one line under the logger "sphere_plugin".

    At level INFO: the method, how many facts and weights, r, the removed share of the whole update, what of the rest
    rounding took if that is something, and the hyperspherical energy before and after, summed over the weights.
    Energy costs two products W Wᵀ in float64 for each weight, so nothing is measured unless the logger is enabled for
    INFO. A weight whose ``before`` or ``after`` is None counts as changed, and the line then has no energy; one that
    has no energy (a row of zeros) is named.

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
        "%s %s: r %s, %.1f %% of the update removed, %s%s",
        method,
        f"changed {weights}" if facts is None else f"wrote {_count(facts, 'fact')} into {weights}",
        min(ranks) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
        round(100 * _removed(touched), 1) + 0.0,  # no -0.0
        _lost(touched),
        _energies(touched),
    )


def warn_of_rounding(reports: Sequence[LayerReport], told: frozenset[str]) -> frozenset[str]:
    """Warn of weights whose rounding took more than `ROUNDING` of an update; returns ``told`` and their names.

    Args:
        reports: of a batch.
        told: names of weights of which a warning has told before, and does not again.
    """
    worst = [one for one in reports if one.rounding_loss > ROUNDING and one.name not in told]
    if worst:
        _LOG.warning(
            "rounding took %s of the update of %s; master_copy: true keeps it for later, and a float32 model has none "
            "to lose. Said once: reports have the share of every batch",
            ", ".join(f"{100 * one.rounding_loss:.0f} %" for one in worst),
            ", ".join(one.name for one in worst),
        )
    return told | {one.name for one in worst}


def _changed(one: Touched) -> bool:
    return one.before is None or one.after is None or bool((one.before != one.after).any())


def _removed(touched: Sequence[Touched]) -> float:
    """Returns the share of all updates together, by their squared norms; 0 if all of them are zero."""
    whole = sum(one.solved_norm**2 for one in touched)
    return sum(one.removed_share * one.solved_norm**2 for one in touched) / whole if whole else 0.0


def _lost(touched: Sequence[Touched]) -> str:
    """Says what rounding took of all updates together, by their norms behind the restraints; nothing below 0.05 %."""
    known = [(one.rounding_loss, one.solved_norm**2 * (1.0 - one.removed_share)) for one in touched]
    whole = sum(size for _, size in known)
    if whole <= 0.0 or any(loss is None for loss, _ in known):
        return ""
    lost = math.sqrt(sum(loss**2 * size for loss, size in known if loss is not None) / whole)
    return f"{100 * lost:.1f} % of the rest lost to rounding, " if lost >= 5e-4 else ""


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
