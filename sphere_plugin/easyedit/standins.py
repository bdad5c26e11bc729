"""Stand-ins for libraries that EasyEdit imports but text editing never calls.

`vision_stand_ins` is open while the host is imported. It answers the import statements of EasyEdit's own modules and
nobody else's, and puts nothing into `sys.modules`: transformers and datasets decide once per process, with
`importlib.util.find_spec`, whether torchvision is there, and must not be told that it is.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Final

from sphere_plugin.errors import HostError

PACKAGE: Final = "easyeditor"
VISION_LIBRARIES: Final = ("torchvision", "timm", "fairscale", "av", "qwen_vl_utils", "iopath", "cv2")


class StandInType(type):
    """The type of every stand-in: any name can be read from it, and none of them can be called."""

    path: str
    remedy: str

    def __getattr__(cls, name: str) -> StandInType:
        if name.startswith("__"):  # inspect, pickle and `import *` ask for these to learn what an object can do
            raise AttributeError(name)
        return stand_in(f"{cls.path}.{name}", cls.remedy)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        """Refuse, unless used as a decorator: then the class or function of the host is left as it is."""
        if len(args) == 1 and not kwargs and _is_defined_by_host(args[0]):
            return args[0]
        raise HostError(cls.path, "a call", "the real one", cls.remedy)

    def __repr__(cls) -> str:
        return f"<stand-in for {cls.path}>"


def stand_in(path: str, remedy: str) -> StandInType:
    """A placeholder that can be imported from, subclassed and used as a decorator, but neither called nor created.

    It is a class whatever it stands for, so `from torchvision import transforms` works whether `transforms` is a
    module, a class or a function, which cannot be known without the library.
    """
    return StandInType(path.rpartition(".")[2], (), {"path": path, "remedy": remedy})


class StandInModule(ModuleType):
    """A module of the host that cannot be loaded any more, so that the modules importing from it can be."""

    def __init__(self, name: str, remedy: str) -> None:
        super().__init__(name)
        self._remedy = remedy

    def __getattr__(self, name: str) -> StandInType:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{self.__name__}.{name}", self._remedy)


def missing_libraries(names: Sequence[str] = VISION_LIBRARIES) -> tuple[str, ...]:
    """Those of `names` that are not installed. A library that is there, even a broken one, is never replaced."""
    return tuple(name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None)


@contextmanager
def vision_stand_ins() -> Iterator[tuple[str, ...]]:
    """While open, EasyEdit's modules get stand-ins for the vision libraries that are not installed.

    Python calls `builtins.__import__` with the globals of the importing module, so this is the one place where "asked
    by EasyEdit" can be told from "asked by transformers"; a finder on `sys.meta_path` cannot tell, and what it returns
    stays in `sys.modules` for all to see.
    """
    missing = missing_libraries()
    real_import = builtins.__import__

    def import_for(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType | StandInType:
        library = name.partition(".")[0]
        if level == 0 and library in missing and globals is not None and _is_host_name(globals.get("__name__")):
            return stand_in(name if fromlist else library, _vision_remedy(library))
        return real_import(name, globals, locals, fromlist or (), level)

    builtins.__import__ = import_for  # type: ignore[assignment]  # a stand-in is no module, only good as one
    try:
        yield missing
    finally:
        builtins.__import__ = real_import


def _vision_remedy(library: str) -> str:
    return f"{library} is not installed; text editing does not need it, multimodal editing does: install {library}."


def _is_host_name(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == PACKAGE


def _is_defined_by_host(thing: object) -> bool:
    return isinstance(thing, (type, FunctionType)) and _is_host_name(thing.__module__)
