"""The uncertainty audit of a run as it lies on disk: its model before any edit and after N is asked the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sphere_plugin.data import Record
from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.evaluation.auditor import Measured
from sphere_plugin.evaluation.audits import EDITED, KINDS, NEIGHBOURS, Audit, path_of, read_audits, write_audit
from sphere_plugin.evaluation.embeddings import MINILM, Embedder
from sphere_plugin.evaluation.paraphrases import RECORD, TEMPLATES, Probe, Source, edited, neighbours
from sphere_plugin.evaluation.responses import Sampling
from sphere_plugin.files import check_writable
from sphere_plugin.journaling.revisit import Revisited, opened
from sphere_plugin.models.placement import usable_device
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.sequence.finished import facts_of
from sphere_plugin.sequence.panel import Panel

# Neighbourhood prompts of a fact: S2 and S3 of the paper's Table 2.
AROUND = 2

# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]
Probes = Mapping[str, Sequence[Probe]]


@dataclass(frozen=True)
class Options:
    """What can be chosen.

    Attributes:
        at: after how many edits; empty: after all that are made.
        facts: how many at most, drawn by the seed of ``sampling``.
        around: whether their neighbourhood prompts are asked as well.
        paraphrases: "templates", "record", or a file.
        embedder: "minilm", or what sentence-transformers knows.
        sampling: how answers are drawn.
        data, model: where the file of facts and the unedited model are, where that is not where the run found them.
        device: of the model.

    Raises:
        ConfigError: a number out of its range.
    """

    at: tuple[int, ...] = ()
    facts: int = 50
    around: bool = False
    paraphrases: str = TEMPLATES
    embedder: str = MINILM
    sampling: Sampling = field(default_factory=Sampling)
    data: Path | None = None
    model: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_number("--facts", self.facts, 1, whole=True)
        for edits in self.at:
            check_number("--at", edits, 1, whole=True)
        usable_device(self.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on beside the model and the prompts."""
        paraphrases = self.paraphrases if self.paraphrases in (TEMPLATES, RECORD) else Path(self.paraphrases).name
        return {**asdict(self.sampling), "embedder": self.embedder, "paraphrases": paraphrases}


