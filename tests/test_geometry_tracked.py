"""The space that is followed from edit to edit against one that is fitted anew, in float64, for every edit."""

import pytest
import torch

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, PrincipalSpace, tracked
from sphere_plugin.geometry.tracked import TrackedSpace

D_OUT, D_IN, FACTS, ALPHA = 120, 400, 3, 0.8


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def structured(power=0.5):
    """A weight whose k-th singular value is k^-power, rows of very different lengths."""
    left = torch.linalg.qr(normal(D_OUT, D_OUT, seed=1, dtype=torch.float64)).Q
    right = torch.linalg.qr(normal(D_IN, D_OUT, seed=2, dtype=torch.float64)).Q
    weight = left * torch.arange(1, D_OUT + 1, dtype=torch.float64) ** -power @ right.T
    return (torch.logspace(-2, 2, D_OUT, dtype=torch.float64)[:, None] * weight).float()


def uneven():
    return normal(D_OUT, D_IN) * torch.logspace(0, -1, D_IN)


def update(weight, size, seed, facts=FACTS):
    """An update ``size`` times as long as the weight, rows in proportion."""
    left = normal(D_OUT, facts, seed=2 * seed) * torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    right = normal(D_IN, facts, seed=2 * seed + 1)
    return Factors(left * (size * float(weight.norm()) / Factors(left, right).norm()), right)


def exact(weight, delta, eta=0.5, row_normalize=True, alpha=ALPHA):
    """What is to come out, [d_out, d_in] float64, and r."""
    basis = PrincipalSpace.fit(weight.double(), eta, row_normalize).basis
    dense = delta.dense().double()
    return dense - alpha * (dense @ basis) @ basis.T, basis.shape[1]


def check(found, weight, delta, **how):
    """Asserts that the first of ``found`` is the projected update to 1e-4, with r equal."""
    expected, rank = exact(weight, delta, **how)
    assert found[1] == rank
    assert float((found[0].dense() - expected).norm() / expected.norm()) < 1e-4


@pytest.fixture
def fits(monkeypatch):
    """How many exact decompositions there were."""
    done = []
    original = tracked.spectrum
    monkeypatch.setattr(tracked, "spectrum", lambda *args: done.append(1) or original(*args))
    return done


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("make", [lambda: normal(D_OUT, D_IN), uneven, structured], ids=["random", "uneven", "power"])
def test_twenty_batches_are_projected_as_if_fitted_anew(make, row_normalize, size, fits):
    weight, space = make(), TrackedSpace(0.4, row_normalize)
    for batch in range(20):
        delta = update(weight, size, batch)
        found = space.project(weight, delta, ALPHA)
        check(found, weight, delta, eta=0.4, row_normalize=row_normalize)
        weight = weight + found[0].dense()
    if size <= 0.1 and (make is not structured or row_normalize):
        assert len(fits) <= 3


