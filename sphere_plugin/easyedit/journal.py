"""``with sp.journal(editor) as j``: edits of a BaseEditor are recorded and can be taken back, whatever the method."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from sphere_plugin._version import __version__
from sphere_plugin.easyedit.method import Session
from sphere_plugin.easyedit.methods import METHODS, Method
from sphere_plugin.easyedit.targets import unrestrained_writes, weights_of
from sphere_plugin.errors import ConfigError, ModelError
from sphere_plugin.files import write_json
from sphere_plugin.journaling import Journal, all_or_nothing, run_lock
from sphere_plugin.journaling.batch import orientations
from sphere_plugin.journaling.exporting import Exported, Format, export_batches
from sphere_plugin.paths import user_path

Weights = dict[str, nn.Parameter]
_MANIFEST: Final = "manifest.json"


@contextmanager
def journal(editor: Any, folder: Path | str | None = None) -> Iterator[EditorJournal]:
    """Record the edits of EasyEdit's ``editor`` while the block runs.

    The weights stay as they are when the block ends, and the editor then edits as it did before.

    Args:
        editor: a BaseEditor for any method that writes weights, SPHERE among them.
        folder: keeps the journal, for ``sphere undo`` and ``sphere export``; must not hold one already. None: it goes
            to a temporary folder and is deleted at the end.

    Raises:
        ConfigError: the method writes no weights, or the editor or the folder has a journal already.
        CacheError: the folder cannot be written, or another process writes there.

    Example:
        >>> with sp.journal(editor) as j:                                                   # doctest: +SKIP
        ...     editor.edit(prompts, target_new, subject=subjects, sequential_edit=True)
        ...     j.undo(3)
    """
    if isinstance(getattr(editor.apply_algo, "__self__", None), EditorJournal):
        remedy = "Use the journal that is there, or end its block first."
        raise ConfigError("the editor", "one with a journal", "an editor without one", remedy)
    with ExitStack() as stack:
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sphere-journal-")))
        else:
            place = user_path(folder)
        stack.enter_context(run_lock(place))
        one = EditorJournal(editor, place)
        editor.apply_algo = one.call
        try:
            yield one
        finally:
            editor.apply_algo = one.method
            if folder is not None:
                one.settle()


@dataclass(frozen=True)
class Edit:
    """One call of the method, still in the weights.

    Attributes:
        batch: its number in the journal.
        facts: `prompt`, `subject` and `target_new` of each.
        seconds: that it took.
    """

    batch: int
    facts: tuple[Mapping[str, Any], ...]
    seconds: float


class EditorJournal:
    """What `journal` gives: the edits that are in the weights, and the way back.

    Attributes:
        folder: of the journal, laid out as that of a run.
        store: its batches. A batch is one call of the method, or a change that somebody else made in between.
    """

    def __init__(self, editor: Any, folder: Path) -> None:
        self.folder = folder
        self.method: Callable[..., Any] = editor.apply_algo
        self._editor = editor
        self._model: nn.Module = editor.model
        weights = _touched(editor, self.method)
        turned = orientations(self._model, weights)
        if (folder / _MANIFEST).exists():
            remedy = "Choose another folder: what is in it, or was taken back there, can still be wanted."
            raise ConfigError("the journal", str(folder), "a folder without one, or a run", remedy)
        self.store = Journal.create(folder / "journal", weights, turned, self._masters())
        write_json(folder / _MANIFEST, _manifest(editor, self.store))

    @property
    def edits(self) -> list[Edit]:
        """The edits that are in the weights now, the first one first."""
        self.settle()
        records = [self.store.record(number) for number in range(1, len(self.store) + 1)]
        made = [record for record in records if not record.get("outside")]
        return [Edit(one["batch"], tuple(one["facts"]), one["seconds"]) for one in made]

    def undo(self, n: int = 1) -> list[Edit]:
        """Take the last ``n`` edits back: the weights are, bit for bit, what they were before them.

        What somebody else changed after the first of these goes with them; what was changed before stays.

        Returns:
            The edits that were taken back, the first one first.

        Raises:
            ConfigError: there are not so many.
        """
        edits = self.edits
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(edits):
            expected = f"a number from 1 to {len(edits)}" if edits else "an edit that is in the weights"
            remedy = "Edits that EasyEdit took back itself do not count; sequential_edit=True lets them stand."
            raise ConfigError("the number of edits to take back", n, expected, remedy)
        number = edits[-n].batch - 1
        self.store.restore(number, self._live())
        self.store.truncate(number)
        self._remind(number)
        return edits[-n:]

    def export(self, out: Path | str, format: Format = "hf", rank: int | None = None) -> Exported:
        """Export what is in the weights now; see :func:`sphere_plugin.export`."""
        self.settle()
        manifest = _manifest(self._editor, self.store)
        parts = (self._model, self._editor.tok)
        target = user_path(out)
        return export_batches(self.store, len(self.store), manifest, target, format, rank, lambda weights: parts)

    def settle(self) -> None:
        """Bring the journal up to date with the weights as they are.

        EasyEdit takes an edit back by itself once it is scored, unless edits are sequential: such records are dropped.
        Weights that somebody else has written become a record of their own.
        """
        live = self._live()
        now = self.store.fingerprint_of(live)
        for number in range(len(self.store), -1, -1):
            if now == self.store.fingerprint(number):
                if number < len(self.store):
                    self.store.truncate(number, keep=False)
                    self._remind(number)
                return
        self.store.append({"edits": self._count(), "facts": [], "seconds": 0.0, "outside": True}, live)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the editor calls to edit meanwhile: the method, recorded.

        Raises:
            ModelError: the method edits another model than the one the journal is of, or other weights of it.
            Exception: whatever the method raises; the weights are then as they were before the call.
        """
        self._check_same(args[0] if args else kwargs.get("model"), "the editor's model")
        self.settle()
        new = [name for name in _touched(self._editor, self.method) if name not in self.store.names]
        if new:
            remedy = "End the block and open another: the settings name other layers than when it was opened."
            raise ModelError("the weights to be edited", new[0], "those the journal has", remedy)
        live, started, edited = self._live(), time.perf_counter(), False
        try:
            with all_or_nothing(live):
                strays = unrestrained_writes(self._model, live)
                result = self.method(*args, **kwargs)
                edited = True
                self._check_same(result[0], f"the model that {self._editor.alg_name} edited")
                if not isinstance(self.method, Session):
                    strays.warn(self._editor.alg_name)
                self._record(_requests(args, kwargs), time.perf_counter() - started)
        except BaseException:
            if edited:  # and undone, as it could not be recorded
                self._remind(len(self.store))
            raise
        return result

    def _record(self, requests: Sequence[Mapping[str, Any]], seconds: float) -> None:
        facts = [
            {"record": None, **{key: str(request.get(key) or "") for key in ("prompt", "subject", "target_new")}}
            for request in requests
        ]
        report = self.method.report if isinstance(self.method, Session) else None
        updates = {} if report is None else {layer.name: layer.update for layer in report.layers}
        keys = {} if report is None else {self._names()[layer]: one for layer, one in report.keys.items()}
        record = {"edits": self._count() + len(facts), "facts": facts, "seconds": seconds}
        self.store.append(record, self._live(), updates, keys, self._masters())

    def _remind(self, number: int) -> None:
        """Have our own editor know the keys of the first ``number`` batches, and of no others, and its master copies.

        As after an edit, what was there before somebody else's change is forgotten. Edits that were made before the
        journal was opened, or by an editor with other settings, are not this editor's: it is left to tell from the
        weights, and where it cannot it says that it starts anew.
        """
        editor = self.method.editor if isinstance(self.method, Session) else None
        if editor is None or editor.pretrained.tensors.keys() != set(self.store.names):
            return
        if self.store.fingerprint_of(editor.pretrained.tensors) != self.store.fingerprint(0):
            return
        foreign = [batch for batch in range(1, number + 1) if self.store.record(batch).get("outside")]
        known = (self.store.keys(batch) for batch in range(max(foreign, default=0) + 1, number + 1))
        batches = ({layer: keys[name] for layer, name in self._names().items()} for keys in known if keys)
        editor.resume(batches, self.store.masters_after(number))

    def _masters(self) -> Mapping[str, Tensor]:
        """Master copies of the weights as they are, of our own editor."""
        editor = self.method.editor if isinstance(self.method, Session) else None
        return {} if editor is None else editor.masters

    def _names(self) -> dict[int, str]:
        """Layer -> name of its weight, of our own editor."""
        editor = self.method.editor if isinstance(self.method, Session) else None
        return {} if editor is None else {layer: one.name for layer, one in editor.anatomy.rewrites.items()}

    def _count(self) -> int:
        return self.store.edits()

    def _live(self) -> Weights:
        return {name: self._model.get_parameter(name) for name in self.store.names}

    def _check_same(self, model: object, what: str) -> None:
        if model is not self._model:
            remedy = "End the block and open another for that model; a method may also have kept an earlier one."
            raise ModelError(what, type(model).__name__, "the model the journal was opened on", remedy)


