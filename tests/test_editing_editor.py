"""SPHERE's own editor as its users meet it: what it writes, leaves alone, undoes and refuses."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import KINDS, pico
from tokenizers.normalizers import Replace
from torch import Tensor, nn

from sphere_plugin import ConfigError, Editor, ModelError, PrincipalSpace, RequestError, SphereError
from sphere_plugin.editing.aim import aim
from sphere_plugin.editing.anatomy import Rewrite
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.editor import EditReport
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.replay import Recording
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.editing.statistics import READING, WRITING, key_moments
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Snapshot
from sphere_plugin.restraints import Restrained, SphereConfig

SECOND = [
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "guitar"},
    {"prompt": "Toyota Camry is produced by", "subject": "Toyota Camry", "target_new": "Microsoft"},
]
THIRD = [{"prompt": "Water boils at 100", "subject": "Water", "target_new": "lines"}]
# Prompts that end with their subject: the aimed hidden state itself predicts the target.
ENDING = [
    {"prompt": "In Italy stands the {}", "subject": "Colosseum", "target_new": "is"},
    {"prompt": "iPhone 5", "subject": "iPhone 5", "target_new": "the"},
]
BASES = ("AlphaEdit", "MEMIT")
PROJECTIONS = ("in_loop", "post")


def make(kind: str = "llama", seed: int = 0, **settings: object) -> Editor:
    """An editor on a fresh pico model; AlphaEdit's null space takes up about half of all dimensions."""
    threshold = 2.0 if kind in ("llama", "qwen2") else 0.15
    model, tokenizer = pico(kind, seed)
    return Editor(model, tokenizer, pico_config(kind, **{"nullspace_threshold": threshold, **settings}))


def stored(editor: Editor) -> dict[str, Tensor]:
    """Copies of all parameters of the model, edited or not."""
    return {name: weight.detach().clone() for name, weight in editor.anatomy.model.named_parameters()}


