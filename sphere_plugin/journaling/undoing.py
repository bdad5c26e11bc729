"""Take the last edits of a run back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sphere_plugin.errors import CacheError
from sphere_plugin.journaling.disk import MEASURED
from sphere_plugin.journaling.lock import run_lock
from sphere_plugin.journaling.store import Journal
from sphere_plugin.paths import user_path


@dataclass(frozen=True)
class Undone:
    """What `undo` did.

    Attributes:
        edits: how many are in the weights now.
        batches: how many were taken back.
        kept: the folder where they are now; None if there were none.
    """

    edits: int
    batches: int
    kept: Path | None


def undo(folder: Path | str, to: int) -> Undone:
    """Take all edits of the run in ``folder`` back but the first ``to``; 0 takes all of them back.

    The run can go on from there, and its weights after ``to`` edits are, bit for bit, what they were then. Batches and
    checkpoints that are taken back are moved to ``undone`` in the folder of the run; nothing is lost.

    Raises:
        ConfigError: ``to`` is not a number of edits between two batches; the message has the nearest.
        CacheError: there is no journal, a file of it is damaged, or another process writes to the folder.
    """
    folder = user_path(folder)
    if not (folder / "journal").is_dir():  # the lock would make a folder
        raise CacheError(str(folder), "no journal", "the folder of a run", "Give the folder that `--out` named.")
    with ExitStack() as stack:
        for place in (folder, *(folder / one for one in MEASURED if (folder / one / "lock").exists())):
            stack.enter_context(run_lock(place))
        journal = Journal.open(folder / "journal")
        number, before = journal.batch_at(to), len(journal)
        kept = journal.truncate(number)
    return Undone(to, before - number, kept)
