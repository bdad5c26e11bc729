"""Every method before and after SPHERE was added to it (the paper's Figure 7)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import ACCURACIES, Metric, Value, shown, shown_value, written
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import INK, Panel, Pen, Plate, colour


@dataclass(frozen=True)
class Pair:
    """A method without SPHERE and with it, by one metric."""

    base: Entry
    entry: Entry
    metric: Metric
    before: Value
    after: Value

    @property
    def gain(self) -> float | None:
        """The relative improvement; None where there is nothing to be relative to."""
        if self.before.mean is None or self.after.mean is None or not self.before.mean:
            return None
        return self.after.mean / self.before.mean - 1.0

    @property
    def before_text(self) -> str:
        """The score without SPHERE."""
        return shown(self.metric, self.before.mean)

    @property
    def after_text(self) -> str:
        """The score with SPHERE."""
        return shown(self.metric, self.after.mean)

    @property
    def gain_text(self) -> str:
        """As it is written everywhere."""
        lost = next((value.reason for value in (self.before, self.after) if value.mean is None), None)
        if lost is not None:
            return lost.partition(":")[0]
        if self.gain is None:
            return "from 0"
        text = written(100.0 * self.gain, 1)
        return f"{'+' if self.gain >= 0 else ''}{text} %"


def gains(study: Study) -> list[Pair]:
    """Returns all pairs by all accuracies, at the study's moment."""
    edits = study.moment
    if edits is None:
        return []
    return [
        Pair(base, entry, metric, base.value(metric, edits), entry.value(metric, edits))
        for metric in ACCURACIES
        for base, entry in study.pairs()
    ]


def plate(study: Study) -> Plate:
    """Returns the figure."""
    found = gains(study)
    panels, missing = [], []
    for metric in ACCURACIES:
        pairs = [pair for pair in found if pair.metric is metric and None not in (pair.before.mean, pair.after.mean)]
        if pairs:
            panels.append(Panel(f"{metric.title} (%)", partial(_draw, pairs=pairs, metric=metric)))
        else:
            nobody = "no two entries x and x+sphere with the same targets"
            why = "no score with SPHERE and without" if study.pairs() else nobody
            missing.append(f"{metric.title}: not available: {why}")
    caption = (
        f"Hatched: the method alone; filled: with SPHERE; after {study.moment} edits. Whiskers: 95 % half width. "
        "Above the bars, the relative change."
    )
    return Plate(f"{study.key}-bars", "With and without SPHERE", caption, tuple(panels), (), tuple(missing))


def _draw(pen: Pen, pairs: list[Pair], metric: Metric) -> None:
    axis, width = pen.axis, 0.36
    for place, pair in enumerate(pairs):
        tops = []
        for entry, value, shift in ((pair.base, pair.before, -width / 2), (pair.entry, pair.after, width / 2)):
            height, half = (0.0 if one is None else one * metric.scale for one in (value.mean, value.half))
            _bar(pen, entry, place + shift, height, width * 0.92)
            if half:
                (line,) = axis.plot([place + shift] * 2, [height - half, height + half], color=INK, linewidth=1.0)
                pen.claim(line, entry)
            tip = f"{entry.label}\n{shown_value(metric, value)} %"
            (target,) = axis.plot([place + shift], [height], "o", color=colour(entry), markersize=5)
            pen.claim(target, entry, [tip])
            tops.append(height + half)
        pen.text(pair.entry, place, 1.02 * max(tops), pair.gain_text, ha="center", va="bottom")
    axis.set_xticks(range(len(pairs)), [pair.base.label for pair in pairs], rotation=20 if len(pairs) > 4 else 0)
    axis.tick_params(axis="x", length=0)
    beside = 0.6 + max(0, 3 - len(pairs)) / 2  # a single pair is not as wide as the figure
    axis.set_xlim(-beside, len(pairs) - 1 + beside)
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.14)
    axis.set_ylim(bottom=0.0)


def _bar(pen: Pen, entry: Entry, place: float, height: float, width: float) -> None:
    look: dict[str, Any] = {"facecolor": colour(entry)}
    if not entry.sphere:
        look = {"facecolor": "none", "hatch": "////"}
    (bar,) = pen.axis.bar([place], [height], width, edgecolor=colour(entry), **look)
    pen.claim(bar, entry)


def grid(study: Study) -> Grid:
    """Returns one line for each pair and accuracy."""
    lines = []
    for pair in gains(study):
        scale, gain = pair.metric.scale, pair.gain
        fields = [Field(pair.metric.title), Field(pair.base.label)]
        fields += [
            Field(shown(pair.metric, value.mean), None if value.mean is None else value.mean * scale)
            for value in (pair.before, pair.after)
        ]
        fields.append(Field(pair.gain_text, None if gain is None else 100.0 * gain))
        lines.append(Line(pair.entry, tuple(fields)))
    heads = ("Metric", "Method", "Alone (%)", "With SPHERE (%)", "Relative change (%)")
    return Grid(f"{study.key}-bars", "With and without SPHERE", heads, tuple(lines))
