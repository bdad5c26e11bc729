"""Folders of sweeps as docs/run-folder.md says, of runs that are made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report_runs import checkpoint, manifest, write_run

from sphere_plugin.files import write_json

METRICS = ("efficacy_exact", "generalization_exact", "specificity")
DEFAULT = {"eta": 0.5, "alpha": 0.8, "basis": "current", "projection": "in_loop", "layers": [3, 4]}
GRID = {"eta": [0.3, 0.5, 0.7], "alpha": [0.3, 0.5, 0.8, 1.0]}
LABELS = {"memit": "MEMIT", "alphaedit": "AlphaEdit"}

# (method, values; none: alone, seed of the order) -> metric -> one score per edit
Scores = Callable[[str, Mapping[str, Any], int | None], Mapping[str, Sequence[float | None]]]


def coins(method: str, values: Mapping[str, Any], order: int | None, count: int = 60) -> dict[str, list[float]]:
    """Zeros and ones; more ones the nearer a cell is to eta 0.5, alpha 1."""
    drawn = random.Random(f"{method} {sorted(values.items(), key=str)} {order}")
    chance = 0.35
    if values:
        chance = 0.85 - 0.5 * abs(values.get("eta", 0.5) - 0.5) - 0.5 * (1.0 - values.get("alpha", 1.0))
    return {metric: [float(drawn.random() < chance) for _ in range(count)] for metric in METRICS}


def write_sweep(
    folder: Path,
    grid: Mapping[str, list[Any]] = GRID,
    bases: Sequence[str] = ("memit", "alphaedit"),
    orders: Sequence[int | None] = (None,),
    scores: Scores = coins,
) -> Path:
    """A sweep of runs without journals: checkpoints before any edit and after all."""
    choices = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    cells: list[dict[str, Any]] = []
    for base in bases:
        alone = len(cells)
        for values in ({}, *choices):
            entry = f"{base}+sphere" if values else base
            name = ",".join(f"{key}={value}" for key, value in values.items()) or "base"
            label = LABELS[base] + (" + SPHERE" if values else "")
            place = f"{base}/base" if values.get("alpha") == 0 else f"{entry}/{name}"
            runs = [place + (f",order={order}" if len(orders) > 1 else "") for order in orders]
            default = bool(values) and all(DEFAULT[key] == value for key, value in values.items())
            against = alone if values else None
            told = {"entry": entry, "label": label, "values": values, "against": against, "default": default}
            cells.append(told | {"runs": runs})
            for order, run in zip(orders, runs, strict=True) if place == f"{entry}/{name}" else ():
                found = dict(scores(base, values, order))
                count = len(next(iter(found.values())))
                closer = 1e-4 * (3.0 - 2.0 * values.get("alpha", 0.0))
                points = [
                    checkpoint(0, {metric: [0.0] * count for metric in found}, {"w": {"2": 100.0}}, nll=3.0),
                    checkpoint(80, found, {"w": {"2": 100.0 * (1 + closer)}}, nll=3.5 - 0.1 * values.get("eta", 0)),
                ]
                method = {"alg_name": "SPHERE", "hparams": {**DEFAULT, **values}}
                write_run(folder / run, manifest(entry, label, order=order, method=method), points)
    write_json(folder / "sweep.json", {"format": 1, "settings": {}, "made_of": {}, "cells": cells})
    return folder
