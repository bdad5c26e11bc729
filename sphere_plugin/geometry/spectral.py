"""The largest singular value of a weight without its singular value decomposition: iterated, or exact in float64."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import all_finite, check_matrix

_BLOCK: Final = 8  # vectors
_MOST: Final = 300  # rounds
_ENOUGH: Final = 1e-7  # relative change from one round to the next
GRAM_BLOCK: Final = 2048  # columns turned into float64 at a time
_SMALLEST_SQUARE: Final = 1e-280  # below it squares lose digits


def largest_singular_value(weight: Tensor) -> float:
    """Returns σ₁ = ‖W‖₂ by block power iteration on the Gram matrix of the smaller side, applied and not formed.

    For numbers that are looked at; :func:`exact_largest_singular_value` is for those that are computed with. The Ritz
    value of a block converges with (σ₉ / σ₁)⁴ per round; the start is the same in every call, so the same
    weight gives the same number.

    Args:
        weight: [d_out, d_in], any floating point dtype; computed in float32 at least.

    Returns:
        σ₁, from below, to about six digits, or three where nearly all singular values are within a percent of it;
        0.0 for a zero matrix.

    Raises:
        ModelError: the weight is not a finite matrix.
    """
    check_matrix(weight, "weight")
    if not all_finite(weight):
        remedy = "An earlier edit or the checkpoint is broken; undo that edit or load the weight anew."
        raise ModelError("weight", "NaN or infinity", "finite entries", remedy)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = wide if wide.shape[0] <= wide.shape[1] else wide.T
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(rows.shape[0], min(_BLOCK, rows.shape[0]), generator=generator).to(rows)
    found = 0.0
    for _ in range(_MOST):
        block = torch.linalg.qr(block).Q
        inner = rows.T @ block
        now = float(torch.linalg.matrix_norm(inner.double(), ord=2))
        if now - found <= _ENOUGH * now:
            return max(now, found)
        found, block = now, rows @ inner
    return found


def exact_largest_singular_value(matrix: Tensor) -> float:
    """Returns the largest singular value of a matrix [d_out, d_in], to a relative error far below 1e-6.

    The square root of the largest eigenvalue of the float64 Gram matrix of the smaller side.

    Raises:
        ModelError: its entries are too small or too large to square.
    """
    gram = smaller_gram(matrix.detach())
    if float(gram.diagonal().sum()) < _SMALLEST_SQUARE and bool(matrix.any()):
        raise _unsquared(gram)
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))


def smaller_gram(matrix: Tensor) -> Tensor:
    """Returns M Mᵀ [m, m] in float64, M the matrix turned so that its m rows are its smaller side.

    Raises:
        ModelError: its entries are too large to square.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=matrix.device)
    for block in torch.split(wide, GRAM_BLOCK, dim=1):
        columns = block.double()
        gram.addmm_(columns, columns.T)
    if not all_finite(gram):
        raise _unsquared(gram)
    return gram


def _unsquared(gram: Tensor) -> ModelError:
    remedy = "Its entries are too small or too large to square; load the weight anew."
    return ModelError(
        "the squared norm of the weight", float(gram.diagonal().sum()), "a positive finite number", remedy
    )
