"""Which batches are in the weights right now."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from sphere_plugin.files import fingerprint

_LOG = logging.getLogger("sphere_plugin")

# Keys of a batch by layer, each [d_in, facts]; empty stands for: forget all earlier ones.
Keys = Mapping[int, Tensor]


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
        self._pretrained = self._now()
        self._settled: str | None = self._pretrained
        self._pending: tuple[Keys, str] | None = None

    def news(self) -> tuple[str, Keys | None]:
        """The weights' fingerprint, and what has to be remembered before the next batch, if anything.

        Changes nothing.
        """
        now = self._now()
        if self._pending is not None and now == self._pending[1]:
            return now, self._pending[0]
        if now == self._settled and not (now == self._pretrained and self._pending is None):
            # The last batch was undone; what came before it still stands, which is nothing if it was the first.
            return now, None
        if now != self._pretrained:
            _LOG.warning(
                "the weights are in a state that this editor does not know, neither before any edit nor before or "
                "after the last batch: keys of earlier edits are forgotten"
            )
        return now, {}

    def settle(self, now: str) -> None:
        """What :meth:`news` told has been remembered."""
        self._settled = now
        self._pending = None

    def forget(self) -> None:
        """Know no state but the one before any edit, until :meth:`pend` tells another."""
        self._settled = self._pending = None

    def pend(self, keys: Keys) -> str:
        """Note the ``keys`` of the batch that has left the weights as they are; returns the weights' fingerprint."""
        now = self._now()
        self._pending = (keys, now)
        return now

    def _now(self) -> str:
        return fingerprint(self._weights.items())
