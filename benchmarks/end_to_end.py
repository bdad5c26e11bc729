"""Editing from requests to written weights: AlphaEdit + SPHERE in batches, against EasyEdit main's own code.

    EASYEDIT_HOME=... python benchmarks/end_to_end.py [--edits 100] [--batch-size 50] [--data counterfact.json]

EasyEdit's AlphaEdit takes a batch of --sample facts, its SPHERE two facts one by one, and what a fact costs them is
carried over to all edits: they work through one fact after another, so their cost is linear. Key statistics and
prefixes are handed to them, and neither side's scoring is counted. Main's own SPHERE and AlphaEdit keep their state in
module globals, so this runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages import machine, requests_of

import sphere_plugin as sp
from sphere_plugin.data import read_records
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.editing.statistics import key_moments

YAML = Path(__file__).resolve().parent.parent / "hparams/SPHERE/smollm2-135m.yaml"


def timed(work: Callable[[], Any]) -> float:
    """Seconds; what EasyEdit prints goes nowhere."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    return time.perf_counter() - started


class Main:
    """A method of EasyEdit main on a copy of the model, with our prefixes and key statistics."""

    def __init__(self, module: str, function: str, editor: sp.Editor) -> None:
        self.module = sys.modules[module]
        self.apply = getattr(self.module, function)
        self.model = copy.deepcopy(editor.anatomy.model)
        self.tokenizer = editor.tokenizer
        config = editor.config
        moments = key_moments(editor.anatomy, editor.tokenizer, config)
        named = {config.rewrite_module_tmp.format(layer): moment for layer, moment in moments.items()}
        layer = config.layer_module_tmp
        self.hparams = SimpleNamespace(
            **vars(config),
            alg_name="AlphaEdit",
            model_name="llama",
            device=0 if editor.anatomy.device.type == "cuda" else "cpu",
            model_parallel=False,
            P_loc="null_space_project.pt",
            mom2_dtype="float32",
            mom2_adjustment=True,
            layer_selection="all",
            mlp_module_tmp=f"{layer}.mlp",
            attn_module_tmp=f"{layer}.self_attn",
            cumulative_ratio=config.eta,
            suppression_strength=config.alpha,
        )
        self.hparams.v_loss_layer = editor.anatomy.loss_layer
        self.module.CONTEXT_TEMPLATES_CACHE = [["{}"], [prefix + "{}" for prefix in editor.contexts.prefixes[1:]]]
        self.module.get_cov = lambda model, tok, name, *_, **__: named[name]
        self.module.cache_c_new = self.module.P_loaded = False

    def edit(self, requests: list[dict[str, str]]) -> float:
        """Write a batch; seconds."""
        return timed(lambda: self.apply(self.model, self.tokenizer, copy.deepcopy(requests), self.hparams))


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    host = load_host()
    if host.kind != "main":
        parser.error("the PyPI release has neither AlphaEdit nor SPHERE: set EASYEDIT_HOME to a checkout of EasyEdit")
    requests = requests_of(read_records(arguments.data, arguments.edits))
    editor = sp.Editor(*sp.load_model("smollm2-135m"), sp.SphereHyperParams.from_hparams(YAML).editing())
    editor.prepare()
    out = arguments.json and arguments.json.resolve()
    os.chdir(tempfile.mkdtemp())  # main writes its null space to the working directory
    alphaedit = Main("easyeditor.models.alphaedit.AlphaEdit_main", "apply_AlphaEdit_to_model", editor)
    sphere = Main("easyeditor.models.SPHERE.SPHERE_main", "apply_SPHERE_to_model", editor)
    alphaedit.edit(requests[:1])  # its null space is made once, at the first edit
    sphere.edit(requests[:1])
    size, edits = arguments.batch_size, len(requests)
    about = {**machine(), "host": host.version, "edits": edits, "batch_size": size}
    theirs = {
        "EasyEdit's AlphaEdit, in a batch": alphaedit.edit(requests[: arguments.sample]) / arguments.sample * edits,
        "EasyEdit's SPHERE, one by one": sum(sphere.edit([request]) for request in requests[:2]) / 2 * edits,
    }
    ours = [timed(lambda first=first: editor.apply(requests[first : first + size])) for first in range(0, edits, size)]
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'AlphaEdit + SPHERE, ours':36} {sum(ours):8.1f} s")
    rows = [{"opponent": name, "seconds": took, "ratio": took / sum(ours)} for name, took in theirs.items()]
    for row in rows:
        print("{opponent:36} {seconds:8.1f} s  {ratio:6.1f}x".format(**row))
    if out:
        out.write_text(json.dumps({**about, "ours": ours, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
