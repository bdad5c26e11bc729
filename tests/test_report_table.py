"""The comparison table against numbers worked out by hand, and its CSV and LaTeX."""

import csv
import io
import itertools
import math

import pytest
from report_runs import checkpoint, manifest, write_run

from sphere_plugin.errors import ConfigError
from sphere_plugin.files import write_json
from sphere_plugin.report import bars, comparison, paired, published
from sphere_plugin.report.numbers import METRICS, Value, averaged, shown, shown_value, written
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of

BY_NAME = {metric.name: metric for metric in METRICS}


def energy(number):
    return {"w": {"0": 1.0, "1": 2.0, "2": number}, "v": {"0": 1.0, "1": 2.0, "2": 2 * number}}


def exact(*scores):
    return {"efficacy_exact": list(scores), "efficacy": [0.5] * len(scores)}


def one_study(folder, *runs):
    for number, (told, points) in enumerate(runs):
        write_run(folder / str(number), told, points)
    (study,) = studies_of(read_runs([folder]))
    return study


def cells(study):
    return {row.label: {cell.metric.name: cell for cell in row.cells} for row in comparison.rows(study)}


@pytest.fixture
def study(tmp_path):
    before = checkpoint(0, exact(0.0, 0.0, 0.0, 0.0), energy(10.0), nll=2.0)
    return one_study(
        tmp_path,
        (manifest("memit"), [before, checkpoint(10, exact(1.0, 0.0, None, 1.0), energy(10.01), nll=3.0)]),
        (manifest("memit+sphere"), [before, checkpoint(10, exact(1.0, 1.0, 1.0, 0.0), energy(9.995), nll=2.5)]),
        (manifest("rect"), [before, checkpoint(10, exact(0.0, 1.0, 0.0, 0.0), energy(10.002))]),
    )


def test_numbers_are_those_worked_out_by_hand(study):
    table = cells(study)
    efficacy = table["MEMIT"]["efficacy"]
    # 1, 0, 1: mean 2/3, s² = (1/9 + 4/9 + 1/9) / 2 = 1/3, half = 1.96 · √(1/3) / √3 = 1.96 / 3
    assert efficacy.value.mean == pytest.approx(2 / 3)
    assert efficacy.value.half == pytest.approx(1.96 / 3)
    assert efficacy.value.n == 3
    assert efficacy.text == "66.67 ± 65.33"
    assert table["MEMIT"]["perplexity"].text == f"{math.exp(3.0):.2f}"
    assert table["MEMIT"]["energy"].value.mean == pytest.approx(1e-3)
    assert table["MEMIT"]["energy"].text == "10.00"
    assert table["MEMIT + SPHERE"]["energy"].text == "−5.00"
    assert table["Unedited"]["efficacy"].text == "0.00 ± 0.00"
    assert table["Unedited"]["energy"].text == "0.00"


def test_best_and_second_are_marked_among_edited_models(study):
    ranks = {label: (row["efficacy"].rank, row["energy"].rank) for label, row in cells(study).items()}
    assert ranks == {
        "Unedited": ("", ""),
        "MEMIT": ("second", ""),
        "MEMIT + SPHERE": ("best", "second"),
        "RECT": ("", "best"),
    }


def test_what_is_missing_is_said(study):
    table = cells(study)
    assert table["RECT"]["perplexity"].text == "not available: not finite"
    assert table["MEMIT"]["fluency"].text == "not scored"
    assert table["RECT"]["perplexity"].rank == ""


def test_what_reads_the_same_has_the_same_rank():
    metric = BY_NAME["efficacy"]
    values = [Value(0.50001), Value(0.5), Value(0.4), Value(None), Value(0.3)]
    assert comparison.ranked(metric, values) == ["best", "best", "second", "", ""]
    assert comparison.ranked(metric, [Value(0.5), Value(None)]) == ["", ""]
    assert comparison.ranked(BY_NAME["perplexity"], [Value(9.0), Value(11.0)]) == ["best", "second"]


def test_energies_as_far_from_zero_have_the_same_rank():
    values = [Value(-0.01), Value(0.01), Value(0.05)]
    for order in itertools.permutations(range(3)):
        ranks = comparison.ranked(BY_NAME["energy"], [values[place] for place in order])
        assert [ranks[order.index(place)] for place in range(3)] == ["best", "best", "second"]


