"""Text for key statistics: the model's own, a local file, or a dataset the user names. Nothing is fetched unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from sphere_plugin.editing.contexts import write_texts
from sphere_plugin.errors import ConfigError
from sphere_plugin.parsing import json_of
from sphere_plugin.paths import is_file, user_path

GENERATED = "generated"
# Statistics that EasyEdit has counted already, one file for each layer, with {} for its number in the name.
COUNTED = ".npz"
# Length of a text the model writes, in tokens.
GENERATED_TOKENS = 64
# Names that EasyEdit's YAMLs use, and where the datasets library has them today.
DATASETS = (
    ("wikipedia", ("wikimedia/wikipedia", "20231101.en")),
    ("wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1")),
)
# Characters of a text that are kept: more than the tokens that are read of it.
LONGEST = 8192
TEXT_FIELDS = ("text", "passage", "document", "content", "prompt")
_REMEDY = "Give a text file, or mom2_dataset: generated, which needs nothing: the model writes the text itself."


def check_source(source: str) -> None:
    """Raise ConfigError if ``source`` looks like a file that is not there."""
    path = user_path(source)
    if source.endswith(COUNTED):
        if "{}" not in source:
            remedy = 'Write ".../model.layers.{}.mlp.down_proj_float32_mom2_100000.npz".'
            raise ConfigError("mom2_dataset", source, "a name with {} for the layer number", remedy)
        return
    if (
        source != GENERATED
        and not is_file(path)
        and (path.suffix in (".txt", ".json", ".jsonl") or path.is_absolute())
    ):
        raise ConfigError("mom2_dataset", source, "a text file that exists", _REMEDY)


def read_corpus(
    source: str,
    number: int,
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """At most ``number`` texts of ``source``.

    Args:
        source: "generated", a .txt (paragraphs), .json or .jsonl file, or a name of the datasets library (streamed,
            so that no more is read than is used).
        number: how many texts.
        model: writes the texts when they are generated.
        tokenizer: its tokenizer.
        seed: of generated text.
        progress: called with the number of texts done.

    Raises:
        ConfigError: the source cannot be read, or holds no text.
    """
    check_source(source)
    if source == GENERATED:
        return write_texts(model, tokenizer, number, GENERATED_TOKENS, seed, progress=progress)
    path = user_path(source)
    texts = list(islice(_of_file(path) if is_file(path) else _of_dataset(source), number))
    if not texts:
        raise ConfigError("mom2_dataset", source, "a source with text in it", _REMEDY)
    return texts


def _of_file(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json_of(content)
        elif path.suffix == ".jsonl":
            records = [json_of(line) for line in content.split("\n") if line.strip()]
        else:
            records = [part for part in content.split("\n\n") if part.strip()]
    except (OSError, ValueError) as error:  # not readable, not UTF-8, or not JSON
        raise ConfigError("mom2_dataset", str(path), f"UTF-8 text, or JSON ({error})", _REMEDY) from error
    if not isinstance(records, list):
        raise ConfigError("mom2_dataset", str(path), "a JSON list of texts or records", _REMEDY)
    for record in records:
        yield _text_of(record, str(path))


def _of_dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset

        stream = load_dataset(*dict(DATASETS).get(name, (name,)), split="train", streaming=True)
        for record in stream:
            yield _text_of(record, name)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ConfigError(
            "mom2_dataset", name, f"a file, or a dataset that can be read ({reason})", _REMEDY
        ) from error


def _text_of(record: object, where: str) -> str:
    if isinstance(record, str):
        return record[:LONGEST]
    if isinstance(record, dict):
        for field in TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return str(record[field])[:LONGEST]
    raise ConfigError(
        "mom2_dataset", where, "texts, or records with one of the fields " + ", ".join(TEXT_FIELDS), _REMEDY
    )
