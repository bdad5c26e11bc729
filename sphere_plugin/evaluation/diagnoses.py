"""What diagnoses have found, as it lies in the folder of a run (docs/run-folder.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sphere_plugin.errors import CacheError
from sphere_plugin.files import read_json, write_json

FORMAT: Final = 1
FOLDER: Final = "diagnostics"
REMEDY: Final = "Delete it and run `sphere diagnose` again."


def path_of(folder: Path, edits: int) -> Path:
    """The file of the batch of a run that ended after so many edits."""
    return folder / FOLDER / f"{edits:06d}.json"


def spaces_path(folder: Path) -> Path:
    """The file of AlphaEdit's null spaces in a run."""
    return folder / FOLDER / "spaces.json"


def write_diagnosis(folder: Path, told: Mapping[str, Any]) -> None:
    """Write what a batch did into the folder of its run.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    settings = {"format": FORMAT, **told["settings"]}
    write_json(path_of(folder, told["edits"]), {**told, "settings": settings})


def write_spaces(folder: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Write null spaces, one for each weight, into the folder of their run.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    write_json(spaces_path(folder), {"format": FORMAT, "layers": list(layers)})


def read_diagnoses(folder: Path) -> dict[Path, dict[str, Any]]:
    """File -> diagnosis, of all batches in the folder of a run, in their order.

    Raises:
        CacheError: a file is damaged.
    """
    paths = sorted(path for path in (folder / FOLDER).glob("*.json") if path.stem.isdecimal())
    return {path: read_diagnosis(path) for path in paths}


def read_diagnosis(path: Path) -> dict[str, Any]:
    """One batch; its format, which stands among its settings, is left out of them.

    Raises:
        CacheError: the file is missing, damaged or of another format.
    """
    content = _object(read_json(path), path)
    settings = dict(_object(content.get("settings"), path))
    _check_format(settings.pop("format", FORMAT), path)
    if not isinstance(content.get("edits"), int):
        raise _wrong(path, content.get("edits"), "a number of edits")
    return {**content, "settings": settings, "layers": _layers(content, path)}


def read_spaces(folder: Path) -> list[dict[str, Any]] | None:
    """The null spaces of a run, one for each weight; None where they were not measured.

    Raises:
        CacheError: the file is damaged or of another format.
    """
    path = spaces_path(folder)
    if not path.exists():
        return None
    content = _object(read_json(path), path)
    _check_format(content.get("format", FORMAT), path)
    return _layers(content, path)


def _layers(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise _wrong(path, layers, "a list of layers")
    return [_object(layer, path) for layer in layers]


def _check_format(found: object, path: Path) -> None:
    if found != FORMAT:
        raise _wrong(path, found, f"a diagnosis of format {FORMAT}")


def _object(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, value, "an object, {…}")
    return value


def _wrong(path: Path, got: object, expected: str) -> CacheError:
    return CacheError(str(path), got, expected, REMEDY)
