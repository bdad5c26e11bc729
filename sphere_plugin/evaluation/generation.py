"""Let the model write, and measure how much it repeats itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.models.forward import longest_text
from sphere_plugin.parallel.ranks import ALONE, Ranks

# As ROME's and MEMIT's code: tokens a text ends at, prompt included, and how many tokens are in the draw.
LENGTH = 100
TOP_K = 5
# Length of n-grams -> weight of their entropy.
WEIGHTS = ((2, 2 / 3), (3, 4 / 3))

_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Start:
    """The beginning of a text: token ids of a prompt, and the seed of what is written behind it."""

    ids: tuple[int, ...]
    seed: int


@torch.no_grad()
def write(
    decoder: Decoder,
    starts: Sequence[Start],
    length: int = LENGTH,
    top_k: int = TOP_K,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[tuple[int, ...]]:
    """Token ids of a text for every start, the prompt included.

    Tokens are drawn from the ``top_k`` most probable ones, each text by its own random numbers, so that it does not
    depend on what else is written at the time. A text does not end where the model would end it: texts of one length
    have entropies that can be compared, and so does the original.

    Args:
        decoder: the model.
        starts: prompts and seeds.
        length: tokens of a text; less where the model takes less. A longer prompt stays as it is.
        top_k: 1 takes the first choice always.
        batch_tokens: tokens in one pass.
        progress: told the number of texts written.
        ranks: those that share the work; the texts are the same for any number of them.
    """
    length = min(length, longest_text(decoder.model, length))
    texts: dict[Start, tuple[int, ...]] = {start: start.ids for start in starts}
    counts = Counter(starts)
    rows = sorted((start for start in texts if len(start.ids) < length), key=lambda start: len(start.ids))
    if progress is not None and len(rows) < len(texts):
        progress(sum(counts[start] for start in texts if len(start.ids) >= length))

    def told(done: Sequence[Start]) -> None:
        if progress is not None:
            progress(sum(counts[start] for start in done))

    for group in decoder.together(rows, lambda start: len(start.ids)):
        texts.update(
            ranks.through(
                "texts", group, lambda start: length, batch_tokens, lambda p: _write(decoder, p, length, top_k), told
            )
        )
    return [texts[start] for start in starts]


def _write(decoder: Decoder, starts: Sequence[Start], length: int, top_k: int) -> list[tuple[int, ...]]:
    """The same for one piece, sorted by length."""
    draws = torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(start.seed)) for start in starts])
    hidden, begun = decoder.begin([start.ids for start in starts])
    lengths = torch.tensor([len(start.ids) for start in starts])
    last = hidden[torch.arange(len(starts)), lengths - 1]
    new = [_draw(decoder.logits(last), draws[:, 0], top_k)]
    for step in range(1, length - len(starts[0].ids)):
        unfinished = (lengths + step < length).long()  # a row that is long enough stays at its last position
        state = begun.read(new[-1][:, None], unfinished[:, None])[:, 0]
        new.append(_draw(decoder.logits(state), draws[:, step], top_k))
    written = torch.stack(new, dim=1).tolist()
    return [(*start.ids, *row)[:length] for start, row in zip(starts, written, strict=True)]


def _draw(logits: Tensor, draws: Tensor, top_k: int) -> Tensor:
    """A token for every row of logits [rows, vocabulary], by a uniform number each."""
    values, tokens = logits.float().topk(min(top_k, logits.shape[1]), dim=1)
    reached = values.softmax(dim=1).cumsum(dim=1)
    place = (reached < draws.to(reached.device)[:, None]).sum(dim=1).clamp_max(tokens.shape[1] - 1)
    return tokens.gather(1, place[:, None])[:, 0]


def words(text: str) -> list[str]:
    """Words and punctuation marks.

    NLTK's tokenizer, which the original takes, differs in contractions and abbreviations.
    """
    return _WORD.findall(text)


def ngram_entropy(tokens: Sequence[Hashable]) -> float | None:
    """The mean of the entropies of bi- and trigrams, in bits, weighted by 2/3 and 4/3: H₂/3 + 2 H₃/3.

    This is what ROME's and MEMIT's code computes and what their tables give a hundredfold. Eq. 65 of the paper is
    twice as much, for it takes the sum in place of the mean, and has a sign too few: as printed, the trigrams' entropy
    would be subtracted. None where there is no trigram.
    """
    if len(tokens) < max(n for n, _ in WEIGHTS):
        return None
    return fmean(
        weight * _entropy([tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]) for n, weight in WEIGHTS
    )


def _entropy(items: Sequence[Hashable]) -> float:
    """Entropy of the items' frequencies, in bits."""
    return sum(count / len(items) * math.log2(len(items) / count) for count in Counter(items).values())
