"""Prefixes read once for all rows, against each row on its own."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from pico import KINDS
from test_editing_engine import CONTEXTS, FACTS, parts
from transformers import DynamicCache

from sphere_plugin.editing import prefix
from sphere_plugin.editing.locate import Sentence
from sphere_plugin.editing.prefix import PASS, Prefix, pieces, read_prefixes


def read_plainly(model, ids: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [heads, tokens, head_dim] of every layer, from the model's own pass over one row."""
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_equal_those_of_the_model_row_by_row(kind: str) -> None:
    model, _, _, anatomy, locator = parts(kind)
    rows = [locator.aimed(fact, text) for fact in FACTS for text in CONTEXTS.prefixes]
    rows += [
        Sentence(rows[0].ids, 0),
        Sentence(rows[0].ids, 1, shared=0),
    ]  # nothing before the lookup token; one token
    found = read_prefixes(anatomy, rows)
    assert sorted(found.layers) == list(range(len(anatomy.decoder)))
    for number, row in enumerate(rows):
        seen = found.seen[number]
        assert int(seen.sum()) == row.lookup
        if row.lookup == 0:
            continue
        for layer, (keys, values) in enumerate(read_plainly(model, row.ids[: row.lookup])):
            torch.testing.assert_close(found.layers[layer][0][number][:, seen], keys, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found.layers[layer][1][number][:, seen], values, atol=2e-5, rtol=1e-4)


def test_rows_without_any_prefix_have_none() -> None:
    _, _, _, anatomy, _ = parts("gpt2")
    found = read_prefixes(anatomy, [Sentence((3, 4, 5), 0), Sentence((6, 7), 0)])
    assert not found.layers
    assert found.seen.shape == (2, 0)


def test_what_sentences_stand_behind_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, anatomy, locator = parts("llama")
    text = CONTEXTS.prefixes[2]
    rows = [locator.aimed(fact, text) for fact in FACTS] * 2
    # The space at the end of the text is a token of its own in front of some prompts, and part of one before others.
    shared = {row.ids[: row.shared] for row in rows}
    assert min(map(len, shared)) > 5  # the text has more words than that
    assert len(shared) <= 2
    read: list[int] = []
    original = prefix.run_trunk

    def counting(anatomy, past: Prefix, ids: torch.Tensor, mask: torch.Tensor):
        read.append(int(mask.sum()))
        return original(anatomy, past, ids, mask)

    monkeypatch.setattr(prefix, "run_trunk", counting)
    read_prefixes(anatomy, rows)
    assert sum(read) == sum(map(len, shared)) + sum(row.lookup - row.shared for row in rows)


def test_shared_tokens_lie_in_the_text_before() -> None:
    _, tokenizer, _, _, locator = parts("llama")
    for fact in FACTS:
        assert locator.aimed(fact).shared == locator.essence(fact).shared == 1  # the token that begins every text
        for text in CONTEXTS.prefixes[1:]:
            row = locator.aimed(fact, text)
            spans = tokenizer(text + fact.prompt, return_offsets_mapping=True)["offset_mapping"]
            assert all(past <= len(text) for _, past in spans[: row.shared])
            assert spans[row.shared][1] > len(text)


LENGTHS = [
    [],
    [0],
    [5],
    [1] * 9,
    [1, 2, 3, 4, 5, 6],
    [0] * 30 + [1] * 3 + [7] * 60 + [30],
    [1] * 50 + [40] * 50,
    [2] * 20 + [9] * 4 + [10] * 30,
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pieces_cost_least(lengths: list[int]) -> None:
    def cost(ends: list[int]) -> int:
        return sum((end - first) * lengths[end - 1] + PASS for first, end in pairwise([0, *ends]))

    found = pieces(lengths)
    assert [number for piece in found for number in range(piece.start, piece.stop)] == list(range(len(lengths)))
    if not lengths:
        assert found == []
        return
    steps = [n for n in range(1, len(lengths)) if lengths[n] != lengths[n - 1]]
    every = [[*cut, len(lengths)] for count in range(len(steps) + 1) for cut in combinations(steps, count)]
    assert cost([piece.stop for piece in found]) == min(map(cost, every))
