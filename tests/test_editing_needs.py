"""What editing needs on each device: read from models, told where it is short, and mended by what is proposed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATES, pico_config
from pico import KINDS, pico, save_pico
from transformers import AutoModelForCausalLM, LlamaConfig

from sphere_plugin import HostError
from sphere_plugin.easyedit.doctor import Finding, examine
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.easyedit.hparams import SphereHyperParams, dtype_of
from sphere_plugin.editing import EditingConfig
from sphere_plugin.editing.budget import Batch, Budget, Shape
from sphere_plugin.editing.needs import ALL_GPUS, PASSES, TOLD, Where, needs, remedy, shape_of, told
from sphere_plugin.models import memory
from sphere_plugin.models.memory import free_bytes, in_words
from sphere_plugin.models.stored import structure

ROOT = Path(__file__).parents[1]
LLAMA3_8B = Shape(8_030_261_248, 32, 4096, 2 * 8 * 128, 128_256, 4096, 14336)
GB = 10**9

# Counted by hand: embeddings and head, four layers of attention, feed-forward network and norms, the last norm.
LLAMA = 2 * 384 * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
QWEN2 = 384 * 32 + 4 * (4 * 32 * 32 + 3 * 32 + 3 * 32 * 64 + 2 * 32) + 32
GPT2 = (384 + 256) * 32 + 4 * (32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 96 + 96 + 32 + 4 * 32) + 2 * 32
GPTJ = 384 * 32 + 4 * (4 * 32 * 32 + 2 * 32 * 96 + 96 + 32 + 2 * 32) + 2 * 32 + 384 * 32 + 384
HAND = {
    "llama": Shape(LLAMA, 4, 32, 2 * 2 * 8, 384, 32, 64),  # two of four heads have keys
    "qwen2": Shape(QWEN2, 4, 32, 2 * 4 * 8, 384, 32, 64),
    "gpt2": Shape(GPT2, 4, 32, 2 * 4 * 8, 384, 32, 96),
    "gptj": Shape(GPTJ, 4, 32, 2 * 4 * 8, 384, 32, 96),
}

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(cpu, *cards): so many bytes are free, as the system and CUDA tell it; None is a system that does not."""

    def made(cpu: int | None, *cards: int) -> None:
        def told_by_linux(path: str) -> Any:
            lines = "" if cpu is None else f"MemTotal: 1 kB\nMemAvailable: {cpu // 1024} kB\n"
            return SimpleNamespace(read_text=lambda encoding: lines)

        def told_by_cuda(device: Any) -> tuple[int, int]:
            return cards[torch.device(device).index or 0], 80 * GB

        monkeypatch.setattr(memory, "Path", told_by_linux)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "mem_get_info", told_by_cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")

    return made


def settings(**changes: object) -> EditingConfig:
    chosen = SphereHyperParams.from_hparams(ROOT / "hparams" / "SPHERE" / "llama3-8b.yaml").editing()
    return dataclasses.replace(chosen, **{"alpha": None, **changes})


def by_device(budget: Budget, where: Where) -> dict[str, tuple[str, ...]]:
    return {need.device: need.places for need in needs(budget, where)}


# ---- sizes of a model ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_a_model_is_what_is_counted_by_hand(kind: str, tmp_path: Path) -> None:
    assert shape_of(pico(kind)[0], pico_config(kind)) == HAND[kind]
    without_values = structure(str(save_pico(kind, tmp_path / "model")))
    assert shape_of(without_values, pico_config(kind)) == HAND[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_layer_to_rewrite_has_another_shape(kind: str) -> None:
    wider = {"llama": "mlp.up_proj", "gpt2": "mlp.c_fc"}[kind]
    shape = shape_of(pico(kind)[0], pico_config(kind, rewrite_module_tmp=f"{TEMPLATES[kind][0]}.{wider}"))
    assert (shape.d_out, shape.d_in) == (HAND[kind].d_in, HAND[kind].d_out)


def test_heads_wider_than_their_share_keep_more() -> None:
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=24,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model, pico_config("llama"))
    assert (shape.kept, shape.layers) == (2 * 1 * 24, 3)


# ---- what is free ----


def test_free_memory_is_what_the_system_tells(machine: Machine) -> None:
    machine(3 * 2**30, 5 * GB, 7 * GB)
    assert [free_bytes(device) for device in ("cpu", "cuda", "cuda:0", "cuda:1")] == [
        3 * 2**30,
        5 * GB,
        5 * GB,
        7 * GB,
    ]
    assert free_bytes("cuda:2") is None
    machine(None)
    assert free_bytes("cpu") is None and free_bytes("cuda:0") is None


