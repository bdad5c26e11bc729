"""Comparisons: every entry in its own process, an entry that fails, targets that are shared, and going on."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import (
    COLLAPSING,
    ROOT,
    Server,
    facts,
    files,
    mapping,
    place,
    prints,
    scores,
    settings,
    write_yaml,
)

import sphere_plugin as sp
from sphere_plugin.cli import main
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation import Quality
from sphere_plugin.files import read_json, read_tensors, write_json
from sphere_plugin.report.read import read_runs
from sphere_plugin.sequence import compare as comparing
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.compare import Ended, compare
from sphere_plugin.sequence.runner import resume, start
from sphere_plugin.sequence.settings import RunSettings

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("compare"))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


@forks
def test_an_entry_that_fails_leaves_the_others_alone(hparams: Path, tmp_path: Path, sphere: Server) -> None:
    told = mapping(hparams, "memit", settings={"rect": {"mom2_dataset": "nowhere/corpus.txt"}})
    told["entries"] = ["memit", "rect", "memit+sphere"]
    yaml, out = write_yaml(tmp_path / "run.yaml", told), tmp_path / "out"
    code, said = sphere("run", yaml, "--compare", "memit,rect,memit+sphere", "--jobs", 2, "--out", out, cwd=tmp_path)
    assert code == 1 and "Traceback" not in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert [line for line in lines if line.startswith("MEMIT 12 edits: efficacy ")]
    assert [line for line in lines if line.startswith("MEMIT + SPHERE 12 edits: efficacy ")]
    (failed,) = [line for line in lines if line.startswith("RECT 0 edits; ")]
    assert "nowhere/corpus.txt" in failed
    assert "ended by" in (out / "rect" / "run.log").read_text() and not (out / "rect" / "manifest.json").exists()
    assert [run.entry for run in read_runs([out])] == ["memit", "memit+sphere"]
    assert prints(out / "memit") != prints(out / "memit+sphere")
    assert read_json(out / "comparison.json")["entries"] == ["memit", "rect", "memit+sphere"]

    before = files(out)
    start(settings(hparams, "memit"), tmp_path / "alone")
    assert prints(out / "memit") == prints(tmp_path / "alone"), "the company makes no difference"
    sp.undo(out / "memit", 4)
    code, said = sphere("run", "--resume", out, cwd=tmp_path)
    assert code == 1 and "corpus.txt" in said
    after = files(out)
    again = {name for name in after if name.startswith("memit/") and "/undone/" not in name}
    assert all(after[name] == before[name] for name in before if name not in again)
    assert prints(out / "memit") == prints(tmp_path / "alone") and scores(out / "memit") == scores(tmp_path / "alone")
    assert sphere("run", yaml, "--out", out, cwd=tmp_path)[0] == 1, "a comparison is not begun twice"


def test_the_unedited_model_is_scored_once(hparams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, score = [], Quality.score

    def counted(self: Quality, edits: int, *args: object) -> Any:
        scored.append(edits)
        return score(self, edits, *args)

    monkeypatch.setattr(Quality, "score", counted)
    told = settings(hparams, "memit,memit+sphere,rect", checkpoints=[], edits=4, sample=2)
    write_json(tmp_path / "out" / "comparison.json", told.plain())
    start(told.for_entry("memit"), tmp_path / "out" / "memit")
    start(told.for_entry("memit+sphere"), tmp_path / "out" / "memit+sphere")
    assert len(scored) == 3  # the unedited model, and both edited ones
    first, second = (read_json(tmp_path / "out" / entry / "checkpoints" / "000000.json") for entry in told.entries[:2])
    assert second.pop("from") == "memit"
    assert first == second
    asked_else = settings(hparams, "rect", checkpoints=[], edits=4, sample=3)
    start(asked_else, tmp_path / "out" / "rect")
    start(told.for_entry("rect"), tmp_path / "alone" / "rect")
    assert len(scored) == 7
    assert scores(tmp_path / "alone" / "rect")[0] == scores(tmp_path / "out" / "memit")[0], "it makes no difference"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("manifest.json", "a folder without a run. Continue it with --resume"),
        ("comparison.json", "a folder without a run. Continue it with --resume"),
        ("sweep.json", "a folder without a sweep. Continue it with --resume"),
        ("two/memit/manifest.json", "a folder with no run below it. Choose another one: "),
    ],
)
def test_a_run_does_not_hide_others(file: str, said: str, hparams: Path, tmp_path: Path, capsys) -> None:
    yaml, out = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit")), tmp_path / "out"
    write_json(out / file, {})
    for more in ((), ("--compare", "memit,rect")):
        assert main(["run", str(yaml), "--out", str(out), *more]) == 1
        assert f"--out: got '{out}', expected {said}" in capsys.readouterr().err
    assert list(files(out)) == [file]


def test_a_sweep_is_no_run_to_go_on_with(tmp_path: Path, capsys) -> None:
    write_json(tmp_path / "sweep.json", {})
    assert main(["run", "--resume", str(tmp_path)]) == 1
    assert f"Continue it with `sphere sweep --resume {tmp_path}`." in capsys.readouterr().err


def test_without_guard_is_for_entries_that_have_not_begun_too(tmp_path: Path) -> None:
    hparams, data = place(tmp_path / "place"), facts(tmp_path / "facts.json")
    told = settings(hparams, "memit", data=str(data), order=None, edits=4, checkpoints=[], guard={"energy": 0.3})
    told = dataclasses.replace(told, settings={"memit": COLLAPSING})
    assert comparing._work(told, tmp_path / "watched", True).stopped
    assert comparing._work(told, tmp_path / "free", False) == Ended("memit", 4)
    assert comparing._work(told, tmp_path / "free", True) == Ended("memit", 4), "for good"


@forks
def test_targets_are_shared_and_that_is_told(hparams: Path, tmp_path: Path, sphere: Server) -> None:
    yaml, out = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit")), tmp_path / "out"
    command = ("run", yaml, "--compare", "memit,memit+sphere", "--share-targets", "--jobs", 2, "--out", out)
    code, said = sphere(*command, cwd=tmp_path)
    assert code == 0, said
    found = out / "targets.safetensors"
    assert [read_json(out / entry / "manifest.json")["share_targets"] for entry in ("memit", "memit+sphere")] == [
        True,
        True,
    ]
    assert all(run.share_targets for run in read_runs([out]))
    tensors, _ = read_tensors(found)
    assert [len(tensors[name]) for name in ("values", "losses", "steps")] == [12] * 3
    for entry in ("memit", "memit+sphere"):
        records = [read_json(path) for path in sorted((out / entry / "journal").glob("0*.json"))]
        assert [loss for record in records for loss in record["losses"]] == tensors["losses"].tolist()
    start(settings(hparams, "memit"), tmp_path / "alone")
    assert prints(tmp_path / "alone")[0] == prints(out / "memit")[0], "nothing is edited yet"
    assert prints(tmp_path / "alone")[1:] != prints(out / "memit")[1:]

    found_then, before = found.stat().st_mtime_ns, prints(out / "memit+sphere")
    sp.undo(out / "memit+sphere", 4)
    resume(out / "memit+sphere")
    assert prints(out / "memit+sphere") == before and found.stat().st_mtime_ns == found_then
    told = settings(hparams, "alphaedit", share_targets=True, sample=1)
    start(told.for_entry("alphaedit"), out / "alphaedit")
    assert found.stat().st_mtime_ns == found_then, "a later entry takes them as well"
    found.unlink()
    sp.undo(out / "memit", 4)
    before = prints(out / "memit+sphere")
    resume(out / "memit")
    assert found.exists() and read_tensors(found)[0]["values"].equal(tensors["values"])


@pytest.mark.parametrize("hosted", ["ft", "rome+sphere"])
def test_targets_of_host_methods_cannot_be_shared(hosted: str, hparams: Path, tmp_path: Path, capsys) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit"))
    command = ["run", str(yaml), "--compare", f"memit,{hosted}", "--share-targets", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert f"share_targets: got '{hosted}', expected entries of this package's own editor. Leave this entry" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("v_lr", 0.1), ("seed", 7), ("context_template_length_params", [[3, 2]]), ("bf16", True), ("fp16", True)],
)
def test_shared_targets_are_searched_for_alike(key: str, value: object, hparams: Path, tmp_path: Path) -> None:
    """With the same search, behind the same prefixes, on the same model."""
    told = settings(hparams, "memit,rect", share_targets=True, settings={"rect": {key: value}})
    with pytest.raises(ConfigError, match=rf"{key} of rect: got .*, as all entries\. Give it to all"):
        compare(told, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_of_jobs_is_checked(hparams: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--jobs: got 0"):
        compare(settings(hparams, "memit,rect"), tmp_path / "out", jobs=0)


@forks
def test_a_guard_stops_its_own_entry(tmp_path: Path, sphere: Server) -> None:
    hparams, data = place(tmp_path / "place"), facts(tmp_path / "facts.json")
    told = mapping(hparams, "memit", data=str(data), order=None, edits=6, checkpoints=[], guard={"energy": 0.3})
    told["entries"], told["settings"] = ["memit", "rect"], {"memit": COLLAPSING}
    yaml, out = write_yaml(tmp_path / "run.yaml", told), tmp_path / "out"
    for arguments in ((yaml, "--out", out, "--jobs", 2), ("--resume", out)):
        code, said = sphere("run", *arguments, cwd=tmp_path)
        lines = [" ".join(line.split()) for line in said.splitlines()]
        assert code == 1 and [line for line in lines if line.startswith("RECT 6 edits: efficacy ")], said
        (stopped,) = [line for line in lines if line.startswith("MEMIT 2 edits; the energy of ")]
        assert "more than 30.00%" in stopped
    code, said = sphere("run", "--resume", out, "--without-guard", cwd=tmp_path)
    assert code == 0 and "MEMIT                             6 edits: efficacy " in said, said


def test_a_damaged_record_of_a_guard_ends_its_entry_only(hparams: Path, tmp_path: Path) -> None:
    start(settings(hparams, "memit"), tmp_path / "memit")
    (tmp_path / "memit" / "guard.json").write_text("{")
    ended = comparing._work(settings(hparams, "memit"), tmp_path / "memit", True)
    assert "guard.json" in (ended.failed or "") and ended.stopped is None


def _kills_itself(settings: RunSettings, folder: Path, guarded: bool) -> Ended:
    if settings.entries[0] == "memit":
        os.kill(os.getpid(), signal.SIGKILL)
    return Ended(settings.entries[0], 12)


@forks
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_process_that_is_killed_ends_its_own_entry(
    jobs: int, hparams: Path, tmp_path: Path, monkeypatch, record_property
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(comparing, "_work", _kills_itself)
    seen: list[int] = []
    ended = compare(settings(hparams, "memit,rect,prune"), tmp_path, jobs, seen.append)
    assert [(one.entry, one.edits) for one in ended] == [("memit", 0), ("rect", 12), ("prune", 12)]
    assert ended[0].failed == "its process ended with code -9 (killed, for want of memory most likely)"
    assert ended[1].failed is ended[1].stopped is None and seen
    record_property("kills", 1)


def _says_its_threads(settings: RunSettings, folder: Path, guarded: bool) -> Ended:
    (folder.parent / f"{settings.entries[0]}.threads").write_text(os.environ["OMP_NUM_THREADS"])
    return Ended(settings.entries[0], 12)


@forks
def test_runs_go_on_with_the_threads_they_began_with(hparams: Path, tmp_path: Path, monkeypatch) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(comparing, "_work", _says_its_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    told = settings(hparams, "memit,rect,prune,alphaedit", edits=2, batch_size=2, checkpoints=[])

    def threads(jobs: int) -> dict[str, int]:
        compare(told, tmp_path, jobs)
        return {entry: int((tmp_path / f"{entry}.threads").read_text()) for entry in told.entries}

    assert threads(2) == dict.fromkeys(told.entries, 3)
    for entry, began in (("rect", 2), ("prune", 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda began=began: began)
        start(told.for_entry(entry), tmp_path / entry)
    (tmp_path / "memit").mkdir()
    (tmp_path / "memit" / "manifest.json").write_text("{")  # whoever goes on with it says so, the others go on
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert threads(1) == {"memit": 2, "rect": 2, "prune": 4, "alphaedit": 2}


def _says_who_it_is(settings: RunSettings, folder: Path, guarded: bool) -> Ended:
    (folder.parent / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    return Ended(settings.entries[0], 12)


@forks
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(how: int, hparams: Path, tmp_path: Path, monkeypatch) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(comparing, "_work", _says_who_it_is)
    above = fork.Process(target=compare, args=(settings(hparams, "memit"), tmp_path, 1))
    above.start()
    told = tmp_path / "pid"
    assert _comes(lambda: told.exists() and told.read_text() != "")
    os.kill(int(above.pid or 0), how)
    above.join()
    assert _comes(lambda: _is_gone(int(told.read_text())))


def _comes(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


def _is_gone(pid: int) -> bool:
    """Whether it has ended; that nobody has asked how does not matter."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_what_is_sent_to_a_process_can_be_sent(hparams: Path) -> None:
    told = settings(hparams, "memit", guard={"energy": 0.1}, settings={"all": {"v_lr": 1.0}})
    assert pickle.loads(pickle.dumps((comparing._work, told))) == (comparing._work, told)  # noqa: S301


@pytest.mark.slow
def test_processes_that_start_from_nothing(hparams: Path, tmp_path: Path) -> None:
    ended = compare(settings(hparams, "memit,alphaedit+sphere", edits=4, checkpoints=[]), tmp_path, jobs=2)
    assert ended == [Ended("memit", 4), Ended("alphaedit+sphere", 4)]
    assert "wrote 2 facts" in (tmp_path / "memit" / "run.log").read_text()


def test_the_docs_name_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    docs = (ROOT / "docs" / "run.md").read_text()
    flags = {word.strip("[],:") for word in capsys.readouterr().out.split() if word.strip("[").startswith("--")}
    assert [flag for flag in sorted(flags - {"--help"}) if flag not in docs] == []
