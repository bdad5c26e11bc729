"""One layer at the size of a large model: what each stage of a batch takes, in time and memory.

    python benchmarks/layer.py --shape 8192x28672 [--facts 100] [--dtype bfloat16] [--base MEMIT|AlphaEdit]
        [--no-master] [--json FILE]

8192 x 28672 is the down_proj of LLaMA3-70B, 4096 x 14336 that of LLaMA3-8B. Weight, keys and residuals are random; the
second moment of keys is that of 4096 random ones and a decaying diagonal. The stages are those of the editor, one
after the other in a process of its own:

    counting   the product of 4096 keys, added up in float64; the moment
    solver     MEMIT's Cholesky factor, or AlphaEdit's null space
    solving    the update of a batch
    writing    the space, the projection, the weight and its master copy
    energy     of the weight that came out
    journal    the batch on disk

"extra" is the most that a stage held beyond what was there before it, "formula" what `sphere_plugin.editing.budget`
says. Nothing is begun where the largest of them would not fit into memory. Linux, CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory import MIB, sizes, status
from stages import machine
from torch import Tensor, nn

from sphere_plugin.editing import EditingConfig
from sphere_plugin.editing.budget import COUNTED, Budget, Shape
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.editing.statistics import ADDED
from sphere_plugin.editing.write import rounded_sum
from sphere_plugin.geometry import Factors, hyperspherical_energy
from sphere_plugin.journaling import Journal
from sphere_plugin.models.memory import free_bytes
from sphere_plugin.restraints import restrain

NAME = "layer.weight"
WARM = (64, 96)


@dataclass(frozen=True)
class Row:
    """One line of the table; memory in MiB."""

    stage: str
    seconds: float
    extra: float
    formula: float

    def line(self) -> str:
        """The line as printed."""
        ratio = self.formula / self.extra if self.extra else float("inf")
        return f"{self.stage:<10}{self.seconds:9.2f} s {self.extra:10.1f} {self.formula:10.1f} {ratio:7.2f}"


HEADER = f"{'stage':<10}{'time':>11} {'MiB extra':>10} {'formula':>10} {'ratio':>7}"


class Layer:
    """A random linear layer, and the stages of a batch on it."""

    def __init__(self, shape: tuple[int, int], arguments: argparse.Namespace, folder: Path) -> None:
        self.d_out, self.d_in = shape
        self.folder, self.facts = folder, arguments.facts
        dtype = getattr(torch, arguments.dtype)
        self.config = EditingConfig(
            layers=[0], rewrite_module_tmp="layers.{}.down", layer_module_tmp="layers.{}", ln_f_module="norm",
            lm_head_module="head", base_method=arguments.base, nullspace_threshold=0.3, master_copy=arguments.master,
        )  # fmt: skip
        sides = Shape(self.d_out * self.d_in, 1, self.d_out, 0, 0, self.d_out, self.d_in)
        self.budget = Budget(sides, self.config, dtype.itemsize)
        self.weight = nn.Parameter((0.02 * self._normal(*shape, seed=0)).to(dtype))
        self.mastered = self.budget.mastered
        self.journal_of = Journal.create(folder / "journal", self._weights, {NAME: False}, self._masters())

    def _normal(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    @property
    def _weights(self) -> dict[str, Tensor]:
        return {NAME: self.weight.detach()}

    def _masters(self) -> dict[str, Tensor]:
        return {NAME: self.weight.detach().float()} if self.mastered else {}

    # ---- the stages; each returns what is timed ----

    def counting(self) -> Callable[[], object]:
        """Σ kkᵀ."""
        keys = self._normal(COUNTED, self.d_in, seed=1) * torch.logspace(0, -1, self.d_in)

        def work() -> None:
            sums = torch.zeros(self.d_in, self.d_in, dtype=torch.float64)
            product = keys.T @ keys
            for first in range(0, self.d_in, ADDED):
                sums[first : first + ADDED] += product[first : first + ADDED]
            del product
            self.moment = sums.div_(COUNTED).float()

        return work

    def solver(self) -> Callable[[], object]:
        """From the moment, which goes."""
        self.moment.diagonal().add_(torch.logspace(0, -2, self.d_in))
        return self._solver

    def _solver(self) -> None:
        moment = self.__dict__.pop("moment")
        alpha = self.config.base_method == "AlphaEdit"
        self.solves = (
            AlphaEdit(moment, self.config.nullspace_threshold, self.config.L2, 0)
            if alpha
            else Memit(moment, self.config.mom2_update_weight, 0)
        )

    def solving(self) -> Callable[[], object]:
        """The batch after one that is to be remembered."""
        keys, residuals = self._normal(self.d_in, self.facts, seed=2), self._normal(self.d_out, self.facts, seed=3)
        self.solves.remember(self.solves.with_keys(keys))
        return lambda: setattr(self, "delta", self.solves.update(keys, residuals))

    def writing(self) -> Callable[[], object]:
        """The update at a thousandth of the weight's length."""
        size = 1e-3 * float(self.weight.detach().float().norm()) / self.delta.norm()
        delta = Factors(size * self.delta.left, self.delta.right)
        bound = self.config.restraint().bind(self.weight.detach())

        def work() -> None:
            live = self.weight.detach()
            start = live.float()
            kept = restrain(bound, start, delta)
            dense = kept.delta.dense() if isinstance(kept.delta, Factors) else kept.delta
            written = rounded_sum(NAME, live, start, dense, mastered=self.mastered)
            live.copy_(written.weight)
            self.update, self.master, self.lost, self.rank = (
                kept.delta,
                written.master,
                written.rounding_loss,
                kept.rank,
            )

        return work

    def energy(self) -> Callable[[], object]:
        """Of the weight."""
        return lambda: hyperspherical_energy(self.weight.detach())

    def journal(self) -> Callable[[], object]:
        """Of the batch."""
        masters = {} if self.master is None else {NAME: self.master}
        self.journal_of.weights_after(0)  # in a run it is at hand
        return lambda: self.journal_of.append({"edits": 1}, self._weights, {NAME: self.update}, masters=masters)

    def formula(self, stage: str) -> int:
        """What the stage is to need beyond what is there before it."""
        budget, moment = self.budget, self.d_in**2
        kept = budget.followed() + (8 * budget.size if self.mastered else 0)  # the master copy before, and after
        return {
            "counting": 12 * moment + 4 * COUNTED * self.d_in,  # the keys are there, and are copied once
            "solver": budget.making_solvers() - 4 * moment,  # the moment is there
            "solving": dict(budget.phases[3].parts)["solving"][1],
            "writing": budget.writing() + kept,
            "energy": budget.energy(),
            "journal": budget.journalling(),
        }[stage]


