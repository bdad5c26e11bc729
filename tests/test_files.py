"""Writing and reading: whole or not at all, and damage is noticed."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sphere_plugin import files
from sphere_plugin.errors import CacheError
from sphere_plugin.files import (
    atomic_folder,
    cache_folder,
    fingerprint,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)

ROOT = Path(files.__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestCacheFolder:
    def test_variable_wins(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "here"))
        assert cache_folder() == tmp_path / "here"

    @pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG is for the other systems")
    def test_xdg(self, monkeypatch, tmp_path):
        monkeypatch.delenv("SPHERE_PLUGIN_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "sphere-plugin"

    def test_empty_variable_counts_as_unset(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SPHERE_PLUGIN_CACHE", "")
        assert cache_folder().name == "sphere-plugin"


class TestJson:
    def test_round_trip(self, tmp_path):
        obj = {"b": [1, 2.5, None, True], "a": {"text": "é 東京 🙂"}, "tiny": 1e-300}
        write_json(tmp_path / "deep" / "er" / "x.json", obj)
        back = read_json(tmp_path / "deep" / "er" / "x.json")
        assert back == obj
        assert list(back) == ["b", "a", "tiny"]

    def test_nan_round_trip(self, tmp_path):
        write_json(tmp_path / "x.json", [math.nan, math.inf])
        nan, inf = read_json(tmp_path / "x.json")
        assert math.isnan(nan)
        assert inf == math.inf

    @pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\xff\xfe{}"], ids=["empty", "truncated", "not utf-8"])
    def test_damaged(self, tmp_path, content):
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(CacheError, match="Delete it and run the command again") as caught:
            read_json(path)
        assert caught.value.culprit == str(path)

    def test_missing(self, tmp_path):
        with pytest.raises(CacheError, match="none.json.*No such file"):
            read_json(tmp_path / "none.json")

    def test_unknown_type_leaves_the_old_file(self, tmp_path):
        write_json(tmp_path / "x.json", "old")
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", {"x": object()})
        assert read_json(tmp_path / "x.json") == "old"
        assert names(tmp_path) == ["x.json"]


class TestAtomicFile:
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_failure_leaves_the_old_file(self, tmp_path, monkeypatch, step):
        path = tmp_path / "x.json"
        write_json(path, "old")
        with monkeypatch.context() as patch:
            patch.setattr(os if step == "fsync" else Path, step, full_disk)
            with pytest.raises(CacheError, match="Free some space on that disk.*SPHERE_PLUGIN_CACHE") as caught:
                write_json(path, "new")
        assert caught.value.culprit == str(path)
        assert read_json(path) == "old"
        assert names(tmp_path) == ["x.json"]

    def test_half_written_tensors_leave_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "x.safetensors"
        write_tensors(path, {"a": torch.ones(3)}, {})

        def half(tensors, filename, metadata):
            filename.write_bytes(b"half of it")
            full_disk()

        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", half)
            with pytest.raises(CacheError, match="Free some space"):
                write_tensors(path, {"a": torch.zeros(3)}, {})
        assert torch.equal(read_tensors(path)[0]["a"], torch.ones(3))
        assert names(tmp_path) == ["x.safetensors"]

    def test_interrupt_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "x.json"
        write_json(path, "old")

        def interrupt(handle):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_json(path, "new")
        assert read_json(path) == "old"
        assert names(tmp_path) == ["x.json"]

    def test_no_permission(self, tmp_path, monkeypatch):
        def refuse(path, content):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(CacheError, match="Permission denied.*Make the place writable"):
            write_bytes(tmp_path / "x", b"new")

    def test_a_file_where_a_folder_should_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CacheError, match="Make the place writable"):
            write_json(tmp_path / "file" / "x.json", 1)

    def test_others_may_read_what_the_umask_lets_them(self, tmp_path):
        write_bytes(tmp_path / "bytes", b"")
        write_tensors(tmp_path / "tensors", {"a": torch.ones(1)}, {})
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.ones(1)}, folder / "tensors")
        usual = (tmp_path / "bytes").stat().st_mode
        assert (tmp_path / "tensors").stat().st_mode == usual
        assert (tmp_path / "folder" / "tensors").stat().st_mode == usual


class TestTensors:
    def test_round_trip(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"{dtype}": torch.randn(3, 5, generator=generator).to(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        }
        tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "nan": torch.tensor([math.nan])}
        write_tensors(tmp_path / "x.safetensors", tensors, {"note": "é"})
        back, metadata = read_tensors(tmp_path / "x.safetensors")
        assert metadata == {"note": "é"}
        assert list(back) == sorted(tensors)
        assert fingerprint(sorted(back.items())) == fingerprint(sorted(tensors.items()))

    def test_views_and_shared_memory(self, tmp_path):
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {"base": base, "same": base, "transposed": base.T, "row": base[1], "needs_grad": base[0].clone()}
        tensors["needs_grad"].requires_grad_()
        write_tensors(tmp_path / "x.safetensors", tensors, {})
        back, _ = read_tensors(tmp_path / "x.safetensors")
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)

    def test_what_is_read_can_be_changed_without_touching_the_file(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write_tensors(path, {"a": torch.ones(3)}, {})
        read_tensors(path)[0]["a"].zero_()
        assert torch.equal(read_tensors(path)[0]["a"], torch.ones(3))

    def test_truncated_anywhere(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write_tensors(path, {"a": torch.ones(4)}, {"k": "v"})
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(CacheError, match="Delete it and run the command again"):
                read_tensors(path)

    def test_one_bit_flipped_anywhere(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write_tensors(path, {"a": torch.ones(4)}, {"k": "v"})
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(CacheError, match="expected a file as this package wrote it") as caught:
                read_tensors(path)
            assert caught.value.culprit == str(path)

    def test_missing_and_foreign(self, tmp_path):
        with pytest.raises(CacheError, match="none"):
            read_tensors(tmp_path / "none")
        save_file({"a": torch.ones(2)}, tmp_path / "foreign")
        with pytest.raises(CacheError, match="as this package wrote it"):
            read_tensors(tmp_path / "foreign")


class TestAtomicFolder:
    def test_appears_whole(self, tmp_path):
        with atomic_folder(tmp_path / "deep" / "x") as folder:
            assert folder.parent == tmp_path / "deep"
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("content")
            assert not (tmp_path / "deep" / "x").exists()
        assert (tmp_path / "deep" / "x" / "sub" / "file").read_text() == "content"
        assert names(tmp_path / "deep") == ["x"]

    def test_exception_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError, match="mine"), atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError("mine")
        assert names(tmp_path) == []

    def test_full_disk_names_the_folder(self, tmp_path):
        with pytest.raises(CacheError, match="Free some space") as caught, atomic_folder(tmp_path / "x"):
            full_disk()
        assert caught.value.culprit == str(tmp_path / "x")
        assert names(tmp_path) == []

    def test_other_errors_pass_unchanged(self, tmp_path):
        with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "x"):
            (tmp_path / "elsewhere").read_text()
        with pytest.raises(CacheError, match="inner"), atomic_folder(tmp_path / "x"):
            read_json(tmp_path / "inner")

    def test_theirs_is_kept_unless_told_otherwise(self, tmp_path):
        for keep, expected in ((True, "theirs"), (False, "ours")):
            path = tmp_path / str(keep)
            with atomic_folder(path, keep=lambda folder, keep=keep: keep) as folder:
                (folder / "file").write_text("ours")
                path.mkdir()
                (path / "file").write_text("theirs")
            assert (path / "file").read_text() == expected
        assert names(tmp_path) == ["False", "True"]

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "x").write_text("mine")
        with pytest.raises(CacheError, match="Make the place writable"), atomic_folder(tmp_path / "x"):
            pass
        assert (tmp_path / "x").read_text() == "mine"

    def test_two_processes(self, tmp_path):
        """Both fill their folder before either may finish; one of the two becomes the folder, whole."""
        code = """
