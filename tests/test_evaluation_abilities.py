"""General abilities of a live model: every task against a plain, slow computation, and the model left as it was."""

from __future__ import annotations

import logging
import math
import os
import random
import statistics
import string

import numpy as np
import pytest
import torch
from benchmark_files import EXAMPLES, FACTS, SAID, SUMS, TRUE, questions, taught, write_benchmarks
from pico import pico

from sphere_plugin.errors import ConfigError, HostError, ModelError, RequestError
from sphere_plugin.evaluation import abilities
from sphere_plugin.evaluation.abilities import HUB, LOCAL, PERPLEXITY, Suite
from sphere_plugin.evaluation.quiet import quiet
from sphere_plugin.files import fingerprint

TEXT = "Water boils at 100 degrees.\n\nThe Eiffel Tower is in the city of Paris, the capital of France.\n"
# Task -> how many tokens may be written, and where the text ends.
WRITTEN = {
    "gsm8k": (128, "\nQuestion:"),
    "gsm8k_given": (8, "\n"),
    "nq": (20, "\n"),
    "nq_given": (20, "\nQuestion:"),
    "boolq": (8, "\n"),
    "rte_written": (8, "\n"),
}


@pytest.fixture(scope="module")
def model():
    return taught()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def suite(folder):
    text = folder / "text.txt"
    text.write_text(TEXT)
    return Suite(list(LOCAL), folder, text=text, batch_size=4)


def written(model, tokenizer, prompt: str, most: int, until: str) -> str:
    """What a model writes with its first choices, one token and one whole pass at a time."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + most:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if ids[-1] == tokenizer.eos_token_id or until in text:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split(until)[0]


def bare(text: str) -> str:
    """As a human would compare it: small letters, no punctuation. No answer here has an article but one."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).replace("the ", " ").split())


def marks(name: str, texts: list[str]) -> list[float]:
    """Which of these answers are right."""
    if name.startswith("gsm8k"):
        last = [[part.strip("$.,") for part in text.replace("=", " ").split()] for text in texts]
        figures = [[part for part in parts if part.isdigit()] for parts in last]
        place = 0 if name.endswith("given") else -1
        pairs = zip(figures, SUMS, strict=True)
        return [float(bool(found) and int(found[place]) == sum(terms)) for found, terms in pairs]
    if name.startswith("nq"):
        wanted = [*SAID, *(answer for _, answer in EXAMPLES)][: len(texts)]
        right = (bare(answer) == bare(text) for answer, text in zip(wanted, texts, strict=True))
        inside = (f" {bare(answer)} " in f" {bare(text)} " for answer, text in zip(wanted, texts, strict=True))
        return [float(one) for one in (inside if name.endswith("given") else right)]
    pair = ("yes", "no") if name == "boolq" else ("true", "false")
    said = [next((word for word in bare(text).split() if word in pair), None) for text in texts]
    return [float(one == pair[0 if true else 1]) for one, true in zip(said, TRUE, strict=True)]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_marked_as_a_slow_reader_marks_it(suite, model, name) -> None:
    texts = [written(*model, prompt, *WRITTEN[name]) for prompt, _ in questions()[name]]
    expected = marks(name, texts)
    score = suite.measure(name, *model)
    assert list(score.records) == expected
    assert 0 < sum(expected) < len(expected)  # or the test would show nothing
    assert score.metric == "exact_match"
    assert score.value == pytest.approx(statistics.fmean(expected))
    assert score.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(len(expected)))
    assert score.cut == 0


def test_the_likelier_answer_is_the_one_that_sums_up_higher(suite, model) -> None:
    expected = []
    for (prompt, _), true in zip(questions()["rte"], TRUE, strict=True):
        sums = [_log_likelihood(*model, prompt, answer) for answer in (" true", " false")]
        expected.append(float((sums[0] > sums[1]) == true))
    score = suite.measure("rte", *model)
    assert list(score.records) == expected
    assert 0 < sum(expected) < len(expected)
    assert score.metric == "acc"
    assert score.value == pytest.approx(statistics.fmean(expected))
    assert score.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(len(expected)))


