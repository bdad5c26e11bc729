"""Edit thousands of facts in batches: journal every batch, score all edits so far at checkpoints, go on after a stop.

What is on disk is docs/run-folder.md. Memory does not grow with the number of edits.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from sphere_plugin.data import Record, held_out, read_records
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.evaluation import Quality
from sphere_plugin.files import fingerprint, read_json, read_tensors, write_json, write_tensors
from sphere_plugin.journaling import Journal, run_lock
from sphere_plugin.journaling.batch import orientations
from sphere_plugin.journaling.disk import move, plain
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.sequence.beside import unedited_scores
from sphere_plugin.sequence.crew import Crew
from sphere_plugin.sequence.entrant import SHARING, Entrant, OwnEntrant
from sphere_plugin.sequence.entries import hparams_of, settings_of
from sphere_plugin.sequence.guard import Events
from sphere_plugin.sequence.manifest import NAME, check_same, manifest_of, read_manifest
from sphere_plugin.sequence.measured import AbilitiesAlong
from sphere_plugin.sequence.monitor import Monitor
from sphere_plugin.sequence.settings import RunSettings
from sphere_plugin.sequence.targets import Targets

_LOG = logging.getLogger("sphere_plugin")

CASES: Final = 3  # prompts that are written on at every checkpoint
CASE_TOKENS: Final = 40
_MEMORY: Final = "1"  # format of what restraints remember

# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        edits: in the weights.
        stopped: why the guard ended it; None if it is finished.
    """

    edits: int
    stopped: str | None


def check(settings: RunSettings) -> None:
    """Find out what can be found out before a model is loaded.

    Raises:
        SphereError: an entry, a file or a number of facts that cannot be.
    """
    searches: list[tuple[str, object]] = []
    for entry in settings.entries:
        hparams = hparams_of(entry, settings.hparams, settings.model, settings_of(entry, settings.settings))
        searches = searches or [(name, getattr(hparams, name, None)) for name in SHARING]
        for name, value in searches if settings.share_targets else ():
            if getattr(hparams, name) != value:
                remedy = "Give it to all entries, or run without share_targets."
                raise ConfigError(f"{name} of {entry}", getattr(hparams, name), f"{value}, as all entries", remedy)
    read_records(settings.data, settings.edits, settings.order)
    held_out(settings.text)
    if settings.abilities is not None:
        settings.abilities.suite()


def start(settings: RunSettings, folder: Path, progress: Progress | None = None, ranks: Ranks = ALONE) -> Outcome:
    """Run one entry in a new folder; see `Run`.

    Raises:
        SphereError: bad settings or data, before anything is computed; a folder that has a run already.
    """
    if (folder / NAME).exists():
        raise ConfigError("--out", str(folder), "a folder without a run", f"Continue it with --resume {folder}.")
    with run_lock(folder):
        run = Run(settings, folder, progress, ranks)
        run.begin()
        return run.go()


def resume(folder: Path, progress: Progress | None = None, guarded: bool = True, ranks: Ranks = ALONE) -> Outcome:
    """Go on with the run in ``folder``; it ends where it would have ended without a stop.

    Args:
        folder: of the run.
        progress: see `Run`.
        guarded: False switches the guard of this run off for good, also after it has stopped the run.
        ranks: see `Run`; their number may be another than before.

    Raises:
        CacheError: there is no run, a file of it is damaged, the facts or the model are others, or a process runs it.
        ConfigError: the guard has stopped it.
    """
    settings = RunSettings.from_mapping(read_manifest(folder)["settings"])
    with run_lock(folder):
        run = Run(settings, folder, progress, ranks)
        run.take_up(guarded)
        return run.go()


