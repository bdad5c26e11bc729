"""PRUNE: compress the large singular values of everything that edits have written (Ma et al., ICLR 2025, 2405.16821).

    D   = W + ΔW − W₀                         the cumulative update, W₀ the weight before any edit
    s   = the largest singular value of W₀
    σ'  = log σ − log s + s   if σ > s,  σ otherwise     for every singular value σ of D (logarithms to ``base``)
    D'  = D with singular values σ'

Only singular values above s change, so D' = D + L diag(σ'/σ − 1) Lᵀ D, with L the left singular vectors of those few.
They are eigenvectors of D Dᵀ (or of DᵀD, whichever is smaller), and no singular vectors of the others are needed. The
Gram matrix is accumulated in float64, because it squares the ratio of singular values.

Two ways to use it, and they are not the same:

- `prune_view` is what the SPHERE authors' code runs: plain MEMIT goes on editing W, uncompressed, and W₀ + D' is made
  from it to be evaluated. No edit is ever computed on W₀ + D'.
- `PruneConfig`, as a restraint, puts the compression into the trajectory: it writes W₀ + D', and the next update is
  computed on that. Singular values above s are then compressed again at each update. After one update from W₀ both
  agree; after more they need not.

Where s < 1 / ln(base), the formula lengthens singular values just above s instead (its slope at s is 1 / (s ln base)).
The papers and both codes have it so, and it is kept. In trained projections s is larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry.checks import check_weight
from sphere_plugin.geometry.spectral import exact_largest_singular_value, smaller_gram
from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, removed_share
from sphere_plugin.restraints.rect import check_update


@dataclass(frozen=True)
class PruneConfig:
    """Write the ΔW' that leaves W + ΔW' = W₀ + D', the pretrained weight with a compressed cumulative update.

    The formula is that of the paper and of the SPHERE authors' code; the authors apply it as a view of plain MEMIT
    weights (`prune_view`), this applies it to what is written, as this module's docstring explains. The correction
    answers for all earlier updates, so ΔW' may be longer than ΔW, and ``removed_share`` is then negative. If no
    singular value of D exceeds s, the update comes back as it is, bit for bit. D is not of low rank, so updates in
    factors are made dense for it.

    Attributes:
        base: base of the logarithm, a number above 1; a larger one compresses more. e, the default, is the SPHERE
            authors' choice. PRUNE's own code also has 2, 1.5 and 1.2, the last as its default.

    Raises:
        ConfigError: base is out of its range.
    """

    base: float = math.e

    def __post_init__(self) -> None:
        _check_base(self.base)

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie PRUNE to a weight.

        Args:
            pretrained: W₀ [d_out, d_in], any floating point dtype and device. It is kept and must not change: pass a
                copy, not the parameter that is edited.

        Raises:
            ModelError: it is not a matrix of finite numbers with a non-zero entry.
        """
        check_weight(pretrained, "pretrained")
        return _BoundPrune(self, pretrained)


@dataclass
class _BoundPrune:
    config: PruneConfig
    pretrained: Tensor
    _limit: float | None = field(default=None, repr=False)

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        check_update(weight, delta)
        _check_pretrained(self.pretrained, weight)
        if self._limit is None:
            self._limit = exact_largest_singular_value(self.pretrained.to(weight.device))
        update = delta.detach().to(weight.device)
        total = _difference(weight, self.pretrained) + update
        correction = _correction(total, self._limit, self.config.base)
        if correction is None:
            return Restrained(delta, removed_share=0.0, rank=0)
        written = (update + correction).to(delta.device, delta.dtype)
        return Restrained(written, removed_share=removed_share(delta, written), rank=0)


def prune_view(pretrained: Tensor, edited: Tensor, base: float = math.e) -> Tensor:
    """Returns W₀ + D', the edited weight with its cumulative update compressed, and changes nothing.

    This is PRUNE as the SPHERE authors run it: on the weights that plain MEMIT has reached, before evaluating them,
    while MEMIT itself goes on from ``edited``.

    Args:
        pretrained: W₀ [d_out, d_in], the weight before any edit, any floating point dtype.
        edited: the weight after any number of edits, [d_out, d_in].
        base: as in `PruneConfig`.

    Returns:
        A new tensor [d_out, d_in] in the dtype and on the device of ``edited``; its values bit for bit if no singular
        value of the cumulative update exceeds the largest of ``pretrained``. Computed in float32 or wider.

    Raises:
        ConfigError: base is not a number above 1.
        ModelError: either is not a matrix of finite numbers with a non-zero entry, or their shapes differ.
    """
    _check_base(base)
    check_weight(pretrained, "pretrained")
    check_weight(edited, "edited")
    _check_pretrained(pretrained, edited)
    limit = exact_largest_singular_value(pretrained.to(edited.device))
    correction = _correction(_difference(edited, pretrained), limit, base)
    if correction is None:
        return edited.detach().clone()
    return (edited.detach() + correction).to(edited.dtype)


def _correction(total: Tensor, limit: float, base: float) -> Tensor | None:
    """Returns D' − D [d_out, d_in] in the dtype of D, or None if no singular value of D exceeds ``limit``."""
    if float(torch.linalg.vector_norm(total, dtype=torch.float64)) <= limit:
        return None  # no singular value is larger than the Frobenius norm
    squares: Tensor
    vectors: Tensor
    squares, vectors = torch.linalg.eigh(smaller_gram(total))
    sizes = squares.clamp(min=0.0).sqrt()
    large = sizes > limit
    if not bool(large.any()):
        return None
    sizes, side = sizes[large], vectors[:, large]
    compressed = (sizes.log() - math.log(limit)) / math.log(base) + limit
    scaled = (side * (compressed / sizes - 1.0)).to(total.dtype)
    side = side.to(total.dtype)
    if total.shape[0] <= total.shape[1]:
        return scaled @ (side.T @ total)
    return (total @ side) @ scaled.T


def _difference(weight: Tensor, pretrained: Tensor) -> Tensor:
    """Returns weight − pretrained [d_out, d_in] on the weight's device, float32, or float64 if either is."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, pretrained.dtype), torch.float32)
    return weight.detach().to(dtype) - pretrained.detach().to(weight.device, dtype)


def _check_pretrained(pretrained: Tensor, weight: Tensor) -> None:
    if pretrained.shape != weight.shape:
        remedy = "Bind PRUNE to the copy of this very weight that was made before its first edit."
        expected = f"the weight's shape, {tuple(weight.shape)}"
        raise ModelError("pretrained's shape", tuple(pretrained.shape), expected, remedy)


def _check_base(base: float) -> None:
    number = isinstance(base, int | float) and not isinstance(base, bool)
    if not number or not 1.0 < base < math.inf:
        remedy = "Leave it out for e, the SPHERE authors' choice; PRUNE's own code has 2, 1.5 and 1.2."
        raise ConfigError("base", base, "a finite number above 1", remedy)
