"""The rules of the house, held by reading its source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sphere_plugin

ROOT = Path(sphere_plugin.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, sphere_plugin; print(*{name.partition('.')[0] for name in sys.modules})"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sphere_plugin" in names
    assert not {"torch", "transformers", "easyeditor", "numpy", "yaml"} & set(names)


def test_every_public_name_can_be_had() -> None:
    for name in sphere_plugin.__all__:
        assert getattr(sphere_plugin, name) is not None
    assert set(dir(sphere_plugin)) == set(sphere_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sphere_plugin.nothing


def test_geometry_knows_torch_alone() -> None:
    for path in (ROOT / "geometry").glob("*.py"):
        extra = imported(path) - {"torch", "sphere_plugin"} - set(sys.stdlib_module_names)
        assert not extra, f"{path.name} imports {extra}"
        source = path.read_text(encoding="utf-8")
        inside = {line.split()[1] for line in source.splitlines() if line.startswith("from sphere_plugin")}
        assert all(name.startswith(("sphere_plugin.geometry", "sphere_plugin.errors")) for name in inside)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_their_rooms_import_easyeditor_and_peft(path: Path) -> None:
    names = imported(path)
    assert "easyeditor" not in names or path.parent.name == "easyedit"
    assert "peft" not in names or path.name == "peft.py"
    assert "pickle" not in names


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_module_keeps_mutable_state(path: Path) -> None:
    """Constants are tuples, frozen sets and read-only mappings; `__all__` is the one list."""
    module = tree(path)
    assert not [node.lineno for node in ast.walk(module) if isinstance(node, ast.Global)]
    for node in module.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            containers = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
            mutable = isinstance(value, containers) and getattr(target, "id", "") != "__all__"
            assert not mutable, f"line {node.lineno}: something that can be changed at module level"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_library_neither_prints_nor_asserts(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert goes away with python -O"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and path.name != "cli.py":
            assert node.func.id != "print", f"line {node.lineno}: log or return instead"


EVERYWHERE = [
    path
    for folder in ("sphere_plugin", "tests", "tools", "examples", "benchmarks")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", EVERYWHERE, ids=[str(path.relative_to(ROOT.parent)) for path in EVERYWHERE])
def test_every_yaml_is_read_safely(path: Path) -> None:
    """`safe_load`; one tool has a loader of its own, which derives from the safe one."""
    module = tree(path)
    safe = {
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
            assert node.attr not in ("full_load", "unsafe_load", "Loader", "UnsafeLoader", "FullLoader"), node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all"):
            loaders = {ast.unparse(word.value) for word in node.keywords if word.arg == "Loader"}
            assert loaders and loaders <= safe | {"yaml.SafeLoader"}, f"line {node.lineno}: yaml.safe_load"
        if isinstance(node, ast.ImportFrom) and node.module == "yaml":
            assert not {"load", "load_all", "Loader", "UnsafeLoader"} & {alias.name for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_is_decided_by_a_models_name(path: Path) -> None:
    """No `"llama" in name`: structure is read from the live modules."""
    families = {"llama", "qwen", "gpt", "gpt2", "gptj", "gpt-j", "mistral", "smollm"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            assert node.left.value.lower() not in families, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 350, "two subjects in one room?"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False)
            length = (node.end_lineno or 0) - node.lineno - (len(doc.splitlines()) if doc else 0)
            assert length <= 45, f"{node.name} has {length} lines"


def test_the_picture_of_the_house_names_every_room() -> None:
    picture = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in FILES:
        named = path.name if path.name != "__init__.py" else path.parent.name
        assert named.removesuffix(".py") in picture, f"{path.relative_to(ROOT)} is not in docs/architecture.md"


def test_every_command_has_arguments_and_work() -> None:
    from sphere_plugin.arguments import parser
    from sphere_plugin.cli import COMMANDS, SHARED

    (choices,) = [action.choices for action in parser()._actions if action.dest == "command"]
    assert set(choices) == set(COMMANDS) and set(COMMANDS) >= SHARED


def test_the_public_names_are_those_of_the_docs() -> None:
    """docs/api.md: a name that is added or taken away there or here has to be so in both."""
    told = (ROOT.parent / "docs" / "api.md").read_text(encoding="utf-8").partition("## Changes")[0]
    rows = [line for line in told.splitlines() if line.startswith("| `sp.")]
    assert {name for row in rows for name in re.findall(r"`sp\.(\w+)`", row)} == set(sphere_plugin.__all__)
