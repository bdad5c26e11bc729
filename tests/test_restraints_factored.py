"""Restraints of updates in factors: the same as of the matrix, alone, in a chain, a user's, and in the editor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import pico
from torch import Tensor

from sphere_plugin import Editor
from sphere_plugin.editing import editor as editor_module
from sphere_plugin.editing.anatomy import Rewrite
from sphere_plugin.geometry import Factors, tracked
from sphere_plugin.journaling import Snapshot
from sphere_plugin.restraints import (
    BoundRestraint,
    Chain,
    FactoredRestraint,
    PruneConfig,
    RectConfig,
    Restrained,
    SphereConfig,
    restrain,
)
from sphere_plugin.restraints.protocol import norm, removed_share

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "restraint.md"
ONES = [
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "guitar"},
    {"prompt": "Toyota Camry is produced by", "subject": "Toyota Camry", "target_new": "Microsoft"},
    {"prompt": "Water boils at 100", "subject": "Water", "target_new": "lines"},
    *REQUESTS,
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class NormCap:
    """A restraint that knows matrices only, as the page has it."""

    def bind(self, pretrained: Tensor):
        limit = 0.1 * pretrained.norm()

        def limited(weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
            scale = min(1.0, float(limit / delta.norm().clamp(min=1e-12)))
            return Restrained(delta * scale, removed_share=1 - scale**2, rank=0)

        return limited


CASES = {
    "sphere": (SphereConfig(), Factors),
    "sphere of pretrained": (SphereConfig(basis="pretrained", alpha=1.0), Factors),
    "sphere, rows as they are": (SphereConfig(row_normalize=False), Factors),
    "sphere of strength 0": (SphereConfig(alpha=0.0), Factors),
    "rect": (RectConfig(), Tensor),
    "prune": (PruneConfig(), Tensor),
    "a user's": (NormCap(), Tensor),
    "an empty chain": (Chain(()), Factors),
    "a chain of sphere": (Chain((SphereConfig(), Chain((SphereConfig(alpha=0.3),)))), Factors),
    "rect, prune, sphere": (Chain((RectConfig(), PruneConfig(), SphereConfig())), Tensor),
    "sphere, a user's": (Chain((SphereConfig(), NormCap())), Tensor),
}


@pytest.mark.parametrize("smallest", [1, 10**6], ids=["followed", "fitted"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(60, 200), (200, 60)], ids=["wide", "tall"])
def test_factors_are_restrained_like_the_matrix(shape, case, smallest, monkeypatch) -> None:
    monkeypatch.setattr(tracked, "SMALLEST", smallest)
    config, kind = CASES[case]
    pretrained = normal(*shape)
    bounds = [config.bind(pretrained.clone()) for _ in range(2)]
    weight = pretrained.clone()
    for batch in range(3):
        update = Factors(normal(shape[0], 4, seed=2 * batch + 5), normal(shape[1], 4, seed=2 * batch + 6))
        found, expected = restrain(bounds[0], weight, update), bounds[1](weight, update.dense())
        assert isinstance(found.delta, kind) and isinstance(expected.delta, Tensor)
        dense = found.delta.dense() if isinstance(found.delta, Factors) else found.delta
        if case == "rect" or "rect," in case:  # entries at the threshold may fall on either side of it
            assert (dense - expected.delta).abs().gt(1e-4).sum() <= 2
        else:
            assert (dense - expected.delta).norm() < 1e-4 * expected.delta.norm()
        assert found.removed_share == pytest.approx(expected.removed_share, abs=1e-4)
        assert found.rank == expected.rank
        weight = weight + expected.delta


def test_who_takes_factors_says_so_by_a_method() -> None:
    weight = normal(6, 9)
    takes = {type(config).__name__: isinstance(config.bind(weight), FactoredRestraint) for config, _ in CASES.values()}
    assert takes == {"SphereConfig": True, "RectConfig": False, "PruneConfig": False, "NormCap": False, "Chain": True}


def test_norms_and_shares_of_either_form() -> None:
    update = Factors(normal(6, 2), normal(9, 2, seed=1))
    half = Factors(update.left, update.right / 2)
    assert norm(update) == pytest.approx(norm(update.dense()))
    assert removed_share(update, half) == pytest.approx(0.75)
    assert removed_share(update, half.dense()) == pytest.approx(0.75)
    assert removed_share(Factors(0 * update.left, update.right), half) == 0.0


# ---- through the editor ----


def make(kind: str, **settings: object) -> Editor:
    """An editor whose principal spaces are small enough to be followed in a weight of 32 neurons."""
    model, tokenizer = pico(kind)
    threshold = 2.0 if kind == "llama" else 0.15
    usual = {"nullspace_threshold": threshold, "eta": 0.1, "alpha": 0.8, "clamp_norm_factor": 3.0}
    return Editor(model, tokenizer, pico_config(kind, **{**usual, **settings}))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def matrices(editor: Editor) -> list[Tensor]:
    """Copies of the edited weights, [d_out, d_in]."""
    return [rewrite.weight.clone() for rewrite in editor.anatomy.rewrites.values()]


@pytest.fixture
def followed(monkeypatch):
    """Follow spaces of any size; counts exact decompositions."""
    done = []
    original = tracked.spectrum
    monkeypatch.setattr(tracked, "spectrum", lambda *args: done.append(1) or original(*args))
    monkeypatch.setattr(tracked, "SMALLEST", 1)
    return done


@pytest.mark.parametrize("projection", ["in_loop", "post"])
@pytest.mark.parametrize("base", ["AlphaEdit", "MEMIT"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # Linear and Conv1D
def test_an_editor_that_follows_spaces_writes_what_a_fit_for_every_batch_gives(
    kind: str, base: str, projection: str, followed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor, int]] = []

    def spied(bound: BoundRestraint, weight: Tensor, delta: Factors) -> Restrained:
        fitted = SphereConfig(eta=0.1, alpha=0.8).bind(weight)(weight, delta.dense())
        asked.append((weight.clone(), fitted.delta, fitted.rank))
        return restrain(bound, weight, delta)

    monkeypatch.setattr(editor_module, "restrain", spied)
    editor = make(kind, base_method=base, projection=projection)
    for request in ONES:
        asked.clear()
        report = editor.apply([request])
        for (weight, expected, rank), after, said in zip(asked, matrices(editor), report.layers, strict=True):
            assert (after - weight - expected).norm() < 1e-4 * expected.norm()
            assert said.rank == rank > 0
    assert len(followed) <= len(ONES), "hardly any space was followed: nothing was tested"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_undone_and_failed_batches_leave_a_followed_space_as_it_was(
    kind: str, followed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, other = make(kind), make(kind)
    for request in ONES[:3]:
        before = Snapshot.take(other.anatomy.weights)
        other.apply([ONES[4]])
        before.restore(other.anatomy.weights)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Rewrite, "write", interrupted)
            other.apply([ONES[5]])
        for editor in (straight, other):
            editor.apply([request])
        for one, two in zip(matrices(straight), matrices(other), strict=True):
            assert (one - two).norm() < 1e-5 * one.norm()


def test_a_user_s_restraint_gets_a_matrix_from_the_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(NormCap):
        def bind(self, pretrained: Tensor):
            inner = super().bind(pretrained)
            return lambda weight, delta: (seen.append((type(delta), delta.shape, weight.shape)), inner(weight, delta))[
                1
            ]

    editor = make("gpt2")
    before = matrices(editor)
    chain = Chain((Spy(), SphereConfig()))
    monkeypatch.setattr(type(editor.config), "restraint", lambda self: chain)
    editor._restraint = None
    assert editor.reconfigure(editor.config)
    editor.apply(REQUESTS)
    assert seen == [(Tensor, (32, 96), (32, 96))] * 2
    for old, new in zip(before, matrices(editor), strict=True):
        assert 0 < float((new - old).norm()) <= 0.1001 * float(old.norm())


def test_the_page_s_example_takes_matrices_and_factors_alike() -> None:
    names: dict = {}
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]
    exec(compile(block, str(PAGE), "exec"), names)
    weight, update = normal(8, 9), Factors(normal(8, 2, seed=1), normal(9, 2, seed=2))
    bound = names["NormCap"](0.05).bind(weight)
    torch.testing.assert_close(restrain(bound, weight, update).delta, bound(weight, update.dense()).delta)
