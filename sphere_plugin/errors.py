"""The errors users meet. Each names the culprit, its value, what was expected and what to do, in that order."""

from __future__ import annotations


class SphereError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        culprit: what is wrong, in the user's words ("eta", "requests[3].subject", a file's path).
        got: its value; shown with ``repr`` unless it is already a sentence fragment.
        expected: what would have been right.
        remedy: what to do next, a full sentence.
    """

    def __init__(self, culprit: str, got: object, expected: str, remedy: str) -> None:
        self.culprit = culprit
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"{culprit}: got {got!r}, expected {expected}. {remedy}")

    def __reduce__(self) -> tuple[type[SphereError], tuple[str, object, str, str]]:
        """From process to process."""
        return type(self), (self.culprit, self.got, self.expected, self.remedy)


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
