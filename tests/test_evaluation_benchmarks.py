"""The benchmark files: what is read of them, and what is refused."""

from __future__ import annotations

import json

import pytest
from benchmark_files import write_benchmarks

from sphere_plugin.errors import ConfigError, RequestError
from sphere_plugin.evaluation.benchmarks import FILES, file_of, read_benchmark


def read(folder, name):
    return read_benchmark(name, file_of(folder, name))


def test_the_four_formats(tmp_path) -> None:
    folder = write_benchmarks(tmp_path)
    assert read(folder, "gsm8k")[0] == {
        "question": "2 and 3?",
        "answer": "It is 2+3=5.\n#### 5",
        "solution": "It is 2+3=5.",
    }
    nq = read(folder, "nq")
    assert len(nq) == 11
    assert nq[0] == {
        "question": "where is it?",
        "answer": ["Rome", "something else"],
        "passage": "They say Rome, and so.",
    }
    yes = {"question": "is it that water boils", "passage": "They say water boils.", "answer": "yes"}
    assert read(folder, "boolq")[0] == {**yes, "words": ("yes", "no")}
    # Quotation marks in a TSV are text.
    no = {"sentence1": 'They say "Rome is in France.', "sentence2": "Rome is in France", "label": 1, "answer": "false"}
    assert read(folder, "rte")[1] == {**no, "words": ("true", "false")}


def test_the_real_files(shared_data) -> None:
    folder = shared_data / "general"
    found = {name: read(folder, name) for name in FILES}
    assert {name: len(records) for name, records in found.items()} == dict.fromkeys(FILES, 250)
    assert {one["answer"] for one in found["boolq"]} == {"yes", "no"}
    assert {one["label"] for one in found["rte"]} == {0, 1}
    assert all(one["passage"] for one in found["nq"])
    assert found["gsm8k"][0]["solution"].endswith("market.")


def test_a_file_by_itself(tmp_path) -> None:
    path = write_benchmarks(tmp_path) / FILES["rte"]
    assert file_of({"rte": path}, "rte") == path
    with pytest.raises(ConfigError, match="boolq=FILE"):
        file_of({"rte": path}, "boolq")
    with pytest.raises(ConfigError, match="test-NLI.tsv"):
        file_of(None, "rte")
    with pytest.raises(ConfigError, match="test-NLI.tsv"):
        file_of(tmp_path / "elsewhere", "rte")


@pytest.mark.parametrize(
    ("name", "record", "where"),
    [
        ("gsm8k", {"question": "2 and 3?", "answer": "five"}, "answer"),
        ("gsm8k", {"question": "2 and 3?", "answer": "five #### five"}, "answer"),
        ("gsm8k", {"question": " ", "answer": "#### 5"}, "question"),
        ("nq", {"question": "who", "answer": "Rome"}, "answer"),
        ("nq", {"question": "who", "answer": []}, "answer"),
        ("nq", {"question": "who", "answer": ["Rome"], "output": "text"}, "output"),
        ("boolq", {"question": "is it", "passage": "-", "answer": "yes"}, "answer"),
        ("boolq", {"question": "is it", "answer": True}, "passage"),
        ("nq", ["who", "Rome"], "line 2"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, name, record, where) -> None:
    path = write_benchmarks(tmp_path) / FILES[name]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]))
    with pytest.raises(RequestError, match=rf"{path.name}, line 2.*") as caught:
        read(tmp_path, name)
    assert where in caught.value.culprit


def test_damage_is_named(tmp_path) -> None:
    folder = write_benchmarks(tmp_path)
    (folder / FILES["rte"]).write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tperhaps\n")
    with pytest.raises(RequestError, match=r"line 2: label.*perhaps"):
        read(folder, "rte")
    (folder / FILES["rte"]).write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(RequestError, match="empty"):
        read(folder, "rte")
    (folder / FILES["nq"]).write_text("{not JSON\n")
    with pytest.raises(RequestError, match=r"test-OpenDomainQA.jsonl, line 1"):
        read(folder, "nq")
    (folder / FILES["boolq"]).write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="can be read"):
        read(folder, "boolq")
