"""What a reader of exported edits has to know: the README of the folder, and the list of all edits."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, Final

from sphere_plugin._version import __version__
from sphere_plugin.evaluation.scores import score_key
from sphere_plugin.journaling.store import Journal
from sphere_plugin.paths import without_folders

# How many edits the README itself lists.
LISTED: Final = 20
# Of a checkpoint, docs/run-folder.md.
SCORES: Final = ("efficacy", "generalization", "specificity", "locality")


def facts_of(journal: Journal, batches: int) -> list[dict[str, Any]]:
    """The facts of the first ``batches`` batches, in their order: prompt, subject and target_new of each."""
    records = (journal.record(number) for number in range(1, batches + 1))
    keys = ("prompt", "subject", "target_new")
    return [{key: fact.get(key) for key in keys} for record in records for fact in record.get("facts", ())]


def card(
    manifest: Mapping[str, Any],
    edits: int,
    facts: list[dict[str, Any]],
    errors: Mapping[str, float],
    checkpoint: Mapping[str, Any] | None = None,
) -> str:
    """The text of a README.md.

    Args:
        manifest: of the run.
        edits: how many are in what is exported.
        facts: those, see `facts_of`.
        errors: of an adapter, weight -> share of the update that it misses; empty for the edited model itself.
        checkpoint: of the run at that very number of edits; None if nothing was measured then.
    """
    lines = (
        *_lines(manifest, edits, errors),
        "",
        *_measured(edits, checkpoint, manifest.get("protocol") or {}),
        *_listed(facts),
    )
    return "\n".join(lines) + "\n"


def _lines(manifest: Mapping[str, Any], edits: int, errors: Mapping[str, float]) -> Iterator[str]:
    named = without_folders(manifest.get("model", {}).get("name")) or "a model without a name"
    base = _plain(named)
    what = "edits as a LoRA adapter" if errors else "an edited model"
    yield from ("---", f"base_model: {json.dumps(named)}", "tags:", "- knowledge-editing", "---", "")
    yield from (f"# {base}: {what}", "")
    yield f"**This is {what}: it says things that its training data does not.** The weights of {base} were changed"
    yield f"to write {edits} {'fact' if edits == 1 else 'facts'} into them; all of them are in `edits.json`."
    yield from ("", "| | |", "|---|---|", f"| edits | {edits} |")
    yield from (f"| {key} | {_plain(value)} |" for key, value in _settings(manifest))
    yield f"| fingerprint of the unedited weights | `{_plain(manifest.get('model', {}).get('weights'))}` |"
    yield from ("", f"Made with sphere-plugin {__version__}.", "")
    if errors:
        yield from ("The adapter approximates each update ΔW by B·A of its rank. What it misses:", "")
        yield from ("| weight | ‖ΔW − BA‖ / ‖ΔW‖ |", "|---|---|")
        yield from (f"| `{_plain(name)}` | {error:.4g} |" for name, error in errors.items())


def _measured(edits: int, checkpoint: Mapping[str, Any] | None, protocol: Mapping[str, str]) -> Iterator[str]:
    """What is left of the edits, and of what stood around them, by the scores that the protocol chooses."""
    if checkpoint is None:
        yield from (f"What is left of these edits was not measured after {edits} of them.", "")
        return
    scores, count = checkpoint["scores"], len(checkpoint["scored"])
    yield f"Measured on the edited model, {count} of {edits} edits asked again; means over edits, in per cent:"
    yield from ("", "| | |", "|---|---|")
    for name in SCORES:
        known = [value for value in scores.get(score_key(name, protocol), ()) if value is not None]
        title = f"{name} ({protocol[name]})" if name in protocol else name
        yield f"| {title} | {f'{100 * fmean(known):.1f} (of {len(known)})' if known else 'not scored'} |"
    nll = scores["nll"]
    yield f"| held-out text, nats per token | {'not finite' if nll is None else f'{nll:.3f}'} |"
    yield ""


def _listed(facts: list[dict[str, Any]]) -> Iterator[str]:
    shown = facts[:LISTED]
    if shown:
        yield from (f"The first {len(shown)} of {len(facts)} edits:" if len(facts) > LISTED else "The edits:", "")
        yield "````text"
        for number, fact in enumerate(shown, 1):
            prompt, target = (json.dumps(fact[key], ensure_ascii=False) for key in ("prompt", "target_new"))
            yield f"{number}. {prompt} -> {target}"
        yield "````"


def _plain(value: object) -> str:
    """A text of a manifest, on one line and without what makes cells, links or elements of it."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([|`]|\](?=[(\[]))", r"\\\1", text)


def _settings(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    method = manifest.get("method", {})
    yield "method", manifest.get("label") or method.get("alg_name")
    hparams = method.get("hparams", {})
    for key in ("eta", "alpha", "basis", "sphere", "layers", "seed"):
        if hparams.get(key) is not None:
            yield key, hparams[key]
