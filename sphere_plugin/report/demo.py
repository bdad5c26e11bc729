"""The demo's table and figure, made from its numbers alone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere_plugin.files import write_bytes

# Energies move by thousandths of a per cent; shown as (energy / before − 1) in units of 1e-4.
ENERGY_UNIT = 1e-4
COLUMNS = ("edits", "efficacy", "generaliz.", "specificity", "ΔHE·10⁴", "perplexity", "fresh")


def rows(result: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """(entry, numbers in the order of COLUMNS) for every checkpoint, entry after entry."""
    return [
        (name, numbers(checkpoint, checkpoints[0]))
        for name, checkpoints in result["entries"].items()
        for checkpoint in checkpoints
    ]


def numbers(checkpoint: Mapping[str, Any], unedited: Mapping[str, Any]) -> list[float]:
    """One checkpoint's numbers, in the order of COLUMNS; what was not scored is NaN."""
    moved = [now / before - 1 for now, before in zip(checkpoint["energy"]["2"], unedited["energy"]["2"], strict=True)]
    return [
        checkpoint["edits"],
        mean(checkpoint["efficacy"]),
        mean(checkpoint["generalization"]),
        mean(checkpoint["specificity"]),
        mean(moved) / ENERGY_UNIT,
        math.exp(min(checkpoint["nll"], 700.0)),
        mean(checkpoint["fresh"]),
    ]


def mean(values: Sequence[float | None]) -> float:
    """The mean of the numbers among ``values``; NaN if there are none."""
    kept = [value for value in values if value is not None and not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def table(result: Mapping[str, Any]) -> str:
    """A table for the terminal."""
    lines = [f"{'':22}" + "".join(f"{column:>13}" for column in COLUMNS)]
    for name, values in rows(result):
        cells = [f"{values[0]:13.0f}"]
        cells += ["            –" if math.isnan(value) else f"{value:13.3f}" for value in values[1:4]]
        cells += [f"{values[4]:13.2f}", f"{values[5]:13.2f}"]
        cells += ["            –" if math.isnan(values[6]) else f"{values[6]:13.3f}"]
        lines.append(f"{name:22}" + "".join(cells))
    demo = result["demo"]
    lines += [
        "",
        f"{demo['model']}, {demo['data']}, batches of {demo['batch_size']}, {demo['seconds']:.0f} s, {demo['host']}.",
        "Efficacy, generalization, specificity: of ALL edits so far, every target token top-1 (specificity: the next",
        "token as in the unedited model). ΔHE: hyperspherical energy (s = 2) of the edited weights against before.",
        "Fresh: EasyEdit's own rewrite_acc, taken right after each batch, which sees no forgetting.",
    ]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ("efficacy", "generalization", "specificity", "hyperspherical energy, change · 10⁴", "perplexity")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.4), layout="constrained")
    styles = (("#9a9a9a", "--", "o"), ("#1f5fbf", "-", "s"))
    for (name, checkpoints), (color, line, marker) in zip(result["entries"].items(), styles, strict=False):
        points = [numbers(checkpoint, checkpoints[0]) for checkpoint in checkpoints]
        for column, axis in enumerate(axes, start=1):
            known = [(point[0], point[column]) for point in points if not math.isnan(point[column])]
            axis.plot(*zip(*known, strict=True), color=color, linestyle=line, marker=marker, markersize=4, label=name)
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("edits", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:3]:
        axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize=9, frameon=False, loc="lower left")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    write_bytes(path, content.getvalue())
