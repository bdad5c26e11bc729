"""What is there, what a YAML will touch and cost, and what is missing: before the long work starts.

The model of a YAML is built without its weights, and of those only a few that will be edited are read from disk.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from sphere_plugin.easyedit.host import Host
from sphere_plugin.easyedit.hparams import dtype_of
from sphere_plugin.easyedit.keys import Asked, asked_of, refusal
from sphere_plugin.easyedit.loader import torch_device
from sphere_plugin.easyedit.methods import METHODS, OWN, Method
from sphere_plugin.easyedit.reading import content_of, load_any
from sphere_plugin.easyedit.registration import register, unregister
from sphere_plugin.easyedit.targets import check_matrices, filled, find_weights, layers_of, templates_of
from sphere_plugin.editing.budget import Batch
from sphere_plugin.editing.needs import Where, shape_of, told
from sphere_plugin.errors import HostError, ModelError, SphereError
from sphere_plugin.files import cache_folder, check_writable
from sphere_plugin.geometry import PrincipalSpace, is_transposed, neurons
from sphere_plugin.models.memory import free_bytes, in_words
from sphere_plugin.models.quantised import REMEDY, quantised_by
from sphere_plugin.models.stored import stored_weight, structure
from sphere_plugin.restraints import SphereConfig

Verdict = Literal["ok", "note", "missing"]

LIBRARIES: Final = ("torch", "transformers", "safetensors", "peft", "accelerate", "datasets")
MEASURED: Final = 3  # weights whose principal space is found: the first, the middle, the last


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: a word or two.
        text: what was found, and what to do if something is missing.
        verdict: "missing" where the work cannot start.
    """

    topic: str
    text: str
    verdict: Verdict = "ok"


def examine(path: Path | None = None) -> list[Finding]:
    """Look at the machine, the libraries and EasyEdit, and at what a YAML of any method will do.

    Args:
        path: a YAML of hyper-parameters, EasyEdit's or ours; None leaves that part out.

    Returns:
        Findings in a sensible order. Nothing is raised for what is wrong: that is a finding as well.
    """
    try:
        _ = None if path is None else content_of(path)
    except SphereError as error:  # at once: the rest takes half a minute
        return [Finding("YAML", str(error), "missing")]
    findings = [*_machine(), *_libraries(), *_cache()]
    try:
        host = register()
    except HostError as error:
        return [*findings, Finding("EasyEdit", str(error), "missing")]
    try:
        methods = sum(1 for name in host.alg_dict if name not in OWN)
        findings.append(Finding("EasyEdit", f"{host.describe()} {methods} methods, and {', '.join(sorted(OWN))}"))
        if path is not None:
            findings.extend(_settings(path, host))
    except SphereError as error:
        findings.append(Finding("YAML", str(error), "missing"))
    finally:
        unregister()
    return findings


# ---- the machine ----


def _machine() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    if not torch.cuda.is_available():
        yield Finding("devices", f"cpu only, {in_words(free_bytes('cpu'))} free; write `device: cpu`")
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        yield Finding("devices", f"cuda:{number}, {name}, {in_words(free_bytes(f'cuda:{number}'))} free")


def _libraries() -> Iterator[Finding]:
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            yield Finding(name, 'not installed; it comes with `pip install "sphere-plugin[easyedit]"`', "missing")
        else:
            yield Finding(name, importlib.metadata.version(name))


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    try:
        check_writable(folder / "probe")
    except SphereError as error:
        yield Finding("cache", str(error), "missing")
    else:
        yield Finding("cache", str(folder))


# ---- a YAML ----


