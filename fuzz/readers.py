"""Coverage-guided fuzzing of everything that reads a file: `python fuzz/readers.py yaml|json|tensors -runs=20000`.

Other arguments are libFuzzer's. Whatever a file holds, a reader gives something, or raises a SphereError that says all
of it; anything else ends the process with an error and leaves the input that led there in build/fuzz.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

import atheris

with atheris.instrument_imports(include=["sphere_plugin", "yaml"]):
    import seeds
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import nn

    from sphere_plugin.data import read_records
    from sphere_plugin.easyedit.hparams import RectHyperParams, SphereHyperParams
    from sphere_plugin.errors import SphereError
    from sphere_plugin.evaluation.audits import read_audit
    from sphere_plugin.evaluation.paraphrases import read_paraphrases
    from sphere_plugin.evaluation.tallies import read_tally
    from sphere_plugin.files import read_json, read_tensors, write_tensors
    from sphere_plugin.journaling import Journal
    from sphere_plugin.journaling.delta import apply_delta
    from sphere_plugin.report.read import read_run
    from sphere_plugin.sequence.cells import SweepSettings
    from sphere_plugin.sequence.guard import Events
    from sphere_plugin.sequence.manifest import check_same, read_manifest
    from sphere_plugin.sequence.settings import RunSettings

PLACE: Final = Path("build/fuzz")
# A reader takes a file and the folder it lies in.
Reader = Callable[[Path, Path], object]


def run_settings(path: Path, folder: Path) -> object:
    """A YAML of a run: what is read comes back from what is kept."""
    settings = RunSettings.from_mapping(RunSettings.from_yaml(path))
    if repr(RunSettings.from_mapping(settings.plain())) != repr(settings):
        raise AssertionError("settings that do not come back")
    return settings


def manifest(path: Path, folder: Path) -> object:
    """A manifest, as `sphere run --resume` reads it."""
    path.replace(folder / "manifest.json")
    then = read_manifest(folder)
    check_same(folder, then, read_manifest(folder / "run"))
    return RunSettings.from_mapping(then["settings"])


def run_file(name: str) -> Reader:
    """A file of a run, as a report reads it among others that are well."""

    def read(path: Path, folder: Path) -> object:
        run = folder / "run"
        good = (run / name).read_bytes()
        try:
            path.replace(run / name)
            return read_run(run)
        finally:
            (run / name).write_bytes(good)

    return read


def guard(path: Path, folder: Path) -> object:
    """What a guard did."""
    path.replace(folder / "guard.json")
    events = Events(folder)
    return events.off, events.stopped(2)


def delta(path: Path, folder: Path) -> object:
    """Exact differences, on a model they may be of; a refusal leaves it as it was."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(seeds.WEIGHT)
    try:
        return apply_delta(model, path)
    except SphereError:
        if not torch.equal(model.weight, seeds.WEIGHT):
            raise AssertionError("a refusal that has changed the model") from None
        raise


def journal(path: Path, folder: Path) -> object:
    """The first file of a journal."""
    (folder / "journal").mkdir(exist_ok=True)
    path.replace(folder / "journal" / "base.safetensors")
    return Journal.open(folder / "journal").weights_after(0)


def signed(read: Reader) -> Reader:
    """The same of a file whose digest is right, whatever else is in it."""

    def whole(path: Path, folder: Path) -> object:
        with suppress(SafetensorError, ValueError, RuntimeError, OSError), safe_open(path, framework="pt") as file:
            told = {key: value for key, value in (file.metadata() or {}).items() if key != "sphere_digest"}
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            write_tensors(path, found, told)
        return read(path, folder)

    return whole


READERS: Mapping[str, tuple[Reader, ...]] = MappingProxyType(
    {
        "yaml": (
            lambda path, folder: SphereHyperParams.from_hparams(path),
            lambda path, folder: RectHyperParams.from_hparams(path),
            run_settings,
            lambda path, folder: SweepSettings.from_mapping(RunSettings.from_yaml(path)).cells,
        ),
        "json": (
            lambda path, folder: read_records(path),
            lambda path, folder: read_paraphrases(path),
            lambda path, folder: RunSettings.from_mapping(read_json(path)),
            manifest,
            run_file("manifest.json"),
            run_file("journal/000001.json"),
            run_file("checkpoints/000002.json"),
            run_file("guard.json"),
            guard,
            lambda path, folder: read_tally(path),
            lambda path, folder: read_audit(path),
        ),
        "tensors": (lambda path, folder: read_tensors(path), delta, journal, signed(delta), signed(journal)),
    }
)


def prepare(kind: str, folder: Path) -> list[str]:
    """Seeds and dictionary, as libFuzzer wants them, and a run folder; returns the arguments that name them."""
    corpus, made = folder / "corpus", folder / "made"
    for place in (corpus, made, folder / "run" / "journal", folder / "run" / "checkpoints"):
        place.mkdir(parents=True)
    texts = {"yaml": seeds.yamls, "json": lambda: seeds.jsons(made), "tensors": lambda: seeds.tensors(made)}[kind]()
    for number, content in enumerate(texts):
        for turn in range(len(READERS[kind])):
            (corpus / f"{number}-{turn}").write_bytes(bytes([turn]) + content)
    if kind == "json":
        whole = list(seeds.jsons(folder / "again"))[-7:]
        names = ("manifest.json", None, "journal/000001.json", "checkpoints/000002.json", "guard.json")
        for name, content in zip(names, whole, strict=False):
            if name is not None:
                (folder / "run" / name).write_bytes(content)
    lines = [f'"{_escaped(word)}"' for word in seeds.words(kind)]
    (folder / "dictionary").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        f"-dict={folder / 'dictionary'}",
        "-max_len=4096",
        "-timeout=30",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={folder}/",
        str(corpus),
    ]


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def main() -> None:
    """Fuzz the readers of one kind of file."""
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in READERS:
        raise SystemExit(f"fuzz/readers.py: got {kind!r}, expected one of {', '.join(READERS)}")
    folder = PLACE / kind
    shutil.rmtree(folder, ignore_errors=True)
    arguments = prepare(kind, folder)

    def one_input(data: bytes) -> None:
        path = folder / "input.yaml"
        path.write_bytes(data[1:])
        read = READERS[kind][data[0] % len(READERS[kind])] if data else READERS[kind][0]
        try:
            read(path, folder)
        except SphereError as error:
            if not all(part.strip() for part in (error.culprit, error.expected, error.remedy)):
                raise AssertionError(f"an error that does not say everything: {error}") from error

    atheris.Setup([sys.argv[0], *arguments, *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
