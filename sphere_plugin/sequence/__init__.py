"""The sequential run: batch after batch into one model, scored on all edits so far."""

from sphere_plugin.sequence.run import Checkpoint, SequentialRun

__all__ = ["Checkpoint", "SequentialRun"]
