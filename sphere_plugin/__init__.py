"""SPHERE for EasyEdit: project any knowledge edit away from a weight's principal directions.

Public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sphere_plugin._version import __version__

if TYPE_CHECKING:
    from sphere_plugin.callback import SphereCallback
    from sphere_plugin.easyedit.journal import journal
    from sphere_plugin.editing import EditingConfig, Editor
    from sphere_plugin.errors import CacheError, ConfigError, HostError, ModelError, RequestError, SphereError
    from sphere_plugin.geometry import PrincipalSpace, energy_change, hyperspherical_energy
    from sphere_plugin.journaling.delta import apply_delta
    from sphere_plugin.journaling.exporting import export
    from sphere_plugin.journaling.undoing import undo
    from sphere_plugin.peft import project_adapter, project_saved_adapter
    from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, SphereConfig

__all__ = [
    "CacheError",
    "Chain",
    "ConfigError",
    "EditingConfig",
    "Editor",
    "HostError",
    "ModelError",
    "PrincipalSpace",
    "PruneConfig",
    "PruneHyperParams",
    "RectConfig",
    "RectHyperParams",
    "RequestError",
    "SphereCallback",
    "SphereConfig",
    "SphereError",
    "SphereHyperParams",
    "__version__",
    "apply_delta",
    "energy_change",
    "export",
    "hyperspherical_energy",
    "journal",
    "load_model",
    "project_adapter",
    "project_saved_adapter",
    "register",
    "undo",
    "unregister",
]

logging.getLogger("sphere_plugin").addHandler(logging.NullHandler())

_HOME = MappingProxyType(
    {
        "errors": ("CacheError", "ConfigError", "HostError", "ModelError", "RequestError", "SphereError"),
        "geometry": ("PrincipalSpace", "energy_change", "hyperspherical_energy"),
        "restraints": ("Chain", "PruneConfig", "RectConfig", "SphereConfig"),
        "editing": ("EditingConfig", "Editor"),
        "journaling.delta": ("apply_delta",),
        "journaling.exporting": ("export",),
        "journaling.undoing": ("undo",),
        "models": ("load_model",),
        "peft": ("project_adapter", "project_saved_adapter"),
        "callback": ("SphereCallback",),
        "easyedit.hparams": ("PruneHyperParams", "RectHyperParams", "SphereHyperParams"),
        "easyedit.journal": ("journal",),
        "easyedit.registration": ("register", "unregister"),
    }
)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"sphere_plugin.{module}"), name)
    raise AttributeError(f"module 'sphere_plugin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
