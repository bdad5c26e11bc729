"""How cost grows: measured points, and the exponent of the power law that fits them best.

    python benchmarks/growth.py [--part width,facts,edits,model] [--repeats 3] [--json FILE]

Parts, all on the machine's threads as they are set (OMP_NUM_THREADS):

    width   the stages of `benchmarks/stages.py` against d_in, d_out = 3/8 of it, 20 facts
    facts   the same against the number of facts in a batch, for one weight
    edits   a batch of SmolLM2-135M against the number of edits before it (`benchmarks/flat.py`); exponent 0 is flat
    model   aiming and key reading of 10 facts against the parameters of LLaMA models with random weights

Exponents are the slope of the least-squares line through the logarithms, over all points, and between the last two.
The former is the lower where a constant cost counts at small sizes. Times are medians in one process.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median as middle

import flat
import torch
from editing import PREFIXES, YAML, requests_of
from stages import NULL_SHARE, STAGES, Case, machine, median
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sphere_plugin as sp
from sphere_plugin.data import read_records
from sphere_plugin.editing.aim import aim
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.models.embedded import embedded_model

WIDTHS = "768,1536,3072,6144"
BATCHES = "10,20,50,100,200"
SHAPE = (1152, 3072)  # of the weight that batches of all sizes are written into
MODELS = "128x4,256x8,512x12,768x16"
FACTS = 20
MODEL_FACTS = 10
STEPS = 5
EDITS = 64  # batches of two


@dataclass(frozen=True)
class Curve:
    """Seconds of one thing at several sizes of another."""

    what: str
    against: str
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of the least-squares line through the logarithms of all points."""
        x, y = ([math.log(value) for value in values] for values in (self.sizes, self.seconds))
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return covariance / sum((a - mean_x) ** 2 for a in x)

    @property
    def last(self) -> float:
        """The same through the last two points."""
        return Curve(self.what, self.against, self.sizes[-2:], self.seconds[-2:]).exponent

    def line(self) -> str:
        """The line as printed."""
        points = "  ".join(f"{size:.4g}: {took:.4g} s" for size, took in zip(self.sizes, self.seconds, strict=True))
        return f"{self.what:<24}{self.against:<14}{self.exponent:6.2f}{self.last:8.2f}   {points}"


HEADER = f"{'cost of':<24}{'against':<14}{'power':>6}{'at end':>8}   points"


