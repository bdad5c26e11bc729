"""Weights of 8 or 4 bits: told from others by what they are, and refused with the way out."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import REQUESTS, TEMPLATES, pico_config
from hosted import HPARAMS, settings
from pico import KINDS, pico, save_pico
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GPTQConfig

import sphere_plugin as sp
from sphere_plugin import HostError, ModelError, cli
from sphere_plugin.easyedit.doctor import Finding, examine
from sphere_plugin.easyedit.host import find_host, load_host
from sphere_plugin.editing import Editor
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.files import write_tensors
from sphere_plugin.models import load_model
from sphere_plugin.models.quantised import REMEDY, check_plain, quantised_by
from sphere_plugin.models.stored import stored_weight

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = (torch.uint8, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)


class Scaled(Tensor):
    """A tensor that passes for bfloat16, as libraries for quantised models have them."""


class ScaledParameter(nn.Parameter):
    """The same of a parameter."""


class Packed(nn.Module):
    """A linear layer as GPTQ stores it: packed numbers and their scales, and nothing that is called a weight."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(d_in // 8, d_out, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, d_out, dtype=torch.float16))


# ---- a weight ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_point_numbers_of_16_bits_or_more_are_plain(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 2, dtype=dtype)
    for one in (weight, nn.Parameter(weight), nn.Parameter(weight, requires_grad=False), nn.Parameter(weight).T):
        check_plain("layer.weight", one)


@pytest.mark.parametrize("dtype", PACKED)
def test_everything_narrower_is_refused(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 2).to(dtype)
    for one, kind in ((weight, "Tensor"), (nn.Parameter(weight, requires_grad=False), "Parameter")):
        with pytest.raises(ModelError) as caught:
            check_plain("layer.weight", one)
        assert (caught.value.culprit, caught.value.got) == ("layer.weight", f"{dtype} in a {kind}")
        assert caught.value.expected == "floating point numbers of 16 bits or more"
        assert caught.value.remedy == REMEDY


@pytest.mark.parametrize(
    ("weight", "got"),
    [
        (torch.ones(3, 2, dtype=torch.bfloat16).as_subclass(Scaled), "Scaled"),
        (ScaledParameter(torch.ones(3, 2)), "ScaledParameter"),
        (torch.ones(3, 2, dtype=torch.uint8).as_subclass(Scaled), "torch.uint8 in a Scaled"),
        (None, "no tensor"),
        ([[1.0]], "no tensor"),
    ],
)
def test_what_only_passes_for_numbers_is_refused(weight: object, got: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_plain("layer.weight", weight)
    assert caught.value.got == got


def test_the_way_out_names_what_there_is() -> None:
    assert "bfloat16" in REMEDY and "LoRA" in REMEDY
    commands = [one for one in re.findall("`([^`]+)`", REMEDY) if one.startswith("sphere ")]
    assert commands == ["sphere project-adapter"]
    with pytest.raises(SystemExit) as ended:
        cli.main([commands[0].removeprefix("sphere "), "--help"])
    assert ended.value.code == 0


# ---- a config ----


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes, 8 bits"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),  # old checkpoints do not name it
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"something": 1}, "an unknown method"),
        (BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes, 4 bits"),
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes, 8 bits"),
        (GPTQConfig(bits=3, tokenizer="none", dataset=["none"]), "gptq, 3 bits"),
        (AwqConfig(bits=4), "awq, 4 bits"),
    ],
)
def test_a_config_says_what_the_model_is_quantised_by(told: Any, said: str, tmp_path: Path) -> None:
    """In memory it is an object, in a folder a mapping: both say the same."""
    assert quantised_by(SimpleNamespace(quantization_config=told)) == said
    config = pico("llama")[0].config
    config.quantization_config = told
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read.quantization_config, dict)
    assert quantised_by(read) == said


def test_a_config_of_plain_weights_says_nothing() -> None:
    assert quantised_by(pico("llama")[0].config) is None
    assert quantised_by(SimpleNamespace()) is None
    assert quantised_by(SimpleNamespace(quantization_config=None)) is None


