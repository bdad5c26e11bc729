"""Weights and updates of any kind: each result is that of a plain computation in float64, or a refusal."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import torch
from generated import EXTREME, SOUND, Made, Tally, is_weight, matrices, seeded, share
from hypothesis import given
from hypothesis import strategies as st

from sphere_plugin.geometry import Factors, PrincipalSpace, hyperspherical_energy
from sphere_plugin.geometry.bound import bound_constant, bound_terms, lower_bound
from sphere_plugin.geometry.energy import delta_he
from sphere_plugin.geometry.pairs import FLOOR
from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, SphereConfig
from sphere_plugin.restraints.prune import prune_view

ETAS = st.floats(0.01, 1.0) | st.sampled_from((0.5, 1, Fraction(1, 3)))
ALPHAS = st.floats(0.0, 1.0) | st.sampled_from((0, 1, 0.8, Fraction(4, 5)))
BAD_NUMBERS = st.sampled_from((0.0, -0.5, 1.5, math.nan, math.inf, None, "0.5", True, 10**400, [0.5]))


def unit(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.detach().double()
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-8)


def update_of(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """An update as large as the weight."""
    size = weight.detach().double().abs().max().clamp(max=1e30)
    wide = torch.randn(weight.shape, generator=seeded(seed), dtype=torch.float64) * size * 0.1
    return wide.clamp(-3e4, 3e4).to(weight.dtype) if weight.dtype == torch.float16 else wide.to(weight.dtype)


def precision(dtype: torch.dtype) -> float:
    """What a result in this dtype may differ by, as a share."""
    return {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 4e-3}.get(dtype, 3e-2)


def test_principal_spaces(record_property):
    """The basis is orthonormal, of eigenvectors, as many as η asks for, and the projection is the dense one."""
    tally = Tally("tensors")

    @share(3.0)
    @given(matrices(), ETAS, ALPHAS, st.integers(0, 99))
    def fitted(made: Made, eta: float, alpha: float, seed: int) -> None:
        weight = made.tensor
        good = None if made.kind in EXTREME else is_weight(weight)
        with tally.one(good):
            space = PrincipalSpace.fit(weight, eta)
            delta = update_of(weight, seed)
            projected = space.project(delta, alpha)  # before U is formed
            share_gone = space.removed_share(delta, alpha)
            basis = space.basis.double()
            tolerance = precision(weight.dtype)
            assert float((basis.T @ basis - torch.eye(space.rank)).abs().max()) < 1e-4
            rows = unit(weight)
            covariance = rows.T @ rows / len(rows)
            values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
            left = covariance @ basis - basis * space.eigenvalues.double()
            assert float(left.norm(dim=0).max()) < 1e-3 * float(values[0])
            sums = values.cumsum(0) / values.sum()
            positive = int((values > 1e-9 * values[0]).sum())
            assert space.rank <= max(1, int((values > 1e-15 * values[0]).sum()))  # in float64 that is no rounding yet
            assert float(sums[space.rank - 1]) >= float(eta) - 1e-4 or space.rank >= positive - 1
            assert space.rank == 1 or float(sums[space.rank - 2]) <= float(eta) + 1e-4
            dense = delta.double() @ (torch.eye(len(covariance)) - float(alpha) * basis @ basis.T)
            assert projected.dtype == delta.dtype
            steps = torch.finfo(delta.dtype).smallest_normal * precision(delta.dtype) * dense.numel()  # of rounding
            assert float((projected.double() - dense).norm()) <= tolerance * float(delta.double().norm()) + steps
            whole = float(delta.double().norm()) ** 2
            assert abs(share_gone - (1 - float(dense.norm()) ** 2 / whole if whole else 0.0)) < 1e-3
            assert 0.0 <= share_gone <= 1.0

    fitted()
    tally.told(record_property)


def test_settings_of_the_projection(record_property):
    tally = Tally("tensors")
    weight = torch.randn(6, 9, generator=seeded(0))

    @share(0.5)
    @given(st.sampled_from(("eta", "alpha", "s", "base", "keep")), BAD_NUMBERS | st.floats())
    def numbers(name: str, value: object) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        ranges = {
            "eta": lambda x: 0 < x <= 1,
            "alpha": lambda x: 0 <= x <= 1,
            "s": lambda x: 0 <= x < math.inf,
            "base": lambda x: 1 < x < math.inf,
            "keep": lambda x: 0 < x <= 1,
        }
        # How large a power a float holds is not for the one who asks to know.
        good = None if name == "s" and number and value > 300 else number and ranges[name](value)
        with tally.one(good):
            if name == "s":
                energy = hyperspherical_energy(weight, value)
                assert math.isfinite(energy)
            elif name == "base":
                bound = PruneConfig(value).bind(weight)
                assert bound(weight, weight).delta.isfinite().all()
            elif name == "keep":
                kept = RectConfig(value).bind(weight)(weight, weight).delta
                assert int(kept.count_nonzero()) >= math.floor(54 * value)
            elif name == "eta":
                assert 1 <= PrincipalSpace.fit(weight, value).rank <= 6
            else:
                PrincipalSpace.fit(weight).project(weight, value)

    numbers()
    tally.told(record_property)


def test_hyperspherical_energy(record_property):
    """The sum over all pairs, pair by pair."""
    tally = Tally("tensors")

    @share(2.0)
    @given(matrices(size=12), st.sampled_from((0.0, 1.0, 2.0, 3.5)), st.none() | st.integers(1, 5))
    def measured(made: Made, s: float, chunk: int | None) -> None:
        weight = made.tensor
        good = None if made.kind in EXTREME else is_weight(weight) and not same_direction(weight)
        with tally.one(good):
            found = hyperspherical_energy(weight, s, chunk)
            rows = weight.detach().double()
            rows = rows / rows.abs().amax(dim=1, keepdim=True)  # of any size, none too large to square
            rows = rows / rows.norm(dim=1, keepdim=True)
            distances = [float((a - b).norm()) for a, b in combinations(rows, 2)]
            assert all(distance > FLOOR / 2 for distance in distances)
            each = [distance**-s if s else -math.log(distance) for distance in distances]
            scale = sum(map(abs, each))
            # Two rows at 1e-7 of each other are no better known than that.
            loose = 1e-6 if made.kind == "near rows" or weight.dtype == torch.float64 else 1e-9
            assert abs(found - 2 * sum(each)) <= loose * (2 * scale + 1) / min([1.0, *distances])

    measured()
    tally.told(record_property)


def same_direction(weight: torch.Tensor) -> bool:
    """Whether two rows are as good as parallel, or one is zero."""
    rows = weight.detach().double()
    if bool((rows == 0).all(dim=1).any()):
        return True
    rows = rows / rows.norm(dim=1, keepdim=True)
    return any(float((a - b).norm()) <= FLOOR * 1.5 for a, b in combinations(rows, 2))


def test_the_bound(record_property):
    """ΔHE, K and the bound, pair by pair; and an energy that falls stays within it."""
    tally = Tally("tensors")

    @share(1.0)
    @given(matrices(size=8), st.integers(0, 99), st.floats(-6, 0))
    def both_sides(made: Made, seed: int, power: float) -> None:
        before = made.tensor
        with tally.one(None if is_weight(before) else False):
            if not is_weight(before):
                bound_constant(before)
            after = (before.detach().double() + update_of(before, seed).double() * 10**power).to(before.dtype)
            change, constant = delta_he(before, after), bound_constant(before)
            old, new = before.detach().double(), after.double()
            pairs = list(combinations(range(len(old)), 2))
            each = [float((old[i] - old[j]).norm()) ** -2 - float((new[i] - new[j]).norm()) ** -2 for i, j in pairs]
            larger = sum(
                float((old[i] - old[j]).norm()) ** -2 + float((new[i] - new[j]).norm()) ** -2 for i, j in pairs
            )
            assert abs(change - 2 * sum(each)) <= 1e-6 * (larger + 1e-300)
            crowding = [
                sum(float((old[i] - old[j]).norm()) ** -3 for j in range(len(old)) if j != i) for i in range(len(old))
            ]
            expected = (
                4 * math.sqrt(sum((one / max(crowding)) ** 2 for one in crowding)) * max(crowding) if pairs else 0
            )
            assert math.isclose(constant, expected, rel_tol=1e-5)
            terms = bound_terms(before, after)
            assert math.isclose(terms.change, change, rel_tol=1e-6, abs_tol=1e-9 * larger)
            assert lower_bound(before, after) >= 0.0
            if change > 0 and terms.perturbation and math.isfinite(constant):
                assert change <= constant * math.sqrt(terms.perturbation) * (1 + 1e-6) + 1e-9 * larger

    both_sides()
    tally.told(record_property)


def test_rect(record_property):
    """As many entries as asked for, those of the largest relative change, each as it was."""
    tally = Tally("tensors")

    @share(1.0)
    @given(matrices(size=10), matrices(size=10), st.booleans(), st.floats(0.01, 1.0), st.integers(0, 99))
    def thinned(made: Made, other: Made, own: bool, keep: float, seed: int) -> None:
        weight = made.tensor
        delta = update_of(weight, seed) if own and is_weight(weight) else other.tensor
        finite = delta.is_floating_point() and bool(delta.isfinite().all())
        good = is_weight(weight) and finite and delta.dim() == 2 and delta.shape == weight.shape and delta.numel() > 0
        with tally.one(good):
            kept = RectConfig(keep).bind(weight)(weight, delta).delta
            count = delta.numel()
            below = math.floor(count * (1 - Fraction(str(keep))))
            dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
            change = (delta.detach().to(dtype) / (weight.detach().to(dtype) + 1e-8)).abs().flatten().tolist()
            change = [math.inf if math.isnan(one) else one for one in change]
            limit = sorted(change)[below - 1] if below else -1.0
            flat, was = kept.flatten().tolist(), delta.detach().flatten().tolist()
            for stays, now, then in zip((one >= limit for one in change), flat, was, strict=True):
                assert now == (then if stays else 0.0)

    thinned()
    tally.told(record_property)


def test_prune(record_property):
    """Singular values of the cumulative update, by a singular value decomposition."""
    tally = Tally("tensors")

    @share(1.0)
    @given(matrices(size=10), st.integers(0, 99), st.floats(0, 2), st.sampled_from((math.e, 2, 1.2, 100.0)))
    def compressed(made: Made, seed: int, power: float, base: float) -> None:
        pretrained = made.tensor
        with tally.one(None if made.kind in EXTREME else is_weight(pretrained)):
            step = update_of(pretrained, seed) * 10**power if is_weight(pretrained) else pretrained
            edited = pretrained.detach() + step.detach()
            view = prune_view(pretrained, edited, base)
            total = edited.double() - pretrained.detach().double()
            left, sizes, right = torch.linalg.svd(total, full_matrices=False)
            top = float(torch.linalg.svdvals(pretrained.detach().double())[0])
            squeezed = torch.where(sizes > top, (sizes.log() - math.log(top)) / math.log(base) + top, sizes)
            expected = pretrained.detach().double() + left * squeezed @ right
            apart = float((view.double() - expected).norm())
            size = float(total.norm() + pretrained.detach().double().norm() + expected.norm())
            assert apart <= precision(pretrained.dtype) * size

    compressed()
    tally.told(record_property)


def test_factors_and_chains(record_property):
    """An update in factors is restrained as its product is; a chain is its members one after the other."""
    tally = Tally("tensors")
    members = st.lists(st.sampled_from(("rect", "prune", "sphere", "pretrained")), max_size=3)

    @share(1.0)
    @given(
        matrices(SOUND, size=12, dtypes=(torch.float32, torch.float64)), st.integers(1, 4), members, st.integers(0, 99)
    )
    def alike(made: Made, facts: int, names: list[str], seed: int) -> None:
        kinds = {
            "rect": RectConfig(0.5),
            "prune": PruneConfig(),
            "sphere": SphereConfig(),
            "pretrained": SphereConfig(basis="pretrained"),
        }
        weight = made.tensor.detach()
        rows, columns = weight.shape
        generator = seeded(seed)
        left, right = (torch.randn(n, facts, generator=generator, dtype=weight.dtype) for n in (rows, columns))
        factors = Factors(left, right)
        with tally.one(True):
            bound = Chain([kinds[name] for name in names]).bind(weight)
            whole = bound(weight, factors.dense())
            thin = bound.factored(weight, factors).delta
            thin = thin.dense() if isinstance(thin, Factors) else thin
            longest = float(left.norm() * right.norm())  # of which their sum may be a small rest
            assert abs(factors.norm() - float(factors.dense().double().norm())) <= 1e-5 * longest
            if "rect" not in names:  # which of two entries that tie stays is a matter of rounding
                torch.testing.assert_close(thin, whole.delta, rtol=1e-3, atol=2e-3 * factors.norm() + 1e-5 * longest)
            step = factors.dense()
            for name in names:
                step = kinds[name].bind(weight)(weight, step).delta
            torch.testing.assert_close(whole.delta, step, rtol=1e-4, atol=1e-5 * longest)
            if names and names[-1] == "sphere":
                basis = PrincipalSpace.fit(weight).basis
                before = Chain([kinds[name] for name in names[:-1]]).bind(weight)(weight, factors.dense()).delta
                torch.testing.assert_close(
                    whole.delta @ basis, 0.2 * before @ basis, rtol=1e-2, atol=1e-3 * float(before.norm()) + 1e-6
                )

    alike()
    tally.told(record_property)


def test_updates_of_other_shapes(record_property):
    """A pair that does not fit together is refused, whatever it is."""
    tally = Tally("tensors")

    @share(1.0)
    @given(
        matrices(SOUND, size=6), matrices(size=6), st.sampled_from(("space", "sphere", "prune", "energy", "factors"))
    )
    def paired(one: Made, other: Made, what: str) -> None:
        weight, delta = one.tensor, other.tensor
        fits = delta.is_floating_point() and delta.dim() == 2 and delta.numel() > 0
        finite = fits and bool(delta.detach().isfinite().all())
        if what in ("space", "sphere"):
            good = fits and delta.shape[1] == weight.shape[1]
        elif what == "factors":
            good = fits and delta.shape[1] == weight.shape[1] and delta.dtype == weight.dtype
        else:
            good = finite and delta.shape == weight.shape
        with tally.one(None if good else False):
            if what == "space":
                assert PrincipalSpace.fit(weight).project(delta).shape == delta.shape
            elif what == "sphere":
                assert SphereConfig().bind(weight)(weight, delta).delta.shape == delta.shape
            elif what == "prune":
                assert PruneConfig().bind(weight)(weight, delta).delta.shape == delta.shape
            elif what == "energy":
                delta_he(weight, delta)
            else:
                assert Factors(weight, delta).dense().shape == (len(weight), len(delta))

    paired()
    tally.told(record_property)
