"""The guard: on models that do collapse, and what stays of their runs."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from pico_runs import COLLAPSING, facts, files, live, mapping, place, prints, scores, settings, write_yaml

import sphere_plugin as sp
from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.journaling import Journal
from sphere_plugin.report.read import read_run
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.guard import Events, Guard
from sphere_plugin.sequence.runner import Outcome, Run, resume, start


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    facts(folder / "facts.json")
    return place(folder)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


def collapsing(hparams: Path, **guard: Any) -> dict[str, Any]:
    """Settings of a run whose energies change by 31 % in batch 1 and by more than 60 % in batch 5.

    Of the efficacy right after each batch all is left after 4 edits, 71 % after 8.
    """
    told = {"data": str(hparams.parents[2] / "facts.json"), "order": None, "sample": None}
    return mapping(hparams, "memit", **told, settings={"all": COLLAPSING}, guard=guard or None)


@pytest.fixture(scope="module")
def unguarded(hparams: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CASE_TOKENS", 4)
        patch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("unguarded")
        assert start(sp_settings(hparams), folder) == Outcome(12, None)
    return folder


def sp_settings(hparams: Path, **guard: Any) -> Any:
    return runner.RunSettings.from_mapping(collapsing(hparams, **guard))


def test_a_guard_stops_where_the_energy_goes(hparams: Path, unguarded: Path, tmp_path: Path, capsys, caplog) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", collapsing(hparams, energy=0.6))
    out = tmp_path / "out"
    assert main(["run", str(yaml), "--out", str(out)]) == 1
    reason = "the energy of model.layers.2.mlp.down_proj.weight has changed by +63"
    assert f"10 edits; {reason}" in capsys.readouterr().out
    assert f"after 10 edits {reason}" in caplog.text
    (event,) = read_json(out / "guard.json")["events"]
    assert (event["edits"], event["left"], event["action"]) == (10, 10, "stop") and event["reason"].startswith(reason)
    assert prints(out) == prints(unguarded)[:5]
    assert live(out) != live(unguarded), "it switched the guard off, and put the weights where the run was stopped"
    assert list(scores(out)) == [0, 4, 8]


def test_a_stopped_run_goes_on_without_its_guard_only(hparams: Path, unguarded: Path, tmp_path: Path, capsys) -> None:
    start(sp_settings(hparams, energy=0.6), tmp_path)
    before = files(tmp_path)
    assert main(["run", "--resume", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "--resume: got 'a run that its guard stopped: the energy of" in said
    assert "Continue with --without-guard, or take edits back with `sphere undo`." in said
    assert files(tmp_path) == before
    assert "its guard ended it after 10 edits" in read_run(tmp_path).stopped
    assert main(["run", "--resume", str(tmp_path), "--without-guard"]) == 0
    assert prints(tmp_path) == prints(unguarded)
    assert scores(tmp_path) == scores(unguarded)
    assert [event["action"] for event in read_json(tmp_path / "guard.json")["events"]] == ["stop", "off"]
    done = files(tmp_path)
    assert main(["run", "--resume", str(tmp_path)]) == 0, "the guard stays off"
    assert files(tmp_path) == done


def test_a_run_that_is_refused_keeps_its_guard(hparams: Path, tmp_path: Path) -> None:
    start(sp_settings(hparams, energy=0.6), tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {**manifest, "contexts": ["other"]})
    with pytest.raises(CacheError, match="prefixes"):
        resume(tmp_path, guarded=False)
    assert [event["action"] for event in read_json(tmp_path / "guard.json")["events"]] == ["stop"]


@pytest.mark.parametrize(
    ("guard", "stopped", "back"),
    [({"energy": 0.6, "retention": 0.5}, 10, 8), ({"energy": 0.3}, 2, 0), ({"retention": 0.8}, 8, 4)],
    ids=["energy", "at once", "retention"],
)
def test_a_guard_rolls_back_to_the_last_good_checkpoint(
    guard: dict[str, float], stopped: int, back: int, hparams: Path, unguarded: Path, tmp_path: Path
) -> None:
    run = Run(sp_settings(hparams, **guard, action="rollback"), tmp_path)
    run.begin()
    outcome = run.go()
    assert outcome.edits == back and outcome.stopped
    journal, known = Journal.open(tmp_path / "journal"), Journal.open(unguarded / "journal")
    assert len(journal) == back // 2
    assert journal.fingerprint_of(run.weights) == known.fingerprint(back // 2), "the live weights, bit for bit"
    assert list(scores(tmp_path)) == [edits for edits in (0, 4, 8, 12) if edits <= back]
    (event,) = read_json(tmp_path / "guard.json")["events"]
    assert (event["edits"], event["left"], event["action"]) == (stopped, back, "rollback")
    taken = sorted(path.name for path in (tmp_path / "undone" / "1" / "journal").glob("*.json"))
    assert taken == [f"{number:06d}.json" for number in range(back // 2 + 1, stopped // 2 + 1)]
    with pytest.raises(ConfigError, match="a run that its guard stopped"):
        resume(tmp_path)
    assert resume(tmp_path, guarded=False) == Outcome(12, None)
    assert prints(tmp_path) == prints(unguarded)


def test_a_guard_that_warns_ends_nothing(hparams: Path, unguarded: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, "sphere_plugin"):
        outcome = start(sp_settings(hparams, energy=0.3, retention=0.8, action="warn"), tmp_path)
    assert outcome == Outcome(12, None) and prints(tmp_path) == prints(unguarded)
    events = read_json(tmp_path / "guard.json")["events"]
    assert {event["action"] for event in events} == {"warn"} and events[0]["edits"] == 2
    (kept,) = [event["reason"] for event in events if event["edits"] == 8]
    assert kept == "of the efficacy right after each batch, 0.646, 71.0% is left, less than 80.0%"
    assert len([record for record in caplog.records if "(guard: warn)" in record.getMessage()]) == len(events)
    assert read_run(tmp_path).stopped == ""
    before = files(tmp_path)
    assert resume(tmp_path) == Outcome(12, None)
    assert files(tmp_path) == before, "nothing is noted twice"


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_run_that_dies_before_its_guard_has_acted(
    action: str, hparams: Path, unguarded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is in the journal; the guard looks at it again before another one is written."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Events, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            start(sp_settings(hparams, retention=0.8, action=action), tmp_path)
    assert not (tmp_path / "guard.json").exists()
    outcome = resume(tmp_path)
    assert outcome.stopped and outcome.edits == (8 if action == "stop" else 4)
    assert prints(tmp_path) == prints(unguarded)[: outcome.edits // 2]


def test_after_undoing_the_guard_watches_again(hparams: Path, tmp_path: Path) -> None:
    stopped = start(sp_settings(hparams, energy=0.6), tmp_path)
    sp.undo(tmp_path, 6)
    assert resume(tmp_path) == stopped
    noted = [(event["edits"], event["action"]) for event in read_json(tmp_path / "guard.json")["events"]]
    assert noted == [(10, "stop"), (6, "undo"), (10, "stop")]


def test_after_undoing_a_run_that_is_killed_where_the_guard_had_left_it_goes_on(
    hparams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rolled back to 8 edits, taken back to 4, and killed at 8 again."""
    guard = {"energy": 0.6, "action": "rollback"}
    assert start(sp_settings(hparams, **guard), tmp_path).edits == 8
    sp.undo(tmp_path, 4)
    batch = Run._batch

    def dies(self: Run, number: int) -> None:
        if number > 4:
            raise KeyboardInterrupt
        batch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path)
    assert Journal.open(tmp_path / "journal").edits() == 8 and read_run(tmp_path).stopped == ""
    outcome = resume(tmp_path)
    assert outcome.edits == 8 and outcome.stopped, "the guard watches as before"


