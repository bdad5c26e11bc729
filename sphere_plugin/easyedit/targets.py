"""Which weights of a live model a method may write, found before it does so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sphere_plugin.easyedit.methods import Method
from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry.neurons import is_transposed
from sphere_plugin.models.quantised import check_plain

_LOG = logging.getLogger("sphere_plugin")


def weights_of(model: nn.Module, hparams: Any, what: Method) -> dict[str, nn.Parameter]:
    """Return every parameter the method may write, by name; it need not write them all.

    Args:
        model: about to be edited.
        hparams: of the method.
        what: the method's row of the table.

    Raises:
        ModelError: none of the model's weights is meant, or one of them is quantised or not in memory.
    """
    weights = find_weights(model, hparams, what)
    for name, weight in weights.items():
        _check_writable(name, weight)
    return weights


def find_weights(model: nn.Module, hparams: Any, what: Method) -> dict[str, nn.Parameter]:
    """The same of a model whose weights need not be in memory.

    Raises:
        ModelError: none of the model's weights is meant.
    """
    names = set(_feed_forward_outputs(model) if what.names == "ffn" else _named(model, hparams, what.names))
    weights = {name: weight for name, weight in model.named_parameters() if name in names}
    if not weights:
        got = getattr(hparams, str(what.names), None)
        remedy = "Write names of modules and numbers of layers that the model has; `sphere doctor YAML` checks them."
        raise ModelError(str(what.names), got, "names of modules in the model", remedy)
    return weights


def _named(model: nn.Module, hparams: Any, key: str | None) -> Iterator[str]:
    """Parameters that the hyper-parameter ``key`` names.

    Some methods take a template for the layer's module, some for its weight, and FT takes any part of a name: to look
    for the text in the name covers all of them.
    """
    given = getattr(hparams, str(key))
    if key == "inner_params":  # ULTRAEDIT strips ".weight" from the list while it runs
        wanted = {one.removesuffix(".weight") for one in given}
        yield from (name for name, _ in model.named_parameters() if name.removesuffix(".weight") in wanted)
        return
    layers = layers_of(hparams)
    parts = {filled(str(key), template, layer) for template in templates_of(str(key), given) for layer in layers}
    yield from (name for name, _ in model.named_parameters() if any(part in name for part in parts))


def templates_of(key: str, given: object) -> list[str]:
    """A name of a module, or a list of such names.

    Raises:
        ConfigError: it is neither.
    """
    templates = [given] if isinstance(given, str) else given
    if not isinstance(templates, list | tuple) or not all(isinstance(one, str) for one in templates):
        raise ConfigError(key, given, "a name of a module, or a list of them", "Check the YAML.")
    return list(templates)


def filled(key: str, template: str, layer: int) -> str:
    """A name of a module, with the layer's number in place of its {}.

    Raises:
        ConfigError: it has other braces.
    """
    try:
        return template.format(layer)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        remedy = 'Write it as in "model.layers.{}.mlp.down_proj".'
        raise ConfigError(key, template, "a name with {} for the layer's number", remedy) from error


def layers_of(hparams: Any) -> list[int]:
    """The numbers of the layers.

    Raises:
        ConfigError: they are no list of numbers.
    """
    layers = getattr(hparams, "layers", None)
    if not isinstance(layers, list | tuple) or not all(isinstance(one, int) for one in layers):
        raise ConfigError("layers", layers, "a list of layer numbers", "Write layers: [4, 5, 6, 7, 8].")
    return list(layers)


def _feed_forward_outputs(model: nn.Module) -> Iterator[str]:
    """Weights of linear layers from a wider inside to the model's width: [hidden_size, d_in > hidden_size]."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            try:
                transposed = is_transposed(module)
            except ModelError:
                continue  # no linear layer
            d_out, d_in = reversed(weight.shape) if transposed else weight.shape
            if d_out == width and d_in > d_out:
                yield f"{name}.weight"


def _check_writable(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        remedy = "Load the model so that the edited layers fit into memory: more GPUs, a smaller dtype, or the CPU."
        raise ModelError(name, "offloaded: its values are not in memory", "a weight in memory", remedy)
    check_plain(name, weight)


def check_matrices(weights: Mapping[str, Tensor]) -> None:
    """Raise ModelError if one of the weights is a stack of matrices, which has no neurons to go by."""
    for name, weight in weights.items():
        if weight.dim() > 2:
            got = f"a stack of shape {tuple(weight.shape)}"
            remedy = "Name layers with one weight matrix each, or leave sphere, rect and prune out of the YAML."
            raise ModelError(name, got, "a matrix, two dimensions, for SPHERE, RECT and PRUNE", remedy)


@dataclass(frozen=True)
class StrayWrites:
    """The parameters that should not be written, with the counts of writes that torch keeps of each."""

    counts: Mapping[str, tuple[Tensor, int]]

    def warn(self, method: str) -> None:
        """Log a warning if any of them was written since."""
        strays = [name for name, (weight, count) in self.counts.items() if weight._version != count]
        if strays:
            shown = ", ".join(strays[:3]) + (", ..." if len(strays) > 3 else "")
            _LOG.warning(
                "%s also wrote %d weights its settings do not name (%s): these are not restrained, nor undone",
                method,
                len(strays),
                shown,
            )


def unrestrained_writes(model: nn.Module, weights: Mapping[str, Tensor]) -> StrayWrites:
    """Watch all parameters of ``model`` but ``weights``."""
    others = {name: one for name, one in model.named_parameters() if name not in weights and not one.is_inference()}
    return StrayWrites({name: (one, one._version) for name, one in others.items()})
