"""Whether a late batch costs what an early one does: many small batches into one model, time and memory of each.

    python benchmarks/flat.py [--batches 150] [--batch-size 2] [--json FILE]

The search for targets is cut short, so that what could grow with the number of edits is not hidden behind it: the keys
of earlier edits, the history, the principal space of weights that edits have changed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import median

from stages import machine, requests_of

import sphere_plugin as sp
from sphere_plugin.data import read_records

YAML = Path(__file__).resolve().parent.parent / "hparams/SPHERE/smollm2-135m.yaml"
EDGE = 10  # batches at either end that are compared


def measure(batches: int, size: int) -> tuple[list[float], list[float]]:
    """Seconds of each batch of ``size`` facts, and the process's peak memory after it in MiB."""
    requests = requests_of(read_records(limit=batches * size))
    config = sp.SphereHyperParams.from_hparams(YAML).editing()
    config.v_num_grad_steps = 2
    editor = sp.Editor(*sp.load_model("smollm2-135m"), config)
    editor.prepare()
    seconds, peaks = [], []
    for first in range(0, len(requests), size):
        started = time.perf_counter()
        editor.apply(requests[first : first + size])
        seconds.append(time.perf_counter() - started)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return seconds, peaks


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size, about = arguments.batch_size, machine()
    seconds, peaks = measure(arguments.batches, size)
    early, late = median(seconds[1 : EDGE + 1]), median(seconds[-EDGE:])
    about |= {"batches": len(seconds), "batch_size": size}
    result = {
        "early_seconds": early,
        "late_seconds": late,
        "time_ratio": late / early,
        "early_peak_mib": peaks[EDGE],
        "late_peak_mib": peaks[-1],
        "memory_ratio": peaks[-1] / peaks[EDGE],
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"batches 2 to {EDGE + 1}: {early:.3f} s, peak {peaks[EDGE]:.0f} MiB")
    print(f"last {EDGE} batches:  {late:.3f} s, peak {peaks[-1]:.0f} MiB")
    print(f"late / early:     {late / early:.3f} in time, {peaks[-1] / peaks[EDGE]:.3f} in memory")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, **result, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
