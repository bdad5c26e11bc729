"""What changes of energy do to accuracy, from each checkpoint to the next (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final

from sphere_plugin.report.curves import ENERGY
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import ACCURACIES, Metric, measure, shown, written
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import MUTED, Panel, Pen, Plate, colour, dash

FEWEST: Final = 3
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Step:
    """From one checkpoint to the next: changes of the relative energy and of an accuracy, and where."""

    energy: float
    accuracy: float
    where: str


@dataclass(frozen=True)
class Regression:
    """A least-squares line with Pearson's r; steps of one run depend on each other, so there is no p value.

    Attributes:
        label: of which points.
        metric: of which accuracy.
        slope: accuracy per relative energy.
        intercept, r, n: as usual; None where there is no line.
        reason: why there is none.
    """

    label: str
    metric: Metric
    slope: float | None
    intercept: float | None
    r: float | None
    n: int
    reason: str = ""


@dataclass(frozen=True)
class Ellipse:
    """A confidence ellipse: centre, full axes, angle in degrees of the first axis."""

    centre: tuple[float, float]
    axes: tuple[float, float]
    angle: float


def steps(entry: Entry, metric: Metric) -> list[Step]:
    """Returns the steps of all runs of an entry, from the first checkpoint after an edit on."""
    found = []
    for run in entry.runs:
        points = [
            (one.edits, measure(run, one, ENERGY).mean, measure(run, one, metric).mean)
            for one in run.checkpoints
            if one.edits
        ]
        for (start, he, accuracy), (end, later_he, later) in pairwise(points):
            if None not in (he, accuracy, later_he, later):
                where = f"{entry.label}\n{start} to {end} edits"
                found.append(Step(later_he - he, later - accuracy, where))  # type: ignore[operator]
    return found


def fit(label: str, metric: Metric, points: Sequence[Step]) -> Regression:
    """Returns the regression line of accuracy on energy."""
    from scipy.stats import linregress

    xs, ys, count = [point.energy for point in points], [point.accuracy for point in points], len(points)
    reason = ""
    if count < FEWEST:
        reason = f"not available: {count} of at least {FEWEST} steps"
    elif len(set(xs)) == 1 or len(set(ys)) == 1:
        reason = "not available: one of the two never changes"
    if reason:
        return Regression(label, metric, None, None, None, count, reason)
    line = linregress(xs, ys)
    slope, intercept, r = (float(one) for one in (line.slope, line.intercept, line.rvalue))
    return Regression(label, metric, slope, intercept, r, count)


def regressions(study: Study) -> list[Regression]:
    """Returns the line of every entry and that of all points together, for every accuracy."""
    found = []
    for metric in ACCURACIES:
        each = [(entry, steps(entry, metric)) for entry in study.entries]
        if any(points for _, points in each):
            found += [fit(entry.label, metric, points) for entry, points in each]
            found.append(fit("All", metric, [point for _, points in each for point in points]))
    return found


def ellipse(xs: Sequence[float], ys: Sequence[float], share: float = CONFIDENCE) -> Ellipse | None:
    """Returns the ellipse that holds ``share`` of a normal distribution with the points' mean and covariance.

    None for fewer than three points, or where they do not spread.
    """
    import numpy
    from scipy.stats import chi2

    if len(xs) < FEWEST:
        return None
    covariance = numpy.cov(numpy.array([xs, ys], dtype=float))
    values, vectors = numpy.linalg.eigh(covariance)
    if not values[-1] > 0:
        return None
    lengths = 2.0 * numpy.sqrt(numpy.clip(values, 0.0, None) * chi2.ppf(share, 2))
    angle = numpy.degrees(numpy.arctan2(vectors[1, -1], vectors[0, -1]))
    centre = float(numpy.mean(xs)), float(numpy.mean(ys))
    return Ellipse(centre, (float(lengths[-1]), float(lengths[0])), float(angle))


def plate(study: Study) -> Plate:
    """Returns the figure."""
    panels, missing = [], []
    for metric in ACCURACIES:
        if any(steps(entry, metric) for entry in study.entries):
            panels.append(Panel(f"Δ {metric.title} (points)", partial(_draw, study=study, metric=metric)))
        else:
            missing.append(f"{metric.title}: not available: needs two checkpoints after an edit, with energies")
    caption = (
        "Each point is the change from one checkpoint to the next, the first edits left out. ΔHE is the change of the "
        "relative energy, above 0 where it rises; the paper's ΔHE (eq. 8) has the other sign. Ellipses hold 95 % of a "
        "normal distribution with a method's mean and covariance; lines are least squares, the grey one over all."
    )
    return Plate(f"{study.key}-scatter", "ΔHE and ΔAcc", caption, tuple(panels), study.entries, tuple(missing))


def _draw(pen: Pen, study: Study, metric: Metric) -> None:
    everything: list[Step] = []
    for entry in study.entries:
        points = steps(entry, metric)
        everything += points
        xs, ys = _scaled(points, metric)
        if not points:
            continue
        tips = [
            f"{one.where}\nΔHE {shown(ENERGY, one.energy)} · {ENERGY.unit}, "
            f"Δ{metric.short} {shown(metric, one.accuracy)} points"
            for one in points
        ]
        pen.dots(entry, xs, ys, tips)
        _ellipse(pen, entry, xs, ys)
        _line(pen, entry, fit(entry.label, metric, points), xs, metric)
    whole = fit("All", metric, everything)
    _line(pen, None, whole, _scaled(everything, metric)[0], metric)
    pen.axis.axhline(0.0, color=MUTED, linewidth=0.6)
    pen.axis.axvline(0.0, color=MUTED, linewidth=0.6)
    pen.axis.set_xlabel(f"ΔHE ({ENERGY.unit})")
    if whole.r is not None:
        text = f"all: r = {written(whole.r, 2)}, n = {whole.n}"
        pen.text(None, 1.0, 1.02, text, transform=pen.axis.transAxes, ha="right", va="bottom")


def _scaled(points: Sequence[Step], metric: Metric) -> tuple[list[float], list[float]]:
    return [one.energy * ENERGY.scale for one in points], [one.accuracy * metric.scale for one in points]


def _ellipse(pen: Pen, entry: Entry, xs: Sequence[float], ys: Sequence[float]) -> None:
    from matplotlib.patches import Ellipse as Patch

    found = ellipse(xs, ys)
    if found is not None:
        patch = Patch(found.centre, *found.axes, angle=found.angle, facecolor=colour(entry), alpha=0.12)
        edge = Patch(found.centre, *found.axes, angle=found.angle, fill=False, edgecolor=colour(entry))
        edge.set_linestyle(dash(entry))
        for one in (patch, edge):
            pen.axis.add_patch(one)
            pen.claim(one, entry)


def _line(pen: Pen, entry: Entry | None, line: Regression, xs: Sequence[float], metric: Metric) -> None:
    if line.slope is None or line.intercept is None:
        return
    ends = (min(xs), max(xs))
    heights = [(line.intercept + line.slope * x / ENERGY.scale) * metric.scale for x in ends]
    look: dict[str, Any] = {"color": MUTED, "linewidth": 2.4, "alpha": 0.6}
    if entry is not None:
        look = {"color": colour(entry), "linestyle": dash(entry), "linewidth": 1.3}
    (drawn,) = pen.axis.plot(ends, heights, **look)
    pen.claim(drawn, entry)


def grid(study: Study) -> Grid:
    """Returns all regression lines."""
    entries = {entry.label: entry for entry in study.entries}
    lines = []
    for one in regressions(study):
        fields = [Field(one.metric.title), Field(one.label), Field(str(one.n), one.n)]
        if one.slope is None or one.r is None:
            fields += [Field(one.reason), Field("–")]
        else:
            slope = one.slope * one.metric.scale / ENERGY.scale
            fields += [Field(written(slope, 3), slope), Field(written(one.r, 2), one.r)]
        lines.append(Line(entries.get(one.label), tuple(fields)))
    heads = ("Metric", "Method", "Steps", f"Slope (points per {ENERGY.unit})", "Pearson's r")
    return Grid(f"{study.key}-regression", "Regression lines", heads, tuple(lines))