def test_a_guard_that_cannot_see_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two equal rows have no finite energy from the start; that is no collapse."""
    from safetensors.torch import load_file, save_file

    hparams = place(tmp_path / "place")
    path = tmp_path / "place" / "pico-llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0] = weights["model.layers.1.mlp.down_proj.weight"][1]
    weights["model.layers.2.mlp.down_proj.weight"][0] = 0.0
    save_file(weights, path, {"format": "pt"})
    told = settings(hparams, "memit", edits=2, checkpoints=[], guard={"energy": 10.0})
    with caplog.at_level(logging.WARNING, "sphere_plugin"):
        assert start(told, tmp_path / "run") == Outcome(2, None)
    assert "the guard cannot see model.layers.1.mlp.down_proj.weight, model.layers.2.mlp.down_proj" in caplog.text


# ---- the guard alone ----


def test_what_counts_as_collapsing() -> None:
    guard = Guard(energy=0.05, retention=0.5)
    assert guard.on_energy({"a": 0.05, "b": -0.05}) is None
    assert guard.on_energy({"a": 0.01, "b": -0.06}) == "the energy of b has changed by -6.00%, more than 5.00%"
    assert guard.on_energy({"a": None}) == "a has no hyperspherical energy any more"
    assert guard.on_energy({"a": math.inf}) is not None
    assert guard.on_retention(0.4, 0.8) is None
    assert guard.on_retention(0.39, 0.8) is not None
    for unknown in ((None, 0.8), (0.1, None), (0.0, 0.0)):
        assert guard.on_retention(*unknown) is None
    assert Guard(retention=0.5).on_energy({"a": None}) is None
    assert Guard(energy=1).on_retention(0.0, 1.0) is None


def test_a_run_is_stopped_only_where_the_guard_left_it(tmp_path: Path) -> None:
    events = Events(tmp_path)
    assert events.all() == [] and events.stopped(0) is None and not events.off
    events.add(20, "early", "warn", 20)
    assert events.stopped(20) is None
    events.add(40, "late", "rollback", 20)
    events.add(40, "late", "rollback", 20)
    assert (len(events.all()), events.stopped(20), events.stopped(40), events.stopped(10)) == (2, "late", None, None)
    events.add(20, "--without-guard", "off", 20)
    assert events.off and events.stopped(20) is None
