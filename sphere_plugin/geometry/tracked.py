"""The principal space of a weight that is edited again and again, found from the space before.

    G  = W Wᵀ [n, n], kept:   W ← W + A Bᵀ  makes  G ← G + H Aᵀ + A Hᵀ,  H = W B + A (BᵀB) / 2
    Ĝ  = D G D,  D = 1 / row norms, the roots of G's diagonal;  D = I without row_normalize
    Ĝ  = L Θ Lᵀ,  Θ = n Λ,  U = Ŵᵀ L Θ^-½ = Wᵀ (D L Θ^-½), see `geometry.principal`

The eigenvectors start from those before the update, with A beside them for directions that are new. A sweep puts them
through a Chebyshev polynomial of Ĝ, which is at most 1 on [0, b] and grows fast above, and takes the Ritz vectors of
what comes out (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006, who so follow eigenvectors from one step
of a self-consistent field to the next). More vectors are kept than r, so b lies below θᵣ. The trace of Ĝ is known, so
the largest Ritz values alone tell r.

How good is that? At θᵣ there is no gap that would bound the angle between two spaces (Davis and Kahan), and none is
needed: vectors on both sides of the cut are kept, and Rayleigh-Ritz tells them apart. What a kept vector v with Ritz
value θ misses lies outside all of them, across the gap from θ to b, and is (θ − Ĝ)⁻¹ (Ĝv − θv) to first order: at most
t = (Ĝv − θv) / (θ − b). What v + t instead of v would change in the very update to be projected is computed, and must
be below `TOLERANCE` of the projected update at α = 1. If it is not, another sweep follows; after `SWEEPS`, the exact
decomposition.

Before anything is built on G, it is asked whether G is still W Wᵀ: G z and W (Wᵀ z) have to agree for random z. They
do if the weight is as the last update left it, or as it was before (the update was undone, or never written). A weight
that was restored, changed by others, or rounded to 16 bits is decomposed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import check_eta, check_weight
from sphere_plugin.geometry.factors import Factors
from sphere_plugin.geometry.principal import ROW_EPSILON, PrincipalSpace, gram, principal_rank, spectrum

SMALLEST: Final = 768  # rows; with fewer, the exact decomposition is as fast
MARGIN: Final = 0.8  # eigenvectors are kept whose eigenvalue is above this share of the r-th
MOST: Final = 0.5  # share of all eigenvectors above which keeping them saves nothing
DEGREE: Final = 4  # of the Chebyshev polynomial
STEEPEST: Final = 1000.0  # ‖Ĝ‖ / b above which float32 loses what is near b under what is far above it
SWEEPS: Final = 3
TOLERANCE: Final = 4e-5  # of the norm of the projected update
PROBES: Final = 4  # random vectors G is checked with
SAME: Final = 1e-5  # relative difference at which G z and W (Wᵀ z) still agree
EXACT_EVERY: Final = 25  # updates


@dataclass(frozen=True)
class _Leading:
    """The leading eigenpairs of Ĝ.

    Attributes:
        gram: G, [n, n].
        values: Θ, [k] float64, falling.
        vectors: L, [n, k]; once G was brought up to date [n, k + u], the last ones not eigenvectors.
        rank: r.
        missing: [n, r], the t of the first r vectors; None if G was brought up to date since.
        updates: how often that was, since G was computed from W.
    """

    gram: Tensor
    values: Tensor
    vectors: Tensor
    rank: int
    missing: Tensor | None
    updates: int


class TrackedSpace:
    """Follows the principal space of one weight through updates in factors, in float32.

    Args:
        eta: as in `PrincipalSpace.fit`.
        row_normalize: as in `PrincipalSpace.fit`.
    """

    def __init__(self, eta: float = 0.5, row_normalize: bool = True) -> None:
        check_eta(eta)
        self.eta = eta
        self.row_normalize = row_normalize
        self._leading: _Leading | None = None
        self._next: tuple[Tensor, Tensor] | None = None  # A and H of the update returned last

    @staticmethod
    def takes(weight: Tensor, delta: Factors) -> bool:
        """Tells whether following is possible and pays: a wide float32 weight of many rows, an update of few facts."""
        fits = weight.dtype == delta.left.dtype == torch.float32 and weight.shape[0] < weight.shape[1]
        return fits and weight.shape[0] >= max(SMALLEST, 4 * delta.left.shape[1])

    def project(self, weight: Tensor, delta: Factors, alpha: float) -> tuple[Factors, int]:
        """Projects an update away from the principal space of the weight it is to be added to.

        Args:
            weight: [d_out, d_in] float32, as it is now. It is read, and not kept.
            delta: an update of it, [d_out, d_in].
            alpha: as in `PrincipalSpace.project`.

        Returns:
            ΔW', which is what the weight is expected to have gained by the next call, and r.

        Raises:
            ConfigError, ModelError: as `PrincipalSpace.fit` and `PrincipalSpace.project`.
        """
        check_weight(weight)
        if delta.shape != weight.shape:
            expected = f"the weight's shape, {tuple(weight.shape)}"
            raise ModelError("delta's shape", delta.shape, expected, "Pass the update of this very weight.")
        weight = weight.detach()
        seen = weight @ delta.right
        found = self._followed(weight)
        if found is not None:
            found = self._settled(found, seen, delta)
        if found is None:
            found = self._decomposed(weight)
        count, rank, scales = weight.shape[0], found.rank, self._scales(found.gram)
        theta = found.values[:rank].to(weight.dtype)
        factor = scales * found.vectors[:, :rank] / theta.sqrt()
        total = float((scales[:, 0].square() * found.gram.diagonal()).double().sum())
        written = PrincipalSpace(factor, theta / count, total / count, self.eta, rows=weight).project(delta, alpha)
        seen = seen - alpha * (found.gram @ (factor @ (factor.T @ seen)))  # W B', without another product with W
        self._leading = found
        left = written.left.contiguous()  # sums depend on how memory is laid out, and `recall` lays it out so
        self._next = left, seen + left @ (written.right.T @ written.right) / 2
        return written, rank

    def memory(self) -> dict[str, Tensor]:
        """Return all that is kept from one update to the next, for `recall`; empty before the first."""
        known = self._leading
        if known is None:
            return {}
        kept = {"gram": known.gram, "values": known.values, "vectors": known.vectors}
        kept["counts"] = torch.tensor([known.rank, known.updates])
        kept |= {} if known.missing is None else {"missing": known.missing}
        return kept if self._next is None else kept | dict(zip(("left", "image"), self._next, strict=True))

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what `memory` returned in another object with the same settings."""
        self._leading = self._next = None
        memory = {name: one.clone(memory_format=torch.contiguous_format) for name, one in memory.items()}
        if memory:
            rank, updates = memory["counts"].tolist()
            missing = memory.get("missing")
            self._leading = _Leading(memory["gram"], memory["values"], memory["vectors"], rank, missing, updates)
        if "left" in memory:
            self._next = memory["left"], memory["image"]

    def _followed(self, weight: Tensor) -> _Leading | None:
        """What is known, if it is of this weight or of the weight before the update that was expected."""
        known = self._leading
        if known is None or known.gram.shape[0] != weight.shape[0] or known.gram.device != weight.device:
            return None
        if known.updates >= EXACT_EVERY or known.vectors.shape[1] > MOST * weight.shape[0]:
            return None
        scales = self._scales(known.gram)
        random = torch.Generator().manual_seed(known.updates)
        probe = scales * torch.randn(weight.shape[0], PROBES, generator=random).to(weight.device)
        seen, guess = weight @ (weight.T @ probe), known.gram @ probe
        limit = SAME * torch.linalg.vector_norm(scales * seen)
        if torch.linalg.vector_norm(scales * (seen - guess)) <= limit:
            return known
        if self._next is None:
            return None
        a, h = self._next
        if not torch.linalg.vector_norm(scales * (seen - guess - h @ (a.T @ probe) - a @ (h.T @ probe))) <= limit:
            return None
        product = torch.addmm(torch.addmm(known.gram, h, a.T), a, h.T)
        beside = scales * a
        beside = beside / torch.linalg.vector_norm(beside, dim=0).clamp(min=torch.finfo(a.dtype).tiny)
        vectors = torch.cat([known.vectors, beside], dim=1)
        return _Leading(product, known.values, vectors, known.rank, None, known.updates + 1)

    def _settled(self, found: _Leading, seen: Tensor, delta: Factors) -> _Leading | None:
        """Sweep until ``delta``, with ``seen`` = W B, can be projected; None if that takes too long."""
        scales = self._scales(found.gram)
        normal = scales * found.gram * scales.T
        # With A = Q R, B Rᵀ has the norms of the update A Bᵀ.
        small = torch.linalg.qr(delta.left, mode="r").R
        seen, whole = scales * (seen @ small.T), delta.norm() ** 2
        for _ in range(SWEEPS):
            if _precise(found, normal, seen, whole):
                return found
            swept = _sweep(found, normal, self.eta)
            if swept is None:
                return None
            found = swept
        return found if _precise(found, normal, seen, whole) else None

    def _decomposed(self, weight: Tensor) -> _Leading:
        product = gram(weight)
        scales = self._scales(product)
        values, vectors = spectrum(scales * product * scales.T, 1)
        rank = principal_rank(values, self.eta)
        kept = max(rank, int((values > MARGIN * values[rank - 1]).sum()))
        vectors = vectors[:, :kept].contiguous()
        return _Leading(product, values[:kept], vectors, rank, torch.zeros_like(vectors[:, :rank]), 0)

    def _scales(self, product: Tensor) -> Tensor:
        """The diagonal of D, [n, 1]."""
        squares = product.diagonal()[:, None].clamp(min=0.0)
        scales: Tensor = 1.0 / (squares.sqrt() + ROW_EPSILON) if self.row_normalize else torch.ones_like(squares)
        return scales


