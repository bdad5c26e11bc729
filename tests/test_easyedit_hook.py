"""What the hook around EasyEdit's methods restrains, refuses and leaves alone, on the host that is found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosted import FACTS, Bench, along, changed, clean_host, copies, expected_to_change, hparams_of, same
from pico import pico, save_pico
from torch import Tensor, nn

import sphere_plugin as sp
from sphere_plugin import ConfigError, HostError, ModelError, PrincipalSpace
from sphere_plugin.easyedit.host import Host, find_host
from sphere_plugin.easyedit.methods import METHODS
from sphere_plugin.models.embedded import EMBEDDED_FOLDER, EMBEDDED_NAME
from sphere_plugin.restraints import RectConfig, SphereConfig, prune_view

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(KIND != "main", reason="EASYEDIT_HOME is not set: the PyPI release lacks the method")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    yield from clean_host(monkeypatch, tmp_path)


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(host, monkeypatch, tmp_path)


# ---- the restraints ----


@pytest.mark.parametrize("method", ["FT", "ROME"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rect_keeps_entries_as_the_method_wrote_them_and_no_others(method: str, kind: str, bench: Bench) -> None:
    editor = bench.editor(method, kind)
    before = copies(editor.model)
    bench.edit(editor, FACTS[:1])
    plain = copies(editor.model)
    sp.register()
    editor = bench.editor(method, kind, rect=True)
    bench.edit(editor, FACTS[:1])
    after = copies(editor.model)
    for name in changed(before, plain):
        if before[name].dim() != 2:
            assert torch.equal(after[name], plain[name])
            continue
        delta = plain[name] - before[name]
        kept = RectConfig().bind(before[name])(before[name], delta).delta != 0
        assert 0.39 < kept.float().mean() < 0.41
        assert torch.equal(after[name][kept], plain[name][kept])
        assert torch.equal(after[name][~kept], before[name][~kept])


class Written:
    """In place of FT: writes what it is told to."""

    def __init__(self, *writes: Callable[[nn.Module], None]) -> None:
        self.writes = list(writes)

    def __call__(self, model: nn.Module, *_: object, **__: object) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.no_grad():
            self.writes.pop(0)(model)
        return model, {}


DOWN = "model.layers.1.mlp.down_proj.weight"


def adding(seed: int, size: float, name: str = DOWN) -> Callable[[nn.Module], None]:
    return lambda model: model.get_parameter(name).add_(size * noise(seed))


def noise(seed: int) -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def writing(host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """writing(*writes, **keys) -> an editor whose FT, restrained by ``keys``, does ``writes``, one at each edit."""

    def make(*writes: Callable[[nn.Module], None], **keys: object) -> Any:
        monkeypatch.setitem(host.alg_dict, "FT", Written(*writes))
        sp.register()
        return bench.editor("FT", "llama", **keys)

    return make


def down(editor: Any) -> Tensor:
    return editor.model.get_parameter(DOWN).detach().clone()


def test_rect_comes_before_sphere(bench: Bench, writing: Callable) -> None:
    editor = writing(adding(1, 0.1), sphere={"alpha": 1.0}, rect={"keep": 0.2})
    before = down(editor)
    bench.edit(editor, FACTS[:1])
    rect, sphere = RectConfig(0.2).bind(before), SphereConfig(alpha=1.0).bind(before)
    kept = rect(before, 0.1 * noise(1)).delta
    torch.testing.assert_close(down(editor) - before, sphere(before, kept).delta, rtol=0, atol=1e-6)
    assert along("llama", before, down(editor)) < 1e-4
    other = rect(before, sphere(before, 0.1 * noise(1)).delta).delta
    assert (down(editor) - before - other).norm() > 0.1 * other.norm()


def test_what_rounding_took_of_a_restrained_update_is_told(bench: Bench, writing: Callable) -> None:
    editor = writing(adding(1, 0.01), sphere={"alpha": 0.5})
    editor.model.bfloat16()
    before = down(editor)
    bench.edit(editor, FACTS[:1])
    (touched,) = [one for one in editor.apply_algo.touched if one.name == DOWN]
    delta = (before.float() + 0.01 * noise(1)).bfloat16().float() - before.float()  # as FT wrote it: rounded
    asked = SphereConfig(alpha=0.5).bind(before)(before.float(), delta).delta
    lost = (down(editor).float() - before.float() - asked).norm() / asked.norm()
    assert 0.01 < lost < 0.5
    assert touched.rounding_loss == pytest.approx(float(lost), rel=1e-3)


def test_prune_looks_at_everything_since_before_the_first_edit(bench: Bench, writing: Callable) -> None:
    editor = writing(adding(1, 2.0), adding(2, 2.0), prune=True)
    before = down(editor)
    bench.edit(editor, FACTS[:1])
    first = prune_view(before, before + 2.0 * noise(1))
    torch.testing.assert_close(down(editor), first, rtol=0, atol=1e-4)
    assert torch.linalg.svdvals(down(editor) - before)[0] < 0.9 * torch.linalg.svdvals(2.0 * noise(1))[0]
    bench.edit(editor, FACTS[:1])
    second = prune_view(before, first + 2.0 * noise(2))
    torch.testing.assert_close(down(editor), second, rtol=0, atol=1e-4)
    assert (second - prune_view(first, first + 2.0 * noise(2))).norm() > 1.0


@pytest.mark.parametrize("basis", ["current", "pretrained"])
def test_the_basis_is_of_the_weight_now_or_before_the_first_edit(basis: str, bench: Bench, writing: Callable) -> None:
    editor = writing(adding(1, 1.0), adding(2, 1.0), sphere={"alpha": 1.0, "basis": basis})
    before = down(editor)
    bench.edit(editor, FACTS[:1])
    between = down(editor)
    bench.edit(editor, FACTS[:1])
    delta = down(editor) - between
    old, new = (float((delta @ PrincipalSpace.fit(w).basis).norm() / delta.norm()) for w in (before, between))
    held, free = (new, old) if basis == "current" else (old, new)
    assert held < 1e-4 and free > 0.05


# ---- what goes wrong ----


def test_an_interrupted_method_leaves_the_weights_as_they_were(bench: Bench, writing: Callable) -> None:
    def interrupted(model: nn.Module) -> None:
        adding(1, 1.0)(model)
        raise KeyboardInterrupt

    editor = writing(interrupted, sphere=True)
    before = copies(editor.model)
    with pytest.raises(KeyboardInterrupt):
        bench.edit(editor, FACTS[:1])
    assert same(copies(editor.model), before)


def test_an_update_that_is_not_finite_is_refused_and_taken_back(bench: Bench, writing: Callable) -> None:
    editor = writing(lambda model: model.get_parameter(DOWN)[3].fill_(torch.nan), adding(1, 0.1), sphere=True)
    before = copies(editor.model)
    message = rf"FT's update of {DOWN}: got 'NaN or infinite in 64 of 2048 entries'"
    with pytest.raises(ModelError, match=message):
        bench.edit(editor, FACTS[:1])
    assert same(copies(editor.model), before)
    bench.edit(editor, FACTS[:1])  # the editor is as good as new
    assert changed(before, copies(editor.model)) == {DOWN}


def test_a_method_that_changes_nothing_is_not_passed_over_in_silence(
    bench: Bench, writing: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    editor = writing(lambda model: None, sphere=True)
    bench.edit(editor, FACTS[:1])
    (said,) = [record for record in caplog.records if record.name == "sphere_plugin"]
    assert said.levelname == "WARNING" and said.getMessage().startswith("FT + SPHERE changed no weight")


def test_a_weight_that_the_settings_do_not_name_is_told(
    bench: Bench, writing: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    stray = DOWN.replace(".1.", ".3.")
    editor = writing(lambda model: (adding(1, 0.1)(model), adding(2, 0.1, stray)(model)), sphere={"alpha": 1.0})
    before = copies(editor.model)
    bench.edit(editor, FACTS[:1])
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in said if line.startswith(f"FT also wrote 1 weights its settings do not name ({stray})")]
    assert torch.equal(editor.model.get_parameter(stray), before[stray] + 0.1 * noise(2))


def test_settings_that_name_no_weight_are_told_before_the_method_runs(bench: Bench, writing: Callable) -> None:
    editor = writing(lambda model: pytest.fail("the method ran"), sphere=True)
    editor.hparams.rewrite_module_tmp = "model.layers.{}.mlp.fc"
    with pytest.raises(ModelError, match=r"rewrite_module_tmp: got 'model\.layers\.\{\}\.mlp\.fc'"):
        bench.edit(editor, FACTS[:1])


# ---- methods that cannot be restrained ----

NOTHING = [name for name, method in METHODS.items() if method.writes == "nothing"]
NOTHING = [name for name in NOTHING if name != "ICE"] if KIND == "main" else ["SERAC", "IKE", "FT-Api"]


def asking(name: str, **keys: object) -> Any:
    """Hyper-parameters of a model that is nowhere."""
    hparams = sys.modules["easyeditor.util.hparams"].HyperParams()
    vars(hparams).update(alg_name=name, model_name="no/such/llama", device="cpu", model_parallel=False, **keys)
    return hparams


@pytest.mark.parametrize("keys", [{"sphere": True}, {"rect": True, "prune": True}], ids=["sphere", "others"])
@pytest.mark.parametrize("name", NOTHING)
def test_a_method_without_an_update_is_refused_before_a_model_is_loaded(name: str, keys: dict, host: Host) -> None:
    assert name in host.alg_dict
    sp.register()
    with pytest.raises(ConfigError) as caught:
        host.base_editor.from_hparams(asking(name, **keys))
    asked = "SPHERE" if "sphere" in keys else "RECT + PRUNE"
    assert caught.value.culprit == f"{asked} on {name}"
    assert f"no weight update to project: {METHODS[name].why_not}" in str(caught.value)


@only_on_main
@pytest.mark.parametrize("editor", ["ConceptEditor", "SafetyEditor"])
def test_easyedits_other_editors_of_text_refuse_as_early(editor: str) -> None:
    sp.register()
    with pytest.raises(ConfigError, match="SPHERE on GRACE"):
        getattr(sys.modules["easyeditor"], editor).from_hparams(asking("GRACE", sphere=True))


@pytest.mark.parametrize("key", ["rect", "prune"])
def test_rect_and_prune_on_an_adapter_are_refused_before_a_model_is_loaded(key: str, host: Host) -> None:
    sp.register()
    with pytest.raises(ConfigError, match=rf"{key.upper()} \+ SPHERE on LoRA: got 'an adapter B·A'"):
        host.base_editor.from_hparams(asking("LoRA", **{key: True, "sphere": True}))


@pytest.mark.parametrize("restraint", [{}, {"sphere": True}], ids=["plain", "sphere"])
def test_a_model_whose_name_easyedit_does_not_know_is_loaded_by_what_it_is(
    restraint: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    folder = save_pico("llama", tmp_path / "mine")
    sp.register()
    hparams = hparams_of("FT", "llama", bench.folder, model_name=str(folder), **restraint)
    for _ in range(2):
        editor = bench.host.base_editor.from_hparams(hparams)
        before = copies(editor.model)
        bench.edit(editor, FACTS[:1])
        assert changed(before, copies(editor.model))
        assert hparams.model_name == str(folder)


@only_on_main
def test_for_the_editor_of_safety_it_tells_what_is_inside(bench: Bench, tmp_path: Path) -> None:
    """EasyEdit loads models for it with their hidden states, by which it finds the layer to edit."""
    folder = save_pico("llama", tmp_path / "mine")
    sp.register()
    hparams = hparams_of("DINM", "llama", bench.folder, model_name=str(folder), layers=[], sphere=True)
    editor = sys.modules["easyeditor"].SafetyEditor.from_hparams(hparams)
    request = {"target_new": "Rome", "ground_truth": "Paris"}
    assert editor._locate_toxic_layer(editor.model, editor.tok, [request])[0] in range(4)


def test_hyper_parameters_serve_a_second_editor_on_the_embedded_model(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(name: str, **_: object) -> tuple[nn.Module, Any]:
        loaded.append(name)
        return pico("llama")

    monkeypatch.setattr("sphere_plugin.easyedit.opening.load_model", load)
    monkeypatch.setattr("sphere_plugin.easyedit.opening.resolve_model", lambda _: f"/cache/models/{EMBEDDED_FOLDER}")
    sp.register()
    hparams = hparams_of("FT", "llama", bench.folder, model_name=EMBEDDED_NAME)
    editors = [bench.host.base_editor.from_hparams(hparams) for _ in range(2)]
    assert loaded == [EMBEDDED_NAME] * 2
    assert editors[0].model is not editors[1].model


def test_a_device_that_is_not_there_is_refused_before_a_model_is_loaded(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sp.register()
    for device in (0, "cuda:1", "gpu"):
        hparams = asking("FT", sphere=True)
        hparams.device = device
        with pytest.raises(ConfigError, match=rf"device: got '{'cuda:0' if device == 0 else device}'"):
            host.base_editor.from_hparams(hparams)


@only_on_main
def test_a_model_that_nobody_would_quantise_is_refused_for_qlora(host: Host) -> None:
    """EasyEdit goes by words in the name; without one of them it would be loaded as it is."""
    sp.register()
    hparams = asking("QLoRA", sphere=True, quantization_bit=4, double_quant=False, quant_type="nf4")
    hparams.model_name = "no/such/gemma"
    with pytest.raises(ConfigError, match="model_name: got 'no/such/gemma, to be loaded in 4 bits'"):
        host.base_editor.from_hparams(hparams)


def test_stacked_weights_are_refused_before_they_are_trained(bench: Bench) -> None:
    sp.register()
    model, tokenizer = pico("llama")
    for layer in model.model.layers:
        layer.mlp.register_parameter("experts", nn.Parameter(torch.zeros(2, 3, 4)))
    bench.fresh()
    editor = bench.editor_on(model, tokenizer, "FT", "llama", sphere=True, rewrite_module_tmp="model.layers.{}.mlp")
    before = copies(editor.model)
    with pytest.raises(ModelError, match=r"mlp\.experts: got 'a stack of shape \(2, 3, 4\)'"):
        bench.edit(editor, FACTS[:1])
    assert same(copies(editor.model), before)


@pytest.mark.parametrize(("made", "then"), [({}, {"alpha": 0.5}), ({"alpha": 0.5}, False), (True, {"alpha": 0.1})])
def test_keys_that_are_changed_after_the_editor_was_made_are_refused(made: Any, then: Any, bench: Bench) -> None:
    sp.register()
    editor = bench.editor("FT", "llama", **({"sphere": made} if made else {}))
    kept = getattr(editor.hparams, "sphere", False)
    editor.hparams.sphere = then
    before = copies(editor.model)
    with pytest.raises(ConfigError, match="keys sphere, rect and prune of the editor's settings"):
        bench.edit(editor, FACTS[:1])
    assert same(copies(editor.model), before)
    editor.hparams.sphere = kept
    bench.edit(editor, FACTS[:1])
    assert changed(before, copies(editor.model))


@only_on_main
def test_simie_with_a_base_method_without_an_update_is_refused_before_a_model_is_loaded(host: Host) -> None:
    sp.register()
    with pytest.raises(ConfigError, match="SPHERE on GRACE"):
        host.base_editor.from_hparams(asking("SimIE", base_method="GRACE", sphere=True))


def test_a_method_that_is_not_in_the_table_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.alg_dict, "NEW", lambda *_, **__: None)
    sp.register()
    with pytest.raises(ConfigError, match="SPHERE on NEW: got 'an unknown method'"):
        host.base_editor.from_hparams(asking("NEW", sphere=True))


@pytest.mark.parametrize(("editor", "name"), [("MultimodalEditor", "MEND"), ("PerEditor", "IKE")])
def test_editors_of_images_and_of_personality_refuse(editor: str, name: str) -> None:
    kind = getattr(sys.modules["easyeditor"], editor, None)
    if kind is None:
        pytest.skip(f"this host has no {editor}")
    sp.register()
    with pytest.raises(ConfigError, match=f"SPHERE: got '{editor}', expected an editor of facts in text"):
        kind.from_hparams(asking(name, sphere=True))


# ---- nothing is left behind, nothing is shared ----

EDITORS = ("BaseEditor", "ConceptEditor", "SafetyEditor", "MultimodalEditor", "PerEditor", "BatchEditor")


def everything(host: Host) -> dict[str, dict[str, Any]]:
    """What is in the table, and in every class that registering touches."""
    classes, found = [sys.modules["easyeditor.util.hparams"].HyperParams], {}
    while classes:
        kind = classes.pop()
        classes += kind.__subclasses__()
        found[f"{kind.__module__}.{kind.__qualname__}"] = dict(vars(kind))
    package = sys.modules["easyeditor"]
    for name in EDITORS:
        kind = host.batch_editor if name == "BatchEditor" else getattr(package, name, None)
        found |= {name: dict(vars(kind))} if kind is not None else {}
    return {**found, "ALG_DICT": dict(host.alg_dict)}


def test_unregistering_leaves_nothing_behind(host: Host, bench: Bench) -> None:
    def edited() -> dict[str, Tensor]:
        editor = bench.editor("FT", "llama")
        bench.edit(editor, FACTS[:2])
        return copies(editor.model)

    before, weights = everything(host), edited()
    sp.register(overrides={"sphere": {"alpha": 1.0}})
    held = edited()
    assert changed(held, weights)
    sp.unregister()
    after = everything(host)
    assert list(after) == list(before)
    for owner, attributes in before.items():
        assert list(after[owner]) == list(attributes) if owner == "ALG_DICT" else set(after[owner]) == set(attributes)
        assert [name for name in attributes if after[owner][name] is not attributes[name]] == [], owner
    assert same(edited(), weights)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sphere'"):
        bench.editor("FT", "llama", sphere=True)


def test_an_editor_without_a_key_calls_easyedits_own_function(host: Host, bench: Bench) -> None:
    own = dict(host.alg_dict)
    sp.register()
    for method in ("FT", "ROME", "MEND"):
        assert bench.editor(method, "llama").apply_algo is own[method]
        assert bench.editor(method, "llama", sphere=False).apply_algo is own[method]
        assert host.alg_dict[method].__name__ == own[method].__name__


@pytest.mark.parametrize("method", ["MEND", *(["ULTRAEDIT"] if KIND == "main" else [])])
def test_two_editors_edit_each_its_own_model(method: str, bench: Bench) -> None:
    """EasyEdit's MEND keeps the first model it sees, and edits that one for every later editor."""
    sp.register()
    alone = []
    for seed in (0, 1):
        editor = bench.editor(method, "llama", seed, sphere=True)
        bench.edit(editor, FACTS[:2])
        alone.append(copies(editor.model))
    first, second = (bench.editor(method, "llama", seed, sphere=True) for seed in (0, 1))
    for fact in FACTS[:2]:
        bench.edit(first, [fact])
        bench.edit(second, [fact])
    assert same(copies(first.model), alone[0]) and same(copies(second.model), alone[1])
    first.model = pico("llama", 1)[0]  # and an editor that gets another model edits that one
    bench.edit(first, FACTS[:2])
    assert same(copies(first.model), alone[1])


def test_called_without_an_editor_the_hyper_parameters_of_that_call_decide(host: Host, bench: Bench) -> None:
    sp.register()
    editor = bench.editor("FT", "llama")
    before, hparams = copies(editor.model), editor.hparams
    hparams.sphere = {"alpha": 1.0}
    requests = [{**FACTS[0], "ground_truth": "Paris", "portability": {}, "locality": {}}]
    edited, old = host.alg_dict["FT"](
        editor.model, editor.tok, requests, hparams, return_orig_weights=True, keep_original_weight=True
    )
    after = copies(edited)
    assert changed(before, after) == set(old) == expected_to_change("FT", "llama")
    assert all(
        along("llama", before[name], after[name]) < 1e-4 and torch.equal(old[name], before[name]) for name in old
    )
