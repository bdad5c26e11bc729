"""What a model says behind prompts: its first choices, and how probable it finds given targets.

Every prompt is run once, however often it is asked and however many targets stand behind it: the prompt's last hidden
state tells the first token of all of them, and what follows continues the prompt's keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.evaluation.decoder import Begun, Decoder
from sphere_plugin.models.forward import pad_right
from sphere_plugin.parallel.ranks import ALONE, Ranks

# Places whose logits are held at once.
PLACES = 256

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A question to the model.

    Attributes:
        ids: token ids of a prompt.
        targets: token ids of what may follow it; none asks for the next token alone.
    """

    ids: Ids
    targets: tuple[Ids, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are read: of the prompt and of its longest target but the last."""
        return len(self.ids) + max((len(target) - 1 for target in self.targets), default=0)


@dataclass(frozen=True)
class Told:
    """What the model says where a target stands.

    Attributes:
        choices: its first choice at each of the target's tokens, the tokens before given (teacher forcing).
        logprob: mean natural log-probability of the target's tokens, the tokens before given.
    """

    choices: Ids
    logprob: float


@dataclass(frozen=True)
class Said:
    """The answer: the first choice behind the prompt, and what is said of each target, in their order."""

    next: int
    targets: tuple[Told, ...]


@torch.no_grad()
def predict(
    decoder: Decoder,
    asks: Sequence[Ask],
    batch_tokens: int,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[Said]:
    """Answer all questions, in their order.

    Args:
        decoder: the model.
        asks: prompts and targets.
        batch_tokens: tokens in one forward pass.
        progress: told the number of questions answered.
        ranks: those that share the work; the answers are the same for any number of them.
    """
    wanted: dict[Ids, dict[Ids, None]] = {}
    for ask in asks:
        wanted.setdefault(ask.ids, {}).update(dict.fromkeys(ask.targets))
    asked = Counter(ask.ids for ask in asks)
    rows = sorted((Ask(ids, tuple(targets)) for ids, targets in wanted.items()), key=lambda row: row.length)
    answers: dict[Ids, tuple[int, dict[Ids, Told]]] = {}

    def told(done: Sequence[Ask]) -> None:
        if progress is not None:
            progress(sum(asked[row.ids] for row in done))

    for row, answered in ranks.through(
        "answers", rows, lambda row: row.length, batch_tokens, lambda piece: _answer(decoder, piece), told
    ):
        answers[row.ids] = answered
    return [Said(answers[ask.ids][0], tuple(answers[ask.ids][1][target] for target in ask.targets)) for ask in asks]


def _answer(decoder: Decoder, rows: Sequence[Ask]) -> list[tuple[int, dict[Ids, Told]]]:
    """For each row its next token and what is said of its targets."""
    longer = [[target for target in row.targets if len(target) > 1] for row in rows]
    prompts, begun = [row.ids for row in rows], None
    if decoder.continues and any(longer):
        hidden, begun = decoder.begin(prompts)
    else:
        hidden = decoder.hidden(prompts)
    last = hidden[torch.arange(len(rows)), torch.tensor([len(ids) - 1 for ids in prompts])]
    firsts = _judge(decoder, last, [[target[0] for target in row.targets] for row in rows])
    del hidden
    found: list[dict[Ids, Told]] = [
        {target: Told((choice,), log) for target, log in zip(row.targets, logs, strict=True)}
        for row, (choice, logs) in zip(rows, firsts, strict=True)
    ]
    for turn in range(max(map(len, longer))):
        some = [number for number, targets in enumerate(longer) if turn < len(targets)]
        targets = [longer[number][turn] for number in some]
        states = _behind(decoder, begun, prompts, some, targets)
        judged = iter(_judge(decoder, states, [[token] for target in targets for token in target[1:]]))
        for number, target in zip(some, targets, strict=True):
            first, rest = found[number][target], [next(judged) for _ in target[1:]]
            logs = [first.logprob, *(log for _, (log,) in rest)]
            found[number][target] = Told((*first.choices, *(choice for choice, _ in rest)), sum(logs) / len(logs))
    return [(choice, told) for (choice, _), told in zip(firsts, found, strict=True)]


def _behind(
    decoder: Decoder, begun: Begun | None, prompts: Sequence[Ids], some: Sequence[int], targets: Sequence[Ids]
) -> Tensor:
    """Hidden states at all tokens but the last of each target behind its prompt: [places, d]."""
    parts = [target[:-1] for target in targets]
    if begun is None:  # such a model reads the prompts again
        hidden = decoder.hidden([prompts[number] + part for number, part in zip(some, parts, strict=True)])
        starts = [len(prompts[number]) for number in some]
    else:
        hidden, starts = begun.take(some).read(*pad_right(parts)), [0] * len(some)
    places = [
        (row, start + step)
        for row, (start, part) in enumerate(zip(starts, parts, strict=True))
        for step in range(len(part))
    ]
    rows, columns = torch.tensor(places).unbind(dim=1)
    return hidden[rows, columns]


def _judge(decoder: Decoder, states: Tensor, wanted: Sequence[Sequence[int]]) -> list[tuple[int, list[float]]]:
    """First choice at each place, and the log-probabilities of the tokens wanted there; states are [places, d]."""
    judged: list[tuple[int, list[float]]] = []
    for first in range(0, len(wanted), PLACES):
        part = wanted[first : first + PLACES]
        logits = decoder.logits(states[first : first + PLACES])
        choices = logits.argmax(dim=1).tolist()
        logits = logits.float()
        rows = [row for row, tokens in enumerate(part) for _ in tokens]
        logs = logits[rows, [token for tokens in part for token in tokens]] - logits.logsumexp(dim=1)[rows]
        split = torch.split(logs, [len(tokens) for tokens in part])
        judged += [(choice, log.tolist()) for choice, log in zip(choices, split, strict=True)]
    return judged
