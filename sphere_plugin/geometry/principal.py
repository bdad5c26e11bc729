"""The principal space of a weight, and the projection of an update away from it (paper eq. 10-13, 66-67, 70).

    Ŵ    = rows of W [d_out, d_in] at unit length (both official codes do so; eq. 10 is written without it)
    C    = Ŵᵀ Ŵ / n,  eigenvalues λ falling,  r the number of them that cover η of their sum
    U    = the top r eigenvectors [d_in, r]
    ΔW'  = ΔW P⊥,  P⊥ = I − α U Uᵀ

No d_in x d_in matrix is built where d_in is the larger side: the Gram matrix of the smaller side has the same non-zero
spectrum, and ΔW − α (ΔW U) Uᵀ applies P⊥ without forming it. An update in factors stays in factors:
A Bᵀ P⊥ = A (P⊥ B)ᵀ.

Where W is wide, ŴŴᵀ / n = L Λ Lᵀ gives U = Ŵᵀ S with S = L Λ^-½ / sqrt(n), and a few rows are projected through this
product, x U = (x Ŵᵀ) S. U itself is formed when it is asked for, or needed for many rows. Until then the space keeps
Ŵ, as a copy, because W will be edited: 0.22 GiB for 4096 x 14336 in float32, where each d_in x d_in matrix of the
official codes takes 0.77 GiB. It is let go when U is formed.

What the paper's proof of ‖Δw P⊥‖ <= ‖Δw‖ (appendix C.2, eq. 53) glosses over: it uses P⊥² = P⊥, which holds for α = 1
only. The claim survives: P⊥ has eigenvalues 1 and 1 − α, and (1 − α)² <= 1 for all 0 <= α <= 2. What changes is the
amount, ‖Δw P⊥‖² = ‖Δw‖² − α (2 − α) ‖Δw U‖², of which eq. 54 is the case α = 1.
"""

from __future__ import annotations

from typing import Final, overload

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import all_finite, check_alpha, check_eta, check_matrix, check_weight
from sphere_plugin.geometry.factors import Factors

ROW_EPSILON: Final = 1e-8  # added to row norms, as both official codes do
RANK_EPSILONS: Final = 16  # eigenvalues under this many machine epsilons of the largest count as zero
SAFE_EPSILONS: Final = 4096  # Ŵᵀ S stands for U while the smallest kept eigenvalue is above this many of the largest
GRAM_BLOCK: Final = 256  # rows of a Gram matrix computed at a time


