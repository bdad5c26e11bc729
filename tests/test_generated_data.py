"""Files of any content, facts, texts, run folders, weights: what is read is what was written, or it is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generated import (
    EXTREME,
    FLAWED,
    SOUND,
    Made,
    Tally,
    broken,
    changed,
    good_texts,
    is_good,
    matrices,
    mostly,
    share,
    texts,
    values,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from sphere_plugin.data import Record, read_records, records_of
from sphere_plugin.editing.corpus import LONGEST, TEXT_FIELDS, read_corpus
from sphere_plugin.errors import RequestError
from sphere_plugin.evaluation.audits import read_audit
from sphere_plugin.evaluation.benchmarks import FILES, read_benchmark
from sphere_plugin.evaluation.paraphrases import read_paraphrases
from sphere_plugin.evaluation.tallies import read_tally
from sphere_plugin.files import read_json, read_tensors, write_json, write_tensors
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.batch import bits, same_bits
from sphere_plugin.journaling.delta import apply_delta, write_delta
from sphere_plugin.report.read import read_run
from sphere_plugin.sequence.guard import Events
from sphere_plugin.sequence.manifest import check_same, read_manifest
from sphere_plugin.sequence.settings import RunSettings


def written(path: Path, content: Any) -> Path:
    """A file with this text, or with this JSON, as anybody may write it."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for files."""
    return tmp_path_factory.mktemp("data")


