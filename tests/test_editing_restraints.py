"""RECT, PRUNE and SPHERE through the editor: what is written, what a batch is told to do, and the line of the log."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import pico
from torch import Tensor, nn

from sphere_plugin import ConfigError, EditingConfig, Editor, PrincipalSpace, hyperspherical_energy
from sphere_plugin.editing import account
from sphere_plugin.editing.account import Touched, log_apply
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.geometry import Factors
from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, SphereConfig

SECOND = [
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "guitar"},
    {"prompt": "Toyota Camry is produced by", "subject": "Toyota Camry", "target_new": "Microsoft"},
]
KINDS = ("llama", "gpt2")  # Linear and Conv1D
RECT, PRUNE = RectConfig(keep=0.3), PruneConfig(base=10.0)


def make(kind: str = "llama", scale: float = 1.0, **settings: object) -> Editor:
    """A MEMIT editor without SPHERE, whose facts weigh a lot, on a pico model with its edited weights scaled."""
    model, tokenizer = pico(kind)
    usual = {"base_method": "MEMIT", "alpha": 0.0, "projection": "post"}
    usual |= {"mom2_update_weight": 0.1, "clamp_norm_factor": 3.0}
    config = pico_config(kind, **{**usual, **settings})
    with torch.no_grad():
        for layer in config.layers:
            model.get_submodule(config.rewrite_module_tmp.format(layer)).weight.mul_(scale)
    return Editor(model, tokenizer, config)


def matrices(editor: Editor) -> dict[int, Tensor]:
    """Copies of the edited weights with one neuron per row, [d_out, d_in]; GPT-2's Conv1D keeps the transpose."""
    found = {}
    for layer in editor.config.layers:
        module = editor.anatomy.model.get_submodule(editor.config.rewrite_module_tmp.format(layer))
        weight = module.weight.detach().clone()
        found[layer] = weight if isinstance(module, nn.Linear) else weight.T
    return found


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


def rect(weight: Tensor, delta: Tensor, keep: float) -> Tensor:
    """RECT with plain torch, as the authors' code has it."""
    change = (delta / (weight + 1e-8)).abs()
    threshold = change.flatten().kthvalue(math.floor(delta.numel() * (1 - keep))).values
    return torch.where(change >= threshold, delta, 0.0)


def pruned(total: Tensor, pretrained: Tensor, base: float) -> Tensor:
    """D' by a full singular value decomposition in float64."""
    left, sizes, right = torch.linalg.svd(total.double(), full_matrices=False)
    return (left * compressed(sizes, pretrained, base)) @ right


def compressed(sizes: Tensor, pretrained: Tensor, base: float) -> Tensor:
    """PRUNE's formula for the singular values."""
    limit = torch.linalg.matrix_norm(pretrained.double(), ord=2)
    return torch.where(sizes > limit, (sizes.log() - limit.log()) / math.log(base) + limit, sizes)