# ---- what lies where ----


@pytest.mark.parametrize(
    ("where", "stats_device", "expected"),
    [
        (Where("cpu", 4), None, {"cpu": ("weights", "statistics", "host")}),
        (Where("cpu", 4), "cpu", {"cpu": ("weights", "statistics", "host")}),
        (Where("cuda:1", 2), None, {"cuda:1": ("weights", "statistics"), "cpu": ("host",)}),
        (Where("cuda:1", 2), "cpu", {"cuda:1": ("weights",), "cpu": ("statistics", "host")}),
        (Where("cuda", 2), "cuda:0", {"cuda:0": ("weights", "statistics"), "cpu": ("host",)}),
        (Where("cuda:0", 2), "cuda", {"cuda:0": ("weights", "statistics"), "cpu": ("host",)}),
        (Where("cuda:0", 2), "cuda:1", {"cuda:0": ("weights",), "cuda:1": ("statistics",), "cpu": ("host",)}),
        (Where("cpu", 4), "cuda:1", {"cpu": ("weights", "host"), "cuda:1": ("statistics",)}),
        (Where("cuda:0", 2, parallel=True), None, {ALL_GPUS: ("weights", "statistics"), "cpu": ("host",)}),
        (Where("cuda:0", 2, parallel=True), "cpu", {ALL_GPUS: ("weights",), "cpu": ("statistics", "host")}),
        (
            Where("cuda:0", 2, parallel=True),
            "cuda:1",
            {ALL_GPUS: ("weights", "statistics"), "cuda:1": ("statistics",), "cpu": ("host",)},
        ),
    ],
)
def test_each_device_holds_its_part_at_its_worst_moment(
    where: Where, stats_device: str | None, expected: dict[str, tuple[str, ...]], machine: Machine
) -> None:
    machine(64 * GB, 20 * GB, 30 * GB)
    budget = Budget(LLAMA3_8B, settings(stats_device=stats_device), where.element)
    found = needs(budget, where)
    assert {need.device: need.places for need in found} == expected
    assert "weights" in found[0].places, "that of the weights is told first"
    for need in found:
        moments = {
            phase.name: sum(size for place, size in phase.parts.values() if place in need.places)
            for phase in budget.phases
        }
        assert need.needed == max(moments.values()) == moments[need.phase.name] > 0
        assert need.free == {"cpu": 64 * GB, "cuda:0": 20 * GB, "cuda:1": 30 * GB, ALL_GPUS: 50 * GB}[need.device]


def test_without_a_gpu_a_model_that_is_spread_is_all_in_one_place(machine: Machine) -> None:
    machine(64 * GB)
    budget = Budget(LLAMA3_8B, settings(), 4)
    assert by_device(budget, Where("cpu", 4, parallel=True)) == by_device(budget, Where("cpu", 4))
    machine(64 * GB, 20 * GB)
    assert ALL_GPUS in by_device(budget, Where("cpu", 4, parallel=True)), "accelerate takes those that are there"


def test_what_is_needed_beyond_what_is_free_is_short(machine: Machine) -> None:
    config, where = settings(), Where("cpu", 2)
    (need,) = needs(Budget(LLAMA3_8B, config, 2), where)
    for free, short in ((need.needed + 1024, False), (need.needed - 1024, True), (None, False)):
        machine(free)
        (one,) = needs(Budget(LLAMA3_8B, config, 2), where)
        assert one.short == short
    exactly = dataclasses.replace(need, free=need.needed)
    assert not exactly.short


# ---- what is told ----


def test_the_sentence_names_the_device_the_moment_and_what_is_large(machine: Machine) -> None:
    machine(64 * GB, 20 * GB)
    budget = Budget(LLAMA3_8B, settings(base_method="MEMIT"), 2)
    need = needs(budget, Where("cuda:0", 2))[0]
    said = need.sentence()
    start, _, rest = said.partition(" (")
    parts, _, end = rest.rpartition("), ")
    assert start == f"needs {in_words(need.needed)} on cuda:0 while {need.phase.name}"
    assert end == f"{20 * GB / 2**30:.1f} GiB free"
    named = {name: size for name, (place, size) in need.phase.parts.items() if place in ("weights", "statistics")}
    large = sorted((name for name, size in named.items() if size > TOLD * need.needed), key=lambda n: -named[n])
    assert parts == ", ".join(f"{name} {in_words(named[name])}" for name in large)
    assert {"model", "aiming"} <= set(large) and len(large) < len(named), "the rest is small"
    assert sum(named[name] for name in large) > 0.8 * need.needed
    machine(None)
    assert needs(budget, Where("cuda:0", 2))[0].sentence().endswith("an unknown amount free")


