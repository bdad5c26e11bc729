"""Many editors on as many models in one process, at the same time: each edits as it would alone."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pico_config
from hosted import STATE, Bench, clean_host, copies, modules, same
from pico import KINDS, pico
from pico_runs import place, prints, scores, settings
from torch import Tensor, nn

import sphere_plugin as sp
from sphere_plugin.editing import Editor
from sphere_plugin.editing.contexts import write_texts
from sphere_plugin.process import ONE_AT_A_TIME, muted
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.runner import start

Weights = dict[str, Tensor]

# What our own editor edits with: a method, and a restraint or none.
METHODS = {
    "MEMIT": {"base_method": "MEMIT"},
    "AlphaEdit": {"base_method": "AlphaEdit"},
    "RECT": {"base_method": "MEMIT", "rect": {"keep": 0.4}},
    "PRUNE": {"base_method": "MEMIT", "prune": {"base": 2.0}},
    "SPHERE": {"base_method": "AlphaEdit", "eta": 0.5, "alpha": 0.5},
    "SPHERE on MEMIT": {"base_method": "MEMIT", "eta": 0.5, "alpha": 0.8},
}
SUBJECTS = ("Eiffel Tower", "Leo Tolstoy", "Toyota Camry", "Jimi Hendrix", "Windows 95", "Colosseum")


def facts(number: int, count: int = 4) -> list[dict[str, str]]:
    """Facts that only the editor of this number edits."""
    subjects = [f"{SUBJECTS[(number + n) % len(SUBJECTS)]} {number}" for n in range(count)]
    targets = ("Rome", "piano", "Apple", "English", "guitar")
    return [
        {"prompt": f"What is known of {subject} is", "subject": subject, "target_new": targets[(number + n) % 5]}
        for n, subject in enumerate(subjects)
    ]


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each job returns; each has a thread of its own, and all begin at the same moment."""
    ready = threading.Barrier(len(jobs))

    def begun(job: Callable[[], Any]) -> Any:
        ready.wait(timeout=60)
        torch.set_num_threads(1)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(begun, job) for job in jobs]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    for host in clean_host(monkeypatch, tmp_path):
        sp.register()
        yield Bench(host, monkeypatch, tmp_path)


@pytest.fixture(autouse=True)
def often_switched() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---- 24 editors ----


def own(number: int) -> Callable[[], tuple[Weights, Any]]:
    """An editor of ours with a model, a seed, a method and facts of its own; the job edits two batches."""
    kind, method = KINDS[number % 4], list(METHODS)[number % len(METHODS)]
    model, tokenizer = pico(kind, seed=number)
    editor = Editor(model, tokenizer, _config(kind, method, number))

    def job() -> tuple[Weights, Any]:
        editor.apply(facts(number)[:2])
        report = editor.apply(facts(number)[2:])
        return copies(model), (editor.contexts.prefixes, report.aimed.losses.tolist())

    return job


def _config(kind: str, method: str, seed: int) -> Any:
    asked = dict(METHODS[method])
    if "rect" in asked:
        asked["rect"] = sp.RectConfig(**asked["rect"])
    if "prune" in asked:
        asked["prune"] = sp.PruneConfig(**asked["prune"])
    return pico_config(kind, seed=seed, v_num_grad_steps=3, **asked)


