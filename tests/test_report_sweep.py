"""Sweeps in a report: the same numbers everywhere, tests over the grid, what is recommended, and what is missing."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from statistics import fmean, harmonic_mean

import pytest
from report_runs import checkpoint, manifest, write_run
from sweep_runs import GRID, METRICS, coins, write_sweep

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.report import heatmap, paired, recommend
from sphere_plugin.report.numbers import METRICS as SHOWN
from sphere_plugin.report.numbers import shown
from sphere_plugin.report.page import Options, write_report
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.recommend import choices, plain, sentence
from sphere_plugin.report.studies import studies_of
from sphere_plugin.report.style import alone
from sphere_plugin.report.sweep import in_words, read_sweep

BY_NAME = {metric.name: metric for metric in SHOWN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "swept")
    write_report([folder], folder / "report")
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return read_json(folder / "report" / "report.json")["sweeps"][0]


def written(panel):
    """The texts of a panel in the order of its cells, row by row from below."""
    figure, tips = alone(panel)
    texts = sorted((text.get_position()[::-1], text.get_text()) for text in figure.axes[0].texts)
    return [text for _, text in texts], list(itertools.chain.from_iterable(tips.values()))


def test_a_cell_is_its_runs_checkpoint(folder, told):
    assert [cell["against"] for cell in told["cells"]] == [None, *[0] * 12, None, *[13] * 12]
    for cell in told["cells"]:
        (name,) = cell["runs"]
        point = read_json(folder / name / "checkpoints" / "000080.json")
        base = read_json(folder / cell["entry"].removesuffix("+sphere") / "base" / "checkpoints" / "000080.json")
        for metric, key in zip(("efficacy", "generalization", "specificity"), METRICS, strict=True):
            found, scores, before = cell["metrics"][metric], point["scores"][key], base["scores"][key]
            assert found["mean"] == fmean(scores) and found["n"] == 60
            if cell["against"] is not None:
                gaps = [one - other for one, other in zip(scores, before, strict=True)]
                assert found["difference"]["mean"] == fmean(gaps)
                assert found["difference"]["p"] == paired.permutation(gaps, 12)
                assert (found["difference"]["low"], found["difference"]["high"]) == paired.bootstrap(gaps)
        energy = cell["metrics"]["energy"]
        assert energy["mean"] == pytest.approx(point["energy"]["w"]["2"] / 100.0 - 1.0)
        if cell["against"] is not None:
            assert energy["difference"]["mean"] == pytest.approx(-2e-4 * cell["values"]["alpha"])
            assert energy["difference"].get("p") is None and energy["difference"]["clear"] is False
    unedited = told["unedited"]
    assert unedited["efficacy"]["mean"] == 0.0 and unedited["perplexity"]["mean"] == pytest.approx(20.0855369)


def test_ps_are_corrected_over_the_grid_of_a_method_and_metric(told):
    for alone_, metric in itertools.product((0, 13), ("efficacy", "generalization", "specificity")):
        family = [cell["metrics"][metric]["difference"] for cell in told["cells"] if cell["against"] == alone_]
        assert len(family) == 12
        assert [one["holm"] for one in family] == paired.holm([one["p"] for one in family])
        assert [one["clear"] for one in family] == [one["holm"] < 0.05 for one in family]
        assert {one["clear"] for one in family} == {True, False}, "the sample has both, or tests nothing"


def test_a_heatmap_shows_the_numbers_of_the_json(folder, told):
    sweep = read_sweep(folder)
    plates = heatmap.plates(sweep, choices(sweep))
    assert list(plates) == ["memit", "alphaedit"]
    for base, plate in plates.items():
        cells = [cell for cell in told["cells"] if cell["entry"] == f"{base}+sphere"]
        assert [cell["values"] for cell in cells] == [
            {"eta": eta, "alpha": alpha} for eta, alpha in itertools.product(*GRID.values())
        ]
        names = ("efficacy", "generalization", "specificity", "perplexity", "energy")
        for name, panel in zip(names, plate.panels, strict=True):
            texts, tips = written(panel)
            wanted = []
            for eta in GRID["eta"]:
                row = [cell["metrics"][name] for cell in cells if cell["values"]["eta"] == eta]
                gaps = [heatmap.signed(BY_NAME[name], one["difference"]["mean"]) for one in row]
                wanted += [shown(BY_NAME[name], one["mean"]) for one in row]
                wanted += [gap + "*" * one["difference"]["clear"] for gap, one in zip(gaps, row, strict=True)]
            assert texts == wanted
            assert len(tips) == 12 and tips[0].startswith("MEMIT" if base == "memit" else "AlphaEdit")
    page = (folder / "report" / "report.html").read_text()
    assert page.count("data-tip=") == 2 * 5 * 12
    assert {f"sweep1-{base}.{kind}" for base in plates for kind in ("png", "pdf")} <= {
        one.name for one in (folder / "report").iterdir()
    }
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL).group(1))["sweeps"] == [told]


def test_the_tables_are_the_numbers_of_the_json(folder, told):
    lines = [one.split(",") for one in (folder / "report" / "sweep1-numbers.csv").read_text().splitlines()]
    heads, rows = lines[0], lines[1:]
    assert len(rows) == 26 * 5
    place = {head: number for number, head in enumerate(heads)}
    cell = told["cells"][7]
    values = [one for one in rows if one[0] == "MEMIT + SPHERE" and one[1:3] == ["0.5", "0.8"]]
    assert cell["values"] == {"eta": 0.5, "alpha": 0.8} and len(values) == 5
    assert float(values[0][place["Mean"]]) == 100.0 * cell["metrics"]["efficacy"]["mean"]
    assert float(values[0][place["p (Holm)"]]) == cell["metrics"]["efficacy"]["difference"]["holm"]
    overview = (folder / "report" / "sweep1-cells.csv").read_text().splitlines()
    assert len(overview) == 27 and overview[0].startswith("Method,η,α,Score (%),Eff.↑ (%)")
    score = told["cells"][7]["score"]
    means = [cell["metrics"][metric]["mean"] for metric in ("efficacy", "generalization", "specificity")]
    assert score == pytest.approx(harmonic_mean(means))
    assert repr(100.0 * score) in overview[8]


# ---- what is recommended ----


def constructed(folder, chances, count=300):
    """MEMIT over alpha; ``chances``: alpha -> share of edits that are right, the same ones first."""

    def scores(method, values, order):
        chance = chances[values.get("alpha")]
        return {metric: [float(edit < chance * count) for edit in range(count)] for metric in METRICS}

    grid = {"alpha": [alpha for alpha in chances if alpha is not None]}
    return read_sweep(write_sweep(folder, grid, ("memit",), scores=scores))


def test_a_clearly_better_cell_is_recommended(tmp_path):
    sweep = constructed(tmp_path, {None: 0.2, 0.5: 0.3, 0.8: 0.4, 1.0: 0.6})
    (choice,) = choices(sweep)
    assert (choice.best.values, choice.reference.values) == ({"alpha": 1.0}, {"alpha": 0.8})
    assert choice.advantage.difference == pytest.approx(0.2) and choice.advantage.low > 0
    assert choice.clear and choice.recommended is choice.best and choice.advantage.p < 0.001 and choice.cells == 3
    assert sentence(sweep, choice) == (
        "MEMIT + SPHERE: α 1 has the highest score of 3, 60.00 (harmonic mean of efficacy, generalization and "
        "specificity after 80 edits, %). Against the default, α 0.8, with 40.00: +20.00 (15.67 to 24.67, p < 0.001, "
        "Holm's correction for 2 tests, 300 records), clearly better. MEMIT has 20.00. Recommended: α 1."
    )
    assert plain(sweep, choice)["recommended"] == 3 and plain(sweep, choice)["advantage"]["clear"] is True


def test_a_better_cell_that_is_not_clearly_so_leaves_the_default(tmp_path):
    (choice,) = choices(constructed(tmp_path, {None: 0.2, 0.5: 0.3, 0.8: 0.4, 1.0: 0.41}))
    assert choice.best.values == {"alpha": 1.0} and not choice.clear
    assert choice.recommended is choice.reference and choice.reference.default


def test_the_default_wins_where_nothing_is_better(tmp_path):
    sweep = constructed(tmp_path, {None: 0.2, 0.5: 0.4, 0.8: 0.4, 1.0: 0.1})
    (choice,) = choices(sweep)
    assert choice.best is choice.recommended and choice.best.default and choice.advantage is None
    assert "That is the default." in sentence(sweep, choice)


def test_without_a_default_in_the_grid_the_method_alone_is_compared(tmp_path):
    sweep = constructed(tmp_path, {None: 0.2, 0.5: 0.3, 1.0: 0.25})
    (choice,) = choices(sweep)
    assert choice.reference is sweep.cells[0] and choice.recommended is choice.best
    assert "Against MEMIT (no default in the grid) with 20.00: +10.00" in sentence(sweep, choice)


@pytest.mark.parametrize(("best", "verdict"), [(0.3, "clearly worse"), (0.39, "not clear"), (0.41, "not clear")])
def test_without_a_default_sphere_is_recommended_only_if_it_is_clearly_better(tmp_path, best, verdict):
    sweep = constructed(tmp_path, {None: 0.4, 0.5: best, 1.0: 0.2})
    (choice,) = choices(sweep)
    assert choice.best.values == {"alpha": 0.5} and choice.recommended is None
    said = sentence(sweep, choice)
    assert f"records), {verdict}. SPHERE is not recommended here: it is not clearly better than" in said
    assert (plain(sweep, choice)["recommended"], plain(sweep, choice)["values"]) == (None, {})


def test_where_the_default_was_not_scored_nothing_else_is_recommended(tmp_path):
    constructed(tmp_path, {None: 0.2, 0.5: 0.3, 0.8: 0.4})
    (tmp_path / "memit+sphere" / "alpha=0.8" / "checkpoints" / "000080.json").unlink()
    write_json(
        tmp_path / "memit+sphere" / "alpha=0.8" / "guard.json", [{"edits": 40, "action": "stop", "reason": "x"}]
    )
    sweep = read_sweep(tmp_path)
    (choice,) = choices(sweep)
    assert choice.clear and choice.recommended is choice.default is sweep.cells[2]
    said = sentence(sweep, choice)
    assert "Against MEMIT with 20.00: +10.00" in said and "no default in the grid" not in said
    assert said.endswith("The default was not scored, and without it nothing else is recommended. Recommended: α 0.8.")


def test_the_method_alone_is_not_tested_against_itself(tmp_path):
    """α = 0 has its runs; in the family of Holm's correction it would only raise the others' p."""
    sweep = constructed(tmp_path, {None: 0.4, 0: 0.4, 0.5: 0.3, 1.0: 0.35})
    (choice,) = choices(sweep)
    assert choice.best.values == {"alpha": 0} and choice.advantage is choice.recommended is None
    assert "That is the method alone. SPHERE is not recommended here" in sentence(sweep, choice)
    same, *others = (sweep.test(cell, BY_NAME["efficacy"]) for cell in sweep.projected())
    assert (same.difference, same.p, same.holm) == (0.0, None, None)
    assert [one.holm for one in others] == paired.holm([one.p for one in others])
    assert constructed(tmp_path, {None: 0.2, 0: 0.2, 0.5: 0.3, 1.0: 0.4}).cells[1].runs == ("memit/base",)
    (choice,) = choices(read_sweep(tmp_path))
    assert choice.advantage.tests == 2 and choice.recommended is choice.best


def test_the_smallest_p_stays_clear_in_a_large_grid(tmp_path):
    ours, theirs = [[1.0, 1.0, 1.0]] * 60, [[0.5, 0.5, 0.5]] * 60
    for tests in (1, 49, 50, 400):
        assert tests * recommend._compared(ours, theirs, paired.resamples(tests)).p < 0.01


def test_nothing_is_recommended_where_nothing_is_scored(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path, {"alpha": [0.8]}, ("memit",), scores=lambda *_: {"fluency": [6.0]}))
    (choice,) = choices(sweep)
    assert choice.best is choice.recommended is None
    assert sentence(sweep, choice) == "memit: nothing to recommend: no cell has been scored"


def test_the_p_value_is_that_of_exchanging_cells_record_by_record():
    ours = [[1, 1, 0.5], [1, 0, 1], [0.5, 1, 1], [1, 0.5, 0], [0.5, 1, 1], [1, 1, 1], [0.75, 1, 0], [1, 0.25, 1]]
    theirs = [[0.5, 1, 0.5], [1, 0, 0], [0.5, 0.5, 1], [1, 0.75, 0], [0, 1, 1], [1, 0.5, 1], [0, 1, 0.5], [1, 0, 0.5]]

    def gap(first, second):
        scores = [harmonic_mean([fmean(column) for column in zip(*one, strict=True)]) for one in (first, second)]
        return scores[0] - scores[1]

    every = []
    for exchanged in itertools.product((False, True), repeat=len(ours)):
        couples = [(b, a) if turn else (a, b) for a, b, turn in zip(ours, theirs, exchanged, strict=True)]
        every.append(gap([a for a, _ in couples], [b for _, b in couples]))
    found = recommend._compared(ours, theirs, 9999)
    assert found.difference == pytest.approx(gap(ours, theirs))
    assert found.p == pytest.approx(fmean(abs(one) >= abs(found.difference) - 1e-12 for one in every), abs=0.015)
    assert recommend._compared(ours, ours, 9999).p == 1.0
    zero = recommend._compared([[0.0, 1.0]], [[0.0, 0.5]], 9999)
    assert (zero.difference, zero.low, zero.n) == (0.0, None, 1)


# ---- other grids ----


def test_other_keys_make_small_multiples_and_a_single_one_bars(tmp_path):
    grid = {"eta": [0.3, 0.5], "alpha": [0.5, 0.8], "basis": ["current", "pretrained"], "layers": [[3, 4], [4]]}
    sweep = read_sweep(write_sweep(tmp_path / "many", grid, ("memit",)))
    (plate,) = heatmap.plates(sweep, choices(sweep)).values()
    titles = [panel.title for panel in plate.panels if panel.title.startswith("Efficacy")]
    assert titles == [
        f"Efficacy (%): basis {basis}, layers {layers}"
        for basis in ("current", "pretrained")
        for layers in ("3–4", "4")
    ]
    for panel in plate.panels:
        assert len(written(panel)[1]) == 4
    single = read_sweep(write_sweep(tmp_path / "one", {"eta": [0.5], "basis": grid["basis"]}, ("memit",)))
    (plate,) = heatmap.plates(single, choices(single)).values()
    texts, tips = written(plate.panels[0])
    assert len(plate.panels) == 5 and len(texts) == len(tips) == 2
    wanted = [heatmap.written_in(single, cell, BY_NAME["efficacy"])[0] for cell in single.projected()]
    assert sorted(texts) == sorted(wanted)
    assert in_words({"eta": 0.5, "layers": (4, 6), "basis": "current"}) == "η 0.5, layers 4, 6, basis current"


def test_several_orders_are_paired_order_by_order(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path, {"alpha": [0.5, 0.8]}, ("memit",), orders=(1, 2, 3)))
    cell, metric = sweep.cells[2], BY_NAME["efficacy"]
    each = [fmean(coins("memit", {"alpha": 0.8}, order)["efficacy_exact"]) for order in (1, 2, 3)]
    assert sweep.value(cell, metric).each == tuple(each)
    before = [fmean(coins("memit", {}, order)["efficacy_exact"]) for order in (1, 2, 3)]
    assert sweep.difference(cell, metric) == pytest.approx(fmean(each) - fmean(before))
    assert sweep.difference(cell, BY_NAME["energy"]) == pytest.approx(-1.6e-4)


# ---- what is missing, and what else is there ----


def test_an_order_that_ended_early_or_never_began_leaves_no_mean_of_the_others(tmp_path):
    write_sweep(tmp_path, {"alpha": [0.5, 0.8, 1.0]}, ("memit",), orders=(1, 2))
    stopped, gone = (tmp_path / "memit+sphere" / f"alpha={alpha},order=2" for alpha in (0.5, 0.8))
    (stopped / "checkpoints" / "000080.json").unlink()
    write_json(stopped / "guard.json", [{"edits": 40, "reason": "too far", "action": "stop"}])
    (gone / "manifest.json").unlink()
    sweep = read_sweep(tmp_path)
    reasons = [sweep.value(cell, BY_NAME["efficacy"]).reason for cell in sweep.cells]
    assert reasons[1] == "not available: order 2: its guard ended it after 40 edits: too far"
    assert reasons[2] == "not available: no run in memit+sphere/alpha=0.8,order=2"
    for name in ("efficacy", "energy"):
        differences = [sweep.difference(cell, BY_NAME[name]) for cell in sweep.projected()]
        assert differences[:2] == [None, None] and differences[2] is not None
    assert [sweep.orders(cell) for cell in sweep.cells] == [2, 1, 1, 2]
    (choice,) = choices(sweep)
    assert choice.cells == 1 and choice.recommended.values == {"alpha": 0.8}


def test_cells_that_are_missing_are_named(tmp_path):
    folder = write_sweep(tmp_path / "swept", {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}, ("memit",))
    (folder / "memit+sphere" / "eta=0.3,alpha=0.8" / "manifest.json").unlink()
    stopped = folder / "memit+sphere" / "eta=0.5,alpha=0.5"
    (stopped / "checkpoints" / "000080.json").unlink()
    write_json(stopped / "guard.json", [{"edits": 40, "reason": "too far", "action": "stop", "left": 40}])
    page = write_report([folder], tmp_path / "report").read_text()
    assert "η 0.3, α 0.8: not available: no run in memit+sphere/eta=0.3,alpha=0.8" in page
    assert "η 0.5, α 0.5: not available: its guard ended it after 40 edits: too far" in page
    told = read_json(tmp_path / "report" / "report.json")["sweeps"][0]
    assert [cell["orders"] for cell in told["cells"]] == [1, 1, 0, 0, 1]
    assert (
        told["recommended"][0]["cells"] == 2 and told["cells"][2]["metrics"]["efficacy"]["difference"]["mean"] is None
    )


def test_a_sweep_that_has_just_begun_is_reported_as_such(tmp_path):
    folder = write_sweep(tmp_path / "swept", {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}, ("memit",))
    for path in folder.rglob("000080.json"):
        path.unlink()
    page = write_report([folder], tmp_path / "report").read_text()
    assert "No run has a checkpoint after an edit yet." in page and "nothing to recommend" in page
    told = read_json(tmp_path / "report" / "report.json")["sweeps"][0]
    assert told["edits"] is None and [cell["orders"] for cell in told["cells"]] == [0] * 5


def test_a_sweep_without_runs_or_with_a_damaged_file_is_refused(tmp_path):
    folder = write_sweep(tmp_path / "swept", {"alpha": [0.5]}, ("memit",))
    with pytest.raises(ConfigError, match=r"--at: got 50, expected a number of edits with a checkpoint: \[0, 80\]"):
        write_report([folder], tmp_path / "report", Options(at=50))
    content = read_json(folder / "sweep.json")
    for damaged in (
        {},
        {"format": 2, "cells": []},
        {"format": 1, "cells": [{"entry": "memit"}]},
        {"format": 1, "cells": [content["cells"][0], content["cells"][1] | {"against": 1}]},
        {"format": 1, "cells": [content["cells"][1] | {"against": 7}]},
    ):
        write_json(folder / "sweep.json", damaged)
        with pytest.raises(CacheError, match=r"sweep.json: got .* Restore it, or leave that sweep out"):
            read_sweep(folder)
    write_json(folder / "sweep.json", {"format": 1, "cells": []})
    with pytest.raises(ConfigError, match="a sweep without a run"):
        read_sweep(folder)


def test_other_runs_beside_a_sweep_make_up_a_study(tmp_path):
    write_sweep(tmp_path / "swept", {"alpha": [0.5, 0.8]}, ("memit",))
    write_run(tmp_path / "other", manifest("memit"), [checkpoint(10, {"efficacy_exact": [1.0, 0.0]})])
    page = write_report([tmp_path], tmp_path / "report").read_text()
    told = read_json(tmp_path / "report" / "report.json")
    assert [row["entry"] for row in told["studies"][0]["table"]] == ["unedited", "memit"] and len(told["sweeps"]) == 1
    assert 'id="study1"' in page and 'id="sweep1"' in page and "4 runs." in page


def test_the_cells_of_a_sweep_as_a_study_are_paired_by_their_settings(tmp_path):
    """Runs of the same entry with other settings are other entries; SPHERE's base is the one with the same layers."""
    for layers in ([3, 4], [4]):
        for entry, alpha in (("memit", 0.0), ("memit+sphere", 0.8)):
            method = {"alg_name": "SPHERE", "hparams": {"layers": layers, "alpha": alpha, "eta": 0.5}}
            folder = tmp_path / entry / f"layers={len(layers)}"
            write_run(folder, manifest(entry, method=method), [checkpoint(10, {"efficacy_exact": [1.0, 0.0]})])
    (study,) = studies_of(read_runs([tmp_path / "memit", tmp_path / "memit+sphere"]))
    assert len(study.entries) == 4
    settings = [[one.runs[0].manifest["method"]["hparams"]["layers"] for one in pair] for pair in study.pairs()]
    assert settings == [[[4], [4]], [[3, 4], [3, 4]]]


def test_the_same_sweep_gives_the_same_page(tmp_path: Path):
    folder = write_sweep(tmp_path / "swept", {"alpha": [0.5]}, ("memit",))
    first, second = (write_report([folder], tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
