"""The folders of runs (docs/run-folder.md), read and checked. What was not scored is None; damage is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json
from sphere_plugin.folders import find_folders

FORMAT: Final = 1
ORDERS: Final = ("0", "1", "2")  # of the energies that are stored
_REMEDY: Final = "The file is damaged, or another program wrote it: restore it, or leave that run out of the report."

Read = TypeVar("Read")
Scores = Mapping[str, tuple[float | None, ...]]
Energies = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Checkpoint:
    """The scores of all edits so far.

    Attributes:
        edits: in the weights.
        seconds: spent editing; None if not told.
        scored: positions, in the order of editing, of the edits that are scored.
        scores: metric -> one number per scored edit.
        nll: nats per token of the held-out text.
        energy: weight -> order -> energy.
        cases: as stored.
    """

    edits: int
    seconds: float | None
    scored: tuple[int, ...]
    scores: Scores
    nll: float | None
    energy: Energies
    cases: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Batch:
    """What one batch did.

    Attributes:
        batch: its number, from 1.
        edits: in the weights after it.
        records: position in the data file of each of its facts; None where that is not told.
        layers: one mapping per weight, as stored.
    """

    batch: int
    edits: int
    records: tuple[int | None, ...]
    layers: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        manifest: as stored.
        entry: "memit+sphere".
        label: "MEMIT + SPHERE".
        order: the seed of the order of edits; None: the file's order.
        share_targets: whether targets were aimed once for all methods.
        protocol: metric -> which of its scores is shown.
        checkpoints: by number of edits.
        batches: by number.
        stopped: what its guard said when it ended the run before the last edit; else nothing.
    """

    folder: Path
    manifest: Mapping[str, Any]
    entry: str
    label: str
    order: int | None
    share_targets: bool
    protocol: Mapping[str, str]
    checkpoints: tuple[Checkpoint, ...]
    batches: tuple[Batch, ...]
    stopped: str = ""

    @property
    def order_in_words(self) -> str:
        """ "order 3"."""
        return "the file's order" if self.order is None else f"order {self.order}"

    def at(self, edits: int) -> Checkpoint | None:
        """The checkpoint after ``edits`` edits, if there is one."""
        return next((one for one in self.checkpoints if one.edits == edits), None)


def read_runs(paths: Sequence[Path], without: Sequence[Path] = ()) -> tuple[Run, ...]:
    """Read every run in ``paths``, which are run folders or folders of them, at any depth.

    Args:
        paths: where to look.
        without: folders whose runs are left out.

    Raises:
        ConfigError: there is no run in one of them.
        CacheError: a file is damaged.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        found = find_runs(path)
        if not found:
            remedy = "Pass what `sphere run --out` wrote, or a folder of such folders."
            raise ConfigError(str(path), "no manifest.json in it or below", "a run folder", remedy)
        folders.update(dict.fromkeys(found))
    return tuple(read_run(folder) for folder in folders if not any(folder.is_relative_to(one) for one in without))


def find_runs(path: Path) -> list[Path]:
    """The run folders at or below ``path``, sorted; what lies inside a run folder is not looked at."""
    return find_folders(path, "manifest.json")


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        CacheError: a file is missing or is not what the contract says.
    """
    path = folder / "manifest.json"
    manifest = _object(read_json(path, _REMEDY), path)
    if manifest.get("format") != FORMAT:
        remedy = "Read it with the version of sphere-plugin that wrote it."
        raise CacheError(f"{path}: format", manifest.get("format"), f"{FORMAT}, the only format there is yet", remedy)
    data, *_ = (_object(manifest.get(key) or {}, path, key) for key in ("data", "model", "settings"))
    for key in ("edits", "batch_size", "sample"):
        if manifest.get(key) is not None:
            _whole(manifest[key], path, key)
    protocol = _object(manifest.get("protocol") or {}, path, "protocol")
    entry = _text(manifest.get("entry"), path, "entry")
    return Run(
        folder=folder,
        manifest=manifest,
        entry=entry,
        label=_text(manifest.get("label", entry), path, "label"),
        order=None if data.get("order") is None else _whole(data["order"], path, "data.order"),
        share_targets=bool(manifest.get("share_targets")),
        protocol={str(key): _text(value, path, f"protocol.{key}") for key, value in protocol.items()},
        checkpoints=_numbered(folder / "checkpoints", _checkpoint),
        batches=_numbered(folder / "journal", _batch),
        stopped=_stopped(folder / "guard.json"),
    )