def _log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_perplexity_of_a_text(suite, model) -> None:
    network, tokenizer = model
    sums, counts = [], []
    for part in TEXT.strip().split("\n\n"):
        ids = tokenizer(part)["input_ids"]
        with torch.no_grad():
            logs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(-sum(float(logs[place, ids[place + 1]]) for place in range(len(ids) - 1)))
        counts.append(len(ids) - 1)
    score = suite.measure(PERPLEXITY, *model)
    assert score.value == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-5)
    assert score.records == pytest.approx([one / n for one, n in zip(sums, counts, strict=True)], rel=1e-5)


def test_the_same_twice_and_in_any_batches(suite, folder, model) -> None:
    alone = Suite(["nq", "rte"], folder, batch_size=1)
    for name in ("nq", "rte"):
        first, second = (suite.measure(name, *model).records for _ in range(2))
        assert first == second == alone.measure(name, *model).records


def test_a_limit_takes_the_first_records(suite, folder, model) -> None:
    few = Suite(["boolq", "nq"], folder, limit=2)
    assert few.measure("boolq", *model).records == suite.measure("boolq", *model).records[:2]
    assert [few.how(name)["records"] for name in few.names] == [2, 2]
    assert suite.how("nq")["records"] == 6  # five of the file's eleven are examples


def test_what_a_score_depends_on_is_told(suite, folder) -> None:
    how = suite.how("rte")
    assert how["task"] == "sphere_rte"
    assert how["version"] == "1.0"
    assert how["harness"].startswith("lm_eval 0.4.")
    assert how["file"] == "test-NLI.tsv"
    changed = folder.parent / "changed"
    write_benchmarks(changed)
    (changed / "test-NLI.tsv").write_text((changed / "test-NLI.tsv").read_text().replace("apples", "pears"))
    assert Suite(["rte"], changed).how("rte")["sha256"] != how["sha256"]


def test_prompts_that_do_not_fit_are_counted(folder, model, tmp_path) -> None:
    write_benchmarks(tmp_path)
    path = tmp_path / "test-ClosedDomainQA.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace("They say", "They say " + "so " * 300), *lines[1:]]))
    assert Suite(["boolq"], tmp_path).measure("boolq", *model).cut == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_and_all_random_states_are_left_as_they_were(folder, kind) -> None:
    model, tokenizer = pico(kind)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    model.train()
    model.get_submodule("model.layers.1" if kind == "llama" else "transformer.h.1").eval()
    modes = [module.training for module in model.modules()]
    names = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before, environment = fingerprint(model.named_parameters()), dict(os.environ)
    config, level = model.generation_config.to_dict(), logging.getLogger("lm_eval").level
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    suite = Suite(["nq", "rte"], folder, limit=2)
    for name in suite.names:
        suite.measure(name, model, tokenizer)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == names
    assert fingerprint(model.named_parameters()) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert model.generation_config.to_dict() == config
    assert dict(os.environ) == environment
    assert logging.getLogger("lm_eval").level == level


def test_nothing_is_printed(folder, model, capfd) -> None:
    suite = Suite(["gsm8k_given", "rte"], folder, limit=2)
    for name in suite.names:
        suite.measure(name, *model)
    assert capfd.readouterr() == ("", "")


