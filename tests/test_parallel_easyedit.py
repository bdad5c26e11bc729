"""EasyEdit's own methods, restrained, on a model that lies on two devices or is offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import cpu_offload
from hosted import FACTS, Bench, clean_host, copies, same
from pico import pico, save_pico
from places import ONE, TWO, Places, place_of, split_in_two
from test_parallel_devices import SPLIT, parts

import sphere_plugin as sp
from sphere_plugin import HostError, ModelError
from sphere_plugin.easyedit.host import Host, find_host
from sphere_plugin.easyedit.hparams import SphereHyperParams

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

MAIN = ("ROME", "MEMIT", "R-ROME", "MEMIT-FE", "PMET", "CORE", "EMMET", "AlphaEdit", "LoRA", "DINM", "ULTRAEDIT") + (
    ("SimIE", "DPO", "KN")
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    yield from clean_host(monkeypatch, tmp_path)


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    sp.register()
    return Bench(host, monkeypatch, tmp_path)


def edited(bench: Bench, model: Any, tokenizer: Any, method: str, **changes: object) -> Any:
    bench.fresh()
    editor = bench.editor_on(model, tokenizer, method, "llama", sphere=True, **changes)
    bench.edit(editor, FACTS[:1])
    return editor.model


@pytest.mark.parametrize("method", ["FT", *(MAIN if KIND == "main" else ())])
def test_a_split_model_is_edited_as_if_it_was_whole(method: str, bench: Bench) -> None:
    whole = copies(edited(bench, *pico("llama"), method))
    assert not same(whole, copies(pico("llama")[0]))
    model, tokenizer = pico("llama")
    split_in_two(model, parts("llama", *SPLIT))
    with Places():
        split = edited(bench, model, tokenizer, method, model_parallel=True, device="cpu:1")
        assert {place_of(one) for one in split.parameters()} == {ONE, TWO}
    assert same(copies(split), whole)


@pytest.mark.skipif(KIND == "main", reason="main's code follows the weights")
@pytest.mark.parametrize("method", ["ROME", "MEMIT"])
def test_what_the_pypi_release_cannot_edit_is_refused_before_any_work(method: str, bench: Bench) -> None:
    model, tokenizer = pico("llama")
    split_in_two(model, parts("llama", *SPLIT))
    expected = f"model: got 'weights on cpu:1, cpu:2', expected one device: .* in {method}. .* or set EASYEDIT_HOME"
    with Places(), pytest.raises(ModelError, match=expected):
        bench.editor_on(model, tokenizer, method, "llama", sphere=True, model_parallel=True)


@pytest.mark.parametrize("method", ["FT", "ROME"])
def test_an_offloaded_model_is_refused_before_any_work(method: str, bench: Bench) -> None:
    model, tokenizer = pico("llama")
    expected = rf"embed_tokens\.weight: got 'offloaded.*since EasyEdit's {method} .* SPHERE's own editor"
    with pytest.raises(ModelError, match=expected):
        model = cpu_offload(model, execution_device="cpu")
        bench.editor_on(model, tokenizer, method, "llama", sphere=True, model_parallel=True)


def test_our_own_methods_take_a_model_that_the_host_has_spread(bench: Bench, tmp_path: Path) -> None:
    """`model_parallel: true` as a user writes it; on a machine without GPUs accelerate puts all of it on the CPU."""
    folder = save_pico("llama", tmp_path / "llama")
    keys = {"layers": [1, 2], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "v_num_grad_steps": 4}
    more = {"layer_module_tmp": "model.layers.{}", "ln_f_module": "model.norm", "lm_head_module": "lm_head"}
    small = {"mom2_n_samples": 8, "nullspace_threshold": 0.5, "context_template_length_params": [[5, 2]]}
    given = {**keys, **more, **small, "model_name": str(folder), "device": "cpu"}
    told = {}
    for parallel in (False, True):
        hparams = SphereHyperParams(**given, model_parallel=parallel)  # type: ignore[arg-type]
        editor = bench.host.base_editor.from_hparams(hparams)
        bench.edit(editor, FACTS[:1])
        told[parallel] = copies(editor.model)
    assert same(told[True], told[False]) and not same(told[True], copies(pico("llama")[0]))
