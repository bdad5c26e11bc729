"""One model over several devices, as `model_parallel: true` spreads it: split, or offloaded to the CPU or to disk."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import REQUESTS, TEMPLATES, pico_config
from pico import KINDS, pico
from places import HOST, ONE, TWO, Misplaced, Places, place_of, split_in_two
from torch import Tensor, nn

from sphere_plugin.data import read_records
from sphere_plugin.editing import Editor
from sphere_plugin.editing.inputs import read_inputs
from sphere_plugin.errors import ModelError
from sphere_plugin.evaluation import Quality
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.responses import Sampling, respond
from sphere_plugin.files import fingerprint
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.batch import orientations
from sphere_plugin.models.placement import device_of, input_device, settle, with_values
from sphere_plugin.restraints import PruneConfig, RectConfig
from sphere_plugin.sequence.monitor import Monitor

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "MEMIT": {"base_method": "MEMIT", "alpha": 0.0},
    "MEMIT + SPHERE": {"base_method": "MEMIT", "projection": "post", "basis": "pretrained"},
    "AlphaEdit + SPHERE": {"base_method": "AlphaEdit"},
    "MEMIT + RECT + PRUNE + SPHERE": {"base_method": "MEMIT", "rect": RectConfig(), "prune": PruneConfig()},
    "random": {"base_method": "MEMIT", "control": "random"},
    "loss in the middle": {"v_loss_layer": 2, "layers": [1], "aiming_dtype": "bfloat16"},
}


def parts(kind: str, *places: torch.device) -> dict[str, torch.device]:
    """Embeddings, four layers, final norm and head, each with its place; tied heads go with the embeddings."""
    layer, _, norm = TEMPLATES[kind]
    below = {"gpt2": ("transformer.wte", "transformer.wpe"), "gptj": ("transformer.wte",)}
    first = below.get(kind, ("model.embed_tokens", "model.rotary_emb"))
    names = [layer.format(number) for number in range(4)] + [norm, "lm_head"]
    return dict.fromkeys(first, places[0]) | dict(zip(names, places[1:], strict=True))


# Two edited layers on two devices; the head is beside the embeddings, the norm is not.
SPLIT = (ONE, ONE, ONE, TWO, TWO, TWO, ONE)


def edits(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any], kind: str = "llama") -> Editor:
    """Two batches, the second from an editor that goes on after the first."""
    editor = Editor(model, tokenizer, pico_config(kind, **settings))
    begun = editor.apply(REQUESTS[:2])
    first = {name: weight.detach().clone() for name, weight in editor.anatomy.weights.items()}
    known = {name: one.cpu() for name, one in editor.memory().items()}
    editor.restore()
    other = Editor(model, tokenizer, pico_config(kind, **settings))
    other.prepare()
    with torch.no_grad():
        for name, weight in first.items():
            other.anatomy.weights[name].copy_(weight)
    other.resume([{layer: keys.cpu() for layer, keys in begun.keys.items()}])
    other.recall(known)
    other.apply(REQUESTS[2:])
    return other


def weights(editor: Editor) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in editor.anatomy.weights.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- split over two ----


def test_places_notice_what_cuda_would_refuse() -> None:
    with Places():
        one, two, scalar = torch.ones(2, 2, device=ONE), torch.ones(2, 2, device=TWO), torch.tensor(2.0)
        assert (one * scalar).device == (one + 1).T.device == one.new_zeros(3).device == ONE
        assert one.cpu().device == HOST and one.to(two).device == TWO and one[torch.tensor([0])].device == ONE
        one.copy_(two)
        refused: list[Callable[[], object]] = [
            lambda: one + two,
            lambda: torch.cat([one, two]),
            lambda: one + torch.ones(2),
            lambda: one[torch.tensor([0], device=TWO)],
            lambda: nn.functional.linear(one, two),
        ]
        for wrong in refused:
            with pytest.raises(Misplaced):
                wrong()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_split_over_two_devices_is_edited_as_if_it_was_whole(kind: str) -> None:
    whole = weights(edits(*pico(kind), {}, kind))
    model, tokenizer = pico(kind)
    tied = kind in ("qwen2", "gpt2")
    split_in_two(model, parts(kind, *SPLIT[:-1], ONE if tied else TWO))
    with Places() as places:
        editor = edits(model, tokenizer, {}, kind)
        told = {name: weight.device for name, weight in editor.anatomy.weights.items()}
    assert list(told.values()) == [ONE, TWO]
    assert places.counts[ONE] > 500 and places.counts[TWO] > 500, "both have worked"
    assert same(whole, weights(editor))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_stays_beside_its_weights(name: str) -> None:
    whole = weights(edits(*pico("llama"), SETTINGS[name]))
    model, tokenizer = pico("llama")
    split_in_two(model, parts("llama", *SPLIT))
    with Places():
        editor = edits(model, tokenizer, SETTINGS[name])
    assert same(whole, weights(editor))


def test_a_split_model_is_scored_asked_and_journalled_as_if_it_was_whole(tmp_path: Path) -> None:
    def measured(model: nn.Module, tokenizer: Any, folder: Path) -> list[Any]:
        quality = Quality(model, tokenizer, read_records(limit=4), "The tower is in the city.\n\nWho plays the piano?")
        editor = Editor(model, tokenizer, pico_config("llama"))
        live = editor.anatomy.weights
        turned = orientations(model, live)
        journal = Journal.create(folder, live, turned)
        monitor = Monitor(journal.weights_after(0), turned)
        report = editor.apply(REQUESTS)
        journal.append({"edits": 3}, live, {one.name: one.update for one in report.layers})
        sampling = Sampling(samples=2, tokens=4, temperature=1.0)
        answers = respond(Decoder(model), [(5, 6, 7), (8, 9)], sampling)
        modules = {name: rewrite.module for name, rewrite in editor.anatomy.rewrites.items()}
        entered = read_inputs(model, modules, [((5, 6, 7), (1, 2))])  # type: ignore[arg-type]
        told = [quality.score(4, fluency=12), quality.texts([0], 4), answers, monitor.batch(live)]
        told += [monitor.checkpoint(live), journal.fingerprint(1), [one.tolist() for one in entered.values()]]
        assert journal.fingerprint_of(live) == journal.fingerprint(1)
        journal.restore(0, live)
        assert fingerprint(live.items()) == journal.fingerprint(0)
        return told

    whole = measured(*pico("llama"), tmp_path / "whole")
    model, tokenizer = pico("llama")
    split_in_two(model, parts("llama", *SPLIT))
    with Places():
        assert measured(model, tokenizer, tmp_path / "split") == whole
    assert {place_of(weight) for weight in model.parameters()} == {ONE, TWO}


# ---- offloaded ----


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, folder, execution_device="cpu")
    return model


def in_part(model: nn.Module, folder: Path) -> nn.Module:
    """The embeddings, an edited layer and a layer above it are on disk, the rest is in memory."""
    places = ["disk", "cpu", "cpu", "disk", "disk", "cpu", "cpu"]
    names = parts("llama", *[HOST] * 7)
    del names["model.rotary_emb"]
    return dispatch_model(model, dict(zip(names, places, strict=True)), offload_dir=str(folder), main_device="cpu")


@pytest.mark.parametrize("offload", [to_cpu, to_disk, in_part])
def test_offloaded_weights_are_edited_and_stay_in_memory(
    offload: Callable[..., nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = pico("llama")
    plain = edits(whole, pico("llama")[1], {"base_method": "MEMIT"})
    model, tokenizer = pico("llama")
    names = [name for name, _ in model.named_parameters()]
    model = offload(model, tmp_path)
    assert input_device(model) == HOST and any(weight.is_meta for weight in model.parameters())
    with caplog.at_level(logging.INFO, "sphere_plugin"):
        editor = edits(model, tokenizer, {"base_method": "MEMIT"})
    brought = 1 if offload is in_part else 2
    assert f"{brought} offloaded weights are to be edited and now stay on cpu" in caplog.text
    assert "counting key statistics" not in caplog.text, (
        "weights that are read from elsewhere have the same fingerprint"
    )
    assert same(weights(plain), weights(editor))
    assert any(weight.is_meta for weight in model.parameters()), "the others are still offloaded"
    assert {name for name, one in model.named_parameters() if one.requires_grad} == set(names)

    ids = torch.arange(5, 15)[None]
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert fingerprint(with_values(model, model.state_dict().items())) == fingerprint(whole.state_dict().items())
    editor.restore()
    assert torch.equal(model(input_ids=ids).logits, pico("llama")[0](input_ids=ids).logits)


def test_an_edited_model_that_is_offloaded_can_be_saved(tmp_path: Path) -> None:
    model, tokenizer = pico("llama")
    model = in_part(model, tmp_path / "offload")
    editor = Editor(model, tokenizer, pico_config("llama"))
    editor.apply(REQUESTS)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    told = with_values(model, model.state_dict().items())
    assert fingerprint(again.state_dict().items()) == fingerprint(told)


def test_a_weight_without_values_is_refused_before_any_work() -> None:
    model, tokenizer = pico("llama")
    layer = model.model.layers[2].mlp
    layer.down_proj = copy.deepcopy(layer.down_proj).to("meta")
    expected = r"model\.layers\.2\.mlp\.down_proj\.weight: got 'a weight without values.*expected a weight in memory"
    with pytest.raises(ModelError, match=expected):
        Editor(model, tokenizer, pico_config("llama"))
    with pytest.raises(ModelError, match=r"down_proj\.weight: got .* expected a weight that can be read"):
        list(with_values(model, model.named_parameters()))


def test_weights_in_memory_are_left_as_they_are() -> None:
    model, _ = pico("gpt2")
    before = list(model.parameters())
    settle(model, [name for name, _ in model.named_parameters()])
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert input_device(model) == device_of(model) == device_of(nn.Identity()) == HOST
