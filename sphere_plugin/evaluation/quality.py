"""What is asked of an edited model (paper D.2), and what the answers are worth.

Teacher forcing on the plain prompt, without a chat template. Targets are compared by the mean log-probability of their
tokens, as in MEMIT's code: P is per token, so that a longer answer is not the less probable one for its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from sphere_plugin.data import Record
from sphere_plugin.editing.locate import continuation
from sphere_plugin.errors import ConfigError, RequestError
from sphere_plugin.evaluation.consistency import Consistency
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.generation import LENGTH, Start, ngram_entropy, words, write
from sphere_plugin.evaluation.perplexity import mean_nll, windows
from sphere_plugin.evaluation.predict import Ask, Said, predict
from sphere_plugin.evaluation.scores import METRICS, Scores
from sphere_plugin.models.forward import most_positions, most_tokens
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.parsing import is_whole

Progress = Callable[[int], None]
Numbers = dict[str, float | None]


class Quality:
    """Scores one model on a fixed list of records; made before the first edit.

    Args:
        model: a causal language model of Hugging Face's, unedited.
        tokenizer: its tokenizer.
        records: in the order in which they will be edited.
        text: held-out text for perplexity.
        neighbours: neighbourhood prompts scored per record; None: all.
        batch_tokens: tokens in one forward pass.
        seed: of the texts that fluency and consistency are measured on.
        ranks: those that share the work. Each scores its own copy of the model, and all call the same methods with
            the same arguments; scores are the same for any number of them.

    Raises:
        RequestError: the held-out text is too short, a prompt or a target has no tokens, or more than the model takes.
        HostError: records have reference texts, and scikit-learn is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        records: Sequence[Record],
        text: str,
        neighbours: int | None = 2,
        batch_tokens: int = 4096,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.records = list(records)
        self.batch_tokens = batch_tokens
        self.seed = seed
        self._ranks = ranks
        self._decoder = Decoder(model)
        self._asks = [self._asked(record, neighbours) for record in self.records]
        self._text = windows(model, tokenizer, text)
        references = [text for record in self.records for text in record.reference_texts]
        self._consistency = Consistency(references) if references else None
        apart = [Ask(ask.ids) for _, _, around in self._asks for ask in around]
        unedited = iter(predict(self._decoder, apart, batch_tokens, ranks=ranks))
        self._unedited = [[next(unedited).next for _ in around] for _, _, around in self._asks]

    def prompts(self, edits: int, which: Sequence[int] | None = None, fluency: bool | int = 0) -> int:
        """How many prompts :meth:`score` reads, or writes behind, for these arguments."""
        chosen = self._chosen(edits, which)
        read = sum(len(kind) for position in chosen for kind in self._asks[position])
        return read + sum(len(self.records[position].generation_prompts) for position in chosen if fluency)

    def score(
        self,
        edits: int,
        which: Sequence[int] | None = None,
        progress: Progress | None = None,
        fluency: bool | int = 0,
    ) -> Scores:
        """Score the model as it is now.

        Args:
            edits: how many records have been edited.
            which: positions of those that are scored; None: all of them.
            progress: told the number of prompts done.
            fluency: tokens of the texts that fluency and consistency are measured on, prompt included; True: 100, as
                in the papers. False or 0: neither is scored, for writing takes longer than all else.

        Raises:
            ConfigError: ``which`` names a record that has not been edited, or one twice.
        """
        chosen = self._chosen(edits, which)
        flat = [ask for position in chosen for kind in self._asks[position] for ask in kind]
        said = iter(predict(self._decoder, flat, self.batch_tokens, progress, self._ranks))
        rows: list[Numbers] = []
        for position in chosen:
            asked = self._asks[position]
            prompt, paraphrases, around = ([next(said) for _ in kind] for kind in asked)
            row = _kept("efficacy", asked[0], prompt) | _kept("generalization", asked[1], paraphrases)
            row |= _kept("specificity", asked[2], around)
            same = zip(around, self._unedited[position], strict=True)
            rows.append(row | {"locality": _mean(float(now.next == before) for now, before in same)})
        if fluency:
            length = LENGTH if fluency is True else fluency
            for row, numbers in zip(rows, self._written(chosen, length, progress), strict=True):
                row |= numbers
        columns = {name: tuple(row.get(name) for row in rows) for name in METRICS}
        return Scores(edits=edits, scored=tuple(chosen), nll=self.nll(), **columns)

    def efficacy(self, which: Sequence[int]) -> list[float | None]:
        """Share of the target's tokens that are the first choice behind the prompt, of the records at ``which``."""
        asks = [self._asks[position][0] for position in which]
        flat = [ask for kind in asks for ask in kind]
        said = iter(predict(self._decoder, flat, self.batch_tokens, ranks=self._ranks))
        return [_kept("efficacy", kind, [next(said) for _ in kind])["efficacy"] for kind in asks]

    def texts(self, which: Sequence[int], tokens: int) -> list[str]:
        """What the model writes behind the prompt of each record at ``which``, first choices only, prompt left out."""

        def text(position: int) -> str:
            start = self._ids(self.records[position].prompt.rstrip())
            written = write(self._decoder, [Start(start, 0)], len(start) + tokens, top_k=1)[0]
            return str(self.tokenizer.decode(list(written[len(start) :]), skip_special_tokens=True))

        mine = self._ranks.share(which)
        parts = self._ranks.each("cases", lambda: [text(position) for position in mine])
        return [text for part in parts for text in part]

    def nll(self) -> float:
        """Mean negative log-likelihood of a token of the held-out text, in nats."""
        return mean_nll(self._decoder, self._text, self._ranks)

    def _chosen(self, edits: int, which: Sequence[int] | None) -> list[int]:
        chosen = list(range(min(edits, len(self.records))) if which is None else which)
        wrong = [place for place in chosen if not 0 <= place < min(edits, len(self.records))]
        if wrong or len(set(chosen)) < len(chosen):
            value = wrong or sorted({place for place in chosen if chosen.count(place) > 1})
            raise ConfigError(
                "which", value, f"each a position below {edits}, once", "Name records that have been edited."
            )
        return chosen

    def _asked(self, record: Record, neighbours: int | None) -> tuple[list[Ask], list[Ask], list[Ask]]:
        """The prompt, the paraphrases and the neighbourhood prompts, each with the right target first."""
        truths = record.neighbour_targets or ("",) * len(record.neighbours)
        around = list(zip(record.neighbours, truths, strict=True))[:neighbours]
        return (
            [self._ask(record.prompt, record.target_new, record.target_true)],
            [self._ask(prompt, record.target_new, record.target_true) for prompt in record.paraphrases],
            [self._ask(prompt, truth, record.target_new if truth else "") for prompt, truth in around],
        )

    def _ask(self, prompt: str, *targets: str) -> Ask:
        prompt = prompt.rstrip()
        for text in (prompt, *targets):
            if not is_whole(text):
                raise RequestError("a prompt or target", text, "a text without halves of characters", "Type it anew.")
        spaced = [target if target.startswith(" ") else f" {target}" for target in targets if target.strip()]
        ask = Ask(self._ids(prompt), tuple(continuation(self.tokenizer, prompt, target) for target in spaced))
        length, most = ask.length, most_positions(self.model)
        if not ask.ids or (most is not None and length > most):
            expected = "one token or more" if most is None else f"1 to {most} tokens, which is what the model takes"
            remedy = "Change it, or leave its record out."
            raise RequestError(f"the prompt {prompt!r:.80}", f"{length} tokens with its target", expected, remedy)
        last, known = max(token for ids in (ask.ids, *ask.targets) for token in ids), most_tokens(self.model)
        if last >= known:
            remedy = "Use the tokenizer of this model, or resize the model's embeddings to it."
            expected = f"tokens below {known}: the model has {known}"
            raise RequestError(f"the prompt {prompt!r:.80}", f"token {last}", expected, remedy)
        return ask

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text)["input_ids"])

    def _written(self, chosen: Sequence[int], length: int, progress: Progress | None) -> list[Numbers]:
        """Fluency and consistency of what the model writes about each record."""
        starts = [
            [
                Start(self._ids(prompt.rstrip()), _seed(self.seed, self.records[position].prompt, number))
                for number, prompt in enumerate(self.records[position].generation_prompts)
            ]
            for position in chosen
        ]
        flat = [start for group in starts for start in group]
        written = write(
            self._decoder, flat, length, batch_tokens=self.batch_tokens, progress=progress, ranks=self._ranks
        )
        texts = iter(self.tokenizer.batch_decode([list(ids) for ids in written], skip_special_tokens=True))
        rows: list[Numbers] = []
        for position, group in zip(chosen, starts, strict=True):
            own, references = [next(texts) for _ in group], self.records[position].reference_texts
            alike = self._consistency.score(own, references) if self._consistency and own and references else None
            entropies = [ngram_entropy(words(text)) for text in own]
            rows.append({"fluency": _mean(value for value in entropies if value is not None), "consistency": alike})
        return rows


def _seed(seed: int, prompt: str, number: int) -> int:
    """A seed that depends on the record and the text, and on nothing beside them."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{prompt}".encode()).digest()[:7])


def _kept(name: str, asks: Sequence[Ask], said: Sequence[Said]) -> Numbers:
    """Share of tokens, share of whole targets, and preference over the other target; of prompts that have them."""
    shares, whole, first = [], [], []
    for ask, answer in zip(asks, said, strict=True):
        for told, target in zip(answer.targets[:1], ask.targets, strict=False):
            right = [float(a == b) for a, b in zip(told.choices, target, strict=True)]
            shares.append(sum(right) / len(right))
            whole.append(float(told.choices == target))
        if len(answer.targets) == 2:
            first.append(float(answer.targets[0].logprob > answer.targets[1].logprob))
    return {name: _mean(shares), f"{name}_exact": _mean(whole), f"{name}_success": _mean(first)}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
