"""Several entries on the same edits, each in a process and a folder of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from sphere_plugin.errors import SphereError
from sphere_plugin.files import write_json
from sphere_plugin.sequence.entries import OWN, split
from sphere_plugin.sequence.manifest import NAME
from sphere_plugin.sequence.runner import Run, resume, start
from sphere_plugin.sequence.settings import RunSettings
from sphere_plugin.sequence.workers import logged, workers_environment

COMPARISON: Final = "comparison.json"
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


def compare(
    settings: RunSettings, folder: Path, jobs: int = 1, progress: Callable[[int], None] | None = None
) -> list[Ended]:
    """Run every entry in ``folder/<entry>``, or go on with it where it was stopped.

    An entry that fails leaves the others alone; its folder has the log.

    Args:
        settings: of the comparison.
        folder: for the entries' folders.
        jobs: entries at a time; the threads of torch are shared out among them.
        progress: told the number of edits done, of all entries, from time to time.
    """
    write_json(folder / COMPARISON, settings.plain())
    context = multiprocessing.get_context("spawn")
    with workers_environment(max(1, torch.get_num_threads() // jobs)):
        if settings.share_targets:
            first = next((one for one in settings.entries if split(one)[0] in OWN), None)
            if first is not None:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    pool.submit(_find_targets, settings.for_entry(first), folder / first).result()
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            running = {pool.submit(_work, settings.for_entry(one), folder / one): one for one in settings.entries}
            _watch(set(running), settings, folder, progress or (lambda done: None))
    return [_ended(one, future) for future, one in running.items()]


def _watch(running: set[Future[Ended]], settings: RunSettings, folder: Path, progress: Callable[[int], None]) -> None:
    while running:
        _, running = wait(running, timeout=_EVERY)
        batches = (len(list((folder / one / "journal").glob("*.json"))) for one in settings.entries)
        progress(sum(min(count * settings.batch_size, settings.edits) for count in batches))


def _ended(entry: str, future: Future[Ended]) -> Ended:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - a worker that was killed, for want of memory most likely
        return Ended(entry, 0, failed=f"{type(error).__name__}: {error}")


def _find_targets(settings: RunSettings, folder: Path) -> None:
    Run(settings, folder)


def _work(settings: RunSettings, folder: Path) -> Ended:
    """One entry, in its own process."""
    entry = settings.entries[0]
    with logged(folder):
        try:
            outcome = resume(folder) if (folder / NAME).exists() else start(settings, folder)
        except SphereError as error:
            return Ended(entry, 0, failed=str(error))
    return Ended(entry, outcome.edits, outcome.stopped)
