"""Settings of any kind, of methods, runs and sweeps: as mappings and as files they are what they say, or refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml
from generated import Tally, broken, changed, is_good, mostly, share, texts, values
from hypothesis import given
from hypothesis import strategies as st

from sphere_plugin.easyedit.blocks import SYNONYMS
from sphere_plugin.easyedit.hparams import UNUSED, PruneHyperParams, RectHyperParams, SphereHyperParams
from sphere_plugin.errors import ConfigError
from sphere_plugin.parsing import yaml_of
from sphere_plugin.sequence.abilities import AbilityPlan
from sphere_plugin.sequence.cells import SweepSettings
from sphere_plugin.sequence.command import _with
from sphere_plugin.sequence.guard import Guard
from sphere_plugin.sequence.settings import RunSettings

HPARAMS = {
    "alg_name": "SPHERE",
    "model_name": "smollm2-135m",
    "device": "cpu",
    "layers": [12, 13],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "v_num_grad_steps": 10,
    "v_lr": 0.5,
    "eta": 0.5,
}
RUN = {
    "entries": ["memit", "memit+sphere"],
    "hparams": "hparams/SPHERE/smollm2-135m.yaml",
    "edits": 200,
    "batch_size": 20,
    "checkpoints": [100, 200],
    "order": None,
    "sample": 100,
    "guard": {"energy": 0.2, "action": "stop"},
    "settings": {"all": {"v_num_grad_steps": 10}, "memit+sphere": {"eta": 0.4}},
}
RUN_KEYS = tuple(field.name for field in dataclasses.fields(RunSettings))
FIELDS = tuple(field.name for field in dataclasses.fields(SphereHyperParams))
KEYS = (*FIELDS, *SYNONYMS, *UNUSED, "sphere", "rect", "prune")

NAMES = st.sampled_from(("v_lr", "memit.v_lr", "memit+sphere.eta", "all.layers"))
VALUES = st.sampled_from(("0.5", "[4, 5]", "null", "current", "1e-3", "{a: 1}"))

# ---- what each field may be, said a second time ----

WHOLE = 2**63


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1.7976931348623157e308


def is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < WHOLE


def is_text(value: Any) -> bool:
    return is_good(value) and "\0" not in value


FIELD_RULES = {
    "layers": lambda v: isinstance(v, list) and v and all(map(is_whole, v)) and v == sorted(set(v)),
    "v_num_grad_steps": lambda v: is_whole(v, 1),
    "mom2_n_samples": lambda v: is_whole(v, 1),
    "token_budget": lambda v: is_whole(v, 64),
    "batch_size": lambda v: is_whole(v, 1),
    "max_length": lambda v: is_whole(v, 1),
    "seed": is_whole,
    "v_loss_layer": lambda v: v is None or is_whole(v),
    "eta": lambda v: is_number(v) and 0 < v <= 1,
    "alpha": lambda v: is_number(v) and 0 <= v <= 1,
    "v_lr": lambda v: is_number(v) and v > 0,
    "clamp_norm_factor": lambda v: is_number(v) and v > 0,
    "mom2_update_weight": lambda v: is_number(v) and v > 0,
    "nullspace_threshold": lambda v: is_number(v) and v > 0,
    "L2": lambda v: is_number(v) and v > 0,
    "v_weight_decay": lambda v: is_number(v) and v >= 0,
    "kl_factor": lambda v: is_number(v) and v >= 0,
    "row_normalize": lambda v: isinstance(v, bool),
    "master_copy": lambda v: isinstance(v, bool),
    "model_parallel": lambda v: isinstance(v, bool),
    "fp16": lambda v: isinstance(v, bool),
    "bf16": lambda v: isinstance(v, bool),
    "model_name": is_text,
    "mom2_dataset": is_text,
    "ln_f_module": is_text,
    "lm_head_module": is_text,
    "stats_dir": lambda v: v is None or is_text(v),
    "basis": lambda v: v in ("current", "pretrained"),
    "projection": lambda v: v in ("in_loop", "post"),
    "base_method": lambda v: v in ("AlphaEdit", "MEMIT"),
    "aiming_dtype": lambda v: v in ("float32", "bfloat16"),
    "fact_token": lambda v: v in ("subject_last", "subject_first", "subject_first_after_last", "last"),
}


def keeps_the_rules(hparams: Any) -> None:
    for name, rule in FIELD_RULES.items():
        assert rule(getattr(hparams, name)), (name, getattr(hparams, name))
    for template in (hparams.rewrite_module_tmp, hparams.layer_module_tmp):
        assert template.format(7) == template.replace("{}", "7")
    assert hparams.rewrite_module_tmp.startswith(hparams.layer_module_tmp + ".")
    assert hparams.sphere() and hparams.restraint() and hparams.editing() and hparams.method()


def test_hyper_parameters(record_property):
    """Every field of what is taken keeps its rule and is the value given; what all rules allow is taken."""
    tally = Tally("yaml")
    kinds = {"SPHERE": SphereHyperParams, "RECT": RectHyperParams, "PRUNE": PruneHyperParams}

    @share(4.0)
    @given(changed(HPARAMS, KEYS), st.sampled_from(sorted(kinds)))
    def read(content: dict[str, Any], name: str) -> None:
        if content.get("alg_name") == "SPHERE":
            content["alg_name"] = name
        simple = all(
            key in FIELD_RULES or (key in HPARAMS and HPARAMS[key] == value) or key == "alg_name"
            for key, value in content.items()
        )
        allowed = simple and set(HPARAMS) <= set(content) and content["alg_name"] == name
        allowed = allowed and all(rule(content[key]) for key, rule in FIELD_RULES.items() if key in content)
        allowed = allowed and not (content.get("fp16") and content.get("bf16"))
        allowed = allowed and (name == "SPHERE" or content.get("base_method") != "AlphaEdit")
        with tally.one(True if allowed else None):
            hparams = kinds[name].from_mapping(content)
            keeps_the_rules(hparams)
            for key, value in content.items():
                if key in FIELDS and key not in ("rect", "prune") and value is not None and not isinstance(value, str):
                    blocks = isinstance(content.get("sphere"), dict) or content.get("cumulative_ratio") == 0
                    assert getattr(hparams, key) == value or (
                        blocks and key in ("eta", "alpha", "basis", "row_normalize")
                    )

    read()
    tally.told(record_property)


def test_blocks(record_property):
    """`sphere:`, `rect:` and `prune:` as true, false, null, or a block."""
    tally = Tally("yaml")
    inside = st.dictionaries(
        st.sampled_from(("eta", "alpha", "basis", "row_normalize", "keep", "base", "x")), values(2)
    )
    block = st.one_of(st.booleans(), st.none(), inside, values(3))

    @share(2.0)
    @given(st.fixed_dictionaries({}, optional={"sphere": block, "rect": block, "prune": block}))
    def read(blocks: dict[str, Any]) -> None:
        plain = {"sphere": (True, None), "rect": (True, False, None), "prune": (True, False, None)}
        good = all(any(value is one for one in plain[key]) for key, value in blocks.items())
        with tally.one(True if good else None):
            hparams = SphereHyperParams.from_mapping({**HPARAMS, **blocks})
            keeps_the_rules(hparams)
            for key in ("rect", "prune"):
                assert (getattr(hparams, key) is not None) == (blocks.get(key) not in (None, False))
            given_alpha = blocks["sphere"].get("alpha") if isinstance(blocks.get("sphere"), dict) else None
            assert given_alpha is None or float(given_alpha) == hparams.alpha

    read()
    tally.told(record_property)


def test_hyper_parameters_in_files(record_property, tmp_path_factory):
    """A file with a piece cut out or put in: what a plain reader makes of it, or a refusal."""
    tally = Tally("yaml")
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"

    @share(3.0)
    @given(broken(yaml.safe_dump(HPARAMS, sort_keys=False)).flatmap(lambda text: st.just(text) | broken(text)))
    def read(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with tally.one():
            hparams = SphereHyperParams.from_hparams(path)
            keeps_the_rules(hparams)
            assert hparams == SphereHyperParams.from_mapping(yaml.safe_load(text))

    read()
    tally.told(record_property)


def test_yaml_of_any_kind(record_property):
    """What is read is plain, finite and can be written; the rest is one kind of error."""
    tally = Tally("yaml")
    bits = st.sampled_from(
        (
            "a: ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "&a ",
            "*a",
            "<<: ",
            "!!int ",
            "!!float ",
            "!!bool ",
            "!!set ",
            "!!binary ",
        )
        + (
            "!!timestamp ",
            "!!omap ",
            "!!null ",
            "? ",
            ": ",
            "\n",
            "\n  ",
            "|\n",
            "'",
            '"',
            "\\ud800",
            "2001-01-01",
            "0x",
            "0b",
            ".",
        )
        + ("1", "x", "~", "---\n", "...", "%YAML 1.1\n", "#", "1e9", ".inf", "0o7", "1:30", "=", "!!str ", "!x ")
    )

    @share(4.0)
    @given(st.lists(bits, max_size=14).map("".join) | texts(40) | values().map(lambda one: yaml.safe_dump(one)[:4000]))
    def read(text: str) -> None:
        with tally.one():
            try:
                content = yaml_of(text)
            except ValueError as error:
                assert str(error)
                raise ConfigError("the YAML", text, f"plain values ({error})", "Mend it.") from error
            again = yaml.safe_load(text)
            assert json.dumps(content) == json.dumps(again)
            json.dumps(content, ensure_ascii=False).encode()

    read()
    tally.told(record_property)


def checkpoints_of(content: dict[str, Any]) -> bool:
    """Whether the schedule is one that is reached, batch by batch."""
    edits, size = content["edits"], content.get("batch_size", 100)
    reached = set(itertools.accumulate([min(size, edits - done) for done in range(0, edits, size)]))
    return set(content.get("checkpoints") or ()) <= reached


def test_runs(record_property, tmp_path_factory):
    """Settings of a run come back from JSON as they were; moments are between batches."""
    tally = Tally("yaml")

    @share(4.0)
    @given(changed(RUN, RUN_KEYS), st.none() | changed({"tasks": ["rte"], "every": 40, "data": "/data"}, ("limit",)))
    def read(content: dict[str, Any], abilities: dict[str, Any] | None) -> None:
        if abilities is not None:
            content = {**content, "abilities": abilities}
        good = True if content == RUN else None
        with tally.one(good):
            settings = RunSettings.from_mapping(content)
            again = json.loads(json.dumps(settings.plain()))
            assert same(RunSettings.from_mapping(again), settings)
            assert is_whole(settings.edits, 1) and is_whole(settings.batch_size, 1) and is_whole(settings.seed)
            points = settings.checkpoints
            assert points[-1] == settings.edits and list(points) == sorted(set(points))
            assert all(point % settings.batch_size == 0 or point == settings.edits for point in points)
            if settings.edits <= 10_000:
                assert checkpoints_of(
                    {"edits": settings.edits, "batch_size": settings.batch_size, "checkpoints": points}
                )
            for entry in settings.entries:
                assert settings.for_entry(entry).entries == (entry,)
            if settings.guard is not None:
                assert any(is_number(one) and one > 0 for one in (settings.guard.energy, settings.guard.retention))

    read()
    tally.told(record_property)


def same(one: RunSettings, other: RunSettings) -> bool:
    """Equal, NaN among settings of a method included."""
    return repr(one) == repr(other)


def test_runs_in_files(record_property, tmp_path_factory):
    tally = Tally("yaml")
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"

    @share(2.0)
    @given(broken(yaml.safe_dump(RUN, sort_keys=False)).flatmap(lambda text: st.just(text) | broken(text)))
    def read(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with tally.one():
            settings = RunSettings.from_mapping(RunSettings.from_yaml(path))
            assert same(settings, RunSettings.from_mapping(yaml.safe_load(text)))

    read()
    tally.told(record_property)


def test_schedules_of_abilities(record_property):
    """Moments to measure at, found by walking through the run."""
    tally = Tally("yaml")
    numbers = (
        st.sampled_from(("paper", 1, 3, 10, 1000, 10**12)) | st.lists(st.integers(-1, 60), max_size=4) | values(2)
    )

    @share(2.0)
    @given(numbers, st.integers(1, 60) | st.sampled_from((20_000, 10**12)), st.integers(1, 20) | st.just(10**6))
    def planned(every: Any, edits: int, size: int) -> None:
        with tally.one():
            plan = AbilityPlan.from_mapping({"tasks": ["rte"], "every": every})
            moments = plan.moments(edits, size)
            assert moments[0] == 0 and moments[-1] == edits and list(moments) == sorted(set(moments))
            assert all(moment % size == 0 or moment == edits for moment in moments)
            if isinstance(every, int) and edits <= 60:
                assert set(moments) == {0, edits, *(n for n in range(1, edits + 1) if n % every == 0)}

    planned()
    tally.told(record_property)


def test_guards(record_property):
    """A guard is content with what lies within its limits, and with nothing else."""
    tally = Tally("yaml")
    share_ = st.floats() | st.integers(-2, 2)

    @share(2.0)
    @given(changed({"energy": 0.2, "retention": 0.5, "action": "stop"}, ("x",)), share_, share_, share_)
    def guarded(content: dict[str, Any], change: float, now: float, fresh: float) -> None:
        with tally.one():
            guard = Guard.from_mapping(content)
            reason = guard.on_energy({"a": change, "b": 0.0})
            if guard.energy is not None and math.isfinite(change):
                assert (reason is not None) == (abs(change) > guard.energy)
            told = guard.on_retention(now, fresh)
            if guard.retention is not None and fresh > 0 and math.isfinite(now) and math.isfinite(fresh):
                assert (told is not None) == (now < guard.retention * fresh)

    guarded()
    tally.told(record_property)


def test_sweeps(record_property):
    """Cells are the product of the grid, each in a folder of its own, with the method alone beside it."""
    tally = Tally("yaml")
    content = {key: RUN[key] for key in ("hparams", "edits", "batch_size")} | {"entries": ["memit", "alphaedit"]}
    choices: dict[str, tuple[Any, ...]] = {
        "eta": (0.3, 0.5, 1, "5e-1"),
        "alpha": (0, 0.5, "0.8"),
        "basis": ("current", "pretrained"),
        "projection": ("in_loop", "post"),
        "layers": ([4, 5], [6]),
    }
    good = {
        key: st.lists(st.sampled_from(one), min_size=1, max_size=3, unique_by=repr) for key, one in choices.items()
    }
    grid = st.fixed_dictionaries({}, optional=good)
    other = st.dictionaries(
        st.sampled_from(sorted(good)) | texts(3), st.lists(values(2), max_size=3) | values(2), max_size=3
    )
    seeds = st.lists(st.integers(0, 3) | st.none(), min_size=1, max_size=3, unique=True)
    order = mostly(st.none() | seeds, values(2))

    @share(2.0)
    @given(mostly(grid, other | values(2)), order, mostly(st.just(content), changed(content), 3))
    def read(grid: Any, orders: Any, content: dict[str, Any]) -> None:
        with tally.one():
            told = {**content, "grid": grid, **({} if orders is None else {"orders": orders})}
            sweep = SweepSettings.from_mapping(told)
            cells = sweep.cells
            count = math.prod(len(one) for one in sweep.grid.values())
            assert sum(cell.sphere for cell in cells) == count * len(sweep.bases)
            assert all(cell.alone in cells and not cell.alone.sphere for cell in cells)
            names = {(cell.entry, cell.name) for cell in cells}
            assert len(names) == len(cells)
            places = [Path(sweep.folder(cell, None)) for cell in cells]
            assert all(
                not place.is_absolute() and len(place.parts) == 2 and ".." not in place.parts for place in places
            )
            again = json.loads(json.dumps(sweep.plain()))
            assert [repr(cell) for cell in SweepSettings.from_mapping(again).cells] == [repr(cell) for cell in cells]

    read()
    tally.told(record_property)


def test_flags_that_set(record_property):
    """`--set`, as one would write it and otherwise."""
    tally = Tally("yaml")

    @share(1.0)
    @given(
        st.lists(
            mostly(st.builds("{}={}".format, NAMES, VALUES), st.builds("{}={}".format, texts(6), texts()) | texts())
        )
    )
    def given_(flags: list[str]) -> None:
        with tally.one(None):
            found = _with({}, flags)
            assert sum(map(len, found.values())) <= len(flags)
            for flag in flags:
                key, _, value = flag.partition("=")
                entry, dot, name = key.rpartition(".")
                last = [one for one in flags if one.partition("=")[0] == key][-1]
                if last == flag and not any(one.partition("=")[0] == f"all.{key}" for one in flags):
                    read = found[entry if dot else "all"][name]
                    assert repr(read) == repr(yaml.safe_load(value)) or not dot

    given_()
    tally.told(record_property)
