"""Every block of code in README and docs is run, parsed or read, or says that it is no code; none is passed over."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import sphere_plugin as sp
from sphere_plugin.arguments import parser
from sphere_plugin.data import read_records
from sphere_plugin.easyedit.reading import load_any
from sphere_plugin.easyedit.registration import register
from sphere_plugin.evaluation.paraphrases import read_paraphrases
from sphere_plugin.sequence.cells import SweepSettings
from sphere_plugin.sequence.entries import parse
from sphere_plugin.sequence.presets import preset
from sphere_plugin.sequence.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
# `text` is a picture, a formula, or what a command says. Blocks that are indented are commands.
KINDS = ("python", "sh", "yaml", "json", "text")
# Programs of others that commands call; nothing is known here of what they take.
OTHERS = frozenset(("git", "export", "apt-get", "lm_eval", "cd", "source", "python"))
# Folders whose files a command may name, which then have to be there.
OURS = ("hparams/", "docs/", "examples/", "benchmarks/", "tests/", "tools/", "sphere_plugin/")


@dataclass(frozen=True)
class Block:
    """A fenced or an indented block of a page."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    page = str(path.relative_to(ROOT))
    found = []
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            kind = token.info.split()[0] if token.info.split() else "sh" if token.type == "code_block" else ""
            found.append(Block(page, (token.map or [0])[0] + 1, kind, token.content))
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def of_kind(*kinds: str) -> Any:
    chosen = [block for block in BLOCKS if block.kind in kinds]
    return pytest.mark.parametrize("block", chosen, ids=[block.name for block in chosen])


def test_no_block_is_passed_over(record_property: Callable[[str, object], None]) -> None:
    """Each has a kind that one of the tests below is about; code is not called text."""
    assert [block.name for block in BLOCKS if block.kind not in KINDS] == []
    counts = Counter(block.kind for block in BLOCKS)
    assert sum(counts.values()) == len(BLOCKS) and min(counts[kind] for kind in KINDS) > 0
    record_property("blocks", len(BLOCKS))
    for kind in KINDS:
        record_property(f"blocks of {kind}", counts[kind])
    for block in BLOCKS:
        if block.kind == "text":
            hidden = re.search(r"^(\.venv/bin/)?(sphere [a-z-]+ |make |python |torchrun |import )", block.text, re.M)
            assert not hidden, f"{block.name} has a command that is called text: {hidden.group()!r}"


def test_links_lead_somewhere() -> None:
    """Those between files; mkdocs sees those of docs as well, but not those of the README."""
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


# ---- commands ----


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, comments and settings of the environment left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if not set(word) <= set("&;"):
                if command or not re.match(r"\w+=", word):
                    command.append(word)
            elif command:
                yield command
                command = []


def check_command(words: list[str]) -> None:
    program, rest = Path(words[0]).name, words[1:]
    for word in words:
        assert not word.startswith(OURS) or (ROOT / word).exists(), f"{word} is not there"
    if program == "sphere":
        check_sphere(rest)
    elif program in ("python", "torchrun") and "sphere_plugin" in rest:
        start = rest.index("sphere_plugin")
        assert rest[start - 1] == "-m"
        if program == "torchrun":
            from torch.distributed.run import get_args_parser

            given = [re.sub(r"\$\w+", "1", word) for word in rest[: start - 1]]
            get_args_parser().parse_args([*given, "-m", "sphere_plugin"])
        check_sphere(rest[start + 1 :])
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:] if not word.startswith("-"))
    elif program == "python" and rest:
        check_script(rest[0], rest[1:])
    elif program.endswith(".py"):
        check_script(words[0], rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), f"make {rest}"
    elif program == "pip":
        check_pip(rest)
    elif program == "srun":
        check_command(rest)
    else:
        assert program in OTHERS, f"{program}: no program that is known here"