def test_a_model_with_noise_in_it_scores_lower(suite, model) -> None:
    network, tokenizer = taught()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in network.model.layers:
            layer.mlp.down_proj.weight.add_(torch.randn_like(layer.mlp.down_proj.weight))
    for name in ("gsm8k", "nq"):
        assert suite.measure(name, network, tokenizer).value < suite.measure(name, *model).value


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"tasks": ["gsm9k"]}, "tasks"),
        ({"tasks": ["hub:"]}, "tasks"),
        ({"tasks": ["rte", "rte"]}, "tasks"),
        ({"tasks": ["rte"], "limit": 0}, "limit"),
        ({"tasks": ["rte"], "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(folder, arguments, culprit) -> None:
    with pytest.raises(ConfigError) as caught:
        Suite(**{"data": folder, **arguments})
    assert caught.value.culprit == culprit


def test_no_data_and_too_little_of_it(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="test-reasoning.jsonl"):
        Suite(["gsm8k"])
    write_benchmarks(tmp_path)
    path = tmp_path / "test-OpenDomainQA.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:5]))
    with pytest.raises(RequestError, match="5 records"):
        Suite(["nq"], tmp_path)
    assert Suite(["nq_given"], tmp_path).how("nq_given")["records"] == 5
    with pytest.raises(ConfigError, match="text file"):
        Suite([], text=tmp_path / "none.txt")


def test_a_missing_harness_is_named(folder, monkeypatch) -> None:
    monkeypatch.setattr(abilities, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(HostError, match=r"no lm_eval.*sphere-plugin\[abilities\]"):
        Suite(["rte"], folder)
    assert Suite([], text=folder / "text.txt").names == (PERPLEXITY,)  # which does not need it


# ---- the harness's own tasks ----


@pytest.fixture(scope="module")
def whole():
    """All of the harness's tasks; it reads thousands of files for that, so once is enough."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


@pytest.fixture
def harness(monkeypatch, whole):
    import lm_eval.tasks

    made = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: made(**given) if given else whole)
    return monkeypatch


def test_without_a_hub_its_tasks_say_so(harness, whole) -> None:
    import huggingface_hub.constants
    from datasets import config

    assert {*HUB, "gsm8k", "nq_open"} <= set(whole.all_tasks)
    for module in (huggingface_hub.constants, config):
        harness.setattr(module, "HF_HUB_OFFLINE", True)
    for name in ("sst2", "hub:gsm8k", "mmlu"):
        with pytest.raises(HostError, match=rf"the records of {name}.*hub"):
            Suite([name])
    with pytest.raises(ConfigError, match="lm_eval ls tasks"):
        Suite(["hub:there_is_no_such_task"])


def test_its_tasks_are_scored_where_their_records_are(harness, model) -> None:
    """One with a metric that is no mean, one that reads answers in two ways and draws examples, one that is many."""
    from datasets import Dataset, DatasetDict, load_dataset

    def records(path, name=None, **more):
        if path.endswith("glue"):
            made = [{"sentence": f"{fact}.", "label": int(true)} for fact, true in zip(FACTS, TRUE, strict=True)]
        elif path.endswith("gsm8k"):
            made = [{"question": f"{a}+{b}?", "answer": f"{a + b}\n#### {a + b}"} for a, b in SUMS]
        elif path == "cais/mmlu":
            made = [{"question": f"{a}+{b}?", "choices": [*"1234"], "subject": name, "answer": 2} for a, b in SUMS[:3]]
        else:
            return load_dataset(path, name, **more)
        return DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), Dataset.from_list(made)))

    harness.setattr("datasets.load_dataset", records)
    suite = Suite(["cola", "hub:gsm8k", "mmlu"], limit=6)
    cola = suite.measure("cola", *model)
    assert cola.metric == "mcc"
    said = [float(true == (one == 1.0)) for true, one in zip(TRUE, cola.records, strict=True)]
    labels = [float(true) for true in TRUE]
    together = np.corrcoef(labels, said)[0, 1] if len(set(said)) > 1 else 0.0
    assert cola.value == pytest.approx(together)
    with pytest.raises(ModelError, match="256 tokens that hub:gsm8k writes"):
        suite.measure("hub:gsm8k", *model)
    harness.setattr(model[0].config, "max_position_embeddings", 1024)
    gsm8k = suite.how("hub:gsm8k")
    assert (gsm8k["task"], gsm8k["version"], gsm8k["records"], gsm8k["seed"]) == ("gsm8k", "3.0", 6, 0)
    first, second = (suite.measure("hub:gsm8k", *model) for _ in range(2))
    assert first.records == second.records  # the same examples again
    assert len(first.records) == 6  # not one for each way of reading
    mmlu = suite.measure("mmlu", *model)
    assert suite.how("mmlu")["records"] == len(mmlu.records) == 57 * 3
    assert mmlu.metric == "acc"
    assert mmlu.value == pytest.approx(statistics.fmean(mmlu.records))
    assert mmlu.stderr is not None
