"""What fuzzing starts from: files as our own writers make them, and the words in them. Nothing of it is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from sphere_plugin.data import read_records
from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.evaluation.auditor import Measured
from sphere_plugin.evaluation.audits import Audit, path_of, write_audit
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.uncertainty import Uncertainty
from sphere_plugin.files import read_json, write_json, write_tensors
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.delta import write_delta
from sphere_plugin.sequence.guard import Events
from sphere_plugin.sequence.manifest import manifest_of
from sphere_plugin.sequence.settings import RunSettings

METHOD = {
    "alg_name": "SPHERE",
    "model_name": "smollm2-135m",
    "layers": [1, 2],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "sphere": {"eta": 0.5, "alpha": 0.8},
    "rect": True,
}
RUN: dict[str, Any] = {
    "entries": ["memit", "memit+sphere"],
    "hparams": "a.yaml",
    "edits": 4,
    "batch_size": 2,
    "checkpoints": [2, 4],
    "guard": {"energy": 0.2, "action": "stop"},
    "abilities": {"tasks": ["rte"], "every": 2},
    "settings": {"all": {"v_lr": 0.5}},
}
WEIGHT = torch.arange(6.0).reshape(2, 3)


def yamls() -> Iterator[bytes]:
    """Settings of a method, of a run, of a sweep, and the presets."""
    sweep = {key: RUN[key] for key in ("hparams", "edits", "batch_size")} | {"entries": ["memit"]}
    for content in (METHOD, RUN, {**sweep, "grid": {"eta": [0.3, 0.5], "layers": [[1], [1, 2]]}, "orders": [0, 1]}):
        yield yaml.safe_dump(content).encode()
    for one in files("sphere_plugin.sequence").joinpath("presets").iterdir():
        yield one.read_bytes()
    yield b"a: &a [1, 2]\nb: *a\n<<: {c: 2001-01-01}\nd: !!float 1\ne: |\n  text\n"


def jsons(folder: Path) -> Iterator[bytes]:
    """Facts in each schema, and every JSON file of a run; without digests, which would hide what they lead to."""
    facts = json.loads(files("sphere_plugin.data").joinpath("facts.json").read_bytes())[:1]
    record = read_records(limit=1)[0]
    flat = {"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}
    zsre = {"src": record.prompt, "subject": record.subject, "alt": record.target_new, "loc": "Who?", "loc_ans": "me"}
    yield from (json.dumps(one).encode() for one in (facts, [flat, zsre]))
    ways = [{"level": 1, "rephrase": "A"}, {"level": 2, "rephrase": "B"}]
    yield json.dumps([{"question": "Who?", "generated_questions": ways}]).encode()
    for content in run_files(folder):
        yield json.dumps(content).encode()


def run_files(folder: Path) -> Iterator[Any]:
    """Manifest, comparison, batch, checkpoint, guard and audit, as they are written."""
    settings = RunSettings.from_mapping(RUN)
    method = SphereHyperParams.from_mapping(METHOD)
    yield manifest_of(settings.for_entry("memit"), method, "model", torch.float32, [""], "0" * 32)
    yield settings.plain()
    journal = Journal.create(folder / "journal", {"w": WEIGHT}, {"w": False})
    facts = [{"record": 0, "prompt": "p", "subject": "s", "target_new": "t"}]
    layer = {"name": "w", "rank": 1, "removed_share": 0.1, "update_norm": 1.0, "energy": {"0": 1.0, "2": None}}
    journal.append(
        {"edits": 2, "facts": facts, "seconds": 1.0, "efficacy": [1.0], "layers": [layer]}, {"w": WEIGHT + 1}
    )
    yield journal.record(1)
    scores = {"efficacy": [1.0, None], "nll": 3.0}
    yield {"edits": 2, "seconds": 1.0, "scored": [0, 1], "scores": scores, "energy": {"w": {"0": 1.0}}, "cases": []}
    Events(folder).add(2, "worse", "stop", 2)
    yield read_json(folder / "guard.json")
    found = Measured(Probe(0, "p", "s", "templates", ("a", "b")), Uncertainty(0.1, 0.2), ("x", "y"))
    write_audit(folder, Audit(2, "0", "0", {"seed": 0}, (found,)))
    yield read_json(path_of(folder, 2))
    write_json(folder / "abilities.json", {"format": 1, "edits": 2, "weights": "0", "tasks": {"rte": {"value": 0.5}}})
    yield read_json(folder / "abilities.json")


def tensors(folder: Path) -> Iterator[bytes]:
    """A delta, the files of a journal with and without factors, and tensors of other dtypes."""
    write_delta(folder / "delta.safetensors", {"weight": WEIGHT}, {"weight": WEIGHT + 1}, {"edits": "2"})
    journal = Journal.create(folder / "tensors", {"weight": WEIGHT.half()}, {"weight": True}, masters=["weight"])
    thin = Factors(torch.ones(3, 1), torch.ones(2, 1))
    journal.append({"edits": 1}, {"weight": (WEIGHT + 1).half()}, {"weight": thin}, {"weight": torch.ones(3, 1)})
    kinds = {str(n): torch.zeros(n, dtype=kind) for n, kind in enumerate((torch.int64, torch.bool, torch.bfloat16))}
    write_tensors(folder / "kinds.safetensors", kinds, {"format": "1"})
    for path in sorted(folder.rglob("*.safetensors")):
        yield path.read_bytes()


def words(kind: str) -> Iterator[str]:
    """What stands in files of a kind, for libFuzzer to put in."""
    yield from (field.name for field in (*dataclasses.fields(RunSettings), *dataclasses.fields(SphereHyperParams)))
    shared = "null true -1 0.5 1e400 NaN [] {} [[ {{ \\ud800 00000000000000000000 memit stop edits"
    own = {
        "yaml": "!!int !!float !!bool !!timestamp !!binary !!set &a *a <<: ? 2001-99-99 grid: orders: eta alpha basis",
        "json": "requested_rewrite target_new str prompt subject format scores energy action Infinity level locality "
        "generated_questions ground_truth contexts method hparams events",
        "tensors": "__metadata__ sphere_digest dtype shape data_offsets fingerprints sphere-delta-1 F32 BF16 I64 "
        "names transposed masters weight weight/left weight/places",
    }
    yield from (*shared.split(), *own[kind].split())
