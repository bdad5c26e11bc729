"""Reading facts from the file formats people have."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sphere_plugin.data import Record, read_records
from sphere_plugin.errors import RequestError

COUNTERFACT = {
    "requested_rewrite": {"prompt": "{} was made by", "subject": "iPod", "target_new": {"str": "Sony", "id": "Q1"}},
    "paraphrase_prompts": ["The maker of iPod is"],
    "neighborhood_prompts": ["Macintosh was made by"],
}
FLAT = {
    "prompt": "iPod was made by",
    "subject": "iPod",
    "target_new": "Sony",
    "rephrase_prompt": "The maker of iPod is",
    "locality_prompt": "Macintosh was made by",
}
ZSRE = {
    "src": "iPod was made by",
    "subject": "iPod",
    "alt": "Sony",
    "rephrase": "The maker of iPod is",
    "loc": "Macintosh was made by",
}
EXPECTED = Record("iPod was made by", "iPod", "Sony", ("The maker of iPod is",), ("Macintosh was made by",))


def write(folder: Path, content: object) -> Path:
    path = folder / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("raw", [COUNTERFACT, FLAT, ZSRE], ids=["CounterFact", "EasyEdit's flat one", "ZsRE"])
def test_every_schema_gives_the_same_record(raw: dict, tmp_path: Path) -> None:
    assert read_records(write(tmp_path, [raw])) == [EXPECTED]


def test_our_own_facts_are_enough_for_the_demo() -> None:
    records = read_records(limit=300)
    assert len(records) == 300
    assert all(len(record.paraphrases) == 2 and len(record.neighbours) >= 5 for record in records)


def test_the_benchmark_files_can_be_read(shared_data: Path) -> None:
    for name, least in (("counterfact.json", 340), ("counterfact-edit.json", 5000), ("zsre_mend_eval.json", 600)):
        assert len(read_records(shared_data / name)) >= least


def test_a_prompt_that_comes_twice_is_edited_once(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path, [FLAT, {**FLAT, "target_new": "Nokia"}]))) == 1


def test_records_that_cannot_be_edited_are_left_out_and_said_so(tmp_path: Path, caplog) -> None:
    path = write(tmp_path, [{**ZSRE, "subject": "Walkman"}, ZSRE])
    with caplog.at_level(logging.WARNING, logger="sphere_plugin"):
        assert read_records(path) == [EXPECTED]
    assert "1 records" in caplog.text
    assert "Walkman" in caplog.text


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("{", "JSON"),
        ({"prompt": "x"}, "array"),
        ([], "0 usable"),
        ([{"question": "?"}], "[0]"),
        ([FLAT, 3], "[1]"),
        ([{"requested_rewrite": {"prompt": "{} is"}}], "[0]"),
        ([{**COUNTERFACT, "requested_rewrite": 3}], "[0]"),
    ],
    ids=str,
)
def test_a_bad_file_is_named_with_what_is_wrong(content: object, culprit: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RequestError) as error:
        read_records(path)
    assert culprit in str(error.value)
    assert "facts.json" in str(error.value)


def test_a_missing_file_and_too_few_records(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere.json"):
        read_records(tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match="1 usable records.*at least 2"):
        read_records(write(tmp_path, [FLAT]), limit=2)
