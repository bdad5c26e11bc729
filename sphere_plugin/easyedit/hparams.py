"""Hyper-parameters of SPHERE, RECT and PRUNE as EasyEdit passes them around: one flat object, read from one YAML."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch

from sphere_plugin.easyedit.blocks import (
    SYNONYMS,
    merged,
    nearest,
    numbers,
    paper_names,
    read_prune,
    read_rect,
    read_sphere,
    sphere_keys,
    types_of,
)
from sphere_plugin.editing.config import (
    ALPHA_OF,
    BaseMethod,
    EditingConfig,
    Projection,
    check_flag,
    check_number,
    check_text,
)
from sphere_plugin.errors import ConfigError
from sphere_plugin.parsing import yaml_of
from sphere_plugin.paths import yaml_path
from sphere_plugin.restraints import PruneConfig, RectConfig

_LOG = logging.getLogger("sphere_plugin")

ALG_NAME = "SPHERE"
# The class here that holds each method's hyper-parameters.
CLASSES = MappingProxyType({"SPHERE": "SphereHyperParams", "RECT": "RectHyperParams", "PRUNE": "PruneHyperParams"})

# Keys of EasyEdit's own SPHERE and AlphaEdit YAMLs that nothing here needs, and why.
UNUSED = MappingProxyType(
    {
        "P_loc": "the null space is computed from the key statistics, which are cached by what they depend on",
        "attn_module_tmp": "attention is not edited",
        "mlp_module_tmp": "rewrite_module_tmp says which layer is edited",
        "mom2_dtype": "statistics are summed in float64",
        "mom2_adjustment": "the closed forms here always weigh what the model knows",
        "layer_selection": "all layers are edited",
    }
)

_LOOK = "Start from a file in hparams/SPHERE, hparams/RECT or hparams/PRUNE."


def dtype_of(hparams: object) -> torch.dtype:
    """What a model is loaded in for these hyper-parameters, of any method."""
    if getattr(hparams, "bf16", False):
        return torch.bfloat16
    return torch.float16 if getattr(hparams, "fp16", False) else torch.float32


@dataclass(kw_only=True)
class SphereHyperParams(EditingConfig):
    """Everything `BaseEditor.from_hparams` needs to edit with SPHERE.

    The fields of :class:`sphere_plugin.editing.EditingConfig`, and those EasyEdit itself reads. ``rect`` and ``prune``
    are None unless asked for; a YAML has ``rect: true`` or ``rect: {keep: 0.4}``, and ``prune:`` likewise.

    Attributes:
        model_name: "smollm2-135m" for the model this package carries, a Hugging Face name, or a local folder.
        alg_name: the method, :attr:`ALG_NAME`; another is refused.
        device: "cpu", "cuda:1", or a GPU's number.
        batch_size: facts per batch of ``batch_edit``; ``edit`` takes one at a time and wants 1.
        max_length: tokens EasyEdit's evaluators read of a prompt.
        model_parallel: spread the model over all GPUs, as EasyEdit does.
        fp16: load the model in float16.
        bf16: load the model in bfloat16.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a value out of its range.
    """

    ALG_NAME: ClassVar[str] = ALG_NAME

    model_name: str
    alg_name: str = ALG_NAME
    device: int | str = 0
    batch_size: int = 1
    max_length: int = 40
    model_parallel: bool = False
    fp16: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        self._check_name(self.alg_name)
        check_text("model_name", self.model_name)
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("max_length", self.max_length, 1, whole=True)
        check_flag("model_parallel", self.model_parallel)
        check_flag("fp16", self.fp16)
        check_flag("bf16", self.bf16)
        if self.fp16 and self.bf16:
            raise ConfigError("bf16", True, "false beside fp16: true", "Choose one of them.")
        if isinstance(self.device, str):
            check_text("device", self.device)
            if self.device.startswith("mps"):
                raise ConfigError(
                    "device", self.device, "cpu or a CUDA device", "MPS has no float64, which sums need."
                )
        else:
            check_number("device", self.device, 0, whole=True)
        super().__post_init__()

    def __setattr__(self, name: str, value: object) -> None:
        if name == "sphere":
            remedy = "Set alpha (0 switches the projection off), eta, basis, row_normalize or projection."
            raise ConfigError(
                "sphere", value, f"a setting of {type(self).__name__}, which has one for each number", remedy
            )
        super().__setattr__(name, value)

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read a YAML, as EasyEdit's own hparams classes do; ".yaml" may be left out.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or see the class.
        """
        path = yaml_path(hparams_name_or_path)
        try:
            content = yaml_of(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError("hparams", str(path), f"a file that can be read ({error.strerror})", _LOOK) from error
        except ValueError as error:
            raise ConfigError("hparams", str(path), f"valid YAML ({error})", _LOOK) from error
        if not isinstance(content, Mapping):
            raise ConfigError("hparams", str(path), "a YAML mapping of keys to values", _LOOK)
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from the keys of a YAML, EasyEdit's own SPHERE keys among them.

        Raises:
            ConfigError: see the class; of the settings in a block, named as "sphere.eta" or "rect.keep".
        """
        cls._check_name(content.get("alg_name", cls.ALG_NAME))
        if content.get("layer_selection", "all") != "all":
            remedy = "Name the layers to edit in layers instead."
            raise ConfigError("layer_selection", content["layer_selection"], "all, or nothing", remedy)
        values = {key: value for key, value in content.items() if key not in UNUSED}
        unused = [key for key in content if key in UNUSED]
        if unused:
            _LOG.debug("not needed here: %s", "; ".join(f"{key} ({UNUSED[key]})" for key in unused))
        types = types_of(cls)
        values = _restraints(cls._lift_sphere(paper_names(numbers(values, types))))
        for key in values:
            if key not in types:
                near = nearest(str(key), [*types, *SYNONYMS, *UNUSED, "sphere"])
                raise ConfigError("hparams", key, "a known key", f"The nearest one is {near!r}; see docs/hparams.md.")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in values
        ]
        if missing:
            raise ConfigError("hparams", missing, "a value for each of these keys", _LOOK)
        return cls(**values)

    @classmethod
    def of(cls, hparams: object) -> SphereHyperParams:
        """The same settings as ``hparams``, which may be an object of EasyEdit's own SPHERE class.

        Objects of this class and of those below it are returned as they are.
        """
        if isinstance(hparams, cls):
            return hparams
        if not hasattr(hparams, "__dict__"):
            raise ConfigError("hparams", hparams, f"{cls.__name__}, or EasyEdit's", "Load them with from_hparams().")
        values = vars(hparams)
        if dataclasses.is_dataclass(hparams):  # scripts hang on EasyEdit's objects what its evaluators read
            known = {field.name for field in (*dataclasses.fields(hparams), *dataclasses.fields(cls))} | {"sphere"}
            values = {key: value for key, value in values.items() if key in known}
        return cls.from_mapping(values)

    def editing(self) -> EditingConfig:
        """The settings that the editor itself reads, as an object of their own."""
        names = [field.name for field in dataclasses.fields(EditingConfig)]
        return EditingConfig(**{name: copy.deepcopy(getattr(self, name)) for name in names})

    @classmethod
    def _check_name(cls, name: object) -> None:
        if name != cls.ALG_NAME:
            other = CLASSES.get(name) if isinstance(name, str) else None
            remedy = f"{other} loads {name}." if other else "Load other methods with EasyEdit's own classes."
            raise ConfigError("alg_name", name, cls.ALG_NAME, remedy)

    @classmethod
    def _lift_sphere(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Lift the keys of a ``sphere:`` block, the spelling other methods use, to the top."""
        others = {key: value for key, value in values.items() if key != "sphere"}
        block = values.get("sphere")
        if block is None:
            return others
        if block is False:
            expected = "true, or a block of eta, alpha, basis and row_normalize"
            raise ConfigError("sphere", block, expected, "To switch the projection off, write alpha: 0.")
        read_sphere(block, alpha=0.0)  # an error in the block is named as one
        return merged(others, sphere_keys(block), "sphere")


@dataclass(kw_only=True)
class _RestrainedMemit(SphereHyperParams):
    """MEMIT with a restraint of its own, and without SPHERE unless asked for."""

    OWN: ClassVar[str]  # the key of the restraint that makes the method

    base_method: BaseMethod = "MEMIT"
    projection: Projection = "post"

    def __post_init__(self) -> None:
        if self.base_method != "MEMIT":
            remedy = f"For AlphaEdit with it write alg_name: SPHERE, base_method: AlphaEdit and {self.OWN}: true."
            raise ConfigError("base_method", self.base_method, f"MEMIT, which {self.ALG_NAME} builds on", remedy)
        if getattr(self, self.OWN) is None:
            raise self._bare(None)
        if self.alpha is None:
            self.alpha = 0.0
        super().__post_init__()

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from the keys of a YAML; ``sphere: true``, or a block, adds SPHERE, with alpha 0.8 if it has none.

        Raises:
            ConfigError: as SphereHyperParams; or the method's own restraint is switched off.
        """
        if content.get(cls.OWN) is False:
            raise cls._bare(False)
        return super().from_mapping(content)

    @classmethod
    def _lift_sphere(cls, values: dict[str, Any]) -> dict[str, Any]:
        asked = values.get("sphere")
        if asked is False:
            others = {key: value for key, value in values.items() if key != "sphere"}
            return merged(others, {"alpha": 0.0}, "sphere")
        lifted = super()._lift_sphere(values)
        if asked is not None and lifted.get("alpha") is None:
            lifted["alpha"] = dict(ALPHA_OF)["MEMIT"]
        return lifted

    @classmethod
    def _bare(cls, value: object) -> ConfigError:
        remedy = "Without it this is plain MEMIT: write alg_name: SPHERE, base_method: MEMIT and alpha: 0."
        return ConfigError(cls.OWN, value, f"true, or a block, since this is {cls.ALG_NAME}", remedy)


@dataclass(kw_only=True)
class RectHyperParams(_RestrainedMemit):
    """Everything `BaseEditor.from_hparams` needs to edit with RECT: MEMIT, then RECT on its updates.

    The fields are those of :class:`SphereHyperParams`, with other defaults. ``projection`` is "post", because the
    authors' code solves all layers first and applies RECT, and SPHERE after it, to what it has solved. ``alpha`` is 0,
    so there is no SPHERE: ask for it with ``sphere: true`` in the YAML (alpha is then 0.8), or with an alpha.

    Attributes:
        alg_name: always "RECT".
        base_method: always "MEMIT".
        rect: RECT's settings; never None.

    Raises:
        ConfigError: as SphereHyperParams; another base method; or RECT is switched off.
    """

    ALG_NAME: ClassVar[str] = "RECT"
    OWN: ClassVar[str] = "rect"

    alg_name: str = "RECT"
    rect: RectConfig | None = RectConfig()


@dataclass(kw_only=True)
class PruneHyperParams(_RestrainedMemit):
    """Everything `BaseEditor.from_hparams` needs to edit with PRUNE: MEMIT, then PRUNE on what it has added up to.

    The fields are those of :class:`SphereHyperParams`, with other defaults. ``projection`` is "post", because the
    authors' code solves all layers first and applies PRUNE, and SPHERE after it, to what it has solved. Their PRUNE is
    a view, though, which MEMIT never edits; this one is written, and the next batch is solved on it: see
    :mod:`sphere_plugin.restraints.prune`. ``alpha`` is 0, so there is no SPHERE: ask for it with ``sphere: true`` in
    the YAML (alpha is then 0.8), or with an alpha.

    Attributes:
        alg_name: always "PRUNE".
        base_method: always "MEMIT".
        prune: PRUNE's settings; never None.

    Raises:
        ConfigError: as SphereHyperParams; another base method; or PRUNE is switched off.
    """

    ALG_NAME: ClassVar[str] = "PRUNE"
    OWN: ClassVar[str] = "prune"

    alg_name: str = "PRUNE"
    prune: PruneConfig | None = PruneConfig()


def _restraints(values: dict[str, Any]) -> dict[str, Any]:
    """Read the blocks ``rect:`` and ``prune:``; null is as good as left out."""
    readers = {"rect": read_rect, "prune": read_prune}
    given = {key: value for key, value in values.items() if key not in readers or value is not None}
    return {key: readers[key](value) if key in readers else value for key, value in given.items()}
