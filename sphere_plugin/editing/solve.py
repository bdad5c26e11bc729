"""Solve: the closed forms that turn keys and residuals into an update.

Both are ridge regressions whose solution is ΔW = R Xᵀ, with R [d_out, facts] the residuals and X [d_in, facts] the
keys seen through the inverse of what must not change. The systems solved here are symmetric and positive definite;
none is larger than it has to be.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError


@dataclass
class Memit:
    """ΔW = R Kᵀ (λC + KKᵀ)⁻¹, MEMIT's equation 14; the paper's eq. 69 with K₀K₀ᵀ = λC and no Kp.

    Only λC is factored, once; each batch is a system of facts × facts (Woodbury's identity).

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
    _factor: Tensor = field(init=False, repr=False)

    def __post_init__(self, moment: Tensor) -> None:
        factor, failed = torch.linalg.cholesky_ex(self.weight * moment.double())
        if int(failed) or not bool(torch.isfinite(factor).all()):
            raise ModelError(
                f"key statistics of layer {self.layer}",
                "a singular second moment",
                f"text of more than {moment.shape[0]} tokens",
                "Raise mom2_n_samples, or use base_method: AlphaEdit, which needs no inverse of it.",
            )
        self._factor = factor

    def update(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """The update for ``keys`` [d_in, facts] and ``residuals`` [d_out, facts]: [d_out, d_in], float32."""
        k = keys.double()
        known = torch.cholesky_solve(k, self._factor)  # (λC)⁻¹K
        small = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + k.T @ known
        return (residuals.double() @ _solve_spd(small, known.T)).float()

    def with_keys(self, keys: Tensor | None) -> None:
        """MEMIT knows nothing of earlier edits beyond the weights themselves."""
        return

    def remember(self, past: None) -> None:
        """Nothing to remember."""


@dataclass
class AlphaEdit:
    """ΔW = R KᵀP (KpKpᵀP + KKᵀP + L2·I)⁻¹, AlphaEdit's closed form; P the null space of C, Kp all earlier keys.

    With P = QQᵀ the solution lies in the span of Q, so the system solved is Qᵀ(KpKpᵀ + KKᵀ)Q + L2·I: symmetric
    and as small as the null space.

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
    _past: Tensor = field(init=False, repr=False)  # QᵀKpKpᵀQ, [null, null]

    def __post_init__(self, moment: Tensor) -> None:
        values, vectors = torch.linalg.eigh(moment.double())
        self.null = vectors[:, values < self.threshold]
        if self.null.shape[1] == 0:
            raise ModelError(
                f"key statistics of layer {self.layer}",
                f"no eigenvalue below {self.threshold}",
                "a null space of at least one dimension",
                f"Raise nullspace_threshold; the smallest eigenvalue is {float(values[0]):.3g}.",
            )
        self._past = self.with_keys(None)

    def update(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """The update for ``keys`` [d_in, facts] and ``residuals`` [d_out, facts]: [d_out, d_in], float32."""
        k = self.null.T @ keys.double()
        system = self._past + k @ k.T
        system.diagonal().add_(self.ridge)
        return (residuals.double() @ _solve_spd(system, k).T @ self.null.T).float()

    def with_keys(self, keys: Tensor | None) -> Tensor:
        """QᵀKpKpᵀQ with the ``keys`` [d_in, facts] of one more batch in Kp; None empties Kp. Changes nothing here."""
        if keys is None:
            size = self.null.shape[1]
            return torch.zeros(size, size, dtype=torch.float64, device=self.null.device)
        k = self.null.T @ keys.double()
        return self._past + k @ k.T

    def remember(self, past: Tensor) -> None:
        """From now on count as earlier edits what :meth:`with_keys` has returned."""
        self._past = past


def _solve_spd(system: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive definite system."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))
