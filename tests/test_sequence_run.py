"""A run: what it writes, what it refuses, and that it is the editor and the scores that are known from elsewhere."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from pico_runs import files, mapping, place, prints, scores, settings, write_yaml

from sphere_plugin.cli import COMMANDS, main
from sphere_plugin.data import read_records
from sphere_plugin.errors import CacheError, SphereError
from sphere_plugin.evaluation import METRICS
from sphere_plugin.files import fingerprint, read_json, write_json
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.exporting import export
from sphere_plugin.report.read import read_run
from sphere_plugin.sequence import crew, runner
from sphere_plugin.sequence.entries import hparams_of
from sphere_plugin.sequence.monitor import ORDERS
from sphere_plugin.sequence.runner import Run, resume, start


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)


ENTRIES = ("memit", "alphaedit+sphere", "prune+sphere", "memit+random", "rect+shrunk")


@pytest.mark.parametrize("entry", [*ENTRIES, "ft", "rome+sphere"])
def test_a_run_writes_what_the_docs_say(entry: str, hparams: Path, tmp_path: Path, monkeypatch) -> None:
    told = settings(hparams, entry, fluency=12 if entry == "memit" else 0, batch_size=2, seed=5)
    run = Run(told, tmp_path)
    run.begin()
    outcome = run.go()
    assert (outcome.edits, outcome.stopped) == (12, None)

    manifest = read_json(tmp_path / "manifest.json")
    assert (manifest["format"], manifest["entry"], manifest["edits"], manifest["batch_size"]) == (1, entry, 12, 2)
    assert [manifest[key] for key in ("checkpoints", "sample", "seed", "threads")] == [[4, 8, 12], 5, 5, 1]
    assert manifest["data"]["order"] == 3 and len(manifest["data"]["sha256"]) == 64
    journal = Journal.open(tmp_path / "journal")
    assert manifest["model"]["weights"] == journal.fingerprint(0) == fingerprint(journal.weights_after(0).items())
    hosted = entry.startswith(("ft", "rome"))
    assert bool(manifest["contexts"]) == (entry != "ft")

    records = read_records(limit=12, order=3)
    assert len(journal) == 6
    for number in range(1, 7):
        record = journal.record(number)
        assert (record["batch"], record["edits"]) == (number, 2 * number)
        batch = records[2 * number - 2 : 2 * number]
        assert [fact["record"] for fact in record["facts"]] == [one.position for one in batch]
        assert [fact["target_new"] for fact in record["facts"]] == [one.target_new for one in batch]
        assert len(record["losses"]) == len(record["steps"]) == (0 if hosted else 2)
        assert len(record["efficacy"]) == 2 and record["seconds"] > 0
        assert bool(journal.keys(number)) == entry.startswith("alphaedit"), "what MEMIT does not remember is not kept"
        for layer in record["layers"]:
            assert layer["update_norm"] > 0 and layer["sigma_max"] > 0 and layer["weight_norm"] > 0
            assert list(layer["energy"]) == [f"{s:g}" for s in ORDERS]
            restrained = "+" in entry
            assert (layer["rank"] > 0) == restrained
            if restrained:
                assert 0 < layer["removed_share"] < 1
    assert journal.fingerprint(6) == fingerprint(run.weights.items())

    points = scores(tmp_path)
    assert list(points) == [0, 4, 8, 12]
    for edits, point in points.items():
        asked = edits or 12
        assert len(point["scored"]) == min(5, asked) and all(0 <= place < asked for place in point["scored"])
        assert point["scored"] == sorted(set(point["scored"]))
        assert set(point["scores"]) == {*METRICS, "nll"} and math.isfinite(point["scores"]["nll"])
        assert all(len(point["scores"][name]) == len(point["scored"]) for name in METRICS)
        written = [value for value in point["scores"]["fluency"] if value is not None]
        assert bool(written) == (entry == "memit" and edits in (0, 12))
        assert set(point["energy"]) == set(point["weights"]) == {layer["name"] for layer in record["layers"]}
        assert all((one["update_norm"] > 0) == (edits > 0) for one in point["weights"].values())
        assert [case["record"] for case in point["cases"]] == [one.position for one in records[:3]]
    assert points[0]["scored"] == points[12]["scored"], "before and after are of the same edits"
    assert points[0]["scores"]["locality"] == [1.0] * 5

    last = points[12]["scored"]
    direct = run.quality.score(12, last, fluency=12 if entry == "memit" else 0)
    assert points[12]["scores"] == {**{k: list(v) for k, v in direct.columns().items()}, "nll": direct.nll}
    assert run.quality.efficacy([10, 11]) == journal.record(6)["efficacy"]
    assert read_run(tmp_path).entry == entry, "the report reads it"
    there = {path.name for path in tmp_path.iterdir() if path.name not in ("logs", "memory")}
    assert there == {"manifest.json", "journal", "checkpoints"}
    kept = [path.name for path in tmp_path.glob("memory/*")]
    assert kept == (["000006.safetensors"] if entry == "memit+random" else [])

    if entry == "memit":
        export(tmp_path, tmp_path / "model")
        again = type(run.entrant.model).from_pretrained(tmp_path / "model")
        assert fingerprint((name, again.get_parameter(name)) for name in run.weights) == journal.fingerprint(6)


def test_a_journal_is_no_run_to_go_on_with(tmp_path: Path, capsys) -> None:
    """What `sp.journal` writes has no settings."""
    told = {"format": 1, "entry": "memit", "method": {"alg_name": "MEMIT", "hparams": {}}, "model": {"weights": "0"}}
    write_json(tmp_path / "manifest.json", told)
    assert main(["run", "--resume", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert 'got "a journal of an editor\'s edits"' in said and "sphere undo and sphere export take this one." in said


def test_a_finished_run_is_left_as_it_is_and_not_begun_again(hparams: Path, tmp_path: Path, capsys, caplog) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit+sphere"))
    out = tmp_path / "out"
    assert main(["run", str(yaml), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("MEMIT + SPHERE") and "12 edits: efficacy " in said and f"sphere report {out}" in said
    before = files(out)
    assert main(["run", "--resume", str(out)]) == 0
    assert files(out) == before
    assert main(["run", str(yaml), "--out", str(out)]) == 1
    assert f"--out: got '{out}', expected a folder without a run. Continue it with --resume" in capsys.readouterr().err
    assert main(["run", str(yaml), "--out", str(out), "--compare", "memit,rect"]) == 1
    assert "Continue it with --resume" in capsys.readouterr().err
    assert main(["run", "--resume", str(out), "--edits", "20"]) == 1
    assert "--resume: got '--edits', expected nothing but --jobs" in capsys.readouterr().err
    for flag in ("--order", "--seed", "--fluency"):
        assert main(["run", "--resume", str(out), flag, "0"]) == 1
        assert f"--resume: got '{flag}', expected nothing but --jobs" in capsys.readouterr().err
    assert main(["run", "--resume", str(tmp_path / "nowhere")]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err
    assert files(out) == before


def test_flags_that_would_do_nothing_are_refused(hparams: Path, tmp_path: Path, capsys) -> None:
    yaml, out = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit")), tmp_path / "out"
    for flags, told in (
        (("--scale", "0.5"), "--scale: got 0.5, expected a preset to scale"),
        (("--without-guard",), "--without-guard: got 'a new run', expected a run to go on with, by --resume"),
    ):
        assert main(["run", str(yaml), "--out", str(out), *flags]) == 1
        assert told in capsys.readouterr().err
    assert not out.exists()


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sphere_plugin.journaling.undoing.undo", interrupted)
    assert main(["undo", str(tmp_path), "--to", "0"]) == 130
    assert "sphere: interrupted; what was finished is kept" in capsys.readouterr().err


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"\n    {command}" in said for command in COMMANDS)


def test_the_last_line_has_the_scores(hparams: Path, tmp_path: Path, capsys) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit", protocol="exact"))
    assert main(["run", str(yaml), "--out", str(tmp_path / "out")]) == 0
    point = read_json(tmp_path / "out" / "checkpoints" / "000012.json")["scores"]
    known = [one for one in point["efficacy_exact"] if one is not None]
    expected = f"12 edits: efficacy {100 * sum(known) / len(known):.1f}, generalization "
    said = capsys.readouterr().out
    assert expected in said and f"perplexity {math.exp(point['nll']):.4g}\n" in said


def test_a_yaml_of_easyedits_method_serves_its_entry(hparams: Path) -> None:
    yaml = hparams.parents[1] / "ROME" / "pico.yaml"
    assert hparams_of("rome+sphere", yaml, None, {}).alg_name == "ROME"
    with pytest.raises(SphereError, match="is no FT YAML, so that of the same name is looked for there"):
        hparams_of("ft", yaml.with_name("other.yaml"), None, {})


def test_a_tilde_of_nobody_is_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["undo", "~nobody-of-that-name/run", "--to", "0"]) == 1
    assert "sphere: ~nobody-of-that-name/run: got 'no journal'" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "what"), [("text", "the held-out text"), ("mom2_dataset", "the text of the key")])
def test_a_run_does_not_go_on_with_other_texts(key: str, what: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Water boils at 100 degrees.\nLeo Tolstoy wrote novels.\n" * 20)
    hparams = place(tmp_path / "place", mom2_dataset=str(corpus))
    text = hparams.parents[2] / "text.txt"
    start(settings(hparams, "memit", checkpoints=[], edits=2, text=text), tmp_path / "out")
    resume(tmp_path / "out")
    changed = text if key == "text" else corpus
    changed.write_text(changed.read_text() + "One more line here.\n")
    with pytest.raises(CacheError, match=f"{what}.*as in the manifest"):
        resume(tmp_path / "out")


def test_an_order_and_a_sample_are_what_their_seeds_say(hparams: Path, tmp_path: Path) -> None:
    runs, changes = {}, {"one": {}, "order": {"order": 4}, "seed": {"seed": 1}, "all": {"sample": None}}
    for name, more in changes.items():
        start(settings(hparams, "memit", edits=8, checkpoints=[], **more), tmp_path / name)
        runs[name] = scores(tmp_path / name)
    assert prints(tmp_path / "one") != prints(tmp_path / "order")
    assert prints(tmp_path / "one") == prints(tmp_path / "seed"), "the seed of a run only draws what is scored"
    assert runs["one"][8]["scored"] != runs["seed"][8]["scored"]
    assert runs["all"][8]["scored"] == list(range(8))
    chosen = runs["one"][8]["scored"]
    kept = runs["all"][8]["scores"]["efficacy"]
    assert runs["one"][8]["scores"]["efficacy"] == [kept[place] for place in chosen]


def test_a_last_batch_that_is_not_full(hparams: Path, tmp_path: Path) -> None:
    start(settings(hparams, "memit", edits=5, checkpoints=[4]), tmp_path)
    assert [len(Journal.open(tmp_path / "journal").record(n)["facts"]) for n in (1, 2, 3)] == [2, 2, 1]
    assert list(scores(tmp_path)) == [0, 4, 5]


WRONG = {
    "entries": ("memit,nothing", r"entry: got 'nothing', expected one of memit, .*\+random"),
    "entries ": ("memit,memit", r"entries: got 'memit,memit', expected names of entries, each once"),
    "entries  ": ([1], r"entries: got \[1\], expected names of entries"),
    "colour": ("red", r"run: got 'colour', expected a known setting\. Settings are entries, hparams"),
    "edits": (100000, r"data: got '\d+ usable records in facts.json', expected 'at least 100000'|at least 100000"),
    "edits ": ("many", r"edits: got 'many', expected a whole number of at least 1"),
    "batch_size": (0, r"batch_size: got 0, expected a whole number of at least 1"),
    "checkpoints": ([3], r"checkpoints: got 3, expected multiples of batch_size 2 up to 12"),
    "checkpoints ": ("four", r"checkpoints: got 'four', expected numbers with commas"),
    "checkpoints  ": ([4.5], r"checkpoints: got \[4.5\], expected numbers"),
    "guard": ({"energy": -1}, r"guard.energy: got -1, expected a number above 0"),
    "guard ": ({"action": "stop"}, r"guard: got 'no limit', expected energy, retention or both"),
    "guard  ": ({"energy": 1, "action": "cry"}, r"guard.action: got 'cry', expected stop or rollback or warn"),
    "guard   ": ({"energie": 1}, r"guard: got 'energie', expected energy, retention or action"),
    "guard    ": (True, r"guard: got True, expected energy, retention, action"),
    "data": ("nowhere.json", r"data: got '.*nowhere.json', expected a file that can be read"),
    "text": ("nowhere.txt", r"--text: got '.*nowhere.txt', expected a text file"),
    "hparams": ("nowhere.yaml", r"hparams: got '.*nowhere.yaml', expected a file that can be read"),
    "hparams ": (5, r"hparams: got 5, expected the path of a file"),
    "protocol": ("loose", r"protocol: got 'loose', expected tokens or exact"),
    "share_targets": ("yes", r"share_targets: got 'yes', expected true or false"),
    "sample": (0, r"sample: got 0, expected a whole number of at least 1"),
    "settings": ({"rome": {}}, r"settings: got 'rome', expected all, or one of the entries\. Entries are memit"),
    "settings ": ({"memit": 3}, r"settings.memit: got 3, expected keys and values"),
    "settings  ": ({"all": {"v_lrr": 1}}, r"settings: got 'v_lrr', expected a key of the YAML"),
    "settings   ": ({"all": {"v_lr": -1}}, r"v_lr: got -1, expected a number above 0"),
    "settings    ": ({"memit": {"alpha": 0.5, "base_method": "AlphaEdit"}}, r"settings of memit: got 'base_method'"),
}


@pytest.mark.parametrize(("key", "value", "told"), [(key.strip(), *one) for key, one in WRONG.items()])
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    key: str, value: object, told: str, hparams: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(crew.Crew, "_open", lambda *_: pytest.fail("a model was loaded"))
    yaml = write_yaml(tmp_path / "run.yaml", {**mapping(hparams, "memit"), key: value})
    assert main(["run", str(yaml), "--out", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(told, said), said
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(hparams: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(crew.Crew, "_open", lambda *_: pytest.fail("a model was loaded"))
    for key in ("entries", "edits"):
        yaml = write_yaml(tmp_path / "run.yaml", {**mapping(hparams, "memit"), key: None})
        assert main(["run", str(yaml), "--out", str(tmp_path / "out")]) == 1
        assert f"run: got 'no {key}', expected a value for {key}" in capsys.readouterr().err
    yaml = write_yaml(tmp_path / "run.yaml", mapping(hparams, "memit"))
    assert main(["run", str(yaml)]) == 1
    assert "--out: got 'nothing', expected a folder for the run" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("entries: [memit")
    for bad, expected in (("bad.yaml", "a YAML file that can be read"), ("no.yaml", "a YAML file that can be read")):
        assert main(["run", str(tmp_path / bad), "--out", str(tmp_path / "out")]) == 1
        assert expected in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("- memit")
    assert main(["run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert "expected a YAML mapping of settings" in capsys.readouterr().err
    other = place(tmp_path / "other").rename(tmp_path / "other" / "hparams" / "SPHERE" / "another.yaml")
    with pytest.raises(SphereError, match=r"expected EasyEdit's YAML of FT for this model"):
        runner.check(settings(other, "ft"))
    assert not (tmp_path / "out").exists()


# ---- is it still the run that was begun? ----


@pytest.fixture
def begun(hparams: Path, tmp_path: Path) -> Path:
    facts = [
        {"prompt": one.prompt, "subject": one.subject, "target_new": one.target_new} for one in read_records(limit=4)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    here = place(tmp_path / "place")
    told = settings(here, "memit", edits=4, checkpoints=[], data=str(tmp_path / "facts.json"), order=None)
    start(told, tmp_path / "run")
    return tmp_path


def test_another_data_file_is_refused(begun: Path) -> None:
    facts = json.loads((begun / "facts.json").read_text())
    (begun / "facts.json").write_text(json.dumps([*facts, facts[0]]))
    with pytest.raises(CacheError, match=r"the file of facts: got .*as in the manifest\. Continue with what the run"):
        resume(begun / "run")


def test_other_base_weights_are_refused(begun: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = begun / "place" / "pico-llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CacheError, match=r"the model's weights before any edit: got .*as in the manifest"):
        resume(begun / "run")


def test_other_settings_of_the_method_are_refused(begun: Path) -> None:
    path = begun / "place" / "hparams" / "SPHERE" / "pico.yaml"
    path.write_text(path.read_text().replace("v_lr: 0.5", "v_lr: 0.4"))
    with pytest.raises(CacheError, match=r"v_lr: got 0.4, expected 0.5, as in the manifest\. Put the YAML back"):
        resume(begun / "run")


def test_other_threads_are_told(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.WARNING, "sphere_plugin"):
            resume(begun / "run")
    finally:
        torch.set_num_threads(1)
    assert "the run began with threads 1 and goes on with 2: its last digits may differ" in caplog.text


def test_a_run_goes_on_from_any_working_directory(hparams: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(hparams.parents[2])
    yaml = write_yaml(tmp_path / "run.yaml", {**mapping(hparams, "memit", edits=2, checkpoints=[]), "hparams": None})
    command = ["run", str(yaml), "--hparams", "hparams/SPHERE/pico.yaml", "--model", "pico-llama"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path / "out")
    assert main(["run", "--resume", "out"]) == 0
    assert files(tmp_path / "out") == before


def test_a_manifest_that_is_none(begun: Path) -> None:
    (begun / "run" / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(CacheError, match="got 7, expected a manifest of format 1"):
        resume(begun / "run")
