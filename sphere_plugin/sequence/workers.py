"""What processes that run an entry have around them: an environment, a log."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sphere_plugin.errors import SphereError
from sphere_plugin.files import make_folder

LOG: Final = "run.log"


class Log(logging.FileHandler):
    """A log that may have no place, or a full disk: what ends a run is told elsewhere as well.

    A link in its place is replaced. The file is opened with the first line.
    """

    def __init__(self, path: Path, mode: str = "a") -> None:
        super().__init__(path, mode, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        if path.is_symlink():
            path.unlink()
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or leave it out where the file cannot be opened."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (the name is logging's)
        """Leave the line out."""

    def close(self) -> None:
        """Close the file, whether or not all of it could be written."""
        with contextlib.suppress(OSError):
            super().close()


@contextmanager
def logged(folder: Path, name: str = LOG) -> Iterator[None]:
    """Add what this package logs in the block to ``folder/run.log``, or another file there, and what ends it."""
    make_folder(folder)
    handler = Log(folder / name)
    log = logging.getLogger("sphere_plugin")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error, exc_info=not isinstance(error, SphereError))
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


@contextmanager
def workers_environment(threads: int) -> Iterator[None]:
    """What processes find that are started in the block: so many threads each, and an allocator that keeps its memory.

    Two runs of one thread beat one run of two threads by far on two shared cores. Giving freed memory back to the
    system and faulting it in again, which glibc does for large tensors, costs more than many of the products.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MALLOC_TRIM_THRESHOLD_": "-1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(1 << 26),
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
