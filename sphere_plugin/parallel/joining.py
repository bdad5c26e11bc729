"""Connect the processes that torchrun has started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from sphere_plugin.errors import ConfigError, RanksError
from sphere_plugin.parallel.environment import processes
from sphere_plugin.parallel.ranks import ALONE, RESUME, Ranks

PATIENCE_VARIABLE: Final = "SPHERE_PLUGIN_PATIENCE"
PATIENCE: Final = 1800  # seconds that an exchange waits for the slowest rank


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect the processes that torchrun has started; `ALONE` without torchrun, or with a single one.

    Raises:
        ConfigError: the time to wait that the environment names is no number.
        RanksError: they do not find each other.
    """
    if processes() == 1:
        yield ALONE
        return
    patience = _patience()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError, dist.DistError) as error:
        remedy = "Start them with torchrun, the same command on every machine; docs/scale.md has the lines."
        raise RanksError("the processes", str(error).strip().splitlines()[0], "to find each other", remedy) from error
    before = signal.signal(signal.SIGTERM, _terminated)
    ranks = Ranks(rank, size, local, store)
    lost = False
    try:
        yield ranks
    except RanksError:
        lost = True
        raise
    finally:
        if not lost:
            with suppress(RanksError):
                ranks.end()
            signal.signal(signal.SIGTERM, before)
            dist.destroy_process_group()


def _patience() -> timedelta:
    given = os.environ.get(PATIENCE_VARIABLE, str(PATIENCE))
    try:
        seconds = float(given)
        if seconds <= 0:
            raise ValueError
    except ValueError:
        raise ConfigError(PATIENCE_VARIABLE, given, "seconds above 0", f"Unset it for {PATIENCE}.") from None
    return timedelta(seconds=seconds)


def _terminated(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    remedy = "Another process of the run has died, or the scheduler takes the machine back. " + RESUME
    raise RanksError("this process", "SIGTERM", "to be left running", remedy)
