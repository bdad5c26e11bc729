"""Run folders: what is read, and what is said about what is missing or damaged."""

import json
import math

import pytest
from report_runs import checkpoint, manifest, write_run, write_study

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.report.read import find_runs, read_run, read_runs
from sphere_plugin.report.studies import studies_of


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs") / "comparison")


def test_reads_what_the_contract_says(study):
    run = read_run(study / "memit+sphere")
    assert (run.entry, run.label, run.order, run.share_targets) == ("memit+sphere", "MEMIT + SPHERE", None, False)
    assert [one.edits for one in run.checkpoints] == [0, 20, 40, 60, 80]
    assert [batch.edits for batch in run.batches] == list(range(10, 90, 10))
    assert len(run.batches[0].records) == 10
    stored = json.loads((study / "memit+sphere/checkpoints/000040.json").read_text())
    assert list(run.checkpoints[2].scores["efficacy_exact"]) == stored["scores"]["efficacy_exact"]
    assert run.checkpoints[2].nll == stored["scores"]["nll"]


def test_finds_runs_at_any_depth_and_not_twice(study):
    assert [path.name for path in find_runs(study.parent)] == ["memit", "memit+sphere"]
    assert len(read_runs([study, study.parent, study / "memit"])) == 2


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"manifest\.json.*sphere run"):
        read_runs([tmp_path])


def test_missing_pieces_are_empty(tmp_path):
    run = read_run(write_run(tmp_path, manifest("memit")))
    assert run.checkpoints == run.batches == ()


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("manifest.json", {"format": 2}, "format"),
        ("manifest.json", {"entry": None}, "entry"),
        ("manifest.json", {"model": "pico"}, "model"),
        ("manifest.json", {"edits": "many"}, "edits"),
        ("manifest.json", {"data": {"order": "three"}}, "data.order"),
        ("checkpoints/000010.json", {"edits": 1.5}, "edits"),
        ("checkpoints/000010.json", {"scored": [0, "x"]}, "scored"),
        ("checkpoints/000010.json", {"scores": {"efficacy": [1.0]}}, "scores.efficacy"),
        ("checkpoints/000010.json", {"scores": {"efficacy": [1.0, "no"]}}, "scores.efficacy"),
        ("checkpoints/000010.json", {"scores": {"nll": [3.0]}}, "scores.nll"),
        ("checkpoints/000010.json", {"energy": {"w": 3.0}}, "w"),
        ("checkpoints/000010.json", {"cases": ["text"]}, "cases"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, change, named):
    write_run(tmp_path, manifest("memit"), [checkpoint(10, {"efficacy": [1.0, 0.0]})])
    path = tmp_path / file
    write_json(path, read_json(path) | change)
    with pytest.raises(CacheError) as caught:
        read_run(tmp_path)
    assert str(path) in caught.value.culprit
    assert named in caught.value.culprit


def test_a_truncated_file_is_named(tmp_path):
    write_run(tmp_path, manifest("memit"), [checkpoint(10, {"efficacy": [1.0]})])
    path = tmp_path / "checkpoints" / "000010.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(CacheError, match="000010.json"):
        read_run(tmp_path)


def test_numbers_that_are_not_finite_count_as_not_scored(tmp_path):
    one = checkpoint(10, {"efficacy": [1.0, math.nan, None]}, nll=math.inf)
    read = read_run(write_run(tmp_path, manifest("memit"), [one])).checkpoints[0]
    assert read.scores["efficacy"] == (1.0, None, None)
    assert read.nll is None


def test_orders_of_one_entry_come_together_and_repeats_stay_apart(tmp_path):
    for name, order in (("a", 1), ("b", 2), ("c", 2)):
        write_run(tmp_path / name / "memit", manifest("memit", order=order), [checkpoint(10, {"efficacy": [1.0]})])
    (study,) = studies_of(read_runs([tmp_path]))
    assert [[run.order for run in entry.runs] for entry in study.entries] == [[1, 2], [2]]
    assert [entry.label for entry in study.entries] == ["MEMIT (a/memit)", "MEMIT (c/memit)"]


