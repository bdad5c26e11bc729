"""The principal space of the embedded model's real weights, against the formula of both official codes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from sphere_plugin.geometry import PrincipalSpace
from sphere_plugin.models import embedded_model


@pytest.mark.keeps_cache
@pytest.mark.parametrize("layer", [4, 14])
def test_projection_agrees_with_the_official_formula_on_real_weights(layer: int) -> None:
    with safe_open(embedded_model() / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor(f"model.layers.{layer}.mlp.down_proj.weight")
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))
    rows = (weight / (weight.norm(dim=1, keepdim=True) + 1e-8)).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / rows.shape[0])
    for eta, alpha in ((0.5, 0.8), (0.3, 1.0), (0.9, 0.5)):
        rank = int((values.flip(0).cumsum(0) / values.sum() <= eta).sum()) + 1
        basis = vectors[:, -rank:]
        expected = (delta - alpha * delta.double() @ basis @ basis.T).float()
        space = PrincipalSpace.fit(weight, eta)
        assert space.rank == rank
        assert (space.project(delta, alpha) - expected).norm() < 1e-5 * expected.norm()
