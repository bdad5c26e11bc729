"""The journal of a run: the weights before any edit, and what each batch did to them.

docs/run-folder.md says what is in its files.

A batch has happened when its JSON file is there, which is written last. Whatever else a killed process left behind is
passed over, and written anew by the next batch.

Of a weight with a float32 master copy the journal is one of the copy; the weight is its rounding.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sphere_plugin.errors import CacheError, ConfigError
from sphere_plugin.files import fingerprint, json_digest, write_json, write_tensors
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import disk
from sphere_plugin.journaling.batch import Update, encode, on_threads, replayed
from sphere_plugin.journaling.disk import header, move, numbered, plain, read_record, tensors
from sphere_plugin.journaling.mastered import Mastered, Weights

_BASE: Final = "base.safetensors"
_FORMAT: Final = "1"
_MASTERED: Final = "2"  # the format of a journal with master copies


class Journal:
    """The folder ``journal`` in the folder of a run; made by `create` or `open`.

    It does not lock anything: whoever writes holds `run_lock` on the run's folder. Memory: one copy of the weights,
    and what one batch stored.

    Attributes:
        folder: where its files are.
        names: of the weights, in the order in which fingerprints take them.
        transposed: those of them that are stored as [d_in, d_out].
        mastered: those of them that have a master copy.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str]) -> None:
        self.folder = folder
        self.mastered = Mastered.read(metadata)
        self.names: tuple[str, ...] = tuple(json.loads(metadata["names"]))
        self.transposed: frozenset[str] = frozenset(json.loads(metadata["transposed"]))
        self._first = metadata["fingerprint"]
        self._count = max(numbered(folder), default=0)
        # The states (see `Mastered`) after that many batches, known to be right.
        self._state: tuple[int, Weights] | None = None

    @classmethod
    def create(
        cls,
        folder: Path,
        weights: Mapping[str, Tensor],
        transposed: Mapping[str, bool],
        masters: Collection[str] = (),
    ) -> Journal:
        """Start a journal with ``weights`` (name -> weight as the model stores it), before any edit.

        Args:
            folder: must not hold a journal with batches; one without is replaced.
            weights: any shape, dtype and device.
            transposed: name -> whether it is stored as [d_in, d_out]; see `orientations`.
            masters: names of weights that have a master copy, which is now the weight itself.

        Raises:
            ConfigError: there is a journal with batches.
            CacheError: the folder cannot be written.
        """
        if numbered(folder):
            remedy = "Continue that run with --resume, or choose another folder."
            raise ConfigError("the journal", str(folder), "a folder without one", remedy)
        metadata = {
            "format": _MASTERED if masters else _FORMAT,
            "names": json.dumps(list(weights)),
            "transposed": json.dumps([name for name in weights if transposed[name]]),
            "fingerprint": fingerprint(weights.items()),
            "torch": str(torch.__version__),
        }
        metadata |= Mastered.among(weights, masters).metadata()
        write_tensors(folder / _BASE, weights, metadata)
        return cls(folder, metadata)

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Open a journal for reading and for more batches.

        Raises:
            CacheError: there is none, or its first file is damaged.
        """
        if not (folder / _BASE).exists() and not numbered(folder):
            raise CacheError(str(folder), "no journal", "the journal of a run", "Give the folder of a run.")
        base, metadata = tensors(folder / _BASE, 0)
        if metadata.get("format") not in (_FORMAT, _MASTERED):
            remedy = "Read it with the version of sphere-plugin that wrote it."
            expected = f"a journal of format {_FORMAT} or {_MASTERED}"
            raise CacheError(str(folder / _BASE), metadata.get("format"), expected, remedy)
        disk.check_base(folder / _BASE, base, metadata)
        return cls(folder, metadata)

    def __len__(self) -> int:
        """How many batches are in it."""
        return self._count

    def edits(self, number: int | None = None) -> int:
        """How many edits are in the weights after batch ``number``; None: after the last one."""
        number = len(self) if number is None else number
        return int(self.record(number)["edits"]) if number else 0

    def record(self, number: int) -> dict[str, Any]:
        """What batch ``number``, from 1, did, as docs/run-folder.md says.

        Raises:
            CacheError: a file of it is missing or damaged.
        """
        self._check_number(number, 1)
        return read_record(self._path(number, "json"), self._path(number, "safetensors"), number)

    def fingerprint(self, number: int) -> str:
        """The fingerprint of the weights after ``number`` batches; 0: before any."""
        self._check_number(number)
        return str(self.record(number)["after"]) if number else self._first

    def fingerprint_of(self, weights: Mapping[str, Tensor]) -> str:
        """The fingerprint of these weights, to be compared with `fingerprint`; those of other names are left out."""
        return fingerprint((name, weights[name]) for name in self.names)

    def keys(self, number: int) -> Weights:
        """Name -> the keys [d_in, u] that batch ``number`` was appended with."""
        self._check_number(number, 1)
        path = self._path(number, "safetensors")
        if not any(name.endswith("/keys") for name in header(path, number)[0]):
            return {}
        entries = tensors(path, number)[0]
        return {name: entries[f"{name}/keys"] for name in self.names if f"{name}/keys" in entries}

    def factors(self, number: int) -> dict[str, Factors]:
        """Name -> the update [d_out, d_in] of batch ``number``, where it is stored in factors."""
        self._check_number(number, 1)
        entries = tensors(self._path(number, "safetensors"), number)[0]
        stored = [name for name in self.names if f"{name}/left" in entries]
        return {name: Factors(entries[f"{name}/left"], entries[f"{name}/right"]) for name in stored}

    def batch_at(self, edits: int) -> int:
        """The number of the last batch after which ``edits`` edits are in the weights; 0 for none.

        Raises:
            ConfigError: there is none; the message names the nearest two numbers of edits.
        """
        below, number = 0, 0
        while below < edits and number < len(self):
            number += 1
            here = self.edits(number)
            if here > edits:
                expected = "a number of edits between two batches"
                raise ConfigError("the number of edits", edits, expected, f"The nearest are {below} and {here}.")
            below = here
        if below != edits:
            last = self.edits()
            remedy = f"{last} edits are in the journal."
            raise ConfigError("the number of edits", edits, f"a number from 0 to {last}", remedy)
        while edits and number < len(self) and self._outside(number + 1):
            number += 1
        return number

    def _outside(self, number: int) -> bool:
        """Whether batch ``number`` is what somebody else wrote; not if it cannot be read, for it may be undone."""
        with suppress(CacheError):
            return bool(self.record(number).get("outside"))
        return False

    def append(
        self,
        record: Mapping[str, Any],
        after: Mapping[str, Tensor],
        updates: Mapping[str, Update] | None = None,
        keys: Mapping[str, Tensor] | None = None,
        masters: Mapping[str, Tensor] | None = None,
    ) -> int:
        """Write a batch that has just been done.

        Args:
            record: what it did; ``edits`` is needed, ``batch`` and ``after`` are filled in here.
            after: name -> the weight after it, as the model stores it, on any device.
            updates: name -> what was added to it, [d_out, d_in]; factors are stored instead of the whole weight
                where that takes less room, and anything else is as good as nothing.
            keys: name -> keys [d_in, u] that a method remembers.
            masters: name -> the master copy after it, float32, stored as the weight is. Where there is none, or it is
                not what the weight is a rounding of, the copy starts anew from the weight.

        Returns:
            The number of the batch.

        Raises:
            ConfigError: the record has no number of edits.
            CacheError: the disk is full, or the last batch cannot be read. The journal is then as before.
        """
        edits = record.get("edits")
        if not isinstance(edits, int) or edits < 0:
            raise ConfigError("edits of the record", edits, "how many edits are in the weights", "Fill it in.")
        before = self._at(len(self))
        live = {name: after[name].detach() for name in self.names}
        now = {name: self.mastered.state(name, one, (masters or {}).get(name)) for name, one in live.items()}
        entries = encode(before, now, updates or {}, self.transposed)
        entries |= {f"{name}/keys": matrix for name, matrix in (keys or {}).items()}
        number = len(self) + 1
        told = {key: value for key, value in record.items() if key not in ("batch", "after", "masters")}
        whole = plain({"batch": number, **told, "after": self.fingerprint_of(live), **self.mastered.told(now)})
        metadata = {"threads": str(torch.get_num_threads()), "record": json_digest(whole)}
        write_tensors(self._path(number, "safetensors"), entries, metadata)
        write_json(self._path(number, "json"), whole)
        self._count, self._state = number, (number, now)
        return number

    def weights_after(self, number: int) -> Weights:
        """Name -> the weight after ``number`` batches, as the model stores it, on the CPU; 0: before any edit.

        Raises:
            CacheError: a file is missing or damaged, or the arithmetic of this machine gives other weights than were
                recorded, on as many threads as then, too.
        """
        self._check_number(number)
        return {name: weight.clone() for name, weight in self.mastered.live(self._at(number)).items()}

    def masters_after(self, number: int) -> Weights:
        """Name -> the master copy after ``number`` batches, float32, on the CPU, of the weights that have one.

        Raises:
            CacheError: as `weights_after`.
        """
        self._check_number(number)
        return {name: state.clone() for name, state in self._at(number).items() if name in self.mastered.dtypes}

    def restore(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights after ``number`` batches into the live ``weights``."""
        with torch.no_grad():
            for name, weight in self.mastered.live(self._at(number)).items():
                weights[name].copy_(weight)

    def truncate(self, number: int, keep: bool = True) -> Path | None:
        """Take the batches after ``number`` out of the journal, and what was measured at later moments with them.

        They go to ``undone/1``, or the next free number, in the folder of the run, the last one first, so that the
        journal can be read at any moment.

        Args:
            number: how many batches stay.
            keep: False deletes them instead.

        Returns:
            The folder where they are now; None if there were none, or they were deleted.
        """
        self._check_number(number)
        later = disk.measured_later(self.folder.parent, self.edits(number)) if number < len(self) else []
        place = disk.free_place(self.folder.parent / "undone") if keep and number < len(self) else None
        for path in later:
            move(path, None if place is None else place / path.parent.name / path.name)
        for batch in range(len(self), number, -1):
            for kind in ("json", "safetensors"):  # without the first the second is nothing
                path = self._path(batch, kind)
                move(path, None if place is None else place / "journal" / path.name)
            self._count = batch - 1
        if self._state is not None and self._state[0] > number:
            self._state = None
        return place

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _check_number(self, number: int, least: int = 0) -> None:
        if not least <= number <= len(self):
            expected = f"a number from {least} to {len(self)}"
            raise ConfigError("the number of batches", number, expected, f"{self.folder} has {len(self)}.")

    # ---- from what is stored to the weights ----

    def _at(self, number: int) -> Weights:
        """The states after ``number`` batches; not to be written to."""
        if self._state is None or self._state[0] != number:
            states = self._replay(number)
            if self._mismatch(number, states):
                states = self._replay_as_then(number)
            self._state = (number, states)
        return self._state[1]

    def _mismatch(self, number: int, states: Weights) -> tuple[str, str, str] | None:
        """What is other in ``states`` than after ``number`` batches, got and expected; None if nothing is."""
        got, told = self.fingerprint_of(self.mastered.live(states)), self.mastered.told(states)
        if got != self.fingerprint(number):
            return "weights", got, self.fingerprint(number)
        expected = self.record(number).get("masters") if number else None
        if number and told.get("masters") != expected:
            return "master copies", str(told.get("masters")), str(expected)
        return None

    def _known(self, number: int) -> tuple[int, Weights]:
        if self._state is not None and self._state[0] <= number:
            return self._state
        return 0, self.mastered.starting(tensors(self.folder / _BASE, 0)[0])

    def _replay(self, number: int) -> Weights:
        """Each weight from the last batch that stored it whole."""
        known, start = self._known(number)
        since = dict.fromkeys(self.names, known)
        for batch in range(number, known, -1):
            stored = header(self._path(batch, "safetensors"), batch)[0]
            since |= {n: batch for n in self.names if since[n] == known and f"{n}/whole" in stored}
            if known not in since.values():
                break
        weights = {name: start[name] for name in self.names}
        for batch in range(max(known + 1, min(since.values())), number + 1):
            entries, _ = tensors(self._path(batch, "safetensors"), batch)
            due = [name for name in self.names if since[name] <= batch]
            weights |= {name: replayed(name, weights[name], entries, name in self.transposed) for name in due}
        return weights

    def _replay_as_then(self, number: int) -> Weights:
        """Batch by batch, each on as many threads as when it was written if that is what it takes."""
        known, start = self._known(number)
        weights = {name: start[name] for name in self.names}
        for batch in range(known + 1, number + 1):
            entries, metadata = tensors(self._path(batch, "safetensors"), batch)
            for threads in (torch.get_num_threads(), int(metadata["threads"])):
                with on_threads(threads):
                    new = {n: replayed(n, weights[n], entries, n in self.transposed) for n in self.names}
                wrong = self._mismatch(batch, new)
                if wrong is None:
                    break
            if wrong is not None:
                what, got, expected = wrong
                raise CacheError(
                    f"the {what} after batch {batch} of {self.folder}",
                    got,
                    f"{expected}, as recorded",
                    "Read the journal on the kind of machine, and with the version of torch, that wrote it: sums of "
                    "floating point numbers depend on both. No file is damaged.",
                )
            weights = new
        return weights
