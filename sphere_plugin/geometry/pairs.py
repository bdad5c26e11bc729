"""Sums over all pairs of rows, a block of rows at a time.

With N rows of length d no block holds more than about four million distances: neither an N x N x d tensor nor, for
large N, the N x N one ever exists. All is float64 inside, whatever comes in: the change an edit makes to an energy is
1e-4 of it or less.

Distances come from the Gram matrix, ‖a − b‖² = ‖a‖² + ‖b‖² − 2 a·b, which cancels for nearby rows. Pairs whose
squared distance is under ``NEAR`` of ‖a‖² + ‖b‖² are therefore measured anew from the difference of the two rows, so
that every distance is good to about 1e-9 of itself, and to 1e-15 between rows that are no neighbours. Rows nearer than
``FLOOR`` of that scale coincide as far as float64 can tell: their energy is infinite, and that is an error rather than
a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import all_finite, check_chunk

NEAR: Final = 1e-6  # of ‖a‖² + ‖b‖², for squared distances
FLOOR: Final = 1e-12  # of sqrt(‖a‖² + ‖b‖²), for distances
BLOCK_ENTRIES: Final = 2**22  # 32 MiB of float64

Kernel = Callable[[Tensor], Tensor]


def pair_blocks(rows: Tensor, chunk: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yields squared distances of rows ``start..start+b`` to rows ``start..N``, one block after the other.

    Args:
        rows: [N, d] float64.
        chunk: rows per block; None chooses by size.

    Yields:
        ``start`` and a tensor [b, N - start]. Only its part above the diagonal counts, each pair i < j once over all
        blocks; the diagonal holds ones as a placeholder, the part below it may be inexact.

    Raises:
        ConfigError: chunk is not a positive whole number.
        ModelError: two rows coincide; the message names them. Or a row is too long to square.
    """
    count = rows.shape[0]
    size = max(1, BLOCK_ENTRIES // count) if chunk is None else chunk
    check_chunk(size)
    lengths = rows.square().sum(dim=1)  # [N]
    if not all_finite(lengths):
        remedy = "An earlier edit or the checkpoint is broken; undo that edit or load the weight anew."
        raise ModelError("the squared lengths of the weight's rows", float(lengths.max()), "finite numbers", remedy)
    for start in range(0, count, size):
        block, rest = rows[start : start + size], rows[start:]
        scale = lengths[start : start + size, None] + lengths[None, start:]  # [b, N - start]
        squared = torch.addmm(scale, block, rest.T, alpha=-2.0)
        near = (squared <= NEAR * scale).triu_(1).nonzero()
        if near.numel():
            _measure_anew(squared, block, rest, near)
            _refuse_coincident(squared, scale, near, start)
        squared.fill_diagonal_(1.0)
        yield start, squared


def pair_sum(rows: Tensor, kernel: Kernel, chunk: int | None = None) -> float:
    """Sums ``kernel(squared distance)`` over all ordered pairs i != j of rows [N, d] float64."""
    total = sum(float(kernel(squared).triu_(1).sum()) for _, squared in pair_blocks(rows, chunk))
    return 2.0 * total


def row_sums(rows: Tensor, kernel: Kernel, chunk: int | None = None) -> Tensor:
    """Sums ``kernel(squared distance)`` over j != k for every row k of [N, d] float64; returns [N]."""
    sums = torch.zeros_like(rows[:, 0])
    for start, squared in pair_blocks(rows, chunk):
        values = kernel(squared).triu_(1)  # [b, N - start]
        sums[start : start + values.shape[0]] += values.sum(dim=1)
        sums[start:] += values.sum(dim=0)
    return sums


def riesz(s: float) -> Kernel:
    """Returns eq. 5's f_s as a function of the squared distance: ‖·‖^-s, or log ‖·‖^-1 for s = 0."""
    if s == 0:
        return lambda squared: squared.log().mul_(-0.5)
    return lambda squared: squared.pow(-0.5 * s)


def _measure_anew(squared: Tensor, block: Tensor, rest: Tensor, near: Tensor) -> None:
    """Overwrites the entries ``near`` [pairs, 2] of ``squared`` by ‖a − b‖² of the rows themselves."""
    for part in torch.split(near, max(1, BLOCK_ENTRIES // block.shape[1])):
        i, j = part.unbind(dim=1)
        squared[i, j] = (block[i] - rest[j]).square_().sum(dim=1)


def _refuse_coincident(squared: Tensor, scale: Tensor, near: Tensor, start: int) -> None:
    i, j = near.unbind(dim=1)
    same = near[squared[i, j] <= FLOOR**2 * scale[i, j]]
    if same.shape[0]:
        first, second = (start + int(index) for index in same[0])
        raise ModelError(
            f"rows {first} and {second} of the weight",
            float(squared[tuple(same[0])].sqrt()),
            f"a distance above {FLOOR:g} of their length",
            "Equal neurons have infinite energy; leave one of them out, or measure a layer without copies.",
        )
