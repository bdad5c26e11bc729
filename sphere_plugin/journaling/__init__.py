"""The journal: what was there before an edit, so that nothing is ever half-written or lost."""

from sphere_plugin.journaling.lock import run_lock
from sphere_plugin.journaling.snapshot import Snapshot, all_or_nothing
from sphere_plugin.journaling.store import Journal

__all__ = ["Journal", "Snapshot", "all_or_nothing", "run_lock"]
