"""The economical engine against plain, slow computations that follow the formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import KINDS, pico
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig

from sphere_plugin.editing import Editor
from sphere_plugin.editing.aim import aim
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.locate import Locator, Padded
from sphere_plugin.editing.prefix import read_prefixes
from sphere_plugin.editing.replay import record, record_suffix
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.errors import ModelError, RequestError

FACTS = read_requests(REQUESTS)
CONTEXTS = Contexts(("", "He said it. ", "A new line starts here and goes on. "), (0.5, 0.25, 0.25))


def parts(kind: str, **settings: object):
    model, tokenizer = pico(kind)
    config = pico_config(kind, **settings)
    return model, tokenizer, config, Anatomy.of(model, config), Locator(tokenizer, config.fact_token)


def layer_outputs(model: nn.Module, anatomy: Anatomy, ids: list[int]) -> list[torch.Tensor]:
    """Each decoder layer's output [tokens, width] for one unpadded sentence."""
    outputs: list[torch.Tensor] = []

    def hook(_, __, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_hook(hook) for layer in anatomy.decoder]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_layers_equal_the_plain_forward_pass(kind: str) -> None:
    model, _, _, anatomy, locator = parts(kind)
    sentences = [locator.aimed(fact, prefix) for fact in FACTS for prefix in CONTEXTS.prefixes]
    batch = Padded.of(sentences, anatomy.device)
    with torch.no_grad():
        whole = record(anatomy, batch, 1, 4)
        out = whole.run(whole.hidden, 1, 4)
        suffix = record_suffix(anatomy, sentences, read_prefixes(anatomy, sentences), 2)
        tail = suffix.run(suffix.hidden, 2, 4)
        some = suffix.rows(torch.tensor([4, 1]))
        picked = some.run(some.hidden, 2, 4)
    for row, sentence in enumerate(sentences):
        expected = layer_outputs(model, anatomy, list(sentence.ids))[3]
        length = len(sentence.ids)
        torch.testing.assert_close(out[row, :length], expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            tail[row, : length - sentence.lookup], expected[sentence.lookup :], atol=2e-5, rtol=1e-4
        )
    torch.testing.assert_close(picked, tail[[4, 1]])


def log_probabilities(model, layer: nn.Module, sentence, delta: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary], with ``delta`` added to the layer's output at the lookup token."""

    def hook(_, __, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, sentence.lookup] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(hook)
    logits = model(torch.tensor([sentence.ids])).logits[0]
    handle.remove()
    return torch.log_softmax(logits, dim=1)


def aim_one_plainly(model, anatomy, locator, fact, prefixes, config) -> torch.Tensor:
    """MEMIT's search, one fact and one sentence at a time through the whole model."""
    number = config.layers[-1]
    layer = anatomy.decoder[number]
    sentences = [locator.aimed(fact, prefix) for prefix in prefixes]
    essence = locator.essence(fact)
    first = layer_outputs(model, anatomy, list(sentences[0].ids))[number][sentences[0].lookup]
    delta = torch.zeros_like(first, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.v_lr)
    before = None
    for step in range(config.v_num_grad_steps):
        loss = config.v_weight_decay * delta.norm() / first.norm() ** 2
        for sentence in sentences:
            said = log_probabilities(model, layer, sentence, delta)[-len(sentence.targets) :]
            loss = loss - said.gather(1, torch.tensor(sentence.targets)[:, None]).mean() / len(sentences)
        now = log_probabilities(model, layer, essence, delta)[essence.lookup]
        before = now.detach() if before is None else before
        # torch's own: kl_div(input, target) is KL(target || input); MEMIT passes what was before as the input.
        divergence = torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
        loss = loss + config.kl_factor * divergence
        if loss < 5e-2 or step == config.v_num_grad_steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            longest = config.clamp_norm_factor * first.norm()
            if delta.norm() > longest:
                delta *= longest / delta.norm()
    return (first + delta).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"kl_factor": 5.0, "clamp_norm_factor": 0.3}, {"token_budget": 64}], ids=str)