def test_several_orders_are_averaged_with_their_spread(tmp_path):
    study = one_study(
        tmp_path,
        (manifest("memit", order=1), [checkpoint(10, exact(1.0, 1.0, 1.0, 0.0))]),
        (manifest("memit", order=2), [checkpoint(10, exact(1.0, 0.0, 1.0, 0.0))]),
    )
    (_, row) = comparison.rows(study)
    cell = row.cells[0]
    assert row.orders == 2
    assert cell.value.mean == pytest.approx(0.625)
    assert cell.value.each == (0.75, 0.5)
    # s² is 1/4 and 1/3, n is 4: the halves are 1.96 / 4 and 1.96 / √12
    assert cell.value.half == pytest.approx(1.96 * (1 / 4 + 1 / math.sqrt(12)) / 2)
    assert cell.spread == "50.00 to 75.00"
    assert "several orders" in " ".join(comparison.notes(study))


def test_an_order_without_a_number_leaves_no_mean():
    assert averaged([Value(0.5, 0.1, 4)]) == Value(0.5, 0.1, 4)
    assert averaged([Value(None), Value(0.5)]) == Value(None, reason="not available: not scored in 1 of 2 orders")
    energy = Value(None, reason="not available: no finite energy of w")
    assert averaged([Value(0.5), energy, energy]).reason == "not available: no finite energy of w in 2 of 3 orders"
    assert averaged([Value(None, reason="because"), Value(None)]).reason == "because"


def test_an_order_that_ended_early_leaves_no_mean_of_the_others(tmp_path):
    """Its model has collapsed: the mean of the survivors would be too good."""
    points = [checkpoint(edits, exact(1.0, 0.0), nll=3.0) for edits in (10, 80)]
    for order in (1, 2, 3):
        write_run(tmp_path / f"ft-{order}", manifest("ft", order=order), points[: 1 if order > 1 else 2])
    write_json(tmp_path / "ft-2" / "guard.json", [{"edits": 10, "reason": "too far", "action": "stop"}])
    study = one_study(tmp_path, (manifest("ft+sphere", order=1), points))
    assert study.moment == 80
    why = "not available: order 2: its guard ended it after 10 edits: too far; order 3: no checkpoint after 80 edits"
    assert {metric: cells(study)["FT"][metric].text for metric in ("efficacy", "perplexity")} == {
        "efficacy": why,
        "perplexity": why,
    }
    (pair, *_) = bars.gains(study)
    assert (pair.before.mean, pair.gain_text) == (None, "not available")
    (test,) = paired.comparisons(study)
    assert (test.p, test.reason) == (None, f"FT: {why}")


def test_shared_targets_are_marked_everywhere(tmp_path):
    study = one_study(
        tmp_path,
        (manifest("memit", share_targets=True), [checkpoint(10, exact(1.0, 1.0))]),
        (manifest("memit"), [checkpoint(10, exact(1.0, 0.0))]),
    )
    assert [entry.label for entry in study.entries] == ["MEMIT †", "MEMIT"]
    assert any(note.startswith("†") for note in comparison.notes(study))
    lines = list(csv.DictReader(io.StringIO(comparison.table_csv(study))))
    assert {line["method"]: line["shared_targets"] for line in lines} == {
        "Unedited": "no",
        "MEMIT †": "yes",
        "MEMIT": "no",
    }
    assert r"MEMIT \textsuperscript{\dag}" in comparison.table_latex(study)
    assert not study.pairs()


def test_csv_holds_the_unrounded_numbers(study):
    lines = list(csv.DictReader(io.StringIO(comparison.table_csv(study))))
    (line,) = [one for one in lines if one["entry"] == "memit" and one["metric"] == "efficacy"]
    assert float(line["mean"]) == 2 / 3
    assert line["n"] == "3"
    (line,) = [one for one in lines if one["entry"] == "rect" and one["metric"] == "fluency"]
    assert (line["mean"], line["note"]) == ("", "not scored")


def test_latex_marks_and_escapes(tmp_path):
    study = one_study(
        tmp_path,
        (manifest("a", "50% & a_b #1"), [checkpoint(10, exact(1.0, 1.0))]),
        (manifest("b", "{x}^~\\"), [checkpoint(10, exact(1.0, 0.0))]),
    )
    text = comparison.table_latex(study)
    assert r"50\% \& a\_b \#1 & $\mathbf{100.00\pm 0.00}$" in text
    assert r"\{x\}\textasciicircum{}\textasciitilde{}\textbackslash{} & $\underline{50.00\pm 98.00}$" in text
    assert text.count(r"\\") == 4
    assert "-- &" in text


