"""Each of EasyEdit's own methods with `sphere: true`, on four architectures, on the host that is found."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATES
from hosted import FACTS, Bench, along, changed, clean_host, copies, expected_to_change, same
from pico import pico
from torch import Tensor, nn

import sphere_plugin as sp
from sphere_plugin import HostError, PrincipalSpace
from sphere_plugin.easyedit.hook import WeightSession
from sphere_plugin.easyedit.host import Host, find_host
from sphere_plugin.easyedit.keys import KEYS
from sphere_plugin.easyedit.methods import METHODS
from sphere_plugin.peft import lora_layers

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(KIND != "main", reason="EASYEDIT_HOME is not set: the PyPI release lacks the method")

ALL = ("llama", "qwen2", "gpt2", "gptj")
LOCATED = ("ROME", "R-ROME", "MEMIT", "MEMIT-FE", "PMET", "CORE", "EAMET", "EMMET", "AlphaEdit")
IN_PLACE = {
    "main": (*LOCATED, "FT", "DINM", "ULTRAEDIT", "MEND", "KN"),
    "pypi": ("ROME", "MEMIT", "FT", "MEND", "KN"),
}
CANNOT = {
    ("main", "AlphaEdit", "gptj"): "EasyEdit's AlphaEdit: NameError, cache_c is never made for GPT-J",
    ("main", "EAMET", "gpt2"): "EasyEdit's EAMET: multiplies the stored Conv1D by a matrix of the other side",
    ("pypi", "KN", "qwen2"): "the release's KN has no entry for Qwen2",
    ("pypi", "MEND", "qwen2"): "the release's MEND computes its loss for LLaMA and GPT only",
}


def cases(*more: str) -> list[Any]:
    """Method and architecture, with a skip where EasyEdit's method itself cannot do it."""
    return [
        pytest.param(
            method,
            kind,
            marks=[pytest.mark.skip(CANNOT[KIND, method, kind])] if (KIND, method, kind) in CANNOT else [],
        )
        for method in (*IN_PLACE[KIND], *(more if KIND == "main" else ()))
        for kind in ALL
    ]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    yield from clean_host(monkeypatch, tmp_path)


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(host, monkeypatch, tmp_path)


# ---- every method that writes weights ----


