"""Which cell of a sweep is best, by one score, and whether it is clearly better than what is used without a sweep.

The score is the harmonic mean of efficacy, generalization and specificity, which the field calls "score": a cell that
buys one of them with another does not win. The best of many cells looks better than it is, for it was chosen on the
records it is measured on; so all cells are tested against the same one, and the p values corrected by Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from sphere_plugin.report.numbers import ACCURACIES, Metric, written, written_p
from sphere_plugin.report.paired import CHUNK, SEED, holm, paired_scores, resamples
from sphere_plugin.report.sweep import LEVEL, Cell, Sweep

if TYPE_CHECKING:
    import numpy

    Numbers = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


@dataclass(frozen=True)
class Advantage:
    """A cell's score minus another's, on the records both have.

    Attributes:
        difference: of the scores.
        low, high: its 95 % percentile bootstrap interval over records.
        p: two-sided, of exchanging the two cells record by record; corrected by Holm's method for ``tests`` tests.
        n: how many records.
        tests: of how many cells; 1: not corrected.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    tests: int = 1


@dataclass(frozen=True, eq=False)
class Choice:
    """What is recommended for one method.

    Attributes:
        base: the method.
        best: the cell with the highest score; None if there is no score, `reason` then says why.
        reference: what it is compared with: the default cell, or the method alone where that is not in the grid or was
            not scored.
        advantage: of the best over the reference; None if they are the same, or no record is scored in both.
        default: the default cell, scored or not; None where it is not in the grid.
        cells: how many were in the running.
        reason: why there is nothing to recommend.
    """

    base: str
    best: Cell | None
    reference: Cell | None = None
    advantage: Advantage | None = None
    default: Cell | None = None
    cells: int = 0
    reason: str = ""

    @property
    def clear(self) -> bool:
        """Whether the best is clearly better than the reference."""
        return self.advantage is not None and self.advantage.p < LEVEL and self.advantage.difference > 0

    @property
    def recommended(self) -> Cell | None:
        """The best if it is clearly better than the default, or than the method alone where the grid has no default;
        else the default, if it has one."""
        return self.best if self.clear and self.default in (None, self.reference) else self.default

    @property
    def verdict(self) -> str:
        """The advantage in words."""
        if self.advantage is None or self.advantage.p >= LEVEL:
            return "not clear"
        return "clearly better" if self.clear else "clearly worse"


def score(sweep: Sweep, cell: Cell) -> float | None:
    """The score of a cell at the moment of the sweep; None where one of its parts was not scored."""
    means = [sweep.value(cell, metric).mean for metric in parts(sweep)]
    known = [mean for mean in means if mean is not None]
    return _harmonic(known) if means and len(known) == len(means) else None


def parts(sweep: Sweep) -> list[Metric]:
    """What the score is the harmonic mean of: efficacy, generalization and specificity, as far as they were scored."""
    return [metric for metric in ACCURACIES if sweep.study.has(metric)]


def criterion(sweep: Sweep) -> str:
    """The score in words."""
    return "harmonic mean of " + " and ".join(", ".join(metric.name for metric in parts(sweep)).rsplit(", ", 1))


def choices(sweep: Sweep) -> list[Choice]:
    """What is recommended for each method."""
    return [_choice(sweep, base) for base in sweep.bases]


def sentence(sweep: Sweep, choice: Choice) -> str:
    """A choice in words."""
    best, reference = choice.best, choice.reference
    if best is None or reference is None:
        return f"{choice.base}: nothing to recommend: {choice.reason}"
    alone = sweep.alone(best)
    said = f"{best.method}: {best.words} has the highest score of {choice.cells}, {_percent(score(sweep, best))}"
    said += f" ({criterion(sweep)} after {sweep.study.moment} edits, %). "
    what = f"the default, {reference.words}," if reference is choice.default else reference.label
    what += "" if choice.default else " (no default in the grid)"
    if best.runs == reference.runs:
        said += "That is the default." if best is reference else "That is the method alone."
    elif choice.advantage is None:
        said += f"It cannot be compared with {what.rstrip(',')}: {_missing(sweep, reference)}."
    else:
        said += f"Against {what} with {_percent(score(sweep, reference))}: {_told(choice.advantage)}, "
        said += f"{choice.verdict}."
    if alone is not reference:
        said += f" {alone.label} has {_percent(score(sweep, alone))}."
    return said + _advice(choice)


def advantage(sweep: Sweep, cell: Cell, other: Cell, tests: int = 1) -> Advantage | None:
    """A cell's score against another's, one of so many tests, p not corrected; None where that cannot be told."""
    moment = sweep.study.moment
    if cell.entry is None or other.entry is None or moment is None:
        return None
    if None in (score(sweep, cell), score(sweep, other)):
        return None
    first, second = cell.entry.checkpoints(moment), other.entry.checkpoints(moment)
    scored = [paired_scores(first, second, metric) for metric in parts(sweep)]
    records = [key for key in scored[0] if all(key in one for one in scored[1:])] if scored else []
    if not records:
        return None
    ours, theirs = ([[fmean(pair[side] for pair in one[key]) for one in scored] for key in records] for side in (0, 1))
    return _compared(ours, theirs, resamples(tests))


