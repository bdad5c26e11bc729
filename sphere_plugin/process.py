"""What a process has one of, however many threads: changed by one thread at a time, and put back.

Our own editing and scoring change nothing of the kind and take no turns. Other people's code does: EasyEdit keeps in
its modules what its methods remember, and prints; transformers changes torch's defaults while it loads a model.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

# Held by the thread whose turn it is, as often as it likes.
ONE_AT_A_TIME: Final = threading.RLock()


@contextmanager
def muted(errors: bool = False) -> Iterator[None]:
    """Drop what this thread prints while the block runs; what others print goes where it went.

    Args:
        errors: what it prints to standard error too, such as progress bars.
    """
    with ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        if sys.stdout is not None:  # a program without a terminal may have none
            stack.enter_context(contextlib.redirect_stdout(_OfOthers(sys.stdout)))
        if sys.stderr is not None and errors:
            stack.enter_context(contextlib.redirect_stderr(_OfOthers(sys.stderr)))
        yield


class _OfOthers:
    """A stream without what is written to it by the thread that made this."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._muted = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        return len(text) if threading.get_ident() == self._muted else int(self._stream.write(text))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of them, or drop it."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
