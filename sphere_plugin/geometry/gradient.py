"""The gradient of the hyperspherical energy: which small change of a weight moves it most."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_plugin.geometry.checks import check_order, check_weight
from sphere_plugin.geometry.energy import unit_rows
from sphere_plugin.geometry.pairs import pair_blocks


def energy_gradient(weight: Tensor, s: float = 1.0, chunk: int | None = None) -> Tensor:
    """Returns the gradient of `hyperspherical_energy` in the weight's entries.

    Every row is orthogonal to the neuron it belongs to: the length of a neuron does not count.

    Args:
        weight: [d_out, d_in], rows are neurons; any floating point dtype.
        s: order of the Riesz kernel; 0 is the logarithmic energy.
        chunk: rows per block, a matter of memory only; None chooses by size.

    Returns:
        [d_out, d_in] float64, on the weight's device.

    Raises:
        ConfigError, ModelError: as `hyperspherical_energy`.
    """
    check_order(s)
    check_weight(weight)
    rows = unit_rows(weight)
    pulled = torch.zeros_like(rows)  # Σj f'(‖ŵi − ŵj‖²) ŵj
    for start, squared in pair_blocks(rows, chunk):
        slope = (-0.5 * (s or 1.0) * squared.pow(-0.5 * s - 1.0)).triu_(1)  # [b, N - start]
        block = rows[start : start + slope.shape[0]]
        pulled[start : start + slope.shape[0]] += slope @ rows[start:]
        pulled[start:] += slope.T @ block
    along = (pulled * rows).sum(dim=1, keepdim=True)
    lengths = torch.linalg.vector_norm(weight.detach().double(), dim=1, keepdim=True)
    gradient: Tensor = 4.0 * (along * rows - pulled) / lengths
    return gradient
