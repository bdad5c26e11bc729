"""RECT: write the entries that change their weight the most, and no others (Gu et al., EMNLP 2024, 2401.04700)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry.checks import all_finite, check_matrix, check_weight
from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, removed_share

WEIGHT_EPSILON: Final = 1e-8  # added to every entry of W before ΔW is divided by it, as in the authors' code


@dataclass(frozen=True)
class RectConfig:
    """Keep the entries with the largest relative change |ΔW / (W + 1e-8)|, set the others to zero.

    Agrees with RECT in the repository of the SPHERE authors. Of n entries the k-th smallest relative change,
    k = floor(n (1 − keep)), is the threshold, and what reaches the threshold stays. So n − k + 1 entries stay, one
    more than the share says, and all entries that tie with the threshold stay with it: no tie is broken, and the
    result does not depend on the order of the entries. Where W is zero, the relative change is 1e8 |ΔW|, far above
    that of other entries, so it stays.

    RECT has no state and looks at the weight as it is now, not at the pretrained one. It chooses among entries, so
    updates in factors are made dense for it.

    Attributes:
        keep: share of entries to keep, in (0, 1]. The authors' code keeps 0.4; 1 returns the update as it is.

    Raises:
        ConfigError: keep is out of its range.
    """

    keep: float = 0.4

    def __post_init__(self) -> None:
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if not number or not 0.0 < self.keep <= 1.0:
            remedy = "The authors' code keeps 0.4 of the entries; write 40 percent as 0.4."
            raise ConfigError("keep", self.keep, "a number in (0, 1]", remedy)

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie RECT to a weight. Nothing of ``pretrained`` [d_out, d_in] is used or kept."""
        return _BoundRect(self)


@dataclass(frozen=True)
class _BoundRect:
    config: RectConfig

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        check_update(weight, delta)
        below = math.floor(delta.numel() * (1 - Fraction(str(self.config.keep))))
        if below == 0:
            return Restrained(delta, removed_share=0.0, rank=0)
        change = _relative_change(weight.detach(), delta.detach())
        stays = change >= _kth_smallest(change, below)
        kept = torch.where(stays.to(delta.device), delta.detach(), 0.0)
        return Restrained(kept, removed_share=removed_share(delta, kept), rank=0)


def check_update(weight: Tensor, delta: Tensor) -> None:
    """Raises ModelError unless ``delta`` is a finite update of ``weight``, a finite matrix of the same shape.

    Args:
        weight: [d_out, d_in], any floating point dtype, not all zero.
        delta: [d_out, d_in], any floating point dtype; zeros are fine.
    """
    check_weight(weight)
    check_matrix(delta, "delta")
    if delta.shape != weight.shape:
        turned = delta.T.shape == weight.shape
        raise ModelError(
            "delta's shape",
            tuple(delta.shape),
            f"the weight's shape, {tuple(weight.shape)}",
            "It looks stored transposed: pass neurons(delta, transposed=True)."
            if turned
            else "Pass the update of this very weight.",
        )
    if not all_finite(delta):
        bad = delta.numel() - int(torch.isfinite(delta.detach()).sum())
        remedy = "The method that made this update diverged: lower its learning rate, or edit fewer facts at once."
        raise ModelError("delta", f"NaN or infinite in {bad} of {delta.numel()} entries", "finite entries", remedy)


def _relative_change(weight: Tensor, delta: Tensor) -> Tensor:
    """Returns |delta / (weight + ε)| [d_out, d_in] on the weight's device, float32, or float64 if either is.

    Where a weight is exactly −ε, a change of zero gives NaN. It counts as the largest change, as in the authors' code,
    and whether it stays makes no difference.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    change = weight.to(dtype) + WEIGHT_EPSILON
    return torch.div(delta.to(weight.device, dtype), change, out=change).abs_()


def _kth_smallest(values: Tensor, k: int) -> float:
    """Returns the k-th smallest of non-negative values, k counted from 1.

    Floats that are not negative are ordered as their bits are when read as integers, so bisection over the bits finds
    it. torch.kthvalue finds the same, but it copies the values, makes an index of 8 bytes for each, and on a GPU is
    refused in torch's deterministic mode. This takes one mask, and less time.
    """
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    low, high = 0, torch.iinfo(bits.dtype).max
    while low < high:
        middle = (low + high) // 2
        if int(torch.count_nonzero(bits <= middle)) >= k:
            high = middle
        else:
            low = middle + 1
    return float(torch.tensor(low, dtype=bits.dtype).view(values.dtype))
