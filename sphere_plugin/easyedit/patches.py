"""Changes to what EasyEdit's classes and tables hold, each of which can be taken back."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any


class Patches:
    """What was replaced, and how to put it back; the last change is taken back first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def attribute(self, owner: type | ModuleType, name: str, value: object) -> None:
        """Set ``owner.name``; undone, it is again what stood there, or is inherited as before."""
        there = name in vars(owner)
        original = vars(owner).get(name)
        self._undo.append(lambda: setattr(owner, name, original) if there else delattr(owner, name))
        setattr(owner, name, value)

    def item(self, table: MutableMapping[str, Any], key: str, value: object) -> None:
        """Set ``table[key]``; undone, the key has its old value, or is gone."""
        there = key in table
        original = table.get(key)

        def undo() -> None:
            if there:
                table[key] = original
            else:
                del table[key]

        self._undo.append(undo)
        table[key] = value

    def undo(self) -> None:
        """Take everything back."""
        while self._undo:
            self._undo.pop()()
