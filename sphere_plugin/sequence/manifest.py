"""What a run is: written before its first edit, and checked against what is there when it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from sphere_plugin._version import __version__
from sphere_plugin.data import held_out
from sphere_plugin.editing.corpus import COUNTED
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.journaling import revisit
from sphere_plugin.journaling.disk import plain
from sphere_plugin.paths import is_file, user_path
from sphere_plugin.restraints import PruneConfig, RectConfig
from sphere_plugin.sequence.entries import label
from sphere_plugin.sequence.settings import RunSettings

_LOG = logging.getLogger("sphere_plugin")

_DEFAULTS: Final = MappingProxyType({"master_copy": False, "stats_device": None, "bf16": False})
NAME: Final = "manifest.json"
COMPARISON: Final = "comparison.json"  # in the folder of several entries: its settings
# What a run is continued with, and the keys in it.
_PARTS: Final = MappingProxyType({"settings": (), "method": ("hparams",), "data": ("sha256",), "model": ("weights",)})


def manifest_of(
    settings: RunSettings,
    hparams: Any,
    model: str,
    dtype: torch.dtype,
    contexts: Sequence[str],
    weights: str,
    ranks: int = 1,
) -> dict[str, Any]:
    """The content of a new run's manifest, docs/run-folder.md.

    Args:
        settings: of one entry.
        hparams: the method's.
        model: its name or folder.
        dtype: of the edited weights.
        contexts: prefixes facts are edited behind.
        weights: fingerprint of the touched weights before any edit.
        ranks: how many processes share the run.
    """
    given = {**vars(hparams), "model_name": Path(model).name}
    blocks = {key: dataclasses.asdict(one) for key, one in given.items() if isinstance(one, RectConfig | PruneConfig)}
    content = {
        "format": revisit.FORMAT,
        "entry": settings.entries[0],
        "label": label(settings.entries[0]),
        "method": {"alg_name": hparams.alg_name, "hparams": given | blocks},
        "model": {"name": model, "dtype": str(dtype).removeprefix("torch."), "weights": weights},
        "data": {
            "file": "facts.json" if settings.data is None else settings.data.name,
            "sha256": data_digest(settings.data),
            "records": settings.edits,
            "order": settings.order,
        },
        "text": digest(held_out(settings.text).encode()),
        "corpus": _corpus(given.get("mom2_dataset"), given.get("layers") or ()),
        "edits": settings.edits,
        "batch_size": settings.batch_size,
        "checkpoints": list(settings.checkpoints),
        "sample": settings.sample,
        "share_targets": settings.share_targets,
        "protocol": dict.fromkeys(("efficacy", "generalization", "specificity"), settings.protocol),
        "preset": settings.preset,
        "contexts": list(contexts),
        "seed": settings.seed,
        "settings": settings.plain() | {"model": model},
        "ranks": ranks,
        **surroundings(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    told: dict[str, Any] = plain(content)
    return told


def surroundings() -> dict[str, Any]:
    """What the last digits of a run depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "threads": torch.get_num_threads(),
        "versions": {"sphere-plugin": __version__, "python": platform.python_version(), **libraries},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def data_digest(path: Path | None) -> str:
    """SHA-256 of a file of facts; None: the project's own."""
    content = files("sphere_plugin.data").joinpath("facts.json").read_bytes() if path is None else path.read_bytes()
    return digest(content)


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def _corpus(source: object, layers: Sequence[object]) -> str | None:
    """SHA-256 of the file that key statistics are counted on, or of those they are in; None where there is none."""
    named = [str(source or "")]
    if named[0].endswith(COUNTED):
        named = [named[0].replace("{}", str(layer)) for layer in layers]
    paths = [user_path(one) for one in named]
    return digest(b"".join(path.read_bytes() for path in paths)) if source and all(map(is_file, paths)) else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run in ``folder``.

    Raises:
        CacheError: there is none, it is of another format, or a part is missing that a run is continued with.
        ConfigError: see `refuse_journal`.
    """
    path = folder / NAME
    if not path.exists():
        raise CacheError(str(folder), "no manifest", "the folder of a run", "Give the folder that --out named.")
    content = revisit.read_manifest(path)
    refuse_journal(folder, content)
    for part, keys in _PARTS.items():
        inside = content.get(part)
        if not isinstance(inside, Mapping) or not all(key in inside for key in keys):
            expected = f"an object with {', '.join(keys)}" if keys else "an object"
            raise CacheError(f"{path}: {part}", inside, expected, revisit.RESTORE)
    if not isinstance(content["method"]["hparams"], Mapping):
        raise CacheError(f"{path}: method.hparams", content["method"]["hparams"], "an object", revisit.RESTORE)
    for part, kind in (("entry", str), ("contexts", list)):
        if not isinstance(content.get(part), kind):
            raise CacheError(f"{path}: {part}", content.get(part), f"a {kind.__name__}", revisit.RESTORE)
    return content


def refuse_journal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ConfigError if a folder is no run's: `journal` has written it, which has no file of facts to its edits."""
    if not manifest.get("settings"):
        remedy = "Give the folder of a run; sphere undo and sphere export take this one."
        raise ConfigError(str(folder), "a journal of an editor's edits", "what `sphere run --out` wrote", remedy)


def check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other facts, weights, settings or prefixes; warn of what changes the last digits.

    Raises:
        CacheError: names what differs.
    """
    same = (("data", "sha256", "the file of facts"), ("model", "weights", "the model's weights before any edit"))
    for part, key, what in same:
        if then[part][key] != now[part][key]:
            remedy = "Continue with what the run began with, or begin a new one."
            raise CacheError(f"{folder}: {what}", now[part][key], f"{then[part][key]}, as in the manifest", remedy)
    for key, what in (("text", "the held-out text"), ("corpus", "the text of the key statistics")):
        if then.get(key) is not None and then[key] != now[key]:
            remedy = "Put it back as it was, or begin a new run."
            raise CacheError(f"{folder}: {what}", now[key], f"{then[key]}, as in the manifest", remedy)
    # A setting that the manifest's version did not know was what it is by default.
    old, new = ({**_DEFAULTS, **told["method"]["hparams"], "stats_dir": None} for told in (then, now))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            remedy = "Put the YAML back as it was, or begin a new run."
            raise CacheError(f"{folder}: {key}", new.get(key), f"{old.get(key)}, as in the manifest", remedy)
    if then["contexts"] != now["contexts"]:
        remedy = "They come from the model and the seed: use the versions of the manifest, or begin a new run."
        raise CacheError(f"{folder}: prefixes", now["contexts"], f"{then['contexts']}, as in the manifest", remedy)
    for key in ("ranks", "threads", "versions", "machine"):
        old, new = then.get(key, 1), now[key]  # manifests of older versions have no ranks
        if old != new:
            _LOG.warning(
                "the run began with %s %s and goes on with %s: its last digits may differ from an uninterrupted one's",
                key,
                old,
                new,
            )
