"""The report's sections on interference and on the theorem, from made-up diagnoses and by hand."""

import csv
import io
import math

import pytest
from report_runs import LAYERS, sample_report, write_study

from sphere_plugin.errors import CacheError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.report import diagnosed, interference, theorem
from sphere_plugin.report.page import Options, write_report
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of
from sphere_plugin.report.style import alone, decades


def terms(ratio, change=-2.0, step=0.5):
    """ΔV = 4 and Σ C‖Δw‖ = 1, so that eq. 33 is reached by |change| / 2."""
    return {"change": change, "first_order": 0.5 * change, "constant": 1.0, "perturbation": 4.0} | (
        {"moved": 1.0, "largest_step": step, "ratio": ratio, "neuron_ratio": abs(change) / 2}
    )


def inputs(change, share=0.02, alignment=0.5):
    bound = {"mean": 2 * change, "reached": 0.5, "most": 0.75}
    return {"keys": 20, "change": {"mean": change, "max": change}, "relative": change / 10, "bound": bound} | (
        {"l_kp": 100 * share, "l_kp_share": share, "alignment": alignment, "drift_relative": change / 5}
    )


def layer(name, edits, entry):
    """Of the first weight after 20 edits, MEMIT's update breaks the theorem."""
    ratio = 1.5 if (name, edits, entry) == (LAYERS[0], 20, "memit") else 0.25
    batch = {"raw": terms(ratio), "unit": {"missing": "row 3 of the weight: zeros only"}}
    change = edits / 10 + LAYERS.index(name)
    told = {"name": name, "width": 64, "vectors": 4, "span": 2, "factors": "journal", "norm": 1.0, "spectral": 1.0}
    told |= {side: {"mean": size * edits, "max": 1.0, "min": 0.0} for side, size in (("left", 3.0), ("right", 0.1))}
    told |= {"theorem": {"batch": batch, "run": {"raw": terms(0.5), "unit": terms(1e-8)}}}
    told |= {"inputs": {kind: inputs(change) for kind in ("text", "neighbours", "edited")}}
    if "+" not in entry:
        kept = {kind: inputs(0.5 * change, 0.03) for kind in ("text", "neighbours", "edited")}
        told["projected"] = {"eta": 0.5, "alpha": 0.8, "rank": 9, "removed_share": 0.1, "inputs": kept}
    return told


def diagnose(folder, **settings):
    """Made-up diagnoses of the batches after 10 and 20 edits of a run."""
    entry = read_json(folder / "manifest.json")["entry"]
    for batch in (1, 2):
        told = {
            "batch": batch,
            "edits": 10 * batch,
            "settings": {"keys": 20, "seed": 0, "projected": None, **settings},
        }
        told["after"] = read_json(folder / "journal" / f"{batch:06d}.json")["after"]
        told["layers"] = [layer(name, 10 * batch, entry) for name in LAYERS]
        write_json(folder / "diagnostics" / f"{10 * batch:06d}.json", told)
    space = {"name": LAYERS[0], "layer": 3, "width": 14336, "threshold": 0.02, "null": 14326, "rank": 62}
    write_json(folder / "diagnostics" / "spaces.json", {"format": 1, "layers": [space]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("interference"))
    for entry in ("memit", "memit+sphere"):
        diagnose(folder / entry)
    return folder


@pytest.fixture
def study(folder):
    (study,) = studies_of(read_runs([folder]))
    return study


@pytest.fixture
def found(study):
    return diagnosed.gather(study)


def cells(grid):
    """Column -> value of each line; columns of the same name are told apart by a second one."""
    heads = [head if head not in grid.heads[:n] else f"{head} 2" for n, head in enumerate(grid.heads)]
    return [
        dict(zip(heads, (field.text if field.value is None else field.value for field in line.fields), strict=True))
        for line in grid.lines
    ]


# ---- what is read ----


def test_every_batch_and_weight_is_a_row(study, found):
    assert len(found.rows) == 2 * 2 * 2
    assert not found.missing
    assert found.curve(study.entries[0], "inputs.text.change.mean") == [(10, 1.5), (20, 2.5)]
    assert found.curve(study.entries[0], "left.mean", last=True) == [(10, 30.0), (20, 60.0)]
    assert found.mean(study.entries[0], "inputs.text.change.mean") == 2.0
    assert found.mean(study.entries[1], "projected.alpha") is None


def test_diagnoses_of_batches_that_are_no_more_are_left_out(tmp_path):
    folder = write_study(tmp_path, ("memit", "memit+sphere"))
    diagnose(folder / "memit")
    path = folder / "memit" / "diagnostics" / "000020.json"
    write_json(path, read_json(path) | {"after": "0" * 32})
    (study,) = studies_of(read_runs([folder]))
    found = diagnosed.gather(study)
    assert {row.edits for row in found.rows} == {10}
    assert found.missing == (
        "MEMIT: 1 diagnoses of batches that were undone",
        "MEMIT + SPHERE: not available: `sphere diagnose memit+sphere` was not run",
    )


def test_other_inputs_are_told(tmp_path):
    folder = write_study(tmp_path)
    diagnose(folder / "memit")
    diagnose(folder / "memit+sphere", keys=7)
    (study,) = studies_of(read_runs([folder]))
    (said,) = diagnosed.gather(study).missing
    assert said.startswith("MEMIT + SPHERE: diagnosed with other settings") and "'keys': 7" in said


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"batch": 1, "edits": 10, "settings": {}, "layers": 3},
        {"batch": 1, "settings": {}, "layers": []},
        {"batch": 1, "edits": 10, "settings": {"format": 2}, "layers": []},
    ],
)
def test_a_damaged_diagnosis_is_named(tmp_path, content):
    folder = write_study(tmp_path, ("memit",))
    diagnose(folder / "memit")
    path = folder / "memit" / "diagnostics" / "000010.json"
    after = read_json(path)["after"]
    write_json(path, content | {"after": after} if isinstance(content, dict) else content)
    (study,) = studies_of(read_runs([folder]))
    with pytest.raises(CacheError, match=r"000010\.json"):
        diagnosed.gather(study)