import sys, time
from pathlib import Path
from sphere_plugin.files import atomic_folder
place, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with atomic_folder(place / "x") as folder:
    for number in range(50):
        (folder / str(number)).write_text(me)
    (place / me).touch()
    while not (place / other).exists():
        time.sleep(0.001)
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        runs = [
            subprocess.Popen([sys.executable, "-c", code, str(tmp_path), me, other], env=environment)
            for me, other in (("a", "b"), ("b", "a"))
        ]
        assert [run.wait(timeout=120) for run in runs] == [0, 0]
        assert names(tmp_path) == ["a", "b", "x"]
        assert len(names(tmp_path / "x")) == 50
        assert len({path.read_text() for path in (tmp_path / "x").iterdir()}) == 1

    def test_leftovers_of_dead_runs_go_after_a_day(self, tmp_path):
        for name, hours in (("old", 25), ("new", 23)):
            folder = tmp_path / f".x.{name}.sphere-tmp"
            folder.mkdir()
            (folder / "file").write_text("")
            file = tmp_path / f".y.{name}.sphere-tmp"
            file.write_text("")
            for path in (folder, file):
                os.utime(path, (time.time() - 3600 * hours,) * 2)
        write_json(tmp_path / "z.json", 1)
        assert names(tmp_path) == [".x.new.sphere-tmp", ".y.new.sphere-tmp", "z.json"]


class TestFingerprint:
    def test_known_value(self):
        """Pinned: a change would turn every stored fingerprint into a mismatch."""
        weights = [("w", torch.arange(6, dtype=torch.float32).reshape(2, 3)), ("b", torch.ones(2).bfloat16())]
        assert fingerprint(weights) == "38b3ddad88503187de5ac751a84dcec6"
        assert fingerprint(iter(weights)) == fingerprint(weights)

    @pytest.mark.parametrize(
        "other",
        [
            [("v", torch.zeros(2, 3))],
            [("w", torch.zeros(3, 2))],
            [("w", torch.zeros(6))],
            [("w", torch.zeros(2, 3, dtype=torch.int32))],
            [("w", torch.zeros(2, 6, dtype=torch.float16))],
            [("w", torch.zeros(2, 3)), ("x", torch.zeros(0))],
            [("w", torch.zeros(2, 3).index_fill(0, torch.tensor(1), -0.0))],
            [],
        ],
        ids=["name", "shape", "rank", "dtype", "dtype and shape", "one more", "a sign bit", "none"],
    )
    def test_differs(self, other):
        assert fingerprint(other) != fingerprint([("w", torch.zeros(2, 3))])

    def test_differs_by_any_byte_and_by_order(self):
        tensor = torch.zeros(4, dtype=torch.bfloat16)
        seen = {fingerprint([("w", tensor)])}
        for place in range(8):
            changed = tensor.clone()
            changed.view(torch.uint8)[place] = 1
            seen.add(fingerprint([("w", changed)]))
        assert len(seen) == 9
        pair = [("a", torch.ones(1)), ("b", torch.zeros(1))]
        assert fingerprint(pair) != fingerprint(pair[::-1])

    def test_layout_in_memory_does_not_matter(self):
        weight = torch.arange(12.0).reshape(3, 4)
        assert fingerprint([("w", weight.T.contiguous().T)]) == fingerprint([("w", weight)])
        assert fingerprint([("w", torch.nn.Parameter(weight))]) == fingerprint([("w", weight)])
