"""Does energy cause collapse? Move it up, down or not at all, always by as much weight, and see what the model knows.

RUN is a folder of `sphere run`. Each edited weight, as it was after N edits, is changed by the same ‖ΔW‖ / ‖W‖:
along the gradient of the energy, against it, in random directions but every neuron as far as the gradient moved it,
and by a random rotation, which changes no energy. docs/results has what came out.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

from sphere_plugin.data import held_out, read_records
from sphere_plugin.evaluation import Quality, interval
from sphere_plugin.evaluation.abilities import Suite
from sphere_plugin.geometry import energy_change, neurons, stored
from sphere_plugin.geometry.perturb import along_energy, scattered, turned
from sphere_plugin.journaling.revisit import Revisited
from sphere_plugin.sequence.settings import RunSettings

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", metavar="RUN", type=Path)
parser.add_argument("--at", metavar="N", type=int, help="after so many edits (default: all)")
parser.add_argument("--sizes", default="0.05,0.1", help="‖ΔW‖ / ‖W‖, with commas between them")
parser.add_argument("--seeds", type=int, default=2, help="of the random changes")
parser.add_argument("--facts", type=int, default=150, help="score so many edits at most, evenly chosen")
parser.add_argument("--abilities", metavar="DIR", type=Path, help="GSM8K and BoolQ too, 100 records each, from there")
parser.add_argument("--json", type=Path, required=True, help="where all numbers are written")
given = parser.parse_args()

seen = Revisited(given.run)
settings = RunSettings.from_mapping(seen.manifest["settings"])
edits = given.at or seen.edits
records = read_records(settings.data, settings.edits, settings.order)[:edits][:: -(-edits // given.facts)]
suite = Suite(("gsm8k_given", "boolq"), given.abilities, limit=100) if given.abilities else None
quality = Quality(seen.model, seen.tokenizer, records, held_out(settings.text))
seen.go(edits)
turn, rows = seen.journal.transposed, []
base = {name: neurons(weight.detach(), name in turn).double() for name, weight in seen.weights.items()}


def measure(kind: str, size: float, deltas: dict[str, torch.Tensor]) -> None:
    for name, weight in seen.weights.items():
        weight.data.copy_(stored(base[name] + deltas[name], name in turn))
    scores, row = quality.score(len(records)), {"change": kind, "size": size}
    row["energy"] = fmean(energy_change(base[name], base[name] + delta, 2.0) for name, delta in deltas.items())
    row |= {one: interval(getattr(scores, one)).mean for one in ("efficacy", "generalization", "locality")}
    row |= {one: suite.measure(one, seen.model, seen.tokenizer).value for one in suite.names} if suite else {}
    rows.append(row | {"nll": scores.nll})
    print(*(one if isinstance(one, str) else f"{one:.5f}" for one in rows[-1].values()), sep="\t", flush=True)
    given.json.write_text(json.dumps({"edits": edits, "facts": len(records), "rows": rows}, indent=1) + "\n")


print("change", "size", "energy", "efficacy", "generalization", "locality", "abilities", "nll", sep="\t")
measure("none", 0.0, {name: torch.zeros_like(weight) for name, weight in base.items()})
for size in map(float, given.sizes.split(",")):
    moved = {way: {n: along_energy(base[n], size, rising=way == "up") for n in base} for way in ("up", "down")}
    for way, deltas in moved.items():
        measure(f"energy {way}", size, deltas)
    for random in (torch.Generator().manual_seed(seed) for seed in range(given.seeds)):
        measure("rotation", size, {name: turned(weight, size, random) for name, weight in base.items()})
        for way, deltas in moved.items():
            measure(f"as far as {way}", size, {n: scattered(base[n], deltas[n], random) for n in base})
