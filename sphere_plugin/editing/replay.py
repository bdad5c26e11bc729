"""Run again only the part of a decoder that a change can reach.

A forward pass is recorded once: what each layer was called with, and where wanted the keys and values of attention.
From then on any run of layers can be repeated on other hidden states, for all tokens or for those from a given
position on, against the recorded keys and values of the tokens before. What the recording holds comes from the
model's own forward pass, so rotary tables and position embeddings are the model's own. Every editor checks on its
model that a replay says what the model says (:func:`check_replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.locate import Padded, Sentence
from sphere_plugin.editing.prefix import Prefix, PrefixCache, causal, read_prefixes, run_trunk
from sphere_plugin.errors import ModelError
from sphere_plugin.models.forward import Enough, pad_right, trunk


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

    def run() -> None:
        trunk(anatomy.model)(
            input_ids=batch.ids,
            # Padding is on the right, so a causal mask alone keeps every token clear of it.
            attention_mask=causal(Prefix.nothing(1, batch.ids.device).seen, batch.ids.shape[1], anatomy.dtype),
            position_ids=batch.positions,
            use_cache=False,
        )

    return _recorded(anatomy, start, past, run)


@torch.no_grad()
def record_suffix(anatomy: Anatomy, rows: Sequence[Sentence], prefix: Prefix, start: int) -> Recording:
    """Record all layers from ``start`` on, for each row's tokens from its lookup token on.

    The tokens before it enter as ``prefix``, see :func:`read_prefixes`: nothing done to the lookup token can change
    them in a causal model. ``hidden`` of the result is [rows, suffix, width]; position 0 is the lookup token.
    """
    ids, mask = (part.to(anatomy.device) for part in pad_right([row.ids[row.lookup :] for row in rows]))
    caches: list[DynamicCache] = []
    recording = _recorded(
        anatomy, start, len(anatomy.decoder), lambda: caches.append(run_trunk(anatomy, prefix, ids, mask.bool()))
    )
    width = prefix.seen.shape[1]
    kept = {n: caches[0].layers[n] for n in range(start, len(anatomy.decoder))}
    cache = PrefixCache({n: (layer.keys[:, :, :width], layer.values[:, :, :width]) for n, layer in kept.items()})

    def take(value: Any) -> Any:
        return cache if value is caches[0] else value

    return replace(recording, calls={layer: call.map(take) for layer, call in recording.calls.items()})


@torch.no_grad()
def check_replay(anatomy: Anatomy, sentences: Sequence[Sentence]) -> None:
    """Check that replaying the last layers, and the norm and the head after them, gives the model's own logits.

    Models that do more to their logits than a norm and a head (soft caps, scales), or attend otherwise than causally
    to all tokens before, would be aimed at as if they were another model.

    Raises:
        ModelError: the log-probabilities differ by more than rounding.
    """
    start = max(anatomy.rewrites)
    batch = Padded.of(sentences, anatomy.device)
    suffix = record_suffix(anatomy, sentences, read_prefixes(anatomy, sentences), start)
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


def _recorded(anatomy: Anatomy, start: int, past: int, run: Callable[[], None]) -> Recording:
    """What layers ``start`` to ``past - 1`` are called with in ``run``, which ends there if nothing comes after."""
    calls: dict[int, Call] = {}
    entered: list[Tensor] = []

    def entering(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, calls[layer] = _split(args, kwargs)
            if layer == start:
                entered.append(hidden.detach())
            if layer == past - 1 < len(anatomy.decoder) - 1:
                raise Enough

        return hook

    with ExitStack() as stack:
        for layer in range(start, past):
            handle = anatomy.decoder[layer].register_forward_pre_hook(entering(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(suppress(Enough))
        run()
    return Recording(anatomy, start, entered[0], calls)


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
