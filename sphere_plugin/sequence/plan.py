"""What a run would take: memory by formulas, time and disk from a short probe.

Nothing is kept, and nothing is written but key statistics.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from sphere_plugin.easyedit.hparams import SphereHyperParams, dtype_of
from sphere_plugin.editing.budget import Batch
from sphere_plugin.editing.needs import Where, shape_of, told
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import all_or_nothing
from sphere_plugin.models.stored import structure
from sphere_plugin.sequence.entries import hparams_of, settings_of
from sphere_plugin.sequence.runner import Run
from sphere_plugin.sequence.settings import RunSettings

PROBE: Final = 10  # facts edited and scored


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        editing: seconds.
        scoring: seconds, of all checkpoints and the unedited model.
        disk: bytes of the folder.
        memory: bytes the process has had at most by the end of the probe, earlier probes included.
        facts: how many the probe edited.
    """

    editing: float
    scoring: float
    disk: int
    memory: int
    facts: int

    def sentence(self, label: str) -> str:
        """For the terminal."""
        return (
            f"{label}: {time_in_words(self.editing)} of editing and {time_in_words(self.scoring)} of scoring, "
            f"{self.disk / 1e6:.0f} MB of disk, {self.memory / 1e9:.1f} GB of memory "
            f"(from {self.facts} facts; a whole batch at once is faster per fact, and takes more memory)"
        )


def plan(settings: RunSettings) -> Plan:
    """Measure a few facts of a run of one entry.

    Raises:
        SphereError: whatever would end the run before its first batch.
    """
    settings = dataclasses.replace(settings, share_targets=False)  # finding them all is what would take long
    with tempfile.TemporaryDirectory(prefix="sphere-plan-") as folder:
        run = Run(settings, Path(folder) / "run")
    count = min(PROBE, settings.batch_size, len(run.records))
    started = time.perf_counter()
    with all_or_nothing(run.weights) as before:
        done = run.entrant.apply(run.records[:count], 1)
        before.restore(run.weights)
    editing = (time.perf_counter() - started) / count * len(run.records)
    scoring = _scoring(run, count)
    batches = -(-len(run.records) // settings.batch_size)
    whole = sum(_bytes(weight) for weight in run.weights.values())
    facts = settings.batch_size / count
    kept = sum(facts * _bytes(keys) for keys in done.keys.values())
    kept += sum(min(_bytes(run.weights[name]), facts * _factors(one)) for name, one in done.updates.items())
    kept = kept if done.updates else whole
    return Plan(editing, scoring, int(whole + batches * kept), _peak(), count)


def needs_of(settings: RunSettings) -> list[tuple[str, bool]]:
    """What a run of one entry needs on each device by the formulas, and whether it has too little; no model is loaded.

    A method of EasyEdit has no formulas.
    """
    entry = settings.entries[0]
    hparams = hparams_of(entry, settings.hparams, settings.model, settings_of(entry, settings.settings))
    if not isinstance(hparams, SphereHyperParams):
        return []
    config, device = hparams.editing(), str(hparams.device)
    where = Where(f"cuda:{device}" if device.isdigit() else device, dtype_of(hparams).itemsize, hparams.model_parallel)
    shape = shape_of(structure(hparams.model_name), config)
    return told(shape, config, Batch(min(settings.batch_size, settings.edits)), where)


def _scoring(run: Run, count: int) -> float:
    """Seconds, from scoring ``count`` facts once."""
    settings, quality, length = run.settings, run.quality, run.settings.fluency
    started = time.perf_counter()
    quality.score(count)
    reading = (time.perf_counter() - started) / max(1, quality.prompts(count))
    started = time.perf_counter()
    texts = quality.prompts(count, fluency=length) - quality.prompts(count)
    if texts:
        quality.score(count, fluency=length)
    writing = max(0.0, time.perf_counter() - started - reading * quality.prompts(count)) / max(1, texts)
    sizes = [min(point, settings.sample or point) for point in (*settings.checkpoints, settings.edits)]
    written = 2 * (quality.prompts(sizes[-1], fluency=length) - quality.prompts(sizes[-1]))  # at the ends of the run
    return reading * sum(quality.prompts(size) for size in sizes) + writing * written


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _factors(update: Tensor | Factors) -> float:
    return _bytes(update.left) + _bytes(update.right) if isinstance(update, Factors) else float("inf")


def _peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def time_in_words(seconds: float) -> str:
    """Seconds as "80 s", "12 min" or "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
