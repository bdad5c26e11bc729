"""What other people's evaluation code is kept from changing: a model's mode, what a terminal shows."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sphere_plugin.process import muted


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
def quiet() -> Iterator[None]:
    """Keep lm-evaluation-harness from printing, from drawing bars and from starting processes for a standard error.

    Environment variables are afterwards what they were: the harness sets some as it is imported. One thread at a time.
    """
    with muted(errors=True), _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _silent() -> Iterator[None]:
    logs, environment = [logging.getLogger(name) for name in ("lm_eval", "transformers")], dict(os.environ)
    levels = [log.level for log in logs]
    os.environ["DISABLE_MULTIPROC"] = "1"
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
