"""EasyEdit's own methods on pico models, on whichever host is found: settings, editors, edits."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REQUESTS, TEMPLATES
from pico import pico
from torch import Tensor, nn

import sphere_plugin as sp
from sphere_plugin import PrincipalSpace
from sphere_plugin.easyedit.host import Host, load_host
from sphere_plugin.easyedit.keys import KEYS
from sphere_plugin.geometry.neurons import is_transposed, neurons

# Words in a model's name by which EasyEdit decides about shapes, and the class names that it looks at.
WORDS = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2-xl", "gptj": "gpt-j-6b"}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
}
ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "gpt2": "attn", "gptj": "attn"}
ATTENTION_OUT = {"llama": "o_proj", "qwen2": "o_proj", "gpt2": "c_proj", "gptj": "out_proj"}

HPARAMS = {
    "FT": "FTHyperParams",
    "ROME": "ROMEHyperParams",
    "R-ROME": "R_ROMEHyperParams",
    "MEMIT": "MEMITHyperParams",
    "MEMIT-FE": "MEMITFEHyperParams",
    "PMET": "PMETHyperParams",
    "CORE": "COREHyperParams",
    "EAMET": "EAMETHyperParams",
    "EMMET": "EMMETHyperParams",
    "AlphaEdit": "AlphaEditHyperParams",
    "DINM": "DINMHyperParams",
    "ULTRAEDIT": "UltraEditHyperParams",
    "MEND": "MENDHyperParams",
    "KN": "KNHyperParams",
    "SimIE": "SimIEHyperParams",
    "LoRA": "LoRAHyperParams",
    "DPO": "DPOHyperParams",
}

FACTS = [{**request, "prompt": request["prompt"].replace("{}", request["subject"])} for request in REQUESTS]

# What the methods keep in their modules from one call to the next, and from one model to another.
STATE = {
    "CONTEXT_TEMPLATES_CACHE": None,
    "COV_CACHE": {},
    "inv_mom2_cache": {},
    "P_loaded": False,
    "cache_c_new": False,
}


def settings(method: str, kind: str, folder: Path) -> dict[str, Any]:
    """A pool of settings for all methods; each takes those that it knows."""
    layer, rewrite, norm = TEMPLATES[kind]
    attention = f"{layer}.{ATTENTION[kind]}"
    rewritten = f"{layer}.{rewrite}"
    return {
        "alg_name": method,
        "alg": method,
        "model_name": str(folder / WORDS[kind]),
        "model_class": CLASSES[kind],
        "tokenizer_class": "AutoTokenizer",
        "tokenizer_name": "none",
        "device": "cpu",
        "model_parallel": False,
        "fp16": False,
        "batch_size": 1,
        "max_length": 40,
        "layers": [1, 2],
        "layer_selection": "all",
        "fact_token": "subject_last",
        # names of modules
        "rewrite_module_tmp": rewritten,
        "rewrite_module_tmps": [rewritten],
        "layer_module_tmp": layer,
        "mlp_module_tmp": rewritten if method == "PMET" else f"{layer}.mlp",
        "attn_module_tmp": f"{attention}.{ATTENTION_OUT[kind]}" if method == "PMET" else attention,
        "ln_f_module": norm,
        # EasyEdit does not find a head that is tied to the embeddings.
        "lm_head_module": {"qwen2": "model.embed_tokens", "gpt2": "transformer.wte"}.get(kind, "lm_head"),
        "inner_params": [f"{rewritten.format(number)}.weight" for number in (1, 2)],
        "target_modules": [f"{number}.{rewrite}" for number in (1, 2)],
        # steps
        "num_steps": 3,
        "lr": 1e-2,
        "weight_decay": 0,
        "norm_constraint": False,
        "objective_optimization": "target_new",
        "v_num_grad_steps": 4,
        "v_lr": 0.5,
        "v_loss_layer": 3,
        "v_weight_decay": 0.1,
        "clamp_norm_factor": 2.0,
        "kl_factor": 0.0625,
        "nll_loss_factor": 1.0,
        "context_template_length_params": [[5, 5]],
        # statistics
        "mom2_adjustment": True,
        "mom2_update_weight": [100.0, 100.0] if method == "EAMET" else 100.0,
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 8,
        "mom2_dtype": "float32",
        "stats_dir": str(folder / "stats"),
        "P_loc": str(folder / "not_there.pt"),
        "nullspace_threshold": 1.2,
        "L2": 1.0,
        **_special(folder),
    }


def _special(folder: Path) -> dict[str, Any]:
    return {
        # EAMET, EMMET
        "ks_bs": 1,
        "clamp_ks_factor": 1.0,
        "cs_factor": 1.0,
        "mse_factor": 1.0,
        "tau": 0.07,
        "norm_factor": 1e-3,
        "delta_init": "target_init",
        "weight_decay_method": "norm",
        "update_norm_lambda": 0,
        "emmet_lambda": 0.1,
        # CORE
        "context": "subject",
        # DINM
        "suffix_system_prompt": "",
        # KN
        "lr_scale": 1.0,
        "n_toks": 10,
        "refine": False,
        "steps": 2,
        "adaptive_threshold": 0.2,
        "p": 0.5,
        # MEND, ULTRAEDIT
        "archive": str(folder / "archive.pt"),
        "edit_lr": 0.1,
        "lr_lr": 1e-4,
        "seed": 42,
        "dropout": 0.0,
        "no_grad_layers": None,
        "one_sided": False,
        "n_hidden": 1,
        "hidden_dim": None,
        "init": "id",
        "norm": False,  # an untrained network has no statistics
        "combine": True,
        "x_only": False,
        "delta_only": False,
        "act": "relu",
        "rank": 8,
        "mlp_class": "IDMLP",
        "shared": True,
        "results_dir": str(folder / "results"),
        "token": "mask",
        "batch_size_once": 1,
        "editor_batch_size": 8,
        "silent": True,
        "half": False,
        # SimIE
        "base_method": "ROME",
        "lamHyper": 10.0,
        "init_model": False,
        "solver": "LU",
        "fast": True,
        # LoRA, DPO
        "lora_type": "lora",
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "alpha": 0.5,
        "beta": 0.1,
    }


def hparams_of(method: str, kind: str, folder: Path, /, **changes: object) -> Any:
    """Hyper-parameters of EasyEdit's class for ``method``; our keys among ``changes`` go the way a YAML's would."""
    cls = getattr(sys.modules["easyeditor"], HPARAMS[method])
    pool = {**settings(method, kind, folder), **changes}
    fields = [field for field in dataclasses.fields(cls) if field.init]
    known = {field.name: pool.get(field.name) for field in fields if field.name in pool or _required(field)}
    hparams = cls(**known, **{key: changes[key] for key in KEYS if key in changes})
    if method == "SimIE":
        base = {key: value for key, value in changes.items() if key not in KEYS}
        hparams._base_hparams = hparams_of(pool["base_method"], kind, folder, **base)
    return hparams


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def second_moment(model: nn.Module, _: object, layer: str, *__: object, **___: object) -> Any:
    """In place of EasyEdit's `layer_stats`: a positive definite matrix of the right size, always the same."""
    module = model.get_submodule(layer)
    size = neurons(module.weight, is_transposed(module)).shape[1]
    keys = torch.randn(size, 4 * size, generator=torch.Generator().manual_seed(size))
    moment = keys @ keys.T / (4 * size) + 0.1 * torch.eye(size)
    return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: moment))


