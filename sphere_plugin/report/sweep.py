"""The folder of a sweep (docs/run-folder.md), read and checked: its cells, and each against its method alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json
from sphere_plugin.folders import SWEEP, find_folders
from sphere_plugin.report.numbers import METRICS, Metric, Value, measure
from sphere_plugin.report.paired import Comparison, compare, holm
from sphere_plugin.report.read import Run, read_run
from sphere_plugin.report.studies import Entry, Study, check_moment, study_of, without_sphere

FORMAT: Final = 1
LEVEL: Final = 0.05  # below which a corrected p counts as clear
SYMBOLS: Final = MappingProxyType({"eta": "η", "alpha": "α"})


@dataclass(frozen=True, eq=False)
class Cell:
    """One method with one choice of values.

    Attributes:
        number: from 0, in the order of the file.
        name: its entry, "memit+sphere".
        method: "MEMIT + SPHERE".
        values: key of the grid -> value.
        against: the number of the method alone; None for such a one.
        default: whether these are the values where nothing is tried.
        runs: folders of its runs below the sweep's, one for each order of edits.
        entry: those of its runs that have been begun; None if there are none.
        absent: the folders of the others.
    """

    number: int
    name: str
    method: str
    values: Mapping[str, Any]
    against: int | None
    default: bool
    runs: tuple[str, ...]
    entry: Entry | None
    absent: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """ "memit"."""
        return without_sphere(self.name)

    @property
    def words(self) -> str:
        """Its values, "η 0.3, α 0.5"."""
        return in_words(self.values)

    @property
    def label(self) -> str:
        """ "MEMIT + SPHERE, η 0.3, α 0.5"."""
        return ", ".join(filter(None, (self.method, self.words)))


@dataclass(frozen=True, eq=False)
class Sweep:
    """What was swept.

    Attributes:
        number: from 0.
        folder: where it lies.
        study: the cells that have runs, as entries of a study.
        cells: all, as in the file.
        tests: (number of a cell with SPHERE, name of a metric) -> it against its method alone, corrected by Holm's
            method for all cells of that method and metric.
    """

    number: int
    folder: Path
    study: Study
    cells: tuple[Cell, ...]
    tests: Mapping[tuple[int, str], Comparison]

    @property
    def key(self) -> str:
        """The prefix of its files."""
        return f"sweep{self.number + 1}"

    @property
    def bases(self) -> list[str]:
        """The methods: "memit"."""
        return list(dict.fromkeys(cell.base for cell in self.cells))

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Key of the grid -> its values."""
        found: dict[str, dict[Any, None]] = {}
        for cell in self.projected():
            for key, value in cell.values.items():
                found.setdefault(key, {})[value] = None
        return {key: tuple(values) for key, values in found.items()}

    @property
    def metrics(self) -> list[Metric]:
        """Those that any cell has a number for."""
        return [metric for metric in METRICS if self.study.has(metric)]

    def projected(self, base: str | None = None) -> list[Cell]:
        """The cells with SPHERE, of one method or of all."""
        return [cell for cell in self.cells if cell.against is not None and base in (None, cell.base)]

    def alone(self, cell: Cell) -> Cell:
        """The method alone that a cell is compared with; itself if it is one."""
        return cell if cell.against is None else self.cells[cell.against]

    def value(self, cell: Cell, metric: Metric) -> Value:
        """A metric of a cell at the moment of the sweep, averaged over orders; or why there is none."""
        if cell.entry is None or cell.absent:
            return Value(None, reason=f"not available: no run in {', '.join(cell.absent)}")
        return self.study.value(cell.entry, metric)

    def orders(self, cell: Cell) -> int:
        """How many of a cell's runs have got to the moment."""
        moment = self.study.moment
        return 0 if cell.entry is None or moment is None else len(cell.entry.checkpoints(moment))

    def test(self, cell: Cell, metric: Metric) -> Comparison | None:
        """A cell against its method alone, record by record; None where there is nothing of the kind."""
        return self.tests.get((cell.number, metric.name))

    def difference(self, cell: Cell, metric: Metric) -> float | None:
        """A cell minus its method alone: over the records, or the orders, that both have.

        Of the energy's change, the difference of absolute values: below 0 the energy has stayed nearer.
        """
        test = self.test(cell, metric)
        if metric.per_edit or cell.against is None:
            return None if test is None else test.difference
        alone, moment = self.alone(cell), self.study.moment
        if moment is None or None in (self.value(cell, metric).mean, self.value(alone, metric).mean):
            return None
        gaps = []
        for run in _runs(cell):
            for other in _runs(alone):
                ours, theirs = (measure(one, one.at(moment), metric).mean for one in (run, other))
                if run.order == other.order and ours is not None and theirs is not None:
                    gaps.append(abs(ours) - abs(theirs))
        return fmean(gaps) if gaps else None

    def clear(self, cell: Cell, metric: Metric) -> bool:
        """Whether a cell differs clearly from its method alone."""
        test = self.test(cell, metric)
        return test is not None and test.holm is not None and test.holm < LEVEL


