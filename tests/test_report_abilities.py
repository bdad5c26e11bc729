"""General abilities in the report: what is read, drawn, tested, and said about what is missing."""

from __future__ import annotations

import csv
import io
import json

import pytest
from matplotlib.figure import Figure
from report_runs import checkpoint, manifest, write_run, write_study
from scipy import stats

from sphere_plugin.errors import CacheError
from sphere_plugin.evaluation.abilities import Suite
from sphere_plugin.files import write_json
from sphere_plugin.report import abilities
from sphere_plugin.report.page import write_report
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of
from sphere_plugin.report.style import Pen
from sphere_plugin.sequence.measured import Abilities

HOW = {"task": "sphere_rte", "version": "1.0", "records": 4}


def kept(*records, how=HOW, metric="acc", value=None):
    mean = sum(records) / len(records) if value is None else value
    return {"how": how, "metric": metric, "value": mean, "stderr": 0.25, "records": list(records), "cut": 0}


def put(folder, edits, **tasks):
    content = {"format": 1, "edits": edits, "weights": "0" * 32, "tasks": tasks}
    write_json(folder / "abilities" / f"{edits:06d}.json", content)


def study_of(folder):
    (study,) = studies_of(read_runs([folder]))
    return study


@pytest.fixture
def pair(tmp_path):
    """MEMIT loses everything in 20 edits, MEMIT + SPHERE a quarter."""
    points = [checkpoint(edits, {"efficacy_exact": [1.0, 0.0]}) for edits in (0, 20)]
    for entry, after in (("memit", (0, 0, 0, 0)), ("memit+sphere", (1, 1, 0, 0))):
        folder = write_run(tmp_path / entry, manifest(entry), points)
        put(folder, 0, rte=kept(1, 1, 1, 0), perplexity=kept(3.0, 2.0, metric="perplexity", value=12.5))
        put(folder, 20, rte=kept(*after), perplexity=kept(9.0, 7.0, metric="perplexity", value=3000.0))
    return tmp_path


def test_the_points_are_those_of_the_files(pair) -> None:
    study = study_of(pair)
    grid = abilities.grid(study, abilities.gather(study))
    head, *rows = csv.reader(io.StringIO(grid.csv()))
    assert head == ["Method", "Edits", "RTE (accuracy, %)", "± RTE", "Perplexity (e^nll)", "± Perplexity"]
    assert [row[:5] for row in rows] == [
        ["MEMIT", "0", "75.0", "25.0", "12.5"],
        ["MEMIT", "20", "0.0", "25.0", "3000.0"],
        ["MEMIT + SPHERE", "0", "75.0", "25.0", "12.5"],
        ["MEMIT + SPHERE", "20", "50.0", "25.0", "3000.0"],
    ]


def test_one_panel_for_each_task_and_a_curve_for_each_entry(pair) -> None:
    study = study_of(pair)
    plate = abilities.plate(study, abilities.gather(study))
    assert [panel.title for panel in plate.panels] == ["RTE (accuracy, %)", "Perplexity (e^nll)"]
    assert plate.missing == ()
    for panel, scale in zip(plate.panels, ("linear", "log"), strict=True):
        pen = Pen(Figure().add_subplot())
        panel.draw(pen)
        lines = [line for line in pen.axis.lines if line.get_linestyle() != "None"]
        assert [list(line.get_xdata()) for line in lines] == [[0, 20], [0, 20]]
        assert pen.axis.get_yscale() == scale
        if panel is plate.panels[0]:
            assert [list(line.get_ydata()) for line in lines] == [[75.0, 0.0], [75.0, 50.0]]
            # ± one standard error, 25 %.
            band = pen.axis.collections[1].get_paths()[0].vertices
            assert {(20.0, 25.0), (20.0, 75.0), (0.0, 50.0), (0.0, 100.0)} <= {tuple(one) for one in band}
            assert ["MEMIT\n0 edits: 75.0 ± 25.0", "MEMIT\n20 edits: 0.0 ± 25.0"] in pen.tips.values()


def test_tests_are_on_the_same_records(pair) -> None:
    study = study_of(pair)
    grid = abilities.tests(study, abilities.gather(study))
    rows = {tuple(field.text for field in line.fields[:3]): line.fields for line in grid.lines}
    assert list(rows) == [
        ("MEMIT", "Unedited", "RTE"),
        ("MEMIT + SPHERE", "Unedited", "RTE"),
        ("MEMIT + SPHERE", "MEMIT", "RTE"),
    ]
    fields = rows["MEMIT", "Unedited", "RTE"]
    assert [field.value for field in fields[3:6]] == [20, 4, -75.0]
    assert fields[8].text == "0 / 3"
    whole = stats.permutation_test(([-1, -1, -1],), sum, permutation_type="samples", n_resamples=9999)
    assert fields[9].value == pytest.approx(whole.pvalue) == 0.25
    assert fields[10].value == pytest.approx(0.75)  # Holm: three tests
    assert rows["MEMIT + SPHERE", "MEMIT", "RTE"][5].value == 50.0


