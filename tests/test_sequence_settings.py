"""Entries, their settings, presets, --set and --plan."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import yaml
from pico_runs import ROOT, mapping, place, settings, write_yaml

from sphere_plugin.arguments import parser
from sphere_plugin.cli import main
from sphere_plugin.errors import ConfigError
from sphere_plugin.restraints import PruneConfig, RectConfig
from sphere_plugin.sequence import command, manifest, plan, presets, runner, targets
from sphere_plugin.sequence.compare import Ended
from sphere_plugin.sequence.entries import ALL, absolute, hparams_of, label, parse, settings_of, split
from sphere_plugin.sequence.settings import RunSettings

SMOL = ROOT / "hparams" / "SPHERE" / "smollm2-135m.yaml"


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("settings"))


def given(*argv: object) -> RunSettings:
    """The settings that a command makes."""
    return command.settings_of(parser().parse_args(["run", *map(str, argv)]))


# ---- entries ----


def test_twelve_entries_and_their_names() -> None:
    assert len(ALL) == 12 and parse("all") == ALL
    assert parse(" memit , memit+sphere") == ("memit", "memit+sphere")
    assert [label(name) for name in ("memit", "alphaedit+sphere", "ft+sphere", "rect+shrunk", "prune+random")] == [
        "MEMIT",
        "AlphaEdit + SPHERE",
        "FT + SPHERE",
        "RECT + SPHERE's length",
        "PRUNE + random subspace",
    ]
    assert split("memit") == ("memit", None) and split("rome+sphere") == ("rome", "sphere")


@pytest.mark.parametrize("name", ["", "MEMIT", "memit+", "memit+rect", "ft+prune", "rome+", "sphere", "+sphere"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of memit, alphaedit, rect, prune, ft, rome, alone or with"):
        split(name)


def test_what_an_entry_means_for_the_own_editor() -> None:
    def values(name: str, **changes: Any) -> Any:
        return hparams_of(name, SMOL, None, changes)

    assert (values("memit").base_method, values("memit").alpha) == ("MEMIT", 0.0)
    assert (values("memit+sphere").base_method, values("memit+sphere").alpha) == ("MEMIT", 0.8)
    assert (values("alphaedit").alpha, values("alphaedit+sphere").alpha) == (0.0, 0.5)
    rect, prune = values("rect"), values("prune+sphere")
    assert (rect.alg_name, rect.rect, rect.prune, rect.alpha, rect.projection) == (
        "RECT",
        RectConfig(),
        None,
        0.0,
        "post",
    )
    assert (prune.alg_name, prune.prune, prune.rect, prune.alpha) == ("PRUNE", PruneConfig(), None, 0.8)
    assert values("memit+random").control == "random" and values("rect+shrunk").control == "shrunk"
    assert values("memit+sphere").control is None
    assert values("memit+sphere", alpha=0.3).alpha == 0.3 and values("memit", alpha=0.3).alpha == 0.0
    assert values("memit", v_lr="5e-1").v_lr == 0.5, "YAML takes 5e-1 for text"
    assert values("rect", rect={"keep": 0.2}).rect == RectConfig(keep=0.2)
    assert values("rect", projection="in_loop").projection == "in_loop"
    for entry, alpha in (
        ("memit+sphere", 0.8),
        ("rect+sphere", 0.8),
        ("prune+random", 0.8),
        ("alphaedit+sphere", 0.5),
    ):
        assert values(entry, alpha=None).alpha == alpha, "null is the default, not none"
    assert hparams_of("memit", SMOL, "another/model", {}).model_name == "another/model"


def test_what_an_entry_means_for_easyedit(tmp_path: Path) -> None:
    ft = hparams_of("ft", SMOL, None, {"lr": "1e-3", "num_steps": 7})
    assert (ft.alg_name, ft.lr, ft.num_steps, ft.sphere) == ("FT", 1e-3, 7, False)
    assert hparams_of("ft+sphere", SMOL, None, {}).sphere is True
    assert hparams_of("rome", SMOL, "a/model", {}).model_name == "a/model"
    assert vars(hparams_of("ft", SMOL.with_suffix(""), None, {})) == vars(hparams_of("ft", SMOL, None, {}))
    with pytest.raises(ConfigError, match="settings: got 'v_lr', expected a key of .*FT/smollm2-135m.yaml"):
        hparams_of("ft", SMOL, None, {"v_lr": 1})
    here = place(tmp_path)
    path = here.parents[1] / "ROME" / here.name
    path.write_text(path.read_text() + "sphere: {alpha: 0.3}\n")
    assert hparams_of("rome+sphere", here, None, {}).sphere == {"alpha": 0.3}
    assert hparams_of("rome", here, None, {}).sphere is False, "the entry's name decides"


def test_the_yaml_of_another_method_is_refused(tmp_path: Path) -> None:
    hparams = place(tmp_path)
    yaml = hparams.parents[1] / "FT" / "pico.yaml"
    yaml.write_text((hparams.parents[1] / "ROME" / "pico.yaml").read_text())
    with pytest.raises(ConfigError, match=r"alg_name in .*FT.pico\.yaml: got 'ROME', expected FT\."):
        hparams_of("ft", hparams, None, {})


def test_the_nearest_setting_wins() -> None:
    told = {"all": {"v_lr": 1, "L2": 1}, "memit": {"v_lr": 2}, "memit+sphere": {"v_lr": 3}}
    assert settings_of("memit+sphere", told) == {"v_lr": 3, "L2": 1}
    assert settings_of("memit", told) == settings_of("memit+random", told) == {"v_lr": 2, "L2": 1}
    assert settings_of("rect", told) == {"v_lr": 1, "L2": 1}


@pytest.mark.parametrize("key", ["alg_name", "base_method", "control", "batch_size", "model_name"])
def test_what_the_entry_or_the_run_decides_is_not_set(key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings of memit: got '{key}', expected a key of the method"):
        hparams_of("memit", SMOL, None, {key: "x"})


# ---- settings ----


def test_a_run_without_anything_is_told_all_it_needs(capsys: pytest.CaptureFixture) -> None:
    assert main(["run"]) == 1
    said = capsys.readouterr().err
    assert "no entries and no edits" in said and "--compare" in said and "--edits" in said and "--out" in said


def test_the_report_is_named_where_there_is_something_to_report(tmp_path: Path) -> None:
    assert command._told([Ended("memit", 0, failed="no model")], tmp_path)[1][-1] == str(tmp_path)
    ended = [Ended("memit", 0, failed="no model"), Ended("rect", 4)]
    assert command._told(ended, tmp_path) == (1, [ANY, ANY, "", str(tmp_path), f"sphere report {tmp_path}"])


def test_settings_come_back_from_a_manifest(hparams: Path) -> None:
    more = {"guard": {"energy": 0.1}, "settings": {"memit": {"v_lr": 1.0}}, "data": "facts.json", "preset": "x"}
    told = settings(hparams, "memit,memit+sphere,rect", **more)
    assert RunSettings.from_mapping(told.plain()) == told
    assert told.checkpoints == (4, 8, 12) and told.data == Path("facts.json").resolve()
    assert told.for_entry("memit+sphere").settings == {"memit": {"v_lr": 1.0}}
    assert told.for_entry("rect").settings == {} and told.for_entry("rect").entries == ("rect",)


def test_numbers_of_the_yamls_own_block_stay(tmp_path: Path) -> None:
    told = yaml.safe_load(SMOL.read_text()) | {"rect": {"keep": 0.3}}
    path = write_yaml(tmp_path / "hparams" / "SPHERE" / "kept.yaml", told)
    assert hparams_of("rect", path, None, {}).rect == RectConfig(keep=0.3)
    assert hparams_of("rect+sphere", path, None, {"rect": {"keep": 0.2}}).rect == RectConfig(keep=0.2)
    assert hparams_of("memit", path, None, {}).rect is None, "the entry's name decides"


def test_statistics_of_layers_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_yaml(tmp_path / "counted.yaml", yaml.safe_load(SMOL.read_text()) | {"mom2_dataset": "stats/{}.npz"})
    told = absolute(hparams_of("memit", path, None, {}))
    assert told.mom2_dataset == str(tmp_path / "stats" / "{}.npz")
    (tmp_path / "stats").mkdir()
    for layer in told.layers:
        (tmp_path / "stats" / f"{layer}.npz").write_bytes(b"%d" % layer)
    before = manifest._corpus(told.mom2_dataset, told.layers)
    (tmp_path / "stats" / f"{told.layers[-1]}.npz").write_bytes(b"other")
    assert before is not None and manifest._corpus(told.mom2_dataset, told.layers) != before
    assert manifest._corpus(told.mom2_dataset, [*told.layers, 99]) is None


@pytest.mark.parametrize(
    ("told", "flags", "said"),
    [
        ({"settings": 5}, ("--set", "v_lr=0.5"), "settings: got 5"),
        ({"settings": ["a"]}, ("--set", "v_lr=0.5"), r"settings: got \['a'\]"),
        ({"settings": {"memit": 5}}, ("--set", "v_lr=0.5"), r"settings\.memit: got 5"),
        ({"hparams": 5}, ("--model", "x/y"), "hparams: got 5"),
        ({"hparams": ["a"]}, ("--model", "x/y"), r"hparams: got \['a'\]"),
    ],
)
def test_keys_of_another_kind_are_refused_beside_flags_too(
    told: dict, flags: tuple, said: str, hparams: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        given(write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit") | told), *flags)


def test_entries_are_named_in_one_way() -> None:
    with pytest.raises(ConfigError, match="--entry: got 'rect', expected one of --entry and --compare"):
        given("--entry", "rect", "--compare", "memit,memit+sphere", "--edits", 4)


@pytest.mark.parametrize("flag", ["--entry", "--compare"])
def test_no_entry_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match="entries: got '', expected names of entries"):
        given(flag, "", "--edits", 4)


def test_a_model_without_a_name_is_refused(hparams: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit", model=""))
    for flags in ((), ("--model", "")):
        with pytest.raises(ConfigError, match="model: got '', expected a text that is not empty"):
            given(path, *flags)


def test_flags_win_over_the_yaml(hparams: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit", settings={"all": {"v_lr": 1.0}}))
    told = given(path, "--edits", 20, "--checkpoints", "10,4", "--entry", "rect", "--order", 7, "--seed", 3)
    assert (told.entries, told.edits, told.checkpoints, told.order, told.seed) == (("rect",), 20, (4, 10, 20), 7, 3)
    told = given(
        path, "--set", "v_lr=2e-1", "--set", "memit.L2=5", "--set", "all.layers=[1, 3]", "--protocol", "exact"
    )
    assert told.settings == {"all": {"v_lr": "2e-1", "layers": [1, 3]}, "memit": {"L2": 5}}
    assert hparams_of("memit", hparams, None, settings_of("memit", told.settings)).v_lr == 0.2
    assert told.protocol == "exact" and not told.share_targets
    told = given(path, "--compare", "memit,memit+sphere", "--set", "memit+sphere.eta=0.3", "--share-targets")
    assert told.settings["memit+sphere"] == {"eta": 0.3} and told.share_targets
    for wrong in ("v_lr", "=1", "memit.=1"):
        with pytest.raises(ConfigError, match=r"--set: got .*expected KEY=VALUE or ENTRY.KEY=VALUE"):
            given(path, "--set", wrong)


def test_a_model_is_a_yaml_beside_or_any_model(hparams: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit"))
    other = hparams.with_name("other.yaml")
    other.write_text(hparams.read_text())
    assert (given(path, "--model", "other").hparams, given(path, "--model", "other").model) == (other, None)
    told = given(path, "--model", "some/model")
    assert (told.hparams, told.model) == (hparams, "some/model")
    assert given(path, "--model", tmp_path).model == str(tmp_path)


@pytest.mark.parametrize(
    ("entry", "key", "value", "said"),
    [
        ("ft", "weight_decay", "small", "float"),
        ("ft", "num_steps", "many", "int"),
        ("ft", "num_steps", 2.5, "int"),
        ("ft", "layers", "21", r"List\[int\]"),
        ("ft", "layers", ["a"], r"List\[int\]"),
        ("ft", "lr", None, "float"),
        ("ft", "lr", math.inf, "float"),
        ("rome", "mom2_adjustment", "yes", "bool"),
        ("rome", "fact_token", 3, "str"),
    ],
)
def test_settings_of_easyedits_methods_have_the_kind_that_is_declared(
    entry: str, key: str, value: object, said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"settings\.{key}: got .*, expected {said}"):
        hparams_of(entry, SMOL, None, {key: value})


def test_settings_of_easyedits_methods_are_read_as_their_kind() -> None:
    told = hparams_of("ft", SMOL, None, {"weight_decay": "1e-3", "lr": 1, "norm_constraint": False, "layers": [3]})
    assert (told.weight_decay, told.lr, told.norm_constraint, told.layers) == (1e-3, 1, False, [3])
    assert hparams_of("rome", SMOL, None, {"context_template_length_params": []}).context_template_length_params == []
    assert hparams_of("rome", SMOL, None, {"device": "cpu"}).device == "cpu", (
        "declared a number, and a name in its YAML"
    )


def test_a_number_of_jobs_is_checked_for_a_single_run_too(hparams: Path, tmp_path: Path, capsys) -> None:
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit"))
    assert main(["run", str(path), "--jobs", "0", "--out", str(tmp_path / "out")]) == 1
    assert "--jobs: got 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, "0", "", [4, "x"], 4.5])
def test_checkpoints_that_cannot_be_are_refused(value: object, hparams: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoints: got"):
        settings(hparams, "memit", checkpoints=value)


# ---- presets ----


def test_a_preset_is_named_on_the_command_line_only(hparams: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit", preset="figure7-llama3-8b"))
    with pytest.raises(ConfigError, match="preset: got 'figure7-llama3-8b'.*--preset NAME"):
        given(path)


def test_every_preset_loads_and_its_entries_have_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert set(presets.names()) == {
        "figure2-llama3-8b",
        "figure7-llama3-8b",
        "table1-llama3-8b",
        "table1-qwen2.5-7b",
    }
    for name in presets.names():
        told = given("--preset", name)
        assert told.preset == name and told.batch_size == 100 and told.neighbours is None
        for entry in told.entries:
            values = hparams_of(entry, told.hparams, told.model, settings_of(entry, told.settings))
            assert values.layers == [4, 5, 6, 7, 8] or entry.startswith("ft")
        docs = (ROOT / "docs" / "run.md").read_text()
        assert f"`{name}`" in docs


def test_a_preset_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told = given("--preset", "table1-llama3-8b", "--model", "smollm2-135m", "--scale", 0.05)
    assert told.hparams == SMOL and told.model is None
    assert (told.batch_size, told.edits) == (20, 760) and told.checkpoints == (60, 100, 160, 200, 260, 500, 760)
    assert told.entries == ("ft", "memit", "prune", "rect", "alphaedit", "alphaedit+sphere")
    told = given("--preset", "table1-llama3-8b", "--model", "smollm2-135m", "--scale", 0.0001, "--entry", "memit")
    assert (told.edits, told.checkpoints, told.entries) == (20, (20,), ("memit",))
    whole = given("--preset", "table1-llama3-8b", "--scale", 1)
    assert (whole.edits, whole.batch_size) == (15000, 100)
    for scale in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="--scale"):
            given("--preset", "table1-llama3-8b", "--scale", scale)
    with pytest.raises(ConfigError, match="--preset: got 'table2', expected one of figure2-llama3-8b"):
        given("--preset", "table2")


# ---- plan ----


@pytest.mark.parametrize("entry", ["alphaedit+sphere", "ft"])
def test_a_plan_starts_nothing(entry: str, hparams: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "cache"))
    path = write_yaml(tmp_path / "run.yaml", mapping(hparams, entry, fluency=12))
    shares = ["--share-targets"] if entry != "ft" else []
    monkeypatch.setattr(targets, "Targets", lambda *_: pytest.fail("targets were searched for"))
    monkeypatch.setattr(runner, "Targets", lambda *_: pytest.fail("targets were searched for"))
    assert main(["run", str(path), "--plan", *shares]) == 0
    said = capsys.readouterr().out
    assert said.startswith(label(entry)) and "of editing and" in said and "(from 2 facts;" in said
    needs = re.search(rf"^{re.escape(label(entry))}, batches of 2: needs [\d.]+ MiB on cpu while", said, re.M)
    assert bool(needs) == (entry != "ft")  # of our own editor formulas are known
    assert not list((tmp_path / "here").iterdir()) and not list((tmp_path / "temporary").iterdir())
    kept = {one.name for one in (tmp_path / "cache").iterdir()} if (tmp_path / "cache").exists() else set()
    assert kept == ({"statistics"} if entry != "ft" else set())


def test_a_plan_leaves_the_weights_and_counts_what_is_asked(hparams: Path, monkeypatch) -> None:
    kept: list[Any] = []
    begin = runner.Run.__init__
    monkeypatch.setattr(runner.Run, "__init__", lambda self, *more: begin(self, *more) or kept.append(self))
    small = plan.plan(settings(hparams, "memit", checkpoints=[]))
    run = kept[0]
    assert all(torch.equal(one, run.entrant.editor.pretrained.tensors[name]) for name, one in run.weights.items())
    weights = sum(one.numel() * one.element_size() for one in run.weights.values())
    assert weights < small.disk < 3 * weights and small.memory > 1e8 and small.facts == 2
    assert small.editing > 0 and small.scoring > 0
    text = plan.Plan(30.0, 600.0, 5_000_000, 2_500_000_000, 10).sentence("MEMIT")
    assert text.startswith(
        "MEMIT: 30 s of editing and 10 min of scoring, 5 MB of disk, 2.5 GB of memory (from 10 facts"
    )
    assert "3.0 h" in plan.Plan(10800.0, 0.0, 0, 0, 1).sentence("")


def test_the_example_in_the_docs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block = (ROOT / "docs" / "run.md").read_text().split("```yaml\n", 1)[1].split("```", 1)[0]
    told = RunSettings.from_mapping(yaml.safe_load(block))
    runner.check(told)
    assert len(told.entries) > 1 and told.guard is not None
