"""Facts of any kind, edited into pico models: each is edited as a plain pass over the model says, or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import pico_config
from generated import (
    ODD,
    RTL,
    Tally,
    follow,
    good_texts,
    is_good,
    loss_with,
    mostly,
    said,
    share,
    spelled,
    state_at,
    texts,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from pico import KINDS, pico

from sphere_plugin.data import Record
from sphere_plugin.editing import Editor
from sphere_plugin.editing.requests import Fact, read_requests
from sphere_plugin.errors import SphereError
from sphere_plugin.evaluation import Quality
from sphere_plugin.geometry import Factors

CONTEXT = 256  # tokens, of pico models
PLAIN = {"context_template_length_params": [], "kl_factor": 0.0, "v_weight_decay": 0.0, "v_num_grad_steps": 3}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request; most can be edited. The subject may stand in the prompt, several times, not at all, or as {}."""
    subject = draw(mostly(good_texts(), texts()))
    long = draw(st.sampled_from((1, 1, 1, 1, 1, 8, 300)))
    subject = " ".join([subject] * long) if long > 1 else subject
    good = st.sampled_from(("{0}", "{0} is", "The {0} is in", "{{}} is in", "{0} is as {0} does", "In {0}"))
    other = texts().map(lambda text: text.replace("{", "").replace("}", "")) | st.just("{{}} and {{}}")
    form = draw(mostly(good, other))
    aims = good_texts() | st.just("a b " * 30) | st.sampled_from(("A", " Rome", {"str": "Rome"}))
    target = draw(mostly(aims, texts() | st.just({"id": "Q1"})))
    request = {"prompt": form.format(subject), "subject": subject, "target_new": target}
    if draw(st.integers(0, 9)) == 0:
        request[draw(st.sampled_from(("prompt", "subject", "target_new", "more")))] = draw(values())
    if draw(st.integers(0, 19)) == 0:
        del request[draw(st.sampled_from(sorted(request)))]
    return request


def as_fact(request: Any) -> Fact | None:
    """What a request means, read slowly; None if it means nothing."""
    if not isinstance(request, dict):
        return None
    target = request.get("target_new")
    target = target.get("str") if isinstance(target, dict) else target
    prompt, subject = request.get("prompt"), request.get("subject")
    if not (is_good(prompt) and is_good(subject) and is_good(target)):
        return None
    target = target if target[0] == " " else " " + target
    places = [n for n in range(len(prompt)) if prompt[n : n + 2] == "{}"]
    if len(places) > 1:
        return None
    if places:
        return Fact(prompt[: places[0]], subject, prompt[places[0] + 2 :], target)
    found = [n for n in range(len(prompt)) if prompt[n : n + len(subject)] == subject]
    return Fact(prompt[: found[-1]], subject, prompt[found[-1] + len(subject) :], target) if found else None


def test_requests_are_read_as_they_are_meant(record_property):
    tally = Tally("requests")

    @share(3.0)
    @given(mostly(st.lists(mostly(requests(), values(2)), max_size=4), values(4)))
    def read(given_: Any) -> None:
        facts = [as_fact(one) for one in given_] if isinstance(given_, list) else []
        with tally.one(bool(facts) and None not in facts):
            assert read_requests(given_) == facts

    read()
    tally.told(record_property)


def editors() -> dict[str, Editor]:
    """One of each kind, with what is counted once."""
    made = {}
    for kind in KINDS:
        model, tokenizer = pico(kind)
        changes = {"nullspace_threshold": 2.0 if kind in ("llama", "qwen2") else 0.15, **PLAIN}
        made[kind] = Editor(model, tokenizer, pico_config(kind, **changes))
        made[kind].prepare()
    return made


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in editor.anatomy.weights.items()}


