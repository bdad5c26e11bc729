"""Shared by all tests: pico models and their settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from pico import pico

from sphere_plugin.editing import EditingConfig, Editor

# Pico models are too small for a second thread to help; on a busy machine it does harm. The processes that tests start
# have one too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# How many inputs the tests of generated.py make: `make test` some, `make nightly` ten times as many.
settings.register_profile("default", deadline=None)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)

TEMPLATES = {
    "llama": ("model.layers.{}", "mlp.down_proj", "model.norm"),
    "qwen2": ("model.layers.{}", "mlp.down_proj", "model.norm"),
    "gpt2": ("transformer.h.{}", "mlp.c_proj", "transformer.ln_f"),
    "gptj": ("transformer.h.{}", "mlp.fc_out", "transformer.ln_f"),
}

REQUESTS = [
    {"prompt": "The Eiffel Tower is in the city of", "subject": "Eiffel Tower", "target_new": "Rome"},
    {"prompt": "{} was developed by", "subject": "Windows 95", "target_new": "Apple"},
    {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux", "target_new": "English"},
]


def pico_config(kind: str, **changes: object) -> EditingConfig:
    """Settings for a pico model of ``kind``; MEMIT's statistics are counted over text the model writes."""
    layer, rewrite, norm = TEMPLATES[kind]
    settings = {
        "layers": [1, 2],
        "rewrite_module_tmp": f"{layer}.{rewrite}",
        "layer_module_tmp": layer,
        "ln_f_module": norm,
        "lm_head_module": "lm_head",
        "v_num_grad_steps": 6,
        "v_lr": 0.5,
        "context_template_length_params": [[5, 2]],
        "mom2_n_samples": 8,
        "mom2_update_weight": 100.0,
        "nullspace_threshold": 0.5,
        "L2": 1.0,
    }
    return EditingConfig(**{**settings, **changes})


@pytest.fixture(autouse=True)
def own_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
):
    """Statistics of pico models go to a folder of the test run; the embedded model stays in the user's cache."""
    if "keeps_cache" not in request.keywords:
        monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make_editor():
    """make_editor(kind, seed=0, **settings) -> Editor on a fresh pico model."""

    def make(kind: str = "llama", seed: int = 0, **settings: object) -> Editor:
        model, tokenizer = pico(kind, seed)
        return Editor(model, tokenizer, pico_config(kind, **settings))

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real benchmark records beside the checkout; tests that need it are skipped where it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPHERE_BENCHMARKS", beside))
    if not folder.is_dir():
        pytest.skip(f"benchmark records are not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Processes that share work, as torchrun starts them, at once: see `pico_ranks.Launcher`."""
    from pico_ranks import launcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with launcher() as ready:
            yield ready


@pytest.fixture(scope="session")
def sphere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command, in processes that start at once and can be killed: see `pico_runs.Server`."""
    from pico_runs import server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with server() as ready:
            yield ready
