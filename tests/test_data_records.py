"""Reading facts from the file formats people have."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sphere_plugin.data import Record, read_records, records_of
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
KNOWEDIT = {
    "subject": "iPod",
    "prompt": "iPod was made by",
    "target_new": "Sony",
    "ground_truth": ["Apple"],
    "rephrase_prompt": "The maker of iPod is",
    "locality": {
        "Relation_Specificity": [{"prompt": "Macintosh was made by", "ground_truth": [["Apple", "Apple Inc."]]}]
    },
    "portability": {"Reasoning": [{"prompt": "The maker of iPod is in", "ground_truth": "Tokyo"}]},
}
EXPECTED = Record("iPod was made by", "iPod", "Sony", ("The maker of iPod is",), ("Macintosh was made by",))


def write(folder: Path, content: object) -> Path:
    path = folder / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("raw", [COUNTERFACT, FLAT, ZSRE], ids=["CounterFact", "EasyEdit's flat one", "ZsRE"])
def test_every_schema_gives_the_same_record(raw: dict, tmp_path: Path) -> None:
    assert read_records(write(tmp_path, [raw])) == [EXPECTED]


def test_a_flat_record_may_have_several_prompts_of_a_kind(tmp_path: Path) -> None:
    prompts = ["Macintosh was made by", "Windows was made by"]
    raw = FLAT | {
        "rephrase_prompt": ["A", " ", "B"],
        "locality_prompt": prompts,
        "locality_ground_truth": ["Apple", "MS"],
    }
    (record,) = read_records(write(tmp_path, [raw]))
    assert (record.paraphrases, record.neighbours) == (("A", "B"), tuple(prompts))
    assert record.neighbour_targets == ("Apple", "MS")
    (record,) = read_records(write(tmp_path, [raw | {"locality_ground_truth": "Apple"}]))
    assert record.neighbour_targets == ("Apple", "Apple")
    for key, value in (("rephrase_prompt", 5), ("locality_prompt", [1]), ("locality_ground_truth", ["Apple"])):
        with pytest.raises(RequestError, match="expected all fields of its schema"):
            read_records(write(tmp_path, [raw | {key: value}]))


TRUE = replace(EXPECTED, target_true="Apple", neighbour_targets=("Apple",))


def with_truth(**changes: object) -> dict:
    return {**COUNTERFACT["requested_rewrite"], "target_true": {"str": "Apple"}, **changes}


@pytest.mark.parametrize(
    "raw",
    [
        {**COUNTERFACT, "requested_rewrite": with_truth()},
        {**FLAT, "ground_truth": "Apple", "locality_ground_truth": "Apple"},
        {**ZSRE, "answers": ["Apple", "Apple Inc."], "loc_ans": "Apple"},
        KNOWEDIT,
    ],
    ids=["CounterFact", "EasyEdit's flat one", "ZsRE", "KnowEdit"],
)
def test_every_schema_gives_the_true_answers(raw: dict, tmp_path: Path) -> None:
    assert read_records(write(tmp_path, [raw])) == [TRUE]


def test_neighbours_keep_their_own_answers(tmp_path: Path) -> None:
    around = {"neighborhood_prompts": ["Macintosh was made by", "Walkman was made by"]}
    own = {**COUNTERFACT, **around, "requested_rewrite": with_truth(), "neighborhood_targets": ["Apple", "Sony"]}
    assert read_records(write(tmp_path, [own]))[0].neighbour_targets == ("Apple", "Sony")
    del own["neighborhood_targets"]
    assert read_records(write(tmp_path, [own]))[0].neighbour_targets == ("Apple", "Apple")
    with pytest.raises(RequestError, match=r"facts.json\[0\].neighbour_targets.*one for each of 2"):
        read_records(write(tmp_path, [{**own, "neighborhood_targets": ["Apple"]}]))


def test_texts_to_write_and_to_compare_with_are_read_in_every_schema(tmp_path: Path) -> None:
    more = {"generation_prompts": ["iPod is", "iPod was"], "reference_texts": ["Sony is a company."]}
    expected = replace(EXPECTED, generation_prompts=("iPod is", "iPod was"), reference_texts=("Sony is a company.",))
    for raw in (COUNTERFACT, FLAT, ZSRE):
        assert read_records(write(tmp_path, [{**raw, **more}])) == [expected]


def test_localities_of_knowedit_are_neighbours_and_an_unknown_answer_is_empty() -> None:
    groups = {
        "Relation_Specificity": [{"prompt": "Its colour is", "ground_truth": [[]]}, {"prompt": "Its shape is"}],
        "Forgetfulness": [{"prompt": "Its maker, which is not Sony, is", "ground_truth": [[], ["Apple", "A."]]}],
    }
    item = {**KNOWEDIT, "locality": groups}
    (record,) = records_of([item])
    assert record.neighbours == ("Its colour is", "Its shape is", "Its maker, which is not Sony, is")
    assert record.neighbour_targets == ("", "", "Apple")
    # As EasyEdit's KnowEditDataset hands the same out.
    del item["locality"]
    item |= {
        "locality_rs": groups["Relation_Specificity"],
        "locality_f": groups["Forgetfulness"],
        "portability_r": None,
    }
    assert records_of([item]) == [record]
    assert records_of([{**item, "locality_rs": None, "locality_f": None}])[0].neighbours == ()


class Dataset:
    """What EasyEdit's datasets are: of a length, and indexed."""

    def __init__(self, items: list[dict]) -> None:
        self._data = items

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> dict:
        return self._data[number]


