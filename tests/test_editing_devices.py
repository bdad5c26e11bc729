"""`stats_device`: where key statistics are added up and solved with, and that nothing else depends on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REQUESTS, TEMPLATES, pico_config
from pico import KINDS, pico
from places import HOST, ONE, TWO, Places, split_in_two
from torch import Tensor, nn

from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.editing import EditingConfig, Editor, statistics, unfinished
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.editing.solvers import Solvers
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.errors import ConfigError

BASES = ("MEMIT", "AlphaEdit")
TEXT = "The Eiffel Tower is in Paris.\n\nToyota Camry is produced by Toyota.\n\nWindows 95 was developed by Microsoft."


def spread(kind: str) -> tuple[nn.Module, Any]:
    """A pico model over two make-believe accelerators: layer 1 on the first, layer 2 on the second."""
    model, tokenizer = pico(kind)
    layer, _, norm = TEMPLATES[kind]
    below = {"gpt2": ("transformer.wte", "transformer.wpe"), "gptj": ("transformer.wte",)}
    names = [*below.get(kind, ("model.embed_tokens", "model.rotary_emb")), layer.format(0), layer.format(1)]
    above = [layer.format(2), layer.format(3), norm]
    tied = kind in ("qwen2", "gpt2")
    places = dict.fromkeys(names, ONE) | dict.fromkeys(above, TWO) | {"lm_head": ONE if tied else TWO}
    return split_in_two(model, places), tokenizer


def in_two_batches(editor: Editor) -> dict[str, Tensor]:
    """The edited weights after two batches, the second of which knows the first."""
    editor.apply(REQUESTS[:2])
    editor.apply(REQUESTS[2:])
    return {name: weight.detach().clone() for name, weight in editor.anatomy.weights.items()}


def tensors_of(solver: Memit | AlphaEdit) -> list[Tensor]:
    """What a closed form keeps."""
    return [solver._factor] if isinstance(solver, Memit) else [solver.null, solver._past.factor, solver._past.fresh]


# ---- the setting ----


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:0", "cuda:3"])
def test_a_device_that_sums_can_be_on_is_taken(device: str | None) -> None:
    assert pico_config("llama", stats_device=device).stats_device == device


@pytest.mark.parametrize("device", ["", "gpu", "CPU", "cpu:1", "mps", "meta", "cuda:x", "cuda:-1", "cudas", 0, True])
def test_another_is_refused_before_anything_is_loaded(device: object) -> None:
    with pytest.raises(ConfigError, match=r"stats_device: got .*, expected cpu or a CUDA device, as cuda:1\."):
        pico_config("llama", stats_device=device)


def test_a_yaml_says_it(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "hparams" / "SPHERE" / "llama3-8b.yaml"
    assert SphereHyperParams.from_hparams(path).editing().stats_device is None
    mine = tmp_path / "mine.yaml"
    mine.write_text(path.read_text(encoding="utf-8") + "\nstats_device: cpu\n", encoding="utf-8")
    assert SphereHyperParams.from_hparams(mine).editing().stats_device == "cpu"


@pytest.mark.parametrize(("cards", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:5")])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    cards: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    model, tokenizer = pico("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("something was computed"))
    there = f"cpu, or cuda:0 to cuda:{cards - 1}" if cards else "cpu"
    with pytest.raises(ConfigError, match=f"stats_device: got '{device}', expected {there}\\."):
        Editor(model, tokenizer, pico_config("llama", stats_device=device))


def test_another_device_takes_a_new_editor() -> None:
    config = pico_config("llama")
    editor = Editor(*pico("llama"), config)
    assert not editor.reconfigure(dataclasses.replace(config, stats_device="cpu"))
    assert editor.config.stats_device is None
    assert editor.reconfigure(dataclasses.replace(config, token_budget=64))


# ---- where things lie ----


@pytest.mark.parametrize(("stats_device", "expected"), [(None, [ONE, TWO]), ("cpu", [HOST, HOST])])
def test_sums_and_moments_lie_where_they_are_sent(
    stats_device: str | None, expected: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = spread("llama")
    config = pico_config("llama", stats_device=stats_device, stats_dir=str(tmp_path))
    seen: list[tuple[list[torch.device], set[torch.dtype]]] = []
    original = statistics._Counter.add

    def watched(self: Any, rows: Any) -> None:
        original(self, rows)
        seen.append(([one.device for one in self.sums.values()], {one.dtype for one in self.sums.values()}))

    monkeypatch.setattr(statistics._Counter, "add", watched)
    with Places() as places:
        anatomy = Anatomy.of(model, config)
        counted = key_moments(anatomy, tokenizer, config)
        assert [one.device for one in counted.values()] == expected
        assert seen == [(expected, {torch.float64})] * len(seen) and seen
        worked = dict(places.counts)
        known = key_moments(anatomy, tokenizer, config)  # from the cache
        assert [one.device for one in known.values()] == expected
    assert all(torch.equal(known[layer], counted[layer]) for layer in counted)
    assert worked[ONE] > 50 and worked[TWO] > 50, "the model runs where it is"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("stats_device", "expected"), [(None, [ONE, TWO]), ("cpu", [HOST, HOST])])
def test_closed_forms_lie_beside_their_statistics_and_updates_beside_their_weights(
    stats_device: str | None, expected: list[torch.device], base: str
) -> None:
    model, tokenizer = spread("llama")
    config = pico_config("llama", stats_device=stats_device, base_method=base)
    with Places():
        anatomy = Anatomy.of(model, config)
        solvers = Solvers(anatomy, config, key_moments(anatomy, tokenizer, config))
        for _ in range(2):  # the second knows the first
            for (layer, rewrite), place in zip(anatomy.rewrites.items(), expected, strict=True):
                here = rewrite.weight.device
                assert here == {1: ONE, 2: TWO}[layer]
                keys, residuals = torch.ones(64, 2, device=here), torch.ones(32, 2, device=here)
                found = solvers.update(layer, keys, residuals)
                assert (found.left.device, found.right.device) == (here, here)
                assert found.left.dtype == found.right.dtype == torch.float32
                kept = tensors_of(solvers._own[layer])
                assert {one.device for one in kept} == {place} and {one.dtype for one in kept} == {torch.float64}
            solvers.learn({layer: torch.ones(64, 2) for layer in anatomy.rewrites})
            solvers.remember({layer: torch.ones(64, 1, device=ONE) for layer in anatomy.rewrites})
        if base == "AlphaEdit":
            assert all(one.shape[1] == 1 for one in (tensors_of(s)[2] for s in solvers._own.values()))


# ---- that results are the same ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_a_spread_model_with_statistics_on_the_cpu_is_edited_as_one_that_is_whole(base: str, kind: str) -> None:
    whole = in_two_batches(Editor(*pico(kind), pico_config(kind, base_method=base)))
    model, tokenizer = spread(kind)
    with Places() as places:
        editor = Editor(model, tokenizer, pico_config(kind, base_method=base, stats_device="cpu"))
        assert {one.device for one in editor.anatomy.weights.values()} == {ONE, TWO}
        edited = in_two_batches(editor)
        assert editor._solvers is not None
        assert {one.device for s in editor._solvers._own.values() for one in tensors_of(s)} == {HOST}
    assert places.counts[HOST] > 50
    assert whole.keys() == edited.keys() and all(torch.equal(whole[name], edited[name]) for name in whole)


@pytest.mark.parametrize("base", BASES)
def test_another_editor_goes_on_with_its_statistics_elsewhere(base: str) -> None:
    """A run that was begun with statistics beside the weights is resumed with them on the CPU."""
    whole = in_two_batches(Editor(*pico("llama"), pico_config("llama", base_method=base)))
    model, tokenizer = spread("llama")
    with Places():
        first = Editor(model, tokenizer, pico_config("llama", base_method=base))
        begun = first.apply(REQUESTS[:2])
        remembered = {1: ONE, 2: TWO} if base == "AlphaEdit" else {}
        assert {layer: keys.device for layer, keys in begun.keys.items()} == remembered
        after = {name: weight.detach().clone() for name, weight in first.anatomy.weights.items()}
        known = first.memory()
        first.restore()
        other = Editor(model, tokenizer, pico_config("llama", base_method=base, stats_device="cpu"))
        other.prepare()
        with torch.no_grad():
            for name, weight in after.items():
                other.anatomy.weights[name].copy_(weight)
        other.resume([{layer: keys.cpu() for layer, keys in begun.keys.items()}])
        other.recall(known)
        other.apply(REQUESTS[2:])
    edited = other.anatomy.weights
    assert all(torch.equal(whole[name], edited[name]) for name in whole)


# ---- files ----


def forbidden(*_: object, **__: object) -> None:
    pytest.fail("the statistics were counted again")


@pytest.mark.parametrize(("first", "second"), [(None, "cpu"), ("cpu", None)])
def test_statistics_of_the_cache_serve_every_device(
    first: str | None, second: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(device: str | None) -> dict[int, Tensor]:
        model, tokenizer = pico("llama")
        config = pico_config("llama", stats_device=device, stats_dir=str(tmp_path))
        return key_moments(Anatomy.of(model, config), tokenizer, config)

    once = counted(first)
    monkeypatch.setattr(statistics._Counter, "add", forbidden)
    again = counted(second)
    assert again.keys() == once.keys() and all(torch.equal(again[layer], once[layer]) for layer in once)


class Stopped(Exception):
    """As if the machine had gone."""


@pytest.mark.parametrize(("first", "second"), [(None, "cpu"), ("cpu", None)])
def test_a_stopped_count_goes_on_with_its_sums_on_another_device(
    first: str | None, second: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 12)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    original = statistics._Counter.add

    def config(device: str | None, folder: str) -> EditingConfig:
        return pico_config("llama", mom2_dataset=str(text), stats_device=device, stats_dir=str(tmp_path / folder))

    def counted(device: str | None, folder: str, add: Callable[..., None]) -> dict[int, Tensor]:
        model, tokenizer = spread("llama")
        monkeypatch.setattr(statistics._Counter, "add", add)
        with Places():
            chosen = config(device, folder)
            return key_moments(Anatomy.of(model, chosen), tokenizer, chosen)

    whole, rows = counted(None, "whole", original), []

    def stopping(self: Any, piece: Any) -> None:
        if self.sums:
            raise Stopped
        original(self, piece)

    with pytest.raises(Stopped):
        counted(first, "parts", stopping)
    assert [path for path in (tmp_path / "parts").iterdir() if path.name.endswith("sums.safetensors")]
    again = counted(second, "parts", lambda self, piece: (rows.extend(piece), original(self, piece)))
    assert 0 < len(rows) < 3, "not all of them again"
    assert all(torch.equal(whole[layer], again[layer]) for layer in whole)
    with Places():
        places = [one.device for one in again.values()]
    assert places == ([HOST, HOST] if second == "cpu" else [ONE, TWO])