def plain_loss(editor: Editor, fact: Fact, value: torch.Tensor) -> float:
    """Mean −log p of the target's tokens with the aimed value put where the subject ends."""
    tokenizer = editor.tokenizer
    ids, targets = follow(tokenizer, fact.prompt, fact.target)
    # A byte-level tokenizer says its text again: the first token by which the subject is whole is its last one.
    first = int(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    sizes, wanted = [len(one) for one in spelled(tokenizer, ids[first:])], len((fact.before + fact.subject).encode())
    last = first + next(n for n in range(len(sizes)) if sum(sizes[: n + 1]) >= wanted)
    model, layer = editor.anatomy.model, editor.anatomy.decoder[editor.config.layers[-1]]
    return loss_with(model, layer, ids, targets, last, value - state_at(model, layer, ids, last))


def test_facts_are_edited_or_refused(record_property):
    """Targets say what they say in a plain pass; weights are what the report adds up to, or bit for bit as before."""
    tally = Tally("requests")
    made = editors()
    before = {kind: weights_of(editor) for kind, editor in made.items()}

    @share(1.0)
    @given(st.sampled_from(KINDS), st.lists(requests(), min_size=1, max_size=3))
    def edited(kind: str, batch: list[dict[str, Any]]) -> None:
        editor, facts = made[kind], [as_fact(one) for one in batch]
        fits = None not in facts and all(
            len(editor.tokenizer(fact.prompt)["input_ids"]) + len(editor.tokenizer(fact.target)["input_ids"])
            < CONTEXT - 1
            for fact in facts
        )
        good = None not in facts and (fits or None)
        try:
            with tally.one(good):
                try:
                    report = editor.apply(batch)
                except SphereError:
                    for name, weight in editor.anatomy.weights.items():
                        assert torch.equal(weight, before[kind][name])
                    raise
                for number, fact in enumerate(facts):
                    loss = plain_loss(editor_before(editor, before[kind]), fact, report.aimed.values[number])
                    assert math.isclose(loss, float(report.aimed.losses[number]), rel_tol=1e-3, abs_tol=1e-3)
                assert report.aimed.values.isfinite().all()
        finally:
            editor.restore()

    edited()
    tally.told(record_property)


def editor_before(editor: Editor, weights: dict[str, torch.Tensor]) -> Editor:
    """The editor, its weights as they were when targets were aimed."""
    with torch.no_grad():
        for name, weight in editor.anatomy.weights.items():
            weight.copy_(weights[name])
    return editor


def test_what_is_written_is_what_is_reported(record_property):
    """W after = W before + the sum of the updates; the editor says which update, and puts everything back."""
    tally = Tally("requests")
    made = editors()
    before = {kind: weights_of(editor) for kind, editor in made.items()}
    facts = st.builds(
        lambda subject, target, twice: {
            "prompt": f"{subject} and {subject} are in" if twice else f"The {subject} is in",
            "subject": subject,
            "target_new": target,
        },
        st.sampled_from((*ODD, *RTL)).filter(lambda one: one not in ("{}", "{0}")) | good_texts(),
        good_texts(),
        st.booleans(),
    )

    @share(0.5)
    @given(st.sampled_from(KINDS), st.lists(st.lists(facts, min_size=1, max_size=2), min_size=1, max_size=3))
    def written(kind: str, batches: list[list[dict[str, str]]]) -> None:
        editor = made[kind]
        with tally.one(None if any(as_fact(one) is None for batch in batches for one in batch) else True):
            try:
                total = {name: weight.double() for name, weight in before[kind].items()}
                for batch in batches:
                    for layer, rewrite in zip(
                        editor.apply(batch).layers, editor.anatomy.rewrites.values(), strict=True
                    ):
                        update = layer.update.dense() if isinstance(layer.update, Factors) else layer.update
                        total[rewrite.name] += (update.T if rewrite.transposed else update).double()
                        assert math.isclose(layer.update_norm, float(update.norm()), rel_tol=1e-4, abs_tol=1e-6)
                        assert 0.0 <= layer.removed_share <= 1.0
                for name, weight in editor.anatomy.weights.items():
                    torch.testing.assert_close(
                        weight.double(), total[name], rtol=1e-4, atol=1e-5 * float(total[name].norm())
                    )
            finally:
                editor.restore()
        assert all(torch.equal(weight, before[kind][name]) for name, weight in editor.anatomy.weights.items())

    written()
    tally.told(record_property)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_those_of_one_pass_each(kind, record_property):
    """First choices and probabilities of any prompt and target, prompt by prompt; too long ones are refused."""
    tally = Tally("requests")
    model, tokenizer = pico(kind)
    text = "The tower is in the city. " * 4
    several = st.lists(mostly(good_texts(), texts() | st.just("a b " * 200)), max_size=2).map(tuple)

    def record(prompt: str, target: str, true: str, more: tuple[str, ...], around: tuple[str, ...]) -> Record:
        return Record(prompt, prompt, target, more, around, true)

    @share(0.5)
    @given(st.builds(record, good_texts(), good_texts(), st.just("") | good_texts(), several, several))
    def scored(one: Record) -> None:
        asked = (one.prompt, *one.paraphrases, *one.neighbours)
        wanted = len(tokenizer(one.target_new)["input_ids"])
        good = all(is_good(prompt) and len(tokenizer(prompt)["input_ids"]) + wanted < CONTEXT - 1 for prompt in asked)
        with tally.one(good or None):
            quality = Quality(model, tokenizer, [one], text, neighbours=None)
            scores = quality.score(1)
            rows = [said(model, tokenizer, prompt, one.target_new) for prompt in asked]
            share_right = [sum(row) / len(row) for row in rows]
            assert math.isclose(scores.efficacy[0], share_right[0])
            paraphrases = share_right[1 : 1 + len(one.paraphrases)]
            if paraphrases:
                assert math.isclose(scores.generalization[0], sum(paraphrases) / len(paraphrases))
            assert scores.locality[0] == (1.0 if one.neighbours else None)
            assert len(tokenizer(quality.texts([0], 5)[0])["input_ids"]) <= 6 * 4

    scored()
    tally.told(record_property)