def _touched(editor: Any, method: Callable[..., Any]) -> Weights:
    """The weights that the editor's ``method`` may write, by name.

    Raises:
        ConfigError: it writes none, or it is not known which.
    """
    name, hparams = editor.alg_name, editor.hparams
    if isinstance(method, Session):
        return method.open(editor.model, editor.tok, hparams).anatomy.weights
    what = METHODS.get(name)
    if what is not None and what.writes == "base":
        name, hparams = hparams.base_method, hparams.base_hparams
        what = METHODS.get(name)
    if what is not None and what.writes == "own":
        what = Method("weights", "rewrite_module_tmp")  # EasyEdit's own, where ours is not registered
    if what is None or what.writes != "weights":
        why = {"adapter": "it trains an adapter beside the weights"}.get(what.writes, what.why_not) if what else ""
        got = why or "an unknown method"
        remedy = "docs/methods.md lists those that do."
        raise ConfigError(f"a journal of {name}", got, "a method that writes weights", remedy)
    return weights_of(editor.model, hparams, what)


def _requests(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = args[2] if len(args) > 2 else kwargs.get("requests", ())
    return [given] if isinstance(given, Mapping) else list(given)


def _manifest(editor: Any, store: Journal) -> dict[str, Any]:
    """What a run's manifest says, as far as there is a run."""
    settings = {key: value for key, value in vars(editor.hparams).items() if not key.startswith("_")}
    plain = {key: value for key, value in settings.items() if _is_plain(value)}
    dtype = str(editor.model.get_parameter(store.names[0]).dtype).removeprefix("torch.")
    name = getattr(editor.model, "name_or_path", "") or None
    return {
        "format": 1,
        "entry": str(editor.alg_name).lower(),
        "label": editor.alg_name,
        "method": {"alg_name": editor.alg_name, "hparams": plain},
        "model": {"name": name, "dtype": dtype, "weights": store.fingerprint(0)},
        "threads": torch.get_num_threads(),
        "versions": {"sphere-plugin": __version__, "torch": str(torch.__version__)},
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float)
