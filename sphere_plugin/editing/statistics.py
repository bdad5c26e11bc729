"""Key statistics: the second moment E[kkᵀ] of what enters each rewritten layer over ordinary text.

MEMIT weighs it against the new facts, AlphaEdit takes its null space. All layers are read in one pass over the text,
and kept in the cache under everything they depend on: the weights below, the layers, the text and the arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.corpus import COUNTED, GENERATED, check_source, read_corpus
from sphere_plugin.editing.unfinished import Unfinished
from sphere_plugin.errors import CacheError, ConfigError, ModelError
from sphere_plugin.files import cache_folder, check_writable, fingerprint, read_tensors, write_tensors
from sphere_plugin.models.forward import Enough, longest_text, pad_right, trunk
from sphere_plugin.models.memory import work_through

_LOG = logging.getLogger("sphere_plugin")
_FORMAT = "1"  # raise it when files of an older code must not be used any more
_LONGEST = 512  # tokens of a text that are read
_BATCH_TOKENS = 4096


def key_moments(
    anatomy: Anatomy, tokenizer: Any, config: EditingConfig, progress: Callable[[str, int, int], None] | None = None
) -> dict[int, Tensor]:
    """Second moments of the keys of every edited layer, from the cache or counted now.

    The first token of each text is left out: decoders keep an attention sink there whose keys are hundreds of times
    longer than all others and would drown them.

    Args:
        anatomy: the model's parts.
        tokenizer: its tokenizer.
        config: layers, mom2_dataset, mom2_n_samples, seed, stats_dir.
        progress: called with (what, done, of how many).

    Returns:
        Layer number -> [d_in, d_in] float32, on the layer's device.

    Raises:
        ConfigError: the text cannot be read.
        ModelError: the text has no token to count, or the model's keys are not finite.
    """
    check_source(config.mom2_dataset)
    if config.mom2_dataset.endswith(COUNTED):
        return {
            layer: read_counted(Path(config.mom2_dataset.format(layer)).expanduser(), rewrite.weight.shape[1]).to(
                rewrite.parameter.device
            )
            for layer, rewrite in anatomy.rewrites.items()
        }
    path = _path(anatomy, tokenizer, config)
    cached = _read(path, anatomy)
    if cached is None:
        check_writable(path)
        unfinished = Unfinished(path)
        try:
            cached = _count(anatomy, tokenizer, config, unfinished, progress)
        except ModelError:  # it would fail again
            unfinished.forget()
            raise
        write_tensors(path, {str(layer): moment for layer, moment in cached.items()}, {"format": _FORMAT})
        unfinished.forget()
        _LOG.info("key statistics of layers %s kept in %s", list(cached), path)
    return {layer: cached[layer].to(rewrite.parameter.device) for layer, rewrite in anatomy.rewrites.items()}


def read_counted(path: Path, width: int) -> Tensor:
    """E[kkᵀ] [width, width] float32 of one layer, from a file of EasyEdit's or ROME's ``layer_stats``.

    Raises:
        ConfigError: no such file, or not one of these statistics of a key of ``width`` dimensions.
    """
    expected = f"a file of EasyEdit's layer_stats over keys of {width} dimensions"
    remedy = "Put {} for the layer number into the name, and name the statistics of this very model."
    try:
        with np.load(path, allow_pickle=False) as content:
            total, count = content["mom2.mom2"], int(content["mom2.count"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError("mom2_dataset", str(path), f"{expected} ({error})", remedy) from error
    moment = torch.from_numpy(total).double() / max(count, 1)
    if moment.shape != (width, width) or not bool(torch.isfinite(moment).all()) or count < 1:
        got = f"{path}: {tuple(moment.shape)} over {count} tokens"
        raise ConfigError("mom2_dataset", got, expected, remedy)
    return moment.float()


def _path(anatomy: Anatomy, tokenizer: Any, config: EditingConfig) -> Path:
    source = Path(config.mom2_dataset).expanduser()
    content = hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest() if source.is_file() else None
    settings = anatomy.model.config.to_dict()  # type: ignore[operator, union-attr]
    identity = {
        "format": _FORMAT,
        "weights": fingerprint(_weights_below(anatomy, config)),
        # What a forward pass reads beside the weights: rotary tables, activations, numbers of heads.
        "settings": {name: value for name, value in settings.items() if name not in _NO_MATTER},
        "modules": [rewrite.name for rewrite in anatomy.rewrites.values()],
        "tokenizer": tokenizer(_PROBE)["input_ids"],
        "source": config.mom2_dataset if content is None else [content, source.suffix in (".json", ".jsonl")],
        "samples": config.mom2_n_samples,
        # Sampling follows the seed; a file or a dataset is read from its beginning.
        "seed": config.seed if config.mom2_dataset == GENERATED else None,
    }
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    folder = Path(config.stats_dir).expanduser() if config.stats_dir else cache_folder() / "statistics"
    return folder / f"sphere-{key}.safetensors"


# Settings of a model that say where it comes from, not what it computes.
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")

# A sentence that tells tokenizers apart, special tokens included.
_PROBE = "Ünïcode, 1234 tokens\n  and a “quoted” line."


def _weights_below(anatomy: Anatomy, config: EditingConfig) -> Sequence[tuple[str, Tensor]]:
    """Every weight that keys of the edited layers, or text the model writes, depend on."""
    if config.mom2_dataset == GENERATED:
        return list(anatomy.model.state_dict().items())
    above = {id(p) for layer in anatomy.decoder[config.layers[-1] + 1 :] for p in layer.parameters()}
    above |= {id(p) for module in (anatomy.norm, anatomy.head) for p in module.parameters()}
    embeddings = {id(p) for p in anatomy.model.get_input_embeddings().parameters()}  # type: ignore[operator]
    return [(name, p) for name, p in anatomy.model.named_parameters() if id(p) not in above or id(p) in embeddings]


def _read(path: Path, anatomy: Anatomy) -> dict[int, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors, _ = read_tensors(path)
    except CacheError as error:
        _LOG.warning("key statistics are counted again: %s", error)
        return None
    sizes = {str(layer): rewrite.weight.shape[1] for layer, rewrite in anatomy.rewrites.items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != {name: (n, n) for name, n in sizes.items()}:
        _LOG.warning("key statistics are counted again: %s holds other layers than were asked for", path)
        return None
    return {int(name): tensor for name, tensor in tensors.items()}


def _count(
    anatomy: Anatomy,
    tokenizer: Any,
    config: EditingConfig,
    unfinished: Unfinished,
    progress: Callable[[str, int, int], None] | None,
) -> dict[int, Tensor]:
    def told(what: str) -> Callable[[int], None] | None:
        if progress is None:
            return None
        return lambda done: progress(what, done, config.mom2_n_samples)

    _LOG.info("counting key statistics over %d texts (%s)", config.mom2_n_samples, config.mom2_dataset)
    texts = unfinished.texts() or read_corpus(
        config.mom2_dataset, config.mom2_n_samples, anatomy.model, tokenizer, config.seed, told("writing text")
    )
    unfinished.keep_texts(texts)
    longest = min(_LONGEST, longest_text(anatomy.model, _LONGEST))
    ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    ids = sorted((row for row in ids if len(row) > 1), key=len)
    _check_amount(anatomy, config, sum(len(row) - 1 for row in ids))
    counter = _Counter(anatomy)
    counter.sums, counter.tokens, done = unfinished.sums()
    if progress is not None and done:
        progress("reading keys", done, len(ids))
    for batch, _ in work_through(ids[done:], len, _BATCH_TOKENS, counter.add):
        done += len(batch)
        unfinished.keep_sums(counter.sums, counter.tokens, done)
        if progress is not None:
            progress("reading keys", len(batch), len(ids))
    return counter.moments()


def _check_amount(anatomy: Anatomy, config: EditingConfig, tokens: int) -> None:
    """Say before anything is counted whether so many tokens can tell what the model knows."""
    width = max(rewrite.weight.shape[1] for rewrite in anatomy.rewrites.values())
    if tokens > width:
        return
    expected = f"more than {width}, the number of dimensions of a key"
    remedy = "Raise mom2_n_samples, or give longer texts as mom2_dataset."
    if tokens == 0 or config.base_method == "MEMIT":
        raise ModelError("tokens for key statistics", tokens, expected, remedy)
    _LOG.warning("key statistics: %d tokens, expected %s: most of the null space is mere ignorance", tokens, expected)


class _Counter:
    """Adds up kkᵀ over batches of text: float32 products, float64 sums."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.tokens = 0
        self.sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, rows: Sequence[list[int]]) -> None:
        """Count a batch of token ids, or, if it fails, nothing of it."""
        ids, mask = pad_right(rows)
        counted = mask.bool()
        counted[:, 0] = False
        products: dict[int, Tensor] = {}
        device = self.anatomy.device
        with ExitStack() as stack:
            for layer, rewrite in self.anatomy.rewrites.items():
                handle = rewrite.module.register_forward_pre_hook(self._hook(layer, counted, products))
                stack.callback(handle.remove)
            stack.enter_context(suppress(Enough))
            trunk(self.anatomy.model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        self.tokens += int(counted.sum())
        for layer, product in products.items():
            self.sums[layer] = self.sums[layer] + product if layer in self.sums else product

    def _hook(
        self, layer: int, counted: Tensor, products: dict[int, Tensor]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0][counted.to(args[0].device)].float()
            products[layer] = (keys.T @ keys).double()
            if layer == max(self.anatomy.rewrites):
                raise Enough

        return hook

    def moments(self) -> dict[int, Tensor]:
        """E[kkᵀ] of every layer, float32."""
        moments = {layer: (total / self.tokens).float() for layer, total in self.sums.items()}
        for layer, moment in moments.items():
            if not bool(torch.isfinite(moment).all()):
                raise ModelError(
                    f"keys of layer {layer}", "NaN or infinity", "finite numbers", "Check the model; try float32."
                )
        return moments
