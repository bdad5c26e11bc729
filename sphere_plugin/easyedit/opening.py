"""What the plugin adds to EasyEdit's editors when one is made, and before it edits."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sphere_plugin.easyedit.hook import Hooked
from sphere_plugin.easyedit.host import Host
from sphere_plugin.easyedit.hparams import dtype_of
from sphere_plugin.easyedit.keys import asked_of, refusal
from sphere_plugin.easyedit.loader import torch_device
from sphere_plugin.easyedit.method import SphereMethod
from sphere_plugin.easyedit.methods import METHODS, OWN
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.editing.checks import check_device
from sphere_plugin.editing.requests import read_requests
from sphere_plugin.errors import ConfigError, ModelError, RequestError
from sphere_plugin.models import load_model, resolve_model
from sphere_plugin.models.embedded import EMBEDDED_FOLDER, EMBEDDED_NAME
from sphere_plugin.models.placement import input_device
from sphere_plugin.process import ONE_AT_A_TIME, muted

_LOG = logging.getLogger("sphere_plugin")

# EasyEdit's other editors, each in the module of that name.
TEXT_EDITORS: Final = (("concept_editor", "ConceptEditor"), ("safety_editor", "SafetyEditor"))
# Methods whose code in the PyPI release expects all weights on one device; that of main follows the weights.
ON_ONE_DEVICE: Final = frozenset(("MEMIT", "ROME"))
OTHER_EDITORS: Final = (("multimodal_editor", "MultimodalEditor"), ("per_editor", "PerEditor"))
MADE_WITH: Final = "sphere_made_with"  # the restraints that an editor has been made with, as an attribute of it


def open_editors(host: Host, patches: Patches) -> None:
    """Change how EasyEdit's editors are made, and how BaseEditor reads requests for the methods that are ours."""
    base, main = host.base_editor, host.kind == "main"
    patches.attribute(base, "__init__", _opening(vars(base)["__init__"], main, repairs=main))
    for name in ("edit", "batch_edit"):
        patches.attribute(base, name, _checked(getattr(base, name), host.kind))
    for editor in _editors(TEXT_EDITORS):
        patches.attribute(editor, "__init__", _opening(vars(editor)["__init__"], main, repairs=False))
    for editor in _editors(OTHER_EDITORS):
        patches.attribute(editor, "__init__", _refusing(vars(editor)["__init__"]))


def _editors(names: Sequence[tuple[str, str]]) -> Iterator[type]:
    for module, name in names:
        editor = getattr(sys.modules.get(f"{PACKAGE}.editors.{module}"), name, None)
        if editor is not None:
            yield editor


# ---- when an editor is made ----