# ---- a live model ----


def packed_at(kind: str, layer: int, make: Callable[[nn.Module], None]) -> tuple[nn.Module, Any, str]:
    """A pico model, of which ``make`` has changed what is rewritten in one layer; its tokenizer, the weight's name."""
    model, tokenizer = pico(kind)
    path = "{}.{}".format(*TEMPLATES[kind][:2]).format(layer)
    make(model.get_submodule(path))
    return model, tokenizer, f"{path}.weight"


def bytes_of(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def packed_in_a_column(layer: nn.Module) -> None:  # two numbers a byte, as bitsandbytes has them
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def float8(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def subclass(layer: nn.Module) -> None:
    layer.weight = ScaledParameter(layer.weight.detach())


def without(layer: nn.Module) -> None:
    del layer.weight
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


MADE = {
    "int8": (bytes_of, "torch.int8 in a Parameter"),
    "4 bits": (packed_in_a_column, "torch.uint8 in a Parameter"),
    "float8": (float8, "torch.float8_e4m3fn in a Parameter"),
    "subclass": (subclass, "ScaledParameter"),
    "without": (without, "no tensor"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MADE)
def test_the_anatomy_and_the_editor_refuse_a_quantised_weight(case: str, kind: str) -> None:
    make, got = MADE[case]
    model, tokenizer, name = packed_at(kind, 2, make)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    computed = []
    model.register_forward_pre_hook(lambda *_: computed.append(1))
    for attempt in (lambda: Anatomy.of(model, pico_config(kind)), lambda: Editor(model, tokenizer, pico_config(kind))):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert (caught.value.culprit, caught.value.got, caught.value.remedy) == (name, got, REMEDY)
    assert not computed, "refused before anything is computed"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_with_another_name_for_its_weight_is_refused() -> None:
    model, _ = pico("llama")
    model.model.layers[1].mlp.down_proj = Packed(64, 32)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight: got 'no tensor'.*LoRA"):
        Anatomy.of(model, pico_config("llama"))


def test_a_layer_that_is_not_edited_may_be_anything() -> None:
    model, tokenizer, _ = packed_at("llama", 3, subclass)
    assert list(Anatomy.of(model, pico_config("llama")).rewrites) == [1, 2]
    report = Editor(model, tokenizer, pico_config("llama")).apply(REQUESTS[:1])
    assert all(layer.update_norm > 0 for layer in report.layers)


def test_a_weight_of_other_dimensions_has_its_own_remedy() -> None:
    with pytest.raises(ModelError, match=r"LlamaRMSNorm with a weight of 1 dimensions.*Name the linear layer"):
        Anatomy.of(pico("llama")[0], pico_config("llama", rewrite_module_tmp="model.layers.{}.input_layernorm"))


# ---- a model in a folder ----


@pytest.fixture
def host() -> None:
    try:
        find_host()
    except HostError as error:
        pytest.skip(str(error))


def quantised_folder(folder: Path, told: dict[str, object]) -> Path:
    """A pico model whose config says that it is quantised, and whose weights to be edited are numbers of 8 bits."""
    file = save_pico("llama", folder) / "model.safetensors"
    tensors = {name: one.to(torch.int8) if "down_proj" in name else one for name, one in load_file(file).items()}
    write_tensors(file, tensors, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return folder


def settings_file(folder: Path, model: Path, alg_name: str, **changes: object) -> Path:
    """A YAML of a method for a model."""
    pool = {**settings(alg_name, "llama", folder), "model_name": str(model), "device": "cpu"}
    known = ("alg_name", "model_name", "device", "layers", "ln_f_module", "lm_head_module")
    known += ("rewrite_module_tmp", "layer_module_tmp")
    if alg_name in HPARAMS:
        load_host()
        known = tuple(one.name for one in dataclasses.fields(getattr(sys.modules["easyeditor"], HPARAMS[alg_name])))
    path = folder / f"{alg_name}.yaml"
    path.write_text(yaml.safe_dump({**{name: pool[name] for name in known if name in pool}, **changes}))
    return path


def only(findings: list[Finding], topic: str) -> Finding:
    (found,) = [finding for finding in findings if finding.topic == topic]
    return found


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("alg_name", ["SPHERE", "RECT", "PRUNE"])
def test_the_doctor_refuses_a_quantised_model_with_the_way_out(
    alg_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantised_folder(tmp_path / "model", {"quant_method": "gptq", "bits": 4, "group_size": 128})
    path = settings_file(tmp_path, model, alg_name)
    findings = examine(path)
    told = only(findings, "quantised")
    assert told == Finding("quantised", f"the model is quantised (gptq, 4 bits); {REMEDY}", "missing")
    assert [one.topic for one in findings if one.verdict == "missing"] == ["quantised"]
    assert cli.main(["doctor", str(path)]) == 1
    assert "missing quantised" in capsys.readouterr().out


@pytest.mark.usefixtures("host")
def test_the_doctor_finds_nothing_wrong_with_a_plain_model(tmp_path: Path) -> None:
    findings = examine(settings_file(tmp_path, save_pico("llama", tmp_path / "model"), "SPHERE"))
    assert not [one for one in findings if one.topic == "quantised" or one.verdict == "missing"]


@pytest.mark.usefixtures("host")
def test_the_doctor_lets_a_lora_train_on_a_quantised_model(tmp_path: Path) -> None:
    """r is not measured there: what the files hold are no weights yet."""
    model = quantised_folder(tmp_path / "model", {"quant_method": "bitsandbytes", "load_in_8bit": True})
    stored = stored_weight(str(model), "model.layers.1.mlp.down_proj.weight")
    assert stored is not None and stored.dtype == torch.int8
    findings = examine(settings_file(tmp_path, model, "LoRA", sphere=True))
    assert only(findings, "method").text == "LoRA + SPHERE"
    assert only(findings, "quantised") == Finding(
        "quantised", "the model is quantised (bitsandbytes, 8 bits); r is not measured.", "note"
    )
    assert not [one for one in findings if one.verdict == "missing" or one.topic in ("YAML", "projection")]
    findings = examine(settings_file(tmp_path, model, "FT", sphere=True))
    assert only(findings, "quantised").verdict == "missing"
    assert [one.topic for one in findings if one.verdict == "missing"] == ["quantised"]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_bitsandbytes_are_refused(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save_pico("llama", tmp_path)
    told = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=told)
    assert quantised_by(model.config) == f"bitsandbytes, {bits} bits"
    with pytest.raises(ModelError, match=r"1\.mlp\.down_proj\.weight: got 'torch\.u?int8 in a .*LoRA") as caught:
        Editor(model, pico("llama")[1], pico_config("llama"))
    assert caught.value.remedy == REMEDY


@pytest.mark.usefixtures("host")
def test_an_editor_of_easyedit_refuses_a_quantised_model_when_it_is_made(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = save_pico("llama", tmp_path / "plain"), tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(packed)
    pico("llama")[1].save_pretrained(packed)
    path = settings_file(tmp_path, packed, "SPHERE")
    host = sp.register()
    try:
        with pytest.raises(ModelError, match=r"down_proj\.weight: got 'torch\.int8 in a Int8Params'") as caught:
            host.base_editor.from_hparams(sp.SphereHyperParams.from_hparams(path))
    finally:
        sp.unregister()
    assert caught.value.remedy == REMEDY


def test_a_quantised_model_that_does_not_load_has_the_same_way_out(tmp_path: Path) -> None:
    """A library that reads it would not help: its weights could not be edited."""
    told = {"quant_method": "compressed-tensors", "config_groups": {}, "format": "nonsense"}
    with pytest.raises(ModelError) as caught:
        load_model(str(quantised_folder(tmp_path / "model", told)))
    assert caught.value.culprit == "model" and caught.value.remedy == REMEDY
    broken = save_pico("llama", tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError) as other:
        load_model(str(broken))
    assert "Give a local folder" in other.value.remedy
