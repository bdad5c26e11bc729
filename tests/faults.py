"""Faults of disks, clocks, permissions and other processes; what each does to a file, or to whoever writes it.

`kinds.py` has the files that they are put to, `test_faults.py` puts them.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
PAGE = 4096
DISK = 2**23  # bytes of the disk that is full; more than any of the folders


# ---- of a file that is read ----


def cut(path: Path) -> None:
    """A copy that was broken off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """A file system that lost the content in a crash."""
    path.write_bytes(b"")


def flip(path: Path, place: float) -> None:
    """One bit, at a share of the length."""
    content = bytearray(path.read_bytes())
    at = min(int(place * len(content)), len(content) - 1)
    content[at] ^= 1
    path.write_bytes(bytes(content))


def folder_instead(path: Path) -> None:
    """Something that is no file."""
    path.unlink()
    path.mkdir()


def closed(path: Path) -> None:
    """A file that its reader has no right to read."""
    path.chmod(0)


# ---- whoever has no rights ----


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """The block is run by an ordinary user who owns what is in the folder: root may read and write anything."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.lchown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def opened_again(folder: Path) -> None:
    """Give all rights back."""
    folder.chmod(0o755)
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made, renamed or deleted in the folder and those below."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    try:
        with without_rights(folder):
            for path in folders:
                path.chmod(0o555)
            yield
    finally:
        opened_again(folder)


# ---- a disk without room ----


@contextmanager
def full_disk(folder: Path, room: int, largest: int) -> Iterator[None]:
    """The folder lies on a disk with so many bytes left: a file system of its own, or else a limit on files.

    Where file systems cannot be mounted, no file of the process may become larger than ``largest``.
    """
    if not _mounted(folder):
        with _no_file_larger_than(largest):
            yield
        return
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        os.truncate(filler, filler.stat().st_size - room // PAGE * PAGE)
        yield
        filler.unlink(missing_ok=True)
        kept = folder.with_name(f"{folder.name}-kept")
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    shutil.rmtree(folder)
    kept.rename(folder)


def _mounted(folder: Path) -> bool:
    """Move what is in a folder onto a small file system that is mounted there; False where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() or shutil.which("mount") is None:
        return False
    aside = folder.with_name(f"{folder.name}-aside")
    shutil.copytree(folder, aside)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True)
    if done.returncode == 0:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)
    return done.returncode == 0


@contextmanager
def _no_file_larger_than(size: int) -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- other processes ----


def at_once(work: Callable[[], object], number: int = 2) -> list[Any]:
    """What each of so many processes ended with that do the same at the same time: None, or the error."""
    context = multiprocessing.get_context("fork")
    answers, start = context.Queue(), context.Barrier(number)
    processes = [context.Process(target=_one, args=(work, answers, start)) for _ in range(number)]
    for process in processes:
        process.start()
    ended = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return ended


def _one(work: Callable[[], object], answers: Any, start: Any) -> None:
    from sphere_plugin.errors import SphereError

    start.wait()
    try:
        work()
        answers.put(None)
    except SphereError as error:
        answers.put(error)
    except BaseException:
        answers.put(traceback.format_exc())


# ---- clocks ----


@contextmanager
def clock_going_backwards(folder: Path) -> Iterator[None]:
    """Every look at the clock is an hour before the last one, and what is there was written the day after tomorrow."""
    now, looks = time.time(), []

    def earlier() -> float:
        looks.append(now)
        return now - 3600.0 * len(looks)

    for path in sorted(folder.rglob("*")):
        os.utime(path, (now + 2 * 86400.0,) * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", earlier)
        yield
