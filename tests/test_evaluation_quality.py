"""Scores against one prompt at a time through the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from pico import KINDS, pico

from sphere_plugin.data import Record
from sphere_plugin.evaluation import Quality

RECORDS = [
    Record(
        "The Eiffel Tower is in the city of",
        "Eiffel Tower",
        "Rome",
        ("Where is the Eiffel Tower? In", "The Eiffel Tower stands in"),
        ("The Colosseum stands in", "Big Ben is in the city of", "Never scored: only two are"),
    ),
    Record("Windows 95 was developed by", "Windows 95", "Apple Inc.", ("Who made Windows 95? It was",), ()),
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


def kept(model, tokenizer, prompt: str, target: str) -> list[float]:
    ids, goal = tokenizer(prompt)["input_ids"], tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    said = first_choices(model, ids + goal)[len(ids) - 1 : -1]
    return [float(a == b) for a, b in zip(said, goal, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_one_prompt_at_a_time(kind: str) -> None:
    model, tokenizer = pico(kind)
    quality = Quality(model, tokenizer, RECORDS, TEXT, batch_tokens=40)
    before = [[first_choices(model, tokenizer(p)["input_ids"])[-1] for p in r.neighbours[:2]] for r in RECORDS]
    disturb(model)
    scores = quality.score(3)
    for number, record in enumerate(RECORDS):
        tokens = kept(model, tokenizer, record.prompt, record.target_new)
        assert scores.efficacy[number] == float(all(tokens))
        assert scores.efficacy_tokens[number] == pytest.approx(sum(tokens) / len(tokens))
        if record.paraphrases:
            shares = [float(all(kept(model, tokenizer, p, record.target_new))) for p in record.paraphrases]
            assert scores.generalization[number] == pytest.approx(sum(shares) / len(shares))
        now = [first_choices(model, tokenizer(p)["input_ids"])[-1] for p in record.neighbours[:2]]
        if now:
            same = [float(a == b) for a, b in zip(now, before[number], strict=True)]
            assert scores.specificity[number] == pytest.approx(sum(same) / len(same))


def test_an_edit_that_holds_is_counted_and_one_that_does_not_is_not() -> None:
    model, tokenizer = pico("llama")
    prompt, target = tokenizer("Windows 95 was developed by")["input_ids"], tokenizer(" Apple Inc.")["input_ids"][1:]
    with torch.no_grad():  # teach the output embedding to say the target there
        hidden = model.model(torch.tensor([prompt + target])).last_hidden_state[0, len(prompt) - 1 : -1]
        for token, state in zip(target, hidden, strict=True):
            model.lm_head.weight[token] += 100 * state / state.norm() ** 2
    scores = Quality(model, tokenizer, RECORDS[:2], TEXT).score(2)
    assert scores.efficacy == (0.0, 1.0)
    assert scores.efficacy_tokens[1] == 1.0


def test_the_unedited_model_agrees_with_itself() -> None:
    model, tokenizer = pico("gpt2")
    specificity = Quality(model, tokenizer, RECORDS, TEXT).score(3).specificity
    assert specificity[0] == specificity[2] == 1.0
    assert math.isnan(specificity[1]), "a record without neighbours has no specificity"


def test_only_the_edits_so_far_are_scored() -> None:
    model, tokenizer = pico("llama")
    quality = Quality(model, tokenizer, RECORDS, TEXT)
    seen: list[int] = []
    assert len(quality.score(2, seen.append).efficacy) == 2
    assert sum(seen) == quality.prompts(2) == 2 + 3 + 2
    assert quality.score(0).efficacy == ()


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
