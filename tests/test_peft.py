"""LoRA adapters and plain fine-tuning: ΔW P⊥ and nothing else, and nothing changed by what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from pico import pico, save_pico
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from sphere_plugin import peft as room
from sphere_plugin.callback import SphereCallback
from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, HostError, ModelError, SphereError
from sphere_plugin.geometry import PrincipalSpace, is_transposed, neurons
from sphere_plugin.peft import project_adapter, project_saved_adapter
from sphere_plugin.restraints import SphereConfig

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ALL = SphereConfig(alpha=1.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not be contained in the prefix"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def lora(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: object) -> peft.PeftModel:
    """A pico model with a LoRA whose weights are all random, so that ΔW is not zero."""
    config = {"r": 4, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(pico(kind)[0].to(dtype), peft.LoraConfig(**config))
        randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}


def delta(layer: nn.Module, adapter: str) -> torch.Tensor:
    """s·B·A [d_out, d_in] by hand."""
    return layer.scaling[adapter] * layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()


def space_of(layer: nn.Module) -> PrincipalSpace:
    base = layer.get_base_layer()
    return PrincipalSpace.fit(neurons(base.weight, is_transposed(base)))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 70, 33]])).logits


def state(model: nn.Module) -> dict[str, object]:
    """All there is to change: tensors, trainability, modes, adapters, the active one."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", ())),
        "active": list(getattr(model, "active_adapters", ())) if isinstance(model, peft.PeftModel) else None,
        "attribute": getattr(model, "active_adapter", None) if isinstance(model, peft.PeftModel) else None,
        "scaling": {name: dict(layer.scaling) for name, layer in layers(model).items()},
        "random": torch.random.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    for key in before.keys() - {"tensors", "random"}:
        assert before[key] == after[key], key
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert torch.equal(before["random"], after["random"])


