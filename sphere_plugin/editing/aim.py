"""Aim: find, for each fact, the hidden state that would make the model say its target.

The search is MEMIT's (Meng et al. 2023, section 4.3; EasyEdit's ``compute_z``): a vector δ added to the output of one
decoder layer at the lookup token, Adam on the target's negative log-likelihood over several contexts, plus a KL
divergence that keeps "{subject} is a" as it was, plus a pull towards zero; ‖δ‖ is clamped. What differs is the
economy: all facts at once, only the layers above the aimed one, only tokens from the lookup token on, logits only
where a target is predicted, and no gradient for any weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.locate import Locator, Sentence
from sphere_plugin.editing.prefix import pieces, read_prefixes
from sphere_plugin.editing.replay import Recording, record_suffix
from sphere_plugin.editing.requests import Fact
from sphere_plugin.models.memory import work_through

# MEMIT stops a fact's search once its loss is below this.
GOOD_ENOUGH = 5e-2


@dataclass(frozen=True)
class Aimed:
    """Where the facts of a batch are to end up.

    Attributes:
        values: [facts, width] float32, the output of the aimed layer at the lookup token that says the target.
        losses: [facts] the loss each fact's search ended with.
        steps: [facts] forward passes it took.
    """

    values: Tensor
    losses: Tensor
    steps: Tensor


def aim(
    anatomy: Anatomy,
    locator: Locator,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    config: EditingConfig,
    progress: Callable[[int], None] | None = None,
) -> Aimed:
    """Find the target values of ``facts``.

    Args:
        anatomy: the model's parts; its weights are read as they are now.
        locator: tokenises the facts.
        facts: what the model should say.
        prefixes: texts to aim behind; the first is the empty one, the bare prompt.
        config: v_lr, v_num_grad_steps, v_weight_decay, clamp_norm_factor, kl_factor, token_budget.
        progress: called with the number of facts done, as they are done.
    """
    sentences = [[locator.aimed(fact, prefix) for prefix in prefixes] + [locator.essence(fact)] for fact in facts]
    parts = []
    with _no_weight_gradients(anatomy):
        for chunk, part in work_through(
            sentences, _tokens, config.token_budget, lambda chunk: _Search(anatomy, chunk, config).run()
        ):
            parts.append(part)
            if progress is not None:
                progress(len(chunk))
    return Aimed(*(torch.cat([getattr(part, name) for part in parts]) for name in ("values", "losses", "steps")))


class _Search:
    """The search for the targets of one chunk of facts; each fact has ``contexts`` aimed sentences and one essence."""

    def __init__(self, anatomy: Anatomy, sentences: Sequence[list[Sentence]], config: EditingConfig) -> None:
        self.anatomy = anatomy
        self.config = config
        self.contexts = len(sentences[0]) - 1
        self.layer = config.layers[-1]
        rows = [_Row(fact, sentence) for fact, group in enumerate(sentences) for sentence in group]
        self.groups = _groups(anatomy, rows, self.layer)
        entered = self.groups[0].entered  # δ lies where the aimed layer does
        self.start = torch.zeros(len(sentences), entered.shape[-1], dtype=torch.float32, device=entered.device)
        firsts = {id(group[0]): fact for fact, group in enumerate(sentences)}
        for group in self.groups:
            for number, row in enumerate(group.members):
                if id(row.sentence) in firsts:
                    self.start[row.fact] = group.entered[number, 0].float()

    def run(self) -> Aimed:
        config, count = self.config, self.start.shape[0]
        delta = torch.zeros_like(self.start, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=config.v_lr)
        norms = self.start.norm(dim=1)
        losses = torch.full((count,), torch.inf, dtype=torch.float32, device=delta.device)
        steps = torch.zeros(count, dtype=torch.long, device=delta.device)
        active = torch.ones(count, dtype=torch.bool, device=delta.device)
        for step in range(config.v_num_grad_steps):
            optimizer.zero_grad()
            last = step == config.v_num_grad_steps - 1
            latest = self._backward(delta, norms, active, gradients=not last)
            losses = torch.where(active, latest, losses)
            steps += active
            active = active & (losses >= GOOD_ENOUGH)
            if last or not active.any():
                break
            settled = delta.detach().clone()
            optimizer.step()
            with torch.no_grad():
                excess = config.clamp_norm_factor * norms / delta.norm(dim=1).clamp(min=1e-20)
                clamped = delta * excess.clamp(max=1)[:, None]
                delta.copy_(torch.where(active[:, None], clamped, settled))
        return Aimed(self.start + delta.detach(), losses, steps)

    def _backward(self, delta: Tensor, norms: Tensor, active: Tensor, *, gradients: bool) -> Tensor:
        """Each fact's loss, [facts]; adds its gradient to ``delta.grad`` group by group."""
        losses = torch.zeros(delta.shape[0], dtype=torch.float32, device=delta.device)
        narrow = self.config.aiming_dtype == "bfloat16"
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(delta.device.type, torch.bfloat16, enabled=narrow),
        ):
            for group in self.groups:
                part = group.keep(active)
                if part is None:
                    continue
                loss = part.losses(self.anatomy, delta, self.layer, self.contexts, self.config.kl_factor)
                if gradients and loss.requires_grad:  # not of essences alone where kl_factor is 0
                    torch.autograd.backward(loss.sum())
                losses += loss.detach()
            decay = self.config.v_weight_decay * delta.norm(dim=1) / norms.square()
            if gradients:
                torch.autograd.backward(decay.sum())
        total: Tensor = losses + decay.detach()
        return total


