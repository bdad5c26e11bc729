"""The closed forms against the textbook formulas, solved densely in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sphere_plugin.editing import solve
from sphere_plugin.editing.solve import AlphaEdit, Memit, with_columns
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
    update = Memit(c, 50.0, layer=0).update(keys, residuals).dense()
    torch.testing.assert_close(update, expected.float(), rtol=1e-4, atol=1e-6)


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
        update = solver.update(keys, residuals).dense()
        assert (update - expected).norm() < 1e-5 * expected.norm()
        # Nothing is written where the model keeps what it knows.
        known = vectors[:, values >= 1e-3].float()
        assert (update @ known).norm() < 1e-5 * update.norm()
        solver.remember(solver.with_keys(keys))
        past += k @ k.T


def test_forgetting_starts_over() -> None:
    solver = AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0)
    keys, residuals = randn(D_IN, FACTS, seed=1), randn(D_OUT, FACTS, seed=2)
    fresh = solver.update(keys, residuals).dense()
    solver.remember(solver.with_keys(keys))
    assert not torch.equal(solver.update(keys, residuals).dense(), fresh)
    solver.remember(solver.with_keys(None))
    assert torch.equal(solver.update(keys, residuals).dense(), fresh)


def alike(batch: int, facts: int = FACTS) -> torch.Tensor:
    """Keys of a batch as models have them: long, and nearly the same for all facts; some come back again and again."""
    keys = 100.0 * randn(D_IN, 1) + randn(D_IN, facts, seed=batch + 1) * torch.logspace(0, -3, D_IN)[:, None]
    keys[:, 0] = 100.0 * randn(D_IN, 1, seed=5)[:, 0]
    return keys


def plainly(c: torch.Tensor, past: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
    """AlphaEdit's equation in float64 for a threshold of 1e-3 and L2 = 0.01."""
    values, vectors = torch.linalg.eigh(c.double())
    null = vectors[:, values < 1e-3]
    k = null.T @ keys.double()
    system = null.T @ past @ null + k @ k.T + 0.01 * torch.eye(null.shape[1], dtype=torch.float64)
    return residuals.double() @ torch.linalg.solve(system, k).T @ null.T


def test_after_150_batches_of_keys_that_are_nearly_alike_the_solution_is_still_that_of_a_direct_solve() -> None:
    """Condition numbers above 1e7."""
    c = moment()
    solver = AlphaEdit(c, threshold=1e-3, ridge=0.01, layer=0)
    past = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for batch in range(150):
        keys, residuals = alike(batch), randn(D_OUT, FACTS, seed=batch)
        expected = plainly(c, past, keys, residuals)
        assert (solver.update(keys, residuals).dense() - expected).norm() < 1e-5 * expected.norm()
        solver.remember(solver.with_keys(keys))
        past += keys.double() @ keys.double().T
    system = solver.null.T @ past @ solver.null
    assert float(torch.linalg.eigvalsh(system)[-1] + 0.01) / 0.01 > 1e7


def test_a_batch_costs_the_same_however_many_came_before() -> None:
    solver = AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0)
    counts = []
    for batch in range(40):
        keys = randn(D_IN, FACTS, seed=batch)
        with FlopCounterMode(display=False) as counter:
            solver.update(keys, randn(D_OUT, FACTS))
            past = solver.with_keys(keys)
        solver.remember(past)
        counts.append(counter.get_total_flops())
    assert len(set(counts[1:])) == 1
    held = [value for value in (*vars(solver).values(), *vars(past).values()) if isinstance(value, torch.Tensor)]
    size = solver.null.shape[1]
    assert sum(tensor.shape == (size, size) for tensor in held) == 1


def test_what_is_not_remembered_was_never_there() -> None:
    """The batch was interrupted, or undone before the next one."""
    straight, other = (AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0) for _ in range(2))
    residuals = randn(D_OUT, FACTS)
    for batch in range(4):
        other.with_keys(randn(D_IN, FACTS, seed=100 + batch))
        other.update(randn(D_IN, FACTS, seed=200 + batch), residuals)
        for solver in (straight, other):
            solver.remember(solver.with_keys(randn(D_IN, FACTS, seed=batch)))
        other.with_keys(None)
        keys = randn(D_IN, FACTS, seed=300 + batch)
        one, two = (solver.update(keys, residuals) for solver in (straight, other))
        assert torch.equal(one.right, two.right) and torch.equal(one.left, two.left)


