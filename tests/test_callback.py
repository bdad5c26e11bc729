"""What 16 bits cannot hold of projected steps, as the callback of a `Trainer` reports it: against plain sums."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import peft
import pytest
import torch
from pico import pico
from torch import Tensor, nn

from sphere_plugin.callback import SphereCallback
from sphere_plugin.errors import ModelError
from sphere_plugin.restraints import SphereConfig

LAYER = {"llama": "model.layers.2.mlp.down_proj", "gpt2": "transformer.h.2.mlp.c_proj"}
HALVES = (torch.bfloat16, torch.float16)


def plain(matrix: Tensor, transposed: bool = False) -> Tensor:
    """A copy in float64, [d_out, d_in]."""
    copy = matrix.detach().double().clone()
    return copy.T if transposed else copy


def projected(weight: Tensor, change: Tensor, alpha: float, eta: float = 0.5) -> Tensor:
    """ΔW (I − α UUᵀ) in float64, with the whole d_in x d_in matrices."""
    rows = weight / weight.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values.cumsum(0) / values.sum() <= eta).sum()) + 1
    basis = vectors[:, :rank]
    return change @ (torch.eye(weight.shape[1], dtype=torch.float64) - alpha * basis @ basis.T)


def train(callback: SphereCallback, model: nn.Module, weights: Sequence[nn.Parameter], sizes: Sequence[float]) -> None:
    """What a `Trainer` does, with random numbers for the optimizer's steps, of these sizes."""
    random = torch.Generator().manual_seed(0)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    for size in sizes:
        with torch.no_grad():
            for weight in weights:
                weight += (size * torch.randn(weight.shape, generator=random)).to(weight.dtype)
        callback.on_optimizer_step(None, None, None)
    callback.on_train_end(None, None, None)


