"""Files of a journal: read with what to do about a damaged one, moved, and tied to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphere_plugin.errors import CacheError
from sphere_plugin.files import json_digest, read_json, read_tensors
from sphere_plugin.parsing import json_of

# Folders of a run whose files are named by the number of edits they were measured after.
MEASURED: Final = ("checkpoints", "abilities", "audit", "diagnostics")


def measured_later(folder: Path, edits: int) -> list[Path]:
    """The files in the folder of a run that say what was measured after more than ``edits`` edits, the last first."""
    found = [path for kind in MEASURED for path in (folder / kind).glob("*.json") if path.stem.isdigit()]
    later = [path for path in found if int(path.stem) > edits]
    return sorted(later, key=lambda path: int(path.stem), reverse=True)


def numbered(folder: Path) -> list[int]:
    """The numbers of the JSON files in a folder that are called by a number."""
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]


def lost(number: int) -> str:
    """What to do when a file of batch ``number`` cannot be read; 0: the first file of the journal."""
    if number < 1:
        return "Put a copy of the file back; without it the run has to be done again."
    return f"Put a copy of the file back, or undo batch {number} and those after it."


def header(path: Path, number: int) -> tuple[frozenset[str], dict[str, str]]:
    """The names of the tensors in a file of batch ``number``, and its metadata; what they say is not checked."""
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys()), dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CacheError(str(path), why, "a file of a journal", lost(number)) from error


def tensors(path: Path, number: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file of batch ``number``, and its metadata, to the bit as they were written."""
    try:
        return read_tensors(path)
    except CacheError as error:
        raise CacheError(error.culprit, error.got, error.expected, lost(number)) from error


def check_base(path: Path, base: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise CacheError unless the metadata of a journal's first file are about the weights in it."""
    try:
        names, turned = (json_of(metadata[key]) for key in ("names", "transposed"))
        masters = json_of(metadata.get("masters", "{}"))
        good = sorted(names) == sorted(base) and {*turned, *masters} <= {*names} and "fingerprint" in metadata
        good = good and all(isinstance(dtype, str) for dtype in masters.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise CacheError(str(path), "metadata of other weights", "the first file of a journal", lost(0))


def read_record(path: Path, beside: Path, number: int) -> dict[str, Any]:
    """The record of batch ``number`` in a JSON file, as the file of tensors ``beside`` it says it was written."""
    try:
        record = read_json(path)
    except CacheError as error:
        raise CacheError(error.culprit, error.got, error.expected, lost(number)) from error
    if header(beside, number)[1].get("record") != json_digest(record) or record.get("batch") != number:
        tensors(beside, number)  # raises if it is this file that is damaged
        raise CacheError(str(path), "another content", f"the record that {beside.name} was written with", lost(number))
    return dict(record)


def plain(value: Any) -> Any:
    """The same as JSON has it: numbers that are not finite are null, tuples are lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def free_place(folder: Path) -> Path:
    """The first number that no folder in ``folder`` has, as a path in it."""
    taken = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(taken, default=0) + 1)


def move(path: Path, target: Path | None) -> None:
    """Rename a file, or delete it; one that is gone already is no matter."""
    try:
        if target is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    except OSError as error:
        raise CacheError(str(path), error.strerror or str(error), "a file that can be moved", "Try again.") from error
