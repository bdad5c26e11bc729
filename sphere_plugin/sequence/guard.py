"""Notice that a model starts to collapse, and act before it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.journaling.revisit import RESTORE

Action = Literal["stop", "rollback", "warn"]

FORMAT: Final = 1
_EVENT: Final = frozenset(("edits", "reason", "action", "left"))


@dataclass(frozen=True)
class Guard:
    """When a run counts as collapsing, and what to do then.

    Attributes:
        energy: largest relative change of the hyperspherical energy (s = 2) of any edited weight since before the
            first edit, looked at after every batch; None: not looked at. The paper's early sign.
        retention: smallest ratio of the efficacy of all edits so far, now, to their efficacy right after their own
            batch, looked at at checkpoints; None: not looked at.
        action: "stop" ends the run as it is; "rollback" takes it back to the last checkpoint at which all was well, or
            to the unedited model, and ends it; "warn" only logs it.

    Raises:
        ConfigError: a value out of its range.
    """

    energy: float | None = None
    retention: float | None = None
    action: Action = "stop"

    def __post_init__(self) -> None:
        for name in ("energy", "retention"):
            if getattr(self, name) is not None:
                check_number(f"guard.{name}", getattr(self, name), 0.0, above=True)
        if self.action not in get_args(Action):
            raise ConfigError("guard.action", self.action, " or ".join(get_args(Action)), "Leave it out for stop.")
        if self.energy is None and self.retention is None:
            raise ConfigError("guard", "no limit", "energy, retention or both", "Write guard: {energy: 0.05}.")

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from a block ``guard:``."""
        for key in content:
            if key not in ("energy", "retention", "action"):
                raise ConfigError("guard", key, "energy, retention or action", "Check the spelling.")
        return cls(**content)

    def on_energy(self, changes: Mapping[str, float | None]) -> str | None:
        """Why the run counts as collapsing after a batch; None if it does not.

        Args:
            changes: weight -> relative change of its energy; None where it has none, which counts.
        """
        if self.energy is None:
            return None
        for name, change in changes.items():
            if change is None:
                return f"{name} has no hyperspherical energy any more"
            if abs(change) > self.energy:
                return f"the energy of {name} has changed by {change:+.2%}, more than {self.energy:.2%}"
        return None

    def on_retention(self, now: float | None, fresh: float | None) -> str | None:
        """The same at a checkpoint.

        Args:
            now: mean efficacy of all edits so far.
            fresh: their mean efficacy right after their own batch.
        """
        if self.retention is None or now is None or not fresh or now >= self.retention * fresh:
            return None
        left = f"{now / fresh:.1%} is left, less than {self.retention:.1%}"
        return f"of the efficacy right after each batch, {fresh:.3f}, {left}"


class Events:
    """What the guard of a run has done so far: ``guard.json`` in the folder of the run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "guard.json"

    def all(self) -> list[dict[str, Any]]:
        """Each as docs/run-folder.md says, in their order."""
        if not self._path.exists():
            return []
        told = read_json(self._path, RESTORE)
        if isinstance(told, dict) and told.get("format") == FORMAT:
            told = told.get("events")
        events: list[dict[str, Any]] = told if isinstance(told, list) else [{}]  # a list is what older versions wrote
        if not all(isinstance(one, dict) and one.keys() >= _EVENT for one in events):
            raise CacheError(str(self._path), told, f"what a guard did, of format {FORMAT}", RESTORE)
        return events

    def add(self, edits: int, reason: str, action: str, left: int) -> None:
        """Note one; the same one twice, after a stop in between, counts once."""
        told = self.all()
        event = {"edits": edits, "reason": reason, "action": action, "left": left}
        if told[-1:] != [event]:
            write_json(self._path, {"format": FORMAT, "events": [*told, event]})

    @property
    def off(self) -> bool:
        """Whether somebody has switched the guard off, which is for good."""
        return any(event["action"] == "off" for event in self.all())

    def stopped(self, edits: int) -> str | None:
        """Why the guard stopped the run where it is now, with so many edits in its weights; None if it did not."""
        last = self._end()
        return str(last["reason"]) if last is not None and last["left"] == edits else None

    def go_on(self, edits: int) -> None:
        """Note that a run which the guard has stopped goes on, for edits were taken back: it is stopped no more."""
        if self._end() is not None:
            self.add(edits, "sphere undo", "undo", edits)

    def _end(self) -> dict[str, Any] | None:
        """The last event if it ended the run."""
        last = self.all()[-1:]
        return last[0] if last and last[0]["action"] in ("stop", "rollback") else None
