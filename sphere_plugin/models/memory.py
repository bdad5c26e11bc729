"""Work in pieces that fit into memory, as large as a budget of tokens allows; and how much memory there is."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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


def cut(rows: Sequence[Row], length: Callable[[Row], int], budget: int) -> list[Sequence[Row]]:
    """The pieces in which `work_through` does ``rows`` where memory suffices."""
    pieces: list[Sequence[Row]] = []
    first = 0
    while first < len(rows):
        pieces.append(rows[first : first + _fitting(rows, first, length, budget)])
        first += len(pieces[-1])
    return pieces


def free_bytes(device: str) -> int | None:
    """Bytes that are free on a device, "cpu" or "cuda:1"; None where nobody says, or there is none."""
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return int(torch.cuda.mem_get_info(device)[0]) if (torch.device(device).index or 0) < count else None
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        pages = getattr(os, "sysconf_names", {})
        known = "SC_AVPHYS_PAGES" in pages and "SC_PAGE_SIZE" in pages
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)  # what is free, and what the system caches meanwhile
    return None if found is None else 1024 * int(found[1])


def in_words(count: int | None) -> str:
    """Bytes as "3.3 GiB" or "12.0 MiB"."""
    if count is None:
        return "an unknown amount"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


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
