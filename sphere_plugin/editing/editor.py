"""SPHERE's own editor: locate → aim → solve → restrain → write, for a batch of facts at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from sphere_plugin.editing.account import Touched, log_apply
from sphere_plugin.editing.aim import Aimed, aim
from sphere_plugin.editing.anatomy import Anatomy, Rewrite
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.corpus import check_source
from sphere_plugin.editing.history import History
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.locate import Locator, Padded
from sphere_plugin.editing.replay import check_replay
from sphere_plugin.editing.requests import Fact, read_request, read_requests
from sphere_plugin.editing.solve import AlphaEdit, Memit
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.errors import ModelError, RequestError
from sphere_plugin.geometry import Factors, neurons
from sphere_plugin.geometry.checks import all_finite
from sphere_plugin.journal import Snapshot, all_or_nothing
from sphere_plugin.models.forward import longest_text
from sphere_plugin.restraints import BoundRestraint, Restrained, restrain

_LOG = logging.getLogger("sphere_plugin")

# The sentence on which each model's replay is checked.
PROBE: Final = MappingProxyType(
    {"prompt": "The tower is in the city of", "subject": "tower", "target_new": "one or two"}
)
# Settings that may change between batches of one editor.
FREE: Final = frozenset(
    ("eta", "alpha", "basis", "row_normalize", "rect", "prune", "projection", "token_budget", "aiming_dtype")
    + ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor")
)
# Share of an update that rounding may swallow before a warning says so.
ROUNDING: Final = 0.1

# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """What a batch did to one weight.

    Attributes:
        name: the parameter.
        rank: dimension of the principal space the update was held away from; 0 without SPHERE.
        removed_share: share of the update's squared norm that the restraints took away; negative where PRUNE's
            correction of earlier updates made it longer.
        solved_norm: Frobenius norm of the update before the restraints.
        update_norm: Frobenius norm of what was written, after rounding to the weight's dtype.
        weight_norm: Frobenius norm of the weight it was written to.
    """

    name: str
    rank: int
    removed_share: float
    solved_norm: float
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
        >>> fact = {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"}
        >>> editor.apply([fact])                                                            # doctest: +SKIP
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
        probe = self.locator.aimed(read_request(PROBE, "probe"))
        with self._quiet():
            check_replay(self.anatomy, Padded.of([probe], self.anatomy.device))
        self._progress = progress
        self.pretrained = Snapshot.take(self.anatomy.weights)
        self._restraint = config.restraint()
        self._restraints = self._bind()
        self._history = History(self.anatomy.weights)
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
            ModelError: a weight, a loss or an update is not finite. The weights are then as they were before the call.
        """
        facts = read_requests(requests)
        self._check_tokens(facts)
        self.anatomy.check_finite()
        self.prepare()
        self._remember()
        with self._quiet(), all_or_nothing(self.anatomy.weights) as before:
            aimed = aim(self.anatomy, self.locator, facts, self.contexts.prefixes, self.config, self._aiming(facts))
            self._check_aimed(aimed)
            reader = KeyReader(self.anatomy, self.locator, facts, self.contexts, self.config.token_budget)
            reports = self._write(reader, aimed.values.T, before)
            self._history.pend({layer: reader.read(layer)[0] for layer in reader.layers})
            self._log(reports, len(facts), before)
        return EditReport(len(facts), tuple(reports), aimed)

    def reconfigure(self, config: EditingConfig) -> bool:
        """Take other settings for the batches to come, keeping all that is remembered.

        Returns:
            False, and nothing is changed, if ``config`` differs in more than how targets are searched for and how
            updates are restrained (:data:`FREE`): that takes a new editor.
        """
        kept = [field.name for field in dataclasses.fields(EditingConfig) if field.name not in FREE]
        if any(getattr(config, name) != getattr(self.config, name) for name in kept):
            return False
        self.config = config
        if config.restraint() != self._restraint:  # else they keep what they know of the pretrained weights
            self._restraint = config.restraint()
            self._restraints = self._bind()
        return True

    def restore(self) -> None:
        """Put the weights back to what they were when this editor was made, bit for bit."""
        self.pretrained.restore(self.anatomy.weights)

    def _write(self, reader: KeyReader, targets: Tensor, before: Snapshot) -> list[LayerReport]:
        """Solve, restrain and write layer by layer; ``targets`` [width, facts]."""
        reports: list[LayerReport] = []
        updates: dict[int, Factors] = {}
        in_loop = self.config.projection == "in_loop"
        for number, layer in enumerate(reader.layers):
            keys, values = reader.read(layer)
            residuals = (targets.to(values.device) - values) / (len(reader.layers) - number)
            delta = self._solver_of(layer).update(keys, residuals)
            reports.append(self._put(layer, delta, restrained=in_loop))
            if not in_loop:
                updates[layer] = delta
        if in_loop:
            return reports
        before.restore(self.anatomy.weights)
        return [self._put(layer, delta, restrained=True) for layer, delta in updates.items()]

    def _put(self, layer: int, delta: Factors, restrained: bool) -> LayerReport:
        """Write an update [d_out, d_in], restrained or as it is; it becomes a matrix here, if not in a restraint."""
        rewrite = self.anatomy.rewrites[layer]
        weight = rewrite.weight.float()
        delta = delta.to(weight.device)
        kept = restrain(self._restraints[layer], weight, delta) if restrained else Restrained(delta, 0.0, 0)
        update = kept.delta.dense() if isinstance(kept.delta, Factors) else kept.delta
        edited = (weight + update).to(rewrite.parameter.dtype)
        if not all_finite(edited):
            raise ModelError(
                f"update of {rewrite.name}",
                "NaN or infinity",
                "finite numbers",
                "The weights are as before this batch; lower v_lr, or edit a float32 model.",
            )
        # Before the write: a float32 weight is the live one.
        weight_norm, asked = float(weight.norm()), float(update.norm())
        written = float((edited.float() - weight).norm())
        if written < (1 - ROUNDING) * asked:
            _LOG.warning(
                "%s: rounding to %s left %.2g of an update of %.2g", rewrite.name, edited.dtype, written, asked
            )
        rewrite.write(edited)
        return LayerReport(
            name=rewrite.name,
            rank=kept.rank,
            removed_share=kept.removed_share,
            solved_norm=delta.norm(),
            update_norm=written,
            weight_norm=weight_norm,
        )

    def _bind(self) -> dict[int, BoundRestraint]:
        return {layer: self._restraint.bind(self._pretrained_of(r)) for layer, r in self.anatomy.rewrites.items()}

    def _pretrained_of(self, rewrite: Rewrite) -> Tensor:
        return neurons(self.pretrained.tensors[rewrite.name], rewrite.transposed)

    def _solver(self, layer: int, moment: Tensor) -> Memit | AlphaEdit:
        config = self.config
        if config.base_method == "MEMIT":
            return Memit(moment, config.mom2_update_weight, layer)
        return AlphaEdit(moment, config.nullspace_threshold, config.L2, layer)

    def _solver_of(self, layer: int) -> Memit | AlphaEdit:
        if self._solvers is None:
            self.prepare()
        return cast(dict[int, Memit | AlphaEdit], self._solvers)[layer]

    def _remember(self) -> None:
        """Bring what the solvers know of earlier edits up to date; all of them or, on an interruption, none."""
        now, news = self._history.news()
        pasts: list[tuple[Any, Any]] = []
        for keys in news:
            for layer in self.anatomy.rewrites:
                solver = self._solver_of(layer)
                pasts.append((solver, solver.with_keys(None if keys is None else keys[layer])))
        for solver, past in pasts:
            solver.remember(past)
        self._history.settle(now)

    def _check_tokens(self, facts: Sequence[Fact]) -> None:
        for number, fact in enumerate(facts):
            try:
                sentence = self.locator.aimed(fact)
            except RequestError as error:
                where = f"requests[{number}].{error.culprit}"
                raise RequestError(where, error.got, error.expected, error.remedy) from None
            longest = longest_text(self.anatomy.model, len(sentence.ids))
            if len(sentence.ids) > longest:
                raise RequestError(
                    f"requests[{number}].prompt",
                    f"{len(sentence.ids)} tokens",
                    f"at most {longest}, which is what the model takes",
                    "Shorten it.",
                )
            if sentence.lookup == 0:
                _LOG.warning(
                    "the subject of %r is the first token the model sees, where decoders keep an attention sink: "
                    "such edits hardly take; put words before it",
                    fact.prompt,
                )

    def _check_aimed(self, aimed: Aimed) -> None:
        """A search whose loss is not a number has found nothing; writing its target would do nothing, or harm."""
        for number, loss in enumerate(aimed.losses.tolist()):
            if not math.isfinite(loss):
                raise ModelError(
                    f"loss of requests[{number}]",
                    loss,
                    "a finite number",
                    "Nothing was written. Lower v_lr, load the model in float32, or check its weights for NaN.",
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
        """Keep dropout, and the caller's inference mode, out of what is computed here."""
        training = [module for module in self.anatomy.model.modules() if module.training]
        self.anatomy.model.eval()
        try:
            with torch.inference_mode(False):
                yield
        finally:
            for module in training:
                module.training = True

    def _log(self, reports: Sequence[LayerReport], facts: int, before: Snapshot) -> None:
        touched: list[Touched] = []
        for report, rewrite in zip(reports, self.anatomy.rewrites.values(), strict=True):
            old = neurons(before.tensors[rewrite.name], rewrite.transposed)
            share, norm = report.removed_share, report.solved_norm
            touched.append(Touched(rewrite.name, report.rank, share, old, rewrite.weight, norm))
        log_apply(self.config.method(), facts, touched)
