"""Load a model and its tokenizer by name: the embedded one, a Hugging Face name, or a local folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sphere_plugin.errors import ModelError
from sphere_plugin.folders import check_sums
from sphere_plugin.models.embedded import EMBEDDED_NAME, check_tokenizer, embedded_model
from sphere_plugin.models.quantised import REMEDY, quantised_by
from sphere_plugin.paths import is_folder, user_path
from sphere_plugin.process import ONE_AT_A_TIME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REMEDY = f"Give a local folder that holds a model and its tokenizer, or the embedded model's name, {EMBEDDED_NAME!r}."


def resolve_model(name: str) -> str:
    """Return the folder of the embedded model for its name; any other name or folder comes back unchanged.

    Raises:
        ModelError: the embedded model is asked for and cannot be made.
        CacheError: the folder for it cannot be written.
    """
    return str(embedded_model()) if name == EMBEDDED_NAME else name


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer, which has a pad token afterwards.

    Args:
        name: "smollm2-135m" for the embedded model, a Hugging Face name, or a local folder.
        dtype: of the weights.
        device: where the weights go.
        device_map: "auto" spreads the model over all devices instead, by accelerate.

    Raises:
        ModelError: there is no such folder, the hub cannot be reached or does not know the name, or what lies there
            is not a causal language model with its tokenizer.
        CacheError: the folder for the embedded model cannot be written, or a file of an exported model has changed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _place(resolve_model(name))
    check_sums(Path(place))
    try:
        with ONE_AT_A_TIME:  # torch's default dtype and nn.init are others while transformers loads
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, device_map=device_map, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever somebody's files make transformers raise
        expected = f"a causal language model that loads ({_first_line(error)})"
        raise ModelError("model", name, expected, _way_out(place)) from error
    if name == EMBEDDED_NAME:
        check_tokenizer(tokenizer)  # made by one version of transformers, perhaps read by another
    _set_pad_token(model, tokenizer, name)
    return (model if device_map else model.to(device)).eval(), tokenizer


def _way_out(place: str) -> str:
    """What to do about a model that does not load; a quantised one wants a library that would not help editing."""
    from transformers import AutoConfig

    with suppress(OSError, ValueError, KeyError, ImportError, RuntimeError):
        if quantised_by(AutoConfig.from_pretrained(place, trust_remote_code=False)) is not None:
            return REMEDY
    return _REMEDY


def _place(name: str) -> str:
    """Return the folder or hub name; what is written like a folder has to be one."""
    folder = user_path(name)
    if name and is_folder(folder):
        return str(folder)
    if not name or folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2:
        raise ModelError("model", name, "an existing folder", _REMEDY)
    return name


def _set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            remedy = "Set `pad_token` in the folder's tokenizer_config.json."
            raise ModelError(f"tokenizer of {name}", None, "a pad token, or an end-of-text token in its stead", remedy)
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _first_line(error: Exception) -> str:
    if type(error).__name__ == "UnpicklingError":  # torch's own words are how to run it nevertheless
        return "its weights are pickled objects, which can be code; safetensors are not"
    return (str(error) or type(error).__name__).strip().splitlines()[0]
