"""The paper's Table 1, to stand beside what was measured.

Source: "Energy-regularized sequential model editing on hyperspheres", Table 1 (ZsRE and CounterFact, sequential edits
in batches of 100; 15,000 for LLaMA3 8B, 5,000 for Qwen2.5 7B). Mean and ± as printed there, top-1 accuracy in per
cent, fluency and consistency times 100. The paper's SPHERE row is AlphaEdit + SPHERE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

SOURCE: Final = "Energy-regularized sequential model editing on hyperspheres, Table 1"
UNEDITED: Final = "unedited"
COLUMNS: Final = ("efficacy", "generalization", "specificity", "fluency", "consistency")


@dataclass(frozen=True)
class Published:
    """One block of the table.

    Attributes:
        preset: the words of the preset and of the file of data that it belongs to.
        model, data, edits: what it is of.
        rows: entry -> metric -> (mean, ±) as strings, not a digit changed.
    """

    preset: str
    model: str
    data: str
    edits: int
    rows: Mapping[str, Mapping[str, tuple[str, str]]]


def published(preset: str, data: str) -> Published | None:
    """Returns the block that belongs to a run's preset and file of data, if there is one.

    The preset "table1-llama3-8b" with "counterfact.json" names one. Case, order and punctuation do not matter.
    """
    words = _words(f"{preset} {data}")
    found = [block for block in _blocks() if _words(block.preset) <= words]
    return found[0] if len(found) == 1 else None


def _words(text: str) -> frozenset[str]:
    """The words of a name, letters and digits apart: "LLaMA3-8B" has llama, 3, 8 and b."""
    return frozenset(re.findall(r"[a-z]+|\d+", text.lower()))


def _blocks() -> tuple[Published, ...]:
    return tuple(
        Published(preset, model, data, edits, _rows(text)) for preset, model, data, edits, text in (*_LLAMA, *_QWEN)
    )


def _rows(text: str) -> Mapping[str, Mapping[str, tuple[str, str]]]:
    rows = {}
    for line in text.strip().splitlines():
        name, *cells = line.split()
        pairs = [cell.split("±") for cell in cells]
        rows[name] = {metric: (mean, half) for metric, (mean, half) in zip(COLUMNS, pairs, strict=False)}
    return MappingProxyType(rows)


_LLAMA: Final = (
    (
        "table1-llama3-8b-zsre",
        "LLaMA3 (8B)",
        "ZsRE",
        15000,
        """
        unedited          35.42±0.30 34.17±0.30 38.02±0.27
        ft                15.27±0.21 14.78±0.21 5.06±0.10
        memit             0.00±0.00 0.00±0.00 0.06±0.01
        prune             10.35±0.18 10.08±0.18 9.55±0.15
        rect              0.01±0.00 0.01±0.01 0.04±0.01
        alphaedit         86.64±0.23 81.28±0.28 28.78±0.22
        alphaedit+sphere  90.01±0.21 84.67±0.26 45.40±0.29
        """,
    ),
    (
        "table1-llama3-8b-counterfact",
        "LLaMA3 (8B)",
        "CounterFact",
        15000,
        """
        unedited          0.49±0.07 0.44±0.05 18.09±0.24 634.84±0.12 22.06±0.08
        ft                8.40±0.28 2.54±0.13 0.03±0.01 409.80±0.67 19.35±0.13
        memit             0.00±0.00 0.00±0.00 0.00±0.00 318.19±0.24 4.19±0.04
        prune             1.19±0.11 0.34±0.04 0.62±0.03 618.72±0.08 49.24±0.13
        rect              0.57±0.08 0.29±0.04 0.10±0.01 438.83±0.18 9.40±0.05
        alphaedit         4.37±0.20 1.71±0.10 0.57±0.03 482.36±0.44 4.71±0.04
        alphaedit+sphere  52.89±0.50 32.07±0.39 5.01±0.10 551.51±0.53 30.89±0.13
        """,
    ),
)
_QWEN: Final = (
    (
        "table1-qwen2.5-7b-zsre",
        "Qwen2.5 (7B)",
        "ZsRE",
        5000,
        """
        unedited          35.29±0.29 34.10±0.28 38.44±0.27
        ft                4.97±0.14 4.58±0.13 4.01±0.11
        memit             0.13±0.02 0.12±0.01 0.04±0.01
        prune             47.93±0.36 45.50±0.35 39.20±0.28
        rect              0.73±0.04 0.75±0.04 0.05±0.07
        alphaedit         42.01±0.40 39.99±0.39 13.87±0.20
        alphaedit+sphere  70.04±0.36 65.43±0.37 27.35±0.26
        """,
    ),
    (
        "table1-qwen2.5-7b-counterfact",
        "Qwen2.5 (7B)",
        "CounterFact",
        5000,
        """
        unedited          0.42±0.06 0.46±0.05 15.06±0.20 624.45±0.11 23.02±0.69
        ft                15.44±0.36 4.63±0.17 1.46±0.05 214.26±0.09 3.15±0.02
        memit             0.00±0.00 0.00±0.00 0.00±0.00 370.84±0.30 3.59±0.03
        prune             14.30±0.35 11.27±0.26 6.75±0.12 620.74±0.10 29.50±0.08
        rect              0.64±0.08 0.19±0.03 0.09±0.01 368.46±0.27 1.35±0.01
        alphaedit         43.92±0.50 24.37±0.36 2.32±0.06 479.83±0.77 4.67±0.07
        alphaedit+sphere  60.76±0.49 29.24±0.37 3.83±0.08 612.67±0.22 14.74±0.07
        """,
    ),
)
