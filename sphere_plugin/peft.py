"""SPHERE for LoRA adapters; the only file that knows PEFT.

A LoRA adds ΔW = s·B·A to a weight W [d_out, d_in]; A is [r, d_in], B is [d_out, r], s the scaling. With U [d_in, k],
the principal space of W,

    ΔW P⊥ = s·B·(A − α (A U) Uᵀ),   P⊥ = I − α U Uᵀ,

so projecting the rows of A alone gives an adapter of the same rank and scaling, exactly. This holds for `nn.Linear`,
for transformers' `Conv1D`, which stores Wᵀ but has the same A, and for rsLoRA, which only has another s. An adapter
never writes to the weight it belongs to, so `basis: current` and `pretrained` both mean the base weight.

- ``project_adapter``: write a projected LoRA beside the raw one, in a live model.
- ``project_saved_adapter``: the same, from folder to folder.
- ``save_lora``: write factors of updates as a LoRA.
- ``lora_layers``, ``check_adapter``, ``check_layer``, ``base_weight``, ``project_layers``: what others take.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from sphere_plugin.errors import ConfigError, HostError, ModelError, SphereError
from sphere_plugin.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from sphere_plugin.folders import check_sums, refuse_existing
from sphere_plugin.geometry import Factors, PrincipalSpace, is_transposed, neurons
from sphere_plugin.models import load_model
from sphere_plugin.paths import user_path
from sphere_plugin.projection import LayerProjection, ProjectionReport, reported
from sphere_plugin.restraints import SphereConfig

if TYPE_CHECKING:
    from peft import PeftModel

_PLAIN_LORA: Final = "Train a plain LoRA instead, or the full weights with SphereCallback."
_CONVERT: Final = "Make it plain with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
# A field of LoraConfig, the values that do no harm, what was expected and why, what to do.
_PLAIN: Final[tuple[tuple[str, tuple[Any, ...], str, str], ...]] = (
    ("use_dora", (False,), "False: DoRA rescales W + ΔW, so a projected A does not give W + ΔW P⊥", _PLAIN_LORA),
    ("init_lora_weights", (True, False, "gaussian", "eva", "orthogonal"), "one that leaves W alone", _CONVERT),
    ("bias", ("none",), '"none": PEFT keeps trained biases in the base model, for one adapter only', _PLAIN_LORA),
    ("target_parameters", (None, []), "none: of stacked experts ΔW is not one matrix", _PLAIN_LORA),
    ("trainable_token_indices", (None,), "none: rows of the embedding are not s·B·A", _PLAIN_LORA),
    ("ensure_weight_tying", (False,), "False: a tied layer's A belongs to two weights", _PLAIN_LORA),
    ("layer_replication", (None, []), "none: PEFT would replicate the layers again", _PLAIN_LORA),
)
_QUANTISED: Final = frozenset({"aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao"})  # PEFT's own files


def project_adapter(
    peft_model: PeftModel, name: str = "default", config: SphereConfig | None = None, new_adapter: str | None = None
) -> ProjectionReport:
    """Write a projected copy of a LoRA adapter beside it; merged, it gives W + ΔW P⊥.

    The old adapter stays as it is and can be selected again with ``set_adapter``; the new one has the same rank,
    scaling, B, biases, dropout and `modules_to_save`, and is active afterwards, as with PEFT's
    ``reduce_intruder_dimension``. A is projected in float32 and cast to its own dtype once.

    Args:
        peft_model: with the LoRA adapter on `nn.Linear` or transformers' `Conv1D` layers of a floating point model.
        name: of the adapter to project.
        config: η, α and row_normalize; ``basis`` makes no difference, see above. By default SPHERE's.
        new_adapter: name of the new adapter; by default the old one with "-sphere" behind it.

    Raises:
        ConfigError: an unknown or existing name, another kind of adapter, a LoRA that ΔW = s·B·A does not describe.
        ModelError: a layer that cannot be projected: quantised, merged, an embedding, a convolution.
        HostError: PEFT is not installed. Whatever is raised, the model is as it was before.
    """
    new = f"{name}-sphere" if new_adapter is None else new_adapter
    layers = _checked_layers(peft_model, name)
    if not new or "." in new:
        raise ConfigError("new_adapter", new, "a name without a dot", 'Leave it out for the old name and "-sphere".')
    if new in peft_model.peft_config:
        raise ConfigError("new_adapter", new, "a new name", "Choose another, or delete_adapter the one that has it.")
    projected = project_layers(layers, name, config or SphereConfig())
    settings = copy.deepcopy(peft_model.peft_config[name])
    with _whole_or_not(peft_model, new, settings):
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights, which are replaced below
            peft_model.add_adapter(new, settings)
        _fill(peft_model, layers, name, new, {title: a for title, (a, _) in projected.items()})
        peft_model.set_adapter(new, inference_mode=settings.inference_mode)
    return reported(new, {title: layer for title, (_, layer) in projected.items()})


def project_saved_adapter(
    source: Path | str,
    target: Path | str,
    base: str,
    config: SphereConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> ProjectionReport:
    """Project a LoRA adapter in a folder into a new folder, whole or not at all.

    Every tensor but the A matrices is copied bit for bit, and ``adapter_config.json`` as well; all keep their dtype.
    ``sphere.json`` records how it was made. Tokenizer files and model cards are not copied.

    Args:
        source: the folder that ``save_pretrained`` wrote.
        target: the folder to make.
        base: the model it was trained on: a local folder, a Hugging Face name, or "smollm2-135m".
        config: as in ``project_adapter``.
        dtype: the base model is loaded in; bfloat16 halves the memory and loses nothing if it was published so.

    Raises:
        ConfigError, ModelError, HostError: as ``project_adapter``; ``target`` exists; ``base`` does not fit.
        CacheError: a file cannot be read, or ``target`` cannot be written.
    """
    peft, config = peft_library(), config or SphereConfig()
    source, target = user_path(source), user_path(target)
    refuse_existing(target)
    settings, tensors = _saved(source)
    model, _ = load_model(base, dtype)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(source))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # sizes or names that do not fit
        raise _wrong_base(base, source, str(error).strip().splitlines()[0]) from error
    layers = _checked_layers(adapted, "default")
    titles = {f"{title}.lora_A.weight": title for title in layers}
    strange = titles.keys() ^ {key for key in tensors if ".lora_A." in key}
    if strange:
        raise _wrong_base(base, source, f"{min(strange)} is only in one of them")
    dtypes = {title: tensors[key].dtype for key, title in titles.items()}  # PEFT loads 16 bits as float32
    projected = project_layers(layers, "default", config, dtypes)
    tensors.update({key: projected[title][0] for key, title in titles.items()})
    report = reported(target.name, {title: layer for title, (_, layer) in projected.items()})
    with atomic_folder(target, keep=refuse_existing) as folder:
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "adapter_config.json", settings, marked=False)
        write_json(folder / "sphere.json", _record(report, base, config))
    return report


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA layers by name; none where PEFT was never imported, for then there can be none."""
    lora = sys.modules.get("peft.tuners.lora")
    return {n: m for n, m in model.named_modules() if lora is not None and isinstance(m, lora.LoraLayer)}


