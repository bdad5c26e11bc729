"""Progress bars for the long parts of the work, with an estimate of what is left."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bars:
    """Called with (what, done now, of how many in all); one bar for each kind of work, on stderr.

    Args:
        hide: kinds of work that get no bar.
    """

    def __init__(self, hide: frozenset[str] = frozenset()) -> None:
        self._hide = hide
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what in self._hide:
            return
        bar = self._bars.get(what)
        if bar is None:
            bar = self._bars[what] = tqdm(total=total, desc=what)
        bar.update(done)
        if bar.n >= total:
            self._bars.pop(what).close()
