"""The examples run, and the README shows what they print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_files import write_benchmarks
from pico_runs import place, settings

import sphere_plugin as sp
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.sequence.runner import start

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    """What an example prints, run as its first lines say."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_examples_are_short_and_all_of_them_are_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 65, path.name
        assert f'"examples/{path.name}"' in source, f"{path.name} is not run by a test"


@pytest.mark.slow
@pytest.mark.keeps_cache
def test_the_first_edit_prints_what_the_readme_says() -> None:
    said = [line for line in run("examples/first_edit.py").splitlines() if line.startswith("The capital of")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(said) == 3
    for line in said:
        assert f"# {line}" in readme
    assert "Vienna" not in said[0]
    assert "Vienna" in said[1]


@pytest.mark.keeps_cache
def test_rome_with_sphere() -> None:
    said = run("examples/rome_sphere.py")
    assert said.count("ROME + SPHERE changed 1 weight: r 1") == 3
    assert re.search(r"Australia is (?!Vienna).* -> .*Australia is Vienna", said)
    assert re.search(r"Eiffel Tower is in the city of (?!Rome).* -> .*city of Rome", said)


@pytest.mark.keeps_cache
def test_edits_are_undone() -> None:
    lines = re.findall(r"^(unedited|two edits|one edit|none): (.*); (.*)$", run("examples/undo.py"), re.MULTILINE)
    australia, france = ({moment: said[which] for moment, *said in lines} for which in (0, 1))
    assert len(lines) == 4
    assert australia["none"] == australia["unedited"] and france["none"] == france["unedited"]
    assert "Vienna" in australia["one edit"] and "Vienna" not in australia["none"]
    assert france["two edits"] != france["one edit"]


def test_energy_is_moved_and_the_model_asked(tmp_path) -> None:
    start(settings(place(tmp_path), "memit", checkpoints=[]), tmp_path / "run")
    told = tmp_path / "told.json"
    choices = ("--sizes", "0.05", "--seeds", "1", "--facts", "6", "--json", str(told))
    choices += ("--abilities", str(write_benchmarks(tmp_path / "data")))
    run("examples/energy_intervention.py", str(tmp_path / "run"), *choices)
    result = json.loads(told.read_text())
    moved = {row["change"]: row["energy"] for row in result["rows"]}
    assert result["edits"] == 12 and result["facts"] == 6
    assert moved["none"] == 0 and abs(moved["rotation"]) < 1e-6
    assert moved["energy up"] > 0 > moved["energy down"]
    assert abs(moved["as far as up"]) < moved["energy up"]
    assert all(row[one] is not None for row in result["rows"] for one in ("efficacy", "locality", "nll"))
    assert all(0 <= row[one] <= 1 for row in result["rows"] for one in ("gsm8k_given", "boolq"))


def test_alpha_is_chosen_from_the_update(tmp_path) -> None:
    """Everything lies in U: what is left there is what chance puts there. The run beside it loses all along U."""
    hparams = place(tmp_path)
    start(settings(hparams, "memit+sphere", settings={"all": {"eta": 0.99, "alpha": 1.0}}), tmp_path / "run")
    told = tmp_path / "told.json"
    run("examples/alpha_from_update.py", str(tmp_path / "run"), "--to", "8", "--json", str(told))
    result = json.loads(told.read_text())
    assert result["entry"] == "memit+sphere"
    assert [row["edits"] for row in result["batches"]] == [2, 4, 6, 8]
    fixed = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "journal").glob("0*.json"))]
    first = [layer["removed_share"] for layer in fixed[0]["layers"]]
    assert all(0 <= one < other for one, other in zip(result["batches"][0]["removed"], first, strict=True))
    for row in result["batches"][1::2]:
        scores = json.loads((tmp_path / "run" / "checkpoints" / f"{row['edits']:06d}.json").read_text())["scores"]
        ours, theirs, difference = row["efficacy"]
        assert theirs == pytest.approx(sum(scores["efficacy"]) / len(scores["efficacy"]))
        assert ours - theirs == pytest.approx(difference)
        assert row["interval"][0] <= difference <= row["interval"][1]


def test_easyedit_reads_statistics_of_any_text(tmp_path, monkeypatch) -> None:
    hparams = place(tmp_path)
    stats = tmp_path / "stats"
    assert run("examples/statistics_for_easyedit.py", str(hparams), str(stats)).count(".npz") == 2
    load_host()
    easyedits = sys.modules["easyeditor.models.rome.layer_stats"]
    monkeypatch.setattr(easyedits, "load_dataset", lambda *_: pytest.fail("Wikipedia was asked for"))
    model, tokenizer = sp.load_model(str(tmp_path / "pico-llama"))
    config = sp.SphereHyperParams.from_hparams(hparams).editing()
    anatomy = Anatomy.of(model, config)
    expected = key_moments(anatomy, tokenizer, config)
    for layer, rewrite in anatomy.rewrites.items():
        asked = (model, tokenizer, rewrite.name.removesuffix(".weight"), str(stats), "wikipedia", ["mom2"])
        more = {"sample_size": 100000, "precision": "float32", "hparams": SimpleNamespace(device="cpu")}
        assert torch.equal(easyedits.layer_stats(*asked, **more).mom2.moment(), expected[layer])


@pytest.mark.keeps_cache
def test_a_yaml_alone() -> None:
    said = run("-m", "sphere_plugin", "launch", "examples/yaml_only.py")
    assert "The capital of Australia is Vienna" in said
    assert "ROME + SPHERE changed 1 weight" in said


@pytest.mark.slow
@pytest.mark.keeps_cache
def test_rect() -> None:
    said = run("examples/rect.py")
    for method in ("MEMIT + RECT wrote", "MEMIT + RECT + SPHERE wrote", "ROME + RECT changed"):
        assert said.count(method) == 1
    assert said.count("says: The capital of Australia is Vienna") == 3


@pytest.mark.slow
@pytest.mark.keeps_cache
def test_memit_sequentially() -> None:
    scores = re.findall(
        r"^(MEMIT(?: \+ SPHERE)?) +60 edits: ([01]\.\d\d) still said", run("examples/memit_sequential.py"), re.M
    )
    assert [name for name, _ in scores] == ["MEMIT", "MEMIT + SPHERE"]
    assert all(float(kept) > 0.3 for _, kept in scores)


@pytest.mark.keeps_cache
def test_a_projected_lora() -> None:
    raw, projected = run("examples/project_lora.py").split("default-sphere:")
    assert re.search(r"\d+ layers, \d+\.\d% of the update removed", raw)
    assert "Vienna" in raw
    assert "Vienna" in projected


@pytest.mark.keeps_cache
def test_fine_tuning_with_the_callback() -> None:
    said = run("examples/finetune_with_callback.py")
    assert "Vienna" in said


def test_the_readme_shows_the_example() -> None:
    """Every line of the README's first code block stands in the example, comments aside."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "first_edit.py").read_text(encoding="utf-8")
    block = readme.split("```python\n", 1)[1].split("```", 1)[0]
    plain = [line.split("  #")[0].rstrip() for line in block.splitlines() if line.strip()]
    assert len(plain) >= 10
    for line in plain:
        assert line in example, line
