"""float32 master copies of weights of 16 bits, in which edits add up.

    M ← M + ΔW,   W ← round(M)

A weight of bfloat16 has 8 significant bits, so W + ΔW drops whatever of ΔW is below 2⁻⁹ of W, entry by entry and batch
after batch. M keeps it, and brings it into W once enough has come together. |W − M| never exceeds half a step of W.

A copy belongs to the weight as long as the weight is its rounding. Weights that were put back to what they were before
the last batch have the copies of then, and those put back to what they were before any edit themselves. Weights in any
other state are somebody else's work: their masters then start anew from them, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LOG = logging.getLogger("sphere_plugin")


class Masters:
    """The master copies of an editor's weights; what it returns must not be written to.

    Args:
        weights: name -> live weight. Those of 32 bits or more are their own masters.
        pretrained: name -> copy of the weight before any edit.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], pretrained: Mapping[str, Tensor]) -> None:
        self._weights = {name: weight for name, weight in weights.items() if weight.element_size() < 4}
        self._pretrained = pretrained
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the last batch, for whoever undoes it; in the memory of the process
        self._new: dict[str, Tensor] = {}

    def copies(self) -> dict[str, Tensor]:
        """Name -> the copy of the weight as it is now, float32, laid out as the model stores the weight."""
        self._settle()
        return dict(self._kept)

    def recall(self, copies: Mapping[str, Tensor]) -> None:
        """Go on from what `copies` returned in another editor whose weights were as these are now."""
        here = {name: weight.device for name, weight in self._weights.items() if name in copies}
        self._kept = {name: copies[name].to(device, copy=True) for name, device in here.items()}
        self._before = {}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """While a batch is written; what `write` was last given counts from its end on, and never if it raises."""
        self._settle()
        self._new = {}
        try:
            yield
            self._before = {name: copy.cpu() for name, copy in self._kept.items()}
            self._kept |= self._new
        finally:
            self._new = {}

    def of(self, name: str) -> Tensor | None:
        """The copy as it was when the batch began; None for a weight without one."""
        return self._kept.get(name)

    def write(self, name: str, copy: Tensor) -> None:
        """Note what the copy is after this batch."""
        self._new[name] = copy

    def _settle(self) -> None:
        """Have the copies of the weights as they are: all of one moment, if there is one."""
        if self._rounded(self._kept):
            return
        if self._rounded(self._before):
            self._kept = {name: copy.to(self._weights[name].device) for name, copy in self._before.items()}
        elif all(torch.equal(self._pretrained[name], weight) for name, weight in self._weights.items()):
            self._kept = {name: weight.detach().float() for name, weight in self._weights.items()}
        else:
            self._begin_anew()
        self._before = {}

    def _rounded(self, copies: Mapping[str, Tensor]) -> bool:
        """Whether every weight is the rounding of its copy."""
        return all(
            name in copies and torch.equal(copies[name].to(weight.device, weight.dtype), weight)
            for name, weight in self._weights.items()
        )

    def _begin_anew(self) -> None:
        strange = []
        for name, weight in self._weights.items():
            known = self._kept.get(name)
            if known is not None and torch.equal(known.to(weight.dtype), weight):
                continue
            if known is not None and not torch.equal(self._pretrained[name], weight):
                strange.append(name)
            self._kept[name] = weight.detach().float()
        if strange:
            _LOG.warning(
                "%s: not as the last batch left them, nor as before it or before any edit: the master copies "
                "start anew from the weights, and what rounding took of earlier edits is lost",
                ", ".join(strange),
            )
