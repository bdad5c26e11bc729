"""``with sp.journal(editor)``: SPHERE's edits and those of EasyEdit's own methods, taken back on the host found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosted import FACTS, Bench, changed, clean_host, copies, same, settings
from pico import pico, save_pico
from test_journal_store import keys_of
from torch import nn
from transformers import AutoModelForCausalLM

import sphere_plugin as sp
from sphere_plugin import CacheError, ConfigError, HostError, ModelError
from sphere_plugin.easyedit.host import Host, find_host
from sphere_plugin.easyedit.methods import METHODS
from sphere_plugin.journaling import Journal

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(KIND != "main", reason="EASYEDIT_HOME is not set: the PyPI release lacks the method")

# The PyPI release takes KN's edits back whatever it is told.
STANDING = {"main": ("FT", "ROME", "MEMIT", "PMET", "AlphaEdit", "ULTRAEDIT", "MEND", "KN", "SimIE")}.get(
    KIND, ("FT", "ROME", "MEMIT", "MEND")
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    yield from clean_host(monkeypatch, tmp_path)


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(host, monkeypatch, tmp_path)


def sphere_editor(bench: Bench, kind: str, **changes: Any) -> Any:
    """EasyEdit's editor for SPHERE on a saved pico model."""
    sp.register()
    folder = bench.folder / f"pico-{kind}"
    if not folder.exists():
        save_pico(kind, folder)
    pool = {
        **settings("SPHERE", kind, bench.folder),
        "model_name": str(folder),
        "lm_head_module": "lm_head",
        **changes,
    }
    keys = ("layers", "rewrite_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module", "v_num_grad_steps")
    keys += ("v_lr", "mom2_n_samples", "context_template_length_params", "nullspace_threshold", "L2", "model_name")
    chosen = {key: pool[key] for key in (*keys, *changes)}
    return bench.host.base_editor.from_hparams(
        sp.SphereHyperParams(**{"alg_name": "SPHERE", "device": "cpu", **chosen})
    )


def prompts(edits: list[Any]) -> list[list[str]]:
    return [[fact["prompt"] for fact in edit.facts] for edit in edits]


FIRST, SECOND, THIRD = ([fact["prompt"]] for fact in FACTS)


# ---- there and back ----


@pytest.mark.parametrize("method", STANDING)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("registered", [False, True], ids=["plain", "sphere"])
def test_edits_of_any_method_are_taken_back_to_the_bit(method: str, kind: str, registered: bool, bench: Bench) -> None:
    if registered:
        sp.register()
    editor = bench.editor(method, kind, **({"sphere": True} if registered else {}))
    apply, states = editor.apply_algo, [copies(editor.model)]
    with sp.journal(editor) as j:
        assert j.edits == []
        for fact in FACTS:
            bench.edit(editor, [fact])
            states.append(copies(editor.model))
            assert changed(states[-2], states[-1])
        assert prompts(j.edits) == [FIRST, SECOND, THIRD]
        assert prompts(j.undo()) == [THIRD]
        assert same(copies(editor.model), states[2])
        assert prompts(j.undo(2)) == [FIRST, SECOND]
        assert same(copies(editor.model), states[0]) and j.edits == []
        bench.edit(editor, FACTS[:1])
        kept = copies(editor.model)
        assert prompts(j.edits) == [FIRST]
        folder = j.folder
    assert editor.apply_algo is apply and same(copies(editor.model), kept) and not folder.exists()


@pytest.mark.parametrize("method", ["FT", "ROME", "KN"])
def test_what_easyedit_takes_back_itself_does_not_count(method: str, bench: Bench) -> None:
    editor = bench.editor(method, "llama")
    before = copies(editor.model)
    with sp.journal(editor) as j:
        bench.edit(editor, FACTS, keep=False)
        assert changed(before, bench.scored[-1]) and same(copies(editor.model), before)
        assert j.edits == [] and len(j.store) == 0
        with pytest.raises(ConfigError, match="expected an edit that is in the weights"):
            j.undo()
        if method == "KN" and KIND == "pypi":
            return
        bench.edit(editor, FACTS[:1])
        first = copies(editor.model)
        bench.edit(editor, FACTS[1:2], keep=False)
        bench.edit(editor, FACTS[2:])
        assert prompts(j.edits) == [FIRST, THIRD]
        j.undo()
        assert same(copies(editor.model), first)
        bench.edit(editor, FACTS[1:2], keep=False)
        j.undo()
        assert same(copies(editor.model), before)


