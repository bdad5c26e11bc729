"""The only way this package writes to disk, so that nobody ever reads a half-written file.

- ``cache_folder``: where files of ours live.
- ``write_json``, ``write_tensors``, ``write_bytes``: replace a file as a whole or leave it as it was.
- ``check_writable``: find out before long work whether its result will have a place.
- ``read_json``, ``read_tensors``: read such a file, or say what is wrong with it and what to do.
- ``make_folder``: for files that others write.
- ``atomic_folder``: fill a folder out of sight and rename it into place.
- ``fingerprint``, ``json_digest``: a short name for the content of tensors, and of JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sphere_plugin.errors import CacheError
from sphere_plugin.parsing import json_of
from sphere_plugin.paths import user_path

CACHE_VARIABLE = "SPHERE_PLUGIN_CACHE"

_TEMPORARY = ".sphere-tmp"
_ABANDONED_AFTER = 24 * 3600.0  # seconds
_DIGEST = "sphere_digest"
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_REFUSED = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.EIO,
    )
)
_AGAIN = "Delete it and run the command again."


def cache_folder() -> Path:
    """Return the folder for files that can be made again; it need not exist yet.

    The environment variable ``SPHERE_PLUGIN_CACHE`` wins, then the platform's cache folder of the user.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return user_path(chosen)
    return platformdirs.user_cache_path("sphere-plugin", appauthor=False)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file by ``content``, or leave it as it was.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)

    _replace(path, fill)


