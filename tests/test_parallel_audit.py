"""`sphere audit` in several processes: the same files as in one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pico_ranks import Launcher
from pico_runs import place, settings
from test_sequence_audit import Embed, content

from sphere_plugin.cli import main
from sphere_plugin.sequence.runner import start

ARGV = ("audit", "--facts", "5", "--samples", "2", "--tokens", "3", "--temperature", "1.0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two entries on six facts."""
    folder = tmp_path_factory.mktemp("audit")
    whole = settings(place(folder), "memit,memit+sphere", edits=6, checkpoints=[6], order=1)
    for entry in whole.entries:
        start(whole.for_entry(entry), folder / "runs" / entry)
    return folder / "runs"


def audit(argv: list[str]) -> int:
    """The command, with vectors of sentences that take no time."""
    from sphere_plugin.sequence import audit_command, panel

    audit_command.embedder = panel.embedder = lambda name: Embed()
    return main(argv)


@pytest.mark.parametrize("size", [2, 3])
def test_an_audit_that_processes_share_is_that_of_one(
    size: int, runs: Path, tmp_path: Path, launch: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = shutil.copytree(runs, tmp_path / "one"), shutil.copytree(runs, tmp_path / "out")
    monkeypatch.setattr("sphere_plugin.sequence.audit_command.embedder", lambda name: Embed())
    assert main([*ARGV, str(one)]) == 0
    ended = launch(size, "test_parallel_audit:audit", [*ARGV, str(out)], cwd=tmp_path)
    assert [process.code for process in ended] == [0] * size, ended
    assert "SPHERE on MEMIT" in ended[0].said and not any(other.said.strip() for other in ended[1:])
    for entry in ("memit", "memit+sphere"):
        assert content(one / entry).keys() == {"000000.json", "000006.json"}
        assert content(one / entry) == content(out / entry), "to the byte"


def test_what_is_wrong_is_said_once(runs: Path, tmp_path: Path, launch: Launcher) -> None:
    ended = launch(2, "test_parallel_audit:audit", [*ARGV, str(runs), "--at", "3"], cwd=tmp_path)
    assert [one.code for one in ended] == [1, 0]
    assert "a number of edits between two batches" in ended[0].said and not ended[1].said.strip()
