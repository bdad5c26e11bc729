"""What the projection needs beside its inputs at its peak: ours, and EasyEdit's formula.

    python benchmarks/memory.py [--shapes 576x1536,1024x3584,2048x7168] [--largest 4096x14336] [--json FILE]

Each number is of a process of its own: libraries are warmed up on a small weight, inputs are made, the kernel's record
of the peak is set back (`/proc/self/clear_refs`), the projection runs, and the record is read (`VmHWM`). This sees
LAPACK's workspaces, which torch's own count of tensors does not. `getrusage` would not do: its peak cannot be set
back, and begins with what the parent held when it forked. glibc keeps what is freed for later use, as much as it sees
fit; so that this counts for neither side, every tensor has pages of its own here (MALLOC_MMAP_THRESHOLD_).
--allocator glibc measures with what the environment says instead.

EasyEdit's formula is not run at the largest shape, but extrapolated by the exponent in d_in between the last two
others; ours is. "Counted" is the sum of the matrices that have to be there at once: of EasyEdit's formula Ŵ, its
covariance, the eigenvectors and LAPACK's workspace of two such matrices, 4 (d_out d_in + 4 d_in²) bytes; of ours
4 max(d_out d_in + d_out², 3 d_out²).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from stages import ALPHA, ETA, Case, cold, easyedit_projection, machine
from torch import Tensor

from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.geometry.tracked import TrackedSpace

FACTS = 20
WARM = (64, 96)  # rows and columns of the weight that libraries are warmed up on
MIB = 2**20
THEIRS, OURS = "easyedit", "cold"
AIM = 0.15  # of EasyEdit's


def matrix(weight: Tensor, delta: Tensor) -> Tensor:
    """A matrix projected, as the post-hook has it; U is formed."""
    return PrincipalSpace.fit(weight, ETA).project(delta, ALPHA)


def followed(weight: Tensor, delta: Factors) -> Tensor:
    """The first batch of a weight that is followed; no other needs more."""
    return TrackedSpace(ETA).project(weight, delta, ALPHA)[0].dense()


# Whether the update is a matrix, and what is done.
WAYS: MappingProxyType[str, tuple[bool, Callable[..., Tensor]]] = MappingProxyType(
    {THEIRS: (True, easyedit_projection), OURS: (False, cold), "followed": (False, followed), "matrix": (True, matrix)}
)
NAMES = MappingProxyType(
    {
        THEIRS: "EasyEdit's formula",
        OURS: "ours, update in factors",
        "followed": "ours, followed, first batch",
        "matrix": "ours, update a matrix",
    }
)


@dataclass(frozen=True)
class Row:
    """One line of the table; memory in MiB."""

    way: str
    shape: str
    extra: float
    counted: float | None
    seconds: float | None
    ratio: float
    extrapolated: bool = False

    def line(self) -> str:
        """The line as printed."""
        about = "~" if self.extrapolated else " "
        counted = f"{self.counted:9.1f}" if self.counted is not None else f"{'':>9}"
        took = f"{self.seconds:8.2f} s" if self.seconds is not None else f"{'':>10}"
        return f"{NAMES[self.way]:<30}{self.shape:>11} {about}{self.extra:9.1f} {counted} {took} {self.ratio:8.1%}"


HEADER = f"{'way':<30}{'shape':>11}  {'MiB extra':>9} {'counted':>9} {'time':>10} {'ratio':>8}"


def status(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def child(way: str, shape: tuple[int, int]) -> None:
    """Measure in this process, and print bytes and seconds as JSON."""
    dense, work = WAYS[way]
    for size in (WARM, shape):
        case = Case.of(*size, FACTS)
        weight, delta = case.weight, case.delta()
        update = delta.dense() if dense else delta
        del case, delta
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, started = status("VmRSS"), time.perf_counter()
        work(weight, update)
        seconds, peak = time.perf_counter() - started, status("VmHWM")
    print(json.dumps({"extra": peak - before, "seconds": seconds}))


def measured(way: str, shape: tuple[int, int], allocator: str) -> tuple[float, float]:
    """MiB and seconds, of a process of its own."""
    environment = dict(os.environ)
    if allocator == "pages":
        environment = {name: value for name, value in environment.items() if not name.startswith("MALLOC_")}
        environment["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    command = [sys.executable, __file__, "--child", way, "--shapes", "x".join(map(str, shape))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout)
    return answer["extra"] / MIB, answer["seconds"]


def counted(way: str, d_out: int, d_in: int) -> float | None:
    """MiB of the matrices that have to be there at once; None for ways that are not counted."""
    n, d = sorted((d_out, d_in))
    numbers = {THEIRS: n * d + 4 * d_in**2, OURS: max(n * d + n * n, 3 * n * n)}
    return 4 * numbers[way] / MIB if way in numbers else None


def compare(shape: tuple[int, int], allocator: str, theirs: float | None = None) -> list[Row]:
    """All ways at one shape; EasyEdit's formula is not run where its MiB are given as ``theirs``."""
    name, rows = "x".join(map(str, shape)), []
    for way in WAYS:
        if way == THEIRS and theirs is not None:
            row = Row(way, name, theirs, counted(way, *shape), None, 1.0, extrapolated=True)
        else:
            extra, seconds = measured(way, shape, allocator)
            theirs = extra if theirs is None else theirs  # the first way is theirs
            row = Row(way, name, extra, counted(way, *shape), seconds, extra / theirs)
        print(row.line(), flush=True)
        rows.append(row)
    return rows


def extrapolated(rows: list[Row], shape: tuple[int, int]) -> tuple[float, float]:
    """EasyEdit's MiB at a shape, and the exponent in d_in, from the last two shapes it was run at."""
    (small, first), (large, second) = [(int(r.shape.split("x")[1]), r.extra) for r in rows if r.way == THEIRS][-2:]
    exponent = math.log(second / first) / math.log(large / small)
    return second * (shape[1] / large) ** exponent, exponent


def sizes(text: str) -> list[tuple[int, int]]:
    """Shapes as they are given, 576x1536,1024x3584."""
    return [(int(d_out), int(d_in)) for d_out, d_in in (shape.split("x") for shape in text.split(",") if shape)]


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="576x1536,1024x3584,2048x7168")
    parser.add_argument("--largest", default="4096x14336", help="nothing: --largest ''")
    parser.add_argument("--allocator", choices=("pages", "glibc"), default="pages")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = sizes(arguments.shapes)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this system keeps no /proc/self/clear_refs: peaks cannot be measured here")
    if arguments.child:
        child(arguments.child, shapes[0])
        return
    about, rows = machine(), []
    print("{processor}, {cores} cores, {threads} threads, torch {torch}, {date}".format(**about))
    print(HEADER)
    for shape in shapes:
        rows += compare(shape, arguments.allocator)
    for shape in sizes(arguments.largest) if len(shapes) > 1 else []:
        theirs, exponent = extrapolated(rows, shape)
        rows += compare(shape, arguments.allocator, theirs)
        print(f"~: not run, but extrapolated from the two shapes before: d_in^{exponent:.2f}")
    worst = {way: max(row.ratio for row in rows if row.way == way) for way in WAYS if way != THEIRS}
    told = "; ".join(f"{NAMES[way]} {ratio:.1%}" for way, ratio in worst.items())
    print(f"at most {AIM:.0%} of EasyEdit's was aimed for; the worst are: {told}")
    if arguments.json:
        content = {**about, "allocator": arguments.allocator, "facts": FACTS, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
