"""What ``sphere run`` does with its arguments."""

from __future__ import annotations

import argparse
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from math import exp
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Final

from tqdm import tqdm

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import CacheError, ConfigError, SphereError
from sphere_plugin.evaluation.scores import score_key
from sphere_plugin.files import read_json
from sphere_plugin.folders import SWEEP
from sphere_plugin.journaling.revisit import RESTORE
from sphere_plugin.parallel.environment import log_name
from sphere_plugin.parallel.joining import joined
from sphere_plugin.parallel.ranks import Ranks
from sphere_plugin.parsing import yaml_of
from sphere_plugin.paths import absolute_path, is_file, user_path
from sphere_plugin.progress import Bars
from sphere_plugin.sequence.compare import Ended, compare, refuse_used
from sphere_plugin.sequence.crew import Crew
from sphere_plugin.sequence.entries import check_shape, label, parse
from sphere_plugin.sequence.manifest import COMPARISON, read_manifest
from sphere_plugin.sequence.plan import needs_of, plan
from sphere_plugin.sequence.presets import preset
from sphere_plugin.sequence.runner import check, resume, start
from sphere_plugin.sequence.settings import RunSettings
from sphere_plugin.sequence.workers import logged

_LOG = logging.getLogger("sphere_plugin")

HPARAMS: Final = Path("hparams/SPHERE/smollm2-135m.yaml")  # without others, in the folder where one is

# Flags that say what to do; all others are for a new run.
_ANY: Final = ("command", "resume", "without_guard", "jobs")
# Flags that are settings of the same name.
_SAME: Final = ("data", "text", "edits", "batch_size", "checkpoints", "order", "sample", "fluency") + (
    ("protocol", "seed", "share_targets")
)