def _numbered(folder: Path, read: Callable[[Path], Read]) -> tuple[Read, ...]:
    """What ``read`` makes of the files 000000.json, 000001.json, … of a folder, which need not be there."""
    paths = sorted((path for path in folder.glob("*.json") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    return tuple(read(path) for path in paths)


def _checkpoint(path: Path) -> Checkpoint:
    content = _object(read_json(path, _REMEDY), path)
    scored = tuple(_whole(one, path, "scored") for one in _list(content.get("scored"), path, "scored"))
    scores = dict(_object(content.get("scores") or {}, path, "scores"))
    nll = _number(scores.pop("nll", None), path, "scores.nll")
    lists = {name: _scores(values, path, f"scores.{name}", len(scored)) for name, values in scores.items()}
    energy = {
        name: {order: _number(value, path, f"energy.{name}") for order, value in _object(orders, path, name).items()}
        for name, orders in _object(content.get("energy") or {}, path, "energy").items()
    }
    cases = tuple(_object(one, path, "cases") for one in _list(content.get("cases"), path, "cases"))
    seconds = _number(content.get("seconds"), path, "seconds")
    edits = _whole(content.get("edits"), path, "edits")
    return Checkpoint(edits, seconds, scored, lists, nll, energy, cases)


def _batch(path: Path) -> Batch:
    content = _object(read_json(path, _REMEDY), path)
    facts = [_object(one, path, "facts") for one in _list(content.get("facts"), path, "facts")]
    layers = [_object(one, path, "layers") for one in _list(content.get("layers"), path, "layers")]
    for layer in layers:
        _text(layer.get("name"), path, "layers.name")
        for key in ("removed_share", "update_norm", "sigma_max"):
            _number(layer.get(key), path, f"layers.{key}")
        for order, value in _object(layer.get("energy") or {}, path, "layers.energy").items():
            _number(value, path, f"layers.energy.{order}")
    return Batch(
        batch=_whole(content.get("batch"), path, "batch"),
        edits=_whole(content.get("edits"), path, "edits"),
        records=tuple(_record(fact.get("record"), path) for fact in facts),
        layers=tuple(layers),
    )


def _stopped(path: Path) -> str:
    """Why the guard ended a run, in the last line of what it noted."""
    if not path.exists():
        return ""
    told = read_json(path, _REMEDY)
    told = told if isinstance(told, list) else _object(told, path).get("events")  # older versions wrote a list
    events = [_object(one, path) for one in _list(told, path, "events")]
    if not events or events[-1].get("action") in ("warn", "off", "undo"):
        return ""
    return f"its guard ended it after {events[-1].get('edits')} edits: {events[-1].get('reason')}"


def _record(value: object, path: Path) -> int | None:
    return None if value is None else _whole(value, path, "facts.record")


def _scores(values: object, path: Path, name: str, count: int) -> tuple[float | None, ...]:
    numbers = tuple(_number(value, path, name) for value in _list(values, path, name))
    if numbers and len(numbers) != count:
        raise _wrong(path, name, f"{len(numbers)} numbers", f"one for each of the {count} edits in `scored`")
    return numbers or (None,) * count


def _wrong(path: Path, name: str, got: object, expected: str) -> CacheError:
    return CacheError(f"{path}: {name}" if name else str(path), got, expected, _REMEDY)


def _object(value: object, path: Path, name: str = "") -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, name, value, "an object, {…}")
    return value


def _list(value: object, path: Path, name: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(path, name, value, "a list")
    return value


def _text(value: object, path: Path, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(path, name, value, "text")
    return value


def _whole(value: object, path: Path, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(path, name, value, "a whole number")
    return value


def _number(value: object, path: Path, name: str) -> float | None:
    """A finite number, or None for null and for what is not finite."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(path, name, value, "a number or null")
    return float(value) if math.isfinite(value) else None
