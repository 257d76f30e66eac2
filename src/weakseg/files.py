"""Files that are complete whenever they exist, and folders that take each other's place."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "atomic_path",
    "beside",
    "cache_folder",
    "is_alive",
    "link_or_copy",
    "put_in_place",
    "remove",
    "remove_leftovers",
    "undo_half",
    "write_json",
]

_OLD = ".replaced"
_LEFTOVER = re.compile(r"\..*-p(\d+)-[^-]*")


@contextlib.contextmanager
def atomic_path(path: Path, *, note: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it when the block succeeds.

    ``note`` is called with both before that, where somebody keeps a list of what is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(path.stem), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp makes private files; results are meant to be shared
        if note is not None:
            note(Path(name), path)
        os.replace(name, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # a full disk says nothing of where it is
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``, which is gone afterwards if still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(path.name), dir=path.parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, target: Path) -> None:
    """Makes ``new`` take the place of the folder ``target``, which is removed afterwards.

    A process that dies on the way leaves the old folder under a hidden name beside it: see
    :func:`undo_half`.
    """
    old = target.with_name(f".{target.name}{_OLD}")
    _undo(old)
    if not os.path.lexists(target):
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def undo_half(parent: Path) -> None:
    """Ends what a killed :func:`put_in_place` began in a folder: each old folder is back, or gone."""
    for old in list(parent.glob(f".*{_OLD}")):
        _undo(old)


def _undo(old: Path) -> None:
    target = old.with_name(old.name[1 : -len(_OLD)])
    if os.path.lexists(old):
        remove(old) if os.path.lexists(target) else old.rename(target)


def link_or_copy(source: str, target: str) -> None:
    """Makes a file appear in a second place: a hard link, or a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(path: Path) -> None:
    """Removes a file or a folder with what is in it; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, deep: bool = False, of: str | None = None) -> None:
    """Removes temporary files and folders of processes that were killed.

    Args:
        folder: Where to look; it need not exist.
        deep: In its sub-folders too.
        of: Only those for a file of this stem, or a folder of this name.
    """
    prefix = None if of is None else _prefix(of).removesuffix(f"{os.getpid()}-")
    found = folder.rglob(".*") if deep else folder.glob(".*")
    for path in list(found):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not (prefix is None or path.name.startswith(prefix)):
            continue
        process = int(match[1])
        if process == os.getpid() or not is_alive(process):  # in a container, numbers come again
            with contextlib.suppress(OSError):
                remove(path)


def _prefix(stem: str) -> str:
    """Start of a temporary's name: hidden, short enough for any file system, and whose it is."""
    return f".{stem[:40]}-p{os.getpid()}-"


def is_alive(process: int) -> bool:
    """Whether a process of this machine lives; False where that cannot be known."""
    if os.name != "posix":
        return False  # there, signal 0 would end the process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def cache_folder() -> Path:
    """Where things are kept that can be made again: ``$WEAKSEG_CACHE``, else the user's cache."""
    own = os.environ.get("WEAKSEG_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(home) / "weakseg").expanduser()
