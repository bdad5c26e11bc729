"""What others wrote, in data, settings, run folders and models, decides no place to write and runs no code."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import save_pico
from pico_runs import mapping, place, settings, write_yaml
from report_runs import manifest

import sphere_plugin as sp
from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ModelError, SphereError
from sphere_plugin.files import atomic_folder, read_json, write_bytes, write_json, write_tensors
from sphere_plugin.journaling.card import card
from sphere_plugin.journaling.lock import run_lock
from sphere_plugin.models.stored import structure
from sphere_plugin.sequence.runner import start
from sphere_plugin.sequence.workers import logged

ROOT = Path(sp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
OUTSIDE = ("../../out", "/tmp/sphere-out", "memit/../../../out", "..", "memit\\..\\out", "memit\x00")


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder, links as what they point to."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# ---- no code ----


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_reads_objects_or_trusts_code(path: Path) -> None:
    """No pickle in any dress, and `trust_remote_code` is nowhere but refused."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword):
            allowed = isinstance(node.value, ast.Constant) and node.value.value is False
            assert node.arg not in ("trust_remote_code", "allow_pickle", "weights_only") or allowed, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("torch.load", "torch.save", "joblib.load", "shelve.open", "marshal.loads"), called
            assert node.value.id != "os" or node.attr not in ("system", "popen"), called
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"


HARMFUL = """
from pathlib import Path
Path({mark!r}).write_text("run")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""


def with_code(folder: Path, mark: Path, kind: str) -> Path:
    """A model whose files ask for code of their own."""
    save_pico("llama", folder)
    (folder / "own.py").write_text(HARMFUL.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    return folder


def test_a_model_with_code_of_its_own_does_not_load(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "model", mark, "nobody-knows-it")
    for load in (sp.load_model, structure):
        with pytest.raises(ModelError, match="model"):
            load(str(folder))
    assert not mark.exists()


def test_code_beside_a_known_model_is_not_run(tmp_path: Path) -> None:
    """The family is one that transformers knows; what lies beside it is left alone."""
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "model", mark, "llama")
    model, _ = sp.load_model(str(folder))
    structure(str(folder))
    assert type(model).__module__.startswith("transformers.") and not mark.exists()


class Harm:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def test_weights_that_are_pickled_objects_do_not_load(tmp_path: Path) -> None:
    folder, mark = save_pico("llama", tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="model"):
        sp.load_model(str(folder))
    assert not mark.exists()


def test_statistics_that_are_pickled_objects_are_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for layer in (1, 2):
        (tmp_path / f"layer{layer}.npz").write_bytes(pickle.dumps(Harm(mark)))
    hparams = place(tmp_path, mom2_dataset=str(tmp_path / "layer{}.npz"))
    with pytest.raises(SphereError, match="npz"):
        start(settings(hparams, "memit"), tmp_path / "run")
    assert not mark.exists()


@pytest.mark.parametrize("line", ["!!python/object/apply:os.system [touch MARK]", "!!python/name:os.system ''"])
def test_a_yaml_makes_no_objects(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "run.yaml"
    path.write_text(f"entries: {line.replace('MARK', str(mark))}\nhparams: x.yaml\nedits: 2\n")
    with pytest.raises(SphereError, match="YAML"):
        sp.SphereHyperParams.from_hparams(path)
    for command in ("run", "sweep"):
        assert main([command, str(path), "--out", str(tmp_path / "out")]) == 1
        assert "YAML" in capsys.readouterr().err
    assert main(["doctor", str(path)]) == 1
    assert not mark.exists() and not (tmp_path / "out").exists()


# ---- no place outside ----


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_entry_is_no_path(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a YAML, on the command line, in `comparison.json`, in a manifest."""
    hparams = place(tmp_path / "deep" / "place")
    folder = tmp_path / "deep" / "runs"
    write_json(folder / "both" / "comparison.json", mapping(hparams, "memit") | {"entries": ["memit", name]})
    told = manifest("memit", settings=mapping(hparams, "memit") | {"entries": [name]})
    write_json(folder / "one" / "manifest.json", told)
    path = write_yaml(folder / "run.yaml", mapping(hparams, "memit") | {"entries": ["memit", name]})
    before = everything(tmp_path)
    assert main(["run", str(path), "--out", str(folder / "new")]) == 1
    assert main(["run", "--resume", str(folder / "both")]) == 1
    assert main(["run", "--resume", str(folder / "one")]) == 1
    assert capsys.readouterr().err.count("sphere: ") == 3
    (folder / "one" / "run.log").unlink(missing_ok=True)  # where it may say why
    assert everything(tmp_path) == before and not Path("/tmp/sphere-out").exists()


