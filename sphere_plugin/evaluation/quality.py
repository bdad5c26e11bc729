"""Efficacy, Generalization and Specificity of all edits so far (paper D.2), perplexity, and hyperspherical energy.

Protocol: teacher forcing on the plain prompt. An edit counts as kept where every token of its target is the model's
first choice (strict; the share of tokens is given beside it). Specificity is the share of neighbourhood prompts whose
next token is still the unedited model's first choice (eq. 61, 64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.data import Record
from sphere_plugin.editing.locate import continuation
from sphere_plugin.editing.requests import read_request
from sphere_plugin.errors import RequestError
from sphere_plugin.models.forward import longest_text, pad_right, trunk
from sphere_plugin.models.memory import work_through

# Tokens of the held-out text read at once; bounds the memory its logits take.
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Scores:
    """Scores after some edits.

    Attributes:
        edits: how many records have been edited; all of them are scored.
        efficacy: per record, 1.0 where the whole target follows the prompt.
        generalization: per record, the share of its paraphrases where it does.
        specificity: per record, the share of its neighbourhood prompts with the unedited model's next token.
        efficacy_tokens: per record, the share of target tokens that are the first choice behind the prompt.
        nll: mean negative log-likelihood of a token of the held-out text, in nats.
    """

    edits: int
    efficacy: tuple[float, ...]
    generalization: tuple[float, ...]
    specificity: tuple[float, ...]
    efficacy_tokens: tuple[float, ...]
    nll: float


@dataclass(frozen=True)
class _Prompt:
    """Token ids, and the tokens asked for at the end; none asks for the next token."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


class Quality:
    """Scores one model on a fixed list of records; made before the first edit.

    Args:
        model: a causal language model of Hugging Face's, unedited.
        tokenizer: its tokenizer.
        records: in the order in which they will be edited.
        text: held-out text for perplexity.
        neighbours: neighbourhood prompts scored per record.
        batch_tokens: tokens in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        records: Sequence[Record],
        text: str,
        neighbours: int = 2,
        batch_tokens: int = 4096,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.records = list(records)
        self.batch_tokens = batch_tokens
        self._edits = [self._target_prompts(record, [record.prompt]) for record in self.records]
        self._paraphrases = [self._target_prompts(record, record.paraphrases) for record in self.records]
        self._neighbours = [
            [_Prompt(self._encode(prompt), ()) for prompt in record.neighbours[:neighbours]] for record in self.records
        ]
        self._text = self._windows(text)
        self._unedited = self._predict([prompt for group in self._neighbours for prompt in group])

    def _windows(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of the text's paragraphs, cut where the model's context or a limit of memory ends."""
        size = min(TEXT_TOKENS, longest_text(self.model, TEXT_TOKENS))
        parts = [self._encode(part) for part in text.split("\n\n") if part.strip()]
        windows = [ids[first : first + size] for ids in parts for first in range(0, len(ids), size)]
        scored = [ids for ids in windows if len(ids) > 1]
        if not scored:
            raise RequestError("held-out text", text[:80], "a paragraph of two tokens or more", "Give a longer text.")
        return scored

    def prompts(self, edits: int) -> int:
        """How many prompts :meth:`score` reads for so many edits."""
        kinds = (self._edits, self._paraphrases, self._neighbours)
        return sum(len(group) for kind in kinds for group in kind[:edits])

    def score(self, edits: int, progress: Callable[[int], None] | None = None) -> Scores:
        """Score the first ``edits`` records; ``progress`` is told the number of prompts done."""
        asked = self._edits[:edits], self._paraphrases[:edits], self._neighbours[:edits]
        flat = [prompt for kind in asked for group in kind for prompt in group]
        said = iter(self._predict(flat, progress))
        efficacy = [[next(said) for _ in group] for group in asked[0]]
        generalization = [[next(said) for _ in group] for group in asked[1]]
        neighbours = [next(said) for group in asked[2] for _ in group]
        same = iter(float(now == before) for now, before in zip(neighbours, self._unedited, strict=False))
        return Scores(
            edits=edits,
            efficacy=tuple(_strict(g, p) for g, p in zip(efficacy, asked[0], strict=True)),
            generalization=tuple(_strict(g, p) for g, p in zip(generalization, asked[1], strict=True)),
            specificity=tuple(_mean([next(same) for _ in group]) for group in asked[2]),
            efficacy_tokens=tuple(_tokens(g, p) for g, p in zip(efficacy, asked[0], strict=True)),
            nll=self.nll(),
        )

    @torch.no_grad()
    def nll(self) -> float:
        """Mean negative log-likelihood of a token of the held-out text, in nats."""
        total, count = 0.0, 0
        for ids in self._text:
            tokens = torch.tensor([ids], device=self._device)
            logits = self._head(self._hidden(tokens, torch.ones_like(tokens))[0, :-1]).float()
            total += float(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            count += len(ids) - 1
        return total / count

    def _target_prompts(self, record: Record, prompts: Sequence[str]) -> list[_Prompt]:
        request = {"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}
        target = read_request(request, record.prompt).target
        asked = []
        for prompt in prompts:
            tokens = continuation(self.tokenizer, prompt.rstrip(), target)
            asked.append(_Prompt(self._encode(prompt) + tokens[:-1], tokens))
        return asked

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text.rstrip())["input_ids"])

    @torch.no_grad()
    def _predict(
        self, prompts: Sequence[_Prompt], progress: Callable[[int], None] | None = None
    ) -> list[tuple[int, ...]]:
        """The model's first choices for the asked tokens of every prompt, in the order given."""
        choices: list[tuple[int, ...]] = [()] * len(prompts)
        ordered = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
        for batch, said in work_through(
            ordered,
            lambda number: len(prompts[number].ids),
            self.batch_tokens,
            lambda batch: self._choices([prompts[number] for number in batch]),
        ):
            for number, choice in zip(batch, said, strict=True):
                choices[number] = choice
            if progress is not None:
                progress(len(batch))
        return choices

    def _choices(self, prompts: Sequence[_Prompt]) -> list[tuple[int, ...]]:
        """The same for one batch."""
        ids, mask = pad_right([prompt.ids for prompt in prompts])
        asked = [max(1, len(prompt.targets)) for prompt in prompts]
        places = [
            (row, len(prompt.ids) - back) for row, prompt in enumerate(prompts) for back in range(asked[row], 0, -1)
        ]
        rows, columns = torch.tensor(places).unbind(dim=1)
        hidden = self._hidden(ids.to(self._device), mask.to(self._device))
        said = self._head(hidden[rows, columns]).argmax(dim=1)
        return [tuple(part.tolist()) for part in torch.split(said, asked)]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = trunk(self.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        return logits


def _strict(said: Sequence[tuple[int, ...]], prompts: Sequence[_Prompt]) -> float:
    return _mean([float(tokens == prompt.targets) for tokens, prompt in zip(said, prompts, strict=True)])


def _tokens(said: Sequence[tuple[int, ...]], prompts: Sequence[_Prompt]) -> float:
    shares = [
        _mean([float(a == b) for a, b in zip(tokens, prompt.targets, strict=True)])
        for tokens, prompt in zip(said, prompts, strict=True)
    ]
    return _mean(shares)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
