"""Thousands of edits into one model: a late batch costs what an early one does, and all of it can be taken back."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sphere_plugin.files import read_tensors
from sphere_plugin.journaling import Journal

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "load.py"

# Medians over the last tenth of a run, against those over the first. Time is in yardsticks, see the script; a cost
# that grows with the number of edits has some twenty times as many behind it there.
TIME = 1.25
MEMORY = 1.02


def options(folder: Path, entry: str, edits: int, size: int, **more: object) -> list[str]:
    given = {"entries": entry, "edits": edits, "batch-size": size, "out": folder, **more}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def check(found: dict[str, Any], folder: Path, edits: int, size: int, time: float = TIME) -> None:
    """Nothing grew, and the way back is exact."""
    batches = found["batches"]
    assert [batch["edits"] for batch in batches] == list(range(size, edits + 1, size))
    assert found["pace"]["late_to_early"] <= time
    for measure in ("held", "most"):
        assert found[measure]["late_to_early"] <= MEMORY, measure
    sizes = [batch["bytes"] for batch in batches]
    assert max(sizes) <= 1.02 * min(sizes), "a late batch takes as much of the journal as an early one"
    assert found["undo"] == {"to_none": True, "and_to_all": True}

    journal = Journal.open(folder / found["entry"] / "run" / "journal")
    assert len(journal) == edits // size
    base, _ = read_tensors(journal.folder / "base.safetensors")
    assert journal.fingerprint_of(journal.weights_after(0)) == journal.fingerprint_of(base) == journal.fingerprint(0)
    prints = {journal.fingerprint(number) for number in range(len(journal) + 1)}
    assert len(prints) == len(journal) + 1, "every batch wrote something"
    assert all(score["nll"] is not None for score in found["scores"])


@pytest.mark.parametrize("entry", ["memit+sphere", "alphaedit+sphere"])
def test_hundreds_of_edits_cost_the_same_from_first_to_last(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    record_property("edits", 200)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    load = importlib.import_module("load")
    quick = {"every": 100, "sample": 10, "steps": 2, "hidden": 32, "texts": 40}
    found = load.measure(entry, load.parsed(options(tmp_path, entry, 200, 10, **quick)))
    check(found, tmp_path, 200, 10, 2 * TIME)  # few batches, and short ones
    assert len(found["scores"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["memit+sphere", "alphaedit+sphere"])
def test_ten_thousand_edits_cost_the_same_from_first_to_last(entry: str, tmp_path: Path, record_property) -> None:
    record_property("edits", 10_000)
    more = {"every": 2000, "sample": 50, "steps": 2, "hidden": 32, "json": tmp_path / "load.json"}
    command = [sys.executable, str(SCRIPT), *options(tmp_path, entry, 10_000, 50, **more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run([*command, "--plot", str(tmp_path / "load.png")], env=environment, check=True, capture_output=True)
    (found,) = json.loads((tmp_path / "load.json").read_text())["results"]
    assert (tmp_path / "load.png").stat().st_size > 10_000
    check(found, tmp_path, 10_000, 50)
    live = json.loads((tmp_path / entry / "run" / "checkpoints" / "010000.json").read_text())
    assert live.get("content", live)["edits"] == 10_000
