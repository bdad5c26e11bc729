"""Keys and current values: what the edited layers see at the lookup tokens of a batch of facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.locate import Locator, Padded
from sphere_plugin.editing.replay import Recording, record
from sphere_plugin.editing.requests import Fact
from sphere_plugin.models.memory import work_through


@dataclass(frozen=True)
class _Part:
    """Some of the facts: their bare prompts and, beside them, the same prompts behind random prefixes."""

    bare: Padded
    recording: Recording
    others: Padded | None
    others_recording: Recording | None


class KeyReader:
    """Reads keys and values of a batch while its layers are being edited from below.

    Everything below the first edited layer is computed once. After a layer has been written, :meth:`advance` carries
    the hidden states through it, so that each layer above is read as the edits below have left it.

    Args:
        anatomy: the model's parts.
        locator: tokenises the facts.
        facts: the batch.
        contexts: prefixes the prompts stand behind, and what each counts for in a fact's key.
        token_budget: tokens in one pass.
    """

    def __init__(
        self, anatomy: Anatomy, locator: Locator, facts: Sequence[Fact], contexts: Contexts, token_budget: int
    ) -> None:
        self.anatomy = anatomy
        self.layers = sorted(anatomy.rewrites)
        self.facts = facts
        self.shares = torch.tensor(contexts.shares, dtype=torch.float32, device=anatomy.device)
        prefixes = contexts.prefixes
        self.parts = [
            part
            for _, part in work_through(
                facts,
                lambda fact: _tokens(locator, fact, prefixes),
                token_budget,
                lambda piece: self._part(locator, piece, prefixes),
            )
        ]
        self._at = [(part.recording.hidden, _hidden_of(part.others_recording)) for part in self.parts]
        self._layer = self.layers[0]

    def _part(self, locator: Locator, facts: Sequence[Fact], prefixes: Sequence[str]) -> _Part:
        start, past = self.layers[0], self.layers[-1] + 1
        bare = Padded.of([locator.keyed(fact).up_to_lookup() for fact in facts], self.anatomy.device)
        recording = record(self.anatomy, bare, start, past)
        if len(prefixes) == 1:
            return _Part(bare, recording, None, None)
        sentences = [locator.keyed(fact, prefix).up_to_lookup() for fact in facts for prefix in prefixes[1:]]
        others = Padded.of(sentences, self.anatomy.device)
        return _Part(bare, recording, others, record(self.anatomy, others, start, past))

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values with the weights as they are now.

        Returns:
            Keys [d_in, facts], what enters the rewritten module of ``layer`` at the lookup tokens, and values
            [width, facts], what leaves the last edited layer there in the bare prompt. Both float32.
        """
        self._advance_to(layer)
        keys, values = [], []
        for part, (bare, others) in zip(self.parts, self._at, strict=True):
            key, hidden = self._through(part.recording, bare, part.bare, layer)
            top = part.recording.run(hidden, layer + 1, self.layers[-1] + 1)
            values.append(_at_lookup(top, part.bare))
            if part.others is not None and part.others_recording is not None and others is not None:
                more, _ = self._through(part.others_recording, others, part.others, layer)
                every = torch.cat([key[:, None], more.reshape(key.shape[0], -1, key.shape[1])], dim=1)
                key = torch.einsum("fcd,c->fd", every, self.shares.to(every.device))
            keys.append(key)
        return torch.cat(keys).T.contiguous(), torch.cat(values).T.contiguous()

    def _through(self, recording: Recording, hidden: Tensor, batch: Padded, layer: int) -> tuple[Tensor, Tensor]:
        """Run one layer; its rewritten module's input at the lookup tokens [rows, d_in], and what leaves the layer."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        handle = self.anatomy.rewrites[layer].module.register_forward_pre_hook(hook)
        try:
            out = recording.run(hidden, layer, layer + 1)
        finally:
            handle.remove()
        return _at_lookup(seen[0], batch), out

    def _advance_to(self, layer: int) -> None:
        """Carry the hidden states up to ``layer``; going down again starts over from below."""
        if layer < self._layer:
            self._at = [(part.recording.hidden, _hidden_of(part.others_recording)) for part in self.parts]
            self._layer = self.layers[0]
        for number, (part, (bare, others)) in enumerate(zip(self.parts, self._at, strict=True)):
            bare = part.recording.run(bare, self._layer, layer)
            if part.others_recording is not None and others is not None:
                others = part.others_recording.run(others, self._layer, layer)
            self._at[number] = (bare, others)
        self._layer = layer


def _hidden_of(recording: Recording | None) -> Tensor | None:
    return None if recording is None else recording.hidden


def _at_lookup(hidden: Tensor, batch: Padded) -> Tensor:
    """[rows, tokens, width] -> [rows, width] float32, at each row's lookup token."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, batch.lookup.to(hidden.device)].float()


def _tokens(locator: Locator, fact: Fact, prefixes: Sequence[str]) -> int:
    """Tokens of a fact's sentences up to the lookup token, all padded to the longest."""
    return len(prefixes) * max(len(locator.keyed(fact, prefix).up_to_lookup().ids) for prefix in prefixes)