@pytest.mark.parametrize(("method", "kind"), cases())
def test_what_is_written_has_nothing_along_the_principal_directions(
    method: str, kind: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    sp.register()
    editor = bench.editor(method, kind, sphere={"alpha": 1.0})
    before = copies(editor.model)
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        bench.edit(editor, FACTS[:1])
    after = bench.scored[-1]  # the PyPI release takes KN's edits back at once
    touched = changed(before, after)
    if method == "KN":
        assert touched and touched <= {name for name in before if TEMPLATES[kind][1] + ".weight" in name}
    else:
        assert touched == expected_to_change(method, kind)
        assert same(after, copies(editor.model))
    for name in touched:
        if before[name].dim() == 2:
            assert along(kind, before[name], after[name]) < 1e-4
    (line,) = [record for record in caplog.records if record.name == "sphere_plugin"]
    matrices = sum(before[name].dim() == 2 for name in touched)
    found = re.fullmatch(
        rf"{method} \+ SPHERE changed {matrices} weights?: r (\d+)(?: to \d+)?, ([\d.]+) % of the update removed, "
        r"hyperspherical energy ([\d.e+]+) -> ([\d.e+]+)",
        line.getMessage(),
    )
    assert found and line.levelno == logging.INFO
    assert int(found[1]) > 0 and 0 < float(found[2]) < 100 and float(found[3]) > 0


@pytest.mark.parametrize(("method", "kind"), cases("SimIE"))
def test_without_strength_nothing_differs_from_easyedit(method: str, kind: str, bench: Bench) -> None:
    """Bit for bit, at every moment at which EasyEdit scores."""
    bench.edit(bench.editor(method, kind), FACTS[:2])
    plain, bench.scored = bench.scored, []
    sp.register()
    bench.edit(bench.editor(method, kind, sphere={"alpha": 0.0}), FACTS[:2])
    assert len(plain) == len(bench.scored) == 4
    assert all(same(one, other) for one, other in zip(plain, bench.scored, strict=True))
    assert changed(plain[0], plain[2]) and changed(plain[2], plain[3])


@pytest.mark.parametrize(("method", "kind"), cases("SimIE"))
def test_edits_are_taken_back_bit_for_bit(method: str, kind: str, host: Host, bench: Bench) -> None:
    """Also those of EMMET, ULTRAEDIT and DINM, whose own copies of the old weights are empty."""
    sp.register()
    editor = bench.editor(method, kind, sphere=True)
    before = copies(editor.model)
    bench.edit(editor, FACTS[:1], keep=False)
    assert changed(before, bench.scored[-1]) and same(copies(editor.model), before)
    if KIND == "main":
        first = bench.edit(editor, FACTS[:1])
        bench.edit(editor, FACTS[1:2])
        assert changed(before, copies(editor.model))
        sys.modules["easyeditor.editors.utils"].restore_after_edit(editor, editor.model, first)
        assert same(copies(editor.model), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_in_half_precision_stay_so(kind: str, bench: Bench) -> None:
    sp.register()
    model, tokenizer = pico(kind)
    bench.fresh()
    editor = bench.editor_on(model.bfloat16(), tokenizer, "FT", kind, sphere={"alpha": 1.0})
    before = copies(editor.model)
    bench.edit(editor, FACTS[:1])
    after = copies(editor.model)
    for name in expected_to_change("FT", kind):
        assert after[name].dtype == torch.bfloat16
        if before[name].dim() == 2:
            assert 0.0 < along(kind, before[name], after[name]) < 0.1  # what rounding alone brings back
    bench.edit(editor, FACTS[1:2], keep=False)
    assert same(copies(editor.model), after)


@only_on_main
@pytest.mark.parametrize("kind", ALL)
def test_ultraedit_may_cast_the_model_inside_its_call(
    kind: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    sp.register()
    editor = bench.editor("ULTRAEDIT", kind, sphere={"alpha": 1.0}, half=True)
    before = {name: weight.half() for name, weight in copies(editor.model).items()}
    bench.edit(editor, FACTS[:1])
    after = copies(editor.model)
    assert changed(before, after) == expected_to_change("ULTRAEDIT", kind)
    for name in changed(before, after):
        assert 0.0 < along(kind, before[name], after[name]) < 0.01  # what rounding to 11 bits brings back
    bench.edit(editor, FACTS[1:2], keep=False)
    assert same(copies(editor.model), after)
    assert [record.levelname for record in caplog.records if record.name == "sphere_plugin"] == []
    editor = bench.editor("ULTRAEDIT", kind, sphere=True, half=True, lr=0.0)
    bench.edit(editor, FACTS[:1])
    assert same(copies(editor.model), before)  # what the cast alone changes is no update
    assert "changed no weight" in caplog.records[-1].getMessage()


# ---- SimIE ----


@only_on_main
@pytest.mark.parametrize(("kind", "base"), [(kind, "ROME") for kind in ALL] + [("llama", "MEND"), ("llama", "FT")])
def test_of_simie_the_base_method_is_restrained(
    kind: str, base: str, host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = [], WeightSession.__call__

    def watched(self: WeightSession, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = copies(model)
        result = run(self, model, *args, **kwargs)
        seen.append((self.name, before, copies(model)))
        return result

    monkeypatch.setattr(WeightSession, "__call__", watched)
    bench.edit(bench.editor("SimIE", kind, base_method=base), FACTS[:3])
    plain = bench.scored[-1]
    sp.register()
    editor = bench.editor("SimIE", kind, base_method=base, sphere={"alpha": 1.0})
    entry = host.alg_dict[base]
    bench.edit(editor, FACTS[:2])
    assert host.alg_dict[base] is entry
    sp.unregister()  # an editor goes on with what it was made with
    bench.edit(editor, FACTS[2:3])
    assert [name for name, *_ in seen] == [base] * 4  # SimIE calls it once more, for the names of the weights
    for _, before, after in seen:
        touched = changed(before, after)
        assert touched == expected_to_change(base, kind)
        assert all(along(kind, before[name], after[name]) < 1e-4 for name in touched)
    assert changed(plain, bench.scored[-1])
    # MEND copies its hyper-parameters: nothing as large as a model may hang on them.
    known = {field.name for field in dataclasses.fields(editor.hparams.base_hparams)} | set(KEYS)
    assert set(vars(editor.hparams.base_hparams)) <= known


@only_on_main
def test_an_edit_of_simie_that_fails_leaves_the_edits_before_it(
    host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sp.register()
    editor = bench.editor("SimIE", "llama", base_method="ROME", sphere=True, init_model=True)
    unedited = copies(editor.model)
    bench.edit(editor, FACTS[:1])
    before = copies(editor.model)
    assert changed(unedited, before)
    monkeypatch.setattr(WeightSession, "__call__", lambda *_, **__: _interrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.edit(editor, FACTS[1:2])
    assert same(copies(editor.model), before)


# ---- adapters ----


class Watched:
    """EasyEdit's own function of a method, with the A of every layer before and after each call."""

    def __init__(self, host: Host, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.method, self.before, self.after = host.alg_dict[method], [], []
        monkeypatch.setitem(host.alg_dict, method, self)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.before.append(sides(model)[0])
        result = self.method(model, *args, **kwargs)
        self.after.append(sides(result[0])[0])
        return result


def adapted(model: nn.Module) -> dict[str, Any]:
    """Its layers with a LoRA, by names that are the same inside and outside of a PeftModel."""
    return {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model).items()}


def sides(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B of every layer with a LoRA."""
    layers = adapted(model).items()
    a = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers}
    return a, {name: layer.lora_B["default"].weight.detach().clone() for name, layer in layers}


def directions_of(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The principal directions of every adapted layer's base weight."""
    weights = {name: layer.get_base_layer().weight.detach() for name, layer in adapted(model).items()}
    return {name: PrincipalSpace.fit(w.T if kind == "gpt2" else w).basis for name, w in weights.items()}


ADAPTERS = [(method, kind) for method in ("LoRA", "DPO") for kind in ALL]


@only_on_main
@pytest.mark.parametrize(("method", "kind"), ADAPTERS)
def test_a_trained_lora_has_nothing_along_the_principal_directions(
    method: str, kind: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    sp.register()
    editor = bench.editor(method, kind, sphere={"alpha": 1.0})
    before = copies(editor.model)
    bench.edit(editor, FACTS[1:2], keep=False)
    assert same(copies(editor.model), before) and not lora_layers(editor.model)
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        bench.edit(editor, FACTS[:1])
    (line,) = [record.getMessage() for record in caplog.records if record.name == "sphere_plugin"]
    assert line.startswith(f"{method} + SPHERE changed 2 weights: r ")
    (a, b), directions = sides(editor.model), directions_of(editor.model, kind)
    assert len(a) == 2
    for name, side in a.items():
        delta = b[name] @ side
        assert delta.norm() > 0 and (delta @ directions[name]).norm() < 1e-4 * delta.norm()


@only_on_main
@pytest.mark.parametrize("kind", ALL)
def test_training_goes_on_from_the_raw_adapter(
    kind: str, host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P⊥ is no projection where alpha is below 1: projected at every edit, the first would fade away."""
    raw = Watched(host, "LoRA", monkeypatch)
    sp.register()
    editor = bench.editor("LoRA", kind, sphere={"alpha": 0.5})
    bench.edit(editor, FACTS[:2])
    trained, held = raw.after[0], sides(editor.model)[0]
    assert all(torch.equal(raw.before[1][name], trained[name]) for name in trained)
    directions = directions_of(editor.model, kind)
    for name, a in raw.after[1].items():
        basis = directions[name]
        expected = a - 0.5 * (a @ basis) @ basis.T
        torch.testing.assert_close(held[name], expected, rtol=0, atol=1e-6)
        assert (held[name] - a).norm() > 0.01 * a.norm()


@only_on_main
@pytest.mark.parametrize(("method", "kind"), ADAPTERS)
def test_without_strength_an_adapter_is_easyedits(method: str, kind: str, bench: Bench) -> None:
    plain = bench.editor(method, kind)
    bench.edit(plain, FACTS[:2])
    sp.register()
    held = bench.editor(method, kind, sphere={"alpha": 0.0})
    bench.edit(held, FACTS[:2])
    for one, other in zip(sides(plain.model), sides(held.model), strict=True):
        assert len(one) == 2 and same(one, other)


@only_on_main
def test_training_goes_on_from_what_somebody_has_put_back(
    host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Watched(host, "LoRA", monkeypatch)
    sp.register()
    editor = bench.editor("LoRA", "llama", sphere={"alpha": 0.5})
    bench.edit(editor, FACTS[:1])
    kept, held = copies(editor.model), sides(editor.model)[0]
    bench.edit(editor, FACTS[1:2])
    with torch.no_grad():
        for name, weight in editor.model.named_parameters():
            weight.copy_(kept[name])
    bench.edit(editor, FACTS[2:3])
    assert same(raw.before[2], held) and not same(raw.before[1], held)


@only_on_main
def test_dpo_begins_a_new_adapter_at_every_edit_and_the_log_says_so(
    host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EasyEdit's own doing: what the first edit has learned is zero when the second begins."""
    module, begun = sys.modules["easyeditor.models.dpo.dpo_main"], list[float]()
    train = module.execute_dpo

    def watched(model: nn.Module, *args: Any) -> Any:
        begun.append(sum(float(b.norm()) for b in sides(model)[1].values()))
        return train(model, *args)

    monkeypatch.setattr(module, "execute_dpo", watched)
    sp.register()
    editor = bench.editor("DPO", "llama", sphere={"alpha": 0.5})
    bench.edit(editor, FACTS[:3])
    assert begun == [0.0] * 3 and all(float(b.norm()) > 0 for b in sides(editor.model)[1].values())
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("EasyEdit's DPO begins a new adapter at every edit")


@only_on_main
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("method", ["LoRA", "DPO"])
def test_a_training_that_fails_leaves_a_model_that_answers_as_before(
    method: str, before: int, host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = host.alg_dict[method], list[int]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = train(*args, **kwargs)
        return result if len(calls) <= before else _interrupt()

    monkeypatch.setitem(host.alg_dict, method, interrupted)
    sp.register()
    editor = bench.editor(method, "llama", sphere=True)
    tokens = editor.tok("Water boils at", return_tensors="pt")
    unedited = editor.model(**tokens).logits
    if before:
        bench.edit(editor, FACTS[:before])
    logits = editor.model.eval()(**tokens).logits
    assert torch.equal(logits, unedited) != bool(before)
    with pytest.raises(KeyboardInterrupt):
        bench.edit(editor, FACTS[1:2])
    assert torch.equal(editor.model.eval()(**tokens).logits, logits)


@only_on_main
def test_a_projection_that_fails_leaves_the_raw_adapter_of_the_edit_before(
    host: Host, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Watched(host, "LoRA", monkeypatch)
    sp.register()
    editor = bench.editor("LoRA", "llama", sphere={"alpha": 0.5})
    bench.edit(editor, FACTS[:1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sphere_plugin.easyedit.adapters.project_layers", lambda *_: _interrupt())
        bench.edit(editor, FACTS[1:2])
    bench.edit(editor, FACTS[1:2])
    assert same(raw.before[2], raw.after[0])


def _interrupt() -> dict[str, Any]:
    raise KeyboardInterrupt


# ---- padding, batches, and EasyEdit's other editors of text ----


PADDED = [
    ("PMET", "right"),
    ("MEMIT-FE", "right"),
    ("SimIE", "right"),
    ("ROME", "right"),
    ("FT", "left"),
    ("MEND", "left"),
]


@pytest.mark.parametrize(("method", "side"), PADDED if KIND == "main" else PADDED[3:])
def test_methods_that_count_positions_from_the_left_are_padded_on_the_right(
    method: str, side: str, bench: Bench
) -> None:
    """EasyEdit forgets three of them; PMET's update is then NaN. Without a key nothing of it is touched."""
    sp.register()
    for keys, expected in (({}, "left"), ({"sphere": True}, side)):
        model, tokenizer = pico("llama")
        tokenizer.padding_side = "left"
        bench.fresh()
        editor = bench.editor_on(model, tokenizer, method, "llama", **keys)
        assert editor.tok.padding_side == expected
    bench.edit(editor, FACTS[:1])


def test_a_batch_is_restrained_as_one_update(bench: Bench) -> None:
    sp.register()
    editor = bench.editor("MEMIT", "llama", batch_size=2, sphere={"alpha": 1.0})
    before = copies(editor.model)
    keep = {"sequential_edit": True} if KIND == "main" else {}
    texts = {key: [fact[name] for fact in FACTS[:2]] for key, name in (("prompts", "prompt"), ("subject", "subject"))}
    targets = [fact["target_new"] for fact in FACTS[:2]]
    editor.batch_edit(**texts, target_new=targets, ground_truth=["Paris"] * 2, verbose=False, **keep)
    after = copies(editor.model)
    assert changed(before, after) == expected_to_change("MEMIT", "llama")
    assert all(along("llama", before[name], after[name]) < 1e-4 for name in changed(before, after))


@only_on_main
def test_the_editor_of_concepts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = sys.modules["easyeditor.editors.concept_editor"], []
    monkeypatch.setattr(
        module, "compute_concept_edit_quality", lambda model, *_, **__: seen.append(copies(model)) or {}
    )
    sp.register()
    editor = bench.editor("ROME", "llama", editor="ConceptEditor", sphere={"alpha": 1.0})
    assert isinstance(editor.apply_algo, WeightSession)
    before = copies(editor.model)
    fact = {key: value for key, value in FACTS[0].items() if key != "prompt"}
    editor.edit(prompts=FACTS[0]["prompt"], ground_truth="Paris", verbose=False, **fact)
    assert same(copies(editor.model), before)  # it takes edits back
    for name in expected_to_change("ROME", "llama"):
        assert along("llama", before[name], seen[-1][name]) < 1e-4
    by_prompt = {"model_name": pico("llama"), "device": "cpu"}
    assert editor.from_hparams(None, by_prompt).alg_name == "prompt"


@only_on_main
def test_the_editor_of_safety_finds_its_layer_late(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["easyeditor.editors.safety_editor"]
    monkeypatch.setattr(module, "compute_safety_edit_quality", lambda *_, **__: {})
    sp.register()
    editor = bench.editor("DINM", "llama", editor="SafetyEditor", sphere={"alpha": 1.0}, layers=[])
    assert isinstance(editor.apply_algo, WeightSession)
    editor.model.config.output_hidden_states = True
    before = copies(editor.model)
    harmless = {"general knowledge constraint": {"prompt": "Water boils at", "ground_truth": "100 degrees"}}
    editor.edit(
        editing_method="DINM",
        prompts=[FACTS[0]["prompt"]],
        prompts_with_systemPrompt=[FACTS[0]["prompt"]],
        target_new=["Rome"],
        ground_truth=["Paris"],
        locality_inputs=harmless,
        locality_inputs_with_systemPrompt=harmless,
        case_id=0,
        verbose=False,
    )
    after = copies(editor.model)
    (layer,) = editor.hparams.layers
    assert changed(before, after) == {f"model.layers.{layer}.mlp.down_proj.weight"}
    assert all(along("llama", before[name], after[name]) < 1e-4 for name in changed(before, after))


# ---- the table ----


def test_the_table_has_every_method_of_the_host(host: Host) -> None:
    known = set(METHODS) - {"RECT", "PRUNE", "ICE"}  # ours, and one that EasyEdit names but does not enter
    assert set(host.alg_dict) == known if KIND == "main" else set(host.alg_dict) <= known


def test_the_page_of_methods_is_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == list(METHODS)
    expected = {
        "weights": ("", "projects ΔW"),
        "base": ("what its base method writes", "projects the ΔW of its base method"),
        "adapter": ("a LoRA", "projects A"),
        "nothing": ("no weight", "refused: "),
        "own": ("`rewrite_module_tmp`", "projects ΔW"),
    }
    for name, writes, does, _ in rows:
        method = METHODS[name]
        first, second = expected[method.writes]
        named = "feed-forward outputs" if method.names == "ffn" else f"`{method.names}`"
        assert writes.startswith(named if method.names else first), name
        assert does.startswith(second + method.why_not), name
