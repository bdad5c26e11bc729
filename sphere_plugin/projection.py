"""What a projection did to an adapter or to trained weights, and the line that says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_LOG = logging.getLogger("sphere_plugin")
_PREFIX: Final = "base_model.model."  # of every layer's name in a PeftModel


@dataclass(frozen=True)
class LayerProjection:
    """What the projection did to one layer.

    Attributes:
        rank: k, the number of principal directions of the layer's weight.
        removed_share: share of the update's squared Frobenius norm that was taken away, in [0, 1].
        energy: that squared norm before the projection; over all steps if there were several.
        rounding_loss: share of the projected update's norm that its dtype could not hold, a root of sums of squares
            over steps: ‖written − projected‖ / ‖projected‖.
    """

    rank: int
    removed_share: float
    energy: float
    rounding_loss: float = 0.0


@dataclass(frozen=True)
class ProjectionReport:
    """What the projection did to an adapter or to trained weights.

    Attributes:
        adapter: name of the adapter that now holds the projected update; None for full weights.
        layers: by the layer's name in the base model.
    """

    adapter: str | None
    layers: Mapping[str, LayerProjection]

    @property
    def removed_share(self) -> float:
        """Share of the whole update's squared norm that was taken away, in [0, 1]."""
        energy = sum(layer.energy for layer in self.layers.values())
        removed = sum(layer.energy * layer.removed_share for layer in self.layers.values())
        return removed / energy if energy else 0.0


def reported(adapter: str | None, layers: Mapping[str, LayerProjection]) -> ProjectionReport:
    """Make a report, and log it: one INFO line, or a warning that there was nothing to project."""
    report = ProjectionReport(adapter, {title.removeprefix(_PREFIX): layer for title, layer in layers.items()})
    ranks = [layer.rank for layer in layers.values()]
    what = "the trained weights" if adapter is None else f"adapter {adapter!r}"
    if any(layer.energy for layer in layers.values()):
        share, many = 100 * report.removed_share, len(layers)
        _LOG.info("%s: %d layers, r %d to %d, %.1f %% of ΔW removed", what, many, min(ranks), max(ranks), share)
    else:
        _LOG.warning("%s: ΔW is zero in all %d layers; there was nothing to project", what, len(layers))
    return report
