"""SPHERE inside EasyEdit, on the host that is found: the PyPI release, or a checkout where EASYEDIT_HOME is set."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REQUESTS, TEMPLATES
from pico import pico, save_pico
from torch import Tensor, nn
from transformers import PreTrainedModel

import sphere_plugin as sp
from sphere_plugin import ConfigError, Editor, HostError, PrincipalSpace, RequestError, SphereHyperParams
from sphere_plugin.easyedit.host import Host, find_host, load_host

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(KIND != "main", reason="EASYEDIT_HOME is not set: the PyPI release has no SPHERE")

FACTS = [
    *({**request, "prompt": request["prompt"].replace("{}", request["subject"])} for request in REQUESTS),
    {"prompt": "Toyota Camry is produced by", "subject": "Toyota Camry", "target_new": "Microsoft"},
]
PATCHED = ("__init__", "edit", "batch_edit")


@pytest.fixture(autouse=True, params=[KIND])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """The host, with nothing of ours in it before and after; what it logs goes to the test's own folder."""
    monkeypatch.chdir(tmp_path)
    host = load_host()
    assert host.kind == request.param
    sp.unregister()  # what ran before in this process, the demo say, may have left SPHERE registered
    log = sys.modules["easyeditor.editors.editor"].LOG
    handlers = list(log.handlers)
    yield host
    sp.unregister()
    for handler in [handler for handler in log.handlers if handler not in handlers]:
        log.removeHandler(handler)
        handler.close()


@pytest.fixture
def registered(host: Host) -> Host:
    return sp.register()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """folders(name, kind, seed=0) -> a folder of that name with a pico model in it; the host goes by the name."""
    made: dict[tuple[str, str, int], Path] = {}

    def folder(name: str, kind: str, seed: int = 0) -> Path:
        key = (name, kind, seed)
        if key not in made:
            made[key] = save_pico(kind, tmp_path_factory.mktemp("models") / name, seed)
        return made[key]

    return folder


def settings(kind: str, folder: Path, **changes: object) -> dict[str, Any]:
    """The keys of a YAML for a pico model."""
    layer, rewrite, norm = TEMPLATES[kind]
    keys = {
        "alg_name": "SPHERE",
        "model_name": str(folder),
        "device": "cpu",
        "layers": [1, 2],
        "rewrite_module_tmp": f"{layer}.{rewrite}",
        "layer_module_tmp": layer,
        "ln_f_module": norm,
        "lm_head_module": "lm_head",
        "v_num_grad_steps": 4,
        "v_lr": 0.5,
        "context_template_length_params": [[5, 2]],
        "mom2_n_samples": 8,
        "nullspace_threshold": 2.0 if kind in ("llama", "qwen2") else 0.15,
        "L2": 1.0,
    }
    return {**keys, **changes}


def hyperparams(kind: str, folder: Path, **changes: object) -> SphereHyperParams:
    """The same, through a YAML."""
    path = Path("pico.yaml")
    path.write_text(yaml.safe_dump(settings(kind, folder, **changes)))
    read = SphereHyperParams.from_hparams(path)
    path.unlink()
    return read