class RunAudit:
    """The audit of one run; the probes of each moment, and what is measured of them.

    Args:
        folder: of the run; a process may run it meanwhile.
        options: see `Options`.
        source: of paraphrases.

    Attributes:
        entry, label: of the run.
        edits: that it has made.
        moments: those of ``options.at`` that it has come to.

    Raises:
        CacheError: a file of the run is missing or damaged, or the file of facts is another one.
        ConfigError: a moment between two batches, facts without paraphrases, or an audit with other settings.
    """

    def __init__(self, folder: Path, options: Options, source: Source) -> None:
        self.folder, self.options = folder, options
        self.journal, self.manifest = opened(folder)
        self.entry = str(self.manifest.get("entry") or folder.name)
        self.label = str(self.manifest.get("label") or self.entry)
        self.edits = self.journal.edits()
        wanted = options.at or ((self.edits,) if self.edits else ())
        self.moments = [edits for edits in sorted(set(wanted)) if edits <= self.edits]
        self._batches = {edits: self.journal.batch_at(edits) for edits in self.moments}
        records = facts_of(folder, self.manifest, options.data)
        self.probes: dict[int, Probes] = {edits: self._probes(records[:edits], source) for edits in self.moments}
        every = [{kind: probes[kind] for kind in KINDS} for probes in self.probes.values()]
        self.probes[0] = {kind: _once(itertools.chain(*(one[kind] for one in every))) for kind in KINDS}
        self._batches[0] = 0
        self.audits = read_audits(folder)
        self._check()

    @property
    def due(self) -> bool:
        """Whether anything is still to be measured."""
        return any(self._missing(edits) for edits in self.probes)

    def measure(
        self,
        embed: Embedder,
        others: Iterable[RunAudit] = (),
        tell: Progress = lambda *_: None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Measure what is missing; every probe is kept once it is measured.

        Args:
            embed: makes vectors of sentences.
            others: runs whose unedited model may be the same; what is known of it is taken over.
            tell: told about the work.
            ranks: those that share it; the others have a `Panel`, see `panel.convene`.

        Raises:
            ModelError: a model gives numbers that are not finite.
            CacheError: the disk is full.
        """
        seen, options = Revisited(self.folder, self.options.model), self.options
        ranks.order("begin", dict(seen.known), options.embedder, options.sampling, options.device)
        panel = ranks.together(
            "begin",
            lambda: Panel(seen.model, seen.tokenizer, embed, options.sampling, options.device, ranks),
        )
        model = panel.identity
        for edits in sorted(self.probes):
            if not edits:
                self._take_over(model, others)
            missing = self._missing(edits)
            if missing:
                seen.go(edits)
                panel.follow(list(seen.weights))
            for first in range(0, len(missing), ranks.size):
                turn = missing[first : first + ranks.size]
                for (kind, _), measured in zip(turn, panel.measure([probe for _, probe in turn]), strict=True):
                    self._keep(edits, model, kind, [measured])
                    tell(f"{self.label} after {edits}", 1, len(missing))

    # ---- what is there ----

    def _check(self) -> None:
        check_writable(path_of(self.folder, 0))
        for edits, audit in self.audits.items():
            where = path_of(self.folder, edits)
            then, now = audit.settings, self.options.settings
            for key in sorted({*then, *now}):
                if then.get(key) != now.get(key):
                    remedy = f"Measure with the same settings, or move {where.parent} away."
                    raise ConfigError(f"{where}: {key}", now.get(key), f"{then.get(key)}, as it was measured", remedy)
            if edits in self._batches and audit.weights != self.journal.fingerprint(self._batches[edits]):
                remedy = "It is of edits that were taken back: move the file away."
                raise CacheError(str(where), f"weights of fingerprint {audit.weights}", "those of the run", remedy)

    def _missing(self, edits: int) -> list[tuple[str, Probe]]:
        audit = self.audits.get(edits)
        known = {(kind, one.probe) for kind in KINDS for one in (audit.of(kind) if audit else ())}
        return [(kind, probe) for kind in KINDS for probe in self.probes[edits][kind] if (kind, probe) not in known]

    def _keep(self, edits: int, model: str, kind: str, measured: Sequence[Measured]) -> None:
        audit = self.audits.get(edits) or Audit(
            edits, self.journal.fingerprint(self._batches[edits]), model, self.options.settings
        )
        said = {(one.probe.record, one.probe.prompt) for one in measured}
        kept = [one for one in audit.of(kind) if (one.probe.record, one.probe.prompt) not in said]
        lists: dict[str, Any] = {kind: (*kept, *measured)}
        self.audits[edits] = replace(audit, **lists)
        write_audit(self.folder, self.audits[edits])

    def _take_over(self, model: str, others: Iterable[RunAudit]) -> None:
        """What other runs know of the same unedited model."""
        for other in others:
            audit = other.audits.get(0)
            if audit is None or audit.model != model or audit.settings != self.options.settings:
                continue
            for kind in KINDS:
                wanted = {probe for one, probe in self._missing(0) if one == kind}
                found = [one for one in audit.of(kind) if one.probe in wanted]
                if found:
                    self._keep(0, model, kind, found)

    # ---- what is asked ----

    def _probes(self, records: Sequence[Record], source: Source) -> Probes:
        """The facts drawn of those edited so far, and their neighbours."""
        drawn: list[Probe] = []
        around: list[Probe] = []
        for record in sorted(records, key=self._lot):
            fact = edited(record, source) if len(drawn) < self.options.facts else None
            if fact is not None:
                drawn.append(fact)
                around += neighbours(record, source, AROUND) if self.options.around else []
        if not drawn:
            remedy = "Leave it out: there are templates for every prompt."
            raise ConfigError("--paraphrases", self.options.paraphrases, "paraphrases of an edited fact", remedy)
        if self.options.around and not around:
            remedy = "Leave it out: the records of this run have none."
            raise ConfigError("--neighbours", "no neighbourhood prompts", "some in the file of facts", remedy)
        return {EDITED: _once(drawn), NEIGHBOURS: _once(around)}

    def _lot(self, record: Record) -> str:
        """Where a fact stands in the draw: the same in every order of edits, and after any number of them."""
        return hashlib.sha256(f"{self.options.sampling.seed}/{record.prompt}".encode()).hexdigest()


def _once(probes: Iterable[Probe]) -> list[Probe]:
    return list(dict.fromkeys(probes))
