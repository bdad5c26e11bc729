"""Run folders as docs/run-folder.md says, small and made up, but real files with real weights and real energies."""

from __future__ import annotations

from pathlib import Path

import torch

from sphere_plugin.files import fingerprint, write_json
from sphere_plugin.geometry import hyperspherical_energy
from sphere_plugin.geometry.factors import Factors
from sphere_plugin.journaling import Journal

LAYERS = ("model.layers.3.mlp.down_proj.weight", "model.layers.4.mlp.down_proj.weight")
PROTOCOL = {"efficacy": "exact", "generalization": "exact", "specificity": "tokens"}
PRESET = "table1-llama3-8b"
DECAY = {"memit": 0.055, "alphaedit": 0.02, "prune": 0.08, "rect": 0.07, "ft": 0.11}
TEXTS = ("The tower", "A river & its <b>banks</b>", "Her language")


def base_weights(rows=40, width=64):
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, width, generator=random) for name in LAYERS}


def manifest(entry, label=None, order=None, share_targets=False, edits=80, batch_size=10, file="facts.json", **more):
    return {
        "format": 1,
        "entry": entry,
        "label": label or " + ".join(part.upper() for part in entry.split("+")),
        "method": {"alg_name": entry.upper(), "hparams": {"eta": 0.5, "layers": [3, 4]}},
        "model": {"name": "pico-llama", "dtype": "float32", "weights": "0" * 32},
        "data": {"file": file, "sha256": "ab" * 32, "records": 80, "order": order},
        "edits": edits,
        "batch_size": batch_size,
        "checkpoints": [20, 40, 60, 80],
        "sample": None,
        "share_targets": share_targets,
        "protocol": PROTOCOL,
        "contexts": ["{}"],
        "seed": 0,
        "threads": 1,
        "versions": {"torch": str(torch.__version__)},
        "machine": "a test",
        "started": "2026-01-01T00:00:00",
        **more,
    }


def energies(weights):
    return {
        name: {str(s): hyperspherical_energy(weight, s=float(s)) for s in (0, 1, 2)}
        for name, weight in weights.items()
    }


def checkpoint(edits, scores, energy=None, cases=(), nll=None, scored=None):
    """A checkpoint's JSON; ``scores`` maps metrics to lists of equal length."""
    count = max((len(values) for values in scores.values()), default=0)
    return {
        "edits": edits,
        "seconds": 1.5 * edits,
        "scored": list(range(count)) if scored is None else scored,
        "scores": {**scores, "nll": nll},
        "energy": energy or {},
        "weights": {},
        "cases": list(cases),
    }


def write_run(folder: Path, told, checkpoints=()):
    """A run folder of a manifest and checkpoints alone, without a journal."""
    write_json(folder / "manifest.json", told)
    for one in checkpoints:
        write_json(folder / "checkpoints" / f"{one['edits']:06d}.json", one)
    return folder


def write_study(folder: Path, entries=("memit", "memit+sphere"), order=None, seed=0, **settings):
    """A comparison: one run with journal, checkpoints and cases for each entry."""
    for number, entry in enumerate(entries):
        told = manifest(entry, order=order, **settings)
        _write_whole(folder / entry, told, 100 * seed + number)
    return folder


def sample_report(folder: Path) -> Path:
    """The folder of a report of two studies, made once in ``folder``; its runs are in ``folder/runs``."""
    from sphere_plugin.report.page import write_report

    runs, out = folder / "runs", folder / "report"
    if not (out / "report.html").exists():
        write_study(runs / "first", ("memit", "memit+sphere", "memit+random", "prune", "prune+sphere"))
        write_study(runs / "again", ("memit", "memit+sphere"), order=3, seed=7)
        paper = {"preset": PRESET, "file": "counterfact.json"}
        write_study(runs / "shared", ("alphaedit", "alphaedit+sphere"), 4, 8, share_targets=True, **paper)
        write_report([runs], out)
    return out


def _write_whole(folder, told, seed):
    random = torch.Generator().manual_seed(seed)
    entry, batch_size, edits = told["entry"], told["batch_size"], told["edits"]
    decay = DECAY.get(entry.split("+")[0], 0.06) * (0.45 if "sphere" in entry else 1.0)
    weights = base_weights()
    journal = Journal.create(folder / "journal", weights, dict.fromkeys(weights, False))
    points = [_scores(0, edits, 0.0, weights, entry, random)]
    facts = torch.randperm(edits, generator=torch.Generator().manual_seed(told["data"]["order"] or 0)).tolist()
    for batch in range(1, edits // batch_size + 1):
        updates = {name: _update(weight, decay, batch, random) for name, weight in weights.items()}
        weights = {name: weight + updates[name].dense() for name, weight in weights.items()}
        journal.append(_record(batch, batch_size, facts, weights, updates, entry), weights, updates)
        if not batch * batch_size % 20:
            points.append(_scores(batch * batch_size, edits, decay * batch, weights, entry, random))
    write_run(folder, told | {"model": {**told["model"], "weights": fingerprint(weights.items())}}, points)


def _update(weight, decay, batch, random):
    rows, width = weight.shape
    left = torch.randn(rows, 1, generator=random).abs() * decay * batch
    return Factors(left, torch.randn(width, 1, generator=random) + 0.8)


def _record(batch, batch_size, facts, weights, updates, entry):
    places = facts[(batch - 1) * batch_size : batch * batch_size]
    return {
        "edits": batch * batch_size,
        "facts": [
            {"record": k, "prompt": f"prompt {k}", "subject": f"subject {k}", "target_new": "x"} for k in places
        ],
        "seconds": 1.0,
        "losses": [],
        "steps": [],
        "layers": [
            {
                "name": name,
                "rank": 12 if "sphere" in entry else 0,
                "removed_share": 0.3 + 0.01 * batch if "sphere" in entry else 0.0,
                "solved_norm": float(updates[name].norm()) * 1.3,
                "update_norm": float(updates[name].norm()),
                "weight_norm": float(weight.norm()),
                "sigma_max": float(torch.linalg.matrix_norm(weight, 2)),
                "energy": energies({name: weight})[name],
            }
            for name, weight in weights.items()
        ],
    }


def _scores(edits, count, damage, weights, entry, random):
    def coins(chance):
        size = edits or count
        return [float(one < chance) for one in torch.rand(size, generator=random).tolist()]

    kept = max(0.02, 0.97 - damage) if edits else 0.02
    shared = {
        "efficacy_exact": coins(kept),
        "efficacy": coins(min(1.0, kept + 0.1)),
        "generalization_exact": coins(kept * 0.6),
        "specificity": coins(0.3 + 0.6 * kept if edits else 0.9),
        "locality": coins(0.2 + 0.6 * kept if edits else 1.0),
        "fluency": [6.2 - 2 * damage + 0.1 * one for one in torch.rand(edits or count, generator=random).tolist()],
    }
    text = "is in Rome, Italy." if damage < 0.3 else "Rome Rome <script>alert('x')</script> ((( Rome"
    cases = [
        {"record": k, "prompt": prompt, "target_new": "Rome", "text": f"{prompt} {text if edits else 'is in Paris.'}"}
        for k, prompt in enumerate(TEXTS)
    ]
    return checkpoint(edits, shared, energies(weights), cases, nll=3.1 + damage)
