"""Aiming and scoring, against EasyEdit's own code on the same model, facts and settings.

    python benchmarks/editing.py [--facts 50] [--sample 8] [--layers 12,13,14,15,16] [--stage aiming] [--json FILE]
    python benchmarks/editing.py --profile: where the time of a batch of ours goes; no opponent

The limit of a stage is the number of operations in the products that ours does, counted by torch, at the speed of a
plain product of the same run: what is above it goes into memory traffic, small products, and all that is no product.

EasyEdit takes one fact at a time, so a sample of the facts says what each costs it; ours takes all of them at once.
What both find is compared before a ratio is printed. The opponent is EasyEdit main where EASYEDIT_HOME is set, and
the PyPI release otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from stages import machine, requests_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sphere_plugin as sp
from sphere_plugin.data import Record, read_records
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.editing.aim import aim
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.evaluation import Quality

YAML = Path(__file__).resolve().parent.parent / "hparams/SPHERE/smollm2-135m.yaml"
PREFIXES = ("He said it. ", "A new line starts here and goes on. ", "It was in 1997, and then. ")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work returned; what EasyEdit prints goes nowhere."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        done = work()
    return time.perf_counter() - started, done


def limit(work: Callable[[], Any]) -> float:
    """Seconds that the products in the work would take at the speed of a plain one."""
    with FlopCounterMode(display=False) as counter:
        work()
    a, b = torch.ones(1024, 576), torch.ones(576, 1536)
    seconds = min(timed(lambda: [a @ b for _ in range(20)])[0] for _ in range(5)) / 20
    return counter.get_total_flops() * seconds / (2 * 1024 * 576 * 1536)


def aiming(editor: sp.Editor, records: Sequence[Record], sample: int) -> dict[str, Any]:
    """Target values for all records at once, and for a sample of them one by one."""
    config = editor.config
    contexts = Contexts(("", *PREFIXES), (0.5, *[0.5 / len(PREFIXES)] * len(PREFIXES)))
    facts = read_requests(requests_of(records))
    search = functools.partial(aim, editor.anatomy, editor.locator, facts, contexts.prefixes, config)
    ours, aimed = timed(search)
    settings = SimpleNamespace(
        **{name: getattr(config, name) for name in vars(config)},
        model_name="llama",
        device="cpu",
        mlp_module_tmp=config.rewrite_module_tmp.rpartition(".")[0],
    )
    settings.v_loss_layer = editor.anatomy.loss_layer
    head = editor.anatomy.head.weight  # EasyEdit does not find a head that is tied to the embeddings
    named = {id(weight): name for name, weight in editor.anatomy.model.named_parameters()}
    settings.lm_head_module = named[id(head)].removesuffix(".weight")
    compute_z = sys.modules["easyeditor.models.memit.compute_z"].compute_z
    templates = [["{}"], [prefix + "{}" for prefix in PREFIXES]]
    seconds, cosines = [], []
    for number in [round(k * (len(facts) - 1) / max(1, sample - 1)) for k in range(sample)]:
        fact = facts[number]
        request = {
            "prompt": fact.prompt.replace(fact.subject, "{}"),
            "subject": fact.subject,
            "target_new": fact.target,
        }
        took, found = timed(
            lambda request=request: compute_z(
                editor.anatomy.model, editor.tokenizer, request, settings, config.layers[-1], templates
            )
        )
        seconds.append(took)
        cosines.append(float(torch.cosine_similarity(found.detach().float(), aimed.values[number], dim=0)))
    theirs = fmean(seconds) * len(facts)
    return {
        "stage": f"aiming, layers {config.layers[0]} to {config.layers[-1]}",
        "ours": ours,
        "theirs": theirs,
        "ratio": theirs / ours,
        "limit": limit(search),
        "agreement": f"cosine of targets at least {min(cosines):.4f}",
    }


def scoring(editor: sp.Editor, records: Sequence[Record], sample: int) -> dict[str, Any]:
    """EasyEdit's rewrite_acc and rephrase_acc for all records at once, and for a sample of them one by one."""
    model, tokenizer = editor.anatomy.model, editor.tokenizer
    asked = {"neighbours": (), "neighbour_targets": (), "target_true": ""}  # EasyEdit asks the prompt and a paraphrase
    same = [replace(record, paraphrases=record.paraphrases[:1], **asked) for record in records]
    quality = Quality(model, tokenizer, same, "Two words.")  # EasyEdit scores no held-out text
    ours, scores = timed(lambda: quality.score(len(records)))
    evaluate = sys.modules["easyeditor.evaluate.evaluate"].compute_edit_quality
    settings = SimpleNamespace(alg_name="MEMIT", model_name="llama", device="cpu", max_length=40)
    seconds, differing = [], 0
    for number in [round(k * (len(records) - 1) / max(1, sample - 1)) for k in range(sample)]:
        record = records[number]
        request: dict[str, Any] = requests_of([record])[0] | {"ground_truth": "?"}
        request |= {"rephrase_prompt": record.paraphrases[0], "locality": {}, "portability": {}}
        took, metrics = timed(lambda request=request: evaluate(model, "llama", settings, tokenizer, request, "cpu"))
        seconds.append(took)
        theirs = float(fmean(metrics["rewrite_acc"]))
        differing += theirs != scores.efficacy[number]
    theirs = fmean(seconds) * len(records)
    return {
        "stage": "scoring",
        "ours": ours,
        "theirs": theirs,
        "ratio": theirs / ours,
        "limit": limit(lambda: quality.score(len(records))),
        "agreement": f"rewrite_acc differs in {differing} of {sample} facts",
    }


def profiled(editor: sp.Editor, records: Sequence[Record]) -> None:
    """Print how long aiming and the rest of a batch take, and aiming's operations and their shares of its time."""
    requests = requests_of(records)
    editor.prepare()
    seconds, aimed = timed(lambda: editor.aim(requests))
    rest, _ = timed(lambda: editor.apply(requests, aimed))
    editor.restore()
    print(f"a batch of {len(records)}: aiming {seconds:.1f} s, all else {rest:.1f} s")
    with FlopCounterMode(display=False) as counter:
        editor.aim(requests)
    print(f"products in aiming: {counter.get_total_flops() / 1e9:.0f} GFLOP")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        editor.aim(requests)
    found = sorted(seen.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in found)
    for one in found[:12]:
        print(f"{one.self_cpu_time_total / whole:6.1%}  {one.key}")


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--layers", default="12,13,14,15,16")
    parser.add_argument("--stage", choices=("aiming", "scoring"), action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    host = load_host()
    config = sp.SphereHyperParams.from_hparams(YAML).editing()
    config.layers = [int(layer) for layer in arguments.layers.split(",")]
    records = read_records(limit=arguments.facts)
    editor = sp.Editor(*sp.load_model("smollm2-135m"), config)
    if arguments.profile:
        profiled(editor, records)
        return
    about = {**machine(), "host": f"{host.kind} {host.version}", "facts": arguments.facts}
    stages = {"aiming": aiming, "scoring": scoring}
    rows = [stages[name](editor, records, arguments.sample) for name in arguments.stage or stages]
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        print(
            "{stage:32} {ours:8.2f} s  {theirs:8.2f} s  {ratio:6.1f}x  limit {limit:6.2f} s  {agreement}".format(**row)
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
