"""The keys `sphere`, `rect` and `prune` in the YAML of any of EasyEdit's methods.

EasyEdit's loaders all end in ``cls(**config)``, so it is enough to take the keys out of what the class is called with,
and to keep them as attributes of the object: no loader need be known. While the plugin is registered, ``__init__`` of
every class of hyper-parameters does so. Classes that are defined later get the same when they are first loaded from a
file; they cannot have it earlier, because the dataclass decorator writes their ``__init__`` last of all.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sphere_plugin.easyedit.blocks import SYNONYMS, nearest, read_prune, read_rect, read_sphere, sphere_keys
from sphere_plugin.easyedit.methods import METHODS
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.editing.config import ALPHA_OF
from sphere_plugin.errors import ConfigError
from sphere_plugin.process import ONE_AT_A_TIME
from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, Restraint, SphereConfig
from sphere_plugin.restraints.controls import Control, ControlConfig

KEYS: Final = ("sphere", "rect", "prune")
ALPHA: Final = 0.8  # paper D.4.1, on every method but AlphaEdit


@dataclass(frozen=True)
class Asked:
    """The restraints that hyper-parameters ask for, at least one; ``control`` stands in SPHERE's place."""

    rect: RectConfig | None = None
    prune: PruneConfig | None = None
    sphere: SphereConfig | None = None
    control: Control | None = None

    @property
    def restraint(self) -> Restraint:
        """All of them as one, in this order: see `Chain`."""
        last: Restraint | None = self.sphere
        if self.sphere is not None and self.control is not None:
            last = ControlConfig(self.control, self.sphere)
        return Chain(tuple(one for one in (self.rect, self.prune, last) if one is not None))

    @property
    def label(self) -> str:
        """Such as "RECT + SPHERE"."""
        names = [key.upper() for key in ("rect", "prune", "sphere") if getattr(self, key) is not None]
        if self.control is not None:
            names[-1] = f"control ({self.control})"
        return " + ".join(names)


def asked_of(hparams: object) -> Asked | None:
    """Return what the keys of ``hparams`` ask for, or None if they ask for nothing.

    Those of SimIE ask for what its base method's ask for where they have no keys themselves.

    Raises:
        ConfigError: a key has a value that means nothing, or a number out of its range.
    """
    hparams = writers(hparams)
    alpha = dict(ALPHA_OF).get(str(getattr(hparams, "alg_name", None)), ALPHA)
    asked = Asked(
        rect=read_rect(getattr(hparams, "rect", False)),
        prune=read_prune(getattr(hparams, "prune", False)),
        sphere=read_sphere(getattr(hparams, "sphere", False), alpha),
    )
    if asked.sphere is not None:  # `sphere run` puts a control of experiments in its place
        asked = replace(asked, control=getattr(hparams, "control", None))
    return None if asked == Asked() else asked


def writers(hparams: Any) -> Any:
    """The hyper-parameters of the method that writes: of SimIE a copy of its base method's, with the keys of both."""
    base = getattr(hparams, "_base_hparams", None)
    if base is None:
        return hparams
    both = copy.copy(base)
    for key in KEYS:
        if getattr(hparams, key, False) is not False:
            setattr(both, key, getattr(hparams, key))
    return both


def hparams_class() -> type:
    """EasyEdit's base class of hyper-parameters."""
    base: type = sys.modules[f"{PACKAGE}.util.hparams"].HyperParams
    return base


def accept_keys(patches: Patches, overrides: Mapping[str, object]) -> None:
    """Make every class of EasyEdit's hyper-parameters accept the keys, those defined later included.

    Args:
        patches: undoes it.
        overrides: keys that all objects get; they win over those of a YAML, setting by setting.
    """
    base = hparams_class()
    wrapped: set[type] = set()  # lives as long as these patches do

    def wrap(cls: type) -> None:
        if cls not in wrapped and "__init__" in vars(cls):
            wrapped.add(cls)
            patches.attribute(cls, "__init__", _taking_keys(vars(cls)["__init__"], overrides))

    for cls in _with_subclasses(base):
        wrap(cls)
    _accept_later(base, patches, wrap)


def _with_subclasses(cls: Any) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _accept_later(base: Any, patches: Patches, wrap: Callable[[type], None]) -> None:
    """Give every class that is defined from now on a ``from_hparams`` that first sees to its ``__init__``."""

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        own = vars(cls).get("from_hparams")

        def from_hparams(actual: Any, *args: Any, **more: Any) -> object:
            with ONE_AT_A_TIME:
                for one in actual.__mro__:
                    if issubclass(one, base):
                        wrap(one)
            loader = super(cls, actual).from_hparams if own is None else own.__get__(None, actual)
            return loader(*args, **more)

        if own is not None or hasattr(cls, "from_hparams"):
            patches.attribute(cls, "from_hparams", classmethod(from_hparams))

    patches.attribute(base, "__init_subclass__", classmethod(init_subclass))


def _taking_keys(original: Callable[..., None], overrides: Mapping[str, object]) -> Callable[..., None]:
    """``__init__`` that takes the keys out, calls the class's own, and keeps the keys as attributes."""
    parameters = inspect.signature(original).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = tuple(parameters)[1:]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {key: kwargs.pop(key) for key in KEYS if key in kwargs and key not in known}
        for key in kwargs:
            if key not in known and not anything:
                remedy = f"The nearest one is {nearest(key, (*known, *KEYS))!r}."
                raise ConfigError("hparams", key, f"a key of {type(self).__name__}", remedy)
        original(self, *args, **kwargs)
        for key, value in given.items():
            setattr(self, key, value)
        for key, value in overrides.items():
            if key not in known:
                _override(self, key, value)
        asked_of(self)  # a wrong value is told here, not hours later

    return init


def _override(hparams: Any, key: str, value: object) -> None:
    """Set the key, and of a block that is there only what ``value`` names.

    EasyEdit's own SPHERE class has other names for two of the numbers, and fields for them: these are set.
    """
    own = getattr(hparams, key, False)
    if own is not False and value is True:
        return
    if key == "sphere" and own is not False and value is not False:
        value = {**sphere_keys(own), **sphere_keys(value)}
    spelled = {ours: theirs for theirs, ours in SYNONYMS.items() if hasattr(hparams, theirs)}
    if key == "sphere" and isinstance(value, Mapping) and spelled:
        for name, theirs in spelled.items():
            if name in value:
                setattr(hparams, theirs, value[name])
        value = {name: number for name, number in value.items() if name not in spelled} or True
    setattr(hparams, key, value)


def refusal(name: str, asked: Asked) -> ConfigError | None:
    """The reason why ``asked`` is impossible for the method ``name``, or None if it is possible."""
    method, culprit = METHODS.get(name), f"{asked.label} on {name}"
    drop = "Take the key out of the YAML, or --sphere off the command; docs/methods.md has what writes weights."
    if method is None:
        return ConfigError(culprit, "an unknown method", "one of EasyEdit's that docs/methods.md lists", drop)
    if method.writes == "nothing":
        return ConfigError(culprit, f"no weight update to project: {method.why_not}", "a weight update", drop)
    if method.writes == "adapter" and (asked.rect or asked.prune):
        remedy = f"Use sphere alone on {name}: a projected LoRA is a LoRA of the same rank, RECT's and PRUNE's is not."
        return ConfigError(culprit, "an adapter B·A", "full weights, for RECT and PRUNE", remedy)
    return None
