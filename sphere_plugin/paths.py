"""Paths as users write them: no text that stands for one makes it fail to look there. What others see of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sphere_plugin.errors import ConfigError


def user_path(given: str | Path) -> Path:
    """The path, with the home folder in place of a ``~``; as it is where there is no such user."""
    path = Path(given)
    with suppress(RuntimeError):  # "~nobody/here"
        return path.expanduser()
    return path


def yaml_path(given: str | Path) -> Path:
    """The path of a YAML, whose suffix may be left out, as EasyEdit's hparams classes have it."""
    path = user_path(given)
    if not path.name or path.suffix in (".yaml", ".yml"):
        return path
    return path.with_name(path.name + ".yaml")


def absolute_path(key: str, given: object) -> Path:
    """The absolute path in the setting ``key``.

    Raises:
        ConfigError: it is no text, or has characters that no path has.
    """
    if isinstance(given, str | Path):
        with suppress(ValueError):
            return user_path(given).resolve()
    raise ConfigError(key, given, "the path of a file or folder", "Check it.")


def is_folder(path: Path) -> bool:
    """Whether there is a folder; none where the name is too long for one, or nobody may look."""
    with suppress(OSError):
        return path.is_dir()
    return False


def is_file(path: Path) -> bool:
    """The same of a file."""
    with suppress(OSError):
        return path.is_file()
    return False


def without_folders(value: Any) -> Any:
    """Returns JSON with only the last part of every absolute path in it: where files lay is nobody else's business."""
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
