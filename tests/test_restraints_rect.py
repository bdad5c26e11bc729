"""RECT: agreement with the authors' formula and with a plain loop, ties, zeros, and what is refused."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.restraints.rect import RectConfig, _kth_smallest, removed_share

FEW = settings(deadline=None, max_examples=40, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rect(weight, delta, keep=0.4):
    return RectConfig(keep).bind(weight)(weight, delta)


def official(weight, delta, keep_percent):
    """The authors' code computes this: an epsilon in the denominator, kthvalue as threshold, which stays."""
    change = torch.abs(delta / (weight + 1e-8))
    threshold = torch.kthvalue(change.reshape(-1), int(change.numel() * (100 - keep_percent) / 100)).values
    result = torch.zeros_like(delta)
    result[change >= threshold] = delta[change >= threshold]
    return result


def looped(weight, delta, keep):
    """The same in plain Python: sort, count, compare."""
    changes = [abs(d / (w + 1e-8)) for w, d in zip(weight.flatten().tolist(), delta.flatten().tolist(), strict=True)]
    below = math.floor(len(changes) * (1 - Fraction(str(keep))))
    threshold = sorted(changes)[below - 1] if below else 0.0
    kept = [d if c >= threshold else 0.0 for d, c in zip(delta.flatten().tolist(), changes, strict=True)]
    return torch.tensor(kept, dtype=delta.dtype).reshape(delta.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percent", [1, 25, 40, 90])
@pytest.mark.parametrize("shape", [(24, 60), (40, 40), (60, 24)], ids=["wide", "square", "tall"])
def test_agrees_with_the_authors_formula_bit_for_bit(shape, percent, dtype):
    weight, delta = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    assert torch.equal(rect(weight, delta, percent / 100).delta, official(weight, delta, percent))


@FEW
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.01, 0.1, 0.3, 0.4, 0.7, 1.0]))
def test_agrees_with_a_plain_loop_on_any_shape(d_out, d_in, seed, keep):
    weight, delta = (normal(d_out, d_in, seed=s, dtype=torch.float64) for s in (seed, seed + 100))
    assert torch.equal(rect(weight, delta, keep).delta, looped(weight, delta, keep))


@FEW
@given(st.lists(st.floats(0, math.inf, width=32), min_size=1, max_size=30), st.data())
def test_kth_smallest_is_that_of_a_sorted_list(values, data):
    k = data.draw(st.integers(1, len(values)))
    assert _kth_smallest(torch.tensor(values).abs(), k) == sorted(values)[k - 1]
    assert _kth_smallest(torch.tensor(values, dtype=torch.float64).abs(), k) == sorted(values)[k - 1]


@pytest.mark.parametrize("count", range(1, 60))
def test_one_entry_more_than_the_share_stays(count):
    weight, delta = torch.ones(1, count), torch.arange(1.0, count + 1).reshape(1, count)
    below = int(count * 60 / 100)
    expected = count - below + 1 if below else count
    assert int(rect(weight, delta).delta.count_nonzero()) == expected


def test_all_ties_with_the_threshold_stay_wherever_they_are():
    weight = torch.ones(2, 5)
    delta = torch.tensor([[1.0, 2, 2, -2, 2], [2, 2, 3, 1, 2]])
    expected = torch.where(delta.abs() > 1, delta, 0.0)
    assert torch.equal(rect(weight, delta).delta, expected)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = rect(weight, delta.flatten()[order].reshape(2, 5)).delta
    assert torch.equal(shuffled, expected.flatten()[order].reshape(2, 5))
    assert torch.equal(rect(weight, torch.ones(2, 5)).delta, torch.ones(2, 5))


def test_entries_whose_weight_is_zero_stay():
    weight, delta = normal(10, 10), normal(10, 10, seed=1) * 1e-3
    weight[:, ::3] = 0.0
    kept = rect(weight, delta, keep=0.5).delta
    assert torch.equal(kept[:, ::3], delta[:, ::3])
    assert torch.equal(kept, official(weight, delta, 50))


