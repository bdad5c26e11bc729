"""Tests of the facts data set: its schema, its truth conditions and its reproducibility."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "sphere_plugin" / "data" / "facts.json"
SCRIPT = ROOT / "tools" / "build_facts.py"
SOURCE = ROOT / "tools" / "facts_source.yaml"

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return json.loads(FACTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    return yaml.safe_load(SOURCE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def truth(source: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """(relation, subject) -> every true answer in lower case, read without the build script."""
    answers: dict[tuple[str, str], set[str]] = {}
    for table in source["relations"]:
        also = table.get("also", {})
        for target, subjects in table["facts"].items():
            for subject in subjects:
                known = [target, *also.get(subject, []), *also.get(target, [])]
                names = {name.casefold() for name in known}
                for group in source["aliases"]:
                    group_names = {name.casefold() for name in group}
                    if names & group_names:
                        names |= group_names
                answers[table["relation_id"], subject] = names
    return answers


@pytest.fixture(scope="module")
def prompt_facts(source: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Filled edit prompt -> (relation, subject, true object), for every fact of the tables."""
    return {
        table["prompt"].format(subject): (table["relation_id"], subject, target)
        for table in source["relations"]
        for target, subjects in table["facts"].items()
        for subject in subjects
    }


def parts(record: Record) -> tuple[str, str, str, str]:
    """The subject, the filled edit prompt, the new target and the true target."""
    rewrite = record["requested_rewrite"]
    filled = rewrite["prompt"].format(rewrite["subject"])
    return rewrite["subject"], filled, rewrite["target_new"]["str"], rewrite["target_true"]["str"]


def run_script(*args: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *args]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False)


def test_size_and_case_ids(records: list[Record]) -> None:
    assert len(records) >= 400
    assert [record["case_id"] for record in records] == list(range(len(records)))


def test_one_record_a_line(records: list[Record]) -> None:
    lines = FACTS.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == records


def test_schema(records: list[Record]) -> None:
    for record in records:
        assert list(record) == [
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "neighborhood_targets",
            "attribute_prompts",
            "generation_prompts",
        ]
        assert type(record["case_id"]) is int
        rewrite = record["requested_rewrite"]
        assert list(rewrite) == ["prompt", "relation_id", "target_new", "target_true", "subject"]
        assert list(rewrite["target_new"]) == list(rewrite["target_true"]) == ["str"]
        assert re.fullmatch(r"P\d+", rewrite["relation_id"])
        assert record["attribute_prompts"] == []
        texts = [
            rewrite["prompt"],
            rewrite["subject"],
            rewrite["target_new"]["str"],
            rewrite["target_true"]["str"],
            *record["paraphrase_prompts"],
            *record["neighborhood_prompts"],
            *record["neighborhood_targets"],
            *record["generation_prompts"],
        ]
        for text in texts:
            assert isinstance(text, str) and text and text == " ".join(text.split()), record


def test_relations(records: list[Record]) -> None:
    counts = Counter(record["requested_rewrite"]["relation_id"] for record in records)
    assert 10 <= len(counts) <= 16
    assert all(20 <= count <= 45 for count in counts.values()), counts


def test_edit_prompt_has_one_slot(records: list[Record]) -> None:
    for record in records:
        subject, filled, _, _ = parts(record)
        assert record["requested_rewrite"]["prompt"].count("{}") == 1
        assert filled.casefold().count(subject.casefold()) == 1, filled
        assert filled[-1].isalpha(), filled