def run(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Start, continue or plan a run; returns the exit code, 1 if an entry failed or was stopped, and what to say.

    Under torchrun this is called in every process; what rank 0 does, the others do with it.
    """
    with joined() as ranks:
        if ranks.is_main:
            return _run(arguments, ranks)
        follow(ranks)
    return 0, []


def follow(ranks: Ranks) -> None:
    """What a process other than rank 0 does in runs: its share, until rank 0 ends."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with ExitStack() as around:

        def begin(ranks: Ranks, settings: dict[str, Any], folder: str) -> Crew:
            around.close()
            around.enter_context(logged(Path(folder) / "logs", log_name(ranks.rank)))
            _LOG.info("rank %d of %d: process %d on %s", ranks.rank, ranks.size, os.getpid(), platform.node())
            place = around.enter_context(TemporaryDirectory(prefix="sphere-rank-"))  # for what EasyEdit logs
            return Crew(RunSettings.from_mapping(settings), Path(place), ranks)

        ranks.follow(begin, _log)


def _log(error: Exception) -> None:
    _LOG.error("%s: %s", type(error).__name__, error, exc_info=None if isinstance(error, SphereError) else error)


def _run(arguments: argparse.Namespace, ranks: Ranks) -> tuple[int, list[str]]:
    check_number("--jobs", arguments.jobs, 1, whole=True)
    if arguments.resume is not None:
        _refuse_others(arguments)
        folder = user_path(arguments.resume).resolve()
        return _told(_resumed(folder, arguments, ranks), folder)
    refuse_unguarded(arguments)
    if arguments.scale is not None and arguments.preset is None:
        raise ConfigError("--scale", arguments.scale, "a preset to scale", "Write --preset NAME, or --edits N.")
    settings = settings_of(arguments)
    check(settings)
    if arguments.plan:
        if ranks.size > 1:
            raise ConfigError("--plan", f"{ranks.size} processes", "one", "Start it without torchrun.")
        return _planned(settings)
    if arguments.out is None:
        raise ConfigError("--out", "nothing", "a folder for the run", "Write --out runs/NAME.")
    out = user_path(arguments.out).resolve()
    refuse_used(out)
    if arguments.compare is None and len(settings.entries) == 1:
        return _told(_single(settings, out, ranks), out)
    return _told(_several(settings, out, arguments, ranks), out)


def _planned(settings: RunSettings) -> tuple[int, list[str]]:
    """What each entry needs and would take; one that does not fit is not tried, and makes the exit code 1."""
    code, lines = 0, []
    for entry in settings.entries:
        single = settings.for_entry(entry)
        needs = needs_of(single)
        lines += [f"{label(entry)}, {text}" for text, _ in needs]
        if any(short for _, short in needs):
            code = 1
        else:
            lines.append(plan(single).sentence(label(entry)))
    return code, lines


def _refuse_others(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for settings beside --resume: a run goes on with its own."""
    for name, value in vars(arguments).items():
        if name not in _ANY and not (value is None or value is False or value == []):
            flag = "a YAML" if name == "settings" else f"--{name.replace('_', '-')}"
            remedy = "Leave it out: a run goes on with the settings it began with."
            raise ConfigError("--resume", flag, "nothing but --jobs and --without-guard beside it", remedy)


def refuse_unguarded(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for --without-guard on what has not begun."""
    if arguments.without_guard:
        remedy = "Leave it out, and the guard out of the YAML."
        raise ConfigError("--without-guard", "a new run", "a run to go on with, by --resume", remedy)


def settings_of(arguments: argparse.Namespace) -> RunSettings:
    """The settings in the YAML, over those of the preset, under the flags."""
    content: dict[str, Any] = {} if arguments.preset is None else preset(arguments.preset, arguments.scale)
    if arguments.settings is not None:
        content |= RunSettings.from_yaml(arguments.settings)
    content |= {name: getattr(arguments, name) for name in _SAME if getattr(arguments, name) is not None}
    if arguments.compare is not None and arguments.entry is not None:
        raise ConfigError("--entry", arguments.entry, "one of --entry and --compare", "Name all entries in --compare.")
    if arguments.compare is not None or arguments.entry is not None:
        content["entries"] = parse(arguments.entry if arguments.compare is None else arguments.compare)
    if arguments.hparams is not None:
        content["hparams"] = arguments.hparams
    if arguments.model is not None:
        content |= _model(arguments.model, absolute_path("hparams", content.get("hparams") or HPARAMS))
    content.setdefault("hparams", HPARAMS)
    content["settings"] = _with(content.get("settings") or {}, arguments.set)
    return RunSettings.from_mapping(content)


def _model(name: str, hparams: Path) -> dict[str, Any]:
    """A model by the name of its YAML, which lies beside ``hparams``, or any other model with the same settings."""
    beside = hparams.parent / f"{name}.yaml"
    return {"hparams": beside, "model": None} if name == Path(name).name and is_file(beside) else {"model": name}


def _with(settings: Mapping[str, Mapping[str, Any]], given: list[str]) -> Mapping[str, Mapping[str, Any]]:
    """The settings, with those of ``--set``: "KEY=VALUE" for all entries, "ENTRY.KEY=VALUE" for one."""
    if not given:
        return settings
    check_shape(settings)
    found = {entry: dict(values) for entry, values in settings.items()}
    for one in given:
        key, equals, value = one.partition("=")
        entry, dot, name = key.rpartition(".")
        if not equals or not name:
            raise ConfigError(
                "--set", one, "KEY=VALUE or ENTRY.KEY=VALUE", "Write --set memit.mom2_update_weight=200."
            )
        found.setdefault(entry if dot else "all", {})[name] = _value(one, value)
    return found


def _value(given: str, text: str) -> Any:
    try:
        return yaml_of(text)
    except ValueError as error:
        raise ConfigError("--set", given, f"a value as in a YAML ({error})", "Write --set v_lr=0.5.") from error


def _single(settings: RunSettings, out: Path, ranks: Ranks) -> list[Ended]:
    with logged(out):
        outcome = start(settings, out, Bars(hide=frozenset(("aiming",))), ranks)
    return [Ended(settings.entries[0], outcome.edits, outcome.stopped)]


def _resumed(folder: Path, arguments: argparse.Namespace, ranks: Ranks) -> list[Ended]:
    if (folder / COMPARISON).exists():
        return _several(_compared(folder / COMPARISON), folder, arguments, ranks)
    if (folder / SWEEP).exists():
        remedy = f"Continue it with `sphere sweep --resume {folder}`."
        raise ConfigError("--resume", str(folder), "the folder of a run or a comparison, not of a sweep", remedy)
    entry = read_manifest(folder)["entry"]
    with logged(folder):
        outcome = resume(folder, Bars(hide=frozenset(("aiming",))), not arguments.without_guard, ranks)
    return [Ended(entry, outcome.edits, outcome.stopped)]


def _compared(path: Path) -> RunSettings:
    """The settings a comparison began with."""
    content = read_json(path, RESTORE)
    try:
        return RunSettings.from_mapping(content)
    except (ConfigError, TypeError) as error:
        remedy = "Read it with the version of sphere-plugin that wrote it."
        raise CacheError(str(path), str(error), "the settings of a comparison", remedy) from error


def _several(settings: RunSettings, out: Path, arguments: argparse.Namespace, ranks: Ranks) -> list[Ended]:
    guarded = not arguments.without_guard
    with tqdm(total=settings.edits * len(settings.entries), desc="edits") as bar:
        return compare(settings, out, arguments.jobs, lambda done: show(bar, done), guarded, ranks)


def show(bar: tqdm[Any], done: int) -> None:
    """Put a progress bar to where the work is, which may be further back than it was."""
    bar.n = done
    bar.refresh()


def _told(ended: list[Ended], folder: Path) -> tuple[int, list[str]]:
    states = [one.failed or one.stopped for one in ended]
    several = (folder / COMPARISON).exists()
    lines = [
        f"{label(one.entry):28} {one.edits:6d} edits{_scored(folder / one.entry if several else folder, one.edits)}"
        f"{'' if state is None else '; ' + state}"
        for one, state in zip(ended, states, strict=True)
    ]
    page = [f"sphere report {folder}"] if any(one.edits for one in ended) else []
    return int(any(states)), [*lines, "", str(folder), *page]


def _scored(folder: Path, edits: int) -> str:
    """What the checkpoint of a run after so many edits says, if there is one: means over the edits that are scored."""
    path = folder / "checkpoints" / f"{edits:06d}.json"
    if not path.exists():
        return ""
    scores, protocol = read_json(path)["scores"], read_manifest(folder)["protocol"]
    told = []
    for name in ("efficacy", "generalization", "specificity"):
        known = [value for value in scores[score_key(name, protocol)] if value is not None]
        told += [f"{name} {100 * fmean(known):.1f}"] if known else []
    nll = scores["nll"]
    parts = [
        *([f"{', '.join(told)} %"] if told else []),
        *([] if nll is None else [f"perplexity {exp(min(nll, 700.0)):.4g}"]),
    ]
    return f": {', '.join(parts)}" if parts else ""
