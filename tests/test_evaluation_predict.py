"""Answers to many questions at once against one prompt and one target at a time through the whole model."""

from __future__ import annotations

import pytest
import torch
from pico import KINDS, pico, pico_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, CohereConfig, Gemma2Config, GraniteConfig

from sphere_plugin.errors import ModelError
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.predict import Ask, Said, Told, predict

PROMPTS = ("The", "The Eiffel Tower is in the city of", "Windows 95 was developed by", "Who plays the piano? It is")
TARGETS = (" Rome", " Apple Inc.", " the", " the guitar (1942-1970)")


def bloom() -> tuple[torch.nn.Module, object]:
    """A model that cannot be told at which position a token stands."""
    tokenizer = pico_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    return model.eval(), tokenizer


def asks(tokenizer) -> list[Ask]:
    """Every prompt with none, one or several targets; the last repeats the first."""
    ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    new = [tuple(tokenizer(target, add_special_tokens=False)["input_ids"]) for target in TARGETS]
    assert {len(target) for target in new} > {1}, "targets of one token and of several"
    return [
        Ask(ids[0], (new[0], new[1])),
        Ask(ids[1], (new[1], new[0])),
        Ask(ids[1], (new[2],)),
        Ask(ids[2]),
        Ask(ids[3], (new[3], new[2], new[0])),
        Ask(ids[0], (new[0], new[1])),
    ]


def alone(model, ask: Ask) -> Said:
    """The same by one pass per target, over all logits."""

    def logs(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(dim=1)

    told = []
    for target in ask.targets:
        rows = logs(ask.ids + target)[len(ask.ids) - 1 : -1]
        told.append(Told(tuple(rows.argmax(1).tolist()), float(rows[range(len(target)), list(target)].mean())))
    return Said(int(logs(ask.ids)[-1].argmax()), tuple(told))


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_answers_equal_one_question_at_a_time(kind: str, batch_tokens: int) -> None:
    model, tokenizer = bloom() if kind == "bloom" else pico(kind)
    questions = asks(tokenizer)
    assert Decoder(model).continues == (kind != "bloom")
    for said, expected in zip(
        predict(Decoder(model), questions, batch_tokens), [alone(model, ask) for ask in questions], strict=True
    ):
        assert said.next == expected.next
        assert [told.choices for told in said.targets] == [told.choices for told in expected.targets]
        logs = [told.logprob for told in expected.targets]
        assert [told.logprob for told in said.targets] == pytest.approx(logs, abs=1e-5)


def test_a_prompt_is_read_once_however_much_is_asked() -> None:
    model, tokenizer = pico("llama")
    questions, read = asks(tokenizer), 0

    def count(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        read += arguments[0].numel()

    decoder = Decoder(model)
    model.get_input_embeddings().register_forward_pre_hook(count)
    predict(decoder, questions, 1)  # one prompt in a batch: nothing is padded
    prompts = {ask.ids for ask in questions}
    continued = {(ask.ids, target) for ask in questions for target in ask.targets}
    assert read == sum(map(len, prompts)) + sum(len(target) - 1 for _, target in continued)


@pytest.mark.parametrize("make", [CohereConfig, Gemma2Config, GraniteConfig], ids=lambda make: make.model_type)
def test_what_a_model_does_to_its_logits_is_done_here(make) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    numbers = {"logit_scale": 0.25, "logits_scaling": 5.0, "final_logit_softcapping": 2.0}
    config = make(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, value in numbers.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
    decoder, rows = Decoder(model), [[5, 9, 31, 7], [3, 4, 60, 80]]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(rows)).logits
        torch.testing.assert_close(decoder.logits(decoder.hidden(rows)), expected, rtol=1e-4, atol=1e-4)
        plain = model.get_output_embeddings()(decoder.hidden(rows))
    assert not torch.allclose(plain, expected, rtol=0.05), "there was something to do"


def test_a_model_whose_logits_are_otherwise_is_refused() -> None:
    model, _ = pico("llama")
    model.config.logits_scaling = 3.0  # which LLaMA does not know
    with pytest.raises(ModelError, match="the model's logits: got '.* away from', expected those it computes"):
        Decoder(model)


def test_progress_counts_questions_and_none_has_no_answer() -> None:
    model, tokenizer = pico("gpt2")
    seen: list[int] = []
    predict(Decoder(model), asks(tokenizer), 40, seen.append)
    assert sum(seen) == 6
    assert predict(Decoder(model), [], 40) == []
