"""The command ``sphere``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sphere_plugin._version import __version__
from sphere_plugin.errors import ConfigError, SphereError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A SphereError becomes one sentence on stderr."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return int(arguments.run(arguments))
    except SphereError as error:
        print(f"sphere: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sphere", description="Knowledge editing that does not wear the model out.")
    parser.add_argument("--version", action="version", version=f"sphere-plugin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="edit a real model with and without SPHERE, side by side")
    demo.set_defaults(run=_demo)
    demo.add_argument("--hparams", type=Path, default=Path("hparams/SPHERE/smollm2-135m.yaml"), help="settings (YAML)")
    demo.add_argument("--base-method", default="MEMIT", choices=("MEMIT", "AlphaEdit"), help="run with and without")
    demo.add_argument("--model", help="Hugging Face name or folder, instead of the one in --hparams")
    demo.add_argument("--data", type=Path, help="CounterFact or ZsRE file (default: the project's own facts)")
    demo.add_argument("--text", type=Path, help="held-out text for perplexity (default: the project's own)")
    demo.add_argument("--edits", type=int, default=200, help="how many facts (default: 200)")
    demo.add_argument("--batch-size", type=int, default=20, help="facts per batch (default: 20)")
    demo.add_argument("--checkpoints", help="score all edits so far after these numbers (default: three)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for figure, numbers and logs")
    doctor = commands.add_parser("doctor", help="what is here, what a YAML will touch and cost, what is missing")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("hparams", metavar="YAML", type=Path, nargs="?", help="settings of any method")
    launch = commands.add_parser("launch", help="run an EasyEdit script as it is, with the plugin active")
    launch.set_defaults(run=_launch)
    launch.add_argument("--sphere", action="store_true", help="project every update, whatever the YAML says")
    launch.add_argument("--eta", type=float, help="the same, with this cumulative ratio")
    launch.add_argument("--alpha", type=float, help="the same, with this suppression strength")
    launch.add_argument("script", metavar="SCRIPT", help="a path, or the name of a script in EasyEdit's examples")
    launch.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    adapter = commands.add_parser("project-adapter", help="write a saved LoRA adapter anew, projected")
    adapter.set_defaults(run=_project_adapter)
    adapter.add_argument("source", metavar="IN", type=Path, help="folder of the adapter, from save_pretrained")
    adapter.add_argument("target", metavar="OUT", type=Path, help="folder to make")
    adapter.add_argument("--base", metavar="MODEL", required=True, help="the model it was trained on: name or folder")
    adapter.add_argument("--eta", type=float, default=0.5, help="cumulative ratio (default: 0.5)")
    adapter.add_argument("--alpha", type=float, default=0.8, help="suppression strength (default: 0.8)")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from sphere_plugin.report import draw, table
    from sphere_plugin.sequence.demo import Demo, demo_hparams, held_out, run_demo

    out = arguments.out.expanduser().resolve()
    demo = Demo(
        hparams=demo_hparams(arguments.hparams, arguments.base_method, arguments.model),
        out=out,
        data=None if arguments.data is None else arguments.data.expanduser().resolve(),
        text=held_out(arguments.text),
        edits=arguments.edits,
        batch_size=arguments.batch_size,
        checkpoints=_checkpoints(arguments.checkpoints, arguments.edits, arguments.batch_size),
    )
    result = run_demo(demo)
    draw(result, out / "demo.png")
    print(table(result))
    print(f"\nFigure and numbers: {out / 'demo.png'}, {out / 'demo.json'}")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from sphere_plugin.easyedit.launch import launch
    from sphere_plugin.restraints import SphereConfig

    given = {key: getattr(arguments, key) for key in ("eta", "alpha") if getattr(arguments, key) is not None}
    SphereConfig(**given)  # a number out of its range is told before anything is loaded
    launch(arguments.script, arguments.arguments, {"sphere": given or True} if arguments.sphere or given else {})
    return 0


def _checkpoints(text: str | None, edits: int, batch_size: int) -> tuple[int, ...]:
    """The numbers in ``text``, or about a fifth, a half and all of the edits, between batches."""
    if text is None:
        near = {batch_size * round(edits * share / max(batch_size, 1)) for share in (0.2, 0.5)}
        return (*sorted(number for number in near if 0 < number < edits), edits)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("--checkpoints", text, "numbers with commas between them", "Write 40,100,200.") from None


def _doctor(arguments: argparse.Namespace) -> int:
    from sphere_plugin.easyedit.doctor import examine

    findings = examine(arguments.hparams)
    for one in findings:
        print(f"{'' if one.verdict == 'ok' else one.verdict:8}{one.topic:14}{one.text}")
    missing = sum(one.verdict == "missing" for one in findings)
    print(f"\n{missing} thing{'s' if missing > 1 else ''} missing" if missing else "\nready")
    return 1 if missing else 0


def _project_adapter(arguments: argparse.Namespace) -> int:
    from sphere_plugin.peft import project_saved_adapter
    from sphere_plugin.restraints import SphereConfig

    source, target = arguments.source.expanduser(), arguments.target.expanduser()
    config = SphereConfig(eta=arguments.eta, alpha=arguments.alpha)
    report = project_saved_adapter(source, target, arguments.base, config)
    print(f"{target}: {len(report.layers)} layers, {report.removed_share:.1%} of the update removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
