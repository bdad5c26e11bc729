"""SPHERE's own editor: locate → aim → solve → restrain → write, for a batch of facts at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.editing.aim import Aimed, aim
from sphere_plugin.editing.anatomy import Anatomy, Rewrite
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.corpus import check_source
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.requests import Fact, read_requests
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.errors import ModelError
from sphere_plugin.files import fingerprint
from sphere_plugin.journal import Snapshot, all_or_nothing
from sphere_plugin.restraints import BoundRestraint, Restrained

_LOG = logging.getLogger("sphere_plugin")

# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """What a batch did to one weight.

    Attributes:
        name: the parameter.
        rank: dimension of the principal space the update was held away from; 0 without SPHERE.
        removed_share: share of the update's squared norm that SPHERE took away.
        update_norm: Frobenius norm of what was written.
        weight_norm: Frobenius norm of the weight it was written to.
    """

    name: str
    rank: int
    removed_share: float
    update_norm: float
    weight_norm: float


@dataclass(frozen=True)
class EditReport:
    """What a batch did.

    Attributes:
        facts: how many were written.
        layers: one report per edited weight.
        aimed: the targets, the loss each search ended with and its steps.
    """

    facts: int
    layers: tuple[LayerReport, ...]
    aimed: Aimed


class Editor:
    """Edits one model; everything it remembers lives in this object.

    Args:
        model: a decoder-only language model of Hugging Face's, edited in place.
        tokenizer: its tokenizer.
        config: what to edit, and how.
        progress: told about the long parts of the work.

    Raises:
        ConfigError, ModelError: the model has not what the settings name, or its weights are not finite. Raised
            here, before any computation.

    Example:
        >>> editor = Editor(model, tokenizer, config)                                       # doctest: +SKIP
        >>> editor.apply([{"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"}])
        >>> editor.restore()                                                                # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: EditingConfig, progress: Progress | None = None
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.anatomy = Anatomy.of(model, config)
        self.locator = Locator(tokenizer, config.fact_token)
        check_source(config.mom2_dataset)
        self._check_attention(model)
        self._progress = progress
        self.pretrained = Snapshot.take(self.anatomy.weights)
        self._restraints = self._bind()
        self._history = _History(self.anatomy)
        self._contexts: Contexts | None = None
        self._solvers: dict[int, Memit | AlphaEdit] | None = None

    @property
    def contexts(self) -> Contexts:
        """The prefixes facts are edited behind; written by the model when first asked for."""
        if self._contexts is None:
            params = self.config.context_template_length_params
            with self._quiet():
                self._contexts = (
                    Contexts.generate(self.anatomy.model, self.tokenizer, params, self.config.seed)
                    if params
                    else Contexts.bare()
                )
        return self._contexts

    def prepare(self) -> None:
        """Do now what the first batch would wait for: prefixes and key statistics."""
        _ = self.contexts
        if self._solvers is None:
            with self._quiet():
                moments = key_moments(self.anatomy, self.tokenizer, self.config, self._progress)
            self._solvers = {layer: self._solver(layer, moment) for layer, moment in moments.items()}

    def apply(self, requests: Sequence[Mapping[str, Any]]) -> EditReport:
        """Write a batch of facts into the model, all or none.

        Args:
            requests: EasyEdit requests, see :func:`sphere_plugin.editing.requests.read_requests`.

        Raises:
            RequestError: a request cannot be edited; raised before any computation.
            ModelError: a weight or an update is not finite. The weights are then as they were before the call.
        """
        facts = read_requests(requests)
        self._check_tokens(facts)
        self.anatomy.check_finite()
        self.prepare()
        for keys in self._history.settle():
            self._remember(keys)
        with self._quiet(), all_or_nothing(self.anatomy.weights) as before:
            aimed = aim(self.anatomy, self.locator, facts, self.contexts.prefixes, self.config, self._aiming(facts))
            reader = KeyReader(self.anatomy, self.locator, facts, self.contexts, self.config.token_budget)
            reports = self._write(reader, aimed.values.T, before)
            self._history.pend({layer: reader.read(layer)[0] for layer in reader.layers}, before)
        report = EditReport(len(facts), tuple(reports), aimed)
        self._log(report)
        return report

    def restore(self) -> None:
        """Put the weights back to what they were when this editor was made, bit for bit."""
        self.pretrained.restore(self.anatomy.weights)

    def _write(self, reader: KeyReader, targets: Tensor, before: Snapshot) -> list[LayerReport]:
        """Solve, restrain and write layer by layer; ``targets`` [width, facts]."""
        reports: list[LayerReport] = []
        updates: dict[int, Tensor] = {}
        in_loop = self.config.projection == "in_loop"
        for number, layer in enumerate(reader.layers):
            keys, values = reader.read(layer)
            residuals = (targets.to(values.device) - values) / (len(reader.layers) - number)
            weight = self.anatomy.rewrites[layer].weight.float()
            delta = self._solver_of(layer).update(keys, residuals).to(weight.device)
            if in_loop:
                reports.append(self._put(layer, weight, self._restraints[layer](weight, delta)))
            else:
                updates[layer] = delta
                self._put(layer, weight, Restrained(delta, 0.0, 0))
        if not in_loop:
            before.restore(self.anatomy.weights)
            for layer, delta in updates.items():
                weight = self.anatomy.rewrites[layer].weight.float()
                reports.append(self._put(layer, weight, self._restraints[layer](weight, delta)))
        return reports

    def _put(self, layer: int, weight: Tensor, restrained: Restrained) -> LayerReport:
        rewrite = self.anatomy.rewrites[layer]
        edited = (weight + restrained.delta).to(rewrite.parameter.dtype)
        if not bool(torch.isfinite(edited).all()):
            raise ModelError(
                f"update of {rewrite.name}",
                "NaN or infinity",
                "finite numbers",
                "The weights are as before this batch; lower v_lr, or edit a float32 model.",
            )
        weight_norm = float(weight.norm())  # now: a float32 weight is the live one
        rewrite.write(edited)
        return LayerReport(
            name=rewrite.name,
            rank=restrained.rank,
            removed_share=restrained.removed_share,
            update_norm=float(restrained.delta.norm()),
            weight_norm=weight_norm,
        )

    def _bind(self) -> dict[int, BoundRestraint]:
        sphere = self.config.sphere()
        return {layer: sphere.bind(self._pretrained_of(r)) for layer, r in self.anatomy.rewrites.items()}

    def _pretrained_of(self, rewrite: Rewrite) -> Tensor:
        from sphere_plugin.geometry.neurons import neurons

        return neurons(self.pretrained.tensors[rewrite.name], rewrite.transposed)

    def _solver(self, layer: int, moment: Tensor) -> Memit | AlphaEdit:
        config = self.config
        if config.base_method == "MEMIT":
            return Memit(moment, config.mom2_update_weight, layer)
        return AlphaEdit(moment, config.nullspace_threshold, config.L2, layer)

    def _solver_of(self, layer: int) -> Memit | AlphaEdit:
        if self._solvers is None:
            self.prepare()
        return (self._solvers or {})[layer]

    def _remember(self, keys: dict[int, Tensor] | None) -> None:
        for layer in self.anatomy.rewrites:
            if keys is None:
                self._solver_of(layer).forget()
            else:
                self._solver_of(layer).remember(keys[layer])

    def _check_tokens(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            if self.locator.aimed(fact).lookup == 0:
                _LOG.warning(
                    "the subject of %r is the first token the model sees, where decoders keep an attention sink: "
                    "such edits hardly take; put words before it",
                    fact.prompt,
                )

    def _check_attention(self, model: nn.Module) -> None:
        kind = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
        if kind not in ("sdpa", "eager"):
            raise ModelError(
                "attention implementation", kind, "sdpa or eager", 'Load the model with attn_implementation="sdpa".'
            )

    def _aiming(self, facts: Sequence[Fact]) -> Callable[[int], None] | None:
        progress = self._progress
        return None if progress is None else lambda done: progress("aiming", done, len(facts))

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep dropout out of what is computed here."""
        training = [module for module in self.anatomy.model.modules() if module.training]
        self.anatomy.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _log(self, report: EditReport) -> None:
        ranks = sorted({layer.rank for layer in report.layers})
        removed = sum(layer.removed_share for layer in report.layers) / len(report.layers)
        change = max(layer.update_norm / layer.weight_norm for layer in report.layers)
        _LOG.info(
            "%s%s wrote %d facts into %d weights: r %s, %.1f %% of the update removed, change up to %.2g of a weight",
            self.config.base_method,
            " + SPHERE" if self.config.alpha else "",
            report.facts,
            len(report.layers),
            "–".join(map(str, ranks[:: max(1, len(ranks) - 1)])),
            100 * removed,
            change,
        )


class _History:
    """Which batches are in the weights right now.

    The keys of a batch count as earlier edits only once the next batch finds the weights as that batch left them.
    Restored weights thus take the keys of what was undone out of the history without anyone having to say so.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._pretrained = self._now()
        self._settled = self._pretrained
        self._pending: tuple[dict[int, Tensor], str] | None = None

    def pend(self, keys: dict[int, Tensor], before: Snapshot) -> None:
        """Note the ``keys`` of a batch that has just been written over the weights ``before``."""
        self._settled = fingerprint(before.tensors.items())
        self._pending = (keys, self._now())

    def settle(self) -> list[dict[int, Tensor] | None]:
        """What to remember before the next batch: keys to add, or None for: forget everything first."""
        now = self._now()
        pending, self._pending = self._pending, None
        if pending is not None and now == pending[1]:
            self._settled = now
            return [pending[0]]
        if now == self._settled and not (now == self._pretrained and pending is None):
            # The last batch was undone; what came before it still stands, which is nothing if it was the first.
            return []
        if now != self._pretrained:
            _LOG.warning("the weights were changed by someone else since the last batch: earlier keys are forgotten")
        self._settled = now
        return [None]

    def _now(self) -> str:
        return fingerprint(self.anatomy.weights.items())