class Watch(SphereCallback):
    """Adds up plainly what every projection was to write, and what it has written.

    Args:
        weight: the one that is watched.
        transposed: whether it is stored as [d_in, d_out].
        base: W under a LoRA; None where U is of the weight itself.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False, base: Tensor | None = None, **given: object):
        super().__init__(**given)
        self.weight, self.transposed, self.base = weight, transposed, base
        self.asked = self.lost = 0.0

    def now(self) -> Tensor:
        return plain(self.weight, self.transposed)

    def around(self, what: object, *arguments: object, **more: object) -> None:
        before = self.now()
        what(*arguments, **more)
        change = before - self.last
        if self.config.basis == "pretrained" and self.base is None:
            of = self.start
        else:
            of = self.last if self.base is None else self.base
        exact = projected(of, change, self.config.alpha)
        self.asked += float(exact.square().sum())
        self.lost += float((self.now() - self.last - exact).square().sum())
        self.last = self.now()

    def on_train_begin(self, *arguments, **more):
        self.start = self.now()
        super().on_train_begin(*arguments, **more)
        self.last = self.now()

    def on_optimizer_step(self, *arguments, **more):
        if self.when == "step":
            self.around(super().on_optimizer_step, *arguments, **more)

    def on_train_end(self, *arguments, **more):
        if self.when == "end":
            self.around(super().on_train_end, *arguments, **more)
        else:
            super().on_train_end(*arguments, **more)

    def expected(self) -> float:
        return (self.lost / self.asked) ** 0.5


def watched(kind: str, dtype: torch.dtype, when: str, alpha: float = 0.8, basis: str = "current") -> tuple:
    model = pico(kind)[0].to(dtype)
    weight = model.get_submodule(LAYER[kind]).weight
    config = SphereConfig(alpha=alpha, basis=basis)
    return model, weight, Watch(weight, kind == "gpt2", config=config, weights=[LAYER[kind]], when=when)


# ---- full weights ----


@pytest.mark.parametrize("basis", ["current", "pretrained"])
@pytest.mark.parametrize("when", ["step", "end"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_sixteen_bits_lose_is_what_a_plain_sum_says(kind: str, dtype: torch.dtype, when: str, basis: str) -> None:
    """Steps of very different size: what each loses counts by its size."""
    model, weight, callback = watched(kind, dtype, when, basis=basis)
    train(callback, model, [weight], [2e-2, 2e-3, 5e-3])
    (layer,) = callback.report.layers.values()
    assert layer.rounding_loss == pytest.approx(callback.expected(), rel=2e-3)
    assert 1e-3 < layer.rounding_loss < 0.3


@pytest.mark.parametrize("when", ["step", "end"])
def test_small_steps_lose_more_where_each_is_rounded(when: str) -> None:
    told = []
    for size in (3e-1, 3e-3):
        model, weight, callback = watched("llama", torch.bfloat16, when)
        train(callback, model, [weight], [size] * 8)
        (layer,) = callback.report.layers.values()
        assert layer.rounding_loss == pytest.approx(callback.expected(), rel=2e-3)
        told.append(layer.rounding_loss)
    large, small = told
    assert 10 * large < small < 1.0
    if when == "step":
        model, weight, callback = watched("llama", torch.bfloat16, "end")
        train(callback, model, [weight], [3e-3] * 8)
        assert callback.report.layers[LAYER["llama"]].rounding_loss < 0.8 * small, "one rounding loses less than eight"


@pytest.mark.parametrize("when", ["step", "end"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_wide_weights_lose_what_their_own_arithmetic_does(dtype: torch.dtype, most: float, when: str) -> None:
    model, weight, callback = watched("llama", dtype, when)
    train(callback, model, [weight], [1e-2, 1e-2])
    (layer,) = callback.report.layers.values()
    assert layer.energy > 0 and 0.0 <= layer.rounding_loss < most


def test_a_change_that_vanishes_is_lost_whole() -> None:
    """A change by half a step or a step of bfloat16 everywhere, of which the projection leaves less than half."""
    model, weight, callback = watched("llama", torch.bfloat16, "end", alpha=1.0)
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight) + torch.eye(32, 64, dtype=weight.dtype))
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 2**-7 * weight  # along the rows, of which U takes nearly all
    assert not torch.equal(weight, before)
    callback.on_train_end(None, None, None)
    (layer,) = callback.report.layers.values()
    assert torch.equal(weight, before)
    assert layer.rounding_loss == pytest.approx(1.0) and layer.removed_share < 1.0


def test_where_nothing_was_written_nothing_is_lost() -> None:
    for when in ("step", "end"):
        model, weight, callback = watched("llama", torch.bfloat16, when)
        train(callback, model, [], [1e-2, 1e-2])
        (layer,) = callback.report.layers.values()
        assert (layer.energy, layer.rounding_loss) == (0.0, 0.0)


def test_a_step_that_was_skipped_counts_for_nothing() -> None:
    def told(sizes: Sequence[float]) -> float:
        model, weight, callback = watched("llama", torch.bfloat16, "step")
        train(callback, model, [weight], sizes)
        return callback.report.layers[LAYER["llama"]].rounding_loss

    assert told([1e-2, 0.0, 0.0]) == told([1e-2]) > 0


def test_every_layer_has_its_own() -> None:
    model, _ = pico("llama")
    model.bfloat16()
    weights = [model.model.layers[number].mlp.down_proj.weight for number in range(4)]
    callback = SphereCallback(SphereConfig(), ["mlp.down_proj"], "end")
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    with torch.no_grad():
        for number, weight in enumerate(weights):
            random = torch.Generator().manual_seed(number)
            weight += (0.2 * 0.3**number * torch.randn(weight.shape, generator=random)).bfloat16()
    callback.on_train_end(None, None, None)
    lost = [callback.report.layers[f"model.layers.{number}.mlp.down_proj"].rounding_loss for number in range(4)]
    assert lost == sorted(lost) and lost[3] > 10 * lost[0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", ["step", "end"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_projected(kind: str, when: str, wrong: float) -> None:
    """A single NaN used to take its whole row with it."""
    model, _ = pico(kind)
    name = LAYER[kind].rpartition(".")[2]
    weights = [module.weight for title, module in model.named_modules() if title.endswith(f"mlp.{name}")]
    callback = SphereCallback(SphereConfig(), [f"mlp.{name}"], when)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    with torch.no_grad():
        for weight in weights:
            weight += 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weights[2][3, 4] = wrong
    before = [weight.detach().clone() for weight in weights]
    end = callback.on_optimizer_step if when == "step" else callback.on_train_end
    with pytest.raises(
        ModelError, match=rf"trained weight of {LAYER[kind]}: got 'NaN or infinite.*before training div"
    ):
        end(None, None, None)
    assert len(weights) == 4
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=0, equal_nan=True)


# ---- LoRA ----


def adapted(dtype: torch.dtype, when: str) -> tuple[nn.Module, list[nn.Parameter], Watch]:
    """A fresh LoRA of this dtype, its A matrices, and a callback that watches one of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(pico("llama")[0], peft.LoraConfig(r=4, target_modules=["down_proj"])).to(dtype)
    layer = model.get_submodule(f"base_model.model.{LAYER['llama']}")
    base = plain(layer.get_base_layer().weight)
    watch = Watch(layer.lora_A["default"].weight, base=base, config=SphereConfig(), when=when)
    return model, [one for name, one in model.named_parameters() if ".lora_A." in name], watch


