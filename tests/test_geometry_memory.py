"""What is never built: d_in x d_in for the space, N x N x d and (in chunks) N x N for the energy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_plugin.geometry import PrincipalSpace, bound_constant, delta_he, hyperspherical_energy


class Largest(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_nothing_of_size_d_in_squared_exists():
    d_out, d_in = 64, 60_000
    weight = normal(d_out, d_in)
    with Largest() as largest:
        space = PrincipalSpace.fit(weight)
        space.project(weight)
        space.removed_share(weight)
    assert d_out * space.rank < largest.numel <= d_out * d_in
    assert largest.numel < d_in**2 / 900


@pytest.mark.parametrize(
    "function", [hyperspherical_energy, bound_constant, lambda w, chunk: delta_he(w, 2 * w, chunk)]
)
def test_pair_sums_hold_one_block_at_a_time(function):
    count, length, chunk = 500, 20, 25
    with Largest() as largest:
        function(normal(count, length), chunk=chunk)
    assert count * length <= largest.numel <= chunk * count


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are measured on Linux only")
def test_a_fit_and_a_projection_need_little_beside_their_inputs():
    """3 d_out² numbers, as LAPACK needs, and something for what libraries keep; without economy it is 6 d_out²."""
    side = 800
    script = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, script, "--child", "cold", "--shapes", f"{side}x{2 * side}"],
        env=others | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["extra"] < 1.4 * 4 * 3 * side**2
