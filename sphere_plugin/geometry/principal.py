"""The principal space of a weight, and the projection of an update away from it (paper eq. 10-13, 66-67, 70).

    Ŵ    = rows of W [d_out, d_in] at unit length (both official codes do so; eq. 10 is written without it)
    C    = Ŵᵀ Ŵ / n,  eigenvalues λ falling,  r the number of them that cover η of their sum
    U    = the top r eigenvectors [d_in, r]
    ΔW'  = ΔW P⊥,  P⊥ = I − α U Uᵀ

No d_in x d_in matrix is built where d_in is the larger side: the Gram matrix of the smaller side has the same non-zero
spectrum, and ΔW − α (ΔW U) Uᵀ applies P⊥ without forming it.

What the paper's proof of ‖Δw P⊥‖ <= ‖Δw‖ (appendix C.2, eq. 53) glosses over: it uses P⊥² = P⊥, which holds for α = 1
only. The claim survives: P⊥ has eigenvalues 1 and 1 − α, and (1 − α)² <= 1 for all 0 <= α <= 2. What changes is the
amount, ‖Δw P⊥‖² = ‖Δw‖² − α (2 − α) ‖Δw U‖², of which eq. 54 is the case α = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import check_alpha, check_eta, check_matrix, check_weight

ROW_EPSILON: Final = 1e-8  # added to row norms, as both official codes do
RANK_EPSILONS: Final = 16  # eigenvalues under this many machine epsilons of the largest count as zero


@dataclass(frozen=True, eq=False, repr=False)
class PrincipalSpace:
    """The directions in which a weight's neurons vary most; made by `fit`.

    Attributes:
        basis: U, [d_in, r] with orthonormal columns, ordered by falling eigenvalue; the sign of a column is arbitrary.
            float32, or float64 if the weight was.
        eigenvalues: [r], those of the kept directions, falling.
        total: the sum of all eigenvalues, kept or not; 1 up to rounding where rows were normalised.
        eta: the share of ``total`` that was asked for.
    """

    basis: Tensor
    eigenvalues: Tensor
    total: float
    eta: float

    @property
    def rank(self) -> int:
        """r, the number of principal directions."""
        return self.basis.shape[1]

    @classmethod
    def fit(cls, weight: Tensor, eta: float = 0.5, row_normalize: bool = True) -> PrincipalSpace:
        """Finds the principal space of a weight (eq. 10-11, 66).

        Args:
            weight: [d_out, d_in], rows are neurons; any floating point dtype. The work is done on its device, in
                float64 if it is float64 and in float32 otherwise.
            eta: cumulative ratio η in (0, 1]. A larger one protects more directions and leaves an edit less room; 1
                takes the whole row space. As in the official codes r is the number of leading sums of λ that do not
                exceed η of the total, plus one; it never exceeds the numerical rank of the weight.
            row_normalize: False takes the rows as they are, the letter of eq. 10.

        Returns:
            The space. Neither the weight nor its gradient is touched.

        Raises:
            ConfigError: eta is not in (0, 1].
            ModelError: the weight is not a matrix of finite floating point numbers with a non-zero entry.
        """
        check_eta(eta)
        check_weight(weight)
        rows = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if row_normalize:
            rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + ROW_EPSILON)
        wide = rows.shape[0] < rows.shape[1]
        values, vectors = _spectrum(rows @ rows.T if wide else rows.T @ rows, rows.shape[0])
        rank = _rank(values, eta)
        basis = vectors[:, :rank].contiguous()
        if wide:
            # Ŵᵀ L / sqrt(n S) is orthonormal in exact arithmetic only. QR keeps the order and the spans of the leading
            # columns, and sets their length itself, so no division by a small eigenvalue is needed.
            basis = torch.linalg.qr(rows.T @ basis).Q  # [d_in, r]
        return cls(basis, values[:rank].to(rows.dtype), float(values.sum()), float(eta))

    def project(self, delta: Tensor, alpha: float = 0.8) -> Tensor:
        """Takes the share ``alpha`` of an update's components along the principal space out of it (eq. 12-13).

        Args:
            delta: [d_out, d_in], or any matrix with d_in columns, such as the A of a LoRA adapter.
            alpha: suppression strength α in [0, 1]: 0 returns the values bit for bit, 1 projects them out entirely.

        Returns:
            delta − α (delta U) Uᵀ as a new tensor, in delta's shape, dtype and device; computed in float32 or wider.

        Raises:
            ConfigError: alpha is not in [0, 1].
            ModelError: delta is not a floating point matrix with d_in columns.
        """
        check_alpha(alpha)
        self._check_delta(delta)
        if alpha == 0:
            return delta.clone()
        wide = delta.to(torch.promote_types(delta.dtype, self.basis.dtype))
        basis = self.basis.to(wide)
        return torch.addmm(wide, wide @ basis, basis.T, alpha=-alpha).to(delta.dtype)

    def removed_share(self, delta: Tensor, alpha: float = 0.8) -> float:
        """Returns the share of an update's squared Frobenius norm that `project` takes away.

        1 − ‖ΔW'‖² / ‖ΔW‖², a number in [0, 1], computed as α (2 − α) ‖ΔW U‖² / ‖ΔW‖²: the same for an orthonormal U,
        and exact where the share is small. A zero update loses nothing: 0.0.

        Args:
            delta: as in `project`.
            alpha: as in `project`.

        Raises:
            ConfigError: alpha is not in [0, 1].
            ModelError: as `project`.
        """
        check_alpha(alpha)
        self._check_delta(delta)
        wide = delta.detach().to(torch.promote_types(delta.dtype, self.basis.dtype))
        whole = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
        if whole == 0.0:
            return 0.0
        inside = float(torch.linalg.vector_norm(wide @ self.basis.to(wide), dtype=torch.float64))
        return min(1.0, alpha * (2.0 - alpha) * (inside / whole) ** 2)

    def __repr__(self) -> str:
        return f"PrincipalSpace(d_in={self.basis.shape[0]}, rank={self.rank}, eta={self.eta:g})"

    def _check_delta(self, delta: Tensor) -> None:
        check_matrix(delta, "delta")
        columns = self.basis.shape[0]
        if delta.shape[1] != columns:
            turned = delta.shape[0] == columns
            raise ModelError(
                "delta's shape",
                tuple(delta.shape),
                f"{columns} columns, as the basis of shape {tuple(self.basis.shape)} has rows",
                "It looks stored transposed: pass neurons(delta, transposed=True)."
                if turned
                else "Project the update of the weight that this space was fitted on.",
            )


def _spectrum(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues of gram / count [m], falling, clamped at zero, float64, and its eigenvectors [m, m]."""
    gram = gram / count
    trace = float(gram.diagonal().double().sum())
    if not 0.0 < trace < float("inf"):
        remedy = "Its entries are too small or too large to square; convert the weight to float64."
        raise ModelError("the weight's squared norm", trace, "a positive finite number", remedy)
    values, vectors = torch.linalg.eigh(gram)
    floor = RANK_EPSILONS * torch.finfo(gram.dtype).eps * float(values[-1])
    values = values.flip(0).double()
    return torch.where(values > floor, values, 0.0), vectors.flip(1)


def _rank(values: Tensor, eta: float) -> int:
    """Returns r for falling eigenvalues: leading sums within η of the total plus one, at most the positive ones."""
    sums = values.cumsum(0)
    within = int((sums / sums[-1] <= eta).sum())
    return min(within + 1, int((values > 0).sum()))
