"""Sweeps: which runs a grid means, that they are single runs bit for bit, what is refused, and going on."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from pico_runs import ROOT, Server, facts, mapping, place, prints, scores, write_yaml

from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, SphereError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.cells import Cell, SweepSettings, described, written
from sphere_plugin.sequence.runner import start
from sphere_plugin.sequence.settings import RunSettings
from sphere_plugin.sequence.sweep import taken_up

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


def swept(hparams: Path, grid: dict[str, Any], entries: Any = ("memit",), **changes: Any) -> dict[str, Any]:
    """The YAML of a sweep of two batches."""
    usual = {"edits": 4, "checkpoints": [2], "sample": None, "order": 3}
    return mapping(hparams, list(entries), **{**usual, **changes}) | {"grid": grid}


def read(hparams: Path, grid: dict[str, Any], entries: Any = ("memit",), **changes: Any) -> SweepSettings:
    return SweepSettings.from_mapping(swept(hparams, grid, entries, **changes))


def single(content: dict[str, Any], entry: str, values: dict[str, Any], order: int = 3) -> RunSettings:
    """The settings of a run of its own."""
    told = {key: one for key, one in content.items() if key not in ("grid", "orders")}
    return RunSettings.from_mapping({**told, "entries": entry, "order": order, "settings": {"all": values}})


# ---- the grid ----


def test_cells_and_their_folders(hparams: Path) -> None:
    grid = {"alpha": [0, 0.5], "eta": [0.3, 1], "layers": [[1, 2], [1, 3]]}
    sweep = read(hparams, grid, ["memit", "alphaedit"], order=None, orders=[0, 1])
    cells = sweep.cells
    assert len(cells) == 2 * (2 + 8) and sweep.bases == ("memit", "alphaedit")
    assert [sweep.folder(cell, 0) for cell in cells[:2]] == ["memit/layers=1-2,order=0", "memit/layers=1+3,order=0"]
    name = "eta=0.3,alpha=0.5,layers=1-2"
    cell = next(one for one in cells if one.entry == "alphaedit+sphere" and one.name == name)
    assert sweep.folder(cell, 1) == f"alphaedit+sphere/{name},order=1"
    assert cell.alone == Cell("alphaedit", False, {"layers": (1, 2)}) == cells[10]
    told = sweep.settings(cell, 1)
    assert told.entries == ("alphaedit+sphere",) and told.order == 1
    assert told.settings["alphaedit+sphere"] == {"eta": 0.3, "alpha": 0.5, "layers": [1, 2]}
    # Without SPHERE there is nothing to project away with: alpha 0 has the runs of the method alone.
    still = next(one for one in cells if one.values.get("alpha") == 0 and one.values["eta"] == 1)
    assert sweep.folder(still, 0) == "memit/layers=1-2,order=0"
    tasks = sweep.tasks(Path("out"))
    assert len(tasks) == 2 * 2 * (2 + 4) == len({task.folder for task in tasks})
    assert [task.settings.order for task in tasks] == [0] * 12 + [1] * 12, "one order after the other"
    assert SweepSettings.from_mapping(sweep.plain()) == sweep


def test_a_method_alone_varies_with_what_matters_to_it(hparams: Path) -> None:
    grid = {"basis": ["current", "pretrained"], "projection": ["in_loop", "post"], "alpha": [0.8]}
    alone = [cell.name for cell in read(hparams, grid, ["memit", "rect", "prune"]).cells if not cell.sphere]
    restrained = ["projection=in_loop", "projection=post"]
    assert alone == ["base", *restrained, *restrained]


def test_the_defaults_are_those_of_the_entry(hparams: Path) -> None:
    grid = {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}
    for told in (described(read(hparams, grid, ["memit", "alphaedit"])), described(read(hparams, grid))):
        found = {one["entry"]: one["values"] for one in told["cells"] if one["default"]}
        assert found.pop("memit+sphere") == {"eta": 0.5, "alpha": 0.8}
        assert found in ({"alphaedit+sphere": {"eta": 0.5, "alpha": 0.5}}, {})
    moved = described(read(hparams, {"alpha": [0.5, 0.8]}, settings={"memit+sphere": {"eta": 0.4}}))
    assert [one["values"] for one in moved["cells"] if one["default"]] == [{"alpha": 0.8}]
    assert not any(one["default"] for one in described(read(hparams, {"alpha": [0.1]}))["cells"])


def test_values_in_the_names_of_folders() -> None:
    values = {0.3: "0.3", 1.0: "1", 0.1234567: "0.1234567", (12, 13, 14): "12-14", (12, 14): "12+14", (5,): "5"}
    assert {written(value): text for value, text in values.items()} == {text: text for text in values.values()}
    assert written("post") == "post"


def test_the_sweep_of_the_results_can_be_run() -> None:
    path = ROOT / "docs" / "results" / "sweep.yaml"
    content = yaml.safe_load(path.read_text()) | {"hparams": str(ROOT / "hparams" / "SPHERE" / "smollm2-135m.yaml")}
    sweep = SweepSettings.from_mapping(content)
    assert len(sweep.tasks(Path())) == 2 * (1 + 12)
    told = described(sweep)["cells"]
    assert [(one["entry"], one["values"]) for one in told if one["default"]] == [
        ("memit+sphere", {"eta": 0.5, "alpha": 0.8}),
        ("alphaedit+sphere", {"eta": 0.5, "alpha": 0.5}),
    ]


BAD = [
    ({"grid": {}}, "grid: got {}, expected lists of values of eta, alpha"),
    ({"grid": {"gamma": [1]}}, "grid: got 'gamma', expected one of eta, alpha, basis, projection, layers"),
    ({"grid": {"eta": 0.5}}, "grid.eta: got 0.5, expected a list"),
    ({"grid": {"eta": []}}, "grid.eta: got []"),
    ({"grid": {"eta": [0.5, 1.5]}}, "grid.eta: got 1.5, expected a number in (0, 1]"),
    ({"grid": {"alpha": [-0.1]}}, "grid.alpha: got -0.1"),
    ({"grid": {"alpha": [0.5, 0.50]}}, "grid.alpha: got [0.5, 0.5], expected each value once"),
    ({"grid": {"alpha": ["much"]}}, "grid.alpha: got 'much'"),
    ({"grid": {"basis": ["present"]}}, "grid.basis: got 'present'"),
    ({"grid": {"projection": ["outside"]}}, "grid.projection: got 'outside'"),
    ({"grid": {"layers": [1, 2]}}, "grid.layers: got 1.0, expected lists of layers"),
    ({"grid": {"layers": [[2, 1]]}}, "grid.layers: got [2, 1], expected ascending"),
    ({"grid": {"layers": [[1, 7]]}}, "grid.layers: got 7, expected a layer of the model"),
    ({"entries": ["memit+sphere"]}, "entries: got 'memit+sphere', expected methods of this package's own editor"),
    ({"entries": ["ft"]}, "entries: got 'ft'"),
    ({"entries": []}, "entries: got ''"),
    ({"orders": [1, 1]}, "orders: got [1, 1]"),
    ({"orders": 3}, "orders: got 3, expected a list"),
    ({"orders": [-1]}, "orders: got -1"),
    ({"orders": [0], "order": 1}, "order: got 1, expected order or orders"),
    ({"share_targets": True}, "share_targets: got True"),
    ({"settings": {"all": {"alpha": 0.2}}}, "settings.all.alpha: got 0.2, expected a key that is not in the grid"),
    ({"settings": {"rect": {"v_lr": 0.2}}}, "settings: got 'rect'"),
    ({"settings": {"all": {"v_lr": -1}}}, "v_lr: got -1"),
    ({"edits": 3000}, "3000"),
    ({"nonsense": 1}, "run: got 'nonsense'"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_cannot_be_is_refused_before_anything_starts(
    changes: dict[str, Any], said: str, hparams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = swept(hparams, {"alpha": [0.5, 0.8]}, order=None) | changes
    path = write_yaml(tmp_path / "sweep.yaml", content)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_go_together(hparams: Path, tmp_path: Path, capsys) -> None:
    path = write_yaml(tmp_path / "sweep.yaml", swept(hparams, {"alpha": [0.8]}))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "sweep.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    for command, said in (
        (["--out", "x"], "expected a YAML of settings"),
        ([str(path)], "expected a folder for the sweep"),
        ([str(path), "--out", str(tmp_path / "used")], "expected a folder without a sweep. Continue it with --resume"),
        ([str(path), "--out", str(tmp_path / "run")], "expected a folder without a run"),
        ([str(path), "--out", "x", "--jobs", "0"], "--jobs: got 0"),
        ([str(path), "--resume", str(tmp_path)], "--resume: got 'a YAML'"),
        (["--resume", str(tmp_path), "--plan"], "--resume: got '--plan'"),
        (["--resume", str(tmp_path / "nowhere")], "expected the folder of a sweep"),
        (["--resume", str(tmp_path / "used")], "expected a file as `sphere sweep` wrote it"),
    ):
        assert main(["sweep", *command]) == 1
        assert said in capsys.readouterr().err, command


# ---- the runs ----


@forks
def test_cells_are_single_runs_and_their_numbers_those_of_the_checkpoints(
    hparams: Path, tmp_path: Path, sphere: Server
) -> None:
    content = swept(hparams, {"eta": [0.3, 0.6], "alpha": [0, 1.0]})
    path, out = write_yaml(tmp_path / "sweep.yaml", content), tmp_path / "out"
    code, said = sphere("sweep", path, "--out", out, "--jobs", 2, cwd=tmp_path)
    assert code == 0, said
    assert (
        "3 of 3 runs finished" in said
        and "SPHERE is not recommended here" in said
        and str(out / "report" / "report.html") in said
    )
    runs = {
        "memit/base": {},
        "memit+sphere/eta=0.3,alpha=1": {"eta": 0.3},
        "memit+sphere/eta=0.6,alpha=1": {"eta": 0.6},
    }
    assert {str(one.parent.relative_to(out)) for one in out.rglob("manifest.json")} == set(runs)

    for name, values in runs.items():
        entry = name.partition("/")[0]
        start(single(content, entry, {**values, "alpha": 1.0} if values else {}), tmp_path / name)
        assert prints(out / name) == prints(tmp_path / name), "the company makes no difference"
        assert scores(out / name) == scores(tmp_path / name)
    assert prints(out / "memit/base") != prints(out / "memit+sphere/eta=0.3,alpha=1")
    start(single(content, "memit+sphere", {"alpha": 0.0}), tmp_path / "still")
    assert prints(tmp_path / "still") == prints(out / "memit/base"), "alpha 0 projects nothing"

    stored = read_json(out / "sweep.json")
    assert stored["edits"] == 4 and len(stored["cells"]) == 5
    for cell in stored["cells"]:
        points = [read_json(out / run / "checkpoints" / "000004.json")["scores"] for run in cell["runs"]]
        for metric in ("efficacy", "generalization", "specificity"):
            assert cell["metrics"][metric]["mean"] == pytest.approx(fmean(points[0][metric]), abs=1e-15)
        assert cell["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(points[0]["nll"]))
        assert cell["orders"] == 1
    still = stored["cells"][1]
    assert still["values"] == {"eta": 0.3, "alpha": 0.0} and still["runs"] == ["memit/base"]
    assert {one["difference"]["mean"] for one in still["metrics"].values()} == {0.0}
    shown = read_json(out / "report" / "report.json")
    assert shown["sweeps"][0]["cells"] == stored["cells"] and shown["studies"] == []

    before = (out / "sweep.json").read_bytes()
    assert sphere("sweep", "--resume", out, cwd=tmp_path)[0] == 0
    assert (out / "sweep.json").read_bytes() == before


@forks
def test_killed_runs_go_on_where_they_were(hparams: Path, tmp_path: Path, sphere: Server, record_property) -> None:
    content = swept(hparams, {"alpha": [1.0]}, order=None, orders=[0, 1])
    path, out = write_yaml(tmp_path / "sweep.yaml", content), tmp_path / "out"
    # Every run dies in a write, and in the end what reports on them.
    code, _ = sphere("sweep", path, "--out", out, cwd=tmp_path, write=16)
    assert code == -9
    begun = sorted(str(one.parent.relative_to(out)) for one in out.rglob("manifest.json"))
    assert begun == [
        "memit+sphere/alpha=1,order=0",
        "memit+sphere/alpha=1,order=1",
        "memit/base,order=0",
        "memit/base,order=1",
    ]
    assert not any((out / name / "checkpoints" / "000004.json").exists() for name in begun)
    code, said = sphere("sweep", "--resume", out, "--jobs", 2, cwd=tmp_path)
    assert code == 0 and "4 of 4 runs finished" in said, said
    for name in begun:
        entry, order = name.partition("/")[0], int(name[-1])
        start(single(content, entry, {"alpha": 1.0} if "+" in entry else {}, order), tmp_path / name)
        assert prints(out / name) == prints(tmp_path / name) and scores(out / name) == scores(tmp_path / name)
    assert [cell["orders"] for cell in read_json(out / "sweep.json")["cells"]] == [2, 2]
    record_property("kills", len(begun) + 1)  # each run, and the command itself


@forks
def test_a_cell_that_fails_leaves_the_others_alone(hparams: Path, tmp_path: Path, sphere: Server) -> None:
    grid = {"layers": [[1], [3]], "alpha": [0.5]}
    content = swept(hparams, grid, settings={"all": {"v_loss_layer": 2}})
    path, out = write_yaml(tmp_path / "sweep.yaml", content), tmp_path / "out"
    code, said = sphere("sweep", path, "--out", out, "--jobs", 2, cwd=tmp_path)
    assert code == 1 and "Traceback" not in said
    assert "2 of 4 runs finished" in said
    for name in ("memit/layers=3", "memit+sphere/alpha=0.5,layers=3"):
        assert f"{name}: 0 edits; v_loss_layer: got 2" in said
    stored = read_json(out / "sweep.json")
    states = [(cell["values"]["layers"], cell["metrics"]["efficacy"].get("reason")) for cell in stored["cells"]]
    gone = "not available: no run in memit"
    assert states == [([1], None), ([3], f"{gone}/layers=3"), ([1], None), ([3], f"{gone}+sphere/alpha=0.5,layers=3")]
    assert "no run in memit+sphere/alpha=0.5,layers=3" in (out / "report" / "report.html").read_text()

    content["settings"]["all"]["mom2_dataset"] = "nowhere/corpus.txt"
    path = write_yaml(tmp_path / "sweep.yaml", content)
    code, said = sphere("sweep", path, "--out", tmp_path / "none", cwd=tmp_path)
    assert code == 1 and "0 of 4 runs finished" in said and "corpus.txt" in said
    assert "cells" in read_json(tmp_path / "none" / "sweep.json") and not (tmp_path / "none" / "report").exists()


def test_a_sweep_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    hparams, data = place(tmp_path / "place"), facts(tmp_path / "facts.json")
    sweep = read(hparams, {"alpha": [0.5]}, data=str(data))
    (tmp_path / "sweep.json").write_text(yaml.safe_dump(described(sweep)))  # JSON is YAML; this is no JSON
    with pytest.raises(CacheError, match=r"sweep.json"):
        taken_up(tmp_path)
    write_json(tmp_path / "sweep.json", described(sweep))
    assert taken_up(tmp_path) == sweep
    kept = data.read_text()
    data.write_text(kept + " ")
    with pytest.raises(CacheError, match="the file of facts: got"):
        taken_up(tmp_path)
    data.write_text(kept)
    values = yaml.safe_load(hparams.read_text())
    write_yaml(hparams, values | {"v_lr": 0.25})
    with pytest.raises(CacheError, match=r"the settings of the methods: got .* Put it back"):
        taken_up(tmp_path)
    write_yaml(hparams, values)
    (hparams.parents[2] / "text.txt").write_text("Another text.\n")
    with pytest.raises(CacheError, match="the held-out text: got"):
        taken_up(tmp_path)
    shutil.rmtree(hparams.parents[2] / "pico-llama")
    with pytest.raises(SphereError, match="pico-llama"):
        taken_up(tmp_path)


def test_a_plan_says_what_each_kind_of_run_takes(hparams: Path, tmp_path: Path, capsys) -> None:
    content = swept(hparams, {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}, order=None, orders=[0, 1])
    path = write_yaml(tmp_path / "sweep.yaml", content)
    assert main(["sweep", str(path), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["2 runs", "8 runs", lines[2].partition(",")[0]]
    assert "each MEMIT: " in lines[0] and "each MEMIT + SPHERE: " in lines[1]
    assert lines[2].startswith("10 runs in all: ") and "MB of disk" in lines[2]
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_sweep_of_shared_targets_is_none(hparams: Path) -> None:
    sweep = read(hparams, {"alpha": [0.5]})
    with pytest.raises(ConfigError, match="share_targets"):
        SweepSettings(replace(sweep.run, share_targets=True), sweep.grid, sweep.orders)


def test_the_docs_name_every_flag_and_their_example_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    docs = (ROOT / "docs" / "sweep.md").read_text()
    flags = {word.strip("[],:") for word in capsys.readouterr().out.split() if word.strip("[").startswith("--")}
    assert [flag for flag in sorted(flags - {"--help"}) if flag not in docs] == []
    content = yaml.safe_load(docs.partition("```yaml")[2].partition("```")[0])
    hparams = str(ROOT / content["hparams"])
    assert len(SweepSettings.from_mapping(content | {"hparams": hparams}).tasks(Path())) == 2 * 2 * (2 + 96)
