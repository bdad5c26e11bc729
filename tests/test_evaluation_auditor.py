"""What a live model's answers are worth: against itself, with other seeds, and with noise in a layer."""

from __future__ import annotations

import hashlib

import pytest
import torch
from pico import pico

from sphere_plugin.data import read_records
from sphere_plugin.evaluation.auditor import Auditor, ends_of
from sphere_plugin.evaluation.embeddings import embedder
from sphere_plugin.evaluation.paraphrases import Probe, edited, templated
from sphere_plugin.evaluation.responses import Sampling
from sphere_plugin.evaluation.uncertainty import growth, uncertainty
from sphere_plugin.models import load_model

SUBJECTS = ("Eiffel Tower", "Colosseum", "Leo Tolstoy", "Toyota Camry", "Windows 95", "Jimi Hendrix", "Rome")
PROBES = [
    Probe(k, f"{one} is", one, "a test", tuple(form.format(one) for form in ("{} is", "So {} is", "What is {}?")))
    for k, one in enumerate(SUBJECTS)
]


def hashed(texts):
    """Vectors of texts, as far from each other as random ones are."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) for text in texts]
    rows = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def totals(model, tokenizer, probes=PROBES, embed=hashed, **sampling) -> list[float]:
    auditor = Auditor(model, tokenizer, embed, Sampling(**{"tokens": 6, "temperature": 1.0, **sampling}))
    return [auditor.measure(probe).uncertainty.total for probe in probes]


def test_a_probe_is_the_uncertainty_of_its_answers() -> None:
    model, tokenizer = pico("llama")
    seen = []

    def embed(texts):
        seen.extend(texts)
        return hashed(texts)

    found = Auditor(model, tokenizer, embed, Sampling(samples=4, tokens=6)).measure(PROBES[0])
    assert found.uncertainty == uncertainty(hashed(seen).reshape(3, 4, 8))
    assert found.written == tuple(seen[::4])
    assert found.probe is PROBES[0]


def test_an_unedited_model_against_itself() -> None:
    model, tokenizer = pico("llama")
    first = totals(model, tokenizer)
    again = growth(first, totals(model, tokenizer))
    assert (again.value, again.low, again.high) == (0.0, 0.0, 0.0)
    reversed_order = totals(model, tokenizer, PROBES[::-1])[::-1]
    assert reversed_order == first
    other = growth(first, totals(model, tokenizer, seed=1))
    assert other.value != 0.0
    assert other.low <= 0.0 <= other.high


def test_a_text_ends_with_any_token_the_model_or_its_tokenizer_ends_with() -> None:
    model, tokenizer = pico("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert ends_of(model, tokenizer) == {7, 9, tokenizer.eos_token_id}


@pytest.mark.keeps_cache
def test_noise_in_one_layer_of_a_real_model_scores_clearly_higher() -> None:
    """Four facts the model knows, and short answers: at least a tenth more, as far as the interval goes."""
    model, tokenizer = load_model("smollm2-135m")
    capitals = [fact for fact in read_records() if fact.relation == "P36"][:4]
    probes = [probe for fact in capitals if (probe := edited(fact, templated))]
    ask = {"embed": embedder(), "temperature": 0.3, "tokens": 6, "samples": 3}
    before = totals(model, tokenizer, probes, **ask)
    with torch.no_grad():
        weight = model.get_submodule("model.layers.10.mlp.down_proj").weight
        weight += 3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    noisy = growth(before, totals(model, tokenizer, probes, **ask))
    assert noisy.low > 0.1
    assert noisy.value > 0.25
