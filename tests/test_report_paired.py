"""Paired tests: which records are paired, and the tests against scipy and full enumeration."""

import itertools

import numpy
import pytest
from report_runs import checkpoint, manifest, write_run, write_study
from scipy import stats

from sphere_plugin.files import read_json, write_json
from sphere_plugin.report import paired
from sphere_plugin.report.numbers import METRICS
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import studies_of

EFFICACY = METRICS[0]


def study_of(folder):
    (study,) = studies_of(read_runs([folder]))
    return study


def two_runs(folder, first, second, scored=(None, None), orders=(None, None)):
    for entry, scores, places, order in zip(("memit", "memit+sphere"), (first, second), scored, orders, strict=True):
        one = checkpoint(10, {"efficacy_exact": scores}, scored=places)
        write_run(folder / entry, manifest(entry, order=order), [one])
    return study_of(folder)


def test_differences_are_of_the_same_edits(tmp_path):
    study = two_runs(tmp_path, [1.0, 0.0, 0.5], [1.0, 1.0, None], ([0, 2, 4], [2, 0, 4]))
    (found,) = paired.comparisons(study)
    assert (found.entry.name, found.base.name) == ("memit+sphere", "memit")
    # Edit 0: 1 − 1; edit 2: 1 − 0; edit 4 was not scored in one of them.
    assert (found.n, found.difference, found.better, found.worse) == (2, 0.5, 1, 0)


def test_records_are_told_by_the_journal(tmp_path):
    study = study_of(write_study(tmp_path))
    entry = study.entries[1]
    (found,) = [one for one in paired.comparisons(study) if one.metric is EFFICACY]
    first, second = (run.runs[0].at(80).scores["efficacy_exact"] for run in (entry, study.entries[0]))
    assert found.difference == pytest.approx(numpy.subtract(first, second).mean())
    assert found.n == 80


def test_several_orders_are_averaged_record_by_record(tmp_path):
    for order in (1, 2):
        write_study(tmp_path / str(order), order=order, seed=order)
    study = study_of(tmp_path)
    (found,) = [one for one in paired.comparisons(study) if one.metric is EFFICACY]
    assert found.n == 80
    means = [entry.value(EFFICACY, 80).mean for entry in study.entries]
    assert found.difference == pytest.approx(means[1] - means[0])


def test_records_are_told_although_a_run_is_not_finished(tmp_path):
    """The unedited model is scored on the edits of the whole run, which the journal does not have yet."""
    for order in (1, 2):
        folder = write_study(tmp_path / str(order), order=order, seed=order)
        for entry in ("memit", "memit+sphere"):
            path = folder / entry / "checkpoints" / "000000.json"
            told = read_json(path)
            write_json(path, told | {"scored": list(range(80, 80 + len(told["scored"])))})
    study = study_of(tmp_path)
    (found,) = [one for one in paired.comparisons(study) if one.metric is EFFICACY]
    assert found.n == 80
    records = [line.split(",")[4] for line in paired.scores_csv(study).splitlines()[1:]]
    assert len(records) == 4 * 80 and "" not in records


def test_other_orders_are_not_paired(tmp_path):
    study = two_runs(tmp_path, [1.0, 0.0], [1.0, 1.0], orders=(1, 2))
    (found,) = paired.comparisons(study)
    assert found.difference is None
    assert found.reason == "not available: no record that both are scored on"


def test_every_entry_is_held_against_the_controls(tmp_path):
    study = study_of(write_study(tmp_path, ("memit", "memit+sphere", "memit+shrunk")))
    pairs = {(one.entry.name, one.base.name) for one in paired.comparisons(study)}
    assert pairs == {("memit+sphere", "memit"), ("memit", "memit+shrunk"), ("memit+sphere", "memit+shrunk")}


def test_controls_are_held_against_their_own_method_and_each_other_once(tmp_path):
    entries = ("memit", "memit+sphere", "memit+random", "memit+shrunk", "rect", "rect+sphere", "rect+random")
    study = study_of(write_study(tmp_path, entries))
    pairs = [(one.entry.name, one.base.name) for one in paired.comparisons(study) if one.metric is EFFICACY]
    assert sorted(pairs) == sorted(
        [
            ("memit+sphere", "memit"),
            ("rect+sphere", "rect"),
            ("memit", "memit+random"),
            ("memit+sphere", "memit+random"),
            ("memit+shrunk", "memit+random"),
            ("memit", "memit+shrunk"),
            ("memit+sphere", "memit+shrunk"),
            ("rect", "rect+random"),
            ("rect+sphere", "rect+random"),
        ]
    )


def test_the_smallest_p_stays_clear_among_many_tests():
    for tests in (1, 49, 50, 120):
        assert tests * paired.permutation([1.0] * 40, tests) < 0.01


def test_a_table_of_many_tests_asks_for_as_many_signs(tmp_path, monkeypatch):
    """Forty edits, each a little better: p is as small as the number of tests it is corrected for needs."""
    monkeypatch.setattr(paired, "RESAMPLES", 99)
    study = study_of(write_study(tmp_path, ("memit", "memit+sphere")))
    monkeypatch.setattr(paired, "paired_differences", lambda *_: [1.0 + i / 40 for i in range(40)])
    found = [one for one in paired.comparisons(study) if one.p is not None]
    assert len(found) > 1
    assert {one.p for one in found} == {paired.permutation([1.0 + i / 40 for i in range(40)], len(found))}
    assert all(one.p < 2 / 100 for one in found)


def test_few_differences_are_tested_by_all_signs():
    differences = [0.4, -0.1, 0.3, 0.0, 0.25, 0.2, -0.05]
    total = sum(differences)
    signs = itertools.product((-1, 1), repeat=6)
    others = [abs(sum(s * d for s, d in zip(one, filter(None, differences), strict=True))) for one in signs]
    expected = sum(other >= abs(total) - 1e-12 for other in others) / len(others)
    assert paired.permutation(differences) == pytest.approx(expected)


def test_many_differences_agree_with_the_t_test():
    differences = numpy.random.default_rng(1).normal(0.15, 1.0, 300).tolist()
    assert paired.permutation(differences) == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, abs=0.01)


def test_without_any_difference_p_is_one():
    assert paired.permutation([0.0, 0.0]) == 1.0
    assert paired.permutation([0.0, 0.5]) == 1.0


def test_the_bootstrap_interval_is_near_the_normal_one_and_repeatable():
    differences = numpy.random.default_rng(2).normal(0.2, 1.0, 400).tolist()
    low, high = paired.bootstrap(differences)
    half = 1.96 * numpy.std(differences, ddof=1) / 20
    assert (low, high) == pytest.approx((numpy.mean(differences) - half, numpy.mean(differences) + half), abs=0.01)
    assert paired.bootstrap(differences) == (low, high)
    assert paired.bootstrap([1.0]) == (None, None)
    assert paired.bootstrap([1.0, 1.0]) == (1.0, 1.0)


def test_holms_correction_by_hand():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert paired.holm([]) == []


def test_the_table_says_which_test_it_was(tmp_path):
    study = two_runs(tmp_path, [1.0, 0.0], [1.0, 1.0])
    grid = paired.grid(study, paired.comparisons(study))
    assert "sign-flip permutation test" in grid.note
    assert grid.lines[0].fields[4].text == "50.00"