def _precise(found: _Leading, normal: Tensor, seen: Tensor, whole: float) -> bool:
    """Tells whether what the vectors miss changes too little in the projected update to matter.

    Args:
        found: the eigenpairs.
        normal: Ĝ.
        seen: Ŵ B, [n, u], B such that ‖B‖ = ‖ΔW‖.
        whole: ‖ΔW‖².
    """
    if found.missing is None:
        return False
    vectors, theta = found.vectors[:, : found.rank], found.values[: found.rank, None].to(seen.dtype)
    inside = vectors.T @ seen  # U Uᵀ B = Ŵᵀ L Θ⁻¹ Lᵀ Ŵ B
    kept = max(0.0, whole - float((inside.square() / theta).double().sum()))
    change = found.missing @ (inside / theta) + vectors @ (found.missing.T @ seen / theta)
    lost = float((change * (normal @ change)).double().sum())  # ‖Ŵᵀ change‖²
    return lost <= TOLERANCE**2 * kept


def _sweep(found: _Leading, normal: Tensor, eta: float) -> _Leading | None:
    """Better eigenpairs; None if the spectrum is too steep for it, or r is not among what is kept."""
    bound = float(found.values[-1])
    if not float(torch.linalg.matrix_norm(normal)) <= STEEPEST * bound:
        return None
    block = torch.linalg.qr(filtered(normal, found.vectors, bound)).Q
    images = normal @ block
    values, turn = torch.linalg.eigh(block.T @ images)
    values, turn = values.flip(0).double(), turn.flip(1)
    rank = principal_rank(values, eta, total=float(normal.diagonal().double().sum()))
    kept = int((values > MARGIN * values[rank - 1]).sum())
    if kept <= rank:
        return None
    vectors = block @ turn[:, :kept]
    theta = values[:rank].to(vectors.dtype)
    residuals = images @ turn[:, :rank] - vectors[:, :rank] * theta
    missing = residuals / (theta - values[kept - 1].to(theta))
    return _Leading(found.gram, values[:kept], vectors, rank, missing, found.updates)


def filtered(normal: Tensor, block: Tensor, bound: float, degree: int = DEGREE) -> Tensor:
    """Returns the Chebyshev polynomial of [0, bound] of Ĝ [n, n] times ``block`` [n, k], columns of unit length."""
    half = bound / 2
    before, now = block, torch.addmm(block, normal, block, beta=-1.0, alpha=1 / half)  # T₁ = x, x = Ĝ / half − 1
    for _ in range(degree - 1):
        before, now = now, torch.addmm(before + 2 * now, normal, now, beta=-1.0, alpha=2 / half)  # 2 x Tᵢ − Tᵢ₋₁
    lengths: Tensor = torch.linalg.vector_norm(now, dim=0)
    return now / lengths.clamp(min=torch.finfo(now.dtype).tiny)
