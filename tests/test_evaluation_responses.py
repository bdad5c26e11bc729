"""Answers drawn from a model: the nucleus, seeds, and that nothing depends on what else is drawn."""

from __future__ import annotations

import random

import pytest
import torch
from pico import KINDS, pico

from sphere_plugin.errors import ConfigError, ModelError, RequestError
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.responses import FIRST, Sampling, nucleus, respond

PROMPTS = ((0, 20, 30, 40), (0, 21), (0, 50, 51, 52, 53, 54))


def plain(logits, uniform, temperature, top_p) -> int:
    """The token of one row, by a loop over tokens sorted by probability."""
    exponents = [float(value) / temperature for value in logits]
    top = max(exponents)
    weights = [2.718281828459045 ** (value - top) for value in exponents]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / sum(weights)
        if mass >= top_p:
            break
    left = uniform * mass
    for token in kept:
        left -= weights[token] / sum(weights)
        if left < 0:
            return token
    return kept[-1]


@pytest.mark.parametrize("spread", [4.0, 0.3], ids=["few tokens", "more than are looked at first"])
def test_tokens_are_those_of_a_plain_nucleus(spread) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3 * FIRST, generator=generator) * spread
    uniform = torch.rand(40, generator=generator)
    found = nucleus(logits, uniform, 0.8, 0.9).tolist()
    assert found == [plain(row, float(u), 0.8, 0.9) for row, u in zip(logits, uniform, strict=True)]


def test_the_nucleus_is_drawn_from_by_its_probabilities() -> None:
    """0.5, 0.3, 0.15, 0.05: a nucleus of 0.9 has the first three, with 10/19, 6/19 and 3/19."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(19, 1)
    uniform = (torch.arange(19) + 0.5) / 19
    assert nucleus(logits, uniform, 1.0, 0.9).tolist() == [0] * 10 + [1] * 6 + [2] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_what_else_is_asked(kind) -> None:
    model, _ = pico(kind)
    decoder, sampling = Decoder(model), Sampling(samples=3, tokens=6, temperature=1.0)
    together = respond(decoder, PROMPTS, sampling)
    apart = [respond(decoder, [prompt], sampling)[0] for prompt in reversed(PROMPTS)][::-1]
    assert together == apart == respond(decoder, PROMPTS, sampling, batch_tokens=1)
    assert len({answer for answers in together for answer in answers}) == 9
    assert all(len(answer) == 6 for answers in together for answer in answers)


def test_answers_are_those_of_the_whole_text_read_anew() -> None:
    model, _ = pico("llama")
    decoder, sampling = Decoder(model), Sampling(samples=2, tokens=5, temperature=1.0, top_p=0.7)
    (answers,) = respond(decoder, PROMPTS[:1], sampling)
    for number, answer in enumerate(answers):
        said = f"0/{number}/{','.join(map(str, PROMPTS[0]))}"
        uniform = torch.rand(5, generator=torch.Generator().manual_seed(seed_of(said)))
        ids = list(PROMPTS[0])
        for step in range(5):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(plain(logits, float(uniform[step]), 1.0, 0.7))
        assert tuple(ids[len(PROMPTS[0]) :]) == answer


def seed_of(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def test_seeds_and_samples() -> None:
    decoder = Decoder(pico("llama")[0])
    first = respond(decoder, PROMPTS, Sampling(samples=3, tokens=4, temperature=1.0))
    more = respond(decoder, PROMPTS, Sampling(samples=5, tokens=4, temperature=1.0))
    other = respond(decoder, PROMPTS, Sampling(samples=3, tokens=4, temperature=1.0, seed=1))
    assert [answers[:3] for answers in more] == first
    assert other != first
    cold = respond(decoder, PROMPTS, Sampling(samples=3, tokens=4, temperature=1e-4))
    assert all(len(set(answers)) == 1 for answers in cold)


def test_an_answer_ends_where_the_model_ends_it() -> None:
    decoder, sampling = Decoder(pico("llama")[0]), Sampling(samples=3, tokens=8, temperature=1.0)
    whole = respond(decoder, PROMPTS, sampling)
    end = whole[0][0][3]
    for answers, cut in zip(whole, respond(decoder, PROMPTS, sampling, {end}), strict=True):
        for answer, short in zip(answers, cut, strict=True):
            assert short == answer[: answer.index(end)] if end in answer else short == answer


def test_what_cannot_be_answered_is_refused() -> None:
    model, _ = pico("llama")
    with pytest.raises(RequestError, match="256 tokens together"):
        respond(Decoder(model), [tuple(random.Random(0).choices(range(3, 300), k=250))], Sampling())
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        respond(Decoder(model), PROMPTS, Sampling())


@pytest.mark.parametrize(
    ("name", "value"),
    [("samples", 1), ("tokens", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)],
)
def test_settings_out_of_their_range(name, value) -> None:
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})