def test_only_the_first_device_that_is_short_has_a_way_out(machine: Machine) -> None:
    config, where = settings(stats_device="cpu"), Where("cuda:0", 2)
    machine(64 * GB, 80 * GB)
    assert [short for _, short in told(LLAMA3_8B, config, Batch(100), where)] == [False, False]
    assert not any("too little" in text for text, _ in told(LLAMA3_8B, config, Batch(100), where))
    machine(1 * GB, 80 * GB)
    (gpu, fits), (cpu, short) = told(LLAMA3_8B, config, Batch(100), where)
    assert (fits, short) == (False, True) and "too little" not in gpu
    assert cpu.startswith("batches of 100: needs ") and "; too little: use " in cpu
    machine(1 * GB, 1 * GB)
    lines = told(LLAMA3_8B, config, Batch(100), where)
    assert [short for _, short in lines] == [True, True]
    assert ["too little" in text for text, _ in lines] == [True, False]


def test_larger_batches_need_more(machine: Machine) -> None:
    machine(64 * GB)
    (one,), (many,) = (needs(Budget(LLAMA3_8B, settings(), 2, Batch(n)), Where("cpu", 2)) for n in (1, 100))
    assert one.needed < many.needed
    assert told(LLAMA3_8B, settings(), Batch(7), Where("cpu", 2))[0][0].startswith("batches of 7: ")


# ---- what would make it fit ----

NOTHING = ("fewer layers", "a smaller model", "a larger machine")


def followed(text: str, config: EditingConfig, where: Where, cards: int) -> tuple[EditingConfig, Where, list[str]]:
    """The settings and the place after writing what is proposed into a YAML, as a user would."""
    assert text.startswith("use ")
    lines = [yaml.safe_load(line) for line in text.removeprefix("use ").split(" and ")]
    keys: dict[str, Any] = {key: value for line in lines for key, value in line.items()}
    assert len(keys) == len(lines), "no key twice"
    content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    spread = {"model_parallel": where.parallel, "fp16": where.element == 2}
    hparams = SphereHyperParams(**{**content, "model_name": "any", "device": where.device, **spread, **keys})
    assert "model_parallel" not in keys or cards > 1, "one card is no more than itself"
    placed = Where(where.device, dtype_of(hparams).itemsize, hparams.model_parallel)
    return hparams.editing(), placed, list(keys)


def fits(shape: Shape, config: EditingConfig, batch: Batch, where: Where) -> bool:
    return not any(need.short for need in needs(Budget(shape, config, where.element, batch), where))


def tried(config: EditingConfig, where: Where, cards: int) -> Iterator[tuple[int, EditingConfig, Where]]:
    """Every way to change what may be changed, and how many settings it takes; written plainly."""
    stats = [config.stats_device, "cpu"] if where.device != "cpu" else [config.stats_device]
    tokens = [config.token_budget, *(one for one in PASSES if one < config.token_budget)]
    widths = [where.element, 2]
    spread = [where.parallel, True] if cards > 1 and where.device != "cpu" else [where.parallel]
    for device, budget, element, parallel in itertools.product(stats, tokens, widths, spread):
        changed = dataclasses.replace(config, stats_device=device, token_budget=budget)
        placed = Where(where.device, element, parallel)
        count = sum(getattr(changed, name) != getattr(config, name) for name in ("stats_device", "token_budget"))
        yield count + (placed.element != where.element) + (placed.parallel != where.parallel), changed, placed


MACHINES = [
    (2**40, 16 * GB), (2**40, 24 * GB), (2**40, 40 * GB), (2**40, 48 * GB), (2**40, 60 * GB), (2**40, 80 * GB),
    (20 * GB, 24 * GB), (20 * GB, 40 * GB), (2**40, 24 * GB, 24 * GB), (20 * GB, 40 * GB, 40 * GB), (2**40, 12 * GB),
    (40 * GB,), (60 * GB,), (90 * GB,), (10 * GB,),
]  # fmt: skip


