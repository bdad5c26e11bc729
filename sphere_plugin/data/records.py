"""Read facts, with the prompts they are scored on, from the file formats people have."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from sphere_plugin.editing.config import check_number
from sphere_plugin.editing.requests import read_request
from sphere_plugin.errors import ConfigError, RequestError
from sphere_plugin.parsing import is_whole, json_of

_LOG = logging.getLogger("sphere_plugin")


@dataclass(frozen=True)
class Record:
    """A fact to edit and the prompts it is scored on.

    Attributes:
        prompt: the sentence to complete, subject written out.
        subject: what the fact is about; "" where the source does not say, which is enough for scoring, and for methods
            that need none.
        target_new: the new object.
        paraphrases: other ways to say the prompt; the edit should hold there too.
        neighbours: prompts about something else; the edit should change nothing there.
        target_true: the object before the edit; "" where the source does not say.
        neighbour_targets: the true answer of each neighbour, "" where it is not known; empty where none is.
        generation_prompts: beginnings of texts about the subject, for the model to go on with.
        reference_texts: texts about the new object, which what it writes is compared with.
        relation: Wikidata's name of what the fact says, "P36"; "" where the source does not say.
        position: the record's number in its file, from 0.
    """

    prompt: str
    subject: str
    target_new: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    target_true: str = ""
    neighbour_targets: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()
    relation: str = ""
    position: int = 0

    def __post_init__(self) -> None:
        if self.neighbour_targets and len(self.neighbour_targets) != len(self.neighbours):
            raise RequestError(
                "neighbour_targets",
                len(self.neighbour_targets),
                f"one for each of {len(self.neighbours)} neighbours, or none at all",
                'Write "" for those that are not known.',
            )


def held_out(path: Path | None = None) -> str:
    """The text perplexity is measured on; None: the project's own.

    Raises:
        ConfigError: the file cannot be read, or has next to nothing in it.
    """
    if path is None:
        return files("sphere_plugin.data").joinpath("heldout.txt").read_text(encoding="utf-8")
    remedy = "Leave it out for the project's own."
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--text", str(path), f"a text file ({error})", remedy) from error
    if len(text.split()) < 2:
        raise ConfigError("--text", str(path), "a text of some words", remedy)
    return text


def read_records(path: Path | None = None, limit: int | None = None, order: int | None = None) -> list[Record]:
    """Read facts, each prompt once.

    Args:
        path: a JSON array of records: CounterFact's original schema, EasyEdit's flat one, KnowEdit's, or ZsRE's (whose
            edits go towards ``alt``, as EasyEdit's do). None reads the project's own facts.
        limit: at most so many, 1 or more.
        order: seed of a shuffle before anything is left out; None: the order of the file.

    Raises:
        ConfigError: ``limit`` is below 1.
        RequestError: the file is no such array, or has fewer usable records than ``limit``; names the record.
    """
    where = "facts.json" if path is None else str(path)
    source = files("sphere_plugin.data").joinpath("facts.json") if path is None else path
    try:
        content = json_of(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError("data", where, f"a file that can be read ({error.strerror})", _FORMATS) from error
    except ValueError as error:
        raise RequestError("data", where, f"a JSON array ({error})", _FORMATS) from error
    if not isinstance(content, list):
        raise RequestError("data", f"{where}: {type(content).__name__}", "a JSON array of records", _FORMATS)
    return _records(content, where, limit, order)


def records_of(items: Iterable[Mapping[str, Any]], limit: int | None = None, order: int | None = None) -> list[Record]:
    """The records of a list in memory, or of a dataset object of EasyEdit's; see :func:`read_records`.

    EasyEdit's ZsreDataset leaves the subjects out. Its records can be scored, but not edited by methods that look for
    the subject: read the file itself for those.
    """
    if isinstance(items, Mapping | str) or not (hasattr(items, "__iter__") or hasattr(items, "__getitem__")):
        raise RequestError("items", items, "a list or a dataset of records", "Write [record] for a single one.")
    content = [{"subject": "", **item} if isinstance(item, Mapping) else item for item in items]
    return _records(content, "items", limit, order, nameless=True)


def _records(
    content: Sequence[Any], where: str, limit: int | None, order: int | None, nameless: bool = False
) -> list[Record]:
    """``nameless``: records without a subject will do."""
    if limit is not None:
        check_number("limit", limit, 1, whole=True)
    numbers = list(range(len(content)))
    if order is not None:
        random.Random(order).shuffle(numbers)
    records: dict[str, Record] = {}
    unusable: list[str] = []
    for number in numbers:
        if limit is not None and len(records) == limit:
            break
        record = _record(content[number], f"{where}[{number}]")
        try:
            subject = record.subject or record.prompt if nameless else record.subject
            read_request({"prompt": record.prompt, "subject": subject, "target_new": record.target_new}, where)
        except RequestError as error:
            unusable.append(f"[{number}] {error}")
            continue
        records.setdefault(record.prompt, replace(record, position=number))
    if unusable:
        _LOG.warning("%d records of %s are left out, the first: %s", len(unusable), where, unusable[0])
    if not records or (limit is not None and len(records) < limit):
        wanted = "one" if limit is None else str(limit)
        raise RequestError("data", f"{len(records)} usable records in {where}", f"at least {wanted}", "Ask for fewer.")
    return list(records.values())


_FORMATS = "CounterFact, EasyEdit's flat CounterFact, KnowEdit and ZsRE files can be read; see docs/data.md."


def _record(raw: object, where: str) -> Record:
    if not isinstance(raw, Mapping):
        raise RequestError(where, raw, "a record", _FORMATS)
    reader = _reader(raw, where)
    try:
        record = replace(
            reader(raw),
            generation_prompts=_texts(raw.get("generation_prompts")),
            reference_texts=_texts(raw.get("reference_texts")),
        )
        for text in (record.prompt, record.subject, record.target_new):
            if not isinstance(text, str):
                raise TypeError(f"{text!r:.60} is no text")
        for value in vars(record).values():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not is_whole(text):
                    raise TypeError(f"half a character in {text!r:.60}")
        return record
    except RequestError as error:
        raise RequestError(f"{where}.{error.culprit}", error.got, error.expected, error.remedy) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RequestError(where, raw, f"all fields of its schema ({error!r})", _FORMATS) from error


def _reader(raw: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any]], Record]:
    """Which schema a record follows, by the keys it has."""
    if "requested_rewrite" in raw:
        return _counterfact
    if {"src", "alt", "subject"} <= raw.keys():
        return _zsre
    if {"prompt", "target_new"} <= raw.keys():
        return _flat
    raise RequestError(where, sorted(map(str, raw)), "the keys of a known schema", _FORMATS)


def _counterfact(raw: Mapping[str, Any]) -> Record:
    """Every neighbourhood prompt has the true object for its answer; our own facts give each its own."""
    rewrite = raw["requested_rewrite"]
    true = _first(rewrite.get("target_true"))
    neighbours = _texts(raw.get("neighborhood_prompts"))
    return Record(
        prompt=_filled(rewrite["prompt"], rewrite["subject"]),
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"],
        paraphrases=_texts(raw.get("paraphrase_prompts")),
        neighbours=neighbours,
        target_true=true,
        neighbour_targets=_known(_texts(raw.get("neighborhood_targets")) or (true,) * len(neighbours)),
        relation=str(rewrite.get("relation_id") or ""),
    )


def _zsre(raw: Mapping[str, Any]) -> Record:
    neighbours = _some(raw.get("loc"))
    return Record(
        prompt=_filled(raw["src"], raw["subject"]),
        subject=raw["subject"],
        target_new=raw["alt"],
        paraphrases=_some(raw.get("rephrase")),
        neighbours=neighbours,
        target_true=_first(raw.get("answers")),
        neighbour_targets=_known((_first(raw.get("loc_ans")),) * len(neighbours)),
    )


def _flat(raw: Mapping[str, Any]) -> Record:
    """EasyEdit's flat CounterFact and KnowEdit's files, and the items of EasyEdit's dataset objects for either."""
    groups: list[Any] = [*(raw.get("locality") or {}).values(), raw.get("locality_rs"), raw.get("locality_f")]
    prompts, truths = _some(raw.get("locality_prompt")), raw.get("locality_ground_truth")
    each = truths if isinstance(raw.get("locality_prompt"), list) and isinstance(truths, list) else [truths] * len(prompts)
    around = [(prompt, _first(truth)) for prompt, truth in zip(prompts, each, strict=True)]
    around += [(item["prompt"], _first(item.get("ground_truth"))) for group in groups for item in group or ()]
    return Record(
        prompt=_filled(raw["prompt"], raw["subject"] or ""),
        subject=raw["subject"] or "",
        target_new=raw["target_new"],
        paraphrases=_some(raw.get("rephrase_prompt")),
        neighbours=_texts([prompt for prompt, _ in around]),
        target_true=_first(raw.get("ground_truth")),
        neighbour_targets=_known(tuple(truth for _, truth in around)),
    )


def _filled(prompt: str, subject: str) -> str:
    """The prompt with the subject in the place that is left for it."""
    return prompt.replace("{}", subject) if subject != "" else prompt


def _some(value: object) -> tuple[str, ...]:
    """A text, a list of texts, or nothing; without those that are blank."""
    return tuple(text for text in _texts([value] if isinstance(value, str) else value) if text.strip())


def _texts(value: object) -> tuple[str, ...]:
    """A list of texts, or nothing."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{value!r} is no list of texts")
    return tuple(value)


def _first(answers: object) -> str:
    """An answer as it stands in a file: a text, CounterFact's object, or lists of what it may be called."""
    if isinstance(answers, list | tuple):
        return next((text for text in map(_first, answers) if text), "")
    if isinstance(answers, Mapping):
        answers = answers.get("str")
    return answers if isinstance(answers, str) and answers.strip() else ""


def _known(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets, or nothing where none is known."""
    return targets if any(targets) else ()