# ---- facts ----


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A fact that can be edited."""
    subject = draw(good_texts().filter(lambda text: "{}" not in text))
    prompt = draw(st.sampled_from(("{} is in", "The {} is", "{}"))).format(subject) if "{" not in subject else subject
    around = tuple(draw(st.lists(good_texts(), max_size=3)))
    return Record(prompt, subject, draw(good_texts()), tuple(draw(st.lists(good_texts(), max_size=2))), around)


def as_schema(record: Record, schema: str) -> dict[str, Any]:
    """The record as a file of this schema has it."""
    if schema == "counterfact":
        rewrite = {"prompt": record.prompt, "subject": record.subject, "target_new": {"str": record.target_new}}
        around = {"paraphrase_prompts": list(record.paraphrases), "neighborhood_prompts": list(record.neighbours)}
        return {"requested_rewrite": rewrite, **around}
    one = {"rephrase": next(iter(record.paraphrases), None), "loc": next(iter(record.neighbours), None)}
    if schema == "zsre":
        return {"src": record.prompt, "subject": record.subject, "alt": record.target_new, **one}
    flat = {"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}
    if schema == "flat":
        return {**flat, "rephrase_prompt": one["rephrase"], "locality_prompt": one["loc"]}
    return {
        **flat,
        "rephrase_prompt": one["rephrase"],
        "locality": {"all": [{"prompt": p} for p in record.neighbours]},
    }


def test_facts_come_back_from_every_schema(record_property, place):
    tally = Tally("data files")
    schemas = st.sampled_from(("counterfact", "zsre", "flat", "knowedit"))

    @share(1.0)
    @given(
        st.lists(st.tuples(records(), schemas), min_size=1, max_size=4), st.booleans(), st.none() | st.integers(0, 5)
    )
    def read(given_: list[tuple[Record, str]], ascii_: bool, order: int | None) -> None:
        path = place / "facts.json"
        path.write_text(json.dumps([as_schema(*one) for one in given_], ensure_ascii=ascii_), encoding="utf-8")
        with tally.one(True):
            found = read_records(path, order=order)
            assert len({one.prompt for one in found}) == len(found) == len({one.prompt for one, _ in given_})
            for record in found:
                told, schema = given_[record.position]
                whole = schema == "counterfact"
                assert (record.prompt, record.subject, record.target_new) == (
                    told.prompt,
                    told.subject,
                    told.target_new,
                )
                assert record.paraphrases == (told.paraphrases if whole else told.paraphrases[:1])
                some = whole or schema == "knowedit"
                assert record.neighbours == (told.neighbours if some else told.neighbours[:1])

    read()
    tally.told(record_property)


def test_facts_with_anything_in_them(record_property, place):
    """Fields of other types, other keys, cut files: a record of texts that can be edited, or a refusal."""
    tally = Tally("data files")
    known = (
        "target_true",
        "ground_truth",
        "locality",
        "locality_rs",
        "generation_prompts",
        "reference_texts",
        "answers",
    )
    known += ("neighborhood_targets", "paraphrase_prompts", "neighborhood_prompts", "locality_ground_truth", "loc_ans")
    good = Record("iPod was made by", "iPod", "Sony", ("Who made iPod?",), ("Macintosh was made by",))

    @st.composite
    def files(draw: st.DrawFn) -> Any:
        raw = as_schema(good, draw(st.sampled_from(("counterfact", "zsre", "flat", "knowedit"))))
        raw = draw(changed(raw, known))
        if isinstance(raw.get("requested_rewrite"), dict):
            raw["requested_rewrite"] = draw(changed(raw["requested_rewrite"], ("target_true", "relation_id")))
        whole = [raw, *draw(st.lists(values(3), max_size=1))]
        return draw(broken(json.dumps(whole))) if draw(st.integers(0, 2)) == 0 else whole

    def of_texts(record: Record) -> None:
        assert is_good(record.prompt) and is_good(record.target_new) and record.subject in record.prompt
        for group in (record.paraphrases, record.neighbours, record.neighbour_targets, record.generation_prompts):
            assert isinstance(group, tuple) and all(isinstance(text, str) for text in group)
        assert len(record.neighbour_targets) in (0, len(record.neighbours))
        " ".join((record.target_true, record.relation, *record.paraphrases, *record.neighbours)).encode()

    @share(3.0)
    @given(files())
    def read(content: Any) -> None:
        with tally.one():
            for record in read_records(written(place / "facts.json", content)):
                of_texts(record)
        if not isinstance(content, str):
            with tally.one():
                for record in records_of(content):
                    of_texts(record)

    read()
    tally.told(record_property)


# ---- other texts ----


def test_paraphrases(record_property, place):
    tally = Tally("data files")
    good = st.fixed_dictionaries({"level": st.integers(1, 6), "rephrase": good_texts()})
    way = mostly(
        good, st.fixed_dictionaries({"level": st.integers(0, 7) | values(1), "rephrase": texts()}) | values(2)
    )
    ways = st.lists(way, min_size=2, max_size=4, unique_by=repr)
    item = st.fixed_dictionaries({"question": good_texts(), "generated_questions": ways})
    other = item.flatmap(changed)

    @share(2.0)
    @given(mostly(st.lists(mostly(item, other), min_size=1, max_size=2), values()))
    def read(content: Any) -> None:
        with tally.one():
            found = read_paraphrases(written(place / "other.json", content))
            slow = {
                one["question"].strip(): list(
                    dict.fromkeys(
                        way["rephrase"].strip()
                        for way in sorted(one["generated_questions"], key=lambda way: way["level"])
                    )
                )
                for one in content
            }
            assert {question: list(prompts) for question, prompts in found.items()} == slow
            assert all(len(prompts) >= 2 for prompts in slow.values())

    read()
    tally.told(record_property)


def test_texts_for_statistics(record_property, place):
    """JSON, lines of JSON and paragraphs; line separators inside a text are none between lines."""
    tally = Tally("data files")
    record = st.builds(lambda key, text: {key: text}, st.sampled_from((*TEXT_FIELDS, "x")), texts() | values(1))

    @share(2.0)
    @given(
        st.lists(texts(40) | record | values(1), max_size=4),
        st.sampled_from((".json", ".jsonl", ".txt")),
        st.integers(1, 5),
    )
    def read(content: list[Any], kind: str, number: int) -> None:
        lines = {
            ".json": json.dumps(content),
            ".jsonl": "\n".join(json.dumps(one, ensure_ascii=False) for one in content),
        }
        text = lines.get(kind, "\n\n".join(one for one in content if isinstance(one, str)))
        path = written(place / f"corpus{kind}", text)
        with tally.one():
            found = read_corpus(str(path), number, nn.Identity(), None, 0)
            if kind == ".txt":
                plain = path.read_text(encoding="utf-8")
                expected = [part for part in plain.split("\n\n") if part.strip()]
            else:
                expected = [
                    one
                    if isinstance(one, str)
                    else next(one[key] for key in TEXT_FIELDS if isinstance(one.get(key), str))
                    for one in content[:number]
                ]
            assert found == [one[:LONGEST] for one in expected][:number]

    read()
    tally.told(record_property)


def test_benchmarks(record_property, place):
    """Lines of the four benchmarks, some of them of another type."""
    tally = Tally("data files")
    good: dict[str, dict[str, Any]] = {
        "gsm8k": {"question": "1 + 1?", "answer": "One more.\n#### 2"},
        "nq": {"question": "who", "answer": ["a", "b"], "output": ["text"]},
        "boolq": {"question": "is it?", "passage": "It is.", "answer": True},
        "rte": {"sentence1": "It is.", "sentence2": "Is it?", "label": "entailment"},
    }

    @st.composite
    def lines(draw: st.DrawFn) -> tuple[str, list[Any]]:
        name = draw(st.sampled_from(sorted(good)))
        return name, draw(st.lists(mostly(st.just(good[name]), changed(good[name]) | values(2), 4), max_size=3))

    @share(2.0)
    @given(lines(), st.booleans())
    def read(given_: tuple[str, list[Any]], ascii_: bool) -> None:
        name, rows = given_
        path = place / f"{name}.jsonl"
        written(path, "\n".join(json.dumps(row, ensure_ascii=ascii_) for row in rows))
        assert name in FILES
        with tally.one(True if rows and all(row == good[name] for row in rows) else None):
            found = read_benchmark(name, path)
            assert len(found) == len(rows)
            for row, one in zip(rows, found, strict=True):
                for key in ("question", "sentence1", "sentence2"):
                    assert key not in row or one[key] in row[key].strip()
                assert name != "boolq" or one["answer"] == ("yes" if row["answer"] else "no")
                assert name != "nq" or one["answer"] == row["answer"]

    read()
    tally.told(record_property)


# ---- folders of runs ----

LAYER = {
    "name": "a.weight",
    "rank": 3,
    "removed_share": 0.1,
    "update_norm": 1.0,
    "sigma_max": 2.0,
    "energy": {"0": 1.0, "2": None},
}
BATCH = {"batch": 1, "edits": 2, "facts": [{"record": 0}, {"record": 1}], "after": "0" * 32, "layers": [LAYER]}
SCORES = {"efficacy": [1.0, None], "nll": 3.0}
POINT = {
    "edits": 2,
    "seconds": 1.0,
    "scored": [0, 1],
    "scores": SCORES,
    "energy": {"a.weight": {"0": 1.0}},
    "cases": [],
}
GUARD = [{"edits": 2, "reason": "worse", "action": "stop", "left": 2}]
RUN = {"entries": ["memit"], "hparams": "a.yaml", "edits": 2, "batch_size": 2, "checkpoints": [2]}
MANIFEST = {
    "format": 1,
    "entry": "memit",
    "label": "MEMIT",
    "method": {"alg_name": "SPHERE", "hparams": {"v_lr": 0.5}},
    "model": {"name": "m", "dtype": "float32", "weights": "0" * 32},
    "data": {"file": "facts.json", "sha256": "0" * 64, "records": 2, "order": None},
    "edits": 2,
    "batch_size": 2,
    "protocol": {"efficacy": "tokens"},
    "contexts": [""],
    "settings": RUN,
    **{"ranks": 1, "threads": 1, "versions": {}, "machine": "m"},
}
ABILITIES = {
    "format": 1,
    "edits": 2,
    "weights": "0" * 32,
    "tasks": {"rte": {"how": {}, "metric": "acc", "value": 0.5, "stderr": None, "records": [1.0, 0.0]}},
}
MEASURED = {
    "record": 0,
    "prompt": "p",
    "subject": "s",
    "source": "x",
    "prompts": ["a", "b"],
    "aleatoric": 0.1,
    "epistemic": 0.2,
}
AUDIT = {"format": 1, "edits": 2, "weights": "0", "model": "0", "settings": {}, "edited": [], "neighbours": []}
AUDIT["edited"] = [{**MEASURED, "written": ["x", "y"]}]


@st.composite
def bent(draw: st.DrawFn, content: Any, depth: int = 3) -> Any:
    """The content with one value, somewhere in it, replaced or taken out."""
    content = copy.deepcopy(content)
    around = content
    for _ in range(draw(st.integers(0, depth))):
        inner = [
            one
            for one in (around.values() if isinstance(around, dict) else around)
            if isinstance(one, dict | list) and one
        ]
        if not inner:
            break
        around = draw(st.sampled_from(inner))
    key = draw(st.sampled_from(sorted(around) if isinstance(around, dict) else range(len(around))))
    if draw(st.integers(0, 3)):
        around[key] = draw(values(3))
    else:
        del around[key]
    return content if draw(st.integers(0, 20)) else draw(values())


def test_run_folders(record_property, place):
    """The readers of reports: numbers that are finite, texts that are texts, whatever a file holds."""
    tally = Tally("run folders")
    for name in ("journal", "checkpoints"):
        (place / name).mkdir(exist_ok=True)
    files = {
        "manifest.json": MANIFEST,
        "journal/000001.json": BATCH,
        "checkpoints/000002.json": POINT,
        "guard.json": GUARD,
    }

    @share(3.0)
    @given(st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), bent(files[name]))))
    def read(changed_: tuple[str, Any]) -> None:
        for name, content in files.items():
            written(place / name, changed_[1] if name == changed_[0] else content)
        with tally.one():
            run = read_run(place)
            assert run.entry and run.label and isinstance(run.stopped, str)
            for point in run.checkpoints:
                assert all(len(numbers) == len(point.scored) for numbers in point.scores.values())
                known = [one for numbers in point.scores.values() for one in numbers if one is not None]
                assert all(isinstance(one, float) and math.isfinite(one) for one in known)
                assert point.nll is None or math.isfinite(point.nll)
            assert all(isinstance(batch.edits, int) and isinstance(batch.batch, int) for batch in run.batches)

    read()
    tally.told(record_property)


def test_what_a_run_goes_on_with(record_property, place):
    """Manifest, guard, abilities and audits, as `--resume` and the measuring commands read them."""
    tally = Tally("run folders")
    folder = place / "resumed"
    (folder / "audit").mkdir(parents=True, exist_ok=True)
    told = {"manifest": MANIFEST, "guard": GUARD, "abilities": ABILITIES, "audit": AUDIT}

    def going_on() -> None:
        then = read_manifest(folder)
        settings = RunSettings.from_mapping(then["settings"])
        assert RunSettings.from_mapping(settings.plain()) == settings
        check_same(folder, then, MANIFEST)
        assert then["model"]["weights"] == MANIFEST["model"]["weights"]  # type: ignore[index]

    def guarded() -> None:
        events = Events(folder)
        reason = events.stopped(2)
        assert isinstance(events.off, bool) and (reason is None or isinstance(reason, str))

    def able() -> None:
        assert isinstance(read_tally(folder / "abilities.json")["tasks"], dict)

    def audited() -> None:
        audit = read_audit(folder / "audit.json")
        assert all(math.isfinite(one.uncertainty.total) for one in (*audit.edited, *audit.neighbours))
        assert isinstance(audit.edits, int)

    readers = {"manifest": going_on, "guard": guarded, "abilities": able, "audit": audited}

    @share(3.0)
    @example(("abilities", {**ABILITIES, "edits": math.inf}))
    @example(("audit", {**AUDIT, "edits": math.inf}))
    @given(st.sampled_from(sorted(told)).flatmap(lambda name: st.tuples(st.just(name), bent(told[name]))))
    def read(changed_: tuple[str, Any]) -> None:
        name, content = changed_
        written(folder / f"{name}.json", content)
        with tally.one(True if content == told[name] else None):
            readers[name]()

    read()
    tally.told(record_property)


# ---- weights on disk ----

ANY = matrices(SOUND + EXTREME + FLAWED, size=6)


def test_tensors_come_back_to_the_bit(record_property, place):
    """Of any dtype, shape and content; a file that differs by a bit is refused, or means the same (\\u001F)."""
    tally = Tally("weights on disk")
    path = place / "one.safetensors"

    @share(2.0)
    @given(
        st.dictionaries(good_texts(), ANY, max_size=3),
        st.dictionaries(good_texts(), texts()),
        st.integers(0),
        st.booleans(),
    )
    def kept(given_: dict[str, Made], about: dict[str, str], at: int, hurt: bool) -> None:
        named = {name: made.tensor for name, made in given_.items() if name != "__metadata__"}
        about = {key: value for key, value in about.items() if is_good(value)}
        write_tensors(path, named, about)
        raw = bytearray(path.read_bytes())
        if hurt:
            raw[at % len(raw)] ^= 1 << at % 8
            path.write_bytes(raw)
        with tally.one(None if hurt else True):
            found, metadata = read_tensors(path)
            assert metadata == about and set(found) == set(named)
            assert all(same_bits(found[name], named[name].detach()) for name in named)

    kept()
    tally.told(record_property)


def test_json_comes_back(record_property, place):
    tally = Tally("weights on disk")

    @share(2.0)
    @given(values(12))
    def kept(content: Any) -> None:
        with tally.one():
            try:
                write_json(place / "one.json", content)
            except ValueError as error:  # half a character, or a number too long to be written
                raise RequestError("content", "something", f"what JSON can hold ({error})", "Change it.") from error
            again = read_json(place / "one.json")
            assert repr(again) == repr(json.loads(json.dumps(content)))

    kept()
    tally.told(record_property)


class One(nn.Module):
    """A model of one weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)


