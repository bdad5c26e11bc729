"""What has been measured of general abilities along a run, in the folder of the run.

One file per moment, ``abilities/000500.json``, written anew after every task, so that nothing measured is lost and
nothing is measured twice (docs/run-folder.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sphere_plugin.errors import CacheError, ConfigError, SphereError
from sphere_plugin.evaluation.abilities import PERPLEXITY, Score, Suite
from sphere_plugin.evaluation.tallies import FOLDER, path_of, read_tallies, read_tally, write_tally
from sphere_plugin.journaling import run_lock
from sphere_plugin.journaling.disk import plain
from sphere_plugin.models.placement import input_device
from sphere_plugin.sequence.manifest import COMPARISON, NAME, read_manifest, surroundings
from sphere_plugin.sequence.settings import RunSettings

_LOG = logging.getLogger("sphere_plugin")


class Abilities:
    """What has been measured of a run, and what is still to be.

    Args:
        folder: of the run, or any other where ``abilities/`` is to be; None: nothing is kept.
        suite: the tasks.
    """

    def __init__(self, folder: Path | None, suite: Suite) -> None:
        self._folder, self._suite = folder, suite

    def check(self) -> None:
        """Raise ConfigError if a task was measured in another way at any moment so far."""
        if self._folder is None:
            return
        for edits, content in read_tallies(self._folder).items():
            for name, then in content["tasks"].items():
                if name in self._suite.names:
                    self._check_same(path_of(self._folder, edits), name, then["how"])

    def missing(self, edits: int, weights: str) -> list[str]:
        """The tasks that are not measured yet at a moment.

        Args:
            edits: in the weights.
            weights: fingerprint of them.

        Raises:
            ConfigError: a task has been measured there in another way.
            CacheError: the file is damaged, or tells of other weights.
        """
        known = self._known(edits, weights)
        for name in known.keys() & set(self._suite.names):
            self._check_same(path_of(self._folder or Path(), edits), name, known[name]["how"])
        return [name for name in self._suite.names if name not in known]

    def measure(
        self, edits: int, weights: str, model: Any, tokenizer: Any, tell: Callable[[str], None] = lambda name: None
    ) -> dict[str, dict[str, Any]]:
        """Measure what is missing at a moment, with the model that is there; returns task -> what is kept of it.

        The unedited model of a comparison is measured once: the scores of another entry are taken over.
        """
        known = self._known(edits, weights)
        for name in self.missing(edits, weights):
            taken = self._elsewhere(name, weights) if not edits else None
            known[name] = taken or self._kept(name, self._suite.measure(name, model, tokenizer))
            self._write(edits, weights, known, model)
            _LOG.info("after %d edits %s: %s", edits, name, told(known[name]))
            tell(name)
        return {name: known[name] for name in self._suite.names}

    # ---- files ----

    def _known(self, edits: int, weights: str) -> dict[str, dict[str, Any]]:
        path = None if self._folder is None else path_of(self._folder, edits)
        if path is None or not path.exists():
            return {}
        content = read_tally(path)
        if content["weights"] != weights:
            remedy = "It is of another model, or of edits that were taken back: move the file away."
            raise CacheError(str(path), f"weights of fingerprint {content['weights']}", weights, remedy)
        return dict(content["tasks"])

    def _check_same(self, path: Path, name: str, then: Mapping[str, Any]) -> None:
        now = self._suite.how(name)
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                remedy = "Measure with the same settings, or move the folder abilities away."
                expected = f"{then.get(key)}, with which it was measured"
                raise ConfigError(f"{path}: {key} of {name}", now.get(key), expected, remedy)

    def _kept(self, name: str, score: Score) -> dict[str, Any]:
        kept: dict[str, Any] = plain({"how": self._suite.how(name), **asdict(score)})
        return kept

    def _elsewhere(self, name: str, weights: str) -> dict[str, Any] | None:
        """A score of the unedited model in another entry of the same comparison; none of a model without a run."""
        if self._folder is None or not all(map(Path.exists, (self._folder.parent / COMPARISON, self._folder / NAME))):
            return None
        own = read_manifest(self._folder)["model"]
        for path in sorted(self._folder.parent.glob(f"*/{FOLDER}/{path_of(Path(), 0).name}")):
            try:
                content, model = read_tally(path), read_manifest(path.parents[1])["model"]
            except SphereError:
                continue  # whoever measures that entry will hear of it
            found = content["tasks"].get(name)
            if found and model == own and content["weights"] == weights and found["how"] == self._suite.how(name):
                return {**found, "from": path.parents[1].name}
        return None

    def _write(self, edits: int, weights: str, tasks: Mapping[str, Any], model: Any) -> None:
        if self._folder is not None:
            around = surroundings() | {"device": str(input_device(model))}
            write_tally(self._folder, edits, weights, plain(dict(tasks)), plain(around))


class AbilitiesAlong:
    """Measures the live model of a run when that is due.

    Args:
        settings: of one entry.
        folder: of the run.

    Raises:
        SphereError: the records of a task cannot be had, or earlier moments were measured in another way.
    """

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        plan = settings.abilities
        self._due = plan.moments(settings.edits, settings.batch_size) if plan else ()
        self._suite = plan.suite() if plan else None
        if self._suite is not None:
            Abilities(folder, self._suite).check()
        self._folder = folder

    def measure(
        self, edits: int, weights: str, model: Any, tokenizer: Any, progress: Callable[[str, int, int], None]
    ) -> None:
        """Measure after so many edits, if that is due; the model and all random generators are left as they were.

        Where another process measures abilities of this run, the moment is left out, and the log says so.
        """
        if self._suite is None or edits not in self._due:
            return
        what, total = f"abilities after {edits}", len(self._suite.names)
        found = Abilities(self._folder, self._suite)
        with ExitStack() as locked:
            try:
                locked.enter_context(run_lock(self._folder / FOLDER))
            except CacheError as error:
                _LOG.warning("not measured: %s: %s `sphere abilities --at %d` measures it later.", what, error, edits)
                return
            found.measure(edits, weights, model, tokenizer, lambda name: progress(what, 1, total))


def told(kept: Mapping[str, Any]) -> str:
    """A score as it is written: "46.0 ± 5.0" in per cent, "23.45" for perplexity."""
    if kept["value"] is None:
        return "not finite"
    if kept["metric"] == PERPLEXITY:
        return f"{kept['value']:.4g}"
    half = "" if kept["stderr"] is None else f" ± {100 * kept['stderr']:.1f}"
    return f"{100 * kept['value']:.1f}{half}"
