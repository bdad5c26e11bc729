"""General abilities against edits (the paper's Figures 6 and 10 to 12), as runs and `sphere abilities` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.errors import CacheError
from sphere_plugin.evaluation.abilities import PERPLEXITY
from sphere_plugin.evaluation.tallies import REMEDY, path_of, read_tallies
from sphere_plugin.report.curves import MANY, STEEP, TOP
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import written, written_p
from sphere_plugin.report.paired import RESAMPLES, TEST, bootstrap, holm, permutation
from sphere_plugin.report.read import Run
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import Panel, Pen, Plate

NOT_MEASURED: Final = "not measured"
TITLES: Final = MappingProxyType(
    {
        "gsm8k": "GSM8K",
        "gsm8k_given": "GSM8K, solution given",
        "rte": "RTE",
        "rte_written": "RTE, written",
        "nq": "Natural Questions",
        "nq_given": "Natural Questions, passage given",
        "boolq": "BoolQ",
        PERPLEXITY: "Perplexity",
    }
)
# Metric -> how it is told.
UNITS: Final = MappingProxyType(
    {"exact_match": "exact match, %", "acc": "accuracy, %", "mcc": "Matthews · 100", PERPLEXITY: "e^nll"}
)


@dataclass(frozen=True)
class Score:
    """What an entry scored in a task after so many edits; of several orders, the means.

    Attributes:
        value, stderr: in the unit of the task; the latter is None where it is not told.
        records: one number per record.
    """

    value: float
    stderr: float | None
    records: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A task of a study.

    Attributes:
        name: of it.
        metric: what its value is.
        scores: entry's slot -> edits -> score.
    """

    name: str
    metric: str
    scores: Mapping[int, Mapping[int, Score]]

    @property
    def title(self) -> str:
        """In words."""
        return TITLES.get(self.name, self.name)

    @property
    def unit(self) -> str:
        """What `scale` makes of its values."""
        return UNITS.get(self.metric, f"{self.metric}, %")

    @property
    def scale(self) -> float:
        """Per cent, but of perplexity."""
        return 1.0 if self.metric == PERPLEXITY else 100.0


@dataclass(frozen=True)
class Measured:
    """All that was measured of a study; nothing is false.

    Attributes:
        tasks: in the order they were measured in.
        missing: what is not there, and why.
    """

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.tasks)


def gather(study: Study) -> Measured:
    """Read what was measured of all runs of a study. Scores of a task with other settings than the first are left out.

    Raises:
        CacheError: a file is damaged.
    """
    hows: dict[str, tuple[Any, str, int]] = {}
    found: dict[str, dict[int, dict[int, list[Score]]]] = {}
    missing: dict[str, None] = {}
    told_of: set[tuple[str, int]] = set()
    for entry in study.entries:
        for run in entry.runs:
            for edits, name, told, path in _stored(run):
                how, metric, count = hows.setdefault(name, (told["how"], told["metric"], len(told["records"])))
                score = _score(told, metric) if told["how"] == how else None
                if score is not None and len(score.records) != count:
                    raise CacheError(
                        str(path), f"{len(score.records)} records of {name}", f"{count}, as elsewhere", REMEDY
                    )
                if score is None:
                    why = f" after {edits} edits: not finite" if told["how"] == how else ": other settings"
                    missing[f"{TITLES.get(name, name)} of {entry.label}{why}"] = None
                    told_of.add((name, entry.slot))
                else:
                    found.setdefault(name, {}).setdefault(entry.slot, {}).setdefault(edits, []).append(score)
    for name, slots in found.items():
        for entry in (one for one in study.entries if one.slot in slots):
            for edits, scores in list(slots[entry.slot].items()):
                if edits and len(scores) < len(entry.runs):  # the others may have collapsed
                    del slots[entry.slot][edits]
                    some = f"after {edits} edits: in {len(scores)} of {len(entry.runs)} orders only"
                    missing[f"{TITLES.get(name, name)} of {entry.label} {some}"] = None
                    told_of.add((name, entry.slot))
    tasks = tuple(
        Task(
            name,
            hows[name][1],
            {slot: {edits: _together(scores) for edits, scores in at.items()} for slot, at in slots.items() if at},
        )
        for name, slots in found.items()
    )
    for task in tasks:
        absent = [one for one in study.entries if one.slot not in task.scores and (task.name, one.slot) not in told_of]
        missing |= {f"{task.title} of {one.label}: {NOT_MEASURED}": None for one in absent}
    return Measured(tasks, tuple(missing))


def plate(study: Study, measured: Measured) -> Plate:
    """Returns the figure."""
    panels = tuple(
        Panel(f"{task.title} ({task.unit})", partial(_draw, study=study, task=task)) for task in measured.tasks
    )
    caption = (
        "What the model as a whole can do, after so many edits; 0 is the unedited model. Shaded: ± the standard error "
        "over records, as lm-evaluation-harness computes it; of several orders, the means of both."
    )
    return Plate(f"{study.key}-abilities", "General abilities", caption, panels, study.entries, measured.missing)


def grid(study: Study, measured: Measured) -> Grid:
    """Returns all points, each with its standard error."""
    heads = [one for task in measured.tasks for one in (f"{task.title} ({task.unit})", f"± {task.title}")]
    lines = []
    for entry in study.entries:
        moments = sorted({edits for task in measured.tasks for edits in task.scores.get(entry.slot, {})})
        for edits in moments:
            fields = [Field(entry.label), Field(str(edits), edits)]
            for task in measured.tasks:
                fields += _fields(task, task.scores.get(entry.slot, {}).get(edits))
            lines.append(Line(entry, tuple(fields)))
    note = "±: standard error. docs/abilities.md says what is asked, and how it is marked."
    return Grid(
        f"{study.key}-abilities", "All points of these curves", ("Method", "Edits", *heads), tuple(lines), note
    )


