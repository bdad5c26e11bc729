"""The settings of SPHERE's own editor. docs/hparams.md gives every field's trade-off and the paper's values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from sphere_plugin.errors import ConfigError
from sphere_plugin.parsing import is_whole
from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, Restraint, SphereConfig
from sphere_plugin.restraints.controls import Control, ControlConfig
from sphere_plugin.restraints.sphere import Basis

BaseMethod = Literal["AlphaEdit", "MEMIT"]
FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
Projection = Literal["in_loop", "post"]
AimingDtype = Literal["float32", "bfloat16"]

# Paper D.4.1: AlphaEdit already keeps its updates off the keys of what the model knows, and takes half the strength.
ALPHA_OF = (("AlphaEdit", 0.5), ("MEMIT", 0.8))


@dataclass(kw_only=True)
class EditingConfig:
    """How to locate, aim, solve and restrain. Names are those of EasyEdit's MEMIT and AlphaEdit hparams.

    Attributes:
        layers: decoder layers to edit, ascending; the last is the one the targets are aimed at.
        rewrite_module_tmp: the linear layer that is rewritten, with {} for the layer number.
        layer_module_tmp: the decoder layer, with {} for the layer number.
        ln_f_module: the final norm.
        lm_head_module: the output embedding.
        v_loss_layer: decoder layer whose output the loss reads; None is the last.
        base_method: whose closed form solves for the update.
        fact_token: which token of the prompt looks the fact up.
        v_num_grad_steps: forward passes of the search for a target value; one fewer optimizer steps are taken.
        v_lr: Adam's learning rate in that search.
        v_weight_decay: weight of ‖δ‖ / ‖h‖² in its loss.
        clamp_norm_factor: ‖δ‖ may not exceed this times ‖h‖.
        kl_factor: weight of the KL divergence that keeps "{subject} is a" as it was.
        context_template_length_params: pairs (tokens, number) of random prefixes the fact is also aimed and keyed
            behind, beside the bare prompt.
        mom2_dataset: where the text for key statistics comes from: "generated" (the model writes it), a text file
            (.txt, .json, .jsonl), or a name the datasets library knows; or statistics that EasyEdit has counted
            (.npz), with {} for the layer number.
        mom2_n_samples: how many texts of that source.
        mom2_update_weight: λ of MEMIT, the weight of what the model already knows.
        nullspace_threshold: AlphaEdit's null space holds the eigenvectors of the keys' second moment below this.
        L2: AlphaEdit's ridge.
        eta: η of SPHERE, see SphereConfig.
        alpha: α of SPHERE; None takes the paper's value for base_method. 0 is the base method without SPHERE.
        basis: see SphereConfig.
        row_normalize: see SphereConfig.
        rect: RECT before SPHERE, see RectConfig; None is without.
        prune: PRUNE before SPHERE and after RECT, see PruneConfig; None is without.
        control: "shrunk" or "random" puts a control of experiments in SPHERE's place, see
            :mod:`sphere_plugin.restraints.controls`.
        projection: "in_loop" restrains each layer's update before the next layer is solved, as the authors do on
            AlphaEdit; "post" solves all layers first and restrains then, as the authors do on MEMIT, and EasyEdit's
            own SPHERE on AlphaEdit.
        token_budget: tokens in one pass through the network; bounds memory, and is halved where memory runs out.
        aiming_dtype: "bfloat16" runs the network in it while targets are searched for, with loss and optimizer in
            float32; for GPUs.
        master_copy: keep a float32 copy of every edited weight of 16 bits, in which updates add up; the weight in the
            model is its rounding. 4 bytes per entry, and as much again while a batch is written.
        stats_device: where key statistics are added up and solved with, "cpu" or "cuda:1"; None is the device of each
            weight. Updates are still made and written on the weight's.
        seed: of the random prefixes and of generated text.
        stats_dir: folder for key statistics; None is the user's cache.

    Raises:
        ConfigError: a value out of its range, before anything is loaded.
    """

    layers: list[int]
    rewrite_module_tmp: str
    layer_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    v_loss_layer: int | None = None
    base_method: BaseMethod = "AlphaEdit"
    fact_token: FactToken = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    context_template_length_params: list[list[int]] = field(default_factory=lambda: [[10, 5]])
    mom2_dataset: str = "generated"
    mom2_n_samples: int = 1000
    mom2_update_weight: float = 15000.0
    nullspace_threshold: float = 2e-2
    L2: float = 10.0
    eta: float = 0.5
    alpha: float | None = None
    basis: Basis = "current"
    row_normalize: bool = True
    rect: RectConfig | None = None
    prune: PruneConfig | None = None
    control: Control | None = None
    projection: Projection = "in_loop"
    token_budget: int = 8192
    aiming_dtype: AimingDtype = "float32"
    master_copy: bool = False
    stats_device: str | None = None
    seed: int = 0
    stats_dir: str | None = None

    def __post_init__(self) -> None:
        _check_choice("base_method", self.base_method, get_args(BaseMethod))
        _check_choice("fact_token", self.fact_token, get_args(FactToken))
        _check_choice("projection", self.projection, get_args(Projection))
        _check_choice("aiming_dtype", self.aiming_dtype, get_args(AimingDtype))
        _check_layers(self.layers)
        _check_templates(self.rewrite_module_tmp, self.layer_module_tmp)
        _check_contexts(self.context_template_length_params)
        for name in ("ln_f_module", "lm_head_module", "mom2_dataset"):
            check_text(name, getattr(self, name))
        if self.stats_dir is not None:
            check_text("stats_dir", self.stats_dir)
        check_flag("row_normalize", self.row_normalize)
        check_flag("master_copy", self.master_copy)
        _check_device(self.stats_device)
        _check_restraint("rect", self.rect, RectConfig)
        _check_restraint("prune", self.prune, PruneConfig)
        for name, least in (("v_num_grad_steps", 1), ("mom2_n_samples", 1), ("token_budget", 64), ("seed", 0)):
            check_number(name, getattr(self, name), least, whole=True)
        if self.v_loss_layer is not None:
            check_number("v_loss_layer", self.v_loss_layer, 0, whole=True)
        for name in ("v_lr", "clamp_norm_factor", "mom2_update_weight", "nullspace_threshold", "L2"):
            check_number(name, getattr(self, name), 0.0, above=True)
        for name in ("v_weight_decay", "kl_factor"):
            check_number(name, getattr(self, name), 0.0)
        if self.control is not None:
            _check_choice("control", self.control, get_args(Control))
        if self.alpha is None:
            self.alpha = dict(ALPHA_OF)[self.base_method]
        self.sphere()

    def sphere(self) -> SphereConfig:
        """The projection these settings ask for."""
        alpha = dict(ALPHA_OF)[self.base_method] if self.alpha is None else self.alpha
        return SphereConfig(eta=self.eta, alpha=alpha, basis=self.basis, row_normalize=self.row_normalize)

    def restraint(self) -> Restraint:
        """All restraints these settings ask for: RECT, PRUNE and SPHERE, in this order (see `Chain` for why).

        The projection alone where neither RECT nor PRUNE is asked for; a chain without it where alpha is 0.
        """
        asked: list[Restraint] = [one for one in (self.rect, self.prune) if one is not None]
        sphere = self.sphere()
        last: Restraint = sphere if self.control is None or not sphere.alpha else ControlConfig(self.control, sphere)
        if not asked:
            return last
        return Chain((*asked, last) if sphere.alpha else asked)

    def method(self) -> str:
        """The base method with its restraints, as they are applied: "MEMIT + RECT + SPHERE"."""
        last = "SPHERE" if self.control is None else f"control ({self.control})"
        asked = {"RECT": self.rect, "PRUNE": self.prune, last: self.sphere().alpha}
        return " + ".join([self.base_method, *(name for name, one in asked.items() if one)])


def _check_device(device: object) -> None:
    good = device is None or device == "cpu"
    if isinstance(device, str) and device.startswith("cuda"):
        with suppress(RuntimeError):
            good = torch.device(device).type == "cuda"
    if not good:
        remedy = "Leave it out for the device of the weights; sums need float64, which not every device has."
        raise ConfigError("stats_device", device, "cpu or a CUDA device, as cuda:1", remedy)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(name, value, "one of " + ", ".join(choices), "Check the spelling, capitals included.")


def _check_restraint(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(
            name, value, f"a {kind.__name__}, or None", f"Write {name}={kind.__name__}(), with the parentheses."
        )


def check_number(name: str, value: Any, least: float, *, whole: bool = False, above: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a finite number of at least, or above, ``least``.

    A whole one has to fit into 64 bits, as seeds and sizes must.
    """
    most = 2**63 - 1 if whole else sys.float_info.max  # which Python compares without rounding
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and value <= most
    if not good or value < least or (above and value == least):
        kind = "a whole number" if whole else "a number"
        bound = "above" if above else "of at least"
        raise ConfigError(name, value, f"{kind} {bound} {least}", "See docs/hparams.md for usual values.")


