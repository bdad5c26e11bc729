"""A run that is over, looked at again: its journal, its manifest, and its model as it was after any of its batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from sphere_plugin.errors import CacheError, ConfigError, ModelError
from sphere_plugin.files import read_json
from sphere_plugin.journaling.store import Journal
from sphere_plugin.models import load_model

FORMAT: Final = 1  # of a manifest
RESTORE: Final = "Put a copy of the file back: what is in it is nowhere else."


class Revisited:
    """The model of a run, put to any of its moments.

    Nothing in the folder is written, and a run that goes on meanwhile does not mind.

    Args:
        folder: of the run.
        model: name or folder of the unedited model, where it is not the one the run names.

    Attributes:
        manifest: of the run, docs/run-folder.md.
        known: the manifest's ``model``, by the name it was loaded with here.
        journal: of the run.
        model: live, at first as it was before any edit.
        tokenizer: its tokenizer.

    Raises:
        CacheError: a file of the run is missing or damaged.
        ConfigError: the run does not say what model it edited, and none is given.
        ModelError: the model is not the one that was edited.
    """

    def __init__(self, folder: Path, model: str | None = None) -> None:
        self.journal, self.manifest = opened(folder)
        self.known = self.manifest["model"] if model is None else {**self.manifest["model"], "name": model}
        self.model, self.tokenizer = unedited(self.known, self.journal)

    @property
    def edits(self) -> int:
        """How many edits the run has made."""
        return self.journal.edits()

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Name -> live weight, of all that the run may have written."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.journal.names}

    def go(self, edits: int) -> None:
        """Put the model, bit for bit, to where the run was after so many edits.

        Raises:
            ConfigError: that is no moment between two batches; the message has the nearest.
            CacheError: a file of the journal is damaged.
        """
        put(self.weights, self.journal.weights_after(self.journal.batch_at(edits)))


def opened(folder: Path) -> tuple[Journal, dict[str, Any]]:
    """The journal and the manifest of a run.

    Raises:
        CacheError: one is missing or damaged, or they are not of one run.
    """
    journal, path = Journal.open(folder / "journal"), folder / "manifest.json"
    manifest = read_manifest(path)
    known = manifest.get("model")
    if not isinstance(known, Mapping):
        raise CacheError(str(path), known, "what model the run edited", RESTORE)
    if known.get("weights") != journal.fingerprint(0):
        remedy = "The two are not of one run: put the right manifest.json back."
        raise CacheError(str(path), known.get("weights"), "the weights of the journal", remedy)
    return journal, manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What a run is, docs/run-folder.md.

    Raises:
        CacheError: the file is missing, damaged or of another format.
    """
    content = read_json(path, RESTORE)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        remedy = "Read it with the version of sphere-plugin that wrote it."
        raise CacheError(str(path), got, f"a manifest of format {FORMAT}", remedy)
    return content


def unedited(known: Mapping[str, Any], journal: Journal) -> tuple[Any, Any]:
    """The model that a journal's edits were made to, before them, and its tokenizer.

    Args:
        known: the manifest's ``model``.
        journal: of the run.

    Raises:
        ConfigError: the manifest names none.
        ModelError: its weights are others.
    """
    model, tokenizer = loaded(known)
    parameters = dict(cast(nn.Module, model).named_parameters())
    missing = [one for one in journal.names if one not in parameters]
    if missing or journal.fingerprint_of(parameters) != journal.fingerprint(0):
        got = f"no {missing[0]}" if missing else f"weights of fingerprint {journal.fingerprint_of(parameters)}"
        remedy = "Name the model that was edited, in the version that was edited."
        raise ModelError(f"the model {known['name']}", got, f"weights of fingerprint {journal.fingerprint(0)}", remedy)
    return model, tokenizer


def loaded(known: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model, and its tokenizer, of a manifest's ``model``; raises ConfigError if that names none."""
    name = known.get("name")
    if not name:
        raise ConfigError("model", name, "the unedited model's name or folder", "The run has none: give it.")
    dtype = getattr(torch, str(known.get("dtype")).removeprefix("torch."), None)
    return load_model(name, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def put(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` into the live ones of the same names."""
    with torch.no_grad():
        for name, weight in weights.items():
            live[name].copy_(weight)
