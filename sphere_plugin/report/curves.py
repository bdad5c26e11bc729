"""Scores and hyperspherical energy against edits, and how they go together (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import METRICS, Metric, shown, shown_spread, shown_value, written
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import Panel, Pen, Plate, decades

ENERGY: Final = next(metric for metric in METRICS if metric.name == "energy")
FEWEST: Final = 3  # points below which there is no rank correlation to speak of
TOP: Final = 1e30  # perplexities above it are drawn there
STEEP: Final = 30.0  # ratio of perplexities above which their axis is logarithmic
MANY: Final = 40  # points above which a curve is drawn without them


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ between the change of HE and a metric, over the checkpoints after an edit.

    Attributes:
        entry, metric: of what.
        rho: None if there is none; `reason` then says why.
        n: how many checkpoints.
    """

    entry: Entry
    metric: Metric
    rho: float | None
    n: int
    reason: str = ""

    @property
    def text(self) -> str:
        """As it is written everywhere."""
        return self.reason if self.rho is None else written(self.rho, 2)


def correlations(study: Study) -> list[Correlation]:
    """Returns ρ for every entry and metric that has a curve."""
    metrics = [metric for metric in drawn(study) if metric is not ENERGY]
    return [_correlation(entry, metric) for entry in study.entries for metric in metrics]


def drawn(study: Study) -> list[Metric]:
    """Returns the metrics that have a number after an edit."""
    return [metric for metric in study.metrics() if study.has(metric)]


def curve(entry: Entry, metric: Metric) -> list[tuple[int, float]]:
    """Returns (edits, value) at the checkpoints of an entry, the unedited model included."""
    edits = sorted({0 for run in entry.runs if run.at(0)} | set(entry.moments()))
    values = ((number, entry.value(metric, number).mean) for number in edits)
    return [(number, value) for number, value in values if value is not None]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> tuple[float | None, str]:
    """Returns ρ, or None and why there is none."""
    from scipy.stats import spearmanr

    if len(xs) < FEWEST:
        return None, f"not available: {len(xs)} of at least {FEWEST} checkpoints"
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return None, "not available: one of the two never changes"
    return float(spearmanr(xs, ys).statistic), ""


def plate(study: Study) -> Plate:
    """Returns the figure."""
    metrics = drawn(study)
    found = {(one.entry.slot, one.metric.name): one for one in correlations(study)}
    panels = tuple(
        Panel(f"{metric.title} ({metric.unit})", partial(_draw, study=study, metric=metric, found=found))
        for metric in metrics
    )
    missing = tuple(f"{metric.title}: not scored" for metric in study.metrics() if metric not in metrics)
    caption = (
        "All edits so far are scored at every checkpoint. The number at the end of a curve is Spearman's ρ between "
        "the change of hyperspherical energy and that score, over the checkpoints after an edit. Checkpoints of one "
        "run depend on each other, so there is no p value. Shaded: from the lowest to the highest of several orders."
    )
    return Plate(f"{study.key}-curves", "Scores and energy against edits", caption, panels, study.entries, missing)


def _correlation(entry: Entry, metric: Metric) -> Correlation:
    energies = dict(curve(entry, ENERGY))
    both = [(energies[edits], value) for edits, value in curve(entry, metric) if edits and edits in energies]
    if not energies:
        return Correlation(entry, metric, None, 0, "not available: no energy")
    rho, reason = spearman(*zip(*both, strict=True)) if both else (None, "not scored")
    return Correlation(entry, metric, rho, len(both), reason)


def _draw(pen: Pen, study: Study, metric: Metric, found: dict[tuple[int, str], Correlation]) -> None:
    ends: list[tuple[float, Entry, str]] = []
    for entry in study.entries:
        points = curve(entry, metric)
        if not points:
            continue
        edits, heights = [number for number, _ in points], [min(value * metric.scale, TOP) for _, value in points]
        pen.line(entry, edits, heights, [_tip(entry, metric, number) for number in edits], len(points) <= MANY)
        spans = [entry.value(metric, number).each or (value,) for number, value in points]
        if any(len(span) > 1 for span in spans):
            low, high = ([min(side(span) * metric.scale, TOP) for span in spans] for side in (min, max))
            pen.band(entry, edits, low, high)
        one = found.get((entry.slot, metric.name))
        if one is not None and one.rho is not None:
            ends.append((heights[-1], entry, one.text))
    _finish(pen.axis, metric)
    _label_ends(pen, ends)