class Run:
    """One entry of a comparison, on its folder.

    Args:
        settings: of one entry.
        folder: locked by the caller.
        progress: told about the long parts of the work.
        ranks: those that share the work. A run is rank 0's; the others have a `Crew`, see `command.follow`.
    """

    def __init__(
        self, settings: RunSettings, folder: Path, progress: Progress | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.settings, self.folder = settings, folder.resolve()
        self._progress = progress or (lambda what, done, total: None)
        self.abilities = AbilitiesAlong(settings, self.folder)
        ranks.order("begin", settings.plain(), str(self.folder))
        self.crew = ranks.together("begin", lambda: Crew(settings, self.folder, ranks))
        self.records = self.crew.records
        self.contexts = self.crew.prepare()
        self._unedited = fingerprint(self.weights.items())
        self.guard, self.events = settings.guard, Events(self.folder)
        self.targets: Targets | None = None
        if settings.share_targets and isinstance(self.entrant, OwnEntrant):
            self.targets = Targets(self.folder, settings, self.entrant, self.crew.aim)

    @property
    def entrant(self) -> Entrant:
        """What edits."""
        return self.crew.entrant

    @property
    def quality(self) -> Quality:
        """What scores."""
        return self.crew.quality

    @property
    def monitor(self) -> Monitor:
        """What follows the edited weights."""
        return self.crew.monitor

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """Name -> live weight."""
        return self.crew.weights

    def begin(self) -> None:
        """Write what there is before the first edit."""
        turned = orientations(self.entrant.model, self.weights)
        self.journal = Journal.create(self.folder / "journal", self.weights, turned, self.entrant.masters)
        write_json(self.folder / NAME, self._manifest())
        self._follow(turned)

    def take_up(self, guarded: bool) -> None:
        """Put the model where the run was stopped."""
        self.journal = Journal.open(self.folder / "journal")
        edits = self.journal.edits()
        off = self.guard is not None and not guarded
        self.guard = None if off or self.events.off else self.guard
        stopped = self.events.stopped(edits)
        if self.guard and stopped is not None:
            remedy = "Continue with --without-guard, or take edits back with `sphere undo`."
            raise ConfigError("--resume", f"a run that its guard stopped: {stopped}", "a run to go on with", remedy)
        check_same(self.folder, read_manifest(self.folder), self._manifest())
        if off:
            self.events.add(edits, "--without-guard", "off", edits)
        self.events.go_on(edits)
        self._follow(orientations(self.entrant.model, self.weights))
        number = len(self.journal)
        self.crew.put(self.journal.weights_after(number))
        self.crew.resume(number, self.journal.keys, self._recalled(number), self.journal.masters_after(number))

    def go(self) -> Outcome:
        """Run to the end, or to where the guard stops it."""
        size, total, number = self.settings.batch_size, len(self.records), len(self.journal)
        self._progress("edits", self.journal.edits(number), total)
        stopped = self._judge(number)
        while stopped is None and number * size < total:
            number += 1
            self._batch(number)
            self._progress("edits", min(size, total - (number - 1) * size), total)
            stopped = self._judge(number)
        return Outcome(self.journal.edits(), stopped)

    # ---- one batch ----

    def _batch(self, number: int) -> None:
        """Write batch ``number`` and its record."""
        size = self.settings.batch_size
        places = range((number - 1) * size, min(number * size, len(self.records)))
        aimed = self.targets.of(places) if self.targets else None
        started = time.perf_counter()
        done = self.crew.apply(places, number, aimed)
        seconds = time.perf_counter() - started
        measured = self.crew.energies()
        record = {
            "edits": places.stop,
            "facts": [_fact(self.records[place]) for place in places],
            "seconds": seconds,
            "losses": list(done.losses),
            "steps": list(done.steps),
            "efficacy": self.crew.efficacy(places),
            "layers": [{**layer, **measured.get(layer["name"], {})} for layer in done.layers],
        }
        self._keep(number, self.entrant.memory())
        self.journal.append(record, self.weights, done.updates, done.keys, self.entrant.masters)
        self._drop(number - 1)

    # ---- what restraints remember ----

    def _memory(self, number: int) -> Path:
        return self.folder / "memory" / f"{number:06d}.safetensors"

    def _keep(self, number: int, memory: Mapping[str, Tensor]) -> None:
        if memory:
            write_tensors(self._memory(number), memory, {"format": _MEMORY})

    def _drop(self, number: int) -> None:
        move(self._memory(number), None)

    def _recalled(self, number: int) -> dict[str, Tensor]:
        path = self._memory(number)
        if path.exists():
            remedy = "Put a copy of the file back, or delete it: spaces are then found anew, and last digits differ."
            tensors, about = read_tensors(path, remedy)
            if about.get("format") != _MEMORY:
                raise CacheError(str(path), about.get("format"), f"what a run remembers, of format {_MEMORY}", remedy)
            return tensors
        if number and path.parent.is_dir():
            _LOG.warning("after undoing, spaces are found anew and random ones begin again: what follows differs")
        return {}

    # ---- checkpoints ----

    def _score(self, number: int) -> dict[str, Any] | None:
        """Score the model after batch ``number`` if that is due, and return the scores."""
        edits = self.journal.edits(number)
        name = f"checkpoints/{edits:06d}.json"
        path = self.folder / name
        if edits and edits not in self.settings.checkpoints:
            return None
        if not path.exists():
            known = None if edits else unedited_scores(self.folder, read_manifest(self.folder), name)
            write_json(path, plain(self._checkpoint(number, edits, known or self._said(edits))))
        return dict(read_json(path))

    def _checkpoint(self, number: int, edits: int, said: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "edits": edits,
            "seconds": sum(float(self.journal.record(batch)["seconds"]) for batch in range(1, number + 1)),
            "energy": {name: one["energy"] for name, one in self.crew.energies().items()},
            "weights": self.monitor.checkpoint(self.weights),
            **said,
        }

    def _said(self, edits: int) -> dict[str, Any]:
        """What the model says after so many edits: scores, and case studies."""
        asked = edits or self.settings.edits  # the unedited model is asked what the last one will be
        which, fluency = self._sampled(asked), self.settings.fluency if asked == self.settings.edits else 0
        total = self.quality.prompts(asked, which, fluency)
        self.crew.progress = lambda done: self._progress(f"scoring after {edits}", done, total)
        scores = self.crew.score(asked, which, fluency)
        cases = range(min(CASES, len(self.records)))
        texts = self.crew.texts(cases, CASE_TOKENS)
        return {
            "scored": list(scores.scored),
            "scores": {**scores.columns(), "nll": scores.nll},
            "cases": [{**_fact(self.records[n]), "text": text} for n, text in zip(cases, texts, strict=True)],
        }

    def _sampled(self, edits: int) -> list[int] | None:
        sample = self.settings.sample
        if sample is None or edits <= sample:
            return None
        return sorted(random.Random(f"{self.settings.seed}/{edits}").sample(range(edits), sample))

    def _retention(self, number: int, checkpoint: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Mean efficacy of the scored edits now, and right after their own batches."""
        fresh = [value for batch in range(1, number + 1) for value in self.journal.record(batch)["efficacy"]]
        now = [value for value in checkpoint["scores"]["efficacy"] if value is not None]
        then = [fresh[place] for place in checkpoint["scored"] if fresh[place] is not None]
        return _mean(now), _mean(then)

    # ---- the guard ----

    def _judge(self, number: int) -> str | None:
        """Score the model after batch ``number`` if that is due, and ask the guard; returns why the run ends."""
        checkpoint, edits = self._score(number), self.journal.edits(number)
        model, tokenizer = self.entrant.model, self.entrant.tokenizer
        self.abilities.measure(edits, self.journal.fingerprint(number), model, tokenizer, self._progress)
        if self.guard is None or not number:
            return None
        record = self.journal.record(number)
        energy = {layer["name"]: layer["energy"] for layer in record["layers"] if "energy" in layer}
        reason = self.guard.on_energy(self.monitor.change(energy))
        if checkpoint is not None:
            reason = self.guard.on_retention(*self._retention(number, checkpoint)) or reason
        return None if reason is None else self._act(self.guard.action, reason, int(record["edits"]))

    def _act(self, action: str, reason: str, edits: int) -> str | None:
        """Do what the guard is to do after so many edits; returns why the run ends."""
        _LOG.warning("after %d edits %s (guard: %s)", edits, reason, action)
        left = edits
        if action == "rollback":
            left = max((point for point in self.settings.checkpoints if point < edits), default=0)
            back = self.journal.batch_at(left)
            self.journal.truncate(back)
            self.crew.put(self.journal.weights_after(back))
        self.events.add(edits, reason, action, left)
        return None if action == "warn" else reason

    def _follow(self, turned: Mapping[str, bool]) -> None:
        self.crew.watch(self.journal.weights_after(0), turned)
        blind = [name for name, energy in self.monitor.energy.items() if energy["2"] is None]
        if blind and self.guard and self.guard.energy is not None:
            _LOG.warning("the guard cannot see %s: zero or equal rows have no hyperspherical energy", ", ".join(blind))

    def _manifest(self) -> dict[str, Any]:
        crew, weight = self.crew, next(iter(self.weights.values()))
        known = (crew.hparams, crew.name, weight.dtype, self.contexts, self._unedited)
        return manifest_of(self.settings, *known, ranks=crew.ranks.size)


def _fact(record: Record) -> dict[str, Any]:
    told = {"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}
    return {"record": record.position, **told}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