def modules() -> Iterator[Any]:
    """Those of EasyEdit's methods."""
    return (module for name, module in list(sys.modules.items()) if name.startswith("easyeditor.models."))


class Bench:
    """Makes editors and edits with them, one method after another, each as in a fresh process."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.host, self.monkeypatch, self.folder = host, monkeypatch, folder
        self.scored: list[dict[str, Tensor]] = []
        monkeypatch.setattr(sys.modules["easyeditor.editors.editor"], "compute_edit_quality", self._score)
        for module in modules():
            if hasattr(module, "layer_stats"):
                monkeypatch.setattr(module, "layer_stats", second_moment)

    def _score(self, model: nn.Module, *args: Any, **_: Any) -> dict[str, Any]:
        """In place of EasyEdit's scoring: remembers the weights that it sees."""
        self.scored.append(copies(model))
        request = next(value for value in args if isinstance(value, dict) and "prompt" in value)
        return {"rewrite_acc": [1.0], "locality": {f"{key}_output": [[1]] for key in request["locality"]}}

    def fresh(self) -> None:
        """Forget what the host's methods remember, and start random numbers anew."""
        for module in modules():
            for name, value in STATE.items():
                if name in vars(module):
                    self.monkeypatch.setattr(module, name, {} if value == {} else value)
            for name in ("P", "cache_c"):
                self.monkeypatch.delattr(module, name, raising=False)
        for entry in self.host.alg_dict.values():
            owner = getattr(getattr(entry, "method", entry), "__self__", None)
            if hasattr(owner, "is_init"):
                self.monkeypatch.setattr(owner, "is_init", False)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def editor(self, method: str, kind: str, seed: int = 0, editor: str = "BaseEditor", **changes: object) -> Any:
        """One of EasyEdit's editors on a pico model, as fresh as can be."""
        self.fresh()
        model, tokenizer = pico(kind, seed)
        return self.editor_on(model, tokenizer, method, kind, editor=editor, **changes)

    def editor_on(self, model: nn.Module, tok: Any, method: str, kind: str, /, **changes: Any) -> Any:
        """The same on a model that is there."""
        editor = changes.pop("editor", "BaseEditor")
        if "MEND" in (method, changes.get("base_method")):
            self.archive(kind)
        hparams = hparams_of(method, kind, self.folder, **changes)
        hparams.model_name = (model, tok)
        made = getattr(sys.modules["easyeditor"], editor).from_hparams(hparams)
        made.model_name = hparams.model_name = WORDS[kind]
        if method == "SimIE":
            hparams.base_hparams.model_name = WORDS[kind]
        return made

    def archive(self, kind: str) -> None:
        """An untrained network of MEND's, where its hyper-parameters look for the trained one."""
        hparams, mend = hparams_of("MEND", kind, self.folder), sys.modules["easyeditor"].MEND
        model = pico(kind)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            state = dict(mend(model, hparams, lambda: model).state_dict())
        torch.save({"model": {**state, "model_config": {}}}, hparams.archive)

    def edit(self, editor: Any, facts: Sequence[Mapping[str, str]], keep: bool = True) -> Any:
        """Edit one fact after another and return the last `weights_copy`; ``keep``: let the edits stand."""
        arguments: dict[str, Any] = {"sequential_edit" if self.host.kind == "main" else "keep_original_weight": True}
        if keep != (self.host.kind == "main"):
            arguments = {}
        if editor.alg_name == "DINM":
            harmless = {"prompt": ["Water boils at"] * len(facts), "ground_truth": ["100 degrees"] * len(facts)}
            arguments["locality_inputs"] = {"general knowledge constraint": harmless}
        if editor.alg_name == "DPO":
            arguments["target_neg"] = ["Paris"] * len(facts)
        return editor.edit(
            prompts=[fact["prompt"] for fact in facts],
            target_new=[fact["target_new"] for fact in facts],
            subject=[fact["subject"] for fact in facts],
            ground_truth=["Paris"] * len(facts),
            verbose=False,
            **arguments,
        )[2]


