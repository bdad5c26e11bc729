"""Runs brought together: a study is what may be compared, an entry is one method in it, in one or several orders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from sphere_plugin.errors import ConfigError
from sphere_plugin.folders import ending
from sphere_plugin.paths import without_folders
from sphere_plugin.report.numbers import METRICS, Metric, Value, averaged, measure
from sphere_plugin.report.read import Checkpoint, Run

SPHERE: Final = "sphere"
CONTROLS: Final = ("shrunk", "random")  # an update of the same norm, a random subspace of the same rank
SHARED: Final = " †"


class Placed(Protocol):
    """A run and where it lies."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """As stored."""
        ...


@dataclass(frozen=True, eq=False)
class Entry:
    """One method of a study.

    Attributes:
        name: "memit+sphere".
        label: "MEMIT + SPHERE", with a dagger where targets were shared.
        slot: its number in the study; the page shows and hides by it.
        family: the number of its colour, the same with SPHERE and without.
        runs: one for each order of edits.
    """

    name: str
    label: str
    slot: int
    family: int
    runs: tuple[Run, ...]
    _values: dict[tuple[str, int], Value] = field(default_factory=dict, repr=False)

    @property
    def shared(self) -> bool:
        """Whether its targets were aimed once for all methods."""
        return self.runs[0].share_targets

    @property
    def sphere(self) -> bool:
        """Whether SPHERE is in it."""
        return SPHERE in self.name.split("+")

    @property
    def control(self) -> bool:
        """Whether it is a control."""
        return any(map(_is_control, self.name.lower().split("+")[1:]))

    @property
    def stopped(self) -> str:
        """Why a guard ended one of its runs, if one did and the run did not go on to its end after that."""
        ended = (run for run in self.runs if not run.at(run.manifest.get("edits") or 0))
        return next((run.stopped for run in ended if run.stopped), "")

    def value(self, metric: Metric, edits: int) -> Value:
        """Returns a metric after so many edits, averaged over orders; where not all have come so far, the reason."""
        key = metric.name, edits
        if key not in self._values:
            why = self.missing(edits)
            each = averaged(measure(run, run.at(edits), metric) for run in self.runs)
            self._values[key] = Value(None, reason=why) if why else each
        return self._values[key]

    def missing(self, edits: int) -> str:
        """Says which of its runs have no checkpoint after so many edits, and why; nothing where all have one."""
        absent = [run for run in self.runs if run.at(edits) is None]
        told = [
            (f"{run.order_in_words}: " if len(self.runs) > 1 else "")
            + (run.stopped or f"no checkpoint after {edits} edits")
            for run in absent
        ]
        return f"not available: {'; '.join(told)}" if told else ""

    def moments(self) -> list[int]:
        """The numbers of edits at which all its runs have a checkpoint, the unedited model left out."""
        each = [{one.edits for one in run.checkpoints if one.edits} for run in self.runs]
        return sorted(set.intersection(*each))

    def checkpoints(self, edits: int) -> list[tuple[Run, Checkpoint]]:
        """Its runs with their checkpoints after so many edits."""
        found = ((run, run.at(edits)) for run in self.runs)
        return [(run, checkpoint) for run, checkpoint in found if checkpoint is not None]


@dataclass(frozen=True)
class Study:
    """What may be compared: the same model, data, schedule and protocol.

    Attributes:
        number: from 0.
        model, data: names.
        edits, batch_size, sample: the schedule.
        protocol: metric -> which of its scores is shown.
        preset: the manifest's, if any.
        entries: in the order they were read.
        moment: after how many edits the table is; None if nothing was scored after an edit.
        remark: where the runs have come to different ends.
    """

    number: int
    model: str
    data: str
    edits: int | None
    batch_size: int | None
    sample: int | None
    protocol: Mapping[str, str]
    preset: str
    entries: tuple[Entry, ...]
    moment: int | None
    remark: str

    @property
    def key(self) -> str:
        """The prefix of its files."""
        return f"study{self.number + 1}"

    def value(self, entry: Entry, metric: Metric) -> Value:
        """Returns a metric of an entry at the moment; or why there is none."""
        if self.moment is None:
            return Value(None, reason="not available: no checkpoint after an edit")
        return entry.value(metric, self.moment)

    def unedited(self, metric: Metric) -> Value:
        """Returns a metric before any edit: one run of each order, for all entries start from the same model."""
        first: dict[int | None, Value] = {}
        for run in (run for entry in self.entries for run in entry.runs):
            value = measure(run, run.at(0), metric)
            if value.mean is not None:
                first.setdefault(run.order, value)
        if metric.name == "energy":
            first = dict(list(first.items())[:1])
        return averaged(first.values()) if first else Value(None)

    def pairs(self) -> list[tuple[Entry, Entry]]:
        """Entries "x" and "x+sphere"; of several "x" the one with the most settings in common.

        Of those with as many one of the same comparison, then one of the same seed, then the first.
        """
        found = []
        for entry in (one for one in self.entries if one.sphere):
            wanted = without_sphere(entry.name), entry.shared
            alone = [one for one in self.entries if not one.sphere and (one.name, one.shared) == wanted]
            if alone:
                found.append((min(alone, key=lambda one: distance(one.runs[0], entry.runs[0])), entry))
        return found

    def metrics(self) -> list[Metric]:
        """All metrics; locality is left out where nobody has it."""
        return [metric for metric in METRICS if metric.name != "locality" or self.has(metric)]

    def has(self, metric: Metric) -> bool:
        """Whether any entry has a number for it at any checkpoint."""
        return any(entry.value(metric, edits).mean is not None for entry in self.entries for edits in entry.moments())


def without_sphere(name: str) -> str:
    """Returns "memit" for "memit+sphere"."""
    return "+".join(part for part in name.split("+") if part.lower() != SPHERE)


def studies_of(runs: Sequence[Run], at: int | None = None) -> tuple[Study, ...]:
    """Sort runs into studies.

    Args:
        runs: as read.
        at: after how many edits to compare; None: the last moment that all entries have.

    Raises:
        ConfigError: no run has a checkpoint after ``at`` edits.
    """
    check_moment(runs, at)
    families, texts = _families(runs), _texts(runs)
    sorted_out: dict[str, list[Run]] = {}
    for run in runs:
        sorted_out.setdefault(_setting(run, texts), []).append(run)
    return tuple(study_of(number, _entries(group, families), at) for number, group in enumerate(sorted_out.values()))


def check_moment(runs: Sequence[Run], at: int | None) -> None:
    """Raise ConfigError unless any run has a checkpoint after ``at`` edits; None stands for a moment to be found."""
    if at is not None and not any(run.at(at) for run in runs):
        known = sorted({checkpoint.edits for run in runs for checkpoint in run.checkpoints})
        raise ConfigError("--at", at, f"a number of edits with a checkpoint: {known}", "Choose one of them.")


def study_of(number: int, entries: tuple[Entry, ...], at: int | None) -> Study:
    """Returns entries as a study, what they share being told by the first run; see `studies_of` for ``at``."""
    first = entries[0].runs[0]
    manifest = first.manifest
    moment, remark = (at, "") if at is not None else _last_moment(entries)
    return Study(
        number=number,
        model=str(without_folders((manifest.get("model") or {}).get("name")) or "unknown model"),
        data=str((manifest.get("data") or {}).get("file") or "unknown data"),
        edits=manifest.get("edits"),
        batch_size=manifest.get("batch_size"),
        sample=manifest.get("sample"),
        protocol=first.protocol,
        preset=str(manifest.get("preset") or ""),
        entries=entries,
        moment=moment,
        remark=remark,
    )


def _last_moment(entries: Sequence[Entry]) -> tuple[int | None, str]:
    """The last moment that all entries have which have any and were not ended by a guard; who went further."""
    scored = [entry for entry in entries if entry.moments()]
    scored = [entry for entry in scored if not entry.stopped] or scored
    common = set.intersection(*(set(entry.moments()) for entry in scored)) if scored else set()
    if not common:
        return (max(edits for entry in scored for edits in entry.moments()), "") if scored else (None, "")
    further = [entry.label for entry in scored if entry.moments()[-1] > max(common)]
    remark = f"{', '.join(further)} went further: see the curves, or choose a moment with --at." if further else ""
    return max(common), remark


def _entries(runs: Sequence[Run], families: Mapping[str, int]) -> tuple[Entry, ...]:
    """Runs of the same entry, settings and kind of targets are orders of one entry if their orders differ."""
    groups: dict[tuple[str, bool, str, int], dict[int | None, Run]] = {}
    for run in runs:
        settings = json.dumps(run.manifest.get("method"), sort_keys=True, default=str)
        repeat = 0
        while run.order in groups.setdefault((run.entry, run.share_targets, settings, repeat), {}):
            repeat += 1
        groups[run.entry, run.share_targets, settings, repeat][run.order] = run
    members = [tuple(group.values()) for group in groups.values() if group]
    first = [group[0] for group in members]
    return tuple(
        Entry(group[0].entry, _label(group[0], first), slot, families[_family(group[0].entry)], group)
        for slot, group in enumerate(members)
    )


def _label(run: Run, runs: Sequence[Run]) -> str:
    """The run's label; with its folder where two entries would have the same, with a dagger for shared targets."""
    wanted = run.label, run.share_targets
    alike = [one.folder for one in runs if one is not run and (one.label, one.share_targets) == wanted]
    return run.label + ending(run.folder, alike) + (SHARED if run.share_targets else "")


