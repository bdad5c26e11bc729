"""Copies of weights, and writes that either happen whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Bit-exact copies of named weights, in their own dtype and on their own devices.

    Attributes:
        tensors: name -> copy, the same shape and dtype as the weight.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def take(cls, weights: Mapping[str, Tensor]) -> Snapshot:
        """Copy ``weights`` (name -> live parameter)."""
        return cls({name: weight.detach().clone() for name, weight in weights.items()})

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write the copies back into the live ``weights`` of the same names."""
        with torch.no_grad():
            for name, copy in self.tensors.items():
                weights[name].copy_(copy)


@contextmanager
def all_or_nothing(weights: Mapping[str, Tensor]) -> Iterator[Snapshot]:
    """Undo every write to ``weights`` if the block raises, whatever it raises (Ctrl-C included).

    Yields:
        The weights as they were when the block was entered.
    """
    before = Snapshot.take(weights)
    try:
        yield before
    except BaseException:
        before.restore(weights)
        raise