def _settings(path: Path, host: Host) -> Iterator[Finding]:
    hparams = load_any(path, host)
    name = hparams.alg_name
    asked = asked_of(hparams) if name not in OWN else None
    yield Finding("method", _method(name, asked), "ok" if asked or name in OWN else "note")
    if asked is not None:
        refused = refusal(name, asked)
        if refused is not None:
            yield Finding("restraint", str(refused), "missing")
            return
    what = METHODS.get(name, Method("nothing"))
    if what.writes == "base":
        hparams = hparams.base_hparams
        what = METHODS[hparams.alg_name]
    if what.writes == "nothing":
        return
    if getattr(hparams, "lora_type", None) == "adalora":
        yield Finding("lora_type", "adalora needs a total_step, which EasyEdit does not pass; write lora", "missing")
    model = structure(hparams.model_name)
    yield Finding("model", f"{hparams.model_name}: {type(model).__name__}, {_count(model) / 1e6:.0f} M parameters")
    beyond = _layers_beyond(model, hparams)
    if beyond:
        yield Finding("layers", f"{beyond} are not there: the model has 0 to {_last_layer(model)}", "missing")
        return
    yield from _modules(model, hparams)
    touched = _touched(model, hparams, what)
    if asked is not None:
        check_matrices(touched)
    weights = {name: weight for name, weight in touched.items() if weight.dim() == 2}
    if not weights:
        yield Finding("weights", "none of those the settings name is a matrix", "missing")
        return
    yield Finding("weights", f"{len(weights)} may be changed: {', '.join(_ends(list(weights)))}")
    sphere = asked.sphere if asked is not None else hparams.sphere() if name in OWN else None
    packed = quantised_by(model.config)
    if packed is not None:
        wrong = what.writes != "adapter"
        more = REMEDY if wrong else "r is not measured."
        yield Finding("quantised", f"the model is quantised ({packed}); {more}", "missing" if wrong else "note")
    yield from _needs(model, hparams) if name in OWN else _cost(model, weights, hparams)
    if sphere is not None and sphere.alpha and packed is None:
        yield from _measured(model, hparams.model_name, list(weights), sphere)


def _method(name: str, asked: Asked | None) -> str:
    if name in OWN:
        return f"{name}, our own editor"
    if asked is None:
        return f"{name} as EasyEdit has it; `sphere: true` in the YAML would project its updates"
    return f"{name} + {asked.label}"


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ends(names: list[str]) -> list[str]:
    return names if len(names) <= 2 * MEASURED else [*names[:MEASURED], "...", *names[-MEASURED:]]


def _last_layer(model: nn.Module) -> int | None:
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return count - 1 if isinstance(count, int) else None


def _layers_beyond(model: nn.Module, hparams: Any) -> list[int]:
    """Numbers of layers that the settings name and the model does not have."""
    last, layers = _last_layer(model), getattr(hparams, "layers", [])
    numbers = [one for one in layers if isinstance(one, int)] if isinstance(layers, list) else []
    return [] if last is None else [one for one in numbers if not 0 <= one <= last]


def _modules(model: nn.Module, hparams: Any) -> Iterator[Finding]:
    """Whether the modules that the settings name are in the model."""
    known = [name for name, _ in model.named_modules() if name]
    for key, value in sorted(vars(hparams).items()):
        if not (key.endswith(("_module_tmp", "_module", "_module_tmps")) and value):
            continue
        first = next(iter(layers_of(hparams)), 0) if hasattr(hparams, "layers") else 0
        for template in templates_of(key, value):
            path = filled(key, template, first).removesuffix(".weight")
            if path not in known:
                near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
                yield Finding(key, f"{path} is not in the model; the nearest is {near}", "missing")


def _touched(model: nn.Module, hparams: Any, what: Method) -> dict[str, nn.Parameter]:
    if what.writes != "adapter":
        return find_weights(model, hparams, what if what.names else METHODS["MEMIT"])
    targets, layers = hparams.target_modules, layers_of(hparams) if getattr(hparams, "layers", None) else []
    ends = tuple(f".{one}" for one in templates_of("target_modules", targets))
    chosen = {}
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        weight = getattr(module, "weight", None)
        meant = name.endswith(ends) and (not layers or any(number in layers for number in numbers))
        if meant and isinstance(weight, nn.Parameter):
            chosen[f"{name}.weight"] = weight
    if not chosen:
        remedy = "Write the last part of module names, as model.named_modules() has them."
        raise ModelError("target_modules", targets, "modules of the model", remedy)
    return chosen


