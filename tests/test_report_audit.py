"""The uncertainty table of a report."""

from __future__ import annotations

import csv
import io

import pytest
from report_runs import write_study

from sphere_plugin.errors import CacheError
from sphere_plugin.evaluation.auditor import Measured
from sphere_plugin.evaluation.audits import EDITED, Audit, grown, lowered, path_of, write_audit
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.uncertainty import Uncertainty
from sphere_plugin.report.audit import grids
from sphere_plugin.report.page import Options, write_report
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of

SETTINGS = {"samples": 5, "tokens": 16, "temperature": 0.3, "top_p": 0.9, "seed": 0, "embedder": "minilm"}
BEFORE = ((0.2, 0.4), (0.4, 0.6), (0.3, 0.5), (0.1, 0.9))
AFTER = {"memit": 1.5, "memit+sphere": 1.2}


def measured(numbers, source="templates of P36"):
    return tuple(
        Measured(Probe(k, f"prompt {k}", "", source, ("a", "b")), Uncertainty(*pair), ("x", "y"))
        for k, pair in enumerate(numbers)
    )


def write(folder, entry, edits, factor, settings=SETTINGS, **more):
    numbers = [(alea * factor, epis) for alea, epis in BEFORE]
    audit = Audit(edits, f"{entry}{edits}", "m", settings, measured(numbers), **more)
    write_audit(folder / entry, audit)
    return audit


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "runs")


def table(folder):
    (one,) = studies_of(read_runs([folder]), None)
    return grids(one)


def rows(grid):
    return list(csv.DictReader(io.StringIO(grid.csv())))


def test_runs_without_an_audit_have_no_table(study) -> None:
    assert table(study) == {}
    write(study, "memit", 0, 1.0)
    assert table(study) == {}  # the unedited model alone says nothing


def test_the_folder_of_an_embedder_is_told_by_its_last_part(study) -> None:
    for edits, factor in ((0, 1.0), (80, 1.5)):
        write(study, "memit", edits, factor, SETTINGS | {"embedder": "/home/somebody/mpnet"})
    assert "embedded by mpnet." in table(study)["audit"].note


def test_the_table_has_the_numbers_of_the_files(study) -> None:
    before = write(study, "memit", 0, 1.0)
    write(study, "memit+sphere", 0, 1.0)
    after = {name: write(study, name, 80, factor) for name, factor in AFTER.items()}
    lines = rows(table(study)["audit"])
    assert [line["Method"] for line in lines] == ["MEMIT", "MEMIT + SPHERE"]
    assert {line["Data"] for line in lines} == {"facts.json"}
    first, second = lines
    # By hand: aleatoric sums to 1.0 before and 1.5 after, epistemic to 2.4 both times; U is half of the sum.
    assert float(first["U before"]) == pytest.approx(3.4 / 8)
    assert float(first["U after"]) == pytest.approx(3.9 / 8)
    assert float(first["ΔU"]) == pytest.approx(0.5 / 3.4)
    assert float(first["Aleatoric ΔU"]) == pytest.approx(0.5)
    assert float(first["Epistemic ΔU"]) == 0.0
    assert first["SPHERE's part"] == "–"
    assert float(second["SPHERE's part"]) == pytest.approx((0.2 - 0.5) / 3.4)
    change = grown(before, after["memit"], EDITED)["total"].change
    assert (float(first["ΔU from"]), float(first["ΔU to"])) == (change.low, change.high)
    part = lowered(before, after["memit"], after["memit+sphere"], EDITED)
    assert (float(second["Part from"]), float(second["Part to"])) == (part.low, part.high)
    assert part.high < 0.0


def test_every_moment_and_the_neighbours_have_a_line(study) -> None:
    write(study, "memit", 0, 1.0, neighbours=measured(BEFORE[:2], "templates of sentences"))
    write(study, "memit", 40, 1.1)
    write(study, "memit", 80, 1.5, neighbours=measured(BEFORE[:2], "templates of sentences"))
    grid = table(study)["audit"]
    assert [(line["Edits"], line["Asked"], line["Prompts"]) for line in rows(grid)] == [
        ("40", "edited facts", "4"),
        ("80", "edited facts", "4"),
        ("80", "neighbours", "2"),
    ]
    assert "edited facts: templates of relations; neighbours: templates of sentences." in grid.note
    assert "temperature 0.3" in grid.note
    assert "MEMIT + SPHERE: not audited." in grid.note


def test_audits_with_other_settings_are_not_compared(study) -> None:
    for edits, factor in ((0, 1.0), (80, 1.5)):
        write(study, "memit", edits, factor)
        write(study, "memit+sphere", edits, factor, {**SETTINGS, "seed": 1})
    first, second = rows(table(study)["audit"])
    assert first["ΔU"] == second["ΔU"]
    assert second["SPHERE's part"] == "–"


def test_a_damaged_audit_is_named(study) -> None:
    write(study, "memit", 0, 1.0)
    path = path_of(study / "memit", 80)
    path.write_text("{}")
    with pytest.raises(CacheError, match="000080.json"):
        table(study)


def test_the_page_shows_it(study, tmp_path) -> None:
    write(study, "memit", 0, 1.0)
    write(study, "memit", 80, 1.5)
    page = write_report([study], tmp_path / "report", Options(neurons=10)).read_text()
    assert 'id="study1-audit"' in page
    assert "0.147" in page
    assert (tmp_path / "report" / "study1-audit.csv").read_text().startswith("Method,Data,Edits,Asked")