def copies(model: nn.Module) -> dict[str, Tensor]:
    """All weights, bit for bit."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all weights are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that differ."""
    return {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}


def along(kind: str, before: Tensor, after: Tensor) -> float:
    """The share ‖ΔW U‖ / ‖ΔW‖ of an update, U the principal directions of the weight before it."""
    if kind == "gpt2":  # stored with one neuron per column
        before, after = before.T, after.T
    delta = after.float() - before.float()
    return float((delta @ PrincipalSpace.fit(before.float()).basis).norm() / delta.norm())


def expected_to_change(method: str, kind: str) -> set[str]:
    """Names of the parameters that a method writes with the settings above."""
    layer, rewrite, _ = TEMPLATES[kind]
    names = {f"{layer.format(number)}.{rewrite}.weight" for number in (1, 2)}
    if method in ("FT", "DINM") and kind.startswith("gpt"):  # these take every parameter with the text in its name
        names |= {name.replace("weight", "bias") for name in names}
    return names


def clean_host(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Host]:
    """The host, with nothing of ours in it before and after; what it logs goes to ``folder``."""
    monkeypatch.chdir(folder)
    host = load_host()
    sp.unregister()  # what ran before in this process may have left the plugin registered
    logs = [logging.getLogger(name) for name in sys.modules if name.startswith("easyeditor.editors.")]
    handlers = {log: list(log.handlers) for log in logs}
    yield host
    sp.unregister()
    for log in logs:
        for handler in [handler for handler in log.handlers if handler not in handlers[log]]:
            log.removeHandler(handler)
            handler.close()
