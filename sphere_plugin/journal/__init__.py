"""The journal: what was there before an edit, so that nothing is ever half-written or lost."""

from sphere_plugin.journal.snapshot import Snapshot, all_or_nothing

__all__ = ["Snapshot", "all_or_nothing"]
