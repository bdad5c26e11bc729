"""An update as two thin factors: what a closed form returns for a few facts, before anyone needs all its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import check_matrix


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = A Bᵀ of rank u or less: d_out u + d_in u numbers instead of d_out d_in.

    Attributes:
        left: A, [d_out, u], floating point.
        right: B, [d_in, u], of the same dtype and on the same device.

    Raises:
        ModelError: a factor is not a floating point matrix, or their numbers of columns, dtypes or devices differ.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        check_matrix(self.left, "left factor")
        check_matrix(self.right, "right factor")
        if self.left.shape[1] != self.right.shape[1]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            remedy = "Pass [d_out, u] and [d_in, u], one column of each per fact."
            raise ModelError("factors' shapes", shapes, "the same number of columns", remedy)
        kinds = [(one.dtype, one.device) for one in (self.left, self.right)]
        if kinds[0] != kinds[1]:
            got = " and ".join(f"{dtype} on {device}" for dtype, device in kinds)
            raise ModelError("factors", got, "one dtype and one device", "Bring both there with .to() before.")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of ΔW."""
        return self.left.shape[0], self.right.shape[0]

    def dense(self) -> Tensor:
        """ΔW itself, [d_out, d_in] in the factors' dtype."""
        return self.left @ self.right.T

    def norm(self) -> float:
        """Frobenius norm of ΔW, in float64: with A = Q R, Q's columns orthonormal, it is that of R Bᵀ."""
        small = torch.linalg.qr(self.left.detach().double(), mode="r").R
        return float(torch.linalg.vector_norm(small @ self.right.detach().double().T))

    def to(self, *where: Any) -> Factors:
        """Both factors on another device, in another dtype, or both; arguments as of ``Tensor.to``."""
        return Factors(self.left.to(*where), self.right.to(*where))
