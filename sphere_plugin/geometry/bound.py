"""The paper's theorem: an edit that moves the energy must move the layer's outputs (eq. 9, proof in appendix C.1).

    |ΔHE| <= K sqrt(ΔV)        hence        ΔV >= (ΔHE / K)²

It is a first-order statement, true for updates small against the distances between neurons (assumption 2), with inputs
that form an orthonormal basis (assumption 1). Rows are not normalised here, as in the proof; distances carry the unit
of the weight. Given unit rows, the functions speak of the energy of eq. 5 instead, and of ΔV as the squared way that
the neurons have gone on the sphere. All sums run in blocks and in float64, see `geometry.pairs`.

Where the energy falls, the inequality holds for steps of any size; where it rises, with the factor `step_factor`
beside K. docs/theory.md has the proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.geometry.checks import check_matrix, check_order, check_same_shape, check_weight
from sphere_plugin.geometry.energy import delta_he
from sphere_plugin.geometry.pairs import pair_blocks, riesz, row_sums


@dataclass(frozen=True)
class BoundTerms:
    """Both sides of eq. 9 and of eq. 33 for one update, and what tells why they may cross; made by `bound_terms`.

    For every update |first_order| <= 2 moved <= constant sqrt(perturbation). What breaks the theorem is therefore
    never the chain of its proof but the difference between ``change`` and ``first_order``: assumption 2.

    Attributes:
        change: ΔHE of eq. 26, each pair counted in both orders; above 0 where the energy falls.
        first_order: the part of it that is linear in the update, which is what the proof bounds.
        constant: K of eq. 27.
        perturbation: ΔV under assumption 1, ‖ΔW‖_F².
        moved: Σk C_k ‖Δwk‖ of eq. 33 with s = 2, which counts each pair once.
        largest_step: ρ, the largest ‖Δwi − Δwj‖ / ‖wi − wj‖ of all pairs: how small the update is not.
    """

    change: float
    first_order: float
    constant: float
    perturbation: float
    moved: float
    largest_step: float

    @property
    def ratio(self) -> float:
        """(ΔHE / K)² / ΔV, which the theorem keeps at 1 or below; 0 for an update that changes nothing."""
        whole = self.constant**2 * self.perturbation
        return self.change**2 / whole if whole else 0.0

    @property
    def neuron_ratio(self) -> float:
        """|ΔHE| / Σk C_k ‖Δwk‖ with ΔHE as in eq. 36, half of `change`; eq. 33 keeps it at 1 or below."""
        return abs(self.change) / (2.0 * self.moved) if self.moved else 0.0


def bound_constant(weight: Tensor, chunk: int | None = None) -> float:
    """Returns the K of eq. 9 and 27: 4 sqrt(Σk (Σj≠k ‖wk − wj‖^-3)²).

    Args:
        weight: [d_out, d_in], rows are neurons, any floating point dtype.
        chunk: rows per block, a matter of memory only; None chooses by size.

    Raises:
        ConfigError: chunk is not a positive whole number.
        ModelError: the weight is not a finite matrix, or two of its rows coincide.
    """
    return _constant(neuron_constants(weight, 2.0, chunk))


def output_perturbation(delta: Tensor) -> float:
    """Returns the ΔV of eq. 25 under assumption 1: ‖ΔW‖_F², the squared change of the outputs over a basis of inputs.

    Args:
        delta: [d_out, d_in], an update; zero is fine.

    Raises:
        ModelError: it is not a floating point matrix.
    """
    check_matrix(delta, "delta")
    return float(torch.linalg.vector_norm(delta.detach(), dtype=torch.float64)) ** 2


def lower_bound(before: Tensor, after: Tensor, chunk: int | None = None) -> float:
    """Returns the right-hand side of eq. 9, (ΔHE / K)²: what `output_perturbation` of the update cannot go below.

    Args:
        before: [d_out, d_in], W, at least two neurons; K is taken from it.
        after: [d_out, d_in], W + ΔW.
        chunk: rows per block; None chooses by size.

    Returns:
        The bound, in the unit of ΔV; 0.0 for a single neuron, whose energy cannot change.

    Raises:
        ConfigError: chunk is not a positive whole number.
        ModelError: the shapes differ, a weight is not a finite matrix, or two of its rows coincide.
    """
    change = delta_he(before, after, chunk)
    constant = bound_constant(before, chunk)
    return (change / constant) ** 2 if constant > 0 else 0.0


def neuron_constants(weight: Tensor, s: float = 1.0, chunk: int | None = None) -> Tensor:
    """Returns the C_k of eq. 34: s Σj≠k ‖wk − wj‖^(-s-1), how strongly neuron k's own movement moves the energy.

    To first order |ΔHE| <= Σk C_k ‖Δwk‖ for the energy that counts each pair once (eq. 33, 36). K is 2 ‖C‖ at s = 2:
    the theorem counts pairs in both orders.

    Args:
        weight: [d_out, d_in], rows are neurons, any floating point dtype.
        s: order of the kernel. 0 stands for the logarithmic energy as in eq. 5, whose gradient has norm 1/‖x‖: the
            factor s is then 1.
        chunk: rows per block; None chooses by size.

    Returns:
        [d_out] float64, on the weight's device.

    Raises:
        ConfigError: s is negative or not finite, or chunk is not a positive whole number.
        ModelError: the weight is not a finite matrix, or two of its rows coincide.
    """
    check_order(s)
    check_weight(weight)
    sums = row_sums(weight.detach().double(), riesz(s + 1.0), chunk)
    return sums if s == 0 else s * sums


def bound_terms(before: Tensor, after: Tensor, chunk: int | None = None) -> BoundTerms:
    """Returns what the theorem and eq. 33 say of one update, s = 2, and what it did.

    ``first_order`` comes from a difference of squared distances, and is good to some 10⁻¹⁵ of them.

    Args:
        before: [d_out, d_in], W, at least two neurons; K and C_k are taken from it.
        after: [d_out, d_in], W + ΔW.
        chunk: rows per block; None chooses by size.

    Raises:
        ConfigError, ModelError: as `lower_bound`.
    """
    check_same_shape(before, after)
    check_weight(before, "before")
    check_weight(after, "after")
    constants = neuron_constants(before, 2.0, chunk)
    rows, moved_rows = before.detach().double(), after.detach().double()
    delta = moved_rows - rows
    steps = delta.square().sum(dim=1)
    change, first, largest = 0.0, 0.0, 0.0
    for (start, old), (_, new) in zip(pair_blocks(rows, chunk), pair_blocks(moved_rows, chunk), strict=True):
        here, there = slice(start, start + old.shape[0]), slice(start, None)
        step = torch.addmm(steps[here, None] + steps[None, there], delta[here], delta[there].T, alpha=-2.0)
        along = (new - old - step) / 2.0  # (wi − wj)·(Δwi − Δwj)
        change += float((old.reciprocal() - new.reciprocal()).triu_(1).sum())
        first += float((along / old.square()).triu_(1).sum())
        largest = max(largest, float((step / old).triu_(1).max()))
    return BoundTerms(
        change=2.0 * change,
        first_order=4.0 * first,
        constant=_constant(constants),
        perturbation=output_perturbation(delta),
        moved=float(constants @ torch.linalg.vector_norm(delta, dim=1)),
        largest_step=math.sqrt(largest),
    )


def step_factor(largest_step: float) -> float:
    """Returns (1 − ρ/2) / (1 − ρ)², by which an energy may rise beyond the theorem's bound; infinite from ρ = 1 on.

    −ΔHE <= step_factor(ρ) K sqrt(ΔV) for every update whose largest step is ρ, and ΔHE <= K sqrt(ΔV) for every update.
    """
    return (1.0 - largest_step / 2.0) / (1.0 - largest_step) ** 2 if largest_step < 1.0 else math.inf


def _constant(constants: Tensor) -> float:
    """K from the C_k [d_out] at s = 2."""
    return 2.0 * float(torch.linalg.vector_norm(constants))
