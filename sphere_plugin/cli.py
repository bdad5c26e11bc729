"""The command ``sphere``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from sphere_plugin.arguments import parser
from sphere_plugin.errors import ConfigError, SphereError
from sphere_plugin.parallel.environment import processes
from sphere_plugin.paths import user_path

# Commands that several processes share; each of them would do any other as a whole.
SHARED: Final = frozenset(("run", "audit"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A SphereError becomes one sentence on stderr."""
    whole = parser()
    arguments = whole.parse_args(argv)
    _log_to_stderr()
    if arguments.command is None:
        whole.print_help()
        return 2
    try:
        _check_processes(arguments.command)
        return COMMANDS[arguments.command](arguments)
    except SphereError as error:
        print(f"sphere: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsphere: interrupted; what was finished is kept, and `--resume` goes on with a run", file=sys.stderr)
        return 130


def _log_to_stderr() -> None:
    """Show warnings, each once: libraries with a handler of their own, as EasyEdit's, have shown theirs already."""
    handler = logging.StreamHandler()
    handler.addFilter(_not_shown)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler])


def _not_shown(record: logging.LogRecord) -> bool:
    """Whether no logger between the record's own and the root writes it to the terminal."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        for one in logger.handlers:
            if isinstance(one, logging.StreamHandler) and not isinstance(one, logging.FileHandler):
                return False
        logger = logger.parent
    return True


def _check_processes(command: str) -> None:
    """Raise ConfigError for a command that is not shared where there are several processes."""
    count = processes()
    if count > 1 and command not in SHARED:
        raise ConfigError(f"sphere {command}", f"{count} processes", "one", "Start it without torchrun.")


def _say(code: int, lines: list[str]) -> int:
    """Print what a command has to say, and return its exit code."""
    if lines:
        print("\n".join(lines))
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from sphere_plugin.data import held_out
    from sphere_plugin.report import draw, table
    from sphere_plugin.sequence.demo import Demo, demo_hparams, run_demo

    out = user_path(arguments.out).resolve()
    demo = Demo(
        hparams=demo_hparams(arguments.hparams, arguments.base_method, arguments.model),
        out=out,
        data=None if arguments.data is None else user_path(arguments.data).resolve(),
        text=held_out(None if arguments.text is None else user_path(arguments.text)),
        edits=arguments.edits,
        batch_size=arguments.batch_size,
        checkpoints=_checkpoints(arguments.checkpoints, arguments.edits, arguments.batch_size),
    )
    result = run_demo(demo)
    draw(result, out / "demo.png")
    print(table(result))
    print(f"\nFigure and numbers: {out / 'demo.png'}, {out / 'demo.json'}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from sphere_plugin.sequence.command import run

    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)  # what is logged below that goes to the log of the run
    return _say(*run(arguments))


def _sweep(arguments: argparse.Namespace) -> int:
    from sphere_plugin.sequence.sweep import run

    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    return _say(*run(arguments))


def _launch(arguments: argparse.Namespace) -> int:
    from sphere_plugin.easyedit.launch import launch
    from sphere_plugin.restraints import SphereConfig

    given = {key: getattr(arguments, key) for key in ("eta", "alpha") if getattr(arguments, key) is not None}
    SphereConfig(**given)  # a number out of its range is told before anything is loaded
    launch(arguments.script, arguments.arguments, {"sphere": given or True} if arguments.sphere or given else {})
    return 0


def _checkpoints(text: str | None, edits: int, batch_size: int) -> tuple[int, ...]:
    """The numbers in ``text``, or about a fifth, a half and all of the edits, between batches."""
    from sphere_plugin.sequence.settings import whole_numbers

    if text is None:
        near = {batch_size * round(edits * share / max(batch_size, 1)) for share in (0.2, 0.5)}
        return (*sorted(number for number in near if 0 < number < edits), edits)
    return whole_numbers("--checkpoints", text)


def _diagnose(arguments: argparse.Namespace) -> int:
    from sphere_plugin.sequence.diagnose import run

    return _say(*run(arguments))


def _abilities(arguments: argparse.Namespace) -> int:
    from sphere_plugin.sequence.abilities_command import run

    return _say(*run(arguments))


def _audit(arguments: argparse.Namespace) -> int:
    from sphere_plugin.sequence.audit_command import run

    return _say(*run(arguments))


def _doctor(arguments: argparse.Namespace) -> int:
    from sphere_plugin.easyedit.doctor import examine

    findings = examine(arguments.hparams)
    for one in findings:
        print(f"{'' if one.verdict == 'ok' else one.verdict:8}{one.topic:13} {one.text}")
    missing = sum(one.verdict == "missing" for one in findings)
    print(f"\n{missing} thing{'s' if missing > 1 else ''} missing" if missing else "\nready")
    return 1 if missing else 0


def _undo(arguments: argparse.Namespace) -> int:
    from sphere_plugin.journaling.undoing import undo

    undone = undo(user_path(arguments.folder), arguments.to)
    where = "" if undone.kept is None else f"; what was taken back is in {undone.kept}"
    print(f"{arguments.folder}: {undone.edits} edits, {undone.batches} batches taken back{where}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from sphere_plugin.journaling.exporting import export

    folder, out = user_path(arguments.folder), user_path(arguments.out)
    exported = export(folder, out, arguments.format, arguments.at, arguments.rank, arguments.model)
    rank = "" if exported.rank is None else f", rank {exported.rank}"
    print(f"{out}: {exported.edits} edits, {exported.format}{rank}")
    for name, error in exported.errors.items():
        print(f"    {name}: {error:.3%} of the update missing")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from sphere_plugin.progress import Bars
    from sphere_plugin.report.page import Options, write_report

    folders = [user_path(folder) for folder in arguments.folders]
    out = folders[0] / "report" if arguments.out is None else user_path(arguments.out)
    options = Options(arguments.at, arguments.layer, arguments.neurons, not arguments.no_texts)
    print(write_report(folders, out, options, Bars()))
    return 0


def _project_adapter(arguments: argparse.Namespace) -> int:
    from sphere_plugin.peft import project_saved_adapter
    from sphere_plugin.restraints import SphereConfig

    source, target = user_path(arguments.source), user_path(arguments.target)
    config = SphereConfig(eta=arguments.eta, alpha=arguments.alpha)
    report = project_saved_adapter(source, target, arguments.base, config)
    print(f"{target}: {len(report.layers)} layers, {report.removed_share:.1%} of the update removed")
    return 0


COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = MappingProxyType(
    {
        "demo": _demo,
        "run": _run,
        "report": _report,
        "undo": _undo,
        "export": _export,
        "doctor": _doctor,
        "launch": _launch,
        "project-adapter": _project_adapter,
        "diagnose": _diagnose,
        "sweep": _sweep,
        "abilities": _abilities,
        "audit": _audit,
    }
)

if __name__ == "__main__":
    sys.exit(main())