def test_differences_are_applied_to_the_bit(record_property, place):
    """A delta takes any weight to any other and back; one whose file or model is another changes nothing."""
    tally = Tally("weights on disk")
    path = place / "delta.safetensors"
    pairs = matrices(SOUND + EXTREME + ("nan", "inf", "zeros"), size=6)
    about = changed({"format": "sphere-delta-1", "fingerprints": "own"}, (), most=1)

    @share(3.0)
    @given(pairs, pairs, st.sampled_from(("well", "well", "metadata", "values", "names", "model")), about, texts())
    def applied(one: Made, other: Made, what: str, metadata: dict[str, Any], name: str) -> None:
        before = one.tensor.detach().contiguous()
        after = torch.zeros_like(before)
        after.view(-1)[:] = other.tensor.detach().reshape(-1)[:1].to(before.dtype)
        write_delta(path, {"weight": before}, {"weight": after}, {"edits": "3"})
        tensors, known = read_tensors(path)
        if what == "metadata":
            own = known["fingerprints"]
            told = {
                k: own if v == "own" else json.dumps(v) if not isinstance(v, str) else v for k, v in metadata.items()
            }
            told = {key: value for key, value in told.items() if is_good(key) and is_good(value)}
            write_tensors(path, tensors, told)
        elif what == "values":
            write_tensors(path, {"weight": tensors["weight"].reshape(-1)[:1] + 1}, known)
        elif what == "names":
            write_tensors(path, {name if is_good(name) and name != "__metadata__" else "x": tensors["weight"]}, known)
        model = One(before if what != "model" else before + 1)
        start = model.weight.detach().clone()
        plain = what == "well" or (
            what == "metadata" and metadata == {"format": "sphere-delta-1", "fingerprints": "own"}
        )
        good = True if plain else None if what in ("model", "names", "metadata") else False
        with tally.one(good):
            try:
                apply_delta(model, path)
            except Exception:
                assert same_bits(model.weight.detach(), start)
                raise
            assert same_bits(model.weight.detach(), after)
            apply_delta(model, path, revert=True)
            assert same_bits(model.weight.detach(), before)

    applied()
    tally.told(record_property)


