"""The figures of a sweep: every metric of every method over the grid, as heatmaps of differences to the method alone.

Two keys with several values make up a heatmap, the others small multiples of it; a single one gives bars.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from sphere_plugin.report.numbers import Metric, shown, shown_value, written_p
from sphere_plugin.report.recommend import Choice
from sphere_plugin.report.style import FONT, INK, MUTED, Panel, Pen, Plate, colour
from sphere_plugin.report.sweep import LEVEL, SYMBOLS, Cell, Sweep, in_words, value_in_words

COLOUR_MAP: Final = "RdBu"  # red: worse, blue: better; told apart without colour vision
DARK, LIGHT = "#101317", "#ffffff"  # what is written on a cell, whatever the page's colours
MARK: Final = "*"


def plates(sweep: Sweep, chosen: Sequence[Choice]) -> dict[str, Plate]:
    """One figure for each method."""
    return {choice.base: _plate(sweep, choice) for choice in chosen}


def _plate(sweep: Sweep, choice: Choice) -> Plate:
    cells = sweep.projected(choice.base)
    name, title = f"{sweep.key}-{choice.base}", f"{cells[0].method if cells else choice.base} over the grid"
    several = [key for key, values in sweep.axes.items() if len(values) > 1]
    panels, missing = [], []
    for metric in sweep.metrics:
        if all(sweep.difference(cell, metric) is None for cell in cells):
            missing.append(f"{metric.title}: not available: nothing to compare with the method alone")
            continue
        panels += _panels(sweep, choice, metric, cells, several)
    for cell in cells:
        reasons = {
            sweep.value(cell, metric).reason for metric in sweep.metrics if sweep.value(cell, metric).mean is None
        }
        missing += [f"{cell.label}: {reason}" for reason in sorted(reasons) if reason.startswith("not available")]
    return Plate(name, title, _caption(choice, cells, several), tuple(panels), (), tuple(missing))


def _panels(
    sweep: Sweep, choice: Choice, metric: Metric, cells: Sequence[Cell], several: Sequence[str]
) -> list[Panel]:
    """A heatmap for each combination of values of all keys but the first two; bars where there are not two."""
    axes = sweep.axes
    if len(several) < 2:
        key = several[0] if several else next(iter(axes))
        return [Panel(_title(metric, {}), partial(_bars, sweep=sweep, metric=metric, cells=cells, key=key))]
    first, second, *others = several
    found = []
    for values in itertools.product(*(axes[key] for key in others)):
        fixed = dict(zip(others, values, strict=True))
        part = [cell for cell in cells if all(cell.values[key] == value for key, value in fixed.items())]
        draw = partial(
            _heatmap, sweep=sweep, metric=metric, cells=part, keys=(first, second), choice=choice,
            top=top(sweep, metric),
        )  # fmt: skip
        found.append(Panel(_title(metric, fixed), draw))
    return found


def _title(metric: Metric, fixed: Mapping[str, Any]) -> str:
    unit = {"energy": "|ΔHE|, 10⁻⁴"}.get(metric.name, metric.unit)
    return f"{metric.title} ({unit})" + (f": {in_words(fixed)}" if fixed else "")


def top(sweep: Sweep, metric: Metric) -> float:
    """The difference at which the colours end: the largest of any method, no less than the ± of a method alone."""
    sizes = [abs(one) for cell in sweep.projected() if (one := sweep.difference(cell, metric)) is not None]
    halves = [sweep.value(cell, metric).half or 0.0 for cell in sweep.cells if cell.against is None]
    return max([*sizes, *halves, 1e-12])


def _heatmap(
    pen: Pen, sweep: Sweep, metric: Metric, cells: Sequence[Cell], keys: tuple[str, str], choice: Choice, top: float
) -> None:
    import matplotlib
    import numpy

    rows, columns = (sweep.axes[key] for key in keys)
    places = {(rows.index(cell.values[keys[0]]), columns.index(cell.values[keys[1]])): cell for cell in cells}
    better = numpy.full((len(rows), len(columns)), numpy.nan)
    for place, cell in places.items():
        gap = sweep.difference(cell, metric)
        better[place] = numpy.nan if gap is None else gap * metric.better
    axis, paint = pen.axis, matplotlib.colormaps[COLOUR_MAP]
    axis.grid(visible=False)
    axis.pcolormesh(
        numpy.ma.masked_invalid(better), cmap=paint, vmin=-top, vmax=top, edgecolors="white", linewidth=1.5
    )
    size = min(FONT, 38.0 / len(columns), 24.0 / len(rows))
    for (row, column), cell in places.items():
        known = bool(numpy.isfinite(better[row, column]))
        shade = paint(0.5 + float(better[row, column]) / top / 2)[:3] if known else (1.0, 1.0, 1.0)
        ink = LIGHT if known and numpy.dot(shade, (0.299, 0.587, 0.114)) < 0.5 else DARK if known else MUTED
        middle = column + 0.5, row + 0.5
        _write(axis, middle, size, ink, written_in(sweep, cell, metric))
        _frame(axis, middle, ink, "-" if cell is choice.best else ":" if cell.default else "")
        (target,) = axis.plot(*([one] for one in middle), "s", color=ink, alpha=0.0, markersize=2.4 * size)
        pen.claim(target, None, [tip(sweep, cell, metric)])
    for side, key, values in ((axis.xaxis, keys[1], columns), (axis.yaxis, keys[0], rows)):
        side.set_ticks([number + 0.5 for number in range(len(values))], list(map(value_in_words, values)))
        side.set_tick_params(length=0)
        side.set_label_text(SYMBOLS.get(key, key))
    axis.yaxis.label.set_rotation(0 if keys[0] in SYMBOLS else 90)
    axis.spines[:].set_visible(False)


def _write(axis: Any, middle: tuple[float, float], size: float, ink: str, lines: Sequence[str]) -> None:
    """The difference, and below it, smaller, what it leads to."""
    for line, shift, smaller in zip(lines, (0.14, -0.2), (1.0, 0.8), strict=False):
        at = middle[0], middle[1] + shift
        axis.text(*at, line, color=ink, fontsize=smaller * size, ha="center", va="center")


def _frame(axis: Any, middle: tuple[float, float], ink: str, line: str) -> None:
    if line:
        xs, ys = ((one - 0.45, one + 0.45, one + 0.45, one - 0.45, one - 0.45) for one in middle)
        axis.plot(xs, (ys[0], ys[0], ys[1], ys[1], ys[0]), color=ink, linestyle=line, linewidth=1.4)


def _bars(pen: Pen, sweep: Sweep, metric: Metric, cells: Sequence[Cell], key: str) -> None:
    axis, scale = pen.axis, metric.scale
    ink = next((colour(cell.entry) for cell in cells if cell.entry is not None), INK)
    axis.axhline(0.0, color=MUTED, linewidth=1.0)
    for place, cell in enumerate(cells):
        gap, test = sweep.difference(cell, metric), sweep.test(cell, metric)
        if gap is None:
            continue
        axis.bar([place], [scale * gap], 0.6, facecolor=ink, alpha=0.35, edgecolor=ink)
        if test is not None and test.low is not None and test.high is not None:
            axis.plot([place] * 2, [scale * test.low, scale * test.high], color=INK, linewidth=1.0)
        (target,) = axis.plot([place], [scale * gap], "o", color=ink, markersize=5)
        pen.claim(target, None, [tip(sweep, cell, metric)])
        above = scale * max(gap, (test.high if test is not None and test.high is not None else gap), 0.0)
        pen.text(None, place, above, written_in(sweep, cell, metric)[0], ha="center", va="bottom")
    words = [value_in_words(cell.values[key]) for cell in cells]
    axis.set_xticks(range(len(cells)), words, rotation=20 if max(map(len, words)) > 8 else 0)
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel(SYMBOLS.get(key, key))
    axis.grid(visible=False, axis="x")
    axis.margins(x=0.3 if len(cells) < 3 else 0.1, y=0.16)


def written_in(sweep: Sweep, cell: Cell, metric: Metric) -> tuple[str, ...]:
    """What is written in a cell: the difference, marked where it is clear, and the value."""
    gap, value = sweep.difference(cell, metric), sweep.value(cell, metric)
    if gap is None:
        return ("–",)
    return signed(metric, gap) + (MARK if sweep.clear(cell, metric) else ""), shown(metric, value.mean)


def signed(metric: Metric, gap: float) -> str:
    """A difference as it is written everywhere, with its sign."""
    text = shown(metric, gap)
    return f"+{text}" if gap > 0 and float(text) else text


def tip(sweep: Sweep, cell: Cell, metric: Metric) -> str:
    """What a cell tells under the pointer."""
    gap, test = sweep.difference(cell, metric), sweep.test(cell, metric)
    told = [cell.label, f"{metric.title}: {shown_value(metric, sweep.value(cell, metric))} {metric.unit}"]
    if gap is not None:
        told.append(f"{signed(metric, gap)} against {sweep.alone(cell).label}")
    if test is not None and test.low is not None and test.holm is not None:
        between = f"{shown(metric, test.low)} to {shown(metric, test.high)}"
        told.append(f"95 %: {between}, p (Holm) {written_p(test.holm)}, {test.n} records")
    return "\n".join(told)


def _caption(choice: Choice, cells: Sequence[Cell], several: Sequence[str]) -> str:
    if len(several) < 2:
        return f"Difference to the method alone; whiskers: 95 % bootstrap interval over records. {_marks()}"
    dotted = "; dotted: the default" if any(cell.default and cell is not choice.best for cell in cells) else ""
    return (
        "Difference to the method alone, and below it the value itself. Blue: better, red: worse; a metric has one "
        "scale for all methods, up to the largest difference or the ± of a method alone. "
        f"{_marks()} Framed: the highest score{dotted}."
    )


def _marks() -> str:
    return f"{MARK} clear: p < {LEVEL:g} in the paired test over records, after Holm's correction over the grid."
