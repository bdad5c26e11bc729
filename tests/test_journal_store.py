"""The journal of a run: exact undo, crashes, damage, the lock, undo by number of edits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATES
from pico import pico
from safetensors import safe_open
from torch import Tensor, nn

import sphere_plugin as sp
from sphere_plugin import CacheError, ConfigError, ModelError
from sphere_plugin.files import fingerprint, read_json, write_json
from sphere_plugin.geometry import Factors, neurons
from sphere_plugin.journaling import Journal, run_lock
from sphere_plugin.journaling import batch as batches
from sphere_plugin.journaling.batch import orientations, same_bits

ROOT = Path(sp.__file__).parents[1]


def touched(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    layer, rewrite, _ = TEMPLATES[kind]
    names = [f"{layer.format(number)}.{rewrite}.weight" for number in (2, 1)]  # not in alphabetical order
    return {name: model.get_parameter(name) for name in names}


def random_update(weight: Tensor, transposed: bool, seed: int, rank: int = 3) -> Factors:
    d_out, d_in = neurons(weight, transposed).shape
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(rows, rank, generator=generator) for rows in (d_out, d_in))
    return Factors(0.1 * left, right)


def write(weight: Tensor, transposed: bool, update: Factors) -> None:
    """As SPHERE's editor does it."""
    rows = neurons(weight.detach(), transposed)
    rows.copy_((rows.float() + update.dense()).to(weight.dtype))


