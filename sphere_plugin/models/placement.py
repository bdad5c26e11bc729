"""Where the weights of a model are that accelerate has spread over devices, or offloaded to the CPU or to disk.

accelerate's hooks (`AlignDevicesHook`) bring what enters a module to the device it computes on, and an offloaded
weight for the time of a pass; between passes such a weight has a shape and no values. A model without hooks lies where
its weights lie.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.errors import ConfigError, ModelError

_LOG = logging.getLogger("sphere_plugin")


def usable_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ConfigError: there is none of that name here, or it holds no values.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # torch without CUDA fails an assertion
        remedy = "Leave it out for the CPU."
        raise ConfigError("--device", name, f"cpu, or a device that is here, as cuda:1 ({error})", remedy) from error
    if device.type == "meta":
        raise ConfigError("--device", name, "a device that holds values", "Leave it out for the CPU.")
    return device


def input_device(model: nn.Module) -> torch.device:
    """Where the token ids of ``model`` go."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return device_of(model if embeddings is None else embeddings)


def device_of(module: nn.Module) -> torch.device:
    """Where the first weight in ``module`` is when it computes; the CPU where it has none."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            hook = _loader_of(part) if weight.is_meta else None
            return weight.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def settle(model: nn.Module, names: Iterable[str]) -> None:
    """Bring those of the weights ``names`` that are offloaded into memory, to the device their modules compute on.

    They stay there. Where an offloaded weight has its values, on the CPU or in a file, only accelerate reads them, so
    an edit could not be written; with them here the model computes what it did, in as much more memory.

    Raises:
        ModelError: a weight has no values, and no hook that would bring them.
    """
    brought: list[nn.Parameter] = []
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if not model.get_parameter(name).is_meta:
            continue
        hook = _loader_of(module)
        if hook is None:
            remedy = "Load the model so that the layers to be edited are in memory: see `device_map` of transformers."
            raise ModelError(name, "a weight without values (on the meta device)", "a weight in memory", remedy)
        hook.pre_forward(module)
        hook.offload = False  # from here on it brings inputs alone
        for key, weight in list(module.named_parameters(recurse=False)):
            # A copy: what was brought to the CPU may still be the offloaded one, or a file's memory.
            copy = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            setattr(module, key, copy)
            brought.append(copy)
    if brought:
        size = sum(weight.numel() * weight.element_size() for weight in brought)
        where = ", ".join(sorted({str(weight.device) for weight in brought}))
        _LOG.info(
            "%d offloaded weights are to be edited and now stay on %s (%.3g MB)", len(brought), where, size / 1e6
        )


def with_values(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same names and tensors, with the values of those weights of ``model`` that are offloaded; one at a time.

    Raises:
        ModelError: a weight has no values, and no hook that knows them.
    """
    for name, tensor in named:
        if not tensor.is_meta:
            yield name, tensor
            continue
        path, _, key = name.rpartition(".")
        hook = _loader_of(model.get_submodule(path))
        if hook is None:
            remedy = "Load the model anew; accelerate's hooks know where offloaded weights are."
            raise ModelError(name, "a weight without values (on the meta device)", "a weight that can be read", remedy)
        yield name, hook.weights_map[key].to(tensor.dtype)


def _loader_of(module: nn.Module) -> Any:
    """The hook that brings the weights of ``module`` itself for a pass; None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)), None)
