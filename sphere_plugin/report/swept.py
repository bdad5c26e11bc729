"""Sweeps as the page and its files show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_plugin.report import cells, heatmap, recommend
from sphere_plugin.report.grid import Grid
from sphere_plugin.report.style import Plate
from sphere_plugin.report.sweep import Sweep, read_sweep, value_in_words


@dataclass(frozen=True)
class SweepChapter:
    """One sweep.

    Attributes:
        sweep: what was read.
        plates: method -> its figure.
        grids: its tables.
        told: its numbers as JSON.
    """

    sweep: Sweep
    plates: Mapping[str, Plate]
    grids: Mapping[str, Grid]
    told: Mapping[str, Any]


def chapters_of(folders: Sequence[Path], at: int | None, tell: Callable[[str, int, int], None]) -> list[SweepChapter]:
    """Read the sweeps in ``folders`` and compute everything about them; see `read_sweep` for ``at`` and errors."""
    found = []
    for number, folder in enumerate(folders):
        sweep = read_sweep(folder, number, at)
        chosen = recommend.choices(sweep)
        told = cells.numbers(sweep, chosen)
        found.append(SweepChapter(sweep, heatmap.plates(sweep, chosen), cells.grids(sweep), told))
        tell("sweeps", 1, len(folders))
    return found


def context(one: SweepChapter, charts: Callable[[Plate], Any]) -> dict[str, Any]:
    """What the template is given."""
    sweep = one.sweep
    return {
        "key": sweep.key,
        "study": sweep.study,
        "axes": [(key, "; ".join(map(value_in_words, values))) for key, values in sweep.axes.items()],
        "plates": {base: (plate, charts(plate)) for base, plate in one.plates.items()},
        "grids": one.grids,
        "recommended": [choice["in_words"] for choice in one.told["recommended"]],
        "notes": one.told["notes"],
    }