def test_a_number_that_is_none_is_named(tmp_path):
    folder = write_study(tmp_path, ("memit",))
    diagnose(folder / "memit")
    path = folder / "memit" / "diagnostics" / "000010.json"
    told = read_json(path)
    told["layers"][0]["norm"] = "much"
    write_json(path, told)
    (study,) = studies_of(read_runs([folder]))
    with pytest.raises(CacheError, match=r"000010\.json.*a number for norm"):
        diagnosed.grid(study, diagnosed.gather(study))


def test_without_diagnoses_there_is_nothing(tmp_path):
    (study,) = studies_of(read_runs([write_study(tmp_path, ("memit",))]))
    assert not diagnosed.gather(study)


# ---- the theorem ----


def test_violations_are_counted_and_named(study, found):
    first, *_ = cells(theorem.grid(study, found))
    assert (first["Method"], first["Neurons"], first["Update"]) == ("MEMIT", "as they are", "each batch")
    assert (first["Tested"], first["Broken"], first["Most reached"], first["Median"]) == (4, 1, 1.5, 0.25)
    assert (first["Eq. 33 broken"], first["Most reached 2"], first["Largest step"]) == (0, 1.0, 0.5)
    assert first["Broken for real inputs"] == 1  # 1.5 is above the alignment of 0.5, 0.25 is not
    sphere = next(one for one in cells(theorem.grid(study, found)) if one["Method"] == "MEMIT + SPHERE")
    assert sphere["Broken"] == 0
    (broken,) = cells(theorem.violations(study, found))
    assert (broken["Method"], broken["Edits"], broken["Weight"]) == ("MEMIT", 20, LAYERS[0])
    assert (broken["Reached"], broken["ΔHE"], broken["First order"]) == (1.5, -2.0, -1.0)
    assert broken["Why"] == "neurons come nearer by up to 0.5 of their distance, no small step"


def test_updates_without_an_energy_are_not_tested(study, found):
    lines = {(one["Method"], one["Neurons"], one["Update"]): one for one in cells(theorem.grid(study, found))}
    assert lines["MEMIT", "unit length", "each batch"]["Tested"] == 0
    assert lines["MEMIT", "unit length", "all so far"]["Tested"] == 4
    assert "The same on the sphere, each batch" not in [panel.title for panel in theorem.plate(study, found).panels]


@pytest.mark.parametrize(
    ("change", "step", "why"),
    [(1.0, 0.5, "rounding"), (-1.0, 0.5, "no small step"), (-1.0, 1.25, "it passes the distance of two neurons")],
)
def test_why_it_breaks(study, found, change, step, why):
    told = {"theorem": {"batch": {"raw": terms(2.0, change, step)}}}
    row = diagnosed.Row(study.entries[0], study.entries[0].runs[0], 10, "w", told, found.rows[0].where)
    (point,) = theorem.points([row], theorem.TESTS[0])
    assert why in theorem.reason(point, theorem.TESTS[0])


