"""The numbers a checkpoint gives for every edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sphere_plugin.errors import ConfigError

# One number per scored edit, None where it was not scored: a record without what it takes, or a score not asked for.
Column = tuple[float | None, ...]

METRICS = (
    "efficacy",
    "efficacy_exact",
    "efficacy_success",
    "generalization",
    "generalization_exact",
    "generalization_success",
    "specificity",
    "specificity_exact",
    "specificity_success",
    "locality",
    "fluency",
    "consistency",
)
SUFFIXES: Final = MappingProxyType({"tokens": "", "exact": "_exact", "success": "_success"})


@dataclass(frozen=True)
class Scores:
    """Scores after some edits. Over several prompts of a record, a number is their mean.

    Attributes:
        edits: how many records have been edited.
        scored: positions, in the order of editing, of those that are scored; the order of all columns.
        efficacy: share of the target's tokens that are the first choice behind the prompt (eq. 59, 62); EasyEdit's
            rewrite_acc.
        efficacy_exact: 1 where all of them are.
        efficacy_success: 1 where the model finds the new target more probable than the true one, per token.
        generalization: as efficacy, behind the paraphrases (eq. 60, 63); so are the two that follow.
        generalization_exact: share of the paraphrases with all tokens.
        generalization_success: share of the paraphrases with the new target more probable than the true one.
        specificity: share of the tokens of the neighbourhood prompts' own true answers that are the first choice.
        specificity_exact: share of the neighbourhood prompts with all of them.
        specificity_success: share of the neighbourhood prompts with the true answer more probable than the new target.
        locality: share of the neighbourhood prompts whose next token is the unedited model's (eq. 61, 64).
        fluency: entropy of bi- and trigrams of what the model writes, in bits (eq. 65).
        consistency: cosine of TF-IDF vectors of what the model writes and the reference texts.
        nll: mean negative log-likelihood of a token of the held-out text, in nats.
    """

    edits: int
    scored: tuple[int, ...]
    efficacy: Column
    efficacy_exact: Column
    efficacy_success: Column
    generalization: Column
    generalization_exact: Column
    generalization_success: Column
    specificity: Column
    specificity_exact: Column
    specificity_success: Column
    locality: Column
    fluency: Column
    consistency: Column
    nll: float

    def columns(self) -> dict[str, Column]:
        """All numbers that there is one of per scored edit, by name."""
        return {name: getattr(self, name) for name in METRICS}


def score_key(name: str, protocol: Mapping[str, str]) -> str:
    """Returns the key in a checkpoint's `scores` that the protocol shows under a metric's name.

    Raises:
        ConfigError: the protocol names none of "exact", "tokens", "success", nor "locality" for specificity.
    """
    chosen = protocol.get(name, "tokens")
    if name == "specificity" and chosen == "locality":
        return "locality"
    if chosen not in SUFFIXES:
        remedy = "Correct the manifest of that run."
        raise ConfigError(f"protocol.{name}", chosen, f"one of {', '.join(SUFFIXES)}", remedy)
    return name + SUFFIXES[chosen]
