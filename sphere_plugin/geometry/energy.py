"""Hyperspherical energy: how crowded the neurons of a weight are (paper, section 2.2 and eq. 26).

A low energy means directions spread evenly over the sphere, a high one that neurons cluster. No units: distances are
between unit vectors, except in `delta_he`, which follows the paper's proof and leaves rows unnormalised.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import check_order, check_same_shape, check_weight
from sphere_plugin.geometry.pairs import pair_blocks, pair_sum, riesz

SHORTEST: Final = 1e-140  # of a row whose squared entries are good to all digits


def hyperspherical_energy(weight: Tensor, s: float = 1.0, chunk: int | None = None) -> float:
    """Returns the energy of eq. 5: the sum of ‖ŵi − ŵj‖^-s over i != j, both orders counted; eq. 6 in angles.

    Args:
        weight: [d_out, d_in], rows are neurons; any floating point dtype, on any device with float64.
        s: order of the Riesz kernel; 0 gives the sum of log ‖ŵi − ŵj‖^-1, which may be negative.
        chunk: rows per block, a matter of memory only; None chooses by size.

    Returns:
        A float accumulated in float64, 0.0 for a single neuron. The scale of each row does not matter.

    Raises:
        ConfigError: s is negative or not finite, or chunk is not a positive whole number.
        ModelError: the weight is not a finite matrix; a row is zero and has no direction; two rows have the same
            direction, so that the energy is infinite for every s (nearer than 1e-12: see `geometry.pairs`); s is so
            large that no float holds the energy.
    """
    check_order(s)
    check_weight(weight)
    energy = pair_sum(unit_rows(weight), riesz(float(s)), chunk)
    if not math.isfinite(energy):
        raise ModelError(
            f"the energy of order {float(s):g}", energy, "a number that a float holds", "Take a smaller order s."
        )
    return energy


def energy_change(before: Tensor, after: Tensor, s: float = 1.0, chunk: int | None = None) -> float:
    """Returns the relative change of energy that an edit made: HE(after) / HE(before) − 1.

    For s = 0 the energy is a sum of logarithms with no fixed sign, and a ratio of two such sums means nothing. There
    the relative change of the geometric mean of 1/‖ŵi − ŵj‖ is returned, that is
    exp((HE(after) − HE(before)) / (N (N − 1))) − 1: again 0 for no change and positive where neurons crowd.

    Args:
        before: [d_out, d_in], the weight before the edit, at least two neurons.
        after: [d_out, d_in], the same weight after it.
        s: as in `hyperspherical_energy`.
        chunk: as in `hyperspherical_energy`.

    Raises:
        ConfigError: as `hyperspherical_energy`.
        ModelError: as `hyperspherical_energy`; or the shapes differ, or there is one neuron only.
    """
    check_order(s)
    check_same_shape(before, after)
    check_weight(before, "before")
    check_weight(after, "after")
    count = before.shape[0]
    if count < 2:
        raise ModelError("before's rows", count, "two neurons or more", "A lone neuron has no energy to compare.")
    old, new = (pair_sum(unit_rows(weight), riesz(s), chunk) for weight in (before, after))
    return math.expm1((new - old) / (count * (count - 1))) if s == 0 else new / old - 1.0


def delta_he(before: Tensor, after: Tensor, chunk: int | None = None) -> float:
    """Returns the ΔHE of eq. 26: the sum over i != j of ‖wi − wj‖^-2 − ‖w'i − w'j‖^-2, rows NOT normalised.

    This is the quantity of the theorem, positive where the energy falls. Eq. 8 counts each pair once: half of it.

    Args:
        before: [d_out, d_in], W.
        after: [d_out, d_in], W + ΔW.
        chunk: rows per block; None chooses by size.

    Raises:
        ConfigError: chunk is not a positive whole number.
        ModelError: the shapes differ, a weight is not a finite matrix, or two of its rows coincide.
    """
    check_same_shape(before, after)
    check_weight(before, "before")
    check_weight(after, "after")
    old_blocks, new_blocks = (pair_blocks(weight.detach().double(), chunk) for weight in (before, after))
    total = 0.0
    for (_, old), (_, new) in zip(old_blocks, new_blocks, strict=True):
        total += float((old.reciprocal() - new.reciprocal()).triu_(1).sum())
    return 2.0 * total


def unit_rows(weight: Tensor) -> Tensor:
    """Returns the rows scaled to unit length, [d_out, d_in] float64.

    Raises:
        ModelError: a row is zero and has no direction.
    """
    rows = weight.detach().double()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # [d_out, 1]
    if not SHORTEST < float(norms.min()) <= float(norms.max()) < math.inf:  # squares of entries vanish, or overflow
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    zero = (norms == 0).flatten().nonzero()
    if zero.numel():
        raise ModelError(
            f"row {int(zero[0])} of the weight",
            f"zeros only, as in {zero.numel()} of {rows.shape[0]} rows",
            "a neuron with a direction",
            "Drop dead neurons before measuring: weight[weight.any(dim=1)].",
        )
    return rows / norms
