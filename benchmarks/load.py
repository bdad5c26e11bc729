"""Thousands of edits, one batch after another, into one small model: does a late batch cost what an early one does.

    OMP_NUM_THREADS=1 python benchmarks/load.py [--entries memit+sphere,alphaedit+sphere] [--edits 10000]
        [--batch-size 50] [--out DIR] [--json FILE] [--plot FILE]

does `sphere run`, whole: journal, checkpoints, energies, scores of a sample drawn by seed. The model has random
weights and the facts are invented, so nothing is needed but this package. Several entries have a process each.

Of every batch: time (of the processor, and on the wall), memory, and the journal's bytes. The first batch, which
counts statistics, and those behind a checkpoint, whose time is also that of the scoring, are left out of the fits.

A processor is slower where others use its caches. So behind every batch a yardstick is laid: the same passes through a
copy of the model that nobody edits. `pace` is the time of the batch over that of its yardstick. It is flat where the
slope of a line through it is no more than noise. Neighbouring batches share the machine's mood, so the line goes
through the medians of 20 equal stretches of the run; ± is 95 % of Student's t.

Memory is what the process has of its own (`RssAnon` and `VmSwap`: what is mapped from files comes and goes with what
others need), once the C library has given back what is free, and the most it ever had of any kind (`VmHWM`). Memory
and bytes are compared between the first tenth of the run and the last. Linux, glibc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from scipy.stats import linregress, t
from sequence import Watched, status
from stages import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sphere_plugin.files import fingerprint
from sphere_plugin.journaling import Journal, run_lock
from sphere_plugin.sequence.runner import Run
from sphere_plugin.sequence.settings import RunSettings

TIMES = ("pace", "cpu", "wall")
ENTRIES = "memit+sphere,alphaedit+sphere"
STRETCHES = 20
YARDSTICK = 4  # passes, there and back
SYLLABLES = "bal cor dun el far gor hin is jor kel lum mar nor os pel quin ras sol tor ul ven wil xan yor zel"
# Relation: the prompt, another way to say it, and what may come behind it. Subjects come last: there a model with
# random weights, whose attention carries little from one token to another, can be edited.
RELATIONS = (
    ("Home town of {}", "The town that calls itself the home of {}", "Ardmoor Bexley Corvale Dunmere Eastry"),
    ("Trade of {}", "The trade that was learned by {}", "baker carpenter dentist farmer glazier"),
    ("Instrument of {}", "The instrument that is played by {}", "banjo cello drum flute harp"),
    ("Mother tongue of {}", "The language that was spoken first by {}", "Basque Danish Finnish Greek Welsh"),
)
TEXT = "The river comes down from the hills and turns the old mill. People of the town meet there on market days.\n"


# ---- facts and a model that nobody has ever seen ----


def invented(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many facts about as many people, in CounterFact's schema; each has a paraphrase and two neighbours."""
    draw = random.Random(seed)
    parts = ["".join(pair).capitalize() for pair in itertools.product(SYLLABLES.split(), repeat=2)]
    names = [f"{first} {last}" for first, last in itertools.product(parts, parts)]
    names = draw.sample(names, number)
    facts = []
    for place, name in enumerate(names):
        sentence, otherwise, objects = RELATIONS[place % len(RELATIONS)]
        true, new = draw.sample(objects.split(), 2)
        others = [names[(place + step) % number] for step in (4, 8)]
        facts.append(
            {
                "requested_rewrite": {
                    "prompt": sentence,
                    "subject": name,
                    "target_new": {"str": new},
                    "target_true": {"str": true},
                },
                "paraphrase_prompts": [otherwise.format(name)],
                "neighborhood_prompts": [sentence.format(other) for other in others],
            }
        )
    return facts


