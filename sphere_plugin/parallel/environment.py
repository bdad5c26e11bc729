"""What torchrun tells a process, read without torch."""

from __future__ import annotations

import os


def processes() -> int:
    """How many processes share this run; 1 without torchrun."""
    told = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if told else 1


def log_name(rank: int) -> str:
    """Where a rank other than 0 logs, in the folder of a run."""
    return f"rank{rank}.log"
