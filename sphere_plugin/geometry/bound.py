"""The paper's theorem: an edit that moves the energy must move the layer's outputs (eq. 9, proof in appendix C.1).

    |ΔHE| <= K sqrt(ΔV)        hence        ΔV >= (ΔHE / K)²

It is a first-order statement, true for updates small against the distances between neurons (assumption 2), with inputs
that form an orthonormal basis (assumption 1). Rows are not normalised here, as in the proof; distances carry the unit
of the weight. All sums run in blocks and in float64, see `geometry.pairs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_plugin.geometry.checks import check_matrix, check_order, check_weight
from sphere_plugin.geometry.energy import delta_he
from sphere_plugin.geometry.pairs import riesz, row_sums


def bound_constant(weight: Tensor, chunk: int | None = None) -> float:
    """Returns the K of eq. 9 and 27: 4 sqrt(Σk (Σj≠k ‖wk − wj‖^-3)²).

    Args:
        weight: [d_out, d_in], rows are neurons, any floating point dtype.
        chunk: rows per block, a matter of memory only; None chooses by size.

    Raises:
        ConfigError: chunk is not a positive whole number.
        ModelError: the weight is not a finite matrix, or two of its rows coincide.
    """
    check_weight(weight)
    crowding = row_sums(weight.detach().double(), riesz(3.0), chunk)  # [d_out]
    return 4.0 * float(torch.linalg.vector_norm(crowding))


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