def columns(facts: list[dict[str, str]]) -> dict[str, Any]:
    """EasyEdit's arguments for ``facts``."""
    return {
        "prompts": [fact["prompt"] for fact in facts],
        "target_new": [fact["target_new"] for fact in facts],
        "subject": [fact["subject"] for fact in facts],
        "ground_truth": ["Paris"] * len(facts),
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edited_by_hand(hparams: SphereHyperParams, batches: list[list[dict[str, str]]]) -> list[dict[str, Tensor]]:
    """All weights after each of ``batches``, edited without EasyEdit."""
    editor = Editor(*sp.load_model(hparams.model_name), hparams.editing())
    steps = []
    for batch in batches:
        editor.apply(batch)
        steps.append(weights(editor.anatomy.model))
    return steps


@pytest.fixture
def scored(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights of the model each time EasyEdit scores it."""
    module, seen = sys.modules["easyeditor.editors.editor"], []
    original = module.compute_edit_quality

    def score(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append(weights(model))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(module, "compute_edit_quality", score)
    return seen


@pytest.fixture
def nothing_scored(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if EasyEdit begins to score or to edit."""

    def reached(*_: object, **__: object) -> None:
        pytest.fail("the host went to work before the mistake was reported")

    monkeypatch.setattr(sys.modules["easyeditor.editors.editor"], "compute_edit_quality", reached)
    monkeypatch.setattr(Editor, "apply", reached)


# ---- registering ----


def table(host: Host) -> tuple[Any, ...]:
    """Everything of EasyEdit's that registering touches, as the very objects that are there."""
    return (
        list(host.alg_dict.items()),
        vars(host.batch_editor)["is_batchable_method"],
        *(vars(host.base_editor)[name] for name in PATCHED),
    )


def unchanged(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    methods = [[(name, id(method)) for name, method in state[0]] for state in (one, other)]
    return methods[0] == methods[1] and all(a is b for a, b in zip(one[1:], other[1:], strict=True))


def test_registering_twice_is_registering_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        assert sp.register() == host
        once = table(host)
        assert sp.register() == host
    assert unchanged(table(host), once)
    said = [record.getMessage() for record in caplog.records if "registered" in record.getMessage()]
    assert len(said) == 1
    assert ("in place of EasyEdit's own, until unregister()" in said[0]) == (host.kind == "main")
    assert str(host.location) in said[0]


def test_unregistering_puts_back_the_very_objects_that_were_there(host: Host) -> None:
    before = table(host)
    sp.unregister()
    assert unchanged(table(host), before), "unregister() without a registration changed something"
    for _ in range(2):
        sp.register()
        assert not any(a is b for a, b in zip(table(host)[1:], before[1:], strict=True))
        sp.unregister()
        assert unchanged(table(host), before)
        sp.unregister()
        assert unchanged(table(host), before)
    assert ("SPHERE" in host.alg_dict) == (host.kind == "main")


@only_on_main
def test_easyedits_own_sphere_comes_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sys.modules["easyeditor.models.SPHERE.SPHERE_main"].apply_SPHERE_to_model
    monkeypatch.setitem(host.alg_dict, "a method behind it", own)
    place = list(host.alg_dict).index("SPHERE")
    sp.register()
    assert host.alg_dict["SPHERE"] is not own and list(host.alg_dict).index("SPHERE") == place
    sp.unregister()
    assert host.alg_dict["SPHERE"] is own and list(host.alg_dict).index("SPHERE") == place


def test_only_sphere_becomes_batchable(host: Host) -> None:
    methods = [*host.alg_dict, "no such method"]
    before = {name: host.batch_editor.is_batchable_method(name) for name in methods}
    assert not before.get("SPHERE", False), "the host can batch SPHERE by now: the patch is not needed any more"
    sp.register()
    after = {name: host.batch_editor.is_batchable_method(name) for name in methods}
    assert after == {**before, **({"SPHERE": True} if "SPHERE" in before else {})}
    assert host.batch_editor.is_batchable_method("SPHERE") is True


def test_other_methods_are_passed_through_untouched(registered: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that has no subjects and no targets of our kind must not be checked by our rules."""
    calls: list[tuple[Any, ...]] = []

    def method(model: nn.Module, tok: Any, requests: Any, hparams: Any, **_: Any) -> tuple[nn.Module, dict]:
        calls.append((model, [request["prompt"] for request in requests]))
        return model, {}

    module = sys.modules["easyeditor.editors.editor"]
    monkeypatch.setattr(module, "compute_edit_quality", lambda *args, **kwargs: {"rewrite_acc": [1.0]})
    model, tokenizer = pico("llama")
    tokenizer.padding_side = "left"
    hparams = type("Hparams", (), {})()
    vars(hparams).update(
        alg_name="FT", model_name=(model.train(), tokenizer), device="cpu", model_parallel=False, batch_size=1
    )
    with monkeypatch.context() as patched:  # taken back before the registration is
        patched.setitem(registered.alg_dict, "FT", method)
        editor = registered.base_editor.from_hparams(hparams)
    assert editor.apply_algo is method and editor.model.training and editor.tok.padding_side == "left"
    editor.edit(prompts=["Water boils at"], target_new=["100"], ground_truth=["7"])
    editor.batch_edit(prompts=["Water boils at"], target_new=["100"], ground_truth=["7"])
    assert calls == [(model, ["Water boils at"])] * 2


# ---- editing ----


def test_a_sequential_edit_stays_and_equals_our_own_editor(registered: Host, folders: Callable) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    expected = edited_by_hand(hparams, [[fact] for fact in FACTS[:2]])
    editor = registered.base_editor.from_hparams(hparams)
    metrics, edited, _ = editor.edit(**columns(FACTS[:2]), sequential_edit=True)
    assert edited is editor.model
    assert same(weights(editor.model), expected[-1])
    assert [len(metric["post"]["rewrite_acc"]) for metric in metrics] == [1, 1]
    assert all(0.0 <= metric[when]["rewrite_acc"][0] <= 1.0 for metric in metrics for when in ("pre", "post"))


def test_an_edit_that_is_not_sequential_is_scored_and_undone_bit_for_bit(
    registered: Host, folders: Callable, scored: list
) -> None:
    """EasyEdit's own SPHERE kept the keys of edits that had been undone: the second one came out otherwise."""
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    before = weights(editor.model)
    metrics, *_ = editor.edit(**columns(FACTS[:2]), sequential_edit=False)
    assert same(weights(editor.model), before)
    assert len(metrics) == 2 and all("rewrite_acc" in metric["post"] for metric in metrics)
    # Scored: both facts before any edit, then each after its own edit of the unedited model.
    assert [same(seen, before) for seen in scored] == [True, True, False, False]
    for seen, fact in zip(scored[2:], FACTS[:2], strict=True):
        assert same(seen, edited_by_hand(hparams, [[fact]])[0])


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_stay_where_edits_are_sequential(registered: Host, folders: Callable, repeats: int) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"), batch_size=2)
    expected = edited_by_hand(hparams, [FACTS[:2], FACTS[2:]] * repeats)
    editor = registered.base_editor.from_hparams(hparams)
    for _ in range(repeats):
        metrics, edited, _ = editor.batch_edit(**columns(FACTS), sequential_edit=True)
    assert edited is editor.model and same(weights(editor.model), expected[-1])
    # The PyPI release returns the metrics of its last batch only.
    assert len(metrics) == (4 if registered.kind == "main" else 2)
    assert all("rewrite_acc" in metric[when] for metric in metrics for when in ("pre", "post"))


def test_batches_are_undone_bit_for_bit_where_edits_are_not_sequential(
    registered: Host, folders: Callable, scored: list
) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"), batch_size=2)
    editor = registered.base_editor.from_hparams(hparams)
    before = weights(editor.model)
    for _ in range(2):
        editor.batch_edit(**columns(FACTS), sequential_edit=False)
        assert same(weights(editor.model), before)
    edited = [seen for seen in scored if not same(seen, before)]
    assert len(edited) == 8 and len(scored) == 16
    alone = [edited_by_hand(hparams, [batch])[0] for batch in (FACTS[:2], FACTS[2:])]
    for number, seen in enumerate(edited):
        assert same(seen, alone[number // 2 % 2])


def test_the_default_is_the_hosts(registered: Host, folders: Callable) -> None:
    """Main undoes an edit unless told otherwise, the PyPI release keeps it."""
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama")))
    before = weights(editor.model)
    editor.edit(**columns(FACTS[:1]))
    assert same(weights(editor.model), before) == (registered.kind == "main")


@pytest.mark.parametrize(
    ("name", "kind", "base"),
    [
        ("mymodel", "gpt2", "AlphaEdit"),
        ("mymodel", "qwen2", "AlphaEdit"),
        ("mymodel", "qwen2", "MEMIT"),
        ("neither-gpt-nor-t5", "llama", "AlphaEdit"),
    ],
)
def test_a_models_name_decides_nothing(name: str, kind: str, base: str, registered: Host, folders: Callable) -> None:
    """EasyEdit picks loader and tokenizer by words in the name, has none for most models, and its own SPHERE raises
    NameError for every name without llama or gpt2-xl in it."""
    folder = folders(name, kind)
    hparams = hyperparams(kind, folder, base_method=base, mom2_update_weight=100.0, batch_size=2)
    editor = registered.base_editor.from_hparams(hparams)
    assert hparams.model_name == str(folder)
    assert type(editor.model) is type(pico(kind)[0])
    assert editor.model_name == type(editor.model).__name__
    assert editor.tok.padding_side == "right" and not editor.model.training
    metrics, *_ = editor.batch_edit(**columns(FACTS[:2]), sequential_edit=True)
    assert all("rewrite_acc" in metric["post"] for metric in metrics)
    assert same(weights(editor.model), edited_by_hand(hparams, [FACTS[:2]])[0])


@pytest.mark.parametrize("verb", ["edit", "batch_edit"])
@pytest.mark.parametrize("sequential", [True, False])
def test_calls_as_main_s_scripts_make_them_mean_the_same_on_both_hosts(
    verb: str, sequential: bool, registered: Host, folders: Callable
) -> None:
    """The PyPI release swallows sequential_edit, and its batch_edit trips over locality_inputs."""
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    before = weights(editor.model)
    neighbours = {"prompt": ["Big Ben is in the city of"] * 2, "ground_truth": ["London"] * 2}
    metrics, *_ = getattr(editor, verb)(
        **columns(FACTS[:2]),
        locality_inputs={"neighborhood": neighbours},
        keep_original_weight=True,
        sequential_edit=sequential,
    )
    assert same(weights(editor.model), before) is not sequential
    assert any(key.startswith("neighborhood") for key in metrics[-1]["post"]["locality"])


def test_half_precision_is_loaded_where_it_is_asked_for(registered: Host, folders: Callable) -> None:
    """`fp16: true` was overlooked where the host does not know the model's name."""
    editor = registered.base_editor.from_hparams(hyperparams("qwen2", folders("mymodel", "qwen2"), fp16=True))
    assert next(editor.model.parameters()).dtype == torch.float16


def test_prompts_are_padded_on_the_right(registered: Host, folders: Callable) -> None:
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama")))
    assert editor.tok.padding_side == "right" and editor.tok.pad_token is not None
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    assert editor.tok.padding_side == "right"


def test_one_fact_may_be_given_without_lists(registered: Host, folders: Callable) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    arguments = {name: column[0] for name, column in columns(FACTS[:1]).items()}
    metrics, *_ = editor.edit(**arguments, sequential_edit=True)
    assert len(metrics) == 1
    assert same(weights(editor.model), edited_by_hand(hparams, [FACTS[:1]])[0])


def test_a_prompt_may_hold_a_place_for_its_subject(registered: Host, folders: Callable) -> None:
    """EasyEdit's own editor wants the subject written out and fails with a bare AssertionError."""
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    placed = [{**fact, "prompt": fact["prompt"].replace(fact["subject"], "{}")} for fact in FACTS[:2]]
    metrics, *_ = editor.edit(**columns(placed), sequential_edit=True)
    assert [metric["requested_rewrite"]["prompt"] for metric in metrics] == [fact["prompt"] for fact in FACTS[:2]]
    assert same(weights(editor.model), edited_by_hand(hparams, [[fact] for fact in FACTS[:2]])[-1])


def test_two_editors_on_two_models_do_not_touch(registered: Host, folders: Callable) -> None:
    """EasyEdit's own SPHERE keeps P, the key cache and the contexts in module globals: the second model got those of
    the first, and its update was off by more than half."""
    models = [("llama", "llama", 0), ("llama", "llama", 1), ("mymodel", "gpt2", 0)]
    hparams = [hyperparams(kind, folders(name, kind, seed)) for name, kind, seed in models]
    expected = [edited_by_hand(hp, [[fact] for fact in FACTS[:2]]) for hp in hparams]
    editors = [registered.base_editor.from_hparams(hp) for hp in hparams]
    for step, fact in enumerate(FACTS[:2]):
        for number, editor in enumerate(editors):
            editor.edit(**columns([fact]), sequential_edit=True)
            assert same(weights(editor.model), expected[number][step])


def test_an_editor_goes_on_after_unregistering(registered: Host, folders: Callable) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    sp.unregister()
    undo = {"sequential_edit": True} if registered.kind == "main" else {"keep_original_weight": False}
    editor.edit(**columns(FACTS[1:2]), **undo)
    assert same(weights(editor.model), edited_by_hand(hparams, [[fact] for fact in FACTS[:2]])[-1])


def test_another_strength_goes_on_with_what_is_remembered(registered: Host, folders: Callable) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    inner = editor.apply_algo.editor
    hparams.alpha = 1.0
    editor.edit(**columns(FACTS[1:2]), sequential_edit=True)
    assert editor.apply_algo.editor is inner
    # Loaded like the other one: where a matrix lies in memory may decide last digits of products with it.
    by_hand = Editor(*sp.load_model(hparams.model_name), hyperparams("llama", folders("llama", "llama")).editing())
    by_hand.apply(FACTS[:1])
    assert by_hand.reconfigure(hparams.editing())
    by_hand.apply(FACTS[1:2])
    assert same(weights(editor.model), weights(by_hand.anatomy.model))


def test_other_layers_start_anew_from_the_weights_as_they_are(
    registered: Host, folders: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    editor = registered.base_editor.from_hparams(hparams)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    model, tokenizer = sp.load_model(hparams.model_name)
    model.load_state_dict(editor.model.state_dict())
    newcomer = Editor(model, tokenizer, hparams.editing())
    newcomer.config.layers = [2]
    hparams.layers = [2]
    newcomer = Editor(newcomer.anatomy.model, newcomer.tokenizer, newcomer.config)
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        editor.edit(**columns(FACTS[1:2]), sequential_edit=True)
    assert any("SPHERE starts anew" in record.getMessage() for record in caplog.records)
    newcomer.apply(FACTS[1:2])
    assert same(weights(editor.model), weights(newcomer.anatomy.model))


def test_called_without_an_editor_a_batch_stands_for_itself(registered: Host, folders: Callable) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"))
    method = registered.alg_dict["SPHERE"]
    model, tokenizer = pico("llama")
    before = weights(model)
    edited, copies = method(model, tokenizer, FACTS[:2], hparams, copy=True, return_orig_weights=True)
    assert edited is not model and same(weights(model), before)
    (expected,) = edited_by_hand(hparams, [FACTS[:2]])
    assert same(weights(edited), expected)
    edited, copies = method(model, tokenizer, FACTS[:2], hparams, return_orig_weights=True, keep_original_weight=True)
    assert edited is model and same(weights(model), expected)
    assert copies.keys() == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert all(torch.equal(copies[name], before[name]) for name in copies)


# ---- refusals ----

WRONG = {
    "a subject that is not in its prompt": ({"subject": ["Eiffel Tower", "Windows 98"]}, r"requests\[1\]\.subject"),
    "an empty target": ({"target_new": ["Rome", ""]}, r"requests\[1\]\.target_new"),
    "no subjects at all": ({"subject": None}, r"subject: got '0 entries', expected one for each of the 2 prompts"),
    "too few subjects": ({"subject": ["Eiffel Tower"]}, r"subject: got '1 entries'"),
    "too few targets": ({"target_new": ["Rome"]}, r"target_new: got '1 entries'"),
    "an empty prompt": ({"prompts": ["", FACTS[1]["prompt"]]}, r"requests\[0\]\.prompt"),
    "nothing at all": ({"prompts": [], "target_new": [], "subject": []}, r"requests: got \[\]"),
}


@pytest.mark.parametrize("verb", ["edit", "batch_edit"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_before_anything_is_scored(
    case: str, verb: str, registered: Host, folders: Callable, nothing_scored: None
) -> None:
    changes, message = WRONG[case]
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama")))
    arguments = {**columns(FACTS[:2]), **changes}
    if arguments["subject"] is None:
        del arguments["subject"]
    before = weights(editor.model)
    with pytest.raises(RequestError, match=message):
        getattr(editor, verb)(**arguments, sequential_edit=True)
    assert same(weights(editor.model), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 30]}, r"layers: got 30, expected numbers below 4"),
        ({"v_loss_layer": 29}, r"v_loss_layer: got 29"),
        ({"lm_head_module": "head"}, r"lm_head_module: got 'head'.*'lm_head'"),
    ],
    ids=["layers", "v_loss_layer", "lm_head_module"],
)
def test_settings_that_do_not_fit_the_model_are_refused_as_the_editor_is_made(
    changes: dict, message: str, registered: Host, folders: Callable, nothing_scored: None
) -> None:
    hparams = hyperparams("llama", folders("llama", "llama"), **changes)
    with pytest.raises(ConfigError, match=message):
        registered.base_editor.from_hparams(hparams)


def test_settings_that_fit_no_model_are_refused_as_they_are_read(folders: Callable) -> None:
    with pytest.raises(ConfigError, match=r"layers: got \[2, 1\]"):
        hyperparams("llama", folders("llama", "llama"), layers=[2, 1])
    with pytest.raises(ConfigError, match=r"hparams: got 'v_steps'"):
        hyperparams("llama", folders("llama", "llama"), v_steps=3)


def test_a_batch_that_fails_leaves_the_model_as_it_was(
    registered: Host, folders: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama"), batch_size=2))
    before = weights(editor.model)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrincipalSpace, "project", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.batch_edit(**columns(FACTS), sequential_edit=True)
    assert same(weights(editor.model), before)


# ---- defects of EasyEdit's own SPHERE that ours must not have ----


def test_nothing_is_written_to_the_working_directory_but_the_hosts_logs(
    registered: Host, folders: Callable, tmp_path: Path
) -> None:
    """EasyEdit's own SPHERE writes null_space_project.pt there, whatever P_loc says."""
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama"), batch_size=2))
    editor.batch_edit(**columns(FACTS), sequential_edit=True)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_edited(dtype: torch.dtype, registered: Host, folders: Callable) -> None:
    """EasyEdit's own SPHERE calls eigh on the weight as it is: not implemented for half precision."""
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama"), alpha=1.0))
    editor.model.to(dtype)
    before = weights(editor.model)
    metrics, *_ = editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    assert "rewrite_acc" in metrics[0]["post"]
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        after = editor.model.get_parameter(name).detach()
        assert after.dtype == dtype and torch.isfinite(after).all()
        delta = after.float() - before[name].float()
        basis = PrincipalSpace.fit(before[name]).basis
        assert 0.0 < (delta @ basis).norm() < 0.2 * delta.norm()  # what rounding alone brings back


@only_on_main
def test_a_model_that_the_host_loads_in_half_precision_is_edited(registered: Host, folders: Callable) -> None:
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama"), fp16=True))
    assert next(editor.model.parameters()).dtype == torch.float16
    before = weights(editor.model)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    changed = {name for name, weight in weights(editor.model).items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


def test_conv1d_is_projected_on_the_side_of_its_neurons(registered: Host, folders: Callable) -> None:
    """EasyEdit's own SPHERE projects the rows of what is stored, which are the inputs of GPT-2's Conv1D."""
    editor = registered.base_editor.from_hparams(hyperparams("gpt2", folders("mymodel", "gpt2"), alpha=1.0))
    before = weights(editor.model)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    for layer in (1, 2):
        name = f"transformer.h.{layer}.mlp.c_proj.weight"
        assert before[name].shape == (96, 32)
        delta = (editor.model.get_parameter(name).detach() - before[name]).T
        basis = PrincipalSpace.fit(before[name].T).basis
        assert delta.norm() > 0 and (delta @ basis).norm() < 1e-4 * delta.norm()


def test_no_matrix_of_the_larger_side_is_decomposed_once_statistics_are_ready(
    registered: Host, folders: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EasyEdit's own SPHERE runs eigh on d_in x d_in at every edit and layer: 14336 x 14336 for LLaMA 3."""
    editor = registered.base_editor.from_hparams(hyperparams("llama", folders("llama", "llama")))
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    sizes: list[int] = []

    def decompose(original: Callable, matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(min(matrix.shape))
        return original(matrix, *args, **kwargs)

    for name in ("eigh", "eigvalsh", "eig", "eigvals", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, functools.partial(decompose, getattr(torch.linalg, name)))
    editor.edit(**columns(FACTS[1:2]), sequential_edit=True)
    assert editor.model.get_parameter("model.layers.1.mlp.down_proj.weight").shape == (32, 64)
    assert len(sizes) == 2 and max(sizes) == 32


@only_on_main
@pytest.mark.parametrize("name", ["llama3-8b", "gpt2-xl"])
def test_easyedits_own_hparams_work_through_our_method(
    name: str, registered: Host, folders: Callable, tmp_path: Path
) -> None:
    kind = "llama" if name == "llama3-8b" else "gpt2"
    own = sys.modules["easyeditor.models.SPHERE.SPHERE_hparams"].SPHEREHyperParams
    hparams = own.from_hparams(str(registered.location.parent / "hparams" / "SPHERE" / f"{name}.yaml"))
    folder = folders("mymodel", kind)
    changes = settings(kind, folder, v_loss_layer=3, mom2_dataset="generated", stats_dir=str(tmp_path / "statistics"))
    del changes["context_template_length_params"]
    for key, value in changes.items():
        assert hasattr(hparams, key)
        setattr(hparams, key, value)
    editor = registered.base_editor.from_hparams(hparams)
    metrics, edited, _ = editor.edit(**columns(FACTS[:2]), sequential_edit=True)
    assert isinstance(edited, PreTrainedModel) and all("rewrite_acc" in metric["post"] for metric in metrics)
    ours = SphereHyperParams.from_mapping(vars(hparams))
    assert (ours.eta, ours.alpha, ours.L2) == (hparams.cumulative_ratio, hparams.suppression_strength, 1.0)
    assert same(weights(edited), edited_by_hand(ours, [[fact] for fact in FACTS[:2]])[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "statistics"]


@only_on_main
def test_easyedits_own_hparams_may_switch_the_projection_off(registered: Host, folders: Callable) -> None:
    own = sys.modules["easyeditor.models.SPHERE.SPHERE_hparams"].SPHEREHyperParams
    hparams = own.from_hparams(str(registered.location.parent / "hparams" / "SPHERE" / "llama3-8b.yaml"))
    changes = settings("llama", folders("llama", "llama"), v_loss_layer=3, mom2_dataset="generated", stats_dir=None)
    del changes["context_template_length_params"]
    vars(hparams).update(changes, cumulative_ratio=0)
    editor = registered.base_editor.from_hparams(hparams)
    editor.edit(**columns(FACTS[:1]), sequential_edit=True)
    assert editor.apply_algo.editor.config.alpha == 0.0
