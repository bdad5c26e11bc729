"""`sphere run` in two and three processes: the same as in one."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pico_ranks import ROOT, Ended, Launcher
from pico_runs import files, mapping, place, prints, scores, settings, write_yaml

from sphere_plugin.cli import main
from sphere_plugin.files import read_json
from sphere_plugin.journaling import Journal
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.runner import resume, start

# Batches of 4, 4 and 2 facts.
SHORT = {"edits": 10, "batch_size": 4, "checkpoints": [4, 8], "fluency": 12}


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


def alone(hparams: Path, entry: str, folder: Path, **changes: Any) -> Path:
    start(settings(hparams, entry, **{**SHORT, **changes}), folder)
    return folder


def yaml(hparams: Path, entry: str, folder: Path, **changes: Any) -> Path:
    return write_yaml(folder / "run.yaml", mapping(hparams, entry, **{**SHORT, **changes}))


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


def check_same(one: Path, other: Path, exactly: bool = False) -> None:
    """Two runs wrote the same weights up to rounding, and have the same scores."""
    ours, theirs = Journal.open(one / "journal"), Journal.open(other / "journal")
    assert len(ours) == len(theirs) and ours.fingerprint(0) == theirs.fingerprint(0)
    for number in range(1, len(ours) + 1):
        before, after, known = ours.weights_after(number - 1), ours.weights_after(number), theirs.weights_after(number)
        for name, weight in after.items():
            moved = float((weight - before[name]).norm())
            assert float((weight - known[name]).norm()) <= (0 if exactly else 1e-4 * moved), (number, name)
        mine, their = ours.record(number), theirs.record(number)
        assert mine["facts"] == their["facts"] and mine["efficacy"] == their["efficacy"]
        assert mine["losses"] == pytest.approx(their["losses"], rel=1e-4) and mine["steps"] == their["steps"]
    left, right = scores(one), scores(other)
    assert left.keys() == right.keys()
    for edits, point in left.items():
        known = right[edits]
        nll = point["scores"].pop("nll"), known["scores"].pop("nll")
        assert math.isclose(*nll, rel_tol=0 if exactly or not edits else 1e-5)
        assert [point[key] for key in ("scored", "scores", "cases")] == [
            known[key] for key in ("scored", "scores", "cases")
        ]
        for name, energy in point["energy"].items():
            assert energy == pytest.approx(known["energy"][name], rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("entry", ["memit+sphere", "alphaedit+sphere"])
def test_a_run_that_processes_share_is_that_of_one(
    entry: str, size: int, hparams: Path, tmp_path: Path, launch: Launcher
) -> None:
    one, out = alone(hparams, entry, tmp_path / "one"), tmp_path / "out"
    # A cache of its own: key statistics are counted by all of them, too.
    ended = launch.sphere(
        size, "run", yaml(hparams, entry, tmp_path), "--out", out, cwd=tmp_path, SPHERE_PLUGIN_CACHE=tmp_path / "cache"
    )
    assert codes(ended) == [0] * size, ended
    assert "10 edits" in ended[0].said and not any(one.said.strip() for one in ended[1:]), "only rank 0 speaks"
    check_same(one, out)
    assert (read_json(out / "manifest.json")["ranks"], read_json(one / "manifest.json")["ranks"]) == (size, 1)
    assert f"rank {size - 1} of {size}" in (out / "logs" / f"rank{size - 1}.log").read_text()
    assert "counting key statistics" in (out / "run.log").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()} | {"run.log", "logs"}
    before = files(out)
    ended = launch.sphere(2, "run", "--resume", out, cwd=tmp_path)
    assert codes(ended) == [0, 0], ended
    assert files(out) == before, "a finished run is left as it is"


def test_methods_of_easyedit_edit_on_rank_0_and_are_scored_by_all(
    hparams: Path, tmp_path: Path, launch: Launcher
) -> None:
    one, out, told = tmp_path / "one", tmp_path / "out", yaml(hparams, "ft+sphere", tmp_path)
    # Both in processes that have done nothing else: Adam makes much of last digits.
    assert codes(launch.sphere(1, "run", told, "--out", one, cwd=tmp_path)) == [0]
    ended = launch.sphere(2, "run", told, "--out", out, cwd=tmp_path)
    assert codes(ended) == [0, 0], ended
    check_same(one, out, exactly=True)
    assert prints(one) == prints(out)


def test_it_goes_on_after_a_death_with_any_number_of_processes(
    hparams: Path, tmp_path: Path, launch: Launcher
) -> None:
    entry, out = "alphaedit+sphere", tmp_path / "out"
    one = alone(hparams, entry, tmp_path / "one", batch_size=2)
    told = yaml(hparams, entry, tmp_path, batch_size=2)
    ended = launch(2, "test_parallel_run:dies", 1, 2, ["run", str(told), "--out", str(out)], cwd=tmp_path)
    assert codes(ended) == [1, -9]
    # Whichever it hears first: that rank 1 does not answer, or torchrun.
    assert (
        "sphere: the other processes: got" in ended[0].said or "sphere: this process: got 'SIGTERM'" in ended[0].said
    )
    assert "has died" in ended[0].said and "`sphere run --resume DIR` goes on" in ended[0].said
    assert "ended by RanksError" in (out / "run.log").read_text()
    assert len(Journal.open(out / "journal")) == 1, "of the second batch nothing is left"

    ended = launch(3, "test_parallel_run:dies", 0, 2, ["run", "--resume", str(out)], cwd=tmp_path)
    assert ended[0].code == -9 and all(code in (1, -15) for code in codes(ended)[1:])
    assert "the run began with ranks 2 and goes on with 3" in (out / "run.log").read_text()
    first = prints(out)
    assert len(first) == 2
    resume(out)  # in one process
    assert prints(out)[:2] == first
    check_same(one, out)


def dies(rank: int, batch: int, argv: list[str]) -> int:
    """The command, in which one rank is killed while the others work on a batch."""
    from sphere_plugin.editing import editor

    calls: list[int] = []

    def deadly(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == batch and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), 9)
        return search(*args, **more)

    search, editor.aim = editor.aim, deadly
    return main(argv)


def test_going_on_with_as_many_processes_is_as_if_nothing_had_happened(
    hparams: Path, tmp_path: Path, launch: Launcher
) -> None:
    told, cut = yaml(hparams, "alphaedit+sphere", tmp_path, batch_size=2), tmp_path / "cut"
    assert codes(launch.sphere(2, "run", told, "--out", tmp_path / "whole", cwd=tmp_path)) == [0, 0]
    launch(2, "test_parallel_run:dies", 1, 3, ["run", str(told), "--out", str(cut)], cwd=tmp_path)
    assert len(prints(cut)) == 2
    assert codes(launch.sphere(2, "run", "--resume", cut, cwd=tmp_path)) == [0, 0]
    assert prints(cut) == prints(tmp_path / "whole")
    assert scores(cut) == scores(tmp_path / "whole")


def test_a_guard_takes_all_of_them_back(hparams: Path, tmp_path: Path, launch: Launcher) -> None:
    guard = {"energy": 1e-9, "action": "rollback"}
    told = yaml(hparams, "memit", tmp_path, guard=guard)
    ended = launch.sphere(2, "run", told, "--out", tmp_path / "out", cwd=tmp_path)
    assert codes(ended) == [1, 0] and re.search("0 edits: .*; the energy of", ended[0].said)
    assert prints(tmp_path / "out") == []


def test_a_comparison_runs_its_entries_one_after_the_other(hparams: Path, tmp_path: Path, launch: Launcher) -> None:
    told = yaml(hparams, "memit,memit+sphere,rect", tmp_path, fluency=0, share_targets=True)
    # A setting that the second entry trips over.
    argv = ("run", told, "--set", "memit+sphere.mom2_dataset=/nowhere.txt", "--out", tmp_path / "out")
    ended = launch.sphere(2, *argv, "--jobs", 2, cwd=tmp_path)
    assert codes(ended) == [1, 0] and "--jobs: got 2, expected 1: 2 processes share each entry" in ended[0].said
    ended = launch.sphere(2, *argv, cwd=tmp_path)
    assert codes(ended) == [1, 0], ended
    rows = [line.split() for line in ended[0].said.splitlines() if " edits" in line]
    assert [row[0] for row in rows] == ["MEMIT", "MEMIT", "RECT"]
    assert "mom2_dataset: got" in ended[0].said
    assert [len(prints(tmp_path / "out" / name)) for name in ("memit", "rect")] == [3, 3]
    assert (tmp_path / "out" / "targets.safetensors").exists()
    start(settings(hparams, "rect", **{**SHORT, "fluency": 0, "share_targets": True}), tmp_path / "one" / "rect")
    check_same(tmp_path / "one" / "rect", tmp_path / "out" / "rect")


def test_what_is_wrong_is_said_once(hparams: Path, tmp_path: Path, launch: Launcher) -> None:
    for more, expected in (
        (("--out", tmp_path / "run", "--entry", "nothing"), "entry: got 'nothing', expected one of memit"),
        (("--plan",), "--plan: got '2 processes', expected one"),
    ):
        ended = launch.sphere(2, "run", yaml(hparams, "memit", tmp_path), *more, cwd=tmp_path)
        assert codes(ended) == [1, 0] and expected in ended[0].said and not ended[1].said.strip(), ended
    spread = yaml(hparams, "memit", tmp_path, settings={"all": {"model_parallel": True}})
    ended = launch.sphere(2, "run", spread, "--out", tmp_path / "spread", cwd=tmp_path)
    assert codes(ended) == [1, 0] and "model_parallel: got True, expected false in a run that 2" in ended[0].said


def test_torchrun_itself(hparams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torchrun's processes know nothing of shorter texts
    one, out = alone(hparams, "memit", tmp_path / "one", fluency=0), tmp_path / "out"
    told = yaml(hparams, "memit", tmp_path, fluency=0)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "sphere_plugin", "run", str(told), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 edits") == 1
    assert read_json(out / "manifest.json")["ranks"] == 2
    check_same(one, out)
