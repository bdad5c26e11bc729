"""SPHERE's own editor: locate → aim → solve → restrain → write, for a batch of facts at a time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from sphere_plugin.editing.account import EditReport, LayerReport, Touched, log_apply, warn_of_rounding
from sphere_plugin.editing.aim import Aimed, aim
from sphere_plugin.editing.anatomy import Anatomy, Rewrite
from sphere_plugin.editing.checks import check_aimed, check_attention, check_device, check_prefixed, check_tokens
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.contexts import Contexts
from sphere_plugin.editing.corpus import check_source
from sphere_plugin.editing.history import History, Keys
from sphere_plugin.editing.keys import KeyReader
from sphere_plugin.editing.locate import Locator
from sphere_plugin.editing.master import Masters
from sphere_plugin.editing.replay import check_replay
from sphere_plugin.editing.requests import Fact, read_request, read_requests
from sphere_plugin.editing.shared import Reader, ReadTogether, aimed_together
from sphere_plugin.editing.solvers import Solvers
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.editing.write import rounded_sum
from sphere_plugin.geometry import Factors, neurons, stored
from sphere_plugin.journaling import Snapshot, all_or_nothing
from sphere_plugin.parallel.ranks import ALONE, Ranks
from sphere_plugin.restraints import BoundRestraint, Restrained, restrain
from sphere_plugin.restraints.protocol import memories, recall_all

_LOG = logging.getLogger("sphere_plugin")

# The sentence on which each model's replay is checked.
PROBE: Final = MappingProxyType(
    {"prompt": "The tower is in the city of", "subject": "tower", "target_new": "one or two"}
)
# Settings that may change between batches of one editor.
FREE: Final = frozenset(
    (
        "eta",
        "alpha",
        "basis",
        "row_normalize",
        "rect",
        "prune",
        "control",
        "projection",
        "token_budget",
        "aiming_dtype",
    )
    + ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor")
)
# Called with (what, done now, of how many in all).
Progress = Callable[[str, int, int], None]


class Editor:
    """Edits one model; everything it remembers lives in this object.

    Args:
        model: a decoder-only language model of Hugging Face's, edited in place.
        tokenizer: its tokenizer.
        config: what to edit, and how.
        progress: told about the long parts of the work.
        ranks: processes that share the work (`parallel.joining`). Each has an editor of its own on a copy of the
            model, and all of them call the same methods with the same arguments; see also :meth:`join`.

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
        self,
        model: nn.Module,
        tokenizer: Any,
        config: EditingConfig,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.anatomy = Anatomy.of(model, config)
        self.locator = Locator(tokenizer, config.fact_token)
        check_source(config.mom2_dataset)
        check_device("stats_device", config.stats_device or "cpu", "Leave it out for the device of the weights.")
        check_attention(model)
        probe = self.locator.aimed(read_request(PROBE, "probe"))
        with self._quiet():
            check_replay(self.anatomy, [probe])
        self._progress = progress
        self.pretrained = Snapshot.take(self.anatomy.weights)
        self._restraint = config.restraint()
        self._restraints = self._bind()
        self._history = History(self.anatomy.weights)
        self._masters = Masters(self.anatomy.weights if config.master_copy else {}, self.pretrained.tensors)
        self._told: frozenset[str] = frozenset()  # weights of whose rounding a warning has told
        self._contexts: Contexts | None = None
        self._solvers: Solvers | None = None
        self._ranks = ranks

    def join(self, ranks: Ranks) -> None:
        """Share the work with others from here on; before :meth:`prepare`. Only rank 0 tells about progress then."""
        self._ranks = ranks
        self._progress = self._progress if ranks.is_main else None

    @property
    def contexts(self) -> Contexts:
        """The prefixes facts are edited behind; written by the model when first asked for."""
        if self._contexts is None:
            params = self.config.context_template_length_params
            model, seed = self.anatomy.model, self.config.seed

            def written() -> Contexts:
                return Contexts.generate(model, self.tokenizer, params, seed) if params else Contexts.bare()

            with self._quiet():
                self._contexts = self._ranks.by(0, "prefixes", written)
        return self._contexts

    def prepare(self) -> None:
        """Do now what the first batch would wait for: prefixes and key statistics."""
        _ = self._prepared()

    def _prepared(self) -> Solvers:
        _ = self.contexts
        if self._solvers is None:
            with self._quiet():
                moments = key_moments(self.anatomy, self.tokenizer, self.config, self._progress, self._ranks)
            self._solvers = Solvers(self.anatomy, self.config, moments, self._ranks)
        return self._solvers

    def aim(self, requests: Sequence[Mapping[str, Any]]) -> Aimed:
        """Find the targets of a batch, and write nothing.

        Raises:
            RequestError, ModelError: as `apply`.
        """
        facts = self._facts(requests)
        self.prepare()
        aimed = self._aim(facts)
        check_aimed(aimed, len(facts), self.anatomy)
        return aimed

    def apply(self, requests: Sequence[Mapping[str, Any]], aimed: Aimed | None = None) -> EditReport:
        """Write a batch of facts into the model, all or none.

        Args:
            requests: EasyEdit requests, see :func:`sphere_plugin.editing.requests.read_requests`.
            aimed: their targets, where they are known; None finds them for the weights as they are now.

        Raises:
            RequestError: a request cannot be edited; raised before anything is computed but the prefixes. ``aimed`` is
                of other facts.
            ModelError: a weight, a loss or an update is not finite. The weights are then as they were before the call.
        """
        facts = self._facts(requests)
        self.prepare()
        self._remember()
        aimed = self._aim(facts) if aimed is None else aimed
        check_aimed(aimed, len(facts), self.anatomy)  # those that were given too
        with self._quiet(), all_or_nothing(self.anatomy.weights) as before, self._masters.batch():
            reader = ReadTogether(self._ranks, list(self.anatomy.rewrites), facts, self._reader)
            reports = self._write(reader, aimed.values.T, before)
            # Laid out as what `resume` gets: sums depend on it.
            remembering = reader.layers if self.config.base_method == "AlphaEdit" else ()
            keys = {layer: reader.read(layer)[0].contiguous() for layer in remembering}
            now, remedy = self._history.pend(keys), "Use machines of one kind, or one process."
            self._ranks.agree("the weights after the batch", now, "those of rank 0", remedy)
            if self._ranks.is_main:
                self._log(reports, len(facts), before)
        return EditReport(len(facts), tuple(reports), aimed, keys)

    @property
    def masters(self) -> dict[str, Tensor]:
        """Name -> float32 master copy of the weight as it is now, as the model stores it; none without master_copy."""
        return self._masters.copies()

    def resume(self, batches: Iterable[Mapping[int, Tensor]], masters: Mapping[str, Tensor] | None = None) -> None:
        """Go on where another editor stopped, its edits being in the weights now.

        Made, and :meth:`prepare` called, on the weights before any edit; the weights as that editor left them are then
        written into the model, and this is called. With `recall`, what follows is what would have followed there.

        Args:
            batches: the keys of its batches in their order (`EditReport.keys`), one batch at a time. Where the base
                method has none, it does not matter how many are given.
            masters: its master copies (`masters`).
        """
        solvers = self._prepared()
        self._history.forget()
        solvers.remember({})
        self._masters.recall(masters or {})
        last: Keys = {}
        for keys in batches:
            if last:
                solvers.learn(last)
            last = keys
        self._history.pend({layer: solvers.beside(layer, keys) for layer, keys in last.items()})

    def memory(self) -> dict[str, Tensor]:
        """What the restraints remember of earlier batches beside the weights, for :meth:`recall`."""
        return memories(self._restraints)

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Give the restraints what :meth:`memory` returned in another editor with the same settings."""
        where = {str(layer): rewrite.weight.device for layer, rewrite in self.anatomy.rewrites.items()}
        recall_all(self._restraints, {name: one.to(where[name.partition("/")[0]]) for name, one in memory.items()})

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

    def _reader(self, facts: Sequence[Fact]) -> KeyReader:
        return KeyReader(self.anatomy, self.locator, facts, self.contexts, self.config.token_budget)

    def _write(self, reader: Reader, targets: Tensor, before: Snapshot) -> list[LayerReport]:
        """Solve, restrain and write layer by layer; ``targets`` [width, facts]."""
        reports: list[LayerReport] = []
        updates: dict[int, Factors] = {}
        in_loop = self.config.projection == "in_loop"
        for number, layer in enumerate(reader.layers):
            keys, values = reader.read(layer)
            residuals = (targets.to(values.device) - values) / (len(reader.layers) - number)
            delta = self._prepared().update(layer, keys, residuals)
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
        master = self._masters.of(rewrite.name)
        weight = rewrite.weight.float() if master is None else neurons(master, rewrite.transposed)
        delta = delta.to(weight.device)
        kept = restrain(self._restraints[layer], weight, delta) if restrained else Restrained(delta, 0.0, 0)
        update = kept.delta.dense() if isinstance(kept.delta, Factors) else kept.delta
        update = self._ranks.same(f"what is added to {rewrite.name}", update)
        written = rounded_sum(rewrite.name, rewrite.weight, weight, update, mastered=master is not None)
        weight_norm = float(weight.norm())  # before the write: a float32 weight is the live one
        rewrite.write(written.weight)
        if written.master is not None:
            self._masters.write(rewrite.name, stored(written.master, rewrite.transposed).contiguous())
        return LayerReport(
            name=rewrite.name,
            rank=kept.rank,
            removed_share=kept.removed_share,
            solved_norm=delta.norm(),
            update_norm=written.update_norm,
            weight_norm=weight_norm,
            update=kept.delta,
            null_space=self._prepared().null_space[layer],
            rounding_loss=written.rounding_loss,
            master_gap=written.master_gap,
        )

    def _bind(self) -> dict[int, BoundRestraint]:
        return {layer: self._restraint.bind(self._pretrained_of(r)) for layer, r in self.anatomy.rewrites.items()}

    def _pretrained_of(self, rewrite: Rewrite) -> Tensor:
        return neurons(self.pretrained.tensors[rewrite.name], rewrite.transposed)

    def _remember(self) -> None:
        """Bring what the solvers know of earlier edits up to date; all of them or, on an interruption, none."""
        now, news = self._history.news()
        if news is not None:
            self._prepared().remember(news)
        self._history.settle(now)

    def _facts(self, requests: Sequence[Mapping[str, Any]]) -> list[Fact]:
        """The requests, checked before anything is computed but the prefixes; and the weights."""
        facts = read_requests(requests)
        check_tokens(facts, self.locator, self.anatomy.model)
        self.anatomy.check_finite()
        check_prefixed(facts, self.locator, self.anatomy.model, self.contexts.prefixes)
        return facts

    def _aim(self, facts: Sequence[Fact]) -> Aimed:
        anatomy, locator, prefixes, config = self.anatomy, self.locator, self.contexts.prefixes, self.config
        with self._quiet():
            return aimed_together(
                self._ranks,
                facts,
                lambda mine: aim(anatomy, locator, mine, prefixes, config, self._aiming(mine)),
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
        self._told = warn_of_rounding(reports, self._told)
        touched: list[Touched] = []
        for report, rewrite in zip(reports, self.anatomy.rewrites.values(), strict=True):
            old = neurons(before.tensors[rewrite.name], rewrite.transposed)
            share, norm, lost = report.removed_share, report.solved_norm, report.rounding_loss
            touched.append(Touched(rewrite.name, report.rank, share, old, rewrite.weight, norm, lost))
        log_apply(self.config.method(), facts, touched)
