"""Errors of the system: each names the place that it is about, and what helps there."""

import errno
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from weakseg import failures
from weakseg.errors import UserError
from weakseg.failures import mendable
from weakseg.files import atomic_path, write_json


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder, a cache in it, a folder for temporary files, and no variables beside."""
    for name in ("WEAKSEG_CACHE", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def said(error: BaseException, folder: Path) -> UserError:
    found = mendable(error, folder)
    assert found is not None and found.mend
    return found


CODES = [errno.EACCES, errno.EROFS, errno.EPERM]
CACHES = {
    ".cache/weakseg/shapes-v1/128px/train/0.png": "WEAKSEG_CACHE",
    ".cache/huggingface/hub/models--timm": "HF_HOME",
    ".cache/torch/hub/checkpoints/x.pth": "TORCH_HOME",
    ".cache/other": "XDG_CACHE_HOME",
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("place", CACHES)
def test_a_cache_is_named_and_no_output(home: Path, tmp_path: Path, place: str, code: int):
    error = said(OSError(code, "no", str(home / place)), tmp_path / "run")
    assert error.where == str(home / place)
    assert CACHES[place] in error.mend and "--out" not in error.mend


def test_a_cache_of_ones_own_is_named(home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "mine"))
    error = said(OSError(errno.ENOTDIR, "no", str(tmp_path / "mine" / "a")), tmp_path / "run")
    assert "WEAKSEG_CACHE" in error.mend


def test_a_run_among_temporary_files_is_still_a_run(home: Path, tmp_path: Path):
    temporary = tmp_path / "tmp"
    run = temporary / "run"
    error = said(OSError(errno.EACCES, "no", str(run / "2-train/last.ckpt")), run)
    assert error.mend.startswith("choose another folder with --out")
    error = said(OSError(errno.EACCES, "no", str(run / "recipe.yaml")), Path.cwd())
    assert "TMPDIR" not in error.mend
    error = said(OSError(errno.EACCES, "no", str(temporary / "tmpab12" / "x")), run)
    assert "TMPDIR" in error.mend and "--out" not in error.mend


@pytest.mark.parametrize("full", ["run", "tmp", "home/.cache/weakseg"])
def test_the_disk_that_is_full_is_named(home: Path, tmp_path: Path, monkeypatch, full: str):
    """A write says nothing of its file: the place without room is meant."""
    for name in ("run", "home/.cache/weakseg"):
        (tmp_path / name).mkdir(parents=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        failures.shutil,
        "disk_usage",
        lambda path: usage(9, 9, 0 if Path(path) == tmp_path / full else 10**12),
    )
    error = said(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "run")
    assert error.what == "the disk is full"
    assert error.where == str(tmp_path / full)
    assert ("set " in error.mend) == (full != "run")
    named = said(OSError(errno.ENOSPC, "full", str(tmp_path / "other")), tmp_path / "run")
    assert named.where == str(tmp_path / "other")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path: Path):
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.json") as temporary:  # noqa: PT012
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        with temporary.open("w") as file:
            file.write("x" * 10**6)
    error = said(caught.value, tmp_path)
    assert error.what == "the disk is full"
    assert error.where == str(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []
    write_json(tmp_path / "a.json", {})


TORCH = {
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": ("/dev/shm", "runtime.workers"),
    "unable to write to file </torch_81_1>: No space left on device (28)": (
        "/dev/shm",
        "runtime.workers",
    ),
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 99 bytes": ("FOLDER", "train.batch"),
    "DataLoader worker (pid 7) is killed by signal: Killed.": ("FOLDER", "train.batch"),
    "Could not determine home directory.": ("HOME", "WEAKSEG_CACHE"),
}


@pytest.mark.parametrize("text", TORCH)
def test_what_torch_says_is_translated(home: Path, tmp_path: Path, text: str):
    where, mend = TORCH[text]
    error = said(RuntimeError(text), tmp_path)
    assert error.where == where.replace("FOLDER", str(tmp_path))
    assert mend in error.mend


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_memory(tmp_path: Path, error: BaseException):
    assert "memory of this machine" in said(error, tmp_path).what


def test_what_is_not_there_any_more(tmp_path: Path):
    run = tmp_path / "run"
    gone = said(FileNotFoundError(errno.ENOENT, "no", str(run / "2-train/x")), run)
    assert "moved or deleted" in gone.what and gone.where == str(run / "2-train/x")
    other = said(FileNotFoundError(errno.ENOENT, "no", str(tmp_path / "x")), run)
    assert "moved" not in other.what


@pytest.mark.parametrize("closed", ["a", "a/b", "a/b/x"])
def test_what_may_not_be_read_is_no_place_to_write(tmp_path: Path, monkeypatch, closed: str):
    file = tmp_path / "a/b/x"
    file.parent.mkdir(parents=True)
    file.touch()
    real = os.access
    monkeypatch.setattr(
        failures.os, "access", lambda p, mode: Path(p) != tmp_path / closed and real(p, mode)
    )
    error = said(PermissionError(errno.EACCES, "no", str(file)), tmp_path / "run")
    assert error.what == "may not be read"
    assert error.where == str(tmp_path / closed)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError(errno.EIO, "x")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException):
    assert mendable(error, tmp_path) is None
    assert shutil.disk_usage(tmp_path).free > 0
