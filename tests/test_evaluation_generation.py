"""What the model writes, how much of it repeats, and how like a reference it is; by hand and by slow loops."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from pico import KINDS, pico
from scipy.stats import entropy
from test_evaluation_predict import bloom

from sphere_plugin.errors import HostError, RequestError
from sphere_plugin.evaluation.consistency import Consistency
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.generation import Start, ngram_entropy, words, write

PROMPTS = ("The", "The Eiffel Tower is in the city of", "Who plays the piano?", "The")


def test_entropy_of_a_sequence_worked_by_hand() -> None:
    # "a b a b a": bigrams ab ba ab ba, half each: 1 bit; trigrams aba bab aba: 2/3 and 1/3.
    trigrams = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert ngram_entropy("ababa") == pytest.approx((2 / 3 * 1.0 + 4 / 3 * trigrams) / 2)
    assert ngram_entropy("aaaaaa") == 0.0, "the same word for ever"
    assert ngram_entropy("ab") is None, "no trigram"
    # All different: log2 of how many there are.
    assert ngram_entropy(range(10)) == pytest.approx((2 / 3 * math.log2(9) + 4 / 3 * math.log2(8)) / 2)


def test_entropy_is_what_romes_code_computes() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 80).tolist()
    parts = [
        weight * entropy(list(Counter(zip(*(tokens[k:] for k in range(n)), strict=False)).values()), base=2)
        for n, weight in ((2, 2 / 3), (3, 4 / 3))
    ]
    assert ngram_entropy(tokens) == pytest.approx(np.mean(parts))


def test_words_are_words_and_marks() -> None:
    assert words('He said: "Water boils, doesn\'t it?"') == [
        *["He", "said", ":", '"', "Water", "boils", ",", "doesn't", "it", "?", '"']
    ]


def slowly(model, start: Start, length: int, top_k: int) -> tuple[int, ...]:
    """The same text by one whole pass per token."""
    draws = torch.rand(length, generator=torch.Generator().manual_seed(start.seed)).tolist()
    ids = list(start.ids)
    while len(ids) < length:
        with torch.no_grad():
            shares = model(torch.tensor([ids])).logits[0, -1].softmax(dim=0)
        best = shares.sort(descending=True)
        likely = best.values[:top_k].tolist()
        draw = draws[len(ids) - len(start.ids)] * sum(likely)
        place = next(place for place in range(top_k) if sum(likely[: place + 1]) >= draw)
        ids.append(int(best.indices[place]))
    return tuple(ids)


def starts(tokenizer) -> list[Start]:
    return [Start(tuple(tokenizer(prompt)["input_ids"]), seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_texts_are_those_of_one_token_at_a_time_in_any_batch(kind: str) -> None:
    model, tokenizer = bloom() if kind == "bloom" else pico(kind)
    begun = starts(tokenizer)
    expected = [slowly(model, start, 40, 5) for start in begun]
    assert write(Decoder(model), begun, 40) == expected
    assert write(Decoder(model), begun, 40, batch_tokens=40) == expected
    assert write(Decoder(model), begun[1:2], 40) == expected[1:2]
    assert expected[0] != expected[3], "another seed, another text"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_short_and_long_prompts_side_by_side_stay_within_the_positions_there_are(kind: str) -> None:
    model, tokenizer = pico(kind)
    long = tuple(tokenizer("The Eiffel Tower is in the city of " * 4)["input_ids"])
    begun = [*starts(tokenizer), Start(long, 9)]
    most = model.config.max_position_embeddings
    texts = write(Decoder(model), begun, most)
    assert [len(text) for text in texts] == [most] * len(begun)
    assert len(long) > len(begun[0].ids) + 20
    assert texts == [write(Decoder(model), [start], most)[0] for start in begun]


def test_one_choice_is_the_first_choice_and_long_prompts_stay() -> None:
    model, tokenizer = pico("llama")
    begun = starts(tokenizer)
    assert write(Decoder(model), begun, 30, top_k=1) == [slowly(model, start, 30, 1) for start in begun]
    seen: list[int] = []
    assert write(Decoder(model), begun, 1, progress=seen.append) == [start.ids for start in begun]
    assert sum(seen) == 4


def test_consistency_worked_by_hand() -> None:
    """Of two texts "red" stands in both (idf 1), "wine" and "car" in one (idf 1 + ln 3/2)."""
    consistency = Consistency(["red wine", "red car"])
    rare = 1 + math.log(3 / 2)
    assert consistency.score(["red red"], ["red wine"]) == pytest.approx(1 / math.hypot(1, rare))
    assert consistency.score(["red", "wine"], ["red wine"]) == pytest.approx(1.0)
    assert consistency.score(["wine"], ["red car"]) == 0.0
    assert consistency.score(["nothing of it"], ["red car"]) == 0.0


def test_references_without_words_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="reference_texts"):
        Consistency(["", "."])
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(HostError, match="scikit-learn"):
        Consistency(["red wine"])
