"""The best approximation of an update by thin factors, and how good it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import Factors
from sphere_plugin.geometry.checks import all_finite

# Where no rank is asked for: as many as it takes to lose less than this share of an update's norm.
TOLERANCE: Final = 0.01


@dataclass(frozen=True)
class LowRank:
    """Updates cut down to one rank.

    Attributes:
        rank: r, of all of them.
        factors: name -> B [d_out, r] and Aᵀ [d_in, r], float32.
        errors: name -> ‖ΔW − B A‖ / ‖ΔW‖, of these very factors; 0 for an update of zero.
    """

    rank: int
    factors: Mapping[str, Factors]
    errors: Mapping[str, float]


def cut(updates: Iterable[tuple[str, Tensor]], rank: int | None = None) -> LowRank:
    """Cut updates down to a rank by their singular value decompositions, in float64, one at a time.

    Args:
        updates: name and ΔW [d_out, d_in].
        rank: of all of them. None: each loses less than 1 % of its norm, and the largest rank that takes is that of
            all, filled up with zeros.

    Raises:
        ConfigError: a matrix is too small to have that rank.
        ModelError: an update is not finite.
    """
    factors: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name, update in updates:
        most = min(update.shape)
        if rank is not None and not 1 <= rank <= most:
            remedy = f"{name} has a rank of {most} at most."
            raise ConfigError("rank", rank, f"a whole number from 1 to {most}", remedy)
        if not all_finite(update):
            remedy = 'An adapter cannot hold it: export after fewer edits, or format="delta".'
            raise ModelError(f"the update of {name}", "NaN or infinite entries", "finite entries", remedy)
        delta = update.double()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        size, kept = float(values.norm()), rank or _needed(values)
        roots = values[:kept].sqrt()
        thin = Factors((left[:, :kept] * roots).float(), (right[:kept].T * roots).float())
        missed = float((delta - thin.left.double() @ thin.right.double().T).norm())
        factors[name], errors[name] = thin, missed / size if size else 0.0
    widest = max(thin.left.shape[1] for thin in factors.values())
    padded = {name: Factors(_padded(thin.left, widest), _padded(thin.right, widest)) for name, thin in factors.items()}
    return LowRank(widest, padded, errors)


def _needed(values: Tensor) -> int:
    """The smallest rank, at least 1, that leaves out less than `TOLERANCE` of the norm of these singular values."""
    rest = values.square().flip(0).cumsum(0).flip(0).sqrt()  # of what the ranks 0, 1, … leave out
    return max(1, int((rest >= TOLERANCE * rest[0]).sum())) if float(rest[0]) else 1


def _padded(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))
