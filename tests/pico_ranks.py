"""Processes that share work, as torchrun starts them: forked from one that has loaded everything, so at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sphere_plugin as sp

ROOT = Path(sp.__file__).parents[1]

# For each job: so many forks with torchrun's variables. When one dies the others get SIGTERM, as torchrun does it.
SERVER = """
import importlib, json, os, select, signal, socket, sys, time
import torch
torch.set_num_threads(1)
import torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from sphere_plugin.cli import main
from sphere_plugin.easyedit.registration import register
from sphere_plugin.parallel import joining
from sphere_plugin.sequence import command, runner
register()
runner.CASE_TOKENS = 4

def child(job, rank, port, pipe):
    os.dup2(pipe, 1), os.dup2(pipe, 2)
    told = {"RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(one) for name, one in {**told, "MASTER_PORT": port, **job["env"]}.items()})
    os.chdir(job["cwd"])
    torch.set_num_threads(1)
    module = importlib.import_module(job["module"])
    code = getattr(module, job["function"])(*job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

def free():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

def do(job):
    port, pids, pipes = free(), {}, {}
    for rank in range(job["ranks"]):
        ours, theirs = os.pipe()
        number = os.fork()
        if not number:
            try:
                child(job, rank, port, theirs)
            except BaseException:
                import traceback
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(99)
        os.close(theirs)
        pids[number], pipes[ours] = rank, rank
    codes, said, started = {}, {rank: b"" for rank in range(job["ranks"])}, time.monotonic()
    while len(codes) < job["ranks"] or pipes:
        for pipe in select.select(list(pipes), [], [], 0.05)[0]:
            part = os.read(pipe, 1 << 16)
            said[pipes[pipe]] += part
            if not part:
                os.close(pipe)
                del pipes[pipe]
        for number, rank in list(pids.items()):
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                del pids[number]
                codes[rank] = os.waitstatus_to_exitcode(status)
                for other in pids if codes[rank] else ():
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() - started > 120:
            for number in pids:
                os.kill(number, signal.SIGKILL)
    return [[codes[rank], said[rank].decode(errors="replace")] for rank in range(job["ranks"])]

print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(do(json.loads(line))), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, minus the signal's number if it was killed, and what it said."""

    code: int
    said: str


class Launcher:
    """Starts processes that share a job."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, ranks: int, function: str, *arguments: Any, cwd: Path, **environment: object) -> list[Ended]:
        """Call ``function`` ("module:name", which returns an exit code) in ``ranks`` processes; how each ended."""
        module, name = function.split(":")
        job = {"ranks": ranks, "module": module, "function": name, "arguments": arguments, "cwd": str(cwd)}
        told = {key: str(one) for key, one in environment.items()}
        self.process.stdin.write(json.dumps({**job, "env": told}, default=str) + "\n")
        self.process.stdin.flush()
        return [Ended(*one) for one in json.loads(self.process.stdout.readline())]

    def sphere(self, ranks: int, *argv: object, cwd: Path, **environment: object) -> list[Ended]:
        """The command ``sphere`` in ``ranks`` processes."""
        return self(ranks, "pico_ranks:command", [str(one) for one in argv], cwd=cwd, **environment)


def command(argv: list[str]) -> int:
    from sphere_plugin.cli import main

    return main(argv)


@contextmanager
def launcher() -> Iterator[Launcher]:
    """Start one; needs fork."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "TQDM_DISABLE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes) as process:
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        try:
            yield Launcher(process)
        finally:
            process.kill()
