"""Key statistics: what is counted, over which text, and when a file of the cache may be used."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, pico_config
from pico import KINDS, pico
from torch import Tensor

import sphere_plugin as sp
from sphere_plugin import ConfigError, EditingConfig, Editor, ModelError
from sphere_plugin.editing import statistics, unfinished
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.contexts import write_texts
from sphere_plugin.editing.corpus import read_corpus
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.files import write_tensors

PARAGRAPHS = (
    "The Eiffel Tower is in the city of Paris, the capital of France.",
    "Toyota Camry is produced by Toyota.",
    'He said: "Water boils at 100 degrees, doesn\'t it?" - and 3 + 4 = 7. It was a long text, and it went on and on.',
    "A",
    "Jimi Hendrix was known for the guitar (1942-1970);\nThelonious Monk plays the piano.",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of five paragraphs."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where statistics go."""
    return tmp_path / "statistics"


def moments(kind: str, config: EditingConfig, seed: int = 0, change: str = "") -> dict[int, Tensor]:
    """Key moments of a fresh pico model, after ``change`` was added to (0.1 of noise) one of its parameters."""
    model, tokenizer = pico(kind, seed)
    if change:
        with torch.no_grad():
            weight = model.get_parameter(change)
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return key_moments(Anatomy.of(model, config), tokenizer, config)