STAGES = ("counting", "solver", "solving", "writing", "energy", "journal")


def child(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Measure in this process, and print a line of JSON for each stage."""
    for size in (WARM, shape):
        with tempfile.TemporaryDirectory() as folder:
            layer = Layer(size, arguments, Path(folder))
            for stage in STAGES:
                work = getattr(layer, stage)()
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                before, started = status("VmRSS"), time.perf_counter()
                work()
                seconds, extra = time.perf_counter() - started, status("VmHWM") - before
                row = Row(stage, seconds, extra / MIB, layer.formula(stage) / MIB)
                if size != WARM:
                    print(json.dumps(asdict(row)), flush=True)
            if size != WARM:
                told = {"rank": layer.rank, "rounding_loss": layer.lost, "most": status("VmHWM") / MIB}
                print(json.dumps(told), flush=True)


def refuse_too_large(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """End where the stages would not fit."""
    with tempfile.TemporaryDirectory() as folder:
        layer = Layer(WARM, arguments, Path(folder))
    sides = Shape(shape[0] * shape[1], 1, shape[0], 0, 0, *shape)
    budget = Budget(sides, layer.config, layer.budget.element)
    most = max(12 * shape[1] ** 2, budget.making_solvers()) + 3 * budget.size * 4
    free = free_bytes("cpu")
    if free is not None and most > free:
        raise SystemExit(f"{most / 2**30:.1f} GiB are needed and {free / 2**30:.1f} free: choose a smaller --shape")


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", default="1024x3584")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--base", choices=("MEMIT", "AlphaEdit"), default="MEMIT")
    parser.add_argument("--no-master", dest="master", action="store_false", help="no float32 master copy")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (shape,) = sizes(arguments.shape)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this system keeps no /proc/self/clear_refs: peaks cannot be measured here")
    if arguments.child:
        child(shape, arguments)
        return
    refuse_too_large(shape, arguments)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    about: dict[str, Any] = machine()
    print("{processor}, {cores} cores, {threads} threads, torch {torch}, {date}".format(**about))
    print(f"{arguments.shape}, {arguments.facts} facts, {arguments.base}, {arguments.dtype}\n{HEADER}")
    rows, told = [], {}
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            content = json.loads(line)
            if "stage" in content:
                rows.append(Row(**content))
                print(rows[-1].line(), flush=True)
            else:
                told = content
    if process.returncode:
        raise SystemExit(process.returncode)
    print(
        f"r {told['rank']}, {told['rounding_loss']:.2g} of the update lost to rounding, {told['most']:.0f} MiB at most"
    )
    if arguments.json:
        content = {**about, "shape": arguments.shape, "facts": arguments.facts, "base": arguments.base}
        content |= {"dtype": arguments.dtype, "master": arguments.master, **told, "results": [asdict(r) for r in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
