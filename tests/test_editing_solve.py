"""The closed forms against the textbook formulas, solved densely in float64."""

from __future__ import annotations

import pytest
import torch

from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.errors import ModelError

D_IN, D_OUT, FACTS = 40, 24, 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(rank: int = 4 * D_IN) -> torch.Tensor:
    rows = randn(rank, D_IN) * torch.logspace(0, -3, D_IN)
    return rows.T @ rows / rank


def test_memit_is_the_ridge_regression_of_its_paper() -> None:
    c, keys, residuals = moment(), randn(D_IN, FACTS, seed=1), randn(D_OUT, FACTS, seed=2)
    system = 50.0 * c.double() + keys.double() @ keys.double().T
    expected = residuals.double() @ torch.linalg.solve(system, keys.double()).T
    torch.testing.assert_close(Memit(c, 50.0, layer=0).update(keys, residuals), expected.float(), rtol=1e-4, atol=1e-6)


def test_alphaedit_is_the_projected_ridge_regression_of_its_paper_over_many_batches() -> None:
    c = moment()
    solver = AlphaEdit(c, threshold=1e-3, ridge=2.0, layer=0)
    values, vectors = torch.linalg.eigh(c.double())
    null = vectors[:, values < 1e-3]
    assert 0 < null.shape[1] < D_IN
    p = null @ null.T
    past = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for batch in range(20):
        keys, residuals = randn(D_IN, FACTS, seed=10 + batch), randn(D_OUT, FACTS, seed=50 + batch)
        k = keys.double()
        system = p @ (k @ k.T + past) + 2.0 * torch.eye(D_IN, dtype=torch.float64)
        expected = torch.linalg.solve(system, p @ k @ residuals.double().T).T
        update = solver.update(keys, residuals)
        assert (update - expected).norm() < 1e-5 * expected.norm()
        # Nothing is written where the model keeps what it knows.
        known = vectors[:, values >= 1e-3].float()
        assert (update @ known).norm() < 1e-5 * update.norm()
        solver.remember(solver.with_keys(keys))
        past += k @ k.T


def test_forgetting_starts_over() -> None:
    solver = AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0)
    keys, residuals = randn(D_IN, FACTS, seed=1), randn(D_OUT, FACTS, seed=2)
    fresh = solver.update(keys, residuals)
    solver.remember(solver.with_keys(keys))
    assert not torch.equal(solver.update(keys, residuals), fresh)
    solver.remember(solver.with_keys(None))
    assert torch.equal(solver.update(keys, residuals), fresh)


def test_memit_refuses_statistics_of_too_little_text() -> None:
    with pytest.raises(ModelError, match=r"layer 7.*singular.*mom2_n_samples"):
        Memit(moment(rank=10), 50.0, layer=7)


def test_alphaedit_refuses_an_empty_null_space() -> None:
    with pytest.raises(ModelError, match=r"layer 7.*nullspace_threshold.*smallest eigenvalue"):
        AlphaEdit(moment(), threshold=1e-12, ridge=1.0, layer=7)
