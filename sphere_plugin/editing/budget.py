"""How much memory editing takes at its peak, as formulas of sizes: docs/scale.md derives and measures them.

Nothing here looks at a model or a device. Bytes are upper bounds: what is freed is taken to be given back at once, and
of activations the largest of the architectures is assumed. What libraries keep for themselves, a CUDA context for
instance, comes on top.

Symbols: N = d_out d_in, n and D the smaller side and d_in, e edited layers, u facts of a batch, b bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.statistics import BATCH_TOKENS
from sphere_plugin.geometry import pairs, tracked

# Where something lies: on the device of the weights, on that of the statistics, in the memory of the process.
Place = Literal["weights", "statistics", "host"]

COUNTED: Final = BATCH_TOKENS  # in one pass over text; over prompts as many, `evaluation.quality`
ASKED: Final = 256  # places whose logits are held at once, `evaluation.predict`
SAVED: Final = (4, 12)  # numbers kept of a token in a layer for gradients: times d_in, times the width
PASSING: Final = (4, 4)  # numbers at hand of a token in the layer that is running


@dataclass(frozen=True)
class Shape:
    """What of a model memory depends on.

    Attributes:
        parameters: of the whole model.
        layers: of its decoder.
        width: of its hidden states.
        kept: numbers attention keeps of a token in a layer, 2 · key heads · their width.
        vocabulary: of its output embedding.
        d_out: rows of a weight that is edited.
        d_in: its columns, which is what enters it: the width inside the feed-forward network.
    """

    parameters: int
    layers: int
    width: int
    kept: int
    vocabulary: int
    d_out: int
    d_in: int


@dataclass(frozen=True)
class Batch:
    """A batch of facts.

    Attributes:
        facts: how many, u.
        tokens: of a sentence that is aimed at, with the prefix before it and the target behind.
        behind: those of them from the lookup token on.
        targets: tokens of a target.
    """

    facts: int = 100
    tokens: int = 40
    behind: int = 16
    targets: int = 4


@dataclass(frozen=True)
class Phase:
    """A part of the work.

    Attributes:
        name: what is done.
        parts: what there is meanwhile -> where, and bytes.
    """

    name: str
    parts: Mapping[str, tuple[Place, int]]

    def at(self, *places: Place) -> int:
        """Bytes at these places together."""
        return sum(size for place, size in self.parts.values() if place in places)


@dataclass(frozen=True)
class Budget:
    """The formulas for one model and one set of settings.

    Attributes:
        shape: of the model.
        config: the settings.
        element: bytes of a weight, b.
        batch: the facts.
    """

    shape: Shape
    config: EditingConfig
    element: int
    batch: Batch = field(default_factory=Batch)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the work in their order, each with all that is there meanwhile."""
        solvers: dict[str, tuple[Place, int]] = {"solvers": ("statistics", self.solvers())}
        return (
            Phase("counting key statistics", self._resident() | self._counting()),
            Phase("making solvers", self._resident() | {"statistics": ("statistics", self.making_solvers())}),
            Phase("aiming", self._resident() | solvers | {"aiming": ("weights", self.aiming())}),
            Phase("reading keys", self._resident() | self._batch() | solvers | self._keys()),
            Phase("writing", self._resident() | self._batch() | solvers | {"writing": ("weights", self.writing())}),
            Phase("measuring energy", self._resident() | solvers | {"energy": ("weights", self.energy())}),
            Phase("journal", self._resident() | solvers | {"journal": ("host", self.journalling())}),
            Phase("scoring", self._resident() | solvers | {"scoring": ("weights", self.scoring())}),
        )

    def peak(self, *places: Place) -> tuple[int, Phase]:
        """The most bytes at these places together, and when."""
        worst = max(self.phases, key=lambda phase: phase.at(*places))
        return worst.at(*places), worst

    # ---- what is always there ----

    def _resident(self) -> dict[str, tuple[Place, int]]:
        return dict(self._kept())

    def _kept(self) -> Iterator[tuple[str, tuple[Place, int]]]:
        yield "model", ("weights", self.shape.parameters * self.element)
        yield "copies for undo", ("weights", self._all * self.element)
        if self.mastered:
            yield "master copies", ("weights", 4 * self._all)
            yield "master copies before the last batch", ("host", 4 * self._all)
        yield "spaces that are followed", ("weights", len(self.config.layers) * self.followed())
        # The journal's copy of the weights as they are, and the monitor's of those before any edit.
        yield "copies of a run", ("host", self._all * (self._state + self.element))

    def _batch(self) -> dict[str, tuple[Place, int]]:
        """What a batch keeps until it is written: the weights before it, and the master copies after it."""
        size = self._all * self.element + (4 * self._all if self.mastered else 0)
        return {"copies of the batch": ("weights", size)}

    @property
    def mastered(self) -> bool:
        """Whether there are master copies."""
        return self.config.master_copy and self.element < 4

    @property
    def _state(self) -> int:
        return 4 if self.mastered else self.element

    @property
    def size(self) -> int:
        """N."""
        return self.shape.d_out * self.shape.d_in

    @property
    def _all(self) -> int:
        """e N."""
        return len(self.config.layers) * self.size

    def followed(self) -> int:
        """What is kept of a layer's space from batch to batch: its Gram matrix, half of the eigenvectors twice."""
        config, n = self.config, self.shape.d_out
        follows = config.sphere().alpha and config.basis == "current" and tracked.SMALLEST <= n < self.shape.d_in
        return 8 * n * n if follows and config.rect is None and config.prune is None else 0

    # ---- statistics ----

    def _counting(self) -> dict[str, tuple[Place, int]]:
        moment, count = self.shape.d_in**2, len(self.config.layers)
        # The keys as they come, chosen ones in float32, and as the product wants them.
        reading = max(self.passing(COUNTED), 12 * COUNTED * self.shape.d_in)
        parts: dict[str, tuple[Place, int]] = {"reading text": ("weights", reading)}
        if self.config.stats_device is not None:
            parts["product of keys"] = ("weights", 4 * moment)
        return parts | {"sums": ("statistics", (8 + 4) * count * moment)}

    def solvers(self) -> int:
        """What is kept of all layers: MEMIT's Cholesky factor, AlphaEdit's null space and factor, float64."""
        each = 8 if self.config.base_method == "MEMIT" else 16  # AlphaEdit's null space may be nearly everything
        return each * len(self.config.layers) * self.shape.d_in**2

    def making_solvers(self) -> int:
        """At the last layer, when all others have their solver: all moments, which are one file, and LAPACK's work."""
        moment, count = self.shape.d_in**2, len(self.config.layers)
        if self.config.base_method == "MEMIT":
            return 4 * count * moment + 8 * count * moment
        return 4 * count * moment + (16 * (count - 1) + 24) * moment

    # ---- activations ----

    def passing(self, tokens: int) -> int:
        """A pass of so many tokens without gradients."""
        return tokens * self.element * (PASSING[0] * self.shape.d_in + PASSING[1] * self.shape.width)

    def aiming(self) -> int:
        """The search for the targets of as many facts as ``token_budget`` takes at once.

        First the tokens before the lookup token are read, of which attention's keys and values stay; then come steps
        of the search, with gradients for what is above the aimed layer, and logits where a target is predicted.
        """
        rows, facts = self._rows()
        shape, batch = self.shape, self.batch
        above = shape.layers - 1 - self.config.layers[-1]
        remembered = rows * batch.tokens * shape.kept * self.element  # of one layer
        saved = rows * batch.behind * above * self.element * (SAVED[0] * shape.d_in + SAVED[1] * shape.width)
        said = (rows - facts) * batch.targets * (2 * self.element + 16) + facts * 32
        return max(
            3 * shape.layers * remembered,
            shape.layers * remembered + self.passing(rows * batch.tokens),
            (above + 1) * remembered + saved + said * shape.vocabulary,
        )

    def _rows(self) -> tuple[int, int]:
        """Sentences in one pass, and facts they are of: each behind every prefix, and what the subject is."""
        each = 2 + sum(number for _, number in self.config.context_template_length_params)
        facts = min(self.batch.facts, max(1, self.config.token_budget // (each * self.batch.tokens)))
        return facts * each, facts

    def _keys(self) -> dict[str, tuple[Place, int]]:
        """Hidden states of all sentences up to their lookup tokens, twice, and a pass; X and its systems, float64."""
        shape, batch = self.shape, self.batch
        rows, facts = self._rows()
        before = batch.tokens - batch.behind + 1
        states = batch.facts * (rows // facts - 1) * before * shape.width
        reading = 2 * states * self.element + self.passing((rows - facts) * before)
        solving = 8 * 4 * shape.d_in * batch.facts
        if self.config.base_method == "AlphaEdit":  # the factor with the last batch's keys, beside the one without
            solving += 8 * shape.d_in**2
        return {"reading keys": ("weights", reading), "solving": ("statistics", solving)}

    def scoring(self) -> int:
        """A pass over prompts, their keys and values twice, and logits where something is asked."""
        shape, remembered = self.shape, COUNTED * self.shape.kept * self.shape.layers * self.element
        return self.passing(COUNTED) + 2 * remembered + ASKED * shape.vocabulary * (self.element + 8)

    # ---- one layer ----

    def writing(self) -> int:
        """A layer's space and update: the larger of finding the one and writing the other."""
        n, wide = min(self.shape.d_out, self.shape.d_in), 0 if self.mastered or self.element == 4 else 4 * self.size
        space = max(4 * (self.size + n * n), 16 * n * n) if self.config.sphere().alpha else 0
        return wide + max(space, (4 + self.element) * self.size)

    def energy(self) -> int:
        """A layer's hyperspherical energy, in float64: its rows, the same at unit length, and blocks of pairs."""
        return 16 * self.size + 4 * 8 * min(pairs.BLOCK_ENTRIES, self.shape.d_out**2)

    def journalling(self) -> int:
        """The state after a batch beside the one before, and of one weight what its factors give."""
        return self._all * self._state + (4 + 4 + 4 + self._state) * self.size