def check_text(name: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(name, value, "a text that is not empty", "See docs/hparams.md for what it names.")
    if "\0" in value or not is_whole(value):
        raise ConfigError(name, value, "whole characters, and none of number 0", "Type it anew.")


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(name, value, "true or false", "Write it without quotes.")


def _check_layers(layers: object) -> None:
    good = (
        isinstance(layers, list)
        and len(layers) > 0
        and all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
        and layers == sorted(set(layers))
    )
    if not good:
        raise ConfigError(
            "layers", layers, "ascending layer numbers without repeats", "Write layers: [4, 5, 6, 7, 8]."
        )


def _check_templates(rewrite: str, layer: str) -> None:
    for name, template in (("rewrite_module_tmp", rewrite), ("layer_module_tmp", layer)):
        if (
            not isinstance(template, str)
            or [one for one in template if one in "{}"] != ["{", "}"]
            or "{}" not in template
        ):
            raise ConfigError(
                name, template, "a module path with one {} for the layer number", 'For LLaMA: "model.layers.{}".'
            )
    if not rewrite.startswith(layer + "."):
        raise ConfigError(
            "rewrite_module_tmp", rewrite, f"a module inside {layer}", f'For LLaMA: "{layer}.mlp.down_proj".'
        )


def _check_contexts(params: object) -> None:
    good = isinstance(params, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair)
        for pair in params
    )
    if not good:
        raise ConfigError(
            "context_template_length_params",
            params,
            "a list of pairs [tokens, number]",
            "Write [[10, 5]] for five prefixes of ten tokens, [] for the bare prompt only.",
        )
