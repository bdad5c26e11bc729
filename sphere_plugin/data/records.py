"""Read facts, with the prompts they are scored on, from the file formats people have."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sphere_plugin.editing.requests import read_request
from sphere_plugin.errors import RequestError

_LOG = logging.getLogger("sphere_plugin")


@dataclass(frozen=True)
class Record:
    """A fact to edit and the prompts it is scored on.

    Attributes:
        prompt: the sentence to complete, subject written out.
        subject: what the fact is about.
        target_new: the new object.
        paraphrases: other ways to say the prompt; the edit should hold there too.
        neighbours: prompts about other subjects; the edit should change nothing there.
    """

    prompt: str
    subject: str
    target_new: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]


def own_text() -> str:
    """The project's held-out text, which perplexity is measured on."""
    return files("sphere_plugin.data").joinpath("heldout.txt").read_text(encoding="utf-8")


def read_records(path: Path | None = None, limit: int | None = None) -> list[Record]:
    """Read facts in file order, each prompt once.

    Args:
        path: a JSON array of records: CounterFact's original schema, EasyEdit's flat one, or ZsRE's (whose edits go
            towards ``alt``, as EasyEdit's do). None reads the project's own facts.
        limit: at most so many.

    Raises:
        RequestError: the file is no such array, or has fewer usable records than ``limit``; names the record.
    """
    where = "facts.json" if path is None else str(path)
    source = files("sphere_plugin.data").joinpath("facts.json") if path is None else path
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError("data", where, f"a file that can be read ({error.strerror})", _FORMATS) from error
    except ValueError as error:
        raise RequestError("data", where, f"a JSON array ({error})", _FORMATS) from error
    if not isinstance(content, list):
        raise RequestError("data", f"{where}: {type(content).__name__}", "a JSON array of records", _FORMATS)
    records: dict[str, Record] = {}
    unusable: list[str] = []
    for number, raw in enumerate(content):
        if limit is not None and len(records) == limit:
            break
        try:
            record = _reader(raw, f"{where}[{number}]")(raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{where}[{number}]", raw, f"all fields of its schema ({error!r})", _FORMATS) from error
        try:
            read_request({"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}, where)
        except RequestError as error:
            unusable.append(f"[{number}] {error}")
            continue
        records.setdefault(record.prompt, record)
    if unusable:
        _LOG.warning("%d records of %s are left out, the first: %s", len(unusable), where, unusable[0])
    if not records or (limit is not None and len(records) < limit):
        wanted = "one" if limit is None else str(limit)
        raise RequestError("data", f"{len(records)} usable records in {where}", f"at least {wanted}", "Ask for fewer.")
    return list(records.values())


_FORMATS = "CounterFact, EasyEdit's flat CounterFact and ZsRE files can be read; see docs/data.md."


def _reader(raw: object, where: str) -> Callable[[Mapping[str, Any]], Record]:
    """Which schema a record follows, by the keys it has."""
    if isinstance(raw, Mapping):
        if "requested_rewrite" in raw:
            return _counterfact
        if {"src", "alt", "subject"} <= raw.keys():
            return _zsre
        if {"prompt", "target_new", "subject"} <= raw.keys():
            return _flat
        raise RequestError(where, sorted(map(str, raw)), "the keys of a known schema", _FORMATS)
    raise RequestError(where, raw, "a record", _FORMATS)


def _counterfact(raw: Mapping[str, Any]) -> Record:
    rewrite = raw["requested_rewrite"]
    return Record(
        prompt=rewrite["prompt"].replace("{}", rewrite["subject"]),
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"],
        paraphrases=tuple(raw.get("paraphrase_prompts", ())),
        neighbours=tuple(raw.get("neighborhood_prompts", ())),
    )


def _zsre(raw: Mapping[str, Any]) -> Record:
    return Record(raw["src"], raw["subject"], raw["alt"], _some(raw.get("rephrase")), _some(raw.get("loc")))


def _flat(raw: Mapping[str, Any]) -> Record:
    return Record(
        prompt=raw["prompt"],
        subject=raw["subject"],
        target_new=raw["target_new"],
        paraphrases=_some(raw.get("rephrase_prompt")),
        neighbours=_some(raw.get("locality_prompt")),
    )


def _some(text: object) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) and text.strip() else ()
