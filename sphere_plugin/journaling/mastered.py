"""Weights with a float32 master copy in a journal: the journal is of the copy, and the weight is its rounding."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.errors import CacheError
from sphere_plugin.files import fingerprint
from sphere_plugin.journaling.batch import same_bits

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Mastered:
    """Which weights of a journal have a master copy.

    A *state* is what a journal replays: the master copy where there is one, else the weight; on the CPU, laid out as
    the model stores the weight.

    Attributes:
        dtypes: name -> dtype of the weight.
    """

    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def among(cls, weights: Mapping[str, Tensor], names: Collection[str]) -> Mastered:
        """Those of ``weights`` that are called so."""
        return cls({name: weight.dtype for name, weight in weights.items() if name in names})

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Mastered:
        """From the metadata of a journal."""
        dtypes: dict[str, torch.dtype] = {}
        for name, told in json.loads(metadata.get("masters", "{}")).items():
            dtype = getattr(torch, told, None)
            if not isinstance(dtype, torch.dtype):
                remedy = "Read it with a newer version of torch."
                raise CacheError(f"dtype of {name} in the journal", told, "a dtype that torch knows", remedy)
            dtypes[name] = dtype
        return cls(dtypes)

    def metadata(self) -> dict[str, str]:
        """For the metadata of a journal; empty if there are none."""
        dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items()}
        return {"masters": json.dumps(dtypes)} if dtypes else {}

    def starting(self, weights: Weights) -> Weights:
        """The states before any edit: a weight is its own master, widened."""
        return {name: one.float() if name in self.dtypes else one for name, one in weights.items()}

    def state(self, name: str, live: Tensor, master: Tensor | None) -> Tensor:
        """A copy of the state of a ``live`` weight; its master starts anew if it has none whose rounding it is."""
        if name not in self.dtypes:
            return live.to("cpu", copy=True).contiguous()
        if master is not None and same_bits(master.to(live.dtype), live):
            return master.to("cpu", copy=True).contiguous()
        return live.to("cpu", torch.float32).contiguous()

    def live(self, states: Mapping[str, Tensor]) -> Weights:
        """The weights, rounded from their states; those without a master are the states themselves."""
        return {name: one.to(self.dtypes.get(name, one.dtype)) for name, one in states.items()}

    def told(self, states: Mapping[str, Tensor]) -> dict[str, str]:
        """For a record: the fingerprint of the master copies; empty if there are none."""
        copies = [(name, states[name]) for name in sorted(states) if name in self.dtypes]
        return {"masters": fingerprint(copies)} if copies else {}
