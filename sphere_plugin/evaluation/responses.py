"""What a model answers, drawn several times behind each of many prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError, ModelError, RequestError
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.models.forward import longest_text
from sphere_plugin.models.memory import work_through

Ids = tuple[int, ...]

# Tokens looked at before all of the vocabulary is sorted for a row.
FIRST = 256


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples: answers to each prompt, K of the paper.
        tokens: of an answer at most; it ends where the model ends it.
        temperature: logits are divided by it.
        top_p: of the nucleus, the smallest set of most probable tokens that has this probability; 1: all tokens.
        seed: of the random numbers.

    Raises:
        ConfigError: a number out of its range.
    """

    samples: int = 5
    tokens: int = 16
    temperature: float = 0.3
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("samples", self.samples, 2, whole=True)
        check_number("tokens", self.tokens, 1, whole=True)
        check_number("temperature", self.temperature, 0, above=True)
        check_number("top_p", self.top_p, 0, above=True)
        check_number("seed", self.seed, 0, whole=True)
        if self.top_p > 1:
            raise ConfigError("top_p", self.top_p, "at most 1", "Write 1 to draw from all tokens.")


@torch.no_grad()
def respond(
    decoder: Decoder,
    prompts: Sequence[Ids],
    sampling: Sampling,
    ends: Collection[int] = (),
    batch_tokens: int = 4096,
) -> list[list[Ids]]:
    """Token ids of ``sampling.samples`` answers to every prompt, without the prompt.

    An answer's random numbers depend on the seed, the prompt and the answer's number alone, so that it does not matter
    what else is drawn at the time, and a model is asked the same before and after it was edited. A prompt is read once
    for all its answers.

    Args:
        decoder: the model.
        prompts: token ids of each.
        sampling: how to draw.
        ends: tokens an answer ends before.
        batch_tokens: tokens in one pass.

    Raises:
        RequestError: a prompt leaves no room for an answer.
        ModelError: the model gives numbers that are not finite.
    """
    longest = max(map(len, prompts), default=0) + sampling.tokens
    limit = longest_text(decoder.model, longest)
    if longest > limit:
        got = f"{longest - sampling.tokens} tokens of a prompt and {sampling.tokens} of an answer"
        raise RequestError("prompts", got, f"{limit} tokens together", "Leave the longest prompts out.")
    order = sorted(dict.fromkeys(prompts), key=len)
    answers: dict[Ids, list[Ids]] = {}
    for group in decoder.together(order, len):
        for piece, drawn in work_through(
            group,
            lambda ids: sampling.samples * (len(ids) + sampling.tokens),
            batch_tokens,
            lambda piece: _respond(decoder, piece, sampling, frozenset(ends)),
        ):
            answers.update(zip(piece, drawn, strict=True))
    return [answers[ids] for ids in prompts]


def _respond(decoder: Decoder, prompts: Sequence[Ids], sampling: Sampling, ends: frozenset[int]) -> list[list[Ids]]:
    """The same for one piece: [prompts][samples] token ids."""
    count = sampling.samples
    uniform = torch.cat([_uniform(ids, sampling) for ids in prompts])
    hidden, begun = decoder.begin(prompts)
    last = hidden[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])]
    del hidden
    logits = decoder.logits(last).repeat_interleave(count, dim=0)
    rows = begun.take([row for row in range(len(prompts)) for _ in range(count)])
    new = [_checked(logits, uniform[:, 0], sampling)]
    stop = torch.tensor(sorted(ends), device=logits.device, dtype=torch.long)
    over = torch.isin(new[0], stop)
    for step in range(1, sampling.tokens):
        if bool(over.all()):
            break
        state = rows.read(new[-1][:, None], torch.ones(len(over), 1, dtype=torch.long))[:, 0]
        new.append(_checked(decoder.logits(state), uniform[:, step], sampling))
        over |= torch.isin(new[-1], stop)
    written = [_cut(row, ends) for row in torch.stack(new, dim=1).tolist()]
    return [written[first : first + count] for first in range(0, len(written), count)]


def _uniform(ids: Ids, sampling: Sampling) -> Tensor:
    """Random numbers in [0, 1), [samples, tokens]."""
    rows = []
    for number in range(sampling.samples):
        told = f"{sampling.seed}/{number}/{','.join(map(str, ids))}"
        seed = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7])
        rows.append(torch.rand(sampling.tokens, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def _checked(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        remedy = "There is nothing to draw from such a model: look at an earlier moment of the run."
        raise ModelError("logits", "numbers that are not finite", "finite ones", remedy)
    return nucleus(logits, uniform, sampling.temperature, sampling.top_p)


def nucleus(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token for every row of logits [rows, vocabulary], from its nucleus, by a uniform number each."""
    logits, uniform = logits.float() / temperature, uniform.to(logits.device)
    total = logits.logsumexp(dim=1, keepdim=True)
    values, tokens = logits.topk(min(FIRST, logits.shape[1]), dim=1)
    reached = (values - total).exp().cumsum(dim=1)
    chosen = _among(reached, tokens, uniform, top_p)
    short = (reached[:, -1] < top_p).nonzero()[:, 0]
    if len(short) and logits.shape[1] > FIRST:
        values, tokens = logits[short].sort(dim=1, descending=True)
        reached = (values - total[short]).exp().cumsum(dim=1)
        chosen[short] = _among(reached, tokens, uniform[short], top_p)
    return chosen


def _among(reached: Tensor, tokens: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token where the cumulated probability, most probable first, passes a share of the nucleus."""
    last = (reached < top_p).sum(dim=1, keepdim=True).clamp_max(reached.shape[1] - 1)
    mass = reached.gather(1, last)
    place = (reached <= uniform[:, None] * mass).sum(dim=1, keepdim=True).minimum(last)
    return tokens.gather(1, place)[:, 0]


def _cut(row: Sequence[int], ends: Collection[int]) -> Ids:
    """Tokens up to the first end."""
    until = next((place for place, token in enumerate(row) if token in ends), math.inf)
    return tuple(row[: int(min(until, len(row)))])
