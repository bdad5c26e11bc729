"""Our scores, all prompts at once, against EasyEdit's evaluator, one prompt at a time."""

from __future__ import annotations

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from pico import KINDS, pico

from sphere_plugin import HostError
from sphere_plugin.data import read_records
from sphere_plugin.easyedit.host import find_host, load_host
from sphere_plugin.evaluation import Quality

try:
    find_host()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rewrite_acc_is_the_same_to_the_last_digit(kind: str) -> None:
    load_host()
    evaluate = sys.modules["easyeditor.evaluate.evaluate"].compute_edit_quality
    settings = SimpleNamespace(alg_name="MEMIT", model_name="llama", device="cpu", max_length=40)
    model, tokenizer = pico(kind)
    records = read_records(limit=60)
    teach(model, tokenizer, [f"{record.prompt} {record.target_new}" for record in records[::2]])
    ours = Quality(model, tokenizer, records, "Two words.", batch_tokens=300).score(len(records)).efficacy
    theirs = []
    for record in records:
        request = {
            "prompt": record.prompt,
            "subject": record.subject,
            "target_new": record.target_new,
            "ground_truth": "?",
            "locality": {},
            "portability": {},
        }
        with contextlib.redirect_stdout(io.StringIO()):
            (score,) = evaluate(model, "llama", settings, tokenizer, request, "cpu")["rewrite_acc"]
        theirs.append(float(score))
    assert len(set(theirs)) > 3  # not all right, not all wrong
    assert list(ours) == pytest.approx(theirs, abs=1e-12)


def teach(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> None:
    """A few steps of training, so that some answers are right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[operator]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
