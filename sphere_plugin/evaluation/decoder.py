"""Passes through a decoder: hidden states, logits, and rows that are continued without being read again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from sphere_plugin.errors import ModelError
from sphere_plugin.models.forward import pad_right, trunk
from sphere_plugin.models.placement import input_device

Row = TypeVar("Row")
_AGREE: Final = 0.02  # of the largest logit: what rounding to 16 bits may do


class Decoder:
    """A causal language model of Hugging Face's, as scoring reads it.

    Hidden states become logits only where something is asked, so what a model does to the logits of its output
    embedding is done here as well: Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma's cap.

    Raises:
        ModelError: the model's own logits are others.

    Attributes:
        continues: whether rows of different lengths can be continued side by side: they are padded, so the model must
            let itself be told at which position a token stands. BLOOM and MPT do not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.continues = "position_ids" in inspect.signature(trunk(model).forward).parameters
        config = getattr(model, "config", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._check()

    def together(self, rows: Sequence[Row], length: Callable[[Row], int]) -> Iterator[Sequence[Row]]:
        """Rows, sorted by the length of their prompts, in groups that can be continued side by side."""
        if self.continues:
            yield rows
        else:
            yield from (tuple(group) for _, group in groupby(rows, key=length))

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return input_device(self.model)

    def hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the output embedding reads at every token: [rows, longest, d]."""
        ids, mask = pad_right(rows)
        hidden: Tensor = trunk(self.model)(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        ).last_hidden_state
        return hidden

    def begin(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Begun]:
        """The same, and the rows as they can be continued."""
        from transformers import DynamicCache

        ids, mask = pad_right(rows)
        begun = Begun(self, DynamicCache(), torch.zeros(len(rows), 0, dtype=torch.long, device=self.device))
        return begun.read(ids, mask), begun

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] to [n, vocabulary]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _check(self) -> None:
        """Compare logits with the model's own, behind two tokens."""
        if any(module.training for module in self.model.modules()):  # dropout: no two passes agree
            return
        rows = [[0, 1]]
        with torch.no_grad():
            ours = self.logits(self.hidden(rows)[0]).float()
            ids = torch.tensor(rows, device=self.device)
            theirs = self.model(input_ids=ids, use_cache=False).logits[0].to(ours)
        furthest, most = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if furthest > _AGREE * most:  # not where they are not finite: a collapsed model is scored too
            remedy = "This package cannot score it: its logits are no known function of its output embedding's."
            raise ModelError("the model's logits", f"{furthest / most:.2g} away from", "those it computes", remedy)


class Begun:
    """Rows that have been read, as their keys and values.

    Args:
        decoder: whose rows they are.
        cache: their keys and values, of a `DynamicCache`.
        mask: [rows, tokens] 1 where there is a token; padding may stand between tokens.
    """

    def __init__(self, decoder: Decoder, cache: Any, mask: Tensor) -> None:
        self.decoder = decoder
        self.mask = mask
        self._cache = cache

    def take(self, rows: Sequence[int]) -> Begun:
        """Some of the rows, as a copy; a row may be taken several times."""
        from transformers import DynamicCache

        chosen, cache = torch.tensor(rows, device=self.mask.device), DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            keys, values = layer.keys, layer.values
            cache.update(keys[chosen.to(keys.device)], values[chosen.to(values.device)], number)
        return Begun(self.decoder, cache, self.mask[chosen])

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read more tokens behind each row: ids and mask [rows, new], to hidden states [rows, new, d]."""
        ids, mask = ids.to(self.mask.device), mask.to(self.mask.device)
        told = {}
        if self.decoder.continues:
            places = self.mask.sum(dim=1, keepdim=True) + mask.cumsum(dim=1) - 1
            told["position_ids"] = places.clamp_min(0)
        self.mask = torch.cat([self.mask, mask], dim=1)
        hidden: Tensor = trunk(self.decoder.model)(
            input_ids=ids, attention_mask=self.mask, past_key_values=self._cache, use_cache=True, **told
        ).last_hidden_state
        return hidden
