"""Several entries on the same edits, each in a process and a folder of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import torch

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError, RanksError, SphereError
from sphere_plugin.files import write_json
from sphere_plugin.folders import SWEEP, find_folders
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.disk import numbered
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.sequence.guard import Events
from sphere_plugin.sequence.manifest import COMPARISON, NAME, read_manifest
from sphere_plugin.sequence.runner import Run, check, resume, start
from sphere_plugin.sequence.settings import RunSettings
from sphere_plugin.sequence.workers import logged, workers_environment

_EVERY: Final = 2.0  # seconds between two looks at how far the runs are


@dataclass(frozen=True)
class Ended:
    """How an entry ended.

    Attributes:
        entry: its name.
        edits: in the weights.
        stopped: why its guard stopped it; None if it did not.
        failed: the error that ended it; None if there was none.
    """

    entry: str
    edits: int
    stopped: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Task:
    """A run of one entry.

    Attributes:
        settings: of one entry.
        folder: of the run; it need not be there.
    """

    settings: RunSettings
    folder: Path

    @property
    def done(self) -> int:
        """How many edits are in its journal, as far as the names of files tell."""
        return _done(self.settings, self.folder)


Work = Callable[[RunSettings, Path, bool], Ended]


def compare(
    settings: RunSettings,
    folder: Path,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
    guarded: bool = True,
    ranks: Ranks = ALONE,
) -> list[Ended]:
    """Run every entry in ``folder/<entry>``, or go on with it where it was stopped.

    An entry that fails, or whose process is killed, leaves the others alone; its folder has the log. Where processes
    share the work, entries run one after the other in them, and a process that is killed ends the comparison.

    Args:
        settings: of the comparison.
        folder: for the entries' folders.
        jobs: entries at a time; the threads of torch are shared out among them, but entries that have begun, and all
            others with them, keep to the number they began with.
        progress: told the number of edits done, of all entries, from time to time.
        guarded: see `resume`; entries that have not begun begin without a guard.
        ranks: see `Run`.

    Raises:
        SphereError: what can be said before anything is started.
    """
    check_number("--jobs", jobs, 1, whole=True)
    if ranks.size > 1 and jobs > 1:
        raise ConfigError("--jobs", jobs, f"1: {ranks.size} processes share each entry", "Leave it out.")
    check(settings)
    write_json(folder / COMPARISON, settings.plain())
    tasks = [Task(settings.for_entry(entry), folder / entry) for entry in settings.entries]
    if ranks.size > 1:
        return _one_after_the_other(tasks, progress or (lambda done: None), guarded, ranks)
    if settings.share_targets:  # once, before two entries look for them at the same time
        _side_by_side(_find_targets, tasks[:1], jobs, guarded, lambda: None)
    return run_all(tasks, jobs, progress, guarded)


def run_all(
    tasks: Sequence[Task], jobs: int = 1, progress: Callable[[int], None] | None = None, guarded: bool = True
) -> list[Ended]:
    """Do every run in a process of its own, or go on with it where it was stopped; see `compare`.

    Returns:
        How each ended, in the order of ``tasks``.
    """
    told = progress or (lambda done: None)
    return _side_by_side(_work, tasks, jobs, guarded, lambda: told(sum(task.done for task in tasks)))


def _one_after_the_other(
    tasks: Sequence[Task], told: Callable[[int], None], guarded: bool, ranks: Ranks
) -> list[Ended]:
    ended = []
    for task in tasks:
        ended.append(_work(task.settings, task.folder, guarded, ranks))
        told(sum(one.done for one in tasks))
    return ended


def _side_by_side(
    work: Work, tasks: Sequence[Task], jobs: int, guarded: bool, look: Callable[[], None]
) -> list[Ended]:
    """``work`` on every task in a process of its own, so many at a time."""
    context = multiprocessing.get_context("spawn")
    waiting, ended = list(enumerate(tasks)), dict[int, Ended]()
    running = dict[Any, tuple[int, Any]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, task = waiting.pop(0)
                answers, theirs = context.Pipe(duplex=False)
                arguments = (theirs, work, task.settings, task.folder, guarded)
                process = context.Process(target=_answer, args=arguments, daemon=True)
                with workers_environment(_threads(task, tasks, jobs)):
                    process.start()
                theirs.close()
                running[answers] = number, process
            for ready in wait(list(running), timeout=_EVERY):
                number, process = running.pop(ready)
                ended[number] = _ended(tasks[number], ready, process)
            look()
    finally:
        for _, process in running.values():
            process.terminate()
    return [ended[number] for number in range(len(tasks))]


def _threads(task: Task, tasks: Sequence[Task], jobs: int) -> int:
    """An even share, or as many as the run began with, or another of them: last digits depend on it."""
    for folder in (task.folder, *(one.folder for one in tasks)):
        with suppress(SphereError):  # there is no manifest yet, or whoever goes on with that run will hear of it
            began = read_manifest(folder).get("threads")
            if isinstance(began, int) and began > 0:
                return began
    return max(1, torch.get_num_threads() // jobs)


def _answer(answers: Any, work: Work, settings: RunSettings, folder: Path, guarded: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers.send(work(settings, folder, guarded))


def _end_with_parent() -> None:
    """Nobody would hear the answer, and the lock of the run would stay."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ended(task: Task, answers: Any, process: Any) -> Ended:
    """What a process answered before it ended."""
    try:
        ended: Ended = answers.recv()
    except EOFError:
        process.join()
        killed = " (killed, for want of memory most likely)" if process.exitcode == -9 else ""
        why = f"its process ended with code {process.exitcode}{killed}"
        ended = Ended(task.settings.entries[0], task.done, failed=why)
    return ended


