"""What the mathematics asks of its input, checked before any work is done."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_eta(eta: float) -> None:
    """Raises ConfigError unless ``eta`` is a number in (0, 1]."""
    if not (_is_number(eta) and 0.0 < eta <= 1.0):
        raise ConfigError(
            "eta",
            eta,
            "a number in (0, 1], the share of the eigenvalue sum to cover",
            "Use 0.5, the paper's value for every experiment; write 50 percent as 0.5.",
        )


def check_alpha(alpha: float) -> None:
    """Raises ConfigError unless ``alpha`` is a number in [0, 1]."""
    if not (_is_number(alpha) and 0.0 <= alpha <= 1.0):
        raise ConfigError(
            "alpha",
            alpha,
            "a number in [0, 1], the suppression strength",
            "Use the paper's 0.5 on AlphaEdit or 0.8 on any other method; 0 leaves an update as it is.",
        )


def check_order(s: float) -> None:
    """Raises ConfigError unless ``s`` is a finite number that is not negative."""
    if not (_is_number(s) and 0.0 <= s <= sys.float_info.max):  # Python compares without rounding
        raise ConfigError("s", s, "a finite number >= 0", "Use 1 for the Riesz energy, 0 for the logarithmic one.")


def check_chunk(chunk: int) -> None:
    """Raises ConfigError unless ``chunk`` is a positive whole number."""
    if not (isinstance(chunk, int) and chunk >= 1):
        raise ConfigError("chunk", chunk, "a whole number of rows >= 1", "Leave it out to have it chosen by size.")


def check_matrix(matrix: Tensor, name: str) -> None:
    """Raises ModelError unless ``matrix`` is a floating point matrix with entries in memory; zeros are fine.

    Args:
        matrix: any tensor.
        name: how the message calls it, "weight" or "delta".
    """
    shape = tuple(matrix.shape)
    if matrix.dim() != 2:
        remedy = "Pass one layer's weight matrix; of stacked experts, pass one expert at a time."
        raise ModelError(f"{name}'s shape", shape, "two dimensions, [d_out, d_in]", remedy)
    if matrix.numel() == 0:
        raise ModelError(f"{name}'s shape", shape, "at least one entry", "Gather a sharded weight before this call.")
    if not matrix.is_floating_point() or matrix.element_size() < 2:  # float8 holds scaled, hence quantised, values
        remedy = "Dequantise it first, or load the model without quantisation."
        raise ModelError(f"{name}'s dtype", matrix.dtype, "a floating point dtype of 16 bits or more", remedy)
    if matrix.is_meta:
        remedy = "The layer is offloaded or was never loaded; load its values before this call."
        raise ModelError(f"{name}'s device", "meta", "a device that holds its values", remedy)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raises ModelError unless ``weight`` is a matrix whose entries are finite and not all zero.

    Args:
        weight: [d_out, d_in], any floating point dtype.
        name: how the message calls it, "weight", "before", "after".
    """
    check_matrix(weight, name)
    values = weight.detach()
    if not all_finite(values):
        bad = int(values.numel() - torch.isfinite(values).sum())
        remedy = "An earlier edit or the checkpoint is broken; undo that edit or load the weight anew."
        raise ModelError(name, f"NaN or infinite in {bad} of {values.numel()} entries", "finite entries", remedy)
    if not any(map(bool, torch.aminmax(values))):
        raise ModelError(name, "zeros only", "a trained weight", "Load the checkpoint's values into this layer first.")


def all_finite(values: Tensor) -> bool:
    """Tells whether no entry of a floating point tensor is NaN or infinite, in one pass and without a mask."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values.detach()))  # NaN is extreme


def check_same_shape(before: Tensor, after: Tensor) -> None:
    """Raises ModelError, printing both shapes, unless they agree."""
    if before.shape != after.shape:
        raise ModelError(
            "after's shape",
            tuple(after.shape),
            f"the shape of before, {tuple(before.shape)}",
            "Compare one layer with itself, both in mathematical orientation (see geometry.neurons).",
        )