class Quick(Case):
    """Inputs whose second moment and null space cost nothing to make: both are turned by one reflection I − 2vvᵀ."""

    def _axis(self) -> Tensor:
        axis = torch.randn(len(self.keys), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return axis / axis.norm()

    def moment(self) -> Tensor:
        """A second moment of keys, [d_in, d_in], with a condition number of 10³."""
        axis, values = self._axis(), torch.logspace(0, -3, len(self.keys), dtype=torch.float64)
        seen = values * axis
        beside = 2.0 * seen - 2.0 * float(axis @ seen) * axis
        return (values.diag() - axis[:, None] * beside - beside[:, None] * axis).float()

    def null(self) -> Tensor:
        """An orthonormal basis Q of a null space, [d_in, null] float64."""
        axis, count = self._axis(), int(NULL_SHARE * len(self.keys))
        return torch.eye(len(axis), count, dtype=torch.float64) - 2.0 * axis[:, None] * axis[:count]


def stages(cases: Sequence[tuple[int, Quick]], against: str, repeats: int) -> Iterator[Curve]:
    """All stages, at the size that stands before each case."""
    sizes = tuple(float(size) for size, _ in cases)
    for stage, way in STAGES.items():
        yield Curve(stage, against, sizes, tuple(way(case, repeats)[0] for _, case in cases))


def width(settings: argparse.Namespace) -> Iterator[Curve]:
    """Stages against d_in."""
    widths = [int(d_in) for d_in in settings.widths.split(",")]
    cases = [(d_in, Quick.of(3 * d_in // 8, d_in, FACTS)) for d_in in widths]
    return stages(cases, "d_in", settings.repeats)


def facts(settings: argparse.Namespace) -> Iterator[Curve]:
    """Stages against the number of facts."""
    batches = [int(count) for count in settings.batches.split(",")]
    return stages([(count, Quick.of(*SHAPE, count)) for count in batches], "facts", settings.repeats)


def edits(settings: argparse.Namespace) -> Iterator[Curve]:
    """Batches against the number of edits before: medians of batches 4 to 7, 8 to 15, 16 to 31 and so on."""
    size = 2
    seconds, _ = flat.measure(settings.edits, size)
    starts = [2**power for power in range(2, 20) if 2**power < len(seconds)]
    windows = [(start, min(2 * start, len(seconds))) for start in starts]
    earlier = tuple(size * (first + last - 1) / 2 for first, last in windows)
    yield Curve("a batch of two", "earlier edits", earlier, tuple(middle(seconds[a:b]) for a, b in windows))


def model(settings: argparse.Namespace) -> Iterator[Curve]:
    """Aiming and key reading against the parameters of the model; the head is the embeddings' matrix."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    sizes, aiming, reading = [], [], []
    for name in settings.models.split(","):
        hidden, layers = map(int, name.split("x"))
        editor = editor_of(hidden, layers, tokenizer)
        sizes.append(float(sum(p.numel() for p in editor.anatomy.model.parameters())))
        contexts = Contexts(("", *PREFIXES), (0.5, *[0.5 / len(PREFIXES)] * len(PREFIXES)))
        batch = read_requests(requests_of(read_records(limit=MODEL_FACTS)))
        steps = int(aim(editor.anatomy, editor.locator, batch, contexts.prefixes, editor.config).steps.min())
        if steps < STEPS:
            raise SystemExit(f"a search of the model {name} ended after {steps} of {STEPS} steps: nothing to compare")
        aiming.append(
            median(
                lambda e=editor, b=batch, c=contexts: aim(e.anatomy, e.locator, b, c.prefixes, e.config),
                settings.repeats,
            )
        )
        reading.append(median(lambda e=editor, b=batch, c=contexts: read(e, b, c), settings.repeats))
    yield Curve(f"aiming {MODEL_FACTS} facts", "parameters", tuple(sizes), tuple(aiming))
    yield Curve(f"keys of {MODEL_FACTS} facts", "parameters", tuple(sizes), tuple(reading))


def editor_of(hidden: int, layers: int, tokenizer: object) -> sp.Editor:
    """Of a model with random weights; the two layers at its middle are edited."""
    torch.manual_seed(0)
    described = LlamaConfig(
        vocab_size=len(tokenizer),  # type: ignore[arg-type]
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config = sp.SphereHyperParams.from_hparams(YAML).editing()
    config.layers, config.v_loss_layer, config.v_num_grad_steps = [layers // 2 - 1, layers // 2], None, STEPS
    return sp.Editor(LlamaForCausalLM(described).eval(), tokenizer, config)


def read(editor: sp.Editor, batch: Sequence[object], contexts: Contexts) -> None:
    """Keys and values of the edited layers."""
    reader = KeyReader(editor.anatomy, editor.locator, batch, contexts, editor.config.token_budget)  # type: ignore[arg-type]
    for layer in reader.layers:
        reader.read(layer)


PARTS = {"width": width, "facts": facts, "edits": edits, "model": model}


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--widths", default=WIDTHS)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--models", default=MODELS, help="hidden size x layers")
    parser.add_argument("--edits", type=int, default=EDITS, help="batches of two facts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about, curves = machine(), []
    print("{processor}, {cores} cores, {threads} threads, load {load:.1f}, torch {torch}, {date}".format(**about))
    print(HEADER)
    for part in arguments.part.split(","):
        for curve in PARTS[part](arguments):
            print(curve.line(), flush=True)
            curves.append(curve)
    if arguments.json:
        results = [{**asdict(curve), "exponent": curve.exponent, "last_exponent": curve.last} for curve in curves]
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
