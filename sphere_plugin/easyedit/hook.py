"""The post-hook: run a method of EasyEdit as it is, then write its update again, restrained.

    before = copies of the weights the method may write        after = what it wrote
    W ← before + restrain(before, after − before)

What a method returns as its old weights is not relied on: some return none, some those of another moment. The copies
made here are returned instead, so that every edit can be undone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.easyedit.adapters import AdapterSession
from sphere_plugin.easyedit.keys import Asked, asked_of, hparams_class, refusal, writers
from sphere_plugin.easyedit.methods import METHODS, Method
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.easyedit.targets import check_matrices, unrestrained_writes, weights_of
from sphere_plugin.easyedit.turns import Turns
from sphere_plugin.editing.account import Touched, log_apply
from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.neurons import is_transposed, neurons
from sphere_plugin.journaling import Snapshot, all_or_nothing
from sphere_plugin.process import ONE_AT_A_TIME
from sphere_plugin.restraints import BoundRestraint
from sphere_plugin.restraints.protocol import memories, recall_all

Apply = Callable[..., Any]


class Hooked:
    """The entry of one method in EasyEdit's table while the plugin is registered.

    Called from outside an editor it looks at the hyper-parameters of this one call. An editor asks for a session,
    which remembers what restraints need from one edit to the next; without restraints that is the method itself.
    """

    def __init__(self, name: str, method: Apply) -> None:
        self.name = name
        self.method = method
        functools.update_wrapper(self, method, updated=())  # its attributes are its own

    def session(self, hparams: object, repairs: bool = False, apart: bool = True) -> Apply:
        """Return what an editor with these hyper-parameters calls to edit.

        Args:
            hparams: with or without the keys of :mod:`sphere_plugin.easyedit.keys`.
            repairs: whether to return old weights where they are asked for and the method forgets them.
            apart: see `Turns`.

        Raises:
            ConfigError: a value that means nothing, or a method with nothing to restrain.
        """
        asked = asked_of(hparams)
        if asked is None:
            return self.method
        refused = refusal(self.name, asked)
        if refused is not None:
            raise refused
        what = METHODS[self.name]
        if what.writes == "base":
            return self._through_base(hparams, writers(hparams), apart)
        if asked.sphere is not None and what.writes == "adapter":
            return AdapterSession(self.name, self.method, asked.sphere, Turns(apart))
        return WeightSession(self.name, what, self.method, asked, repairs, turns=Turns(apart))

    def _through_base(self, hparams: Any, base: Any, apart: bool) -> Apply:
        """SimIE with a restrained base method: what was written after it, SimIE would replace at the next edit.

        SimIE looks its base method up in EasyEdit's table at every call, so the session stands there meanwhile, and
        whoever else reads that table waits.
        """
        table = sys.modules[f"{PACKAGE}.util.alg_dict"].ALG_DICT
        session = table[hparams.base_method].session(base, repairs=True, apart=apart)

        def call(*args: Any, **kwargs: Any) -> Any:
            weights = weights_of(_argument(nn.Module, args, kwargs), base, METHODS[hparams.base_method])
            with ONE_AT_A_TIME, all_or_nothing(weights):  # SimIE puts the first weights back before it calls its base
                patches = Patches()
                patches.item(table, hparams.base_method, session)
                try:
                    return self.method(*args, **kwargs)
                finally:
                    patches.undo()

        return call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Edit once, as the hyper-parameters among the arguments ask."""
        with ONE_AT_A_TIME:
            return self.session(_argument(hparams_class(), args, kwargs), apart=False)(*args, **kwargs)


def _own_executor(method: Apply) -> Apply:
    """MEND keeps the first model it sees, and its network, in one object that all editors share: make another."""
    owner = getattr(method, "__self__", None)
    return method if owner is None else getattr(type(owner)(), method.__name__)


