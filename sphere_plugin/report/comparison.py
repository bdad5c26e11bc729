"""The comparison table, as the paper's Table 1: rows of cells for the page, a CSV and a LaTeX table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sphere_plugin.report.grid import csv_text
from sphere_plugin.report.numbers import (
    MINUS,
    NOT_SCORED,
    Metric,
    Value,
    shown,
    shown_spread,
    shown_value,
)
from sphere_plugin.report.published import UNEDITED, Published, published
from sphere_plugin.report.studies import SHARED, Entry, Study

BEST, SECOND = "best", "second"
ARROWS: Final = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\to$"})
SPECIAL: Final = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "†": r"\textsuperscript{\dag}",
    }
)


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        metric: its column.
        value: what was measured.
        text: how it is written.
        spread: of several orders, in words.
        rank: "best", "second" or nothing, among the edited models.
        paper: what the paper has, "90.01 ± 0.21", or nothing.
    """

    metric: Metric
    value: Value
    text: str
    spread: str
    rank: str
    paper: str


@dataclass(frozen=True)
class Row:
    """One method. ``entry`` is None for the unedited model; ``edits`` is what its weights hold."""

    label: str
    entry: Entry | None
    edits: int
    n: int
    orders: int
    cells: tuple[Cell, ...]


def rows(study: Study) -> list[Row]:
    """Returns the unedited model and every entry of a study, at its moment."""
    metrics, block = study.metrics(), published(study.preset, study.data)
    first = [_cell(metric, study.unedited(metric), "", _paper(block, UNEDITED, metric)) for metric in metrics]
    orders = len({run.order for entry in study.entries for run in entry.runs})
    table = [Row("Unedited", None, 0, _count(first), orders, tuple(first))]
    values = {entry.slot: [study.value(entry, metric) for metric in metrics] for entry in study.entries}
    ranks = [ranked(metric, [values[entry.slot][k] for entry in study.entries]) for k, metric in enumerate(metrics)]
    for index, entry in enumerate(study.entries):
        cells = tuple(
            _cell(metric, values[entry.slot][k], ranks[k][index], _paper(block, entry.name.lower(), metric))
            for k, metric in enumerate(metrics)
        )
        table.append(Row(entry.label, entry, study.moment or 0, _count(cells), len(entry.runs), cells))
    return table


def ranked(metric: Metric, values: Sequence[Value]) -> list[str]:
    """Returns "best", "second" or "" for each value. What reads the same is the same; one number alone has no rank."""
    read = [None if value.mean is None else _reading(metric, shown(metric, value.mean)) for value in values]
    falling = sorted({one for one in read if one is not None}, reverse=metric.better > 0)
    if len(falling) < 2:
        return [""] * len(values)
    return [BEST if one == falling[0] else SECOND if one == falling[1] else "" for one in read]


def protocol_in_words(study: Study) -> str:
    """Says which scores the table shows."""
    words = {
        "tokens": "share of the target's tokens that are the first choice",
        "exact": "1 where every token of the target is the first choice, else 0",
        "success": "1 where the right target is more probable than the other, else 0",
        "locality": "share of next tokens that are the unedited model's",
    }
    chosen: dict[str, list[str]] = {}
    for metric in ("efficacy", "generalization", "specificity"):
        how = words.get(study.protocol.get(metric, "tokens"), study.protocol.get(metric, ""))
        chosen.setdefault(how, []).append(metric)
    return "; ".join(f"{', '.join(metrics)}: {how}" for how, metrics in chosen.items())


def table_csv(study: Study) -> str:
    """Returns all numbers of the table unrounded, one line for each method and metric."""
    heads = ("method", "entry", "edits", "metric", "mean", "half_width_95", "n", "orders", "order_min", "order_max")
    lines = []
    for row in rows(study):
        for cell in row.cells:
            value, each = cell.value, cell.value.each
            lines.append(
                (row.label, row.entry.name if row.entry else UNEDITED, row.edits, cell.metric.name)
                + (_raw(value.mean), _raw(value.half), value.n or "", row.orders)
                + (_raw(min(each) if each else None), _raw(max(each) if each else None))
                + ("yes" if row.entry and row.entry.shared else "no", cell.paper)
                + ("" if value.mean is not None else value.reason,)
            )
    return csv_text((*heads, "shared_targets", "published", "note"), lines)


