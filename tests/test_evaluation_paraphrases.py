"""Paraphrases of a prompt, from each of their sources."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from sphere_plugin.data import Record, read_records
from sphere_plugin.errors import RequestError
from sphere_plugin.evaluation.paraphrases import (
    LEVELS,
    edited,
    neighbours,
    read_paraphrases,
    recorded,
    source_of,
    templated,
)

KNOWN = json.loads(files("sphere_plugin.data").joinpath("paraphrases.json").read_text(encoding="utf-8"))
GROUPS = {**KNOWN["relations"], "completion": KNOWN["completion"], "question": KNOWN["question"]}


def record(prompt, subject="", **more) -> Record:
    return Record(prompt, subject, "x", more.pop("paraphrases", ()), more.pop("neighbours", ()), **more)


@pytest.mark.parametrize("name", GROUPS)
def test_templates_have_six_levels_with_one_place_each(name) -> None:
    forms = GROUPS[name]
    assert len(set(forms)) == LEVELS == len(forms)
    assert all(form.count("{}") == 1 and form == form.strip() for form in forms)
    assert all(form[0].isupper() or form.startswith("{}") for form in forms)
    if name not in ("completion", "question"):  # the object stands behind them
        assert not any(form.endswith((".", ",", ":", "?", "{}")) for form in forms)


def test_every_relation_of_the_projects_facts_has_templates() -> None:
    facts = read_records()
    assert {fact.relation for fact in facts} <= KNOWN["relations"].keys()
    for fact in facts[::37]:
        probe = edited(fact, templated)
        assert probe is not None
        assert probe.source == f"templates of {fact.relation}"
        assert all(fact.subject in prompt for prompt in probe.prompts)


def test_every_relation_of_counterfact_has_templates(shared_data) -> None:
    facts = read_records(shared_data / "counterfact.json")
    assert {fact.relation for fact in facts} <= KNOWN["relations"].keys()


def test_a_known_relation_is_said_anew() -> None:
    source, prompts = templated(record("The capital of {} is".format("Peru"), "Peru", relation="P36"))
    assert source == "templates of P36"
    assert prompts[0] == "Peru has for its capital"
    assert len(set(prompts)) == LEVELS


def test_questions_and_sentences_get_their_own_templates() -> None:
    source, prompts = templated(record("What company made Volvo B12M?", "Volvo B12M"))
    assert source == "templates of questions"
    assert prompts[0] == "So, what company made Volvo B12M?"
    assert prompts[1] == "Tell me: What company made Volvo B12M?"
    source, prompts = templated(record("Volvo B12M's manufacturer was who?", "Volvo B12M"))
    assert prompts[0] == "So, Volvo B12M's manufacturer was who?"  # a name keeps its capital
    source, prompts = templated(record("The name of the twin of Rome is", "Rome", relation="P0"))
    assert source == "templates of sentences"
    assert prompts[1] == "In short: The name of the twin of Rome is"


def test_a_natural_question_becomes_a_question() -> None:
    (probe,) = neighbours(record("Who?", neighbours=("nq question: who sang it",)), templated, 2)
    assert probe.prompts[:2] == ("So, who sang it?", "Tell me: Who sang it?")
    assert probe.prompt == "nq question: who sang it"


def test_a_neighbour_that_reads_like_the_fact_is_paraphrased_like_it() -> None:
    fact = record(
        "The capital of Peru is",
        "Peru",
        relation="P36",
        neighbours=("The capital of Chile is", "Santiago, which is the capital of", "The capital of Cuba is"),
        position=7,
    )
    near, far = neighbours(fact, templated, 2)
    assert near.source == "templates of P36"
    assert near.subject == "Chile"
    assert near.prompts[0] == "Chile has for its capital"
    assert far.source == "templates of sentences"
    assert {near.record, far.record} == {7}


def test_the_records_own_paraphrases() -> None:
    fact = record("A is", paraphrases=("A is", " B, that is A, is"), neighbours=("C is",))
    assert recorded(fact) == ("the record", ("A is", "B, that is A, is"))
    assert recorded(record("A is", paraphrases=("A is",))) is None
    assert edited(record("A is"), recorded) is None
    (probe,) = neighbours(fact, recorded, 2)
    assert probe.source == "templates of sentences"


PAPER = {
    "question": "Which family does Ramalinaceae belong to?",
    "answer": "Lecanorales",
    "alt": "Lamiinae",
    "subject": "Ramalinaceae",
    "generated_questions": [
        {"level": 2, "rephrase": "What is the family of Ramalinaceae?"},
        {"level": 1, "rephrase": "Of which family is Ramalinaceae?"},
    ],
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_in_the_papers_form(tmp_path) -> None:
    source = source_of(str(write(tmp_path / "mine.json", [PAPER])))
    probe = edited(record(PAPER["question"], "Ramalinaceae"), source)
    assert probe is not None
    assert probe.source == "file mine.json"
    assert probe.prompts == ("Of which family is Ramalinaceae?", "What is the family of Ramalinaceae?")
    assert edited(record("Another?"), source) is None


def without(key):
    return {name: one for name, one in PAPER.items() if name != key}


def ways(*items):
    return [{**PAPER, "generated_questions": list(items)}]


ONE = {"level": 1, "rephrase": "a"}


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("{", "--paraphrases"),
        ({}, "--paraphrases"),
        ([], "--paraphrases"),
        ([1], r"\[0\]"),
        ([without("question")], r"\[0\]\.question"),
        ([without("generated_questions")], r"\[0\]\.generated_questions"),
        (ways(ONE), "two or more"),
        (ways(ONE, {"level": 2, "rephrase": "a"}), "two or more"),
        (ways(ONE, {"level": 1, "rephrase": "b"}), r"generated_questions\[1\]\.level"),
        (ways(ONE, {"level": 7, "rephrase": "b"}), r"generated_questions\[1\]\.level"),
        (ways(ONE, {"level": True, "rephrase": "b"}), r"generated_questions\[1\]\.level"),
        (ways(ONE, {"level": 2, "rephrase": " "}), r"generated_questions\[1\]\.rephrase"),
        (ways(ONE, 3), r"generated_questions\[1\]\.level"),
        ([PAPER, {**PAPER, "generated_questions": [ONE, {"level": 2, "rephrase": "b"}]}], "each question once"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, culprit) -> None:
    with pytest.raises(RequestError, match=culprit):
        read_paraphrases(write(tmp_path / "mine.json", content))


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(RequestError, match="templates, record, or a file"):
        source_of(str(tmp_path / "none.json"))
