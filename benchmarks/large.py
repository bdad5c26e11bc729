"""What editing large models needs by the formulas of `sphere_plugin.editing.budget`: a table, measured nowhere.

    python benchmarks/large.py [--facts 100]

bfloat16 weights, the layers of the papers, batches of 100 facts of 40 tokens. The first line of a model is with the
defaults, the second with `stats_device: cpu` and `token_budget: 2048`, the third with `master_copy: true` besides.
"""

from __future__ import annotations

import argparse
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.editing import EditingConfig
from sphere_plugin.editing.budget import Batch, Budget, Shape
from sphere_plugin.models.memory import in_words

# parameters, layers, width, numbers of attention, words, d_out, d_in: from the models' own configs
MODELS: Final = MappingProxyType(
    {
        "LLaMA3-8B": Shape(8_030_261_248, 32, 4096, 2 * 8 * 128, 128_256, 4096, 14336),
        "Qwen2.5-7B": Shape(7_615_616_512, 28, 3584, 2 * 4 * 128, 152_064, 3584, 18944),
        "LLaMA3-70B": Shape(70_553_706_496, 80, 8192, 2 * 8 * 128, 128_256, 8192, 28672),
    }
)
SMALL: Final = MappingProxyType({"stats_device": "cpu", "token_budget": 2048})
WAYS: Final = (("defaults", {}), ("small", SMALL), ("small, master", {**SMALL, "master_copy": True}))


def line(name: str, base: str, way: str, changes: Any, facts: int) -> str:
    """One line of the table."""
    config = EditingConfig(
        layers=[4, 5, 6, 7, 8], rewrite_module_tmp="model.layers.{}.mlp.down_proj", layer_module_tmp="model.layers.{}",
        ln_f_module="model.norm", lm_head_module="lm_head", base_method=base, **changes,
    )  # fmt: skip
    budget = Budget(MODELS[name], config, 2, Batch(facts))
    there = ("statistics",) if config.stats_device is None else ()
    here = ("statistics",) if config.stats_device == "cpu" else ()
    gpu, while_gpu = budget.peak("weights", *there)
    cpu, while_cpu = budget.peak("host", *here)
    told = f"{in_words(gpu):>10}  {while_gpu.name:<24}{in_words(cpu):>10}  {while_cpu.name}"
    return f"{name:<12}{base:<11}{way:<15}{told}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{'':<38}{'GPU':>10}  {'while':<24}{'CPU':>10}  while")
    for name in MODELS:
        for base in ("MEMIT", "AlphaEdit"):
            for way, changes in WAYS:
                print(line(name, base, way, changes, arguments.facts))


if __name__ == "__main__":
    main()
