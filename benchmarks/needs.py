"""What each step of editing needs at its peak: measured, and by the formulas of `sphere_plugin.editing.budget`.

    OMP_NUM_THREADS=1 python benchmarks/needs.py [--width 512 --inside 2048 --layers 8 --vocabulary 8000] [--facts 20]
        [--base MEMIT|AlphaEdit] [--dtype float32|bfloat16] [--master] [--json FILE]

A LLaMA of random weights with these sizes edits its layers 1 and 2, in a process of its own in which all steps have
run on a tiny model before. Before each step the kernel's record of the peak is set back (`/proc/self/clear_refs`), and
after it the record is read (`VmHWM`). "extra" is what the step needed beyond what was there before it. Every tensor
has pages of its own (MALLOC_MMAP_THRESHOLD_), so that what is freed is given back. Linux, CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory import MIB, status
from stages import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sphere_plugin.editing import EditingConfig, Editor
from sphere_plugin.editing.budget import Batch, Budget, Shape
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.batch import orientations

LAYERS = [1, 2]
TEXTS = 40  # for key statistics, of so many random letters each
LONG = 600
TINY = {"width": 32, "inside": 64, "layers": 4, "vocabulary": 400, "facts": 2}


@dataclass(frozen=True)
class Row:
    """One step; memory in MiB."""

    step: str
    extra: float
    formula: float

    def line(self) -> str:
        """The line as printed."""
        return f"{self.step:<26}{self.extra:9.1f} {self.formula:9.1f} {self.formula / self.extra:8.2f}"


HEADER = f"{'step':<26}{'extra':>9} {'formula':>9} {'ratio':>8}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the pairs of a sentence or two."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    plain.train_from_iterator(["The mother tongue of number three is in the city of the capital of"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>")


class Case:
    """A model, an editor on it, and what its steps are."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        sizes = {"hidden_size": arguments.width, "intermediate_size": arguments.inside}
        sizes |= {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4))
        self.element = getattr(torch, arguments.dtype).itemsize
        self.config = EditingConfig(
            layers=LAYERS, rewrite_module_tmp="model.layers.{}.mlp.down_proj", layer_module_tmp="model.layers.{}",
            ln_f_module="model.norm", lm_head_module="lm_head", base_method=arguments.base, v_num_grad_steps=2,
            context_template_length_params=[[5, 2]], mom2_dataset=str(self._text()), mom2_n_samples=TEXTS,
            nullspace_threshold=1e9, master_copy=arguments.master, stats_dir=str(folder / "statistics"),
        )  # fmt: skip
        self.editor = Editor(model.to(getattr(torch, arguments.dtype)), tokenizer(), self.config)
        self.requests = [
            {"prompt": "The mother tongue of {} is", "subject": f"number {n}", "target_new": "three"}
            for n in range(arguments.facts)
        ]

    def _text(self) -> Path:
        path = self.folder / "text.json"
        letters = random.Random(0)
        texts = ["".join(letters.choices(string.ascii_letters, k=LONG)) for _ in range(TEXTS)]
        path.write_text(json.dumps([{"text": text} for text in texts]))
        return path

    def budget(self) -> Budget:
        """The formulas, of the facts as they are tokenised."""
        config, locator = self.editor.anatomy.model.config, self.editor.locator
        weight = next(iter(self.editor.anatomy.rewrites.values())).weight
        shape = Shape(
            parameters=sum(one.numel() for one in self.editor.anatomy.model.parameters()),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            kept=2 * config.num_key_value_heads * config.head_dim,
            vocabulary=config.vocab_size,
            d_out=weight.shape[0],
            d_in=weight.shape[1],
        )
        facts = read_requests(self.requests)
        rows = [locator.aimed(fact, prefix) for fact in facts for prefix in self.editor.contexts.prefixes]
        batch = Batch(
            len(facts),
            max(len(row.ids) for row in rows),
            max(len(row.ids) - row.lookup for row in rows),
            max(len(row.targets) for row in rows),
        )
        return Budget(shape, self.config, self.element, batch)

    # ---- the steps, each of which finds what the ones before it have left ----

    def counting(self) -> Callable[[], object]:
        """Key statistics."""
        _ = self.editor.contexts
        return lambda: key_moments(self.editor.anatomy, self.editor.tokenizer, self.config)

    def solvers(self) -> Callable[[], object]:
        """From statistics in a file."""
        return self.editor.prepare

    def aiming(self) -> Callable[[], object]:
        """All facts."""
        return lambda: setattr(self, "aimed", self.editor.aim(self.requests))

    def writing(self) -> Callable[[], object]:
        """Keys, solving, projecting, writing."""
        return lambda: setattr(self, "report", self.editor.apply(self.requests, self.aimed))

    def journal(self) -> Callable[[], object]:
        """A batch."""
        weights, masters = self.editor.anatomy.weights, self.editor.masters
        turned = orientations(self.editor.anatomy.model, weights)
        before = {name: one.detach().clone() for name, one in self.editor.pretrained.tensors.items()}
        journal = Journal.create(self.folder / "journal", before, turned, masters)
        journal.append({"edits": 0}, before)
        updates = {layer.name: layer.update for layer in self.report.layers}
        return lambda: journal.append({"edits": 1}, weights, updates, masters=masters)

    def formula(self, step: str) -> int:
        """What the step is to need beyond what is there before it."""
        budget = self.budget()
        phases = {phase.name: phase for phase in budget.phases}
        there = phases["aiming"].at("weights", "statistics", "host") - budget.aiming()
        if step == "counting":
            return sum(phases["counting key statistics"].parts[part][1] for part in ("reading text", "sums"))
        if step == "solvers":
            return budget.making_solvers()
        if step == "aiming":
            return budget.aiming()
        if step == "journal":
            return budget.journalling()
        both = (phases[name].at("weights", "statistics", "host") for name in ("reading keys", "writing"))
        # Before the first batch nothing is followed yet, and master copies are made in it.
        first = len(LAYERS) * (budget.followed() + (4 * budget.size if budget.mastered else 0))
        return max(both) - there + first


STEPS = ("counting", "solvers", "aiming", "writing", "journal")


def child(arguments: argparse.Namespace) -> None:
    """Measure in this process, and print bytes as JSON, a line for each step."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").mkdir()
        tiny = Case(argparse.Namespace(**{**vars(arguments), **TINY}), Path(folder) / "tiny")
        for step in STEPS:
            getattr(tiny, step)()()
        case = Case(arguments, Path(folder))
        for step in STEPS:
            work = getattr(case, step)()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = status("VmRSS")
            work()
            extra = status("VmHWM") - before
            print(json.dumps({"step": step, "extra": extra / MIB, "formula": case.formula(step) / MIB}), flush=True)


def measured(given: list[str]) -> list[Row]:
    """All steps, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    command = [sys.executable, __file__, *given, "--child"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("width", 512), ("inside", 2048), ("layers", 8), ("vocabulary", 8000), ("facts", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--base", choices=("MEMIT", "AlphaEdit"), default="MEMIT")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--master", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this system keeps no /proc/self/clear_refs: peaks cannot be measured here")
    if arguments.child:
        child(arguments)
        return
    about: dict[str, Any] = machine()
    print("{processor}, {cores} cores, {threads} threads, torch {torch}, {date}".format(**about))
    print(HEADER)
    rows = measured(sys.argv[1:])
    print("\n".join(row.line() for row in rows))
    if arguments.json:
        content = {**about, **{key: str(one) for key, one in vars(arguments).items()}}
        content["results"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
