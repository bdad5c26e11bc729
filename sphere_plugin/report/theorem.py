"""The paper's theorem on real updates: both sides of it, what breaks it, and the bound by single neurons (eq. 33)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

from sphere_plugin.report.diagnosed import Diagnosed, Row, brief
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import MUTED, Panel, Pen, Plate, decades

MANY: Final = 300  # points of an entry above which each batch shows only the weight that is nearest to the line


@dataclass(frozen=True)
class Test:
    """One of the inequalities.

    Attributes:
        path: where its terms are in a diagnosis.
        rows, update: of what, in words.
        title: above its chart.
    """

    path: str
    rows: str
    update: str
    title: str


TESTS: Final = (
    Test("theorem.batch.raw", "as they are", "each batch", "ΔV against (ΔHE / K)², each batch"),
    Test("theorem.run.raw", "as they are", "all so far", "ΔV against (ΔHE / K)², all edits so far"),
    Test("theorem.batch.unit", "unit length", "each batch", "The same on the sphere, each batch"),
    Test("theorem.run.unit", "unit length", "all so far", "The same on the sphere, all edits so far"),
)


@dataclass(frozen=True)
class Point:
    """Both sides for one weight and batch.

    Attributes:
        row: of what.
        bound: the side that is to be the smaller one, (ΔHE / K)² or |ΔHE| / 2.
        value: the other, ΔV or Σk C_k ‖Δwk‖.
    """

    row: Row
    bound: float
    value: float

    @property
    def ratio(self) -> float:
        """Above 1 where the inequality is broken."""
        return self.bound / self.value if self.value else 0.0


def points(rows: Sequence[Row], test: Test) -> list[Point]:
    """Returns both sides of the theorem."""
    found = []
    for row in rows:
        ratio, value = (row.number(f"{test.path}.{name}") for name in ("ratio", "perturbation"))
        if ratio is not None and value is not None:
            found.append(Point(row, ratio * value, value))
    return found


def neuron_points(rows: Sequence[Row], test: Test) -> list[Point]:
    """Returns both sides of eq. 33, s = 2."""
    found = []
    for row in rows:
        change, value = (row.number(f"{test.path}.{name}") for name in ("change", "moved"))
        if change is not None and value is not None:
            found.append(Point(row, abs(change) / 2.0, value))
    return found


def plate(study: Study, diagnosed: Diagnosed) -> Plate:
    """Returns the figure."""
    draw = partial(_draw, study=study, diagnosed=diagnosed)
    panels = [Panel(test.title, partial(draw, test=test)) for test in TESTS if points(diagnosed.rows, test)]
    if neuron_points(diagnosed.rows, TESTS[0]):
        title = "Eq. 33: Σ Cₖ‖Δwₖ‖ against |ΔHE|, each batch"
        panels.append(Panel(title, partial(draw, test=TESTS[0], neurons=True)))
    caption = (
        "One point for each weight and batch; of more than "
        f"{MANY} in an entry, the weight of each batch that comes nearest. The theorem keeps all points above the "
        "line. ΔHE is the proof's: s = 2, neurons as they are, each pair in both orders (eq. 26); on the sphere it is "
        "that of neurons at unit length, the energy of eq. 5, and ΔV the squared way they have gone there. ΔV stands "
        "for inputs that form an orthonormal basis. All edits so far: from the unedited weights in one step."
    )
    return Plate(
        f"{study.key}-theorem", "The theorem, tested", caption, tuple(panels), study.entries, diagnosed.missing
    )


def grid(study: Study, diagnosed: Diagnosed) -> Grid:
    """Returns how often each inequality is broken, and how much of it is reached."""
    lines = [
        _line(entry, test, diagnosed.of(entry)) for entry in study.entries for test in TESTS if diagnosed.of(entry)
    ]
    heads = (
        "Method",
        "Neurons",
        "Update",
        "Tested",
        "Broken",
        "Most reached",
        "Median",
        "Eq. 33 broken",
        "Most reached",
    ) + (("Largest step", "Broken for real inputs"))
    note = (
        "Reached: (ΔHE / K)² / ΔV and |ΔHE| / (2 Σ Cₖ‖Δwₖ‖), above 1 where the inequality is broken. Largest step: "
        "‖Δwᵢ − Δwⱼ‖ / ‖wᵢ − wⱼ‖, which the proof takes for small. Real inputs: ΔV of as many tokens of the held-out "
        "text as the weight has columns, scaled to unit mean square, in place of an orthonormal basis."
    )
    return Grid(f"{study.key}-theorem", "How often the theorem holds", heads, tuple(lines), note)


def violations(study: Study, diagnosed: Diagnosed) -> Grid:
    """Returns every update that breaks the theorem, and why."""
    broken = [
        (entry, test, point)
        for entry in study.entries
        for test in TESTS
        for point in points(diagnosed.of(entry), test)
        if point.ratio > 1
    ]
    lines = tuple(
        Line(
            entry,
            (
                Field(entry.label),
                Field(str(point.row.edits), point.row.edits),
                Field(point.row.weight),
                Field(test.rows),
                Field(test.update),
                _number(point.ratio),
                _number(point.row.number(f"{test.path}.change")),
                _number(point.row.number(f"{test.path}.first_order")),
                _number(point.row.number(f"{test.path}.largest_step")),
                Field(reason(point, test)),
            ),
        )
        for entry, test, point in broken
    )
    heads = ("Method", "Edits", "Weight", "Neurons", "Update", "Reached", "ΔHE", "First order", "Largest step", "Why")
    note = "First order: the part of ΔHE that is linear in the update, for which the theorem always holds."
    return Grid(f"{study.key}-violations", "Updates that break the theorem", heads, lines, note)


def reason(point: Point, test: Test) -> str:
    """Returns why an update breaks the theorem: which assumption it does not keep."""
    change = point.row.number(f"{test.path}.change") or 0.0
    step = point.row.number(f"{test.path}.largest_step") or 0.0
    if change > 0:
        return "rounding: where the energy falls, it holds for every update"
    size = "no small step: it passes the distance of two neurons" if step >= 1 else "no small step"
    return f"neurons come nearer by up to {brief(step)} of their distance, {size}"


def _line(entry: Entry, test: Test, rows: Sequence[Row]) -> Line:
    ratios = [point.ratio for point in points(rows, test)]
    single = [point.ratio for point in neuron_points(rows, test)]
    steps = [step for row in rows if (step := row.number(f"{test.path}.largest_step")) is not None]
    fields = [Field(entry.label), Field(test.rows), Field(test.update), _count(len(ratios)), _count(_broken(ratios))]
    fields += [_number(max(ratios, default=None)), _number(median(ratios) if ratios else None)]
    fields += [_count(_broken(single)), _number(max(single, default=None)), _number(max(steps, default=None))]
    return Line(entry, (*fields, _real(rows, test)))


def _real(rows: Sequence[Row], test: Test) -> Field:
    """How many updates break the theorem where ΔV is that of real inputs; told of single batches only."""
    if test is not TESTS[0]:
        return Field("–")
    both = [(point.ratio, point.row.number("inputs.text.alignment")) for point in points(rows, test)]
    known = [ratio > share for ratio, share in both if share is not None]
    return _count(sum(known)) if known else Field("–")


def _broken(ratios: Sequence[float]) -> int:
    return sum(ratio > 1 for ratio in ratios)


def _count(number: int) -> Field:
    return Field(str(number), number)


def _number(value: float | None) -> Field:
    return Field(brief(value), value)


def _draw(pen: Pen, study: Study, diagnosed: Diagnosed, test: Test, neurons: bool = False) -> None:
    of = neuron_points if neurons else points
    every: list[Point] = []
    for entry in study.entries:
        found = of(diagnosed.of(entry), test)
        every += found
        shown = [point for point in _few(found) if point.bound > 0 and point.value > 0]
        if shown:
            tips = [f"{entry.label}\n{_tip(point)}" for point in shown]
            pen.dots(entry, [point.bound for point in shown], [point.value for point in shown], tips)
    drawn = [point for point in every if point.bound > 0 and point.value > 0]
    if drawn:
        decades(pen.axis, "x", "y")
        ends = [
            min(min(point.bound, point.value) for point in drawn),
            max(max(point.bound, point.value) for point in drawn),
        ]
        (line,) = pen.axis.plot(ends, ends, color=MUTED, linewidth=1.0)
        pen.claim(line, None)
    pen.axis.set_xlabel("|ΔHE|, pairs once" if neurons else "(ΔHE / K)²")
    broken = _broken([point.ratio for point in every])
    text = f"{broken} of {len(every)} below the line"
    pen.text(None, 0.98, 0.03, text, transform=pen.axis.transAxes, ha="right", va="bottom")


def _few(found: Sequence[Point]) -> list[Point]:
    """All points, or of each batch the one with the largest ratio."""
    if len(found) <= MANY:
        return list(found)
    most: dict[tuple[object, int], Point] = {}
    for point in found:
        key = (point.row.run, point.row.edits)
        if key not in most or point.ratio > most[key].ratio:
            most[key] = point
    return list(most.values())


def _tip(point: Point) -> str:
    sides = f"{brief(point.value)} against {brief(point.bound)}: {brief(point.ratio)} reached"
    return f"{point.row.edits} edits, {point.row.weight}\n{sides}"