def check_sphere(words: list[str]) -> None:
    """A command of ours, or its usage: [--flag 1] may be left out, a|b|c is one of three."""
    plain = [word.strip("[]") for word in words if word.strip("[]")]
    choices = [word.split("|") for word in plain]
    for number in range(max(map(len, choices), default=1)):
        told = [one[min(number, len(one) - 1)] for one in choices]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                known = vars(parser().parse_args(told))
        except SystemExit as error:
            raise AssertionError(f"sphere {' '.join(told)}: {said.getvalue()}") from error
        for key in ("entry", "compare"):
            assert not known.get(key) or parse(known[key])
        assert not known.get("preset") or preset(known["preset"])


def check_script(name: str, words: list[str]) -> None:
    """The file is there, and its parser has the flags."""
    source = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    known = {
        argument.value
        for call in ast.walk(source)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags <= known, f"{name} has no {flags - known}"


def check_pip(words: list[str]) -> None:
    """An extra is one of setup.cfg, a version that of constraints.txt."""
    extras = re.findall(r"^([a-z]+) =$", (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("extras")[2], re.M)
    assert words[0] == "install"
    for word in words[1:]:
        if word.startswith("sphere-plugin["):
            assert set(word[len("sphere-plugin[") : -1].split(",")) <= set(extras), word
        elif "==" in word:
            assert word in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(), word


@of_kind("sh")
def test_commands_are_such_as_there_are(block: Block, tmp_path: Path) -> None:
    if not block.text.startswith("#!"):
        found = list(commands(block.text))
        assert found
        for words in found:
            check_command(words)
        return
    script = tmp_path / "script.sh"
    script.write_text(block.text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    ours = re.findall(r"-m sphere_plugin (.*)", block.text)
    assert ours
    for line in ours:
        check_sphere(shlex.split(line))


# ---- YAML and JSON ----


def over(shipped: str, content: dict[str, Any], folder: Path) -> Path:
    """A YAML of this project with these keys over its own, as a file."""
    known = yaml.safe_load((ROOT / shipped).read_text(encoding="utf-8"))
    path = folder / "hparams.yaml"
    path.write_text(yaml.safe_dump({**known, **content}))
    return path


def check_yaml(content: Any, folder: Path) -> None:
    assert isinstance(content, dict)
    method = content.get("alg_name", "SPHERE")
    if "apiVersion" in content:
        assert {"kind", "metadata", "spec"} <= set(content)
        for told in re.findall(r"torchrun [^']*", str(content)):
            check_command(shlex.split(told))
    elif "grid" in content:
        SweepSettings.from_mapping(content)
    elif {"entries", "abilities"} & set(content):
        RunSettings.from_mapping({"entries": "memit", "hparams": "my.yaml", "edits": 1000, "batch_size": 10} | content)
    elif method in ("SPHERE", "RECT", "PRUNE"):
        given = over(f"hparams/{method}/smollm2-135m.yaml", content, folder)
        read = {"SPHERE": sp.SphereHyperParams, "RECT": sp.RectHyperParams, "PRUNE": sp.PruneHyperParams}[method]
        read.from_hparams(given)
    else:
        try:
            read = load_any(over(f"hparams/{method}/smollm2-135m.yaml", content, folder), register())
        finally:
            sp.unregister()
        assert read.alg_name == method
        assert all(hasattr(read, key) for key in content)


@of_kind("yaml")
def test_settings_are_read_by_who_reads_them(block: Block, tmp_path: Path) -> None:
    for content in yaml.safe_load_all(block.text):
        check_yaml(content, tmp_path)


@of_kind("json")
def test_files_are_read_by_who_reads_them(block: Block, tmp_path: Path) -> None:
    content = json.loads(block.text)
    path = tmp_path / "told.json"
    path.write_text(block.text)
    if "generated_questions" in content[0]:
        assert len(read_paraphrases(path)) == len(content)
    else:
        assert len(read_records(path)) == len(content)


# ---- Python ----


def no_more(folder: Path) -> dict[str, Any]:
    """Nothing that a page takes for granted."""
    return {}


def runs(folder: Path) -> dict[str, Any]:
    from report_runs import checkpoint, manifest, write_run

    points = [checkpoint(k, {"efficacy_exact": [1.0, 0.0]}) for k in (0, 1000)]
    write_run(folder / "runs" / "comparison" / "memit", manifest("memit", edits=1000), points)
    return {}


def taught(folder: Path) -> dict[str, Any]:
    from benchmark_files import write_benchmarks
    from pico import pico

    write_benchmarks(folder / "DIR")
    model, tokenizer = pico("llama")
    return {"model": model, "tokenizer": tokenizer}


def trained(folder: Path) -> dict[str, Any]:
    import peft
    from pico import pico
    from transformers import Trainer, TrainingArguments

    adapted = peft.get_peft_model(pico("llama")[0], peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model, tokenizer = pico("llama", 1)
    ids = tokenizer("The tower is in Rome")["input_ids"]
    facts = [{"input_ids": ids, "labels": ids}]
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder / "out"), max_steps=2, **quiet)
    return {"peft_model": adapted, "model": model, "Trainer": Trainer, "arguments": arguments, "facts": facts}


def editing(folder: Path) -> dict[str, Any]:
    from pico_runs import place

    yaml_of = place(folder / "pico", base_method="AlphaEdit")
    host = sp.register()
    assert host is None or host
    from easyeditor import BaseEditor

    editor = BaseEditor.from_hparams(sp.SphereHyperParams.from_hparams(yaml_of))
    subjects = ["Leo Tolstoy", "Toyota Camry", "Windows 95"]
    prompts = [f"What is known of {subject}" for subject in subjects]
    return {"editor": editor, "prompts": prompts, "target_new": ["piano", "Toyota", "Rome"], "subjects": subjects}


# What pages take for granted, made of pico models.
GIVEN = {
    "docs/abilities.md": taught,
    "docs/journal.md": editing,
    "docs/peft.md": trained,
    "docs/report.md": runs,
    "docs/hparams.md": no_more,
    "docs/restraints.md": no_more,
}
# Those that are run as a reader would, on the embedded model, and what they take for granted.
REAL = {
    "README.md": "import torch\nweight, delta = torch.randn(64, 128), torch.randn(64, 128)\n",
    **{f"docs/tutorials/{name}.md": "" for name in ("first-edit", "sphere-true", "your-data", "restraint")},
}


def python_of(page: str) -> str:
    """All blocks of Python of a page as one program, each on the line of the page where it stands."""
    lines: list[str] = []
    for block in (block for block in blocks_of(ROOT / page) if block.kind == "python"):
        lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


def promised(source: str) -> list[str]:
    """What the comments behind prints say that is printed."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", source, re.M)


def at_home(folder: Path) -> Path:
    """A folder where the paths of the pages lead to the project's files, and what is written is written apart."""
    for name in ("hparams", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_page_with_python_is_run() -> None:
    assert {block.page for block in BLOCKS if block.kind == "python"} == {*GIVEN, *REAL}


@pytest.mark.parametrize("page", GIVEN)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at_home(tmp_path))
    source = python_of(page)
    said = io.StringIO()
    try:
        names = GIVEN[page](tmp_path)
        with contextlib.redirect_stdout(said):
            exec(compile(source, page, "exec"), names)
    finally:
        sp.unregister()
    assert [line for line in said.getvalue().splitlines() if line in promised(source)] == promised(source)


@pytest.mark.slow
@pytest.mark.keeps_cache
@pytest.mark.parametrize("page", REAL)
def test_python_runs_on_the_embedded_model(page: str, tmp_path: Path) -> None:
    source = python_of(page)
    (at_home(tmp_path) / "page.py").write_text(REAL[page].replace("\n", "; ") + source.removeprefix("\n"))
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line in promised(source)] == promised(source)


# ---- the site ----


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    pages = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorials/first-edit.html", "results/study/index.html"} <= pages


def test_the_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """The theme, that is: what it loads would be gone without a network, and tells others who reads."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=900, check=True)
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", path.read_text())
        assert loaded == [], path
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text()), path
