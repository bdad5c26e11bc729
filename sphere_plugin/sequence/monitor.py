"""Numbers of the edited weights that cost next to nothing beside a batch of edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import hyperspherical_energy, neurons
from sphere_plugin.geometry.spectral import largest_singular_value
from sphere_plugin.parallel.ranks import ALONE, Ranks

# The energies that are followed: s = 0 is the logarithmic one, s = 2 that of the paper's theorem.
ORDERS: Final = (0.0, 1.0, 2.0)

Energies = dict[str, float | None]
T = TypeVar("T")


def energies(weight: Tensor) -> Energies:
    """Order -> hyperspherical energy of ``weight`` [d_out, d_in]; None where it has none: a zero row, equal rows."""
    found: Energies = {}
    for s in ORDERS:
        try:
            found[f"{s:g}"] = hyperspherical_energy(weight, s)
        except ModelError:
            found[f"{s:g}"] = None
    return found


def sigma_max(weight: Tensor) -> float | None:
    """The largest singular value; None where an entry is not finite."""
    try:
        return largest_singular_value(weight)
    except ModelError:
        return None


class Monitor:
    """Follows weights from before the first edit on.

    Args:
        unedited: name -> weight before any edit, as the model stores it.
        transposed: name -> whether it is stored as [d_in, d_out].
        ranks: those that share the work, weight by weight.
    """

    def __init__(self, unedited: Mapping[str, Tensor], transposed: Mapping[str, bool], ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._transposed = {name: transposed[name] for name, weight in unedited.items() if weight.dim() == 2}
        self._unedited = {name: self._rows(name, unedited[name]) for name in self._transposed}
        self.energy: dict[str, Energies] = self._shared(lambda name: energies(self._unedited[name]))

    def batch(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Weight -> `energy` and `sigma_max` now."""

        def measured(name: str) -> dict[str, Any]:
            rows = self._rows(name, weights[name])
            return {"energy": energies(rows), "sigma_max": sigma_max(rows)}

        return self._shared(measured)

    def checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
        """Weight -> `update_norm` ‖W − W₀‖, `weight_norm` ‖W₀‖ and `sigma_max` now."""
        told: dict[str, dict[str, float | None]] = {}
        for name, before in self._unedited.items():
            now, old = self._rows(name, weights[name]).float(), before.to(weights[name].device).float()
            told[name] = {
                "update_norm": float(torch.linalg.vector_norm(now - old)),
                "weight_norm": float(torch.linalg.vector_norm(old)),
                "sigma_max": sigma_max(now),
            }
        return told

    def change(self, now: Mapping[str, Energies]) -> Energies:
        """Weight -> relative change of its energy at s = 2 since before the first edit; None where it has none now.

        A weight that had none before the first edit is left out.
        """
        found: Energies = {}
        for name, known in self.energy.items():
            old, new = known["2"], now[name]["2"]
            if old is not None:
                found[name] = None if new is None else new / old - 1.0
        return found

    def _shared(self, measure: Callable[[str], T]) -> dict[str, T]:
        """Weight -> what ``measure`` says of it, in the order of the weights."""
        names, ranks = list(self._transposed), self._ranks
        mine = names[ranks.rank :: ranks.size]
        parts = ranks.each("energies", lambda: {name: measure(name) for name in mine})
        found = {name: one for part in parts for name, one in part.items()}
        return {name: found[name] for name in names}

    def _rows(self, name: str, weight: Tensor) -> Tensor:
        return neurons(weight.detach(), self._transposed[name])
