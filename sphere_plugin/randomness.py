"""Random states that other people's code is kept from changing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Put back the states of all random generators when the block ends."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if started else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if started:
            torch.cuda.set_rng_state_all(devices)
        else:  # a seed waits for the first use of a GPU; let the one that was meant overtake it
            torch.cuda.manual_seed_all(torch.initial_seed())
