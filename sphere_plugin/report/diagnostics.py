"""What every batch did to the weights: how much it wrote, how much SPHERE took away, where the energy went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.report.curves import ENERGY, MANY
from sphere_plugin.report.grid import csv_text
from sphere_plugin.report.numbers import energy_change, written
from sphere_plugin.report.read import ORDERS, Batch, Run
from sphere_plugin.report.studies import Study
from sphere_plugin.report.style import Panel, Pen, Plate


@dataclass(frozen=True)
class Trace:
    """One number for every batch, of all weights together.

    Attributes:
        title: with its unit.
        of: computes it; None where it was not stored.
        decimals: how it is written.
    """

    title: str
    of: Callable[[Run, Batch], float | None]
    decimals: int = 3


def update_norm(run: Run, batch: Batch) -> float | None:
    """The norm of all weights' updates together: the root of the sum of squares."""
    norms = _all(batch, "update_norm")
    return math.sqrt(sum(norm * norm for norm in norms)) if norms else None


def removed_share(run: Run, batch: Batch) -> float | None:
    """The mean over weights, in per cent."""
    shares = _all(batch, "removed_share")
    return 100.0 * fmean(shares) if shares else None


def sigma_max(run: Run, batch: Batch) -> float | None:
    """The largest of all weights' largest singular values."""
    return max(_all(batch, "sigma_max"), default=None)


def energy(run: Run, batch: Batch) -> float | None:
    """The mean over weights of the relative change of energy, in 10⁻⁴."""
    found = energy_change(run, {layer["name"]: layer.get("energy") or {} for layer in batch.layers})
    return None if found.mean is None else found.mean * ENERGY.scale


TRACES: Final = (
    Trace("Norm of the update", update_norm),
    Trace("Removed share (%)", removed_share, 2),
    Trace("Largest singular value", sigma_max),
    Trace("Change of HE (10⁻⁴)", energy, 2),
)
COLUMNS: Final = ("rank", "removed_share", "solved_norm", "update_norm", "weight_norm", "sigma_max") + (
    ("right_norm", "null_space", "rounding_loss", "master_gap")
)
ENERGIES: Final = ("energy_0", "energy_1", "energy_2")


def plate(study: Study) -> Plate:
    """Returns the figure; of several orders of an entry, it shows the first."""
    panels, missing = [], []
    for trace in TRACES:
        if any(points(entry.runs[0], trace) for entry in study.entries):
            panels.append(Panel(trace.title, partial(_draw, study=study, trace=trace), size=(4.4, 2.7)))
        else:
            missing.append(f"{trace.title}: not available: no journal tells it")
    missing += [f"{entry.label}: not available: no journal" for entry in study.entries if not entry.runs[0].batches]
    several = any(len(entry.runs) > 1 for entry in study.entries)
    caption = (
        "One point for each batch. The norm of the update and the largest singular value are over all edited weights, "
        "the removed share and the energy means of them." + (" Of several orders, the first." if several else "")
    )
    return Plate(f"{study.key}-batches", "Batch by batch", caption, tuple(panels), study.entries, tuple(missing))


def points(run: Run, trace: Trace) -> list[tuple[int, float]]:
    """Returns (edits, number) for the batches that tell it."""
    found = ((batch.edits, trace.of(run, batch)) for batch in run.batches)
    return [(edits, number) for edits, number in found if number is not None]


def batches_csv(study: Study) -> str:
    """Returns what the journals say, unrounded: one line for each batch and weight."""
    rows = [
        (entry.label, entry.name, run.order, batch.batch, batch.edits, layer["name"])
        + tuple(layer.get(key) for key in COLUMNS)
        + tuple(_energies(layer).get(order) for order in ORDERS)
        for entry in study.entries
        for run in entry.runs
        for batch in run.batches
        for layer in batch.layers
    ]
    return csv_text(("method", "entry", "order", "batch", "edits", "weight", *COLUMNS, *ENERGIES), rows)


def _energies(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    return layer.get("energy") or MappingProxyType({})


def _all(batch: Batch, key: str) -> list[float]:
    """The weights' numbers of one kind, the finite ones."""
    values = (layer.get(key) for layer in batch.layers)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _draw(pen: Pen, study: Study, trace: Trace) -> None:
    for entry in study.entries:
        found = points(entry.runs[0], trace)
        if found:
            edits, numbers = [edits for edits, _ in found], [number for _, number in found]
            tips = [f"{entry.label}\n{at} edits: {written(number, trace.decimals)}" for at, number in found]
            pen.line(entry, edits, numbers, tips, len(found) <= MANY)
    pen.axis.set_xlabel("edits")
