"""Changes of a weight of a given size, made for experiments: some move its hyperspherical energy, some cannot.

All return ΔW [d_out, d_in] float64. In the Frobenius norm ‖ΔW‖ = size · ‖W‖, or the norm of what `scattered` is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.geometry.checks import all_finite, check_same_shape, check_weight
from sphere_plugin.geometry.gradient import energy_gradient


def along_energy(weight: Tensor, size: float, s: float = 2.0, rising: bool = True, steps: int = 20) -> Tensor:
    """Returns a change that follows the gradient of the energy, anew at each of ``steps`` equal steps.

    Args:
        weight: [d_out, d_in], rows are neurons.
        size: ‖ΔW‖ / ‖W‖, between 0 and 1.
        s: order of the energy.
        rising: False goes against the gradient: neurons spread.
        steps: more follow it closer.

    Raises:
        ConfigError: size or steps out of range.
        ModelError: see `hyperspherical_energy`.
    """
    check_size(size)
    if steps < 1:
        raise ConfigError("steps", steps, "1 or more", "Leave it out for 20.")
    start = weight.detach().double()
    whole = float(torch.linalg.vector_norm(start))
    delta = torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = energy_gradient(start + delta, s)
        delta += (size * whole / steps) * gradient / torch.linalg.vector_norm(gradient) * (1.0 if rising else -1.0)
        delta *= size * whole * step / steps / torch.linalg.vector_norm(delta)
    return delta


def turned(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Returns W(R − I) for a random rotation R: all neurons turn together, and no energy changes.

    R turns d_in / 2 random orthogonal planes by one angle θ, so that ‖W(R − I)‖ = 2 sin(θ/2) ‖W‖; where d_in is odd,
    one direction stays and θ is a little larger.

    Args:
        weight: [d_out, d_in], rows are neurons.
        size: ‖ΔW‖ / ‖W‖, between 0 and 1.
        generator: of the planes, on the CPU.

    Raises:
        ConfigError: size out of range.
        ModelError: the weight is not a finite matrix.
    """
    check_size(size)
    check_weight(weight)
    start = weight.detach().double()
    width = start.shape[1]
    random = torch.randn(width, width, generator=generator, dtype=torch.float64).to(start.device)
    planes = torch.linalg.qr(random).Q[:, : width - width % 2]
    inside = start @ planes  # [d_out, d_in], coordinates in the planes
    reach = float(torch.linalg.vector_norm(inside))
    angle = 2.0 * math.asin(min(1.0, size * float(torch.linalg.vector_norm(start)) / (2.0 * reach)))
    first, second = inside[:, 0::2], inside[:, 1::2]
    moved = torch.empty_like(inside)
    moved[:, 0::2] = (math.cos(angle) - 1.0) * first - math.sin(angle) * second
    moved[:, 1::2] = math.sin(angle) * first + (math.cos(angle) - 1.0) * second
    back: Tensor = moved @ planes.T
    return back


def scattered(weight: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a change that moves every neuron as far as ``delta`` does, each in a random direction across itself.

    Args:
        weight: [d_out, d_in], rows are neurons.
        delta: [d_out, d_in].
        generator: of the directions, on the CPU.

    Raises:
        ModelError: the shapes differ, or one is no finite matrix.
    """
    check_same_shape(weight, delta)
    check_weight(weight)
    if not all_finite(delta):
        remedy = "The edit that made it broke the weight; undo it."
        raise ModelError("delta", "NaN or infinity", "finite entries", remedy)
    rows = weight.detach().double()
    random = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
    own = (rows * rows).sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    random -= (random * rows).sum(dim=1, keepdim=True) / own * rows
    lengths = torch.linalg.vector_norm(delta.double(), dim=1, keepdim=True)
    scaled: Tensor = random / torch.linalg.vector_norm(random, dim=1, keepdim=True) * lengths
    return scaled


def check_size(size: float) -> None:
    """Raises ConfigError unless a change of ``size`` can be made."""
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 1:
        raise ConfigError("size", size, "a share of ‖W‖ between 0 and 1", "Edits are around 0.1.")