class PrincipalSpace:
    """The directions in which a weight's neurons vary most; made by `fit`.

    Attributes:
        eigenvalues: [r], those of the kept directions, falling; float32, or float64 if the weight was.
        total: the sum of all eigenvalues, kept or not; 1 up to rounding where rows were normalised.
        eta: the share of ``total`` that was asked for.
    """

    def __init__(
        self, factor: Tensor, eigenvalues: Tensor, total: float, eta: float, rows: Tensor | None = None
    ) -> None:
        """Takes U [d_in, r] as ``factor``; or, with ``rows`` [n, d_in], the S [n, r] of U = rowsᵀ S.

        ``rows`` is kept, and must not change while the space is used.
        """
        self._factor = factor
        self._rows = rows
        self.eigenvalues = eigenvalues
        self.total = total
        self.eta = eta
        # The columns of rowsᵀ S are orthonormal up to ε λ₁ / λᵣ only. QR has no such trouble.
        safe = SAFE_EPSILONS * torch.finfo(eigenvalues.dtype).eps * float(eigenvalues[0])
        if float(eigenvalues[-1]) < safe:
            self._form()

    @property
    def basis(self) -> Tensor:
        """U, [d_in, r] with orthonormal columns, ordered by falling eigenvalue; the sign of a column is arbitrary.

        float32, or float64 if the weight was.
        """
        self._form()
        return self._factor

    @property
    def rank(self) -> int:
        """r, the number of principal directions."""
        return self._factor.shape[1]

    @property
    def width(self) -> int:
        """d_in, the length of a neuron."""
        return self._factor.shape[0] if self._rows is None else self._rows.shape[1]

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
            The space. Neither the weight nor its gradient is touched, and later changes of the weight do not matter.

        Raises:
            ConfigError: eta is not in (0, 1].
            ModelError: the weight is not a matrix of finite floating point numbers with a non-zero entry.
        """
        check_eta(eta)
        check_weight(weight)
        count, wide = weight.shape[0], weight.shape[0] < weight.shape[1]
        # Ŵ is let go for as long as the decomposition takes, and made anew for the space to keep.
        values, vectors = spectrum(_gram_of(weight, row_normalize), count)
        rank = principal_rank(values, float(eta))
        kept, vectors = values[:rank].to(vectors.dtype), vectors[:, :rank].contiguous()
        total = float(values.sum())
        if wide:
            rows = _unit_rows(weight, row_normalize)
            return cls(vectors / (count * kept).sqrt(), kept, total, float(eta), rows)
        return cls(vectors, kept, total, float(eta))

    @overload
    def project(self, delta: Tensor, alpha: float = 0.8) -> Tensor: ...
    @overload
    def project(self, delta: Factors, alpha: float = 0.8) -> Factors: ...
    def project(self, delta: Tensor | Factors, alpha: float = 0.8) -> Tensor | Factors:
        """Takes the share ``alpha`` of an update's components along the principal space out of it (eq. 12-13).

        Args:
            delta: [d_out, d_in], or any matrix with d_in columns, such as the A of a LoRA adapter; or an update in
                factors, of which the right one is projected.
            alpha: suppression strength α in [0, 1]: 0 returns the values bit for bit, 1 projects them out entirely.

        Returns:
            delta − α (delta U) Uᵀ in delta's form, shape, dtype and device, as a new tensor (a left factor stays the
            same one); computed in float32 or wider.

        Raises:
            ConfigError: alpha is not in [0, 1].
            ModelError: delta is not a floating point matrix with d_in columns.
        """
        check_alpha(alpha)
        rows = self._checked(delta)
        if alpha == 0:
            projected = rows.clone()
        else:
            wide = self._widened(rows)
            inside = self._inside(wide)
            if self._rows is None:
                projected = torch.addmm(wide, inside, self._factor.T.to(wide), alpha=-float(alpha))
            else:
                projected = torch.addmm(
                    wide, inside @ self._factor.T.to(wide), self._rows.to(wide), alpha=-float(alpha)
                )
            projected = projected.to(rows.dtype)
        return Factors(delta.left, projected.T) if isinstance(delta, Factors) else projected

    def removed_share(self, delta: Tensor | Factors, alpha: float = 0.8) -> float:
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
        wide = self._widened(self._checked(delta).detach())
        inside = self._inside(wide)
        if isinstance(delta, Factors):
            whole, part = delta.norm(), Factors(delta.left.detach().to(inside), inside.T).norm()
        else:
            whole, part = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (wide, inside))
        return min(1.0, alpha * (2.0 - alpha) * (part / whole) ** 2) if whole else 0.0

    def __repr__(self) -> str:
        return f"PrincipalSpace(d_in={self.width}, rank={self.rank}, eta={self.eta:g})"

    def _form(self) -> None:
        """Form U, if it has not been, and let the rows go."""
        if self._rows is not None:
            # QR keeps the order and the spans of the leading columns, and sets their length itself: that S was divided
            # by small eigenvalues does no harm.
            self._factor, self._rows = torch.linalg.qr(self._rows.T @ self._factor).Q, None

    def _inside(self, matrix: Tensor) -> Tensor:
        """Returns M U [m, r] for M [m, d_in]; forms U if M has more rows than U has columns."""
        if matrix.shape[0] > self.rank:
            self._form()
        if self._rows is None:
            return matrix @ self._factor.to(matrix)
        return matrix @ self._rows.T.to(matrix) @ self._factor.to(matrix)

    def _widened(self, matrix: Tensor) -> Tensor:
        return matrix.to(torch.promote_types(matrix.dtype, self._factor.dtype))

    def _checked(self, delta: Tensor | Factors) -> Tensor:
        """Returns the rows to be projected, [m, d_in]: those of an update, or of its right factor transposed."""
        rows = delta.right.T if isinstance(delta, Factors) else delta
        check_matrix(rows, "delta")
        if rows.shape[1] != self.width:
            turned = delta.shape[0] == self.width
            raise ModelError(
                "delta's shape",
                tuple(delta.shape),
                f"{self.width} columns, as the basis of shape {(self.width, self.rank)} has rows",
                "It looks stored transposed: pass neurons(delta, transposed=True)."
                if turned
                else "Project the update of the weight that this space was fitted on.",
            )
        return rows


def row_norms(rows: Tensor) -> Tensor:
    """Returns what rows [n, d] are divided by to bring them to unit length, [n, 1]; never zero.

    Raises:
        ModelError: a row is too long to square, and would come out as zero.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not all_finite(norms):
        row = int(norms.argmax())
        remedy = "An earlier edit or the checkpoint is broken; load the weight anew, or convert it to float64."
        raise ModelError(f"the length of row {row} of the weight", float(norms[row]), "a finite number", remedy)
    return norms + ROW_EPSILON