def _choice(sweep: Sweep, base: str) -> Choice:
    scores = {cell: score(sweep, cell) for cell in sweep.projected(base)}
    running = {cell: one for cell, one in scores.items() if one is not None}
    if not running:
        return Choice(base, None, reason="no cell has been scored")
    best = max(running, key=lambda cell: (running[cell], cell.default, -cell.number))
    default = next((cell for cell in scores if cell.default), None)
    reference = default if default in running else sweep.alone(best)
    if best is default:
        return Choice(base, best, best, None, best, len(running))
    tested = [cell for cell in running if cell.runs != reference.runs]  # not with α = 0 against the method alone
    found = {cell: advantage(sweep, cell, reference, len(tested)) for cell in tested}
    known = {cell: one for cell, one in found.items() if one is not None}
    corrected = dict(zip(known, holm([one.p for one in known.values()]), strict=True))
    ahead = replace(known[best], p=corrected[best], tests=len(known)) if best in known else None
    return Choice(base, best, reference, ahead, default, len(running))


def _compared(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], patterns: int) -> Advantage:
    """Scores of the same records [n, parts] in two cells, exchanged in so many random patterns."""
    import numpy

    first, second = numpy.asarray(ours, dtype=float), numpy.asarray(theirs, dtype=float)
    count, random = len(first), numpy.random.default_rng(SEED)
    observed = float(_harmonics(first.mean(axis=0)) - _harmonics(second.mean(axis=0)))
    middle, half = (first + second).mean(axis=0) / 2, (first - second) / 2
    drawn, exchanged = [], []
    for done in range(0, patterns, CHUNK):
        part = min(CHUNK, patterns - done)
        chosen = random.integers(0, count, (part, count))
        drawn.append(_harmonics(first[chosen].mean(axis=1)) - _harmonics(second[chosen].mean(axis=1)))
        shift = random.choice((-1.0, 1.0), (part, count)) @ half / count
        exchanged.append(_harmonics(middle + shift) - _harmonics(middle - shift))
    extreme = numpy.abs(numpy.concatenate(exchanged)) >= abs(observed) * (1 - 1e-9)
    p = float((extreme.sum() + 1) / (patterns + 1))
    if count < 2:
        return Advantage(observed, None, None, p, count)
    low, high = numpy.quantile(numpy.concatenate(drawn), (0.025, 0.975))
    return Advantage(observed, float(low), float(high), p, count)


def _harmonics(means: Numbers) -> Numbers:
    """The harmonic mean along the last axis; 0 where a mean is not above 0, rounding of nothing included."""
    import numpy

    safe = numpy.where(means > 1e-12, means, 1.0)
    found: Numbers = means.shape[-1] / (1.0 / safe).sum(axis=-1) * (means > 1e-12).all(axis=-1)
    return found


def _harmonic(means: Sequence[float]) -> float:
    return harmonic_mean(means) if min(means) > 0 else 0.0


def _percent(number: float | None) -> str:
    return "–" if number is None else written(100.0 * number, 2)


def _missing(sweep: Sweep, cell: Cell) -> str:
    """Why a cell has no score, or else what its comparison lacks."""
    values = (sweep.value(cell, metric) for metric in parts(sweep))
    return next((value.reason for value in values if value.mean is None), "no record is scored in both")


def _advice(choice: Choice) -> str:
    """What follows from a choice."""
    if choice.recommended is None:
        return " SPHERE is not recommended here: it is not clearly better than the method alone."
    missing = choice.default is not None and choice.default is not choice.reference
    why = " The default was not scored, and without it nothing else is recommended." if missing else ""
    return f"{why} Recommended: {choice.recommended.words}."


def _told(found: Advantage) -> str:
    sign = "+" if found.difference > 0 else ""
    between = "" if found.low is None else f"{_percent(found.low)} to {_percent(found.high)}, "
    tests = f"Holm's correction for {found.tests} tests, " if found.tests > 1 else ""
    return f"{sign}{_percent(found.difference)} ({between}p {written_p(found.p)}, {tests}{found.n} records)"


def plain(sweep: Sweep, choice: Choice) -> dict[str, Any]:
    """A choice as JSON holds it: numbers unrounded, cells by their numbers."""
    cells = {"best": choice.best, "reference": choice.reference, "recommended": choice.recommended}
    gained = choice.advantage
    return {
        "base": choice.base,
        **{name: None if cell is None else cell.number for name, cell in cells.items()},
        "values": {} if choice.recommended is None else dict(choice.recommended.values),
        "advantage": None if gained is None else vars(gained) | {"clear": choice.clear},
        "cells": choice.cells,
        "in_words": sentence(sweep, choice),
    }