def _families(runs: Iterable[Run]) -> dict[str, int]:
    """Base method -> number of its colour, in the order of their first appearance anywhere."""
    return {name: number for number, name in enumerate(dict.fromkeys(_family(run.entry) for run in runs))}


def _differing(run: Placed, other: Placed) -> int:
    """In how many of the method's settings two runs differ."""
    first, second = ((one.manifest.get("method") or {}).get("hparams") or {} for one in (run, other))
    return sum(first.get(key) != second.get(key) for key in {*first, *second})


def distance(run: Placed, other: Placed) -> tuple[int, bool, bool]:
    """Returns how far two runs are from being alike but for their entry; see `Study.pairs`."""
    seeds = [one.manifest.get("seed") for one in (run, other)]
    return _differing(run, other), run.folder.parent != other.folder.parent, seeds[0] != seeds[1]


def _family(name: str) -> str:
    """The entry's name without SPHERE and without what makes it a control."""
    base, *parts = name.lower().split("+")
    return "+".join((base, *(part for part in parts if part != SPHERE and not _is_control(part))))


def _is_control(part: str) -> bool:
    return part in CONTROLS


def _texts(runs: Iterable[Run]) -> dict[str, str]:
    """Path of a held-out text -> its digest, by the first manifest that has one: older ones have the path only."""
    found: dict[str, str] = {}
    for run in runs:
        if run.manifest.get("text"):
            found.setdefault(_text_path(run), str(run.manifest["text"]))
    return found


def _text_path(run: Run) -> str:
    return str((run.manifest.get("settings") or {}).get("text"))


def _setting(run: Run, texts: Mapping[str, str]) -> str:
    """What must be equal for two runs to be compared, as text; ``texts`` as `_texts` returns them."""
    manifest: Mapping[str, Any] = run.manifest
    model, data = manifest.get("model") or {}, manifest.get("data") or {}
    parts = (
        [model.get(key) for key in ("name", "dtype")],
        [data.get(key) for key in ("file", "sha256", "records")],
        [manifest.get(key) for key in ("edits", "batch_size", "sample", "preset")],
        manifest.get("seed") if manifest.get("sample") else None,  # it draws the sample
        (manifest.get("settings") or {}).get("neighbours"),
        manifest.get("text") or texts.get(_text_path(run), _text_path(run)),
        (manifest.get("settings") or {}).get("fluency") or 0,
        sorted(run.protocol.items()),
    )
    return json.dumps(parts, sort_keys=True, default=str)
