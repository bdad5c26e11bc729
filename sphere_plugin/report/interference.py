"""Hidden interference: what updates do to inputs they were not made for, with SPHERE's projection and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Final

from sphere_plugin.report.curves import MANY
from sphere_plugin.report.diagnosed import KINDS, Diagnosed, brief
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import Panel, Pen, Plate


@dataclass(frozen=True)
class Trace:
    """One number for every batch.

    Attributes:
        title: with its unit.
        of: entry -> (edits, number) for each batch.
    """

    title: str
    of: Callable[[Diagnosed, Entry], list[tuple[int, float]]]


def _of(path: str, factor: float = 1.0, last: bool = False) -> Callable[[Diagnosed, Entry], list[tuple[int, float]]]:
    def curve(diagnosed: Diagnosed, entry: Entry) -> list[tuple[int, float]]:
        return [(edits, factor * value) for edits, value in diagnosed.curve(entry, path, last)]

    return curve


def _left(path: str) -> Callable[[Diagnosed, Entry], list[tuple[int, float]]]:
    """What is left of a number where SPHERE projects the same updates, in per cent."""

    def curve(diagnosed: Diagnosed, entry: Entry) -> list[tuple[int, float]]:
        whole = dict(diagnosed.curve(entry, path))
        kept = diagnosed.curve(entry, f"projected.{path}")
        return [(edits, 100.0 * value / whole[edits]) for edits, value in kept if whole.get(edits)]

    return curve


def _along(diagnosed: Diagnosed, entry: Entry) -> list[tuple[int, float]]:
    """‖ΔW U‖² / ‖ΔW‖² against r / d_in: 1 where an update has no more in the principal space than by chance."""
    found: dict[int, list[float]] = {}
    for row in diagnosed.of(entry):
        share, alpha, rank = (row.number(f"projected.{name}") for name in ("removed_share", "alpha", "rank"))
        width = row.number("width")
        if share is not None and alpha and rank and width:
            found.setdefault(row.edits, []).append(share / (alpha * (2.0 - alpha)) * width / rank)
    return [(edits, fmean(values)) for edits, values in sorted(found.items())]


TRACES: Final = (
    Trace("Right vectors, mean norm", _of("right.mean")),
    Trace("Left vectors of the last weight, mean norm", _of("left.mean", last=True)),
    Trace("Interference on text (% of the output)", _of("inputs.text.relative", 100.0)),
    Trace("All edits so far on text (% of the output)", _of("inputs.text.drift_relative", 100.0)),
    Trace("L_kp of text (% of Σ‖x‖²)", _of("inputs.text.l_kp_share", 100.0)),
    Trace("L_kp of neighbours (% of Σ‖x‖²)", _of("inputs.neighbours.l_kp_share", 100.0)),
    Trace("Update along U, against chance", _along),
    Trace("Interference left by P(α) (%)", _left("inputs.text.change.mean")),
    Trace("L_kp left by P(α) (%)", _left("inputs.text.l_kp")),
)


def plate(study: Study, diagnosed: Diagnosed) -> Plate:
    """Returns the figure."""
    panels, missing = [], []
    for trace in TRACES:
        if any(trace.of(diagnosed, entry) for entry in study.entries):
            panels.append(Panel(trace.title, partial(_draw, study=study, diagnosed=diagnosed, trace=trace)))
        else:
            missing.append(f"{trace.title}: not available: no diagnosis tells it")
    caption = (
        "Means over the edited weights. ΔW = U Vᵀ; right vectors are the columns of V, left ones those of U, which "
        "are what the paper on hidden instability measures. Interference: ‖ΔW z‖ / ‖W₀ z‖ of inputs z that the "
        "unedited model has on text no edit is about. L_kp: Σ‖P x‖², P on the span of the right vectors. Left by "
        "P(α): the updates of an entry without SPHERE, projected afterwards, against as they are. Along U: the "
        "squared share of these updates in SPHERE's principal space, divided by r / d_in; 1 is chance, and below it "
        "there is little to take away."
    )
    return Plate(
        f"{study.key}-interference", "Hidden interference", caption, tuple(panels), study.entries, tuple(missing)
    )


def grid(study: Study, diagnosed: Diagnosed) -> Grid:
    """Returns means over batches and weights, for every entry and kind of inputs."""
    lines = []
    for entry in study.entries:
        for kind in KINDS:
            at = f"inputs.{kind}"
            if diagnosed.mean(entry, f"{at}.keys") is not None:
                lines.append(Line(entry, (Field(entry.label), Field(kind), *_fields(diagnosed, entry, at))))
    heads = ("Method", "Inputs", "n", "‖ΔWz‖", "% of the output", "So far, %", "Bound", "Reached, %", "Most, %") + (
        ("L_kp, %", "By chance, %", "Alignment", "‖ΔWz‖ left, %", "L_kp left, %")
    )
    note = (
        "Bound: ‖U‖₂‖Vᵀz‖, and how much of it is reached. L_kp is a share of Σ‖x‖²; by chance, that of a span of "
        "the same dimension. Alignment: mean ‖ΔWz‖² against inputs of all directions alike, which the theorem "
        "assumes: 1. Left: what SPHERE's projection of the same updates leaves. Edited: the facts' own lookup tokens. "
        "So far: after the last batch measured."
    )
    return Grid(f"{study.key}-interference", "Interference in numbers", heads, tuple(lines), note)


def spaces(study: Study, diagnosed: Diagnosed) -> Grid:
    """Returns the dimensions of AlphaEdit's null spaces (Table 6 of the paper on hidden instability)."""
    lines = []
    for entry, one in diagnosed.spaces:
        cells = [one.get(key) for key in ("width", "threshold", "null", "rank")]
        numbers = [Field(brief(cell), cell) if isinstance(cell, int | float) else Field("–") for cell in cells]
        lines.append(Line(entry, (Field(entry.label), Field(str(one.get("name"))), *numbers)))
    heads = ("Method", "Weight", "Inputs", "Threshold", "Null space", "Rank of E[kkᵀ]")
    note = "Null space: eigenvalues of E[kkᵀ] below the threshold, the rank of AlphaEdit's projector."
    return Grid(f"{study.key}-spaces", "AlphaEdit’s null spaces", heads, tuple(lines), note)


