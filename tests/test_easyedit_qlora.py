"""`sphere: true` on QLoRA, whose base weights are stored in 4 bits."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import sphere_plugin as sp
from sphere_plugin import HostError
from sphere_plugin.easyedit.host import find_host
from sphere_plugin.peft import base_weight, lora_layers

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)
if KIND != "main":
    pytest.skip("EASYEDIT_HOME is not set: the PyPI release has no QLoRA", allow_module_level=True)
pytest.importorskip("bitsandbytes")

FACT = {"prompts": ["The Eiffel Tower is in the city of"], "target_new": ["Rome"], "subject": ["Eiffel Tower"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA that is wide enough for bitsandbytes' blocks of 64, under a name that EasyEdit loads."""
    tokenizer, folder = pico_tokenizer(bos=True), tmp_path_factory.mktemp("models") / "pico-llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def editor(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """editor(**keys) -> a BaseEditor for QLoRA with these keys in its settings."""
    monkeypatch.chdir(tmp_path)
    sp.register()
    from easyeditor import BaseEditor, QLoRAHyperParams

    def make(**keys: object) -> Any:
        pool = {
            "alg_name": "QLoRA",
            "model_name": str(folder),
            "device": "cpu",
            "layers": [],
            "target_modules": ["q_proj", "v_proj"],
            "quantization_bit": 4,
            "quant_type": "nf4",
            "double_quant": False,
            "lora_type": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lr": 1e-2,
            "num_steps": 4,
            "weight_decay": 0.0,
            "batch_size": 1,
            "max_length": 30,
            "model_parallel": False,
        }
        known = inspect.signature(QLoRAHyperParams).parameters
        made = BaseEditor.from_hparams(QLoRAHyperParams(**{k: v for k, v in pool.items() if k in known}, **keys))
        for module in made.model.modules():
            # On a CPU with AVX-512, bitsandbytes repacks weights to infer, and cannot train through them then.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return made

    yield make
    sp.unregister()


def test_the_merged_update_avoids_the_principal_directions(editor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sphere_plugin"):
        _, model, _ = editor(sphere={"alpha": 1.0}).edit(
            **FACT, ground_truth=["Paris"], sequential_edit=True, verbose=False
        )
    layers = lora_layers(model)
    assert len(layers) == 4
    for name, layer in layers.items():
        assert layer.get_base_layer().weight.dtype == torch.uint8, name
        basis = sp.PrincipalSpace.fit(base_weight(layer)).basis
        update = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        assert update.norm() > 0, name
        assert (update @ basis).norm() / update.norm() < 1e-4, name
    assert "QLoRA + SPHERE changed 4 weights" in caplog.text


def test_alpha_zero_leaves_the_adapter_alone(editor: Any) -> None:
    adapters = []
    for keys in ({}, {"sphere": {"alpha": 0.0}}):
        torch.manual_seed(0)
        made = editor(**keys)
        _, model, _ = made.edit(**FACT, ground_truth=["Paris"], sequential_edit=True, verbose=False)
        adapters.append({name: layer.lora_A["default"].weight for name, layer in lora_layers(model).items()})
    assert len(adapters[0]) == 4
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_the_base_weight_is_read_off_the_layer(editor: Any, folder: Path) -> None:
    """Against the weights before they were rounded to 4 bits."""
    made = editor()
    original = AutoModelForCausalLM.from_pretrained(folder).get_submodule("model.layers.0.self_attn.q_proj").weight

    class Layer:
        def get_base_layer(self) -> torch.nn.Module:
            module: torch.nn.Module = made.model.get_submodule("model.layers.0.self_attn.q_proj")
            return module

    read = base_weight(Layer())
    assert read.shape == original.shape
    assert 0 < (read - original).norm() / original.norm() < 0.15
