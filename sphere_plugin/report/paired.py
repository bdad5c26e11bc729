"""Paired tests: two entries scored on the same records, record by record.

The test is a permutation test: were the two the same, the sign of every difference would be a coin's. All sign
patterns are tried where there are few, else as many random ones as `resamples` says; two-sided. The interval is a
percentile bootstrap over records. Both are seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

from sphere_plugin.report.grid import Field, Grid, Line, csv_text
from sphere_plugin.report.numbers import METRICS, Metric, scores_of, shown, written_p
from sphere_plugin.report.read import Checkpoint, Run
from sphere_plugin.report.studies import Entry, Study

RESAMPLES: Final = 9999
SEED: Final = 0
CHUNK: Final = 500  # resamples at a time
PER_TEST: Final = 200  # sign patterns for every test that p is corrected for, where that is more than `RESAMPLES`
TEST: Final = (
    "sign-flip permutation test of the mean difference, two-sided, by all sign patterns or, where there are more than "
    f"that, {RESAMPLES} random ones, {PER_TEST} for every test if that is more"
)

Scored = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Comparison:
    """``entry`` minus ``base`` on the records both are scored on.

    Attributes:
        entry, base, metric: what is compared.
        edits: at which moment.
        difference: mean; None if there is none, `reason` then says why.
        low, high: the 95 % bootstrap interval of it.
        p, holm: of the permutation test; the same corrected by Holm's method for all tests of the study.
        n: how many records.
        better, worse: on how many of them the entry is above or below the base.
    """

    entry: Entry
    base: Entry
    metric: Metric
    edits: int | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    holm: float | None = None
    n: int = 0
    better: int = 0
    worse: int = 0
    reason: str = ""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def comparisons(study: Study) -> list[Comparison]:
    """Returns every x+sphere against its x, and every entry against its controls, for each metric with scores."""
    metrics = [metric for metric in METRICS if metric.per_edit and study.has(metric)]
    planned = [(entry, base, metric) for entry, base in _couples(study) for metric in metrics]
    found = [compare(study, *one, len(planned)) for one in planned]
    corrected = iter(holm([one.p for one in found if one.p is not None]))
    return [one if one.p is None else replace(one, holm=next(corrected)) for one in found]


def compare(study: Study, entry: Entry, base: Entry, metric: Metric, tests: int = 1) -> Comparison:
    """Returns one comparison at the study's moment; it is one of so many tests."""
    edits = study.moment
    nothing = Comparison(entry, base, metric, edits, None)
    if edits is None:
        return replace(nothing, reason="not available: no checkpoint after an edit")
    for one in (entry, base):
        value = one.value(metric, edits)
        if value.mean is None:
            return replace(nothing, reason=f"{one.label}: {value.reason}")
    differences = paired_differences(entry.checkpoints(edits), base.checkpoints(edits), metric)
    if not differences:
        return replace(nothing, reason="not available: no record that both are scored on")
    low, high = bootstrap(differences)
    return replace(
        nothing,
        difference=fmean(differences),
        low=low,
        high=high,
        p=permutation(differences, tests),
        n=len(differences),
        better=sum(one > 0 for one in differences),
        worse=sum(one < 0 for one in differences),
    )


def paired_differences(
    first: Sequence[tuple[Run, Checkpoint]], second: Sequence[tuple[Run, Checkpoint]], metric: Metric
) -> list[float]:
    """Returns first − second for every record that both have; of several orders, the record's mean over them."""
    couples = paired_scores(first, second, metric).values()
    return [fmean(ours - theirs for ours, theirs in scores) for scores in couples]


