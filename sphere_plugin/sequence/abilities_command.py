"""What ``sphere abilities`` does with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation.abilities import LOCAL, Suite
from sphere_plugin.evaluation.benchmarks import Data
from sphere_plugin.evaluation.tallies import FOLDER, path_of
from sphere_plugin.files import check_writable, fingerprint
from sphere_plugin.folders import find_folders
from sphere_plugin.journaling import run_lock
from sphere_plugin.journaling.revisit import Revisited, opened
from sphere_plugin.models import load_model
from sphere_plugin.models.placement import usable_device
from sphere_plugin.paths import user_path
from sphere_plugin.progress import Bars
from sphere_plugin.sequence.abilities import data_of, names_of
from sphere_plugin.sequence.finished import labels_of, moments_of
from sphere_plugin.sequence.manifest import NAME
from sphere_plugin.sequence.measured import Abilities, told

_GAP: Final = "  "

Moments = dict[int, dict[str, dict[str, Any]]]  # edits -> task -> what is kept of it


@dataclass(frozen=True)
class _Run:
    """A run to look at: its folder, its label, and number of edits -> fingerprint of the weights then."""

    folder: Path
    label: str
    moments: Mapping[int, str]


def run(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Measure a model, a run or a comparison; returns the exit code and the tables.

    Raises:
        SphereError: a target, a task, a file or a moment that cannot be, before anything is measured.
    """
    device = usable_device(arguments.device)
    target = user_path(arguments.target)
    folders = find_folders(target, NAME) if target.is_dir() else []
    if folders and arguments.out is not None:
        raise ConfigError("--out", str(arguments.out), "nothing beside a run", "Its scores go into its own folder.")
    if not folders and arguments.at is not None:
        raise ConfigError("--at", arguments.at, "nothing beside a model", "Only runs have moments.")
    names = names_of(arguments.tasks)
    if not names and arguments.text is None:
        raise ConfigError(
            "--tasks", arguments.tasks, "names of tasks, or --text", "Leave it out for the paper's four."
        )
    suite = Suite(names, _data(arguments.data), arguments.limit, arguments.text, arguments.batch_size)
    if not folders:
        return 0, [*_model(arguments, suite, device), "", *_notes(suite)]
    runs = [_looked_up(folder, arguments.at) for folder in folders]
    for one in runs:
        for edits, weights in one.moments.items():
            Abilities(one.folder, suite).missing(edits, weights)
    lines = []
    bars, total = Bars(), sum(len(one.moments) for one in runs) * len(suite.names)
    for one, label in zip(runs, labels_of(runs), strict=True):
        with run_lock(one.folder / FOLDER):
            found = _measured(one, suite, device, lambda done: bars("abilities", done, total))
        lines += [label, *table(suite.names, found), ""]
    return 0, [*lines, *_notes(suite)]


def table(names: Sequence[str], found: Moments) -> list[str]:
    """The scores of one model at its moments: a head and a line each, ± the standard error."""
    rows = [("edits", *names)]
    rows += [(str(edits), *(told(found[edits][name]) for name in names)) for edits in sorted(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_GAP.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


# ---- runs ----


def _looked_up(folder: Path, at: str | None) -> _Run:
    journal, manifest = opened(folder)
    last = journal.edits()
    points = [int(point) for point in manifest.get("checkpoints") or ()]
    wanted = moments_of(at) if at is not None else [point for point in {0, *points, last} if point <= last]
    moments = {edits: journal.fingerprint(journal.batch_at(edits)) for edits in sorted(wanted)}
    check_writable(path_of(folder, 0))
    return _Run(folder, str(manifest.get("label") or folder.name), moments)


def _measured(run: _Run, suite: Suite, device: torch.device, tell: Any) -> Moments:
    """What is there already and what is measured now; the model is loaded only if something is missing."""
    kept, live = Abilities(run.folder, suite), None
    found: Moments = {}
    for edits, weights in run.moments.items():
        missing = kept.missing(edits, weights)
        if missing and live is None:
            live = Revisited(run.folder)
            live.model.to(device)
        if missing and live is not None:
            live.go(edits)
        tell(len(suite.names) - len(missing))
        model, tokenizer = (None, None) if live is None else (live.model, live.tokenizer)
        found[edits] = kept.measure(edits, weights, model, tokenizer, lambda name: tell(1))
    return found


# ---- a model ----


def _model(arguments: argparse.Namespace, suite: Suite, device: torch.device) -> list[str]:
    out = None if arguments.out is None else user_path(arguments.out)
    if out is not None:
        check_writable(path_of(out, 0))
    model, tokenizer = load_model(arguments.target, device=device)
    weights = fingerprint(model.named_parameters())
    bars, total = Bars(), len(suite.names)
    kept = Abilities(out, suite)
    found = kept.measure(0, weights, model, tokenizer, lambda name: bars("abilities", 1, total))
    return [arguments.target, *table(suite.names, {0: found})]


def _data(given: Sequence[str]) -> Data | None:
    """One folder, or files as BENCHMARK=FILE."""
    pairs = [one.partition("=") for one in given]
    if all(mark for _, mark, _ in pairs):
        return data_of({name: path for name, _, path in pairs}) if pairs else None
    if len(given) > 1:
        raise ConfigError("--data", " ".join(given), "one folder, or BENCHMARK=FILE for each", "Write --data DIR.")
    if not user_path(given[0]).is_dir():
        raise ConfigError("--data", given[0], "a folder, or BENCHMARK=FILE", "Write --data DIR, or --data rte=FILE.")
    return data_of(given[0])


def _notes(suite: Suite) -> list[str]:
    """What the numbers are of."""
    lines = ["In per cent, ± the standard error; perplexity per token."]
    for name in suite.names:
        how = suite.how(name)
        source = f", {how['file']}" if "file" in how else ""
        parts = (
            f"{how['task']} {how['version']} of {how['harness']}, {how['records']} records" if "task" in how else ""
        )
        lines.append(f"{name}: {parts}{source}" if parts else f"{name}: {how['file']}")
    if any(name not in LOCAL for name in suite.names if "task" in suite.how(name)):
        lines.append("Records of the harness's own tasks come from a hub.")
    return lines