def check_adapter(settings: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError unless ``settings``, a model's ``peft_config``, has a LoRA ``name`` that adds s·B·A only."""
    if name not in settings:
        raise ConfigError("name", name, f"an adapter of the model: {', '.join(settings)}", "Pass one of these names.")
    kind = str(getattr(settings[name].peft_type, "value", settings[name].peft_type))
    if kind != "LORA":
        raise ConfigError(f"the type of adapter {name!r}", kind, "LORA, whose ΔW is s·B·A", _PLAIN_LORA)
    for key, plain, expected, remedy in _PLAIN:
        value = getattr(settings[name], key, plain[0])
        if value not in plain:
            raise ConfigError(f"{key} of adapter {name!r}", value, expected, remedy)


def check_layer(title: str, layer: Any, name: str, quantised: bool = False) -> None:
    """Raise ModelError unless adapter ``name`` of a LoRA layer is s·B·A beside a floating point matrix W.

    Args:
        title: the layer's name, for the message.
        layer: PEFT's.
        name: of the adapter.
        quantised: take bitsandbytes' layers, too, whose W is worked out from its packed form.
    """
    kind = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
    weight = getattr(layer.get_base_layer(), "weight", None)
    known = (peft_library().tuners.lora.Linear,)
    if quantised and kind.startswith("bnb."):
        known, weight = (type(layer),), None
        kind = "Linear"
    narrow = isinstance(weight, Tensor) and not (weight.is_floating_point() and weight.element_size() > 1)
    if narrow or kind.partition(".")[0] in _QUANTISED:
        got = f"{getattr(weight, 'dtype', None)} in a {kind}"
        remedy = "Load the base in bfloat16 or float32, without quantization_config, and this adapter onto it."
        raise ModelError(f"the base weight of {title}", got, "floating point numbers, not quantised ones", remedy)
    if type(layer) not in known:
        expected = "LoRA on nn.Linear or transformers' Conv1D; the rest has no matrix whose rows are neurons"
        raise ModelError(f"the type of {title}", kind, expected, "Leave this layer out of target_modules.")
    is_transposed(layer.get_base_layer())  # raises for what is neither
    if layer.merged_adapters:
        remedy = "Call unmerge_adapter() first: a merged adapter is in the base weight that U is taken from."
        raise ModelError(f"the adapters merged into {title}", list(layer.merged_adapters), "none", remedy)
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:
        raise ModelError(f"the variant of LoRA in {title}", type(variant).__name__, "plain LoRA", _PLAIN_LORA)
    for side, matrix in (("A", layer.lora_A[name].weight), ("B", layer.lora_B[name].weight)):
        if not bool(torch.isfinite(matrix).all()):
            remedy = "Load a checkpoint from before training diverged."
            raise ModelError(f"{side} of {title}", "NaN or infinite entries", "finite entries", remedy)


def base_weight(layer: Any) -> Tensor:
    """Return W [d_out, d_in] of a LoRA layer.

    Where W is stored in 4 or 8 bits it is read off the layer, W I: packed forms differ by device and by version.
    """
    base = layer.get_base_layer()
    if base.weight.is_floating_point():
        return neurons(base.weight.detach(), is_transposed(base))
    with torch.no_grad():
        unit = torch.eye(base.in_features, dtype=torch.float32, device=base.weight.device)
        weight: Tensor = base(unit) - base(torch.zeros_like(unit[:1]))
    return weight.T


def project_layers(
    layers: Mapping[str, Any], name: str, config: SphereConfig, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, tuple[Tensor, LayerProjection]]:
    """Compute the projected A [r, d_in] of adapter ``name`` by layer, in A's dtype or ``dtypes``; write nothing.

    Raises:
        ModelError: a base weight has no principal space; the message names the layer.
    """
    results = {}
    for title, layer in layers.items():
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        try:
            space = PrincipalSpace.fit(base_weight(layer), config.eta, config.row_normalize)
        except SphereError as error:
            raise ModelError(f"{title}: {error.culprit}", error.got, error.expected, error.remedy) from error
        wide = torch.promote_types(a.dtype, torch.float32)
        # With B = Q R, Q's columns orthonormal, s R A [r, d_in] has the norms of ΔW [d_out, d_in] before and behind U.
        small = torch.linalg.qr(b.to(wide), mode="r").R
        update = layer.scaling[name] * (small @ a.to(wide))
        share, energy = space.removed_share(update, config.alpha), float(update.double().square().sum())
        exact = space.project(a.to(wide), config.alpha)
        projected = exact.to(a.dtype if dtypes is None else dtypes[title])
        asked = float(torch.linalg.vector_norm(small @ exact))
        lost = float(torch.linalg.vector_norm(small @ (projected - exact))) / asked if asked else 0.0
        results[title] = projected, LayerProjection(space.rank, share, energy, lost)
    return results


def _checked_layers(model: PeftModel, name: str) -> dict[str, Any]:
    if not isinstance(model, peft_library().PeftModel):
        remedy = "Load the adapter with PeftModel.from_pretrained, or make one with get_peft_model."
        raise ConfigError("peft_model", type(model).__name__, "a PeftModel", remedy)
    check_adapter(model.peft_config, name)
    layers = {title: layer for title, layer in lora_layers(model).items() if name in layer.r}
    if not layers:
        raise ConfigError(f"the layers of adapter {name!r}", 0, "at least one", "Name its target_modules.")
    for title, layer in layers.items():
        check_layer(title, layer, name)
    return layers


@contextmanager
def _whole_or_not(model: PeftModel, new: str, settings: Any) -> Iterator[None]:
    """Remove adapter ``new`` if the block raises, and make active and trainable again what was so before."""
    attribute, active = model.active_adapter, list(model.active_adapters)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        model.base_model.set_adapter(active)
        model.peft_config.setdefault(new, settings)  # PEFT forgets the name of an adapter that it added in part
        model.delete_adapter(new)
        model.active_adapter = attribute
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _fill(model: PeftModel, layers: Mapping[str, Any], name: str, new: str, projected: Mapping[str, Tensor]) -> None:
    """Make adapter ``new`` a copy of ``name`` with other A: in the same dtype, in train mode only if that one is."""
    strange = layers.keys() ^ {title for title, layer in lora_layers(model).items() if new in layer.r}
    if strange:
        remedy = "Write target_modules so that they name the same layers as when the adapter was made."
        raise ModelError("the layers of the new adapter", sorted(strange), "those of the old one", remedy)
    for title, layer in layers.items():
        for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            part[new] = copy.deepcopy(part[name])
        layer.lora_A[new].weight.data = projected[title]
        layer.scaling[new] = layer.scaling[name]
    for module in model.modules():
        trained = getattr(module, "modules_to_save", None)
        if isinstance(trained, nn.ModuleDict) and name in trained:
            trained[new] = copy.deepcopy(trained[name])


def _saved(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read settings and tensors of a saved adapter, and refuse before a base model is loaded what can be refused."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (source / name).is_file():
            remedy = (
                "Give the folder that save_pretrained wrote; adapters with a name of their own lie one folder down."
            )
            raise ConfigError("the adapter", str(source), f"a folder with {name}", remedy)
    check_sums(source)
    settings: dict[str, Any] = read_json(source / "adapter_config.json")
    remedy = "Save the adapter again, with this version of PEFT."
    tensors, _ = read_tensors(source / "adapter_model.safetensors", remedy, marked=False)
    try:
        parsed = peft_library().PeftConfig.from_pretrained(str(source))
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError("the adapter", str(source), f"settings and tensors that load ({error})", remedy) from error
    check_adapter({"default": parsed}, "default")
    return settings, tensors


def save_lora(folder: Path, updates: Mapping[str, Factors], transposed: bool, base: str | None) -> None:
    """Fill an empty ``folder`` with a LoRA that adds W + B·A, in PEFT's format.

    Args:
        folder: the folder.
        updates: name of a layer's weight -> B [d_out, r] and Aᵀ [d_in, r], r the same for all.
        transposed: whether the layers store their weights as [d_in, d_out], as Conv1D does.
        base: name of the model the layers are in.

    Raises:
        HostError: PEFT is not installed.
    """
    titles = {name: name.removesuffix(".weight") for name in updates}
    rank = next(iter(updates.values())).left.shape[1]
    peft_library().LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(titles.values()), fan_in_fan_out=transposed,
        task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
    ).save_pretrained(str(folder))  # fmt: skip
    sides = {}
    for name, factors in updates.items():
        sides[f"base_model.model.{titles[name]}.lora_A.weight"] = factors.right.T
        sides[f"base_model.model.{titles[name]}.lora_B.weight"] = factors.left
    write_tensors(folder / "adapter_model.safetensors", sides, {"format": "pt"})


def _wrong_base(base: str, source: Path, why: str) -> ModelError:
    return ModelError("base", base, f"the model that {source} was trained on ({why})", "Name that model.")


def _record(report: ProjectionReport, base: str, config: SphereConfig) -> dict[str, Any]:
    told = ("rank", "removed_share", "rounding_loss")
    layers = {n: {key: getattr(x, key) for key in told} for n, x in report.layers.items()}
    chosen = {"eta": config.eta, "alpha": config.alpha, "row_normalize": config.row_normalize}
    return {**chosen, "base": base, "removed_share": report.removed_share, "layers": layers}


def peft_library() -> Any:
    """The package; raises HostError unless it is installed."""
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        remedy = "Run `pip install 'peft>=0.18'`."
        raise HostError("the package peft", "not installed", "PEFT 0.18 or newer", remedy) from error
    return peft
