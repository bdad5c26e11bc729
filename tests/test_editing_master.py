"""Master copies in the editor: what adds up, what is undone, what starts anew, and what an editor goes on from."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import pico
from torch import Tensor

from sphere_plugin import ConfigError
from sphere_plugin.editing import Editor
from sphere_plugin.files import fingerprint
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Snapshot

BATCHES = [[REQUESTS[0]], [REQUESTS[1]], [REQUESTS[2]], [{**REQUESTS[0], "target_new": "London"}]]
KINDS = ("llama", "gpt2")  # GPT-2 stores its weights transposed
QUICK = {"v_num_grad_steps": 3, "nullspace_threshold": 2.0}


def make(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: object) -> Editor:
    model, tokenizer = pico(kind)
    threshold = 2.0 if kind == "llama" else 0.15
    changes = {**QUICK, "nullspace_threshold": threshold, "master_copy": True, **settings}
    return Editor(model.to(dtype), tokenizer, pico_config(kind, **changes))


def live(editor: Editor) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in editor.anatomy.weights.items()}


def dense(update: Tensor | Factors) -> Tensor:
    return update.dense() if isinstance(update, Factors) else update


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
@pytest.mark.parametrize("projection", ["in_loop", "post"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_add_up_in_the_copy_and_the_weight_is_its_rounding(
    dtype: torch.dtype, kind: str, projection: str, base: str
) -> None:
    editor = make(kind, dtype, projection=projection, base_method=base)
    sums = {name: weight.float() for name, weight in live(editor).items()}
    for batch in BATCHES:
        report = editor.apply(batch)
        for layer, rewrite in zip(report.layers, editor.anatomy.rewrites.values(), strict=True):
            update = dense(layer.update)
            sums[layer.name] = sums[layer.name] + (update.T if rewrite.transposed else update)
            assert layer.rounding_loss < 1e-4
            gap = float((editor.masters[layer.name] - rewrite.parameter.detach().float()).norm())
            assert layer.master_gap == pytest.approx(gap, rel=1e-4) and gap > 0.0
        masters = editor.masters
        assert masters.keys() == sums.keys()
        for name, weight in live(editor).items():
            assert masters[name].dtype == torch.float32 and masters[name].is_contiguous()
            assert torch.equal(masters[name], sums[name])
            assert torch.equal(masters[name].to(dtype), weight)


def test_small_edits_survive_with_it_and_are_lost_without() -> None:
    """Two hundred updates, each below half a step of nearly all entries."""
    ends = {}
    for kept in (True, False):
        editor = make(master_copy=kept, layers=[1], alpha=0.0)
        editor.apply(BATCHES[0])
        editor.restore()
        (rewrite,) = editor.anatomy.rewrites.values()
        random = torch.Generator().manual_seed(0)
        left, right = 2e-4 * torch.randn(32, 1, generator=random), torch.randn(64, 1, generator=random)
        for _ in range(200):
            with editor._masters.batch():
                editor._put(1, Factors(left, right), restrained=False)
        gained = rewrite.weight.float() - editor.pretrained.tensors[rewrite.name].float()
        asked = 200 * (left @ right.T)
        ends[kept] = float((gained * asked).sum() / asked.square().sum())
    assert ends[True] == pytest.approx(1.0, abs=0.02)
    assert ends[False] < 0.5


def test_weights_of_32_bits_have_none_and_are_edited_as_without() -> None:
    first, second = make(dtype=torch.float32), make(dtype=torch.float32, master_copy=False)
    for editor in (first, second):
        reports = [editor.apply(batch) for batch in BATCHES[:2]]
        assert editor.masters == {}
        assert all(layer.master_gap is None for report in reports for layer in report.layers)
    assert fingerprint(live(first).items()) == fingerprint(live(second).items())


def test_without_it_there_is_none() -> None:
    editor = make(master_copy=False)
    report = editor.apply(BATCHES[0])
    assert editor.masters == {}
    assert all(layer.master_gap is None and layer.rounding_loss > 1e-4 for layer in report.layers)


@pytest.mark.parametrize("projection", ["in_loop", "post"])
def test_a_batch_that_fails_leaves_the_copies_as_they_were(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, other = make(projection=projection), make(projection=projection)
    for one in (editor, other):
        one.apply(BATCHES[0])
    weights, masters = live(editor), editor.masters

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(editor, "_log", interrupted)  # everything is written by then
        with pytest.raises(KeyboardInterrupt):
            editor.apply(BATCHES[1])
    assert all(torch.equal(one, weights[name]) for name, one in live(editor).items())
    assert all(torch.equal(one, masters[name]) for name, one in editor.masters.items())
    for one in (editor, other):
        one.apply(BATCHES[2])
    assert all(torch.equal(one, other.masters[name]) for name, one in editor.masters.items())


def test_restored_weights_are_their_own_masters(caplog: pytest.LogCaptureFixture) -> None:
    editor, fresh = make(), make()
    for batch in BATCHES[:3]:
        editor.apply(batch)
    editor.restore()
    for one in (editor, fresh):
        one.apply(BATCHES[3])
    assert all(torch.equal(one, fresh.masters[name]) for name, one in editor.masters.items())
    assert "master copies" not in warnings(caplog)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_an_edit_that_is_only_tried_leaves_the_copies_of_those_that_stand(
    kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    """EasyEdit puts the weights back after an edit with sequential_edit=False; it tells nobody."""
    editor, other = make(), make()
    for one in (editor, other):
        for batch in BATCHES[:kept]:
            one.apply(batch)
    before = Snapshot.take(editor.anatomy.weights)
    for tried in BATCHES[2:4]:
        editor.apply(tried)
        before.restore(editor.anatomy.weights)
    assert all(torch.equal(one, editor.masters[name]) for name, one in other.masters.items())
    for one in (editor, other):
        one.apply(BATCHES[3])
    assert all(torch.equal(one, editor.masters[name]) for name, one in other.masters.items())
    assert "master copies" not in warnings(caplog)


def test_after_somebody_elses_write_a_copy_starts_anew_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    editor = make()
    editor.apply(BATCHES[0])
    editor.apply(BATCHES[1])
    first, second = editor.anatomy.rewrites.values()
    kept = editor.masters[second.name]
    with torch.no_grad():
        first.parameter.mul_(1.5)
    with caplog.at_level(logging.WARNING, "sphere_plugin"):
        masters = editor.masters
    assert f"{first.name}: not as the last batch left them" in caplog.text and second.name not in caplog.text
    assert torch.equal(masters[first.name], first.parameter.float())
    assert torch.equal(masters[second.name], kept)
    assert not torch.equal(kept, second.parameter.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 3])
def test_an_editor_goes_on_where_another_stopped(kind: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    first, second = make(kind), make(kind)
    for editor in (first, second):
        editor.prepare()
    keys = [{layer: one.clone() for layer, one in first.apply(batch).keys.items()} for batch in BATCHES[:at]]
    masters = {name: one.clone() for name, one in first.masters.items()}
    memory = {name: one.clone() for name, one in first.memory().items()}
    Snapshot.take(first.anatomy.weights).restore(second.anatomy.weights)
    second.resume(iter(keys), masters)
    second.recall(memory)
    for batch in BATCHES[at:]:
        for editor in (first, second):
            editor.apply(batch)
        assert fingerprint(live(first).items()) == fingerprint(live(second).items())
        assert fingerprint(sorted(first.masters.items())) == fingerprint(sorted(second.masters.items()))


def test_spaces_are_followed_on_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is rounded is another weight, whose space would be found anew for every batch."""
    monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    for kept in (True, False):
        editor = make(master_copy=kept, mom2_update_weight=1e5, base_method="MEMIT")
        for batch in BATCHES:
            editor.apply(batch)
        counts = [one for name, one in editor.memory().items() if name.endswith("counts")]
        assert len(counts) == 2
        assert all((int(one[1]) > 0) == kept for one in counts)


def test_rounding_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    editor = make(master_copy=False, mom2_update_weight=1e6, base_method="MEMIT")
    with caplog.at_level(logging.INFO, "sphere_plugin"):
        reports = [editor.apply(batch) for batch in BATCHES[:3]]
    assert all(layer.rounding_loss > 0.1 for report in reports for layer in report.layers)
    said = [one.getMessage() for one in caplog.records if "rounding took" in one.getMessage()]
    assert len(said) == 1 and "master_copy: true" in said[0]
    for layer in reports[0].layers:
        assert layer.name in said[0] and f"{100 * layer.rounding_loss:.0f} %" in said[0]
    lines = [one.getMessage() for one in caplog.records if "of the update removed" in one.getMessage()]
    assert len(lines) == 3 and all(" % of the rest lost to rounding, hyperspherical" in line for line in lines)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_it_is_a_flag(value: object) -> None:
    with pytest.raises(ConfigError, match="master_copy: got"):
        pico_config("llama", master_copy=value)
