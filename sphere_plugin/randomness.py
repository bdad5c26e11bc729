"""Random numbers of other people's code: drawn from a generator of ours, or from the process's and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sphere_plugin.process import ONE_AT_A_TIME


@dataclass(frozen=True)
class RandomStates:
    """Where all random generators of the process are."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: Sequence[torch.Tensor] | None

    @classmethod
    def now(cls) -> Self:
        """As they are."""
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = torch.cuda.get_rng_state_all() if started else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), devices)

    def put(self) -> None:
        """Go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.devices is not None:
            torch.cuda.set_rng_state_all(list(self.devices))
        else:  # a seed waits for the first use of a GPU; let the one that was meant overtake it
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Put back the states of all random generators when the block ends, which one thread at a time is in."""
    with ONE_AT_A_TIME:
        before = RandomStates.now()
        try:
            yield
        finally:
            before.put()


class DrawnFrom(TorchFunctionMode):
    """While open, samples that this thread draws with `torch.multinomial` come from ``generator``.

    The generator of the process is neither used nor changed, so threads that write text at the same time write what
    each would alone. Numbers are those that the process's generator gives after the same seed.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called instead of every function of torch."""
        given = dict(kwargs or {})
        if func is torch.multinomial:
            given["generator"] = self.generator
        return func(*args, **given)
