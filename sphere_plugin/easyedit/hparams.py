"""SPHERE's hyper-parameters as EasyEdit passes them around: one flat object, read from one YAML."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import yaml

from sphere_plugin.editing.config import EditingConfig, check_flag, check_number, check_text
from sphere_plugin.errors import ConfigError

_LOG = logging.getLogger("sphere_plugin")

ALG_NAME = "SPHERE"

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
# EasyEdit's names for the two numbers of the paper.
SYNONYMS = MappingProxyType({"cumulative_ratio": "eta", "suppression_strength": "alpha"})


@dataclass(kw_only=True)
class SphereHyperParams(EditingConfig):
    """Everything `BaseEditor.from_hparams` needs to edit with SPHERE.

    The fields of :class:`sphere_plugin.editing.EditingConfig`, and those EasyEdit itself reads.

    Attributes:
        model_name: "smollm2-135m" for the model this package carries, a Hugging Face name, or a local folder.
        alg_name: always "SPHERE".
        device: "cpu", "cuda:1", or a GPU's number.
        batch_size: facts per batch of ``batch_edit``; ``edit`` takes one at a time and wants 1.
        max_length: tokens EasyEdit's evaluators read of a prompt.
        model_parallel: spread the model over all GPUs, as EasyEdit does.
        fp16: load the model in float16 (EasyEdit main).

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a value out of its range.
    """

    model_name: str
    alg_name: str = ALG_NAME
    device: int | str = 0
    batch_size: int = 1
    max_length: int = 40
    model_parallel: bool = False
    fp16: bool = False

    def __post_init__(self) -> None:
        if self.alg_name != ALG_NAME:
            raise ConfigError("alg_name", self.alg_name, ALG_NAME, "Load other methods with EasyEdit's own classes.")
        check_text("model_name", self.model_name)
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("max_length", self.max_length, 1, whole=True)
        check_flag("model_parallel", self.model_parallel)
        check_flag("fp16", self.fp16)
        if isinstance(self.device, str):
            check_text("device", self.device)
            if self.device.startswith("mps"):
                raise ConfigError(
                    "device", self.device, "cpu or a CUDA device", "MPS has no float64, which sums need."
                )
        else:
            check_number("device", self.device, 0, whole=True)
        super().__post_init__()

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read a YAML, as EasyEdit's own hparams classes do; ".yaml" may be left out.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or see the class.
        """
        path = Path(hparams_name_or_path).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            path = path.with_name(path.name + ".yaml")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError("hparams", str(path), f"a file that can be read ({error.strerror})", _LOOK) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError("hparams", str(path), f"valid YAML ({error})", _LOOK) from error
        if not isinstance(content, Mapping):
            raise ConfigError("hparams", str(path), "a YAML mapping of keys to values", _LOOK)
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Build from the keys of a YAML, EasyEdit's own SPHERE keys among them."""
        if content.get("layer_selection", "all") != "all":
            remedy = "Name the layers to edit in layers instead."
            raise ConfigError("layer_selection", content["layer_selection"], "all, or nothing", remedy)
        values = {key: value for key, value in content.items() if key not in UNUSED}
        unused = [key for key in content if key in UNUSED]
        if unused:
            _LOG.debug("not needed here: %s", "; ".join(f"{key} ({UNUSED[key]})" for key in unused))
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        values = _paper_names(_flat(_numbers(values, types), types))
        for key in values:
            if key not in types:
                near = difflib.get_close_matches(str(key), [*types, *SYNONYMS, *UNUSED, "sphere"], n=1, cutoff=0.0)[0]
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
        """The same settings as ``hparams``, which may be an object of EasyEdit's own SPHERE class."""
        if isinstance(hparams, SphereHyperParams):
            return hparams
        if not hasattr(hparams, "__dict__"):
            raise ConfigError("hparams", hparams, "SphereHyperParams, or EasyEdit's", "Load them with from_hparams().")
        return cls.from_mapping(vars(hparams))

    def editing(self) -> EditingConfig:
        """The settings that the editor itself reads, as an object of their own."""
        names = [field.name for field in dataclasses.fields(EditingConfig)]
        return EditingConfig(**{name: copy.deepcopy(getattr(self, name)) for name in names})


_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LOOK = "hparams/SPHERE/ holds one for each of several models."


def _flat(values: dict[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Lift the keys of a ``sphere:`` block, the spelling other methods use, to the top."""
    block = values.pop("sphere", None)
    if block is None or block is True:
        return values
    if not isinstance(block, Mapping):
        raise ConfigError("sphere", block, "true, or a block of eta, alpha and basis", "See docs/hparams.md.")
    return _merged(values, _numbers(block, types), "sphere")


def _paper_names(values: dict[str, Any]) -> dict[str, Any]:
    given = {SYNONYMS[key]: values.pop(key) for key in list(values) if key in SYNONYMS}
    if given.get("eta") == 0 and given["eta"] is not False:  # EasyEdit's way of switching the projection off
        given = {"alpha": 0.0}
    return _merged(values, given, "cumulative_ratio and suppression_strength")


def _merged(values: dict[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, value in more.items():
        if values.get(key, value) != value:
            raise ConfigError(key, (values[key], value), f"one value (the second is from {where})", "Give it once.")
    return {**values, **more}


def _numbers(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Read texts as numbers where a number is meant: YAML 1.1 takes 2e-2, without a point, for text."""
    return {
        key: float(value)
        if isinstance(value, str)
        and (key in SYNONYMS or "float" in types.get(key, ""))
        and _SCIENTIFIC.fullmatch(value)
        else value
        for key, value in values.items()
    }
