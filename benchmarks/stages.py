"""What a batch of edits costs, stage by stage: ours, EasyEdit's formulas, and the arithmetic alone.

    python benchmarks/stages.py [--shapes 576x1536,1024x3584] [--facts 20] [--repeats 5] [--json FILE]
    python benchmarks/stages.py --shapes 4096x14336 --facts 100 --repeats 3 --extrapolate --json stages.json

The second is the size of LLaMA3-8B's down_proj. With --extrapolate, EasyEdit's formulas run at a half and at a quarter
of each side, and their time at the full size follows from the exponent between the two; the table says so.

Stages, for a weight W [d_out, d_in] and a batch of facts:

    projection cold        the principal space of W, the update projected and written out as a matrix
    projection warm        the same for a weight that is followed from edit to edit (`geometry.tracked`), as the editor
                           does from 768 neurons on; each update is a hundredth as long as the weight
    closed form MEMIT      one batch, λC known
    closed form AlphaEdit  one batch, the null space known; the batch before is added to the keys of earlier edits

The limit of a stage is the number of operations that any method needs, over the operations per second of a plain torch
matrix product of the stage's dtype and size in the same run. Every result is checked before anything is timed. Times
are medians in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from sphere_plugin.data import Record
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.geometry.tracked import TrackedSpace

ETA, ALPHA = 0.5, 0.8
LAMBDA, RIDGE = 15000.0, 10.0
SIZE = 0.01  # of an update, relative to the weight
NULL_SHARE = 0.8  # of all directions, AlphaEdit's null space
AGREE = 1e-3  # relative difference to EasyEdit's result, which is float32 in part


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds."""

    stage: str
    shape: str
    facts: int
    easyedit: float
    extrapolated: bool
    ours: float
    limit: float
    difference: float

    def line(self) -> str:
        """The line as printed."""
        about = "~" if self.extrapolated else " "
        return (
            f"{self.stage:<22}{self.shape:>11}{self.facts:>6} {about}{self.easyedit:9.4f} s {self.ours:9.4f} s"
            f"  {about}{self.easyedit / self.ours:7.1f}x {self.limit:9.4f} s {self.ours / self.limit:6.1f}"
            f"   {self.difference:.0e}"
        )


HEADER = (
    f"{'stage':<22}{'shape':>11}{'facts':>6}  {'EasyEdit':>11} {'ours':>11}  {'ratio':>8} {'limit':>11}"
    f" {'ours/limit':>6}  difference"
)


# ---- EasyEdit's formulas ----


def easyedit_projection(weight: Tensor, delta: Tensor) -> Tensor:
    """sparse_projection of its SPHERE: a Gram matrix and a dense projection of d_in × d_in."""
    rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows / rows.shape[0])
    rank = int((values.flip(0).cumsum(0) / values.sum() <= ETA).sum()) + 1
    basis = vectors[:, -rank:]
    return delta @ (torch.eye(weight.shape[1]) - ALPHA * (basis @ basis.T)).T


def easyedit_memit(moment: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """Its MEMIT: a dense float64 system of d_in × d_in for every batch."""
    keys, residuals = keys.double(), residuals.double()
    return residuals @ torch.linalg.solve(LAMBDA * moment.double() + keys @ keys.T, keys).T


def easyedit_alphaedit(null: Tensor, cache: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """Its AlphaEdit and SPHERE: a dense system of d_in × d_in with d_out right-hand sides; ``null`` is P."""
    system = null @ (keys @ keys.T + cache) + RIDGE * torch.eye(len(null), dtype=null.dtype)
    return torch.linalg.solve(system, null @ keys @ residuals.T).T


# ---- what is measured ----


@dataclass(frozen=True)
class Case:
    """The inputs of all stages at one shape."""

    weight: Tensor  # [d_out, d_in], with a decaying spectrum
    keys: Tensor  # [d_in, facts]
    earlier: Tensor  # [d_in, facts], the batch before
    residuals: Tensor  # [d_out, facts]

    @classmethod
    def of(cls, d_out: int, d_in: int, facts: int) -> Case:
        """Random ones, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(d_out, d_in, generator=generator) * torch.logspace(0, -1, d_in)
        keys, earlier = (torch.randn(d_in, facts, generator=generator) for _ in range(2))
        return cls(weight, keys, earlier, torch.randn(d_out, facts, generator=generator))

    def delta(self, seed: int = 0) -> Factors:
        """An update of SIZE times the weight's length."""
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(x.shape, generator=generator) for x in (self.residuals, self.keys))
        return Factors(left * (SIZE * float(self.weight.norm()) / Factors(left, right).norm()), right)

    def moment(self) -> Tensor:
        """A second moment of keys, [d_in, d_in], with a condition number of about 10⁴."""
        d_in = len(self.keys)
        rows = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1.5, d_in)
        return rows.T @ rows / len(rows)

    def null(self) -> Tensor:
        """An orthonormal basis Q of a null space, [d_in, null] float64."""
        d_in = len(self.keys)
        generator = torch.Generator().manual_seed(2)
        return torch.linalg.qr(torch.randn(d_in, int(NULL_SHARE * d_in), generator=generator).double()).Q


