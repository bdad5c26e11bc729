"""The demo: the same facts into the same model twice, without SPHERE and with it, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import platform
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from sphere_plugin._version import __version__
from sphere_plugin.data import read_records
from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.easyedit.registration import register
from sphere_plugin.errors import SphereError
from sphere_plugin.evaluation import Quality
from sphere_plugin.files import check_writable, make_folder, write_json
from sphere_plugin.sequence.entries import absolute
from sphere_plugin.sequence.run import Checkpoint, SequentialRun
from sphere_plugin.sequence.settings import check_schedule
from sphere_plugin.sequence.workers import Log, workers_environment

_LOG = logging.getLogger("sphere_plugin")

# Scoring one prompt, as a share of editing one fact: only the progress bar's estimate depends on it.
PROMPT_COST = 0.04


BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


class DemoError(SphereError, RuntimeError):
    """One of the two runs failed."""


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        hparams: the settings, of which ``alpha`` is the strength of the run with SPHERE.
        out: folder for the figure, the numbers and the logs.
        data: a file of facts; None is the project's own.
        text: held-out text for perplexity.
        edits: how many facts.
        batch_size: facts per batch.
        checkpoints: numbers of edits after which all so far are scored.
    """

    hparams: SphereHyperParams
    out: Path
    data: Path | None
    text: str
    edits: int
    batch_size: int
    checkpoints: tuple[int, ...]

    def entries(self) -> dict[str, SphereHyperParams]:
        """The pair: the base method alone, and with SPHERE."""
        base = self.hparams.base_method
        return {base: dataclasses.replace(self.hparams, alpha=0.0), f"{base} + SPHERE": self.hparams}


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run both entries, each in a process of one thread; returns what was also written to ``out/demo.json``.

    Raises:
        SphereError: bad settings or data, before anything is computed; DemoError if a run fails.
    """
    check_schedule(demo.edits, demo.batch_size, demo.checkpoints)
    records = read_records(demo.data, demo.edits)
    check_writable(demo.out / "demo.json")
    with contextlib.chdir(demo.out):  # EasyEdit writes its log to the working directory
        host = register()
        editor = host.base_editor(demo.hparams)
        Quality(editor.model, editor.tok, records[:1], demo.text)  # says what is wrong with the text
        editor.apply_algo.editor.prepare()
        del editor
    started = time.perf_counter()
    checkpoints = _side_by_side(demo)
    result = {
        "demo": {
            "edits": demo.edits,
            "batch_size": demo.batch_size,
            "data": "the project's own facts" if demo.data is None else demo.data.name,
            "model": Path(demo.hparams.model_name).name,
            "hparams": {**dataclasses.asdict(demo.hparams), "model_name": Path(demo.hparams.model_name).name},
            "seconds": round(time.perf_counter() - started, 1),
            "host": host.describe().split(" in ")[0],
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_default_dtype()}",
            "versions": {name: version(name) for name in ("torch", "transformers")} | {"sphere-plugin": __version__},
        },
        "entries": checkpoints,
    }
    write_json(demo.out / "demo.json", result)
    return result


# ---- two processes, one bar each ----


def _side_by_side(demo: Demo) -> dict[str, list[dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    entries = demo.entries()
    workers = {
        name: context.Process(target=_work, args=(name, hparams, demo, messages), daemon=True)
        for name, hparams in entries.items()
    }
    scored = {name: [] for name in entries}  # type: dict[str, list[dict[str, Any]]]
    with workers_environment(1):
        for worker in workers.values():
            worker.start()
    bars = {name: tqdm(total=0, desc=f"{name:20}", bar_format=BAR, position=n) for n, name in enumerate(entries)}
    try:
        running = set(entries)
        while running:
            name, kind, content = _next(messages, workers, running, demo.out)
            if kind == "total":
                bars[name].total = content
                bars[name].refresh()
            elif kind == "progress":
                bars[name].update(content)
            elif kind == "checkpoint":
                scored[name].append(content)
            elif kind == "failed":
                raise DemoError(name, content, "a finished run", f"See {demo.out / _log_name(name)}.")
            else:
                running.discard(name)
        for worker in workers.values():
            worker.join(timeout=60)  # let them clear up after themselves
    finally:
        for bar in bars.values():
            bar.close()
        for worker in workers.values():
            worker.terminate()
    return scored


def _next(messages: Any, workers: dict[str, Any], running: set[str], out: Path) -> tuple[str, str, Any]:
    while True:
        try:
            message: tuple[str, str, Any] = messages.get(timeout=5)
            return message
        except queue.Empty:
            for name in running:
                if not workers[name].is_alive():
                    code = workers[name].exitcode
                    raise DemoError(
                        name, f"exit code {code}", "a finished run", f"See {out / _log_name(name)}; free some memory."
                    ) from None


def _work(name: str, hparams: SphereHyperParams, demo: Demo, messages: Any) -> None:
    """One run, in its own process."""
    folder = demo.out / _log_name(name).removesuffix(".log")
    make_folder(folder)
    os.chdir(folder)  # EasyEdit writes its own log to the working directory
    logging.basicConfig(handlers=[Log(demo.out / _log_name(name), mode="w")], level=logging.INFO)
    logging.getLogger("easyeditor").setLevel(logging.WARNING)
    try:
        for checkpoint in _run(hparams, demo, lambda kind, content: messages.put((name, kind, content))):
            messages.put((name, "checkpoint", _plain(checkpoint)))
        messages.put((name, "done", None))
    except BaseException as error:
        logging.error(traceback.format_exc())
        messages.put((name, "failed", str(error) or type(error).__name__))


def _run(hparams: SphereHyperParams, demo: Demo, tell: Callable[[str, Any], None]) -> Iterator[Checkpoint]:
    torch.set_num_threads(1)
    records = read_records(demo.data, demo.edits)
    editor = register().base_editor(hparams)
    quality = Quality(editor.model, editor.tok, records, demo.text)
    prompts = sum(quality.prompts(edits) for edits in demo.checkpoints)
    tell("total", demo.edits + PROMPT_COST * prompts)

    def progress(edits: int, scored: int) -> None:
        tell("progress", edits + PROMPT_COST * scored)

    yield from SequentialRun(editor, records, quality, demo.batch_size, demo.checkpoints, progress)


def _log_name(name: str) -> str:
    return name.lower().replace(" + ", "-") + ".log"


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON has it: strict scores, and the paper's Specificity, against the unedited model."""
    made = checkpoint.scores
    scores = {
        "edits": made.edits,
        "efficacy": made.efficacy_exact,
        "generalization": made.generalization_exact,
        "specificity": made.locality,
        "efficacy_tokens": made.efficacy,
        "nll": made.nll,
    }
    energy = {f"{s:g}": values for s, values in checkpoint.energy.items()}
    return {**scores, "energy": energy, "fresh": checkpoint.fresh, "seconds": round(checkpoint.seconds, 1)}


def demo_hparams(path: Path, base_method: str, model: str | None) -> SphereHyperParams:
    """The settings in ``path``, with this base method, its own strength of SPHERE, and this model if one is named."""
    hparams = SphereHyperParams.from_hparams(path)
    changes: dict[str, Any] = {} if model is None else {"model_name": model}
    if hparams.base_method != base_method:
        changes |= {"base_method": base_method, "alpha": None}
    return cast(SphereHyperParams, absolute(dataclasses.replace(hparams, **changes)))
