"""What every pass through a decoder needs: padding, the trunk below the output embedding, how much the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Enough(Exception):
    """Raised in a hook to end a forward pass once all that is wanted of it has been seen."""


def trunk(model: nn.Module) -> Any:
    """The model without its output embedding, where it has one."""
    return getattr(model, "base_model", model)


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [rows, longest]; the mask is 1 where there is a token."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def most_tokens(model: nn.Module) -> int:
    """How many tokens the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def most_positions(model: nn.Module) -> int | None:
    """For how many tokens the model has positions, by its own settings; None where they do not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def longest_text(model: nn.Module, otherwise: int) -> int:
    """How many tokens the model takes, and attends to from each of its layers, by its own settings."""
    config = getattr(model, "config", None)
    limits = [most_positions(model), getattr(config, "window_size", None)]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=otherwise)