@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sphere_with_and_without_keeping(base: str, kind: str, bench: Bench) -> None:
    threshold = 2.0 if kind == "llama" else 0.15
    editor = sphere_editor(bench, kind, base_method=base, nullspace_threshold=threshold)
    before = copies(editor.model)
    with sp.journal(editor) as j:
        bench.edit(editor, FACTS[:1])
        first = copies(editor.model)
        bench.edit(editor, FACTS[1:2], keep=False)
        assert same(copies(editor.model), first)
        bench.edit(editor, FACTS[1:2])
        second = copies(editor.model)
        bench.edit(editor, FACTS[2:])
        third = copies(editor.model)
        assert prompts(j.edits) == [FIRST, SECOND, THIRD]
        j.undo()
        assert same(copies(editor.model), second)
        kept = {"left", "right"} | ({"keys"} if base == "AlphaEdit" else set())
        assert keys_of(j.folder / "journal" / "000002.safetensors") == kept
        bench.edit(editor, FACTS[2:])  # the keys of what was taken back are forgotten, those before it are not
        for name, weight in copies(editor.model).items():
            torch.testing.assert_close(weight, third[name], rtol=0, atol=1e-4)
        j.undo(3)
        assert same(copies(editor.model), before)


@pytest.mark.parametrize("undone", [(2,), (1, 1), (2, 1), (1, 2), (3,)], ids=str)
def test_an_editor_knows_the_edits_that_stayed_and_no_others(
    undone: tuple[int, ...], bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    editor, other = (sphere_editor(bench, "llama", base_method="AlphaEdit") for _ in range(2))
    facts = [*FACTS, {**FACTS[0], "target_new": "London"}]
    for fact in (*facts[: 4 - sum(undone)], FACTS[2]):
        bench.edit(other, [fact])
    with sp.journal(editor) as j:
        for fact in facts:
            bench.edit(editor, [fact])
        for n in undone:
            j.undo(n)
        bench.edit(editor, [FACTS[2]])
    assert same(copies(editor.model), copies(other.model))
    assert "are forgotten" not in caplog.text


def test_after_somebody_elses_change_undo_leaves_known_what_was_edited_since(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The editor itself forgets what was there before such a change, and says so."""
    editor, other = (sphere_editor(bench, "llama", base_method="AlphaEdit") for _ in range(2))
    with sp.journal(editor) as j:
        for one in (editor, other):
            bench.edit(one, [FACTS[0]])
            with torch.no_grad():
                one.model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.01)
            bench.edit(one, [FACTS[1]])
        assert caplog.text.count("are forgotten") == 2
        bench.edit(editor, [FACTS[2]])
        j.undo()
        for one in (editor, other):
            bench.edit(one, [FACTS[2]])
    assert same(copies(editor.model), copies(other.model))
    assert caplog.text.count("are forgotten") == 2


def test_an_editor_that_was_made_anew_for_fewer_layers_takes_its_edits_back(bench: Bench) -> None:
    editor = sphere_editor(bench, "llama", base_method="AlphaEdit")
    before = copies(editor.model)
    with sp.journal(editor) as j:
        bench.edit(editor, FACTS[:1])
        editor.hparams.layers = editor.hparams.layers[:1]
        bench.edit(editor, FACTS[1:2])
        j.undo()
        assert prompts(j.undo()) == [FIRST]
        assert same(copies(editor.model), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("taken", [1, 2])
def test_master_copies_go_back_with_the_edits(
    taken: int, kind: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"base_method": "MEMIT", "bf16": True, "master_copy": True}
    editor, other = (sphere_editor(bench, kind, **settings) for _ in range(2))
    for fact in (*FACTS[: 3 - taken], FACTS[2]):
        bench.edit(other, [fact])
    with sp.journal(editor) as j:
        for fact in FACTS:
            bench.edit(editor, [fact])
        j.undo(taken)
        bench.edit(editor, [FACTS[2]])
    assert same(copies(editor.model), copies(other.model))
    assert same(editor.apply_algo.editor.masters, other.apply_algo.editor.masters)
    assert "master copies" not in caplog.text


def editor_and_expected(bench: Bench) -> tuple[Any, Any]:
    """An editor with master copies, and what it has to be after the first and the third fact."""
    settings = {"base_method": "MEMIT", "bf16": True, "master_copy": True}
    editor, other = (sphere_editor(bench, "llama", **settings) for _ in range(2))
    for fact in (FACTS[0], FACTS[2]):
        bench.edit(other, [fact])
    return editor, other


def test_master_copies_stay_where_easyedit_takes_an_edit_back(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    editor, other = editor_and_expected(bench)
    with sp.journal(editor) as j:
        bench.edit(editor, [FACTS[0]])
        kept = {name: copy.clone() for name, copy in j.method.editor.masters.items()}
        bench.edit(editor, [FACTS[1]], keep=False)
        assert prompts(j.edits) == [FIRST]
        assert same(j.method.editor.masters, kept)
        bench.edit(editor, [FACTS[2]])
    assert same(copies(editor.model), copies(other.model))
    assert "master copies" not in caplog.text


def test_an_edit_that_cannot_be_recorded_is_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, other = editor_and_expected(bench)
    with sp.journal(editor) as j:
        bench.edit(editor, [FACTS[0]])
        with monkeypatch.context() as full:
            full.setattr(j.store, "append", lambda *_, **__: (_ for _ in ()).throw(CacheError("disk", "full", "", "")))
            with pytest.raises(CacheError):
                bench.edit(editor, [FACTS[1]])
        bench.edit(editor, [FACTS[2]])
    assert same(copies(editor.model), copies(other.model))
    assert same(editor.apply_algo.editor.masters, other.apply_algo.editor.masters)


@pytest.mark.parametrize("number", ["1", 1.0, None, True, 0])
def test_edits_are_taken_back_in_whole_numbers(number: object, bench: Bench) -> None:
    editor = sphere_editor(bench, "llama", base_method="MEMIT")
    with sp.journal(editor) as j:
        bench.edit(editor, [FACTS[0]])
        with pytest.raises(
            ConfigError, match="the number of edits to take back: got .*, expected a number from 1 to 1"
        ):
            j.undo(number)
        assert len(j.edits) == 1


def test_a_batch_is_one_edit(bench: Bench) -> None:
    editor = sphere_editor(bench, "llama", batch_size=2)
    before = copies(editor.model)
    columns = {key: [fact[key] for fact in FACTS] for key in ("prompt", "target_new", "subject")}
    arguments = {"target_new": columns["target_new"], "subject": columns["subject"], "verbose": False}
    with sp.journal(editor) as j:
        editor.batch_edit(columns["prompt"], ground_truth=["Paris"] * 3, sequential_edit=True, **arguments)
        assert prompts(j.edits) == [FIRST + SECOND, THIRD]
        assert [j.store.record(number)["edits"] for number in (1, 2)] == [2, 3]
        j.undo()
        assert prompts(j.edits) == [FIRST + SECOND]
        j.undo()
        assert same(copies(editor.model), before)


def test_a_journal_changes_nothing_that_is_written(bench: Bench) -> None:
    plain = bench.editor("ROME", "llama")
    bench.edit(plain, FACTS)
    editor = bench.editor("ROME", "llama")
    with sp.journal(editor):
        bench.edit(editor, FACTS)
    assert same(copies(editor.model), copies(plain.model))


def test_what_somebody_else_writes_stays_or_goes_with_the_edits_before_it(bench: Bench) -> None:
    editor = bench.editor("FT", "llama")

    def meddle() -> None:
        with torch.no_grad():
            editor.model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)

    with sp.journal(editor) as j:
        before = copies(editor.model)
        bench.edit(editor, FACTS[:1])
        meddle()
        meddled = copies(editor.model)
        bench.edit(editor, FACTS[1:2])
        meddle()
        assert prompts(j.edits) == [FIRST, SECOND]
        assert [j.store.record(number).get("outside", False) for number in range(1, 5)] == [False, True, False, True]
        j.undo()
        assert same(copies(editor.model), meddled)
        assert (j.store.batch_at(1), j.store.batch_at(0)) == (2, 0), "what was changed before it stays"
        j.undo()
        assert same(copies(editor.model), before)


def test_a_method_that_fails_leaves_no_trace(bench: Bench, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, *_: object, **__: object) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
        raise KeyboardInterrupt

    editor = bench.editor("FT", "llama")
    editor.apply_algo = fails
    before = copies(editor.model)
    with sp.journal(editor) as j:
        with pytest.raises(KeyboardInterrupt):
            bench.edit(editor, FACTS[:1])
        assert same(copies(editor.model), before) and j.edits == []
    assert editor.apply_algo is fails


# ---- a folder that is kept ----


def test_a_kept_journal_is_for_undo_and_export(bench: Bench, tmp_path: Path) -> None:
    editor = sphere_editor(bench, "llama")
    before, folder = copies(editor.model), tmp_path / "kept"
    with sp.journal(editor, folder) as j:
        bench.edit(editor, FACTS[:1])
        first = copies(editor.model)
        bench.edit(editor, FACTS[1:2])
        second = copies(editor.model)
        delta = j.export(tmp_path / "x.safetensors", "delta")
        j.export(tmp_path / "live")
        with pytest.raises(CacheError, match="held by process"):
            sp.undo(folder, 0)
        bench.edit(editor, FACTS[2:], keep=False)
    assert delta.edits == 2 and len(Journal.open(folder / "journal")) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "live")
    assert same(copies(model), second)
    sp.apply_delta(model, delta.path, revert=True)
    assert same(copies(model), before)
    assert sp.undo(folder, 1).batches == 1
    sp.export(folder, tmp_path / "exported")
    assert same(copies(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), first)
    assert "Eiffel Tower" in (tmp_path / "exported" / "README.md").read_text()
    for kept in (1, 0):  # what was taken back last would be left without the weights it began with
        sp.undo(folder, kept)
        with pytest.raises(ConfigError, match="expected a folder without one"), sp.journal(editor, folder):
            pass
    assert (folder / "undone" / "2").is_dir() and len(Journal.open(folder / "journal")) == 0


def test_a_fact_without_a_subject_has_none(bench: Bench) -> None:
    editor = bench.editor("FT", "llama")
    with sp.journal(editor) as j:
        editor.edit(["The capital of France is"], ["Rome"], sequential_edit=True, verbose=False)
        assert [fact["subject"] for fact in j.edits[0].facts] == [""]


# ---- what is refused ----


@pytest.mark.parametrize("method", [name for name, what in METHODS.items() if what.writes in ("nothing", "adapter")])
def test_methods_without_weights_are_named(method: str, bench: Bench) -> None:
    editor = bench.editor("FT", "llama")
    editor.alg_name = method
    apply, why = editor.apply_algo, METHODS[method].why_not or "it trains an adapter"
    with pytest.raises(ConfigError, match=f"a journal of {method}: got '{why}"), sp.journal(editor):
        pass
    assert editor.apply_algo is apply


def test_unknown_methods_and_journals_in_journals_are_refused(bench: Bench) -> None:
    editor = bench.editor("FT", "llama")
    with sp.journal(editor), pytest.raises(ConfigError, match="got 'one with a journal'"), sp.journal(editor):
        pass
    editor.alg_name = "NEW"
    with pytest.raises(ConfigError, match="a journal of NEW: got 'an unknown method'"), sp.journal(editor):
        pass


def test_another_model_or_other_layers_are_refused(bench: Bench) -> None:
    editor = bench.editor("FT", "llama")
    with sp.journal(editor) as j:
        own = editor.model
        editor.model = pico("llama", 1)[0]
        with pytest.raises(ModelError, match="expected the model the journal was opened on"):
            bench.edit(editor, FACTS[:1])
        editor.model = own
        editor.hparams.layers = [1, 2, 3]
        with pytest.raises(ModelError, match=r"got 'model\.layers\.3\.mlp\.down_proj\.weight'"):
            bench.edit(editor, FACTS[:1])
        editor.hparams.layers = [1]
        bench.edit(editor, FACTS[:1])
        for n in (0, 2):
            with pytest.raises(ConfigError, match=f"got {n}, expected a number from 1 to 1"):
                j.undo(n)


@only_on_main
def test_easyedits_own_sphere_without_ours(bench: Bench, host: Host) -> None:
    editor = bench.editor("FT", "llama")
    editor.alg_name = "SPHERE"
    with sp.journal(editor) as j:
        assert set(j.store.names) == {f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)}


def test_the_name_is_the_function_whatever_is_imported() -> None:
    for module in pkgutil.walk_packages(sp.__path__, "sphere_plugin."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert callable(sp.journal) and callable(sp.undo) and callable(sp.export)
