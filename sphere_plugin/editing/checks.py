"""What is checked of a batch and its model, so that what cannot be edited is told before the long work starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from sphere_plugin.editing.aim import Aimed
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.requests import Fact
from sphere_plugin.errors import ConfigError, ModelError, RequestError
from sphere_plugin.models.forward import longest_text, most_tokens

_LOG = logging.getLogger("sphere_plugin")


def check_tokens(facts: Sequence[Fact], locator: Locator, model: nn.Module) -> None:
    """Raise RequestError if a fact has no tokens, or more than the model takes; warn of those that hardly take."""
    for number, fact in enumerate(facts):
        try:
            sentence = locator.aimed(fact)
        except RequestError as error:
            where = f"requests[{number}].{error.culprit}"
            raise RequestError(where, error.got, error.expected, error.remedy) from None
        unknown = max((*sentence.ids, *sentence.targets)) - most_tokens(model)
        if unknown >= 0:
            raise RequestError(
                f"requests[{number}].prompt",
                f"token {unknown + most_tokens(model)}",
                f"tokens below {most_tokens(model)}: the model has {most_tokens(model)}",
                "Use the tokenizer of this model, or resize the model's embeddings to it.",
            )
        _check_length(number, len(sentence.ids), model, prefixed=False)
        if sentence.lookup == 0:
            _LOG.warning(
                "the subject of %r is the first token the model sees, where decoders keep an attention sink: "
                "such edits hardly take; put words before it",
                fact.prompt,
            )


def check_prefixed(facts: Sequence[Fact], locator: Locator, model: nn.Module, prefixes: Sequence[str]) -> None:
    """Raise RequestError if a fact behind one of the ``prefixes`` has more tokens than the model takes."""
    for number, fact in enumerate(facts):
        tokens = max(len(locator.aimed(fact, prefix).ids) for prefix in prefixes)
        _check_length(number, tokens, model, prefixed=True)


def _check_length(number: int, tokens: int, model: nn.Module, *, prefixed: bool) -> None:
    longest = longest_text(model, tokens)
    if tokens > longest:
        got = f"{tokens} tokens, with a prefix before it" if prefixed else f"{tokens} tokens"
        expected = f"at most {longest}, which is what the model takes"
        remedy = "Shorten it, or lower context_template_length_params." if prefixed else "Shorten it."
        raise RequestError(f"requests[{number}].prompt", got, expected, remedy)


def check_aimed(aimed: Aimed, facts: int, anatomy: Anatomy) -> None:
    """Raise RequestError for targets of other facts than these, ModelError if a loss is no number.

    Such a search has found nothing, and writing its target does harm.
    """
    wanted = facts, anatomy.rewrites[max(anatomy.rewrites)].weight.shape[0]
    if tuple(aimed.values.shape) != wanted:
        remedy = "Give what `aim` returned for these requests."
        raise RequestError("aimed", tuple(aimed.values.shape), f"targets of shape {wanted}", remedy)
    for number, loss in enumerate(aimed.losses.tolist()):
        if not math.isfinite(loss):
            raise ModelError(
                f"loss of requests[{number}]",
                loss,
                "a finite number",
                "Nothing was written. Lower v_lr, load the model in float32, or check its weights for NaN.",
            )


def check_device(setting: str, device: str, remedy: str) -> None:
    """Raise ConfigError if the device that ``setting`` names is none that this machine has."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(setting, device, "a device as torch names it", remedy) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        there = "cpu" if not count else f"cpu, or cuda:0 to cuda:{count - 1}"
        raise ConfigError(setting, device, there, remedy)


def check_attention(model: nn.Module) -> None:
    """Raise ModelError if the model computes attention in a way that takes no mask ready-made."""
    kind = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if kind not in ("sdpa", "eager"):
        raise ModelError(
            "attention implementation", kind, "sdpa or eager", 'Load the model with attn_implementation="sdpa".'
        )
