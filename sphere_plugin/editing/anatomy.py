"""Where things are in a model: read from the live modules, never from the model's name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry.checks import all_finite
from sphere_plugin.geometry.neurons import is_transposed, neurons, stored
from sphere_plugin.models.placement import input_device, settle
from sphere_plugin.models.quantised import check_plain


@dataclass(frozen=True)
class Rewrite:
    """A linear layer whose weight is edited.

    Attributes:
        name: full parameter name, as ``model.named_parameters()`` has it.
        module: the layer, an nn.Linear or a Conv1D.
        transposed: True where the weight is stored as [d_in, d_out] (Conv1D).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The live weight as it is stored."""
        weight = self.module.weight
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                self.name, type(weight).__name__, "a plain parameter", "Edit a model that is not wrapped."
            )
        return weight

    @property
    def weight(self) -> Tensor:
        """The live weight as a view [d_out, d_in], rows = neurons."""
        return neurons(self.parameter.detach(), self.transposed)

    def write(self, weight: Tensor) -> None:
        """Replace the weight by ``weight`` [d_out, d_in], rounded once to the stored dtype."""
        with torch.no_grad():
            self.parameter.copy_(stored(weight, self.transposed))


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only language model that editing needs.

    Attributes:
        model: the causal language model.
        decoder: its layers, all of them, in order.
        rewrites: layer number -> the linear layer that is rewritten there.
        norm: the final norm.
        head: the output embedding.
        loss_layer: number of the decoder layer whose output the loss reads.
    """

    model: nn.Module
    decoder: list[nn.Module]
    rewrites: dict[int, Rewrite]
    norm: nn.Module
    head: nn.Module
    loss_layer: int

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return next(self.decoder[0].parameters()).dtype

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Full parameter name -> the live parameter, for every weight that is edited."""
        return {rewrite.name: rewrite.parameter for rewrite in self.rewrites.values()}

    @classmethod
    def of(cls, model: nn.Module, config: EditingConfig) -> Anatomy:
        """Find the parts that ``config`` names in ``model``; offloaded weights among the rewrites are brought home.

        Raises:
            ConfigError: a template matches nothing, or a layer number does not exist; names the nearest module.
            ModelError: a weight is quantised, float64, not two-dimensional, without values, or holds NaN or infinity.
        """
        decoder = _layers(model, config.layer_module_tmp)
        for layer in config.layers:
            if layer >= len(decoder):
                raise ConfigError(
                    "layers", layer, f"numbers below {len(decoder)}", f"The model has layers 0 to {len(decoder) - 1}."
                )
        loss_layer = len(decoder) - 1 if config.v_loss_layer is None else config.v_loss_layer
        if not config.layers[-1] <= loss_layer < len(decoder):
            raise ConfigError(
                "v_loss_layer",
                config.v_loss_layer,
                f"a layer from {config.layers[-1]} to {len(decoder) - 1}",
                "Leave it out for the last layer.",
            )
        anatomy = cls(
            model=model,
            decoder=decoder,
            rewrites={n: _rewrite(model, config.rewrite_module_tmp.format(n)) for n in config.layers},
            norm=_module(model, "ln_f_module", config.ln_f_module),
            head=_module(model, "lm_head_module", config.lm_head_module),
            loss_layer=loss_layer,
        )
        settle(model, [rewrite.name for rewrite in anatomy.rewrites.values()])
        anatomy.check_finite()
        return anatomy

    def check_finite(self) -> None:
        """Raise ModelError if a weight to be edited holds NaN or infinity."""
        for name, weight in self.weights.items():
            if not all_finite(weight):
                bad = int((~torch.isfinite(weight)).sum())
                raise ModelError(
                    name, f"{bad} entries that are NaN or infinite", "finite numbers", "Reload the unedited model."
                )


def _module(model: nn.Module, field: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.0)
        hint = f"The nearest module of this model is {near[0]!r}." if near else "The model has no modules."
        raise ConfigError(field, path, "the path of a module of the model", hint) from None


def _layers(model: nn.Module, template: str) -> list[nn.Module]:
    layers = [_module(model, "layer_module_tmp", template.format(0))]
    while True:
        try:
            layers.append(model.get_submodule(template.format(len(layers))))
        except AttributeError:
            return layers


def _rewrite(model: nn.Module, path: str) -> Rewrite:
    module = _module(model, "rewrite_module_tmp", path)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim != 2:
        got = f"{type(module).__name__} with a weight of {weight.ndim} dimensions"
        remedy = "Name the linear layer whose rows are to be rewritten."
        raise ModelError(f"{path}.weight", got, "a two-dimensional floating-point weight", remedy)
    check_plain(f"{path}.weight", weight)
    if module.weight.dtype == torch.float64:
        remedy = "Call model.float(): updates are computed and added in float32, which would round all of the weight."
        raise ModelError(f"{path}.weight", module.weight.dtype, "floating point numbers of 32 or 16 bits", remedy)
    return Rewrite(f"{path}.weight", module, is_transposed(module))
