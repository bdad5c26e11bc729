"""The numbers of a sweep: as JSON, and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sphere_plugin.report.comparison import protocol_in_words
from sphere_plugin.report.grid import Field, Grid, Line
from sphere_plugin.report.numbers import Metric, Value, shown, shown_value, written, written_p
from sphere_plugin.report.paired import TEST
from sphere_plugin.report.recommend import Choice, criterion, plain, score
from sphere_plugin.report.sweep import LEVEL, Cell, Sweep, in_words, value_in_words


def numbers(sweep: Sweep, chosen: Sequence[Choice]) -> dict[str, Any]:
    """Everything that was measured, unrounded, for ``sweep.json`` and ``report.json``; docs/run-folder.md."""
    study = sweep.study
    return {
        "model": study.model,
        "data": study.data,
        "edits": study.moment,
        "batch_size": study.batch_size,
        "protocol": dict(study.protocol),
        "unedited": {metric.name: _value(study.unedited(metric)) for metric in sweep.metrics},
        "cells": [_cell(sweep, cell) for cell in sweep.cells],
        "criterion": criterion(sweep),
        "recommended": [plain(sweep, choice) for choice in chosen],
        "notes": notes(sweep),
    }


def notes(sweep: Sweep) -> list[str]:
    """What must be known to read the numbers, a sentence each."""
    study = sweep.study
    orders = sorted({len(cell.entry.runs) for cell in sweep.cells if cell.entry is not None})
    said = [
        f"{study.model}, {study.data}, after {study.moment} edits in batches of {study.batch_size}."
        if study.moment is not None
        else f"{study.model}, {study.data}. No run has a checkpoint after an edit yet.",
        f"Scores are of all edits so far: {protocol_in_words(study)}. ±: 1.96 s/√n over the scored edits.",
        f"Differences are to the same method without SPHERE, edit by edit. {TEST[0].upper()}{TEST[1:]}; corrected by "
        f"Holm's method for all cells of a method and metric, clear below {LEVEL:g}. Perplexity and ΔHE are single "
        "numbers of a run and have no such test.",
        "ΔHE: relative change of hyperspherical energy (s = 2), mean of the edited weights. Its difference is that of "
        "absolute values: below 0 the energy has stayed nearer to where it was.",
        f"Score: {criterion(sweep)}.",
    ]
    if orders and orders != [1]:
        said.append(f"Means of {' or '.join(map(str, orders))} orders of the edits; their ± is the mean of theirs.")
    if any(cell.values.get("alpha") == 0 for cell in sweep.projected()):
        said.append("α 0 is the method alone, whose runs stand for it.")
    return [*said, *([study.remark] if study.remark else [])]


def grids(sweep: Sweep) -> dict[str, Grid]:
    """The cells with their scores, and every single number of them."""
    return {"cells": _overview(sweep), "numbers": _every_number(sweep)}


def _cell(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    return {
        "entry": cell.name,
        "label": cell.method,
        "values": dict(cell.values),
        "against": cell.against,
        "default": cell.default,
        "runs": list(cell.runs),
        "orders": sweep.orders(cell),
        "score": score(sweep, cell),
        "metrics": {
            metric.name: _value(sweep.value(cell, metric)) | {"difference": _difference(sweep, cell, metric)}
            for metric in sweep.metrics
        },
    }


def _value(value: Value) -> dict[str, Any]:
    told: dict[str, Any] = {"mean": value.mean, "half_width": value.half, "n": value.n, "each_order": list(value.each)}
    return told | ({"reason": value.reason} if value.mean is None else {})


def _difference(sweep: Sweep, cell: Cell, metric: Metric) -> dict[str, Any] | None:
    """Against the method alone; None of the method itself."""
    if cell.against is None:
        return None
    told: dict[str, Any] = {"mean": sweep.difference(cell, metric)}
    test = sweep.test(cell, metric)
    if test is not None:
        told |= {"low": test.low, "high": test.high, "p": test.p, "holm": test.holm, "n": test.n}
    return told | {"clear": sweep.clear(cell, metric)}


def _overview(sweep: Sweep) -> Grid:
    axes, metrics = list(sweep.axes), sweep.metrics
    lines = []
    for cell in sweep.cells:
        found = score(sweep, cell)
        fields = [Field(cell.method), *(_axis(cell, key) for key in axes)]
        fields.append(Field("–") if found is None else Field(written(100.0 * found, 2), 100.0 * found))
        for metric in metrics:
            value = sweep.value(cell, metric)
            raw = None if value.mean is None else value.mean * metric.scale
            mark = " *" if sweep.clear(cell, metric) else ""
            fields.append(Field(shown_value(metric, value) + mark, raw))
        lines.append(Line(None, tuple(fields)))
    heads = ("Method", *(in_words({key: ""}).strip() for key in axes), "Score (%)")
    note = f"* clearly other than the method alone (p < {LEVEL:g} after Holm's correction)."
    heads = (*heads, *(f"{metric.short}{metric.arrow} ({metric.unit})" for metric in metrics))
    return Grid(f"{sweep.key}-cells", "All cells", heads, tuple(lines), note)


def _every_number(sweep: Sweep) -> Grid:
    axes = list(sweep.axes)
    lines = []
    for cell in sweep.cells:
        for metric in sweep.metrics:
            value, orders = sweep.value(cell, metric), sweep.orders(cell)
            fields = [
                Field(cell.method),
                *(_axis(cell, key) for key in axes),
                Field(f"{metric.title} ({metric.unit})"),
            ]
            fields += [Field(str(orders), orders), Field(str(value.n), value.n)]
            fields += [_scaled(metric, one) for one in (value.mean, value.half, sweep.difference(cell, metric))]
            test = sweep.test(cell, metric)
            low, high, p, corrected = (None,) * 4 if test is None else (test.low, test.high, test.p, test.holm)
            fields += [_scaled(metric, low), _scaled(metric, high)]
            fields += [Field("–") if one is None else Field(written_p(one), one) for one in (p, corrected)]
            lines.append(Line(None, tuple(fields)))
    heads = ("Method", *(in_words({key: ""}).strip() for key in axes), "Metric", "Orders", "Edits", "Mean", "±")
    note = "Differences to the method alone, with the 95 % percentile bootstrap interval over records."
    heads = (*heads, "Difference", "95 % from", "95 % to", "p", "p (Holm)")
    return Grid(f"{sweep.key}-numbers", "All numbers", heads, tuple(lines), note)


def _axis(cell: Cell, key: str) -> Field:
    value = cell.values.get(key)
    if value is None:
        return Field("–")
    return Field(value_in_words(value), value if isinstance(value, float) else None)


def _scaled(metric: Metric, number: float | None) -> Field:
    return Field("–") if number is None else Field(shown(metric, number), number * metric.scale)