def _opening(original: Callable[..., None], main: bool, repairs: bool) -> Callable[..., None]:
    """``__init__`` of an editor of text: a session of its own for what it calls to edit.

    The host chooses its loader, and the tokenizer's class, by words in the model's name or path: a folder called
    "t5" or "gpt" anywhere above the model decides. For the methods that are ours, and for the embedded model, the
    model is loaded by what it is and handed over ready-made.

    Editors are made one at a time: the host's table of methods, its loggers, and torch's defaults while a model is
    loaded belong to the whole process.
    """

    @functools.wraps(original)
    def init(self: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
        with ONE_AT_A_TIME:
            open_one(self, hparams, *args, **kwargs)

    def open_one(self: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
        alg_name = getattr(hparams, "alg_name", None)
        asked = None if alg_name in OWN else asked_of(hparams)
        restrained = asked is not None
        if restrained:
            _check_possible(hparams)
        if restrained or alg_name in OWN:
            _check_there(hparams)
        if getattr(hparams, "model_name", None) == EMBEDDED_FOLDER:  # an editor was made with it before
            hparams.model_name = EMBEDDED_NAME
        if alg_name in OWN or getattr(hparams, "model_name", None) == EMBEDDED_NAME:
            _open_loaded(original, self, hparams, *args, **kwargs)
        else:
            _open_by_host(original, self, hparams, *args, **kwargs)
        if str(getattr(hparams, "device", None)) == "meta":  # what the host takes for the device of an offloaded model
            hparams.device = str(input_device(self.model))
        entry = getattr(self, "apply_algo", None)  # ConceptEditor has none where it edits by prompt
        if isinstance(entry, SphereMethod):
            self.apply_algo = entry.session()
            self.apply_algo.open(self.model, self.tok, hparams)
        elif isinstance(entry, Hooked):
            if restrained:
                _check_placed(self.model, hparams.alg_name, main)
            if restrained and any(METHODS[name].reads_right for name in _methods(hparams)):
                self.tok.padding_side = "right"  # the host forgets some of them
            self.apply_algo = entry.session(hparams, repairs)
            setattr(self, MADE_WITH, asked)

    return init


def _check_there(hparams: Any) -> None:
    """Refuse a device that this machine has not; with model_parallel accelerate takes those that it has."""
    device = getattr(hparams, "device", "meta")  # what the host takes for the device of an offloaded model
    if not getattr(hparams, "model_parallel", False) and device != "meta":
        check_device("device", torch_device(device), "Write `device: cpu`, or the number of a GPU.")


def _check_possible(hparams: Any) -> None:
    """Refuse what cannot be restrained before a model is loaded."""
    table, asked = sys.modules[f"{PACKAGE}.util.alg_dict"].ALG_DICT, asked_of(hparams)
    for name in _methods(hparams):
        refused = refusal(name, asked) if asked is not None and isinstance(table.get(name), Hooked) else None
        if refused is not None:
            raise refused


def _methods(hparams: Any) -> tuple[str, ...]:
    """The method, and the one that SimIE leaves the writing to."""
    method = METHODS.get(hparams.alg_name)
    through = method is not None and method.writes == "base"
    return (hparams.alg_name, hparams.base_method) if through else (hparams.alg_name,)


def _check_placed(model: Any, method: str, main: bool) -> None:
    """Refuse a model that lies where EasyEdit's own code for this method cannot edit it.

    Raises:
        ModelError: weights are offloaded, or on more than one device.
    """
    remedy = "Take SPHERE's own editor (alg_name: SPHERE, RECT or PRUNE), which edits such models"
    for name, weight in model.named_parameters():
        if weight.is_meta:
            got = "offloaded: its values are not in memory"
            whole = f"{remedy}, or load all of it: more GPUs, a smaller dtype."
            raise ModelError(name, got, f"a weight in memory, since EasyEdit's {method} reads weights itself", whole)
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if not main and len(devices) > 1 and method in ON_ONE_DEVICE:
        expected = f"one device: this release of EasyEdit mixes devices in {method}"
        raise ModelError("model", f"weights on {', '.join(devices)}", expected, f"{remedy}, or set EASYEDIT_HOME.")


def _open_by_host(original: Callable[..., None], editor: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
    """Leave the loading to the host; a causal model whose name has none of the words it knows is loaded here."""
    try:
        with muted():  # it says that it writes a log
            original(editor, hparams, *args, **kwargs)
    except NotImplementedError:
        _LOG.info("EasyEdit knows no word of %s: the model is loaded by what it is", hparams.model_name)
        _open_loaded(original, editor, hparams, *args, **kwargs)


def _open_loaded(original: Callable[..., None], editor: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
    """Make the editor with a model that is loaded already; what words in its name decide is decided here.

    Raises:
        ConfigError: the model is to be quantised, which only the host does.
    """
    name = hparams.model_name
    if isinstance(name, str):
        _check_plain(hparams)
        device_map = "auto" if getattr(hparams, "model_parallel", False) else None
        hparams.model_name = load_model(name, dtype=dtype_of(hparams), device_map=device_map)
    try:
        with muted():
            original(editor, hparams, *args, **kwargs)
    finally:
        hparams.model_name = name
    # The evaluators and some methods look for words in the name as well.
    if hparams.alg_name in OWN:
        editor.model_name = type(editor.model).__name__
    else:
        editor.model_name = Path(resolve_model(name)).name
        if name == EMBEDDED_NAME:
            hparams.model_name = editor.model_name
    method = METHODS.get(hparams.alg_name)
    editor.tok.padding_side = "right" if method is not None and method.reads_right else "left"
    if editor.tok.pad_token is None:
        editor.tok.pad_token = editor.tok.eos_token
    if hasattr(editor, "_locate_toxic_layer"):  # SafetyEditor looks into the layers, and loads its models so
        editor.model.config.output_hidden_states = True
    editor.model.eval()


def _check_plain(hparams: Any) -> None:
    bits = getattr(hparams, "quantization_bit", None)
    if hparams.alg_name == "QLoRA" and bits:
        got = f"{hparams.model_name}, to be loaded in {bits} bits"
        expected = "a model whose name has a word that EasyEdit knows (llama, qwen, gpt, ...): only then it quantises"
        remedy = "Name the folder so, hand over a loaded model and its tokenizer as model_name, or take LoRA."
        raise ConfigError("model_name", got, expected, remedy)


def _refusing(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of an editor of images or of personality, which the hook does not reach."""

    @functools.wraps(original)
    def init(self: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
        asked = asked_of(hparams)
        if asked is not None:
            remedy = "Take the key out of the YAML, or edit text with BaseEditor."
            raise ConfigError(asked.label, type(self).__name__, "an editor of facts in text", remedy)
        original(self, hparams, *args, **kwargs)

    return init


# ---- before it edits ----


def _checked(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """BaseEditor.edit and batch_edit, with checks before the first fact is scored.

    Of our methods the requests are read; of EasyEdit's the keys must be those that the editor has been made with.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.alg_name not in OWN:
            _check_unchanged(self)
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


def _check_unchanged(editor: Any) -> None:
    """Raise ConfigError if the keys of an editor's settings have been changed since it was made."""
    now, made = asked_of(editor.hparams), getattr(editor, MADE_WITH, None)
    if now != made:
        got = "set to nothing" if now is None else f"set to {now.label}"
        expected = f"what it was made with, {'none of them' if made is None else made.label} and the same numbers"
        remedy = "Make another editor with these settings: what restrains an edit belongs to the editor."
        raise ConfigError("the keys sphere, rect and prune of the editor's settings", got, expected, remedy)


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
                name, f"{len(column)} entries", f"one for each of the {count} prompts", "All three lists are needed."
            )
    return [
        {"prompt": prompt, "target_new": target, "subject": subject}
        for prompt, target, subject in zip(*columns.values(), strict=True)
    ]


def _column(values: Any) -> Sequence[Any]:
    if values is None:
        return []
    return values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