@pytest.mark.parametrize("facts", [3, 100])  # together they would be cut elsewhere than between batches
def test_keys_learned_one_batch_after_the_other_leave_what_editing_in_between_leaves(facts: int) -> None:
    """A run that is resumed learns the keys of all batches before its first update."""
    live, resumed = (AlphaEdit(moment(), threshold=1e-1, ridge=2.0, layer=0) for _ in range(2))
    keys, residuals = [randn(D_IN, facts, seed=batch) for batch in range(6)], randn(D_OUT, facts)
    for batch in keys:
        live.update(batch, residuals)
        for solver in (live, resumed):
            solver.remember(solver.with_keys(batch))
    one, two = (solver.update(keys[0], residuals) for solver in (live, resumed))
    assert torch.equal(live._past.factor, resumed._past.factor) and torch.equal(one.right, two.right)


def test_an_older_past_can_be_put_back() -> None:
    solver = AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0)
    keys, residuals = randn(D_IN, FACTS), randn(D_OUT, FACTS)
    first = solver.with_keys(randn(D_IN, FACTS, seed=1))
    solver.remember(first)
    expected = solver.update(keys, residuals).right
    solver.remember(solver.with_keys(randn(D_IN, FACTS, seed=2)))
    assert not torch.equal(solver.update(keys, residuals).right, expected)
    solver.remember(first)
    assert torch.equal(solver.update(keys, residuals).right, expected)


def test_an_interruption_while_keys_are_worked_in_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = AlphaEdit(moment(), threshold=1e-3, ridge=2.0, layer=0)
    past = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for batch in range(3):
        keys = randn(D_IN, FACTS, seed=batch)
        solver.remember(solver.with_keys(keys))
        past += keys.double() @ keys.double().T

    def stop(*_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    keys, residuals = randn(D_IN, FACTS, seed=9), randn(D_OUT, FACTS)
    for name in ("with_columns", "_woodbury"):
        monkeypatch.setattr(solve, name, stop)
        with pytest.raises(KeyboardInterrupt):
            solver.update(keys, residuals)
        monkeypatch.undo()
    k = solver.null.T @ keys.double()
    system = solver.null.T @ past @ solver.null + k @ k.T
    system.diagonal().add_(2.0)
    expected = residuals.double() @ torch.linalg.solve(system, k).T @ solver.null.T
    assert (solver.update(keys, residuals).dense() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("facts", [1, D_OUT + 6, D_IN + 100])
@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
def test_any_number_of_facts(base: str, facts: int) -> None:
    c, keys, residuals = moment(), randn(D_IN, facts, seed=1), randn(D_OUT, facts, seed=2)
    if base == "MEMIT":
        update = Memit(c, 50.0, layer=0).update(keys, residuals)
        system = 50.0 * c.double() + keys.double() @ keys.double().T
        expected = residuals.double() @ torch.linalg.solve(system, keys.double()).T
    else:
        update = AlphaEdit(c, threshold=1e-3, ridge=0.01, layer=0).update(keys, residuals)
        expected = plainly(c, torch.zeros(D_IN, D_IN, dtype=torch.float64), keys, residuals)
    assert update.shape == (D_OUT, D_IN) and update.left.shape[1] == facts
    assert update.left.dtype == update.right.dtype == torch.float32
    assert (update.dense() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("columns", [1, 7, 64, 300])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 200])
def test_a_cholesky_factor_is_brought_up_to_date_without_loss(size: int, columns: int) -> None:
    rows = randn(size, 2 * size).double()
    system = rows @ rows.T + torch.eye(size)
    factor, added = torch.linalg.cholesky(system), randn(size, columns, seed=3).double()
    kept = factor.clone()
    found, expected = with_columns(factor, added), system + added @ added.T
    assert torch.equal(factor, kept) and torch.equal(found, found.tril())
    assert (found @ found.T - expected).norm() < 1e-14 * expected.norm()


def test_memit_refuses_statistics_of_too_little_text() -> None:
    with pytest.raises(ModelError, match=r"layer 7.*singular.*mom2_n_samples"):
        Memit(moment(rank=10), 50.0, layer=7)


def test_alphaedit_refuses_an_empty_null_space() -> None:
    with pytest.raises(ModelError, match=r"layer 7.*nullspace_threshold.*smallest eigenvalue"):
        AlphaEdit(moment(), threshold=1e-12, ridge=1.0, layer=7)
