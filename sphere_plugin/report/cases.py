"""Case studies: what each method's model writes behind the same prompt (the paper's appendix E.3)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sphere_plugin.report.studies import Entry, Study

NEW_LINE: Final = "⏎"


@dataclass(frozen=True)
class Piece:
    """A stretch of what a model wrote. ``kind`` is "prompt", "target" or nothing."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Answer:
    """What one model wrote; ``entry`` is None for the unedited one."""

    label: str
    entry: Entry | None
    pieces: tuple[Piece, ...]
    missing: str = ""


@dataclass(frozen=True)
class Case:
    """One prompt and what every model writes behind it."""

    prompt: str
    target: str
    answers: tuple[Answer, ...]


def cases(study: Study) -> list[Case]:
    """Returns the case studies at the study's moment; of several orders, those of the first that has any."""
    if study.moment is None:
        return []
    unedited = _first(one.cases for entry in study.entries for _, one in entry.checkpoints(0))
    written = [_first(one.cases for _, one in entry.checkpoints(study.moment or 0)) for entry in study.entries]
    prompts: dict[tuple[str, str], None] = {}
    for texts in (*written, unedited):
        prompts.update(dict.fromkeys(texts))
    found = []
    for prompt, target in prompts:
        answers = [_answer("Unedited", None, unedited, prompt, target)] if unedited else []
        answers += [
            _answer(one.label, one, texts, prompt, target) for one, texts in zip(study.entries, written, strict=True)
        ]
        found.append(Case(prompt, target, tuple(answers)))
    return found


def marked(text: str, prompt: str, target: str) -> tuple[Piece, ...]:
    """Cut a text into the prompt it begins with, the places where the target stands, and the rest.

    Line breaks become ⏎, so that a model that writes nothing else takes little room.
    """
    pieces = []
    if prompt and text.startswith(prompt):
        pieces.append(Piece(prompt, "prompt"))
        text = text[len(prompt) :]
    text = re.sub(r"\s*\n\s*", f" {NEW_LINE} ", text)
    wanted = target.strip()
    while wanted and wanted in text:
        before, _, text = text.partition(wanted)
        pieces += [Piece(before), Piece(wanted, "target")]
    pieces.append(Piece(text))
    return tuple(piece for piece in pieces if piece.text)


def _first(each: Any) -> Mapping[tuple[str, str], str | None]:
    """(prompt, target) -> text, of the first checkpoint that has cases."""
    for stored in each:
        if stored:
            return _texts(stored)
    return {}


def _texts(stored: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str | None]:
    return {(str(one.get("prompt", "")), str(one.get("target_new", ""))): one.get("text") for one in stored}


def _answer(
    label: str, entry: Entry | None, texts: Mapping[tuple[str, str], str | None], prompt: str, target: str
) -> Answer:
    text = texts.get((prompt, target))
    if text is None:
        return Answer(label, entry, (), "not available: this model wrote nothing for this prompt")
    return Answer(label, entry, marked(str(text), prompt, target), "" if text else "an empty text")
