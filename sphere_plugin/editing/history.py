"""Which batches are in the weights right now."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from sphere_plugin.files import fingerprint

_LOG = logging.getLogger("sphere_plugin")

# Keys of a batch by layer, each [d_in, facts]; None stands for: forget all earlier ones.
Keys = Mapping[int, Tensor] | None


class History:
    """Tells from the weights alone which batches count as earlier edits.

    The keys of a batch count once the next batch finds the weights as that batch left them. Weights that were restored
    to what they were before the last batch, or before any, thus take the undone keys out of the history without
    anyone having to say so. Weights in any other state are somebody else's work: the history then starts anew.

    Args:
        weights: name -> live weight, before any edit.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._pretrained = self._settled = self._now()
        self._pending: tuple[Mapping[int, Tensor], str] | None = None

    def news(self) -> tuple[str, list[Keys]]:
        """The weights' fingerprint, and what has to be remembered before the next batch. Changes nothing."""
        now = self._now()
        if self._pending is not None and now == self._pending[1]:
            return now, [self._pending[0]]
        if now == self._settled and not (now == self._pretrained and self._pending is None):
            # The last batch was undone; what came before it still stands, which is nothing if it was the first.
            return now, []
        if now != self._pretrained:
            _LOG.warning(
                "the weights are neither as the last batch left them, nor as it found them, nor as they were before "
                "any edit: keys of earlier edits are forgotten"
            )
        return now, [None]

    def settle(self, now: str) -> None:
        """What :meth:`news` told has been remembered."""
        self._settled = now
        self._pending = None

    def pend(self, keys: Mapping[int, Tensor]) -> str:
        """Note the ``keys`` of a batch just written over the weights that were settled; returns their fingerprint."""
        now = self._now()
        self._pending = (keys, now)
        return now

    def _now(self) -> str:
        return fingerprint(self._weights.items())
