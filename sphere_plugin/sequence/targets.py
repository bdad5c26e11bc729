"""Targets that are searched for once, on the unedited model, and shared by the entries of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from sphere_plugin.editing.aim import Aimed
from sphere_plugin.files import read_tensors, write_tensors
from sphere_plugin.sequence.entrant import OwnEntrant
from sphere_plugin.sequence.manifest import COMPARISON, data_digest
from sphere_plugin.sequence.settings import RunSettings

NAME: Final = "targets.safetensors"
_PARTS: Final = ("values", "losses", "steps")


class Targets:
    """The targets of a run's facts; found when first needed, which has to be before the first edit.

    They lie beside the folders of the entries of a comparison, or in that of a run alone. Sharing is quick, and hides
    much of what restraints do: a target says where a fact is to end up in a model that other edits have changed
    meanwhile.

    Args:
        folder: of the run.
        settings: of the run.
        entrant: with the unedited model.
        aim: finds the targets of the facts at the places it is called with.
    """

    def __init__(
        self, folder: Path, settings: RunSettings, entrant: OwnEntrant, aim: Callable[[range], Aimed]
    ) -> None:
        path = (folder.parent if (folder.parent / COMPARISON).exists() else folder) / NAME
        about = {
            "data": data_digest(settings.data),
            "order": str(settings.order),
            "edits": str(settings.edits),
            "batch_size": str(settings.batch_size),  # last digits depend on who is aimed together
            "aiming": entrant.aiming(),
        }
        if path.exists():
            tensors, known = read_tensors(path)
            if known == about:
                self._all = Aimed(tensors["values"], tensors["losses"], tensors["steps"])
                return
        size, count = settings.batch_size, settings.edits
        parts = [aim(range(first, min(first + size, count))) for first in range(0, count, size)]
        self._all = Aimed(*(torch.cat([getattr(part, name) for part in parts]) for name in _PARTS))
        tensors = {name: getattr(self._all, name) for name in _PARTS}
        write_tensors(path, tensors, about)

    def of(self, places: range) -> Aimed:
        """Those of the facts at ``places``."""
        chosen = slice(places.start, places.stop)
        return Aimed(self._all.values[chosen], self._all.losses[chosen], self._all.steps[chosen])
