"""YAML and JSON as others write them, read into plain values; whatever is wrong with them is one kind of error.

Their libraries also raise what nobody expects of a file that is merely wrong: RecursionError of a thousand brackets,
KeyError or AttributeError of a YAML tag, ValueError of a date that there is not. And what they let through can end in
the middle of a run: half a character cannot be written, and a few lines of YAML aliases can stand for gigabytes.
"""

from __future__ import annotations

import json
import sys
from itertools import chain
from typing import Any, Final

import yaml

MOST: Final = 1_000_000  # values of a YAML, those that an alias stands for counted each time
DEEPEST: Final = 100  # lists and mappings in each other
_SCALARS: Final = (str, int, float, type(None))


def yaml_of(text: str) -> Any:  # noqa: ANN401 (YAML holds anything; callers check what they take)
    """The content of a YAML: mappings with texts for keys, lists, texts, numbers, true, false and null.

    Raises:
        ValueError: it is no YAML, or has something else in it, such as a date without quotes.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise _deep() from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value is not what its tag or form says ({type(error).__name__}: {error})") from error
    _count(content, {}, frozenset())
    return content


def json_of(content: str | bytes) -> Any:  # noqa: ANN401
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, or has half a character or a number in it that nothing can hold.
    """
    try:
        found = json.loads(content if isinstance(content, bytes) else content.removeprefix("\ufeff"))
    except RecursionError as error:
        raise _deep() from error
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise _deep()
        for one in level:
            _check_scalar(one)
        level = [inner for one in level if isinstance(one, list | dict) for inner in _inside(one)]
    return found


def is_whole(text: str) -> bool:
    """Whether a text has no half characters, which can neither be written nor turned into tokens.

    An escape of JSON, YAML or Python, as "\\ud83d", can say one of the two halves that make a character.
    """
    return text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text)


def _check_scalar(value: object) -> None:
    if isinstance(value, str) and not is_whole(value):
        half = next(one for one in value if "\ud800" <= one <= "\udfff")
        raise ValueError(f"half a character, {half!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:  # which Python compares without rounding
        raise ValueError(f"a whole number of {value.bit_length()} bits, which is more than fractions can have")


def _inside(value: list[Any] | dict[Any, Any]) -> Any:  # noqa: ANN401
    return value if isinstance(value, list) else chain(value, value.values())


def _count(value: object, known: dict[int, int], around: frozenset[int]) -> int:
    """How many values a YAML stands for; ``around`` are those that this one lies in."""
    _check_scalar(value)
    if isinstance(value, _SCALARS):
        return 1
    if not isinstance(value, dict | list):
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}; write it in quotes if it is a text")
    if id(value) in around:
        raise ValueError("an alias inside what it stands for")
    if len(around) >= DEEPEST:
        raise _deep()
    if id(value) not in known:
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise ValueError("a key that is no text; write it in quotes")
        known[id(value)] = 1 + sum(_count(one, known, around | {id(value)}) for one in _inside(value))
        if known[id(value)] > MOST:
            raise ValueError(f"aliases that stand for more than {MOST} values")
    return known[id(value)]


def _deep() -> ValueError:
    return ValueError(f"more than {DEEPEST} lists and mappings in each other")
