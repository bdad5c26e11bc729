"""Work in pieces that fit into memory: as large as a budget of tokens allows, halved where memory says otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

_LOG = logging.getLogger("sphere_plugin")

Row = TypeVar("Row")
Done = TypeVar("Done")


def work_through(
    rows: Sequence[Row], length: Callable[[Row], int], budget: int, work: Callable[[Sequence[Row]], Done]
) -> Iterator[tuple[Sequence[Row], Done]]:
    """Do ``work`` on one piece of ``rows`` after another, in their order.

    A piece has at most ``budget`` tokens, all its rows padded to the longest, or is a single row. Where memory runs
    out the piece is cut in half, and so are those after it.

    Args:
        rows: what there is to do; of like length beside each other, little is padded.
        length: tokens of a row.
        budget: tokens in one piece.
        work: called with a piece; called again with less of it if memory runs out, so it must change nothing before.

    Yields:
        A piece, and what the work on it returned.

    Raises:
        RuntimeError, MemoryError: memory runs out on a single row.
    """
    first = 0
    while first < len(rows):
        piece = rows[first : first + _fitting(rows, first, length, budget)]
        try:
            done = work(piece)
        except (RuntimeError, MemoryError) as error:
            if len(piece) == 1 or not is_out_of_memory(error):
                raise
            budget = max(map(length, piece)) * len(piece) // 2
        else:
            first += len(piece)
            yield piece, done
            continue
        # Only here has the error let go of what it held.
        _LOG.warning("out of memory on %d rows: going on with %d tokens at once", len(piece), budget)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how a GPU, or torch's allocator on a CPU, says that memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _fitting(rows: Sequence[Row], first: int, length: Callable[[Row], int], budget: int) -> int:
    """How many rows from ``first`` on make a piece."""
    longest = 0
    for number in range(first, len(rows)):
        longest = max(longest, length(rows[number]))
        if longest * (number - first + 1) > budget:
            return max(1, number - first)
    return len(rows) - first
