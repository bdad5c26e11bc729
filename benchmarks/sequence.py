"""A run of a thousand edits: is its memory constant, and what does following the energy cost.

    OMP_NUM_THREADS=1 python benchmarks/sequence.py --data counterfact-edit.json [--edits 1000] [--batch-size 50]
        [--entry memit+sphere] [--steps 10] [--json FILE]

runs `sphere run` in this process, scoring at most a tenth of the edits at the first tenth and at the end. Memory is
what the process holds (`VmRSS`) after each batch and the scoring behind it, once the C library has given back what is
free: else it is what the longest batch so far has left behind. "At most" is `VmHWM`. The cost of the monitor is the
CPU time of one look at all edited weights (energies for s = 0, 1, 2, largest singular value), median of 9, against the
median CPU time of a batch. Fewer `--steps` of aiming cost less and change nothing about memory. Linux, glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from stages import machine

from sphere_plugin.journaling import run_lock
from sphere_plugin.sequence.runner import Run
from sphere_plugin.sequence.settings import RunSettings

YAML = Path(__file__).parents[1] / "hparams" / "SPHERE" / "smollm2-135m.yaml"
LOOKS = 9
MIB = 1024  # /proc counts in KiB


class Watched:
    """What a run tells of its progress, with the time and memory at that moment."""

    def __init__(self) -> None:
        self.edits, self.seconds, self.clock = [0], [time.process_time()], [time.perf_counter()]
        self.held, self.most = [status("VmRSS")], [status("VmHWM")]

    def __call__(self, what: str, done: int, total: int) -> None:
        """Note the end of a batch, and of scoring behind it."""
        if what != "edits" and not what.startswith("scoring"):
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        if what == "edits" and done:
            self.edits.append(self.edits[-1] + done)
            self.seconds.append(time.process_time())
            self.clock.append(time.perf_counter())
            self.held.append(status("VmRSS"))
            self.most.append(status("VmHWM"))
        elif what.startswith("scoring"):
            self.held[-1], self.most[-1] = status("VmRSS"), status("VmHWM")

    def at(self, edits: int) -> tuple[float, float]:
        """MiB held after so many edits, and the most so far."""
        place = self.edits.index(edits)
        return self.held[place], self.most[place]


def status(name: str) -> float:
    """MiB of this process, by the name that the system has for them."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit(f"no {name} in /proc/self/status: this benchmark runs on Linux only")
    return int(found[1]) / MIB


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it and return every number."""
    early = arguments.edits // 10
    settings = RunSettings.from_mapping(
        {
            "entries": arguments.entry,
            "hparams": YAML,
            "data": arguments.data,
            "edits": arguments.edits,
            "batch_size": arguments.batch_size,
            "checkpoints": [early],
            "sample": early,
            "settings": {"all": {"mom2_update_weight": 200, "v_num_grad_steps": arguments.steps}},
        }
    )
    watched = Watched()
    with run_lock(folder):
        run = Run(settings, folder, watched)
        run.begin()
        run.go()
        looks = [_timed(run) for _ in range(LOOKS)]
    # The first batch counts statistics, those at checkpoints score.
    spent = [after - before for before, after in zip(watched.seconds, watched.seconds[1:], strict=False)]
    batch = median(spent)
    (held, most), (held_end, most_end) = watched.at(early), watched.at(arguments.edits)
    return {
        "machine": machine(),
        "entry": arguments.entry,
        "edits": arguments.edits,
        "batch_size": arguments.batch_size,
        "after": {
            str(early): {"held": held, "most": most},
            str(arguments.edits): {"held": held_end, "most": most_end},
        },
        "batches": [
            {"edits": n, "held": h, "most": m}
            for n, h, m in zip(watched.edits, watched.held, watched.most, strict=True)
        ],
        "held_ratio": held_end / held,
        "most_ratio": most_end / most,
        "monitor_seconds": median(looks),
        "batch_seconds": batch,
        "monitor_share": median(looks) / batch,
    }


def _timed(run: Run) -> float:
    started = time.process_time()
    run.monitor.batch(run.weights)
    return time.process_time() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--entry", default="memit+sphere")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    for edits, memory in found["after"].items():
        print(f"after {edits:>5} edits: {memory['held']:8.0f} MiB held, {memory['most']:8.0f} MiB at most so far")
    print(f"ratio: {found['held_ratio']:.4f} held, {found['most_ratio']:.4f} at most")
    seconds = f"{found['monitor_seconds']:.2f} s of {found['batch_seconds']:.1f} s of CPU time"
    print(f"monitor: {seconds} a batch of {found['batch_size']}, {found['monitor_share']:.2%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