def alphaedit_of(null: Tensor) -> AlphaEdit:
    """The solver with a null space that is given: finding it is done once for a model, and no part of a batch."""
    solver: AlphaEdit = object.__new__(AlphaEdit)
    solver.ridge, solver.layer, solver.threshold, solver.null = RIDGE, 0, 0.0, null
    solver.remember(solver.with_keys(None))
    return solver


def median(way: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        way()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Operations per second of a plain product [rows, inner] × [inner, columns]."""
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    a @ b
    return 2.0 * rows * inner * columns / median(lambda: a @ b, 3)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference; refuses one above AGREE."""
    relative = float((found - expected).norm() / expected.norm())
    if not relative <= AGREE:
        raise SystemExit(f"results differ by {relative:.1e}: nothing to compare")
    return relative


def opponents(case: Case, repeats: int) -> dict[str, float]:
    """Seconds of EasyEdit's formulas; their results are checked against ours."""
    delta, moment, null = case.delta(), case.moment(), case.null()
    dense, projector = delta.dense(), (null @ null.T).float()
    cache = case.earlier @ case.earlier.T
    solver = alphaedit_of(null)
    solver.remember(solver.with_keys(case.earlier))
    difference(cold(case.weight, delta), easyedit_projection(case.weight, dense))
    found = Memit(moment, LAMBDA, 0).update(case.keys, case.residuals).dense()
    difference(found, easyedit_memit(moment, case.keys, case.residuals))
    found = solver.update(case.keys, case.residuals).dense()
    difference(found, easyedit_alphaedit(projector, cache, case.keys, case.residuals))
    projection = median(lambda: easyedit_projection(case.weight, dense), repeats)
    return {
        "projection cold": projection,
        "projection warm": projection,
        "closed form MEMIT": median(lambda: easyedit_memit(moment, case.keys, case.residuals), repeats),
        "closed form AlphaEdit": median(
            lambda: (
                easyedit_alphaedit(projector, cache, case.keys, case.residuals),
                cache + case.keys @ case.keys.T,
            ),
            repeats,
        ),
    }


def extrapolated(d_out: int, d_in: int, facts: int, repeats: int) -> dict[str, float]:
    """Seconds of EasyEdit's formulas at a shape, from those at a half and a quarter of its sides."""
    half, quarter = (opponents(Case.of(d_out // part, d_in // part, facts), repeats) for part in (2, 4))
    for stage in half:
        exponent = math.log2(half[stage] / quarter[stage])
        print(f"  {stage}: {quarter[stage]:.3f} s at a quarter, {half[stage]:.3f} s at a half: side^{exponent:.2f}")
    return {stage: half[stage] ** 2 / quarter[stage] for stage in half}


# ---- ours ----


def cold(weight: Tensor, delta: Factors) -> Tensor:
    """The space of a weight nothing is known of, and the projected update."""
    return PrincipalSpace.fit(weight, ETA).project(delta, ALPHA).dense()


def projection_cold(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds, and the relative difference to the projection of the matrix with U itself."""
    delta, basis = case.delta(), PrincipalSpace.fit(case.weight, ETA).basis
    expected = delta.dense() - ALPHA * (delta.dense() @ basis) @ basis.T
    checked = difference(cold(case.weight, delta), expected)
    return median(lambda: cold(case.weight, delta), repeats), checked


def projection_warm(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of a batch in a row of them, and the relative difference to a cold fit at the last."""
    space, weight, times = TrackedSpace(ETA), case.weight, []
    for batch in range(repeats + 2):
        delta = case.delta(seed=batch)
        started = time.perf_counter()
        written = space.project(weight, delta, ALPHA)[0].dense()
        times.append(time.perf_counter() - started)
        if batch == 1:
            checked = difference(written, cold(weight, delta))
        weight = weight + written
    return statistics.median(times[2:]), checked


def memit(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of a batch, and the relative residual of its system."""
    moment = case.moment()
    solver = Memit(moment, LAMBDA, 0)
    x, k = solver.update(case.keys, case.residuals).right.double(), case.keys.double()
    checked = difference(LAMBDA * (moment.double() @ x) + k @ (k.T @ x), k)
    return median(lambda: solver.update(case.keys, case.residuals), repeats), checked


def alphaedit(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of a batch in a row of them, and the relative residual of the system of the first."""
    solver = alphaedit_of(case.null())

    def batch() -> Factors:
        solver.remember(solver.with_keys(case.earlier))
        return solver.update(case.keys, case.residuals)

    x = solver.null.T @ batch().right.double()
    k, past = (solver.null.T @ keys.double() for keys in (case.keys, case.earlier))
    checked = difference(past @ (past.T @ x) + k @ (k.T @ x) + RIDGE * x, k)
    return median(batch, repeats), checked


def limits(case: Case) -> dict[str, float]:
    """Seconds of the operations that any method needs, at the speed of a plain product.

    projection cold: half of the Gram matrix, its reduction to tridiagonal form, r eigenvectors back, the update.
    projection warm: one product of the Gram matrix with r eigenvectors, the update.
    MEMIT: two triangular solves. AlphaEdit: the keys into the null space and back, two triangular solves, and a change
    of rank u in the factor. The update: W B and Wᵀ c for the projection, A Bᵀ written out.
    """
    (n, d), u = case.weight.shape, case.keys.shape[1]
    r, null = PrincipalSpace.fit(case.weight, ETA).rank, int(NULL_SHARE * d)
    single, double = rate(n, d, n, torch.float32), rate(d, d, u, torch.float64)
    update = 4 * n * d * u + 2 * n * d * u
    return {
        "projection cold": (n * n * d + 4 * n**3 / 3 + 2 * n * n * r + update) / single,
        "projection warm": (2 * n * n * r + update) / single,
        "closed form MEMIT": 2 * d * d * u / double,
        "closed form AlphaEdit": (4 * d * null * u + 2 * null * null * u + 2 * null * null * u) / double,
    }


STAGES: dict[str, Callable[[Case, int], tuple[float, float]]] = {
    "projection cold": projection_cold,
    "projection warm": projection_warm,
    "closed form MEMIT": memit,
    "closed form AlphaEdit": alphaedit,
}


def compare(d_out: int, d_in: int, facts: int, repeats: int, extrapolate: bool) -> Iterator[Row]:
    """All stages at one shape."""
    case = Case.of(d_out, d_in, facts)
    theirs = extrapolated(d_out, d_in, facts, repeats) if extrapolate else opponents(case, repeats)
    least = limits(case)
    for stage, way in STAGES.items():
        seconds, checked = way(case, repeats)
        yield Row(stage, f"{d_out}x{d_in}", facts, theirs[stage], extrapolate, seconds, least[stage], checked)


def machine() -> dict[str, object]:
    """Where and when this ran."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def requests_of(records: Sequence[Record]) -> list[dict[str, str]]:
    """What an editor is asked, ours or EasyEdit's."""
    return [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in records]


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="576x1536,1024x3584")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--extrapolate", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = machine()
    print("{processor}, {cores} cores, {threads} threads, load {load:.1f}, torch {torch}, {date}".format(**about))
    print(HEADER)
    rows: list[Row] = []
    for shape in arguments.shapes.split(","):
        d_out, d_in = map(int, shape.split("x"))
        for row in compare(d_out, d_in, arguments.facts, arguments.repeats, arguments.extrapolate):
            print(row.line(), flush=True)
            rows.append(row)
    if arguments.extrapolate:
        print("~: EasyEdit's formulas were not run at this size, but at a half and a quarter of it")
    if arguments.json:
        content = {**about, "extrapolated": arguments.extrapolate, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
