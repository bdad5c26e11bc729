"""Abilities along a run and after it: when, in which files, not twice, and without disturbing the run."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmark_files import taught, write_benchmarks
from pico import save_pico
from pico_runs import COLLAPSING, files, mapping, place, prints, scores, settings, stopped_and_resumed, write_yaml

from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, RequestError
from sphere_plugin.evaluation.abilities import Suite
from sphere_plugin.evaluation.tallies import path_of, read_tallies, read_tally
from sphere_plugin.files import read_json, write_json
from sphere_plugin.journaling import run_lock
from sphere_plugin.journaling.revisit import Revisited
from sphere_plugin.journaling.undoing import undo
from sphere_plugin.sequence import abilities_command, measured
from sphere_plugin.sequence.abilities import AbilityPlan
from sphere_plugin.sequence.manifest import COMPARISON
from sphere_plugin.sequence.measured import Abilities, AbilitiesAlong
from sphere_plugin.sequence.runner import check, resume, start
from sphere_plugin.sequence.settings import RunSettings

TASKS = ["nq", "rte"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with benchmarks, a model and its YAML."""
    folder = tmp_path_factory.mktemp("abilities")
    write_benchmarks(folder / "data")
    return folder


@pytest.fixture(scope="module")
def hparams(here):
    path = place(here, **COLLAPSING | {"layers": [1, 2], "kl_factor": 0.0625})  # so that edits show
    taught()[0].save_pretrained(here / "pico-llama")
    return path


def block(here, **changes):
    return {"tasks": TASKS, "every": 4, "limit": 3, "data": str(here / "data"), "batch_size": 2, **changes}


def short(here, hparams, entry="memit+sphere", **changes):
    return settings(hparams, entry, edits=6, checkpoints=[4], **{"abilities": block(here), **changes})


@pytest.fixture(scope="module")
def run(here, hparams):
    """A run of six edits, measured on its way."""
    start(short(here, hparams), here / "run")
    return here / "run"


