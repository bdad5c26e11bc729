"""The cells of a sweep: which values are tried on which methods, and in which run each of them lies."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from sphere_plugin.data import held_out
from sphere_plugin.easyedit.blocks import numbers
from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError
from sphere_plugin.models.stored import structure
from sphere_plugin.sequence.compare import Task
from sphere_plugin.sequence.entries import OWN, hparams_of, label, parse, settings_of
from sphere_plugin.sequence.manifest import data_digest
from sphere_plugin.sequence.runner import check
from sphere_plugin.sequence.settings import RunSettings

# What a grid may have, in the order in which names and figures have it.
KEYS: Final = ("eta", "alpha", "basis", "projection", "layers")
# The keys that matter to a method without SPHERE: RECT and PRUNE, too, are applied in the loop or after it.
_MATTER: Final = MappingProxyType(
    {base: ("projection", "layers") if base in ("rect", "prune") else ("layers",) for base in OWN}
)


@dataclass(frozen=True)
class Cell:
    """One method with one choice of values.

    Attributes:
        base: "memit".
        sphere: whether it is projected.
        values: key of the grid -> value, in the order of `KEYS`; of a method alone those that matter to it.
    """

    base: str
    sphere: bool
    values: Mapping[str, Any]

    @property
    def entry(self) -> str:
        """Its entry: "memit+sphere"."""
        return f"{self.base}+sphere" if self.sphere else self.base

    @property
    def name(self) -> str:
        """Of its folder in that of the entry: "eta=0.3,alpha=0.5", "base" where there is nothing to tell."""
        return ",".join(f"{key}={written(value)}" for key, value in self.values.items()) or "base"

    @property
    def alone(self) -> Cell:
        """The method without SPHERE that it is compared with; of such a method, itself."""
        kept = {key: value for key, value in self.values.items() if key in _MATTER[self.base]}
        return Cell(self.base, False, kept)

    @property
    def run(self) -> Cell:
        """The cell whose runs are its own: with alpha 0 nothing is projected, and the method alone has them."""
        return self.alone if self.sphere and self.values.get("alpha") == 0 else self


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep.

    Attributes:
        run: of the runs; its entries are the methods alone and with SPHERE, its order is not looked at.
        grid: key -> values that are tried, each with each of the other keys'.
        orders: seeds of the orders of edits in which every cell is run; None is the file's.

    Raises:
        ConfigError: an unknown key of the grid, or what cannot be swept; names the key.
    """

    run: RunSettings
    grid: Mapping[str, tuple[Any, ...]]
    orders: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.run.share_targets:
            remedy = "Leave it out: targets that are aimed once for all hide what is to be seen."
            raise ConfigError("share_targets", True, "targets aimed anew in every run", remedy)
        _check_grid(self.grid)
        for entry, values in self.run.settings.items():
            for key in values:
                if key in self.grid:
                    remedy = "Give it in one place."
                    raise ConfigError(f"settings.{entry}.{key}", values[key], "a key that is not in the grid", remedy)
        for order in self.orders:
            if order is not None:
                check_number("orders", order, 0, whole=True)
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ConfigError("orders", list(self.orders), "seeds of orders, each once", "Write orders: [0, 1, 2].")

    @property
    def bases(self) -> tuple[str, ...]:
        """The methods."""
        return tuple(entry for entry in self.run.entries if entry in OWN)

    @property
    def cells(self) -> list[Cell]:
        """For every method first itself, then itself with SPHERE."""
        keys = [key for key in KEYS if key in self.grid]
        choices = [dict(zip(keys, one, strict=True)) for one in itertools.product(*(self.grid[key] for key in keys))]
        found = []
        for base in self.bases:
            projected = [Cell(base, True, values) for values in choices]
            alone = {cell.alone.name: cell.alone for cell in projected}
            found += [*alone.values(), *projected]
        return found

    def folder(self, cell: Cell, order: int | None) -> str:
        """Where a run of a cell lies, below the folder of the sweep: "memit+sphere/eta=0.3,alpha=0.5,order=1"."""
        ran = cell.run
        turn = f",order={'file' if order is None else order}" if len(self.orders) > 1 else ""
        return f"{ran.entry}/{ran.name}{turn}"

    def settings(self, cell: Cell, order: int | None) -> RunSettings:
        """Of a run of a cell."""
        entry, given = cell.entry, self.run.settings
        values = {key: list(value) if key == "layers" else value for key, value in cell.values.items()}
        chosen = {**given, entry: {**given.get(entry, {}), **values}}
        return dataclasses.replace(self.run, settings=chosen, order=order).for_entry(entry)

    def tasks(self, folder: Path) -> list[Task]:
        """All runs, in the order in which they are begun: one order of edits after the other."""
        found: dict[Path, Task] = {}
        for order in self.orders:
            for cell in self.cells:
                place = folder / self.folder(cell, order)
                found.setdefault(place, Task(self.settings(cell.run, order), place))
        return list(found.values())

    def check(self) -> None:
        """Find out what can be found out before a model is loaded.

        Raises:
            SphereError: a value of the grid, a setting, a file or a number of facts that cannot be.
        """
        check(self.run)
        model, known = None, set[str]()
        for cell in self.cells:
            with _in_the_grid(self.grid):
                hparams = self._hparams(cell)
                model = structure(hparams.model_name) if model is None else model
                known = known or {name for name, _ in model.named_modules()}
                for layer in hparams.layers:
                    if hparams.rewrite_module_tmp.format(layer) not in known:
                        remedy = f"The model has no {hparams.rewrite_module_tmp.format(layer)}."
                        raise ConfigError("layers", layer, "a layer of the model", remedy)

    def defaults(self, base: str) -> dict[str, Any]:
        """What the keys of the grid are where nothing is tried."""
        entry = f"{base}+sphere"
        hparams = hparams_of(entry, self.run.hparams, self.run.model, settings_of(entry, self.run.settings))
        return {key: plain_value(getattr(hparams, key)) for key in KEYS if key in self.grid}

    def made_of(self) -> dict[str, str]:
        """Digests of what the runs have in common with no regard to their folders; they must stay as they are."""
        hparams = [{**vars(self._hparams(cell)), "stats_dir": None} for cell in self.cells]
        told = json.dumps(hparams, sort_keys=True, default=str)
        return {
            "hparams": hashlib.sha256(told.encode()).hexdigest(),
            "data": data_digest(self.run.data),
            "text": hashlib.sha256(held_out(self.run.text).encode()).hexdigest(),
        }

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `from_mapping` reads it."""
        told = {key: value for key, value in self.run.plain().items() if key != "order"}
        grid = {key: [list(one) if key == "layers" else one for one in self.grid[key]] for key in self.grid}
        return told | {"entries": list(self.bases), "grid": grid, "orders": list(self.orders)}

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from the keys of a YAML: a run's, `grid` and `orders`.

        Raises:
            ConfigError: an unknown key, or a value out of its range.
        """
        values = {key: value for key, value in content.items() if key not in ("grid", "orders")}
        if values.get("order") is not None and content.get("orders") is not None:
            raise ConfigError("order", values["order"], "order or orders", "Give orders alone.")
        orders = content.get("orders", [values.pop("order", None)])
        bases = _bases(values.get("entries"))
        run = RunSettings.from_mapping(values | {"entries": [*bases, *(f"{base}+sphere" for base in bases)]})
        if not isinstance(orders, list | tuple):
            raise ConfigError("orders", orders, "a list of seeds", "Write orders: [0, 1, 2].")
        return cls(run, _grid(content.get("grid")), tuple(orders))

    def _hparams(self, cell: Cell) -> Any:
        run = self.settings(cell, None)
        return hparams_of(cell.entry, run.hparams, run.model, settings_of(cell.entry, run.settings))


