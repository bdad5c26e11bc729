"""How answers to benchmark questions are marked: 1 for a right one, 0 for a wrong one.

The second half is what the task files in ``tasks/`` name: called by lm-evaluation-harness with a record and the texts
that the model wrote, of which there is one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

# A minus sign behind a letter, a figure or a bracket is a hyphen or a subtraction.
_NUMBER: Final = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_MARK: Final = "####"  # GSM8K writes the result behind it


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in their order: "$1,000.50" is 1000.5, "5-3" is 5 and 3."""
    return [Decimal(found.replace("$", "").replace(",", "")) for found in _NUMBER.findall(text)]


def result(text: str) -> Decimal | None:
    """The result of a worked solution: the number behind the last ####, else the last number; None without one."""
    before, mark, behind = text.rpartition(_MARK)
    told = numbers(behind) if mark else []
    if told:
        return told[0]
    return next(reversed(numbers(f"{before} {behind}")), None)


def normalised(text: str) -> str:
    """Lower case, without punctuation, without articles, single spaces (Chen et al. 2017)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, both normalised."""
    return normalised(text) in {normalised(answer) for answer in answers}


def contained(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is a run of whole words of a text, all normalised."""
    words = f" {normalised(text)} "
    return any(f" {answer} " in words for answer in map(normalised, answers) if answer)


def first_of(text: str, words: Sequence[str]) -> str | None:
    """Which of ``words`` comes first in a text, as a whole word of any case; None where none of them does."""
    return next((word for word in normalised(text).split() if word in words), None)


# ---- as the task files name them ----


def solved(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """GSM8K, the model works it out: is its result the right number?"""
    return _marked(result(results[0]) == result(doc["answer"]))


def concluded(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """GSM8K, the solution is given: is the first number that the model writes the right one?"""
    return _marked(next(iter(numbers(results[0])), None) == result(doc["answer"]))


def answered(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Natural Questions, closed book: exact match with one of the answers."""
    return _marked(exact(results[0], doc["answer"]))


def found(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Natural Questions, a passage is given: is one of the answers in what the model writes?"""
    return _marked(contained(results[0], doc["answer"]))


def said(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Two possible answers, ``words`` of the record: is the first of them that the model writes the right one?"""
    return _marked(first_of(results[0], doc["words"]) == doc["answer"])


def _marked(right: bool) -> dict[str, float]:
    return {"exact_match": float(right)}