def matrices(kind: str, editor: Editor) -> dict[int, Tensor]:
    """Copies of the edited weights with one neuron per row, [d_out, d_in]; GPT-2's Conv1D keeps the transpose."""
    config = editor.config
    modules = {n: editor.anatomy.model.get_submodule(config.rewrite_module_tmp.format(n)) for n in config.layers}
    weights = {n: module.weight.detach().clone() for n, module in modules.items()}
    return {n: weight.T if kind == "gpt2" else weight for n, weight in weights.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def directions(weight: Tensor, eta: float = 0.5) -> Tensor:
    """U [d_in, r] by singular values, as the paper's eq. 10 and 11 read once rows are normalised."""
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    return right[: int((shares <= eta).sum()) + 1].T


def project(delta: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ΔW(I − αUUᵀ), U of ``weight``."""
    u = directions(weight)
    return delta.double() - alpha * (delta.double() @ u) @ u.T


def along(delta: Tensor, weight: Tensor) -> float:
    """‖ΔW U‖ / ‖ΔW‖, U of ``weight``."""
    return float((delta @ PrincipalSpace.fit(weight, 0.5).basis).norm() / delta.norm())


def likelihoods(editor: Editor, requests: list[dict[str, str]]) -> Tensor:
    """Mean log-probability per token of each target behind its prompt, by a plain forward pass."""
    values = []
    for request in requests:
        prompt = editor.tokenizer(request["prompt"].replace("{}", request["subject"]))["input_ids"]
        target = editor.tokenizer(" " + request["target_new"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = editor.anatomy.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        values.append(torch.log_softmax(logits, dim=1).gather(1, torch.tensor(target)[:, None]).mean())
    return torch.stack(values)


def losses(editor: Editor, requests: list[dict[str, str]]) -> Tensor:
    """What aiming finds before its first step: the loss of the model as it is."""
    config = pico_config("llama", **{**vars(editor.config), "v_num_grad_steps": 1})
    return aim(editor.anatomy, editor.locator, read_requests(requests), editor.contexts.prefixes, config).losses


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Layer -> the updates its closed form has returned, as they were before any restraint."""
    noted: dict[int, list[Tensor]] = {}
    for form in (AlphaEdit, Memit):

        def update(self, keys, residuals, original=form.update):
            delta = original(self, keys, residuals)
            noted.setdefault(self.layer, []).append(delta.dense())
            return delta

        monkeypatch.setattr(form, "update", update)
    return noted


# ---- what an edit does ----


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_lowers_the_loss_it_was_aimed_at_and_makes_its_targets_likelier(kind: str, base: str) -> None:
    editor = make(
        kind,
        base_method=base,
        layers=[2, 3],
        v_num_grad_steps=20,
        clamp_norm_factor=3.0,
        L2=0.1,
        mom2_update_weight=0.1,
        context_template_length_params=[[5, 1]],
    )
    loss, before = losses(editor, ENDING), likelihoods(editor, ENDING)
    report = editor.apply(ENDING)
    assert (report.aimed.losses < loss - 1.0).all()
    assert (losses(editor, ENDING) < loss - 0.5).all()
    assert (likelihoods(editor, ENDING) > before + 0.5).all()


class Plainly:
    """The same edit by the formulas: dense systems, one sentence at a time, on a model of its own.

    Only the targets are taken over.
    """

    def __init__(self, kind: str, editor: Editor) -> None:
        self.kind, self.editor, self.config = kind, editor, editor.config
        self.model, _ = pico(kind)
        self.moments = key_moments(editor.anatomy, editor.tokenizer, editor.config)
        self.past = {layer: torch.zeros_like(moment).double() for layer, moment in self.moments.items()}

    def weight(self, layer: int) -> Tensor:
        """The live weight, one neuron per row."""
        weight = self.model.get_submodule(self.config.rewrite_module_tmp.format(layer)).weight.detach()
        return weight.T if self.kind == "gpt2" else weight

    def read(self, facts: list, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, facts] of one layer, averaged over the prefixes, and values [width, facts] of the last one."""
        keys, values = [], []
        for fact in facts:
            key = 0.0
            for prefix, share in zip(self.editor.contexts.prefixes, self.editor.contexts.shares, strict=True):
                sentence = self.editor.locator.keyed(fact, prefix)
                seen: list[Tensor] = []
                rewritten = self.model.get_submodule(self.config.rewrite_module_tmp.format(layer))
                last = self.model.get_submodule(self.config.layer_module_tmp.format(self.config.layers[-1]))
                handles = [
                    rewritten.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
                    last.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out)),
                ]
                with torch.no_grad():
                    self.model(torch.tensor([sentence.ids]))
                for handle in handles:
                    handle.remove()
                entered, left = (hidden[0] if isinstance(hidden, tuple) else hidden for hidden in seen)
                key = key + share * entered[0, sentence.lookup].double()
                if not prefix:
                    values.append(left[0, sentence.lookup].double())
            keys.append(key)
        return torch.stack(keys, dim=1), torch.stack(values, dim=1)

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """MEMIT's and AlphaEdit's equations, to the letter."""
        moment, config = self.moments[layer].double(), self.config
        if config.base_method == "MEMIT":
            return residuals @ keys.T @ torch.linalg.inv(config.mom2_update_weight * moment + keys @ keys.T)
        values, vectors = torch.linalg.eigh(moment)
        null = vectors[:, values < config.nullspace_threshold]
        p, one = null @ null.T, torch.eye(len(moment)).double()
        return residuals @ keys.T @ p @ torch.linalg.inv((keys @ keys.T + self.past[layer]) @ p + config.L2 * one)

    def apply(self, requests: list[dict[str, str]], targets: Tensor) -> None:
        facts, layers = read_requests(requests), self.config.layers
        start = {layer: self.weight(layer).clone() for layer in layers}
        in_loop = self.config.projection == "in_loop"
        updates = {}
        for number, layer in enumerate(layers):
            keys, values = self.read(facts, layer)
            update = self.update(layer, keys, (targets.T.double() - values) / (len(layers) - number))
            updates[layer] = project(update, start[layer], self.config.alpha)
            self.weight(layer).add_((updates[layer] if in_loop else update).float())
        for layer in layers:
            self.weight(layer).copy_(start[layer] + updates[layer].float())
        for layer in layers:
            keys, _ = self.read(facts, layer)
            self.past[layer] += keys @ keys.T


@pytest.mark.parametrize(
    ("kind", "base", "projection"),
    [
        *((kind, "AlphaEdit", "in_loop") for kind in KINDS),
        ("llama", "AlphaEdit", "post"),
        ("gpt2", "MEMIT", "in_loop"),
    ],
)
def test_two_batches_are_those_of_the_formulas(kind: str, base: str, projection: str) -> None:
    editor = make(kind, base_method=base, alpha=0.5, projection=projection)
    plainly = Plainly(kind, editor)
    for requests in (REQUESTS, SECOND):
        before = matrices(kind, editor)
        report = editor.apply(requests)
        plainly.apply(requests, report.aimed.values)
        for layer, after in matrices(kind, editor).items():
            assert (after - plainly.weight(layer)).norm() < 1e-3 * (after - before[layer]).norm()


def test_only_the_named_weights_change() -> None:
    editor = make()
    before = stored(editor)
    editor.apply(REQUESTS)
    changed = {name for name, weight in stored(editor).items() if not torch.equal(weight, before[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"}


def test_a_batch_says_what_it_did_in_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    editor = make()
    editor.prepare()
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        editor.apply(REQUESTS)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "AlphaEdit + SPHERE wrote 3 facts into 2 weights" in record.getMessage()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_settings_and_facts_give_the_same_bits(kind: str) -> None:
    results = []
    for _ in range(2):
        editor = make(kind)
        editor.apply(REQUESTS)
        editor.apply(SECOND)
        results.append(stored(editor))
        torch.rand(3)  # what the program around draws is none of the editor's business
    assert same(*results)


def test_the_seed_changes_the_prefixes() -> None:
    one, other = (Editor(*pico("llama"), pico_config("llama", seed=seed)).contexts for seed in (0, 1))
    assert one.prefixes != other.prefixes
    assert one.shares == other.shares == (0.5, 0.25, 0.25)


# ---- what SPHERE holds back ----


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    ("kind", "base"), [*((kind, "AlphaEdit") for kind in KINDS), ("llama", "MEMIT"), ("gpt2", "MEMIT")]
)
def test_at_full_strength_nothing_is_written_along_the_principal_directions(
    kind: str, base: str, projection: str
) -> None:
    editor = make(kind, base_method=base, alpha=1.0, projection=projection)
    for requests in (REQUESTS, SECOND):
        before = matrices(kind, editor)
        editor.apply(requests)
        for layer, after in matrices(kind, editor).items():
            assert along(after - before[layer], before[layer]) < 1e-4
    free = make(kind, base_method=base, alpha=0.0, projection=projection)
    before = matrices(kind, free)
    free.apply(REQUESTS)
    assert all(along(after - before[n], before[n]) > 0.05 for n, after in matrices(kind, free).items())


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("base", BASES)
def test_strength_zero_is_the_base_method_bit_for_bit(
    base: str, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = make(base_method=base, alpha=0.0, projection=projection)
    monkeypatch.setattr(SphereConfig, "bind", lambda self, pretrained: lambda weight, delta: Restrained(delta, 0.0, 0))
    bypassed = make(base_method=base, alpha=0.8, projection=projection)
    monkeypatch.undo()
    on = make(base_method=base, alpha=0.8, projection=projection)
    for requests in (REQUESTS, SECOND):
        for editor in (off, bypassed, on):
            editor.apply(requests)
    assert same(stored(off), stored(bypassed))
    assert not same(stored(off), stored(on))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_post_writes_the_projection_of_the_update_without_sphere(kind: str, base: str) -> None:
    plain, post = make(kind, base_method=base, alpha=0.0), make(kind, base_method=base, alpha=0.6, projection="post")
    before = matrices(kind, plain)
    plain.apply(REQUESTS)
    post.apply(REQUESTS)
    unprojected, written = matrices(kind, plain), matrices(kind, post)
    for layer, weight in before.items():
        expected = project(unprojected[layer] - weight, weight, 0.6)
        assert (written[layer] - weight - expected).norm() < 1e-4 * expected.norm()


def test_in_loop_and_post_differ_from_the_second_layer_on() -> None:
    in_loop, post = (make(projection=projection, alpha=0.8) for projection in PROJECTIONS)
    for editor in (in_loop, post):
        editor.apply(REQUESTS)
    ours, theirs, start = matrices("llama", in_loop), matrices("llama", post), matrices("llama", make())
    assert torch.equal(ours[1], theirs[1])
    assert (ours[2] - theirs[2]).norm() > 1e-3 * (theirs[2] - start[2]).norm()


def test_in_loop_and_post_are_the_same_for_one_layer() -> None:
    in_loop, post = (make(projection=projection, alpha=0.8, layers=[2]) for projection in PROJECTIONS)
    for requests in (REQUESTS, SECOND):
        for editor in (in_loop, post):
            editor.apply(requests)
    assert same(stored(in_loop), stored(post))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("basis", ["current", "pretrained"])
def test_the_second_batch_is_projected_with_the_weight_that_basis_names(
    basis: str, projection: str, solved: dict[int, list[Tensor]]
) -> None:
    editor = make(basis=basis, projection=projection, alpha=0.7, clamp_norm_factor=3.0)
    pretrained = matrices("llama", editor)
    editor.apply(REQUESTS)
    current = matrices("llama", editor)
    editor.apply(SECOND)
    for layer, after in matrices("llama", editor).items():
        delta, written = solved[layer][1], after - current[layer]
        of_current, of_pretrained = (project(delta, weights[layer], 0.7) for weights in (current, pretrained))
        assert (of_current - of_pretrained).norm() > 1e-2 * delta.norm(), "the two bases are alike: nothing was tested"
        expected = of_current if basis == "current" else of_pretrained
        assert (written - expected).norm() < 1e-4 * expected.norm()


def test_conv1d_is_projected_on_the_side_of_its_neurons() -> None:
    """EasyEdit's own SPHERE normalises and projects the other side of GPT-2's transposed weights."""
    editor = make("gpt2", alpha=1.0)
    before = {n: rewrite.parameter.detach().clone() for n, rewrite in editor.anatomy.rewrites.items()}  # [d_in, d_out]
    editor.apply(REQUESTS)
    for layer, rewrite in editor.anatomy.rewrites.items():
        assert before[layer].shape == (96, 32)
        delta = rewrite.parameter.detach() - before[layer]
        assert (directions(before[layer].T).T @ delta.double()).norm() < 1e-4 * delta.norm()
        assert (delta.double() @ directions(before[layer])).norm() > 0.05 * delta.norm()


# ---- what the report says ----


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_report_tells_what_was_written(kind: str, projection: str, solved: dict[int, list[Tensor]]) -> None:
    editor = make(kind, projection=projection, alpha=0.7)
    before = matrices(kind, editor)
    report = editor.apply(REQUESTS)
    after = matrices(kind, editor)
    assert (report.facts, len(report.layers)) == (3, 2)
    for layer, said in zip((1, 2), report.layers, strict=True):
        delta, weight = solved[layer][0].double(), before[layer]
        u = directions(weight)
        removed = 0.7 * (2 - 0.7) * (delta @ u).square().sum() / delta.square().sum()
        assert said.name == editor.config.rewrite_module_tmp.format(layer) + ".weight"
        assert said.rank == u.shape[1]
        assert said.removed_share == pytest.approx(float(removed), abs=1e-4)
        assert said.update_norm == pytest.approx(float((after[layer] - weight).norm()), rel=1e-4)
        assert said.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
    aimed = report.aimed
    assert aimed.values.shape == (3, 32) and aimed.values.dtype == torch.float32
    assert aimed.steps.tolist() == [editor.config.v_num_grad_steps] * 3 and torch.isfinite(aimed.losses).all()


def test_without_sphere_the_report_shows_no_space_and_nothing_removed() -> None:
    report = make(alpha=0.0).apply(REQUESTS)
    assert [(layer.rank, layer.removed_share) for layer in report.layers] == [(0, 0.0), (0, 0.0)]


# ---- two editors in one process ----


@pytest.mark.parametrize(("kind", "seed"), [("llama", 1), ("gpt2", 0)])
def test_two_models_edited_in_turn_come_out_as_each_alone(kind: str, seed: int) -> None:
    """EasyEdit's own SPHERE keeps null space, key cache and contexts in module globals: the second model got the
    first one's."""

    def alone(kind: str, seed: int) -> tuple[list[dict[str, Tensor]], Editor]:
        editor = make(kind, seed)
        steps = []
        for requests in (REQUESTS, SECOND, THIRD):
            editor.apply(requests)
            steps.append(stored(editor))
        return steps, editor

    (first, one), (second, other) = alone("llama", 0), alone(kind, seed)
    a, b = make("llama", 0), make(kind, seed)
    for number, requests in enumerate((REQUESTS, SECOND, THIRD)):
        for editor, expected in ((a, first), (b, second)):
            editor.apply(requests)
            assert same(stored(editor), expected[number])
    assert a.contexts == one.contexts and b.contexts == other.contexts and a.contexts != b.contexts


# ---- undoing ----


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_restore_is_bit_exact(kind: str) -> None:
    editor = make(kind)
    before = stored(editor)
    for requests in (REQUESTS, SECOND):
        editor.apply(requests)
    assert not same(stored(editor), before)
    editor.restore()
    assert same(stored(editor), before)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("batches", [[], [SECOND], [REQUESTS], [SECOND, THIRD], [SECOND, THIRD, ENDING]], ids=len)
def test_a_restored_model_is_edited_as_if_for_the_first_time(batches: list, projection: str) -> None:
    """EasyEdit's key cache outlives a restore: facts that were undone still count as earlier edits (its issue 613)."""
    fresh, editor = make(projection=projection), make(projection=projection)
    fresh.apply(REQUESTS)
    for requests in batches:
        editor.apply(requests)
    editor.restore()
    for _ in range(2):
        editor.apply(REQUESTS)
        assert same(stored(editor), stored(fresh))
        editor.restore()


def test_earlier_batches_do_count_while_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of restoring rely on: the key history changes what AlphaEdit writes."""
    editor, forgetful = make(), make()
    for one in (editor, forgetful):
        one.apply(REQUESTS)
    editor.apply(SECOND)
    monkeypatch.setattr(AlphaEdit, "remember", lambda self, keys: None)
    forgetful.apply(SECOND)
    assert not same(stored(editor), stored(forgetful))


def test_a_restored_model_after_prepare_and_a_foreign_change_is_edited_as_if_for_the_first_time() -> None:
    fresh, editor = make(), make()
    fresh.apply(REQUESTS)
    editor.prepare()
    with torch.no_grad():
        editor.anatomy.rewrites[1].parameter.add_(0.01)
    editor.restore()
    editor.apply(REQUESTS)
    assert same(stored(editor), stored(fresh))


def test_undoing_only_the_last_batch_takes_only_its_keys_out_of_the_history(caplog: pytest.LogCaptureFixture) -> None:
    straight, editor = make(), make()
    for requests in (REQUESTS, SECOND, THIRD):
        straight.apply(requests)
    editor.apply(REQUESTS)
    after_first = Snapshot.take(editor.anatomy.weights)
    editor.apply(THIRD)
    after_first.restore(editor.anatomy.weights)
    editor.apply(SECOND)
    after_second = Snapshot.take(editor.anatomy.weights)
    editor.apply(ENDING)
    after_second.restore(editor.anatomy.weights)
    editor.apply(THIRD)
    assert same(stored(editor), stored(straight))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_batch_undone_at_once_leaves_no_trace_however_often() -> None:
    """EasyEdit's sequential_edit=False: every edit is undone after it was scored."""
    editor, fresh = make(), make()
    for requests in (SECOND, THIRD, SECOND):
        before = Snapshot.take(editor.anatomy.weights)
        editor.apply(requests)
        before.restore(editor.anatomy.weights)
    for one in (editor, fresh):
        one.apply(REQUESTS)
        one.apply(SECOND)
    assert same(stored(editor), stored(fresh))


def test_a_foreign_change_of_the_weights_is_said_and_earlier_keys_are_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    editor, newcomer = make(), make()
    newcomer.prepare()  # both have the statistics of the unedited model
    editor.apply(REQUESTS)
    with torch.no_grad():
        editor.anatomy.rewrites[1].parameter.mul_(1.01)
    Snapshot.take(editor.anatomy.weights).restore(newcomer.anatomy.weights)
    assert not caplog.records
    editor.apply(SECOND)
    assert ["keys of earlier edits are forgotten" in record.getMessage() for record in caplog.records] == [True]
    newcomer.apply(SECOND)
    assert same(stored(editor), stored(newcomer))


# ---- going on ----


def test_after_resume_no_state_of_before_is_known_but_that_before_any_edit(caplog: pytest.LogCaptureFixture) -> None:
    """The weights once stood before batch 3; what the solvers know now is not what they knew then."""
    editor, newcomer = make(), make()
    newcomer.prepare()
    keys, states = [], [Snapshot.take(editor.anatomy.weights)]
    for batch in (REQUESTS, SECOND, THIRD):
        keys.append(editor.apply(batch).keys)
        states.append(Snapshot.take(editor.anatomy.weights))
    states[1].restore(editor.anatomy.weights)
    editor.resume(keys[:1])
    for one in (editor, newcomer):
        states[2].restore(one.anatomy.weights)
        one.apply(ENDING)
    assert caplog.text.count("keys of earlier edits are forgotten") == 2
    assert same(stored(editor), stored(newcomer))
    states[1].restore(editor.anatomy.weights)
    editor.resume(keys[:1])
    states[0].restore(editor.anatomy.weights)
    editor.apply(REQUESTS)
    assert same(editor.anatomy.weights, states[1].tensors)
    assert caplog.text.count("keys of earlier edits are forgotten") == 2


@pytest.mark.parametrize("given", [0, 2])
def test_memit_reads_no_keys_twice_and_goes_on_without_them(
    given: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches without keys it is told of."""
    first, second = make(base_method="MEMIT"), make(base_method="MEMIT")
    second.prepare()
    read: list[int] = []
    original = KeyReader.read
    monkeypatch.setattr(KeyReader, "read", lambda self, layer: [read.append(layer), original(self, layer)][1])
    keys = [first.apply(batch).keys for batch in (REQUESTS, SECOND)]
    assert keys == [{}, {}] and read == [1, 2, 1, 2]
    Snapshot.take(first.anatomy.weights).restore(second.anatomy.weights)
    second.resume(keys[:given])
    for one in (first, second):
        one.apply(THIRD)
    assert same(stored(first), stored(second))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# ---- a batch that fails ----


class Bomb:
    """Stands in for a function and raises ``error`` at call number ``at``, calling it otherwise."""

    def __init__(self, function: Callable, at: int, error: BaseException) -> None:
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def set(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: self(*args, **kwargs))

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


def world(editor: Editor) -> dict[str, object]:
    """Everything about a model, its tokenizer and the process that an edit must not change."""
    model, tokenizer = editor.anatomy.model, editor.tokenizer
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {name: [list(getattr(m, kind)) for kind in hooks] for name, m in model.named_modules()},
        "instance attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "grad": {name: weight.grad is None for name, weight in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, len(tokenizer)),
        "config": model.config.to_json_string(),
        "generation": model.generation_config.to_json_string(),
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


PLACES = {
    "while aiming": (torch.optim.Adam, "step", 2),
    "in a replayed layer": (Recording, "run", 9),
    "in the second layer's closed form": (AlphaEdit, "update", 2),
    "in the second layer's projection": (PrincipalSpace, "project", 2),
    "in the second layer's write": (Rewrite, "write", 2),
    "while reading keys for the history": (KeyReader, "read", 4),
}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", PLACES)
def test_a_batch_that_fails_leaves_no_trace(
    place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The history used to be dropped, too, when a batch after the first one failed."""
    editor, straight = make(), make()
    for one in (editor, straight):
        one.apply(REQUESTS)
    before, around = stored(editor), world(editor)
    owner, name, at = PLACES[place]
    bomb = Bomb(getattr(owner, name), at, error)
    bomb.set(monkeypatch, owner, name)
    with pytest.raises(type(error)):
        editor.apply(SECOND)
    monkeypatch.undo()
    assert bomb.calls == at, "the batch did not get that far: nothing was tested"
    assert same(stored(editor), before)
    assert world(editor) == around
    for one in (editor, straight):
        one.apply(THIRD)
    assert same(stored(editor), stored(straight))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_an_update_that_is_not_finite_is_refused_and_undone(
    value: float, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(projection=projection)
    editor.apply(REQUESTS)
    before = stored(editor)
    monkeypatch.setattr(AlphaEdit, "update", broken_on_layer(2, value))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight.*as before this batch"):
        editor.apply(SECOND)
    assert same(stored(editor), before)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
def test_a_loss_that_is_not_finite_is_refused(name: str) -> None:
    """The search took NaN for "good enough": nothing was written, and the log spoke of success."""
    editor = make()
    editor.prepare()
    before = stored(editor)
    weight = editor.anatomy.model.get_parameter(name)
    with torch.no_grad():
        kept = weight[5, 5].clone()
        weight[5, 5] = float("inf")
    with pytest.raises(ModelError, match=r"loss of requests\[0\]: got nan.*Nothing was written"):
        editor.apply(REQUESTS)
    with torch.no_grad():
        weight[5, 5] = kept
    assert same(stored(editor), before)


def test_an_update_that_does_not_fit_the_weights_dtype_is_refused_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite in float32, infinite once rounded: it was written as infinity, and only the next batch noticed."""
    editor = half(torch.float16)
    editor.prepare()
    before = stored(editor)
    monkeypatch.setattr(AlphaEdit, "update", broken_on_layer(2, 1e6))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight.*float32"):
        editor.apply(REQUESTS)
    assert same(stored(editor), before)


def broken_on_layer(layer: int, value: float) -> Callable:
    def update(self, keys, residuals, original=AlphaEdit.update):
        delta = original(self, keys, residuals)
        if self.layer != layer:
            return delta
        broken = delta.dense()
        broken[0, 0] = value
        return Factors(broken, torch.eye(len(keys)))

    return update


# ---- what an edit leaves alone ----


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_everything_around_the_weights_is_as_before(training: bool, side: str) -> None:
    editor = make()
    model, tokenizer = editor.anatomy.model, editor.tokenizer
    tokenizer.padding_side = side
    model.train(training)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    before = world(editor)
    editor.apply(REQUESTS)
    editor.apply(SECOND)
    editor.restore()
    assert world(editor) == before
    assert not model.lm_head.weight.grad.any()


def test_each_modules_own_training_flag_is_kept() -> None:
    """A model may have some modules frozen in evaluation mode; the root's flag used to be spread over all of them."""
    editor = make()
    editor.anatomy.model.train()
    editor.anatomy.model.model.layers[0].eval()
    before = world(editor)
    editor.apply(REQUESTS)
    assert world(editor) == before


def test_dropout_has_no_part_in_an_edit() -> None:
    def dropping() -> Editor:
        editor = make("gpt2")
        for module in editor.anatomy.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        return editor

    training, evaluating = dropping(), dropping()
    training.anatomy.model.train()
    for editor in (training, evaluating):
        editor.apply(REQUESTS)
    assert same(stored(training), stored(evaluating))


# ---- half precision ----


def half(dtype: torch.dtype, kind: str = "llama", **settings: object) -> Editor:
    model, tokenizer = pico(kind)
    threshold = 2.0 if kind == "llama" else 0.15
    return Editor(model.to(dtype), tokenizer, pico_config(kind, **{"nullspace_threshold": threshold, **settings}))


def half_a_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding ``values`` to ``dtype`` once can change in them at most."""
    exponent = values.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    return 0.5 * torch.finfo(dtype).eps * exponent.exp2()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_edited_in_float32_and_rounded_once(
    dtype: torch.dtype, kind: str, projection: str, solved: dict[int, list[Tensor]]
) -> None:
    """EasyEdit's own SPHERE calls eigh on the weight as it is, which half precision has not."""
    editor = half(dtype, kind, alpha=0.7, projection=projection)
    for batch, requests in enumerate((REQUESTS, SECOND)):
        before = matrices(kind, editor)
        report = editor.apply(requests)
        for layer, after in matrices(kind, editor).items():
            assert after.dtype == dtype
            expected = before[layer].double() + project(solved[layer][batch], before[layer].float(), 0.7)
            # Beside the rounding: what float32 itself loses, far below it.
            assert ((after.double() - expected).abs() <= 1.001 * half_a_step(expected, dtype) + 2e-6).all()
            assert not torch.equal(after, before[layer])
        assert all(0.0 < layer.removed_share < 1.0 for layer in report.layers)
    editor.restore()
    assert same(stored(editor), stored(half(dtype, kind)))


# ---- what is refused before anything is computed ----


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if aiming, counting or writing prefixes begins."""

    def reached(*_: object, **__: object) -> None:
        pytest.fail("computation began before the mistake was reported")

    for place in ("sphere_plugin.editing.editor.aim", "sphere_plugin.editing.editor.key_moments"):
        monkeypatch.setattr(place, reached)
    monkeypatch.setattr(Contexts, "generate", reached)
    # Every editor checks its model on one sentence as it is made.
    monkeypatch.setattr("sphere_plugin.editing.editor.check_replay", lambda *_: None)
    monkeypatch.setattr(nn.Module, "__call__", reached)
    yield


def check(error: SphereError, culprit: str, got: str, expected: str, remedy: str) -> None:
    """The message names culprit, value, expectation and remedy, in that order."""
    message, place = str(error), 0
    for part in (culprit, got, expected, remedy):
        assert part in message[place:], f"{part!r} is missing, or not in its place: {message}"
        place = message.index(part, place) + len(part)
    assert len(error.remedy) > 10


GOOD = REQUESTS[0]
BAD_REQUESTS = {
    "no request": ([], "requests", "[]", "at least one fact", "Pass the facts"),
    "subject not in the prompt": (
        [GOOD, {**GOOD, "subject": "Big Ben"}],
        "requests[1].subject",
        "'Big Ben'",
        "'The Eiffel Tower is in the city of'",
        "exactly as there",
    ),
    "empty subject": ([{**GOOD, "subject": " "}], "requests[0].subject", "' '", "non-empty", "Fill it in"),
    "no subject": ([{"prompt": "a", "target_new": "b"}], "requests[0].subject", "None", "the entity", "Fill it in"),
    "empty target": ([{**GOOD, "target_new": ""}], "requests[0].target_new", "''", "the new object", "Fill it in"),
    "empty target of CounterFact": (
        [{**GOOD, "target_new": {"str": ""}}], "requests[0].target_new", "''", "the new object", "Fill it in",
    ),
    "empty prompt": ([{**GOOD, "prompt": ""}], "requests[0].prompt", "''", "the sentence to complete", "Fill it in"),
    "two places for the subject": (
        [GOOD, GOOD, {**GOOD, "prompt": "{} or {} is in"}],
        "requests[2].prompt",
        "'{} or {} is in'",
        "one {} for the subject",
        "Write the other places out",
    ),
    "one request instead of a list": (GOOD, "requests", "{'prompt'", "a list of requests", "[request]"),
    "a request that is no mapping": (
        [GOOD, "The Eiffel Tower"], "requests[1]", "'The Eiffel Tower'", "a mapping", "target_new",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_cannot_be_edited_is_refused(case: str, nothing_computed: None) -> None:
    requests, *parts = BAD_REQUESTS[case]
    editor = make()
    with pytest.raises(RequestError) as caught:
        editor.apply(requests)
    check(caught.value, *parts)


@pytest.mark.parametrize("field", ["subject", "target_new"])
def test_words_that_the_tokenizer_drops_are_refused_by_number_and_field(field: str, nothing_computed: None) -> None:
    model, tokenizer = pico("llama")
    tokenizer.backend_tokenizer.normalizer = Replace("Zog" if field == "subject" else " Zog", "")
    editor = Editor(model, tokenizer, pico_config("llama"))
    subject = {"prompt": "Zog lives in", "subject": "Zog", "target_new": "Paris"}
    with pytest.raises(RequestError) as caught:
        editor.apply([GOOD, subject if field == "subject" else {**GOOD, "target_new": "Zog"}])
    check(caught.value, f"requests[1].{field}", "Zog", "tokenizer", "another")


BAD_SETTINGS = {
    "a layer too high": ({"layers": [1, 9]}, "layers", "9", "below 4", "layers 0 to 3"),
    "layers not ascending": ({"layers": [2, 1]}, "layers", "[2, 1]", "ascending", "Write layers"),
    "no layers": ({"layers": []}, "layers", "[]", "ascending", "Write layers"),
    "a rewrite template that matches nothing": (
        {"rewrite_module_tmp": "model.layers.{}.mlp.c_proj"},
        "rewrite_module_tmp",
        "'model.layers.1.mlp.c_proj'",
        "the path of a module",
        "'model.layers.1.mlp.up_proj'",
    ),
    "a layer template that matches nothing": (
        {"layer_module_tmp": "model.layer.{}", "rewrite_module_tmp": "model.layer.{}.mlp.down_proj"},
        "layer_module_tmp",
        "'model.layer.0'",
        "the path of a module",
        "'model.layers.0'",
    ),
    "a norm that is not there": (
        {"ln_f_module": "model.norms"}, "ln_f_module", "'model.norms'", "the path of a module", "'model.norm'",
    ),
    "a head that is not there": (
        {"lm_head_module": "head"}, "lm_head_module", "'head'", "the path of a module", "'lm_head'",
    ),
    "a rewritten module without a matrix": (
        {"rewrite_module_tmp": "model.layers.{}.input_layernorm"},
        "model.layers.1.input_layernorm.weight",
        "LlamaRMSNorm",
        "two-dimensional",
        "Name the linear layer",
    ),
    "a loss layer below the edits": ({"v_loss_layer": 1}, "v_loss_layer", "1", "from 2 to 3", "Leave it out"),
    "a loss layer above the model": ({"v_loss_layer": 31}, "v_loss_layer", "31", "from 2 to 3", "Leave it out"),
    "a loss layer in words": ({"v_loss_layer": "last"}, "v_loss_layer", "'last'", "whole number", "docs/hparams.md"),
    "a seed in words": ({"seed": "lucky"}, "seed", "'lucky'", "whole number", "docs/hparams.md"),
    "eta zero": ({"eta": 0.0}, "eta", "0.0", "(0, 1]", "0.5"),
    "eta above one": ({"eta": 50}, "eta", "50", "(0, 1]", "0.5"),
    "alpha negative": ({"alpha": -0.1}, "alpha", "-0.1", "[0, 1]", "0.8"),
    "alpha above one": ({"alpha": 1.5}, "alpha", "1.5", "[0, 1]", "0.8"),
    "alpha not a number": ({"alpha": float("nan")}, "alpha", "nan", "[0, 1]", "0.8"),
    "an unknown base method": ({"base_method": "ROME"}, "base_method", "'ROME'", "AlphaEdit, MEMIT", "spelling"),
    "an unknown projection": ({"projection": "after"}, "projection", "'after'", "in_loop, post", "spelling"),
    "an unknown basis": ({"basis": "old"}, "basis", "'old'", "current or pretrained", "default"),
    "no steps": ({"v_num_grad_steps": 0}, "v_num_grad_steps", "0", "at least 1", "docs/hparams.md"),
    "a text file that is not there": (
        {"mom2_dataset": "/no/such/text.txt"}, "mom2_dataset", "'/no/such/text.txt'", "that exists", "generated",
    ),
    "a relative text file that is not there": (
        {"mom2_dataset": "text.jsonl"}, "mom2_dataset", "'text.jsonl'", "that exists", "generated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_do_not_fit_are_refused(case: str, nothing_computed: None) -> None:
    settings, *parts = BAD_SETTINGS[case]
    expected = ModelError if case == "a rewritten module without a matrix" else ConfigError
    model, tokenizer = pico("llama")
    with pytest.raises(expected) as caught:
        Editor(model, tokenizer, pico_config("llama", **settings))
    check(caught.value, *parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weight_that_is_not_finite_is_named(kind: str, value: float, nothing_computed: None) -> None:
    editor = make(kind)
    name = "model.layers.2.mlp.down_proj.weight" if kind == "llama" else "transformer.h.2.mlp.c_proj.weight"
    with torch.no_grad():
        editor.anatomy.model.get_parameter(name)[3, 4] = value
    for attempt in (
        lambda: editor.apply(REQUESTS),
        lambda: Editor(editor.anatomy.model, editor.tokenizer, editor.config),
    ):
        with pytest.raises(ModelError) as caught:
            attempt()
        check(caught.value, name, "1 entries", "finite", "Reload")


def test_a_slow_tokenizer_is_refused(nothing_computed: None) -> None:
    model, _ = pico("llama")
    with pytest.raises(ModelError) as caught:
        Editor(model, SimpleNamespace(is_fast=False), pico_config("llama"))
    check(caught.value, "tokenizer", "SimpleNamespace", "a fast tokenizer", "AutoTokenizer")


def test_an_attention_that_takes_no_mask_is_refused(nothing_computed: None) -> None:
    model, tokenizer = pico("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError) as caught:
        Editor(model, tokenizer, pico_config("llama"))
    check(caught.value, "attention implementation", "'flash_attention_2'", "sdpa or eager", "attn_implementation=")


# ---- odd but allowed ----


def test_a_tokenizer_without_a_pad_token_will_do() -> None:
    """GPT-2's and LLaMA's tokenizers come without one."""
    editor, padless = make(), make()
    padless.tokenizer.pad_token = None
    for one in (editor, padless):
        one.apply(REQUESTS)
    assert padless.tokenizer.pad_token is None
    assert [len(p) > 0 for p in padless.contexts.prefixes] == [False, True, True]


@pytest.mark.parametrize(("kind", "warned"), [("gpt2", ["iPhone 5"]), ("llama", [])])
def test_a_subject_that_is_the_first_token_is_warned_about(
    kind: str, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A begin-of-text token before it, as LLaMA's tokenizers put it there, is enough."""
    editor = make(kind, fact_token="subject_first")
    editor.apply(ENDING)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == len(warned) and all(name in message for name, message in zip(warned, said, strict=True))


def test_progress_is_told_of_facts_and_texts(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    model, tokenizer = pico("llama")
    settings = {"token_budget": 64, "stats_dir": str(tmp_path)}
    editor = Editor(model, tokenizer, pico_config("llama", **settings), lambda *what: told.append(what))
    report = editor.apply(REQUESTS)
    assert isinstance(report, EditReport)
    for what, total in ((WRITING, 8), (READING, 8), ("aiming", 3)):
        assert sum(done for name, done, _ in told if name == what) == total
        assert {whole for name, _, whole in told if name == what} == {total}


def test_targets_of_other_facts_are_refused() -> None:
    model, tokenizer = pico("llama")
    editor = Editor(model, tokenizer, pico_config("llama"))
    aimed = editor.aim(REQUESTS[:1])
    before = [weight.detach().clone() for weight in editor.anatomy.weights.values()]
    with pytest.raises(RequestError, match=r"aimed: got \(1, 32\), expected targets of shape \(2, 32\)"):
        editor.apply(REQUESTS[:2], aimed)
    with pytest.raises(ModelError, match="loss of requests"):
        editor.apply(REQUESTS[:1], replace(aimed, losses=torch.tensor([float("nan")])))
    assert all(torch.equal(*pair) for pair in zip(before, editor.anatomy.weights.values(), strict=True))
