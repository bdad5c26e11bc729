"""The edits of a run for others to use: as a whole model, as a file of exact differences, or as a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from torch import Tensor

from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.files import atomic_folder, read_json, write_bytes, write_json
from sphere_plugin.folders import refuse_existing, write_sums
from sphere_plugin.geometry.neurons import neurons
from sphere_plugin.journaling.batch import same_bits
from sphere_plugin.journaling.card import card, facts_of
from sphere_plugin.journaling.delta import write_delta
from sphere_plugin.journaling.lowrank import cut
from sphere_plugin.journaling.revisit import opened, put, unedited
from sphere_plugin.journaling.store import Journal
from sphere_plugin.paths import user_path, without_folders
from sphere_plugin.peft import peft_library, save_lora

Format = Literal["hf", "delta", "adapter"]
FORMATS: Final[tuple[str, ...]] = get_args(Format)

# Gives the model with these weights in it, and its tokenizer.
Source = Callable[[Mapping[str, Tensor]], tuple[Any, Any]]


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        path: the folder or file.
        format: "hf", "delta" or "adapter".
        edits: how many are in it.
        rank: of an adapter.
        errors: of an adapter, weight -> ‖ΔW − BA‖ / ‖ΔW‖.
    """

    path: Path
    format: str
    edits: int
    rank: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)


def export(
    folder: Path | str,
    out: Path | str,
    format: Format = "hf",
    at: int | None = None,
    rank: int | None = None,
    model: str | None = None,
) -> Exported:
    """Export the edits of the run in ``folder``; what is at ``out`` afterwards is whole.

    - "hf": the edited model and its tokenizer, in a folder for ``from_pretrained``.
    - "delta": one safetensors file of exact differences, for :func:`sphere_plugin.apply_delta`.
    - "adapter": the updates, cut down to a rank, in a folder for ``PeftModel.from_pretrained``.

    Folders have a README.md, with what was measured of the edits and what an adapter misses of each update, all edits
    in edits.json, and in SHA256SUMS what the files are, which ``load_model`` compares.

    Args:
        folder: of the run.
        out: where to; nothing may be there.
        format: see above.
        at: after how many edits; a number between two batches. None: after all of them.
        rank: of the adapter; None: what it takes to miss less than 1 % of each update.
        model: name or folder of the unedited model, where it is not the one the run names.

    Raises:
        ConfigError: a number that cannot be, or something at ``out``.
        CacheError: a file of the run is missing or damaged, or ``out`` cannot be written.
        ModelError: the model is not the one that was edited.
        HostError: an adapter without PEFT.
    """
    folder, out = user_path(folder), user_path(out)
    journal, manifest = opened(folder)
    if model is not None:
        manifest = {**manifest, "model": {**manifest["model"], "name": model}}
    number = len(journal) if at is None else journal.batch_at(at)

    def source(weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        model, tokenizer = unedited(manifest["model"], journal)
        put(dict(model.named_parameters()), weights)
        return model, tokenizer

    point = folder / "checkpoints" / f"{int(journal.record(number)['edits']):06d}.json" if number else None
    checkpoint = read_json(point) if point is not None and point.exists() else None
    return export_batches(journal, number, manifest, out, format, rank, source, checkpoint)


def export_batches(
    journal: Journal,
    number: int,
    manifest: Mapping[str, Any],
    out: Path,
    format: Format,
    rank: int | None,
    source: Source,
    checkpoint: Mapping[str, Any] | None = None,
) -> Exported:
    """The same for the first ``number`` batches of a journal.

    ``source`` is asked for a model for "hf" only; ``checkpoint`` has the scores at that moment, if there are some.
    """
    if format not in FORMATS:
        raise ConfigError("format", format, f"one of {', '.join(FORMATS)}", "See docs/journal.md.")
    if rank is not None and format != "adapter":
        raise ConfigError("rank", rank, f"none for the format {format!r}", "Only an adapter has a rank.")
    refuse_existing(out)
    if format == "adapter":
        peft_library()
        _check_rank(rank, journal)
    edits = journal.edits(number)
    after = journal.weights_after(number)
    if format == "delta":
        named = str(without_folders(manifest["model"].get("name")))
        about = {"edits": str(edits), "entry": str(manifest.get("entry")), "model": named}
        write_delta(out, journal.weights_after(0), after, about)
        return Exported(out, format, edits)
    facts = facts_of(journal, number)
    with atomic_folder(out, keep=refuse_existing) as folder:
        if format == "hf":
            for part in source(after):
                part.save_pretrained(folder)
            exported = Exported(out, format, edits)
        else:
            exported = _adapter(folder, out, edits, journal, after, rank, manifest["model"].get("name"))
        write_sums(folder)  # of what is loaded; people may write into the rest
        write_json(folder / "edits.json", facts)
        write_bytes(folder / "README.md", card(manifest, edits, facts, exported.errors, checkpoint).encode())
    return exported


def _check_rank(rank: int | None, journal: Journal) -> None:
    """Raise ConfigError for a rank that a weight cannot have, before batches are added up."""
    sides = {name: min(weight.shape) for name, weight in journal.weights_after(0).items() if weight.dim() == 2}
    if rank is None or not sides:
        return
    name = min(sides, key=sides.__getitem__)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= sides[name]:
        expected, remedy = f"a whole number from 1 to {sides[name]}", f"{name} has a rank of {sides[name]} at most."
        raise ConfigError("rank", rank, expected, remedy)


def _adapter(
    folder: Path, out: Path, edits: int, journal: Journal, after: dict[str, Tensor], rank: int | None, base: str | None
) -> Exported:
    before = journal.weights_after(0)
    vectors = [name for name in after if after[name].dim() != 2 or not name.endswith(".weight")]
    for name in vectors:
        if not same_bits(before[name], after[name]):
            remedy = "Export the whole model (hf) or the exact differences (delta)."
            raise ModelError(
                name, f"changed, of shape {tuple(after[name].shape)}", "matrices only: B·A is one", remedy
            )

    def updates() -> Iterator[tuple[str, Tensor]]:
        for name in after:
            if name not in vectors:
                yield name, neurons(after[name].double() - before[name].double(), name in journal.transposed)

    low = cut(updates(), rank)
    save_lora(folder, low.factors, bool(journal.transposed), base)
    return Exported(out, "adapter", edits, low.rank, low.errors)
