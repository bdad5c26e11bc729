"""Inputs of linear layers at chosen tokens, against one plain pass for each text."""

from __future__ import annotations

import pytest
import torch
from conftest import TEMPLATES
from pico import KINDS, pico
from torch import nn

from sphere_plugin.editing.inputs import read_inputs
from sphere_plugin.errors import ModelError

TEXTS = ("The Eiffel Tower is in the city of Paris.", "Water boils", "Who plays the piano? Thelonious Monk does.")
PICKS = ([1, 3], [0], [5, 2, 4])


def plain(model, module, ids):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [8192, 12])
def test_inputs_are_those_of_a_plain_pass_in_the_order_asked_for(kind, budget):
    model, tokenizer = pico(kind)
    layer, rewrite, _ = TEMPLATES[kind]
    modules = {str(n): model.get_submodule(f"{layer.format(n)}.{rewrite}") for n in (2, 0)}
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = read_inputs(model, modules, list(zip(ids, PICKS, strict=True)), budget)
    assert set(found) == {"0", "2"}
    for name, module in modules.items():
        expected = [plain(model, module, row)[pick] for row, picks in zip(ids, PICKS, strict=True) for pick in picks]
        torch.testing.assert_close(found[name], torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert not module._forward_pre_hooks


def test_a_layer_that_is_not_passed_is_named():
    model, tokenizer = pico("llama")
    idle = {"idle": nn.Linear(4, 4), "used": model.get_submodule("model.layers.0.mlp.down_proj")}
    with pytest.raises(ModelError, match="inputs of idle"):
        read_inputs(model, idle, [(tokenizer(TEXTS[0])["input_ids"], [1])])


def test_a_layer_that_sees_some_tokens_is_refused():
    """As experts do, whose inputs are not laid out by text and token."""
    model, tokenizer = pico("llama")
    expert = model.get_submodule("model.layers.0.mlp.down_proj")

    class Routed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    model.get_submodule("model.layers.0.mlp").down_proj = Routed(expert)
    with pytest.raises(ModelError, match="inputs of expert"):
        read_inputs(model, {"expert": expert}, [(tokenizer(TEXTS[0])["input_ids"], [1])])
