"""What each of EasyEdit's methods changes, and so what a restraint can do for it. docs/methods.md has it as a table.

A method that is not in this table is new to this version: it is refused where a restraint is asked for, rather than
restrained by guesswork, and a test compares the table with the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

# weights: writes weights of the model. base: leaves that to another method. adapter: trains a LoRA.
# nothing: has no weight update. own: one of ours, which restrains its updates itself.
Writes = Literal["weights", "base", "adapter", "nothing", "own"]
# The hyper-parameter that names the weights; "ffn": all output projections of feed-forward layers.
Names = Literal["rewrite_module_tmp", "rewrite_module_tmps", "inner_params", "ffn"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        writes: see `Writes`.
        names: see `Names`; None unless it writes weights.
        why_not: for "nothing", the clause that says what it does instead.
        reads_right: it looks at token positions counted from the left, so it needs padding on the right.
        undo: "dict" or "call": what EasyEdit expects it to return for taking an edit back.
    """

    writes: Writes
    names: Names | None = None
    why_not: str = ""
    reads_right: bool = False
    undo: Literal["dict", "call"] = "dict"


_LOCATED: Final = Method("weights", "rewrite_module_tmp", reads_right=True)
_LORA: Final = Method("adapter")
_OWN: Final = Method("own", reads_right=True)


def _nothing(why: str) -> Method:
    return Method("nothing", why_not=why)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "ROME": _LOCATED,
        "R-ROME": _LOCATED,
        "MEMIT": _LOCATED,
        "MEMIT-FE": _LOCATED,
        "PMET": Method("weights", "rewrite_module_tmps", reads_right=True),
        "CORE": _LOCATED,
        "EAMET": _LOCATED,
        "EMMET": _LOCATED,
        "AlphaEdit": _LOCATED,
        "FT": Method("weights", "rewrite_module_tmp"),
        "DINM": Method("weights", "rewrite_module_tmp"),
        "KN": Method("weights", "ffn", undo="call"),
        "MEND": Method("weights", "inner_params"),
        "ULTRAEDIT": Method("weights", "inner_params"),
        "SimIE": Method("base"),
        "LoRA": _LORA,
        "QLoRA": _LORA,
        "DPO": _LORA,
        "GRACE": _nothing("it keeps edits in a codebook beside the model"),
        "WISE": _nothing("it keeps edits in a side memory, and the main weights stay as they are"),
        "DEFER": _nothing("it sends edited prompts to a second network"),
        "MELO": _nothing("it keeps each edit in a LoRA block of its own, chosen per prompt"),
        "SERAC": _nothing("it answers edited prompts with a second model"),
        "IKE": _nothing("it puts the fact into the prompt"),
        "ICE": _nothing("it puts the fact into the prompt"),
        "FT-Api": _nothing("the weights are at a service"),
        "DeepEdit-Api": _nothing("the weights are at a service"),
        "SPHERE": _OWN,
        "RECT": _OWN,
        "PRUNE": _OWN,
    }
)

OWN: Final = frozenset(name for name, method in METHODS.items() if method.writes == "own")