def table_latex(study: Study) -> str:
    """Returns the table for LaTeX with booktabs; best bold, second underlined."""
    metrics = study.metrics()
    heads = " & ".join(_latex(metric.short) + metric.arrow.translate(ARROWS) for metric in metrics)
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{l" + "c" * len(metrics) + "}",
        r"\toprule",
        rf"Method & {heads} \\",
        r"\midrule",
    ]
    for row in rows(study):
        lines.append(rf"{_latex(row.label)} & {' & '.join(_latex_cell(cell) for cell in row.cells)} \\")
        if row.entry is None:
            lines.append(r"\midrule")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {_line(note)}" for note in notes(study))]
    return "\n".join(lines) + "\n"


def notes(study: Study) -> list[str]:
    """Says what must be known to read the table, a sentence each."""
    said = [
        f"{study.model}, {study.data}, after {study.moment} edits in batches of {study.batch_size}."
        if study.moment is not None
        else f"{study.model}, {study.data}. No run has a checkpoint after an edit yet.",
        f"Scores are of all edits so far: {protocol_in_words(study)}.",
        "Mean ± 95 % half width 1.96 s/√n over the n scored edits.",
        "Best bold, second underlined, among the edited models.",
        "ΔHE: relative change of hyperspherical energy (s = 2), mean of the edited weights; above 0, neurons crowd; "
        "best is nearest to 0.",
    ]
    if any(len(entry.runs) > 1 for entry in study.entries):
        said.append("Of several orders, the mean; its ± is the mean of the single orders' half widths.")
    if any(entry.shared for entry in study.entries):
        said.append(f"{SHARED.strip()} Targets were aimed once and shared by all methods, not by each for itself.")
    return [*said, *([study.remark] if study.remark else [])]


def table_json(study: Study) -> list[dict[str, Any]]:
    """Returns the table as it goes into report.json."""
    return [
        {
            "method": row.label,
            "entry": row.entry.name if row.entry else UNEDITED,
            "shared_targets": bool(row.entry and row.entry.shared),
            "edits": row.edits,
            "n": row.n,
            "orders": row.orders,
            "values": {cell.metric.name: _cell_json(cell) for cell in row.cells},
        }
        for row in rows(study)
    ]


def _cell_json(cell: Cell) -> Mapping[str, Any]:
    value = cell.value
    keys = ("mean", "half_width", "n", "each_order", "shown", "rank", "published")
    return dict(
        zip(keys, (value.mean, value.half, value.n, value.each, cell.text, cell.rank, cell.paper), strict=True)
    )


def _cell(metric: Metric, value: Value, rank: str, paper: str) -> Cell:
    return Cell(metric, value, shown_value(metric, value), shown_spread(metric, value), rank, paper)


def _paper(block: Published | None, name: str, metric: Metric) -> str:
    found = block.rows.get(name, {}).get(metric.name) if block else None
    return " ± ".join(found) if found else ""


def _count(cells: Sequence[Cell]) -> int:
    return max((cell.value.n for cell in cells), default=0)


def _reading(metric: Metric, text: str) -> float:
    number = float(text.replace(MINUS, "-"))
    return abs(number) if metric.name == "energy" else number


def _raw(number: float | None) -> str:
    return "" if number is None else repr(number)


def _latex(text: str) -> str:
    return _line(text).translate(SPECIAL).replace("Δ", r"$\Delta$")


def _line(text: str) -> str:
    """On one line: a name with a line break would end the row, or the comment, that it stands in."""
    return " ".join(text.split())


def _latex_cell(cell: Cell) -> str:
    if cell.value.mean is None:
        return "--" if cell.value.reason == NOT_SCORED else r"\emph{n/a}"
    mean = _latex_number(shown(cell.metric, cell.value.mean))
    half = "" if cell.value.half is None else rf"\pm {_latex_number(shown(cell.metric, cell.value.half))}"
    marked = {BEST: rf"\mathbf{{{mean}{half}}}", SECOND: rf"\underline{{{mean}{half}}}"}.get(cell.rank, mean + half)
    return f"${marked}$"


def _latex_number(text: str) -> str:
    """In a formula: "2.35e+17" is a product."""
    mantissa, power, exponent = text.replace(MINUS, "-").partition("e")
    return mantissa + (rf" \times 10^{{{int(exponent)}}}" if power else "")