@pytest.mark.parametrize("eta", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_any_eta_and_alpha(eta, alpha):
    weight, space = uneven(), TrackedSpace(eta)
    for batch in range(3):
        delta = update(weight, 0.05, batch)
        found = space.project(weight, delta, alpha)
        check(found, weight, delta, eta=eta, alpha=alpha)
        weight = weight + found[0].dense()


@pytest.mark.parametrize("facts", [1, 40, 130, 450])
def test_any_number_of_facts(facts):
    weight, space = uneven(), TrackedSpace(0.3)
    for batch in range(3):
        delta = update(weight, 0.05, batch, facts)
        found = space.project(weight, delta, ALPHA)
        check(found, weight, delta, eta=0.3)
        weight = weight + found[0].dense()


def test_a_new_direction_that_has_nothing_to_do_with_the_old_ones_is_found():
    """Silent neurons get a weight along inputs that no neuron read: G x = 0 there for all eigenvectors of before."""
    weight, how = uneven(), {"eta": 0.3, "row_normalize": False}
    weight[-20:], weight[:, -10:] = 0.0, 0.0
    left, right = torch.zeros(D_OUT, 1), torch.zeros(D_IN, 1)
    left[-20:], right[-10:] = 20**-0.5, 0.9 * torch.linalg.matrix_norm(weight, ord=2) * 10**-0.5
    space = TrackedSpace(**how)
    for delta in (Factors(left, right), update(weight, 0.01, 3), Factors(left, right)):
        found = space.project(weight, delta, ALPHA)
        check(found, weight, delta, **how)
        weight = weight + found[0].dense()


def test_an_update_that_was_undone_or_never_written_changes_nothing(fits):
    weight, space, straight = uneven(), TrackedSpace(0.4), TrackedSpace(0.4)
    first = update(weight, 0.05, 0)
    written = space.project(weight, first, ALPHA)[0]
    assert torch.equal(straight.project(weight, first, ALPHA)[0].right, written.right)
    edited = weight + written.dense()
    for seed in range(1, 4):
        delta = update(edited, 0.05, seed)
        check(space.project(edited, delta, ALPHA), edited, delta, eta=0.4)
    last = update(edited, 0.05, 1)
    assert torch.equal(space.project(edited, last, ALPHA)[0].right, straight.project(edited, last, ALPHA)[0].right)
    assert len(fits) == 2  # one for each


@pytest.mark.parametrize(
    "change",
    [
        lambda weight, start: start,
        lambda weight, start: weight.bfloat16().float(),
        lambda weight, start: weight.half().float(),
        lambda weight, start: weight.index_fill(0, torch.tensor([5]), 0.0),
        lambda weight, start: weight + 1e-3 * normal(D_OUT, 1, seed=8) @ normal(1, D_IN, seed=9),
        lambda weight, start: weight.roll(1, 0),
    ],
    ids=["restored", "bfloat16", "float16", "one row", "another edit", "rows moved"],
)
def test_a_weight_in_any_other_state_is_decomposed_anew(change, fits):
    start, space = uneven(), TrackedSpace(0.4)
    weight = start
    for batch in range(3):
        weight = weight + space.project(weight, update(weight, 0.05, batch), ALPHA)[0].dense()
    weight = change(weight, start)
    done, delta = len(fits), update(weight, 0.05, 7)
    found = space.project(weight, delta, ALPHA)
    check(found, weight, delta, eta=0.4)
    assert len(fits) == done + 1
    fresh = TrackedSpace(0.4).project(weight, delta, ALPHA)  # as if there had been nothing before, bit for bit
    assert torch.equal(found[0].right, fresh[0].right) and found[1] == fresh[1]


def test_orthogonal_turns_of_the_inputs_change_no_gram_matrix_and_no_result():
    """G does not tell W from W Q. It need not: U is taken from W as it is now."""
    weight, space = uneven(), TrackedSpace(0.4)
    space.project(weight, update(weight, 0.05, 0), ALPHA)
    turned = weight @ torch.linalg.qr(normal(D_IN, D_IN, seed=5)).Q
    delta = update(turned, 0.05, 1)
    check(space.project(turned, delta, ALPHA), turned, delta, eta=0.4)


def test_the_gram_matrix_is_made_anew_every_so_often(monkeypatch, fits):
    monkeypatch.setattr(tracked, "EXACT_EVERY", 4)
    weight, space = uneven(), TrackedSpace(0.4)
    for batch in range(11):
        weight = weight + space.project(weight, update(weight, 0.01, batch), ALPHA)[0].dense()
    assert len(fits) == 3


@pytest.mark.parametrize("place", ["_sweep", "_precise", "gram", "PrincipalSpace"])
def test_an_interruption_anywhere_leaves_a_usable_state(place, monkeypatch):
    weight, space = uneven(), TrackedSpace(0.4)
    weight = weight + space.project(weight, update(weight, 0.05, 0), ALPHA)[0].dense()
    if place == "gram":
        weight = weight * 1.1

    def stop(*args, **more):
        raise KeyboardInterrupt

    delta = update(weight, 0.05, 1)
    monkeypatch.setattr(tracked, place, stop)
    with pytest.raises(KeyboardInterrupt):
        space.project(weight, delta, ALPHA)
    monkeypatch.undo()
    check(space.project(weight, delta, ALPHA), weight, delta, eta=0.4)


def test_updates_that_are_zero_or_not_finite_poison_nothing(fits):
    weight, space = uneven(), TrackedSpace(0.4)
    delta = update(weight, 0.05, 1)
    zero = Factors(delta.left, torch.zeros_like(delta.right))
    for _ in range(2):
        written, _ = space.project(weight, zero, ALPHA)
        assert not written.dense().any()
    assert len(fits) == 1
    one_zero = Factors(delta.left * torch.tensor([1.0, 0.0, 1.0]), delta.right)
    weight = weight + space.project(weight, one_zero, ALPHA)[0].dense()
    check(space.project(weight, delta, ALPHA), weight, delta, eta=0.4)
    spoiled = Factors(delta.left, delta.right * float("nan"))
    assert space.project(weight, spoiled, ALPHA)[0].right.isnan().any()
    check(space.project(weight, delta, ALPHA), weight, delta, eta=0.4)


def test_steep_and_low_rank_weights():
    thin = normal(D_OUT, 7) @ normal(7, D_IN, seed=5)
    steep = structured(4.0)
    for start in (thin, steep):
        weight, space = start, TrackedSpace(0.99, row_normalize=False)
        for batch in range(3):
            delta = update(weight, 1e-3, batch)
            found = space.project(weight, delta, 1.0)
            cold = PrincipalSpace.fit(weight, 0.99, row_normalize=False)
            assert found[1] == cold.rank
            assert float((found[0].right - cold.project(delta, 1.0).right).norm() / delta.right.norm()) < 1e-3
            weight = weight + found[0].dense()


def test_what_it_takes():
    weight, delta = torch.zeros(1000, 2000), Factors(torch.zeros(1000, 5), torch.zeros(2000, 5))
    assert TrackedSpace.takes(weight, delta)
    assert not TrackedSpace.takes(weight.double(), delta)
    assert not TrackedSpace.takes(weight, delta.to(torch.float64))
    assert not TrackedSpace.takes(weight.T, Factors(delta.right, delta.left))
    assert not TrackedSpace.takes(weight[:100], Factors(delta.left[:100], delta.right))
    assert not TrackedSpace.takes(weight, Factors(torch.zeros(1000, 300), torch.zeros(2000, 300)))


def test_an_update_of_another_weight_and_a_broken_weight_are_refused():
    weight, space = uneven(), TrackedSpace(0.4)
    with pytest.raises(
        ModelError, match=r"delta's shape: got \(400, 120\), expected the weight's shape, \(120, 400\)"
    ):
        space.project(weight, Factors(normal(D_IN, 2), normal(D_OUT, 2)), ALPHA)
    with pytest.raises(ModelError, match="weight: got 'zeros only'"):
        space.project(torch.zeros(D_OUT, D_IN), update(weight, 0.1, 0), ALPHA)
    weight[3, 3] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinite in 1"):
        space.project(weight, update(normal(D_OUT, D_IN), 0.1, 0), ALPHA)
