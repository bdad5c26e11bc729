"""The blocks ``sphere:``, ``rect:`` and ``prune:`` of a YAML, read into restraints.

Each is true, false, or a block of the restraint's own settings; what a block leaves out has its default. Nothing here
keeps or changes what it is given.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from sphere_plugin.editing.config import check_flag
from sphere_plugin.errors import ConfigError
from sphere_plugin.restraints import PruneConfig, RectConfig, SphereConfig

# EasyEdit's names for the two numbers of the paper.
SYNONYMS = MappingProxyType({"cumulative_ratio": "eta", "suppression_strength": "alpha"})

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def read_sphere(value: object, alpha: float) -> SphereConfig | None:
    """Read what stands behind ``sphere:``.

    Args:
        value: true, false, a block of SphereConfig's fields (or EasyEdit's names for them), or a SphereConfig.
        alpha: the strength where the block gives none: the paper's for the method at hand.

    Returns:
        The projection, or None for false.

    Raises:
        ConfigError: anything else (null too), an unknown key, or a value out of its range, named as "sphere.eta".
    """
    if value is False:
        return None
    given = {"alpha": alpha, **sphere_keys(value)}
    with _inside("sphere"):
        check_flag("row_normalize", given.get("row_normalize", True))
        return SphereConfig(**given)


def read_rect(value: object) -> RectConfig | None:
    """Read what stands behind ``rect:``: true, false, a block ``{keep: 0.4}``, or a RectConfig.

    Returns:
        RECT, or None for false.

    Raises:
        ConfigError: anything else (null too), an unknown key, or a value out of its range, named as "rect.keep".
    """
    if value is False:
        return None
    given = _given("rect", value, RectConfig)
    with _inside("rect"):
        return RectConfig(**given)


def read_prune(value: object) -> PruneConfig | None:
    """Read what stands behind ``prune:``: true, false, a block ``{base: 2}``, or a PruneConfig.

    Returns:
        PRUNE, or None for false.

    Raises:
        ConfigError: anything else (null too), an unknown key, or a value out of its range, named as "prune.base".
    """
    if value is False:
        return None
    given = _given("prune", value, PruneConfig)
    with _inside("prune"):
        return PruneConfig(**given)


def sphere_keys(value: object) -> dict[str, Any]:
    """Return the settings that ``sphere:`` gives, under SphereConfig's names, unchecked; none for true.

    ``alpha: null`` is as good as no alpha, and ``cumulative_ratio: 0`` is EasyEdit's way of writing alpha 0.

    Raises:
        ConfigError: neither true nor a block nor a SphereConfig, an unknown key, or one thing given two values.
    """
    given = _given("sphere", value, SphereConfig, SYNONYMS)
    with _inside("sphere"):
        given = paper_names(given)
    return {key: one for key, one in given.items() if key != "alpha" or one is not None}


def paper_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with EasyEdit's names (:data:`SYNONYMS`) replaced by those of the paper.

    Raises:
        ConfigError: one thing has two different values.
    """
    given = {SYNONYMS[key]: value for key, value in values.items() if key in SYNONYMS}
    if given.get("eta") == 0 and given["eta"] is not False:  # EasyEdit's way of switching the projection off
        given = {"alpha": 0.0}
    others = {key: value for key, value in values.items() if key not in SYNONYMS}
    return merged(others, given, "cumulative_ratio and suppression_strength")


def merged(values: Mapping[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return both mappings as one.

    Raises:
        ConfigError: a key has different values in both, and not null in the first; it says that the second is from
            ``where``.
    """
    for key, value in more.items():
        if values.get(key) is not None and values[key] != value:
            raise ConfigError(key, (values[key], value), f"one value (the second is from {where})", "Give it once.")
    return {**values, **more}


def numbers(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Return ``values`` with texts read as numbers where a fraction is meant.

    YAML 1.1 takes 2e-2, without a point, for text.

    Args:
        values: the keys of a YAML.
        types: key -> its type as the dataclass spells it.
    """
    return {
        key: float(value)
        if isinstance(value, str)
        and (key in SYNONYMS or "float" in types.get(key, ""))
        and _SCIENTIFIC.fullmatch(value)
        else value
        for key, value in values.items()
    }


def types_of(kind: type) -> dict[str, str]:
    """Return name -> type, as it is spelled, of each field of a dataclass."""
    return {field.name: str(field.type) for field in dataclasses.fields(kind)}


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the one of ``known``, at least one name, that looks most like ``key``, whatever its capitals."""
    names = {name.lower(): name for name in known}
    return names[difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.0)[0]]


def _given(block: str, value: object, kind: type, synonyms: Iterable[str] = ()) -> dict[str, Any]:
    """Return the fields of ``kind`` that the block gives, with texts read as numbers."""
    types = types_of(kind)
    if value is True:
        return {}
    if isinstance(value, kind):
        return {name: getattr(value, name) for name in types}
    *firsts, last = types
    if not isinstance(value, Mapping):
        names = f"{', '.join(firsts)} and {last}" if firsts else last
        remedy = f"Write {block}: true for the defaults; docs/hparams.md explains the block."
        raise ConfigError(block, value, f"true, false, or a block of {names}", remedy)
    known = (*types, *synonyms)
    for key in value:
        if key not in known:
            remedy = f"The nearest one is {nearest(str(key), known)!r}; see docs/hparams.md."
            raise ConfigError(block, key, "a known key", remedy)
    return numbers(value, types)


@contextmanager
def _inside(block: str) -> Iterator[None]:
    """Say of errors that what they are about stands in this block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{block}.{error.culprit}", error.got, error.expected, error.remedy) from None