def _argument(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument of this type: methods differ in the names and the order of theirs."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, kind)), None)


@dataclass
class WeightSession:
    """Restrains a method that writes weights.

    Attributes:
        name: of the method.
        what: what it writes.
        method: EasyEdit's function.
        asked: the restraints.
        repairs: see `Hooked.session`.
        touched: what the last call did, without the weights.
        turns: in which the method is called.
    """

    name: str
    what: Method
    method: Apply
    asked: Asked
    repairs: bool
    touched: tuple[Touched, ...] = ()
    turns: Turns = field(default_factory=Turns, repr=False)
    _bound: dict[str, BoundRestraint] = field(default_factory=dict, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)
    _run: Apply | None = field(default=None, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Edit once; weights are as they were if anything raises.

        Returns:
            The edited model, and what EasyEdit restores: the weights by name, or a function that restores them.

        Raises:
            ModelError: a weight that is not there, is quantised, offloaded or stacked, or an update that has NaN.
        """
        model = _argument(nn.Module, args, kwargs)
        weights = weights_of(model, _argument(hparams_class(), args, kwargs), self.what)
        check_matrices(weights)
        run = self._begin(model)
        with all_or_nothing(weights) as before:
            strays = unrestrained_writes(model, weights)
            with self.turns.take():
                edited, returned = run(*args, **kwargs)
            strays.warn(self.name)
            with torch.no_grad():
                touched = [self._restrain(edited, name, old) for name, old in before.tensors.items()]
            written = [one for one in touched if one is not None]
            log_apply(f"{self.name} + {self.asked.label}", None, written)
            self.touched = tuple(replace(one, before=None, after=None) for one in written)
        if self.what.undo == "call":
            return edited, functools.partial(before.restore, weights)
        wanted = returned or (self.repairs and kwargs.get("return_orig_weights"))
        return edited, _old_weights(edited, before, returned) if wanted else {}

    def bind(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Tie the restraints to the weights as they are now, instead of as the first edit of each finds it."""
        self._begin(model)
        for name, weight in weights.items():
            if weight.dim() == 2:
                transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
                wide = torch.promote_types(weight.dtype, torch.float32)
                self._bound[name] = self.asked.restraint.bind(neurons(weight.detach(), transposed).to(wide, copy=True))

    def memory(self) -> dict[str, Tensor]:
        """What the restraints remember of earlier edits beside the weights, for :meth:`recall`."""
        return memories(self._bound)

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Give the restraints what :meth:`memory` returned in another session that is bound to the same weights."""
        recall_all(self._bound, memory)

    def _begin(self, model: nn.Module) -> Apply:
        """What edits this model; a model that is not the last one is known from now on."""
        if self._run is None or self._model is not model:
            self._bound, self._model, self._run = {}, model, _own_executor(self.method)
        return self._run

    def _restrain(self, edited: nn.Module, name: str, old: Tensor) -> Touched | None:
        """Write one weight again, restrained; None if the method left it as it was, or it is not a matrix."""
        live = edited.get_parameter(name).detach()
        old = old.to(live.device, live.dtype)  # ULTRAEDIT can cast the model before it edits it
        if torch.equal(live, old):
            return None
        owner = edited.get_submodule(name.rpartition(".")[0])
        if live.dim() != 2:
            return None  # a bias has no neurons
        transposed = is_transposed(owner)
        written, wide = neurons(live, transposed), torch.promote_types(live.dtype, torch.float32)
        weight = neurons(old, transposed).to(wide)
        delta = written.to(wide) - weight
        _check_finite(delta, name, self.name)
        if name not in self._bound:
            self._bound[name] = self.asked.restraint.bind(weight)
        restrained = self._bound[name](weight, delta)
        # What the restraint let through stays as the method wrote it, to the last bit.
        kept = torch.where(restrained.delta == delta, written, (weight + restrained.delta).to(live.dtype))
        _check_finite(kept, name, f"{self.name} + {self.asked.label}")
        written.copy_(kept)
        before, size, asked = neurons(old, transposed), float(delta.norm()), float(restrained.delta.norm())
        lost = float((written.to(wide) - weight).sub_(restrained.delta).norm()) / asked if asked else 0.0
        return Touched(name, restrained.rank, restrained.removed_share, before, written, size, lost)


def _old_weights(edited: nn.Module, before: Snapshot, returned: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our own copies of the weights that the method names as written, and of those that were."""
    return {name: old for name, old in before.tensors.items() if name in returned or _differs(edited, name, old)}


def _differs(edited: nn.Module, name: str, old: Tensor) -> bool:
    live = edited.get_parameter(name).detach()
    return not torch.equal(live, old.to(live.device, live.dtype))


def _check_finite(matrix: Tensor, name: str, method: str) -> None:
    bad = matrix.numel() - int(torch.isfinite(matrix).sum())
    if bad:
        raise ModelError(
            f"{method}'s update of {name}",
            f"NaN or infinite in {bad} of {matrix.numel()} entries",
            "finite numbers",
            "The weights are as before this edit. Lower the method's learning rate, or load the model in float32.",
        )
