"""Run again only the part of a decoder that a change can reach.

A forward pass is recorded once: what each layer was called with, and where wanted the keys and values of attention.
From then on any run of layers can be repeated on other hidden states, for all tokens or for those from a given
position on, against the recorded keys and values of the tokens before. What the recording holds comes from the
model's own forward pass, so rotary tables and position embeddings are the model's own. Every editor checks on its
model that a replay says what the model says (:func:`check_replay`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.locate import Padded
from sphere_plugin.errors import ModelError
from sphere_plugin.models.forward import Enough, trunk


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
class Call:
    """What a decoder layer was called with, beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> Call:
        """Change every tensor and cache in the call, inside tuples too."""

        def walk(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(walk(item) for item in value)
            return change(value)

        return Call(walk(self.args), {name: walk(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Recording:
    """A stretch of the decoder that can be run again.

    Attributes:
        anatomy: the model's parts.
        start: number of the first layer recorded.
        hidden: [rows, tokens, width] what entered layer ``start``.
        calls: layer number -> what it was called with.
    """

    anatomy: Anatomy
    start: int
    hidden: Tensor
    calls: dict[int, Call]

    def run(self, hidden: Tensor, first: int, past: int) -> Tensor:
        """Run layers ``first`` to ``past - 1`` on ``hidden`` [rows, tokens, width]; same shape out."""
        for layer in range(first, past):
            call = self.calls[layer]
            hidden = _hidden(self.anatomy.decoder[layer](hidden, *call.args, **call.kwargs))
        return hidden

    def rows(self, keep: Tensor) -> Recording:
        """The same for some of the rows, ``keep`` [kept] their numbers."""
        count = self.hidden.shape[0]

        def change(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count:
                return _selected(value, keep)
            if isinstance(value, PrefixCache):
                return PrefixCache({n: (_selected(k, keep), _selected(v, keep)) for n, (k, v) in value.layers.items()})
            return value

        # One cache is shared by all layers of a recording: select from it once.
        seen: dict[int, Any] = {}

        def once(value: Any) -> Any:
            return seen.setdefault(id(value), change(value)) if isinstance(value, PrefixCache) else change(value)

        calls = {layer: call.map(once) for layer, call in self.calls.items()}
        return replace(self, hidden=_selected(self.hidden, keep), calls=calls)


@torch.no_grad()
def record(anatomy: Anatomy, batch: Padded, start: int, past: int) -> Recording:
    """Record a plain forward pass through layers ``start`` to ``past - 1``, over all tokens of ``batch``."""
    return _record(anatomy, batch, start, past, cache=None)


@torch.no_grad()
def record_suffix(anatomy: Anatomy, batch: Padded, start: int) -> Recording:
    """Record all layers from ``start`` on, for each row's tokens from its lookup token on.

    The tokens before it enter as keys and values of attention, which nothing done to the lookup token can change in
    a causal model. ``hidden`` of the result is [rows, suffix, width]; position 0 is the lookup token.
    """
    cache = DynamicCache()
    depth = len(anatomy.decoder)
    whole = _record(anatomy, batch, start, depth, cache)
    suffix = _Suffix(batch)
    prefix = PrefixCache({n: (cache.layers[n].keys, cache.layers[n].values) for n in range(start, depth)})
    mask = suffix.mask(whole.hidden.dtype)

    def take(value: Any) -> Any:
        if value is cache:
            return prefix
        return suffix.take(value, mask) if isinstance(value, Tensor) else value

    calls = {layer: call.map(take) for layer, call in whole.calls.items()}
    return replace(whole, hidden=suffix.of_tokens(whole.hidden), calls=calls)


@torch.no_grad()
def check_replay(anatomy: Anatomy, batch: Padded) -> None:
    """Check that replaying the last layers, and the norm and the head after them, gives the model's own logits.

    Models that do more to their logits than a norm and a head (soft caps, scales), or attend otherwise than causally
    to all tokens before, would be aimed at as if they were another model.

    Raises:
        ModelError: the log-probabilities differ by more than rounding.
    """
    start = max(anatomy.rewrites)
    suffix = record_suffix(anatomy, batch, start)
    hidden = suffix.run(suffix.hidden, start, len(anatomy.decoder))
    ours = torch.log_softmax(anatomy.head(anatomy.norm(hidden)).float(), dim=-1)
    logits = anatomy.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    theirs = torch.log_softmax(logits.to(ours.device).float(), dim=-1)
    lengths = (batch.mask.sum(1) - batch.lookup).tolist()
    pairs = [
        (ours[row, :length], theirs[row, lookup : lookup + length])
        for row, (lookup, length) in enumerate(zip(batch.lookup.tolist(), lengths, strict=True))
    ]
    worst = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    allowed = 1e-2 if ours.dtype == logits.dtype else 1.0  # half precision rounds every layer's output
    if not worst <= allowed:  # NaN among them
        raise ModelError(
            f"replay of {type(anatomy.model).__name__}",
            f"log-probabilities off by {worst:.3g}",
            "the model's own logits",
            "This architecture cannot be edited here yet; LLaMA, Qwen2, GPT-2 and GPT-J can.",
        )


def _record(anatomy: Anatomy, batch: Padded, start: int, past: int, cache: DynamicCache | None) -> Recording:
    calls: dict[int, Call] = {}
    entered: list[Tensor] = []

    def entering(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, calls[layer] = _split(args, kwargs)
            if layer == start:
                entered.append(hidden.detach())
            if cache is None and layer == past - 1:
                raise Enough

        return hook

    with ExitStack() as stack:
        for layer in range(start, past):
            handle = anatomy.decoder[layer].register_forward_pre_hook(entering(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(suppress(Enough))
        trunk(anatomy.model)(
            input_ids=batch.ids,
            # Padding is on the right, so a causal mask alone keeps every token clear of it. Given ready-made: the
            # model's own may be left out where it is plainly causal, and could not be told apart when run again.
            attention_mask=_causal(batch.ids.shape[1], _dtype(anatomy), batch.ids.device),
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return Recording(anatomy, start, entered[0], calls)


class _Suffix:
    """Takes the part of recorded arguments that belongs to each row's tokens from its lookup token on."""

    def __init__(self, batch: Padded) -> None:
        self.rows, self.tokens = batch.ids.shape
        self.length = int((batch.mask.sum(1) - batch.lookup).max())
        self.lookup = batch.lookup
        # Positions past the last token repeat it: what is computed there is never read.
        steps = torch.arange(self.length, device=batch.ids.device)
        self.index = (batch.lookup[:, None] + steps).clamp(max=self.tokens - 1)  # [rows, suffix]

    def take(self, value: Tensor, mask: Tensor) -> Tensor:
        if value.ndim == 4 and value.shape[-2:] == (self.tokens, self.tokens):
            return mask
        if value.ndim >= 2 and value.shape[1] == self.tokens and value.shape[0] in (1, self.rows):
            return self.of_tokens(value)
        return value

    def of_tokens(self, value: Tensor) -> Tensor:
        """[rows or 1, tokens, ...] -> [rows, suffix, ...]."""
        value = value.expand(self.rows, *value.shape[1:])
        index = self.index.reshape(*self.index.shape, *([1] * (value.ndim - 2)))
        return value.gather(1, index.expand(*self.index.shape, *value.shape[2:]))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[rows, 1, suffix, tokens + suffix], added to attention scores: first the prefix, then the suffix."""
        columns = torch.arange(self.tokens, device=self.index.device)
        blocked = torch.finfo(dtype).min
        prefix = torch.zeros(self.rows, self.tokens, dtype=dtype, device=self.index.device)
        prefix.masked_fill_(columns >= self.lookup[:, None], blocked)
        among = _causal(self.length, dtype, self.index.device)
        return torch.cat(
            [
                prefix[:, None, None, :].expand(self.rows, 1, self.length, self.tokens),
                among.expand(self.rows, 1, self.length, self.length),
            ],
            dim=3,
        )


def _causal(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, tokens, tokens], added to attention scores."""
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    return torch.zeros(tokens, tokens, dtype=dtype, device=device).masked_fill_(later, torch.finfo(dtype).min)[
        None, None
    ]


def _dtype(anatomy: Anatomy) -> torch.dtype:
    return next(anatomy.decoder[0].parameters()).dtype


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _selected(value: Tensor, keep: Tensor) -> Tensor:
    return value.index_select(0, keep.to(value.device))


def _hidden(output: Any) -> Tensor:
    """A layer's hidden states, whether it returns them alone or first in a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"a decoder layer returned {type(hidden).__name__}, not hidden states")
    return hidden
