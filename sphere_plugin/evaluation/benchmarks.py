"""Benchmark files on disk: the four that measure general abilities, read and checked.

They are GSM8K, Natural Questions, BoolQ and RTE in the form in which Gu et al. (2024) give them out. None comes with
this package.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.errors import ConfigError, RequestError
from sphere_plugin.parsing import json_of
from sphere_plugin.paths import is_file, user_path

# Benchmark -> its file in a folder of all four.
FILES: Final = MappingProxyType(
    {
        "gsm8k": "test-reasoning.jsonl",
        "nq": "test-OpenDomainQA.jsonl",
        "boolq": "test-ClosedDomainQA.jsonl",
        "rte": "test-NLI.tsv",
    }
)
LABELS: Final = ("entailment", "not_entailment")
TRUTH: Final = ("true", "false")  # how an answer says them
CONSENT: Final = ("yes", "no")

Data = Path | Mapping[str, Path]


def file_of(data: Data | None, benchmark: str) -> Path:
    """Where a benchmark lies.

    Args:
        data: a folder that has it under the name in `FILES`, or benchmark -> file.
        benchmark: one of `FILES`.

    Raises:
        ConfigError: nobody says where it is, or it is not there.
    """
    if isinstance(data, Mapping):
        path = data.get(benchmark)
    else:
        path = None if data is None else Path(data) / FILES[benchmark]
    if path is None:
        remedy = f"Give a folder that has {FILES[benchmark]}, or {benchmark}=FILE; hub: before a name asks a hub."
        raise ConfigError("--data", "nothing", f"the file of {benchmark}", remedy)
    path = user_path(path)
    if not is_file(path):
        remedy = f"Give a folder that has {FILES[benchmark]}, or {benchmark}=FILE."
        raise ConfigError("--data", str(path), f"the file of {benchmark}", remedy)
    return path


def read_benchmark(benchmark: str, path: Path) -> list[dict[str, Any]]:
    """The records of a benchmark, in the order of the file.

    Returns:
        gsm8k: question, answer, solution (the answer without its result). nq: question, answer (a list), passage
        ("" where there is none). boolq: question, without its question mark, passage, answer ("yes" or "no"). rte:
        sentence1, sentence2, answer ("true" if the second follows from the first, else "false"), label (0 for true, 1
        for false). The last two have words, the answers there are.

    Raises:
        RequestError: a line is not what the benchmark has; names file and line.
    """
    read = _lines if path.suffix != ".tsv" else _rows
    records = [_READERS[benchmark](raw, f"{path}, line {number}") for number, raw in read(path)]
    if not records:
        raise RequestError(str(path), "an empty file", f"records of {benchmark}", "Give another file.")
    return records


# ---- one record ----


def _gsm8k(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    answer = _text(raw, "answer", where)
    solution, mark, result = answer.rpartition("####")
    if not mark or not any(map(str.isdigit, result)):
        raise _wrong(f"{where}: answer", answer[-40:], "a solution with its result behind ####")
    return {"question": _text(raw, "question", where), "answer": answer, "solution": solution.strip()}


def _nq(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    answers = raw.get("answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise _wrong(f"{where}: answer", answers, "a list of texts")
    passages = raw.get("output") or [""]
    if not isinstance(passages, list) or not isinstance(passages[0], str):
        raise _wrong(f"{where}: output", passages, "a list of texts")
    return {"question": _text(raw, "question", where), "answer": answers, "passage": passages[0].strip()}


def _boolq(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(raw.get("answer"), bool):
        raise _wrong(f"{where}: answer", raw.get("answer"), "true or false")
    question, passage = (_text(raw, key, where) for key in ("question", "passage"))
    answer = CONSENT[0 if raw["answer"] else 1]
    return {"question": question.rstrip("? "), "passage": passage, "answer": answer, "words": CONSENT}


def _rte(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    label = raw.get("label")
    if label not in LABELS:
        raise _wrong(f"{where}: label", label, " or ".join(LABELS))
    texts = {key: _text(raw, key, where) for key in ("sentence1", "sentence2")}
    number = LABELS.index(str(label))
    return {**texts, "label": number, "answer": TRUTH[number], "words": TRUTH}


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = MappingProxyType(
    {"gsm8k": _gsm8k, "nq": _nq, "boolq": _boolq, "rte": _rte}
)


# ---- files ----


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json_of(line)
        except ValueError as error:
            raise _wrong(f"{path}, line {number}", line[:60], f"a JSON object ({error})") from error
        if not isinstance(raw, dict):
            raise _wrong(f"{path}, line {number}", raw, "a JSON object")
        yield number, raw


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = [line for line in _content(path).split("\n") if line.strip()]
    yield from enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 2)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(str(path), str(error), "a file that can be read", "Check it.") from error


def _text(raw: Mapping[str, Any], key: str, where: str) -> str:
    text = raw.get(key)
    if not isinstance(text, str) or not text.strip():
        raise _wrong(f"{where}: {key}", text, "a text")
    return text.strip()


def _wrong(where: str, got: object, expected: str) -> RequestError:
    return RequestError(where, got, expected, "docs/abilities.md says what the file has to hold.")


# ---- as the task files name them ----


def gsm8k(**told: Any) -> Any:
    """The data set of GSM8K, for lm-evaluation-harness; see `_dataset`."""
    return _dataset("gsm8k", **told)


def nq(**told: Any) -> Any:
    """The data set of Natural Questions."""
    return _dataset("nq", **told)


def boolq(**told: Any) -> Any:
    """The data set of BoolQ."""
    return _dataset("boolq", **told)


def rte(**told: Any) -> Any:
    """The data set of RTE."""
    return _dataset("rte", **told)


def _dataset(benchmark: str, data: Any = None, shots: int = 0, **rest: Any) -> Any:  # noqa: ARG001 (the task's metadata)
    """A `datasets.DatasetDict`, in memory: "test", and in "shots" the last records, which are then not in "test".

    Args:
        benchmark: one of `FILES`.
        data: the metadata of that name, a folder or benchmark -> file.
        shots: how many records are examples.
        rest: all other metadata.
    """
    from datasets import Dataset, DatasetDict

    path = file_of(data, benchmark)
    records = read_benchmark(benchmark, path)
    count = len(records) - shots
    if count < 1:
        raise _wrong(str(path), f"{len(records)} records", f"more than {shots}, of which the last are the examples")
    parts = {"test": records[:count], **({"shots": records[count:]} if shots else {})}
    return DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