def find_sweeps(paths: Sequence[Path]) -> list[Path]:
    """The folders of sweeps in ``paths``, at any depth."""
    return list(dict.fromkeys(folder for path in paths for folder in find_folders(path, SWEEP)))


def read_sweep(folder: Path, number: int = 0, at: int | None = None) -> Sweep:
    """Read a sweep as far as it has come.

    Args:
        folder: its own.
        number: what it is to have in a report.
        at: after how many edits to compare; None: the last moment that all cells have which have begun.

    Raises:
        CacheError: a file is damaged.
        ConfigError: no run has been begun, or none has a checkpoint after ``at`` edits.
    """
    cells = _cells(folder)
    entries = tuple(cell.entry for cell in cells if cell.entry is not None)
    if not entries:
        remedy = f"Begin its runs: sphere sweep --resume {folder}."
        raise ConfigError(str(folder), "a sweep without a run", "runs to report", remedy)
    check_moment([run for entry in entries for run in entry.runs], at)
    study = study_of(number, entries, at)
    return Sweep(number, folder, study, cells, _tests(study, cells))


def in_words(values: Mapping[str, Any]) -> str:
    """Values of a grid as they are written everywhere: "η 0.3, layers 12–16"."""
    return ", ".join(f"{SYMBOLS.get(key, key)} {value_in_words(value)}" for key, value in values.items())


def value_in_words(value: object) -> str:
    """One value: "0.3", "current", "12–16", "12, 14"."""
    if isinstance(value, tuple):
        row = len(value) > 1 and list(value) == list(range(value[0], value[-1] + 1))
        return f"{value[0]}–{value[-1]}" if row else ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _cells(folder: Path) -> tuple[Cell, ...]:
    path = folder / SWEEP
    content = read_json(path, "Restore it, or leave that sweep out of the report.")
    found: list[Cell] = []
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        families = list(dict.fromkeys(without_sphere(one["entry"]) for one in content["cells"]))
        known: dict[str, Run] = {}
        for number, one in enumerate(content["cells"]):
            values = {
                str(key): tuple(value) if isinstance(value, list) else value for key, value in one["values"].items()
            }
            told = str(one["entry"]), str(one["label"]), values, one["against"], one["default"] is True
            cell = Cell(number, *told, tuple(map(str, one["runs"])), None)
            _check_names(cell)
            if cell.against is not None and content["cells"][cell.against]["against"] is not None:
                raise ValueError(f"cell {number} is compared with {cell.against}, which is no method alone")
            names = [name for name in cell.runs if (folder / name / "manifest.json").exists()]
            runs = tuple(known.setdefault(name, known.get(name) or read_run(folder / name)) for name in names)
            entry = Entry(cell.name, cell.label, number, families.index(cell.base), runs) if runs else None
            absent = tuple(name for name in cell.runs if name not in names)
            found.append(replace(cell, entry=entry, absent=absent))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        remedy = "Restore it, or leave that sweep out of the report."
        raise CacheError(str(path), str(error), "a file as `sphere sweep` wrote it", remedy) from error
    return tuple(found)


def _check_names(cell: Cell) -> None:
    """Raise ValueError unless a cell's figures and runs lie where they should: a name in a file leads nowhere else."""
    if not re.fullmatch(r"[a-z]+(\+[a-z]+)?", cell.name):
        raise ValueError(f"the entry {cell.name!r}")
    for run in map(PurePath, cell.runs):
        if run.is_absolute() or ".." in run.parts or not run.name:
            raise ValueError(f"the run {str(run)!r}, which is not in the folder of the sweep")


def _tests(study: Study, cells: Sequence[Cell]) -> dict[tuple[int, str], Comparison]:
    metrics = [metric for metric in METRICS if metric.per_edit and study.has(metric)]
    found: dict[tuple[int, str], Comparison] = {}
    for base in dict.fromkeys(cell.base for cell in cells):
        alone = {cell.number: cells[cell.against] for cell in cells if cell.base == base and cell.against is not None}
        # A cell with α = 0 has the runs of the method alone, and so nothing to test.
        tested = [number for number, other in alone.items() if cells[number].runs != other.runs]
        for metric in metrics:
            group: dict[int, Comparison] = {}
            for number, other in alone.items():
                cell = cells[number]
                if cell.entry is not None and other.entry is not None and not cell.absent + other.absent:
                    group[number] = compare(study, cell.entry, other.entry, metric, len(tested))
            ps = {number: group[number].p for number in tested if number in group}
            known = {number: p for number, p in ps.items() if p is not None}
            corrected = dict(zip(known, holm(list(known.values())), strict=True))
            for number, one in group.items():
                found[number, metric.name] = replace(one, p=known.get(number), holm=corrected.get(number))
    return found


def _runs(cell: Cell) -> tuple[Run, ...]:
    return () if cell.entry is None else cell.entry.runs