def paired_scores(
    first: Sequence[tuple[Run, Checkpoint]], second: Sequence[tuple[Run, Checkpoint]], metric: Metric
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Returns record -> scores in first and in second, a pair for each order that both have."""
    by_record: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run, checkpoint in first:
        for other, counterpart in second:
            if other.order != run.order:
                continue
            known = _can_name(run, checkpoint) and _can_name(other, counterpart)
            ours, theirs = (_by_record(*one, metric, known) for one in ((run, checkpoint), (other, counterpart)))
            for key in sorted(ours.keys() & theirs.keys()):
                by_record.setdefault(key, []).append((ours[key], theirs[key]))
    return by_record


def bootstrap(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the 95 % percentile interval of the mean; nothing for a single difference."""
    import numpy

    if len(differences) < 2:
        return None, None
    values = numpy.asarray(differences, dtype=float)
    random = numpy.random.default_rng(SEED)
    parts = [min(CHUNK, RESAMPLES - done) for done in range(0, RESAMPLES, CHUNK)]
    means = [values[random.integers(0, len(values), (part, len(values)))].mean(axis=1) for part in parts]
    low, high = numpy.quantile(numpy.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def resamples(tests: int) -> int:
    """Returns how many random patterns it takes for the smallest p, corrected for so many tests, to be below 0.01."""
    return max(RESAMPLES, PER_TEST * tests)


def permutation(differences: Sequence[float], tests: int = 1) -> float:
    """Returns the p value of the mean under random signs, not corrected, for one of so many tests."""
    import numpy
    from scipy.stats import permutation_test

    values = numpy.asarray([one for one in differences if one], dtype=float)  # a zero stays zero under any sign
    if len(values) < 2:
        return 1.0
    result = permutation_test(
        (values,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples(tests),
        batch=CHUNK,
        rng=SEED,
    )
    return float(result.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p values corrected by Holm's step-down method."""
    corrected, highest = [1.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = highest
    return corrected


def grid(study: Study, found: Sequence[Comparison]) -> Grid:
    """Returns all comparisons as a table."""
    heads = ("Entry", "Against", "Metric", "Records", "Difference", "95 % from", "95 % to", "Up / down")
    lines = [Line(one.entry, tuple(_fields(one))) for one in found]
    note = (
        f"Difference of the scores of the same edit, entry minus the other, after {study.moment} edits. p: {TEST}; "
        "corrected by Holm's method for all tests of this table. "
        f"Interval: percentile bootstrap over records, {RESAMPLES} samples. Of several orders, a record's mean."
    )
    return Grid(f"{study.key}-paired", "Paired tests", (*heads, "p", "p (Holm)"), tuple(lines), note)


def scores_csv(study: Study) -> str:
    """Returns the scores that are compared, unrounded: one line for each scored edit of each run at the moment."""
    metrics = [metric for metric in METRICS if metric.per_edit and study.has(metric)]
    heads = ("entry", "order", "edits", "position", "record", *(metric.name for metric in metrics))
    rows = []
    for entry in study.entries:
        for run, checkpoint in entry.checkpoints(study.moment) if study.moment is not None else ():
            scores = [scores_of(run, checkpoint, metric) for metric in metrics]
            known = _can_name(run, checkpoint)
            records = [record for batch in run.batches for record in batch.records] if known else None
            for place in checkpoint.scored:
                told = (place, None if records is None else records[place], *(one.get(place) for one in scores))
                rows.append((entry.name, run.order, checkpoint.edits, *told))
    return csv_text(heads, rows)


def _couples(study: Study) -> list[tuple[Entry, Entry]]:
    """Every x+sphere and its x, every entry and the controls of its method and targets; two controls one way only."""
    couples = [(entry, base) for base, entry in study.pairs()]
    for base in (one for one in study.entries if one.control):
        alike = [one for one in study.entries if (one.family, one.shared) == (base.family, base.shared)]
        couples += [(one, base) for one in alike if one is not base and (base, one) not in couples]
    return couples


def _fields(one: Comparison) -> list[Field]:
    names = [Field(one.entry.label), Field(one.base.label), Field(f"{one.metric.title} ({one.metric.unit})")]
    if one.difference is None:
        return [*names, Field("0", 0), Field(one.reason), *[Field("–")] * 5]
    scaled = (one.difference, one.low, one.high)
    fields = [Field(shown(one.metric, x), None if x is None else x * one.metric.scale) for x in scaled]
    ps = [Field("–") if p is None else Field(written_p(p), p) for p in (one.p, one.holm)]
    return [*names, Field(str(one.n), one.n), *fields, Field(f"{one.better} / {one.worse}"), *ps]


def _can_name(run: Run, checkpoint: Checkpoint) -> bool:
    """Whether the journal tells which record each scored edit is."""
    records = [record for batch in run.batches for record in batch.records]
    return all(position < len(records) and records[position] is not None for position in checkpoint.scored)


def _by_record(run: Run, checkpoint: Checkpoint, metric: Metric, known: bool) -> Scored:
    """Record -> score; by the position in the order of editing where a journal does not tell the record."""
    scores = scores_of(run, checkpoint, metric)
    if not known:
        return {(f"position in order {run.order}", position): score for position, score in scores.items()}
    records = [record or 0 for batch in run.batches for record in batch.records]
    return {("record", records[position]): score for position, score in scores.items()}