def _fields(diagnosed: Diagnosed, entry: Entry, at: str) -> list[Field]:
    drift = diagnosed.curve(entry, f"{at}.drift_relative")
    told = [
        (diagnosed.mean(entry, f"{at}.change.mean"), 1.0),
        (diagnosed.mean(entry, f"{at}.relative"), 100.0),
        (drift[-1][1] if drift else None, 100.0),
        (diagnosed.mean(entry, f"{at}.bound.mean"), 1.0),
        (diagnosed.mean(entry, f"{at}.bound.reached"), 100.0),
        (max((row.number(f"{at}.bound.most") or 0.0 for row in diagnosed.of(entry)), default=None), 100.0),
        (diagnosed.mean(entry, f"{at}.l_kp_share"), 100.0),
        (_chance(diagnosed, entry), 100.0),
        (diagnosed.mean(entry, f"{at}.alignment"), 1.0),
        (_share(diagnosed, entry, f"{at}.change.mean"), 100.0),
        (_share(diagnosed, entry, f"{at}.l_kp"), 100.0),
    ]
    keys = diagnosed.mean(entry, f"{at}.keys") or 0.0
    numbers = [Field(brief(value, factor), None if value is None else value * factor) for value, factor in told]
    return [Field(f"{keys:.0f}", keys), *numbers]


def _chance(diagnosed: Diagnosed, entry: Entry) -> float | None:
    """The share of isotropic inputs that lies in a span of the updates' dimension."""
    span, width = diagnosed.mean(entry, "span"), diagnosed.mean(entry, "width")
    return span / width if span is not None and width else None


def _share(diagnosed: Diagnosed, entry: Entry, path: str) -> float | None:
    whole, kept = diagnosed.mean(entry, path), diagnosed.mean(entry, f"projected.{path}")
    return kept / whole if whole and kept is not None else None


def _draw(pen: Pen, study: Study, diagnosed: Diagnosed, trace: Trace) -> None:
    for entry in study.entries:
        found = trace.of(diagnosed, entry)
        if found:
            edits, heights = [edits for edits, _ in found], [number for _, number in found]
            tips = [f"{entry.label}\n{at} edits: {brief(number)}" for at, number in found]
            pen.line(entry, edits, heights, tips, len(found) <= MANY)
    pen.axis.set_xlabel("edits")
