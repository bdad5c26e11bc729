"""The settings of the paper's tables and figures, by name."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError


def names() -> list[str]:
    """All presets."""
    folder = files("sphere_plugin.sequence").joinpath("presets")
    return sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))


def preset(name: str, scale: float | None = None) -> dict[str, Any]:
    """The settings of a preset, for `RunSettings.from_mapping`.

    Args:
        name: of the preset.
        scale: this share of its edits, checkpoints and batch size, so that the same experiment fits a small machine.

    Raises:
        ConfigError: there is no such preset, or the scale is out of (0, 1].
    """
    if name not in names():
        raise ConfigError("--preset", name, f"one of {', '.join(names())}", "docs/run.md says what they are.")
    source = files("sphere_plugin.sequence").joinpath("presets", f"{name}.yaml")
    content: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    content["preset"] = name
    if scale is None:
        return content
    check_number("--scale", scale, 0.0, above=True)
    if scale > 1:
        raise ConfigError("--scale", scale, "a share of at most 1", "Leave it out for the paper's size.")
    size = max(1, round(content["batch_size"] * max(scale, 0.2)))
    edits, *points = (max(1, int(n * scale / size + 0.5)) * size for n in (content["edits"], *content["checkpoints"]))
    points = sorted({min(edits, point) for point in points})
    return content | {"batch_size": size, "edits": edits, "checkpoints": points}
