"""A journal of weights with master copies: both come back bit for bit, and what is damaged is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pico import pico
from test_journal_store import alike, keys_of, random_update, touched
from torch import Tensor

from sphere_plugin import CacheError
from sphere_plugin.files import json_digest, read_json, read_tensors, write_tensors
from sphere_plugin.geometry import Factors, neurons, stored
from sphere_plugin.journaling import Journal

DTYPES = (torch.bfloat16, torch.float16)


class Walk:
    """16-bit weights whose master copies are edited by random updates; the second weight has none if ``half``."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype, half: bool = False) -> None:
        self.weights = touched(pico(kind)[0].to(dtype), kind)
        self.transposed = dict.fromkeys(self.weights, kind == "gpt2")
        chosen = list(self.weights)[: 1 if half else None]
        self.masters = {name: self.weights[name].detach().float() for name in chosen}
        self.journal = Journal.create(folder / "journal", self.weights, self.transposed, self.masters)
        self.states = [self.copy()]

    def copy(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        live = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return live, {name: one.clone() for name, one in self.masters.items()}

    def step(self, thin: bool = True, size: float = 0.01) -> None:
        seed = len(self.states)
        updates = {n: random_update(w, self.transposed[n], seed) for n, w in self.weights.items()}
        updates = {name: Factors(size * one.left, one.right) for name, one in updates.items()}
        with torch.no_grad():
            for name, weight in self.weights.items():
                start = self.masters.get(name, weight.detach().float())
                total = neurons(start, self.transposed[name]) + updates[name].dense()
                weight.copy_(stored(total, self.transposed[name]))
                if name in self.masters:
                    self.masters[name] = stored(total, self.transposed[name]).contiguous()
        self.journal.append({"edits": seed}, self.weights, updates if thin else None, masters=self.masters)
        self.states.append(self.copy())

    def check(self, journal: Journal) -> None:
        assert len(journal) == len(self.states) - 1
        for number in (*range(len(self.states)), *reversed(range(len(self.states)))):
            live, masters = self.states[number]
            assert alike(journal.weights_after(number), live)
            assert alike(journal.masters_after(number), masters)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["all", "one"])
def test_weights_and_master_copies_come_back(half: bool, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    walk = Walk(tmp_path, kind, dtype, half)
    for thin in (True, True, False, True):
        walk.step(thin)
    assert keys_of(tmp_path / "journal" / "000002.safetensors") == {"left", "right"}
    assert keys_of(tmp_path / "journal" / "000003.safetensors") == {"whole"}
    whole, _ = read_tensors(tmp_path / "journal" / "000003.safetensors")
    for name in walk.weights:
        assert whole[f"{name}/whole"].dtype == (torch.float32 if name in walk.masters else dtype)
    walk.check(walk.journal)
    walk.check(Journal.open(tmp_path / "journal"))
    journal = Journal.open(tmp_path / "journal")
    journal.restore(2, walk.weights)
    assert alike(walk.copy()[0], walk.states[2][0])


def test_what_is_taken_back_and_written_anew(tmp_path: Path) -> None:
    walk = Walk(tmp_path, "llama", torch.bfloat16)
    for _ in range(4):
        walk.step()
    walk.journal.truncate(2)
    walk.journal.restore(2, walk.weights)
    walk.masters, walk.states = walk.journal.masters_after(2), walk.states[:3]
    for _ in range(2):
        walk.step(size=0.02)
    walk.check(Journal.open(tmp_path / "journal"))


@pytest.mark.parametrize("told", ["none", "of another weight"])
def test_a_weight_that_somebody_else_wrote_is_its_own_master(told: str, tmp_path: Path) -> None:
    walk = Walk(tmp_path, "llama", torch.bfloat16)
    walk.step()
    with torch.no_grad():
        for weight in walk.weights.values():
            weight.mul_(1.25)
    masters = None if told == "none" else walk.masters
    walk.journal.append({"edits": 2, "outside": True}, walk.weights, masters=masters)
    walk.masters = {name: weight.detach().float() for name, weight in walk.weights.items()}
    walk.states.append(walk.copy())
    walk.step()
    walk.check(Journal.open(tmp_path / "journal"))


def test_the_files_say_which_weights_have_one_and_old_code_does_not_read_them(tmp_path: Path) -> None:
    walk = Walk(tmp_path, "llama", torch.bfloat16, half=True)
    walk.step()
    base, metadata = read_tensors(tmp_path / "journal" / "base.safetensors")
    assert metadata["format"] == "2"
    assert json.loads(metadata["masters"]) == dict.fromkeys(walk.masters, "bfloat16")
    assert all(one.dtype == torch.bfloat16 for one in base.values())
    assert len(read_json(tmp_path / "journal" / "000001.json")["masters"]) == 32
    plain = Journal.create(tmp_path / "plain", walk.weights, walk.transposed)
    assert plain.masters_after(0) == {}
    assert read_tensors(tmp_path / "plain" / "base.safetensors")[1]["format"] == "1"


def test_master_copies_that_come_out_otherwise_are_told(tmp_path: Path) -> None:
    """The weights may be right where their masters are not: the error names what differs."""
    walk = Walk(tmp_path, "llama", torch.bfloat16)
    walk.step()
    path = tmp_path / "journal" / "000001"
    record = {**read_json(path.with_suffix(".json")), "masters": "0" * 32}
    path.with_suffix(".json").write_text(json.dumps(record))
    entries, metadata = read_tensors(path.with_suffix(".safetensors"))
    write_tensors(path.with_suffix(".safetensors"), entries, {**metadata, "record": json_digest(record)})
    with pytest.raises(CacheError, match="the master copies after batch 1 of .*expected 0{32}, as recorded"):
        Journal.open(tmp_path / "journal").weights_after(1)
