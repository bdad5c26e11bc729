"""One process at a time writes to the folder of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sphere_plugin.errors import CacheError

_FOLLOW_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_FAR: Final = 2**30  # Windows keeps others from reading a locked byte: lock one behind the process's number


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock`` for the block; the folder is made if it is not there.

    The system lets go of the lock when the process ends, however it ends, so a killed run never locks anyone out. The
    file stays; what is in it is the number of the process that holds it.

    Raises:
        CacheError: another process, or this one already, holds it; the message has its number. Raised at once.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _FOLLOW_NO_LINK, 0o666)
    except OSError as error:
        remedy = "Make the place writable, or choose another folder."
        if path.is_symlink():
            raise CacheError(str(path), "a link", "a file that can be locked", "Delete the link.") from error
        raise CacheError(str(path), error.strerror or str(error), "a file that can be locked", remedy) from error
    try:
        _take(handle, path)
        _note(handle, str(os.getpid()))
        try:
            yield
        finally:
            _note(handle, "")
    finally:
        os.close(handle)  # this lets go of the lock


def _take(handle: int, path: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, 32).decode(errors="replace").strip()
        got = f"held by process {holder}" if holder else "held by another process"
        remedy = "Wait until that process has ended, or choose another folder."
        raise CacheError(str(path), got, "no other process that writes here", remedy) from error
    except OSError as error:  # some network file systems have no locks
        remedy = "Choose a folder on a local disk."
        raise CacheError(str(path), error.strerror or str(error), "a file that can be locked", remedy) from error


def _note(handle: int, text: str) -> None:
    with suppress(OSError):  # a full disk: what the file says is for people, the lock holds without it
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode())