def through_easyedit(bench: Bench, number: int) -> Callable[[], tuple[Weights, Any]]:
    """The same through EasyEdit's BaseEditor: our own methods, or its methods with restraints."""
    kind, method = KINDS[number % 4], HOSTED[number // 4 % len(HOSTED)]
    if method in ("SPHERE", "RECT", "PRUNE"):
        editor = _ours(bench, kind, method, number)
    else:
        changes = {"rect": True} if number % 3 == 0 else {"prune": True} if number % 3 == 1 else {}
        editor = bench.editor(method, kind, seed=number, sphere=True, **changes, **LONG)

    def job() -> tuple[Weights, Any]:
        bench.edit(editor, facts(number, 2))
        return copies(editor.model), templates(editor)

    return job


LONG = {"context_template_length_params": [[14, 5]]}  # enough for EasyEdit to draw random numbers
HOSTED = ("ROME", "SPHERE", "MEMIT", "FT", "RECT", "PRUNE")


def _ours(bench: Bench, kind: str, method: str, number: int) -> Any:
    cls = {"SPHERE": sp.SphereHyperParams, "RECT": sp.RectHyperParams, "PRUNE": sp.PruneHyperParams}[method]
    bench.fresh()
    folder = bench.folder / f"{kind}-{number}"
    model, tokenizer = pico(kind, number)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = pico_config(kind, v_num_grad_steps=3, seed=number)
    names = ("layers", "rewrite_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module", "v_num_grad_steps")
    names += ("v_lr", "context_template_length_params", "mom2_n_samples", "mom2_update_weight", "seed")
    given = {name: getattr(config, name) for name in names}
    base = "AlphaEdit" if method == "SPHERE" else "MEMIT"
    given |= {"base_method": base, "nullspace_threshold": 0.5, "L2": 1.0}
    hparams = cls.from_mapping({"alg_name": method, "model_name": str(folder), "device": "cpu", **given})
    return sys.modules["easyeditor"].BaseEditor.from_hparams(hparams)


def templates(editor: Any) -> Any:
    """What the editor's method writes its facts behind."""
    if hasattr(editor.apply_algo, "editor"):
        return editor.apply_algo.editor.contexts.prefixes
    kept = getattr(editor.apply_algo.turns, "_kept", {})
    return [value for (_, name), value in sorted(kept.items()) if name == "CONTEXT_TEMPLATES_CACHE" and value]


def alike(one: Sequence[tuple[Weights, Any]], other: Sequence[tuple[Weights, Any]]) -> None:
    for number, ((weights, told), (expected, told_then)) in enumerate(zip(one, other, strict=True)):
        assert told == told_then, f"editor {number}"
        assert same(weights, expected), f"editor {number}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Weights, Any]]:
    """What 24 editors of ours do, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return [own(number)() for number in range(24)]


@pytest.mark.parametrize("cached", [False, True], ids=["statistics counted at once", "statistics in the cache"])
def test_24_editors_edit_24_models_in_threads_as_each_does_alone(
    cached: bool, alone: list[tuple[Weights, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property
) -> None:
    record_property("editors", 24)
    if not cached:
        monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "empty"))
    state = torch.get_rng_state()
    alike(together([own(number) for number in range(24)]), alone)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the process's random numbers"
    prefixes = {told[0] for _, told in alone}
    assert len(prefixes) > 12, "models and seeds differ in what they write, so that a mixture would show"


def test_24_base_editors_of_easyedit_edit_in_threads_as_each_does_alone(bench: Bench, record_property) -> None:
    record_property("editors", 24)
    alone = []
    for number in range(24):
        alone.append(through_easyedit(bench, number)())
    jobs = [through_easyedit(bench, number) for number in range(24)]
    remembered = [{name: vars(module)[name] for name in STATE if name in vars(module)} for module in modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    alike(together(jobs), alone)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2]), "the main thread's random numbers are where they were"
    now = [{name: vars(module)[name] for name in STATE if name in vars(module)} for module in modules()]
    assert now == remembered, "what EasyEdit's own methods remember is not what editors with restraints do"
    table = bench.host.alg_dict
    assert all(type(entry).__name__ in ("Hooked", "SphereMethod") for entry in table.values())
    assert len({str(told) for _, told in alone}) > 6


def test_editors_are_made_in_threads_at_the_same_time(bench: Bench) -> None:
    """Loading, registering and looking a method up."""
    sp.unregister()
    places = []
    for number in range(8):
        model, tokenizer = pico(KINDS[number % 4], number)
        places.append(bench.folder / f"m{number}")
        model.save_pretrained(places[-1])
        tokenizer.save_pretrained(places[-1])

    def made(number: int) -> Weights:
        sp.register()
        model, _ = sp.load_model(str(places[number]), dtype=torch.bfloat16 if number % 2 else torch.float32)
        return copies(model)

    inits = (nn.init.normal_, nn.init.kaiming_uniform_)
    for number, weights in enumerate(together([lambda n=n: made(n) for n in range(8)])):
        expected = copies(pico(KINDS[number % 4], number)[0])
        dtype = torch.bfloat16 if number % 2 else torch.float32
        assert same(weights, {name: weight.to(dtype) for name, weight in expected.items()})
    assert torch.get_default_dtype() == torch.float32
    assert (nn.init.normal_, nn.init.kaiming_uniform_) == inits
    sp.unregister()
    assert not any(type(entry).__name__ == "Hooked" for entry in bench.host.alg_dict.values())


def test_our_editor_does_not_take_its_precision_from_what_others_load() -> None:
    """transformers changes torch's default dtype while it loads a model, for all threads."""
    expected = own(4)()
    job = own(4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        alike([job()], [expected])
    finally:
        torch.set_default_dtype(before)


# ---- EasyEdit's SimIE ----


@pytest.mark.usefixtures("bench")
def test_simie_in_threads_leaves_the_table_of_methods_to_the_others(bench: Bench) -> None:
    """It finds its base method in EasyEdit's table, where each editor's own session stands while it edits."""
    if "SimIE" not in bench.host.alg_dict:
        pytest.skip("EASYEDIT_HOME is not set: the PyPI release lacks the method")

    def simie(number: int) -> Callable[[], tuple[Weights, Any]]:
        editor = bench.editor(
            "SimIE", ("llama", "gpt2")[number % 2], seed=number, sphere={"alpha": 0.2 + number / 10}, **LONG
        )
        return lambda: (bench.edit(editor, facts(number, 2)), (copies(editor.model), None))[1]

    def rome(number: int) -> Callable[[], tuple[Weights, Any]]:
        editor = bench.editor("ROME", KINDS[number % 4], seed=number, sphere=True, **LONG)
        return lambda: (bench.edit(editor, facts(number, 2)), (copies(editor.model), None))[1]

    makers = [simie, rome] * 4
    table = dict(bench.host.alg_dict)
    alone = [make(number)() for number, make in enumerate(makers)]
    alike(together([make(number) for number, make in enumerate(makers)]), alone)
    assert dict(bench.host.alg_dict) == table


# ---- runs ----


def test_runs_in_threads_write_the_folders_that_each_writes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 4)
    hparams = place(tmp_path)
    entries = ("memit", "alphaedit+sphere", "rome+sphere", "rome", "rect", "ft")
    told = [settings(hparams, entry, edits=4, checkpoints=[], seed=n) for n, entry in enumerate(entries)]
    here = Path.cwd()
    for entry, one in zip(entries, told, strict=True):
        start(one, tmp_path / "alone" / entry)
    together(
        [
            lambda entry=entry, one=one: start(one, tmp_path / "together" / entry)
            for entry, one in zip(entries, told, strict=True)
        ]
    )
    assert Path.cwd() == here
    for entry in entries:
        alone, beside = tmp_path / "alone" / entry, tmp_path / "together" / entry
        assert prints(alone) == prints(beside) and scores(alone) == scores(beside), entry
        contexts = [_manifest(folder)["contexts"] for folder in (alone, beside)]
        assert contexts[0] == contexts[1], entry
        assert (beside / "logs" / "run.log").read_text().count("Instantiating model") <= 1, "of no other run"
    handlers = logging.getLogger("easyeditor.editors.editor").handlers
    assert not [one for one in handlers if str(tmp_path) in getattr(one, "baseFilename", "")]


def _manifest(folder: Path) -> Any:
    told = json.loads((folder / "manifest.json").read_text())
    return told.get("content", told)


# ---- what a process has one of ----


def test_a_thread_is_muted_alone(capsys: pytest.CaptureFixture[str]) -> None:
    inside, done = threading.Event(), threading.Event()

    def silent() -> None:
        with muted(errors=True):
            print("dropped")
            sys.stdout.writelines(["dropped\n"])
            print("dropped", file=sys.stderr)
            inside.set()
            done.wait(timeout=60)
        print("again")

    thread = threading.Thread(target=silent)
    thread.start()
    inside.wait(timeout=60)
    before = sys.stdout
    print("heard")
    print("heard as well", file=sys.stderr)
    assert sys.stdout.encoding, "anything else is the stream's own"
    done.set()
    thread.join()
    assert sys.stdout is not before
    out, err = capsys.readouterr()
    assert (out, err) == ("heard\nagain\n", "heard as well\n")
    with contextlib.redirect_stdout(io.StringIO()) as kept, muted():
        print("dropped")
    assert kept.getvalue() == ""


def test_a_stream_that_is_not_there_is_muted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with muted(errors=True):
        print("nowhere")
    assert sys.stdout is None and sys.stderr is None


def test_texts_are_what_the_process_would_have_drawn_after_the_same_seed() -> None:
    """Texts, and so statistics, are those of earlier versions, which seeded the process."""
    model, tokenizer = pico("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    written = write_texts(model, tokenizer, 3, 8, seed=7, openers=("The", "He"))
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.tensor([tokenizer([opener])["input_ids"][0] for opener in ("The", "He", "The")])
    torch.manual_seed(7)
    plain = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, top_k=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert written == tokenizer.batch_decode(plain, skip_special_tokens=True)
    jobs = [lambda: write_texts(model, tokenizer, 3, 8, seed=7, openers=("The", "He"))]
    assert together(jobs) == [written]


def test_a_turn_ends_where_it_raises(bench: Bench) -> None:
    editor = bench.editor("ROME", "llama", sphere=True)
    before = copies(editor.model)
    with pytest.raises(KeyError):
        editor.apply_algo(editor.model, editor.tok, [{"prompt": "{}"}], editor.hparams)
    assert same(before, copies(editor.model))
    free = together([lambda: ONE_AT_A_TIME.acquire(timeout=5) and ONE_AT_A_TIME.release() is None])
    assert free == [True], "another thread can have its turn"
    bench.edit(editor, facts(0, 1))
    assert not same(before, copies(editor.model))


def test_one_method_on_two_models_remembers_for_each_its_own(bench: Bench) -> None:
    """EasyEdit's methods would put the second model's facts behind texts that the first one wrote."""
    first = bench.editor("ROME", "llama", seed=1, sphere=True, **LONG)
    second = bench.editor("ROME", "llama", seed=2, sphere=True, **LONG)
    bench.edit(first, facts(1, 1))
    bench.edit(second, facts(2, 1))
    assert templates(first) and templates(second) and templates(first) != templates(second)
    kept = templates(first)
    bench.edit(first, facts(3, 1))
    assert templates(first) == kept, "written once for each"
