"""Pure tensor functions on one weight: its principal space, its hyperspherical energy, the theorem's bound.

Everything here takes a weight in mathematical orientation, ``[d_out, d_in]`` with one neuron per row; `neurons` brings
a stored weight into it. Nothing here writes to a model.
"""

from __future__ import annotations

from sphere_plugin.geometry.bound import bound_constant, lower_bound, neuron_constants, output_perturbation
from sphere_plugin.geometry.energy import delta_he, energy_change, hyperspherical_energy
from sphere_plugin.geometry.factors import Factors
from sphere_plugin.geometry.gradient import energy_gradient
from sphere_plugin.geometry.neurons import is_transposed, neurons, stored
from sphere_plugin.geometry.principal import PrincipalSpace

__all__ = [
    "Factors",
    "PrincipalSpace",
    "bound_constant",
    "delta_he",
    "energy_change",
    "energy_gradient",
    "hyperspherical_energy",
    "is_transposed",
    "lower_bound",
    "neuron_constants",
    "neurons",
    "output_perturbation",
    "stored",
]
