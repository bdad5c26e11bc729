"""Tokenizers of every make: the lookup token, the target's tokens, prefixes and scores are right, or it is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pico as models_of_tests
import pytest
import torch
from conftest import pico_config
from generated import Tally, follow, good_texts, loss_with, said, share, spelled, state_at, texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sphere_plugin.data import Record
from sphere_plugin.editing import Editor
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.requests import read_request
from sphere_plugin.errors import ModelError, RequestError
from sphere_plugin.evaluation import Quality

MAKES = ("bytes", "bytes, space before", "bytes, trimmed", "sentencepiece", "llama 1", "unigram", "wordpiece", "words")
ENDS = ("nothing", "bos", "eos")
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
SIZE = 700  # tokens of each model


@cache
def tokenizer_of(make: str, ends: str = "nothing", names: frozenset[str] = frozenset(("bos", "eos", "pad"))) -> Any:
    """A fast tokenizer.

    Args:
        make: how it takes texts apart.
        ends: what it puts around a text.
        names: the special tokens it has a name for.
    """
    raw = Tokenizer.from_str(trained(make))
    marks = {"bos": "<s> $A", "eos": "$A </s>", "nothing": "$A"}[ends]
    around = processors.TemplateProcessing(
        single=marks, special_tokens=[(one, raw.token_to_id(one)) for one in SPECIAL]
    )
    trim = processors.ByteLevel(trim_offsets=True)
    raw.post_processor = processors.Sequence([trim, around]) if make == "bytes, trimmed" else around
    named = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    told = {f"{name}_token": token for name, token in named.items() if name in names}
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", model_max_length=256, **told)


@cache
def trained(make: str) -> str:
    """The tokenizer without its ends, as JSON."""
    space = pre_tokenizers.Metaspace(prepend_scheme="first")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=make == "bytes, space before")
    fallback = [f"<0x{n:02X}>" for n in range(256)]
    if make.startswith("bytes"):
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = bytes_, decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=sorted(bytes_.alphabet())
        )
    elif make in ("sentencepiece", "llama 1"):
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if make == "llama 1":
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            raw.pre_tokenizer = space
        last = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        raw.decoder = decoders.Sequence(last)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *fallback])
    elif make == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.normalizer, raw.pre_tokenizer, raw.decoder = normalizers.NFKC(), space, decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
    elif make == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        raw.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL)
    else:
        raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
        raw.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        raw.pre_tokenizer, trainer = pre_tokenizers.Whitespace(), trainers.WordLevelTrainer(special_tokens=SPECIAL)
    trainer.show_progress = False
    raw.train_from_iterator(models_of_tests._TEXT, trainer)
    return raw.to_str()


def model_for(tokenizer: Any, kind: str = "llama") -> Any:
    """A pico model that has an embedding for each of its tokens."""
    config = models_of_tests._config(kind, tokenizer)
    config.vocab_size = SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    return model.eval()


@cache
def editor_of(make: str, ends: str, names: frozenset[str], kind: str) -> Editor:
    """An editor that is ready, with two prefixes that the model has written."""
    tokenizer = tokenizer_of(make, ends, names)
    settings = {"context_template_length_params": [[4, 2]], "kl_factor": 0.0, "v_weight_decay": 0.0}
    config = pico_config(kind, **settings, v_num_grad_steps=3, nullspace_threshold=2.0 if kind == "llama" else 0.15)
    editor = Editor(model_for(tokenizer, kind), tokenizer, config)
    editor.prepare()
    return editor


NAMES = st.frozensets(st.sampled_from(("bos", "eos", "pad")))
FACTS = st.builds(
    lambda form, subject, target: {"prompt": form.replace("{}", subject), "subject": subject, "target_new": target},
    st.sampled_from(
        ("{} is in", "The {} is in", "{}", "Of {} and {}, the second is", "x{}y z", "In the {}, ", "({})")
    ),
    good_texts(),
    good_texts() | st.just("a b " * 30),
)


NOT_ENDING = st.sampled_from(("nothing", "bos"))
THREE = st.lists(good_texts(), min_size=3, max_size=3)


def covering(tokenizer: Any, prompt: str, subject: str) -> list[int]:
    """The tokens that cover a character of the last mention of the subject, character by character."""
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    start = prompt.rindex(subject)
    here = set(range(start, start + len(subject)))
    return [n for n, (first, past) in enumerate(encoded["offset_mapping"]) if here & set(range(first, past))]


def test_lookup_tokens_and_targets(record_property):
    """For each tokenizer: the token that looks a fact up, the ids before it, and the target's ids."""
    tally = Tally("tokenizers")
    tokens = ("subject_last", "subject_first", "subject_first_after_last", "last")

    @share(6.0)
    @given(st.sampled_from(MAKES), NOT_ENDING, NAMES, FACTS, texts(), st.sampled_from(tokens))
    def located(make: str, ends: str, names: frozenset[str], raw: dict[str, str], prefix: str, token: str) -> None:
        tokenizer = tokenizer_of(make, ends, names)
        prefix = "" if any(0xD800 <= ord(one) < 0xE000 for one in prefix) else prefix
        with tally.one():
            fact = read_request(raw, "request")
            sentence = Locator(tokenizer, token).aimed(fact, prefix)  # type: ignore[arg-type]
            ids, targets = follow(tokenizer, prefix + fact.prompt, fact.target)
            assert (list(sentence.ids), list(sentence.targets)) == (ids + targets[:-1], targets)
            offsets = tokenizer(prefix + fact.prompt, return_offsets_mapping=True)["offset_mapping"]
            own = covering(tokenizer, prefix + fact.prompt, fact.subject)
            text = [n for n, (first, past) in enumerate(offsets) if past > first]
            after = min(own[-1] + 1, text[-1])
            expected = dict(zip(tokens, (own[-1], own[0], after, text[-1]), strict=True))
            assert sentence.lookup == expected[token]
            assert ends == "nothing" or sentence.lookup > 0
            if make == "bytes" and token == "subject_last":  # which says its text again, token by token
                first = int(ends == "bos")
                sizes = [len(one) for one in spelled(tokenizer, ids[first:])]
                wanted = len((prefix + fact.before + fact.subject).encode())
                assert sentence.lookup == first + next(n for n in range(len(sizes)) if sum(sizes[: n + 1]) >= wanted)

    located()
    tally.told(record_property)


