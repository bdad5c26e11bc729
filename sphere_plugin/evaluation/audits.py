"""What audits have found, as it lies in the folder of a run (docs/run-folder.md), and what follows from it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from sphere_plugin.errors import CacheError
from sphere_plugin.evaluation.auditor import Measured
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.uncertainty import Change, Uncertainty, difference, growth
from sphere_plugin.files import read_json, write_json

FORMAT: Final = 1
FOLDER: Final = "audit"
EDITED: Final = "edited"
NEIGHBOURS: Final = "neighbours"
KINDS: Final = (EDITED, NEIGHBOURS)
TITLES: Final = ("edited facts", "neighbours")
PARTS: Final = ("total", "aleatoric", "epistemic")


@dataclass(frozen=True)
class Audit:
    """One model of a run.

    Attributes:
        edits: in the weights; 0 is the unedited model.
        weights: fingerprint of the weights that the run may write, at that moment.
        model: fingerprint of all weights before any edit.
        settings: of drawing and embedding, and the source of paraphrases.
        edited, neighbours: what was measured.
    """

    edits: int
    weights: str
    model: str
    settings: Mapping[str, Any]
    edited: tuple[Measured, ...] = ()
    neighbours: tuple[Measured, ...] = ()

    def of(self, kind: str) -> tuple[Measured, ...]:
        """The edited facts, or their neighbours."""
        return self.edited if kind == EDITED else self.neighbours

    def sources(self, kind: str) -> dict[str, int]:
        """Where paraphrases came from -> for how many prompts."""
        return dict(Counter(re.sub(r"(?<=of )P\d+$", "relations", one.probe.source) for one in self.of(kind)))


@dataclass(frozen=True)
class Part:
    """Means over the facts before and after the edits, and the growth."""

    before: float
    after: float
    change: Change


def grown(before: Audit, after: Audit, kind: str) -> dict[str, Part]:
    """U, and its two kinds, of the facts that both have; empty where their settings differ."""
    if before.settings != after.settings:
        return {}
    pairs = _paired(kind, before, after)
    parts = {}
    for part in PARTS if pairs else ():
        pre, post = _columns(pairs, part)
        parts[part] = Part(fmean(pre), fmean(post), growth(pre, post))
    return parts


def lowered(before: Audit, base: Audit, other: Audit, kind: str) -> Change | None:
    """ΔU of ``other`` minus ΔU of ``base`` on the facts that all have; None where there are none to compare."""
    if not before.settings == base.settings == other.settings or base.model != other.model:
        return None
    rows = _paired(kind, before, base, other)
    return difference(*_columns(rows, "total")) if rows else None


def path_of(folder: Path, edits: int) -> Path:
    """The file of a run's audit after so many edits."""
    return folder / FOLDER / f"{edits:06d}.json"


def write_audit(folder: Path, audit: Audit) -> None:
    """Write it into the folder of its run.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    told = {key: getattr(audit, key) for key in ("edits", "weights", "model", "settings")}
    found = {kind: [_plain(one) for one in audit.of(kind)] for kind in KINDS}
    write_json(path_of(folder, audit.edits), {"format": FORMAT, **told, **found})


def read_audits(folder: Path) -> dict[int, Audit]:
    """Edits -> audit, of all in the folder of a run.

    Raises:
        CacheError: a file is damaged.
    """
    paths = sorted(path for path in (folder / FOLDER).glob("*.json") if path.stem.isdecimal())
    return {int(path.stem): read_audit(path) for path in paths}


def read_audit(path: Path) -> Audit:
    """Read one file.

    Raises:
        CacheError: it is damaged.
    """
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        edited, neighbours = (tuple(_measured(one) for one in content[kind]) for kind in KINDS)
        weights, model = (str(content[key]) for key in ("weights", "model"))
        return Audit(int(content["edits"]), weights, model, dict(content["settings"]), edited, neighbours)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # int() of infinity
        remedy = "Delete it and run `sphere audit` again."
        raise CacheError(str(path), repr(error), "an audit as this package wrote it", remedy) from error


def _plain(one: Measured) -> dict[str, Any]:
    probe, found = one.probe, one.uncertainty
    return {
        "record": probe.record,
        "prompt": probe.prompt,
        "subject": probe.subject,
        "source": probe.source,
        "prompts": list(probe.prompts),
        "aleatoric": found.aleatoric,
        "epistemic": found.epistemic,
        "uncertainty": found.total,
        "written": list(one.written),
    }


def _measured(content: Mapping[str, Any]) -> Measured:
    prompts, written = (tuple(str(text) for text in content[key]) for key in ("prompts", "written"))
    prompt, subject, source = (str(content[key]) for key in ("prompt", "subject", "source"))
    found = Uncertainty(*(float(content[key]) for key in ("aleatoric", "epistemic")))
    if not math.isfinite(found.total):
        raise ValueError(f"uncertainty {found}")
    return Measured(Probe(int(content["record"]), prompt, subject, source, prompts), found, written)


def _paired(kind: str, *audits: Audit) -> list[tuple[Measured, ...]]:
    """The same prompts, said in the same ways, of several audits."""
    tables = [{(one.probe.record, one.probe.prompt, one.probe.prompts): one for one in a.of(kind)} for a in audits]
    return [tuple(table[key] for table in tables) for key in tables[0] if all(key in table for table in tables)]


def _columns(rows: Sequence[Sequence[Measured]], part: str) -> list[list[float]]:
    """One kind of uncertainty, for each audit a number per prompt."""
    return [[float(getattr(one.uncertainty, part)) for one in column] for column in zip(*rows, strict=True)]
