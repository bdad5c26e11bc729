"""What ranks share of a batch: each aims at, and reads the keys of, its part of the facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sphere_plugin.editing.aim import Aimed
from sphere_plugin.editing.requests import Fact
from sphere_plugin.parallel.ranks import Ranks


class Reader(Protocol):
    """What reads keys and values of facts, see `KeyReader`."""

    layers: list[int]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, facts] and values [width, facts]."""
        ...


def aimed_together(ranks: Ranks, facts: Sequence[Fact], search: Callable[[Sequence[Fact]], Aimed]) -> Aimed:
    """The targets of ``facts``; every rank does ``search`` on its part of them, if it has one."""
    if ranks.size == 1:
        return search(facts)
    mine = ranks.share(facts)

    def own() -> tuple[Tensor, Tensor, Tensor] | None:
        found = search(mine) if mine else None
        return None if found is None else (found.values, found.losses, found.steps)

    parts = [part for part in ranks.each("targets", own) if part is not None]
    return Aimed(*(torch.cat(column) for column in zip(*parts, strict=True)))


class ReadTogether:
    """Reads keys and values of ``facts``, every rank those of its part.

    Args:
        ranks: those that share the work.
        layers: that are read.
        facts: the batch.
        begin: makes a reader of some facts.
    """

    def __init__(
        self, ranks: Ranks, layers: Sequence[int], facts: Sequence[Fact], begin: Callable[[Sequence[Fact]], Reader]
    ) -> None:
        self.layers = sorted(layers)
        self._ranks = ranks
        mine = ranks.share(facts)
        self._reader = ranks.together("hidden states", lambda: begin(mine) if mine else None)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, facts] and values [width, facts] with the weights as they are now, see `KeyReader.read`."""
        if self._ranks.size == 1 and self._reader is not None:
            return self._reader.read(layer)
        devices: list[torch.device] = []

        def own() -> tuple[Tensor, Tensor] | None:
            found = None if self._reader is None else self._reader.read(layer)
            devices.extend(part.device for part in found or ())
            return found

        parts = [part for part in self._ranks.each(f"keys of layer {layer}", own) if part is not None]
        keys, values = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return (keys, values) if not devices else (keys.to(devices[0]), values.to(devices[1]))
