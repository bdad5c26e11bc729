"""Who is asked in an audit, and who asks: the same on every rank; rank 0 says what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sphere_plugin.evaluation.auditor import Auditor, Measured
from sphere_plugin.evaluation.embeddings import Embedder, embedder
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.responses import Sampling
from sphere_plugin.files import fingerprint
from sphere_plugin.journaling.revisit import loaded
from sphere_plugin.parallel.ranks import Ranks, led


class Panel:
    """The live model of a run, and what measures it. Methods are called on rank 0, and by it on the others.

    Args:
        model: before any edit.
        tokenizer: its tokenizer.
        embed: makes vectors of sentences.
        sampling: how answers are drawn.
        device: of the model.
        ranks: those that share the work.

    Attributes:
        identity: fingerprint of all weights before any edit.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, embed: Embedder, sampling: Sampling, device: str, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self._model = model.to(ranks.device(device))
        self._auditor = Auditor(model, tokenizer, embed, sampling)
        self.identity = fingerprint(model.state_dict().items())
        ranks.agree("the model", self.identity, "that of rank 0", "Load the same files on every machine.")

    @led
    def follow(self, names: Sequence[str]) -> None:
        """Put the weights ``names`` of all ranks to what they are on rank 0."""
        with torch.no_grad():
            for name in names:
                weight = self._model.get_parameter(name)
                weight.copy_(self.ranks.same(name, weight))

    @led
    def measure(self, probes: Sequence[Probe]) -> list[Measured]:
        """Ask, and measure; each probe is one rank's, and gives what it gives in one process."""
        rank, size = self.ranks.rank, self.ranks.size
        parts = self.ranks.each("probes", lambda: [self._auditor.measure(one) for one in probes[rank::size]])
        return [parts[number % size][number // size] for number in range(len(probes))]


def convene(ranks: Ranks, known: Mapping[str, Any], name: str, sampling: Sampling, device: str) -> Panel:
    """The panel of a rank other than 0: the model of a manifest, and the embedder of that name."""
    model, tokenizer = loaded(known)
    return Panel(model, tokenizer, embedder(name), sampling, device, ranks)
