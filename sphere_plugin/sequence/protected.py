"""Inputs of edited weights that edits should leave alone, and those that they are made for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from sphere_plugin.data import Record
from sphere_plugin.editing.inputs import Row, read_inputs
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.requests import read_request
from sphere_plugin.evaluation.perplexity import windows

TEXT: Final = "text"
NEIGHBOURS: Final = "neighbours"
EDITED: Final = "edited"

Keys = dict[str, Tensor]  # weight -> [n, d_in] float32
Item = TypeVar("Item")


def owners(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Weight -> the linear layer it belongs to."""
    return {name: model.get_submodule(name.rpartition(".")[0]) for name in names}


def protected(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    text: str,
    records: Sequence[Record],
    number: int,
    seed: int,
) -> dict[str, Keys]:
    """Read the protected inputs of weights, with the model as it is.

    Args:
        model: unedited.
        tokenizer: its tokenizer.
        names: of the weights.
        text: has nothing to do with any edit. Its tokens but the first of each paragraph, where decoders keep an
            attention sink.
        records: of the run; their neighbourhood prompts, at the last token.
        number: how many of each, drawn by ``seed``; all where there are not so many.
        seed: of the choice.

    Returns:
        "text" and, where there are any, "neighbours" -> weight -> inputs [n, d_in].
    """
    layers = owners(model, names)
    rows: dict[str, list[Row]] = {TEXT: _of_text(windows(model, tokenizer, text), number, seed)}
    prompts = list(dict.fromkeys(prompt for record in records for prompt in record.neighbours))
    chosen = (tokenizer(prompt)["input_ids"] for prompt in _drawn(prompts, number, seed))
    rows[NEIGHBOURS] = [(ids, [len(ids) - 1]) for ids in chosen if ids]
    return {kind: read_inputs(model, layers, each) for kind, each in rows.items() if each}


def edited(
    model: nn.Module, tokenizer: Any, names: Sequence[str], facts: Sequence[Mapping[str, Any]], token: Any
) -> Keys:
    """Read the inputs at the lookup tokens of a batch of facts, prompts without prefixes, with the model as it is.

    Args:
        model: as it was before the batch.
        tokenizer: its tokenizer.
        names: of the weights.
        facts: `prompt`, `subject`, `target_new` of each.
        token: which token looks a fact up, see EditingConfig.
    """
    locator = Locator(tokenizer, token)
    sentences = [locator.keyed(read_request(fact, "facts")).up_to_lookup() for fact in facts]
    return read_inputs(model, owners(model, names), [(one.ids, [one.lookup]) for one in sentences])


def _of_text(texts: Sequence[Sequence[int]], number: int, seed: int) -> list[Row]:
    places = [(row, place) for row, ids in enumerate(texts) for place in range(1, len(ids))]
    picks: dict[int, list[int]] = {}
    for row, place in _drawn(places, number, seed):
        picks.setdefault(row, []).append(place)
    return [(texts[row], found) for row, found in picks.items()]


def _drawn(items: Sequence[Item], number: int, seed: int) -> list[Item]:
    """``number`` of the items in their order, drawn by ``seed``; all of them where there are not more."""
    if len(items) <= number:
        return list(items)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), number))]


def mean_square(keys: Tensor) -> float:
    """Mean ‖z‖² of [n, d_in]."""
    return float(torch.linalg.vector_norm(keys, dim=1, dtype=torch.float64).square().mean())
