"""Text that the model writes itself: prefixes to edit behind, and a corpus for key statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Openers that lead into many kinds of sentence. The first five are those of MEMIT's context templates.
OPENERS = (
    "The", "Therefore", "Because", "I", "You", "In", "It", "When", "A", "He", "She", "They", "There", "This", "After",
    "On", "At", "As", "If", "We", "For", "During", "One", "Many", "Some", "Most", "By", "With", "From", "What", "How",
    "Although", "Since", "Each", "To", "His", "Her", "My", "Their", "People",
)  # fmt: skip


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
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Texts sampled from the model at temperature 1, the same for the same model, seed and arguments.

    Args:
        model: a causal language model of Hugging Face's.
        tokenizer: its tokenizer.
        number: how many texts.
        tokens: new tokens in each, behind an opener; a text ends earlier where the model ends it.
        seed: of the sampling; the global random state is left as it was.
        openers: first words, taken in turn.
        batch: texts written at once.
        progress: called with the number of texts done, as they are done.
    """
    texts: list[str] = []
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    # Padded here and on the left: many tokenizers have no pad token of their own.
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        while len(texts) < number:
            size = min(batch, number - len(texts))
            starts = [openers[(len(texts) + k) % len(openers)] for k in range(size)]
            rows = tokenizer(starts)["input_ids"]
            missing = [max(map(len, rows)) - len(row) for row in rows]
            ids = [[pad] * n + row for n, row in zip(missing, rows, strict=True)]
            mask = [[0] * n + [1] * len(row) for n, row in zip(missing, rows, strict=True)]
            with torch.no_grad():
                written = model.generate(  # type: ignore[operator]
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    max_new_tokens=tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=pad,
                )
            new = [row[n:] for n, row in zip(missing, written, strict=True)]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            if progress is not None:
                progress(size)
    return texts
