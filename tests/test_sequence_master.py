"""Runs of bfloat16 models with master copies: resumed, undone and taken up bit for bit, and what the files tell."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from pico_runs import files, live, place, prints, scores, settings, stopped_and_resumed
from test_sequence_resume import assert_same, warnings

import sphere_plugin as sp
from sphere_plugin import CacheError, ConfigError
from sphere_plugin.files import read_json
from sphere_plugin.journaling import Journal
from sphere_plugin.report.diagnostics import batches_csv
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.runner import Run, resume, start

BF16 = {"bf16": True, "master_copy": True}


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("masters"), **BF16)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


def masters(folder: Path) -> list[str]:
    return [read_json(path)["masters"] for path in sorted((folder / "journal").glob("0*.json"))]


@pytest.mark.parametrize(
    ("entry", "followed"), [("memit+sphere", False), ("memit+sphere", True), ("alphaedit", False), ("prune", False)]
)
def test_a_stopped_run_goes_on_as_it_would_have(entry, followed, hparams: Path, tmp_path: Path, monkeypatch) -> None:
    if followed:
        monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    told = settings(hparams, entry, checkpoints=[], edits=6, sample=1, neighbours=1)
    start(told, tmp_path / "whole")
    stopped_and_resumed(told, tmp_path / "stopped", 1, 2)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert masters(tmp_path / "stopped") == masters(tmp_path / "whole")
    assert len(set(masters(tmp_path / "whole"))) == 3
    assert files(tmp_path / "stopped").keys() == files(tmp_path / "whole").keys()
    assert read_json(tmp_path / "whole" / "manifest.json")["model"]["dtype"] == "bfloat16"


def test_an_undone_run_repeats_itself(hparams: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The master copies of that moment come from the journal, so nothing differs in its last digits."""
    start(settings(hparams, "alphaedit+sphere"), tmp_path)
    before, copies, told = prints(tmp_path), masters(tmp_path), scores(tmp_path)
    for to in (8, 2, 0):
        sp.undo(tmp_path, to)
        with caplog.at_level(logging.WARNING, "sphere_plugin"):
            resume(tmp_path)
        assert prints(tmp_path) == before and masters(tmp_path) == copies and scores(tmp_path) == told
    assert not warnings(caplog)


def test_the_record_tells_what_rounding_took(hparams: Path, tmp_path: Path) -> None:
    start(settings(hparams, "memit", checkpoints=[], edits=4, sample=1), tmp_path / "with")
    without = {"all": {"master_copy": False}}
    start(settings(hparams, "memit", checkpoints=[], edits=4, sample=1, settings=without), tmp_path / "without")
    for name, kept in (("with", True), ("without", False)):
        journal = Journal.open(tmp_path / name / "journal")
        assert bool(journal.mastered.dtypes) == kept
        for number in (1, 2):
            record = journal.record(number)
            assert ("masters" in record) == kept
            for layer in record["layers"]:
                assert (layer["master_gap"] is not None) == kept
                assert (layer["rounding_loss"] < 1e-4) == kept and layer["rounding_loss"] > 0.0
    (study,) = studies_of(read_runs([tmp_path / "with"]))
    lines = batches_csv(study).splitlines()
    columns = lines[0].split(",")
    assert columns[-5:-3] == ["rounding_loss", "master_gap"]
    first = dict(zip(columns, lines[1].split(","), strict=True))
    layer = Journal.open(tmp_path / "with" / "journal").record(1)["layers"][0]
    assert float(first["rounding_loss"]) == layer["rounding_loss"]
    assert float(first["master_gap"]) == layer["master_gap"]


def test_masters_are_at_hand_where_a_run_is_taken_up(hparams: Path, tmp_path: Path) -> None:
    told = settings(hparams, "memit+sphere", checkpoints=[], edits=4, sample=1)
    start(told, tmp_path)
    journal = Journal.open(tmp_path / "journal")
    run = Run(told, tmp_path)
    run.take_up(guarded=True)
    kept = journal.masters_after(2)
    assert run.entrant.masters.keys() == kept.keys() and len(kept) == 2
    for name, one in run.entrant.masters.items():
        assert torch.equal(one, kept[name])
        assert torch.equal(one.bfloat16(), journal.weights_after(2)[name])
    assert live(tmp_path) == journal.fingerprint(2)


def test_a_run_of_a_version_that_knew_no_master_copies_goes_on(tmp_path: Path) -> None:
    hparams = place(tmp_path / "place")
    told = settings(hparams, "memit", checkpoints=[], edits=4, sample=1)
    stopped_and_resumed(told, tmp_path / "run", 1)
    sp.undo(tmp_path / "run", 2)
    path = tmp_path / "run" / "manifest.json"
    manifest = read_json(path)
    for key in ("master_copy", "stats_device", "bf16"):
        del manifest["method"]["hparams"][key]
    path.write_text(json.dumps(manifest))
    assert resume(tmp_path / "run").edits == 4
    yaml = hparams.read_text()
    hparams.write_text(yaml + "master_copy: true\n")
    with pytest.raises(CacheError, match="master_copy: got True, expected False, as in the manifest"):
        resume(tmp_path / "run")


def test_two_dtypes_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bf16: got True, expected false beside fp16: true"):
        start(settings(place(tmp_path, fp16=True, bf16=True), "memit"), tmp_path / "run")
