"""Key statistics: the second moment E[kkᵀ] of what enters each rewritten layer over ordinary text.

MEMIT weighs it against the new facts, AlphaEdit takes its null space. All layers are read in one pass over the text,
and kept in the cache under everything they depend on: the weights below, the layers, the text and the arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.editing.anatomy import Anatomy, Rewrite
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.corpus import COUNTED, GENERATED, check_source, read_corpus
from sphere_plugin.editing.counted import read_counted
from sphere_plugin.editing.unfinished import Unfinished
from sphere_plugin.errors import CacheError, ModelError
from sphere_plugin.files import cache_folder, check_writable, fingerprint, read_tensors, write_tensors
from sphere_plugin.models.forward import Enough, longest_text, pad_right, trunk
from sphere_plugin.models.memory import cut, work_through
from sphere_plugin.models.placement import with_values
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.paths import is_file, user_path

_LOG = logging.getLogger("sphere_plugin")
_FORMAT = "1"  # raise it when files of an older code must not be used any more
_LONGEST = 512  # tokens of a text that are read
BATCH_TOKENS = 4096  # in one pass over text
ADDED = 256  # rows of a product that are added up at a time
# What is told while it takes its minutes.
WRITING = "key statistics, once: writing text"
READING = "key statistics, once: reading keys"


def key_moments(
    anatomy: Anatomy,
    tokenizer: Any,
    config: EditingConfig,
    progress: Callable[[str, int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, Tensor]:
    """Second moments of the keys of every edited layer, from the cache or counted now.

    The first token of each text is left out: decoders keep an attention sink there whose keys are hundreds of times
    longer than all others and would drown them.

    Args:
        anatomy: the model's parts.
        tokenizer: its tokenizer.
        config: layers, mom2_dataset, mom2_n_samples, seed, stats_dir.
        progress: called with (what, done, of how many).
        ranks: those that share the work; rank 0 reads and writes files.

    Returns:
        Layer number -> [d_in, d_in] float32, on ``stats_device`` or, without one, the layer's; of the layers that
        this rank keeps (`Ranks.keeper`).

    Raises:
        ConfigError: the text cannot be read.
        ModelError: the text has no token to count, or the model's keys are not finite.
    """
    check_source(config.mom2_dataset)
    moments: dict[int, Tensor] = {}  # on rank 0 alone

    def look() -> Path | None:
        """Where they are to be kept; None if they are there."""
        if config.mom2_dataset.endswith(COUNTED):
            files = {layer: user_path(config.mom2_dataset.replace("{}", str(layer))) for layer in anatomy.rewrites}
            widths = {layer: rewrite.weight.shape[1] for layer, rewrite in anatomy.rewrites.items()}
            moments.update({layer: read_counted(file, widths[layer]) for layer, file in files.items()})
            return None
        path = _path(anatomy, tokenizer, config)
        cached = _read(path, anatomy)
        moments.update(cached or {})
        return path if cached is None else None

    path = ranks.by(0, "key statistics", look)
    if path is not None:
        moments = _counted(anatomy, tokenizer, config, path, progress, ranks)
    kept: dict[int, Tensor] = {}
    for number, (layer, rewrite) in enumerate(anatomy.rewrites.items()):
        device, width = _device(rewrite, config), rewrite.weight.shape[1]
        if ranks.is_main:
            moment = moments.pop(layer).to(device)
        else:
            moment = torch.empty(width, width, dtype=torch.float32, device=device)
        moment = ranks.same(f"key statistics of layer {layer}", moment)
        if ranks.keeper(number) == ranks.rank:
            kept[layer] = moment
    return kept


def _device(rewrite: Rewrite, config: EditingConfig) -> torch.device:
    """Where the statistics of a layer are to be."""
    return rewrite.parameter.device if config.stats_device is None else torch.device(config.stats_device)


def _path(anatomy: Anatomy, tokenizer: Any, config: EditingConfig) -> Path:
    source = user_path(config.mom2_dataset)
    content = hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest() if is_file(source) else None
    settings = anatomy.model.config.to_dict()  # type: ignore[operator, union-attr]
    identity = {
        "format": _FORMAT,
        "weights": fingerprint(with_values(anatomy.model, _weights_below(anatomy, config))),
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
    folder = user_path(config.stats_dir) if config.stats_dir else cache_folder() / "statistics"
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
        tensors, metadata = read_tensors(path)
    except CacheError as error:
        _LOG.warning("key statistics are counted again: %s", error)
        return None
    if metadata.get("format") != _FORMAT:
        _LOG.warning("key statistics are counted again: %s is another version's", path)
        return None
    sizes = {str(layer): rewrite.weight.shape[1] for layer, rewrite in anatomy.rewrites.items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != {name: (n, n) for name, n in sizes.items()}:
        _LOG.warning("key statistics are counted again: %s holds other layers than were asked for", path)
        return None
    return {int(name): tensor for name, tensor in tensors.items()}


def _counted(
    anatomy: Anatomy,
    tokenizer: Any,
    config: EditingConfig,
    path: Path,
    progress: Callable[[str, int, int], None] | None,
    ranks: Ranks,
) -> dict[int, Tensor]:
    """The moments, on rank 0; kept in ``path`` from here on."""
    unfinished, moments = Unfinished(path), dict[int, Tensor]()
    counter = _Counter(anatomy, {layer: _device(one, config) for layer, one in anatomy.rewrites.items()})

    def begin() -> tuple[list[list[int]], int]:
        check_writable(path)
        ids = _ids(anatomy, tokenizer, config, unfinished, progress)
        counter.sums, counter.tokens, done = unfinished.sums()
        return ids, done

    def finish() -> None:
        moments.update(counter.moments())
        write_tensors(path, {str(layer): moment for layer, moment in moments.items()}, {"format": _FORMAT})
        unfinished.forget()
        _LOG.info("key statistics of layers %s kept in %s", list(moments), path)

    try:
        ids, done = ranks.by(0, "texts for key statistics", begin)
        if progress is not None and done:
            progress(READING, done, len(ids))
        for rows in _in_turns(ids[done:], counter, ranks):
            done += rows
            if ranks.by(0, "whether to keep sums", lambda: unfinished.due):
                sums, tokens = counter.over_all(ranks)
                if ranks.is_main:
                    unfinished.keep_sums(sums, tokens, done)
            if progress is not None:
                progress(READING, rows, len(ids))
        counter.sums, counter.tokens = counter.over_all(ranks)
        ranks.by(0, "moments", finish)
    except ModelError:  # it would fail again
        if ranks.is_main:
            unfinished.forget()
        raise
    return moments


def _ids(
    anatomy: Anatomy,
    tokenizer: Any,
    config: EditingConfig,
    unfinished: Unfinished,
    progress: Callable[[str, int, int], None] | None,
) -> list[list[int]]:
    """Token ids of the texts, the shortest first."""

    def told(what: str) -> Callable[[int], None] | None:
        if progress is None:
            return None
        return lambda done: progress(what, done, config.mom2_n_samples)

    _LOG.info("counting key statistics over %d texts (%s)", config.mom2_n_samples, config.mom2_dataset)
    texts = unfinished.texts() or read_corpus(
        config.mom2_dataset, config.mom2_n_samples, anatomy.model, tokenizer, config.seed, told(WRITING)
    )
    unfinished.keep_texts(texts)
    longest = min(_LONGEST, longest_text(anatomy.model, _LONGEST))
    ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    ids = sorted((row for row in ids if len(row) > 1), key=len)
    _check_amount(anatomy, config, sum(len(row) - 1 for row in ids))
    return ids


def _in_turns(rows: Sequence[list[int]], counter: _Counter, ranks: Ranks) -> Iterator[int]:
    """Count texts, a piece of them on each rank at a time; yields how many have been counted since the last time."""
    if ranks.size == 1:
        for piece, _ in work_through(rows, len, BATCH_TOKENS, counter.add):
            yield len(piece)
        return
    pieces = cut(rows, len, BATCH_TOKENS)
    for first in range(0, len(pieces), ranks.size):
        turn = pieces[first : first + ranks.size]
        own = turn[ranks.rank] if ranks.rank < len(turn) else []
        ranks.together("key statistics", partial(list, work_through(own, len, BATCH_TOKENS, counter.add)))
        yield sum(map(len, turn))


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
    """Adds up kkᵀ over batches of text: float32 products on the layers' devices, float64 sums on ``devices``."""

    def __init__(self, anatomy: Anatomy, devices: Mapping[int, torch.device]) -> None:
        self.anatomy = anatomy
        self.devices = devices
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
        for layer, product in products.items():
            known = self.sums.get(layer)
            known = torch.zeros_like(product, dtype=torch.float64) if known is None else known
            self.sums[layer] = known.to(product.device)  # sums that were read from a file lie on the CPU
        # Nothing large is made from here on (a sum of two dtypes has copies), so that memory does not run out halfway.
        self.tokens += int(counted.sum())
        for layer, product in products.items():
            for first in range(0, len(product), ADDED):
                self.sums[layer][first : first + ADDED] += product[first : first + ADDED]

    def _hook(
        self, layer: int, counted: Tensor, products: dict[int, Tensor]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0][counted.to(args[0].device)].float()
            products[layer] = (keys.T @ keys).to(self.devices[layer])
            if layer == max(self.anatomy.rewrites):
                raise Enough

        return hook

    def over_all(self, ranks: Ranks) -> tuple[dict[int, Tensor], int]:
        """Sums and tokens of all ranks together, on rank 0; what is here stays as it is."""
        if ranks.size == 1:
            return self.sums, self.tokens
        sums: dict[int, Tensor] = {}
        for layer, rewrite in self.anatomy.rewrites.items():
            width, device = rewrite.weight.shape[1], self.devices[layer]
            own = self.sums.get(layer, torch.zeros(width, width, dtype=torch.float64, device=device))
            total = ranks.total(f"sums of layer {layer}", own.to(device))
            if ranks.is_main:
                sums[layer] = total
        return sums, sum(ranks.each("tokens", lambda: self.tokens))

    def moments(self) -> dict[int, Tensor]:
        """E[kkᵀ] of every layer, float32; the sums are gone afterwards."""
        moments = {layer: self.sums.pop(layer).div_(self.tokens).float() for layer in list(self.sums)}
        for layer, moment in moments.items():
            if not bool(torch.isfinite(moment).all()):
                raise ModelError(
                    f"keys of layer {layer}", "NaN or infinity", "finite numbers", "Check the model; try float32."
                )
        return moments
