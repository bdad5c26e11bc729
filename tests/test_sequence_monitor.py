"""Energies and singular values of the edited weights, and memory that does not grow."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from pico_runs import place, settings
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import hyperspherical_energy
from sphere_plugin.geometry.spectral import largest_singular_value
from sphere_plugin.sequence import runner
from sphere_plugin.sequence.monitor import ORDERS, Monitor, energies
from sphere_plugin.sequence.runner import Run


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with these singular values."""
    left, right = (torch.linalg.qr(normal(n, len(values), seed=n).double()).Q for n in (rows, columns))
    return (left * values.double()) @ right.T


# ---- the largest singular value ----


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (64, 64), (5, 9), (1, 7), (7, 1), (300, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_singular_value(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape).to(dtype)
    exact = float(torch.linalg.svdvals(weight.double())[0])
    found = largest_singular_value(weight)
    assert found == pytest.approx(exact, rel=1e-5) and found <= exact * (1 + 1e-6)
    assert found == largest_singular_value(weight.clone()), "the same weight gives the same number"


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([3.0, 3.0, 3.0, 1.0]),
        torch.ones(60),
        torch.cat([torch.full((30,), 2.0), torch.linspace(1.0, 0.1, 30)]),
        torch.logspace(3, -3, 60),
        torch.linspace(1.0, 0.99, 60),
        torch.tensor([1e-20, 1e-21]),
        torch.tensor([1e15, 1.0]),
    ],
    ids=["three", "all", "half", "steep", "close", "tiny", "huge"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_equal_close_and_extreme_singular_values(values: Tensor, turned: bool) -> None:
    weight = with_values(values, 60, 100)
    weight = (weight.T if turned else weight).float()
    exact = float(torch.linalg.svdvals(weight.double())[0])
    all_close = float(values[-1]) in (1.0, pytest.approx(0.99))
    assert largest_singular_value(weight) == pytest.approx(exact, rel=1e-3 if all_close else 1e-5)


def test_nothing_and_what_is_no_number() -> None:
    assert largest_singular_value(torch.zeros(4, 6)) == 0.0
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="weight: got 'NaN or infinity', expected finite entries"):
            largest_singular_value(torch.full((2, 3), wrong))
    with pytest.raises(ModelError, match="two dimensions"):
        largest_singular_value(torch.ones(3))


# ---- the monitor ----


def test_energies_are_those_of_the_geometry() -> None:
    weight = normal(12, 30)
    assert energies(weight) == {f"{s:g}": hyperspherical_energy(weight, s) for s in ORDERS}
    assert energies(torch.cat([weight, weight[:1]])) == dict.fromkeys(("0", "1", "2"))
    assert energies(torch.zeros(3, 4)) == energies(torch.full((3, 4), float("nan"))) == dict.fromkeys(("0", "1", "2"))


@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_monitor_follows_neurons_however_they_are_stored(turned: bool, dtype: torch.dtype) -> None:
    before, after = normal(12, 30).to(dtype), (normal(12, 30) + 0.1 * normal(12, 30, seed=1)).to(dtype)
    stored = (before.T.contiguous(), after.T.contiguous()) if turned else (before, after)
    monitor = Monitor({"a": stored[0], "bias": torch.ones(12)}, {"a": turned, "bias": False})
    now = monitor.batch({"a": stored[1], "bias": torch.ones(12)})
    # How a matrix lies in memory may decide last digits of products with it.
    assert now.keys() == monitor.energy.keys() == {"a"} and now["a"].keys() == {"energy", "sigma_max"}
    assert now["a"]["energy"] == pytest.approx(energies(after), rel=1e-12)
    assert now["a"]["sigma_max"] == pytest.approx(largest_singular_value(after), rel=1e-6)
    assert monitor.energy["a"] == pytest.approx(energies(before), rel=1e-12)
    change = monitor.change({name: one["energy"] for name, one in now.items()})
    expected = hyperspherical_energy(after, 2.0) / hyperspherical_energy(before, 2.0) - 1.0
    assert change == {"a": pytest.approx(expected, rel=1e-9)}
    assert monitor.change({"a": monitor.energy["a"]}) == {"a": 0.0}
    told = monitor.checkpoint({"a": stored[1]})["a"]
    assert told["update_norm"] == pytest.approx(float((after.float() - before.float()).norm()), rel=1e-6)
    assert told["weight_norm"] == pytest.approx(float(before.float().norm()), rel=1e-6)
    assert told["sigma_max"] == pytest.approx(float(torch.linalg.svdvals(after.float())[0]), rel=1e-5)


def test_a_weight_that_is_no_number_any_more_is_told_and_ends_nothing() -> None:
    monitor = Monitor({"a": normal(4, 9), "b": torch.zeros(4, 9)}, {"a": False, "b": False})
    broken = {"a": torch.full((4, 9), float("nan")), "b": normal(4, 9)}
    now = monitor.batch(broken)
    assert now["a"] == {"energy": dict.fromkeys(("0", "1", "2")), "sigma_max": None}
    assert monitor.checkpoint(broken)["a"]["sigma_max"] is None
    assert monitor.change({name: one["energy"] for name, one in now.items()}) == {"a": None}, "b never had an energy"


# ---- memory ----


def alive() -> tuple[int, int]:
    """Objects, and bytes of tensors."""
    gc.collect()
    objects = gc.get_objects()
    storages = [one.untyped_storage() for one in objects if type(one) is Tensor]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return len(objects), sum(sizes.values())


def test_memory_does_not_grow_with_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_TOKENS", 2)
    monkeypatch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
    hparams = place(tmp_path / "place", layers=[1], v_num_grad_steps=1, context_template_length_params=[])
    told = settings(hparams, "alphaedit+sphere", edits=60, batch_size=1, checkpoints=[], sample=1, neighbours=1)
    seen: dict[int, tuple[int, int]] = {}
    done: list[int] = []

    def progress(what: str, now: int, total: int) -> None:
        done.extend([now] if what == "edits" else [])
        if what == "edits" and sum(done) in (20, 59):
            seen[sum(done)] = alive()

    run = Run(told, tmp_path / "run", progress)
    run.begin()
    run.go()
    (objects, memory), (later, more) = seen[20], seen[59]
    assert abs(later - objects) <= 0.02 * objects
    assert abs(more - memory) <= 0.02 * memory
