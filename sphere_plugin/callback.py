"""SPHERE for plain fine-tuning: a callback of the transformers `Trainer`, for full weights and for LoRA.

Full weights, W the weight before a step (when="step") or before training (when="end"), ΔW its change since:

    W ← W + ΔW P⊥,   P⊥ = I − α U Uᵀ

LoRA, where the change s·(B_k A_k − B_0 A_0) is bilinear. Projecting A itself after every step would not be one
projection but k of them, P⊥ᵏ, with (1 − α)ᵏ in place of 1 − α for what was learned first. Projecting the change of A
alone would leave A's random start, through which a growing B writes along U. Hence, with U of the frozen base weight:

    start   A_0 ← A_0 P⊥                   changes nothing while B = 0
    step    A_k ← A_{k-1} + (ΔA) P⊥        ΔA the optimizer's step, so A_k = (A_0 + ΣΔA) P⊥ whatever α is

which makes the adapter at every step s·B_k·(A_0 + ΣΔA) P⊥: what was learned, projected once. At the end of training
there is nothing to remember, and when="end" is `project_adapter` in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry import is_transposed, neurons
from sphere_plugin.geometry.checks import all_finite
from sphere_plugin.peft import check_adapter, check_layer, lora_layers, project_layers
from sphere_plugin.projection import LayerProjection, ProjectionReport, reported
from sphere_plugin.restraints import BoundRestraint, SphereConfig

When = Literal["step", "end"]
Weights = str | Sequence[str] | Callable[[str], bool]


class SphereCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Projects what a `Trainer` writes away from the principal directions of the weights.

        Trainer(model, args, train_dataset=facts, callbacks=[SphereCallback(weights=["mlp.down_proj"])]).train()

    Weights of 16 bits are projected in float32 and rounded once; a step much smaller than their rounding (2^-9 of W in
    bfloat16) cannot be told from it, so train float32 weights, with autocast if need be. The optimizer's moments stay
    as they are. With alpha 0 training is bit for bit what it is without the callback.

    Memory: a copy of each chosen full weight in its own dtype, two with when="step" and basis="pretrained"; a copy of
    A for LoRA. Time: one eigen-decomposition of the smaller side per weight; with when="step", basis="current" and
    full weights one per weight and step, for U then follows the weights.

    Args:
        config: η, α, basis and row_normalize. For full weights "current" takes U from the weight as it was before the
            change, "pretrained" from the weight before training; under LoRA both are the frozen base weight.
        weights: which trained linear layers: names as in ``named_modules()`` or their ends, with "*" and "?" as in
            file names ("mlp.down_proj", "layers.1?.mlp.*"), or a function of the name. Under LoRA the default is every
            layer of the trained adapter; full weights have to be named.
        when: "end" projects the whole change once when training ends, so checkpoints of before are raw; "step" after
            every optimizer step, so that training sees, and checkpoints hold, projected weights.

    Attributes:
        report: after training, rank and removed share per layer; under LoRA with when="step" the share is A's.

    Raises:
        ConfigError: ``when`` or ``weights`` is none of these. When training begins, before anything is changed:
            nothing matches; it resumes from a checkpoint and the start would be needed; `project_adapter` would
            refuse the adapter.
        ModelError: a layer that cannot be projected; after a step or at the end a weight that is no longer finite,
            and nothing is projected then.
    """

    def __init__(self, config: SphereConfig | None = None, weights: Weights | None = None, when: When = "end") -> None:
        if when not in get_args(When):
            raise ConfigError("when", when, " or ".join(get_args(When)), "Leave it out to project once, at the end.")
        if not (weights is None or callable(weights)):
            weights = (weights,) if isinstance(weights, str) else tuple(weights)
            if not weights or not all(isinstance(name, str) for name in weights):
                raise ConfigError("weights", weights, "names of layers", 'Write weights=["mlp.down_proj"].')
        self.config = config or SphereConfig()
        self.weights = weights
        self.when = when
        self.report: ProjectionReport | None = None
        self._adapter: str | None = None
        self._lora: dict[str, Any] = {}
        self._guards: dict[str, _Guard] = {}
        self._raw: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # A as it was projected

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Choose and check the layers, and remember what they are."""
        resumed = state.global_step > 0
        lora, full = _choose(model, self.weights)
        self._adapter = _trained_adapter(model, lora) if lora else None
        if not resumed:
            self._go_on_from_raw(lora)
        self.report, self._lora, self._guards, self._raw, self._held = None, lora, {}, {}, {}
        if full and resumed and (self.when == "end" or self.config.basis == "pretrained"):
            expected = 'a start at step 0: when="end" and basis="pretrained" need the weights from before training'
            remedy = 'Train anew, or use when="step" with basis="current".'
            raise ConfigError("resume_from_checkpoint", f"step {state.global_step}", expected, remedy)
        if self.config.alpha == 0.0:
            return
        self._guards = {name: _weight_guard(layer, self.config, self.when) for name, layer in full.items()}
        if self.when == "step" and self._adapter is not None:
            guards = {name: _adapter_guard(layer, self._adapter, self.config) for name, layer in lora.items()}
            if not resumed:
                _check_fresh(lora, self._adapter)
                for projected, guard in [(g.restrain(g.previous, g.previous).delta, g) for g in guards.values()]:
                    guard.matrix.copy_(projected)
                    guard.previous.copy_(projected)
            self._guards |= guards

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project the step, with when="step"."""
        if self.when == "step":
            self._project()

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project the whole change, with when="end"; make the report, and let go of the copies."""
        if self.config.alpha == 0.0:
            self.report = ProjectionReport(self._adapter, {})
            return
        layers = {}
        if self._adapter is not None:
            for name, layer in self._lora.items():
                check_layer(name, layer, self._adapter)
        if self.when == "end":
            self._project()
            if self._adapter is not None:
                projected = project_layers(self._lora, self._adapter, self.config)
                layers = {name: layer for name, (_, layer) in projected.items()}
                for name, (a, _) in projected.items():
                    weight = self._lora[name].lora_A[self._adapter].weight
                    self._raw[name] = weight.detach().clone()
                    weight.copy_(a)
                    self._held[name] = weight.detach().clone()
        layers |= {name: guard.summary() for name, guard in self._guards.items()}
        self.report = reported(self._adapter, layers)
        self._guards = {}

    @torch.no_grad()
    def undo(self) -> None:
        """Write the A matrices that training ended with back, bit for bit, after when="end" under LoRA.

        Raises:
            ConfigError: there are none: full weights, when="step", no training yet, or undone before.
        """
        if not self._raw:
            remedy = 'Raw A matrices are kept for LoRA with when="end"; of full weights keep a copy of your own.'
            raise ConfigError("undo", "nothing kept", "a finished training of a LoRA", remedy)
        for name, raw in self._raw.items():
            self._lora[name].lora_A[self._adapter].weight.copy_(raw)
        self._raw = {}

    def _go_on_from_raw(self, lora: Mapping[str, Any]) -> None:
        """Where the last training's projected A matrices are trained again, put back the raw ones it ended with.

        They are projected whole at the end: projecting what is left of them again would hold them back twice.
        """
        for name, held in self._held.items():
            if name not in lora or name not in self._raw or lora[name] is not self._lora.get(name):
                continue
            live = lora[name].lora_A[self._adapter].weight
            if torch.equal(live, held):
                live.copy_(self._raw[name])

    def _project(self) -> None:
        """Project what all guarded matrices have changed by; none of them if one holds NaN or infinity."""
        for name, guard in self._guards.items():
            if not all_finite(guard.matrix):  # which the projection would spread over its row
                remedy = "Load a checkpoint from before training diverged, and lower the learning rate."
                raise ModelError(f"the trained weight of {name}", "NaN or infinite entries", "finite entries", remedy)
        for guard in self._guards.values():
            guard.project()


@dataclass
class _Guard:
    """One trained matrix, and what it was when it was last projected.

    Attributes:
        owner: the module whose ``weight`` it is.
        transposed: whether that is stored as [d_in, d_out].
        restrain: the projection, bound to W.
        previous: [d_out, d_in], or [r, d_in] for the A of a LoRA.
        rank: of the last projection.
        energy: sum of ‖ΔW‖² over projections.
        removed: sum of what was taken away of it.
        asked: sum of the squared norms of what was to be written.
        lost: sum of the squared norms of what rounding took of it.
    """

    owner: nn.Module
    transposed: bool
    restrain: BoundRestraint
    previous: Tensor
    rank: int = 0
    energy: float = 0.0
    removed: float = 0.0
    asked: float = 0.0
    lost: float = 0.0

    @property
    def matrix(self) -> Tensor:
        """The live weight, in mathematical orientation."""
        weight: Any = self.owner.weight
        return neurons(weight.detach(), self.transposed)

    def project(self) -> None:
        """Project the change since the last call, and write it."""
        live, wide = self.matrix, torch.promote_types(self.previous.dtype, torch.float32)
        delta = live.to(wide) - self.previous.to(wide)
        if not bool(delta.any()):
            return  # a frozen layer, or a step that loss scaling has skipped
        kept = self.restrain(self.previous, delta)
        live.copy_(self.previous.to(wide) + kept.delta)
        missed = live.to(wide) - self.previous.to(wide) - kept.delta
        self.previous.copy_(live)
        self.asked += float(kept.delta.double().square().sum())
        self.lost += float(missed.double().square().sum())
        energy = float(delta.double().square().sum())
        self.rank, self.energy, self.removed = (
            kept.rank,
            self.energy + energy,
            self.removed + energy * kept.removed_share,
        )

    def summary(self) -> LayerProjection:
        share = self.removed / self.energy if self.energy else 0.0
        lost = math.sqrt(self.lost / self.asked) if self.asked else 0.0
        return LayerProjection(self.rank, share, self.energy, lost)


def _weight_guard(layer: nn.Module, config: SphereConfig, when: When) -> _Guard:
    weight: Any = layer.weight
    transposed = is_transposed(layer)
    start = neurons(weight.detach(), transposed).clone()
    moving = when == "step" and config.basis == "pretrained"  # then U is of `start`, which is not the last step's
    return _Guard(layer, transposed, config.bind(start), start.clone() if moving else start)


def _adapter_guard(layer: Any, adapter: str, config: SphereConfig) -> _Guard:
    base, owner = layer.get_base_layer(), layer.lora_A[adapter]
    fixed = replace(config, basis="pretrained").bind(neurons(base.weight.detach(), is_transposed(base)))
    return _Guard(owner, False, fixed, owner.weight.detach().clone())


def _choose(model: nn.Module, wanted: Weights | None) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Return the trained LoRA layers and the trained linear layers that are wanted, by name.

    Raises:
        ConfigError: there are none, or one of several names matches none.
    """
    lora = lora_layers(model)
    inside = tuple(f"{name}." for name in lora)
    linear = {n: m for n, m in model.named_modules() if not n.startswith(inside) and _is_linear(m)}
    trained = {n: m for n, m in {**lora, **linear}.items() if any(p.requires_grad for p in m.parameters())}
    if wanted is None:
        chosen = {name for name in lora if name in trained}
    elif callable(wanted):
        chosen = {name for name in trained if wanted(name)}
    else:
        chosen = {name for name in trained if any(_matches(pattern, name) for pattern in wanted)}
    missing = [w for w in wanted or () if not any(_matches(w, n) for n in chosen)] if not callable(wanted) else []
    if missing or not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in trained})) or "none; are all weights frozen?"
        remedy = "Name the linear layers to project, as in named_modules() or by the end of their names."
        got = missing[0] if missing else wanted
        raise ConfigError("weights", got, f"the name of a linear layer that is trained ({known})", remedy)
    unique = {id(module.weight): name for name, module in reversed(linear.items()) if name in chosen}
    return {n: lora[n] for n in lora if n in chosen}, {n: linear[n] for n in linear if n in unique.values()}


def _is_linear(module: nn.Module) -> bool:
    try:
        is_transposed(module)
    except ModelError:
        return False
    return True


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _trained_adapter(model: Any, lora: dict[str, Any]) -> str:
    """Return the one adapter that is trained in all these layers, checked."""
    names: set[str] = {name for layer in lora.values() for name in layer.active_adapters if name in layer.r}
    if len(names) != 1:
        raise ConfigError("active adapters", sorted(names), "one", "Train one adapter at a time: set_adapter(name).")
    (adapter,) = names
    check_adapter(model.peft_config, adapter)
    for name, layer in lora.items():
        check_layer(name, layer, adapter)
    return adapter


def _check_fresh(lora: dict[str, Any], adapter: str) -> None:
    for name, layer in lora.items():
        if bool(layer.lora_B[adapter].weight.any()):
            expected = (
                'zeros: when="step" projects all that A learns, and an adapter that holds an update has unprojected A'
            )
            remedy = 'Start from a fresh adapter, or use when="end".'
            raise ConfigError(f"B of {name}", "non-zero entries", expected, remedy)