@pytest.mark.parametrize("values", [{"basis": ["current", "../../o"]}, {"layers": [["../../o"]]}, {"../../o": [1]}])
def test_a_value_of_a_sweep_is_no_path(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hparams = place(tmp_path / "deep" / "place")
    content = mapping(hparams, "memit", edits=4, checkpoints=[]) | {"grid": values, "orders": [0]}
    path = write_yaml(tmp_path / "sweep.yaml", {key: one for key, one in content.items() if key != "order"})
    folder = tmp_path / "deep" / "sweeps" / "old"
    write_json(folder / "sweep.json", {"format": 1, "settings": content, "made_of": {}, "cells": []})
    before = everything(tmp_path)
    assert main(["sweep", str(path), "--out", str(tmp_path / "deep" / "new")]) == 1
    assert main(["sweep", "--resume", str(folder)]) == 1
    assert capsys.readouterr().err.count("sphere: ") == 2
    assert everything(tmp_path) == before


def test_facts_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of facts that look like paths writes into its own folder, the cache, and nowhere else."""
    monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hparams = place(tmp_path / "place")
    names = ("../../../out", "/etc/passwd", "file:///tmp/out", "$(touch out)")
    told = [{"prompt": f"What is known of {name}", "subject": name, "target_new": "../out"} for name in names]
    (tmp_path / "facts.json").write_text(json.dumps(told))
    before = set(everything(tmp_path))
    run = settings(hparams, "memit", data=str(tmp_path / "facts.json"), edits=4, checkpoints=[], sample=None)
    start(run, tmp_path / "deep" / "run")
    assert len(read_json(tmp_path / "deep" / "run" / "journal" / "000001.json")["facts"]) == 2
    new = set(everything(tmp_path)) - before
    assert new and all(name.startswith(("deep/run/", "cache/")) for name in new)


# ---- links ----


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"gold")
    out = tmp_path / "out"
    out.mkdir()
    writers = {
        "a": lambda path: write_bytes(path, b"x"),
        "b": lambda path: write_json(path, {"x": 1}),
        "c": lambda path: write_tensors(path, {"x": torch.zeros(1)}, {}),
    }
    for name, write in writers.items():
        (out / name).symlink_to(treasure)
        write(out / name)
        assert treasure.read_bytes() == b"gold" and not (out / name).is_symlink() and (out / name).is_file()


def test_a_linked_folder_is_replaced_and_not_filled(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_bytes(b"gold")
    (tmp_path / "out").symlink_to(treasure)
    with atomic_folder(tmp_path / "out", keep=lambda folder: False) as folder:
        (folder / "new").write_bytes(b"x")
    assert everything(treasure) == {"gold": b"gold"}
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out" / "new").exists()


def test_clearing_up_follows_no_link(tmp_path: Path) -> None:
    """What dead processes left is deleted a day later; a link that is called so leads to what is not theirs."""
    treasure, out = tmp_path / "treasure", tmp_path / "out"
    treasure.mkdir()
    (treasure / "gold").write_bytes(b"gold")
    out.mkdir()
    (out / ".x.json.0000.sphere-tmp").symlink_to(treasure)
    old = time.time() - 10 * 24 * 3600
    os.utime(treasure, (old, old))
    write_bytes(out / "y.json", b"x")
    assert everything(treasure) == {"gold": b"gold"}


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "treasure").write_bytes(b"gold")
    (tmp_path / "lock").symlink_to(tmp_path / "treasure")
    with pytest.raises(CacheError, match="lock: got 'a link'.*Delete the link"), run_lock(tmp_path):
        pass
    assert (tmp_path / "treasure").read_bytes() == b"gold"


def test_a_log_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "treasure").write_bytes(b"gold")
    (tmp_path / "run.log").symlink_to(tmp_path / "treasure")
    with logged(tmp_path):
        logging.getLogger("sphere_plugin").warning("told")
    assert (tmp_path / "treasure").read_bytes() == b"gold"
    assert "told" in (tmp_path / "run.log").read_text() and not (tmp_path / "run.log").is_symlink()


# ---- what is told of others' texts ----


def test_the_card_of_an_edited_model_has_no_markup_of_others() -> None:
    hostile = "x<script>alert(1)</script>\n# [a](javascript:b) | c `d`"
    told = {"label": hostile, "model": {"name": hostile, "weights": hostile}, "method": {"hparams": {"eta": hostile}}}
    facts = [{"prompt": f"````\n{hostile}", "subject": "x", "target_new": hostile}]
    lines = card(told, 1, facts, {hostile: 0.5}).splitlines()
    begin = lines.index("````text")
    head, listed = lines[:begin], lines[begin:]
    assert not [line for line in head if "<script" in line and not line.startswith("base_model: ")]
    assert [line for line in head if line.startswith("#")] == [line for line in head if line.startswith("# x&lt;")]
    assert not [line for line in head if "](" in line.replace("\\](", "") and not line.startswith("base_model: ")]
    assert listed[-1] == "````" and len(listed) == 3