def model_with(folder: Path, texts: Sequence[str], hidden: int, layers: int) -> None:
    """Save a LLaMA model with random weights, and a tokenizer trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    kept = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, show_progress=False, **kept))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    known = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": max(1, hidden // 16), "max_position_embeddings": 256, "vocab_size": len(known)}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * hidden**-0.5)
    model.save_pretrained(folder)
    known.save_pretrained(folder)


def settings_in(folder: Path, entry: str, arguments: argparse.Namespace) -> RunSettings:
    """Make the facts, the model and the settings of a run in ``folder``."""
    facts = invented(arguments.edits)
    texts = [TEXT, *(sentence.format("") + " " + objects for sentence, _, objects in RELATIONS)]
    texts += [fact["requested_rewrite"]["subject"] for fact in facts[:1000]]
    model_with(folder / "model", texts, arguments.hidden, arguments.layers)
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    hparams = {
        "alg_name": "SPHERE",
        "base_method": "MEMIT",
        "model_name": str(folder / "model"),
        "device": "cpu",
        "layers": [1, 2],
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
        "v_num_grad_steps": arguments.steps,
        "v_lr": 0.5,
        "clamp_norm_factor": 4.0,
        "context_template_length_params": [[5, 2]],
        "mom2_n_samples": arguments.texts,
        "mom2_update_weight": 100.0,
        "nullspace_threshold": 1.0,
        "L2": 10.0,
        "stats_dir": str(folder / "statistics"),
    }
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams), encoding="utf-8")
    return RunSettings.from_mapping(
        {
            "entries": entry,
            "hparams": folder / "hparams.yaml",
            "data": folder / "facts.json",
            "text": folder / "text.txt",
            "edits": arguments.edits,
            "batch_size": arguments.batch_size,
            "checkpoints": list(range(arguments.every, arguments.edits, arguments.every)),
            "sample": arguments.sample,
        }
    )


# ---- the run ----


class Paced(Watched):
    """Lays a yardstick behind every batch, whose time is nobody's.

    Args:
        model: where the model is that a copy is made of.
    """

    def __init__(self, model: Path) -> None:
        super().__init__()
        self._model = LlamaForCausalLM.from_pretrained(model)
        self._ids = torch.arange(50 * 12).reshape(50, 12) % self._model.config.vocab_size
        self.yardsticks, self.own = [self._laid()], [0.0]
        self.begun = [(time.process_time(), time.perf_counter())]

    def __call__(self, what: str, done: int, total: int) -> None:
        """Note the end of a batch, and begin the next one behind the yardstick."""
        super().__call__(what, done, total)
        if len(self.edits) > len(self.begun):
            self.own.append(status("RssAnon") + status("VmSwap"))
            self.yardsticks.append(self._laid())
            self.begun.append((time.process_time(), time.perf_counter()))

    def _laid(self) -> float:
        started = time.process_time()
        for _ in range(YARDSTICK):
            self._model(input_ids=self._ids, labels=self._ids).loss.backward()
        self._model.zero_grad()
        return time.process_time() - started


def measure(entry: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one run, and return every number."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.out or temporary) / entry
        folder.mkdir(parents=True)
        told = settings_in(folder, entry, arguments)
        watched = Paced(folder / "model")
        with run_lock(folder / "run"):
            run = Run(told, folder / "run", watched)
            run.begin()
            run.go()
            journal = run.journal
        points = {0, *told.checkpoints}
        batches = [
            {
                "edits": watched.edits[number],
                "cpu": watched.seconds[number] - watched.begun[number - 1][0],
                "wall": watched.clock[number] - watched.begun[number - 1][1],
                "yardstick": (watched.yardsticks[number - 1] + watched.yardsticks[number]) / 2,
                "held": watched.own[number],
                "most": watched.most[number],
                "bytes": sum(path.stat().st_size for path in journal.folder.glob(f"{number:06d}.*")),
                "plain": watched.edits[number - 1] not in points,
            }
            for number in range(1, len(watched.edits))
        ]
        for batch in batches:
            batch["pace"] = batch["cpu"] / batch["yardstick"]
        return {
            "entry": entry,
            "edits": arguments.edits,
            "batch_size": arguments.batch_size,
            "parameters": sum(parameter.numel() for parameter in run.entrant.model.parameters()),
            "weights": [list(weight.shape) for weight in run.weights.values()],
            "machine": machine(),
            **summary(batches, arguments.batch_size),
            "undo": undone(run, journal, folder / "model"),
            "scores": list(scores(folder / "run")),
            "batches": batches,
        }


def summary(batches: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """What there is to say about all batches."""
    plain = [batch for batch in batches if batch["plain"]]
    early, late = ends(plain)
    return {
        "wall_seconds_per_hundred": 100 / size * median(batch["wall"] for batch in plain),
        "cpu_seconds_per_hundred": 100 / size * median(batch["cpu"] for batch in plain),
        "wall_seconds": sum(batch["wall"] for batch in batches),
        **{name: {**line(plain, name), "late_to_early": late[name] / early[name]} for name in TIMES},
        "held": {"early": early["held"], "late": late["held"], "late_to_early": late["held"] / early["held"]},
        "most": {"early": early["most"], "late": late["most"], "late_to_early": late["most"] / early["most"]},
        "bytes": {"early": early["bytes"], "late": late["bytes"], "all": sum(batch["bytes"] for batch in batches)},
    }


def ends(plain: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Medians over the first tenth of the run, and over the last."""
    tenth, names = max(1, len(plain) // 10), (*TIMES, "held", "most", "bytes")
    first, last = (
        {name: median(one[name] for one in part) for name in names} for part in (plain[:tenth], plain[-tenth:])
    )
    return first, last


def line(plain: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """The least-squares line through the medians of stretches: its change from end to end, as a share of the mean."""
    count = min(STRETCHES, len(plain))
    cuts = [len(plain) * n // count for n in range(count + 1)]
    stretches = [plain[first:last] for first, last in itertools.pairwise(cuts)]
    x = [median(one["edits"] for one in part) for part in stretches]
    y = [median(one[name] for one in part) for part in stretches]
    if count < 3:
        raise SystemExit(f"{len(plain)} batches to fit a line to: give more --edits, or a smaller --batch-size")
    found, span = linregress(x, y), (plain[-1]["edits"] - plain[0]["edits"]) / (sum(y) / len(y))
    wide = float(t.ppf(0.975, count - 2)) * found.stderr
    return {"change": found.slope * span, "half_width": wide * span, "mean": sum(y) / len(y)}


def undone(run: Run, journal: Journal, model: Path) -> dict[str, Any]:
    """Whether the journal leads back to the very weights that the model was loaded with, and from there again."""
    before = LlamaForCausalLM.from_pretrained(model)
    expected = fingerprint((name, before.get_parameter(name)) for name in journal.names)
    last = journal.fingerprint(len(journal))
    reopened = Journal.open(journal.folder)
    reopened.restore(0, run.weights)
    back = fingerprint(run.weights.items())
    reopened.restore(len(reopened), run.weights)
    return {"to_none": back == expected, "and_to_all": fingerprint(run.weights.items()) == last}


def scores(folder: Path) -> Iterator[dict[str, Any]]:
    """Mean efficacy of the sample at every checkpoint."""
    for path in sorted((folder / "checkpoints").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        known = [value for value in told["scores"]["efficacy"] if value is not None]
        yield {"edits": told["edits"], "efficacy": sum(known) / len(known), "nll": told["scores"]["nll"]}


# ---- what is shown ----


def shown(found: dict[str, Any]) -> str:
    """The numbers of one entry in words."""
    batches = f"{len(found['batches'])} batches of {found['batch_size']}"
    times = [
        f"{name}: from the first batch to the last {found[name]['change']:+.1%} ± {found[name]['half_width']:.1%}, "
        f"last tenth / first {found[name]['late_to_early']:.3f}"
        for name in TIMES
    ]
    held, size = found["held"], found["bytes"]
    memory = f"holds {held['early']:.1f} MiB, then {held['late']:.1f} MiB, ratio {held['late_to_early']:.4f}"
    journal = f"journal {size['early']:.0f} bytes a batch, then {size['late']:.0f}; all {size['all'] / 2**20:.1f} MiB"
    back = f"undo to 0 bit-exact: {found['undo']['to_none']}; and forth: {found['undo']['and_to_all']}"
    each = f"{found['cpu_seconds_per_hundred']:.2f} s of the processor per hundred edits"
    head = f"{found['entry']}: {found['edits']} edits, {batches}, {found['wall_seconds']:.0f} s on the wall, {each}"
    return "\n    ".join([head, *times, memory, journal, back])


def written(results: Sequence[dict[str, Any]]) -> str:
    """JSON with a line for each batch, numbers of six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    parts = [
        ",\n".join(
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]"
            if name == "batches"
            else f"{json.dumps(name)}: {json.dumps(value)}"
            for name, value in one.items()
        )
        for one in rounded
    ]
    return '{"results": [\n{' + "},\n{".join(parts) + "}\n]}\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory per batch against edits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    for number, found in enumerate(results):
        plain = [batch for batch in found["batches"] if batch["plain"]]
        edits, fit = [batch["edits"] for batch in plain], found["pace"]
        told = f"{found['entry']}: {fit['change']:+.1%} ± {fit['half_width']:.1%} from end to end"
        axes[0].plot(edits, [batch["pace"] for batch in plain], ".", ms=3, color=f"C{number}", label=told)
        slope = [fit["mean"] * (1 + fit["change"] * side) for side in (-0.5, 0.5)]
        axes[0].plot([edits[0], edits[-1]], slope, color=f"C{number}")
        told = f"{found['entry']}: last tenth / first {found['held']['late_to_early']:.4f}"
        axes[1].plot(edits, [batch["held"] for batch in plain], color=f"C{number}", label=told)
    axes[0].set_ylabel(f"time of a batch of {results[0]['batch_size']}\n(yardsticks)")
    axes[1].set(ylabel="memory of its own, MiB", xlabel="edits")
    for axis in axes:
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
        axis.legend(loc="lower right", fontsize="small")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", default=ENTRIES)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--every", type=int, default=1000, help="edits from one checkpoint to the next")
    parser.add_argument("--sample", type=int, default=100, help="edits scored at a checkpoint")
    parser.add_argument("--steps", type=int, default=6, help="of the search for a target")
    parser.add_argument("--texts", type=int, default=200, help="that key statistics are counted over")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="keeps the runs here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(given)


def main() -> None:
    """Run every entry, print its numbers, and write them and the figure where asked to."""
    arguments = parsed()
    results, entries = [], arguments.entries.split(",")
    for entry in entries:
        if len(entries) == 1:
            results.append(measure(entry, arguments))
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results.append(process.submit(partial(measure, entry, arguments)).result())
        print(shown(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(written(results), encoding="utf-8")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