class Walk:
    """A model that is edited by random updates, its journal, and copies of what its weights were."""

    def __init__(self, folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.weights = touched(pico(kind)[0].to(dtype), kind)
        self.transposed = dict.fromkeys(self.weights, kind == "gpt2")
        self.journal = Journal.create(folder / "journal", self.weights, self.transposed)
        self.states = [self.copy()]

    def copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def step(self, thin: bool = True, facts: int = 10) -> None:
        seed = len(self.states)
        updates = {n: random_update(w, self.transposed[n], seed) for n, w in self.weights.items()}
        for name, weight in self.weights.items():
            write(weight, self.transposed[name], updates[name])
        record = {"edits": facts * seed, "facts": [{"prompt": f"{seed}"}], "seconds": 1.5, "losses": [float("nan")]}
        self.journal.append(record, self.weights, updates if thin else None)
        self.states.append(self.copy())

    def check(self, journal: Journal) -> None:
        assert len(journal) == len(self.states) - 1
        for number in (*range(len(self.states)), *reversed(range(len(self.states)))):
            assert alike(journal.weights_after(number), self.states[number])


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def keys_of(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {key.rpartition("/")[2] for key in file.keys()}  # noqa: SIM118 (a file, no mapping)


# ---- back to any state, bit for bit ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("thin", [True, False], ids=["factors", "whole"])
def test_every_state_comes_back(kind: str, dtype: torch.dtype, thin: bool, tmp_path: Path) -> None:
    walk = Walk(tmp_path, kind, dtype)
    for _ in range(4):
        walk.step(thin)
    assert keys_of(tmp_path / "journal" / "000001.safetensors") == ({"left", "right"} if thin else {"whole"})
    walk.check(walk.journal)
    walk.check(Journal.open(tmp_path / "journal"))
    journal = Journal.open(tmp_path / "journal")
    journal.restore(2, walk.weights)
    assert alike(walk.copy(), walk.states[2])


def test_factors_and_whole_weights_mixed_and_on_after_opening(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    for thin in (True, False, True, True, False, True):
        walk.step(thin)
        walk.journal = Journal.open(tmp_path / "journal")
    walk.check(walk.journal)


def test_a_weight_that_a_batch_left_alone_takes_no_room(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    one = next(iter(walk.weights.values()))
    with torch.no_grad():
        one[0, 0] = -0.0
    walk.journal.append({"edits": 1}, walk.weights)
    walk.states.append(walk.copy())
    with torch.no_grad():
        one[0, 0] = 0.0  # equal, but not the same bits
    walk.journal.append({"edits": 2}, walk.weights)
    walk.states.append(walk.copy())
    walk.journal.append({"edits": 3}, walk.weights)
    walk.states.append(walk.copy())
    files = [tmp_path / "journal" / f"{number:06d}.safetensors" for number in (1, 2, 3)]
    assert [len(safe_open(file, framework="pt").keys()) for file in files] == [1, 1, 0]
    walk.check(Journal.open(tmp_path / "journal"))


def test_what_factors_miss_is_stored_beside_them(tmp_path: Path) -> None:
    """A GPU adds up in another order: some entries come out one bit off."""
    walk = Walk(tmp_path)
    updates = {name: random_update(weight, False, 1) for name, weight in walk.weights.items()}
    with torch.no_grad():
        for name, weight in walk.weights.items():
            write(weight, False, updates[name])
            weight[3, 5:8] = torch.nextafter(weight[3, 5:8], torch.tensor(9.0))
    walk.journal.append({"edits": 1}, walk.weights, updates)
    walk.states.append(walk.copy())
    assert keys_of(tmp_path / "journal" / "000001.safetensors") == {"left", "right", "places", "values"}
    walk.check(Journal.open(tmp_path / "journal"))


def test_factors_that_have_nothing_to_do_with_it_do_no_harm(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    first, second = walk.weights
    with torch.no_grad():
        walk.weights[first].mul_(2.0)
    walk.journal.append({"edits": 1}, walk.weights, {n: random_update(w, False, 7) for n, w in walk.weights.items()})
    walk.states.append(walk.copy())
    walk.check(Journal.open(tmp_path / "journal"))
    with torch.no_grad():
        walk.weights[second].mul_(2.0)
    with pytest.raises(ModelError, match=r"update of .*: got \(64, 32\), expected the shape \(32, 64\)"):
        turned = random_update(walk.weights[second].T, False, 7)
        walk.journal.append({"edits": 2}, walk.weights, {second: turned})
    assert len(walk.journal) == 1


def test_what_takes_more_room_than_the_weight_is_stored_whole(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    updates = {name: random_update(weight, False, 1, rank=40) for name, weight in walk.weights.items()}
    for name, weight in walk.weights.items():
        write(weight, False, updates[name])
    walk.journal.append({"edits": 1}, walk.weights, updates)
    assert keys_of(tmp_path / "journal" / "000001.safetensors") == {"whole"}


def test_orientations_are_read_from_the_model() -> None:
    for kind in TEMPLATES:
        model = pico(kind)[0]
        names = dict(touched(model, kind))
        assert orientations(model, names) == dict.fromkeys(names, kind == "gpt2")
    assert orientations(pico("gptj")[0], {"transformer.h.1.mlp.fc_out.bias": None}) == {
        "transformer.h.1.mlp.fc_out.bias": False
    }


# ---- records ----


def test_a_record_is_told_its_number_and_the_weights_after_it(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.step()
    record = walk.journal.record(1)
    assert record == read_json(tmp_path / "journal" / "000001.json")
    assert record["batch"] == 1 and record["edits"] == 10 and record["losses"] == [None]
    assert record["after"] == fingerprint(walk.weights.items()) == walk.journal.fingerprint(1)
    assert walk.journal.fingerprint(0) == fingerprint(walk.states[0].items())


def test_keys_are_kept(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    name = next(iter(walk.weights))
    walk.journal.append({"edits": 1}, walk.weights, keys={name: torch.ones(64, 3)})
    assert torch.equal(Journal.open(tmp_path / "journal").keys(1)[name], torch.ones(64, 3))
    assert list(walk.journal.keys(1)) == [name]


def test_what_a_journal_refuses(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    Journal.create(tmp_path / "journal", walk.weights, walk.transposed)  # nothing has been done yet
    walk.step()
    with pytest.raises(ConfigError, match="expected a folder without one"):
        Journal.create(tmp_path / "journal", walk.weights, walk.transposed)
    with pytest.raises(ConfigError, match="edits of the record: got None"):
        walk.journal.append({}, walk.weights)
    for number in (-1, 2):
        with pytest.raises(ConfigError, match=f"the number of batches: got {number}, expected a number from 0 to 1"):
            walk.journal.weights_after(number)
    with pytest.raises(CacheError, match="Give the folder of a run"):
        Journal.open(tmp_path)


# ---- crashes ----

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Journal
folder, moments = Path(sys.argv[1]), random.Random(0)
names = ("b", "a")

def append_for_ever():
    generator = torch.Generator().manual_seed(os.getpid())
    if not (folder / "base.safetensors").exists():
        weights = {n: torch.randn(96, 160, generator=generator) for n in names}
        Journal.create(folder, weights, dict.fromkeys(names, False))
    journal = Journal.open(folder)
    weights = journal.weights_after(len(journal))
    while True:
        updates = {n: Factors(torch.randn(96, 2, generator=generator), torch.randn(160, 2, generator=generator))
                   for n in names}
        weights = {n: w + updates[n].dense() for n, w in weights.items()}
        journal.append({"edits": len(journal) + 1, "facts": []}, weights, updates if len(journal) % 2 else {})

for attempt in range(12):
    child = os.fork()
    if not child:
        append_for_ever()
    time.sleep(moments.uniform(0.03, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    journal = Journal.open(folder)
    for number in (*range(len(journal) + 1), *range(len(journal), -1, -1)):
        assert journal.fingerprint_of(journal.weights_after(number)) == journal.fingerprint(number)
    print(len(journal), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_killed_at_any_moment_leaves_a_journal(tmp_path: Path, record_property) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "journal")]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lengths = [int(line) for line in run.stdout.split()]
    assert len(lengths) == 12 and lengths == sorted(lengths) and lengths[-1] > 0
    record_property("kills", len(lengths))


def test_what_a_killed_process_left_is_passed_over_and_written_anew(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.step()
    journal = tmp_path / "journal"
    shutil.copy(journal / "000001.safetensors", journal / "000002.safetensors")
    (journal / ".000002.json.0123abcd.sphere-tmp").write_text('{"half')
    (journal / ".000003.safetensors.0123abcd.sphere-tmp").write_bytes(b"half")
    walk.journal = Journal.open(journal)
    assert len(walk.journal) == 1
    walk.step()
    walk.check(Journal.open(journal))


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(tmp_path)
    walk.step()

    def full(*_: object) -> None:
        raise CacheError("disk", "full", "room", "Free some.")

    with monkeypatch.context() as patch:
        patch.setattr("sphere_plugin.journaling.store.write_json", full)
        with pytest.raises(CacheError, match="Free some"):
            walk.journal.append({"edits": 20}, walk.weights)
    assert len(walk.journal) == len(Journal.open(tmp_path / "journal")) == 1
    walk.step()
    walk.check(Journal.open(tmp_path / "journal"))


# ---- damage ----


def damages() -> list[tuple[str, Callable[[Path], None]]]:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path: Path, place: int) -> None:
        whole = path.read_bytes()
        at = place % len(whole)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])

    places = [(f"bit at {place}", lambda path, place=place: flip(path, place)) for place in (12, 60, -1, -200)]
    return [("missing", Path.unlink), ("cut", cut), *places]


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize(("name", "damage"), damages(), ids=[name for name, _ in damages()])
@pytest.mark.parametrize("thin", [True, False], ids=["factors", "whole"])
def test_a_damaged_batch_is_named_and_never_used(
    name: str, damage: Callable[[Path], None], kind: str, thin: bool, tmp_path: Path
) -> None:
    walk = Walk(tmp_path)
    for _ in range(4):
        walk.step(thin)
    path = tmp_path / "journal" / f"000002.{kind}"
    damage(path)
    for number in (2, 3, 4) if thin else (2,):
        if kind == "json" and number > 2:
            continue  # what batch 2 did is not lost, and the weights after it are known from later records
        with pytest.raises(CacheError, match=r"Put a copy of the file back, or undo batch 2") as caught:
            Journal.open(tmp_path / "journal").weights_after(number)
        assert caught.value.culprit == str(path)
    if kind == "json":
        with pytest.raises(CacheError) as caught:
            Journal.open(tmp_path / "journal").batch_at(30)
        assert caught.value.culprit == str(path)
    for number in (3, 4) if not thin or kind == "json" else ():
        assert alike(Journal.open(tmp_path / "journal").weights_after(number), walk.states[number])
    assert sp.undo(str(tmp_path), 10).batches == 3
    assert alike(Journal.open(tmp_path / "journal").weights_after(1), walk.states[1])


@pytest.mark.parametrize(("name", "damage"), damages(), ids=[name for name, _ in damages()])
def test_a_damaged_base_is_named(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.step()
    damage(tmp_path / "journal" / "base.safetensors")
    with pytest.raises(CacheError, match="the run has to be done again") as caught:
        Journal.open(tmp_path / "journal")
    assert caught.value.culprit == str(tmp_path / "journal" / "base.safetensors")


def test_a_record_that_was_changed_or_renamed_is_not_believed(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.step()
    walk.step()
    folder = tmp_path / "journal"
    record = read_json(folder / "000002.json")
    write_json(folder / "000002.json", {**record, "edits": 15})
    with pytest.raises(CacheError, match="the record that 000002.safetensors was written with"):
        Journal.open(folder).batch_at(15)
    write_json(folder / "000002.json", record)
    for kind in ("json", "safetensors"):
        (folder / f"000002.{kind}").rename(folder / f"000001.{kind}")
    with pytest.raises(CacheError, match="000001.json"):
        Journal.open(folder).record(1)


def test_other_arithmetic_is_told_and_other_threads_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(tmp_path)
    walk.step()
    walk.step()
    sum_then = batches._edited
    seen = []

    def on_two_threads_only(weight: Tensor, update: Factors, transposed: bool) -> Tensor:
        seen.append(torch.get_num_threads())
        return sum_then(weight, update, transposed) + (0.0 if torch.get_num_threads() == 1 else 1e-3)

    monkeypatch.setattr(batches, "_edited", on_two_threads_only)
    torch.set_num_threads(2)
    try:
        assert alike(Journal.open(tmp_path / "journal").weights_after(2), walk.states[2])
        assert set(seen) == {1, 2} and torch.get_num_threads() == 2
        monkeypatch.setattr(batches, "_edited", lambda *args: sum_then(*args) + 1e-3)
        with pytest.raises(CacheError, match=r"the weights after batch 1 of .*as recorded.*No file is damaged"):
            Journal.open(tmp_path / "journal").weights_after(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ---- undo ----


@pytest.mark.parametrize("to", [0, 10, 30, 40])
def test_undo_keeps_what_it_takes_back(to: int, tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    for _ in range(4):
        walk.step()
    for edits in (0, 20, 40):
        write_json(tmp_path / "checkpoints" / f"{edits:06d}.json", {"edits": edits})
    undone = sp.undo(tmp_path, to)
    assert (undone.edits, undone.batches) == (to, 4 - to // 10)
    journal = Journal.open(tmp_path / "journal")
    walk.states = walk.states[: 1 + to // 10]
    walk.check(journal)
    left = [edits for edits in (0, 20, 40) if edits <= to]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"{e:06d}.json" for e in left]
    if to == 40:
        assert undone.kept is None and not (tmp_path / "undone").exists()
        return
    assert undone.kept == tmp_path / "undone" / "1"
    kept = {path.name for path in (undone.kept / "journal").iterdir()}
    assert kept == {f"{n:06d}.{kind}" for n in range(1 + to // 10, 5) for kind in ("json", "safetensors")}
    walk.journal = journal
    journal.restore(len(journal), walk.weights)
    walk.step()
    walk.check(Journal.open(tmp_path / "journal"))
    assert sp.undo(tmp_path, 0).kept == tmp_path / "undone" / "2"


def test_undo_between_batches_only(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.step()
    walk.step()
    for to, told in ((5, "The nearest are 0 and 10"), (15, "The nearest are 10 and 20")):
        with pytest.raises(ConfigError, match=told):
            sp.undo(tmp_path, to)
    for to in (-1, 21):
        with pytest.raises(ConfigError, match="expected a number from 0 to 20"):
            sp.undo(tmp_path, to)
    assert len(Journal.open(tmp_path / "journal")) == 2
    with pytest.raises(CacheError, match="expected the folder of a run"):
        sp.undo(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_an_undo_that_is_killed_leaves_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for moves in range(8):
        folder = tmp_path / str(moves)
        walk = Walk(folder)
        for _ in range(4):
            walk.step()
        rename, done = Path.rename, []

        def dies(self: Path, target: Path, rename=rename, done=done, moves=moves) -> Path:  # noqa: ANN001
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(self)
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dies)
            if moves < 6:
                with pytest.raises(KeyboardInterrupt):
                    sp.undo(folder, 10)
            else:
                sp.undo(folder, 10)
        walk.states = walk.states[: len(Journal.open(folder / "journal")) + 1]
        assert len(walk.states) == 5 - (min(moves, 6) + 1) // 2
        walk.check(Journal.open(folder / "journal"))


# ---- the lock ----

HOLDING = """
import sys
from pathlib import Path
from sphere_plugin.journaling import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    walk = Walk(tmp_path)
    walk.step()
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CacheError, match=f"held by process {other.pid}") as caught, run_lock(tmp_path):
            pass
        assert caught.value.culprit == str(tmp_path / "lock")
        with pytest.raises(CacheError, match=f"held by process {other.pid}"):
            sp.undo(tmp_path, 0)
        other.kill()
        other.wait()
    with run_lock(tmp_path):  # the dead hold nothing
        assert (tmp_path / "lock").read_text() == str(os.getpid())
        with pytest.raises(CacheError, match=f"held by process {os.getpid()}"), run_lock(tmp_path):
            pass
    with pytest.raises(RuntimeError, match="mine"), run_lock(tmp_path):
        raise RuntimeError("mine")
    with run_lock(tmp_path):
        pass


def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="Make the place writable"), run_lock(tmp_path / "file" / "run"):
        pass


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sphere_plugin.cli import main

    walk = Walk(tmp_path)
    walk.step()
    walk.step()
    assert main(["undo", str(tmp_path), "--to", "10"]) == 0
    told = f"{tmp_path}: 10 edits, 1 batches taken back; what was taken back is in {tmp_path / 'undone' / '1'}\n"
    assert capsys.readouterr().out == told
    assert main(["undo", str(tmp_path), "--to", "5"]) == 1
    assert "The nearest are 0 and 10" in capsys.readouterr().err
    assert json.loads((tmp_path / "journal" / "000001.json").read_text())["edits"] == 10
