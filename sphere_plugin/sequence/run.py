"""Edit a list of records in batches through a BaseEditor, and score all edits so far at checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sphere_plugin.data import Record
from sphere_plugin.easyedit.method import Session
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation import Quality, Scores
from sphere_plugin.geometry import hyperspherical_energy
from sphere_plugin.sequence.monitor import ORDERS
from sphere_plugin.sequence.settings import check_schedule


@dataclass(frozen=True)
class Checkpoint:
    """The model after some edits.

    Attributes:
        scores: of all edits so far.
        energy: s -> hyperspherical energy of each edited weight, in the order of the layers.
        fresh: EasyEdit's own rewrite_acc of each edit so far, measured right after the edit's own batch.
        seconds: spent editing so far, scoring left out.
    """

    scores: Scores
    energy: dict[float, list[float]]
    fresh: list[float]
    seconds: float


class SequentialRun:
    """A run of one method on one model.

    Args:
        editor: EasyEdit's BaseEditor for SPHERE.
        records: what to edit, in order.
        quality: scores the editor's model; made before the first edit.
        batch_size: facts per batch.
        checkpoints: numbers of edits after which everything so far is scored; multiples of batch_size.
        progress: told (edits done, prompts scored) as they are done.
    """

    def __init__(
        self,
        editor: Any,
        records: Sequence[Record],
        quality: Quality,
        batch_size: int,
        checkpoints: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_schedule(len(records), batch_size, checkpoints)
        if not isinstance(editor.apply_algo, Session):
            raise ConfigError(
                "editor", editor.alg_name, "a BaseEditor for SPHERE", "Call register() before making it."
            )
        self.editor = editor
        self.records = list(records)
        self.quality = quality
        self.batch_size = batch_size
        self.checkpoints = list(checkpoints)
        self._progress = progress or (lambda edits, prompts: None)

    def checkpoint(self, edits: int, fresh: list[float], seconds: float) -> Checkpoint:
        """Score the model as it is."""
        anatomy = self.editor.apply_algo.editor.anatomy
        weights = [rewrite.weight for rewrite in anatomy.rewrites.values()]
        energy = {s: [hyperspherical_energy(weight, s) for weight in weights] for s in ORDERS}
        scores = self.quality.score(edits, progress=lambda prompts: self._progress(0, prompts))
        return Checkpoint(scores, energy, list(fresh), seconds)

    def __iter__(self) -> Iterator[Checkpoint]:
        """Run, yielding a checkpoint at zero edits and at every number asked for."""
        fresh: list[float] = []
        seconds = 0.0
        yield self.checkpoint(0, fresh, seconds)
        self.editor.hparams.batch_size = self.batch_size
        for first in range(0, len(self.records), self.batch_size):
            batch = self.records[first : first + self.batch_size]
            started = time.perf_counter()
            metrics, _, _ = self.editor.batch_edit(
                prompts=[record.prompt for record in batch],
                target_new=[record.target_new for record in batch],
                subject=[record.subject for record in batch],
                sequential_edit=True,
                verbose=False,
            )
            seconds += time.perf_counter() - started
            fresh += [
                float(sum(metric["post"]["rewrite_acc"]) / len(metric["post"]["rewrite_acc"])) for metric in metrics
            ]
            self._progress(len(batch), 0)
            done = first + len(batch)
            if done in self.checkpoints:
                yield self.checkpoint(done, fresh, seconds)
