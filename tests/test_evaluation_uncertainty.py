"""The paper's two kinds of uncertainty, and their growth, against plain sums and cases worked by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation.uncertainty import difference, growth, uncertainty


def test_a_case_worked_by_hand() -> None:
    """Two paraphrases, two answers, in the plane: centres (0, 0) and (3, 4), answers 1 and 2 away from them."""
    vectors = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[3.0, 6.0], [3.0, 2.0]]])
    found = uncertainty(vectors)
    assert found.aleatoric == pytest.approx((1 + 1 + 2 + 2) / 4)
    assert found.epistemic == pytest.approx(5.0)
    assert found.total == pytest.approx((1.5 + 5.0) / 2)


def test_both_kinds_are_the_plain_sums_of_the_paper() -> None:
    vectors = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(3))
    numbers = vectors.tolist()
    count, samples, width = vectors.shape
    centres = [[sum(h[d] for h in answers) / samples for d in range(width)] for answers in numbers]
    spread = 0.0
    for answers, centre in zip(numbers, centres, strict=True):
        spread += sum(math.dist(h, centre) for h in answers) / samples / count
    drift = sum(math.dist(a, b) for a, b in itertools.combinations(centres, 2)) * 2 / (count * (count - 1))
    found = uncertainty(vectors)
    assert found.aleatoric == pytest.approx(spread, rel=1e-6)
    assert found.epistemic == pytest.approx(drift, rel=1e-6)


def test_answers_that_are_all_the_same_have_none() -> None:
    found = uncertainty(torch.ones(3, 5, 4))
    assert (found.aleatoric, found.epistemic, found.total) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 0, 4), (3, 4)])
def test_what_has_no_uncertainty_is_refused(shape) -> None:
    with pytest.raises(ConfigError, match="paraphrases, answers, width"):
        uncertainty(torch.zeros(shape))


def test_growth_is_that_of_the_means() -> None:
    """(1 + 3) / 2 before, (2 + 3) / 2 after: a quarter; the mean of the facts' own growths would be a half."""
    found = growth([1.0, 3.0], [2.0, 3.0])
    assert found.value == pytest.approx(0.25)
    assert found.n == 2
    assert found.low == pytest.approx(0.0)  # the second fact twice
    assert found.high == pytest.approx(1.0)  # the first fact twice


def test_the_interval_is_that_of_a_plain_bootstrap_over_facts() -> None:
    draw = random.Random(5)
    before = [draw.uniform(0.4, 0.8) for _ in range(30)]
    after = [value * draw.uniform(0.9, 1.5) for value in before]
    found = growth(before, after)
    plain = []
    for _ in range(4000):
        chosen = [draw.randrange(30) for _ in range(30)]
        pre, post = (sum(column[k] for k in chosen) for column in (before, after))
        plain.append(post / pre - 1)
    plain.sort()
    assert found.value == pytest.approx(sum(after) / sum(before) - 1)
    assert found.low == pytest.approx(plain[100], abs=0.01)
    assert found.high == pytest.approx(plain[3900], abs=0.01)
    assert growth(before, after) == found  # seeded


def test_a_model_against_itself_is_exactly_zero() -> None:
    found = growth([0.3, 0.5, 0.7], [0.3, 0.5, 0.7])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_difference_of_two_growths() -> None:
    before, base, other = [1.0, 3.0, 2.0], [2.0, 3.0, 4.0], [1.5, 3.0, 3.0]
    found = difference(before, base, other)
    first, second = (growth(before, one).value for one in (base, other))
    assert found.value == pytest.approx(second - first)
    assert found.low <= found.value <= found.high <= 0.0


@pytest.mark.filterwarnings("error")
def test_an_end_that_is_not_finite_is_not_told() -> None:
    """Of three facts with one that scattered before, every third sample of facts has nothing to grow from."""
    found = growth([0.0, 0.0, 0.6], [0.0, 0.0, 0.9])
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), None, None)
    found = growth([0.0, 0.0, 0.6], [0.3, 0.3, 0.9])
    assert found.low == pytest.approx(0.5) and found.high is None


def test_where_there_is_no_number() -> None:
    assert growth([], []).value is None
    assert growth([0.0, 0.0], [1.0, 1.0]).value is None
    alone = growth([0.5], [0.6])
    assert (alone.value, alone.low, alone.high) == (pytest.approx(0.2), None, None)
    with pytest.raises(ConfigError, match="the same facts"):
        growth([0.5], [0.6, 0.7])
