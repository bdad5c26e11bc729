"""What ``sphere audit`` does with its arguments."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.evaluation.audits import FOLDER, KINDS, TITLES, grown, lowered
from sphere_plugin.evaluation.embeddings import embedder
from sphere_plugin.evaluation.paraphrases import source_of
from sphere_plugin.evaluation.responses import Sampling
from sphere_plugin.evaluation.uncertainty import Change
from sphere_plugin.journaling import run_lock
from sphere_plugin.parallel.joining import joined
from sphere_plugin.parallel.ranks import Ranks
from sphere_plugin.paths import user_path
from sphere_plugin.progress import Bars
from sphere_plugin.report.studies import distance
from sphere_plugin.sequence.audit import Options, RunAudit
from sphere_plugin.sequence.finished import labels_of, moments_of, runs_in
from sphere_plugin.sequence.panel import convene

_LOG = logging.getLogger("sphere_plugin")

_HEADS = ("edits", "prompts", "U before", "U after", "ΔU", "95 % from", "to", "aleatoric", "epistemic")


def run(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Audit a run or a comparison; returns the exit code, 1 if a model could not be asked, and the tables.

    Under torchrun this is called in every process; rank 0 says what the others ask.

    Raises:
        SphereError: a folder, a file or a setting that cannot be, before anything is measured.
    """
    with joined() as ranks:
        if ranks.is_main:
            return _run(arguments, ranks)
        ranks.follow(convene, lambda error: _LOG.debug("%s", error))  # rank 0 tells
    return 0, []


def _run(arguments: argparse.Namespace, ranks: Ranks) -> tuple[int, list[str]]:
    target, options = user_path(arguments.target), options_of(arguments)
    source = source_of(options.paraphrases)
    runs = [RunAudit(folder, options, source) for folder in runs_in(target)]
    for one, label in zip(runs, labels_of(runs), strict=True):
        one.label = label
    if not any(one.moments for one in runs):
        made = max(one.edits for one in runs)
        raise ConfigError("--at", list(options.at) or "nothing", f"a number up to {made} edits", "Choose another.")
    failed = []
    embed = embedder(options.embedder) if any(one.due for one in runs) else None
    for one in runs:
        if embed is None or not one.due:
            continue
        try:
            with run_lock(one.folder / FOLDER):
                one.measure(embed, [other for other in runs if other is not one], Bars(), ranks)
        except ModelError as error:
            failed.append(f"{one.label}: {error}")
    return int(bool(failed)), [*table(runs, options.at), *failed, "", f"sphere report {target}"]


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the flags stand for.

    Raises:
        ConfigError: a value out of its range.
    """
    return Options(
        at=() if arguments.at is None else moments_of(arguments.at),
        facts=arguments.facts,
        around=arguments.neighbours,
        paraphrases=arguments.paraphrases,
        embedder=arguments.embedder,
        sampling=Sampling(arguments.samples, arguments.tokens, arguments.temperature, arguments.top_p, arguments.seed),
        data=None if arguments.data is None else user_path(arguments.data).resolve(),
        model=arguments.model,
        device=arguments.device,
    )


def table(runs: Sequence[RunAudit], at: Sequence[int]) -> list[str]:
    """As the paper's Tables 3 and 4: U and ΔU of every run, and SPHERE's part in it."""
    lines: list[str] = []
    width = max([28, *(len(one.label) for one in runs)])
    for kind, title in zip(KINDS, TITLES, strict=True):
        rows = [
            one.label.ljust(width) + row for one in runs for edits in one.moments for row in _row(one, edits, kind)
        ]
        if rows:
            lines += [title.ljust(width) + "".join(f"{head:>11}" for head in _HEADS), *rows]
            lines += [*_pairs(runs, kind), ""]
    lines += [f"{one.label}: {one.edits} edits made" for one in runs if set(at) - set(one.moments)]
    return [*lines, *_sources(runs)]


def _row(one: RunAudit, edits: int, kind: str) -> list[str]:
    if edits not in one.audits or 0 not in one.audits:
        return []
    parts = grown(one.audits[0], one.audits[edits], kind)
    if not parts:
        return []
    total = parts["total"]
    cells = [str(edits), str(total.change.n), f"{total.before:.4f}", f"{total.after:.4f}", *_change(total.change)]
    cells += [_signed(parts[part].change.value) for part in ("aleatoric", "epistemic")]
    return ["".join(f"{cell:>11}" for cell in cells)]


def _pairs(runs: Sequence[RunAudit], kind: str) -> list[str]:
    """ΔU of x+sphere minus ΔU of x in the same comparison; of several x the one that a report takes."""
    lines = []
    for one in runs:
        entry = one.entry.removesuffix("+sphere")
        alone = [base for base in runs if _place(base, base.entry) == _place(one, entry)]
        if entry == one.entry or not alone:
            continue
        base = min(alone, key=partial(distance, one))
        for edits in sorted(set(base.moments) & set(one.moments)):
            audits = (base.audits.get(0), base.audits.get(edits), one.audits.get(edits))
            found = None if None in audits else lowered(*audits, kind)  # type: ignore[arg-type]
            if found is not None:
                value, low, high = _change(found)
                told = f"{found.n} prompts, {edits} edits"
                lines.append(f"SPHERE on {base.label}: ΔU {value}, 95 % from {low} to {high} ({told})")
    return lines


def _place(one: RunAudit, entry: str) -> tuple[Path, object, bool, str]:
    """Where a run of ``entry`` on the same edits and kind of targets would be."""
    order, shared = (one.manifest.get("data") or {}).get("order"), bool(one.manifest.get("share_targets"))
    return one.folder.parent, order, shared, entry


def _change(change: Change) -> list[str]:
    return [_signed(value) for value in (change.value, change.low, change.high)]


def _signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.3f}"


def _sources(runs: Sequence[RunAudit]) -> list[str]:
    """Where the paraphrases came from."""
    told: dict[str, None] = {}
    for one in runs:
        for audit in (one.audits[edits] for edits in one.moments if edits in one.audits):
            for kind, title in zip(KINDS, TITLES, strict=True):
                counts = ", ".join(f"{name} ({count})" for name, count in audit.sources(kind).items())
                if counts:
                    told[f"paraphrases of {title}: {counts}"] = None
    return list(told)
