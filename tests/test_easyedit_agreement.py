"""Our closed forms against those of EasyEdit main, run side by side on the same model, targets, keys and statistics.

Needs a checkout: set EASYEDIT_HOME. What is compared are main's own functions; of them only what they would fetch,
generate or cache (statistics, contexts, targets) is handed to them.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REQUESTS, TEMPLATES, pico_config
from pico import pico
from torch import Tensor, nn

from sphere_plugin import Editor, HostError
from sphere_plugin.easyedit.host import find_host, load_host
from sphere_plugin.editing.aim import aim
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.editing.statistics import key_moments

try:
    HOST = find_host()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)
if HOST.kind != "main":
    pytest.skip("EASYEDIT_HOME is not set: no checkout of EasyEdit to compare with", allow_module_level=True)

PREFIXES = ("He said it. ", "A new line starts here and goes on. ", "I was 7. ")
SECOND = [
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "guitar"},
    {"prompt": "Toyota Camry is produced by", "subject": "Toyota Camry", "target_new": "Microsoft"},
    {"prompt": "Who knows that {} boils at", "subject": "Water", "target_new": "100"},
]
MODULES = {
    "AlphaEdit": "easyeditor.models.alphaedit.AlphaEdit_main",
    "MEMIT": "easyeditor.models.memit.memit_main",
    "SPHERE": "easyeditor.models.SPHERE.SPHERE_main",
}
FUNCTIONS = {
    "AlphaEdit": "apply_AlphaEdit_to_model",
    "MEMIT": "apply_memit_to_model",
    "SPHERE": "apply_SPHERE_to_model",
}
YAMLS = {
    ("AlphaEdit", "llama"): "llama3-8b",
    ("AlphaEdit", "gpt2"): "gpt2-xl",
    ("MEMIT", "llama"): "llama3.2-3b",
    ("MEMIT", "gpt2"): "gpt2-xl",
    ("SPHERE", "llama"): "llama3-8b",
}
# Words in its model's name by which main decides about shapes.
NAMES = {"llama": "pico-llama", "gpt2": "pico-gpt2-xl"}


class Main:
    """One method of EasyEdit main on a copy of our editor's model, fed with our contexts and statistics."""

    def __init__(self, method: str, kind: str, editor: Editor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: ModuleType = sys.modules[MODULES[method]]
        self.method, self.editor, self.monkeypatch = method, editor, monkeypatch
        self.model: nn.Module = copy.deepcopy(editor.anatomy.model)
        self.tokenizer = editor.tokenizer
        self.hparams = self._hparams(kind, folder)
        self.templates = [["{}"], [prefix + "{}" for prefix in editor.contexts.prefixes[1:]]]
        monkeypatch.setattr(self.module, "CONTEXT_TEMPLATES_CACHE", self.templates)
        moments = key_moments(editor.anatomy, editor.tokenizer, editor.config)
        named = {editor.config.rewrite_module_tmp.format(layer): moment for layer, moment in moments.items()}
        monkeypatch.setattr(self.module, "get_cov", lambda model, tok, name, *_, **__: named[name])
        if method != "MEMIT":  # its globals, gone again after the test
            monkeypatch.setattr(self.module, "P_loaded", False)
            monkeypatch.setattr(self.module, "cache_c_new", False)
            monkeypatch.setattr(self.module, "P", None, raising=False)
            monkeypatch.setattr(self.module, "cache_c", None, raising=False)
            monkeypatch.chdir(folder)  # it writes its null space here

    def _hparams(self, kind: str, folder: Path) -> Any:
        package, config = sys.modules["easyeditor"], self.editor.config
        own = {"AlphaEdit": "AlphaEditHyperParams", "MEMIT": "MEMITHyperParams", "SPHERE": "SPHEREHyperParams"}
        yaml = HOST.location.parent / "hparams" / self.method / f"{YAMLS[self.method, kind]}.yaml"
        hparams = getattr(package, own[self.method]).from_hparams(str(yaml))
        layer, rewrite, norm = TEMPLATES[kind]
        changes = {
            "model_name": NAMES[kind],
            "device": "cpu",
            "layers": config.layers,
            "rewrite_module_tmp": f"{layer}.{rewrite}",
            "layer_module_tmp": layer,
            "ln_f_module": norm,
            # Main's MEMIT does not find a head that is tied to the embeddings.
            "lm_head_module": "transformer.wte" if (self.method, kind) == ("MEMIT", "gpt2") else "lm_head",
            "v_loss_layer": 3,
            "fact_token": "subject_last",
        }
        same = ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "mom2_update_weight")
        changes |= {name: getattr(config, name) for name in same}
        if self.method != "MEMIT":
            changes |= {"nullspace_threshold": config.nullspace_threshold, "L2": config.L2}
            changes["P_loc"] = str(folder / "not_there.pt")
        if self.method == "SPHERE":
            changes |= {"cumulative_ratio": config.eta, "suppression_strength": config.alpha}
        for name, value in changes.items():
            assert hasattr(hparams, name), f"main's hparams have no {name} any more"
            setattr(hparams, name, value)
        return hparams

    def compute_z(self, request: dict[str, str]) -> Tensor:
        """Main's target for one fact."""
        layer = self.hparams.layers[-1]
        found = self.module.compute_z(self.model, self.tokenizer, request, self.hparams, layer, self.templates)
        return found.detach()

    def compute_ks(self, requests: list[dict[str, str]], layer: int) -> Tensor:
        """Main's keys, [d_in, facts]."""
        return self.module.compute_ks(self.model, self.tokenizer, requests, self.hparams, layer, self.templates).T

    def apply(self, requests: list[dict[str, str]], targets: Tensor) -> None:
        """Write a batch whose target values [facts, width] are given."""
        of_subject = {request["subject"]: target for request, target in zip(requests, targets, strict=True)}
        with self.monkeypatch.context() as patch:
            patch.setattr(self.module, "compute_z", lambda model, tok, request, *_: of_subject[request["subject"]])
            getattr(self.module, FUNCTIONS[self.method])(self.model, self.tokenizer, requests, self.hparams)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pair(method, kind, **settings) -> our editor, and main's method on a copy of its model."""
    load_host()

    def make(method: str, kind: str, **settings: object) -> tuple[Editor, Main]:
        threshold = 2.0 if kind == "llama" else 0.15
        base = "MEMIT" if method == "MEMIT" else "AlphaEdit"
        config = {
            "base_method": base,
            "alpha": 0.0,
            "nullspace_threshold": threshold,
            "v_num_grad_steps": 8,
            **settings,
        }
        editor = Editor(*pico(kind), pico_config(kind, **config))
        editor._contexts = Contexts(("", *PREFIXES), (0.5, 1 / 6, 1 / 6, 1 / 6))
        return editor, Main(method, kind, editor, tmp_path, monkeypatch)

    return make


