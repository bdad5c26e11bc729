"""What editing a model needs on each device, whether that is there, and which settings would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from sphere_plugin.editing.budget import Batch, Budget, Phase, Place, Shape
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.geometry.neurons import is_transposed
from sphere_plugin.models.memory import free_bytes, in_words

ALL_GPUS: Final = "all GPUs"
TOLD: Final = 0.04  # parts that are a smaller share of a device's need are not named
PASSES: Final = (2048, 512, 128)  # values of token_budget that are tried
ASIDE: Final = ("bf16", "model_parallel")  # settings that are none of `EditingConfig`


@dataclass(frozen=True)
class Where:
    """Where a model is to be, and how.

    Attributes:
        device: "cpu" or "cuda:1".
        element: bytes of a weight.
        parallel: whether it is spread over all GPUs.
    """

    device: str
    element: int
    parallel: bool = False


@dataclass(frozen=True)
class Need:
    """What one device has to hold.

    Attributes:
        device: "cpu", "cuda:1" or all GPUs.
        needed: bytes at the peak.
        phase: when that is.
        places: what of the phase is on the device.
        free: bytes; None where nobody says.
    """

    device: str
    needed: int
    phase: Phase
    places: tuple[Place, ...]
    free: int | None

    @property
    def short(self) -> bool:
        """Whether it does not fit."""
        return self.free is not None and self.needed > self.free

    def sentence(self) -> str:
        """For the terminal."""
        parts = {name: size for name, (place, size) in self.phase.parts.items() if place in self.places}
        large = [name for name in sorted(parts, key=lambda name: -parts[name]) if parts[name] > TOLD * self.needed]
        told = ", ".join(f"{name} {in_words(parts[name])}" for name in large)
        return (
            f"needs {in_words(self.needed)} on {self.device} while {self.phase.name} ({told}), "
            f"{in_words(self.free)} free"
        )


def shape_of(model: nn.Module, config: EditingConfig) -> Shape:
    """The sizes of a model, whose weights need not have values; ``config`` fits it."""
    settings: Any = model.config
    path = config.rewrite_module_tmp.format(config.layers[-1])
    module = model.get_submodule(path)
    stored: Any = module.weight
    d_out, d_in = reversed(stored.shape) if is_transposed(module) else stored.shape
    heads = getattr(settings, "num_attention_heads", 1)
    width = getattr(settings, "hidden_size", d_out)
    each = getattr(settings, "head_dim", None) or width // heads
    names = {name for name, _ in model.named_modules()}
    head: Any = model.get_submodule(config.lm_head_module)
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=next(n for n in range(len(names) + 1) if config.layer_module_tmp.format(n) not in names),
        width=width,
        kept=2 * each * (getattr(settings, "num_key_value_heads", None) or heads),
        vocabulary=head.weight.shape[0],
        d_out=d_out,
        d_in=d_in,
    )


def needs(budget: Budget, where: Where) -> list[Need]:
    """What each device has to hold, that of the weights first."""
    spread = where.parallel and (where.device != "cpu" or torch.cuda.is_available())  # without a GPU it is all in one
    weights = ALL_GPUS if spread else _numbered(where.device)
    statistics = _numbered(budget.config.stats_device or weights)
    at: dict[str, list[Place]] = {}
    at.setdefault(weights, []).append("weights")
    at.setdefault(statistics, []).append("statistics")
    if spread and statistics not in (weights, "cpu"):  # that GPU is one of all
        at[weights].append("statistics")
    at.setdefault("cpu", []).append("host")
    found = []
    for device, places in at.items():
        needed, phase = budget.peak(*places)
        found.append(Need(device, needed, phase, tuple(places), _free(device)))
    return found


def told(shape: Shape, config: EditingConfig, batch: Batch, where: Where) -> list[tuple[str, bool]]:
    """For each device a sentence, and whether it has too little; that of the first which has names a way out."""
    lines, said = [], False
    for need in needs(Budget(shape, config, where.element, batch), where):
        more = f"; too little: {remedy(shape, config, batch, where)}" if need.short and not said else ""
        said = said or need.short
        lines.append((f"batches of {batch.facts}: {need.sentence()}{more}", need.short))
    return lines


def remedy(shape: Shape, config: EditingConfig, batch: Batch, where: Where) -> str:
    """Settings with which everything fits, as few of them as it takes; where there are none, what else there is.

    Settings that change no result come before those that do.
    """
    asked = list(_remedies(config, where))
    for count in range(1, len({key for key, _ in asked}) + 1):
        for changes in _combined(asked, count):
            settings: dict[str, Any] = {key: one for key, one in changes.items() if key not in ASIDE}
            tried = dataclasses.replace(config, **settings)
            element = 2 if "bf16" in changes else where.element
            placed = replace(where, element=element, parallel=where.parallel or "model_parallel" in changes)
            if not any(need.short for need in needs(Budget(shape, tried, placed.element, batch), placed)):
                return "use " + " and ".join(f"{key}: {_yaml(one)}" for key, one in changes.items())
    more = "" if where.parallel or where.device == "cpu" else "more GPUs with model_parallel: true, "
    return f"use {more}fewer layers, a smaller model or a larger machine"


def _remedies(config: EditingConfig, where: Where) -> Iterator[tuple[str, object]]:
    if where.device != "cpu" and config.stats_device != "cpu":
        yield "stats_device", "cpu"
    if where.device != "cpu" and not where.parallel and torch.cuda.device_count() > 1:
        yield "model_parallel", True
    yield from (("token_budget", tokens) for tokens in PASSES if tokens < config.token_budget)
    if where.element == 4:
        yield "bf16", True


def _combined(asked: Sequence[tuple[str, object]], count: int) -> Iterator[Mapping[str, object]]:
    """All choices of ``count`` settings, each key once, in the order they are given."""
    if not count:
        yield {}
        return
    for place, (key, value) in enumerate(asked):
        for others in _combined(asked[place + 1 :], count - 1):
            if key not in others:
                yield {key: value, **others}


def _numbered(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _free(device: str) -> int | None:
    if device != ALL_GPUS:
        return free_bytes(device)
    return sum(free_bytes(f"cuda:{number}") or 0 for number in range(torch.cuda.device_count())) or None
