"""Locate: which tokens say a fact, and which of them looks it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_plugin.editing.config import FactToken
from sphere_plugin.editing.requests import Fact
from sphere_plugin.errors import ModelError, RequestError
from sphere_plugin.models.forward import pad_right

# The sentence whose next-token distribution aiming keeps as it was (MEMIT's KL term).
ESSENCE = " is a"


@dataclass(frozen=True)
class Sentence:
    """A tokenised sentence with a lookup token.

    Attributes:
        ids: token ids of the prompt, special tokens included, followed by all target tokens but the last.
        lookup: index in ``ids`` of the token that looks the fact up.
        targets: target token ids; predicted at the last ``len(targets)`` positions. Empty where nothing is aimed at.
        shared: how many leading tokens lie in the text that the prompt stands behind, special tokens among them, and
            so may be those of other sentences as well.
    """

    ids: tuple[int, ...]
    lookup: int
    targets: tuple[int, ...] = ()
    shared: int = 0

    def up_to_lookup(self) -> Sentence:
        """The sentence without what stands behind its lookup token, which a causal model cannot see from there."""
        return Sentence(self.ids[: self.lookup + 1], self.lookup, shared=min(self.shared, self.lookup + 1))


def continuation(tokenizer: Any, prompt: str, target: str) -> tuple[int, ...]:
    """Token ids of ``target`` as they follow ``prompt``.

    Read off the whole text where its tokens begin with the prompt's, since tokenizers that mark the start of a text
    would mark the start of a target on its own as well; taken on its own where a token spans the boundary.

    Raises:
        RequestError: the target has no tokens.
    """
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + target)["input_ids"]
    ids = whole[len(before) :]
    if whole[: len(before)] != before or not ids:
        ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RequestError("target_new", target, "text that the tokenizer knows", "Use another target.")
    return tuple(ids)


class Locator:
    """Tokenises facts and finds their lookup tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; a fast one, since only those know which characters a token covers.
        fact_token: which token looks the fact up.

    Raises:
        ModelError: the tokenizer is not a fast one, or ends every text with a token of its own.
    """

    def __init__(self, tokenizer: Any, fact_token: FactToken) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "tokenizer",
                type(tokenizer).__name__,
                "a fast tokenizer, which knows the characters each token covers",
                "Load it with transformers.AutoTokenizer.",
            )
        first, past = tokenizer("a", return_offsets_mapping=True)["offset_mapping"][-1]
        if past <= first:
            raise ModelError(
                "tokenizer",
                "a special token at the end of a text",
                "none, so that a target can follow its prompt",
                "Switch it off, for example with tokenizer.add_eos_token = False.",
            )
        self.tokenizer = tokenizer
        self.fact_token = fact_token

    def aimed(self, fact: Fact, prefix: str = "") -> Sentence:
        """The prompt behind ``prefix``, with its target: what aiming reads."""
        prompt = self.keyed(fact, prefix)
        targets = continuation(self.tokenizer, prefix + fact.prompt, fact.target)
        return Sentence(prompt.ids + targets[:-1], prompt.lookup, targets, prompt.shared)

    def keyed(self, fact: Fact, prefix: str = "") -> Sentence:
        """The prompt behind ``prefix``: what keys and current values are read from."""
        return self._sentence(prefix + fact.before, fact.subject, fact.after, len(prefix))

    def essence(self, fact: Fact) -> Sentence:
        """ "{subject} is a", up to its lookup token."""
        return self._sentence("", fact.subject, ESSENCE).up_to_lookup()

    def _sentence(self, before: str, subject: str, after: str, prefix: int = 0) -> Sentence:
        encoded = self.tokenizer(before + subject + after, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        shared = next((n for n, (_, past) in enumerate(spans) if past > prefix), len(ids))
        return Sentence(tuple(ids), self._lookup(spans, len(before), subject), shared=shared)

    def _lookup(self, spans: Sequence[tuple[int, int]], start: int, subject: str) -> int:
        end = start + len(subject)
        # Special tokens cover no characters; a character of several byte tokens is covered by each of them.
        covering = [n for n, (first, past) in enumerate(spans) if first < end and past > start and past > first]
        text = [n for n, (first, past) in enumerate(spans) if past > first]
        if not covering:
            raise RequestError(
                "subject", subject, "a subject that the tokenizer turns into tokens", "Use another one."
            )
        if self.fact_token == "subject_first":
            return covering[0]
        if self.fact_token == "last":
            return text[-1]
        if self.fact_token == "subject_first_after_last":
            return min(covering[-1] + 1, text[-1])
        return covering[-1]


@dataclass(frozen=True)
class Padded:
    """Sentences side by side, padded on the right.

    Attributes:
        ids: [rows, tokens] token ids.
        mask: [rows, tokens] 1 where there is a token.
        lookup: [rows] index of each row's lookup token.
    """

    ids: Tensor
    mask: Tensor
    lookup: Tensor

    @classmethod
    def of(cls, sentences: Sequence[Sentence], device: torch.device) -> Padded:
        """Pad ``sentences``; what stands in the padding is never attended to."""
        ids, mask = pad_right([sentence.ids for sentence in sentences])
        lookup = torch.tensor([sentence.lookup for sentence in sentences])
        return cls(ids.to(device), mask.to(device), lookup.to(device))

    @property
    def positions(self) -> Tensor:
        """[rows, tokens] position of each token in its sentence."""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
