"""Scores against one prompt at a time through the whole model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pico import KINDS, pico
from test_evaluation_generation import slowly

from sphere_plugin.data import Record
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation import METRICS, Quality, Scores
from sphere_plugin.evaluation.consistency import Consistency
from sphere_plugin.evaluation.generation import Start, ngram_entropy, words
from sphere_plugin.evaluation.quality import _seed

RECORDS = [
    Record(
        "The Eiffel Tower is in the city of",
        "Eiffel Tower",
        "Rome",
        ("Where is the Eiffel Tower? In", "The Eiffel Tower stands in"),
        ("The Colosseum stands in", "Big Ben is in the city of", "Never scored: only two are"),
        "Paris",
        ("Rome", "London", "Never"),
        ("The Eiffel Tower was", "Seen from the Eiffel Tower", "The Eiffel Tower was"),
        ("Rome is the capital of Italy.", "The Colosseum stands in Rome."),
    ),
    Record(
        "Windows 95 was developed by", "Windows 95", "Apple Inc.", ("Who made Windows 95? It was",), (), "Microsoft"
    ),
    Record("The mother tongue of Leo Tolstoy is", "Leo Tolstoy", "French", (), ("The mother tongue of Chekhov is",)),
]
TEXT = "A new line starts here.\n\nWater boils at 100 degrees, doesn't it?"


def first_choices(model, ids: list[int]) -> list[int]:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].argmax(dim=1).tolist()


def disturb(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))


def teach(model, tokenizer, texts: list[str]) -> None:
    """A few steps of training, so that some answers are right and some are not."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def kept(model, tokenizer, prompt: str, target: str) -> tuple[float, float, float]:
    """Share of tokens, whether all, and the mean log-probability of a token."""
    ids, goal = tokenizer(prompt)["input_ids"], tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids + goal])).logits[0, len(ids) - 1 : -1].log_softmax(dim=1)
    right = [float(a == b) for a, b in zip(logs.argmax(dim=1).tolist(), goal, strict=True)]
    return sum(right) / len(right), float(all(right)), float(logs[range(len(goal)), goal].mean())


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def slow_scores(model, tokenizer, record: Record) -> dict[str, float | None]:
    """Every metric of teacher forcing, one prompt and one target at a time."""
    pairs = list(zip(record.neighbours, record.neighbour_targets, strict=False))[:2]
    kinds = {
        "efficacy": [(record.prompt, record.target_new, record.target_true)],
        "generalization": [(prompt, record.target_new, record.target_true) for prompt in record.paraphrases],
        "specificity": [(prompt, truth, record.target_new) for prompt, truth in pairs],
    }
    expected = {}
    for name, asked in kinds.items():
        found = [kept(model, tokenizer, prompt, right) for prompt, right, _ in asked]
        expected[name] = mean([share for share, _, _ in found])
        expected[f"{name}_exact"] = mean([whole for _, whole, _ in found])
        expected[f"{name}_success"] = mean(
            [float(kept(model, tokenizer, p, a)[2] > kept(model, tokenizer, p, b)[2]) for p, a, b in asked if b]
        )
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_one_prompt_at_a_time(kind: str) -> None:
    model, tokenizer = pico(kind)
    quality = Quality(model, tokenizer, RECORDS, TEXT, batch_tokens=40)
    before = [[first_choices(model, tokenizer(p)["input_ids"])[-1] for p in r.neighbours[:2]] for r in RECORDS]
    teach(model, tokenizer, [f"{RECORDS[0].prompt} Rome.", "The Colosseum stands in Rome.", "developed by Apple"])
    scores = quality.score(3)
    for number, record in enumerate(RECORDS):
        expected = slow_scores(model, tokenizer, record)
        now = [first_choices(model, tokenizer(p)["input_ids"])[-1] for p in record.neighbours[:2]]
        expected["locality"] = mean([float(a == b) for a, b in zip(now, before[number], strict=True)])
        got = {name: column[number] for name, column in scores.columns().items()}
        assert got == pytest.approx(expected | {"fluency": None, "consistency": None})
    assert set(scores.efficacy) - {0.0}, "something was learned"


def test_the_numbers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = pico("llama")
    qualities = [Quality(model, tokenizer, RECORDS, TEXT, batch_tokens=size) for size in (1, 60, 4096)]
    disturb(model)
    one, some, all_at_once = (quality.score(3, fluency=30) for quality in qualities)
    assert one == some == all_at_once
    assert qualities[0].score(3, which=[2, 0], fluency=30).columns() == {
        name: (column[2], column[0]) for name, column in one.columns().items()
    }