def _until(study: Study, task: Task, entry: Entry) -> Mapping[int, Score]:
    """An entry's scores up to the moment of the table."""
    scores = task.scores.get(entry.slot, {})
    return {edits: one for edits, one in scores.items() if study.moment is None or edits <= study.moment}


def tests(study: Study, measured: Measured) -> Grid:
    """Returns paired tests, record by record: entries against the unedited model, and with SPHERE against without."""
    rows = []
    for task in (one for one in measured.tasks if one.metric != PERPLEXITY):
        for entry in study.entries:
            own = _until(study, task, entry)
            if 0 in own and len(own) > 1:
                rows.append((entry, "Unedited", task, max(own), _differences(own[max(own)], own[0])))
        for base, entry in study.pairs():
            own, other = (_until(study, task, one) for one in (entry, base))
            common = max((own.keys() & other.keys()) - {0}, default=None)
            if common is not None:
                rows.append((entry, base.label, task, common, _differences(own[common], other[common])))
    ps = [permutation(row[-1], len(rows)) for row in rows]
    lines = [Line(row[0], _tested(*row, p, corrected)) for row, p, corrected in zip(rows, ps, holm(ps), strict=True)]
    heads = ("Entry", "Against", "Task", "Edits", "Records", "Difference (%)", "95 % from", "95 % to", "Up / down")
    note = (
        "Difference on the same records, entry minus the other, at the last moment that both have up to that of the "
        f"comparison. p: {TEST}; "
        "corrected by Holm's method for all tests here. "
        f"Interval: percentile bootstrap over records, {RESAMPLES} samples."
    )
    title = "Paired tests of abilities"
    return Grid(f"{study.key}-abilities-paired", title, (*heads, "p", "p (Holm)"), tuple(lines), note)


# ---- reading ----


def _stored(run: Run) -> list[tuple[int, str, Mapping[str, Any], Path]]:
    """(edits, task, what is kept of it, file) in the order of edits."""
    return [
        (edits, name, told, path_of(run.folder, edits))
        for edits, content in read_tallies(run.folder).items()
        for name, told in content["tasks"].items()
    ]


def _score(told: Mapping[str, Any], metric: str) -> Score | None:
    """A score in the unit of its task; None for one that is not finite."""
    value, stderr, records = (told[key] for key in ("value", "stderr", "records"))
    if None in (value, *records):
        return None
    scale = Task("", metric, {}).scale
    return Score(scale * value, None if stderr is None else scale * stderr, tuple(map(float, records)))


def _together(scores: Sequence[Score]) -> Score:
    errors = [one.stderr for one in scores if one.stderr is not None]
    records = tuple(map(fmean, zip(*(one.records for one in scores), strict=True)))
    return Score(fmean(one.value for one in scores), fmean(errors) if errors else None, records)


# ---- what is shown ----


def _draw(pen: Pen, study: Study, task: Task) -> None:
    for entry in study.entries:
        at = task.scores.get(entry.slot)
        if not at:
            continue
        edits = sorted(at)
        values = [min(at[number].value, TOP) for number in edits]
        tips = [f"{entry.label}\n{number} edits: {_text(at[number])}" for number in edits]
        pen.line(entry, edits, values, tips, len(edits) <= MANY)
        errors = [at[number].stderr or 0.0 for number in edits]
        if any(errors):
            low, high = ([one + side * error for one, error in zip(values, errors, strict=True)] for side in (-1, 1))
            pen.band(entry, edits, low, high)
    pen.axis.set_xlabel("edits")
    shown = [min(one.value, TOP) for at in task.scores.values() for one in at.values()]
    if task.metric == PERPLEXITY and max(shown) > STEEP * min(shown):
        pen.axis.set_yscale("log")
    if task.metric in ("exact_match", "acc"):
        pen.axis.set_ylim(bottom=0.0)


def _text(score: Score) -> str:
    return written(score.value, 1) + ("" if score.stderr is None else f" ± {written(score.stderr, 1)}")


def _fields(task: Task, score: Score | None) -> list[Field]:
    if score is None:
        return [Field(NOT_MEASURED), Field("–")]
    decimals = 2 if task.metric == PERPLEXITY else 1
    error = Field("–") if score.stderr is None else Field(written(score.stderr, decimals), score.stderr)
    return [Field(written(score.value, decimals), score.value), error]


def _differences(one: Score, other: Score) -> list[float]:
    return [mine - theirs for mine, theirs in zip(one.records, other.records, strict=True)]


def _tested(
    entry: Entry, against: str, task: Task, edits: int, differences: Sequence[float], p: float, corrected: float
) -> tuple[Field, ...]:
    low, high = bootstrap(differences)
    numbers = [None if one is None else 100.0 * one for one in (fmean(differences), low, high)]
    fields = [Field("–") if one is None else Field(written(one, 1), one) for one in numbers]
    sides = f"{sum(one > 0 for one in differences)} / {sum(one < 0 for one in differences)}"
    names = (Field(entry.label), Field(against), Field(task.title), Field(str(edits), edits))
    count = Field(str(len(differences)), len(differences))
    return (*names, count, *fields, Field(sides), Field(written_p(p), p), Field(written_p(corrected), corrected))