@pytest.fixture
def copied(run, tmp_path):
    """The same run, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


def stored(folder):
    """Edits -> what was measured, without what differs from time to time."""
    found = {edits: content["tasks"] for edits, content in read_tallies(folder).items()}
    return {
        edits: {name: {key: one[key] for key in one if key not in ("seconds", "from")} for name, one in tasks.items()}
        for edits, tasks in found.items()
    }


# ---- when ----


def test_the_papers_schedule() -> None:
    plan = AbilityPlan(tasks=("rte",))
    assert plan.moments(15000, 100) == (0, 1000, 2000, 3000, 4000, 5000, 10000, 15000)
    assert plan.moments(7000, 100) == (0, 1000, 2000, 3000, 4000, 5000, 7000)
    assert plan.moments(5000, 100) == (0, 1000, 2000, 3000, 4000, 5000)
    assert plan.moments(250, 25) == (0, 250)


def test_any_other_schedule() -> None:
    assert AbilityPlan(every=50).moments(120, 10) == (0, 50, 100, 120)
    assert AbilityPlan(every=(30, 10)).moments(40, 10) == (0, 10, 30, 40)
    for every, edits in ((15, 40), ((10, 15), 40), ((50,), 40)):
        with pytest.raises(ConfigError, match="between two batches"):
            AbilityPlan(every=every).moments(edits, 10)


def test_settings_survive_the_manifest(here, hparams) -> None:
    told = short(here, hparams)
    assert RunSettings.from_mapping(json.loads(json.dumps(told.plain()))) == told
    files_alone = block(here, data={"rte": here / "data" / "test-NLI.tsv"}, every=[2, 4], tasks="rte")
    told = short(here, hparams, abilities=files_alone)
    assert told.abilities.data == {"rte": here / "data" / "test-NLI.tsv"}
    assert told.abilities.every == (2, 4)
    assert RunSettings.from_mapping(json.loads(json.dumps(told.plain()))) == told
    assert settings(hparams, "memit").plain()["abilities"] is None


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"tasks": ["gsm9k"]}, "tasks"),
        ({"tasks": []}, "abilities.tasks"),
        ({"tasks": 3}, "tasks"),
        ({"every": 0}, "abilities.every"),
        ({"every": 3}, "abilities.every"),
        ({"every": "often"}, "abilities.every"),
        ({"limit": 0}, "abilities.limit"),
        ({"data": 3}, "data"),
        ({"data": {"mmlu": "file"}}, "data"),
        ({"shots": 3}, "abilities"),
    ],
)
def test_bad_settings_are_refused(here, hparams, change, culprit) -> None:
    with pytest.raises(ConfigError) as caught:
        short(here, hparams, abilities=block(here, **change))
    assert caught.value.culprit == culprit


def test_data_is_looked_at_before_anything_starts(here, hparams, tmp_path) -> None:
    with pytest.raises(ConfigError, match="test-OpenDomainQA.jsonl"):
        check(short(here, hparams, abilities=block(here, data=str(tmp_path))))
    write_benchmarks(tmp_path)
    (tmp_path / "test-NLI.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tperhaps\n")
    with pytest.raises(RequestError, match="perhaps"):
        start(short(here, hparams, abilities=block(here, data=str(tmp_path))), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


# ---- in a run ----


def test_a_run_leaves_a_moment_to_whoever_measures_there(here, hparams, run, tmp_path, monkeypatch, caplog) -> None:
    """What `sphere abilities` measures meanwhile is not lost, and the run does not end for it."""
    folder, told = tmp_path / "run", short(here, hparams)
    with run_lock(folder / "abilities"):
        assert start(told, folder).edits == 6
    assert "not measured: abilities after 4" in caplog.text and "sphere abilities --at 4" in caplog.text
    assert read_tallies(folder) == {} and prints(folder) == prints(run)

    measure = Suite.measure

    def refused(*arguments):
        with pytest.raises(CacheError, match="held by process"), run_lock(folder / "abilities"):
            pass
        return measure(*arguments)

    monkeypatch.setattr(Suite, "measure", refused)
    resume(folder)
    assert stored(folder) == {6: stored(run)[6]}


def test_a_run_is_not_disturbed(here, hparams, run, tmp_path) -> None:
    start(short(here, hparams, abilities=None), tmp_path / "without")
    assert len(prints(run)) == 3
    assert prints(run) == prints(tmp_path / "without")
    assert scores(run) == scores(tmp_path / "without")


def test_every_moment_is_what_the_suite_says_of_its_weights(here, run) -> None:
    assert sorted(stored(run)) == [0, 4, 6]
    assert len({json.dumps(tasks["nq"]) for tasks in stored(run).values()}) > 1  # or the test would show nothing
    seen, suite = Revisited(run), Suite(TASKS, here / "data", 3, batch_size=2)
    for edits, tasks in stored(run).items():
        seen.go(edits)
        assert read_tally(path_of(run, edits))["weights"] == seen.journal.fingerprint_of(seen.weights)
        assert list(tasks) == TASKS
        for name, kept in tasks.items():
            score = suite.measure(name, seen.model, seen.tokenizer)
            assert (kept["value"], kept["stderr"], kept["records"]) == (
                score.value,
                score.stderr,
                list(score.records),
            )
            assert kept["how"] == suite.how(name)
    around = read_tally(path_of(run, 0))
    assert around["device"] == "cpu"
    assert around["threads"] == 1


def test_a_stopped_run_measures_nothing_twice(here, hparams, run, tmp_path, monkeypatch) -> None:
    asked = []
    measure = Suite.measure
    monkeypatch.setattr(Suite, "measure", lambda self, name, *more: asked.append(name) or measure(self, name, *more))
    stopped_and_resumed(short(here, hparams), tmp_path / "run", 2, 3)
    assert asked == TASKS * 3
    assert stored(tmp_path / "run") == stored(run)
    assert scores(tmp_path / "run") == scores(run)


def test_a_run_goes_on_with_the_same_records_only(here, hparams, copied, tmp_path) -> None:
    data = write_benchmarks(tmp_path / "data")
    told = short(here, hparams, abilities=block(here, data=str(data)))
    AbilitiesAlong(told, copied)
    (data / "test-NLI.tsv").write_text((data / "test-NLI.tsv").read_text().replace("apples", "pears"))
    with pytest.raises(ConfigError, match=r"sha256 of rte.*move the folder abilities away"):
        AbilitiesAlong(told, copied)


def test_undo_takes_what_was_measured_later_with_it(copied) -> None:
    undone = undo(copied, 4)
    assert sorted(stored(copied)) == [0, 4]
    assert sorted(stored(undone.kept)) == [6]


# ---- after a run ----


def abilities(*argv):
    return main(["abilities", *map(str, argv)])


def flags(here, *more):
    return ("--tasks", "nq,rte", "--limit", 3, "--data", here / "data", *more)


def test_a_finished_run_is_measured_where_it_is_not_yet(here, run, copied, capsys, monkeypatch) -> None:
    for edits in (0, 4, 6):
        path_of(copied, edits).unlink()
    assert abilities(copied, *flags(here, "--at", "0,2,6")) == 0
    found = stored(copied)
    assert sorted(found) == [0, 2, 6]
    assert {edits: found[edits] for edits in (0, 6)} == {edits: stored(run)[edits] for edits in (0, 6)}
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert (first, second.split()) == ("MEMIT + SPHERE", ["edits", "nq", "rte"])
    assert [line.split()[0] for line in lines[:3]] == ["0", "2", "6"]
    value, error = (100 * found[2]["rte"][key] for key in ("value", "stderr"))
    assert lines[1].endswith(f"{value:.1f} ± {error:.1f}")
    assert "rte: sphere_rte 1.0 of lm_eval 0.4.13, 3 records, test-NLI.tsv" in lines
    # Again: nothing is loaded, and nothing changes.
    before = files(copied)
    monkeypatch.setattr(abilities_command, "Revisited", None)
    assert abilities(copied, *flags(here, "--at", "0,2,6")) == 0
    assert files(copied) == before


def test_a_task_can_be_added_and_the_text(here, copied) -> None:
    text = here / "text.txt"
    assert abilities(copied, "--tasks", "boolq", "--data", here / "data", "--text", text, "--at", "0,4") == 0
    assert len({stored(copied)[edits]["perplexity"]["value"] for edits in (0, 4)}) == 2
    tasks = read_tally(path_of(copied, 4))["tasks"]
    assert sorted(tasks) == ["boolq", "nq", "perplexity", "rte"]
    assert tasks["boolq"]["how"]["records"] == 6
    assert tasks["perplexity"]["value"] > 1
    assert tasks["perplexity"]["how"]["file"] == "text.txt"


def test_the_default_moments_are_the_checkpoints(here, copied) -> None:
    shutil.rmtree(copied / "abilities")
    assert abilities(copied, "--tasks", "rte", "--data", f"rte={here / 'data' / 'test-NLI.tsv'}") == 0
    assert sorted(stored(copied)) == [0, 4, 6]


def test_other_settings_are_refused_before_anything_is_measured(here, copied, capsys) -> None:
    before = files(copied)
    assert abilities(copied, "--tasks", "boolq,rte", "--data", here / "data", "--limit", 2) == 1
    said = capsys.readouterr().err
    assert "records of rte: got 2, expected 3, with which it was measured" in said
    assert files(copied) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--at", "5"), "5"),
        (("--at", "some"), "--at"),
        (("--device", "elsewhere"), "--device"),
        (("--out", "somewhere"), "--out"),
        (("--tasks", ""), "--tasks"),
        (("--batch-size", 0), "batch_size"),
        (("--data", "nowhere"), "--data"),
        (("--data", "mmlu=file"), "data"),
    ],
)
def test_arguments_that_cannot_be(here, copied, capsys, argv, said) -> None:
    given = [*flags(here)[:4], *argv] if "--data" in argv else [*flags(here), *argv]
    assert abilities(copied, *given) == 1
    assert said in capsys.readouterr().err


def test_damage_is_named(here, copied, capsys) -> None:
    path = path_of(copied, 4)
    content = read_json(path)
    write_json(path, content | {"weights": "0" * 32})
    assert abilities(copied, *flags(here)) == 1
    assert "edits that were taken back" in capsys.readouterr().err
    write_json(path, content | {"format": 2})
    with pytest.raises(CacheError, match="format 1"):
        read_tally(path)
    path.write_text("{")
    with pytest.raises(CacheError, match="000004.json"):
        read_tally(path)


def test_a_kill_between_two_tasks_loses_one_at_most(here, copied, monkeypatch) -> None:
    shutil.rmtree(copied / "abilities")
    measure = Suite.measure

    def dies(self, name, *more):
        if name == "rte":
            raise KeyboardInterrupt
        return measure(self, name, *more)

    monkeypatch.setattr(Suite, "measure", dies)
    assert abilities(copied, *flags(here, "--at", "4")) == 130
    assert list(stored(copied)[4]) == ["nq"]
    asked = []
    monkeypatch.setattr(Suite, "measure", lambda self, name, *more: asked.append(name) or measure(self, name, *more))
    assert abilities(copied, *flags(here, "--at", "4")) == 0
    assert asked == ["rte"]


# ---- a comparison, a model ----


def test_a_comparison_measures_the_unedited_model_once(here, hparams, tmp_path, capsys) -> None:
    told = settings(hparams, "memit,memit+sphere", edits=4, checkpoints=[], sample=2, abilities=block(here))
    write_json(tmp_path / "both" / COMPARISON, told.plain())
    for entry in told.entries:  # as `compare` does, but here
        start(told.for_entry(entry), tmp_path / "both" / entry)
    first, second = (read_tally(path_of(tmp_path / "both" / one, 0)) for one in ("memit", "memit+sphere"))
    assert [one.get("from") for one in first["tasks"].values()] == [None, None]
    assert [one.get("from") for one in second["tasks"].values()] == ["memit", "memit"]
    assert second["tasks"]["rte"]["records"] == first["tasks"]["rte"]["records"]
    # And afterwards, with another task, in all entries in turn.
    assert abilities(tmp_path / "both", "--tasks", "boolq", "--data", here / "data") == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("MEMIT")] == ["MEMIT", "MEMIT + SPHERE"]
    taken = read_tally(path_of(tmp_path / "both" / "memit+sphere", 0))["tasks"]
    assert {name: one.get("from") for name, one in taken.items()} == dict.fromkeys(("nq", "rte", "boolq"), "memit")


def test_runs_that_are_no_comparison_are_measured_each(here, run, tmp_path, capsys) -> None:
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / name)
    shutil.rmtree(tmp_path / "two" / "abilities")
    assert abilities(tmp_path / "two", *flags(here, "--at", "0")) == 0
    assert not any("from" in one for one in read_tally(path_of(tmp_path / "two", 0))["tasks"].values())
    capsys.readouterr()
    assert abilities(tmp_path, *flags(here, "--at", "0")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MEMIT")]
    assert lines == [f"MEMIT + SPHERE ({tmp_path.name}/{name})" for name in ("one", "two")]


def test_a_model(here, tmp_path, capsys, monkeypatch) -> None:
    folder = save_pico("llama", tmp_path / "model")
    assert abilities(folder, *flags(here)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [str(folder), said[1]]
    assert said[2].split()[0] == "0"
    assert abilities(folder, *flags(here, "--out", tmp_path / "out")) == 0
    assert capsys.readouterr().out.splitlines() == said
    kept = files(tmp_path / "out")
    assert list(kept) == ["abilities/000000.json"]
    monkeypatch.setattr(measured.Suite, "measure", None)  # nothing is measured again
    assert abilities(folder, *flags(here, "--out", tmp_path / "out")) == 0
    assert abilities(folder, *flags(here, "--at", "0")) == 1
    other = save_pico("llama", tmp_path / "other", seed=1)
    assert abilities(other, *flags(here, "--out", tmp_path / "out")) == 1
    assert files(tmp_path / "out") == kept


def test_a_model_in_the_folder_of_a_comparison(here, tmp_path, capsys) -> None:
    write_json(tmp_path / "both" / COMPARISON, {})
    out = tmp_path / "both" / "unedited"
    assert abilities(save_pico("llama", tmp_path / "model"), *flags(here, "--out", out)) == 0, capsys.readouterr().err
    assert list(files(out)) == ["abilities/000000.json"]


def test_the_command_of_a_run_takes_the_block(here, hparams, tmp_path, capsys) -> None:
    told = mapping(hparams, "memit", edits=2, checkpoints=[], sample=1, abilities=block(here, tasks="rte", every=2))
    path = write_yaml(tmp_path / "run.yaml", told)
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0
    assert sorted(stored(tmp_path / "run")) == [0, 2]
    capsys.readouterr()
    write_yaml(path, {**told, "abilities": {"tasks": "rte"}})
    assert main(["run", str(path), "--out", str(tmp_path / "again")]) == 1
    assert "test-NLI.tsv" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_what_a_file_says_of_a_score() -> None:
    assert measured.told({"metric": "acc", "value": 0.455, "stderr": 0.0321}) == "45.5 ± 3.2"
    assert measured.told({"metric": "mcc", "value": -0.02, "stderr": None}) == "-2.0"
    assert measured.told({"metric": "perplexity", "value": 23.4567, "stderr": None}) == "23.46"
    assert measured.told({"metric": "perplexity", "value": None, "stderr": None}) == "not finite"


def test_nothing_is_kept_without_a_folder(here) -> None:
    suite = Suite(["rte"], here / "data", 1)
    assert Abilities(None, suite).missing(0, "anything") == ["rte"]