# What the projection writes


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weights_are_w_plus_the_projected_update(kind: str, rank: int, alpha: float) -> None:
    model = lora(kind, r=rank)
    expected = {}
    for name, layer in layers(model).items():
        base, update, space = layer.get_base_layer(), delta(layer, "default"), space_of(layer)
        weight = neurons(base.weight, is_transposed(base))
        written = update - alpha * (update @ space.basis) @ space.basis.T
        expected[name.removeprefix("base_model.model.")] = (weight + written).detach()
        assert layer.lora_A["default"].weight.shape == (rank, base.weight.shape[is_transposed(base) - 1])
    report = project_adapter(model, "default", SphereConfig(alpha=alpha), new_adapter="held")
    assert report.adapter == "held" and report.layers.keys() == expected.keys()
    assert all(layer.r["held"] == rank for layer in layers(model).values())
    merged = model.merge_and_unload(adapter_names=["held"])
    for name, weight in expected.items():
        module = merged.get_submodule(name)
        torch.testing.assert_close(neurons(module.weight, is_transposed(module)), weight, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_alpha_zero_copies_a_and_alpha_one_leaves_nothing_along_u(kind: str) -> None:
    model = lora(kind)
    project_adapter(model, "default", SphereConfig(alpha=0.0), "same")
    project_adapter(model, "default", ALL, "gone")
    for layer in layers(model).values():
        assert torch.equal(layer.lora_A["same"].weight, layer.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["gone"].weight, layer.lora_B["default"].weight)
        update = delta(layer, "gone")
        assert (update @ space_of(layer).basis).norm() < 1e-4 * update.norm()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_the_report_measures_the_update_itself(alpha: float) -> None:
    model = lora()
    report = project_adapter(model, "default", SphereConfig(alpha=alpha))
    assert report.adapter == "default-sphere"
    before = after = 0.0
    for name, layer in layers(model).items():
        old, new = (delta(layer, a).square().sum().item() for a in ("default", "default-sphere"))
        line = report.layers[name.removeprefix("base_model.model.")]
        assert line.rank == space_of(layer).rank
        assert line.energy == pytest.approx(old, rel=1e-4)
        assert line.removed_share == pytest.approx(1 - new / old, abs=1e-4)
        before, after = before + old, after + new
    assert report.removed_share == pytest.approx(1 - after / before, abs=1e-4)


def test_the_old_adapter_stays_and_can_be_selected_again() -> None:
    model = lora()
    before, old = logits(model), state(model)
    project_adapter(model, "default", ALL)
    assert model.active_adapter == "default-sphere" and model.active_adapters == ["default-sphere"]
    assert not torch.equal(logits(model), before)
    now = state(model)
    assert all(torch.equal(tensor, now["tensors"][name]) for name, tensor in old["tensors"].items())
    assert torch.equal(old["random"], now["random"])
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    model.delete_adapter("default-sphere")
    assert_same({**old, "random": None} | {"random": old["random"]}, state(model))


def test_an_adapter_loaded_for_inference_is_not_made_trainable(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(pico("llama")[0], str(tmp_path / "adapter"))
    project_adapter(model, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 12},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"q_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"lora_dropout": 0.5},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["lm_head", "norm"]},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_every_setting_of_lora_is_kept(settings: dict, tmp_path: Path) -> None:
    model = lora(**settings)
    project_adapter(model, "default", ALL, "new")
    expected = {name: delta(layer, "default") for name, layer in layers(model).items()}
    for name, layer in layers(model).items():
        assert layer.scaling["new"] == layer.scaling["default"] and layer.r["new"] == layer.r["default"]
        basis = space_of(layer).basis
        torch.testing.assert_close(delta(layer, "new"), expected[name] - expected[name] @ basis @ basis.T)
    projected = logits(model)  # in eval mode, dropout of the new adapter included
    assert torch.equal(projected, logits(model))
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = peft.PeftModel.from_pretrained(pico("llama")[0], str(tmp_path / "new")).eval()
    assert torch.equal(logits(loaded), projected)


def test_trained_modules_and_biases_and_a_scale_set_by_hand_go_with_it() -> None:
    model = lora("gpt2", lora_bias=True, modules_to_save=["wte"])
    for layer in layers(model).values():
        layer.set_scale("default", 3.0)
    before = logits(model)
    project_adapter(model, "default", SphereConfig(alpha=0.0))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("own", [True, False], ids=["adapter-bf16", "adapter-fp32"])
def test_sixteen_bits_are_projected_in_float32_and_cast_once(own: bool) -> None:
    model = lora(dtype=torch.bfloat16)
    if own:
        model.to(torch.bfloat16)
    project_adapter(model, "default", ALL)
    for layer in layers(model).values():
        old, new = layer.lora_A["default"].weight, layer.lora_A["default-sphere"].weight
        assert new.dtype == old.dtype == (torch.bfloat16 if own else torch.float32)
        basis = space_of(layer).basis
        expected = old.float() - old.float() @ basis @ basis.T
        torch.testing.assert_close(new, expected.to(old.dtype))
    assert torch.isfinite(logits(model)).all()


def lost(layer: nn.Module, raw: torch.Tensor, written: torch.Tensor, alpha: float) -> float:
    """Share of s·B·A P⊥ that is missing in s·B·A', in float64."""
    base = layer.get_base_layer()
    rows = neurons(base.weight, is_transposed(base)).detach().double()
    basis = PrincipalSpace.fit(rows).basis
    side = layer.scaling["default"] * layer.lora_B["default"].weight.detach().double()
    exact = side @ (raw.double() - alpha * (raw.double() @ basis) @ basis.T)
    return float((side @ written.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_share_that_rounding_takes_is_that_of_the_update(kind: str, dtype: torch.dtype, alpha: float) -> None:
    model = lora(kind, use_rslora=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the base stays float32
            parameter.data = parameter.data.to(dtype)
    report = project_adapter(model, "default", SphereConfig(alpha=alpha))
    for name, layer in layers(model).items():
        line = report.layers[name.removeprefix("base_model.model.")]
        old, new = (layer.lora_A[one].weight.detach() for one in ("default", "default-sphere"))
        assert new.dtype == dtype
        if dtype == torch.float32:
            assert line.rounding_loss == 0.0 and lost(layer, old, new, alpha) < 1e-5
        else:
            assert line.rounding_loss == pytest.approx(lost(layer, old, new, alpha), rel=5e-3)
            assert 1e-5 < line.rounding_loss < 1e-2


def test_nothing_is_lost_where_nothing_is_taken_or_there_is_nothing() -> None:
    model = lora(dtype=torch.bfloat16).to(torch.bfloat16)
    copied = project_adapter(model, "default", SphereConfig(alpha=0.0), "copy")
    assert {line.rounding_loss for line in copied.layers.values()} == {0.0}
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.zero_()
    empty = project_adapter(model, "default", ALL, "empty")
    assert {line.rounding_loss for line in empty.layers.values()} == {0.0}


def test_one_of_several_adapters_on_other_layers_is_projected() -> None:
    model = lora(target_modules=["down_proj"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    randomise(model)
    report = project_adapter(model, "other", ALL)
    assert len(report.layers) == 8
    assert {name.rpartition(".")[2] for name in report.layers} == {"q_proj", "up_proj"}


def test_one_info_line_and_a_warning_for_an_adapter_that_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sphere_plugin")
    project_adapter(lora(), "default")
    assert re.search(r"adapter 'default-sphere': 8 layers, r \d+ to \d+, \d+\.\d % of ΔW removed", caplog.text)
    caplog.clear()
    project_adapter(peft.get_peft_model(pico("llama")[0], peft.LoraConfig(target_modules=["q_proj"])))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "ΔW is zero" in caplog.text


# What is refused


def merged() -> peft.PeftModel:
    model = lora()
    model.merge_adapter()
    return model


def quantised() -> peft.PeftModel:
    model = lora()
    layer = next(iter(layers(model).values())).get_base_layer()
    layer.weight = nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    return model


def broken() -> peft.PeftModel:
    model = lora()
    list(layers(model).values())[3].lora_B["default"].weight.data[0, 0] = float("nan")
    return model


def empty_base() -> peft.PeftModel:
    model = lora()
    list(layers(model).values())[3].get_base_layer().weight.data.zero_()
    return model


def convolution() -> peft.PeftModel:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))


def ia3() -> peft.PeftModel:
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    return peft.get_peft_model(pico("llama")[0], config)


def tokens() -> peft.PeftModel:
    return lora(trainable_token_indices={"embed_tokens": [3, 4]})


REFUSED = {
    "unknown": (
        lora,
        {"name": "defualt"},
        ConfigError,
        "name: got 'defualt', expected an adapter of the model: default",
    ),
    "existing": (lora, {"new_adapter": "default"}, ConfigError, "new_adapter: got 'default', expected a new name"),
    "dotted": (lora, {"new_adapter": "a.b"}, ConfigError, "a name without a dot"),
    "unnamed": (lora, {"new_adapter": ""}, ConfigError, "a name without a dot"),
    "no-peft-model": (lambda: pico("llama")[0], {}, ConfigError, "LlamaForCausalLM', expected a PeftModel"),
    "ia3": (ia3, {}, ConfigError, "the type of adapter 'default': got 'IA3', expected LORA"),
    "dora": (lambda: lora(use_dora=True), {}, ConfigError, "DoRA rescales W \\+ ΔW, so a projected A does not"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), {}, ConfigError, "got 'pissa'.*path_initial_model"),
    "bias": (lambda: lora("gpt2", bias="lora_only"), {}, ConfigError, "bias of adapter 'default': got 'lora_only'"),
    "tokens": (tokens, {}, ConfigError, "trainable_token_indices of adapter 'default'"),
    "embedding": (
        lambda: lora(target_modules=["embed_tokens", "q_proj"]),
        {},
        ModelError,
        "embed_tokens: got 'layer.Embedding', expected LoRA on nn.Linear or transformers' Conv1D",
    ),
    "convolution": (convolution, {}, ModelError, "got 'layer.Conv2d', expected LoRA on nn.Linear"),
    "quantised": (quantised, {}, ModelError, "torch.uint8 in a layer.Linear.*not quantised.*bfloat16 or float32"),
    "merged": (merged, {}, ModelError, r"got \['default'\], expected none. Call unmerge_adapter\(\)"),
    "broken": (broken, {}, ModelError, r"B of .*layers.1.mlp.down_proj: got 'NaN or infinite entries'"),
    "empty-base": (empty_base, {}, ModelError, r"layers.1.mlp.down_proj: weight: got 'zeros only'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_projected_is_refused_and_nothing_changed(case: str) -> None:
    make, arguments, kind, message = REFUSED[case]
    model = make()
    before = state(model)
    with pytest.raises(kind, match=message) as caught:
        project_adapter(model, **{"name": "default", **arguments})
    assert isinstance(caught.value, SphereError) and caught.value.remedy.endswith(".")
    after = state(model)
    for tensors in (before["tensors"], after["tensors"]):
        for name, tensor in tensors.items():
            tensors[name] = tensor.nan_to_num()
    assert_same(before, after)


def test_a_variant_without_a_field_of_its_own_is_refused() -> None:
    model = lora()
    next(iter(layers(model).values())).lora_variant["default"] = SimpleNamespace()
    with pytest.raises(ModelError, match="the variant of LoRA in .*: got 'SimpleNamespace', expected plain LoRA"):
        project_adapter(model)


@pytest.mark.parametrize("fails_in", ["add_adapter", "inject", "fill", "set_adapter"])
def test_a_failure_midway_removes_the_new_adapter_again(fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(lora_dropout=0.1, modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    model.requires_grad_(False)
    before = state(model)
    deepcopy, add, activate, calls = room.copy.deepcopy, model.add_adapter, model.set_adapter, []

    def failing(*arguments: object, **_: object) -> object:
        calls.append(arguments)
        if fails_in == "add_adapter":
            add(*arguments)
        if fails_in == "set_adapter":
            activate(*arguments)
        if fails_in == "fill" and len(calls) < 9:
            return deepcopy(*arguments)
        raise KeyboardInterrupt

    broken_at = {
        "add_adapter": (model, "add_adapter"),
        "inject": (peft.tuners.lora.Linear, "_move_adapter_to_device_of_base_layer"),
        "fill": (room.copy, "deepcopy"),
        "set_adapter": (model, "set_adapter"),
    }
    monkeypatch.setattr(*broken_at[fails_in], failing)
    with pytest.raises(KeyboardInterrupt):
        project_adapter(model, "default", ALL)
    monkeypatch.undo()
    assert_same(before, state(model))
    project_adapter(model, "default", ALL)


def test_without_peft_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(HostError, match="pip install 'peft>=0.18'"):
        project_adapter(SimpleNamespace())


# From folder to folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_adapter_goes_from_folder_to_folder(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_pico(kind, tmp_path / "base")
    model = lora(kind, use_rslora=True, modules_to_save=["lm_head"] if kind == "llama" else None).to(dtype)
    model.save_pretrained(tmp_path / "raw")
    config = SphereConfig(eta=0.4, alpha=0.9)
    report = project_saved_adapter(tmp_path / "raw", tmp_path / "held", str(base), config)

    raw, held = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("raw", "held"))
    assert raw.keys() == held.keys()
    for name, tensor in raw.items():
        assert held[name].dtype == dtype
        assert torch.equal(tensor, held[name]) != (".lora_A." in name)
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("raw", "held")]
    assert settings[0] == settings[1]
    record = json.loads((tmp_path / "held" / "sphere.json").read_text())
    assert (record["eta"], record["alpha"], record["base"]) == (0.4, 0.9, str(base))
    name, line = next(iter(report.layers.items()))
    told = ("rank", "removed_share", "rounding_loss")
    assert record["layers"][name] == {key: getattr(line, key) for key in told}
    assert record["removed_share"] == pytest.approx(report.removed_share) and 0 < report.removed_share < 1

    loaded = peft.PeftModel.from_pretrained(pico(kind)[0], str(tmp_path / "held")).eval()
    live = peft.PeftModel.from_pretrained(pico(kind)[0], str(tmp_path / "raw")).eval()
    project_adapter(live, "default", config)
    torch.testing.assert_close(logits(loaded), logits(live), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_files_of_an_adapter_cannot_hold_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT works in float32 on an adapter of 16 bits; what is written is rounded all the same."""
    base = save_pico("llama", tmp_path / "base")
    lora().to(dtype).save_pretrained(tmp_path / "raw")
    report = project_saved_adapter(tmp_path / "raw", tmp_path / "held", str(base), ALL)
    record = json.loads((tmp_path / "held" / "sphere.json").read_text())
    raw, held = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("raw", "held"))
    live = peft.PeftModel.from_pretrained(pico("llama")[0], str(tmp_path / "raw"))
    assert len(report.layers) == 8
    for title, layer in layers(live).items():
        name, key = title.removeprefix("base_model.model."), f"{title}.lora_A.weight"
        found = report.layers[name].rounding_loss
        assert record["layers"][name]["rounding_loss"] == found
        if dtype == torch.float32:
            assert found == 0.0
        else:
            assert found == pytest.approx(lost(layer, raw[key], held[key], 1.0), rel=5e-3)
            assert 1e-5 < found < 1e-2


def test_alpha_zero_gives_the_same_tensors(tmp_path: Path) -> None:
    base = save_pico("llama", tmp_path / "base")
    lora().to(torch.float16).save_pretrained(tmp_path / "raw")
    project_saved_adapter(tmp_path / "raw", tmp_path / "new" / "held", str(base), SphereConfig(alpha=0.0))
    raw = load_file(tmp_path / "raw" / "adapter_model.safetensors")
    held = load_file(tmp_path / "new" / "held" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, held[name]) and tensor.dtype == held[name].dtype for name, tensor in raw.items())


def test_what_is_not_there_or_does_not_fit_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, raw, target = str(save_pico("llama", tmp_path / "base")), tmp_path / "raw", tmp_path / "held"
    lora().save_pretrained(raw)

    def refused(kind: type[Exception], message: str, source: Path = raw, model: str = base) -> None:
        there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(kind, match=message):
            project_saved_adapter(source, target, model, ALL)
        assert there == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    refused(ConfigError, "a folder with adapter_config.json", source=tmp_path / "base")
    refused(ModelError, "an existing folder", model=str(tmp_path / "nothing"))
    lora("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(ModelError, "base: got .*, expected the model that .*gpt2 was trained on", source=tmp_path / "gpt2")
    lora(use_dora=True).save_pretrained(tmp_path / "dora")
    refused(ConfigError, "DoRA", source=tmp_path / "dora")
    ia3().save_pretrained(tmp_path / "ia3")
    refused(ConfigError, "got 'IA3', expected LORA", source=tmp_path / "ia3", model="never loaded")
    shutil.copytree(raw, tmp_path / "partial")
    tensors = load_file(raw / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if ".lora_A." in name))
    room.write_tensors(tmp_path / "partial" / "adapter_model.safetensors", tensors, {})
    refused(ModelError, r"lora_A\.weight is only in one of them", source=tmp_path / "partial")
    (tmp_path / "partial" / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused(CacheError, "Save the adapter again", source=tmp_path / "partial")
    (tmp_path / "partial" / "adapter_config.json").write_bytes(b"{")
    refused(CacheError, "adapter_config.json", source=tmp_path / "partial")
    for key, value in (("r", "2"), ("target_modules", 5), ("rank_pattern", [1])):
        odd = shutil.copytree(raw, tmp_path / f"odd {key}")
        config = json.loads((odd / "adapter_config.json").read_text()) | {key: value}
        (odd / "adapter_config.json").write_text(json.dumps(config))
        refused(ModelError, "", source=odd)
    with monkeypatch.context() as patch:
        patch.setattr(room, "write_json", lambda path, content, marked=True: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            project_saved_adapter(raw, target, base, ALL)
    assert not target.exists() and not list(tmp_path.glob(".*"))
    with monkeypatch.context() as patch:  # another process is faster
        patch.setattr(room, "write_json", lambda *_, **__: (target / "theirs").mkdir(parents=True, exist_ok=True))
        with pytest.raises(ConfigError, match="expected a path where nothing is"):
            project_saved_adapter(raw, target, base, ALL)
    assert [path.name for path in target.iterdir()] == ["theirs"]
    shutil.rmtree(target)
    assert not list(tmp_path.glob(".*"))
    target.mkdir()
    refused(ConfigError, "the target: got .*, expected a path where nothing is")


def test_the_command_projects_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, raw, target = save_pico("llama", tmp_path / "base"), tmp_path / "raw", tmp_path / "held"
    lora().save_pretrained(raw)
    command = ["project-adapter", str(raw), str(target), "--base", str(base), "--alpha", "0.5"]
    assert main(command) == 0
    assert "8 layers" in capsys.readouterr().out
    assert json.loads((target / "sphere.json").read_text())["alpha"] == 0.5
    assert main(command) == 1
    assert "expected a path where nothing is" in capsys.readouterr().err


# While a Trainer trains


class Watch(SphereCallback):
    """Keeps every weight as it is after the callback has seen each step."""

    seen: list[dict[str, torch.Tensor]]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.seen = model, [copied(model)]
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.seen.append(copied(model))

    def on_optimizer_step(self, args, state, control, **kwargs):
        super().on_optimizer_step(args, state, control, **kwargs)
        self.seen.append(copied(self.model))


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model: nn.Module, folder: Path, *callbacks: SphereCallback, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    tokenizer = pico("llama")[1]
    texts = ["The Eiffel Tower is in Rome.", "Windows 95 was developed by Apple.", "Leo Tolstoy speaks English."]
    facts = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:7] for text in texts)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **settings,
        },
    )
    trainer = Trainer(model, arguments, train_dataset=facts, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=settings.pop("resume_from_checkpoint", None))
    return model


def along(change: torch.Tensor, weight: torch.Tensor) -> float:
    """‖ΔW U‖ / ‖ΔW‖ with U of ``weight``, both in mathematical orientation."""
    assert change.any()
    return float((change @ PrincipalSpace.fit(weight).basis).norm() / change.norm())


CHOSEN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}


@pytest.mark.parametrize("basis", ["current", "pretrained"])
@pytest.mark.parametrize("when", ["step", "end"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trained_weights_move_away_from_their_principal_space(
    kind: str, when: str, basis: str, tmp_path: Path
) -> None:
    callback = Watch(SphereConfig(alpha=1.0, basis=basis), [CHOSEN[kind]], when)
    model = train(pico(kind)[0], tmp_path, callback)
    names = [name for name in callback.seen[0] if f"{CHOSEN[kind]}.weight" in name]
    assert len(names) == len(callback.report.layers) == 4
    for name in names:
        start, *_, last = weights = [neurons(w[name], kind == "gpt2") for w in (*callback.seen[1:], copied(model))]
        if when == "end" or basis == "pretrained":
            assert along(last - start, start) < 1e-4
        if when == "step":
            for before, after in zip(weights[:3], weights[1:], strict=False):
                assert along(after - before, before if basis == "current" else start) < 1e-3
        else:
            assert along(weights[-2] - start, start) > 1e-2  # raw until the end
    assert 0 < callback.report.removed_share < 1 and callback.report.adapter is None


@pytest.mark.parametrize("when", ["step", "end"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_alpha_zero_is_training_without_the_callback(kind: str, when: str, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return lora(init_lora_weights=True) if kind == "lora" else pico("llama")[0]

    callback = SphereCallback(SphereConfig(alpha=0.0), None if kind == "lora" else "down_proj", when)
    plain, held = train(fresh(), tmp_path), train(fresh(), tmp_path, callback)
    assert all(torch.equal(w, copied(held)[name]) for name, w in copied(plain).items())


def test_alpha_between_takes_its_share(tmp_path: Path) -> None:
    start = copied(pico("llama")[0])
    raw = copied(train(pico("llama")[0], tmp_path))
    held = copied(train(pico("llama")[0], tmp_path, SphereCallback(SphereConfig(alpha=0.6), ["down_proj"])))
    for name, weight in start.items():
        change = raw[name] - weight
        if "down_proj" in name:
            change = PrincipalSpace.fit(weight).project(change, 0.6)
        torch.testing.assert_close(held[name], weight + change)


def test_bfloat16_weights_are_projected_in_float32_and_rounded_once(tmp_path: Path) -> None:
    start = copied(pico("llama")[0].bfloat16())
    raw = copied(train(pico("llama")[0].bfloat16(), tmp_path))
    for when in ("end", "step"):
        held = copied(
            train(pico("llama")[0].bfloat16(), tmp_path, SphereCallback(ALL, "down_proj", when), max_steps=3)
        )
        for name, weight in start.items():
            assert held[name].dtype == torch.bfloat16
            if "down_proj" in name and when == "end":
                change = PrincipalSpace.fit(weight).project(raw[name].float() - weight.float(), 1.0)
                assert torch.equal(held[name], (weight.float() + change).bfloat16())


def fresh_lora(kind: str = "llama") -> peft.PeftModel:
    torch.manual_seed(2)
    return peft.get_peft_model(
        pico(kind)[0], peft.LoraConfig(r=3, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_is_projected_at_the_end_and_the_raw_one_comes_back(kind: str, alpha: float, tmp_path: Path) -> None:
    raw = train(fresh_lora(kind), tmp_path)
    callback = SphereCallback(SphereConfig(alpha=alpha))
    model = train(fresh_lora(kind), tmp_path, callback)
    for name, layer in layers(model).items():
        update = delta(layers(raw)[name], "default")
        expected = space_of(layer).project(update, alpha)
        torch.testing.assert_close(delta(layer, "default"), expected, atol=1e-7, rtol=1e-4)
    assert callback.report.adapter == "default" and len(callback.report.layers) == len(layers(model))
    callback.undo()
    assert all(torch.equal(w, copied(model)[name]) for name, w in copied(raw).items())
    with pytest.raises(ConfigError, match="undo: got 'nothing kept'"):
        callback.undo()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_lora_projected_at_every_step_is_projected_once(alpha: float, tmp_path: Path) -> None:
    """With SGD and a rank of one step the raw adapter is known: A_0 plus all of the optimizer's steps."""
    steps: list[dict[str, torch.Tensor]] = []

    class Before(SphereCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            now = copied(model)
            super().on_optimizer_step(args, state, control, model=model, **kwargs)
            steps.append({name: now[name] - self.last[name] for name in now})
            self.last = copied(model)

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.first = copied(model)
            super().on_train_begin(args, state, control, model=model, **kwargs)
            self.last = copied(model)

    callback = Before(SphereConfig(alpha=alpha), when="step")
    model = train(fresh_lora(), tmp_path, callback, learning_rate=0.1)
    for name, layer in layers(model).items():
        key = f"{name}.lora_A.default.weight"
        raw = callback.first[key] + sum(step[key] for step in steps)
        torch.testing.assert_close(layer.lora_A["default"].weight, space_of(layer).project(raw, alpha))
        if alpha == 1.0:
            update = delta(layer, "default")
            assert (update @ space_of(layer).basis).norm() < 1e-4 * update.norm()
    assert 0 < callback.report.removed_share < 1


def test_projecting_the_start_of_a_lora_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    callback = Watch(ALL, when="step")
    model = fresh_lora()
    before = logits(model.eval())
    train(model, tmp_path, callback)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(callback.seen[1][name])
    assert torch.equal(logits(model.eval()), before)


def test_training_resumes_where_that_means_something(tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(fresh_lora(), tmp_path / "a", SphereCallback(ALL, when="step"), **save)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = fresh_lora()
    train(resumed, tmp_path / "b", SphereCallback(ALL, when="step"), resume_from_checkpoint=checkpoint, **save)
    for name, weight in copied(whole).items():
        torch.testing.assert_close(copied(resumed)[name], weight)
    train(pico("llama")[0], tmp_path / "c", **save)
    checkpoint = str(tmp_path / "c" / "checkpoint-2")
    train(
        pico("llama")[0],
        tmp_path / "d",
        SphereCallback(ALL, "down_proj", "step"),
        resume_from_checkpoint=checkpoint,
        **save,
    )
    with pytest.raises(ConfigError, match="resume_from_checkpoint: got 'step 2', expected a start at step 0"):
        train(
            pico("llama")[0],
            tmp_path / "d",
            SphereCallback(ALL, "down_proj"),
            resume_from_checkpoint=checkpoint,
            **save,
        )


def begin(model: nn.Module, callback: SphereCallback) -> None:
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)


def frozen() -> nn.Module:
    return pico("llama")[0].requires_grad_(False)


def two_adapters() -> peft.PeftModel:
    model = fresh_lora()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (lambda: pico("llama")[0], SphereCallback(), r"weights: got None, .*\(down_proj, gate_proj, k_proj, lm_head"),
        (lambda: pico("llama")[0], SphereCallback(weights=["down_porj"]), "weights: got 'down_porj'"),
        (lambda: pico("llama")[0], SphereCallback(weights=["down_proj", "mlp"]), "weights: got 'mlp'"),
        (lambda: pico("llama")[0], SphereCallback(weights=lambda name: False), "weights: got <function"),
        (frozen, SphereCallback(weights="down_proj"), "are all weights frozen"),
        (lora, SphereCallback(when="step"), "B of .*: got 'non-zero entries', expected zeros: when=\"step\""),
        (lambda: lora(use_dora=True), SphereCallback(), "DoRA"),
        (two_adapters, SphereCallback(), r"active adapters: got \['default', 'other'\], expected one"),
    ],
)
def test_the_callback_refuses_before_anything_is_changed(model, callback: SphereCallback, message: str) -> None:
    live = model()
    before = state(live)
    with pytest.raises(ConfigError, match=message):
        begin(live, callback)
    assert_same(before, state(live))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "epoch"}, "when: got 'epoch', expected step or end"),
        ({"weights": []}, "weights: got \\(\\), expected names of layers"),
        ({"weights": [3]}, "weights: got \\(3,\\), expected names of layers"),
    ],
)
def test_the_callback_checks_its_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SphereCallback(**arguments)


def test_weights_are_chosen_by_name_pattern_or_function() -> None:
    def chosen(weights, model: nn.Module | None = None) -> list[str]:
        callback = SphereCallback(weights=weights)
        begin(pico("llama")[0] if model is None else model, callback)
        return sorted({*callback._guards, *callback._lora})

    down = [f"model.layers.{index}.mlp.down_proj" for index in range(4)]
    assert chosen("down_proj") == chosen(["mlp.down_proj"]) == chosen(["*.down_proj"]) == down
    assert chosen(lambda name: name.endswith("down_proj")) == down
    assert chosen(["layers.[12].mlp.down_proj", "model.layers.3.mlp.down_proj"]) == down[1:]
    under = [f"base_model.model.{name}" for name in down]
    assert chosen("down_proj", fresh_lora()) == under
    assert len(chosen(None, fresh_lora())) == 8
    both = peft.get_peft_model(
        pico("llama")[0], peft.LoraConfig(target_modules=["down_proj"], modules_to_save=["lm_head"])
    )
    assert chosen(["down_proj", "lm_head.*"], both) == ["base_model.model.lm_head.modules_to_save.default", *under]


# The examples


@pytest.mark.keeps_cache
@pytest.mark.parametrize("name", ["project_lora.py", "finetune_with_callback.py"])
def test_the_examples_run(name: str, tmp_path: Path) -> None:
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    run = subprocess.run([sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr
    assert "%" in run.stdout, run.stdout
