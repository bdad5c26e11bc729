"""What edits and scores in a run, on every rank alike; rank 0 says what is done, the others do it with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_plugin.data import held_out, read_records
from sphere_plugin.easyedit.hosted import open_editor
from sphere_plugin.editing.aim import Aimed
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation import Quality
from sphere_plugin.evaluation.scores import Scores
from sphere_plugin.files import fingerprint, make_folder
from sphere_plugin.parallel.ranks import ALONE, Ranks, led
from sphere_plugin.sequence.entrant import Done, Entrant, OwnEntrant, entrant_of
from sphere_plugin.sequence.entries import absolute, hparams_of, settings_of
from sphere_plugin.sequence.monitor import Monitor
from sphere_plugin.sequence.settings import RunSettings

Keys = Callable[[int], Mapping[str, Tensor]]


class Crew:
    """The model of a run, what edits it and what scores it.

    The methods that are `led` are called on rank 0, and by it on the others.

    Args:
        settings: of one entry.
        folder: where EasyEdit writes its log.
        ranks: those that share the work.

    Attributes:
        hparams: of the method.
        records: the facts.
        entrant: edits.
        quality: scores.
        progress: told the number of prompts scored, on rank 0.

    Raises:
        SphereError: an entry, a file or a model that cannot be; ranks with different models.
    """

    def __init__(self, settings: RunSettings, folder: Path, ranks: Ranks = ALONE) -> None:
        self.settings, self.ranks = settings, ranks
        entry = settings.entries[0]
        given = hparams_of(entry, settings.hparams, settings.model, settings_of(entry, settings.settings))
        self.hparams = absolute(given)
        self.name = str(self.hparams.model_name)  # EasyEdit's methods get another name for the embedded model
        self.records = read_records(settings.data, settings.edits, settings.order)
        self.entrant, self.quality = self._open(held_out(settings.text), folder)
        self.progress: Callable[[int], None] | None = None
        self._monitor: Monitor | None = None
        # What rank 0 has and the others have not: see `resume` and `watch`.
        self._keys: Keys = lambda batch: {}
        self._unedited: Mapping[str, Tensor] = {}

    def _open(self, text: str, folder: Path) -> tuple[Entrant, Quality]:
        make_folder(folder)
        ranks, settings, hparams = self.ranks, self.settings, self.hparams
        if ranks.size > 1 and getattr(hparams, "model_parallel", False):
            remedy = "Start one process for a model on several GPUs, or give each process a whole one."
            raise ConfigError("model_parallel", True, f"false in a run that {ranks.size} processes share", remedy)
        if ranks.size > 1:  # the manifest has what was asked for, which is not each rank's own
            hparams = copy.copy(hparams)
            hparams.device = ranks.device(getattr(hparams, "device", None))
        entrant = entrant_of(open_editor(hparams, folder), settings.seed, ranks)
        if ranks.size > 1:
            told = fingerprint(entrant.model.state_dict().items())
            ranks.agree("the model", told, "that of rank 0", "Load the same files on every machine.")
        quality = Quality(
            entrant.model,
            entrant.tokenizer,
            self.records,
            text,
            neighbours=settings.neighbours,
            seed=settings.seed,
            ranks=ranks,
        )
        return entrant, quality

    @property
    def weights(self) -> Mapping[str, torch.nn.Parameter]:
        """Name -> live weight."""
        return self.entrant.weights

    # ---- editing ----

    def prepare(self) -> Sequence[str]:
        """Do what has to be done on the unedited model; returns the prefixes facts are edited behind."""
        return self._prepare() if isinstance(self.entrant, OwnEntrant) else self.entrant.prepare()

    @led
    def _prepare(self) -> Sequence[str]:
        return self.entrant.prepare()

    def apply(self, places: range, number: int, aimed: Aimed | None = None) -> Done:
        """Write batch ``number``, from 1: the facts at ``places``; ``aimed`` are its targets where they are known."""
        if isinstance(self.entrant, OwnEntrant):
            return self._apply(places, number, aimed)
        done = self.entrant.apply(self.records[places.start : places.stop], number)
        self.put()  # EasyEdit's methods edit on rank 0 alone
        return done

    @led
    def _apply(self, places: range, number: int, aimed: Aimed | None) -> Done:
        return self.entrant.apply(self.records[places.start : places.stop], number, aimed)

    @led
    def aim(self, places: range) -> Aimed:
        """The targets of the facts at ``places`` for the weights as they are."""
        if not isinstance(self.entrant, OwnEntrant):
            raise ConfigError("share_targets", self.settings.entries[0], "an entry of our own editor", "Leave it out.")
        return self.entrant.aim(self.records[places.start : places.stop])

    def put(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Put the model to ``weights``, or leave rank 0's as it is; and the others to what rank 0's is then."""
        with torch.no_grad():
            for name, weight in (weights or {}).items():
                self.weights[name].copy_(weight)
        if self.ranks.size > 1:
            self._put()

    @led
    def _put(self) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.ranks.same(name, weight))

    def resume(self, number: int, keys: Keys, memory: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> None:
        """Go on after ``number`` batches, which are in the weights.

        Args:
            number: how many.
            keys: batch -> keys [d_in, u] by name.
            memory, masters: see `Entrant.resume`.
        """
        self._keys = keys
        self._resume(number, dict(memory), dict(masters))

    @led
    def _resume(self, number: int, memory: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> None:
        def batches() -> Iterator[Mapping[str, Tensor]]:
            for batch in range(1, number + 1):
                yield self.ranks.by(0, f"keys of batch {batch}", partial(self._keys, batch))

        self.entrant.resume(batches(), memory, masters)

    # ---- measuring ----

    @led
    def score(self, edits: int, which: Sequence[int] | None, fluency: int) -> Scores:
        """See `Quality.score`."""
        return self.quality.score(edits, which, self.progress, fluency)

    @led
    def efficacy(self, which: Sequence[int]) -> list[float | None]:
        """See `Quality.efficacy`."""
        return self.quality.efficacy(which)

    @led
    def texts(self, which: Sequence[int], tokens: int) -> list[str]:
        """See `Quality.texts`."""
        return self.quality.texts(which, tokens)

    @property
    def monitor(self) -> Monitor:
        """What follows the edited weights; there from `watch` on."""
        if self._monitor is None:
            raise ConfigError("monitor", None, "weights to compare with", "Call watch first.")
        return self._monitor

    def watch(self, unedited: Mapping[str, Tensor], turned: Mapping[str, bool]) -> None:
        """Follow the weights from now on, which no edit has changed yet; see `Monitor`."""
        self._unedited = unedited
        self._watch(dict(turned))

    @led
    def _watch(self, turned: Mapping[str, bool]) -> None:
        if not self.ranks.is_main:
            self._unedited = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        self._monitor = Monitor(self._unedited, turned, self.ranks)

    @led
    def energies(self) -> dict[str, dict[str, Any]]:
        """See `Monitor.batch`."""
        return self.monitor.batch(self.weights)