def test_journals_replay_to_the_bit(record_property, tmp_path_factory):
    """Batches of any numbers, with and without the factors of their updates, back to any state."""
    tally = Tally("weights on disk")
    root = tmp_path_factory.mktemp("journals")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    start = matrices(SOUND + EXTREME + ("zeros",), size=8, dtypes=dtypes)
    step = st.tuples(
        st.integers(0, 10**6), st.integers(1, 3), st.sampled_from(("factors", "whole", "wrong", "nan", "nothing"))
    )

    @share(1.0)
    @given(start, st.lists(step, max_size=4), st.booleans())
    def kept(made: Made, steps: list[tuple[int, int, str]], turned: bool) -> None:
        weight = made.tensor.detach().contiguous().clone()
        journal = Journal.create(root / str(tally.inputs), {"w": weight}, {"w": turned})
        states = [weight.clone()]
        with tally.one(True):
            for number, (seed, rank, what) in enumerate(steps, 1):
                generator = torch.Generator().manual_seed(seed)
                shape = weight.T.shape if turned else weight.shape
                update = Factors(*(torch.randn(side, rank, generator=generator) for side in shape))
                dense = update.dense().T if turned else update.dense()
                if what != "nothing":
                    weight = (weight.float() + dense * (0.5 if what == "wrong" else 1.0)).to(weight.dtype)
                if what == "nan":
                    weight.view(-1)[seed % weight.numel()] = math.nan
                updates = {} if what == "whole" else {"w": update}
                journal.append({"edits": number}, {"w": weight}, updates)
                states.append(weight.clone())
            again = Journal.open(journal.folder)
            for number in reversed(range(len(states))):
                assert torch.equal(bits(again.weights_after(number)["w"]), bits(states[number]))

    kept()
    tally.told(record_property)
