"""One rounding on write, and what it took, against numbers that are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphere_plugin.editing.write import rounded_sum
from sphere_plugin.errors import ModelError

DTYPES = (torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_the_share_that_is_lost_is_that_of_the_entries(dtype: torch.dtype, size: float) -> None:
    weight, update = normal(8, 12).to(dtype), size * normal(8, 12, seed=1)
    written = rounded_sum("w", weight, weight.float(), update, mastered=False)
    exact = weight.double() + update.double()
    assert torch.equal(written.weight, (weight.float() + update).to(dtype))
    lost = (written.weight.double() - exact).norm() / update.double().norm()
    assert written.rounding_loss == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
    assert written.update_norm == pytest.approx(float((written.weight.double() - weight.double()).norm()), rel=1e-5)
    assert 0.0 <= written.rounding_loss <= 1.0 + 1e-6
    assert written.master is None and written.master_gap is None
    if dtype == torch.float32 and size >= 1e-3:
        assert written.rounding_loss < 1e-4


def test_an_update_below_half_a_step_is_lost_whole_and_one_of_whole_steps_not_at_all() -> None:
    weight, step = torch.ones(4, 4, dtype=torch.bfloat16), 2.0**-7
    nothing = rounded_sum("w", weight, weight.float(), torch.full((4, 4), 0.49 * step), mastered=False)
    assert torch.equal(nothing.weight, weight) and nothing.update_norm == 0.0
    assert nothing.rounding_loss == 1.0
    whole = rounded_sum("w", weight, weight.float(), torch.full((4, 4), 3 * step), mastered=False)
    assert whole.rounding_loss == 0.0
    zero = rounded_sum("w", weight, weight.float(), torch.zeros(4, 4), mastered=False)
    assert zero.rounding_loss == 0.0


def test_an_error_across_the_update_counts_although_norms_agree() -> None:
    """Half a step and more is rounded up to a step, less to nothing: here the norm hardly changes, the update does."""
    weight = torch.ones(1, 1000, dtype=torch.bfloat16)
    update = torch.linspace(0.0, 2.0**-7, 1000)[None]
    written = rounded_sum("w", weight, weight.float(), update, mastered=False)
    assert written.update_norm == pytest.approx(float(update.norm()), rel=0.25)
    assert written.rounding_loss == pytest.approx(0.5, abs=0.01)  # sqrt(1/12) / sqrt(1/3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_master_copy_loses_nothing_and_the_weight_is_its_rounding(dtype: torch.dtype) -> None:
    weight = normal(8, 12).to(dtype)
    master, start = weight.float(), weight.double()
    for batch in range(50):
        update = 1e-4 * normal(8, 12, seed=batch + 1)
        written = rounded_sum("w", weight, master, update, mastered=True)
        assert written.master is not None
        assert torch.equal(written.weight, written.master.to(dtype))
        assert torch.equal(written.master, master + update)
        assert written.rounding_loss < 2e-3  # float32's own, of entries far above the update
        gap = (written.weight.double() - written.master.double()).norm()
        assert written.master_gap == pytest.approx(float(gap), rel=1e-4)
        moved = (written.weight.double() - weight.double()).norm()
        assert written.update_norm == pytest.approx(float(moved), rel=1e-4)
        weight, master, start = written.weight, written.master, start + update.double()
    assert (master.double() - start).abs().max() < 50 * 2.0**-23


def test_what_is_not_finite_is_refused() -> None:
    weight = torch.ones(2, 2, dtype=torch.float16)
    for update in (torch.full((2, 2), 1e6), torch.full((2, 2), float("nan"))):
        with pytest.raises(ModelError, match="update of layer.weight: got 'NaN or infinity'"):
            rounded_sum("layer.weight", weight, weight.float(), update, mastered=False)