def test_a_dataset_of_easyedits_gives_records() -> None:
    nameless = {key: value for key, value in FLAT.items() if key != "subject"} | {"cond": "Apple >> Sony || ..."}
    assert records_of(Dataset([FLAT])) == [EXPECTED]
    assert records_of(Dataset([nameless])) == [replace(EXPECTED, subject="")], "ZsreDataset names no subject"

    def lazily() -> Iterator[dict]:
        yield FLAT

    assert records_of(lazily()) == [EXPECTED]


@pytest.mark.parametrize("items", [FLAT, "facts.json", 3, [3], [{"prompt": "x"}], []], ids=str)
def test_what_is_no_list_of_records_is_refused(items: object) -> None:
    with pytest.raises(RequestError, match="items"):
        records_of(items)


def test_a_file_must_name_its_subjects(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"facts.json\[0\].*subject"):
        read_records(write(tmp_path, [{key: value for key, value in FLAT.items() if key != "subject"}]))


def test_an_order_shuffles_before_the_limit() -> None:
    everything = read_records()
    assert [record.position for record in everything] == sorted(record.position for record in everything)
    some, again, other = (
        read_records(limit=20, order=1),
        read_records(limit=20, order=1),
        read_records(limit=20, order=2),
    )
    assert some == again
    assert some != other
    assert max(record.position for record in some) > 100
    by_position = {record.position: record for record in everything}
    assert all(by_position[record.position] == record for record in some)
    assert sorted(read_records(order=3), key=lambda record: record.position) == everything


def test_our_own_facts_are_enough_for_the_demo() -> None:
    records = read_records(limit=300)
    assert len(records) == 300
    assert all(len(record.paraphrases) == 2 and len(record.neighbours) >= 5 for record in records)
    assert all(
        record.target_true and all(record.neighbour_targets) and record.generation_prompts for record in records
    )


def test_the_benchmark_files_can_be_read(shared_data: Path) -> None:
    for name, least in (("counterfact.json", 340), ("counterfact-edit.json", 5000), ("zsre_mend_eval.json", 600)):
        records = read_records(shared_data / name)
        assert len(records) >= least
        assert all(record.target_true and len(record.neighbour_targets) >= 1 for record in records)
    assert all(len(record.generation_prompts) == 10 for record in read_records(shared_data / "counterfact.json"))


@pytest.mark.parametrize(
    ("name", "paraphrases", "truths", "around"),
    [
        ("ZsRE-test-all.json", 300, 300, 600),
        ("wiki_counterfact_train_cf.json", 0, 300, 435),
        ("wiki_recent_train.json", 0, 0, 1064),
    ],
)
def test_knowedits_files_can_be_read(name: str, paraphrases: int, truths: int, around: int, shared_data: Path) -> None:
    records = read_records(shared_data / "knowedit" / name)
    raw = json.loads((shared_data / "knowedit" / name).read_text(encoding="utf-8"))
    assert len(records) == len({item["prompt"] for item in raw})
    everything = [records_of([item])[0] for item in raw]
    assert sum(len(record.paraphrases) for record in everything) == paraphrases
    assert sum(bool(record.target_true) for record in everything) == truths
    assert sum(len(record.neighbours) for record in everything) == around
    known = [bool(answer) for record in everything for answer in record.neighbour_targets]
    assert sum(known) > 0.99 * around, "a few ground truths are empty in the file"


def test_a_prompt_that_comes_twice_is_edited_once(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path, [FLAT, {**FLAT, "target_new": "Nokia"}]))) == 1


def test_records_that_cannot_be_edited_are_left_out_and_said_so(tmp_path: Path, caplog) -> None:
    path = write(tmp_path, [{**ZSRE, "subject": "Walkman"}, ZSRE])
    with caplog.at_level(logging.WARNING, logger="sphere_plugin"):
        assert read_records(path) == [replace(EXPECTED, position=1)]
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
        ([{**COUNTERFACT, "paraphrase_prompts": "one text"}], "one text"),
        ([{**FLAT, "reference_texts": [3]}], "[3]"),
        ([{**KNOWEDIT, "locality": ["x"]}], "[0]"),
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
