"""Every kind of file against every fault: what was wrong is made again or refused by name, and never used."""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import (
    PAGE,
    at_once,
    clock_going_backwards,
    closed,
    cut,
    empty,
    flip,
    folder_instead,
    full_disk,
    opened_again,
    read_only,
    without_rights,
)
from kinds import KINDS, READ, WRITERS, WRITTEN, Kind, make_place

import sphere_plugin
from sphere_plugin.errors import SphereError

ROOT = Path(sphere_plugin.__file__).parent


# ---- places, each made once ----


@dataclass
class Places:
    """A folder with what all kinds begin with, and for each kind one with its files and what comes of them."""

    root: Path
    known: dict[str, tuple[Path, Any]] = field(default_factory=dict)
    copies: list[Path] = field(default_factory=list)
    number: int = 0

    def copy(self, place: Path) -> Path:
        self.number += 1
        self.copies.append(shutil.copytree(place, self.root / f"copy{self.number}"))
        return self.copies[-1]

    def clear(self) -> None:
        """Forget the copies, but those that others are made from."""
        for place in self.copies:
            if place not in {made for made, _ in self.known.values()}:
                shutil.rmtree(place)
        self.copies.clear()

    def bare(self, kind: Kind) -> Path:
        """A place without what the kind's `write` makes."""
        place = self.copy(self.root / "place")
        if not set(WRITTEN) <= kind.without.keys():
            shutil.rmtree(place / kind.out, ignore_errors=True)
        return place

    def made(self, kind: Kind) -> tuple[Path, Any]:
        """A place with it, not to be changed, and what comes of it."""
        if kind.name not in self.known:
            place = self.bare(kind)
            kind.write(place)
            assert kind.paths(place), "nothing was written"
            self.known[kind.name] = place, kind.read(self.copy(place))
        return self.known[kind.name]


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """In a folder that an ordinary user can get at, unlike those of pytest."""
    quick = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files
    with tempfile.TemporaryDirectory(prefix="sphere-faults-", dir=quick) as name:
        root = Path(name)
        root.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPHERE_PLUGIN_CACHE", str(root / "cache"))
            make_place(root / "place")
        opened_again(root)  # safetensors lets nobody else read what transformers writes
        yield Places(root)