def test_latex_writes_large_numbers_as_powers_of_ten(tmp_path):
    points = [checkpoint(10, {"efficacy_exact": [2.0e15, 0.0]}, nll=40.0)]
    text = comparison.table_latex(one_study(tmp_path, (manifest("memit"), points)))
    assert r"$2.35 \times 10^{17}$" in text
    assert r"$1.00 \times 10^{17}\pm 1.96 \times 10^{17}$" in text


def test_the_protocol_chooses_the_scores(tmp_path):
    scores = {"specificity": [0.25], "specificity_success": [1.0], "locality": [0.75]}
    for protocol, expected in (("tokens", 0.25), ("success", 1.0), ("locality", 0.75)):
        told = manifest("memit", protocol={"specificity": protocol})
        study = one_study(tmp_path / protocol, (told, [checkpoint(10, scores)]))
        assert cells(study)["MEMIT"]["specificity"].value.mean == expected
    study = one_study(
        tmp_path / "bad", (manifest("memit", protocol={"efficacy": "vibes"}), [checkpoint(10, exact(1.0))])
    )
    with pytest.raises(ConfigError, match="vibes"):
        comparison.rows(study)


def test_a_run_that_its_guard_ended_does_not_hold_the_others_back(tmp_path):
    points = [checkpoint(edits, exact(1.0, 0.0)) for edits in (10, 80)]
    write_run(tmp_path / "ft", manifest("ft"), points[:1])
    event = {"edits": 10, "reason": "energy up by <b>9</b>", "action": "stop"}
    write_json(tmp_path / "ft" / "guard.json", [event])
    study = one_study(tmp_path, (manifest("memit"), points))
    assert study.moment == 80
    assert "its guard ended it after 10 edits: energy up" in cells(study)["FT"]["efficacy"].text
    write_json(tmp_path / "ft" / "guard.json", [event | {"action": "warn"}])
    assert one_study(tmp_path, (manifest("memit"), points)).moment == 10


def test_a_run_without_checkpoints_says_so(tmp_path):
    study = one_study(tmp_path, (manifest("memit"), []))
    assert study.moment is None
    assert cells(study)["MEMIT"]["efficacy"].text == "not available: no checkpoint after an edit"
    assert "No run has a checkpoint" in comparison.notes(study)[0]


@pytest.mark.parametrize(
    ("number", "decimals", "text"),
    [(0.5, 2, "0.50"), (-0.001, 2, "0.00"), (-2.5, 1, "−2.5"), (123456.0, 2, "1.23e+05"), (99999.0, 0, "99999")],
)
def test_numbers_are_written_one_way(number, decimals, text):
    assert written(number, decimals) == text


def test_a_dash_stands_for_nothing():
    assert shown(BY_NAME["efficacy"], None) == "–"
    assert shown_value(BY_NAME["efficacy"], Value(0.25)) == "25.00"


def test_published_numbers_are_found_by_preset():
    block = published.published("table1-llama3-8b", "counterfact.json")
    assert block is not None
    assert block.rows["alphaedit+sphere"]["efficacy"] == ("52.89", "0.50")
    assert published.published("table1-qwen2.5-7b", "zsre_mend_eval.json").rows["prune"]["specificity"] == (
        "39.20",
        "0.28",
    )
    assert published.published("figure7-llama3-8b", "counterfact.json") is None
    assert published.published("table1-llama3-8b", "facts.json") is None
    assert published.published("", "counterfact.json") is None


def test_published_numbers_stand_beside_the_measured(tmp_path):
    points = [checkpoint(0, exact(0.0, 0.0)), checkpoint(10, exact(1.0, 0.0))]
    told = manifest("alphaedit+sphere", preset="table1-llama3-8b")
    told["data"]["file"] = "zsre.json"
    study = one_study(tmp_path, (told, points))
    table = cells(study)
    assert table["ALPHAEDIT + SPHERE"]["efficacy"].paper == "90.01 ± 0.21"
    assert table["Unedited"]["specificity"].paper == "38.02 ± 0.27"
    assert table["ALPHAEDIT + SPHERE"]["fluency"].paper == ""
