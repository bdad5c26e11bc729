"""Runs that are killed, stopped or short of disk end with the weights they would have had, bit for bit."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import pico
from pico_runs import (
    Server,
    files,
    live,
    mapping,
    place,
    prints,
    scores,
    settings,
    stopped_and_resumed,
    wide_model,
    write_yaml,
)
from torch import Tensor

import sphere_plugin as sp
from sphere_plugin.editing import Editor
from sphere_plugin.files import fingerprint, read_json, read_tensors
from sphere_plugin.geometry import Factors
from sphere_plugin.geometry.tracked import TrackedSpace
from sphere_plugin.journaling import Journal, Snapshot
from sphere_plugin.restraints import Chain, PruneConfig, SphereConfig, memory_of, recall, restrain
from sphere_plugin.restraints.controls import ControlConfig
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.runner import start

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("resume"))


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs: weights after every batch, what a live model goes on from, and all scores."""
    assert prints(one) == prints(other)
    journal, known = Journal.open(one / "journal"), Journal.open(other / "journal")
    last = len(known)
    assert len(journal) == last
    assert journal.fingerprint(last) == known.fingerprint(last)
    assert journal.fingerprint_of(journal.weights_after(last)) == known.fingerprint(last)
    assert live(one) == known.fingerprint(last)
    assert scores(one) == scores(other)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours; libraries warn as well."""
    return [one.getMessage() for one in caplog.records if one.name == "sphere_plugin" and one.levelno >= 30]


# ---- killed ----


@forks
@pytest.mark.parametrize("entry", ["memit+sphere", "alphaedit+sphere", "prune"])
def test_a_killed_run_ends_as_if_nothing_had_been(
    entry: str, hparams: Path, tmp_path: Path, sphere: Server, record_property
) -> None:
    """Three kills in random writes and one at a random moment; each time the command goes on."""
    moments = random.Random(entry)
    how = [{"write": moments.randint(2, 12)} for _ in range(3)]
    how += [{"after": moments.uniform(0.1, 0.5)}]
    moments.shuffle(how)
    yaml, folder = write_yaml(tmp_path / "run.yaml", mapping(hparams, entry)), tmp_path / "killed"
    codes = []
    for one in (*how, {}):
        begun = (folder / "manifest.json").exists()
        arguments = ("--resume", folder) if begun else (yaml, "--out", folder)
        code, said = sphere("run", *arguments, cwd=tmp_path, **one)
        codes.append(code)
        assert code in (0, -9), said
    assert codes == [-9, -9, -9, -9, 0]
    assert sphere("run", yaml, "--out", tmp_path / "whole", cwd=tmp_path)[0] == 0
    assert_same(folder, tmp_path / "whole")
    record_property("kills", codes.count(-9))


@forks
def test_a_full_disk_ends_a_run_with_a_sentence(hparams: Path, tmp_path: Path, sphere: Server) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", mapping(hparams, "alphaedit+sphere"))
    full = tmp_path / "full"
    for batches, arguments in ((0, (yaml, "--out", full)), (3, ("--resume", full))):
        code, said = sphere("run", *arguments, cwd=tmp_path, full=batches)
        assert code == 1 and "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"sphere: {full / 'journal' / f'{batches + 1:06d}.safetensors'}: got "), said
        assert "Free some space on that disk" in last
        assert len(prints(full)) == batches
    assert sphere("run", "--resume", full, cwd=tmp_path)[0] == 0
    assert sphere("run", yaml, "--out", tmp_path / "whole", cwd=tmp_path)[0] == 0
    assert_same(full, tmp_path / "whole")


# ---- stopped between two batches ----


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


@pytest.mark.parametrize("entry", ["memit+random", "rect", "ft+sphere", "rome", "rome+random"])
def test_a_stopped_run_of_any_entry_goes_on_as_it_would_have(entry: str, hparams: Path, tmp_path: Path) -> None:
    told = settings(hparams, entry, checkpoints=[], edits=6, sample=2)
    start(told, tmp_path / "whole")
    stopped_and_resumed(told, tmp_path / "stopped", 1, 2)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert files(tmp_path / "stopped").keys() == files(tmp_path / "whole").keys()


@pytest.mark.parametrize("entry", ["rome", "ft"])
def test_controls_of_a_host_method_resemble_sphere_in_one_thing(entry: str, hparams: Path, tmp_path: Path) -> None:
    updates, layers = {}, {}
    for variant in ("", "+sphere", "+shrunk", "+random"):
        folder = tmp_path / f"of{variant}"
        start(settings(hparams, f"{entry}{variant}", checkpoints=[], edits=1, batch_size=1, sample=1), folder)
        journal = Journal.open(folder / "journal")
        (name,) = journal.weights_after(0)
        updates[variant] = (journal.weights_after(1)[name] - journal.weights_after(0)[name]).double()
        (layers[variant],) = journal.record(1)["layers"]
    alone, sphere, shrunk, random = (updates[variant] / updates[""].norm() for variant in updates)
    assert layers["+sphere"]["rank"] == layers["+shrunk"]["rank"] == layers["+random"]["rank"] > 0
    assert shrunk.norm() == pytest.approx(float(sphere.norm()), rel=1e-4) and float(sphere.norm()) < 0.99
    assert float((shrunk / shrunk.norm() - alone).norm()) < 1e-3  # the weight is float32
    assert random.norm() < 1 and float((random - sphere).norm()) > 0.05


@pytest.mark.parametrize("block", [{"sphere": {"basis": "pretrained"}}, {"prune": True}], ids=["pretrained", "prune"])
def test_restraints_of_a_host_method_know_the_weights_before_any_edit(block, tmp_path: Path) -> None:
    hparams = place(tmp_path / "place")
    yaml = hparams.parents[1] / "ROME" / "pico.yaml"
    yaml.write_text(yaml.read_text() + "".join(f"{key}: {value}\n" for key, value in block.items()).replace("'", ""))
    told = settings(hparams, "rome+sphere", checkpoints=[], edits=4, sample=1)
    start(told, tmp_path / "whole")
    stopped_and_resumed(told, tmp_path / "stopped", 1)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    asked = read_json(tmp_path / "whole" / "manifest.json")["method"]["hparams"]
    assert asked["sphere"] == block.get("sphere", True)


@pytest.mark.parametrize("wide", [True, False])
def test_followed_spaces_are_kept(wide: bool, tmp_path: Path, caplog, monkeypatch) -> None:
    """Spaces are found from those of the batch before: in weights of 768 neurons, or of fewer if that is allowed."""
    folder, changes = tmp_path / "place", {}
    if wide:
        changes = {"model_name": str(wide_model(folder / "wide-llama")), "layers": [0], "v_num_grad_steps": 2}
        changes["context_template_length_params"] = []
    else:
        monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    entry = "memit+sphere" if wide else "alphaedit+sphere"
    told = settings(place(folder, **changes), entry, checkpoints=[], edits=6, sample=1, neighbours=1)
    start(told, tmp_path / "whole")
    kept, _ = read_tensors(tmp_path / "whole" / "memory" / "000003.safetensors")
    assert {name.rpartition("/")[2] for name in kept} >= {"gram", "vectors", "values", "counts", "left", "image"}
    assert not wide or kept["0/counts"][1] > 0, "no space was followed"
    assert [path.name for path in (tmp_path / "whole" / "memory").iterdir()] == ["000003.safetensors"]
    with caplog.at_level(logging.WARNING, "sphere_plugin"):
        stopped_and_resumed(told, tmp_path / "stopped", 2)
    assert not warnings(caplog)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_after_undoing_followed_spaces_are_found_anew_and_that_is_told(tmp_path: Path, caplog, monkeypatch) -> None:
    hparams = place(tmp_path / "place")
    monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    start(settings(hparams, "memit+sphere", checkpoints=[], edits=8, sample=1), tmp_path / "run")
    before = prints(tmp_path / "run")
    sp.undo(tmp_path / "run", 4)
    with caplog.at_level(logging.WARNING, "sphere_plugin"):
        runner.resume(tmp_path / "run")
    assert "after undoing, spaces are found anew" in caplog.text
    assert prints(tmp_path / "run")[:2] == before[:2]
    caplog.clear()
    sp.undo(tmp_path / "run", 0)
    runner.resume(tmp_path / "run")
    assert prints(tmp_path / "run") == before and not warnings(caplog)


def test_an_undone_run_without_followed_spaces_repeats_itself(hparams: Path, tmp_path: Path, caplog) -> None:
    start(settings(hparams, "alphaedit+sphere"), tmp_path)
    before, told = prints(tmp_path), scores(tmp_path)
    for to in (8, 2):
        sp.undo(tmp_path, to)
        runner.resume(tmp_path)
        assert prints(tmp_path) == before and scores(tmp_path) == told
    assert not warnings(caplog)


# ---- two editors ----

BATCHES = [[REQUESTS[0]], [REQUESTS[1]], [REQUESTS[2]], [{**REQUESTS[0], "target_new": "London"}]]


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("at", [1, 3])
def test_an_editor_goes_on_where_another_stopped(method: str, followed: bool, at: int, monkeypatch) -> None:
    if followed:
        monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)

    def make() -> Editor:
        editor = Editor(*pico("llama"), pico_config("llama", base_method=method, v_num_grad_steps=3))
        editor.prepare()
        return editor

    first, second = make(), make()
    keys: list[dict[int, Tensor]] = []
    for batch in BATCHES[:at]:
        keys.append({layer: one.clone() for layer, one in first.apply(batch).keys.items()})
    memory = {name: one.clone() for name, one in first.memory().items()}
    assert bool(memory) == followed
    Snapshot.take(first.anatomy.weights).restore(second.anatomy.weights)
    second.resume(iter(keys))
    second.recall(memory)
    for batch in BATCHES[at:]:
        first.apply(batch)
        second.apply(batch)
        assert fingerprint(first.anatomy.weights.items()) == fingerprint(second.anatomy.weights.items())
    assert fingerprint(sorted(first.memory().items())) == fingerprint(sorted(second.memory().items()))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("row_normalize", [True, False])
def test_a_followed_space_goes_on_from_a_file(row_normalize: bool, tmp_path: Path) -> None:
    weight, space = normal(96, 300, seed=0), TrackedSpace(0.4, row_normalize)
    for batch in range(30):
        left, right = 0.03 * normal(3, 96, seed=2 * batch + 1), normal(300, 3, seed=2 * batch + 2)
        delta = Factors(left.T, right)  # as solvers give it: the other way round in memory
        again = TrackedSpace(0.4, row_normalize)
        sp.files.write_tensors(tmp_path / "memory", space.memory(), {})
        again.recall(read_tensors(tmp_path / "memory")[0])
        (one, rank), (other, known) = space.project(weight, delta, 0.8), again.project(weight, delta, 0.8)
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right) and rank == known
        weight = weight + one.dense()


@pytest.mark.parametrize(
    "config",
    [
        SphereConfig(),
        ControlConfig("random", SphereConfig()),
        Chain((PruneConfig(), ControlConfig("random", SphereConfig()))),
        Chain((PruneConfig(), SphereConfig())),
    ],
    ids=["sphere", "random", "prune, random", "prune, sphere"],
)
def test_a_restraint_goes_on_where_another_stopped(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    pretrained = normal(24, 60, seed=0)
    weight, bound = pretrained.clone(), config.bind(pretrained)
    assert memory_of(bound) == {}
    for batch in range(5):
        delta = Factors(0.1 * normal(24, 2, seed=batch + 1), normal(60, 2, seed=batch + 50))
        other = config.bind(pretrained)
        recall(other, memory_of(bound))
        one, two = restrain(bound, weight, delta).delta, restrain(other, weight, delta).delta
        one, two = (part.dense() if isinstance(part, Factors) else part for part in (one, two))
        assert torch.equal(one, two)
        weight = weight + one
