"""A method of EasyEdit has the process to itself while it runs, and finds what it remembers of its own editor only.

EasyEdit's methods keep in their modules what belongs to one model: the texts that prompts are put behind, statistics,
a projection, the keys of earlier edits. They draw from the random generators of the process. So edits of one editor
reach into another, one after the other as well as from threads at the same time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.process import ONE_AT_A_TIME
from sphere_plugin.randomness import RandomStates

# What a method's module remembers, and how it begins.
REMEMBERED: Final[Mapping[str, Callable[[], Any]]] = MappingProxyType(
    {
        "CONTEXT_TEMPLATES_CACHE": lambda: None,
        "COV_CACHE": dict,
        "inv_mom2_cache": dict,
        "P_loaded": bool,
        "cache_c_new": bool,
    }
)
# What is not there before the first edit, in modules that have the first of these.
MARK, LATER = "P_loaded", ("P", "cache_c")


class Turns:
    """One editor's turns with EasyEdit: what its method remembers and where its random numbers are in between.

    In the main thread random numbers are those of the process, as ever. In another thread they go on from where those
    of the process were when this was made, and the process's are put back: what one thread draws, no other misses.

    Args:
        apart: False for calls from outside an editor: these wait for their turn as well, and share what EasyEdit's
            modules remember and the random numbers of the process, as without this package.
    """

    def __init__(self, apart: bool = True) -> None:
        self._apart = apart
        with ONE_AT_A_TIME:
            self._random = RandomStates.now()
        self._kept: dict[tuple[str, str], Any] = {}
        self._taken = False

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for this editor's turn, which lasts as long as the block; inside one, nothing new happens."""
        with ONE_AT_A_TIME:
            if self._taken or not self._apart:
                yield
                return
            with ExitStack() as stack:
                stack.callback(setattr, self, "_taken", False)
                self._taken = True
                stack.enter_context(self._memory())
                if threading.current_thread() is not threading.main_thread():
                    stack.enter_context(self._numbers())
                yield

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Modules remember what they did at the end of this editor's last turn; afterwards, what they did before."""
        before = _remembered()
        fresh = {where: _Nothing if where[1] in LATER else REMEMBERED[where[1]]() for where in before}
        _put(fresh | self._kept)
        try:
            yield
        finally:
            self._kept = _remembered()
            _put(before)

    @contextmanager
    def _numbers(self) -> Iterator[None]:
        outside = RandomStates.now()
        self._random.put()
        try:
            yield
        finally:
            self._random = RandomStates.now()
            outside.put()


class _Nothing:
    """Stands for a name that is not there."""


def _remembered() -> dict[tuple[str, str], Any]:
    """(module, name) -> what stands there, of all methods."""
    found: dict[tuple[str, str], Any] = {}
    for title, module in list(sys.modules.items()):
        if title.startswith(f"{PACKAGE}.models."):
            held = vars(module)
            names = [name for name in REMEMBERED if name in held] + list(LATER if MARK in held else ())
            found |= {(title, name): held.get(name, _Nothing) for name in names}
    return found


def _put(values: Mapping[tuple[str, str], Any]) -> None:
    for (title, name), value in values.items():
        if value is not _Nothing:
            setattr(sys.modules[title], name, value)
        elif name in vars(sys.modules[title]):
            delattr(sys.modules[title], name)
