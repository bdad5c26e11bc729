"""What is kept of a count of key statistics that is not finished, so that it goes on where it was stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from sphere_plugin.errors import CacheError
from sphere_plugin.files import read_json, read_tensors, write_json, write_tensors

EVERY: Final = 60.0  # seconds between two writes of the sums
_FORMAT: Final = "1"

_LOG = logging.getLogger("sphere_plugin")


class Unfinished:
    """Texts and sums of one count, in files beside the one it will end in.

    That file's name says what the numbers depend on, so what is found here belongs to the same count. Files that are
    damaged are as good as none.

    Args:
        path: where the finished statistics go.
    """

    def __init__(self, path: Path) -> None:
        self._texts = path.with_suffix(".texts.json")
        self._sums = path.with_suffix(".sums.safetensors")
        self._written = time.monotonic()

    def texts(self) -> list[str] | None:
        """The texts that are counted, or None if they have to be got first."""
        content = self._read(self._texts, read_json)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return None
        texts: list[str] = content["texts"]
        return texts

    def keep_texts(self, texts: Sequence[str]) -> None:
        """Keep them; written once."""
        if not self._texts.exists() or self.texts() is None:
            write_json(self._texts, {"format": _FORMAT, "texts": list(texts)})

    def sums(self) -> tuple[dict[int, Tensor], int, int]:
        """Sums of kkᵀ [d_in, d_in] float64 by layer, how many tokens are in them, and how many texts."""
        content = self._read(self._sums, read_tensors)
        if content is None or content[1].get("format") != _FORMAT:
            return {}, 0, 0
        tensors, counts = content
        _LOG.info("key statistics: going on after %s texts", counts["texts"])
        return {int(layer): total for layer, total in tensors.items()}, int(counts["tokens"]), int(counts["texts"])

    @property
    def due(self) -> bool:
        """Whether it is time to keep what has been counted so far: once in :data:`EVERY` seconds."""
        return time.monotonic() - self._written >= EVERY

    def keep_sums(self, sums: Mapping[int, Tensor], tokens: int, texts: int) -> None:
        """Keep what has been counted so far."""
        named = {str(layer): total for layer, total in sums.items()}
        write_tensors(self._sums, named, {"format": _FORMAT, "tokens": str(tokens), "texts": str(texts)})
        self._written = time.monotonic()

    def forget(self) -> None:
        """The count is finished."""
        for path in (self._texts, self._sums):
            with suppress(OSError):  # the next count that ends here will try again
                path.unlink(missing_ok=True)

    def _read(self, path: Path, reader: Any) -> Any:
        if not path.exists():
            return None
        try:
            return reader(path)
        except CacheError as error:
            _LOG.warning("an unfinished count of key statistics cannot be used: %s", error)
            return None
