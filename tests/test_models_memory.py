"""Work in pieces that fit: a budget of tokens, halved where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from conftest import REQUESTS, pico_config
from hypothesis import given
from hypothesis import strategies as st
from pico import pico

from sphere_plugin.editing import Editor
from sphere_plugin.editing import aim as aiming
from sphere_plugin.models.memory import is_out_of_memory, work_through


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 200))
def test_every_row_is_worked_on_once_in_order_and_within_the_budget(lengths: list[int], budget: int) -> None:
    pieces = [(list(piece), done) for piece, done in work_through(lengths, int, budget, list)]
    assert [row for piece, _ in pieces for row in piece] == lengths
    for piece, done in pieces:
        assert piece == done
        assert len(piece) == 1 or max(piece) * len(piece) <= budget


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), room=st.integers(30, 120))
def test_pieces_shrink_until_they_fit(lengths: list[int], room: int) -> None:
    tried: list[int] = []

    def work(piece: Sequence[int]) -> int:
        tried.append(max(piece) * len(piece))
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sum(piece)

    done = list(work_through(lengths, int, 10_000, work))
    assert [row for piece, _ in done for row in piece] == lengths
    assert sum(total for _, total in done) == sum(lengths)
    assert len(tried) - len(done) <= 12  # halved, not shortened by one


def test_a_row_that_does_not_fit_alone_is_an_error() -> None:
    def work(piece: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(work_through([3, 4], int, 100, work))


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def work(piece: Sequence[int]) -> None:
        calls.append(piece)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(work_through([3, 4], int, 100, work))
    assert len(calls) == 1


def test_how_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("x"))


def test_an_edit_survives_running_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights, to float rounding, as with memory enough for all facts at once."""
    edited = []
    original = aiming._Search.run
    for room in (10_000, 2):
        model, tokenizer = pico("llama")
        editor = Editor(model, tokenizer, pico_config("llama"))

        def run(self: aiming._Search, room: int = room) -> aiming.Aimed:
            if self.start.shape[0] > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self)

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "sphere_plugin"):
            patch.setattr(aiming._Search, "run", run)
            editor.apply(REQUESTS)
        edited.append(model.get_parameter("model.layers.2.mlp.down_proj.weight").detach().clone())
    assert "out of memory on 3 rows" in caplog.text
    assert (edited[0] - edited[1]).norm() / edited[0].norm() < 1e-5