def _done(settings: RunSettings, folder: Path) -> int:
    """How many edits are in the journal of a run, as far as the names of files tell."""
    batches = max(numbered(folder / "journal"), default=0)
    return min(batches * settings.batch_size, settings.edits)


# ---- what the processes do ----


def _find_targets(settings: RunSettings, folder: Path, guarded: bool) -> Ended:  # noqa: ARG001 (as `_work`)
    with logged(folder):
        try:
            Run(settings, folder)
        except SphereError as error:
            return Ended(settings.entries[0], 0, failed=str(error))  # every entry will say so
    return Ended(settings.entries[0], 0)


def _work(settings: RunSettings, folder: Path, guarded: bool, ranks: Ranks = ALONE) -> Ended:
    entry, begun = settings.entries[0], (folder / NAME).exists()
    try:
        stopped = _stopped(folder) if begun and guarded else None
        if stopped is not None:
            return Ended(entry, _done(settings, folder), stopped=stopped)
        fresh = settings if guarded else dataclasses.replace(settings, guard=None)
        with logged(folder):
            outcome = resume(folder, None, guarded, ranks) if begun else start(fresh, folder, None, ranks)
    except RanksError:  # there are no processes for another entry
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this entry only
        failed = str(error) if isinstance(error, SphereError) else f"{type(error).__name__}: {error}"
        return Ended(entry, _done(settings, folder), failed=failed)
    return Ended(entry, outcome.edits, outcome.stopped)


def _stopped(folder: Path) -> str | None:
    """Why the guard of a run has stopped it where it is."""
    events = Events(folder)
    if not events.all() or events.off:
        return None
    journal = Journal.open(folder / "journal")
    return events.stopped(journal.edits())


def refuse_used(folder: Path) -> None:
    """Raise ConfigError if there is a run, a comparison or a sweep in ``folder``, or a run below it."""
    for name, kind in ((NAME, "run"), (COMPARISON, "run"), (SWEEP, "sweep")):
        if (folder / name).exists():
            remedy = f"Continue it with --resume {folder}."
            raise ConfigError("--out", str(folder), f"a folder without a {kind}", remedy)
    below = find_folders(folder, NAME)
    if below:
        remedy = f"Choose another one: {below[0]} is a run."
        raise ConfigError("--out", str(folder), "a folder with no run below it", remedy)