def test_what_a_record_does_not_have_is_null() -> None:
    model, tokenizer = pico("gpt2")
    quality = Quality(model, tokenizer, RECORDS, TEXT)
    scores = quality.score(3, fluency=30)
    missing = [{name for name, column in scores.columns().items() if column[number] is None} for number in range(3)]
    around = {"specificity", "specificity_exact", "specificity_success"}
    assert missing[0] == set()
    assert missing[1] == around | {"locality", "fluency", "consistency"}
    assert missing[2] == around | {name for name in METRICS if name.startswith("generalization")} | {
        "efficacy_success",
        "fluency",
        "consistency",
    }
    assert not any(value for value in scores.fluency[1:] + quality.score(3).fluency + quality.score(3).consistency)
    assert all(value is None or math.isfinite(value) for column in scores.columns().values() for value in column)


def test_an_edit_that_holds_is_counted_and_one_that_does_not_is_not() -> None:
    model, tokenizer = pico("llama")
    prompt, target = tokenizer("Windows 95 was developed by")["input_ids"], tokenizer(" Apple Inc.")["input_ids"][1:]
    with torch.no_grad():  # teach the output embedding to say the target there
        hidden = model.model(torch.tensor([prompt + target])).last_hidden_state[0, len(prompt) - 1 : -1]
        for token, state in zip(target, hidden, strict=True):
            model.lm_head.weight[token] += 100 * state / state.norm() ** 2
    scores = Quality(model, tokenizer, RECORDS[:2], TEXT).score(2)
    assert scores.efficacy_exact == (0.0, 1.0)
    assert scores.efficacy[1] == scores.efficacy_success[1] == 1.0


def test_targets_are_compared_per_token() -> None:
    """A model that finds all tokens equally probable prefers no target, though the longer one is less probable."""
    model, tokenizer = pico("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    same = replace(RECORDS[1], target_new="x", target_true="Apple Inc.")
    assert Quality(model, tokenizer, [same], TEXT).score(1).efficacy_success == (0.0,)
    assert Quality(model, tokenizer, [same], TEXT).score(1).nll == pytest.approx(math.log(len(tokenizer)))


def test_the_unedited_model_agrees_with_itself() -> None:
    model, tokenizer = pico("gpt2")
    assert Quality(model, tokenizer, RECORDS, TEXT).score(3).locality == (1.0, None, 1.0)


def test_all_neighbours_are_scored_where_asked_for() -> None:
    model, tokenizer = pico("llama")
    counts = [Quality(model, tokenizer, RECORDS, TEXT, neighbours=n).prompts(3) for n in (0, 1, 2, None)]
    assert counts == [6, 8, 9, 10]


def test_only_the_edits_so_far_are_scored() -> None:
    model, tokenizer = pico("llama")
    quality = Quality(model, tokenizer, RECORDS, TEXT)
    seen: list[int] = []
    assert len(quality.score(2, progress=seen.append).efficacy) == 2
    assert sum(seen) == quality.prompts(2) == 2 + 3 + 2
    seen.clear()
    quality.score(3, which=[0, 2], progress=seen.append, fluency=20)
    assert sum(seen) == quality.prompts(3, which=[0, 2], fluency=20) == 2 + 2 + 3 + 3
    assert quality.score(0).efficacy == ()
    assert quality.score(3, which=[]).scored == ()


@pytest.mark.parametrize("which", [[2], [-1], [0, 0]], ids=str)
def test_a_sample_is_of_edited_records(which: list[int]) -> None:
    quality = Quality(*pico("llama"), RECORDS, TEXT)
    with pytest.raises(ConfigError, match="which"):
        quality.score(2, which=which)


def test_fluency_and_consistency_are_those_of_texts_written_slowly() -> None:
    model, tokenizer = pico("qwen2")
    quality = Quality(model, tokenizer, RECORDS, TEXT, seed=7)
    disturb(model)
    scores = quality.score(3, fluency=30)
    record = RECORDS[0]
    texts = []
    for number, prompt in enumerate(record.generation_prompts):
        start = Start(tuple(tokenizer(prompt)["input_ids"]), _seed(7, record.prompt, number))
        texts.append(tokenizer.decode(slowly(model, start, 30, 5), skip_special_tokens=True))
    assert texts[0] != texts[2], "the same prompt, other text"
    assert scores.fluency[0] == pytest.approx(mean([ngram_entropy(words(text)) for text in texts]))
    expected = Consistency(record.reference_texts).score(texts, record.reference_texts)
    assert scores.consistency[0] == pytest.approx(expected)
    assert Quality(model, tokenizer, RECORDS, TEXT, seed=8).score(3, fluency=30).fluency != scores.fluency
    assert quality.score(1, fluency=True) == quality.score(1, fluency=100)


def test_likelihood_of_the_text_is_the_models_own_loss() -> None:
    model, tokenizer = pico("qwen2")
    total, count = 0.0, 0
    for part in TEXT.split("\n\n"):
        ids = torch.tensor([tokenizer(part)["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    scores = Quality(model, tokenizer, RECORDS, TEXT).score(0)
    assert scores.nll == pytest.approx(total / count, rel=1e-5)


def test_every_metric_is_a_column() -> None:
    assert {*METRICS, "edits", "scored", "nll"} == set(Scores.__dataclass_fields__)