@pytest.mark.parametrize("keep", [0.4, 0.9])
def test_a_weight_of_minus_epsilon_gives_no_nan(keep):
    weight, delta = normal(4, 5), normal(4, 5, seed=1)
    weight[0, :2] = -1e-8
    delta[0, 0] = 0.0
    result = rect(weight, delta, keep)
    assert torch.equal(result.delta, official(weight, delta, round(100 * keep)))
    assert result.delta.isfinite().all() and result.delta[0, 1] == delta[0, 1]


def test_keep_one_and_updates_that_need_no_choice_come_back_bit_for_bit():
    weight, delta = normal(7, 9), normal(7, 9, seed=1)
    result = rect(weight, delta, 1.0)
    assert torch.equal(result.delta, delta) and (result.removed_share, result.rank) == (0.0, 0)
    assert torch.equal(rect(weight, delta, 1).delta, delta)
    assert torch.equal(rect(torch.ones(1, 1), torch.ones(1, 1)).delta, torch.ones(1, 1))


def test_a_zero_update_stays_zero():
    result = rect(normal(3, 4), torch.zeros(3, 4))
    assert not result.delta.any() and result.removed_share == 0.0


def test_removed_share_is_that_of_the_squared_norm():
    weight, delta = normal(30, 40), normal(30, 40, seed=1)
    result = rect(weight, delta)
    expected = float((delta - result.delta).double().square().sum() / delta.double().square().sum())
    assert 0.0 < result.removed_share < 1.0
    assert result.removed_share == pytest.approx(expected, rel=1e-6)
    assert removed_share(delta, 2 * delta) == pytest.approx(-3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ranked_in_float32_and_stays_in_its_dtype(dtype):
    weight, delta = normal(20, 30, dtype=dtype), normal(20, 30, seed=1, dtype=dtype)
    result = rect(weight, delta)
    assert result.delta.dtype == dtype
    assert torch.equal(result.delta, official(weight.float(), delta.float(), 40).to(dtype))
    mixed = rect(weight, delta.float())
    assert mixed.delta.dtype == torch.float32 and torch.equal(mixed.delta, result.delta.float())


def test_transposed_matrices_give_the_transposed_result_and_nothing_is_written():
    weight, delta = torch.nn.Parameter(normal(6, 9)), normal(6, 9, seed=1)
    before = weight.detach().clone(), delta.clone()
    straight = rect(weight, delta).delta
    assert torch.equal(rect(weight.T, delta.T).delta, straight.T) and not straight.requires_grad
    assert torch.equal(weight, before[0]) and torch.equal(delta, before[1])


def test_it_works_where_torch_is_told_to_be_deterministic_and_holds_few_copies():
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                inputs = {part.data_ptr() for part in (*args, *(kwargs or {}).values()) if torch.is_tensor(part)}
                self.total += result.numel() * (result.data_ptr() not in inputs)
            return result

    weight, delta = normal(50, 60), normal(50, 60, seed=1)
    bound = RectConfig().bind(weight)
    torch.use_deterministic_algorithms(True)
    try:
        with Count() as count:
            bound(weight, delta)
    finally:
        torch.use_deterministic_algorithms(False)
    assert count.total <= 5 * delta.numel()  # over the whole call, not at once


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.01, 40, float("nan"), "0.4", None, True])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(ConfigError, match=rf"keep: got {keep!r}, expected a number in \(0, 1\]. .*40 percent as 0.4"):
        RectConfig(keep)


def test_a_bad_update_is_named_with_its_value_and_a_remedy():
    weight = normal(4, 6)
    with pytest.raises(ModelError, match=r"delta's shape: got \(4, 7\), expected the weight's shape, \(4, 6\)"):
        rect(weight, normal(4, 7))
    with pytest.raises(ModelError, match=r"\(6, 4\).*stored transposed"):
        rect(weight, normal(6, 4))
    spoiled = normal(4, 6)
    spoiled[0, 0], spoiled[1, 1] = float("nan"), float("inf")
    with pytest.raises(ModelError, match="delta: got 'NaN or infinite in 2 of 24 entries'.*learning rate"):
        rect(weight, spoiled)
    with pytest.raises(ModelError, match="weight: got 'NaN or infinite in 2 of 24.*undo"):
        rect(spoiled, weight)
    with pytest.raises(ModelError, match="delta's dtype"):
        rect(weight, torch.ones(4, 6, dtype=torch.int64))
