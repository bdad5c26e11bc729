"""Every kind of file this package writes: how it comes about on a pico model, and what whoever needs it makes of it.

All are made in one folder of a few hundred kilobytes, a `Place`, of which every fault gets a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import pico_config
from pico import pico
from pico_runs import TEXT, Stop, facts, mapping, place, prints, settings, write_yaml
from report_runs import checkpoint, manifest, write_run
from torch import Tensor, nn

from sphere_plugin.arguments import parser
from sphere_plugin.editing import statistics, unfinished
from sphere_plugin.editing.aim import Aimed
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.evaluation.abilities import Suite
from sphere_plugin.evaluation.auditor import Measured
from sphere_plugin.evaluation.audits import Audit, read_audits, write_audit
from sphere_plugin.evaluation.paraphrases import Probe
from sphere_plugin.evaluation.uncertainty import Uncertainty
from sphere_plugin.files import fingerprint, read_json, read_tensors, write_json, write_tensors
from sphere_plugin.geometry import Factors
from sphere_plugin.journaling import Journal, run_lock
from sphere_plugin.journaling.delta import apply_delta
from sphere_plugin.journaling.exporting import export
from sphere_plugin.journaling.revisit import opened
from sphere_plugin.models import embedded, load_model
from sphere_plugin.peft import project_saved_adapter
from sphere_plugin.report import demo as demo_report
from sphere_plugin.report import diagnosed
from sphere_plugin.report.page import write_report
from sphere_plugin.report.read import read_run, read_runs
from sphere_plugin.report.studies import studies_of
from sphere_plugin.restraints import spaces
from sphere_plugin.sequence import command, compare, runner, sweep
from sphere_plugin.sequence.diagnose import Diagnosis, Options
from sphere_plugin.sequence.guard import Events
from sphere_plugin.sequence.manifest import read_manifest
from sphere_plugin.sequence.measured import Abilities
from sphere_plugin.sequence.runner import resume, start
from sphere_plugin.sequence.targets import Targets
from sphere_plugin.sequence.workers import logged

NEWER = "999"
RUN = "runs/alphaedit+sphere"

Use = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of it, as it is counted.
        out: what `write` makes below a place.
        files: those that are damaged, a pattern below `out`.
        write: makes them in a place without them, as a command does.
        read: what a command makes of them, to be compared.
        newer: turns one into what a later version might write.
        without: fault -> why it is not put to these files.
        earlier: a pattern below `out` of what `write` has written before these.
        flips: bits that are flipped, each in a copy of its own.
    """

    name: str
    out: str
    files: str
    write: Use
    read: Use
    newer: Use | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    earlier: str | None = None
    flips: tuple[float, ...] = (0.1, 0.5, 0.95)

    def paths(self, place: Path) -> list[Path]:
        """The files."""
        return sorted(path for path in (place / self.out).glob(self.files) if path.is_file())


# ---- the place ----


def make_place(folder: Path) -> None:
    """A model, its settings, facts, and a run that was stopped after two batches of three, with all that it keeps."""
    hparams = place(folder, stats_dir=str(folder / "statistics"), mom2_dataset=str(folder / "words.txt"))
    (folder / "words.txt").write_text(f"{TEXT}\n" * 12)
    data = str(facts(folder / "facts.json"))
    write_yaml(folder / "several.yaml", mapping(hparams, "memit,rect", data=data))
    write_yaml(folder / "swept.yaml", mapping(hparams, ["memit"], data=data) | {"grid": {"eta": [0.3]}})
    more = {"share_targets": True, "guard": {"energy": 1e-9, "action": "warn"}, "data": data}
    told = settings(hparams, "alphaedit+sphere", edits=6, checkpoints=[2], sample=1, neighbours=1, **more)
    done = []

    def stopping(what: str, now: int, total: int) -> None:
        done.extend([now] if what == "edits" else [])
        if sum(done) >= 4:
            raise Stop

    with followed(), contextlib.suppress(Stop):
        start(told, folder / RUN, stopping)
    export(folder / RUN, folder / "trained", "adapter", rank=2)
    write_run(folder / "told", manifest("memit", edits=20), [checkpoint(20, {"efficacy": [1.0, 0.0]}, nll=3.0)])


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Spaces of small weights are followed as well, and texts are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sphere_plugin.geometry.tracked.SMALLEST", 8)
        patch.setattr(runner, "CASE_TOKENS", 2)
        yield


@lru_cache(maxsize=1)
def model() -> tuple[nn.Module, Any]:
    """A pico model that nobody changes."""
    return pico("llama")


# ---- later versions ----