def one_text_at_a_time(kind: str, texts: list[str], layers: list[int]) -> dict[int, Tensor]:
    """E[kkᵀ] in float64 over all tokens but each text's first: no batches, no padding."""
    model, tokenizer = pico(kind)
    layer, rewrite, _ = TEMPLATES[kind]
    keys: dict[int, list[Tensor]] = {number: [] for number in layers}
    for number in layers:
        module = model.get_submodule(f"{layer}.{rewrite}".format(number))
        module.register_forward_pre_hook(lambda _, args, number=number: keys[number].append(args[0][0, 1:].double()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    return {number: torch.cat(rows).T @ torch.cat(rows) / len(torch.cat(rows)) for number, rows in keys.items()}


def count_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, counting fails the test."""

    def reached(*_: object, **__: object) -> None:
        pytest.fail("the statistics were counted, not taken from the cache")

    monkeypatch.setattr(statistics._Counter, "add", reached)
    monkeypatch.setattr(statistics, "read_corpus", reached)


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


# ---- what is counted ----


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_a_plain_loop_over_the_texts(
    kind: str, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 100)  # several batches, and padding in them
    config = pico_config(kind, layers=[1, 3], mom2_dataset=str(text), stats_dir=str(folder))
    expected = one_text_at_a_time(kind, list(PARAGRAPHS), [1, 3])
    counted = moments(kind, config)
    assert list(counted) == [1, 3]
    for layer, moment in counted.items():
        assert moment.dtype == torch.float32 and moment.shape == expected[layer].shape
        assert (moment - expected[layer]).norm() < 1e-5 * expected[layer].norm()


def test_moments_of_generated_text_are_those_of_a_plain_loop_over_it(folder: Path) -> None:
    config = pico_config("llama", mom2_n_samples=5, seed=3, stats_dir=str(folder))
    texts = write_texts(*pico("llama"), 5, 64, seed=3)
    expected = one_text_at_a_time("llama", texts, [1, 2])
    for layer, moment in moments("llama", config).items():
        assert (moment - expected[layer]).norm() < 1e-5 * expected[layer].norm()


def test_no_more_texts_are_read_than_asked_for(text: Path, folder: Path) -> None:
    config = pico_config("gpt2", mom2_dataset=str(text), mom2_n_samples=2, stats_dir=str(folder))
    expected = one_text_at_a_time("gpt2", list(PARAGRAPHS[:2]), [1, 2])
    for layer, moment in moments("gpt2", config).items():
        assert (moment - expected[layer]).norm() < 1e-5 * expected[layer].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_longer_than_the_models_context_is_cut(kind: str, tmp_path: Path, folder: Path) -> None:
    """GPT-2 has no position beyond its context and used to fail with an IndexError."""
    text = tmp_path / "long.txt"
    text.write_text("Water boils at 100 degrees. " * 100, encoding="utf-8")
    _, tokenizer = pico(kind)
    cut = tokenizer.decode(tokenizer(text.read_text())["input_ids"][:256], skip_special_tokens=True)
    assert len(tokenizer(cut)["input_ids"]) == 256
    expected = one_text_at_a_time(kind, [cut], [1, 2])
    for layer, moment in moments(kind, pico_config(kind, mom2_dataset=str(text), stats_dir=str(folder))).items():
        assert (moment - expected[layer]).norm() < 1e-5 * expected[layer].norm()


def test_half_precision_keys_are_summed_in_full(text: Path, folder: Path) -> None:
    model, tokenizer = pico("llama")
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    counted = key_moments(Anatomy.of(model.to(torch.bfloat16), config), tokenizer, config)
    for layer, expected in one_text_at_a_time("llama", list(PARAGRAPHS), [1, 2]).items():
        assert counted[layer].dtype == torch.float32
        assert (counted[layer] - expected).norm() < 0.05 * expected.norm()


def test_texts_of_one_token_have_nothing_to_count(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A\n\nI", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokens for key statistics: got 0, expected more than 96.*mom2_dataset"):
        moments("gpt2", pico_config("gpt2", mom2_dataset=str(path), stats_dir=str(folder)))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_too_little_text_for_memit_is_refused_before_it_is_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(PARAGRAPHS[0], encoding="utf-8")
    monkeypatch.setattr(statistics._Counter, "add", lambda *_: pytest.fail("the text was read"))
    config = pico_config("llama", base_method="MEMIT", mom2_dataset=str(path), stats_dir=str(folder))
    with pytest.raises(ModelError, match=r"tokens for key statistics: got \d+, expected more than 64.*mom2_n_samples"):
        moments("llama", config)


def test_too_little_text_for_alphaedit_is_warned_about(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(PARAGRAPHS[0], encoding="utf-8")
    moments("llama", pico_config("llama", mom2_dataset=str(path), stats_dir=str(folder)))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "more than 64" in record.getMessage()


def test_keys_that_are_not_finite_are_refused_and_not_kept(text: Path, folder: Path) -> None:
    model, tokenizer = pico("llama")
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"keys of layer 2: got 'NaN or infinity'.*float32"):
        key_moments(Anatomy.of(model, config), tokenizer, config)
    assert not folder.exists() or not list(folder.iterdir())


def test_no_hook_stays_behind(text: Path, folder: Path) -> None:
    model, tokenizer = pico("llama")
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    key_moments(Anatomy.of(model, config), tokenizer, config)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---- the cache ----


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_second_call_counts_nothing(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pico_config(kind, stats_dir=str(folder))
    first = moments(kind, config)
    count_forbidden(monkeypatch)
    assert same(moments(kind, config), first)
    other_settings = pico_config(kind, base_method="MEMIT", alpha=0.1, v_lr=0.1, L2=3.0, stats_dir=str(folder))
    assert same(moments(kind, other_settings), first)


def test_by_default_files_go_to_the_cache_folder(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    moments("llama", pico_config("llama", mom2_dataset=str(text)))
    (path,) = (tmp_path / "cache" / "statistics").iterdir()
    assert path.suffix == ".safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


OTHER = {
    "a weight below the edited layers": {"change": "model.layers.0.self_attn.q_proj.weight"},
    "the edited weight of a lower layer": {"change": "model.layers.1.mlp.down_proj.weight"},
    "a weight that is not a matrix": {"change": "model.layers.2.input_layernorm.weight"},
    "the embeddings": {"change": "model.embed_tokens.weight"},
    "another model": {"seed": 1},
    "other layers": {"layers": [1, 3]},
    "fewer layers": {"layers": [1]},
    "another number of texts": {"mom2_n_samples": 3},
}
OTHER_GENERATED = {
    **OTHER,
    "the head, which writes the text": {"change": "lm_head.weight"},
    "another seed": {"mom2_seed": 1},
}


@pytest.mark.parametrize(
    ("source", "what"), [*(("text", what) for what in OTHER), *(("generated", what) for what in OTHER_GENERATED)]
)
def test_whatever_statistics_depend_on_makes_another_file(
    source: str, what: str, text: Path, folder: Path, tmp_path: Path
) -> None:
    settings = dict(OTHER_GENERATED[what])
    model = {name: settings.pop(name) for name in ("seed", "change") if name in settings}
    if "mom2_seed" in settings:
        settings["seed"] = settings.pop("mom2_seed")
    dataset = str(text) if source == "text" else "generated"
    first = moments("llama", pico_config("llama", mom2_dataset=dataset, stats_dir=str(folder)))
    config = pico_config("llama", **{"mom2_dataset": dataset, "stats_dir": str(folder), **settings})
    second = moments("llama", config, **model)
    assert len(list(folder.iterdir())) == 2
    config.stats_dir = str(tmp_path / "empty")
    assert same(second, moments("llama", config, **model))
    assert not same(first, second)


def test_another_configuration_of_the_same_weights_makes_another_file(text: Path, folder: Path) -> None:
    """Rotary settings are no weights: two variants of one model used to share a file."""
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    first = moments("llama", config)
    model, tokenizer = pico("llama")
    model.config.hidden_act = "gelu"
    variant = type(model)(model.config).eval()
    variant.load_state_dict(model.state_dict())
    second = key_moments(Anatomy.of(variant, config), tokenizer, config)
    assert len(list(folder.iterdir())) == 2 and not same(first, second)


def test_another_tokenizer_makes_another_file(text: Path, folder: Path) -> None:
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    first = moments("llama", config)
    model, _ = pico("llama")
    second = key_moments(Anatomy.of(model, config), pico("qwen2")[1], config)  # the same one, without "<s>"
    assert len(list(folder.iterdir())) == 2 and not same(first, second)


def test_the_same_path_with_another_text_makes_another_file(text: Path, folder: Path) -> None:
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    first = moments("llama", config)
    text.write_text("A new line starts here, and nothing is as it was.", encoding="utf-8")
    assert not same(moments("llama", config), first)
    assert len(list(folder.iterdir())) == 2


def test_the_same_bytes_read_as_json_make_another_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.txt").write_text('["Water boils at 100 degrees.", "A new line starts here"]')
    (tmp_path / "text.json").write_bytes((tmp_path / "text.txt").read_bytes())
    results = [
        moments("llama", pico_config("llama", mom2_dataset=str(tmp_path / name), stats_dir=str(folder)))
        for name in ("text.txt", "text.json")
    ]
    assert len(list(folder.iterdir())) == 2 and not same(*results)


def test_the_same_text_elsewhere_and_weights_above_the_edited_layers_change_nothing(
    text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moments("llama", pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder)))
    count_forbidden(monkeypatch)
    moved = text.rename(text.with_name("moved.txt"))
    config = pico_config("llama", mom2_dataset=str(moved), seed=5, stats_dir=str(folder))
    assert same(moments("llama", config), first)
    assert same(moments("llama", config, change="model.layers.3.mlp.down_proj.weight"), first)
    assert same(moments("llama", config, change="lm_head.weight"), first)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0b00010000
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    write_tensors(path, {"7": torch.eye(64)}, {})


@pytest.mark.parametrize("damage", [truncate, flip, empty, swap])
def test_a_damaged_file_is_counted_again_and_replaced(
    damage, text: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    first = moments("llama", config)
    (path,) = folder.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING, logger="sphere_plugin"):
        assert same(moments("llama", config), first)
    (record,) = caplog.records
    assert "key statistics are counted again" in record.getMessage() and str(path) in record.getMessage()
    count_forbidden(monkeypatch)
    assert same(moments("llama", config), first)


def test_an_editor_asks_for_its_statistics_once(text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(*pico("llama"), pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder)))
    editor.prepare()
    monkeypatch.setattr("sphere_plugin.editing.editor.key_moments", lambda *_: pytest.fail("asked again"))
    editor.prepare()
    editor.apply([{"prompt": "Water boils at", "subject": "Water", "target_new": "Paris"}])


# ---- text the model writes ----


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_is_the_same_for_the_same_seed_and_draws_nothing_from_the_global_state(kind: str) -> None:
    model, tokenizer = pico(kind)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state()), tokenizer.padding_side
    told: list[int] = []
    first = write_texts(model, tokenizer, 70, 8, seed=3, progress=told.append)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state()), tokenizer.padding_side) == before[1:]
    assert len(first) == sum(told) == 70
    torch.rand(5)
    assert write_texts(*pico(kind), 70, 8, seed=3) == first
    assert write_texts(model, tokenizer, 70, 8, seed=4) != first
    assert len(set(first)) > 60


@pytest.mark.parametrize("kind", KINDS)
def test_generated_texts_begin_with_their_openers_and_hold_no_special_token(kind: str) -> None:
    model, tokenizer = pico(kind)
    texts = write_texts(model, tokenizer, 6, 8, seed=0, openers=("The", "Because", "He said it"))
    for text, opener in zip(texts, ("The", "Because", "He said it") * 2, strict=True):
        assert text.startswith(opener) and len(text) > len(opener)
        assert not any(token in text for token in ("<s>", "</s>", "<pad>"))


def test_padding_is_no_part_of_generated_texts_even_where_no_token_is_special() -> None:
    model, tokenizer = pico("gpt2")

    class Plain:
        pad_token_id = eos_token_id = None

        def __call__(self, texts: list[str]) -> object:
            return tokenizer(texts)

        def batch_decode(self, rows: object, skip_special_tokens: bool) -> list[str]:
            assert skip_special_tokens
            return tokenizer.batch_decode(rows)

    openers = ("The", "Because it was said", "I")
    texts = write_texts(model, Plain(), 3, 4, seed=0, openers=openers)
    assert all(text.startswith(opener) for text, opener in zip(texts, openers, strict=True))


# ---- where text comes from ----


def read(source: Path | str, number: int = 100) -> list[str]:
    return read_corpus(str(source), number, *pico("llama"), seed=0)


SOURCES = {
    "paragraphs.txt": "one\nand a half\n\n\n\ntwo\n\n   \n\nthree\n",
    "no_suffix": "one\nand a half\n\n\n\ntwo\n\nthree",
    "strings.json": json.dumps(["one\nand a half", "two", "three"]),
    "records.json": json.dumps([{"text": "one\nand a half"}, {"passage": "two"}, {"id": 3, "prompt": "three"}]),
    "records.jsonl": '{"text": "one\\nand a half"}\n{"document": "two"}\n\n{"content": "three"}\n',
    "strings.jsonl": '"one\\nand a half"\n"two"\n"three"',
}


@pytest.mark.parametrize("name", SOURCES)
def test_text_is_read_from_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SOURCES[name], encoding="utf-8")
    texts = [text.strip() for text in read(tmp_path / name)]
    assert texts == ["one\nand a half", "two", "three"]
    assert [text.strip() for text in read(tmp_path / name, 2)] == texts[:2]


NO_TEXT = {
    "empty.txt": b"",
    "blank.txt": b" \n\n \t\n\n",
    "empty.json": b"[]",
    "empty.jsonl": b"\n\n",
    "numbers.json": b"[1, 2, 3]",
    "no_known_field.jsonl": b'{"title": "one"}',
    # The keys of an object were once read as if they were the texts.
    "object.json": b'{"train": 1, "test": 2}',
    "number.json": b"7",
    "broken.json": b'["one", "two"',
    "broken.jsonl": b'{"text": "one"}\n{"text": ',
    "latin1.txt": "élan".encode("latin-1"),
    "latin1.jsonl": '{"text": "élan"}'.encode("latin-1"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_file_without_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(NO_TEXT[name])
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert message.startswith("mom2_dataset: got ") and name in message and "mom2_dataset: generated" in message


def test_the_editor_passes_the_refusal_on_with_the_weights_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    model, tokenizer = pico("llama")
    editor = Editor(model, tokenizer, pico_config("llama", mom2_dataset=str(tmp_path / "empty.txt")))
    with pytest.raises(ConfigError, match="mom2_dataset"):
        editor.apply([{"prompt": "Water boils at", "subject": "Water", "target_new": "Paris"}])
    assert all(torch.equal(editor.anatomy.weights[name], one) for name, one in editor.pretrained.tensors.items())


class Stream:
    """Stands in for a streamed dataset; fails behind its last record if ``error`` is given."""

    def __init__(self, records: list[dict[str, str]], error: Exception | None = None) -> None:
        self.records, self.error, self.read = records, error, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for record in self.records:
            self.read += 1
            yield record
        if self.error is not None:
            raise self.error


def datasets_with(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.load_dataset", load)


def test_a_named_dataset_is_streamed_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, asked = Stream([{"text": str(number)} for number in range(10)]), []

    def load(*names: str, **options: object) -> Stream:
        asked.append((names, options))
        return stream

    datasets_with(monkeypatch, load)
    assert read("wikitext", 3) == ["0", "1", "2"]
    assert asked == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})]
    assert stream.read <= 4
    read("somebody/something", 1)
    assert asked[1][0] == ("somebody/something",)


@pytest.mark.parametrize("error", [ConnectionError("no route to the hub"), OSError(), ValueError("no such dataset")])
@pytest.mark.parametrize("when", ["at once", "while streaming"])
def test_a_dataset_that_cannot_be_fetched_is_refused_with_the_remedy(
    when: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: str, **__: object) -> Stream:
        if when == "at once":
            raise error
        return Stream([{"text": "one"}], error)

    datasets_with(monkeypatch, load)
    with pytest.raises(ConfigError) as caught:
        read("wikipedia")
    message = str(caught.value)
    assert message.startswith("mom2_dataset: got 'wikipedia'") and "mom2_dataset: generated" in message
    assert (str(error) or "OSError") in message


def test_a_dataset_without_the_datasets_library_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is no requirement of this package."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"mom2_dataset: got 'wikipedia'.*datasets.*mom2_dataset: generated"):
        read("wikipedia")


# ---- statistics that EasyEdit has counted ----


def counted_by_easyedit(path: Path, keys: Tensor) -> None:
    """What EasyEdit's layer_stats leaves behind: a CombinedStat of one SecondMoment, saved by its own code."""
    from sphere_plugin.easyedit.host import load_host

    try:
        load_host()
    except sp.HostError as error:
        pytest.skip(str(error))
    stats = sys.modules["easyeditor.util.runningstats"]
    moment = stats.SecondMoment()
    for part in keys.split(7):
        moment.add(part)
    stats.save_cached_state(str(path), stats.CombinedStat(mom2=moment), {"sample_size": len(keys)})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_of_easyedit_are_read(kind: str, tmp_path: Path) -> None:
    width = 64 if kind == "llama" else 96
    keys = {layer: torch.randn(200, width, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
    for layer, rows in keys.items():
        counted_by_easyedit(tmp_path / f"layer.{layer}_float32_mom2_200.npz", rows)
    got = moments(kind, pico_config(kind, mom2_dataset=str(tmp_path / "layer.{}_float32_mom2_200.npz")))
    assert got.keys() == keys.keys()
    for layer, rows in keys.items():
        expected = (rows.double().T @ rows.double() / 200).float()
        assert (got[layer] - expected).norm() / expected.norm() < 1e-5


def test_an_edit_with_statistics_of_easyedit(tmp_path: Path) -> None:
    for layer in (1, 2):
        rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(layer))
        np.savez(tmp_path / f"{layer}.npz", **{"mom2.mom2": (rows.T @ rows).numpy(), "mom2.count": np.int64(200)})
    model, tokenizer = pico("llama")
    config = pico_config("llama", base_method="MEMIT", mom2_dataset=str(tmp_path / "{}.npz"))
    report = Editor(model, tokenizer, config).apply(
        [{"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}]
    )
    assert all(layer.update_norm > 0 for layer in report.layers)


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "not an archive",
        "other keys",
        "another model",
        "no tokens",
        "NaN",
        "empty",
        "one array",
        "text",
        "two counts",
        "no end of tokens",
    ],
)
def test_statistics_that_cannot_be_used_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    for layer in (1, 2):
        path = tmp_path / f"{layer}.npz"
        total, count = (
            np.eye(32 if fault == "another model" else 64, dtype=np.float32),
            0 if fault == "no tokens" else 9,
        )
        if fault == "NaN":
            total[0, 0] = np.nan
        total = np.array([["a"]]) if fault == "text" else total
        if fault in ("not an archive", "empty"):
            path.write_bytes(b"" if fault == "empty" else b"nothing of the kind")
        elif fault == "one array":
            with path.open("wb") as file:
                np.save(file, total)
        elif fault != "missing":
            name = "mean.mean" if fault == "other keys" else "mom2.mom2"
            counted = {"two counts": np.full(2, count), "no end of tokens": np.float64(np.inf)}
            np.savez(path, **{name: total, "mom2.count": counted.get(fault, np.int64(count))})
    with pytest.raises(ConfigError, match="mom2_dataset.*1.npz"):
        moments("llama", pico_config("llama", mom2_dataset=str(tmp_path / "{}.npz")))


def test_one_file_for_all_layers_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for the layer number"):
        moments("llama", pico_config("llama", mom2_dataset=str(tmp_path / "all.npz")))


# ---- a count that is stopped ----


class Stopped(BaseException):
    """What kills a count in these tests."""


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = statistics._Counter.add, []

    def add(self: statistics._Counter, rows: list[list[int]]) -> None:
        if len(calls) == batches:
            raise Stopped
        calls.append(rows)
        original(self, rows)

    monkeypatch.setattr(statistics._Counter, "add", add)


@pytest.mark.parametrize("source", ["text", "generated"])
def test_a_stopped_count_goes_on_and_ends_bit_for_bit_the_same(
    source: str, text: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 40)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    dataset = str(text) if source == "text" else source
    whole = moments("llama", pico_config("llama", mom2_dataset=dataset, stats_dir=str(tmp_path / "whole")))
    config = pico_config("llama", mom2_dataset=dataset, stats_dir=str(folder))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(1, patch)
        moments("llama", config)
    assert {path.name.partition(".")[2] for path in folder.iterdir()} == {"texts.json", "sums.safetensors"}
    read = []
    original = statistics._Counter.add
    monkeypatch.setattr(statistics, "read_corpus", lambda *_, **__: pytest.fail("the texts were got again"))
    monkeypatch.setattr(statistics._Counter, "add", lambda self, rows: (read.append(len(rows)), original(self, rows)))
    again = moments("llama", config)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[layer], whole[layer]) for layer in whole)
    assert 0 < sum(read) < (4 if source == "text" else 8)  # not all of them again
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    assert "sums" not in next(folder.iterdir()).name


@pytest.mark.parametrize("name", ["texts.json", "sums.safetensors"])
def test_a_damaged_remainder_is_as_good_as_none(
    name: str,
    text: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 40)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    whole = moments("llama", pico_config("llama", mom2_dataset=str(text), stats_dir=str(tmp_path / "whole")))
    config = pico_config("llama", mom2_dataset=str(text), stats_dir=str(folder))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(1, patch)
        moments("llama", config)
    (path,) = [path for path in folder.iterdir() if path.name.endswith(name)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    again = moments("llama", config)
    assert all(torch.equal(again[layer], whole[layer]) for layer in whole)