@pytest.mark.parametrize("free", MACHINES)
@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
def test_what_is_proposed_makes_it_fit_with_as_few_changes_as_it_takes(
    base: str, element: int, free: tuple[int, ...], machine: Machine
) -> None:
    """Against a search through all settings; what cannot be made to fit is not promised."""
    machine(*free)
    cards = len(free) - 1
    config, batch = settings(base_method=base, master_copy=True), Batch(100)
    where = Where("cuda:0" if cards else "cpu", element)
    if fits(LLAMA3_8B, config, batch, where):
        assert not any("too little" in text for text, _ in told(LLAMA3_8B, config, batch, where))
        return
    text = remedy(LLAMA3_8B, config, batch, where)
    assert f"; too little: {text}" in "".join(line for line, _ in told(LLAMA3_8B, config, batch, where))
    counts = [count for count, *other in tried(config, where, cards) if fits(LLAMA3_8B, other[0], batch, other[1])]
    if not counts:
        assert all(one in text for one in NOTHING)
        assert ("model_parallel" in text) == bool(cards)
        return
    changed, placed, keys = followed(text, config, where, cards)
    assert fits(LLAMA3_8B, changed, batch, placed)
    assert len(keys) == min(counts)


def test_what_changes_no_result_is_proposed_first(machine: Machine) -> None:
    """On these cards one setting is enough, and several would do."""
    config, batch = settings(base_method="MEMIT"), Batch(100)
    machine(2**40, 75 * GB)
    assert fits(LLAMA3_8B, config, batch, Where("cuda:0", 2))
    assert remedy(LLAMA3_8B, config, batch, Where("cuda:0", 4)) == "use stats_device: cpu"
    on_cpu = dataclasses.replace(config, stats_device="cpu")
    machine(2**40, 50 * GB)
    assert remedy(LLAMA3_8B, on_cpu, batch, Where("cuda:0", 4)) == "use token_budget: 2048"
    machine(2**40, 50 * GB, 50 * GB)
    assert remedy(LLAMA3_8B, on_cpu, batch, Where("cuda:0", 4)) == "use model_parallel: true"
    frugal = dataclasses.replace(on_cpu, token_budget=128)
    machine(2**40, 24 * GB)
    assert remedy(LLAMA3_8B, frugal, batch, Where("cuda:0", 4)) == "use bf16: true"
    machine(45 * GB)
    assert remedy(LLAMA3_8B, frugal, batch, Where("cpu", 4)) == "use bf16: true"


def test_a_way_out_is_for_the_batch_that_is_asked_for(machine: Machine) -> None:
    """With few facts a pass is no larger than they are, whatever the budget of tokens."""
    machine(2**40, 44 * GB)
    config, where = settings(stats_device="cpu"), Where("cuda:0", 4)
    assert remedy(LLAMA3_8B, config, Batch(100), where) == "use token_budget: 2048"
    assert fits(LLAMA3_8B, config, Batch(5), where)
    machine(2**40, 35 * GB)
    assert remedy(LLAMA3_8B, config, Batch(100), where) == "use token_budget: 2048 and bf16: true"
    assert remedy(LLAMA3_8B, config, Batch(1), where) == "use bf16: true"


def test_a_move_to_the_cpu_is_not_proposed_where_the_cpu_has_no_room(machine: Machine) -> None:
    config, batch, where = settings(base_method="MEMIT"), Batch(100), Where("cuda:0", 2)
    machine(2**40, 40 * GB)
    assert remedy(LLAMA3_8B, config, batch, where) == "use stats_device: cpu"
    machine(10 * GB, 40 * GB)
    assert remedy(LLAMA3_8B, config, batch, where) == "use token_budget: 2048"


# ---- LLaMA3-8B on a card of 24 GB ----


@pytest.mark.parametrize("base", ["MEMIT", "AlphaEdit"])
def test_llama3_8b_in_bfloat16_fits_24_gb_as_proposed(base: str, machine: Machine) -> None:
    machine(32 * GB, 24 * GB)
    config, where = settings(base_method=base), Where("cuda:0", 2)
    (gpu, short), (cpu, fine) = told(LLAMA3_8B, config, Batch(100), where)
    assert (short, fine) == (True, False)
    assert gpu.endswith("; too little: use stats_device: cpu and token_budget: 2048")
    assert "while making solvers" in gpu or "while aiming" in gpu
    changed, placed, _ = followed(remedy(LLAMA3_8B, config, Batch(100), where), config, where, 1)
    lines = told(LLAMA3_8B, changed, Batch(100), placed)
    assert [short for _, short in lines] == [False, False]
    assert "on cuda:0" in lines[0][0] and "on cpu" in lines[1][0]
    machine(32 * GB, 23 * GB)
    assert not any(short for _, short in told(LLAMA3_8B, changed, Batch(100), placed)), "with room for CUDA itself"


def test_llama3_8b_in_float32_does_not(machine: Machine) -> None:
    machine(64 * GB, 24 * GB)
    text = remedy(LLAMA3_8B, settings(), Batch(100), Where("cuda:0", 4))
    assert text == "use stats_device: cpu and token_budget: 2048 and bf16: true"


# ---- several GPUs ----