def test_edits_with_every_tokenizer(record_property):
    """Whole edits: the loss of an aimed target is that of plain passes behind the bare prompt and each prefix."""
    tally = Tally("tokenizers")

    @share(0.2)
    @given(st.sampled_from(MAKES), NOT_ENDING, NAMES, st.sampled_from(("llama", "gpt2")), FACTS)
    def edited(make: str, ends: str, names: frozenset[str], kind: str, raw: dict[str, str]) -> None:
        with tally.one():
            editor = editor_of(make, ends, names, kind)
            model, tokenizer, anatomy = editor.anatomy.model, editor.tokenizer, editor.anatomy
            assert not set(tokenizer.all_special_tokens) & set("".join(editor.contexts.prefixes).split())
            aimed = editor.aim([raw])
            fact = read_request(raw, "request")
            layer, losses = anatomy.decoder[editor.config.layers[-1]], []
            bare = covering(tokenizer, fact.prompt, fact.subject)[-1]
            moved = aimed.values[0] - state_at(model, layer, follow(tokenizer, fact.prompt, fact.target)[0], bare)
            for prefix in editor.contexts.prefixes:
                ids, targets = follow(tokenizer, prefix + fact.prompt, fact.target)
                place = covering(tokenizer, prefix + fact.prompt, fact.subject)[-1]
                losses.append(loss_with(model, layer, ids, targets, place, moved))
            expected = sum(losses) / len(losses)
            assert math.isclose(expected, float(aimed.losses[0]), rel_tol=1e-3, abs_tol=1e-3)
            try:
                editor.apply([raw], aimed)
                assert all(weight.isfinite().all() for weight in anatomy.weights.values())
            finally:
                editor.restore()

    with_quiet_log(edited)
    tally.told(record_property)


