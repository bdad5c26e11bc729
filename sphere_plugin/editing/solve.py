"""Solve: the closed forms that turn keys and residuals into an update.

Both are ridge regressions whose solution is ΔW = R Xᵀ, with R [d_out, u] the residuals of u facts and X [d_in, u]
their keys seen through the inverse of what must not change:

    X = (S + k kᵀ)⁻¹ k = L⁻ᵀ V (I + VᵀV)⁻¹,  S = L Lᵀ,  V = L⁻¹ k            (Woodbury's identity)

S does not depend on the batch, so its Cholesky factor L is kept, and a batch costs two triangular solves and a system
of u × u: O(d_in² u). No inverse is formed. R and X come back as they are, as factors.

The systems are float64: S is made of second moments of keys, and at a condition number of 10⁴ (10⁶) float32 is wrong
by 10⁻⁴ (10⁻²). A step of iterative refinement cures that only with a float64 residual, and then takes longer than
float64 does (measured on 1536 and 3584). R and X are rounded to float32 at the end.

A solver lives where the second moment is. Keys are brought there, and X to where the residuals are.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors
from sphere_plugin.geometry.checks import all_finite

BLOCK: Final = 64  # columns of a Cholesky factor that are brought up to date at a time
KEYS: Final = 128  # and with how many keys at a time


@dataclass
class Memit:
    """ΔW = R Kᵀ (λC + KKᵀ)⁻¹, MEMIT's equation 14; the paper's eq. 69 with K₀K₀ᵀ = λC and no Kp.

    Args:
        moment: C, the second moment E[kkᵀ] of the keys of ordinary text, [d_in, d_in].
        weight: λ.
        layer: number of the layer, for errors.

    Raises:
        ModelError: C is singular: the text had fewer tokens than the key has dimensions.
    """

    moment: InitVar[Tensor]
    weight: float
    layer: int
    _factor: Tensor = field(init=False, repr=False)  # lower triangle, λC = L Lᵀ

    def __post_init__(self, moment: Tensor) -> None:
        system = _columnwise(moment).mul_(self.weight)
        # On a CPU in its own place; elsewhere torch wants another.
        place = (system, torch.empty((), dtype=torch.int32)) if system.device.type == "cpu" else None
        factor, failed = torch.linalg.cholesky_ex(system, out=place)
        if int(failed) or not all_finite(factor.T):  # by columns it would be copied
            raise ModelError(
                f"key statistics of layer {self.layer}",
                "a singular second moment",
                f"text of more than {moment.shape[0]} tokens",
                "Raise mom2_n_samples, or use base_method: AlphaEdit, which needs no inverse of it.",
            )
        self._factor = factor

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        """The update for ``keys`` [d_in, u] and ``residuals`` [d_out, u]: ΔW [d_out, d_in] in factors, float32."""
        return Factors(residuals.float(), _woodbury(self._factor, keys.to(self._factor)).to(residuals.device).float())

    def with_keys(self, keys: Tensor | None) -> None:
        """MEMIT knows nothing of earlier edits beyond the weights themselves."""
        return

    def remember(self, past: None) -> None:
        """Nothing to remember."""


@dataclass(frozen=True)
class Past:
    """What AlphaEdit knows of earlier edits: M = QᵀKpKpᵀQ + L2·I, as L Lᵀ + k kᵀ.

    Attributes:
        factor: L, [null, null] float64, lower triangular.
        fresh: k, [null, any] float64, keys that are not in L yet.
    """

    factor: Tensor
    fresh: Tensor


@dataclass
class AlphaEdit:
    """ΔW = R KᵀP (KpKpᵀP + KKᵀP + L2·I)⁻¹, AlphaEdit's closed form; P the null space of C, Kp all earlier keys.

    With P = QQᵀ the solution lies in the span of Q, so the system solved is M + kkᵀ with M = QᵀKpKpᵀQ + L2·I and
    k = QᵀK: symmetric, and as small as the null space.

    Of M only its Cholesky factor is kept. A batch's keys are worked into it by orthogonal transformations, in
    O(null² u) and without the cancellation that bringing M⁻¹ up to date suffers: after any number of batches L Lᵀ is M
    up to rounding. So there is nothing to refresh, and a batch costs the same however many came before.

    Args:
        moment: C, the second moment E[kkᵀ] of the keys of ordinary text, [d_in, d_in].
        threshold: eigenvectors of C with an eigenvalue below this span the null space.
        ridge: L2.
        layer: number of the layer, for errors.

    Raises:
        ModelError: the null space is empty.
    """

    moment: InitVar[Tensor]
    threshold: float
    ridge: float
    layer: int
    null: Tensor = field(init=False, repr=False)  # Q, [d_in, null]
    _past: Past = field(init=False, repr=False)

    def __post_init__(self, moment: Tensor) -> None:
        system = _columnwise(moment)
        place = (system.new_empty(len(system)), system) if system.device.type == "cpu" else None
        values, vectors = torch.linalg.eigh(system, out=place)
        self.null = vectors[:, values < self.threshold]
        del system, vectors, place  # what follows is as large
        if self.null.shape[1] == 0:
            raise ModelError(
                f"key statistics of layer {self.layer}",
                f"no eigenvalue below {self.threshold}",
                "a null space of at least one dimension",
                f"Raise nullspace_threshold; the smallest eigenvalue is {float(values[0]):.3g}.",
            )
        self._past = self.with_keys(None)

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        """The update for ``keys`` [d_in, u] and ``residuals`` [d_out, u]: ΔW [d_out, d_in] in factors, float32."""
        x = self.null @ _woodbury(self._factor(), self.null.T @ keys.to(self.null))
        return Factors(residuals.float(), x.to(residuals.device).float())

    def with_keys(self, keys: Tensor | None) -> Past:
        """The past with the ``keys`` [d_in, u] of one more batch in Kp; None empties Kp. M stays as it is here.

        Batches are worked into L one by one, however many are learned between two updates: how they are cut into
        columns decides how L is rounded.
        """
        if keys is None:
            size = self.null.shape[1]
            factor = torch.eye(size, dtype=torch.float64, device=self.null.device).mul_(self.ridge**0.5)
            return Past(factor, factor[:, :0])
        return Past(self._factor(), self.null.T @ keys.to(self.null))

    def remember(self, past: Past) -> None:
        """From now on count as earlier edits what :meth:`with_keys` has returned."""
        self._past = past

    def _factor(self) -> Tensor:
        """L with all earlier keys in it."""
        if self._past.fresh.shape[1]:  # the same M in another form: an interruption here loses nothing
            self._past = Past(with_columns(self._past.factor, self._past.fresh), self._past.fresh[:, :0])
        return self._past.factor


def _columnwise(moment: Tensor) -> Tensor:
    """A copy of a symmetric matrix [n, n] in float64, by columns as LAPACK wants it, which then needs no other."""
    return torch.empty_like(moment, dtype=torch.float64, memory_format=torch.contiguous_format).T.copy_(moment)


def with_columns(factor: Tensor, columns: Tensor) -> Tensor:
    """Returns the lower triangular F' [n, n] with F'F'ᵀ = F Fᵀ + k kᵀ, for F ``factor`` and k ``columns`` [n, u].

    [F k] and [F k] Q have the same product with their transposes if Q is orthogonal. Block by block, the Q of a QR
    decomposition moves what k has in the block's rows into F, and the rows below follow: O(n² u), nearly all of it in
    matrix products. Diagonal entries may become negative, which a triangular solve does not mind.
    """
    for part in torch.split(columns, KEYS, dim=1):
        updated, rest = torch.zeros_like(factor), part
        for first in range(0, factor.shape[0], BLOCK):
            strip = torch.cat([factor[first:, first : first + BLOCK], rest], dim=1)
            width = strip.shape[1] - rest.shape[1]
            strip = strip @ torch.linalg.qr(strip[:width].T, mode="complete").Q
            updated[first:, first : first + BLOCK] = strip[:, :width].tril()
            rest = strip[width:, width:]
        factor = updated
    return factor


def _woodbury(factor: Tensor, k: Tensor) -> Tensor:
    """Returns (L Lᵀ + k kᵀ)⁻¹ k [n, u] for ``factor`` L [n, n] and k [n, u]."""
    # Not torch.cholesky_solve: it copies L at every call, which takes longer than to solve.
    v = torch.linalg.solve_triangular(factor, k, upper=False)
    small = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + v.T @ v
    v = torch.cholesky_solve(v.T, torch.linalg.cholesky(small)).T
    x: Tensor = torch.linalg.solve_triangular(factor.T, v, upper=True)
    return x
