"""Make SPHERE one of EasyEdit's methods, and take it out again without a trace."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sphere_plugin.easyedit.host import Host, load_host
from sphere_plugin.easyedit.hparams import ALG_NAME
from sphere_plugin.easyedit.method import SphereMethod
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.errors import RequestError
from sphere_plugin.models import load_model

_LOG = logging.getLogger("sphere_plugin")


def register() -> Host:
    """Load EasyEdit and enter SPHERE under that name; calling it again changes nothing.

    Where EasyEdit has a SPHERE of its own, ours takes its place until :func:`unregister`, and the log says so. What
    is registered lives in EasyEdit's own table of methods; this package keeps no record beside it.

    Returns:
        The host that was found.

    Raises:
        HostError: there is no EasyEdit, or it cannot be loaded.
    """
    host = load_host()
    if isinstance(host.alg_dict.get(ALG_NAME), SphereMethod):
        return host
    replaced = host.alg_dict.get(ALG_NAME)
    patches = _Patches()
    try:
        _patch(host, patches)
    except BaseException:
        patches.undo()
        raise
    host.alg_dict[ALG_NAME] = SphereMethod(
        restoring="by editor" if host.kind == "main" else "by method",
        undo=functools.partial(_undo, host, replaced, patches),
    )
    note = "in place of EasyEdit's own, until unregister()" if replaced is not None else "as a new method"
    _LOG.info("SPHERE is registered %s: %s", note, host.describe())
    return host


def _patch(host: Host, patches: _Patches) -> None:
    batchable = host.batch_editor.is_batchable_method  # type: ignore[attr-defined]
    patches.set(
        host.batch_editor, "is_batchable_method", staticmethod(lambda name: name == ALG_NAME or batchable(name))
    )
    patches.set(host.base_editor, "__init__", _opening(vars(host.base_editor)["__init__"]))
    for name in ("edit", "batch_edit"):
        patches.set(host.base_editor, name, _checked(getattr(host.base_editor, name), host.kind))


def unregister() -> None:
    """Put EasyEdit back exactly as it was; without a registration it does nothing.

    Editors that exist already go on with what they were made with.
    """
    table = sys.modules.get(f"{PACKAGE}.util.alg_dict")
    entry = getattr(table, "ALG_DICT", {}).get(ALG_NAME)
    if isinstance(entry, SphereMethod):
        entry.undo()


class _Patches:
    """Attributes of EasyEdit's classes that were replaced, and what stood there."""

    def __init__(self) -> None:
        self._originals: list[tuple[type, str, object]] = []

    def set(self, owner: type, name: str, value: object) -> None:
        self._originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)


def _undo(host: Host, replaced: Callable[..., Any] | None, patches: _Patches) -> None:
    patches.undo()
    if replaced is None:
        del host.alg_dict[ALG_NAME]
    else:
        host.alg_dict[ALG_NAME] = replaced
    _LOG.info("SPHERE is unregistered")


def _opening(original: Callable[..., None]) -> Callable[..., None]:
    """BaseEditor.__init__ for SPHERE: any causal language model, right padding, errors before the first edit.

    The host chooses its loader, and the tokenizer's class, by words in the model's name or path: a folder called
    "t5" or "gpt" anywhere above the model decides. Here the model is loaded by what it is and handed over ready-made.
    """

    @functools.wraps(original)
    def init(self: Any, hparams: Any) -> None:
        if getattr(hparams, "alg_name", None) != ALG_NAME:
            original(self, hparams)
            return
        name = hparams.model_name
        if isinstance(name, str):
            dtype = torch.float16 if getattr(hparams, "fp16", False) else torch.float32
            device_map = "auto" if getattr(hparams, "model_parallel", False) else None
            hparams.model_name = load_model(name, dtype=dtype, device_map=device_map)
        try:
            original(self, hparams)
        finally:
            hparams.model_name = name
        # The evaluators look for words in the name as well.
        self.model_name = type(self.model).__name__
        self.tok.padding_side = "right"
        if self.tok.pad_token is None:
            self.tok.pad_token = self.tok.eos_token
        self.model.eval()
        self.apply_algo = self.apply_algo.session()
        self.apply_algo.open(self.model, self.tok, hparams)

    return init


def _checked(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """BaseEditor.edit and batch_edit for SPHERE: requests are checked before the first of them is scored."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.alg_name != ALG_NAME:
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        more = {**given.arguments, **given.arguments.get("kwargs", {})}
        if more.get("requests") is None:
            facts = read_requests(_requests(more["prompts"], more["target_new"], more.get("subject")))
            written = [fact.prompt for fact in facts]  # the host wants subjects written out
            given.arguments["prompts"] = written[0] if isinstance(more["prompts"], str) else written
        else:
            read_requests(more["requests"])
        if kind == "pypi":
            _as_pypi_says(given.arguments)
        return original(*given.args, **given.kwargs)

    return call


def _as_pypi_says(arguments: dict[str, Any]) -> None:
    """Put arguments that main reads, and the 2023 release swallows or trips over, into that release's words."""
    extra = arguments.get("kwargs", {})
    if "sequential_edit" in extra:
        arguments["keep_original_weight"] = not extra.pop("sequential_edit")
    # Its batch_edit hands its locality_prompts on as locality_inputs, and locality_ground_truth as portability_inputs.
    for ours, theirs in (("locality_inputs", "locality_prompts"), ("portability_inputs", "locality_ground_truth")):
        if ours in extra:
            arguments[theirs] = extra.pop(ours)


def _requests(prompts: Any, targets: Any, subjects: Any) -> list[dict[str, Any]]:
    columns = {"prompts": _column(prompts), "target_new": _column(targets), "subject": _column(subjects)}
    count = len(columns["prompts"])
    for name, column in columns.items():
        if len(column) != count:
            raise RequestError(
                name, f"{len(column)} entries", f"one for each of the {count} prompts", "SPHERE needs all three lists."
            )
    return [
        {"prompt": prompt, "target_new": target, "subject": subject}
        for prompt, target, subject in zip(*columns.values(), strict=True)
    ]


def _column(values: Any) -> Sequence[Any]:
    if values is None:
        return []
    return values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
