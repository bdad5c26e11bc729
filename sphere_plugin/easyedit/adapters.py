"""The post-hook for methods that train a LoRA: LoRA, DPO and QLoRA.

EasyEdit's LoRA goes on training the same adapter from one edit to the next. P⊥ = I − αUUᵀ is no projection where
α < 1, so projecting A again and again would take (1 − α)ᵏ of what was learned first. Hence A P⊥ is what is evaluated
and kept, and the raw A is put back before the next training step. Its DPO and QLoRA begin a new adapter at every edit,
in the place of the one before: nothing of that is left to go on from, with this package or without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.easyedit.turns import Turns
from sphere_plugin.editing.account import Touched, log_apply
from sphere_plugin.journaling import Snapshot
from sphere_plugin.peft import base_weight, check_layer, lora_layers, project_layers
from sphere_plugin.projection import LayerProjection
from sphere_plugin.restraints import SphereConfig

_LOG = logging.getLogger("sphere_plugin")


@dataclass(frozen=True)
class Trained:
    """The A of a layer: the parameter, its value as trained, and as it was left, projected."""

    weight: nn.Parameter
    raw: Tensor
    held: Tensor

    def go_on(self) -> None:
        """Put the raw A back for more training, unless somebody has written another A meanwhile."""
        if torch.equal(self.weight, self.held.to(self.weight)):  # the model may have been moved
            self.weight.copy_(self.raw)


@dataclass
class AdapterSession:
    """Restrains a method that trains a LoRA.

    Attributes:
        name: of the method.
        method: EasyEdit's function.
        config: the projection.
        turns: in which the method is called.
    """

    name: str
    method: Callable[..., Any]
    config: SphereConfig
    turns: Turns = field(default_factory=Turns, repr=False)
    _trained: list[Trained] = field(default_factory=list, repr=False)
    _told: bool = field(default=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train once, then project A; the adapter is as it was if anything raises.

        Returns:
            What the method returned; EasyEdit takes the edit back by unloading the adapter.

        Raises:
            ModelError: a layer that has no matrix whose rows are neurons, or a LoRA that ΔW = s·B·A does not describe.
        """
        model = next(value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))
        adapter = _adapter_weights(model)
        with torch.no_grad(), _as_it_was(model, adapter):
            for one in self._trained:
                one.go_on()
            with torch.enable_grad(), self.turns.take():
                edited, returned = self.method(*args, **kwargs)
            self._warn_of_a_new_start(model, adapter)
            self._project(edited)
        return edited, returned

    def _warn_of_a_new_start(self, model: nn.Module, adapter: Mapping[str, nn.Parameter]) -> None:
        """Say once that the adapter of the edits before is gone: the method has put another in its place."""
        now = _adapter_weights(model)
        if not self._told and any(now.get(name) is not weight for name, weight in adapter.items()):
            self._told = True
            _LOG.warning(
                "EasyEdit's %s begins a new adapter at every edit: of edits in sequence the model keeps the last",
                self.name,
            )

    def _project(self, model: nn.Module) -> None:
        trained, touched = list[Trained](), []
        layers = lora_layers(model)
        for adapter in sorted({name for layer in layers.values() for name in layer.active_adapters}):
            chosen = {title: layer for title, layer in layers.items() if adapter in layer.r}
            for title, layer in chosen.items():
                check_layer(title, layer, adapter, quantised=True)
            for title, (a, done) in project_layers(chosen, adapter, self.config).items():
                weight = chosen[title].lora_A[adapter].weight
                raw = weight.detach().clone()
                if self.config.alpha:
                    weight.copy_(a)
                trained.append(Trained(weight, raw, weight.detach().clone()))
                if done.energy:
                    touched.append(_touched(title, chosen[title], adapter, done))
        self._trained = trained  # not before all of it is done: an edit that fails leaves that of the edit before
        log_apply(f"{self.name} + SPHERE", None, touched)


@contextmanager
def _as_it_was(model: nn.Module, adapter: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """If the block raises, ``adapter`` is in ``model`` as it was, and a LoRA that has been added has B = 0.

    Restored by name: a method can put new parameters in the place of the old ones.
    """
    before = Snapshot.take(adapter)
    try:
        yield
    except BaseException:
        now = _adapter_weights(model)
        before.restore(now)
        for name, weight in now.items():
            if name not in adapter and ".lora_B." in name:
                weight.zero_()
        raise


def _adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    inside = tuple(f"{name}.lora_" for name in lora_layers(model))
    return {name: weight for name, weight in model.named_parameters() if name.startswith(inside)}


def _touched(title: str, layer: Any, adapter: str, done: LayerProjection) -> Touched:
    """The account of one layer; W + s·B·A is formed only where somebody reads it."""
    before = after = None
    if _LOG.isEnabledFor(logging.INFO):
        before = base_weight(layer)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        after = before.float() + layer.scaling[adapter] * (b.float() @ a.float())
    return Touched(title, done.rank, done.removed_share, before, after, math.sqrt(done.energy))
