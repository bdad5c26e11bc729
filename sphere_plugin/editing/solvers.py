"""The closed forms of all edited layers, each kept by one of the ranks that share the work.

Layers are solved one after the other, since each sees what was written below it. What is shared is what lies around
that: a rank makes the factorisations of its own layers, while the others make theirs, holds them in its memory, and
works the keys of earlier batches into them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.history import Keys
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.geometry import Factors
from sphere_plugin.parallel.ranks import ALONE, Ranks


class Solvers:
    """What solves for the updates of all layers.

    Args:
        anatomy: the model's parts.
        config: base_method and its settings.
        moments: layer -> E[kkᵀ] of the layers that this rank keeps; emptied.
        ranks: those that share the work.

    Raises:
        ModelError: a second moment that cannot be solved with, on any rank.
    """

    def __init__(
        self, anatomy: Anatomy, config: EditingConfig, moments: dict[int, Tensor], ranks: Ranks = ALONE
    ) -> None:
        self._anatomy, self._ranks = anatomy, ranks
        self._keeper = {layer: ranks.keeper(number) for number, layer in enumerate(anatomy.rewrites)}
        self._own: dict[int, Any] = ranks.together(
            "closed forms", lambda: {layer: _solver(config, layer, moments.pop(layer)) for layer in list(moments)}
        )
        sizes = {n: one.null.shape[1] if isinstance(one, AlphaEdit) else None for n, one in self._own.items()}
        #: layer -> dimension of AlphaEdit's null space; None for another base method.
        self.null_space = {n: size for part in ranks.each("null spaces", lambda: sizes) for n, size in part.items()}

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Factors:
        """ΔW of a layer for ``keys`` [d_in, u] and ``residuals`` [d_out, u], from the rank that keeps it."""

        def solve() -> tuple[Tensor, Tensor]:
            found: Factors = self._own[layer].update(keys, residuals)
            return found.left, found.right

        return Factors(*self._ranks.by(self._keeper[layer], f"update of layer {layer}", solve))

    def remember(self, keys: Keys) -> None:
        """Count a batch among the earlier ones, in all layers or, if it fails, in none; without keys forget them."""
        pasts = [(solver, solver.with_keys(keys[layer] if keys else None)) for layer, solver in self._own.items()]
        for solver, past in pasts:
            solver.remember(past)

    def learn(self, keys: Keys) -> None:
        """Count a batch that another editor has written among the earlier ones."""
        self.remember({layer: self.beside(layer, keys[layer]) for layer in self._own})

    def beside(self, layer: int, keys: Tensor) -> Tensor:
        """Keys [d_in, facts] on the device of their layer's weight, laid out as a batch leaves them."""
        return keys.to(self._anatomy.rewrites[layer].weight.device).contiguous()


def _solver(config: EditingConfig, layer: int, moment: Tensor) -> Memit | AlphaEdit:
    if config.base_method == "MEMIT":
        return Memit(moment, config.mom2_update_weight, layer)
    return AlphaEdit(moment, config.nullspace_threshold, config.L2, layer)
