"""The entries of a comparison, by name: "memit", "memit+sphere", "ft"."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_args, get_origin, get_type_hints

import yaml

from sphere_plugin.easyedit.blocks import numbers, read_prune, read_rect, types_of
from sphere_plugin.easyedit.host import Host
from sphere_plugin.easyedit.hparams import PruneHyperParams, RectHyperParams, SphereHyperParams
from sphere_plugin.easyedit.reading import load_any
from sphere_plugin.easyedit.registration import register
from sphere_plugin.editing.config import ALPHA_OF
from sphere_plugin.editing.corpus import COUNTED
from sphere_plugin.errors import ConfigError
from sphere_plugin.files import write_bytes
from sphere_plugin.parsing import yaml_of
from sphere_plugin.paths import is_file, is_folder, user_path, yaml_path

_LOG = logging.getLogger("sphere_plugin")

# What EasyEdit's main branch reads of a YAML for FT, and its PyPI release does not know.
_OBJECTIVE: Final = "objective_optimization"
# Name -> how it is written. The first four are solved by this package's own editor, the others by EasyEdit.
OWN: Final = MappingProxyType({"memit": "MEMIT", "alphaedit": "AlphaEdit", "rect": "RECT", "prune": "PRUNE"})
HOSTED: Final = MappingProxyType({"ft": "FT", "rome": "ROME"})
# What may follow a plus sign. The last two are controls, see `restraints.controls`.
VARIANTS: Final = MappingProxyType({"sphere": "SPHERE", "shrunk": "SPHERE's length", "random": "random subspace"})
CONTROLS: Final = tuple(variant for variant in VARIANTS if variant != "sphere")
# Keys of a YAML that the name of an entry, or a setting of the run, decides.
DECIDED: Final = MappingProxyType(
    {"alg_name": "entries", "base_method": "entries", "control": "entries", "batch_size": "batch_size"}
    | {"model_name": "model"}
)
ALL: Final = tuple(f"{base}{variant}" for base in (*OWN, *HOSTED) for variant in ("", "+sphere"))


def split(name: str) -> tuple[str, str | None]:
    """The base and the variant of an entry's name.

    Raises:
        ConfigError: there is no such entry.
    """
    base, plus, variant = name.partition("+")
    if (base not in OWN and base not in HOSTED) or (plus and variant not in VARIANTS):
        bases = ", ".join((*OWN, *HOSTED))
        raise ConfigError(
            "entry", name, f"one of {bases}, alone or with +sphere", "The controls are +shrunk and +random."
        )
    return base, variant or None


def label(name: str) -> str:
    """As it stands in tables: "MEMIT + SPHERE"."""
    base, variant = split(name)
    return " + ".join([{**OWN, **HOSTED}[base], *([VARIANTS[variant]] if variant else [])])


def parse(text: str) -> tuple[str, ...]:
    """Entries with commas between them, each once; "all" are the twelve of the paper's comparison."""
    names = ALL if text.strip() == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        split(name)
    if not names or len(set(names)) < len(names):
        raise ConfigError("entries", text, "names of entries, each once", "Write memit,memit+sphere or all.")
    return names


def hparams_of(name: str, path: Path, model: str | None, settings: Mapping[str, Any]) -> Any:
    """The hyper-parameters of an entry.

    Args:
        name: the entry.
        path: a YAML for SPHERE; those of FT and ROME stand beside its folder, hparams/FT/<same file>.
        model: replaces the YAML's model.
        settings: key -> value, over those of the YAML.

    Raises:
        ConfigError: a file is missing, or a key or value is wrong.
    """
    base, variant = split(name)
    for key in settings:
        if key in DECIDED:
            remedy = f"The run's own setting {DECIDED[key]} decides that."
            raise ConfigError(f"settings of {name}", key, "a key of the method", remedy)
    changes = {**settings, **({} if model is None else {"model_name": model})}
    if base in OWN:
        return _own(base, variant, SphereHyperParams.from_hparams(path), changes)
    return _hosted(HOSTED[base], variant, path, changes)


def _own(base: str, variant: str | None, given: SphereHyperParams, changes: dict[str, Any]) -> SphereHyperParams:
    kinds = {"rect": RectHyperParams, "prune": PruneHyperParams}
    kind: type[SphereHyperParams] = kinds.get(base, SphereHyperParams)
    method = "AlphaEdit" if base == "alphaedit" else "MEMIT"
    strength = given.alpha if given.base_method == method else dict(ALPHA_OF)[method]
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(SphereHyperParams)}
    for key in ("alg_name", "rect", "prune", *(("projection",) if base in kinds else ())):
        del values[key]
    values |= {"base_method": method, "alpha": strength}
    if base in kinds and getattr(given, base) is not None:
        values[base] = getattr(given, base)
    values |= _known(changes, kind)
    strength = values["alpha"] if values["alpha"] is not None else dict(ALPHA_OF)[method]
    values["alpha"] = strength if variant else 0.0
    values["control"] = variant if variant in CONTROLS else None
    return kind(**values)


