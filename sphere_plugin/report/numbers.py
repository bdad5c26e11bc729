"""The numbers of a report: which there are, how one is computed from a checkpoint, and how every one is written.

`shown` is the only place where a number is rounded, so the page, the tables and the figures cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from sphere_plugin.evaluation.interval import interval
from sphere_plugin.evaluation.scores import score_key
from sphere_plugin.report.read import Checkpoint, Run

ENERGY_ORDER: Final = "2"  # s, as in the paper's ΔHE
LARGE: Final = 1e5  # from here on numbers are written with a power of ten
MINUS: Final = "−"
NOT_SCORED: Final = "not scored"


@dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
        name: its key in the JSON.
        title, short: in words, and as the paper's Table 1 has it.
        unit: what `scale` makes of it.
        scale, decimals: how it is written.
        better: 1 if higher is better, -1 if lower is.
        per_edit: whether there is one score per edit, and so a half width and a paired test.
    """

    name: str
    title: str
    short: str
    unit: str
    scale: float = 100.0
    decimals: int = 2
    better: int = 1
    per_edit: bool = True

    @property
    def arrow(self) -> str:
        """Which way is better; nearer to 0 for the energy, which the paper wants to stay where it was."""
        return "→0" if self.name == "energy" else "↑" if self.better > 0 else "↓"


METRICS: Final = (
    Metric("efficacy", "Efficacy", "Eff.", "%"),
    Metric("generalization", "Generalization", "Gen.", "%"),
    Metric("specificity", "Specificity", "Spe.", "%"),
    Metric("fluency", "Fluency", "Flu.", "bits · 100"),
    Metric("consistency", "Consistency", "Consis.", "cosine · 100"),
    Metric("locality", "Locality", "Loc.", "%"),
    Metric("perplexity", "Perplexity", "PPL", "e^nll", scale=1.0, better=-1, per_edit=False),
    Metric("energy", "Change of HE", "ΔHE", "10⁻⁴", scale=1e4, better=-1, per_edit=False),
)
ACCURACIES: Final = METRICS[:3]


@dataclass(frozen=True)
class Value:
    """One cell: a mean over edits, and over orders where there are several.

    Attributes:
        mean: None if it was not scored; `reason` then says why.
        half: 95 % half width, 1.96 s/√n, of one run; the mean of them where there are several.
        n: how many edits it is over, in one run.
        each: the means of the single orders, if there are several.
    """

    mean: float | None
    half: float | None = None
    n: int = 0
    each: tuple[float, ...] = ()
    reason: str = NOT_SCORED


def scores_of(run: Run, checkpoint: Checkpoint, metric: Metric) -> dict[int, float]:
    """Returns position in the order of editing -> score, for the edits that were scored."""
    values = checkpoint.scores.get(score_key(metric.name, run.protocol), ())
    pairs = zip(checkpoint.scored, values, strict=False)
    return {position: value for position, value in pairs if value is not None}


def measure(run: Run, checkpoint: Checkpoint | None, metric: Metric) -> Value:
    """Returns one metric of one run at one checkpoint."""
    if checkpoint is None:
        return Value(None, reason="not available: no checkpoint")
    if metric.name == "perplexity":
        if checkpoint.nll is None:
            return Value(None, reason="not available: not finite")
        return Value(math.exp(min(checkpoint.nll, 700.0)))
    if metric.name == "energy":
        return energy_change(run, checkpoint.energy)
    scores = list(scores_of(run, checkpoint, metric).values())
    if not scores:
        return Value(None)
    found = interval(scores)
    return Value(found.mean, found.half, found.n)


def energy_change(run: Run, energy: Mapping[str, Mapping[str, float | None]]) -> Value:
    """Returns the mean over weights of HE / HE of the unedited weight − 1."""
    unedited = run.at(0)
    if unedited is None or not unedited.energy:
        return Value(None, reason="not available: no energy of the unedited model")
    changes = []
    for name, orders in energy.items():
        now, before = orders.get(ENERGY_ORDER), unedited.energy.get(name, {}).get(ENERGY_ORDER)
        if now is None or not before:
            return Value(None, reason=f"not available: no finite energy of {name}")
        changes.append(now / before - 1.0)
    return Value(fmean(changes)) if changes else Value(None)


def averaged(values: Iterable[Value]) -> Value:
    """Returns one cell for several orders of an entry; none where an order has none, for it may have collapsed."""
    cells = tuple(values)
    if len(cells) == 1:
        return cells[0]
    means = tuple(cell.mean for cell in cells if cell.mean is not None)
    if len(means) < len(cells):
        lost = next(cell.reason for cell in cells if cell.mean is None)
        some = f"{lost.removeprefix('not available: ')} in {len(cells) - len(means)} of {len(cells)} orders"
        return Value(None, reason=f"not available: {some}" if means else lost)
    halves = [cell.half for cell in cells if cell.half is not None]
    return Value(fmean(means), fmean(halves) if halves else None, min(cell.n for cell in cells), means)


def shown(metric: Metric, number: float | None) -> str:
    """Returns a number as it is written everywhere; a dash for None."""
    return "–" if number is None else written(number * metric.scale, metric.decimals)


def written(number: float, decimals: int) -> str:
    """Returns a number with so many decimals and a true minus sign, large ones with a power of ten."""
    text = f"{number:.2e}" if abs(number) >= LARGE else f"{number:.{decimals}f}"
    if not float(text):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def written_p(p: float) -> str:
    """Returns a p value as it is written everywhere."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def shown_value(metric: Metric, value: Value) -> str:
    """Returns "46.50 ± 6.91", or why there is no number."""
    if value.mean is None:
        return value.reason
    half = "" if value.half is None else f" ± {shown(metric, value.half)}"
    return shown(metric, value.mean) + half


def shown_spread(metric: Metric, value: Value) -> str:
    """Returns "44.10 to 48.20", the lowest and the highest of several orders, or nothing for a single one."""
    return f"{shown(metric, min(value.each))} to {shown(metric, max(value.each))}" if value.each else ""