def projected(delta: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ΔW(I − αUUᵀ), U of ``weight``."""
    u = PrincipalSpace.fit(weight, 0.5).basis.double()
    return delta.double() - alpha * (delta.double() @ u) @ u.T


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Layer -> the updates its closed form has returned, as they were before any restraint."""
    noted: dict[int, list[Tensor]] = {}
    for form in (AlphaEdit, Memit):

        def update(self, keys, residuals, original=form.update):
            delta = original(self, keys, residuals)
            noted.setdefault(self.layer, []).append(delta.dense())
            return delta

        monkeypatch.setattr(form, "update", update)
    return noted


# ---- RECT ----


@pytest.mark.parametrize("kind", KINDS)
def test_rect_keeps_the_largest_relative_changes_of_memits_update(kind: str, solved: dict[int, list[Tensor]]) -> None:
    plain, ours = make(kind), make(kind, rect=RECT)
    for editor in (plain, ours):
        editor.apply(REQUESTS)
    before = matrices(make(kind))
    unrestrained, after = matrices(plain), matrices(ours)
    for layer, weight in before.items():
        delta, others = solved[layer]
        assert torch.equal(delta, others), "the same targets and keys, so the same updates"
        assert torch.equal(unrestrained[layer], weight + delta)
        assert torch.equal(after[layer], weight + rect(weight, delta, 0.3))
        assert torch.equal(after[layer], weight + RECT.bind(weight)(weight, delta).delta)
        assert float((after[layer] != weight).float().mean()) == pytest.approx(0.3, abs=0.005)


def test_rect_measures_by_the_weight_as_the_batch_finds_it(solved: dict[int, list[Tensor]]) -> None:
    editor = make(rect=RECT)
    pretrained = matrices(editor)
    editor.apply(REQUESTS)
    current = matrices(editor)
    editor.apply(SECOND)
    for layer, after in matrices(editor).items():
        weight, delta = current[layer], solved[layer][1]
        assert torch.equal(after, weight + rect(weight, delta, 0.3))
        assert not torch.equal(after, weight + rect(pretrained[layer], delta, 0.3))


def test_in_the_loop_the_layers_above_see_what_rect_left(solved: dict[int, list[Tensor]]) -> None:
    editor = make(rect=RECT, projection="in_loop")
    before = matrices(editor)
    editor.apply(REQUESTS)
    make(rect=RECT).apply(REQUESTS)  # post
    (first, first_post), (second, second_post) = solved[1], solved[2]
    assert torch.equal(first, first_post) and not torch.equal(second, second_post)
    after = matrices(editor)
    assert all(torch.equal(after[n], before[n] + rect(before[n], solved[n][0], 0.3)) for n in before)


def test_rect_works_on_alphaedit_as_well(solved: dict[int, list[Tensor]]) -> None:
    editor = make(base_method="AlphaEdit", nullspace_threshold=2.0, rect=RECT)
    before = matrices(editor)
    editor.apply(REQUESTS)
    after = matrices(editor)
    assert all(torch.equal(after[n], before[n] + rect(before[n], solved[n][0], 0.3)) for n in before)


# ---- PRUNE ----


@pytest.mark.parametrize("projection", ["post", "in_loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_every_batch_the_cumulative_update_is_the_compressed_one(
    kind: str, projection: str, solved: dict[int, list[Tensor]]
) -> None:
    editor = make(kind, scale=0.2, prune=PRUNE, projection=projection)
    pretrained = matrices(editor)
    for number, requests in enumerate((REQUESTS, SECOND)):
        current = matrices(editor)
        report = editor.apply(requests)
        for said, (layer, after) in zip(report.layers, matrices(editor).items(), strict=True):
            start = pretrained[layer]
            total = (current[layer] - start + solved[layer][number]).double()
            sizes, limit = torch.linalg.svdvals(total), float(torch.linalg.matrix_norm(start, ord=2))
            assert sizes[0] > 1.2 * limit and sizes[-1] < limit, "nothing is compressed, or all: nothing was tested"
            expected = compressed(sizes, start, 10.0).sort(descending=True).values
            left = torch.linalg.svdvals((after - start).double())
            assert left[0] < 0.95 * sizes[0]
            assert torch.allclose(left, expected, rtol=1e-4, atol=1e-5)
            assert ((after - start) - pruned(total, start, 10.0)).norm() < 1e-5 * total.norm()
            removed = 1 - ((after - current[layer]).norm() / solved[layer][number].norm()) ** 2
            assert said.removed_share == pytest.approx(float(removed), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prune_starts_from_memits_update(kind: str, solved: dict[int, list[Tensor]]) -> None:
    for settings in ({}, {"prune": PRUNE}):
        make(kind, scale=0.2, **settings).apply(REQUESTS)
    assert all(torch.equal(*updates) for updates in solved.values())


def test_prune_changes_nothing_while_the_cumulative_update_is_small() -> None:
    plain, ours = make(), make(prune=PRUNE)
    for editor in (plain, ours):
        editor.apply(REQUESTS)
    assert same(matrices(plain), matrices(ours))


# ---- several ----


def test_sphere_comes_after_rect(solved: dict[int, list[Tensor]]) -> None:
    editor = make(rect=RECT, alpha=0.8)
    before = matrices(editor)
    report = editor.apply(REQUESTS)
    for said, (layer, after) in zip(report.layers, matrices(editor).items(), strict=True):
        weight, delta = before[layer], solved[layer][0]
        expected = projected(rect(weight, delta, 0.3), weight, 0.8)
        other = rect(weight, projected(delta, weight, 0.8).float(), 0.3)
        assert (after - weight - expected).norm() < 1e-5 * delta.norm()
        assert (after - weight - other).norm() > 1e-2 * delta.norm()
        removed = 1 - (expected.norm() / delta.norm()) ** 2
        assert said.removed_share == pytest.approx(float(removed), abs=1e-4)
        assert said.rank == PrincipalSpace.fit(weight, 0.5).rank
        assert said.solved_norm == pytest.approx(float(delta.norm()))


def test_prune_comes_after_rect_and_before_sphere(solved: dict[int, list[Tensor]]) -> None:
    editor = make(scale=0.2, rect=RECT, prune=PRUNE, alpha=0.8)
    before = matrices(editor)
    editor.apply(REQUESTS)
    for layer, after in matrices(editor).items():
        weight, delta = before[layer], solved[layer][0]
        kept = rect(weight, delta, 0.3)
        assert (pruned(kept, weight, 10.0) - kept).norm() > 1e-2 * delta.norm(), "PRUNE did nothing"
        expected = projected(pruned(kept, weight, 10.0), weight, 0.8)
        assert (after - weight - expected).norm() < 1e-5 * delta.norm()


@pytest.mark.parametrize("projection", ["post", "in_loop"])
@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
def test_without_restraints_the_base_methods_update_is_written_bit_for_bit(
    base: str, projection: str, solved: dict[int, list[Tensor]]
) -> None:
    editor = make(base_method=base, projection=projection, nullspace_threshold=2.0)
    for number, requests in enumerate((REQUESTS, SECOND)):
        before = matrices(editor)
        editor.apply(requests)
        assert same(matrices(editor), {layer: weight + solved[layer][number] for layer, weight in before.items()})


@pytest.mark.parametrize(
    ("settings", "members", "name"),
    [
        ({"alpha": 0.0}, None, "MEMIT"),
        ({"alpha": 0.8}, None, "MEMIT + SPHERE"),
        ({"alpha": 0.0, "rect": RECT}, [RECT], "MEMIT + RECT"),
        ({"alpha": 0, "prune": PRUNE}, [PRUNE], "MEMIT + PRUNE"),
        ({"prune": PRUNE}, [PRUNE, SphereConfig()], "MEMIT + PRUNE + SPHERE"),
        ({"prune": PRUNE, "rect": RECT, "alpha": 0.3, "basis": "pretrained"},
         [RECT, PRUNE, SphereConfig(alpha=0.3, basis="pretrained")], "MEMIT + RECT + PRUNE + SPHERE"),
        ({"base_method": "AlphaEdit", "rect": RECT}, [RECT, SphereConfig(alpha=0.5)], "AlphaEdit + RECT + SPHERE"),
    ],
)  # fmt: skip
def test_settings_say_what_is_applied_and_in_which_order(settings: dict, members: list | None, name: str) -> None:
    config = pico_config("llama", **{"base_method": "MEMIT", **settings})
    assert config.restraint() == (config.sphere() if members is None else Chain(members))
    assert config.method() == name


@pytest.mark.parametrize("value", [True, False, {"keep": 0.4}, "yes", RectConfig, SphereConfig()])
@pytest.mark.parametrize("name", ["rect", "prune"])
def test_settings_take_configured_restraints_only(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        pico_config("llama", **{name: value})
    assert str(caught.value).startswith(f"{name}: got {value!r}, expected a {name.title()}Config, or None")


# ---- other settings between batches ----


def changed(editor: Editor, **changes: object) -> EditingConfig:
    return dataclasses.replace(editor.config, **changes)


def test_rect_may_be_asked_for_between_batches(solved: dict[int, list[Tensor]]) -> None:
    editor = make()
    editor.apply(REQUESTS)
    assert editor.reconfigure(changed(editor, rect=RECT))
    before = matrices(editor)
    editor.apply(SECOND)
    assert same(matrices(editor), {n: w + rect(w, solved[n][1], 0.3) for n, w in before.items()})
    assert editor.reconfigure(changed(editor, rect=None))
    before = matrices(editor)
    editor.apply(REQUESTS)
    assert same(matrices(editor), {n: w + solved[n][2] for n, w in before.items()})


def test_prune_asked_for_later_still_starts_from_the_pretrained_weights(solved: dict[int, list[Tensor]]) -> None:
    editor = make(scale=0.2)
    pretrained = matrices(editor)
    editor.apply(REQUESTS)
    assert editor.reconfigure(changed(editor, prune=PRUNE))
    current = matrices(editor)
    editor.apply(SECOND)
    for layer, after in matrices(editor).items():
        start = pretrained[layer]
        expected = pruned(current[layer] - start + solved[layer][1], start, 10.0)
        assert (after - start - expected).norm() < 1e-5 * expected.norm()


def test_settings_that_say_the_same_keep_what_is_known_of_the_pretrained_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EasyEdit hands over its hyper-parameters with every batch."""
    fits = []
    original = PrincipalSpace.fit
    monkeypatch.setattr(PrincipalSpace, "fit", lambda *args, **more: fits.append(1) or original(*args, **more))
    editor = make(alpha=0.8, basis="pretrained")
    for requests in (REQUESTS, SECOND):
        assert editor.reconfigure(changed(editor))
        editor.apply(requests)
    assert len(fits) == len(editor.config.layers)
    assert editor.reconfigure(changed(editor, eta=0.3))
    editor.apply(REQUESTS)
    assert len(fits) == 2 * len(editor.config.layers)


# ---- the line of the log ----


@pytest.fixture
def line(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """The one record since the last call, as "LEVEL text"; the logger is enabled for INFO."""

    def one() -> str:
        (record,) = caplog.records
        caplog.clear()
        return f"{record.levelname} {record.getMessage()}"

    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        yield one


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_says_what_was_done_to_which_extent(kind: str, line: Callable, caplog) -> None:
    editor = make(kind, rect=RECT, alpha=0.8)
    editor.prepare()
    caplog.clear()
    before = matrices(editor)
    layers = editor.apply(REQUESTS).layers
    text = line()
    after = matrices(editor)
    assert text.startswith("INFO MEMIT + RECT + SPHERE wrote 3 facts into 2 weights: r ")
    ranks = sorted({layer.rank for layer in layers})
    assert f": r {' to '.join(map(str, ranks))}, " in text
    whole = sum(layer.solved_norm**2 for layer in layers)
    removed = sum(layer.removed_share * layer.solved_norm**2 for layer in layers) / whole
    assert f", {100 * removed:.1f} % of the update removed, " in text and removed > 0.1
    (energies,) = re.findall(r"hyperspherical energy ([\d.]+) -> ([\d.]+)$", text)
    expected = [sum(hyperspherical_energy(weight) for weight in weights.values()) for weights in (before, after)]
    assert [float(energy) for energy in energies] == pytest.approx(expected, rel=1e-7)
    assert energies[0] != energies[1]


def test_no_energy_is_computed_where_nobody_reads_it(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "hyperspherical_energy", lambda weight: pytest.fail("energy was computed"))
    with caplog.at_level(logging.WARNING, logger="sphere_plugin"):
        make().apply(REQUESTS)
    assert not caplog.records


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_batch_that_changes_no_weight_is_warned_about(level: int, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memit, "update", lambda self, keys, residuals: Factors(0 * residuals, keys))
    editor = make(rect=RECT, alpha=0.8)
    editor.prepare()
    before = matrices(editor)
    caplog.clear()
    with caplog.at_level(level, logger="sphere_plugin"):
        editor.apply(REQUESTS)
    assert same(before, matrices(editor))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "MEMIT + RECT + SPHERE changed no weight: the model is as it was before 3 facts")
    ]


def test_an_energy_that_cannot_be_computed_leaves_the_edit_in_place(line: Callable, caplog) -> None:
    editor = make()
    editor.anatomy.rewrites[2].weight[5] = 0.0
    editor = Editor(editor.anatomy.model, editor.tokenizer, editor.config)
    editor.prepare()
    caplog.clear()
    before = matrices(editor)
    # The row is zero before the batch, and no longer after it.
    editor.apply(REQUESTS)
    name = "model.layers.2.mlp.down_proj.weight"
    assert f"no hyperspherical energy ({name}, row 5 of the weight: zeros only, as in 1 of 32 rows)" in line()
    assert not torch.equal(matrices(editor)[1], before[1])


class TestPlainValues:
    """`log_apply` as another method's hook calls it."""

    EYE = torch.eye(3)
    OTHER = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])

    def test_facts_may_be_unknown(self, line: Callable) -> None:
        log_apply("FT + SPHERE", None, [Touched("a", 7, 0.25, self.EYE, self.OTHER)])
        energies = f"{hyperspherical_energy(self.EYE):.8g} -> {hyperspherical_energy(self.OTHER):.8g}"
        expected = f"FT + SPHERE changed 1 weight: r 7, 25.0 % of the update removed, hyperspherical energy {energies}"
        assert line() == f"INFO {expected}"

    def test_one_fact_is_one_fact(self, line: Callable) -> None:
        log_apply("ROME", 1, [Touched("a", 0, 0.0, self.EYE, self.OTHER)] * 2)
        assert line().startswith("INFO ROME wrote 1 fact into 2 weights: r 0, 0.0 %")

    def test_the_share_is_of_the_whole_update(self, line: Callable) -> None:
        large = Touched("a", 4, 0.1, self.EYE, self.OTHER, solved_norm=3.0)
        small = Touched("b", 2, 0.6, self.EYE, self.OTHER, solved_norm=1.0)
        log_apply("FT", 2, [large, small])
        assert "r 2 to 4, 15.0 % of the update removed" in line()

    def test_without_norms_it_is_the_plain_mean(self, line: Callable) -> None:
        log_apply("FT", 2, [Touched(name, 4, share, self.EYE, self.OTHER) for name, share in (("a", 0.1), ("b", 0.6))])
        assert ": r 4, 35.0 % of the update removed" in line()

    def test_an_update_that_got_longer_has_a_negative_share_and_rounding_has_none(self, line: Callable) -> None:
        log_apply("PRUNE", 2, [Touched("a", 0, -0.125, self.EYE, self.OTHER)])
        assert "r 0, -12.5 % of the update removed" in line()
        log_apply("PRUNE", 2, [Touched("a", 0, -1e-9, self.EYE, self.OTHER)])
        assert "r 0, 0.0 % of the update removed" in line()

    @pytest.mark.parametrize(("before", "after"), [(None, OTHER), (EYE, None), (None, None)])
    def test_weights_that_are_not_at_hand_count_as_changed(self, before, after, line: Callable) -> None:
        log_apply("FT", None, [Touched("a", 0, 0.0, before, after), Touched("b", 0, 0.0, self.EYE, self.EYE)])
        assert line().endswith("0.0 % of the update removed, hyperspherical energy not measured")

    @pytest.mark.parametrize("touched", [[], [Touched("a", 0, 0.0, EYE, EYE.clone())]], ids=["none", "one"])
    @pytest.mark.parametrize(("facts", "what"), [(None, "its edit"), (1, "1 fact")])
    def test_nothing_changed(self, touched: list, facts: int | None, what: str, line: Callable) -> None:
        log_apply("FT + SPHERE", facts, touched)
        assert line() == f"WARNING FT + SPHERE changed no weight: the model is as it was before {what}"

    def test_dtypes_may_differ(self, line: Callable) -> None:
        """A hook may keep the old weight in float32 beside a live one in bfloat16."""
        log_apply("FT", None, [Touched("a", 0, 0.0, self.OTHER.bfloat16().float(), self.OTHER.bfloat16())])
        assert line().startswith("WARNING")
        log_apply("FT", None, [Touched("a", 0, 0.0, self.EYE, self.OTHER.bfloat16())])
        assert line().startswith("INFO")