def _unit_rows(weight: Tensor, row_normalize: bool) -> Tensor:
    """Returns Ŵ [d_out, d_in], a copy in any case; W itself in float32 or wider without ``row_normalize``."""
    rows = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    divisor = row_norms(rows) if row_normalize else 1.0
    return rows / divisor if rows.dtype == weight.dtype else rows.div_(divisor)


def _gram_of(weight: Tensor, row_normalize: bool) -> Tensor:
    """Returns the Gram matrix of Ŵ's smaller side, [m, m]."""
    rows = _unit_rows(weight, row_normalize)
    return gram(rows if rows.shape[0] < rows.shape[1] else rows.T)


def gram(rows: Tensor) -> Tensor:
    """Returns M Mᵀ [n, n] for M [n, d]: half of it by blocks of rows, the other half mirrored.

    torch has no product that knows its result to be symmetric (BLAS calls it syrk). On one core this takes two thirds
    of the plain product's time for 1024 x 3584.
    """
    count = rows.shape[0]
    product = rows.new_empty(count, count)
    for first in range(0, count, GRAM_BLOCK):
        last = min(first + GRAM_BLOCK, count)
        product[first:last, :last] = rows[first:last] @ rows[:last].T
        product[:first, first:last] = product[first:last, :first].T
    return product


def spectrum(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues of gram / count [m], falling, clamped at zero, float64, and its eigenvectors [m, m].

    What this holds at most is three [m, m] matrices on a CPU, two of them LAPACK's, if the caller keeps no ``gram``.

    Raises:
        ModelError: the trace is zero or not finite.
    """
    gram = torch.div(gram, count, out=torch.empty_like(gram, memory_format=torch.contiguous_format).T)
    trace = float(gram.diagonal().double().sum())
    if not 0.0 < trace < float("inf"):
        remedy = "Its entries are too small or too large to square; convert the weight to float64."
        raise ModelError("the weight's squared norm", trace, "a positive finite number", remedy)
    # By columns, as LAPACK wants it, the matrix can make room for its own eigenvectors.
    place = (gram.new_empty(len(gram)), gram) if gram.device.type == "cpu" else None
    values, vectors = torch.linalg.eigh(gram, out=place)
    floor = RANK_EPSILONS * torch.finfo(values.dtype).eps * float(values[-1])
    values = values.flip(0).double()
    return torch.where(values > floor, values, 0.0), vectors.flip(1)


def principal_rank(values: Tensor, eta: float, total: float | None = None) -> int:
    """Returns r for falling eigenvalues: leading sums within η of the total plus one, at most the positive ones.

    Args:
        values: [m] float64, all eigenvalues or the largest of them.
        eta: η.
        total: their sum, those left out included; None if none is.
    """
    sums = values.cumsum(0)
    within = int((sums / (float(sums[-1]) if total is None else total) <= eta).sum())
    return min(within + 1, int((values > 0).sum()))
