"""What every look at runs as they lie on disk begins with: which runs, which facts, which moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sphere_plugin.data import Record, read_records
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.folders import ending, find_folders
from sphere_plugin.sequence.manifest import NAME, data_digest, refuse_journal
from sphere_plugin.sequence.settings import RunSettings, whole_numbers


class Labelled(Protocol):
    """A run, as a table names it."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        ...

    @property
    def label(self) -> str:
        """ "MEMIT + SPHERE"."""
        ...


def labels_of(runs: Sequence[Labelled]) -> list[str]:
    """The label of each run, with the end of its folder where others have the same."""
    return [
        one.label
        + ending(one.folder, [other.folder for other in runs if other is not one and other.label == one.label])
        for one in runs
    ]


def runs_in(target: Path) -> list[Path]:
    """The run folders at or below ``target``, sorted: of a run, a comparison, a sweep.

    Raises:
        ConfigError: there is none.
    """
    found = find_folders(target, NAME)
    if not found:
        remedy = "Give what `sphere run --out` wrote, or a folder of such folders."
        raise ConfigError(str(target), f"no {NAME} in it or below", "the folder of a run", remedy)
    return found


def settings_of(folder: Path, manifest: Mapping[str, Any]) -> RunSettings:
    """The settings of a run.

    Raises:
        ConfigError: see `refuse_journal`.
    """
    refuse_journal(folder, manifest)
    return RunSettings.from_mapping(manifest["settings"])


def facts_of(folder: Path, manifest: Mapping[str, Any], data: Path | None) -> list[Record]:
    """The facts of a run in the order of editing.

    Args:
        folder: of the run.
        manifest: of it.
        data: its file of facts, where that is not where the run found it.

    Raises:
        ConfigError: the file is not there, or the folder is not that of a run.
        CacheError: it is another one.
    """
    settings = settings_of(folder, manifest)
    path = data or settings.data
    if path is not None and not path.is_file():
        raise ConfigError(f"facts of {folder}", str(path), "the run's file of facts", "Say where it is with --data.")
    known = (manifest.get("data") or {}).get("sha256")
    if data_digest(path) != known:
        remedy = "Give the file that the run edited."
        raise CacheError(f"facts of {folder}", data_digest(path), f"{known}, as in the manifest", remedy)
    return read_records(path, settings.edits, settings.order)


def moments_of(text: str) -> tuple[int, ...]:
    """The numbers of edits in "0,500,1000", sorted.

    Raises:
        ConfigError: it has something else in it.
    """
    return tuple(sorted(set(whole_numbers("--at", text))))
