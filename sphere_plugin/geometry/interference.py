"""What an update does to inputs it was not made for: hidden interference (the paper on hidden instability, section 3).

    ΔW = U Vᵀ,  U [d_out, u] left vectors,  V [d_in, u] right vectors,  one column per fact
    ‖ΔW z‖ <= ‖U‖₂ ‖Vᵀz‖₂                   for the input z of the edited weight
    L_kp = Σx ‖P x‖²                        P the orthogonal projection onto span(V); its eq. 1

U and V are those of the closed form, residuals and weighted keys. Of an update that comes as a matrix, U are its left
singular vectors and V its right ones, each as long as its singular value: ‖U‖₂ is 1 then, and the bound an equality.
How long V's columns are depends on that choice. What does not is ‖ΔW z‖ itself, L_kp, and the second bound here,
‖ΔW‖₂ ‖P z‖.

The paper's figures and tables measure what EasyEdit's code calls the right vector: the one that is searched for by
gradient descent and clamped, on the side of the outputs. That is a column of U here, not of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import all_finite, check_matrix
from sphere_plugin.geometry.factors import Factors


@dataclass(frozen=True, eq=False)
class Interference:
    """What one update does to n inputs; all fields are [n] float64.

    Attributes:
        change: ‖ΔW z‖.
        bound: ‖U‖₂ ‖Vᵀz‖.
        spectral: ‖ΔW‖₂ ‖P z‖.
        inside: ‖P z‖², whose sum over protected inputs is L_kp.
    """

    change: Tensor
    bound: Tensor
    spectral: Tensor
    inside: Tensor


def split(delta: Tensor, floor: float = 0.0) -> Factors:
    """Returns an update in factors by its singular value decomposition: U orthonormal, V with norms σ, falling.

    Args:
        delta: [d_out, d_in], any floating point dtype.
        floor: singular values up to it are left out. What lies below some 10⁻⁷ of the largest is left out in any
            case, because the Gram matrix of the smaller side cannot tell it from zero.

    Returns:
        [d_out, u] and [d_in, u] float64; one pair of zero columns for a zero update.

    Raises:
        ModelError: it is not a finite matrix.
    """
    check_matrix(delta, "delta")
    if not all_finite(delta):
        remedy = "The edit that made it broke the weight; undo it."
        raise ModelError("delta", "NaN or infinity", "finite entries", remedy)
    rows = delta.detach().double()
    wide = rows.shape[0] <= rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    sigma, vectors = values.clamp(min=0.0).sqrt().flip(0), vectors.flip(1)
    smallest = float(sigma[0]) * (len(sigma) * torch.finfo(torch.float64).eps) ** 0.5
    count = int((sigma > max(floor, smallest)).sum())
    if not count:
        return Factors(rows.new_zeros(rows.shape[0], 1), rows.new_zeros(rows.shape[1], 1))
    sigma, vectors = sigma[:count], vectors[:, :count]
    return Factors(vectors, rows.T @ vectors) if wide else Factors(rows @ vectors / sigma, vectors * sigma)


def lengths(vectors: Tensor) -> Tensor:
    """Returns the norms of the columns of [d, u], [u] float64."""
    norms: Tensor = torch.linalg.vector_norm(vectors.detach().double(), dim=0)
    return norms


def span(vectors: Tensor) -> Tensor:
    """Returns an orthonormal basis of the columns' span, [d, k] float64 with k their numerical rank; 0 for zeros.

    Args:
        vectors: [d, u]; directions below ``max(d, u)`` roundings of its dtype count as none.
    """
    check_matrix(vectors, "vectors")
    left: Tensor
    left, sigma, _ = torch.linalg.svd(vectors.detach().double(), full_matrices=False)
    floor = max(vectors.shape) * torch.finfo(vectors.dtype).eps * float(sigma[0])
    return left[:, sigma > floor]


def spectral_norm(update: Factors) -> float:
    """Returns ‖ΔW‖₂ of an update in factors, in float64, without forming ΔW."""
    left, right = (torch.linalg.qr(side.detach().double(), mode="r").R for side in (update.left, update.right))
    return float(torch.linalg.matrix_norm(left @ right.T, ord=2))


@dataclass(frozen=True, eq=False)
class EditingSpace:
    """An update ΔW = U Vᵀ and the span of its right vectors, in which it sees its inputs; made by `of`.

    Attributes:
        update: U [d_out, u] and V [d_in, u], float64.
        basis: [d_in, k], an orthonormal basis of V's columns.
        left_norm: ‖U‖₂.
        spectral: ‖ΔW‖₂.
    """

    update: Factors
    basis: Tensor
    left_norm: float
    spectral: float

    @classmethod
    def of(cls, update: Factors) -> EditingSpace:
        """The space of an update; the rank of V is judged by its dtype, see `span`."""
        wide = Factors(update.left.detach().double(), update.right.detach().double())
        left_norm = float(torch.linalg.matrix_norm(wide.left, ord=2))
        return cls(wide, span(update.right), left_norm, spectral_norm(wide))

    def interference(self, keys: Tensor) -> Interference:
        """Returns what the update does to inputs ``keys`` [n, d_in].

        Raises:
            ModelError: keys are no matrix with d_in columns.
        """
        inputs = self._checked(keys)
        touched = inputs @ self.update.right  # Vᵀz, [n, u]
        inside = (inputs @ self.basis).square().sum(dim=1)
        return Interference(
            change=torch.linalg.vector_norm(touched @ self.update.left.T, dim=1),
            bound=self.left_norm * torch.linalg.vector_norm(touched, dim=1),
            spectral=self.spectral * inside.sqrt(),
            inside=inside,
        )

    def alignment(self, keys: Tensor) -> float:
        """Returns how much more the update does to inputs ``keys`` [n, d_in] than to ones of all directions alike.

        (mean ‖ΔW x‖² / mean ‖x‖²) / (‖ΔW‖_F² / d_in): 1 for an orthonormal basis of inputs, which is the theorem's
        assumption 1; above it where the inputs lie along what the update writes to. 0 where nothing is written.

        Raises:
            ModelError: as `interference`.
        """
        inputs = self._checked(keys)
        whole = self.update.norm() ** 2 * float(inputs.square().sum())
        done = float((inputs @ self.update.right @ self.update.left.T).square().sum())
        return done * self.update.shape[1] / whole if whole else 0.0

    def _checked(self, keys: Tensor) -> Tensor:
        check_matrix(keys, "keys")
        if keys.shape[1] != self.update.shape[1]:
            remedy = "Pass what enters the edited weight, one input per row."
            raise ModelError("keys' shape", tuple(keys.shape), f"{self.update.shape[1]} columns", remedy)
        return keys.detach().double()


def null_dimension(moment: Tensor, threshold: float) -> tuple[int, int]:
    """Returns how many eigenvalues of a second moment are below a threshold, and its numerical rank.

    The first is the dimension of AlphaEdit's null space, the rank of its projector. The second is that of E[kkᵀ]
    itself: eigenvalues above ``d`` roundings of its dtype times the largest.

    Args:
        moment: E[kkᵀ], [d_in, d_in].
        threshold: AlphaEdit's ``nullspace_threshold``.

    Raises:
        ModelError: the moment is not a finite square matrix.
    """
    check_matrix(moment, "moment")
    if moment.shape[0] != moment.shape[1] or not all_finite(moment):
        remedy = "Pass E[kkᵀ] of one layer's keys."
        raise ModelError("moment", tuple(moment.shape), "a finite square matrix", remedy)
    values = torch.linalg.eigvalsh(moment.detach().double())
    floor = len(values) * torch.finfo(moment.dtype).eps * float(values[-1])
    return int((values < threshold).sum()), int((values > floor).sum())
