"""What processes exchange: shares, orders, errors; with two and three real ones, connected by gloo."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pico_ranks import Ended, Launcher

from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, RanksError, RequestError
from sphere_plugin.models.memory import cut, work_through
from sphere_plugin.parallel.joining import joined
from sphere_plugin.parallel.ranks import ALONE, Ranks, led


def answers(ended: Sequence[Ended]) -> list[dict]:
    assert [one.code for one in ended] == [0] * len(ended), ended
    return [json.loads(one.said) for one in ended]


# ---- what the processes do ----


def tell(**told: object) -> int:
    print(json.dumps(told))
    return 0


def exchanges() -> int:
    with joined() as ranks:
        rank = ranks.rank
        told: list[int] = []
        parts = ranks.each("parts", lambda: (rank, [torch.full((2,), float(rank)), "x" * rank]))
        wide = torch.arange(6.0).reshape(2, 3).T  # not contiguous
        rows = list(ranks.through("rows", [3, 1, 2, 9, 4], int, 5, lambda piece: [10 * one for one in piece]))
        nothing = list(ranks.through("none", [], int, 5, list))
        total = ranks.total("sum", torch.full((3,), 1.0 + rank, dtype=torch.float64))
        same = ranks.same("tensor", wide + rank)
        list(ranks.through("told", [1] * 7, int, 2, list, lambda piece: told.append(len(piece))))
        return tell(
            shares=[list(ranks.share(range(count))) for count in (7, 2, 1, 0)],
            parts=[[number, [t.tolist(), text]] for number, (t, text) in parts],
            by=ranks.by(ranks.size - 1, "by", lambda: f"from {rank}"),
            together=ranks.together("together", lambda: rank),
            rows=sorted(rows),
            nothing=nothing,
            total=total.tolist(),
            same=[same.tolist(), same.is_contiguous()],
            progress=told,
        )


class Counting:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.done: list[str] = []

    @led
    def add(self, number: int, twice: bool = False) -> int:
        self.done.append(f"{number}{'!' if twice else ''}")
        return sum(self.ranks.each("add", lambda: number * self.ranks.rank)) * (2 if twice else 1)

    @led
    def fail(self, where: int, kind: str) -> None:
        """Before an exchange that only the others come to."""
        if self.ranks.rank == where:
            if kind == "request":
                raise RequestError("prompt", torch.float32, "text", "Write one.")
            raise ZeroDivisionError("by nought")
        self.ranks.each("never", lambda: 0)


def crew() -> int:
    errors: list[str] = []
    made: list[Counting] = []

    def begin(ranks: Ranks, name: str) -> Counting:
        made.append(Counting(ranks))
        made[-1].done.append(name)
        return made[-1]

    with joined() as ranks:
        if not ranks.is_main:
            ranks.follow(begin, lambda error: errors.append(str(error)))
            return tell(done=[one.done for one in made], errors=errors)
        sums = []
        for name in ("first", "second"):
            ranks.order("begin", name)
            one = ranks.together("begin", lambda name=name: begin(ranks, name))
            sums.append(one.add(1))
            for where in (0, 1):
                with pytest.raises(RequestError) as caught:
                    one.fail(where, "request")
                errors.append(str(caught.value))
            sums.append(one.add(2, twice=True))
    return tell(done=[one.done for one in made], errors=errors, sums=sums)


def defect() -> int:
    with joined() as ranks:
        if not ranks.is_main:
            errors: list[str] = []
            ranks.follow(lambda ranks: Counting(ranks), lambda error: errors.append(repr(error)))
            return tell(errors=errors)
        ranks.order("begin")
        counting = ranks.together("begin", lambda: Counting(ranks))
        try:
            counting.fail(1, "defect")
        except RanksError as error:
            return tell(error=str(error), culprit=error.culprit)
    return 5


def out_of_step() -> int:
    with joined() as ranks:
        try:
            ranks.each("left" if ranks.is_main else "right", lambda: 1)
        except RanksError as error:
            return tell(error=str(error))
    return 5


def disagree() -> int:
    with joined() as ranks:
        ranks.agree("weights", "same", "those of rank 0", "Look.")
        try:
            ranks.agree("weights", f"w{ranks.rank // 2}", "those of rank 0", "Look.")
        except RanksError as error:
            return tell(error=str(error))
    return 5


def dies(how: str) -> int:
    with joined() as ranks:
        ranks.each("before", lambda: 1)
        if ranks.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(6)
        try:
            ranks.each("after", lambda: 1)
        except RanksError as error:
            tell(error=str(error))
            raise
    return 0


def waits() -> int:
    """Rank 0 works on its own for longer than an exchange may take."""
    with joined() as ranks:
        if not ranks.is_main:
            ranks.follow(lambda ranks: Counting(ranks), lambda error: None)
            return tell(ended=True)
        time.sleep(4)
        ranks.order("begin")
        counting = ranks.together("begin", lambda: Counting(ranks))
        return tell(ended=counting.add(1) == 1)


# ---- what comes of it ----


@pytest.mark.parametrize("size", [2, 3])
def test_shares_and_sums_reach_every_rank(size: int, launch: Launcher, tmp_path: Path) -> None:
    told = answers(launch(size, "test_parallel_ranks:exchanges", cwd=tmp_path))
    for number in range(4):
        joint = [item for one in told for item in one["shares"][number]]
        assert joint == list(range((7, 2, 1, 0)[number])), "in order, each item once"
        assert max(map(len, (one["shares"][number] for one in told))) <= -(-len(joint) // size)
    for rank, one in enumerate(told):
        assert one["parts"] == [[n, [[n, n], "x" * n]] for n in range(size)]
        assert (one["by"], one["together"]) == (f"from {size - 1}", rank)
        assert one["rows"] == [[1, 10], [2, 20], [3, 30], [4, 40], [9, 90]] and one["nothing"] == []
        assert one["same"] == [[[0, 3], [1, 4], [2, 5]], True], "rank 0's, laid out alike on all"
        assert (sum(one["progress"]) == 7) == (rank == 0), "only rank 0 tells"
    assert told[0]["total"] == [size * (size + 1) / 2] * 3


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_as_rank_0_says_and_errors_are_everybodys(size: int, launch: Launcher, tmp_path: Path) -> None:
    told = answers(launch(size, "test_parallel_ranks:crew", cwd=tmp_path))
    each = size * (size - 1) // 2
    assert told[0]["sums"] == [each, 4 * each] * 2
    for one in told:
        assert one["done"] == [["first", "1", "2!"], ["second", "1", "2!"]]
        assert len(one["errors"]) == 4
        assert all("prompt: got" in text and "torch.float32" in text for text in one["errors"])


def test_a_defect_on_one_rank_is_known_to_all(launch: Launcher, tmp_path: Path) -> None:
    first, second = answers(launch(2, "test_parallel_ranks:defect", cwd=tmp_path))
    assert first["culprit"] == "rank 1"
    assert "ZeroDivisionError: by nought" in first["error"] and "rank1.log" in first["error"]
    assert second["errors"] == ["ZeroDivisionError('by nought')"]


def test_ranks_that_are_out_of_step_or_differ_end(launch: Launcher, tmp_path: Path) -> None:
    told = answers(launch(2, "test_parallel_ranks:out_of_step", cwd=tmp_path))
    assert "got \"at 'right'\", expected at 'left'" in told[0]["error"]
    assert "got \"at 'left'\", expected at 'right'" in told[1]["error"]
    told = answers(launch(3, "test_parallel_ranks:disagree", cwd=tmp_path))
    assert {one["error"] for one in told} == {"weights on rank 2: got 'w1', expected those of rank 0, w0. Look."}


def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_sentence(launch: Launcher, tmp_path: Path) -> None:
    for how, code, patience in (("killed", -9, 60), ("hangs", 99, 2)):
        started = time.monotonic()
        ended = launch(3, "test_parallel_ranks:dies", how, cwd=tmp_path, SPHERE_PLUGIN_PATIENCE=patience)
        assert time.monotonic() - started < 30
        assert ended[1].code == code and ended[0].code == ended[2].code == 99
        for one in (ended[0], ended[2]):  # whichever comes first: the silence, or the signal to those that are left
            said = one.said.replace('\\"', '"')
            assert "the other processes: got \"no answer at 'after'" in said or "this process: got 'SIGTERM'" in said
            assert "goes on after the last batch, with any number of processes" in said


def test_orders_are_waited_for_without_end(launch: Launcher, tmp_path: Path) -> None:
    told = answers(launch(2, "test_parallel_ranks:waits", cwd=tmp_path, SPHERE_PLUGIN_PATIENCE=2))
    assert all(one["ended"] for one in told)


def test_one_process_exchanges_nothing() -> None:
    with joined() as ranks:
        assert ranks is ALONE
    tensor = torch.ones(2)
    assert ALONE.same("x", tensor) is ALONE.total("x", tensor) is tensor
    assert ALONE.share([1, 2]) == [1, 2] and ALONE.each("x", lambda: 3) == [3] and ALONE.by(0, "x", lambda: 4) == 4
    rows = [4, 2, 9, 1]
    assert cut(rows, int, 6) == [piece for piece, _ in work_through(rows, int, 6, list)] == [[4], [2], [9], [1]]
    ALONE.order("anything")
    ALONE.end()


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    for kind in (RequestError, CacheError, RanksError, ConfigError):
        error = kind("culprit", 3, "four", "Count again.")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind and str(back) == str(error) and back.remedy == error.remedy


def test_commands_that_do_not_share_are_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["report", "nowhere"]) == 1
    assert "sphere report: got '2 processes', expected one" in capsys.readouterr().err
    monkeypatch.setenv("SPHERE_PLUGIN_PATIENCE", "soon")
    assert main(["run", "--resume", "nowhere"]) == 1
    assert "SPHERE_PLUGIN_PATIENCE: got 'soon', expected seconds above 0" in capsys.readouterr().err


def test_each_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(3, 4, local=1).device(0) == Ranks(3, 4, local=1).device("cuda:0") == 1
    assert Ranks(3, 4, local=5).device("cpu") == "cpu" and ALONE.device(7) == 7
    with pytest.raises(ConfigError, match="device: got '2 GPUs', expected one for process 2 of this machine"):
        Ranks(2, 4, local=2).device(0)