def spelled(requests: list[dict[str, str]]) -> list[dict[str, str]]:
    """Requests as main's inner functions take them: {} in the prompt, a space before the target."""
    return [
        {
            **request,
            "prompt": request["prompt"].replace(request["subject"], "{}"),
            "target_new": " " + request["target_new"],
        }
        for request in requests
    ]


def both(editor: Editor, main: Main, requests: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Write a batch with both, aimed at our targets.

    Returns:
        ‖ΔW − ΔW'‖ / ‖ΔW'‖ and ‖ΔW'‖ / ‖W'‖ layer by layer, ΔW our update and ΔW' theirs.
    """

    def copies(model: nn.Module) -> list[Tensor]:
        return [model.get_parameter(name).detach().clone() for name in editor.anatomy.weights]

    ours, theirs = copies(editor.anatomy.model), copies(main.model)
    report = editor.apply(requests)
    main.apply(requests, report.aimed.values)
    our_updates = [after - before for after, before in zip(copies(editor.anatomy.model), ours, strict=True)]
    their_updates = [after - before for after, before in zip(copies(main.model), theirs, strict=True)]
    pairs = list(zip(our_updates, their_updates, strict=True))
    found = [float((one - other).norm() / other.norm()) for one, other in pairs]
    written = [float(update.norm() / weight.norm()) for update, weight in zip(their_updates, theirs, strict=True)]
    print("relative differences of the updates:", ", ".join(f"{value:.1e}" for value in found))
    return found, written


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_read_the_same_tokens(kind: str, pair) -> None:
    """What the other tests rely on: their differences are differences of arithmetic."""
    editor, main = pair("AlphaEdit", kind)
    locator, find = editor.locator, main.module.find_fact_lookup_idx
    for request, fact in zip(spelled(REQUESTS + SECOND), read_requests(REQUESTS + SECOND), strict=True):
        said = editor.tokenizer.decode(locator.aimed(fact).targets[:-1])
        for prefix in editor.contexts.prefixes:
            sentence = locator.aimed(fact, prefix)
            assert list(sentence.ids) == editor.tokenizer(prefix + fact.prompt + said)["input_ids"]
            template = prefix + request["prompt"]
            theirs = find(template, fact.subject, editor.tokenizer, "subject_last", verbose=False)
            assert sentence.lookup == theirs


@pytest.mark.parametrize("settings", [{}, {"kl_factor": 5.0, "clamp_norm_factor": 0.3}], ids=["usual", "held back"])
@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_targets_agree_fact_by_fact(kind: str, method: str, settings: dict, pair) -> None:
    editor, main = pair(method, kind, **settings)
    aimed = aim(editor.anatomy, editor.locator, read_requests(REQUESTS), editor.contexts.prefixes, editor.config)
    assert aimed.steps.tolist() == [8] * 3, "a search stopped early"
    start = KeyReader(editor.anatomy, editor.locator, read_requests(REQUESTS), editor.contexts, 8192).read(2)[1].T
    for number, request in enumerate(spelled(REQUESTS)):
        theirs = main.compute_z(request)
        ours_moved, theirs_moved = aimed.values[number] - start[number], theirs - start[number]
        cosine = torch.cosine_similarity(ours_moved, theirs_moved, dim=0)
        gap = (aimed.values[number] - theirs).norm() / theirs_moved.norm()
        print(f"cosine of the way from h to z: 1 - {1 - float(cosine):.1e}, relative difference {float(gap):.1e}")
        assert cosine > 0.999
        assert gap < 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_keys_agree(kind: str, pair) -> None:
    editor, main = pair("AlphaEdit", kind)
    reader = KeyReader(editor.anatomy, editor.locator, read_requests(REQUESTS), editor.contexts, 8192)
    for layer in (1, 2):
        ours, theirs = reader.read(layer)[0], main.compute_ks(spelled(REQUESTS), layer)
        assert ours.shape == theirs.shape == ((64 if kind == "llama" else 96), 3)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_updates_agree_over_two_batches(kind: str, method: str, pair) -> None:
    """Without SPHERE our editor is its base method; AlphaEdit's second batch is held off the keys of the first."""
    editor, main = pair(method, kind)
    for requests in (REQUESTS, SECOND):
        found, written = both(editor, main, requests)
        assert max(found) < 1e-3
        assert min(written) > 1e-3


def test_the_history_is_what_makes_the_second_batch_agree(pair) -> None:
    editor, main = pair("AlphaEdit", "llama")
    both(editor, main, REQUESTS)
    main.module.cache_c.zero_()
    found, _ = both(editor, main, SECOND)
    assert max(found) > 1e-2


def test_sphere_projected_afterwards_agrees_with_easyedits_own(pair) -> None:
    editor, main = pair("SPHERE", "llama", alpha=0.5, projection="post")
    found, _ = both(editor, main, REQUESTS)
    assert max(found) < 1e-3


def test_sphere_projected_in_the_loop_agrees_with_easyedits_own_on_the_first_layer_only(pair) -> None:
    """What tells the two apart, and that the test above can fail."""
    editor, main = pair("SPHERE", "llama", alpha=0.5, projection="in_loop")
    (first, second), _ = both(editor, main, REQUESTS)
    assert first < 1e-3 < 1e-2 < second