def _known(changes: Mapping[str, Any], kind: type) -> dict[str, Any]:
    types = types_of(kind)
    for key in changes:
        if key not in types:
            raise ConfigError("settings", key, "a key of the YAML", "See docs/hparams.md for what there is.")
    readers = {"rect": read_rect, "prune": read_prune}
    return {
        key: readers[key](value) if key in readers and value is not None else value
        for key, value in numbers(changes, types).items()
    }


def _hosted(method: str, variant: str | None, path: Path, changes: Mapping[str, Any]) -> Any:
    given = yaml_path(path).resolve()
    beside = given if _mapping(given).get("alg_name") == method else given.parent.parent / method / given.name
    if not beside.exists():
        remedy = f"{path} is no {method} YAML, so that of the same name is looked for there: write it, or give one."
        raise ConfigError("hparams", str(beside), f"EasyEdit's YAML of {method} for this model", remedy)
    hparams = _read(beside, register())
    if hparams.alg_name != method:
        raise ConfigError(f"alg_name in {beside}", hparams.alg_name, method, f"Put {method}'s YAML there.")
    hints = get_type_hints(type(hparams))
    for key, value in numbers(changes, types_of(type(hparams))).items():
        if not hasattr(hparams, key):
            raise ConfigError("settings", key, f"a key of {beside}", "Check the spelling.")
        _check_kind(key, value, getattr(hparams, key), hints.get(key))
        setattr(hparams, key, value)
    # A block `sphere:` of the YAML says with which numbers.
    hparams.sphere = (getattr(hparams, "sphere", False) or True) if variant else False
    if variant in CONTROLS:
        hparams.control = variant
    return hparams


def _check_kind(key: str, value: object, known: object, hint: Any) -> None:
    """Raise ConfigError for a value that is neither what the method declares nor of the kind its YAML has."""
    alike = type(value) is type(known) and not isinstance(value, list | float)
    if not _fits(value, hint) and not alike:
        declared = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
        raise ConfigError(f"settings.{key}", value, declared.replace("typing.", ""), f"Its YAML has {known!r}.")


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint in (int, float):
        number = isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    return not isinstance(hint, type) or isinstance(value, hint)


def _read(path: Path, host: Host) -> Any:
    """The YAML of a method of the host, without what this host does not know."""
    content = _mapping(path)
    if host.kind == "main" or _OBJECTIVE not in content:
        return load_any(path, host)
    _LOG.warning("this EasyEdit has no %s: its FT trains all of a target at the prompt's last token", _OBJECTIVE)
    with tempfile.TemporaryDirectory(prefix="sphere-") as folder:
        known = {key: value for key, value in content.items() if key != _OBJECTIVE}
        write_bytes(Path(folder) / path.name, yaml.safe_dump(known).encode())
        return load_any(Path(folder) / path.name, host)


def _mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML; none where `load_any` will say what is wrong with it."""
    try:
        content = yaml_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def settings_of(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of an entry: those under "all", under its base, and under its full name, the last one winning."""
    chosen: dict[str, Any] = {}
    for key in ("all", split(name)[0], name):
        chosen |= given.get(key, {})
    return chosen


def check_settings(given: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise ConfigError for settings of an entry that does not run."""
    used = {"all", *names, *(split(name)[0] for name in names)}
    check_shape(given)
    for key in given:
        if key not in used:
            raise ConfigError("settings", key, "all, or one of the entries", f"Entries are {', '.join(names)}.")


def check_shape(given: object) -> None:
    """Raise ConfigError for settings that are no mapping of entries to mappings."""
    if not isinstance(given, Mapping):
        raise ConfigError("settings", given, "entries with their settings", "Write settings: {memit: {v_lr: 0.5}}.")
    for key, values in given.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings.{key}", values, "keys and values", f"Write {key}: {{v_lr: 0.5}}.")


def absolute(hparams: Any) -> Any:
    """The same hyper-parameters, with paths that lead to the same place from any working directory; changed in place.

    A run changes it, because EasyEdit writes to where it stands.
    """
    for name in ("model_name", "mom2_dataset", "stats_dir"):
        given = getattr(hparams, name, None)
        path = user_path(given or "")
        counted = name == "mom2_dataset" and str(given).endswith(COUNTED)  # its {} stands for the layer
        if given and (is_file(path) or is_folder(path) or counted or name == "stats_dir"):
            setattr(hparams, name, str(path.resolve()))
    return hparams