def written(value: object) -> str:
    """A value as folders have it: "0.3", "current", "12-16", "12+14"."""
    if isinstance(value, tuple):
        first, last = value[0], value[-1]
        if len(value) > 1 and value == tuple(range(first, last + 1)):
            return f"{first}-{last}"
        return "+".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def plain_value(value: Any) -> Any:
    """A value as a grid has it: numbers as fractions, lists as tuples."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def described(sweep: SweepSettings) -> dict[str, Any]:
    """What ``sweep.json`` says of a sweep before anything is measured, docs/run-folder.md."""
    cells = sweep.cells
    places = {(cell.entry, cell.name): place for place, cell in enumerate(cells)}
    defaults = {base: sweep.defaults(base) for base in sweep.bases}
    told = [
        {
            "entry": cell.entry,
            "label": label(cell.entry),
            "values": {key: list(one) if key == "layers" else one for key, one in cell.values.items()},
            "against": places[cell.alone.entry, cell.alone.name] if cell.sphere else None,
            "default": cell.sphere and dict(cell.values) == defaults[cell.base],
            "runs": [sweep.folder(cell, order) for order in sweep.orders],
        }
        for cell in cells
    ]
    return {"format": 1, "settings": sweep.plain(), "made_of": sweep.made_of(), "cells": told}


def _bases(given: object) -> tuple[str, ...]:
    names = given if isinstance(given, str) else ",".join(map(str, given)) if isinstance(given, list | tuple) else ""
    bases = parse(names)
    for base in bases:
        if base not in OWN:
            remedy = "A sweep runs them alone and with SPHERE by itself."
            raise ConfigError("entries", base, f"methods of this package's own editor: {', '.join(OWN)}", remedy)
    return bases


def _grid(given: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping) or not given:
        remedy = "Write grid: {eta: [0.3, 0.5], alpha: [0.5, 0.8]}."
        raise ConfigError("grid", given, f"lists of values of {', '.join(KEYS)}", remedy)
    for key, values in given.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"grid.{key}", values, "a list of values", f"Write {key}: [first, second].")
    read = {key: [numbers({key: one}, {key: "float"})[key] for one in values] for key, values in given.items()}
    return {key: tuple(map(plain_value, values)) for key, values in read.items()}


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if key not in KEYS:
            remedy = "Give everything else under settings, for all cells alike."
            raise ConfigError("grid", key, f"one of {', '.join(KEYS)}", remedy)
        for value in values:
            if key == "layers" and not (isinstance(value, tuple) and value and all(type(one) is int for one in value)):
                raise ConfigError("grid.layers", value, "lists of layers", "Write layers: [[4, 5, 6], [6]].")
            if key != "layers" and not (type(value) is float or (isinstance(value, str) and value.isidentifier())):
                raise ConfigError(f"grid.{key}", value, "numbers or words", f"Write {key}: [first, second].")
        if len({written(value) for value in values}) < len(values):
            raise ConfigError(f"grid.{key}", list(values), "each value once", "Leave the second one out.")


@contextmanager
def _in_the_grid(grid: Mapping[str, object]) -> Iterator[None]:
    """Say of errors about a key of the grid that it stands there."""
    try:
        yield
    except ConfigError as error:
        if error.culprit not in grid:
            raise
        raise ConfigError(f"grid.{error.culprit}", error.got, error.expected, error.remedy) from None
