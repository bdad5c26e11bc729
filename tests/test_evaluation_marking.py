"""How answers are marked: cases worked by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from sphere_plugin.evaluation import marking


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("She has 3 apples and 12 pears.", ["3", "12"]),
        ("It costs $1,000.50.", ["1000.50"]),
        ("1,234,567 in all, 89,12 not", ["1234567", "89", "12"]),
        ("5-3 is 2, 5 - 8 is -3", ["5", "3", "2", "5", "8", "-3"]),
        ("-$4.5 or (2)-1", ["-4.5", "2", "1"]),
        ("no figure at all", []),
        ("x2 and 3rd", ["2", "3"]),
    ],
)
def test_numbers_in_a_text(text, numbers) -> None:
    assert marking.numbers(text) == [Decimal(one) for one in numbers]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("9 * 2 = $<<9*2=18>>18 a day.\n#### 18", 18),
        ("First 3, then 4. The answer is 7.", 7),
        ("#### 1,080 dollars, or 2 each", 1080),
        ("### 5 is wrong. #### -6", -6),
        ("4 #### nothing behind it", 4),
        ("18.00", 18),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_result_of_a_solution(text, result) -> None:
    assert marking.result(text) == result


def test_a_problem_is_solved_by_its_number_however_it_is_written() -> None:
    doc = {"answer": "so 1,080\n#### 1,080"}
    for text, right in ((" It is $1080.", 1.0), ("1,080.0", 1.0), (" 108", 0.0), ("none", 0.0), ("1080 of 3", 0.0)):
        assert marking.solved(doc, [text]) == {"exact_match": right}
    # With the solution given, the first number counts, not the last.
    assert marking.concluded(doc, [" 1080, not 3"]) == {"exact_match": 1.0}
    assert marking.concluded(doc, [" 3, not 1080"]) == {"exact_match": 0.0}
    assert marking.concluded(doc, [" nothing"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a pear & the anthem", "apple pear anthem"),
        ("May 18 , 2018", "may 18 2018"),
        ("“U.S.A.”", "“usa”"),
        ("The", ""),
    ],
)
def test_normalisation(text, normal) -> None:
    assert marking.normalised(text) == normal


def test_exact_match_and_containment() -> None:
    answers = ["Wilhelm Conrad Röntgen", "14 December 1972 UTC"]
    assert marking.exact(" wilhelm conrad röntgen.", answers)
    assert not marking.exact("Wilhelm Röntgen", answers)
    assert not marking.exact("", answers)
    assert marking.contained("It was on 14 December, 1972, UTC, they say", answers)
    assert not marking.contained("It was in December 1972", answers)
    assert not marking.contained("14 December 1972 UTCs", answers)
    assert not marking.contained("anything", ["the"])  # nothing is left of it
    assert marking.answered({"answer": answers}, ["The Wilhelm Conrad Röntgen"]) == {"exact_match": 1.0}
    assert marking.found({"answer": answers}, ["so Wilhelm Conrad Röntgen did"]) == {"exact_match": 1.0}
    assert marking.answered({"answer": answers}, ["so Wilhelm Conrad Röntgen did"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "first"),
    [(" Yes.", "yes"), (" The answer is No, not yes", "no"), ("nothing, know, yesterday", None), ("", None)],
)
def test_the_first_of_two_words(text, first) -> None:
    assert marking.first_of(text, ("yes", "no")) == first
    doc = {"answer": "yes", "words": ["yes", "no"]}
    assert marking.said(doc, [text]) == {"exact_match": float(first == "yes")}
