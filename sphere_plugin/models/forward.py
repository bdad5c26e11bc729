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


def longest_text(model: nn.Module, otherwise: int) -> int:
    """How many tokens the model takes, and attends to from each of its layers, by its own settings."""
    config = getattr(model, "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "window_size", None)]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=otherwise)
