"""How long the principal space and the projection take, against the d_in × d_in formula of both official codes.

    python benchmarks/geometry.py [--shapes 576x1536,1024x3584] [--repeats 5] [--json FILE]

Both ways run in turn in one process; results are checked to agree; the ratio of medians is what to quote.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sphere_plugin import PrincipalSpace

ETA, ALPHA = 0.5, 0.8


def official(weight: Tensor, delta: Tensor) -> Tensor:
    """The formula as both official codes compute it: a Gram matrix and a dense projection of d_in × d_in."""
    rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows / rows.shape[0])
    rank = int((values.flip(0).cumsum(0) / values.sum() <= ETA).sum()) + 1
    basis = vectors[:, -rank:]
    return delta @ (torch.eye(weight.shape[1]) - ALPHA * basis @ basis.T)


def ours(weight: Tensor, delta: Tensor) -> Tensor:
    """The smaller side's Gram matrix, and the projection applied as factors."""
    return PrincipalSpace.fit(weight, ETA).project(delta, ALPHA)


def seconds(way: Callable[[Tensor, Tensor], Tensor], weight: Tensor, delta: Tensor) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    way(weight, delta)
    return time.perf_counter() - started


def compare(d_out: int, d_in: int, repeats: int) -> dict[str, float | str]:
    """Time both ways on a random weight with a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator) * torch.logspace(0, -1, d_in)
    delta = torch.randn(d_out, d_in, generator=generator)
    expected, got = official(weight, delta), ours(weight, delta)
    times = [(seconds(official, weight, delta), seconds(ours, weight, delta)) for _ in range(repeats)]
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "shape": f"{d_out}x{d_in}",
        "official_seconds": round(slow, 4),
        "ours_seconds": round(fast, 4),
        "ratio": round(statistics.median(a / b for a, b in times), 1),
        "difference": float((expected - got).norm() / expected.norm()),
    }


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="576x1536,1024x3584")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    results = [compare(*map(int, shape.split("x")), arguments.repeats) for shape in arguments.shapes.split(",")]
    print(f"{machine['machine']}, {machine['threads']} threads, torch {machine['torch']}")
    for row in results:
        print(
            "{shape:>12}  {official_seconds:9.3f} s  {ours_seconds:8.3f} s  {ratio:6.1f}x  {difference:.1e}".format(
                **row
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