@pytest.mark.parametrize("dtype", HALVES)
def test_steps_of_a_lora_lose_what_a_plain_sum_says(dtype: torch.dtype) -> None:
    model, weights, callback = adapted(dtype, "step")
    train(callback, model, weights, [1e-2, 1e-3, 3e-3])
    layer = callback.report.layers[LAYER["llama"]]
    assert layer.rounding_loss == pytest.approx(callback.expected(), rel=2e-3)
    assert 1e-3 < layer.rounding_loss < 0.5


def test_steps_of_a_lora_in_float32_lose_nothing_to_speak_of() -> None:
    model, weights, callback = adapted(torch.float32, "step")
    train(callback, model, weights, [1e-2, 1e-3])
    assert 0.0 <= callback.report.layers[LAYER["llama"]].rounding_loss < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lora_that_is_projected_at_the_end_loses_what_its_update_does(dtype: torch.dtype) -> None:
    """Of s·B·A, not of A alone."""
    model, weights, callback = adapted(dtype, "end")
    layer = model.get_submodule(f"base_model.model.{LAYER['llama']}")
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(torch.arange(32 * 4).reshape(32, 4) % 7 - 3)
    side = plain(layer.lora_B["default"].weight)
    train(callback, model, weights, [1e-2, 1e-3])
    raw = plain(callback._raw[f"base_model.model.{LAYER['llama']}"])  # what `undo` would bring back
    alone, now = projected(callback.base, raw, 0.8), plain(layer.lora_A["default"].weight)
    exact, written = side @ alone, side @ now
    found = callback.report.layers[LAYER["llama"]].rounding_loss
    if dtype == torch.float32:
        assert found == 0.0
        assert float((written - exact).norm() / exact.norm()) < 1e-6
    else:
        assert found == pytest.approx(float((written - exact).norm() / exact.norm()), rel=2e-3)
        assert 1e-4 < found < 1e-2
        assert found != pytest.approx(float((now - alone).norm() / alone.norm()), rel=2e-3)


@pytest.mark.parametrize(("when", "side"), [("end", "A"), ("end", "B"), ("step", "B")])
def test_a_lora_that_is_not_finite_is_refused(when: str, side: str) -> None:
    model, weights, callback = adapted(torch.float32, when)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    layer = model.get_submodule(f"base_model.model.{LAYER['llama']}")
    with torch.no_grad():
        (layer.lora_A if side == "A" else layer.lora_B)["default"].weight[0, 0] = float("nan")
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ModelError, match=rf"{side} of base_model\.model\.{LAYER['llama']}: got 'NaN or infinite"):
        SphereCallback.on_train_end(callback, None, None, None)
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=0, equal_nan=True)


def test_trained_again_it_projects_what_was_learned_and_not_what_was_left_of_it() -> None:
    """The raw A matrices are trained on: two trainings end where one of both ends."""
    (model, weights, callback), (twin, others, alone) = (adapted(torch.float32, "end") for _ in range(2))
    train(callback, model, weights, [1e-2])
    train(callback, model, weights, [1e-2])
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        for weight in others:
            weight += 2e-2 * torch.randn(weight.shape, generator=random)
    train(alone, twin, others, [])
    for now, expected in zip(weights, others, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)
    callback.undo()
    alone.undo()
    for now, expected in zip(weights, others, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)


def test_a_matrix_that_somebody_else_wrote_since_is_trained_as_it_is() -> None:
    model, weights, callback = adapted(torch.float32, "end")
    train(callback, model, weights, [1e-2])
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0.5)
    train(callback, model, weights, [])
    callback.undo()
    assert all(bool((weight == 0.5).all()) for weight in weights)