def test_tests_are_at_the_moment_of_the_table(pair) -> None:
    for entry, after in (("memit", (0, 0, 0, 0)), ("memit+sphere", (1, 0, 0, 0))):
        write_json(pair / entry / "checkpoints" / "000040.json", checkpoint(40, {"efficacy_exact": [1.0, 0.0]}))
        put(pair / entry, 40, rte=kept(*after))
    for at, moment in ((None, "40"), (20, "20"), (40, "40")):
        (study,) = studies_of(read_runs([pair]), at)
        _, *rows = csv.reader(io.StringIO(abilities.tests(study, abilities.gather(study)).csv()))
        assert {row[3] for row in rows} == {moment}


def test_several_orders_are_averaged(tmp_path) -> None:
    for order, records in ((1, (1, 0)), (2, (1, 1))):
        folder = write_run(tmp_path / str(order) / "memit", manifest("memit", order=order))
        put(folder, 0, rte=kept(*records))
    study = study_of(tmp_path)
    (task,) = abilities.gather(study).tasks
    assert task.scores[0][0] == abilities.Score(75.0, 25.0, (1.0, 0.5))


def test_orders_that_have_not_come_so_far_leave_no_mean(tmp_path) -> None:
    for order, moments in ((1, (0, 20, 40)), (2, (0, 20))):
        points = [checkpoint(edits, {"efficacy_exact": [1.0, 0.0]}) for edits in moments]
        folder = write_run(tmp_path / str(order) / "memit", manifest("memit", order=order), points)
        for edits in moments:
            put(folder, edits, rte=kept(1, order - 1, 0, 0))
    study = study_of(tmp_path)
    measured = abilities.gather(study)
    assert sorted(measured.tasks[0].scores[0]) == [0, 20]
    assert measured.missing == ("RTE of MEMIT after 40 edits: in 1 of 2 orders only",)


def test_what_is_missing_is_said(pair) -> None:
    other = write_run(pair / "prune", manifest("prune"))
    put(other, 20, rte=kept(1, 0, how={**HOW, "records": 2}), nq=kept(1, 0, metric="exact_match"))
    third = write_run(pair / "rect", manifest("rect"))
    put(third, 20, perplexity={**kept(1, 0, metric="perplexity"), "value": None})
    study = study_of(pair)
    measured = abilities.gather(study)
    assert [task.title for task in measured.tasks] == ["RTE", "Perplexity", "Natural Questions"]
    nobody = [f"Natural Questions of {name}: not measured" for name in ("MEMIT", "MEMIT + SPHERE", "RECT")]
    assert sorted(measured.missing) == sorted(
        ["RTE of PRUNE: other settings", "Perplexity of RECT after 20 edits: not finite", *nobody]
        + ["RTE of RECT: not measured", "Perplexity of PRUNE: not measured"]
    )
    lines = abilities.grid(study, measured).lines
    (row,) = [line.fields for line in lines if line.fields[0].text == "PRUNE"]
    assert [field.text for field in row[1:]] == ["20", "not measured", "–", "not measured", "–", "50.0", "25.0"]


def test_the_section_is_there_only_if_something_was_measured(pair, tmp_path) -> None:
    page = write_report([pair], tmp_path / "report")
    text = page.read_text()
    assert 'id="study1-abilities"' in text
    assert 'href="#study1-abilities"' in text
    assert "0 edits: 75.0 ± 25.0" in json.dumps(text, ensure_ascii=False)
    names = {path.name for path in page.parent.iterdir()}
    figures = {"study1-abilities.png", "study1-abilities.pdf"}
    assert figures | {"study1-abilities.csv", "study1-abilities-paired.csv"} <= names
    assert page.read_bytes() == write_report([pair], tmp_path / "again").read_bytes()
    for entry in ("memit", "memit+sphere"):
        for path in (pair / entry / "abilities").iterdir():
            path.unlink()
    assert "General abilities" not in write_report([pair], tmp_path / "without").read_text()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"format": 2, "edits": 20, "tasks": {}},
        {"format": 1, "edits": 40, "tasks": {}},
        {"format": 1, "edits": 20, "tasks": {"rte": 3}},
        {"format": 1, "edits": 20, "tasks": {"rte": {**kept(1), "value": "high"}}},
        {"format": 1, "edits": 20, "tasks": {"rte": {**kept(1), "records": None}}},
        {"format": 1, "edits": 20, "tasks": {"rte": {**kept(1), "records": ["right"]}}},
        {"format": 1, "edits": 20, "tasks": {"rte": {**kept(1), "how": None}}},
    ],
)
def test_a_damaged_file_is_named_by_whoever_reads_it(tmp_path, content) -> None:
    folder = write_study(tmp_path, ("memit",)) / "memit"
    write_json(folder / "abilities" / "000020.json", {"weights": "0" * 32, **content} if content else content)
    with pytest.raises(CacheError, match="000020.json"):
        abilities.gather(study_of(tmp_path))
    with pytest.raises(CacheError, match="000020.json"):
        Abilities(folder, Suite(())).check()


def test_a_file_with_other_records_than_the_others_is_named(pair) -> None:
    put(pair / "memit+sphere", 20, rte=kept(1, 0, 1))
    with pytest.raises(CacheError, match=r"000020.json: got '3 records of rte', expected 4, as elsewhere"):
        abilities.gather(study_of(pair))
