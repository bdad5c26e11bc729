"""Restraints: functions of (W, ΔW) that return the part of an update worth writing."""

from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, Restraint
from sphere_plugin.restraints.sphere import SphereConfig

__all__ = ["BoundRestraint", "Restrained", "Restraint", "SphereConfig"]
