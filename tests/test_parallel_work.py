"""What processes share of key statistics, of a batch and of scoring: the same as in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REQUESTS, pico_config
from pico import pico
from pico_ranks import Launcher
from torch import Tensor

from sphere_plugin.data import read_records
from sphere_plugin.editing import Editor, unfinished
from sphere_plugin.editing import statistics as counting
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.evaluation import Quality
from sphere_plugin.files import fingerprint, read_tensors, write_tensors
from sphere_plugin.parallel.joining import joined
from sphere_plugin.parallel.ranks import ALONE, Ranks

LAYERS = {"layers": [0, 1, 2]}
TEXT = "The tower is in the city.\n\nWho plays the piano?\n\nWater boils at 100 degrees.\n\nA new line starts here."


# ---- what the processes do ----


def statistics(folder: str, stop: int) -> int:
    """Count key statistics in small pieces, each kept at once; rank 1 dies at its piece number ``stop``, from 1."""
    counting.BATCH_TOKENS, unfinished.EVERY = 120, 0.0
    with joined() as ranks:
        add, calls = counting._Counter.add, []

        def counted(self: Any, rows: Any) -> None:
            calls.append(len(rows))
            if ranks.rank == 1 and len(calls) == stop:
                raise ZeroDivisionError("here it ends")
            add(self, rows)

        counting._Counter.add = counted
        model, tokenizer = pico("llama")
        editor = Editor(model, tokenizer, pico_config("llama", mom2_n_samples=30, stats_dir=folder, **LAYERS))
        moments = key_moments(editor.anatomy, tokenizer, editor.config, None, ranks)
        write_tensors(Path(folder) / f"{ranks.rank}.moments", {str(n): one for n, one in moments.items()}, {})
        print(json.dumps({"texts": sum(calls), "pieces": len(calls)}))
    return 0


def edited(ranks: Ranks, settings: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = pico("llama")
    editor = Editor(model, tokenizer, pico_config("llama", **LAYERS, **settings), ranks=ranks)
    first = editor.apply(REQUESTS)
    second = editor.apply([{**one, "target_new": "French"} for one in REQUESTS[:1]])  # fewer facts than ranks
    told: dict[str, Any] = {"weights": {name: one.detach().clone() for name, one in editor.anatomy.weights.items()}}
    told["aimed"] = torch.cat([first.aimed.values, second.aimed.values])
    told["keys"] = first.keys
    told["losses"] = [*first.aimed.losses.tolist(), *second.aimed.losses.tolist()]
    told["null"] = [one.null_space for one in second.layers]
    editor.restore()
    told["restored"] = fingerprint(model.state_dict().items()) == fingerprint(pico("llama")[0].state_dict().items())
    return told


def edit(folder: str, settings: dict[str, Any]) -> int:
    with joined() as ranks:
        told = edited(ranks, settings)
        tensors = {**told["weights"], "aimed": told["aimed"], **{f"keys/{n}": one for n, one in told["keys"].items()}}
        write_tensors(Path(folder) / f"{ranks.rank}.edited", tensors, {})
        print(json.dumps({key: told[key] for key in ("losses", "null", "restored")}))
    return 0


def scored(ranks: Ranks) -> list[Any]:
    model, tokenizer = pico("llama")
    seen: list[int] = []
    quality = Quality(model, tokenizer, read_records(limit=5), TEXT, batch_tokens=60, ranks=ranks)
    told = quality.score(5, fluency=12, progress=seen.append)
    prompts = sum(seen) == quality.prompts(5, fluency=12)
    return [told.columns(), told.nll, quality.efficacy([3, 1]), quality.texts([0, 1, 4], 3), prompts]


def score() -> int:
    with joined() as ranks:
        print(json.dumps(scored(ranks)))
    return 0


# ---- what comes of it ----


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one - other).norm()) <= tolerance * float(one.norm())


@pytest.mark.parametrize("size", [2, 3])
def test_key_statistics_are_counted_by_all_and_kept_by_the_layers_keepers(
    size: int, tmp_path: Path, launch: Launcher
) -> None:
    model, tokenizer = pico("llama")
    folder = tmp_path / "alone"
    editor = Editor(model, tokenizer, pico_config("llama", mom2_n_samples=30, stats_dir=str(folder), **LAYERS))
    known = key_moments(editor.anatomy, tokenizer, editor.config)
    together = tmp_path / "together"
    # One of them ends in its second piece; what had been counted by then is not counted again.
    ended = launch(size, "test_parallel_work:statistics", str(together), 2, cwd=tmp_path)
    assert any("here it ends" in one.said for one in ended) and not list(together.glob("sphere-*[0-9a-f].safetensors"))
    assert len(list(together.glob("sphere-*.sums.safetensors"))) == 1
    ended = launch(size, "test_parallel_work:statistics", str(together), 0, cwd=tmp_path)
    assert [one.code for one in ended] == [0] * size, ended
    told = [json.loads(one.said.splitlines()[-1]) for one in ended]
    assert 0 < sum(one["texts"] for one in told) < 30 and all(one["pieces"] for one in told)
    parts = [read_tensors(together / f"{rank}.moments")[0] for rank in range(size)]
    assert [sorted(part) for part in parts] == [[str(n) for n in range(3) if n % size == r] for r in range(size)]
    for part in parts:
        for layer, moment in part.items():
            assert close(moment, known[int(layer)], 1e-6)
    (file,) = together.glob("sphere-*.safetensors")
    assert file.name == next(folder.glob("sphere-*.safetensors")).name, "one name for any number of processes"


@pytest.mark.parametrize("settings", [{"base_method": "AlphaEdit"}, {"base_method": "MEMIT", "projection": "post"}])
@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_that_processes_share_is_that_of_one(
    size: int, settings: dict[str, Any], tmp_path: Path, launch: Launcher
) -> None:
    one = edited(ALONE, settings)
    ended = launch(size, "test_parallel_work:edit", str(tmp_path), settings, cwd=tmp_path)
    assert [process.code for process in ended] == [0] * size, ended
    told = [json.loads(process.said.splitlines()[-1]) for process in ended]
    found = [read_tensors(tmp_path / f"{rank}.edited")[0] for rank in range(size)]
    for rank, tensors in enumerate(found):
        assert tensors.keys() == found[0].keys()
        assert all(torch.equal(tensors[name], found[0][name]) for name in tensors), "all ranks have the same"
        assert told[rank]["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert told[rank]["null"] == one["null"] and told[rank]["restored"]
    assert close(found[0]["aimed"], one["aimed"], 1e-5)
    for name, weight in one["weights"].items():
        assert close(found[0][name], weight, 1e-5)
    for layer, keys in one["keys"].items():
        assert close(found[0][f"keys/{layer}"], keys, 1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_scores_are_those_of_one_process_to_the_last_digit(size: int, tmp_path: Path, launch: Launcher) -> None:
    ended = launch(size, "test_parallel_work:score", cwd=tmp_path)
    told = [json.loads(process.said.splitlines()[-1]) for process in ended]
    one = json.loads(json.dumps(scored(ALONE)))
    assert told[0] == one and one[-1] is True
    assert all(other[:-1] == one[:-1] for other in told), "all ranks know them"