def check_writable(path: Path) -> None:
    """Find out before long work whether its result can be written to ``path``; leaves no file behind.

    Raises:
        CacheError: the place cannot be written.
    """
    probe = path.with_name(f"{path.name}.probe")
    write_bytes(probe, b"")
    if path.is_dir():
        probe.unlink(missing_ok=True)
        raise CacheError(str(path), "a folder", "a place for a file", "Move the folder away.")
    probe.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        CacheError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_json(path: Path, obj: object, marked: bool = True) -> None:
    """Write ``obj`` as indented UTF-8 JSON, atomically. Keys keep their order; NaN is written as Python reads it.

    Args:
        path: the file.
        obj: what to write.
        marked: whether an object, {…}, gets one key more: a digest, by which ``read_json`` recognises a changed one.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
        TypeError: ``obj`` is not made of what JSON knows; the old file stays.
    """
    whole = {**obj, _DIGEST: json_digest(obj)} if marked and isinstance(obj, dict) else obj
    write_bytes(path, (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shape, dtype and device as one safetensors file, atomically.

    A digest of tensors and metadata goes into the file, by which ``read_tensors`` recognises a damaged one.

    Raises:
        CacheError: the disk is full, or the place cannot be written.
    """
    stored = _apart(tensors)
    marked = {**metadata, _DIGEST: _digest(stored, metadata)}

    def fill(temporary: Path) -> None:
        save_file(stored, temporary, metadata=marked)

    _replace(path, fill)


def read_json(path: Path, remedy: str = _AGAIN) -> Any:  # noqa: ANN401 (JSON holds anything; callers check it)
    """Read what ``write_json`` wrote, without its digest. A file without one is taken as it is.

    Args:
        path: the file.
        remedy: what to do about a damaged one.

    Raises:
        CacheError: the file is missing, unreadable, not JSON, or not what was written.
    """
    try:
        content = json_of(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # both malformed JSON and malformed UTF-8
        raise _damaged(path, str(error), remedy) from error
    if isinstance(content, dict) and _DIGEST in content:
        told = content.pop(_DIGEST)
        if told != json_digest(content):
            raise _damaged(path, "a content that differs from what was written", remedy)
    return content


def read_tensors(
    path: Path, remedy: str = _AGAIN, marked: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what ``write_tensors`` wrote: the tensors, on the CPU and sorted by name, and the metadata.

    Args:
        path: the file.
        remedy: what to do about a damaged one.
        marked: False takes a file without a digest as it is, which others wrote.

    Raises:
        CacheError: the file is missing, unreadable, truncated, or differs by so much as one bit from what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(path, str(error), remedy) from error
    told = metadata.pop(_DIGEST, None)
    if told != _digest(tensors, metadata) and (marked or told is not None):
        raise _damaged(path, "a content that differs from what was written", remedy)
    return tensors, metadata


@contextmanager
def atomic_folder(path: Path, keep: Callable[[Path], bool] = lambda folder: True) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends it becomes ``path``, whole. On an exception nothing stays.

    Args:
        path: the folder to make; its parents are made too.
        keep: asked about a folder that lies at ``path`` when ours is ready, most likely another process's: True keeps
            that one and drops ours, False puts ours in its place.

    Raises:
        CacheError: the disk is full, or the place cannot be written. Other exceptions of the block pass unchanged.
    """
    temporary = _temporary(path)
    try:
        _make_parent(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _install(temporary, path, keep)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CacheError) or not _is_of_the_disk(error):  # of the block's own
            raise
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return 32 hex digits that depend on names, dtypes, shapes, bytes and the order of tensors, and on nothing else.

    Tensors may have any shape, dtype and device; at most one of them is copied at a time.
    """
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in named_tensors:
        content.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)  # a copy only from a device or of a strided tensor
        flat = flat.as_strided(flat.shape, (1,))  # a single entry may have any stride
        content.update(flat.view(torch.uint8).numpy().data)
    return content.hexdigest()


def json_digest(content: object) -> str:
    """Return 32 hex digits that depend on what JSON holds, the order of keys included."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    content = fingerprint(sorted(tensors.items()))
    return hashlib.blake2b((content + json.dumps(sorted(metadata.items()))).encode(), digest_size=16).hexdigest()


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory with another, which safetensors refuses."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        local = tensor.detach().to("cpu").contiguous()
        address = local.untyped_storage().data_ptr()
        stored[name] = local.clone() if address in seen else local
        seen.add(address)
    return stored


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")


def _make_parent(path: Path) -> None:
    """Make the folder of ``path`` and clear it of what runs that died have left there a day ago or earlier."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*{_TEMPORARY}"):
        with suppress(OSError):  # somebody else may be clearing it as well
            if left.stat().st_mtime < time.time() - _ABANDONED_AFTER:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _replace(path: Path, fill: Callable[[Path], None]) -> None:
    temporary = _temporary(path)
    try:
        _make_parent(path)
        temporary.touch()
        mode = temporary.stat().st_mode
        fill(temporary)
        temporary.chmod(mode)  # safetensors lets nobody else read its files
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _install(temporary: Path, path: Path, keep: Callable[[Path], bool]) -> None:
    """Rename ``temporary`` to ``path``; an existing folder stays or goes as ``keep`` says."""
    try:
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        if keep(path):
            return
        aside = _temporary(path)
        path.rename(aside)
        temporary.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk now."""
    if os.name == "nt" and path.is_dir():  # Windows neither offers nor needs this
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)  # safetensors lets nobody else read its files
        _sync(path)
    _sync(folder)


def _is_of_the_disk(error: Exception) -> bool:
    code = getattr(error, "errno", None)
    return _is_full(error) or code in _REFUSED or isinstance(error, SafetensorError)


def _is_full(error: Exception) -> bool:
    # safetensors' own errors carry the number in their text.
    code = getattr(error, "errno", None)
    return code in _FULL or any(f"os error {number})" in str(error) for number in _FULL)


def _unwritable(path: Path, error: Exception) -> CacheError:
    remedy = "Free some space on that disk" if _is_full(error) else "Make the place writable"
    return CacheError(
        str(path),
        str(error),
        "a place to write to",
        f"{remedy}, or choose another folder ({CACHE_VARIABLE} for the cache).",
    )


def _unreadable(path: Path, error: OSError) -> CacheError:
    why = error.strerror or str(error)
    return CacheError(str(path), why, "a readable file", "Check the path and its permissions.")


def _damaged(path: Path, why: str, remedy: str) -> CacheError:
    return CacheError(str(path), why, "a file as this package wrote it", remedy)