def test_both_sides_are_drawn_with_the_line_between_them(study, found):
    (panel, *_) = theorem.plate(study, found).panels
    figure, tips = alone(panel)
    (axis,) = figure.axes
    memit, sphere, line = axis.lines
    assert sorted(memit.get_xdata()) == [1.0, 1.0, 1.0, 6.0] and list(memit.get_ydata()) == [4.0] * 4
    assert list(sphere.get_xdata()) == [1.0] * 4
    assert list(line.get_xdata()) == list(line.get_ydata()) == [1.0, 6.0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.texts[0].get_text() == "1 of 8 below the line"
    assert f"MEMIT\n20 edits, {LAYERS[0]}\n4 against 6: 1.5 reached" in [tip for each in tips.values() for tip in each]


def test_of_many_points_the_nearest_of_each_batch_is_drawn(study, found, monkeypatch):
    monkeypatch.setattr(theorem, "MANY", 2)
    figure, _ = alone(theorem.plate(study, found).panels[0])
    assert sorted(figure.axes[0].lines[0].get_xdata()) == [1.0, 6.0]
    assert figure.axes[0].texts[0].get_text() == "1 of 8 below the line"


def test_decades_are_written_without_markup():
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    axis.plot([1e-3, 1e4], [1, 1e6])
    decades(axis, "x", "y")
    assert axis.xaxis.get_major_formatter()(1e-3, 0) == "10⁻³"
    assert axis.yaxis.get_major_formatter()(1e10, 0) == "10¹⁰"


# ---- interference ----


def test_curves_are_means_over_weights_and_what_projection_leaves(study, found):
    curves = {trace.title: trace.of(found, study.entries[0]) for trace in interference.TRACES}
    assert curves["Interference on text (% of the output)"] == [(10, pytest.approx(15.0)), (20, pytest.approx(25.0))]
    assert curves["Interference left by P(α) (%)"] == [(10, 50.0), (20, 50.0)]
    assert curves["L_kp left by P(α) (%)"] == [(10, pytest.approx(150.0)), (20, pytest.approx(150.0))]
    along = 0.1 / (0.8 * 1.2) * 64 / 9
    assert curves["Update along U, against chance"] == [(10, pytest.approx(along)), (20, pytest.approx(along))]
    assert not interference.TRACES[-1].of(found, study.entries[1])
    plate = interference.plate(study, found)
    assert len(plate.panels) == len(interference.TRACES)
    for panel in plate.panels:
        alone(panel)


def test_numbers_stand_side_by_side(study, found):
    lines = {(one["Method"], one["Inputs"]): one for one in cells(interference.grid(study, found))}
    assert len(lines) == 2 * 3
    memit, sphere = lines["MEMIT", "text"], lines["MEMIT + SPHERE", "text"]
    assert (memit["n"], memit["‖ΔWz‖"], memit["% of the output"], memit["So far, %"]) == (20, 2.0, 20.0, 50.0)
    assert (memit["Bound"], memit["Reached, %"], memit["Most, %"], memit["L_kp, %"]) == (4.0, 50.0, 75.0, 2.0)
    assert memit["By chance, %"] == pytest.approx(100 * 2 / 64)
    assert (memit["‖ΔWz‖ left, %"], sphere["‖ΔWz‖ left, %"]) == (50.0, "–")
    assert memit["L_kp left, %"] == pytest.approx(150.0)


def test_null_spaces_are_told(study, found):
    grid = interference.spaces(study, found)
    assert [field.text for field in grid.lines[0].fields[1:]] == [LAYERS[0], "14336", "0.02", "14326", "62"]
    assert [field.value for field in grid.lines[0].fields[2:]] == [14336, 0.02, 14326, 62]


def test_how_many_inputs_is_written_whole(study, found):
    for row in found.rows:
        row.told["inputs"]["text"]["keys"] = 12345
    assert interference.grid(study, found).lines[0].fields[2].text == "12345"


def test_everything_is_in_a_file_unrounded(study, found):
    rows = list(csv.DictReader(io.StringIO(diagnosed.grid(study, found).csv())))
    assert len(rows) == 8
    assert float(rows[0]["inputs.text.change.mean"]) == 1.0
    assert rows[0]["theorem.batch.unit.ratio"] == ""
    assert math.isclose(float(rows[0]["theorem.run.unit.ratio"]), 1e-8)


# ---- on the page ----


def test_the_page_has_the_sections_only_where_runs_are_diagnosed(folder, tmp_path, tmp_path_factory):
    text = write_report([folder], tmp_path, Options(neurons=10)).read_text(encoding="utf-8")
    for section in ("interference", "theorem"):
        assert f'id="study1-{section}"' in text and f'href="#study1-{section}"' in text
        assert (tmp_path / f"study1-{section}.png").exists() and (tmp_path / f"study1-{section}.csv").exists()
    for name in ("violations", "spaces", "diagnoses"):
        assert (tmp_path / f"study1-{name}.csv").exists()
    assert "mathdefault" not in text
    without = sample_report(tmp_path_factory.getbasetemp() / "sample")
    assert 'id="study1-theorem"' not in (without / "report.html").read_text(encoding="utf-8")
    assert not (without / "study1-theorem.csv").exists()
