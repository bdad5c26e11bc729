"""What ``sphere sweep`` does with its arguments: every cell of a grid is a run, as the entries of a comparison are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tqdm import tqdm

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.folders import SWEEP
from sphere_plugin.journaling.revisit import RESTORE
from sphere_plugin.paths import user_path
from sphere_plugin.progress import Bars
from sphere_plugin.report.page import NUMBERS, check_libraries, write_report
from sphere_plugin.report.sweep import FORMAT
from sphere_plugin.sequence.cells import SweepSettings, described
from sphere_plugin.sequence.command import refuse_unguarded, show
from sphere_plugin.sequence.compare import Ended, Task, refuse_used, run_all
from sphere_plugin.sequence.entries import label
from sphere_plugin.sequence.manifest import NAME
from sphere_plugin.sequence.plan import Plan, plan, time_in_words
from sphere_plugin.sequence.settings import RunSettings

REPORT: Final = "report"


def run(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Begin, continue or plan a sweep; returns the exit code, 1 if a run failed or was stopped, and what to say."""
    check_number("--jobs", arguments.jobs, 1, whole=True)
    if arguments.resume is not None:
        for name in ("settings", "out", "data", "plan"):
            if getattr(arguments, name):
                flag = "a YAML" if name == "settings" else f"--{name}"
                remedy = "Leave it out: a sweep goes on with the settings it began with."
                raise ConfigError("--resume", flag, "nothing but --jobs and --without-guard beside it", remedy)
        check_libraries()
        folder = user_path(arguments.resume).resolve()
        return _go(taken_up(folder), folder, arguments)
    refuse_unguarded(arguments)
    sweep = _settings_of(arguments)
    sweep.check()
    if arguments.plan:
        return 0, planned(sweep)
    check_libraries()
    if arguments.out is None:
        raise ConfigError("--out", "nothing", "a folder for the sweep", "Write --out runs/NAME.")
    folder = user_path(arguments.out).resolve()
    refuse_used(folder)
    write_json(folder / SWEEP, described(sweep))
    return _go(sweep, folder, arguments)


def taken_up(folder: Path) -> SweepSettings:
    """The settings of the sweep in ``folder``, if what they lead to is still what it began with.

    Raises:
        CacheError: there is no sweep, or its YAML, facts or text are others now.
    """
    if not (folder / SWEEP).exists():
        raise CacheError(str(folder), f"no {SWEEP}", "the folder of a sweep", "Give the folder that --out named.")
    content = read_json(folder / SWEEP, RESTORE)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        sweep, then = SweepSettings.from_mapping(content["settings"]), dict(content["made_of"])
    except (KeyError, TypeError, ValueError) as error:
        remedy = "Restore the file, or begin a new sweep."
        raise CacheError(str(folder / SWEEP), str(error), "a file as `sphere sweep` wrote it", remedy) from error
    sweep.check()
    words = {"hparams": "the settings of the methods", "data": "the file of facts", "text": "the held-out text"}
    for key, digest in sweep.made_of().items():
        if then.get(key) != digest:
            remedy = "Put it back as it was, or begin a new sweep."
            raise CacheError(f"{folder}: {words[key]}", digest, f"{then.get(key)}, as when the sweep began", remedy)
    return sweep


def planned(sweep: SweepSettings) -> list[str]:
    """What a sweep would take, from a probe of each method alone and with SPHERE; a sentence each, and the whole."""
    said, whole = [], Plan(0.0, 0.0, 0, 0, 0)
    tasks = sweep.tasks(Path())
    for entry in dict.fromkeys(task.settings.entries[0] for task in tasks):
        group = [task.settings for task in tasks if task.settings.entries[0] == entry]
        one, count = plan(group[0]), len(group)
        said.append(f"{count} run{'s' if count > 1 else ''}, each {one.sentence(label(entry))}")
        whole = Plan(
            whole.editing + count * one.editing,
            whole.scoring + count * one.scoring,
            whole.disk + count * one.disk,
            max(whole.memory, one.memory),
            one.facts,
        )
    total = f"{time_in_words(whole.editing + whole.scoring)}, {whole.disk / 1e6:.0f} MB of disk"
    return [*said, f"{len(tasks)} runs in all: {total}, one after the other; --jobs N takes N times the memory"]


def _settings_of(arguments: argparse.Namespace) -> SweepSettings:
    if arguments.settings is None:
        raise ConfigError("sweep", "nothing", "a YAML of settings", "docs/sweep.md has an example.")
    content = RunSettings.from_yaml(arguments.settings)
    return SweepSettings.from_mapping(content if arguments.data is None else content | {"data": arguments.data})


def _go(sweep: SweepSettings, folder: Path, arguments: argparse.Namespace) -> tuple[int, list[str]]:
    tasks = sweep.tasks(folder)
    with tqdm(total=sum(task.settings.edits for task in tasks), desc="edits") as bar:
        ended = run_all(tasks, arguments.jobs, lambda done: show(bar, done), not arguments.without_guard)
    found = _reported(folder, tasks)
    return _told(folder, tasks, ended, found)


def _reported(folder: Path, tasks: Sequence[Task]) -> list[str]:
    """Write the page, and the numbers of it into the sweep's file; returns what is recommended."""
    if not any((task.folder / NAME).exists() for task in tasks):
        return []
    write_report([folder], folder / REPORT, tell=Bars())
    (found,) = read_json(folder / REPORT / NUMBERS)["sweeps"]
    known = read_json(folder / SWEEP)
    write_json(folder / SWEEP, {key: known[key] for key in ("format", "settings", "made_of")} | found)
    return [one["in_words"] for one in found["recommended"]]


def _told(
    folder: Path, tasks: Sequence[Task], ended: Sequence[Ended], recommended: Sequence[str]
) -> tuple[int, list[str]]:
    lines = []
    for task, one in zip(tasks, ended, strict=True):
        state = one.failed or one.stopped
        if state is not None:
            lines.append(f"{task.folder.relative_to(folder)}: {one.edits} edits; {state}")
    whole = len(ended) - len(lines)
    told = [f"{whole} of {len(ended)} runs finished", *lines, "", *recommended, "", str(folder)]
    return int(bool(lines)), [*told, f"{folder / REPORT / 'report.html'}"]
