"""Text that the model writes itself: prefixes to edit behind, and a corpus for key statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from sphere_plugin.models.forward import pad_right
from sphere_plugin.models.placement import input_device
from sphere_plugin.randomness import DrawnFrom

# Openers that lead into many kinds of sentence. The first five are those of MEMIT's context templates.
OPENERS = (
    "The", "Therefore", "Because", "I", "You", "In", "It", "When", "A", "He", "She", "They", "There", "This", "After",
    "On", "At", "As", "If", "We", "For", "During", "One", "Many", "Some", "Most", "By", "With", "From", "What", "How",
    "Although", "Since", "Each", "To", "His", "Her", "My", "Their", "People",
)  # fmt: skip
AT_ONCE: Final = 64  # texts that are written side by side


@dataclass(frozen=True)
class Contexts:
    """Prefixes that prompts are put behind.

    Attributes:
        prefixes: the texts; the first is empty, the bare prompt.
        shares: what each counts for in a fact's key; they add up to 1. Each group of equally long prefixes counts as
            much as the bare prompt, as in MEMIT's and AlphaEdit's code.
    """

    prefixes: tuple[str, ...]
    shares: tuple[float, ...]

    @classmethod
    def bare(cls) -> Contexts:
        """The bare prompt only."""
        return cls(("",), (1.0,))

    @classmethod
    def generate(cls, model: nn.Module, tokenizer: Any, params: Sequence[Sequence[int]], seed: int) -> Contexts:
        """Let the model write ``number`` prefixes of ``tokens`` tokens for every pair (tokens, number) of params."""
        prefixes, shares = [""], [1 / (1 + len(params))]
        for group, (tokens, number) in enumerate(params):
            texts = write_texts(model, tokenizer, number, tokens, seed + group, openers=OPENERS[:5])
            prefixes += [text.strip() + ". " for text in texts]
            shares += [1 / (1 + len(params)) / number] * number
        return cls(tuple(prefixes), tuple(shares))


def write_texts(
    model: nn.Module,
    tokenizer: Any,
    number: int,
    tokens: int,
    seed: int,
    openers: Sequence[str] = OPENERS,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Texts sampled from the model at temperature 1, the same for the same model, seed and arguments.

    Args:
        model: a causal language model of Hugging Face's.
        tokenizer: its tokenizer.
        number: how many texts.
        tokens: new tokens in each, behind an opener; a text ends earlier where the model ends it.
        seed: of the sampling; the global random state is neither used nor changed.
        openers: first words, taken in turn.
        progress: called with the number of texts done, as they are done.
    """
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    padding = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    starts = [tokenizer([opener])["input_ids"][0] for opener in openers]
    texts: list[str] = []
    device, own = input_device(model), model.generation_config
    with DrawnFrom(torch.Generator(device).manual_seed(seed)), torch.no_grad():
        try:
            # The model's own generation settings, such as a repetition penalty, would fill in what is not given.
            model.generation_config = GenerationConfig(
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=padding,
                eos_token_id=end,
            )
            while len(texts) < number:
                size = min(AT_ONCE, number - len(texts))
                rows = [starts[(len(texts) + k) % len(starts)] for k in range(size)]
                ids, mask = pad_right([row[::-1] for row in rows])
                ids, mask = ids.flip(1).to(device), mask.flip(1).to(device)  # padded on the left, to be continued
                written = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
                kept = [
                    _whole(row.tolist(), start, ids.shape[1], end) for row, start in zip(written, rows, strict=True)
                ]
                texts += tokenizer.batch_decode(kept, skip_special_tokens=True)
                if progress is not None:
                    progress(size)
        finally:
            model.generation_config = own
    return texts


def _whole(row: list[int], start: list[int], width: int, end: int | None) -> list[int]:
    """A written row without the padding before its ``start`` and from its end token on."""
    new = row[width:]
    return start + (new[: new.index(end)] if end in new else new)