def test_scores_with_every_tokenizer(record_property):
    """Scores are those of a plain pass for each prompt, with and without tokens for padding and beginnings."""
    tally = Tally("tokenizers")
    text = "The tower is in the city of Paris. Water boils in Rome."

    @cache
    def model(make: str, ends: str, names: frozenset[str]) -> Any:
        return model_for(tokenizer_of(make, ends, names))

    @share(0.5)
    @given(
        st.sampled_from(MAKES),
        NOT_ENDING,
        NAMES,
        THREE,
    )
    def scored(make: str, ends: str, names: frozenset[str], given_: list[str]) -> None:
        (prompt, target, around), tokenizer = given_, tokenizer_of(make, ends, names)
        record = Record(prompt, prompt, target, (f"{prompt} {prompt}",), (around,))
        with tally.one():
            quality = Quality(model(make, ends, names), tokenizer, [record], text)
            scores = quality.score(1)
            rows = [said(quality.model, tokenizer, one, target) for one in (prompt, f"{prompt} {prompt}")]
            assert math.isclose(scores.efficacy[0], sum(rows[0]) / len(rows[0]))
            assert math.isclose(scores.generalization[0], sum(rows[1]) / len(rows[1]))
            assert scores.locality[0] == 1.0
            assert all(isinstance(one, str) for one in quality.texts([0], 3))

    scored()
    tally.told(record_property)


def test_prefixes_of_every_tokenizer(record_property):
    """As many as asked for, the same ones for a seed, and no special token in any."""
    tally = Tally("tokenizers")

    @share(0.2)
    @given(st.sampled_from(MAKES), NOT_ENDING, NAMES, st.integers(1, 5), st.integers(0, 9))
    def written(make: str, ends: str, names: frozenset[str], tokens: int, seed: int) -> None:
        tokenizer = tokenizer_of(make, ends, names)
        model = model_for(tokenizer)
        with tally.one(True):
            first, again = (Contexts.generate(model, tokenizer, [[tokens, 2], [2, 1]], seed) for _ in range(2))
            assert first == again
            assert (len(first.prefixes), first.prefixes[0]) == (4, "")
            assert math.isclose(sum(first.shares), 1.0)
            assert not any(mark in prefix for prefix in first.prefixes for mark in tokenizer.all_special_tokens)

    written()
    tally.told(record_property)


@pytest.mark.parametrize("make", MAKES)
def test_a_tokenizer_that_ends_texts_is_refused(make, record_property):
    tally = Tally("tokenizers")
    with tally.one(False):
        Locator(tokenizer_of(make, "eos"), "subject_last")
    tally.told(record_property)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_token_that_the_model_does_not_have_is_told_before_the_work(kind):
    """Tokens added to a tokenizer and not to its model."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained("bytes")), eos_token="</s>")
    editor = Editor(model_for(tokenizer, kind), tokenizer, pico_config(kind, nullspace_threshold=2.0))
    tokenizer.add_tokens([f"word{n}" for n in range(SIZE)])
    for raw in (
        {"prompt": "The word699 is", "subject": "word699", "target_new": "a"},
        {"prompt": "The tower is", "subject": "tower", "target_new": "word699 and a"},
        {"prompt": "The tower is", "subject": "tower", "target_new": "word699"},
    ):
        with pytest.raises(RequestError, match="the model has 700"):
            editor.apply([raw])
    record = Record("The word699 is", "word699", "a", (), ())
    with pytest.raises(RequestError, match="the model has 700"):
        Quality(editor.anatomy.model, tokenizer, [record], "Some words of text.")


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="a fast tokenizer"):
        Locator(object(), "subject_last")


def with_quiet_log(work: Callable[[], None]) -> None:
    """Lookup tokens at the beginning of a text are warned of, fact by fact."""
    log = logging.getLogger("sphere_plugin")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        work()
    finally:
        log.setLevel(level)
