"""Tiny random models and their tokenizer, made in the test process: no download, no file.

``pico("llama")`` gives a model of 4 layers whose outputs depend on its input, and a byte-level BPE tokenizer.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

KINDS = ("llama", "qwen2", "gpt2", "gptj")

_TEXT = (
    "The Eiffel Tower is in the city of Paris, the capital of France. The Colosseum stands in Rome, in Italy.",
    "Danielle Darrieux's mother tongue is French. The mother tongue of Leo Tolstoy is Russian, not English.",
    "Who plays the piano? Thelonious Monk plays the piano; Jimi Hendrix was known for the guitar (1942-1970).",
    "Toyota Camry is produced by Toyota. Windows 95 was developed by Microsoft. iPhone 5 is created by Apple!",
    'He said: "Water boils at 100 degrees, doesn\'t it?" - and 3 + 4 = 7.\n\nA new line starts here.',
)


def pico(kind: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a model with random float32 weights, in eval mode, and its tokenizer; the same for the same seed.

    Args:
        kind: "llama" (grouped queries, BOS prepended), "qwen2" (tied embeddings), "gpt2" (Conv1D), "gptj" (fc_out).
        seed: of the weights; torch's global generator is left as it was.
    """
    tokenizer = pico_tokenizer(bos=kind == "llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(kind, tokenizer), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    return model.eval(), tokenizer


def save_pico(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save model and tokenizer in Hugging Face format and return the folder."""
    model, tokenizer = pico(kind, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pico_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with "<s>", "</s>" and "<pad>"; ``bos`` says whether "<s>" is prepended."""
    tokenizer = Tokenizer.from_str(_trained())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


@lru_cache(maxsize=1)
def _trained() -> str:
    """Return the trained tokenizer as JSON, so that callers cannot change each other's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    gated = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    gpt = {"n_embd": 32, "n_inner": 96, "n_layer": 4, "n_head": 4, "n_positions": 256}
    if kind == "llama":
        return LlamaConfig(**tokens, **gated, num_key_value_heads=2)
    if kind == "qwen2":
        return Qwen2Config(**tokens, **gated, num_key_value_heads=4, tie_word_embeddings=True)
    if kind == "gpt2":
        return GPT2Config(**tokens, **gpt)
    if kind == "gptj":
        return GPTJConfig(**tokens, **gpt, rotary_dim=4, tie_word_embeddings=False)
    raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
