"""Restraints: functions of (W, ΔW) that return the part of an update worth writing."""

from sphere_plugin.restraints.chain import Chain
from sphere_plugin.restraints.protocol import (
    BoundRestraint,
    FactoredRestraint,
    Restrained,
    Restraint,
    memory_of,
    recall,
    restrain,
)
from sphere_plugin.restraints.prune import PruneConfig, prune_view
from sphere_plugin.restraints.rect import RectConfig
from sphere_plugin.restraints.sphere import SphereConfig

__all__ = [
    "BoundRestraint",
    "Chain",
    "FactoredRestraint",
    "PruneConfig",
    "RectConfig",
    "Restrained",
    "Restraint",
    "SphereConfig",
    "memory_of",
    "prune_view",
    "recall",
    "restrain",
]
