"""Look into a model without loading it: its modules without their weights, and single weights from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.models.loading import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def structure(name: str) -> PreTrainedModel:
    """Return a causal language model whose weights have a shape and no values.

    Args:
        name: "smollm2-135m" for the embedded model, a Hugging Face name, or a local folder.

    Raises:
        ModelError: there is no such model within reach, or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        remedy = (
            "Give a local folder, or download the model first: its config could not be read. "
            "Without a network, HF_HUB_OFFLINE=1 says so at once."
        )
        raise ModelError("model_name", name, f"a causal language model ({why})", remedy) from error
    return model


def stored_weight(name: str, parameter: str) -> Tensor | None:
    """Return one weight from the model's safetensors files on this machine, as it is stored there.

    Args:
        name: as for `structure`.
        parameter: its name in the model; old checkpoints leave out the first part of it.

    Returns:
        The weight, or None if the files are not on this machine, or are of another format.
    """
    folder = resolve_model(name)
    index = _file(folder, _INDEX)
    if index is not None:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        key = _key(parameter, shards)
        file = None if key is None else _file(folder, shards[key])
    else:
        file = _file(folder, _ONE)
    if file is None:
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            key = _key(parameter, tensors.keys())
            return None if key is None else tensors.get_tensor(key)
    except (SafetensorError, OSError):
        return None


def _file(folder: str, name: str) -> Path | None:
    """A file of the model, in its folder or in the cache of downloads; nothing is downloaded."""
    from transformers.utils import cached_file

    found = cached_file(
        folder, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return None if found is None else Path(found)


def _key(parameter: str, keys: object) -> str | None:
    known = set(keys)  # type: ignore[call-overload]
    parts = parameter.split(".")
    return next((name for name in (".".join(parts[start:]) for start in (0, 1)) if name in known), None)
