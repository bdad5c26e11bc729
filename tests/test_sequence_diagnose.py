"""`sphere diagnose` on runs of pico models, against what can be computed from their journals with plain loops."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest
import torch
from conftest import pico_config
from pico_runs import COLLAPSING, facts, files, place, settings

from sphere_plugin.cli import main
from sphere_plugin.data import held_out, read_records
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.evaluation.diagnoses import read_diagnosis
from sphere_plugin.files import read_json, write_json
from sphere_plugin.geometry import PrincipalSpace, delta_he, hyperspherical_energy
from sphere_plugin.geometry.interference import lengths
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.revisit import Revisited
from sphere_plugin.journaling.undoing import undo
from sphere_plugin.report.page import Options as ReportOptions
from sphere_plugin.report.page import write_report
from sphere_plugin.sequence.diagnose import Diagnosis, Options, table
from sphere_plugin.sequence.finished import runs_in
from sphere_plugin.sequence.protected import edited, protected
from sphere_plugin.sequence.runner import resume, start

ENTRIES = ("memit", "memit+sphere", "alphaedit", "rect", "prune", "ft", "rome")
FEW = Options(keys=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two batches for each entry, all diagnosed."""
    folder = tmp_path_factory.mktemp("diagnose")
    hparams = place(folder)
    for entry in ENTRIES:
        start(settings(hparams, entry, edits=4, checkpoints=[]), folder / "runs" / entry)
    for one in runs_in(folder / "runs"):
        Diagnosis(one, FEW).go()
    return folder / "runs"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run of MEMIT."""
    return shutil.copytree(whole / "memit", tmp_path / "memit")


def diagnosis(folder, edits):
    return read_diagnosis(folder / "diagnostics" / f"{edits:06d}.json")


def states(folder, number, name):
    journal = Journal.open(folder / "journal")
    return [journal.weights_after(n)[name].double() for n in (0, number - 1, number)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_diagnosed_after_every_batch(whole, entry):
    journal = Journal.open(whole / entry / "journal")
    for number in (1, 2):
        told = diagnosis(whole / entry, 2 * number)
        assert (told["batch"], told["edits"], told["after"]) == (number, 2 * number, journal.fingerprint(number))
        assert [layer["name"] for layer in told["layers"]] == list(journal.names)
        for layer in told["layers"]:
            assert layer["factors"] == ("journal" if layer["name"] in journal.factors(number) else "svd")
            assert set(layer["inputs"]) == {"text", "neighbours", "edited"}
            assert [layer["inputs"][kind]["keys"] for kind in ("text", "neighbours", "edited")] == [20, 20, 2]
            assert 0 < layer["span"] <= layer["vectors"]
            assert ("projected" in layer) == ("+" not in entry)
            for kind in ("raw", "unit"):
                assert math.isfinite(layer["theorem"]["batch"][kind]["ratio"])
    assert journal.factors(1) or entry in ("rect", "prune", "ft", "rome")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_theorem_is_tested_on_the_weights_of_the_journal(whole, entry):
    layer = diagnosis(whole / entry, 4)["layers"][0]
    unedited, before, after = states(whole / entry, 2, layer["name"])
    for first, told in ((before, layer["theorem"]["batch"]), (unedited, layer["theorem"]["run"])):
        assert told["raw"]["change"] == pytest.approx(delta_he(first, after))
        assert told["raw"]["perturbation"] == pytest.approx(float((after - first).norm() ** 2))
        fall = hyperspherical_energy(first, 2) - hyperspherical_energy(after, 2)
        assert told["unit"]["change"] == pytest.approx(fall, rel=1e-6, abs=1e-6)
        assert told["raw"]["ratio"] == pytest.approx(
            (told["raw"]["change"] / told["raw"]["constant"]) ** 2 / told["raw"]["perturbation"]
        )
        assert "first_order" in told["raw"] and "first_order" not in told["unit"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_interference_is_that_of_the_written_difference(whole, entry):
    seen = Revisited(whole / entry)
    journal = seen.journal
    records = read_records(None, 4, 3)
    text = (whole.parent / "text.txt").read_text()
    keys = protected(seen.model, seen.tokenizer, list(journal.names), text, records, 20, 0)
    layer = diagnosis(whole / entry, 4)["layers"][-1]
    unedited, before, after = states(whole / entry, 2, layer["name"])
    for kind in ("text", "neighbours"):
        inputs, told = keys[kind][layer["name"]].double(), layer["inputs"][kind]
        change = (inputs @ (after - before).T).norm(dim=1)
        assert told["change"]["mean"] == pytest.approx(float(change.mean()), rel=1e-3)
        assert told["square"] == pytest.approx(float(change.square().mean()), rel=1e-3)
        outputs = (inputs @ unedited.T).norm(dim=1)
        assert told["relative"] == pytest.approx(float((change / outputs).mean()), rel=1e-3)
        drift = (inputs @ (after - unedited).T).norm(dim=1)
        assert told["drift_relative"] == pytest.approx(float((drift / outputs).mean()), rel=1e-3)
        assert told["bound"]["most"] <= 1 + 1e-9
        assert told["spectral_bound"]["most"] <= 1 + 1e-6  # directions that rounding made are left out of P
        assert 0 <= told["l_kp_share"] <= 1 + 1e-9
        assert told["l_kp"] == pytest.approx(told["l_kp_share"] * float(inputs.square().sum()))


def test_vectors_are_those_of_the_journal_or_of_the_decomposition(whole):
    layer = diagnosis(whole / "memit", 4)["layers"][0]
    stored = Journal.open(whole / "memit" / "journal").factors(2)[layer["name"]]
    for side in ("left", "right"):
        norms = lengths(getattr(stored, side))
        assert layer[side]["mean"] == pytest.approx(float(norms.mean()))
        assert (layer[side]["max"], layer[side]["min"]) == (float(norms.max()), float(norms.min()))
    layer = diagnosis(whole / "ft", 4)["layers"][0]
    _, before, after = states(whole / "ft", 2, layer["name"])
    assert (
        layer["right"]["max"]
        == pytest.approx(layer["spectral"])
        == pytest.approx(float(torch.linalg.svdvals(after - before)[0]))
    )
    assert layer["left"]["mean"] == pytest.approx(1.0)
    assert layer["inputs"]["text"]["bound"]["reached"] == pytest.approx(1.0)


def test_the_rank_of_rome_is_its_number_of_facts(whole):
    assert [diagnosis(whole / "rome", edits)["layers"][0]["vectors"] for edits in (2, 4)] == [2, 2]


def test_rows_are_taken_as_they_are_where_the_run_took_them_so(whole, tmp_path):
    folder = shutil.copytree(whole / "memit", tmp_path / "memit")
    told = read_json(folder / "manifest.json")
    told["method"]["hparams"]["row_normalize"] = False
    write_json(folder / "manifest.json", told)
    (found,) = Diagnosis(folder, Options(at=(4,), keys=20)).go()
    before = Journal.open(folder / "journal").weights_after(1)
    for layer in found["layers"]:
        assert layer["projected"]["rank"] == PrincipalSpace.fit(before[layer["name"]].float(), 0.5, False).rank


def test_a_journal_of_an_editor_is_no_run(whole, tmp_path):
    folder = shutil.copytree(whole / "memit", tmp_path / "memit")
    told = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {key: one for key, one in told.items() if key != "settings"})
    with pytest.raises(ConfigError, match='memit: got "a journal of an editor\'s edits"'):
        Diagnosis(folder, FEW)


def test_projected_is_the_same_update_projected(whole):
    layer = diagnosis(whole / "rect", 4)["layers"][0]
    _, before, after = states(whole / "rect", 2, layer["name"])
    projected = PrincipalSpace.fit(before.float(), 0.5).project(after - before, 0.8)
    assert (layer["projected"]["eta"], layer["projected"]["alpha"]) == (0.5, 0.8)
    assert layer["projected"]["norm"] == pytest.approx(float(projected.norm()), rel=1e-4)
    assert layer["projected"]["row_normalize"] is True
    share = 1 - float(projected.norm() / (after - before).norm()) ** 2
    assert layer["projected"]["removed_share"] == pytest.approx(share, abs=1e-4)
    assert diagnosis(whole / "alphaedit", 4)["settings"]["projected"] == {
        "eta": 0.5,
        "alpha": 0.5,
        "row_normalize": True,
    }


def test_null_spaces_are_those_the_run_solved_in(whole):
    spaces = read_json(whole / "alphaedit" / "diagnostics" / "spaces.json")["layers"]
    record = Journal.open(whole / "alphaedit" / "journal").record(1)
    assert [one["name"] for one in spaces] == [layer["name"] for layer in record["layers"]]
    assert [one["null"] for one in spaces] == [layer["null_space"] for layer in record["layers"]]
    assert all(0 < one["null"] < one["width"] == 64 and one["threshold"] == 0.5 for one in spaces)
    assert not (whole / "memit" / "diagnostics" / "spaces.json").exists()


def test_the_journal_tells_right_vectors_and_null_spaces_where_there_are_any(whole):
    for entry, told in (("memit", True), ("memit+sphere", True), ("rect", False)):
        for layer, measured in zip(
            Journal.open(whole / entry / "journal").record(2)["layers"],
            diagnosis(whole / entry, 4)["layers"],
            strict=True,
        ):
            assert layer["null_space"] is None
            expected = pytest.approx(measured["right"]["mean"], rel=1e-5) if told else None
            assert layer["right_norm"] == expected


def test_edited_inputs_are_the_keys_of_the_bare_prompts_before_the_batch(whole):
    seen = Revisited(whole / "memit")
    seen.go(2)
    names, told = list(seen.journal.names), seen.journal.record(2)["facts"]
    found = edited(seen.model, seen.tokenizer, names, told, "subject_last")
    anatomy, locator = Anatomy.of(seen.model, pico_config("llama")), Locator(seen.tokenizer, "subject_last")
    reader = KeyReader(anatomy, locator, read_requests(told), Contexts.bare(), 8192)
    for layer, name in zip(reader.layers, names, strict=True):
        keys, _ = reader.read(layer)
        torch.testing.assert_close(found[name], keys.T, rtol=1e-4, atol=1e-5)
        update = seen.journal.factors(2)[name]
        layers = {one["name"]: one for one in diagnosis(whole / "memit", 4)["layers"]}
        change = (update.dense() @ keys).norm(dim=0)
        assert layers[name]["inputs"]["edited"]["change"]["max"] == pytest.approx(float(change.max()), rel=1e-4)


# ---- which batches, and what is done again ----


def test_what_is_there_is_kept_and_what_is_missing_is_made_the_same(run):
    before = files(run / "diagnostics")
    (run / "diagnostics" / "000002.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (run / "diagnostics").iterdir()}
    done = []
    told = Diagnosis(run, FEW).go(lambda what, now, total: done.append((now, total)))
    assert done == [(1, 1)]
    assert files(run / "diagnostics") == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert [one["edits"] for one in told] == [2, 4]


def test_nothing_is_loaded_where_nothing_is_due(run, monkeypatch):
    monkeypatch.setattr("sphere_plugin.sequence.diagnose.Revisited", None)
    assert len(Diagnosis(run, FEW).go()) == 2


def test_other_settings_measure_again(run):
    told = Diagnosis(run, Options(at=(4,), keys=5, seed=1)).go()
    assert [one["edits"] for one in told] == [4]
    assert diagnosis(run, 4)["layers"][0]["inputs"]["text"]["keys"] == 5
    assert diagnosis(run, 2)["settings"]["keys"] == 20


def test_a_batch_that_was_undone_and_done_again_is_measured_again(run):
    old = diagnosis(run, 4)
    undo(run, 2)
    assert diagnosis(run / "undone" / "1", 4) == old
    assert [one["edits"] for one in Diagnosis(run, FEW).go()] == [2]
    resume(run)
    assert Diagnosis(run, FEW).go()[1] == old


def test_a_diagnosis_of_other_weights_is_made_anew(run):
    old = diagnosis(run, 4)
    write_json(run / "diagnostics" / "000004.json", old | {"after": "0" * 32})
    assert Diagnosis(run, FEW).go()[1] == old


def test_what_is_asked_for_is_drawn_by_its_seed(whole):
    seen = Revisited(whole / "memit")
    names = list(seen.journal.names)

    def inputs(number, seed):
        return protected(seen.model, seen.tokenizer, names, held_out(), read_records(None, 4), number, seed)

    one, again, other = inputs(10, 0), inputs(10, 0), inputs(10, 1)
    for kind in one:
        assert torch.equal(one[kind][names[0]], again[kind][names[0]])
        assert one[kind][names[0]].shape == (10, 64)
    assert not torch.equal(one["text"][names[0]], other["text"][names[0]])
    prompts = {prompt for record in read_records(None, 4) for prompt in record.neighbours}
    assert inputs(10**6, 0)["neighbours"][names[0]].shape[0] == len(prompts)


def test_records_without_neighbours_have_text_alone(tmp_path):
    data = facts(tmp_path / "facts.json")
    start(settings(place(tmp_path), "memit", edits=2, checkpoints=[], data=str(data)), tmp_path / "run")
    (told,) = Diagnosis(tmp_path / "run", FEW).go()
    assert set(told["layers"][0]["inputs"]) == {"text", "edited"}


def test_a_run_that_collapses_is_told(tmp_path):
    """Where a step is not small, the theorem may break; the numbers say so and stay finite."""
    hparams, data = place(tmp_path, **COLLAPSING), facts(tmp_path / "facts.json")
    start(settings(hparams, "memit", edits=4, checkpoints=[], data=str(data)), tmp_path / "run")
    told = Diagnosis(tmp_path / "run", FEW).go()
    terms = [layer["theorem"]["batch"]["raw"] for one in told for layer in one["layers"]]
    assert max(one["largest_step"] for one in terms) > 1
    assert all(abs(one["first_order"]) <= one["constant"] * math.sqrt(one["perturbation"]) for one in terms)


# ---- the command and its errors ----


def test_the_command_tells_each_run_in_a_line(whole, capsys):
    assert main(["diagnose", str(whole), "--keys", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "batches",
        "broken",
        "reached",
        "C_k",
        "interference",
        "projected",
        "L_kp",
        "projected",
    ]
    told = {line[:28].strip(): line[28:].split() for line in lines[1 : 1 + len(ENTRIES)]}
    assert set(told) == {"MEMIT", "MEMIT + SPHERE", "AlphaEdit", "RECT", "PRUNE", "FT", "ROME"}
    assert told["MEMIT"][:4] == ["2", "0", "of", "4"]
    assert told["MEMIT + SPHERE"][-1] == "-" and told["MEMIT"][-1] != "-"
    assert lines[-1] == f"sphere report {whole}"


def test_the_table_holds_up_without_numbers():
    broken = {"name": "w", "missing": "delta: NaN", "theorem": {"batch": {"raw": {"missing": "NaN"}}}}
    assert table([("X", [{"layers": [broken]}])])[1].split() == ["X", "1", "0", "of", "0", *("-",) * 6]


def test_a_weight_that_broke_is_told_and_the_others_are_measured(run):
    journal = Journal.open(run / "journal")
    weights = journal.weights_after(2)
    first, second = journal.names
    weights[first][0, 0] = math.nan
    weights[second][1] += 0.1
    journal.append({"edits": 6, "facts": journal.record(2)["facts"]}, weights)
    told = Diagnosis(run, FEW).go()[2]["layers"]
    assert "NaN" in told[0]["missing"] and "missing" in told[0]["theorem"]["batch"]["raw"]
    assert told[1]["vectors"] == 1 and told[1]["factors"] == "svd"
    json.loads((run / "diagnostics" / "000006.json").read_text(), parse_constant=pytest.fail)


def test_moments_between_batches_are_refused_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("sphere_plugin.sequence.diagnose.Revisited", None)
    with pytest.raises(ConfigError, match="got 3"):
        Diagnosis(run, Options(at=(3,)))


def test_moments_that_a_run_has_not_come_to_are_told(whole, run, tmp_path, capsys):
    shutil.copytree(whole / "memit+sphere", tmp_path / "memit+sphere")
    undo(run, 2)
    assert main(["diagnose", str(tmp_path), "--keys", "20", "--at", "2,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["MEMIT", "1"] and lines[2].split()[3] == "2"
    assert "MEMIT: 2 edits so far, not [4]" in lines
    assert main(["diagnose", str(tmp_path), "--at", "8"]) == 1
    assert "The longest has 4." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--at", "2;4"], "--at"),
        (["--at", "0"], "--at"),
        (["--keys", "0"], "--keys"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_flags_are_one_sentence(run, flags, says, capsys):
    assert main(["diagnose", str(run), *flags]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_other_facts_are_refused(run, tmp_path):
    with pytest.raises(CacheError, match="as in the manifest"):
        Diagnosis(run, Options(data=facts(tmp_path / "others.json")))


def test_runs_of_one_label_are_told_apart(whole, tmp_path, capsys):
    for one in ("one/memit", "two/memit", "two/rect"):
        shutil.copytree(whole / one[4:], tmp_path / one)
    assert main(["diagnose", str(tmp_path), "--keys", "20", "--at", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line[:28].rstrip() for line in lines[:3]] == ["MEMIT (one/memit)", "MEMIT (two/memit)", "RECT"]
    long = {label: [] for label in ("MEMIT", "MEMIT (memit/eta=0.3,alpha=0.5,order=1)")}
    assert len({len(line) for line in table(list(long.items()))[:3]}) == 1


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no manifest.json"):
        runs_in(tmp_path)


def test_a_report_of_diagnosed_runs_shows_them(whole, tmp_path):
    page = write_report([whole / "memit", whole / "rome"], tmp_path, ReportOptions(neurons=8))
    assert 'id="study1-theorem"' in page.read_text(encoding="utf-8")
    rows = list(csv.DictReader((tmp_path / "study1-diagnoses.csv").read_text().splitlines()))
    assert [(row["entry"], int(row["edits"])) for row in rows] == [("memit", 2)] * 2 + [("memit", 4)] * 2 + [
        ("rome", 2),
        ("rome", 4),
    ]
    told = diagnosis(whole / "memit", 4)["layers"][0]
    assert float(rows[2]["theorem.batch.raw.ratio"]) == told["theorem"]["batch"]["raw"]["ratio"]
    assert float(rows[2]["inputs.text.drift_relative"]) == told["inputs"]["text"]["drift_relative"]
