"""What ``sphere diagnose`` does: measure, on a run as it lies on disk, what its batches did beside their edits."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from sphere_plugin.data import held_out
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.config import ALPHA_OF, EditingConfig, check_number
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation.diagnoses import (
    path_of,
    read_diagnosis,
    read_spaces,
    spaces_path,
    write_diagnosis,
    write_spaces,
)
from sphere_plugin.files import check_writable
from sphere_plugin.geometry import neurons
from sphere_plugin.geometry.interference import null_dimension
from sphere_plugin.journaling.disk import plain
from sphere_plugin.journaling.revisit import Revisited, opened, put
from sphere_plugin.paths import user_path
from sphere_plugin.progress import Bars
from sphere_plugin.sequence.finished import facts_of, labels_of, moments_of, runs_in, settings_of
from sphere_plugin.sequence.hidden import Step, Strength, numbers
from sphere_plugin.sequence.protected import EDITED, Keys, edited, protected

EVERY: Final = "every"
ETA: Final = 0.5
LEGEND: Final = (
    "broken, reached: updates that break the theorem, and the most that is reached of its bound; C_k: of eq. 34's.",
    "interference: mean length of what an update adds to outputs on the held-out text, of the unedited outputs'.",
    "L_kp: share of that text's inputs, squared, that lies in the editing space. projected: the same by SPHERE.",
)

# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What can be chosen.

    Attributes:
        at: after how many edits; None: after every batch.
        keys: protected inputs of each kind at most.
        seed: of their choice.
        text, data, model: where the held-out text, the file of facts and the unedited model are, where that is not
            where the run found them.
    """

    at: tuple[int, ...] | None = None
    keys: int = 500
    seed: int = 0
    text: Path | None = None
    data: Path | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_number("--keys", self.keys, 1, whole=True)
        check_number("--seed", self.seed, 0, whole=True)
        for edits in self.at or ():
            check_number("--at", edits, 1, whole=True)