def _tip(entry: Entry, metric: Metric, edits: int) -> str:
    value = entry.value(metric, edits)
    spread = shown_spread(metric, value)
    return f"{entry.label}\n{edits} edits: {shown_value(metric, value)}" + (
        f"\n{len(value.each)} orders: {spread}" if spread else ""
    )


def _finish(axis: Any, metric: Metric) -> None:
    axis.set_xlabel("edits")
    axis.margins(x=0.04)
    values = [value for line in axis.lines for value in line.get_ydata()]
    if metric.name == "perplexity" and max(values) > STEEP * min(values):
        decades(axis, "y")
    low, high = axis.get_ylim()
    if metric.unit == "%":
        axis.set_ylim(min(0.0, low), max(high, 1.0))
    if metric is ENERGY:
        axis.axhline(0.0, color=axis.xaxis.label.get_color(), linewidth=0.8)


def _label_ends(pen: Pen, ends: Sequence[tuple[float, Entry, str]]) -> None:
    """Write ρ right of the axes, at the height of the curves' ends but never on top of each other."""
    heights = spread_out([_height(pen.axis, height) for height, _, _ in ends], 0.075)
    for height, (_, entry, text) in zip(heights, ends, strict=True):
        pen.text(entry, 1.02, height, text, transform=pen.axis.transAxes, va="center", clip_on=False)
    if ends:
        pen.text(None, 1.02, 1.04, "ρ", transform=pen.axis.transAxes, va="bottom", clip_on=False)


def _height(axis: Any, value: float) -> float:
    """The height of a value as a share of the axes."""
    place = axis.transAxes.inverted().transform(axis.transData.transform((0.0, value)))
    return float(place[1])


def spread_out(places: Sequence[float], apart: float) -> list[float]:
    """Returns places in [0, 1] near the given ones, in their order, at least ``apart`` where they fit."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    floor = 0.0
    for index in order:
        moved[index] = floor = max(moved[index], floor)
        floor += apart
    ceiling = 1.0
    for index in reversed(order):
        moved[index] = ceiling = min(moved[index], ceiling)
        ceiling -= apart
    return moved


def points_grid(study: Study) -> Grid:
    """Returns all points of all curves."""
    metrics = drawn(study)
    lines = [
        Line(entry, (Field(entry.label), Field(str(edits), edits), *(_field(entry, one, edits) for one in metrics)))
        for entry in study.entries
        for edits in sorted({0 for run in entry.runs if run.at(0)} | set(entry.moments()))
    ]
    heads = ("Method", "Edits", *(f"{metric.title} ({metric.unit})" for metric in metrics))
    return Grid(f"{study.key}-curves", "All points of the curves", heads, tuple(lines))


def correlations_grid(study: Study) -> Grid:
    """Returns ρ of every entry and metric."""
    found = correlations(study)
    heads = ("Method", "Checkpoints", *dict.fromkeys(one.metric.title for one in found))
    lines = []
    for entry in study.entries:
        own = [one for one in found if one.entry is entry]
        count = max((one.n for one in own), default=0)
        fields = [Field(entry.label), Field(str(count), count), *(Field(one.text, one.rho) for one in own)]
        lines.append(Line(entry, tuple(fields)))
    return Grid(
        f"{study.key}-spearman", "Spearman's ρ between the change of energy and each score", heads, tuple(lines)
    )


def _field(entry: Entry, metric: Metric, edits: int) -> Field:
    value = entry.value(metric, edits)
    if value.mean is None:
        return Field(value.reason)
    return Field(shown(metric, value.mean), value.mean * metric.scale)
