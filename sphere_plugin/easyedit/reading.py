"""Read a YAML of any method, EasyEdit's or ours."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphere_plugin.easyedit.host import Host
from sphere_plugin.easyedit.hparams import PruneHyperParams, RectHyperParams, SphereHyperParams
from sphere_plugin.easyedit.keys import hparams_class
from sphere_plugin.easyedit.methods import OWN
from sphere_plugin.errors import ConfigError, SphereError
from sphere_plugin.parsing import yaml_of


def load_any(path: Path, host: Host) -> Any:
    """Load a YAML with the class of the method that it names.

    Raises:
        ConfigError: no file, no YAML, no ``alg_name``, or a method that the host does not have.
    """
    content = content_of(path)
    name = (content.get("alg_name") or content.get("alg")) if isinstance(content, Mapping) else None
    known = sorted({*host.alg_dict, *OWN})
    for own in (SphereHyperParams, RectHyperParams, PruneHyperParams):
        if name == own.ALG_NAME:
            return own.from_hparams(path)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ConfigError("alg_name", name, "a method of EasyEdit", f"The nearest one is {near!r}.")
    errors: list[Exception] = []
    for kind in _classes(host, str(name)):
        try:
            return kind.from_hparams(str(path))
        except SphereError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever EasyEdit's loaders raise
            errors.append(error)
    raise ConfigError("hparams", str(path), f"keys that {name} takes ({errors[-1]})", "Compare with EasyEdit's YAMLs.")


def content_of(path: Path) -> Any:
    """What is in a YAML.

    Raises:
        ConfigError: no file, or no YAML.
    """
    try:
        return yaml_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"Check the path; a relative one is looked up in {Path.cwd()}."
        raise ConfigError("hparams", str(path), f"a YAML file that can be read ({error})", remedy) from error


def _classes(host: Host, name: str) -> list[Any]:
    """The classes of hyper-parameters in the package that a method comes from, the plainest name first."""
    module = inspect.getmodule(inspect.unwrap(host.alg_dict[name]))
    package = getattr(module, "__name__", "").rpartition(".")[0]
    found: list[Any] = []
    waiting: list[Any] = list(hparams_class().__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if kind.__module__.startswith(f"{package}."):
            found.append(kind)
    return sorted(found, key=lambda kind: len(kind.__name__))
