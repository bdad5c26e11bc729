"""What is in a folder: nothing yet, folders of a kind below it, files that are still what they were."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import write_bytes
from sphere_plugin.paths import user_path

SUMS: Final = "SHA256SUMS"
SWEEP: Final = "sweep.json"  # what makes a folder that of a sweep
_EXPORT: Final = f"Export it again; if the change is your own, delete {SUMS}."


def find_folders(path: Path, name: str) -> list[Path]:
    """The folders at or below ``path`` that have a file of this name, sorted; inside them is not looked."""
    found = []
    for folder, below, files in os.walk(user_path(path).resolve()):
        if name in files:
            found.append(Path(folder))
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    return found


def ending(folder: Path, others: Iterable[Path]) -> str:
    """The end of a folder that tells it from the others, of two parts at least: " (run/memit)"; "" without others."""
    own, parts, last = folder.parts, [other.parts for other in others], 2
    while any(other[-last:] == own[-last:] for other in parts) and last < len(own):
        last += 1
    return f" ({'/'.join(own[-last:])})" if parts else ""


def refuse_existing(target: Path) -> bool:
    """Raise ConfigError if something is there; for ``atomic_folder``, which asks whether to keep it, never True."""
    if target.exists():
        raise ConfigError("the target", str(target), "a path where nothing is", "Choose another folder, or remove it.")
    return False


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by name; folders in it are not looked into."""
    return {path.name: _sum(path) for path in sorted(folder.iterdir()) if path.is_file()}


def changed(folder: Path, known: object) -> str | None:
    """Say which of the files whose SHA-256 ``known`` has is another one now; None if none is.

    Raises:
        CacheError: a file cannot be read.
    """
    if not isinstance(known, Mapping):
        return "nobody noted what is in its files"
    other = [name for name, digest in known.items() if _sum(folder / name) != digest]
    return f"{other[0]} is not as it was written" if other else None


def write_sums(folder: Path) -> None:
    """Note what is in the files of a folder, as ``sha256sum --check SHA256SUMS`` reads it.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    write_bytes(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums(folder).items()).encode())


def check_sums(folder: Path) -> None:
    """Raise CacheError if a folder has such a note and a file is another one now."""
    path = folder / SUMS
    if not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CacheError(str(path), str(error), "what `sphere export` wrote", _EXPORT) from error
    why = changed(folder, {name: digest for digest, _, name in (line.partition("  ") for line in lines)})
    if why is not None:
        raise CacheError(str(folder), why, f"files as {SUMS} in it says", _EXPORT)


def _sum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise CacheError(str(path), error.strerror or str(error), "a readable file", remedy) from error
