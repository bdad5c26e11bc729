"""A batch of edits on a whole model of random weights in the shape of LLaMA3-8B or Qwen2.5-7B, stage by stage.

    EASYEDIT_HOME=... python benchmarks/full.py --model llama3-8b --device cuda [--dtype float32] [--facts 100]
        [--sample 2] [--json FILE]
    python benchmarks/full.py --narrow 16 --depth 10 --device cpu --facts 4      # a try on any machine

The settings are those of `hparams/SPHERE`: AlphaEdit with SPHERE, layers 4 to 8, 25 steps, six contexts. Key
statistics are counted over texts of random letters, more tokens than a weight has inputs. Facts are the project's own,
tokenised as by SmolLM2. Ours takes all of them at once. EasyEdit main's SPHERE takes a sample one by one and its
AlphaEdit the same sample as a batch, with our prefixes and statistics; what a fact costs them is carried over to all,
as they work through one after the other. Neither has its null space counted, which is made once.

On a GPU "most" is torch's peak of allocated memory in a stage, and "formula" that of `sphere_plugin.editing.budget`.
--narrow divides every width but the vocabulary's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from editing import requests_of
from end_to_end import Main
from stages import machine
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import sphere_plugin as sp
from sphere_plugin.data import read_records
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.editing.budget import Batch, Budget
from sphere_plugin.editing.needs import shape_of
from sphere_plugin.evaluation import Quality
from sphere_plugin.models import resolve_model
from sphere_plugin.models.memory import in_words

HPARAMS: Final = Path(__file__).resolve().parents[1] / "hparams" / "SPHERE"
TEXTS: Final = 80  # of so many random letters each, some 40,000 tokens
LETTERS: Final = 1500
OPPONENTS: Final = (
    ("EasyEdit's SPHERE, one by one", "easyeditor.models.SPHERE.SPHERE_main", "apply_SPHERE_to_model", True),
    (
        "EasyEdit's AlphaEdit, in a batch",
        "easyeditor.models.alphaedit.AlphaEdit_main",
        "apply_AlphaEdit_to_model",
        False,
    ),
)


def built(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model, from its config."""
    by, depth = arguments.narrow, arguments.depth
    if arguments.model == "llama3-8b":
        config: Any = LlamaConfig(
            vocab_size=128_256, hidden_size=4096 // by, intermediate_size=14336 // by, num_hidden_layers=depth or 32,
            num_attention_heads=32, num_key_value_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            tie_word_embeddings=False,
        )  # fmt: skip
        kind: Any = LlamaForCausalLM
    else:
        config = Qwen2Config(
            vocab_size=152_064, hidden_size=3584 // by, intermediate_size=18944 // by, num_hidden_layers=depth or 28,
            num_attention_heads=28, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
        )  # fmt: skip
        kind = Qwen2ForCausalLM
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model: PreTrainedModel = kind(config).to(getattr(torch, arguments.dtype)).eval()
    return model


def texts(folder: Path) -> Path:
    """A file of random letters."""
    letters = random.Random(0)
    path = folder / "texts.json"
    path.write_text(
        json.dumps(["".join(letters.choices(string.ascii_lowercase + " ", k=LETTERS)) for _ in range(TEXTS)])
    )
    return path


class Stages:
    """Times one stage after the other."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.rows: list[dict[str, Any]] = []

    def __call__(self, name: str, work: Callable[[], Any], formula: int | None = None) -> Any:
        """What the work returns."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        done = work()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        most = torch.cuda.max_memory_allocated() if self.cuda else None
        self.rows.append({"stage": name, "seconds": seconds, "most": most, "formula": formula})
        told = "" if most is None else f"{in_words(most):>14}{in_words(formula):>14}"
        print(f"{name:<36}{seconds:10.2f} s{told}", flush=True)
        return done


def ours(model: PreTrainedModel, arguments: argparse.Namespace, stages: Stages, folder: Path) -> sp.Editor:
    """All stages of ours; returns the editor, the model unedited again."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    tokenizer.pad_token = tokenizer.eos_token
    records = read_records(limit=arguments.facts)
    requests = requests_of(records)
    config = sp.SphereHyperParams.from_hparams(HPARAMS / f"{arguments.model}.yaml").editing()
    config = replace(
        config, mom2_dataset=str(texts(folder)), mom2_n_samples=TEXTS, stats_dir=str(folder), v_loss_layer=None
    )
    budget = Budget(shape_of(model, config), config, next(model.parameters()).element_size(), Batch(len(records)))
    formulas = {phase.name: phase.at("weights", "statistics") for phase in budget.phases}
    editor = stages("the editor: model checked, copies", lambda: sp.Editor(model, tokenizer, config))
    stages("prefixes", lambda: editor.contexts)
    stages("key statistics and null spaces", editor.prepare, formulas["making solvers"])
    aimed = stages(f"aiming {len(records)} facts", lambda: editor.aim(requests), formulas["aiming"])
    for number in (1, 2):  # the first finds the principal spaces, the second follows them
        most = max(formulas["reading keys"], formulas["writing"])
        stages(f"keys, solves, projection, write, {number}", lambda: editor.apply(requests, aimed), most)
    quality = stages("scoring is set up", lambda: Quality(model, tokenizer, records, "Two words."))
    stages(f"scoring {len(records)} facts", lambda: quality.score(len(records)), formulas["scoring"])
    rows = [one.weight for one in editor.anatomy.rewrites.values()]
    stages("energy of the edited weights", lambda: [sp.hyperspherical_energy(one) for one in rows])
    editor.restore()
    return editor


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama3-8b", "qwen2.5-7b"), default="llama3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--sample", type=int, default=2)
    parser.add_argument("--narrow", type=int, default=1)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    host = load_host()
    about = {**machine(), "host": f"{host.kind} {host.version}", **{k: str(v) for k, v in vars(arguments).items()}}
    if arguments.device.startswith("cuda"):
        about["processor"] = torch.cuda.get_device_name()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    stages = Stages(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        editor = ours(stages("model", lambda: built(arguments)), arguments, stages, Path(name))
        os.chdir(name)  # main writes its null space to the working directory
        names = ("aiming", "keys, solves, projection, write, 2")  # a batch once spaces are followed
        batch = sum(row["seconds"] for row in stages.rows if row["stage"].startswith(names))
        requests = requests_of(read_records(limit=arguments.sample + 1))
        for title, module, function, alone in OPPONENTS if host.kind == "main" else ():
            opponent = Main(module, function, editor)
            opponent.edit(requests[:1])  # its null space is made at the first edit
            given = [[one] for one in requests[1:]] if alone else [requests[1:]]
            each = sum(opponent.edit(one) for one in given) / arguments.sample
            del opponent
            row = {"stage": title, "seconds": each * arguments.facts, "most": None, "formula": None}
            stages.rows.append({**row, "ratio": row["seconds"] / batch})
            print(f"{title:<36}{row['seconds']:10.2f} s  {row['seconds'] / batch:.1f} times ours")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": stages.rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
