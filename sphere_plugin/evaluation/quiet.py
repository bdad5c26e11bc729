"""What other people's evaluation code is kept from changing: random states, a model's mode, what a terminal shows."""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch
from torch import nn


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Put back, when the block ends, whether every module trains."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-evaluation-harness from printing, from drawing bars and from starting processes for a standard error.

    Environment variables are afterwards what they were: the harness sets some as it is imported.
    """
    logs, environment = [logging.getLogger(name) for name in ("lm_eval", "transformers")], dict(os.environ)
    levels = [log.level for log in logs]
    os.environ["DISABLE_MULTIPROC"] = "1"
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            for redirect in (redirect_stdout, redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