def test_subject_relation_pairs_are_unique(records: list[Record]) -> None:
    rewrites = [record["requested_rewrite"] for record in records]
    pairs = Counter((rewrite["subject"], rewrite["relation_id"]) for rewrite in rewrites)
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_targets(records: list[Record], truth: dict[tuple[str, str], set[str]]) -> None:
    objects: dict[str, set[str]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        objects.setdefault(rewrite["relation_id"], set()).add(rewrite["target_true"]["str"])
    for record in records:
        subject, filled, new, true = parts(record)
        relation_id = record["requested_rewrite"]["relation_id"]
        assert new != true
        assert true.casefold() in truth[relation_id, subject]
        assert new.casefold() not in truth[relation_id, subject], (subject, new)
        assert new in objects[relation_id], (subject, new)
        assert new.split()[0] != true.split()[0], (new, true)
        for target in (new, true):
            assert not re.search(rf"\b{re.escape(target)}\b", filled), (filled, target)


def test_new_targets_are_spread_out(records: list[Record]) -> None:
    by_relation: dict[str, list[Record]] = {}
    for record in records:
        by_relation.setdefault(record["requested_rewrite"]["relation_id"], []).append(record)
    for relation_id, group in by_relation.items():
        uses = Counter(parts(record)[2] for record in group)
        objects = {parts(record)[3] for record in group}
        assert set(uses) == objects, relation_id
        assert max(uses.values()) <= len(group) / len(objects) + 3, (relation_id, uses)


def test_paraphrases(records: list[Record]) -> None:
    for record in records:
        subject, filled, _, true = parts(record)
        paraphrases = record["paraphrase_prompts"]
        assert len(paraphrases) == len(set(paraphrases)) == 2
        for prompt in paraphrases:
            assert subject in prompt and prompt.casefold().count(subject.casefold()) == 1, prompt
            assert prompt != filled
            assert prompt[-1].isalpha(), prompt
            assert not re.search(rf"\b{re.escape(true)}\b", prompt), prompt


def test_generation_prompts(records: list[Record]) -> None:
    for record in records:
        subject, filled, _, _ = parts(record)
        prompts = record["generation_prompts"]
        assert len(prompts) == len(set(prompts)) >= 2
        assert all(subject in prompt and prompt != filled for prompt in prompts), prompts


def test_neighborhood(
    records: list[Record],
    truth: dict[tuple[str, str], set[str]],
    prompt_facts: dict[str, tuple[str, str, str]],
) -> None:
    for record in records:
        subject, _, new, true = parts(record)
        prompts, targets = record["neighborhood_prompts"], record["neighborhood_targets"]
        assert 5 <= len(prompts) <= 10 and len(prompts) == len(targets) == len(set(prompts))
        for prompt, target in zip(prompts, targets, strict=True):
            assert subject.casefold() not in prompt.casefold(), (subject, prompt)
            relation_id, neighbor, known_target = prompt_facts[prompt]
            assert target == known_target, (prompt, target)
            assert new.casefold() not in truth[relation_id, neighbor], (prompt, new)
        same = [target == true for target in targets]
        assert same == sorted(same, reverse=True), (subject, targets)  # neighbours with the same object first
        assert all(same) or len(prompts) == 5, (subject, targets)  # others only to reach the minimum


def test_most_records_have_a_neighbor_with_the_same_object(records: list[Record]) -> None:
    found = sum(parts(record)[3] in record["neighborhood_targets"] for record in records)
    assert found >= 0.75 * len(records)


def test_neighborhoods_never_name_an_edited_subject(records: list[Record]) -> None:
    """Locality stays measurable after all records have been applied."""
    subjects = {parts(record)[0] for record in records}
    edited = re.compile("|".join(rf"\b{re.escape(subject)}\b" for subject in sorted(subjects)), re.IGNORECASE)
    prompts = {prompt for record in records for prompt in record["neighborhood_prompts"]}
    assert sorted(prompt for prompt in prompts if edited.search(prompt)) == []


def test_order_mixes_relations_and_separates_subjects(records: list[Record]) -> None:
    subjects = [parts(record)[0] for record in records]
    assert len(set(subjects[:300])) >= 285
    for start in range(len(records) - 49):
        window = subjects[start : start + 50]
        assert len(set(window)) == 50, Counter(window).most_common(1)
    for start in range(0, len(records) - 49, 50):
        relations = {r["requested_rewrite"]["relation_id"] for r in records[start : start + 50]}
        assert len(relations) >= 10, start


@pytest.mark.parametrize("hash_seed", ["0", "1", "12345"])
def test_file_is_what_the_script_builds(hash_seed: str) -> None:
    result = run_script("--check", hash_seed=hash_seed)
    assert result.returncode == 0, result.stdout + result.stderr


def test_check_notices_changes(tmp_path: Path) -> None:
    copy = tmp_path / "facts.json"
    missing = run_script("--check", "--output", str(copy))
    assert missing.returncode == 1, missing.stderr
    text = FACTS.read_text(encoding="utf-8")
    copy.write_text(text.replace('"case_id": 0,', '"case_id": 999,', 1), encoding="utf-8")
    changed = run_script("--check", "--output", str(copy))
    assert changed.returncode == 1 and "out of date" in changed.stdout, changed.stderr
    assert run_script("--output", str(copy)).returncode == 0
    assert copy.read_bytes() == FACTS.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('prompt: "The capital of {} is"', 'prompt: "The capital is"', "exactly one {}"),
        ('prompt: "The capital of {} is"', 'prompt: "The capital of {} is:"', "a word can follow"),
        ("Paris: [France]", "Paris: [France, Germany]", "a subject occurs twice"),
        ("Paris: [France]", "Paris: [France]\n      Paris: [Atlantis]", "repeated key"),
        ("Paris: [France]", "Paris: [the land around Paris]", "answer given away"),
        ("      birds: [reptiles]", "      unicorns: [mammals]", "unknown name in `also`"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    result = run_script("--source", str(broken), "--output", str(tmp_path / "facts.json"))
    assert result.returncode != 0
    assert message in result.stderr