def test_targets_equal_those_of_the_search_one_fact_at_a_time(kind: str, settings: dict) -> None:
    """In float64, with next to nothing left of what rounding does: Adam turns on the sign of gradients near zero."""
    model, _, config, anatomy, locator = parts(kind, **settings)
    single = aim(anatomy, locator, FACTS, CONTEXTS.prefixes, config).values
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.double()
    double = aim(anatomy, locator, FACTS, CONTEXTS.prefixes, config).values
    for found, rounded, fact in zip(double, single, FACTS, strict=True):
        plain = aim_one_plainly(model, anatomy, locator, fact, CONTEXTS.prefixes, config)
        assert (found - plain).norm() < 1e-3 * plain.norm()
        assert (rounded - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_bfloat16_finds_about_the_same_targets(kind: str) -> None:
    _, _, config, anatomy, locator = parts(kind)
    wide = aim(anatomy, locator, FACTS, CONTEXTS.prefixes, config)
    _, _, config, anatomy, locator = parts(kind, aiming_dtype="bfloat16")
    narrow = aim(anatomy, locator, FACTS, CONTEXTS.prefixes, config)
    assert narrow.values.dtype == torch.float32
    assert not torch.equal(narrow.values, wide.values)
    assert torch.cosine_similarity(narrow.values, wide.values, dim=1).min() > 0.95
    assert (narrow.losses - wide.losses).abs().max() < 0.1 * wide.losses.max()


def test_a_fact_that_is_good_enough_stops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, config, anatomy, locator = parts("llama", v_num_grad_steps=30, v_lr=0.05, clamp_norm_factor=5.0)
    losses = aim(anatomy, locator, FACTS, ("",), config).losses
    # A pico model never gets near MEMIT's threshold; the loss one of the facts ends with does as well.
    monkeypatch.setattr("sphere_plugin.editing.aim.GOOD_ENOUGH", float(losses.sort().values[1]))
    together = aim(anatomy, locator, FACTS, ("",), config)
    assert len(set(together.steps.tolist())) > 1, "all facts took equally long: nothing was tested"
    for number, fact in enumerate(FACTS):
        alone = aim(anatomy, locator, [fact], ("",), config)
        assert alone.steps[0] == together.steps[number]
        torch.testing.assert_close(alone.values[0], together.values[number], atol=1e-3, rtol=1e-3)


def test_without_kl_essences_apart_from_the_rest_ask_for_nothing() -> None:
    model, _, config, anatomy, locator = parts("llama", kl_factor=0.0)
    told = {"prompt": "Toyota Camry, as he said of the city and the capital of France and Italy, is produced by"}
    (fact,) = read_requests([{**told, "subject": "Toyota Camry", "target_new": "Microsoft"}])
    found = aim(anatomy, locator, [fact], ("",), config).values[0]
    expected = aim_one_plainly(model, anatomy, locator, fact, ("",), config)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_loss_may_read_a_lower_layer() -> None:
    model, _, config, anatomy, locator = parts("llama", layers=[1], v_loss_layer=2, kl_factor=1.0)
    lower = aim(anatomy, locator, FACTS, ("",), config).values
    last = aim(Anatomy.of(model, pico_config("llama", layers=[1])), locator, FACTS, ("",), config).values
    assert torch.isfinite(lower).all()
    assert (lower - last).norm() > 1e-3 * last.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_what_the_layers_see_after_the_edits_below(kind: str) -> None:
    model, _, config, anatomy, locator = parts(kind, token_budget=64)
    reader = KeyReader(anatomy, locator, FACTS, CONTEXTS, config.token_budget)
    for layer in (1, 2, 1):  # going down again, as the key history does, starts over
        keys, values = reader.read(layer)
        expected_keys, expected_values = [], []
        for fact in FACTS:
            total = 0.0
            for prefix, share in zip(CONTEXTS.prefixes, CONTEXTS.shares, strict=True):
                sentence = locator.keyed(fact, prefix)
                seen = []
                module = anatomy.rewrites[layer].module
                handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                outputs = layer_outputs(model, anatomy, list(sentence.ids))
                handle.remove()
                total = total + share * seen[0].reshape(-1, seen[0].shape[-1])[sentence.lookup]
                if not prefix:
                    expected_values.append(outputs[2][sentence.lookup])
            expected_keys.append(total)
        torch.testing.assert_close(keys, torch.stack(expected_keys, 1).detach(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(values, torch.stack(expected_values, 1), atol=2e-5, rtol=1e-4)
        if layer == 1:
            rewrite, noise = anatomy.rewrites[1], torch.Generator().manual_seed(1)
            rewrite.write(rewrite.weight + 0.05 * torch.randn(rewrite.weight.shape, generator=noise))


def test_the_lookup_token_is_the_one_that_ends_the_subject() -> None:
    _, tokenizer, _, _, locator = parts("gpt2")
    for request, fact in zip(REQUESTS, FACTS, strict=True):
        for prefix in CONTEXTS.prefixes:
            sentence = locator.keyed(fact, prefix)
            assert tokenizer.decode(sentence.ids[: sentence.lookup + 1]).endswith(request["subject"])
            assert tokenizer.decode(sentence.ids) == prefix + fact.prompt


@pytest.mark.parametrize(
    ("choice", "expected"), [("subject_first", "E"), ("last", "of"), ("subject_first_after_last", "is")]
)
def test_other_lookup_tokens(choice: str, expected: str) -> None:
    _, tokenizer, _, _, _ = parts("gpt2")
    sentence = Locator(tokenizer, choice).keyed(FACTS[0])
    assert tokenizer.decode(sentence.ids[sentence.lookup]).strip().startswith(expected[0])


# ---- models whose replay would be another model's ----


def granite(**changes: object):
    tokenizer = pico("qwen2")[1]
    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def test_a_model_that_scales_its_logits_is_refused() -> None:
    """Aiming reads logits as head(norm(h)); Granite divides them, Gemma 2 caps them."""
    with pytest.raises(ModelError, match="replay of GraniteForCausalLM: got 'log-probabilities off by"):
        Editor(*granite(logits_scaling=8.0, initializer_range=0.5), pico_config("llama"))
    Editor(*granite(logits_scaling=1.0, initializer_range=0.5), pico_config("llama"))


def test_a_model_with_nan_outside_the_edited_layers_is_refused() -> None:
    model, tokenizer = pico("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match="replay of LlamaForCausalLM: got 'log-probabilities off by nan"):
        Editor(model, tokenizer, pico_config("llama"))


def test_a_prompt_longer_than_a_window_of_attention_is_refused() -> None:
    model, tokenizer = pico("llama")
    editor = Editor(model, tokenizer, pico_config("llama"))
    model.config.sliding_window = 8
    with pytest.raises(RequestError, match=r"requests\[0\].prompt: got '\d+ tokens', expected at most 8"):
        editor.apply(REQUESTS)
    model.config.use_sliding_window = False
    editor.apply(REQUESTS)


def test_a_prompt_that_a_prefix_makes_longer_than_the_model_takes_is_refused() -> None:
    """It ended in an IndexError of the position embeddings."""
    locator = parts("gpt2")[-1]
    words, request = 0, dict(REQUESTS[0])
    while len(locator.aimed(read_requests([request])[0]).ids) < 256:  # the pico models' limit
        words += 1
        request["prompt"] = "a" + " a" * words + " {} is in the city of"
    assert len(locator.aimed(read_requests([request])[0]).ids) == 256
    bare, prefixed = (
        Editor(*pico("gpt2"), pico_config("gpt2", context_template_length_params=p)) for p in ([], [[5, 2]])
    )
    bare.apply([request])
    for call in (prefixed.apply, prefixed.aim):
        with pytest.raises(RequestError, match=r"requests\[1\].prompt: got '2\d\d tokens, with a prefix.*at most 256"):
            call([REQUESTS[1], request])
    assert prefixed._solvers is None, "statistics were counted for it"


def test_a_float64_model_is_refused() -> None:
    """Its edited weights were rounded to float32, and that was told as no loss."""
    model, tokenizer = pico("llama")
    expected = (
        r"layers.1.mlp.down_proj.weight: got torch.float64, expected floating point numbers of 32 or 16 bits.*float"
    )
    with pytest.raises(ModelError, match=expected):
        Editor(model.double(), tokenizer, pico_config("llama"))
    Editor(model.float(), tokenizer, pico_config("llama"))
