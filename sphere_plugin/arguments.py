"""What the commands of `sphere` are called with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from sphere_plugin._version import __version__

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """The parser of `sphere`; what it returns has the name of the command as ``command``."""
    whole = argparse.ArgumentParser(prog="sphere", description="Knowledge editing that does not wear the model out.")
    whole.add_argument("--version", action="version", version=f"sphere-plugin {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    first = (_add_demo, _add_run, _add_report, _add_undo, _add_export, _add_doctor, _add_launch, _add_adapter)
    for add in (*first, _add_diagnose, _add_sweep, _add_abilities, _add_audit):
        add(commands)
    return whole


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="edit a real model with and without SPHERE, side by side")
    demo.add_argument("--hparams", type=Path, default=Path("hparams/SPHERE/smollm2-135m.yaml"), help="settings (YAML)")
    demo.add_argument("--base-method", default="MEMIT", choices=("MEMIT", "AlphaEdit"), help="run with and without")
    demo.add_argument("--model", help="Hugging Face name or folder, instead of the one in --hparams")
    demo.add_argument("--data", type=Path, help="CounterFact or ZsRE file (default: the project's own facts)")
    demo.add_argument("--text", type=Path, help="held-out text for perplexity (default: the project's own)")
    demo.add_argument("--edits", type=int, default=200, help="how many facts (default: 200)")
    demo.add_argument("--batch-size", type=int, default=20, help="facts per batch (default: 20)")
    demo.add_argument("--checkpoints", help="score all edits so far after these numbers (default: three)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for figure, numbers and logs")


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="what is here, what a YAML will touch and cost, what is missing")
    doctor.add_argument("hparams", metavar="YAML", type=Path, nargs="?", help="settings of any method")


def _add_launch(commands: Commands) -> None:
    launch = commands.add_parser("launch", help="run an EasyEdit script as it is, with the plugin active")
    launch.add_argument(
        "--sphere", action="store_true", help="project every update of EasyEdit's methods, whatever the YAML says"
    )
    launch.add_argument("--eta", type=float, help="the same, with this cumulative ratio")
    launch.add_argument("--alpha", type=float, help="the same, with this suppression strength")
    launch.add_argument("script", metavar="SCRIPT", help="a path, or the name of a script in EasyEdit's examples")
    launch.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")


def _add_undo(commands: Commands) -> None:
    undo = commands.add_parser("undo", help="take the last edits of a run back")
    undo.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")
    undo.add_argument("--to", metavar="N", type=int, required=True, help="how many edits stay; 0: none")


def _add_export(commands: Commands) -> None:
    export = commands.add_parser("export", help="make a model, a file of differences or a LoRA from a run's edits")
    export.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")
    export.add_argument("out", metavar="OUT", type=Path, help="folder, or for delta file, to make")
    export.add_argument("--format", default="hf", choices=("hf", "delta", "adapter"), help="of OUT (default: hf)")
    export.add_argument("--at", metavar="N", type=int, help="after this many edits (default: all)")
    export.add_argument("--rank", type=int, help="of an adapter (default: what loses less than 1 %% of an update)")
    export.add_argument("--model", help="where the unedited model is, instead of where the run found it")


def _add_adapter(commands: Commands) -> None:
    adapter = commands.add_parser("project-adapter", help="write a saved LoRA adapter anew, projected")
    adapter.add_argument("source", metavar="IN", type=Path, help="folder of the adapter, from save_pretrained")
    adapter.add_argument("target", metavar="OUT", type=Path, help="folder to make")
    adapter.add_argument("--base", metavar="MODEL", required=True, help="the model it was trained on: name or folder")
    adapter.add_argument("--eta", type=float, default=0.5, help="cumulative ratio (default: 0.5)")
    adapter.add_argument("--alpha", type=float, default=0.8, help="suppression strength (default: 0.8)")


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="one page of runs: tables, curves, neurons, tests; and its figures")
    report.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="folders of runs, or folders of those")
    report.add_argument("--out", type=Path, help="folder to write to (default: report, in the first DIR)")
    report.add_argument("--at", metavar="N", type=int, help="compare after N edits (default: the last all runs have)")
    report.add_argument("--layer", type=int, help="whose neurons to show (default: the last edited one)")
    report.add_argument("--neurons", metavar="N", type=int, default=1000, help="show N at most (default: 1000)")
    report.add_argument("--no-texts", action="store_true", help="without what the models write: it holds the data")


def _add_diagnose(commands: Commands) -> None:
    diagnose = commands.add_parser("diagnose", help="hidden interference of a run's batches, and the theorem tested")
    diagnose.add_argument("target", metavar="DIR", type=Path, help="folder of a run, or a folder of those")
    diagnose.add_argument("--at", default="every", metavar="N,...", help="after these edits (default: every batch)")
    diagnose.add_argument(
        "--keys", metavar="N", type=int, default=500, help="protected inputs of a kind (default: 500)"
    )
    diagnose.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    diagnose.add_argument("--text", type=Path, help="held-out text, instead of the run's")
    diagnose.add_argument("--data", type=Path, help="where the run's file of facts is now")
    diagnose.add_argument("--model", help="where the unedited model is, instead of where the run found it")


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser("sweep", help="runs over a grid of eta, alpha, basis, projection, layers; the best")
    sweep.add_argument("settings", metavar="YAML", type=Path, nargs="?", help="settings of a run, and the grid")
    sweep.add_argument("--resume", metavar="DIR", type=Path, help="go on with the sweep in DIR")
    sweep.add_argument("--without-guard", action="store_true", help="go on with runs although the guard stopped them")
    sweep.add_argument("--data", type=Path, help="file of facts, instead of the one in the YAML")
    sweep.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    sweep.add_argument("--plan", action="store_true", help="only say what it would take: time, memory, disk")
    sweep.add_argument("--out", metavar="DIR", type=Path, help="folder for the sweep")


def _add_abilities(commands: Commands) -> None:
    abilities = commands.add_parser("abilities", help="what editing does to reasoning, inference and answering")
    abilities.add_argument("target", metavar="TARGET", help="a run, a comparison, or a model: its name or folder")
    abilities.add_argument(
        "--tasks", default="gsm8k,rte,nq,boolq", help="with commas between them (default: %(default)s)"
    )
    abilities.add_argument("--at", metavar="N,...", help="after these edits of a run (default: its checkpoints)")
    abilities.add_argument("--limit", metavar="N", type=int, help="records of each task (default: all)")
    abilities.add_argument("--data", metavar="DIR", action="append", default=[], help="the benchmarks, or rte=FILE")
    abilities.add_argument("--text", metavar="FILE", type=Path, help="take the perplexity of this text as well")
    abilities.add_argument("--batch-size", metavar="N", type=int, default=16, help="prompts at once (default: 16)")
    abilities.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    abilities.add_argument("--out", metavar="DIR", type=Path, help="folder for the scores of a model")


def _add_audit(commands: Commands) -> None:
    audit = commands.add_parser("audit", help="how much a model's answers scatter before its edits and after")
    audit.add_argument("target", metavar="TARGET", type=Path, help="folder of a run, or of a comparison")
    audit.add_argument("--at", metavar="N,...", help="after these edits (default: all that are made)")
    audit.add_argument("--facts", metavar="N", type=int, default=50, help="ask N edited facts at most (default: 50)")
    audit.add_argument("--neighbours", action="store_true", help="ask two neighbourhood prompts of each as well")
    audit.add_argument("--paraphrases", metavar="FROM", default="templates", help="templates, record, or a JSON file")
    audit.add_argument("--samples", metavar="N", type=int, default=5, help="answers to a paraphrase (default: 5)")
    audit.add_argument("--tokens", metavar="N", type=int, default=16, help="of an answer at most (default: 16)")
    audit.add_argument("--temperature", type=float, default=0.3, help="answers are drawn at (default: 0.3)")
    audit.add_argument("--top-p", type=float, default=0.9, help="of the nucleus they are drawn from (default: 0.9)")
    audit.add_argument("--embedder", default="minilm", help="a model of sentence-transformers (default: minilm)")
    audit.add_argument("--seed", type=int, default=0, help="of answers and of the choice of facts (default: 0)")
    audit.add_argument("--data", type=Path, help="where the run's file of facts is now")
    audit.add_argument("--model", help="where the unedited model is, instead of where the run found it")
    audit.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")


def _add_run(commands: Commands) -> None:
    run = commands.add_parser("run", help="edit thousands of facts in sequence, and measure what stays of them")
    run.add_argument("settings", metavar="YAML", type=Path, nargs="?", help="settings of the run; flags win over it")
    run.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run, or the comparison, in DIR")
    run.add_argument("--without-guard", action="store_true", help="with --resume: go on although the guard stopped it")
    run.add_argument("--preset", help="settings of the paper: table1-llama3-8b and others, see docs/run.md")
    run.add_argument("--scale", type=float, help="this share of a preset's edits, checkpoints and batch size")
    run.add_argument("--entry", help="what edits: memit, memit+sphere, alphaedit, ft, ... (docs/run.md)")
    run.add_argument("--compare", metavar="ENTRIES", help="several entries with commas between them; all: twelve")
    run.add_argument("--hparams", type=Path, help="of the method (default: hparams/SPHERE/smollm2-135m.yaml)")
    run.add_argument("--model", help="Hugging Face name or folder, or the name of a YAML in hparams/SPHERE")
    run.add_argument("--data", type=Path, help="file of facts (default: the project's own)")
    run.add_argument("--text", type=Path, help="held-out text for perplexity (default: the project's own)")
    run.add_argument("--edits", type=int, help="how many facts")
    run.add_argument("--batch-size", type=int, help="facts per batch (default: 100)")
    run.add_argument("--checkpoints", help="score all edits so far after these numbers (default: at the end)")
    run.add_argument("--order", type=int, help="seed of the order of the facts (default: that of the file)")
    run.add_argument("--sample", type=int, help="score so many edits at most at a checkpoint (default: all)")
    run.add_argument("--fluency", type=int, help="tokens of texts that fluency is measured on, at the end")
    run.add_argument("--protocol", choices=("tokens", "exact"), help="which scores the tables show (default: tokens)")
    run.add_argument(
        "--seed", type=int, help="of samples, texts and ft, rome (default: 0); of our own editor: --set seed=N"
    )
    run.add_argument("--share-targets", action="store_true", default=None, help="aim once for all entries: quick")
    run.add_argument("--set", metavar="[ENTRY.]KEY=VALUE", action="append", default=[], help="a setting of the method")
    run.add_argument("--jobs", type=int, default=1, help="entries at a time (default: 1)")
    run.add_argument("--plan", action="store_true", help="only say what it would take: time, memory, disk")
    run.add_argument("--out", metavar="DIR", type=Path, help="folder for the run")
