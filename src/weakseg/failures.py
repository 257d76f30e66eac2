"""Errors of disks, permissions and memory as what a user can do about them.

What the operating system says is often about another place than the one a command was given: a
cache, the folder of temporary files, memory that processes share. It is named as what it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from weakseg.errors import UserError
from weakseg.files import cache_folder

__all__ = ["mendable"]

_SHARED = Path("/dev/shm")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_LITTLE = 2**20  # bytes that are left on a disk that is called full
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|not enough memory|out of memory|"
    r"killed by signal: Killed",
    re.I,
)
_NO_SHARED_MEMORY = re.compile(
    r"Bus error|shared memory|unable to (?:write|open|mmap).*torch_", re.I
)
_LESS = (
    "lower the batch (train.batch, seeds.batch, predict.batch) or cut it into parts "
    "(train.accumulate), or reduce large images first (seeds.max_side, predict.max_side)"
)
_ON = "run the same command again: it goes on where it stopped"


def mendable(error: BaseException, folder: Path) -> UserError | None:
    """What a user can do about an error of the disk or of memory; ``None`` for other errors.

    Args:
        error: Any.
        folder: Where the command writes: named where the system names nothing.
    """
    if isinstance(error, UserError):
        return error
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return UserError(
            f"the memory of the GPU is full ({str(error).splitlines()[0]})",
            where=folder,
            mend=_LESS,
        )
    if isinstance(error, MemoryError):
        return _no_memory(error, folder)
    if isinstance(error, RuntimeError):
        return _of_runtime(error, folder)
    return _of_system(error, folder) if isinstance(error, OSError) else None


def _of_runtime(error: RuntimeError, folder: Path) -> UserError | None:
    """torch, its loader processes and pathlib say by RuntimeErrors what the system told them."""
    text = str(error)
    if _NO_SHARED_MEMORY.search(text):
        return UserError(
            "the memory that processes share is full",
            where=_SHARED,
            mend="set runtime.workers: 0, or give it more room (docker run --shm-size=8g)",
        )
    if "No space left on device" in text:
        return _of_system(OSError(errno.ENOSPC, text), folder)
    if _NO_MEMORY.search(text):
        return _no_memory(error, folder)
    if "home directory" in text:
        return UserError(
            "there is no home folder",
            where="HOME",
            mend="set HOME, or WEAKSEG_CACHE to a folder that you may write to",
        )
    return None


def _no_memory(error: BaseException, folder: Path) -> UserError:
    reason = (str(error).strip().splitlines() or ["no memory is left"])[0]
    return UserError(
        f"the memory of this machine is full ({reason:.200})", where=folder, mend=_LESS
    )


def _of_system(error: OSError, folder: Path) -> UserError | None:
    named = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    where = folder if named is None else Path(os.fsdecode(named))
    code = error.errno
    if code in _FULL:
        place = where if named is not None else _full(folder)
        advice = _elsewhere(place, folder)
        other = f", or {advice}" if advice else ""
        return UserError("the disk is full", where=place, mend=f"free some space{other} and {_ON}")
    if code in _FORBIDDEN:
        return _forbidden(where, folder, code)
    if code == errno.ENOENT and named is not None:
        inside = where.is_relative_to(folder)
        return UserError(
            "is not there any more: it was moved or deleted while it was needed"
            if inside
            else "is not there",
            where=where,
            mend=f"put it back, or {_ON}" if inside else "restore it, or give another path",
        )
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return UserError(
            "a file stands where a folder is needed, or the other way round",
            where=where,
            mend=_elsewhere(where, folder) or "give another path, or move what stands there",
        )
    if code in (errno.ENAMETOOLONG, errno.ELOOP):
        what = "too long" if code == errno.ENAMETOOLONG else "a link that leads to itself"
        return UserError(f"this name is {what}", where=where, mend="give another path")
    if code in (errno.EMFILE, errno.ENFILE):
        return UserError(
            "too many files are open",
            where=where,
            mend="allow more (ulimit -n 4096), or set runtime.workers to a smaller number",
        )
    if code == errno.ENOMEM:
        return _no_memory(error, folder)
    if code == errno.EFBIG:
        return UserError(
            "a file is larger than this disk or its limit allows (ulimit -f)",
            where=where,
            mend="choose another folder with --out, or raise the limit",
        )
    return None


def _forbidden(where: Path, folder: Path, code: int) -> UserError:
    # Functions of os.path, because those of pathlib raise what this is about.
    outer = (p for p in reversed(where.parents) if os.path.isdir(p))
    closed = next((p for p in outer if not os.access(p, os.X_OK)), None)
    if closed is None and os.path.exists(where):
        needed = os.R_OK | (os.X_OK if os.path.isdir(where) else 0)
        closed = None if os.access(where, needed) else where
    if closed is not None and code != errno.EROFS:
        return UserError("may not be read", where=closed, mend="change its permissions")
    advice = _elsewhere(where, folder)
    return UserError(
        "cannot write here",
        where=where,
        mend=f"{advice}, or change its permissions"
        if advice
        else "choose another folder with --out, or change its permissions",
    )


def _elsewhere(where: Path, folder: Path) -> str | None:
    """How to put another place in the stead of this one, where it is none that a command writes to."""
    if where.is_relative_to(folder) and folder != Path.cwd():
        return None
    for root, advice in _places():
        if where.is_relative_to(root) and ("TMPDIR" not in advice or _is_temporary(where, root)):
            return advice
    return None


def _is_temporary(where: Path, root: Path) -> bool:
    """Whether a path is the folder of temporary files or one of them: people keep runs there too."""
    parts = where.relative_to(root).parts
    return not parts or parts[0].startswith(tempfile.gettempprefix())


def _places() -> list[tuple[Path, str]]:
    """Folders that nobody names on the command line, and how they are moved."""
    places = []
    with contextlib.suppress(RuntimeError):  # no home folder
        places.append((cache_folder(), "set WEAKSEG_CACHE to a folder that you may write to"))
    for variable, default in (
        ("HF_HOME", "~/.cache/huggingface"),
        ("TORCH_HOME", "~/.cache/torch"),
        ("XDG_CACHE_HOME", "~/.cache"),
    ):
        with contextlib.suppress(RuntimeError):
            root = Path(os.environ.get(variable) or default).expanduser()
            places.append((root, f"set {variable} to a folder that you may write to"))
    with contextlib.suppress(OSError):  # no place for temporary files at all
        advice = "set TMPDIR to a folder that you may write to"
        places.append((Path(tempfile.gettempdir()), advice))
    places.append((_SHARED, "set runtime.workers: 0"))
    return places


def _full(folder: Path) -> Path:
    """The place that is full, where the system does not say which: the first without room."""
    candidates = [folder, *(root for root, _ in _places())]
    return next((place for place in candidates if _is_full(place)), folder)


def _is_full(place: Path) -> bool:
    there = next((p for p in (place, *place.parents) if os.path.exists(p)), None)
    try:
        return there is not None and shutil.disk_usage(there).free < _LITTLE
    except OSError:
        return False
