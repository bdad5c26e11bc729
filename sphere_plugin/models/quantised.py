"""Weights of 8 or 4 bits: known by what they are, and refused with the way out."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from sphere_plugin.errors import ModelError

REMEDY: Final = (
    "Load the model in bfloat16, without quantization; or train a LoRA on the quantised model and project that: "
    "`sphere: true` with EasyEdit's QLoRA, or `sphere project-adapter` (docs/scale.md)."
)


def check_plain(name: str, weight: object) -> None:
    """Raise ModelError unless a weight holds floating point numbers of 16 bits or more, one for each entry.

    Libraries for quantised models pack several numbers into one, keep scales beside them, or pass their own kind of
    tensor off as bfloat16; an update could be added to none of these.

    Args:
        name: of the weight.
        weight: what a module has as its ``weight``; None where it has another name for it.
    """
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        if type(weight) in (Tensor, nn.Parameter):
            return
        got = type(weight).__name__
    else:
        got = f"{weight.dtype} in a {type(weight).__name__}" if isinstance(weight, Tensor) else "no tensor"
    raise ModelError(name, got, "floating point numbers of 16 bits or more", REMEDY)


def quantised_by(config: Any) -> str | None:
    """What a model's config says it is quantised by, "bitsandbytes, 4 bits"; None if it is not."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    given = told if isinstance(told, dict) else told.to_dict()
    wide = {"load_in_4bit": 4, "load_in_8bit": 8}
    loaded = next((number for key, number in wide.items() if given.get(key)), None)
    method = given.get("quant_method") or ("an unknown method" if loaded is None else "bitsandbytes")
    name, bits = str(getattr(method, "value", method)), given.get("bits") or loaded
    return name if bits is None else f"{name}, {bits} bits"
