"""Is there a quicker way to the principal space than the exact eigen-decomposition?

    OMP_NUM_THREADS=1 python benchmarks/eigen.py [--shapes 1024x3584,2048x7168] [--no-model] [--json FILE]

Weights: normal random ones, whose spectrum is flat; SmolLM2's own, a few layers; and at each shape one with SmolLM2's
singular values, stretched over its rows. Of each the leading eigenvectors of Ŵ Ŵᵀ are found that cover η = 0.5 of the
trace, and an update of 20 facts is projected with them at α = 0.8.

    exact            the whole decomposition (LAPACK's syevd), as `PrincipalSpace.fit` has it
    exact, top       scipy.linalg.eigh for the largest ones only (syevr)
    filtered         subspace iteration from random vectors through the Chebyshev filter of `geometry.tracked`
    svd_lowrank      torch.svd_lowrank of Ŵ, 6 iterations
    lobpcg           torch.lobpcg, 40 iterations
    Lanczos          scipy.sparse.linalg.eigsh

All but the first are told r, which they would have to find out, and "filtered" the size of its block; it stops at the
first sweep whose result is good enough, which is not known without the exact one either. What is printed is thus the
least that each can take. The error is ‖ΔW' − ΔW'₆₄‖ / ‖ΔW'₆₄‖, the largest of two updates, against the decomposition
in float64: one of random rows, one of rows in the row space of W. Acceptable is 10⁻⁴.

Times are CPU time of this process, best of three up to 1024 rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy.linalg
import scipy.sparse.linalg
import torch
from stages import ALPHA, ETA, machine
from torch import Tensor

from sphere_plugin.geometry.principal import gram, principal_rank, row_norms, spectrum
from sphere_plugin.geometry.tracked import filtered
from sphere_plugin.models.stored import stored_weight

GOOD = 1e-4  # of the norm of the projected update
FACTS = 20
LAYERS = (6, 14, 25)
BLOCK = 1.5  # vectors of the block, in r
DEGREES = (4, 8)  # of the filter
SWEEPS = 6
REPEATS = 3
SMALL = 1024  # rows up to which a time is the best of several, and slow ways are tried

Pairs = tuple[Tensor, Tensor]  # Θ [r], L [n, r]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    weight: str
    shape: str
    rank: int
    way: str
    seconds: float
    error: float

    def line(self) -> str:
        """The line as printed."""
        verdict = "" if self.error <= GOOD else "  not good enough"
        start = f"{self.weight:<20}{self.shape:>11}{self.rank:>6}"
        return f"{start}  {self.way:<24}{self.seconds:8.3f} s  {self.error:.0e}{verdict}"


@dataclass(frozen=True)
class Case:
    """A weight, and what its space does to two updates, in float64."""

    rows: Tensor  # Ŵ [n, d]
    product: Tensor  # Ŵ Ŵᵀ
    rank: int
    updates: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> Case:
        """Of W [n, d]."""
        generator = torch.Generator().manual_seed(0)
        rows = weight.float() / row_norms(weight.float())
        n, d = rows.shape
        left = torch.randn(n, FACTS, generator=generator)
        inside = torch.randn(FACTS, n, generator=generator) @ rows
        updates = left @ torch.randn(FACTS, d, generator=generator), left @ inside
        values, vectors = spectrum(gram(rows.double()), 1)
        rank = principal_rank(values, ETA)
        pairs = values[:rank], vectors[:, :rank]
        first, second = (projected(rows.double(), pairs, update.double()) for update in updates)
        return cls(rows, gram(rows), rank, updates, (first, second))

    def error(self, pairs: Pairs) -> float:
        """The larger of the two errors."""
        found = [projected(self.rows, pairs, update).double() for update in self.updates]
        return max(float((one - right).norm() / right.norm()) for one, right in zip(found, self.right, strict=True))


def projected(rows: Tensor, pairs: Pairs, update: Tensor) -> Tensor:
    """ΔW − α (ΔW U) Uᵀ, U = Ŵᵀ L Θ^-½."""
    basis = rows.T @ (pairs[1] / pairs[0].sqrt())
    return update - ALPHA * (update @ basis) @ basis.T


def exact(case: Case) -> Pairs:
    """All of them."""
    values, vectors = spectrum(case.product.clone(), 1)
    return values[: case.rank].float(), vectors[:, : case.rank]


def top(case: Case) -> Pairs:
    """The r largest."""
    n = len(case.product)
    values, vectors = scipy.linalg.eigh(case.product.numpy(), subset_by_index=[n - case.rank, n - 1], driver="evr")
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def svd_lowrank(case: Case) -> Pairs:
    """A randomized singular value decomposition of Ŵ."""
    left, values, _ = torch.svd_lowrank(case.rows, q=int(1.2 * case.rank), niter=6)
    return values[: case.rank].square(), left[:, : case.rank]


def lobpcg(case: Case) -> Pairs:
    """Locally optimal block conjugate gradients."""
    return torch.lobpcg(case.product, k=case.rank, niter=40, largest=True)


def lanczos(case: Case) -> Pairs:
    """Implicitly restarted Lanczos."""
    values, vectors = scipy.sparse.linalg.eigsh(case.product.numpy(), k=case.rank, which="LA")
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def subspace(case: Case, degree: int) -> Iterator[tuple[float, Pairs]]:
    """After each sweep, the seconds spent in sweeps and the pairs."""
    product, seconds = case.product, 0.0
    size = min(len(product), int(BLOCK * case.rank) + 8)
    block, bound = torch.randn(len(product), size, generator=torch.Generator().manual_seed(0)), None
    for _ in range(SWEEPS):
        started = time.process_time()
        block = product @ block if bound is None else filtered(product, block, bound, degree)
        block = torch.linalg.qr(block).Q
        values, turn = torch.linalg.eigh(block.T @ (product @ block))
        block, bound = block @ turn.flip(1), float(values[0])
        seconds += time.process_time() - started
        yield seconds, (values.flip(0)[: case.rank], block[:, : case.rank])


WAYS: tuple[tuple[str, Callable[[Case], Pairs], bool], ...] = (  # name, what it does, whether it is quick
    ("exact", exact, True),
    ("exact, top", top, True),
    ("svd_lowrank", svd_lowrank, True),
    ("Lanczos", lanczos, False),
    ("lobpcg", lobpcg, False),
)


def compare(name: str, weight: Tensor) -> list[Row]:
    """All ways on one weight."""
    case, rows = Case.of(weight), []
    small = len(weight) <= SMALL

    def add(way: str, seconds: float, pairs: Pairs) -> None:
        shape = "x".join(map(str, weight.shape))
        rows.append(Row(name, shape, case.rank, way, seconds, case.error(pairs)))
        print(rows[-1].line(), flush=True)

    for way, work, quick in WAYS:
        # lobpcg wants 3 r < n.
        if not (quick or small) or (work is lobpcg and 3 * case.rank >= len(weight)):
            continue
        seconds = []
        for _ in range(REPEATS if small and quick else 1):
            started = time.process_time()
            pairs = work(case)
            seconds.append(time.process_time() - started)
        add(way, min(seconds), pairs)
    for degree in DEGREES:
        for sweeps, (taken, pairs) in enumerate(subspace(case, degree), 1):
            if case.error(pairs) <= GOOD or sweeps == SWEEPS:
                add(f"filtered, degree {degree}, {sweeps}×", taken, pairs)
                break
    return rows


def stretched(values: Tensor, n: int, d: int) -> Tensor:
    """A weight [n, d] with these singular values, as many of them as it needs in between."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.nn.functional.interpolate(values[None, None], size=n, mode="linear", align_corners=True)[0, 0]
    left, right = (torch.linalg.qr(torch.randn(side, n, generator=generator)).Q for side in (n, d))
    return (left * sizes) @ right.T


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="1024x3584,2048x7168")
    parser.add_argument("--no-model", action="store_true", help="random weights only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in arguments.shapes.split(",") if shape]
    rows: list[Row] = []
    real: list[Tensor] = []
    for layer in () if arguments.no_model else LAYERS:
        weight = stored_weight("smollm2-135m", f"model.layers.{layer}.mlp.down_proj.weight")
        if weight is None:
            raise SystemExit("the embedded model is not here: --no-model")
        real.append(weight.float())
        rows += compare(f"SmolLM2, layer {layer}", real[-1])
    for n, d in shapes:
        rows += compare("random", torch.randn(n, d, generator=torch.Generator().manual_seed(0)))
        if real:
            rows += compare("SmolLM2's values", stretched(torch.linalg.svdvals(real[1]), n, d))
    if arguments.json:
        content = {**machine(), "eta": ETA, "alpha": ALPHA, "good": GOOD, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