@pytest.fixture(autouse=True)
def cache(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(places.root / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


# ---- a damaged file is read ----


def after_damage(kind: Kind, damage: Callable[[Path], object], places: Places) -> str:
    """What becomes of the kind's files once each of them is damaged."""
    made, right = places.made(kind)
    place = places.copy(made)
    paths = kind.paths(place)
    for path in paths:
        damage(path)
    damaged = {path: path.stat().st_ino for path in paths if path.is_file()}
    try:
        with without_rights(place):
            found = kind.read(place)
    except SphereError as error:
        check_sentence(error, paths)
        return "refused"
    finally:
        opened_again(place)
    assert found == right
    now = {path: path.stat().st_ino for path in paths if path.is_file()}  # whoever writes makes a new file
    return "unharmed" if now == damaged else "recomputed"


def check_sentence(error: SphereError, paths: list[Path]) -> None:
    """The error says what is wrong where, what was expected, and what to do."""
    assert any(name in str(error) for path in paths for name in (str(path), f"{path.parent}"))
    assert error.culprit and error.expected
    assert error.remedy[:1].isupper() and error.remedy.endswith(".")


def newer(kind: Kind, path: Path) -> None:
    assert kind.newer is not None
    kind.newer(path)


def one_bit(kind: Kind, places: Places) -> str:
    outcomes = {after_damage(kind, partial(flip, place=place), places) for place in kind.flips}
    return next(one for one in ("refused", "recomputed", "unharmed") if one in outcomes)


READERS: dict[str, Callable[[Kind, Places], str]] = {
    "truncated": lambda kind, places: after_damage(kind, cut, places),
    "empty": lambda kind, places: after_damage(kind, empty, places),
    "one bit flipped": one_bit,
    "newer version": lambda kind, places: after_damage(kind, partial(newer, kind), places),
    "a folder in its place": lambda kind, places: after_damage(kind, folder_instead, places),
    "unreadable": lambda kind, places: after_damage(kind, closed, places),
}


# ---- a file is written where it cannot be ----


def check_whole(kind: Kind, place: Path, right: Any) -> None:
    """Nothing half-written is left, and what was refused works as soon as it can."""
    assert not list(place.rglob("*.sphere-tmp"))
    assert kind.read(place) == right


def into_read_only(kind: Kind, places: Places) -> str:
    _, right = places.made(kind)
    place = places.bare(kind)
    there = sorted(place.rglob("*"))
    outcome = "unharmed"
    try:
        with read_only(place):
            kind.write(place)
    except SphereError as error:
        assert str(place) in str(error) and "Make the place writable" in error.remedy
        outcome = "refused"
    assert sorted(place.rglob("*")) == there
    kind.write(place)
    check_whole(kind, place, right)
    return outcome


def onto_full_disk(kind: Kind, places: Places) -> str:
    """There is room for what is written earlier, and for half of these files."""
    made, right = places.made(kind)
    own = kind.paths(made)
    earlier = [] if kind.earlier is None else [path for path in (made / kind.out).glob(kind.earlier) if path.is_file()]
    pages = sum(-(-path.stat().st_size // PAGE) for path in earlier if path not in own)
    size = sum(path.stat().st_size for path in own)
    place, outcome = places.bare(kind), "unharmed"
    with full_disk(place, pages * PAGE + size // 2, size // 2):
        try:
            kind.write(place)
        except SphereError as error:
            assert str(place) in str(error) and "Free some space on that disk" in error.remedy
            outcome = "refused"
        assert not list(place.rglob("*.sphere-tmp"))
    kind.write(place)
    check_whole(kind, place, right)
    return outcome


def by_two(kind: Kind, places: Places) -> str:
    _, right = places.made(kind)
    place = places.bare(kind)
    ended = at_once(partial(kind.write, place))
    assert None in ended and not [one for one in ended if isinstance(one, str)], ended
    check_whole(kind, place, right)
    return "refused" if any(ended) else "unharmed"


def while_the_clock_goes_back(kind: Kind, places: Places) -> str:
    _, right = places.made(kind)
    place = places.bare(kind)
    (place / kind.out).parent.mkdir(parents=True, exist_ok=True)
    others = (place / kind.out).parent / ".file.0123abcd.sphere-tmp"  # another process is writing it
    others.write_text("half")
    with clock_going_backwards(place):
        kind.write(place)
        assert others.exists()
        others.unlink()
        check_whole(kind, place, right)
    return "unharmed"


FAULTS = READERS | {
    "read-only folder": into_read_only,
    "full disk": onto_full_disk,
    "two processes": by_two,
    "clock": while_the_clock_goes_back,
}
TOLD = {"clock": "clock going backwards", "two processes": "two processes at once"}


MATRIX = [(kind, fault) for kind in KINDS for fault in FAULTS if fault not in kind.without]


@pytest.mark.parametrize(("kind", "fault"), MATRIX, ids=[f"{kind.name}-{fault}" for kind, fault in MATRIX])
def test_a_fault_is_never_a_wrong_result(kind: Kind, fault: str, places: Places, record_property) -> None:
    outcome = FAULTS[fault](kind, places)
    places.clear()
    record_property("fault", f"{kind.name}: {TOLD.get(fault, fault)}")
    record_property("outcome", outcome)
    assert (kind.name, fault) not in HARMLESS or outcome == "unharmed"


# Faults that must not keep anybody from their work.
HARMLESS = {
    *(("lock", fault) for fault in ("truncated", "empty", "one bit flipped", "full disk", "clock")),
    *(("log of a run", fault) for fault in (*READ, "full disk", "two processes", "clock")),
    *(("principal space", fault) for fault in ("read-only folder", "full disk", "two processes", "clock")),
}


# ---- the matrix is whole ----


def test_every_exclusion_has_a_reason() -> None:
    assert set(FAULTS) == {*READ, *WRITTEN}
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    for kind in KINDS:
        assert set(kind.without) < set(FAULTS) and all(kind.without.values()), kind.name
        assert kind.newer is not None or "newer version" in kind.without, kind.name


WRITES = {
    "write_json",
    "write_tensors",
    "write_bytes",
    "write_text",
    "write_sums",
    "atomic_folder",
    "save_pretrained",
} | {*("save_file", "savefig", "FileHandler", "Log", "basicConfig", "copyfile", "copytree", "copy2", "dump", "tofile")}


def writers(path: Path) -> list[str]:
    """The calls in a module that make a file or a folder, in their order."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            modes = [set(one.value) for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            opened = name == "open" and any(mode <= set("rwaxbt+") and mode & set("wax+") for mode in modes)
            if name in WRITES or opened or ast.unparse(node.func) == "os.open":
                found.append((node.lineno, name))
    return [name for _, name in sorted(found)]


def test_every_writer_is_known() -> None:
    """Whoever adds a call that writes says in `kinds.WRITERS` of what kind the file is, and adds that if it is new."""
    modules = {str(path.relative_to(ROOT)): writers(path) for path in sorted(ROOT.rglob("*.py"))}
    found = {name: calls for name, calls in modules.items() if calls and name != "files.py"}
    assert {name: len(calls) for name, calls in found.items()} == {name: len(one) for name, one in WRITERS.items()}
    known = {kind.name for kind in KINDS}
    for name, told in WRITERS.items():
        for one in told:
            assert one in known or one.startswith("("), f"{name}: {one}"
