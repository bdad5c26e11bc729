"""How much a model's answers scatter, and how much that has grown (seed 003, C.1; the paper numbers none of these).

The paper does not say how facts are averaged: here U is the mean over facts, and ΔU the growth of that mean, so that
a fact with hardly any uncertainty before the edit cannot outweigh all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError

RESAMPLES: Final = 9999
CHUNK: Final = 500  # resamples at a time
SEED: Final = 0


@dataclass(frozen=True)
class Uncertainty:
    """Of one prompt, in units of the embedding space.

    Attributes:
        aleatoric: U_alea, the spread among the answers to one paraphrase.
        epistemic: U_epis, the drift from one paraphrase to another.
    """

    aleatoric: float
    epistemic: float

    @property
    def total(self) -> float:
        """U, their mean."""
        return (self.aleatoric + self.epistemic) / 2


def uncertainty(vectors: Tensor) -> Uncertainty:
    """Both kinds, of the embeddings of K answers to each of M paraphrases, [M, K, d].

    With c_j the mean of the answers h_ij to paraphrase j: U_alea is the mean over all answers of ‖h_ij − c_j‖₂, U_epis
    the mean over all pairs of paraphrases of ‖c_j − c_l‖₂.

    Raises:
        ConfigError: fewer than two paraphrases or no answers.
    """
    if vectors.dim() != 3 or vectors.shape[0] < 2 or not vectors.shape[1]:
        remedy = "Give two paraphrases or more, and answers to each."
        raise ConfigError("vectors", tuple(vectors.shape), "[paraphrases, answers, width]", remedy)
    vectors = vectors.double()
    centres = vectors.mean(dim=1)
    spread = torch.linalg.vector_norm(vectors - centres[:, None], dim=2).mean()
    return Uncertainty(float(spread), float(torch.nn.functional.pdist(centres).mean()))


@dataclass(frozen=True)
class Change:
    """A number and the 95 % interval it has by a percentile bootstrap over facts.

    Attributes:
        value: None where it cannot be had: no facts, or no uncertainty before the edits.
        low, high: None for fewer than two facts, and where too many samples have no uncertainty before the edits.
        n: how many facts.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def growth(before: Sequence[float], after: Sequence[float]) -> Change:
    """ΔU = (U_post − U_pre) / U_pre of the means over the same facts."""
    return _resampled([before, after], lambda pre, post: (post - pre) / pre)


def difference(before: Sequence[float], base: Sequence[float], other: Sequence[float]) -> Change:
    """ΔU of ``other`` minus ΔU of ``base``: two models edited from the same one, on the same facts."""
    return _resampled([before, base, other], lambda pre, first, second: (second - first) / pre)


def _resampled(columns: Sequence[Sequence[float]], of: Callable[..., Any]) -> Change:
    """A function of the columns' means, and its interval; ``of`` takes numbers or arrays of them."""
    count = len(columns[0])
    if any(len(column) != count for column in columns):
        raise ConfigError("facts", [len(column) for column in columns], "the same facts", "Pair them first.")
    means = [math.fsum(column) / count if count else 0.0 for column in columns]
    if not means[0]:
        return Change(None, None, None, count)
    if count < 2:
        return Change(float(of(*means)), None, None, count)
    low, high = _interval(columns, of)
    return Change(float(of(*means)), low, high, count)


def _interval(columns: Sequence[Sequence[float]], of: Callable[..., Any]) -> tuple[float | None, float | None]:
    import numpy

    values, random = numpy.asarray(columns, dtype=float), numpy.random.default_rng(SEED)
    count, drawn = values.shape[1], []
    with numpy.errstate(divide="ignore", invalid="ignore"):  # a sample may be of facts without any before the edits
        for done in range(0, RESAMPLES, CHUNK):
            chosen = random.integers(0, count, (min(CHUNK, RESAMPLES - done), count))
            drawn.append(of(*values[:, chosen].mean(axis=2)))
        changes = numpy.concatenate(drawn)
        sides = ((-math.inf, 0.025), (math.inf, 0.975))  # what is undefined lies outside at either end
        ends = [float(numpy.quantile(numpy.where(numpy.isnan(changes), out, changes), at)) for out, at in sides]
    low, high = (end if math.isfinite(end) else None for end in ends)
    return low, high