def _needs(model: nn.Module, hparams: Any) -> Iterator[Finding]:
    """What our own editor needs on each device, by its formulas."""
    device = torch_device(hparams.device)
    yield from _absent("device", device)
    config, dtype = hparams.editing(), dtype_of(hparams)
    yield from _absent("stats_device", config.stats_device or "cpu")
    try:
        shape = shape_of(model, config)
    except (AttributeError, ModelError):  # a module that is not there is told above
        return
    where = Where(device, dtype.itemsize, hparams.model_parallel)
    for text, short in told(shape, config, Batch(hparams.batch_size), where):
        yield Finding("memory", f"{str(dtype).removeprefix('torch.')}, {text}", "missing" if short else "ok")


def _cost(model: nn.Module, weights: Mapping[str, Tensor], hparams: Any) -> Iterator[Finding]:
    """Bytes: the model, a copy of what may change, and the largest weight's arithmetic in float32."""
    width = dtype_of(hparams).itemsize
    copies = width * sum(weight.numel() for weight in weights.values())
    largest = max(weights.values(), key=lambda weight: weight.numel())
    # W, its rows at unit length, ΔW and ΔW'; the Gram matrix of the smaller side, its vectors, and LAPACK's copy.
    work = 4 * (4 * largest.numel() + 3 * min(largest.shape) ** 2)
    whole = width * _count(model)
    device = torch_device(getattr(hparams, "device", "cpu"))
    free = free_bytes(device)
    dtype = str(dtype_of(hparams)).removeprefix("torch.")
    text = (
        f"{dtype}: model {in_words(whole)}, copies for undo {in_words(copies)}, "
        f"projection {in_words(work)}, on {device} with {in_words(free)} free; the method's own work comes on top"
    )
    yield from _absent("device", device)
    short = free is not None and whole + copies + work > free
    yield Finding("memory", text + ("; too little: use fp16, model_parallel or a smaller model" if short else ""),
                  "missing" if short else "ok")  # fmt: skip


def _absent(key: str, device: str) -> Iterator[Finding]:
    if device.startswith("cuda") and (not torch.cuda.is_available() or free_bytes(device) is None):
        yield Finding(key, f"{device} is not on this machine; write `{key}: cpu`", "missing")


def _measured(model: nn.Module, name: str, weights: list[str], sphere: SphereConfig) -> Iterator[Finding]:
    """r, the share of an update without a direction of its own that goes, and the time, of a few of the weights."""
    chosen = sorted({0, len(weights) // 2, len(weights) - 1})
    ranks, shares, seconds = [], [], []
    for number in chosen:
        stored = stored_weight(name, weights[number])
        if stored is None:
            yield Finding("projection", "r is not measured: the weights are not in safetensors files here", "note")
            return
        weight = neurons(stored, is_transposed(model.get_submodule(weights[number].removesuffix(".weight"))))
        start = time.perf_counter()
        space = PrincipalSpace.fit(weight, sphere.eta, sphere.row_normalize)
        space.project(weight.float(), sphere.alpha)
        seconds.append(time.perf_counter() - start)
        ranks.append(space.rank)
        shares.append(sphere.alpha * (2 - sphere.alpha) * space.rank / weight.shape[1])
    text = (
        f"η {sphere.eta:g}, α {sphere.alpha:g}: r {min(ranks)} to {max(ranks)} of {weight.shape[1]} directions; of an "
        f"update without a direction of its own, {100 * min(shares):.1f} to {100 * max(shares):.1f} % go; "
        f"{len(weights) * sum(seconds) / len(seconds):.2g} s per apply on this CPU "
        f"(measured on {len(chosen)} of {len(weights)} weights)"
    )
    yield Finding("projection", text)
