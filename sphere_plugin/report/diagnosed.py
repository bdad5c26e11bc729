"""What `sphere diagnose` measured on the runs of a study, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from sphere_plugin.errors import CacheError
from sphere_plugin.evaluation.diagnoses import REMEDY, read_diagnoses, read_spaces
from sphere_plugin.files import read_json
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import MINUS
from sphere_plugin.report.read import Run
from sphere_plugin.report.studies import Entry, Study

KINDS: Final = ("text", "neighbours", "edited")  # of inputs
# Columns of the CSV of everything, as paths in a layer of a diagnosis.
_TERMS: Final = ("change", "first_order", "constant", "perturbation", "moved", "largest_step", "ratio", "neuron_ratio")
_INPUTS: Final = ("change.mean", "square", "bound.mean", "bound.reached", "bound.most", "spectral_bound.mean") + (
    ("l_kp", "l_kp_share", "alignment", "drift", "relative", "drift_relative")
)
COLUMNS: Final = (
    *(
        "width",
        "vectors",
        "span",
        "norm",
        "spectral",
        "left.mean",
        "left.max",
        "left.min",
        "right.mean",
        "right.max",
        "right.min",
    ),
    *(f"theorem.{of}.{rows}.{term}" for of in ("batch", "run") for rows in ("raw", "unit") for term in _TERMS),
    *(f"inputs.{kind}.{name}" for kind in KINDS for name in _INPUTS),
    *("projected.alpha", "projected.rank", "projected.removed_share"),
    *(f"projected.inputs.{kind}.{name}" for kind in KINDS for name in ("change.mean", "l_kp", "l_kp_share")),
)


@dataclass(frozen=True, eq=False)
class Row:
    """One weight and batch.

    Attributes:
        entry, run: whose.
        edits: in the weights after the batch.
        weight: its name.
        told: as stored, docs/run-folder.md.
        where: the file, for errors.
    """

    entry: Entry
    run: Run
    edits: int
    weight: str
    told: Mapping[str, Any]
    where: Path

    def number(self, path: str) -> float | None:
        """The number at a path such as "inputs.text.l_kp"; None where there is none.

        Raises:
            CacheError: there is something else.
        """
        value: Any = self.told
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CacheError(str(self.where), value, f"a number for {path} of {self.weight}", REMEDY)
        return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Diagnosed:
    """All that was measured of a study.

    Attributes:
        rows: in the order of entries, runs, batches and weights.
        spaces: entry, and what is stored of a null space.
        missing: what is not there, and why.
    """

    rows: tuple[Row, ...] = ()
    spaces: tuple[tuple[Entry, Mapping[str, Any]], ...] = ()
    missing: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.spaces)

    def of(self, entry: Entry) -> list[Row]:
        """The rows of an entry."""
        return [row for row in self.rows if row.entry is entry]

    def curve(self, entry: Entry, path: str, last: bool = False) -> list[tuple[int, float]]:
        """(edits, mean over weights and orders) of a number; ``last``: of the last weight only."""
        found: dict[int, list[float]] = {}
        rows = self.of(entry)
        names = {max((row.weight for row in rows), key=_natural)} if last and rows else {row.weight for row in rows}
        for row in rows:
            value = row.number(path) if row.weight in names else None
            if value is not None:
                found.setdefault(row.edits, []).append(value)
        return [(edits, fmean(values)) for edits, values in sorted(found.items())]

    def mean(self, entry: Entry, path: str) -> float | None:
        """Over batches, weights and orders."""
        return mean(row.number(path) for row in self.of(entry))


def gather(study: Study) -> Diagnosed:
    """Read the diagnoses of all runs of a study; those of batches that are no more in the journal are left out.

    Raises:
        CacheError: a file is damaged.
    """
    rows: list[Row] = []
    spaces: list[tuple[Entry, Mapping[str, Any]]] = []
    missing: list[str] = []
    settings: dict[str, Any] = {}
    for entry in study.entries:
        for run in entry.runs:
            found = read_diagnoses(run.folder)
            fresh = [(path, told) for path, told in found.items() if told.get("after") == _after(run, told)]
            if len(fresh) < len(found):
                missing.append(f"{entry.label}: {len(found) - len(fresh)} diagnoses of batches that were undone")
            if not fresh:
                missing.append(f"{entry.label}: not available: `sphere diagnose {run.folder.name}` was not run")
            missing += _other_settings(entry, fresh, settings)
            rows += [
                Row(entry, run, told["edits"], str(layer.get("name")), layer, path)
                for path, told in fresh
                for layer in told["layers"]
            ]
        spaces += [(entry, one) for one in read_spaces(entry.runs[0].folder) or ()]
    return Diagnosed(tuple(rows), tuple(spaces), tuple(dict.fromkeys(missing)))


def grid(study: Study, diagnosed: Diagnosed) -> Grid:
    """Returns everything that was measured: one line for each batch and weight, for the CSV file."""
    lines = []
    for row in diagnosed.rows:
        numbers = map(row.number, COLUMNS)
        cells = [Field("" if number is None else brief(number), number) for number in numbers]
        order = Field("" if row.run.order is None else str(row.run.order), row.run.order)
        first = (Field(row.entry.label), Field(row.entry.name), order, Field(str(row.edits), row.edits))
        lines.append(Line(row.entry, (*first, Field(row.weight), *cells)))
    heads = ("method", "entry", "order", "edits", "weight", *COLUMNS)
    return Grid(f"{study.key}-diagnoses", "Diagnoses", heads, tuple(lines))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def brief(number: float | None, factor: float = 1) -> str:
    """Three digits, whatever the size; of a whole number all of them; a dash for None."""
    if number is None:
        return "–"
    return f"{number * factor:d}" if isinstance(number * factor, int) else f"{number * factor:.3g}".replace("-", MINUS)


def _after(run: Run, told: Mapping[str, Any]) -> object:
    """The fingerprint of the weights after the batch, as the journal has it now."""
    path = run.folder / "journal" / f"{told.get('batch') or 0:06d}.json"
    record = read_json(path) if path.exists() else None
    return record.get("after") if isinstance(record, dict) else None


def _other_settings(entry: Entry, found: Sequence[tuple[Path, Mapping[str, Any]]], first: dict[str, Any]) -> list[str]:
    """Says so where diagnoses are not of the same inputs; ``first`` remembers the first ones."""
    for _, told in found:
        now = {key: one for key, one in told["settings"].items() if key != "projected"}
        if first.setdefault("settings", now) != now:
            return [f"{entry.label}: diagnosed with other settings than the first: {now}"]
    return []


def _natural(name: str) -> tuple[int, ...]:
    """Names of weights by the numbers in them."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