def test_a_model_spread_over_gpus_has_their_memory_together(machine: Machine) -> None:
    config, batch = settings(base_method="MEMIT", stats_device="cpu", token_budget=2048), Batch(100)
    one, spread = Where("cuda:0", 4), Where("cuda:0", 4, parallel=True)
    machine(64 * GB, 24 * GB, 24 * GB)
    assert told(LLAMA3_8B, config, batch, one)[0][1]
    text, short = told(LLAMA3_8B, config, batch, spread)[0]
    assert not short and f"on {ALL_GPUS} while" in text and f"{48 * GB / 2**30:.1f} GiB free" in text
    machine(64 * GB, 24 * GB, 12 * GB)
    text, short = told(LLAMA3_8B, config, batch, spread)[0]
    assert short and "model_parallel" not in text


def test_statistics_on_one_of_the_gpus_take_room_from_the_model(machine: Machine) -> None:
    """Each fits alone: the model on both, the statistics on one of them."""
    config, batch, where = settings(base_method="MEMIT"), Batch(100), Where("cuda:0", 2, parallel=True)
    apart = dataclasses.replace(config, stats_device="cuda:1", token_budget=2048)
    machine(64 * GB, 14 * GB, 14 * GB)
    whole, single, _ = needs(Budget(LLAMA3_8B, apart, 2, batch), where)
    assert whole.short and not single.short
    together = needs(Budget(LLAMA3_8B, dataclasses.replace(apart, stats_device=None), 2, batch), where)[0]
    assert whole.needed >= together.needed
    assert remedy(LLAMA3_8B, apart, batch, where) == "use stats_device: cpu"


# ---- where it is used ----


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(**changes) -> a YAML of ours for a saved pico model."""
    try:
        load_host()  # before a machine is made up: what it imports looks for GPUs
    except HostError as error:
        pytest.skip(str(error))

    def made(**changes: object) -> Path:
        folder = tmp_path / "model"
        if not folder.exists():
            save_pico("llama", folder)
        config = pico_config("llama")
        names = ("layers", "rewrite_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module")
        keys = {"alg_name": "SPHERE", "model_name": str(folder), "device": "cpu", "alpha": 0.0}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**keys, **{name: getattr(config, name) for name in names}, **changes}))
        return path

    return made


def about(findings: list[Finding], *topics: str) -> list[Finding]:
    return [finding for finding in findings if finding.topic in topics]


def test_the_doctor_tells_what_each_device_needs(write: Callable[..., Path], machine: Machine) -> None:
    machine(64 * GB, 24 * GB)
    findings = about(examine(write(device=0, stats_device="cpu", bf16=True, batch_size=30)), "memory")
    budget = Budget(HAND["llama"], SphereHyperParams.from_hparams(write(stats_device="cpu")).editing(), 2, Batch(30))
    sentences = [need.sentence() for need in needs(budget, Where("cuda:0", 2))]
    assert findings == [Finding("memory", f"bfloat16, batches of 30: {one}") for one in sentences]


def test_the_doctor_says_when_it_is_too_little_and_what_helps(write: Callable[..., Path], machine: Machine) -> None:
    machine(64 * GB, 24 * GB)
    path = write(device=0, batch_size=100)
    (first, _) = about(examine(path), "memory")
    assert first.verdict == "ok"
    config = SphereHyperParams.from_hparams(path).editing()
    need = needs(Budget(HAND["llama"], config, 4, Batch(100)), Where("cuda:0", 4))[0]
    machine(64 * GB, need.needed - 1)
    (first, other) = about(examine(path), "memory")
    assert (first.verdict, other.verdict) == ("missing", "ok")
    proposed = first.text.partition("too little: use ")[2]
    key, _, value = proposed.partition(": ")
    mended = examine(write(device=0, batch_size=100, **{key: yaml.safe_load(value)}))
    assert [one.verdict for one in about(mended, "memory")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("changes", "topic", "words"),
    [
        ({"device": 3}, "device", "cuda:3 is not on this machine; write `device: cpu`"),
        ({"stats_device": "cuda:1"}, "stats_device", "cuda:1 is not on this machine; write `stats_device: cpu`"),
        ({"stats_device": "cuda"}, None, ""),
    ],
)  # fmt: skip
def test_the_doctor_misses_a_device_that_is_not_there(
    changes: dict[str, Any], topic: str | None, words: str, write: Callable[..., Path], machine: Machine
) -> None:
    machine(64 * GB, 24 * GB)
    found = about(examine(write(**changes)), "device", "stats_device", "YAML")
    assert found == ([] if topic is None else [Finding(topic, words, "missing")])
