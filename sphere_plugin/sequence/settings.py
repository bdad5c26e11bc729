"""What a run is to do: every setting, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from sphere_plugin.editing.config import check_flag, check_number, check_text
from sphere_plugin.errors import ConfigError
from sphere_plugin.parsing import yaml_of
from sphere_plugin.paths import absolute_path, is_folder, user_path
from sphere_plugin.sequence.abilities import AbilityPlan
from sphere_plugin.sequence.entries import HOSTED, check_settings, parse, split
from sphere_plugin.sequence.guard import Guard

Protocol = Literal["tokens", "exact"]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, or of a comparison of several entries on the same edits.

    Attributes:
        entries: names of :mod:`sphere_plugin.sequence.entries`.
        hparams: a YAML for SPHERE; that of FT or ROME is looked for beside its folder.
        model: replaces the YAML's model.
        data: a file of facts; None: the project's own.
        order: seed of the order of the facts; None: that of the file.
        edits: how many facts.
        batch_size: facts per batch.
        checkpoints: numbers of edits after which all edits so far are scored; empty: after the last one.
        sample: score so many of them at most, drawn by ``seed``; None: all.
        neighbours: neighbourhood prompts scored per fact; None: all.
        fluency: tokens of the texts that fluency is measured on, at the last checkpoint; 0: not scored (paper: 100).
        protocol: which scores the tables show: "tokens", the share of right target tokens, which is EasyEdit's and
            ZsRE's; "exact", whether all of them are right, which CounterFact's code counts.
        text: held-out text for perplexity; None: the project's own.
        share_targets: aim once, on the unedited model, for all entries of this package's own editor.
        settings: entry, its base, or "all" -> key of its YAML -> value.
        guard: what to do when the run starts to collapse.
        abilities: what is measured of the rest of the model, and when; None: nothing.
        seed: of the sample that is scored, of the texts for fluency, and of EasyEdit's methods. What our own editor
            draws, prefixes and generated text, has the `seed` of its YAML.
        preset: the preset these settings come from.

    Raises:
        ConfigError: a value out of its range; names the key.
    """

    entries: tuple[str, ...]
    hparams: Path
    edits: int
    batch_size: int = 100
    model: str | None = None
    data: Path | None = None
    order: int | None = None
    checkpoints: tuple[int, ...] = ()
    sample: int | None = None
    neighbours: int | None = 2
    fluency: int = 0
    protocol: Protocol = "tokens"
    text: Path | None = None
    share_targets: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guard: Guard | None = None
    abilities: AbilityPlan | None = None
    seed: int = 0
    preset: str | None = None

    def __post_init__(self) -> None:
        parse(",".join(self.entries))
        check_schedule(self.edits, self.batch_size, self.checkpoints)
        check_number("fluency", self.fluency, 0, whole=True)
        check_number("seed", self.seed, 0, whole=True)
        for name in ("order", "sample", "neighbours"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0 if name == "order" else 1, whole=True)
        if self.protocol not in get_args(Protocol):
            raise ConfigError("protocol", self.protocol, " or ".join(get_args(Protocol)), "Leave it out for tokens.")
        if self.model is not None:
            check_text("model", self.model)
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise ConfigError("guard", self.guard, "energy, retention, action", "Write guard: {energy: 0.05}.")
        if self.abilities is not None and not isinstance(self.abilities, AbilityPlan):
            raise ConfigError(
                "abilities", self.abilities, "tasks, every, limit, data", "Write abilities: {data: DIR}."
            )
        check_flag("share_targets", self.share_targets)
        self._check_sharing()
        if self.abilities is not None:
            self.abilities.moments(self.edits, self.batch_size)
        object.__setattr__(self, "checkpoints", tuple(sorted({*self.checkpoints, self.edits})))
        check_settings(self.settings, self.entries)

    def _check_sharing(self) -> None:
        hosted = [entry for entry in self.entries if split(entry)[0] in HOSTED]
        if self.share_targets and hosted:
            remedy = "Leave this entry out, or run without share_targets."
            raise ConfigError("share_targets", hosted[0], "entries of this package's own editor", remedy)

    def for_entry(self, entry: str) -> Self:
        """The same for one of the entries."""
        kept = {key: one for key, one in self.settings.items() if key in ("all", entry.partition("+")[0], entry)}
        return dataclasses.replace(self, entries=(entry,), settings=kept)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `from_mapping` reads it."""
        values = dataclasses.asdict(dataclasses.replace(self, abilities=None))
        values["abilities"] = None if self.abilities is None else self.abilities.plain()
        paths = {key: None if values[key] is None else str(values[key]) for key in ("hparams", "data", "text")}
        return values | paths | {"entries": list(self.entries), "checkpoints": list(self.checkpoints)}

    @classmethod
    def from_yaml(cls, path: Path) -> dict[str, Any]:
        """The keys of a YAML of settings, for `from_mapping`.

        Raises:
            ConfigError: the file cannot be read, is no mapping, or names a preset.
        """
        try:
            content = yaml_of(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError("run", str(path), f"a YAML file that can be read ({error})", "Check it.") from error
        if not isinstance(content, dict):
            raise ConfigError("run", str(path), "a YAML mapping of settings", "docs/run.md has an example.")
        if "preset" in content:  # what a manifest says a run was made from
            remedy = "Leave it out, and write --preset NAME: `sphere run` takes both, the YAML over the preset."
            raise ConfigError("preset", content["preset"], f"no such key in {path}", remedy)
        return content

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from the keys of a YAML or of a manifest.

        Raises:
            ConfigError: an unknown key, or a value out of its range.
        """
        if not isinstance(content, Mapping):
            raise ConfigError("run", content, "keys and values", "docs/run.md has an example.")
        values = dict(content)
        names = [one.name for one in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError("run", key, "a known setting", f"Settings are {', '.join(names)}.")
        missing = [key for key in ("entries", "hparams", "edits") if values.get(key) is None]
        if missing:
            remedy = "Write --compare memit,memit+sphere --edits 100 --out runs/NAME, or a YAML as in docs/run.md."
            raise ConfigError("run", f"no {' and no '.join(missing)}", f"a value for {' and '.join(missing)}", remedy)
        values["entries"] = _entries(values["entries"])
        given = values.get("checkpoints")
        values["checkpoints"] = () if given is None else whole_numbers("checkpoints", given)
        for key in ("hparams", "data", "text"):
            values[key] = _path(key, values.get(key))
        model = values.get("model")
        if isinstance(model, str) and model and is_folder(user_path(model)):  # "" would be the folder one is in
            values["model"] = str(user_path(model).resolve())
        if isinstance(values.get("guard"), Mapping):
            values["guard"] = Guard.from_mapping(values["guard"])
        if isinstance(values.get("abilities"), Mapping):
            values["abilities"] = AbilityPlan.from_mapping(values["abilities"])
        return cls(**values)


def _entries(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return parse(given)
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ConfigError("entries", given, "names of entries", "Write entries: [memit, memit+sphere].")
    return tuple(given)


def _path(key: str, given: Any) -> Path | None:
    return None if given is None else absolute_path(key, given)


def whole_numbers(name: str, given: Any) -> tuple[int, ...]:
    """The numbers in "100,500", in a list or alone, as they stand there.

    Raises:
        ConfigError: there is something else; it says that of ``name``.
    """
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        if any(isinstance(part, bool | float) for part in parts):
            raise TypeError
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ConfigError(name, given, "numbers with commas between them", "Write 100,500,1000.") from None


def check_schedule(edits: int, batch_size: int, checkpoints: Sequence[int]) -> None:
    """Raise ConfigError for numbers below 1, or if a checkpoint would never come."""
    check_number("edits", edits, 1, whole=True)
    check_number("batch_size", batch_size, 1, whole=True)
    for point in checkpoints:
        reached = point == edits or (0 < point < edits and point % batch_size == 0)
        if not reached:
            raise ConfigError(
                "checkpoints",
                point,
                f"multiples of batch_size {batch_size} up to {edits}",
                f"Scores are taken between batches; {edits} itself is always possible.",
            )