def test_what_cannot_be_compared_is_kept_apart(tmp_path):
    write_run(tmp_path / "a", manifest("memit"))
    write_run(tmp_path / "b", manifest("memit", edits=100))
    write_run(tmp_path / "c", manifest("memit", protocol={"efficacy": "success"}))
    assert len(studies_of(read_runs([tmp_path]))) == 3


@pytest.mark.parametrize(
    ("change", "studies"),
    [
        ({"settings": {"fluency": 0}}, 1),  # what older manifests, without the key, mean
        ({"settings": {"fluency": 40}}, 2),
        ({"text": "0" * 64, "settings": {"text": "/here"}}, 2),  # another text
        ({"text": "0" * 64}, 1),  # the text of that path, whose digest older manifests lack
        ({"seed": 1}, 1),
        ({"seed": 1, "sample": 10}, 2),
    ],
)
def test_runs_that_were_asked_other_things_are_kept_apart(tmp_path, change, studies):
    sample = {"sample": change["sample"]} if "sample" in change else {}
    write_run(tmp_path / "a", manifest("memit", **sample))
    write_run(tmp_path / "b", manifest("memit") | change)
    assert len(studies_of(read_runs([tmp_path]))) == studies


def test_held_out_texts_are_told_apart_by_what_is_in_them(tmp_path):
    for name, text in (("a", "1" * 64), ("b", "1" * 64), ("c", "2" * 64)):
        write_run(tmp_path / name, manifest("memit", text=text, settings={"text": f"/{name}/text.txt"}))
    assert [len(study.entries) for study in studies_of(read_runs([tmp_path]))] == [2, 1]


def test_repeats_are_paired_within_their_comparison_and_have_labels_of_their_own(tmp_path):
    for name in ("a", "b"):
        for entry in ("memit", "memit+sphere"):
            write_run(tmp_path / name / "cmp" / entry, manifest(entry), [checkpoint(10, {"efficacy": [1.0]})])
    (study,) = studies_of(read_runs([tmp_path]))
    labels = [entry.label for entry in study.entries]
    assert sorted(labels) == [
        "MEMIT (a/cmp/memit)",
        "MEMIT (b/cmp/memit)",
        *("MEMIT + SPHERE (a/cmp/memit+sphere)", "MEMIT + SPHERE (b/cmp/memit+sphere)"),
    ]
    pairs = [(base.label, entry.label) for base, entry in study.pairs()]
    assert len(pairs) == 2 and all(base[7:12] == entry[16:21] for base, entry in pairs)


def test_seeds_of_one_comparison_are_paired(tmp_path):
    for seed in (0, 1):
        for entry in ("memit", "memit+sphere"):
            write_run(tmp_path / f"{entry}{seed}", manifest(entry, seed=seed), [checkpoint(10, {"efficacy": [1.0]})])
    (study,) = studies_of(read_runs([tmp_path]))
    assert all(base.runs[0].manifest["seed"] == entry.runs[0].manifest["seed"] for base, entry in study.pairs())


def test_other_settings_are_another_entry(tmp_path):
    for name, eta in (("a", 0.5), ("b", 0.9)):
        told = manifest("memit+sphere", order=None, method={"alg_name": "MEMIT", "hparams": {"eta": eta}})
        write_run(tmp_path / name, told)
    (study,) = studies_of(read_runs([tmp_path]))
    assert len(study.entries) == 2
    assert len({entry.label for entry in study.entries}) == 2


def test_the_moment_is_the_last_one_all_have(tmp_path):
    for name, moments in (("memit", (0, 10, 20)), ("rect", (0, 10)), ("prune", (0,))):
        points = [checkpoint(edits, {"efficacy": [1.0, 0.0]}) for edits in moments]
        write_run(tmp_path / name, manifest(name), points)
    (study,) = studies_of(read_runs([tmp_path]))
    assert study.moment == 10
    assert "MEMIT went further" in study.remark
    assert studies_of(read_runs([tmp_path]), at=20)[0].moment == 20
    with pytest.raises(ConfigError, match="--at"):
        studies_of(read_runs([tmp_path]), at=15)
