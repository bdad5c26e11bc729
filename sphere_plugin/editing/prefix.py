"""Attention keys and values of the tokens before a lookup token, which nothing done to that token can change.

They are read once. What many rows begin with, such as a prefix that all facts are aimed behind, is read once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.locate import Sentence
from sphere_plugin.models.forward import pad_right, trunk

# What a pass costs beside its tokens, in tokens: the model's weights have to be read. Measured on a CPU.
PASS = 40


class PrefixCache:
    """Attention keys and values of tokens that do not change; hands them out, and keeps nothing new.

    Args:
        layers: layer number -> (keys, values), each [rows, heads, tokens, head_dim].
    """

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: the kept prefix followed by ``keys`` and ``values`` [rows, heads, new, head_dim]."""
        kept_keys, kept_values = self.layers[layer_idx]
        return torch.cat([kept_keys, keys], dim=2), torch.cat([kept_values, values], dim=2)


@dataclass(frozen=True)
class Prefix:
    """What attention sees of the tokens read so far.

    Attributes:
        layers: layer number -> (keys, values), each [rows, heads, tokens, head_dim]; none where nothing was read.
        seen: [rows, tokens] True where there is a token, False for padding.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    seen: Tensor

    @classmethod
    def nothing(cls, rows: int, device: torch.device) -> Prefix:
        """Before the first token."""
        return cls({}, torch.zeros(rows, 0, dtype=torch.bool, device=device))

    def rows(self, index: Tensor) -> Prefix:
        """The same for the rows ``index`` [chosen]; a row may be chosen more than once."""
        layers = {n: (_of(keys, index), _of(values, index)) for n, (keys, values) in self.layers.items()}
        return Prefix(layers, _of(self.seen, index))


def extend(anatomy: Anatomy, past: Prefix, tokens: Sequence[Sequence[int]]) -> Prefix:
    """Run the model on more ``tokens`` of each row, behind what was read before; returns all of it."""
    ids, mask = (part.to(anatomy.device) for part in pad_right(tokens))
    if ids.shape[1] == 0:
        return past
    cache = run_trunk(anatomy, past, ids, mask.bool())
    layers = {n: (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}
    return Prefix(layers, torch.cat([past.seen, mask.bool()], dim=1))


def run_trunk(anatomy: Anatomy, past: Prefix, ids: Tensor, mask: Tensor) -> DynamicCache:
    """One pass over ``ids`` [rows, tokens], ``mask`` True where there is a token; returns all keys and values."""
    cache = DynamicCache()
    for number, (keys, values) in past.layers.items():
        cache.update(keys, values, number)
    start = past.seen.sum(1, keepdim=True)
    steps = torch.arange(ids.shape[1], device=ids.device)
    # Positions behind the last token repeat it: a model may have no more of them, and none of it is ever read.
    last = start + mask.sum(1, keepdim=True).clamp(min=1) - 1
    trunk(anatomy.model)(
        input_ids=ids,
        # Given ready-made: the model's own may be left out where it is plainly causal, and could not be told apart
        # when run again.
        attention_mask=causal(past.seen, ids.shape[1], anatomy.dtype),
        position_ids=torch.minimum(start + steps, last),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def causal(seen: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, tokens, before + tokens], added to attention scores; ``seen`` [rows, before] as in `Prefix`."""
    blocked = torch.finfo(dtype).min
    before = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, blocked)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=seen.device).triu(1)
    among = torch.zeros(tokens, tokens, dtype=dtype, device=seen.device).masked_fill_(later, blocked)
    rows = (seen.shape[0], 1, tokens)
    return torch.cat([before[:, None, None].expand(*rows, -1), among.expand(*rows, -1)], dim=3)


@torch.no_grad()
def read_prefixes(anatomy: Anatomy, rows: Sequence[Sentence]) -> Prefix:
    """Read each row's tokens before its lookup token; what rows have in common (`Sentence.shared`) once."""
    common = [row.ids[: min(row.shared, row.lookup)] for row in rows]
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(common))}
    first = extend(anatomy, Prefix.nothing(len(numbers), anatomy.device), list(numbers))
    own = [row.ids[len(ids) : row.lookup] for row, ids in zip(rows, common, strict=True)]
    order = sorted(range(len(rows)), key=lambda number: len(own[number]))
    parts = []
    for piece in pieces([len(own[number]) for number in order]):
        members = order[piece]
        index = torch.tensor([numbers[common[member]] for member in members], device=anatomy.device)
        parts.append(extend(anatomy, first.rows(index), [own[member] for member in members]))
    back = torch.tensor(order, device=anatomy.device).argsort()
    return _joined(parts, len(anatomy.decoder)).rows(back)


def pieces(lengths: Sequence[int]) -> list[slice]:
    """Cut ascending ``lengths`` of rows into passes, so that padding and passes together cost least."""
    if not lengths:
        return []
    ends = [n for n in range(1, len(lengths)) if lengths[n] > lengths[n - 1]] + [len(lengths)]
    best: dict[int, tuple[int, list[slice]]] = {0: (0, [])}
    for end in ends:
        best[end] = min(
            (
                (cost + (end - first) * lengths[end - 1] + PASS, [*cut, slice(first, end)])
                for first, (cost, cut) in best.items()
            ),
            key=lambda found: found[0],
        )
    return best[len(lengths)][1]


def _joined(parts: Sequence[Prefix], depth: int) -> Prefix:
    """The rows of all parts, padded to the longest."""
    width = max(part.seen.shape[1] for part in parts)
    seen = torch.cat([pad(part.seen, (0, width - part.seen.shape[1])) for part in parts])
    if width == 0:
        return Prefix({}, seen)
    known = next(part.layers for part in parts if part.layers)
    layers = {}
    for n in range(depth):
        keys, values = (
            torch.cat([_padded(part, part.layers.get(n, known[n])[which], width) for part in parts])
            for which in (0, 1)
        )
        layers[n] = (keys, values)
    return Prefix(layers, seen)


def _padded(part: Prefix, kept: Tensor, width: int) -> Tensor:
    """Keys or values of a part, [rows, heads, width, head_dim]; where it has none, zeros in the shape of ``kept``."""
    if not part.layers:
        return kept.new_zeros(part.seen.shape[0], kept.shape[1], width, kept.shape[3])
    return pad(kept, (0, 0, 0, width - kept.shape[2]))


def _of(value: Tensor, index: Tensor) -> Tensor:
    return value.index_select(0, index.to(value.device))
