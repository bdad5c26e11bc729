"""What the figures show, against scipy and numpy on data of known shape."""

import dataclasses
import math
from xml.etree import ElementTree

import numpy
import pytest
import torch
from matplotlib.text import Text
from report_runs import LAYERS, checkpoint, manifest, write_run, write_study
from scipy import stats

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.report import bars, curves, diagnostics, neurons, scatter
from sphere_plugin.report.numbers import METRICS
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of
from sphere_plugin.report.style import Panel, Plate, alone, picture, sheet
from sphere_plugin.report.svg import svg

EFFICACY = METRICS[0]


def study_of(folder):
    (study,) = studies_of(read_runs([folder]))
    return study


def run_with(folder, energies, accuracies):
    points = [
        checkpoint(10 * k, {"efficacy_exact": [accuracy]}, {"w": {"2": energy}})
        for k, (energy, accuracy) in enumerate(zip(energies, accuracies, strict=True))
    ]
    return study_of(write_run(folder, manifest("memit"), points))


ENERGIES = (10.0, 10.1, 10.4, 10.3, 11.0, 12.5)
ACCURACIES = (0.0, 0.9, 0.8, 0.85, 0.5, 0.6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return study_of(write_study(tmp_path_factory.mktemp("figures")))


# ---- curves ----


def test_spearman_is_scipys_over_the_checkpoints_after_an_edit(tmp_path):
    study = run_with(tmp_path, ENERGIES, ACCURACIES)
    (found,) = [one for one in curves.correlations(study) if one.metric is EFFICACY]
    assert found.n == 5
    assert found.rho == pytest.approx(stats.spearmanr(ENERGIES[1:], ACCURACIES[1:]).statistic)
    # By hand: ranks of energy 1 3 2 4 5, of accuracy 5 3 4 1 2; Σd² = 16 + 0 + 4 + 9 + 9 = 38; ρ = 1 − 6·38 / (5·24)
    assert found.rho == pytest.approx(1 - 6 * 38 / 120)
    assert found.text == "−0.90"


def test_without_enough_checkpoints_there_is_no_correlation(tmp_path):
    (found,) = curves.correlations(run_with(tmp_path, ENERGIES[:3], ACCURACIES[:3]))
    assert found.rho is None
    assert found.text == "not available: 2 of at least 3 checkpoints"
    assert curves.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[1].startswith("not available")


def test_without_energies_there_is_no_correlation(tmp_path):
    points = [checkpoint(edits, {"efficacy_exact": [1.0]}) for edits in (0, 10, 20)]
    (found,) = curves.correlations(study_of(write_run(tmp_path, manifest("memit"), points)))
    assert found.text == "not available: no energy"


def test_labels_are_spread_without_changing_their_order():
    assert curves.spread_out([0.5, 0.5, 0.51], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert curves.spread_out([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])
    assert curves.spread_out([], 0.1) == []


# ---- scatter ----


def test_steps_leave_the_unedited_model_out(tmp_path):
    study = run_with(tmp_path, ENERGIES, ACCURACIES)
    steps = scatter.steps(study.entries[0], EFFICACY)
    assert [step.energy for step in steps] == pytest.approx(numpy.diff(ENERGIES[1:]) / 10.0)
    assert [step.accuracy for step in steps] == pytest.approx(numpy.diff(ACCURACIES[1:]))
    assert steps[0].where.endswith("10 to 20 edits")


def test_regression_is_scipys(tmp_path):
    study = run_with(tmp_path, ENERGIES, ACCURACIES)
    line = scatter.fit("MEMIT", EFFICACY, scatter.steps(study.entries[0], EFFICACY))
    expected = stats.linregress(numpy.diff(ENERGIES[1:]) / 10.0, numpy.diff(ACCURACIES[1:]))
    assert (line.slope, line.intercept, line.r) == pytest.approx((expected.slope, expected.intercept, expected.rvalue))
    grid = scatter.grid(study)
    assert grid.heads[-1] == "Pearson's r" and len(grid.lines[0].fields) == len(
        grid.heads
    )  # steps depend on each other


def test_a_regression_needs_three_steps():
    steps = [scatter.Step(0.1, 0.2, ""), scatter.Step(0.2, 0.1, "")]
    assert scatter.fit("x", EFFICACY, steps).reason == "not available: 2 of at least 3 steps"


def test_the_ellipse_holds_its_share_of_a_normal_distribution():
    random = numpy.random.default_rng(0)
    turn = numpy.array([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    points = (turn @ numpy.diag([3.0, 0.5]) @ random.standard_normal((2, 40000))).T + [1.0, -2.0]
    found = scatter.ellipse(points[:, 0], points[:, 1])
    assert found.centre == pytest.approx((1.0, -2.0), abs=0.05)
    assert found.angle % 180 == pytest.approx(math.degrees(0.5), abs=0.5)
    radius = math.sqrt(stats.chi2.ppf(0.95, 2))
    assert found.axes == pytest.approx((2 * 3.0 * radius, 2 * 0.5 * radius), rel=0.02)
    away = (points - found.centre) @ turn / (numpy.array(found.axes) / 2)
    assert (numpy.square(away).sum(axis=1) <= 1).mean() == pytest.approx(0.95, abs=0.005)


def test_points_that_do_not_spread_have_no_ellipse():
    assert scatter.ellipse([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) is None
    assert scatter.ellipse([1.0, 2.0], [2.0, 3.0]) is None


# ---- bars and batches ----


def test_pairs_are_found_by_name_and_the_gain_is_relative(whole):
    pairs = [pair for pair in bars.gains(whole) if pair.metric is EFFICACY]
    assert [(pair.base.name, pair.entry.name) for pair in pairs] == [("memit", "memit+sphere")]
    assert pairs[0].gain == pytest.approx(pairs[0].after.mean / pairs[0].before.mean - 1)


def test_batches_are_as_the_journal_tells_them(whole):
    run = whole.entries[1].runs[0]
    layers = run.batches[2].layers
    assert diagnostics.update_norm(run, run.batches[2]) == pytest.approx(
        math.hypot(*(layer["update_norm"] for layer in layers))
    )
    assert diagnostics.removed_share(run, run.batches[2]) == pytest.approx(33.0)
    assert diagnostics.sigma_max(run, run.batches[2]) == max(layer["sigma_max"] for layer in layers)
    lines = diagnostics.batches_csv(whole).splitlines()
    assert len(lines) == 1 + 2 * 8 * 2


# ---- neurons ----


def test_neurons_are_those_before_and_after_the_last_batch(whole):
    gathered = neurons.gather(whole)
    assert (gathered.weight, gathered.total) == (LAYERS[1], 40)
    assert numpy.allclose(numpy.linalg.norm(gathered.found[0].after, axis=1), 1.0)
    assert not numpy.allclose(gathered.found[0].after, gathered.found[0].before)
    assert numpy.array_equal(gathered.found[0].before, gathered.found[1].before)
    _, before = neurons.similarity(gathered.found[0].before)
    _, plain = neurons.similarity(gathered.found[0].after)
    _, sphere = neurons.similarity(gathered.found[1].after)
    assert before < sphere < plain  # as the made-up updates were made


def test_a_layer_can_be_chosen(whole):
    assert neurons.gather(whole, layer=3).weight == LAYERS[0]
    absent, elsewhere = neurons.gather(whole, layer=7), dataclasses.replace(neurons.gather(whole), layers=(7,))
    assert not absent.found and all("it did not edit layer 7" in why for why in absent.missing)
    neurons.check_layer([absent, elsewhere], 7)  # another study of the report has it
    with pytest.raises(ConfigError, match=r"--layer.*3, 4"):
        neurons.check_layer([absent], 7)


def test_many_neurons_are_sampled_the_same_way_for_all(whole):
    gathered = neurons.gather(whole, most=12)
    assert gathered.total == 40
    assert gathered.found[0].before.shape == (12, 64)
    assert neurons.sample(40, 12) == neurons.sample(40, 12) == sorted(set(neurons.sample(40, 12)))
    assert neurons.sample(10, 12) == list(range(10))
    assert "12 of 40 neurons (random, seed 0)" in neurons.plates(whole, gathered, lambda *told: None)[0].caption


def test_cosines_are_those_of_the_rows():
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    cosines, mean = neurons.similarity(neurons.unit_rows(weight))
    assert cosines == pytest.approx(numpy.array([[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]]))
    assert mean == pytest.approx(4 * 0.5**0.5 / 6)
    assert neurons.unit_rows(torch.tensor([[1.0, math.nan]])) is None
    assert numpy.array_equal(neurons.unit_rows(torch.zeros(1, 2)), numpy.zeros((1, 2)))


def test_equal_neurons_lie_at_the_same_place_and_tsne_is_repeatable():
    rows = neurons.unit_rows(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
    before, after = neurons.embed(rows, rows)
    assert numpy.array_equal(before, neurons.embed(rows, rows)[0])
    away = numpy.linalg.norm(before - after, axis=1)
    assert numpy.median(away) < 0.1 * numpy.ptp(before)


def test_without_a_journal_neurons_are_not_available(tmp_path):
    study = study_of(write_run(tmp_path, manifest("memit"), [checkpoint(10, {"efficacy_exact": [1.0]})]))
    gathered = neurons.gather(study)
    assert gathered.missing == ("MEMIT: not available: it has no journal",)
    assert not neurons.plates(study, gathered, lambda *told: None)[0].panels


@pytest.mark.parametrize("name", ["base.safetensors", "000003.safetensors"])
def test_weights_that_are_gone_are_not_available_and_damaged_ones_are_named(tmp_path, name):
    write_study(tmp_path, ("memit",))
    path = tmp_path / "memit" / "journal" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=name):
        neurons.gather(study_of(tmp_path))
    path.unlink()
    assert neurons.gather(study_of(tmp_path)).missing == (f"MEMIT: not available: {name} is not in its journal",)


# ---- how they are drawn ----


def drawn(panel, name="figure"):
    figure, tips = alone(panel)
    return svg(figure, name, panel.title, tips)


def test_an_svg_has_the_pages_colours_tips_and_no_foreign_ids(whole):
    panel = curves.plate(whole).panels[0]
    root = ElementTree.fromstring(drawn(panel))
    tips = [one.get("data-tip") for one in root.iter("use") if one.get("data-tip")]
    assert len(tips) == 2 * 5
    assert any(tip.startswith("MEMIT + SPHERE\n80 edits: ") for tip in tips)
    text = ElementTree.tostring(root, encoding="unicode")
    assert "var(--f0)" in text
    assert "currentColor" in text
    assert {"of m0", "of m1"} <= {one.get("class") for one in root.iter("g")}
    ids = {one.get("id") for one in root.iter() if one.get("id")}
    assert all(one.startswith("figure-") for one in ids)
    assert "http" not in text.replace("http://www.w3.org", "")


def test_figures_are_the_same_bytes_every_time(whole):
    plate = bars.plate(whole)
    assert drawn(plate.panels[0]) == drawn(plate.panels[0])
    assert picture(sheet(plate), "png") == picture(sheet(plate), "png")
    assert picture(sheet(plate), "pdf")[:5] == b"%PDF-"


def test_titles_are_text_and_nothing_else():
    panel = Panel("<script>alert(1)</script> $x$", lambda pen: None)
    text = drawn(panel)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert picture(sheet(Plate("n", "t", "", (panel,))), "png")[:4] == b"\x89PNG"


def test_a_long_title_stays_in_its_panel():
    title = "Natural Questions with a passage, as the authors of the method ask them (exact match, %)"
    figure = sheet(Plate("n", "t", "", 3 * (Panel(title, lambda pen: None),)))
    figure.draw_without_rendering()  # the layout is found as it is drawn
    first, second, third = (text.get_window_extent() for text in figure.findobj(Text) if "Natural" in text.get_text())
    assert first.x1 < second.x0 and second.x1 < third.x0 and third.x1 < figure.bbox.x1
