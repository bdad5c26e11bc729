"""The errors users meet. Each names the culprit, its value, what was expected and what to do, in that order."""

from __future__ import annotations

import reprlib


class SphereError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        culprit: what is wrong, in the user's words ("eta", "requests[3].subject", a file's path).
        got: its value; shown with ``repr``, of a huge one the beginning.
        expected: what would have been right.
        remedy: what to do next, a full sentence.
    """

    def __init__(self, culprit: str, got: object, expected: str, remedy: str) -> None:
        self.culprit = culprit
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"{culprit}: got {_Short().repr(got)}, expected {expected}. {remedy}")

    def __reduce__(self) -> tuple[type[SphereError], tuple[str, object, str, str]]:
        """From process to process."""
        return type(self), (self.culprit, self.got, self.expected, self.remedy)


class _Short(reprlib.Repr):
    """``repr`` of what anybody may have written: never long, and never an error itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 40
        self.maxstring = self.maxother = 1000

    def repr_int(self, x: int, level: int) -> str:
        """Python itself refuses to write some."""
        return repr(x) if x.bit_length() <= 1000 else f"a whole number of {x.bit_length()} bits"

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In its own order."""
        if level <= 0 and x:
            return "{...}"
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in list(x)[: self.maxdict]]
        return "{" + ", ".join([*shown, *(["..."] if len(x) > self.maxdict else [])]) + "}"


class ConfigError(SphereError, ValueError):
    """A hyper-parameter, a YAML key or a command-line value."""


class RequestError(SphereError, ValueError):
    """A fact to edit, or a record of a data file."""


class ModelError(SphereError, ValueError):
    """A model, its tokenizer, or one of its weights."""


class HostError(SphereError, ImportError):
    """EasyEdit, or another library the call needs, is missing or not one this package knows how to run."""


class CacheError(SphereError, OSError):
    """A file of ours on disk that cannot be read or written."""


class RanksError(SphereError, RuntimeError):
    """Another process of a run that several share."""
