"""Thousands of writes to a bfloat16 model, with and without a float32 master copy, against a float32 model.

    python benchmarks/rounding.py --data counterfact-edit.json [--edits 500] [--batch-size 1] [--base MEMIT|AlphaEdit]
        [--set KEY=VALUE …] [--json FILE]

All three begin as the model in bfloat16, which is how models are published; the float32 one holds the same numbers.
The targets of all facts are found once, on the unedited float32 model, and are the same for the three, so that nothing
but the weights' dtype differs: searches of their own would end elsewhere by chance. At the end all facts are scored,
by each model as it computes, and by a float32 model that is given its edited weights. "lost" is the mean share of a
batch's update that rounding took, "‖W − W₀‖" what all batches together have moved the edited weights by, in per cent
of what they have moved those of the float32 model by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Final

import torch
import yaml
from stages import machine, requests_of
from torch import Tensor
from tqdm import tqdm

from sphere_plugin.data import Record, held_out, read_records
from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.editing import Editor
from sphere_plugin.editing.aim import Aimed
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.evaluation import Quality
from sphere_plugin.models import load_model

YAML: Final = Path(__file__).parents[1] / "hparams" / "SPHERE" / "smollm2-135m.yaml"
AIMED: Final = 50  # facts whose targets are searched for at once
CASES: Final = (("float32", False), ("bfloat16", True), ("bfloat16", False))


@dataclass(frozen=True)
class Row:
    """One model after all edits.

    Scores are shares, and in `exactly` the same four of its weights in a float32 model; norms are relative to the
    float32 model's.
    """

    dtype: str
    master: bool
    efficacy: float
    generalization: float
    locality: float
    perplexity: float
    exactly: tuple[float, float, float, float]
    lost: float
    moved: float

    def line(self) -> str:
        """The line as printed."""
        name = self.dtype + (" + master copy" if self.master else "")
        own = (self.efficacy, self.generalization, self.locality, self.perplexity)
        scores = "".join(
            "".join(f"{100 * one:12.1f}" for one in shares) + f"{perplexity:12.2f}"
            for *shares, perplexity in (own, self.exactly)
        )
        return f"{name:<24}{scores}{100 * self.lost:9.1f} %{100 * self.moved:11.1f} %"


SCORES: Final = "".join(f"{name:>12}" for name in ("efficacy", "generalis.", "locality", "perplexity"))
HEADER: Final = (
    f"{'':<24}{'as it computes':>48}{'in float32':>48}\n{'weights':<24}{SCORES}{SCORES}{'lost':>11}{'‖W − W₀‖':>13}"
)


def opened(dtype: str, config: EditingConfig) -> Editor:
    """An editor of the unedited model, rounded to bfloat16 whatever it then computes in."""
    name = str(SphereHyperParams.from_hparams(YAML).model_name)
    model, tokenizer = load_model(name)
    with torch.no_grad():
        for one in model.parameters():
            one.data = one.bfloat16().to(getattr(torch, dtype))
    return Editor(model, tokenizer, config)


def targets(editor: Editor, records: list[Record]) -> Aimed:
    """Those of all records, for the weights as they are."""
    parts = []
    for first in tqdm(range(0, len(records), AIMED), desc="aiming", unit="batch"):
        parts.append(editor.aim(requests_of(records[first : first + AIMED])))
    columns = zip(*((one.values, one.losses, one.steps) for one in parts), strict=True)
    return Aimed(*(torch.cat(column) for column in columns))


def edited(editor: Editor, records: list[Record], aimed: Aimed, size: int) -> float:
    """Edit all records in batches; returns the mean share that rounding took."""
    lost = []
    for first in tqdm(range(0, len(records), size), desc="editing", unit="batch"):
        part = slice(first, first + size)
        given = Aimed(aimed.values[part], aimed.losses[part], aimed.steps[part])
        report = editor.apply(requests_of(records[part]), given)
        lost += [layer.rounding_loss for layer in report.layers]
    return fmean(lost)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All three models."""
    changes = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.set)}
    config = SphereHyperParams.from_hparams(YAML).editing()
    config = dataclasses.replace(config, base_method=arguments.base, **{"alpha": None, **changes})
    records = read_records(arguments.data, arguments.edits, None)
    exact = opened("float32", config)
    aimed = targets(exact, records)
    judge = Quality(exact.anatomy.model, exact.tokenizer, records, held_out(None))
    rows: list[Row] = []
    whole = 0.0
    for dtype, master in CASES:
        editor = opened(dtype, dataclasses.replace(config, master_copy=master))
        quality = Quality(editor.anatomy.model, editor.tokenizer, records, held_out(None))
        before = {name: one.detach().float().clone() for name, one in editor.anatomy.weights.items()}
        lost = edited(editor, records, aimed, arguments.batch_size)
        after = {name: one.detach().float() for name, one in editor.anatomy.weights.items()}
        moved = norm({name: one - before[name] for name, one in after.items()})
        whole = whole or moved
        with torch.no_grad():
            for name, one in exact.anatomy.weights.items():
                one.copy_(after[name])
        row = Row(dtype, master, *means(quality), means(judge), lost, moved / whole)
        rows.append(row)
        print(row.line(), flush=True)
    return rows


def means(quality: Quality) -> tuple[float, float, float, float]:
    """Efficacy, generalization, locality of all facts, and perplexity."""
    scores = quality.score(len(quality.records))
    columns = (scores.efficacy, scores.generalization, scores.locality)
    efficacy, generalization, locality = (fmean(one for one in column if one is not None) for column in columns)
    return efficacy, generalization, locality, exp(scores.nll)


def norm(weights: dict[str, Tensor]) -> float:
    """Of all together."""
    return float(torch.stack([one.norm() for one in weights.values()]).norm())


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--base", choices=("MEMIT", "AlphaEdit"), default="MEMIT")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of the editor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    about = machine()
    print("{processor}, {cores} cores, {threads} threads, torch {torch}, {date}".format(**about))
    print(f"{arguments.edits} edits in batches of {arguments.batch_size}, {arguments.base}\n{HEADER}")
    rows = measure(arguments)
    if arguments.json:
        told = {key: getattr(arguments, key) for key in ("edits", "batch_size", "base", "set")}
        content = {**about, **told, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
