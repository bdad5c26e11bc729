"""The uncertainty of a study's models before and after their edits, as the paper's Tables 3 and 4 have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sphere_plugin.evaluation.audits import KINDS, TITLES, Audit, grown, lowered, read_audits
from sphere_plugin.evaluation.uncertainty import RESAMPLES, Change
from sphere_plugin.paths import without_folders
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import written
from sphere_plugin.report.read import Run
from sphere_plugin.report.studies import Entry, Study

HEADS: Final = ("Method", "Data", "Edits", "Asked", "Prompts", "U before", "U after", "ΔU", "ΔU from", "ΔU to") + (
    "Aleatoric ΔU",
    "Epistemic ΔU",
    "SPHERE's part",
    "Part from",
    "Part to",
)
DECIMALS: Final = 3


@dataclass(frozen=True)
class Audited:
    """One run's audits; edits -> audit."""

    entry: Entry
    run: Run
    audits: Mapping[int, Audit]

    @property
    def label(self) -> str:
        """The entry's, with the order where there are several."""
        return self.entry.label + (f", order {self.run.order}" if len(self.entry.runs) > 1 else "")


def grids(study: Study) -> dict[str, Grid]:
    """Returns the table, under "audit"; nothing where no run was audited.

    Raises:
        CacheError: a file of an audit is damaged.
    """
    found = [Audited(entry, run, read_audits(run.folder)) for entry in study.entries for run in entry.runs]
    audited = [one for one in found if 0 in one.audits and len(one.audits) > 1]
    if not audited:
        return {}
    lines = [line for one in audited for line in _lines(study, one, audited)]
    without = [one.label for one in found if one not in audited]
    return {"audit": Grid(f"{study.key}-audit", "Uncertainty", HEADS, tuple(lines), _note(audited, without))}


def _lines(study: Study, one: Audited, audited: Sequence[Audited]) -> list[Line]:
    bases = [base for base, entry in study.pairs() if entry is one.entry]
    base = next((other for other in audited if other.entry in bases and other.run.order == one.run.order), None)
    lines = []
    for kind, title in zip(KINDS, TITLES, strict=True):
        for edits in sorted(one.audits.keys() - {0}):
            parts = grown(one.audits[0], one.audits[edits], kind)
            if not parts:
                continue
            total = parts["total"]
            part = None
            if base is not None and edits in base.audits:
                part = lowered(one.audits[0], base.audits[edits], one.audits[edits], kind)
            fields = [Field(one.label), Field(study.data), Field(str(edits), edits), Field(title)]
            fields += [Field(str(total.change.n), total.change.n), _number(total.before), _number(total.after)]
            fields += _change(total.change)
            fields += [_number(parts[name].change.value) for name in ("aleatoric", "epistemic")]
            fields += _change(part) if part is not None else [Field("–")] * 3
            lines.append(Line(one.entry, tuple(fields)))
    return lines


def _change(change: Change) -> list[Field]:
    return [_number(value) for value in (change.value, change.low, change.high)]


def _number(value: float | None) -> Field:
    return Field("–") if value is None else Field(written(value, DECIMALS), value)


def _note(audited: Sequence[Audited], without: Sequence[str]) -> str:
    """What was measured, with which settings, and who was not audited."""
    said = [
        "U: mean over prompts of the spread among answers to one paraphrase and the drift across paraphrases. "
        "ΔU: its growth by the edits, a share. SPHERE's part: ΔU minus that of the method alone, on the same prompts. "
        f"Intervals of 95 %: percentile bootstrap over prompts, {RESAMPLES} samples."
    ]
    told: dict[str, None] = {}
    for audit in (audit for one in audited for audit in one.audits.values()):
        told[_settings(without_folders(audit.settings))] = None
    said += told
    sources = dict.fromkeys(f"{kind}: {source}" for one in audited for kind, source in _sources(one))
    said.append(f"Paraphrases of {'; '.join(sources)}.")
    return " ".join([*said, *(f"{label}: not audited." for label in without)])


def _settings(told: Mapping[str, Any]) -> str:
    return (
        f"{told.get('samples')} answers of up to {told.get('tokens')} tokens to each paraphrase, temperature "
        f"{told.get('temperature')}, nucleus {told.get('top_p')}, seed {told.get('seed')}; embedded by "
        f"{told.get('embedder')}."
    )


def _sources(one: Audited) -> list[tuple[str, str]]:
    kinds = [(audit, kind, title) for audit in one.audits.values() for kind, title in zip(KINDS, TITLES, strict=True)]
    return [(title, source) for audit, kind, title in kinds for source in audit.sources(kind)]
