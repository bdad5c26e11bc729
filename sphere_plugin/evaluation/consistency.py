"""Whether what the model writes is about what a reference text is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sphere_plugin.errors import HostError, RequestError


class Consistency:
    """Cosine of TF-IDF vectors, as ROME's code takes it.

    How rare a word is, is counted over the reference texts given here; the original counts it over a corpus of
    Wikipedia that comes with it, so that its numbers cannot be compared with these.

    Args:
        texts: all reference texts, of all records.

    Raises:
        HostError: scikit-learn is not installed.
        RequestError: the texts have no words.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
        except ImportError as error:
            raise HostError(
                "reference_texts",
                f"no scikit-learn ({error})",
                "scikit-learn, which Consistency takes",
                "Run `pip install scikit-learn`, or leave reference_texts out of the records.",
            ) from error
        self._vectors: Any = TfidfVectorizer()
        try:
            self._vectors.fit(texts)
        except ValueError as error:
            raise RequestError(
                "reference_texts", list(texts)[:1], f"texts with words in them ({error})", "Leave empty ones out."
            ) from error

    def score(self, written: Sequence[str], references: Sequence[str]) -> float:
        """Cosine between all texts the model has written on a subject and all of its reference texts; 0 to 1."""
        rows = self._vectors.transform([" ".join(written), " ".join(references)])  # of length 1, or zero
        return float((rows[0] @ rows[1].T).sum())