@dataclass(frozen=True)
class _Row:
    fact: int
    sentence: Sentence


@dataclass
class _Group:
    """Rows of about the same number of tokens behind their lookup token."""

    members: list[_Row]
    recording: Recording
    entered: Tensor  # [rows, suffix, width], the output of the aimed layer
    initial: dict[int, Tensor]  # fact -> log-probabilities [vocabulary] of its essence before aiming

    def keep(self, active: Tensor) -> _Group | None:
        """The rows of facts that are still searched for; drops the others for good."""
        kept = [number for number, row in enumerate(self.members) if bool(active[row.fact])]
        if len(kept) < len(self.members) and kept:
            index = torch.tensor(kept, device=self.entered.device)
            self.members = [self.members[number] for number in kept]
            self.recording = self.recording.rows(index)
            self.entered = self.entered.index_select(0, index)
        return self if kept else None

    def losses(self, anatomy: Anatomy, delta: Tensor, layer: int, contexts: int, kl_factor: float) -> Tensor:
        """[facts] what this group adds to each fact's loss."""
        facts = torch.tensor([row.fact for row in self.members], device=delta.device)
        entered = self.entered[:, :1]
        wide = torch.promote_types(entered.dtype, delta.dtype)  # so that the sum is rounded once
        moved = (entered.to(wide) + delta[facts].to(entered.device, wide)[:, None]).to(entered.dtype)
        hidden = torch.cat([moved, self.entered[:, 1:]], dim=1)
        at_loss = self.recording.run(hidden, layer + 1, anatomy.loss_layer + 1)
        losses = self._likelihood(anatomy, at_loss, contexts, delta.shape[0]).to(delta)
        essences = [number for number, row in enumerate(self.members) if not row.sentence.targets]
        if not essences or kl_factor == 0.0:
            return losses
        index = torch.tensor(essences, device=at_loss.device)
        top, depth = at_loss[index], len(anatomy.decoder)
        if anatomy.loss_layer + 1 < depth:
            top = self.recording.rows(index).run(top, anatomy.loss_layer + 1, depth)
        now = _log_probabilities(anatomy, top[:, 0])  # where the head is
        for number, row in enumerate(essences):
            self.initial.setdefault(self.members[row].fact, now[number].detach())
        before = torch.stack([self.initial[self.members[row].fact] for row in essences])
        # MEMIT's direction: KL(now ‖ before).
        divergence = (now.exp() * (now - before)).sum(dim=1)
        return losses.index_add(0, facts[index.to(facts.device)], kl_factor * divergence.to(losses))

    def _likelihood(self, anatomy: Anatomy, hidden: Tensor, contexts: int, count: int) -> Tensor:
        places = [
            (number, len(row.sentence.ids) - len(row.sentence.targets) + k - row.sentence.lookup, token, row)
            for number, row in enumerate(self.members)
            for k, token in enumerate(row.sentence.targets)
        ]
        losses = torch.zeros(count, dtype=torch.float32, device=hidden.device)
        if not places:
            return losses
        index = torch.tensor([place[:3] for place in places], device=hidden.device)
        rows, positions, tokens = index.unbind(dim=1)
        spoken = _log_probabilities(anatomy, hidden[rows, positions])
        said = spoken.gather(1, tokens.to(spoken.device)[:, None])[:, 0].to(hidden.device)
        told = [1 / (contexts * len(row.sentence.targets)) for *_, row in places]
        shares = torch.tensor(told, dtype=torch.float32, device=hidden.device)
        facts = torch.tensor([row.fact for *_, row in places], device=hidden.device)
        return losses.index_add(0, facts, -said * shares)


def _log_probabilities(anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """[n, width] -> [n, vocabulary], float32."""
    return torch.log_softmax(anatomy.head(anatomy.norm(hidden)).float(), dim=1)


def _groups(anatomy: Anatomy, rows: list[_Row], layer: int) -> list[_Group]:
    """Rows in groups whose suffixes differ little in length."""
    rows = sorted(rows, key=lambda row: len(row.sentence.ids) - row.sentence.lookup)
    prefixes = read_prefixes(anatomy, [row.sentence for row in rows])
    groups = []
    for piece in pieces([len(row.sentence.ids) - row.sentence.lookup for row in rows]):
        members = rows[piece]
        prefix = prefixes.rows(torch.arange(piece.start, piece.stop))
        recording = record_suffix(anatomy, [row.sentence for row in members], prefix, layer)
        with torch.no_grad():
            entered = recording.run(recording.hidden, layer, layer + 1)
        groups.append(_Group(members, recording, entered, {}))
    return groups


def _tokens(group: list[Sentence]) -> int:
    """Tokens of a fact's sentences, all padded to the longest."""
    return len(group) * max(len(sentence.ids) for sentence in group)


@contextmanager
def _no_weight_gradients(anatomy: Anatomy) -> Iterator[None]:
    # By name: an offloaded parameter is another object after every pass.
    wanted = [name for name, parameter in anatomy.model.named_parameters() if parameter.requires_grad]
    for name in wanted:
        anatomy.model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in wanted:
            anatomy.model.get_parameter(name).requires_grad_(True)
