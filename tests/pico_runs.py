"""Runs of `sphere run` on pico models: settings, a place for them, and processes that can be killed at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import pico_config
from pico import pico_tokenizer, save_pico
from transformers import LlamaConfig, LlamaForCausalLM

import sphere_plugin as sp
from sphere_plugin.files import fingerprint, read_json
from sphere_plugin.sequence.runner import Run, resume, start
from sphere_plugin.sequence.settings import RunSettings

ROOT = Path(sp.__file__).parents[1]
CHOSEN = ("layers", "rewrite_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module", "v_num_grad_steps") + (
    ("v_lr", "context_template_length_params", "mom2_n_samples", "mom2_update_weight", "nullspace_threshold", "L2")
)
TEXT = "Water boils at 100 degrees, doesn't it? A new line starts here.\n"


def place(folder: Path, **changes: Any) -> Path:
    """Make a model, YAMLs for it, and a held-out text in ``folder``; returns the YAML for SPHERE."""
    config = pico_config("llama", v_num_grad_steps=3)
    values = {name: getattr(config, name) for name in CHOSEN}
    values |= {"alg_name": "SPHERE", "base_method": "MEMIT", "device": "cpu"}
    values |= {"model_name": str(save_pico("llama", folder / "pico-llama")), **changes}
    write_yaml(folder / "hparams" / "SPHERE" / "pico.yaml", values)
    for method, more in (("FT", {"num_steps": 3}), ("ROME", {"v_loss_layer": 3, "v_num_grad_steps": 3})):
        known = yaml.safe_load((ROOT / "hparams" / method / "smollm2-135m.yaml").read_text())
        here = {"model_name": values["model_name"], "layers": [1]}
        write_yaml(folder / "hparams" / method / "pico.yaml", known | here | more)
    (folder / "text.txt").write_text(TEXT)
    return folder / "hparams" / "SPHERE" / "pico.yaml"


def wide_model(folder: Path) -> Path:
    """A model of two layers whose principal spaces are followed: 768 neurons."""
    tokenizer = pico_tokenizer(bos=True)
    sizes = {"hidden_size": 768, "intermediate_size": 800, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 256}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **tokens))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.06)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Settings with which a pico model is written over and over: energies and efficacy go.
COLLAPSING = {"layers": [2, 3], "mom2_update_weight": 1e-4, "v_lr": 5.0, "clamp_norm_factor": 20.0} | (
    {"v_num_grad_steps": 10, "v_weight_decay": 0.0, "kl_factor": 0.0}
)


def facts(path: Path) -> Path:
    """Write twelve facts that a pico model can learn."""
    known = ("The Eiffel Tower", "The Colosseum", "Leo Tolstoy", "Thelonious Monk", "Jimi Hendrix", "Toyota Camry")
    known += ("Windows 95", "iPhone 5", "Danielle Darrieux", "Water", "Apple", "Microsoft")
    told = [
        {"prompt": f"What is known of {subject}", "subject": subject, "target_new": target}
        for subject, target in zip(known, ("piano", "Toyota", "Rome") * 4, strict=True)
    ]
    path.write_text(json.dumps(told))
    return path


def write_yaml(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def mapping(hparams: Path, entries: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run of six batches, as a YAML of them would have it."""
    text = hparams.parents[2] / "text.txt"
    usual = {"edits": 12, "batch_size": 2, "checkpoints": [4, 8], "text": str(text), "order": 3, "sample": 5}
    return {"entries": entries, "hparams": str(hparams), **usual, **changes}


def settings(hparams: Path, entries: str, **changes: Any) -> RunSettings:
    return RunSettings.from_mapping(mapping(hparams, entries, **changes))


def files(folder: Path) -> dict[str, bytes]:
    """What a run is: its files, logs left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in found}
    return {name: path.read_bytes() for name, path in sorted(names.items()) if not name.endswith((".log", "lock"))}


def prints(folder: Path) -> list[str]:
    """The fingerprints of the weights after each batch."""
    return [read_json(path)["after"] for path in sorted((folder / "journal").glob("0*.json"))]


def scores(folder: Path) -> dict[int, Any]:
    """Edits -> the checkpoint after them, without how long it took and who measured the unedited model."""
    told = {int(path.stem): read_json(path) for path in sorted((folder / "checkpoints").glob("*.json"))}
    return {
        edits: {key: one for key, one in point.items() if key not in ("seconds", "from")}
        for edits, point in told.items()
    }


def live(folder: Path) -> str:
    """The fingerprint of the weights of the model that goes on from a run's folder."""
    run = Run(RunSettings.from_mapping(read_json(folder / "manifest.json")["settings"]), folder)
    run.take_up(guarded=False)
    return fingerprint(run.weights.items())


class Stop(Exception):
    """Ends a run between two batches."""


def stopped_and_resumed(told: RunSettings, folder: Path, *stops: int) -> None:
    """Do a run that ends after these batches, and goes on from there each time."""
    for number, stop in enumerate(stops):
        done = []

        def progress(what: str, now: int, total: int, stop: int = stop, done: list[int] = done) -> None:
            done += [now] if what == "edits" else []
            if sum(done) >= stop * told.batch_size:
                raise Stop

        try:
            resume(folder, progress) if number else start(told, folder, progress)
        except Stop:
            continue
        raise AssertionError("the run was not stopped")
    resume(folder)


# ---- processes ----

# Loads everything once, then does each job in a fork: the command, killed or short of disk where it is asked for.
SERVER = """
import json, multiprocessing, os, signal, sys, time
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from sphere_plugin import files
from sphere_plugin.cli import main
from sphere_plugin.easyedit.registration import register
from sphere_plugin.journaling import Journal
from sphere_plugin.sequence import command, runner
register()
runner.CASE_TOKENS = 4
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda kind=None: context

def dies_in_write(number):
    calls, sync = [], files._sync
    def dying(path):
        sync(path)
        calls.append(path)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    files._sync = dying

def fills_disk(after):
    import resource
    append = Journal.append
    def full(self, *args, **more):
        if len(self) == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
        return append(self, *args, **more)
    Journal.append = full

def child(job, pipe):
    os.dup2(pipe, 1), os.dup2(pipe, 2)
    os.chdir(job["cwd"])
    torch.set_num_threads(job.get("threads", 1))
    if job.get("write"):
        dies_in_write(job["write"])
    if job.get("full") is not None:
        fills_disk(job["full"])
    code = main(job["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    ours, theirs = os.pipe()
    number = os.fork()
    if not number:
        try:
            child(job, theirs)
        finally:
            os._exit(99)
    os.close(theirs)
    if job.get("after"):
        time.sleep(job["after"])
        os.kill(number, signal.SIGKILL)
    with os.fdopen(ours, errors="replace") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    print(json.dumps([code, said]), flush=True)
"""


class Server:
    """Does the command in processes that start at once."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, *argv: object, cwd: Path, **how: Any) -> tuple[int, str]:
        """Returns the exit code, −9 if it was killed, and what was said.

        ``how``: after: kill it after so many seconds; write: in its n-th write; full: no disk left after so many
        batches; threads: of torch.
        """
        job = {"argv": [str(one) for one in argv], "cwd": str(cwd), **how}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said


@contextmanager
def server() -> Iterator[Server]:
    """Start a server; needs fork."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes) as process:
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        try:
            yield Server(process)
        finally:
            process.kill()
