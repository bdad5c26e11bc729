"""The block ``abilities:`` of a run: which general abilities are measured along it, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError
from sphere_plugin.evaluation.abilities import BATCH, PAPER, Suite, check_tasks
from sphere_plugin.evaluation.benchmarks import FILES, Data
from sphere_plugin.paths import absolute_path

PAPERS: Final[Literal["paper"]] = "paper"
OFTEN, SELDOM = 1000, 5000  # the paper's schedule: every 1,000 edits up to 5,000, then every 5,000
MOST: Final = 100_000  # moments

Schedule = Literal["paper"] | int | tuple[int, ...]


@dataclass(frozen=True)
class AbilityPlan:
    """The block ``abilities:`` of a run.

    Attributes:
        tasks: names, see `Suite`.
        every: "paper", after so many edits each time, or after each of these numbers of edits; the unedited model and
            the end of the run are always measured.
        limit: so many records of each task; None: all.
        data: a folder with the benchmark files, or benchmark -> file.
        batch_size: prompts at once.

    Raises:
        ConfigError: a value out of its range.
    """

    tasks: tuple[str, ...] = PAPER
    every: Schedule = PAPERS
    limit: int | None = None
    data: Data | None = None
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        if not self.tasks:
            raise ConfigError("abilities.tasks", "nothing", "names of tasks", "Leave it out for the paper's four.")
        if self.every != PAPERS:
            numbers = self.every if isinstance(self.every, tuple) else (self.every,)
            for number in numbers:
                check_number("abilities.every", number, 1, whole=True)
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None:
                check_number(f"abilities.{name}", getattr(self, name), 1, whole=True)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from a block of a YAML, or from a manifest."""
        known = ("tasks", "every", "limit", "data", "batch_size")
        for key in content:
            if key not in known:
                raise ConfigError("abilities", key, ", ".join(known), "Check the spelling.")
        values = {key: value for key, value in content.items() if value is not None}
        if "tasks" in values:
            values["tasks"] = names_of(values["tasks"])
        if isinstance(values.get("every"), list):
            values["every"] = tuple(values["every"])
        values["data"] = data_of(values.get("data"))
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `from_mapping` reads it."""
        data = {key: str(one) for key, one in self.data.items()} if isinstance(self.data, Mapping) else self.data
        every = list(self.every) if isinstance(self.every, tuple) else self.every
        told = {"data": str(data) if isinstance(data, Path) else data, "every": every, "tasks": list(self.tasks)}
        return asdict(replace(self, data=None)) | told

    def moments(self, edits: int, batch_size: int) -> tuple[int, ...]:
        """After how many edits of a run to measure, in their order.

        Raises:
            ConfigError: one of them is not between two batches, or behind the end of the run; or they are too many.
        """
        step = self.every if isinstance(self.every, int) else SELDOM
        if edits // step > MOST:
            remedy = "Measure less often."
            raise ConfigError("abilities.every", self.every, f"at most {MOST} moments in {edits} edits", remedy)
        if self.every == PAPERS:
            numbers = {*range(OFTEN, SELDOM, OFTEN), *range(SELDOM, edits + 1, SELDOM)}
            numbers = {number for number in numbers if number <= edits}
        elif isinstance(self.every, tuple):
            numbers = set(self.every)
        else:
            numbers = set(range(self.every, edits + 1, self.every))
        for number in sorted(numbers):
            if number > edits or (number % batch_size and number != edits):
                remedy = f"Batches have {batch_size} edits, the run {edits}."
                raise ConfigError("abilities.every", number, "a number of edits between two batches", remedy)
        return tuple(sorted({0, *numbers, edits}))

    def suite(self) -> Suite:
        """The tasks, with their records."""
        return Suite(self.tasks, self.data, self.limit, batch_size=self.batch_size)


def names_of(given: Any) -> tuple[str, ...]:
    """Names of tasks from a text with commas or a list."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ConfigError("tasks", given, "names of tasks", "Write tasks: [gsm8k, rte].")
    return tuple(given)


def data_of(given: Any) -> Data | None:
    """A folder, or benchmark -> file, from the text or the mapping that a YAML has; absolute."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        return absolute_path("data", given)
    if not isinstance(given, Mapping) or not all(isinstance(one, str | Path) for one in given.values()):
        raise ConfigError("data", given, "a folder, or benchmarks with their files", "Write data: {rte: FILE}.")
    for key in given:
        if key not in FILES:
            raise ConfigError("data", key, f"one of {', '.join(FILES)}", "Check the spelling.")
    return {key: absolute_path(f"data.{key}", one) for key, one in given.items()}