def run(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Diagnose every run in a folder; returns the exit code and what to say."""
    text, data = (None if one is None else user_path(one).resolve() for one in (arguments.text, arguments.data))
    at = None if arguments.at == EVERY else moments_of(arguments.at)
    options = Options(at, arguments.keys, arguments.seed, text, data, arguments.model)
    target = user_path(arguments.target)
    jobs = [Diagnosis(folder, options) for folder in runs_in(target)]
    if not any(job.batches for job in jobs):
        got, last = arguments.at, max(job.edits for job in jobs)
        raise ConfigError("--at", got, "a number of edits that a run has made", f"The longest has {last}.")
    for job, label in zip(jobs, labels_of(jobs), strict=True):
        job.label = label
    told = [(job.label, job.go(Bars())) for job in jobs]
    beyond = [f"{job.label}: {job.edits} edits so far, not {list(job.beyond)}" for job in jobs if job.beyond]
    return 0, [*table(told), *beyond, "", f"sphere report {target}"]


class Diagnosis:
    """The batches of one run, each measured once.

    Args:
        folder: of the run; a process may run it meanwhile.
        options: see `Options`.

    Attributes:
        label: "MEMIT + SPHERE".
        edits: how many the run has made.
        batches: the numbers of those that are asked for.
        beyond: numbers of edits that are asked for and that the run has not made.

    Raises:
        CacheError: a file of the run is missing or damaged, or the file of facts is another one.
        ConfigError: a number of edits in ``options.at`` lies between two batches, or a file is not to be found.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self.journal, self.manifest = opened(folder)
        self.label = str(self.manifest.get("label") or self.manifest.get("entry") or folder.name)
        self._hparams: Mapping[str, Any] = (self.manifest.get("method") or {}).get("hparams") or {}
        settings = settings_of(folder, self.manifest)
        self._text = held_out(options.text or settings.text)
        self._records = facts_of(folder, self.manifest, options.data)
        self._strength = self._unprojected()
        self.edits = self.journal.edits()
        self.beyond = tuple(edits for edits in options.at or () if edits > self.edits)
        self.batches = self._wanted()
        check_writable(spaces_path(folder))

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on beside the run."""
        told = {"keys": self.options.keys, "seed": self.options.seed}
        strength = None if self._strength is None else dataclasses.asdict(self._strength)
        text = hashlib.blake2b(self._text.encode(), digest_size=16).hexdigest()
        return {**told, "text": text, "projected": strength}

    def go(self, progress: Progress = lambda what, done, total: None) -> list[dict[str, Any]]:
        """Measure what is not measured yet; returns all that was asked for, in the order of batches."""
        due = [number for number in self.batches if self._known(number) is None]
        if due or self._space_due:
            self._measure(Revisited(self.folder, self.options.model), due, progress)
        return [known for known in map(self._known, self.batches) if known is not None]

    def _measure(self, seen: Revisited, due: Sequence[int], progress: Progress) -> None:
        if self._space_due:
            write_spaces(self.folder, plain(list(self._spaces(seen, progress))))
        if due:
            unedited = seen.journal.weights_after(0)
            names = [name for name, weight in unedited.items() if weight.dim() == 2]
            options = self.options
            keys = protected(seen.model, seen.tokenizer, names, self._text, self._records, options.keys, options.seed)
            for number in due:
                write_diagnosis(self.folder, plain(self._batch(seen, number, unedited, keys)))
                progress(f"diagnosing {self.label}", 1, len(due))

    def _batch(
        self, seen: Revisited, number: int, unedited: Mapping[str, Tensor], keys: Mapping[str, Keys]
    ) -> dict[str, Any]:
        journal, record = seen.journal, seen.journal.record(number)
        before, after, factors = (
            journal.weights_after(number - 1),
            journal.weights_after(number),
            journal.factors(number),
        )
        put(seen.weights, before)
        names = list(next(iter(keys.values())))
        token = self._hparams.get("fact_token") or EditingConfig.fact_token
        own = edited(seen.model, seen.tokenizer, names, record["facts"], token)
        layers = []
        for name in names:
            turned = name in journal.transposed
            unedited_rows, old, new = (neurons(weights[name], turned) for weights in (unedited, before, after))
            inputs = {**{kind: one[name] for kind, one in keys.items()}, EDITED: own[name]}
            step = Step(name, unedited_rows, old, new, factors.get(name))
            layers.append(numbers(step, inputs, self._strength))
        told = {"batch": number, "edits": record["edits"], "after": record["after"], "settings": self.settings}
        return {**told, "layers": layers}

    def _known(self, number: int) -> dict[str, Any] | None:
        """What is measured of a batch with these settings, if it is that of the journal: one may have been undone."""
        path = path_of(self.folder, int(self.journal.record(number)["edits"]))
        if not path.exists():
            return None
        told = read_diagnosis(path)
        same = told["settings"] == self.settings and told.get("after") == self.journal.fingerprint(number)
        return told if same else None

    def _wanted(self) -> list[int]:
        if self.options.at is None:
            return list(range(1, len(self.journal) + 1))
        return [self.journal.batch_at(edits) for edits in self.options.at if edits <= self.edits]

    def _unprojected(self) -> Strength | None:
        """η and α to project the updates of an entry without SPHERE with; None for an entry with a variant."""
        if "+" in str(self.manifest.get("entry")):
            return None
        base = "AlphaEdit" if self._hparams.get("base_method") == "AlphaEdit" else "MEMIT"
        unit = bool(self._hparams.get("row_normalize", True))
        return Strength(float(self._hparams.get("eta") or ETA), dict(ALPHA_OF)[base], unit)

    @property
    def _space_due(self) -> bool:
        return self._hparams.get("base_method") == "AlphaEdit" and read_spaces(self.folder) is None

    def _spaces(self, seen: Revisited, progress: Progress) -> Iterator[dict[str, Any]]:
        """AlphaEdit's null space in every layer; statistics are those of the run, from the cache or counted anew."""
        names = [field.name for field in dataclasses.fields(EditingConfig) if field.name in self._hparams]
        config = EditingConfig(**{**{name: self._hparams[name] for name in names}, "rect": None, "prune": None})
        seen.go(0)
        anatomy = Anatomy.of(seen.model, config)
        for layer, moment in key_moments(anatomy, seen.tokenizer, config, progress).items():
            null, rank = null_dimension(moment, config.nullspace_threshold)
            sizes = {"width": moment.shape[0], "threshold": config.nullspace_threshold, "null": null, "rank": rank}
            yield {"name": anatomy.rewrites[layer].name, "layer": layer, **sizes}


def table(told: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """The diagnoses of runs in a few numbers each, means over batches and weights; label -> its diagnoses."""
    heads = ("batches", "broken", "reached", "C_k", "interference", "projected", "L_kp", "projected")
    width = max([28, *(len(label) for label, _ in told)])
    lines = ["".join([" " * width, *(f"{head:>14}" for head in heads)])]
    for label, each in told:
        layers = [layer for one in each for layer in one["layers"]]
        terms = [layer["theorem"]["batch"]["raw"] for layer in layers]
        terms = [one for one in terms if "missing" not in one]
        worst = [max((one[key] for one in terms), default=None) for key in ("ratio", "neuron_ratio")]
        shares = [
            _mean(layers, "inputs", "text", "relative"),
            _kept(layers),
            _mean(layers, "inputs", "text", "l_kp_share"),
            _mean(layers, "projected", "inputs", "text", "l_kp_share"),
        ]
        broken = f"{sum(one['ratio'] > 1 for one in terms)} of {len(terms)}"
        cells = [str(len(each)), broken, *map(_small, worst), *map(_per_cent, shares)]
        lines.append("".join([label.ljust(width), *(f"{cell:>14}" for cell in cells)]))
    return [*lines, "", *LEGEND]


def _values(layers: Sequence[Mapping[str, Any]], *path: str) -> list[float]:
    found = []
    for layer in layers:
        value: Any = layer
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found += [float(value)] if isinstance(value, int | float) else []
    return found


def _mean(layers: Sequence[Mapping[str, Any]], *path: str) -> float | None:
    values = _values(layers, *path)
    return sum(values) / len(values) if values else None


def _kept(layers: Sequence[Mapping[str, Any]]) -> float | None:
    """What would be left of the interference if SPHERE projected the updates."""
    now = _mean(layers, "inputs", "text", "relative")
    whole = _mean(layers, "inputs", "text", "change", "mean")
    left = _mean(layers, "projected", "inputs", "text", "change", "mean")
    return now * left / whole if now is not None and left is not None and whole else None


def _small(number: float | None) -> str:
    return "-" if number is None else f"{number:.2g}"


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
