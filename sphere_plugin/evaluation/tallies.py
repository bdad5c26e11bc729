"""What has been measured of general abilities, as it lies in the folder of a run (docs/run-folder.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sphere_plugin.errors import CacheError
from sphere_plugin.files import read_json, write_json

FORMAT: Final = 1
FOLDER: Final = "abilities"
REMEDY: Final = "Delete it and measure again."


def path_of(folder: Path, edits: int) -> Path:
    """The file of a run's scores after so many edits."""
    return folder / FOLDER / f"{edits:06d}.json"


def write_tally(folder: Path, edits: int, weights: str, tasks: Mapping[str, Any], around: Mapping[str, Any]) -> None:
    """Write the scores of one moment into the folder of their run.

    Args:
        folder: of the run.
        edits: in the weights.
        weights: fingerprint of them.
        tasks: name -> what is kept of it.
        around: where it was measured.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    content = {"format": FORMAT, "edits": edits, "weights": weights, "tasks": dict(tasks), **around}
    write_json(path_of(folder, edits), content)


def read_tallies(folder: Path) -> dict[int, dict[str, Any]]:
    """Edits -> scores, of all moments in the folder of a run.

    Raises:
        CacheError: a file is damaged, or tells of another moment than its name.
    """
    paths = sorted(path for path in (folder / FOLDER).glob("*.json") if path.stem.isdecimal())
    found = {int(path.stem): (path, read_tally(path)) for path in paths}
    for edits, (path, content) in found.items():
        if content["edits"] != edits:
            raise CacheError(f"{path}: edits", content["edits"], f"{edits}, as its name says", REMEDY)
    return {edits: content for edits, (_, content) in sorted(found.items())}


def read_tally(path: Path) -> dict[str, Any]:
    """The scores of one moment.

    Raises:
        CacheError: the file is missing, damaged or of another format.
    """
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        known = {"edits": int(content["edits"]), "weights": str(content["weights"])}
        return {**content, **known, "tasks": {name: _checked(kept) for name, kept in content["tasks"].items()}}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # int() of infinity
        raise CacheError(str(path), repr(error), f"abilities of format {FORMAT}", REMEDY) from error


def _checked(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a task; raises ValueError for a number that is none."""
    for number in (kept["value"], kept["stderr"], *kept["records"]):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{number!r} for a number")
    return {**kept, "how": dict(kept["how"]), "metric": str(kept["metric"])}
