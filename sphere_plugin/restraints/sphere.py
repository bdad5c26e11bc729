"""SPHERE: write ΔW(I − αUUᵀ) instead of ΔW (paper eq. 10–13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

from sphere_plugin.errors import ConfigError
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.geometry.checks import check_alpha, check_eta
from sphere_plugin.geometry.tracked import TrackedSpace
from sphere_plugin.restraints.protocol import BoundRestraint, Restrained, removed_share
from sphere_plugin.restraints.spaces import Spaces

Basis = Literal["current", "pretrained"]


@dataclass(frozen=True)
class SphereConfig:
    """The settings of the projection.

    Attributes:
        eta: cumulative ratio η in (0, 1]: U holds the fewest principal directions whose eigenvalues add up to this
            share of all (eq. 11). More directions, more of the update held back. The paper uses 0.5 everywhere.
        alpha: suppression strength α in [0, 1]: 0 writes the update as it is, 1 removes all of it along U (eq. 12).
            The paper uses 0.5 on AlphaEdit and 0.8 on every other method (D.4.1).
        basis: the weight U is taken from. "current" is the weight each update is added to, so that U also holds what
            earlier edits have written, as in the authors' code; "pretrained" is the weight before any edit, as in the
            paper's text. The latter is found once, and kept in the cache (`restraints.spaces`).
        row_normalize: scale every neuron to unit length before looking for U, as both official codes do; the paper's
            eq. 10 is written without.

    Raises:
        ConfigError: a value out of its range.
    """

    eta: float = 0.5
    alpha: float = 0.8
    basis: Basis = "current"
    row_normalize: bool = True

    def __post_init__(self) -> None:
        check_eta(self.eta)
        check_alpha(self.alpha)
        if self.basis not in get_args(Basis):
            raise ConfigError("basis", self.basis, " or ".join(get_args(Basis)), "Leave it out for the default.")

    def bind(self, pretrained: Tensor) -> BoundRestraint:
        """Tie the projection to a weight, given as it was before any edit, [d_out, d_in]."""
        return _BoundSphere(self, pretrained, self._spaces)

    @cached_property
    def _spaces(self) -> Spaces:
        """Shared by the weights this is bound to; no setting, so no field."""
        return Spaces()


@dataclass
class _BoundSphere:
    config: SphereConfig
    pretrained: Tensor
    _spaces: Spaces = field(repr=False)
    _space: PrincipalSpace | None = field(default=None, repr=False)
    _tracked: TrackedSpace | None = field(default=None, repr=False)

    def __call__(self, weight: Tensor, delta: Tensor) -> Restrained[Tensor]:
        if self.config.alpha == 0.0:
            return Restrained(delta, removed_share=0.0, rank=0)
        space = self._fit(weight)
        kept = space.project(delta, self.config.alpha)
        return Restrained(kept, max(0.0, removed_share(delta, kept)), space.rank)

    def factored(self, weight: Tensor, delta: Factors) -> Restrained[Factors]:
        if self.config.alpha == 0.0:
            return Restrained(delta, removed_share=0.0, rank=0)
        if self.config.basis == "current" and TrackedSpace.takes(weight, delta):
            if self._tracked is None:
                self._tracked = TrackedSpace(self.config.eta, self.config.row_normalize)
            kept, rank = self._tracked.project(weight, delta, self.config.alpha)
        else:
            space = self._fit(weight)
            kept, rank = space.project(delta, self.config.alpha), space.rank
        return Restrained(kept, max(0.0, removed_share(delta, kept)), rank)

    def memory(self) -> dict[str, Tensor]:
        """The space that is followed, see `Remembering`."""
        return {} if self._tracked is None else self._tracked.memory()

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """The reverse of `memory`."""
        self._tracked = TrackedSpace(self.config.eta, self.config.row_normalize)
        self._tracked.recall(memory)

    def _fit(self, weight: Tensor) -> PrincipalSpace:
        if self.config.basis == "current":
            return PrincipalSpace.fit(weight, self.config.eta, row_normalize=self.config.row_normalize)
        if self._space is None:
            pretrained = self.pretrained.to(weight.device)
            self._space = self._spaces.space_of(pretrained, self.config.eta, self.config.row_normalize)
        return self._space
