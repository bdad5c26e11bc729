"""Write: add an update to a weight in float32, round once, and say what the rounding took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry.checks import all_finite

BLOCK: Final = 2**18  # entries that are added up at a time


@dataclass(frozen=True)
class Written:
    """A weight after an update; rows are neurons in all of it.

    Attributes:
        weight: W', [d_out, d_in] in the weight's dtype.
        master: M', [d_out, d_in] float32; None without a master copy.
        update_norm: ‖W' − W‖, what the model has gained, or lost.
        rounding_loss: ‖(S' − S) − ΔW‖ / ‖ΔW‖, S what updates add up in: the master copy, or without one the weight
            itself. A weight of 16 bits can keep all of it (0) or nothing (1), entry by entry, so this is a number from
            0 to 1; of float32 it is what float32 itself loses. 0 for an update of zero.
        master_gap: ‖W' − M'‖, what the model lacks of its master copy; None without one.
    """

    weight: Tensor
    master: Tensor | None
    update_norm: float
    rounding_loss: float
    master_gap: float | None


def rounded_sum(name: str, weight: Tensor, start: Tensor, update: Tensor, mastered: bool) -> Written:
    """Returns W' = round(S + ΔW), and writes nothing.

    Args:
        name: of the weight, for the error.
        weight: W, [d_out, d_in], any floating point dtype.
        start: S, [d_out, d_in] float32: W, or the master copy whose rounding W is.
        update: ΔW, [d_out, d_in] float32.
        mastered: whether S is a master copy.

    Raises:
        ModelError: W' is not finite.
    """
    edited = torch.empty_like(weight)
    master = torch.empty_like(start) if mastered else None
    squares = {"written": 0.0, "asked": 0.0, "lost": 0.0, "gap": 0.0}

    def add(name: str, block: Tensor) -> None:
        squares[name] += float(torch.linalg.vector_norm(block)) ** 2

    count = max(1, BLOCK // weight.shape[1])
    for first in range(0, weight.shape[0], count):  # so that nothing else is as large as the weight
        rows = slice(first, first + count)
        total = start[rows] + update[rows]
        edited[rows] = total
        now = edited[rows].float()
        if master is not None:
            master[rows] = total
            add("gap", now - total)
        add("written", now - weight[rows].float())
        add("asked", update[rows])
        add("lost", (total if mastered else now) - start[rows] - update[rows])
    if not all_finite(edited):
        raise ModelError(
            f"update of {name}",
            "NaN or infinity",
            "finite numbers",
            "The weights are as before this batch; lower v_lr, or edit a float32 model.",
        )
    norms = {key: math.sqrt(one) for key, one in squares.items()}
    lost = norms["lost"] / norms["asked"] if norms["asked"] else 0.0
    return Written(edited, master, norms["written"], lost, norms["gap"] if mastered else None)