def newer_json(path: Path) -> None:
    write_json(path, read_json(path) | {"format": int(NEWER), "parts": []})


def newer_tensors(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    whole = torch.cat([one.flatten().float() for one in tensors.values()])
    write_tensors(path, {"blocks": whole}, {**metadata, "format": NEWER})


def newer_space(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    identity = json.loads(metadata["identity"]) | {"format": int(NEWER)}
    write_tensors(path, {"vectors": tensors["basis"]}, {**metadata, "identity": json.dumps(identity)})


def newer_conversion(path: Path) -> None:
    write_json(path, {"conversion": int(NEWER), "parts": []})


def newer_setting(path: Path) -> None:
    write_json(path, read_json(path) | {"schedule": "cosine"})


def newer_diagnosis(path: Path) -> None:
    told = read_json(path)
    write_json(path, told | {"settings": told["settings"] | {"format": int(NEWER)}, "layers": {}})


# ---- the cache ----


def count(folder: Path) -> dict[int, str]:
    """Key statistics, as an editor gets them."""
    texts = str(folder / "words.txt")
    config = pico_config("llama", mom2_dataset=texts, mom2_n_samples=12, stats_dir=str(folder / "counted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BATCH_TOKENS", 40)
        moments = statistics.key_moments(Anatomy.of(model()[0], config), model()[1], config)
    return {layer: fingerprint([("", moment)]) for layer, moment in moments.items()}


def count_in_part(folder: Path) -> None:
    """The same, stopped after the first sums have been kept."""
    counted, add = [], statistics._Counter.add

    def stopping(self: Any, rows: Any) -> None:
        if len(counted) == 2:
            raise Stop
        counted.append(rows)
        add(self, rows)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(unfinished, "EVERY", 0.0)
        patch.setattr(statistics._Counter, "add", stopping)
        count(folder)
        raise AssertionError("the count was not stopped")


def space(folder: Path) -> list[str]:
    """A principal space, as a restraint gets it."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_PLUGIN_CACHE", str(folder / "cached"))
        patch.setattr(spaces, "SMALLEST", 8)
        found = spaces.Spaces().space_of(weight, 0.5, True)
    return [fingerprint([("", one.contiguous())]) for one in (found.basis, found.eigenvalues)]


def convert(folder: Path) -> dict[str, str]:
    """The folder of the embedded model. Converting the real one takes half a minute; this one is a pico model."""

    def weights(source: Path, target: Path) -> int:
        model()[0].save_pretrained(target)
        return 256

    def tokenizer(source: Path, target: Path, length: int) -> None:
        model()[1].save_pretrained(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "_gguf_file", lambda: folder / "words.txt")
        patch.setattr(embedded, "_convert_weights", weights)
        patch.setattr(embedded, "_convert_tokenizer", tokenizer)
        patch.setattr(embedded.importlib.metadata, "version", lambda name: "1")
        found = content(embedded.embedded_model(folder / "cached"))
    return {name: one for name, one in found.items() if not name.startswith("sphere_")}


def content(folder: Path) -> dict[str, str]:
    """Name -> digest of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


# ---- a journal ----


def _weights() -> dict[str, Tensor]:
    return {name: torch.randn(64, 96, generator=torch.Generator().manual_seed(7)) for name in ("b", "a")}


def begin_journal(folder: Path) -> None:
    with run_lock(folder / "own"):
        Journal.create(folder / "own" / "journal", _weights(), {"b": False, "a": False})


def append(folder: Path) -> None:
    """One more batch."""
    with run_lock(folder / "own"):
        if not (folder / "own" / "journal").exists():
            Journal.create(folder / "own" / "journal", _weights(), {"b": False, "a": False})
        journal = Journal.open(folder / "own" / "journal")
        generator = torch.Generator().manual_seed(len(journal))
        updates = {
            name: Factors(torch.randn(64, 12, generator=generator), torch.randn(96, 12, generator=generator))
            for name in journal.names
        }
        before = journal.weights_after(len(journal))
        after = {name: weight + updates[name].dense() for name, weight in before.items()}
        journal.append({"edits": len(journal) + 1, "facts": []}, after, updates)


def replay(folder: Path) -> list[Any]:
    """All records, and the weights after every batch."""
    journal = Journal.open(folder / "own" / "journal")
    numbers = range(len(journal) + 1)
    states = [fingerprint(journal.weights_after(number).items()) for number in reversed(numbers)]
    return [*states, *(journal.record(number) for number in numbers[1:])]


def newer_batch(path: Path) -> None:
    """A weight stored in a way that this version does not know."""
    entries, metadata = read_tensors(path)
    write_tensors(path, {name.replace("/left", "/first"): one for name, one in entries.items()}, metadata)


def hold(folder: Path) -> str:
    with run_lock(folder / "own"):
        return "held"


def killed_holding(folder: Path) -> None:
    """What is left of a process that was killed while it held the lock."""
    hold(folder)
    with contextlib.suppress(OSError):
        (folder / "own" / "lock").write_text("4242")


# ---- a run ----


def begin_run(folder: Path) -> list[str]:
    """A run of its own, of one batch; goes on where it was stopped."""
    told = settings(
        folder / "hparams" / "SPHERE" / "pico.yaml", "alphaedit", edits=2, checkpoints=[], sample=1, neighbours=1
    )
    with followed():
        if (folder / "begun" / "manifest.json").exists():
            resume(folder / "begun")
        else:
            start(told, folder / "begun")
    return ran(folder)


def ran(folder: Path) -> list[str]:
    return prints(folder / "begun")


def look(folder: Path) -> list[Any]:
    """What commands make of a run before they do anything else."""
    told, one = opened(folder / RUN)[1], read_run(folder / RUN)
    assert told == one.manifest == read_manifest(folder / RUN)
    return [told, one.checkpoints, one.batches, one.stopped]


def go_on(folder: Path) -> list[str]:
    """The run to its end, and what is warned of meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sphere_plugin").addHandler(handler)
    try:
        with followed():
            resume(folder / RUN)
    finally:
        logging.getLogger("sphere_plugin").removeHandler(handler)
    return [*prints(folder / RUN), *(one for one in told if "anew" in one)]


def watch(folder: Path) -> None:
    """A guard that stops a run."""
    with run_lock(folder / "own"):
        Events(folder / "own").add(4, "the energy has changed", "stop", 4)


def stopped(folder: Path) -> list[Any]:
    events = Events(folder / "own")
    return [events.all(), events.off, events.stopped(4)]


def aim(folder: Path) -> list[Any]:
    """The targets of a run with share_targets."""
    told = settings(folder / "hparams" / "SPHERE" / "pico.yaml", "memit", data=str(folder / "facts.json"))

    class Entrant:
        def aiming(self) -> str:
            return "the settings of the search"

    def found(places: range) -> Aimed:
        generator = torch.Generator().manual_seed(places.start)
        size = len(places)
        return Aimed(torch.randn(size, 512, generator=generator), torch.ones(size), torch.arange(size))

    every = Targets(folder / "many", told, Entrant(), found).of(range(12))  # type: ignore[arg-type]
    return [fingerprint([("", one)]) for one in (every.values, every.losses, every.steps)]


# ---- comparisons and sweeps; the runs themselves are put to the test above ----


@contextlib.contextmanager
def no_runs(asked: list[Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for room in (compare, sweep):
            patch.setattr(room, "run_all", lambda tasks, *_: asked.extend(one.settings.plain() for one in tasks) or [])
        patch.setattr(sweep, "_told", lambda *_: (0, []))
        yield


def command_of(work: Callable[..., Any], *argv: object) -> list[Any]:
    """The settings of the runs that a command begins."""
    asked: list[Any] = []
    with no_runs(asked):
        work(parser().parse_args([str(one) for one in argv]))
    return asked


def begin_comparison(folder: Path) -> list[Any]:
    return command_of(command.run, "run", folder / "several.yaml", "--out", folder / "several")


def resume_comparison(folder: Path) -> list[Any]:
    return command_of(command.run, "run", "--resume", folder / "several")


def begin_sweep(folder: Path) -> list[Any]:
    return command_of(sweep.run, "sweep", folder / "swept.yaml", "--out", folder / "swept")


def resume_sweep(folder: Path) -> list[Any]:
    return command_of(sweep.run, "sweep", "--resume", folder / "swept")


# ---- what is measured of runs ----


def audit(folder: Path) -> None:
    probe = Probe(3, "What is known of Water", "Water", "templates", ("Water is", "Tell of Water"))
    measured = Measured(probe, Uncertainty(0.25, 0.5), ("wet", "dry"))
    write_audit(folder / "own", Audit(4, "weights", "model", {"seed": 0, "samples": 2}, (measured,)))


def audits(folder: Path) -> Any:
    return read_audits(folder / "own")


def able(folder: Path) -> dict[str, Any]:
    kept = Abilities(folder / "own", Suite((), text=folder / "text.txt", batch_size=2))
    found = kept.measure(0, "weights", *model())
    return {name: [one["value"], one["records"], one["how"]] for name, one in found.items()}


def diagnose(folder: Path) -> list[Any]:
    """What `sphere diagnose` says of a run, and what a report makes of it."""
    told = Diagnosis(folder / RUN, Options(keys=4)).go()
    (study,) = studies_of(read_runs([folder / RUN]), None)
    found = diagnosed.gather(study)
    return [told, [row.told for row in found.rows], [one for _, one in found.spaces], found.missing]


# ---- exports ----


def export_model(folder: Path) -> None:
    export(folder / RUN, folder / "out", "hf")


def load_exported(folder: Path) -> list[Any]:
    loaded, tokenizer = load_model(str(folder / "out"))
    return [fingerprint(sorted(loaded.state_dict().items())), tokenizer("Who plays the piano?")["input_ids"]]


def export_delta(folder: Path) -> None:
    export(folder / RUN, folder / "one" / "edits.safetensors", "delta")


def apply_exported(folder: Path) -> str:
    fresh = pico("llama")[0]
    apply_delta(fresh, folder / "one" / "edits.safetensors")
    return fingerprint(fresh.state_dict().items())


def export_adapter(folder: Path) -> None:
    export(folder / RUN, folder / "lora", "adapter", rank=2)


def project_exported(folder: Path) -> str:
    return _projected(folder, "lora", "once")


def project(folder: Path) -> None:
    _projected(folder, "trained", "held")


def project_again(folder: Path) -> str:
    return _projected(folder, "held", "twice")


def _projected(folder: Path, source: str, target: str) -> str:
    project_saved_adapter(folder / source, folder / target, str(folder / "pico-llama"))
    return fingerprint(sorted(read_tensors(folder / target / "adapter_model.safetensors")[0].items()))


# ---- reports ----


def report(folder: Path) -> dict[str, str]:
    """A report of one small run."""
    write_report([folder / "told"], folder / "report")
    return content(folder / "report")


def draw(folder: Path) -> dict[str, str]:
    one = {"edits": 2, "efficacy": [1.0], "generalization": [1.0], "specificity": [1.0], "nll": 3.0, "fresh": [1.0]}
    points = [{**one, "edits": edits, "energy": {"2": [5.0 + edits]}} for edits in (0, 2)]
    about = {"model": "pico", "data": "facts", "batch_size": 2, "seconds": 1.0, "host": "none", "edits": 2}
    demo_report.draw(
        {"demo": about, "entries": {"MEMIT": points, "MEMIT + SPHERE": points}}, folder / "demo" / "demo.png"
    )
    return content(folder / "demo")


def log(folder: Path) -> str:
    with logged(folder / "own"):
        logging.getLogger("sphere_plugin").warning("a line of a log")
    return "went on"


# ---- all of them ----

READ = ("truncated", "empty", "one bit flipped", "newer version", "a folder in its place", "unreadable")
WRITTEN = ("read-only folder", "full disk", "two processes", "clock")


def excluded(*faults: str, why: str) -> dict[str, str]:
    return dict.fromkeys(faults, why)


FORMATLESS = excluded("newer version", why="has no format of this package's: a text, or what another library defines")
BY_A_RUN = excluded(*WRITTEN, why="written by a run under its lock; `run folder` is put to this as a whole")
IN_ONE_FOLDER = excluded(*WRITTEN, why="written with the weights, in a folder that appears as a whole")
GOVERNED = excluded("newer version", why="the manifest's format is that of the whole folder")
ITS_FILES = excluded(*READ, why="each of its files is a kind of its own")
EMBEDDED = "cached/models"
STORED = "own/journal"

KINDS = (
    Kind("key statistics", "counted", "*", count, count, newer_tensors),
    Kind("texts of an unfinished count", "counted", "*.texts.json", count_in_part, count, newer_json),
    Kind(
        "sums of an unfinished count",
        "counted",
        "*.sums.safetensors",
        count_in_part,
        count,
        newer_tensors,
        earlier="*.texts.json",
    ),
    Kind("principal space", "cached/spaces", "*", space, space, newer_space),
    Kind("embedded model: weights", EMBEDDED, "*/model.safetensors", convert, convert, None, FORMATLESS),
    Kind("embedded model: tokenizer", EMBEDDED, "*/tok*.json", convert, convert, None, FORMATLESS | IN_ONE_FOLDER),
    Kind("embedded model: record", EMBEDDED, "*/sphere_*", convert, convert, newer_conversion, IN_ONE_FOLDER),
    Kind("journal: base", STORED, "base.safetensors", begin_journal, replay, newer_tensors),
    Kind("journal: batch", STORED, "000001.safetensors", append, replay, newer_batch, earlier="base.safetensors"),
    Kind("journal: record", STORED, "000001.json", append, replay, newer_json, earlier="*.safetensors"),
    Kind("lock", "own", "lock", killed_holding, hold, None, FORMATLESS),
    Kind("run folder", "begun", "journal/000001.json", begin_run, ran, None, ITS_FILES, "*/*"),
    Kind("manifest", RUN, "manifest.json", look, look, newer_json, BY_A_RUN),
    Kind("checkpoint", RUN, "checkpoints/000002.json", look, look, None, GOVERNED | BY_A_RUN),
    Kind("memory", RUN, "memory/*", look, go_on, newer_tensors, BY_A_RUN),
    Kind("guard", "own", "guard.json", watch, stopped, newer_json),
    Kind("comparison", "several", "comparison.json", begin_comparison, resume_comparison, newer_setting),
    Kind("targets", "many", "targets.safetensors", aim, aim, newer_tensors),
    Kind("sweep", "swept", "sweep.json", begin_sweep, resume_sweep, newer_json),
    Kind("audit", "own", "audit/*", audit, audits, newer_json),
    Kind("abilities", "own", "abilities/*", able, able, newer_json),
    Kind("diagnosis", f"{RUN}/diagnostics", "000002.json", diagnose, diagnose, newer_diagnosis, earlier="*"),
    Kind("null spaces", f"{RUN}/diagnostics", "spaces.json", diagnose, diagnose, newer_json),
    Kind("exported model: weights", "out", "model.safetensors", export_model, load_exported, None, FORMATLESS),
    Kind(
        "exported model: settings", "out", "config.json", export_model, load_exported, None, FORMATLESS | IN_ONE_FOLDER
    ),
    Kind("exported model: sums", "out", "SHA256SUMS", export_model, load_exported, None, FORMATLESS | IN_ONE_FOLDER),
    Kind("exported delta", "one", "edits.safetensors", export_delta, apply_exported, newer_tensors),
    Kind("exported adapter", "lora", "adapter_model.safetensors", export_adapter, project_exported, None, FORMATLESS),
    Kind("projected adapter", "held", "adapter_model.safetensors", project, project_again, None, FORMATLESS),
    Kind("report", "report", "*", report, report, None, FORMATLESS, flips=(0.5,)),
    Kind("demo figure", "demo", "demo.png", draw, draw, None, FORMATLESS, flips=(0.5,)),
    Kind("log of a run", "own", "run.log", log, log, None, FORMATLESS),
)

# Who writes files: module -> for each of its calls, in their order, the kind that the file is of; in brackets: none.
WRITERS = MappingProxyType(
    {
        "cli.py": ("(a log to the screen)",),
        "easyedit/journal.py": ("manifest",),
        "editing/statistics.py": ("key statistics",),
        "editing/unfinished.py": ("texts of an unfinished count", "sums of an unfinished count"),
        "evaluation/audits.py": ("audit",),
        "evaluation/diagnoses.py": ("diagnosis", "null spaces"),
        "evaluation/tallies.py": ("abilities",),
        "folders.py": ("exported model: sums",),
        "journaling/delta.py": ("exported delta",),
        "journaling/exporting.py": (
            *("exported model: weights", "exported model: settings", "exported model: sums"),
            *("(edits.json and README.md of that folder: for people)",) * 2,
        ),
        "journaling/lock.py": ("lock",),
        "journaling/store.py": ("journal: base", "journal: batch", "journal: record"),
        "models/embedded.py": (
            *("embedded model: weights", "embedded model: record"),
            *("embedded model: weights", "embedded model: tokenizer"),
        ),
        "peft.py": (
            *("projected adapter",) * 4,
            *("exported adapter",) * 2,
        ),
        "report/demo.py": ("(in memory)", "demo figure"),
        "report/page.py": ("report",) * 8,
        "report/style.py": ("(in memory)",),
        "report/svg.py": ("(in memory)",),
        "restraints/spaces.py": ("principal space",),
        "sequence/compare.py": ("comparison",),
        "sequence/demo.py": (
            "(demo.json: for people; the command looks for its place before it begins)",
            "log of a run",
            "(who is told to write it)",
        ),
        "sequence/entries.py": ("(a YAML for the moment in which EasyEdit reads it)",),
        "sequence/guard.py": ("guard",),
        "sequence/runner.py": ("manifest", "memory", "checkpoint"),
        "sequence/sweep.py": ("sweep", "sweep"),
        "sequence/targets.py": ("targets",),
        "sequence/workers.py": ("log of a run",),
    }
)
