"""Ask a live model the same thing in several ways, several times, and measure how its answers scatter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.embeddings import Embedder
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.responses import Sampling, respond
from sphere_plugin.evaluation.uncertainty import Uncertainty, uncertainty


@dataclass(frozen=True)
class Measured:
    """A probe and what came of it.

    Attributes:
        probe: what was asked.
        uncertainty: of the answers.
        written: the first answer to each paraphrase.
    """

    probe: Probe
    uncertainty: Uncertainty
    written: tuple[str, ...]


class Auditor:
    """Measures one model, as it is at the time.

    What a probe gives depends on the weights, the probe and the settings, and not on what else is measured: each is a
    pass of its own.

    Args:
        model: a causal language model of Hugging Face's.
        tokenizer: its tokenizer.
        embed: makes vectors of sentences.
        sampling: how answers are drawn.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, embed: Embedder, sampling: Sampling) -> None:
        self.tokenizer = tokenizer
        self.embed = embed
        self.sampling = sampling
        self._decoder = Decoder(model)
        self._ends = frozenset(ends_of(model, tokenizer))

    def measure(self, probe: Probe) -> Measured:
        """Ask, and measure.

        Raises:
            RequestError: a prompt is too long for the model.
            ModelError: the model gives numbers that are not finite.
        """
        ids = [tuple(self.tokenizer(prompt)["input_ids"]) for prompt in probe.prompts]
        answers = [answer for kind in respond(self._decoder, ids, self.sampling, self._ends) for answer in kind]
        texts = [str(self.tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]
        vectors = self.embed(texts).reshape(len(ids), self.sampling.samples, -1)
        return Measured(probe, uncertainty(vectors), tuple(texts[:: self.sampling.samples]))


def ends_of(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens with which the model or its tokenizer ends a text."""
    told = [tokenizer.eos_token_id]
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        given = getattr(config, "eos_token_id", None)
        told += given if isinstance(given, Iterable) else [given]
    return {int(token) for token in told if token is not None}
