"""How likely a model finds a text it was not edited on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sphere_plugin.errors import RequestError
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.models.forward import longest_text
from sphere_plugin.parallel.ranks import ALONE, Ranks

# Tokens of the held-out text read at once; bounds the memory its logits take.
TEXT_TOKENS = 512


def windows(model: nn.Module, tokenizer: Any, text: str) -> list[tuple[int, ...]]:
    """Token ids of the text's paragraphs, cut where the model's context or a limit of memory ends.

    Raises:
        RequestError: the text has no paragraph of two tokens.
    """
    size = min(TEXT_TOKENS, longest_text(model, TEXT_TOKENS))
    parts = [tuple(tokenizer(part.rstrip())["input_ids"]) for part in text.split("\n\n") if part.strip()]
    cut = [ids[first : first + size] for ids in parts for first in range(0, len(ids), size)]
    scored = [ids for ids in cut if len(ids) > 1]
    if not scored:
        raise RequestError("held-out text", text[:80], "a paragraph of two tokens or more", "Give a longer text.")
    return scored


@torch.no_grad()
def mean_nll(decoder: Decoder, texts: Sequence[tuple[int, ...]], ranks: Ranks = ALONE) -> float:
    """Mean negative log-likelihood of a token, in nats; the first token of each text is given.

    A text is a pass of its own, and sums are taken in one order: the same for any number of ``ranks``.
    """
    mine = range(ranks.rank, len(texts), ranks.size)
    parts = ranks.each("perplexity", lambda: [_nll(decoder, texts[number]) for number in mine])
    total = sum(parts[number % ranks.size][number // ranks.size] for number in range(len(texts)))
    return total / sum(len(ids) - 1 for ids in texts)


def _nll(decoder: Decoder, ids: tuple[int, ...]) -> float:
    logits = decoder.logits(decoder.hidden([ids])[0, :-1]).float()
    targets = torch.tensor(ids[1:], device=logits.device)
    return float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
