"""General abilities of a live model, by lm-evaluation-harness (the paper's section 5.4).

A `Suite` is a choice of tasks with their records. It measures a model as it is in memory, one task at a time, and
leaves it as it was. Everything is greedy; prompts and marks are in ``tasks/`` and docs/abilities.md.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from sphere_plugin.editing.config import check_number
from sphere_plugin.errors import ConfigError, HostError, ModelError
from sphere_plugin.evaluation.benchmarks import Data, file_of, read_benchmark
from sphere_plugin.evaluation.decoder import Decoder
from sphere_plugin.evaluation.perplexity import mean_nll, windows
from sphere_plugin.evaluation.quiet import mode_kept, quiet
from sphere_plugin.paths import user_path
from sphere_plugin.randomness import randomness_kept

# Task of ours -> the benchmark whose file it reads.
LOCAL: Final = MappingProxyType(
    {"gsm8k": "gsm8k", "rte": "rte", "nq": "nq", "boolq": "boolq"}
    | {"gsm8k_given": "gsm8k", "rte_written": "rte", "nq_given": "nq"}
)
PAPER: Final = ("gsm8k", "rte", "nq", "boolq")
# Tasks of the harness itself, whose records come from a hub; "hub:NAME" is any other one of it.
HUB: Final = ("sst2", "mrpc", "cola", "mmlu", "mnli")
PREFIX: Final = "hub:"
PERPLEXITY: Final = "perplexity"  # of a text file; the name under which it is kept
SEED: Final = 0  # of the choice of examples, in tasks of the harness that choose them
BATCH: Final = 16
_RESAMPLES: Final = 1000  # for standard errors of what is no mean
_LIBRARIES: Final = ("lm_eval", "datasets", "accelerate", "peft")


@dataclass(frozen=True)
class Score:
    """What a model scored in a task.

    Attributes:
        metric: "exact_match", "acc", …; "perplexity".
        value: its mean over the records.
        stderr: its standard error, as the harness computes it; None where it has none.
        records: one number per record, in the order of the file: 0 or 1; nats per token of a stretch of text for
            perplexity. Of a metric that is no mean, whether the answer was right.
        cut: of how many records the prompt was longer than the model's context, and so lost its beginning.
        seconds: it took.
    """

    metric: str
    value: float
    stderr: float | None
    records: tuple[float, ...]
    cut: int
    seconds: float


class Suite:
    """Tasks, and how many of their records.

    Args:
        tasks: names; see `LOCAL`, `HUB` and `PREFIX`.
        data: a folder with the files of `FILES`, or benchmark -> file.
        limit: only so many records of each task, the first ones; None: all.
        text: a file to take the perplexity of.
        batch_size: prompts at once.

    Attributes:
        names: of what is measured, `PERPLEXITY` last where there is a text.

    Raises:
        ConfigError: an unknown task, a file that is missing, a number out of its range.
        RequestError: a record is not what its benchmark has.
        HostError: the harness is not installed, or the records of a task cannot be had from the hub.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        data: Data | None = None,
        limit: int | None = None,
        text: Path | None = None,
        batch_size: int = BATCH,
    ) -> None:
        check_tasks(tasks)
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None:
                check_number(name, value, 1, whole=True)
        self._limit, self._batch_size = limit, batch_size
        self._text = None if text is None else _read_text(text)
        self._how: dict[str, dict[str, Any]] = {}
        for benchmark in sorted({LOCAL[name] for name in tasks if name in LOCAL}):
            read_benchmark(benchmark, file_of(data, benchmark))  # what is wrong there is said before much is imported
        self._tasks = _loaded(tasks, data) if tasks else {}
        for name in tasks:
            self._how[name] = self._described(name, data)
        if text is not None:
            digest = hashlib.sha256(user_path(text).read_bytes()).hexdigest()
            self._how[PERPLEXITY] = {"file": text.name, "sha256": digest}
        self.names = tuple(self._how)

    def how(self, name: str) -> dict[str, Any]:
        """What the score of a task depends on beside the model: two scores with the same can be compared."""
        return dict(self._how[name])

    def measure(self, name: str, model: Any, tokenizer: Any) -> Score:
        """Score a live model, which is as it was afterwards.

        Args:
            name: one of `names`.
            model: a causal language model.
            tokenizer: its tokenizer.
        """
        started = time.perf_counter()
        with mode_kept(model), randomness_kept():
            model.eval()
            score = self._perplexity(model, tokenizer) if name == PERPLEXITY else self._task(name, model, tokenizer)
        return Score(**{**score, "seconds": time.perf_counter() - started})

    # ---- tasks ----

    def _described(self, name: str, data: Data | None) -> dict[str, Any]:
        loaded = self._tasks[name]
        told: dict[str, Any] = {"task": _harness_name(name), "version": _version(loaded)}
        told["harness"] = f"lm_eval {version('lm_eval')}"
        told["records"] = sum(self._count(task) for task in loaded["tasks"].values())
        if name not in LOCAL:
            return told | {"seed": SEED}
        path = file_of(data, LOCAL[name])
        return told | {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def _count(self, task: Any) -> int:
        return min(len(task.eval_docs), self._limit or len(task.eval_docs))

    def _task(self, name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = self._tasks[name]
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(SEED)  # drawing examples moves it on
        with quiet():
            # The harness sets pad tokens and sides of padding; a copy lets it.
            live = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=self._batch_size)
            _check_context(live, name, loaded["tasks"].values())
            found = evaluate(live, loaded, limit=self._limit, bootstrap_iters=_RESAMPLES)
            top = next(iter(loaded["groups"] or loaded["tasks"]))
            metric, way = _metric(found["results"][top], name)
            read = {key: [one for one in found["samples"][key] if one["filter"] == way] for key in loaded["tasks"]}
            cut = sum(_is_cut(live, task, read[key]) for key, task in loaded["tasks"].items())
        # A task may read an answer in several ways; the records are those of the way that is told.
        records = tuple(_number(one[metric]) for samples in read.values() for one in samples if metric in one)
        stderr = found["results"][top].get(f"{metric}_stderr,{way}")
        value = float(found["results"][top][f"{metric},{way}"])
        known = stderr if isinstance(stderr, float) and math.isfinite(stderr) else None
        return {"metric": metric, "value": value, "stderr": known, "records": records, "cut": cut}

    # ---- perplexity ----

    def _perplexity(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        texts, decoder = windows(model, tokenizer, self._text or ""), Decoder(model)
        with torch.no_grad():
            each = [mean_nll(decoder, [ids]) for ids in texts]
        total = sum(nll * (len(ids) - 1) for nll, ids in zip(each, texts, strict=True))
        nll = total / sum(len(ids) - 1 for ids in texts)
        value = math.exp(min(nll, 700.0))
        return {"metric": PERPLEXITY, "value": value, "stderr": None, "records": tuple(each), "cut": 0}


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no task, or is there twice; HostError where the harness is missing."""
    for name in tasks:
        if name not in LOCAL and name not in HUB and not (name.startswith(PREFIX) and name != PREFIX):
            known = ", ".join((*LOCAL, *HUB))
            remedy = "docs/abilities.md says what they are; hub:NAME is any other task of lm-evaluation-harness."
            raise ConfigError("tasks", name, f"one of {known}", remedy)
    if len(set(tasks)) < len(tasks):
        raise ConfigError("tasks", ",".join(tasks), "each task once", "Leave the second one out.")
    missing = [name for name in _LIBRARIES if tasks and find_spec(name) is None]
    if missing:
        remedy = "Install them: pip install 'sphere-plugin[abilities]'."
        raise HostError("the libraries of `sphere abilities`", f"no {', no '.join(missing)}", "all of them", remedy)


def _read_text(path: Path) -> str:
    try:
        return user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", str(path), f"a text file that can be read ({error})", "Check it.") from error


def _harness_name(name: str) -> str:
    return f"sphere_{name}" if name in LOCAL else name.removeprefix(PREFIX)


def _loaded(names: Sequence[str], data: Data | None) -> dict[str, Any]:
    """Name -> the harness's tasks and groups of it; a task that is a group, such as mmlu, has many."""
    with quiet(), randomness_kept():
        from lm_eval.tasks import TaskManager

        own = str(files("sphere_plugin.evaluation").joinpath("tasks"))
        told = dict(data) if isinstance(data, Mapping) else data
        local = TaskManager(include_path=own, include_defaults=False, metadata={"data": told})
        hub = TaskManager() if any(name not in LOCAL for name in names) else local
        loaded = {name: _load(local if name in LOCAL else hub, name) for name in names}
    for name, one in loaded.items():
        if len(one["tasks"]) > 1 and not one["groups"]:
            raise ConfigError("tasks", name, "a task or a group of tasks", f"It stands for {', '.join(one['tasks'])}.")
        for task in one["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return loaded


def _load(manager: Any, name: str) -> Any:
    key = _harness_name(name)
    if key not in manager.all_tasks:
        raise ConfigError("tasks", name, "a task of lm-evaluation-harness", "`lm_eval ls tasks` lists them.")
    if name in LOCAL:
        return manager.load([key])
    try:
        return manager.load([key])
    except Exception as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        remedy = "It needs a hub, or its records in the cache of datasets; with HF_HUB_OFFLINE=1 no hub is asked."
        raise HostError(f"the records of {name}", first, "records that load", remedy) from error


def _version(loaded: Mapping[str, Any]) -> str:
    tops = loaded["groups"] or loaded["tasks"]
    top = next(iter(tops.values()))
    return str(top.version if loaded["groups"] else top.VERSION)


def _metric(results: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The first metric of a task, and the first way it reads answers in."""
    keys = [key for key, value in results.items() if "," in key and "_stderr," not in key and isinstance(value, float)]
    if not keys:
        raise ConfigError("tasks", name, "a task with a number for its result", "Leave it out.")
    metric, _, way = keys[0].partition(",")
    return metric, way


def _number(value: Any) -> float:
    """What a record scored; of a pair (right answer, given answer) whether the two are the same."""
    return float(value[0] == value[1]) if isinstance(value, tuple | list) else float(value)


def _check_context(live: Any, name: str, tasks: Iterable[Any]) -> None:
    """Raise ModelError for a model that has no room for a prompt beside what a task has it write."""
    for task in tasks:
        if task.get_config("output_type") == "generate_until":
            most = task.get_config("generation_kwargs").get("max_gen_toks", live.max_gen_toks)
            if most >= live.max_length:
                expected = f"more than the {most} tokens that {name} writes"
                raise ModelError("the model's context", live.max_length, expected, "Leave this task out.")


def _is_cut(live: Any, task: Any, samples: Sequence[Mapping[str, Any]]) -> int:
    """How many prompts do not fit into the context beside what is to follow."""
    written = task.get_config("output_type") == "generate_until"
    count = 0
    for sample in samples:
        prompt, rest = sample["arguments"][0][:2]
        behind = rest.get("max_gen_toks", live.max_gen_toks) if written else len(live.tok_encode(rest)) - 1
        count += len(live.tok_encode(prompt)) + behind > live.max_length
    return count
