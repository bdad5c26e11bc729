"""What the runs of one comparison, or of one sweep, have in common: the scores of the unedited model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sphere_plugin.errors import SphereError
from sphere_plugin.files import read_json
from sphere_plugin.folders import SWEEP, find_folders
from sphere_plugin.sequence.manifest import COMPARISON, NAME, read_manifest

# Parts of a checkpoint that depend on the model alone, not on which of its weights are followed.
SHARED: Final = ("scored", "scores", "cases")
_SAME: Final = ("model", "data", "text", "edits", "sample", "seed", "ranks", "threads", "versions", "machine")


def unedited_scores(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What another run has measured of the same unedited model with the same questions; None if there is none.

    Args:
        folder: of the run that asks.
        manifest: of it.
        name: of the file, in a run's folder.

    Returns:
        `SHARED`, and `from`: whose they are.
    """
    top = next((one for one in folder.parents[:2] if (one / COMPARISON).exists() or (one / SWEEP).exists()), None)
    for other in find_folders(top, NAME) if top is not None else ():
        if other == folder or not (other / name).exists():
            continue
        try:
            then, found = read_manifest(other), read_json(other / name)
        except SphereError:
            continue  # whoever goes on with that run will hear of it
        if _asked(then) == _asked(manifest):
            return {**{key: found[key] for key in SHARED}, "from": other.relative_to(top or other).as_posix()}
    return None


def _asked(manifest: Mapping[str, Any]) -> list[Any]:
    """What the scores of the unedited model depend on."""
    settings, device = manifest["settings"], manifest["method"]["hparams"].get("device")
    return [*map(manifest.get, _SAME), settings.get("neighbours"), settings.get("fluency"), device]
