"""What files hold, as short digests: these, not times, say whether a file has changed.

A file is read once and then known by its inode, size and times, as long as none of them changes:
within a process always, and between processes in the user's cache where there is much to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from weakseg.files import cache_folder

__all__ = ["contents", "digest", "digests", "together"]

_LENGTH = 16  # hexadecimal digits that are kept
_REST = 2 * 10**9  # ns that a file must have been at rest: the coarsest clock of a file system
_MUCH = 2**26  # bytes; less is read again by the next process


class _Seen(NamedTuple):
    """A file as it was when it was read.

    Attributes:
        size: In bytes.
        modified: Time of its content, in ns; programs can set it.
        changed: Time of its inode, in ns; programs cannot set it.
        read: When reading began, in ns.
        digest: Of its content.
    """

    size: int
    modified: int
    changed: int
    read: int
    digest: str

    def holds(self, now: os.stat_result) -> bool:
        """Whether a file with this status still has the content."""
        same = (self.size, self.modified, self.changed) == (
            now.st_size,
            now.st_mtime_ns,
            now.st_ctime_ns,
        )
        # What was written just before it was read may be written again at the same time.
        return same and max(self.modified, self.changed) < self.read - _REST


_known: dict[str, _Seen] = {}


def digest(path: str | Path) -> str | None:
    """Digest of a file's content; ``None`` where there is no such file or it cannot be read."""
    return digests([path])[0]


def digests(paths: Sequence[str | Path]) -> list[str | None]:
    """Digest of each file's content, 16 hexadecimal digits of its SHA-256.

    ``None`` stands for what is missing, may not be read, or is no regular file.
    """
    now = [_status(path) for path in paths]
    there = {i: status for i, status in enumerate(now) if status is not None}
    todo = {i: status for i, status in there.items() if not _is_known(status)}
    much = sum(status.st_size for status in todo.values()) > _MUCH
    if much:
        with _kept() as kept:
            _recall(kept, todo.values())
        todo = {i: status for i, status in todo.items() if not _is_known(status)}
    fresh: dict[int, str | None] = {}
    if todo:
        with ThreadPoolExecutor() as pool:
            read = pool.map(lambda i: _read(paths[i], todo[i]), todo)
            fresh = dict(zip(todo, read, strict=True))
    if much and todo:
        with _kept() as kept:
            _keep(kept, todo.values())
    old = {i: _known[_key(s)].digest for i, s in there.items() if i not in fresh}
    return [fresh[i] if i in fresh else old.get(i) for i in range(len(now))]


def contents(files: Mapping[str, Path]) -> str:
    """One digest of named files: of their names and of what they hold, wherever they lie."""
    names = sorted(files)
    return together(zip(names, digests([files[name] for name in names]), strict=True))


def together(parts: Iterable[tuple[str, str | None]]) -> str:
    """One digest of pairs of a name and a digest, in their order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(repr(part).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:_LENGTH]


def _status(path: str | Path) -> os.stat_result | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # missing, or a name that no file can have
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _key(found: os.stat_result) -> str:
    return f"{found.st_dev}:{found.st_ino}"


def _is_known(found: os.stat_result) -> bool:
    seen = _known.get(_key(found))
    return seen is not None and seen.holds(found)


def _read(path: str | Path, found: os.stat_result) -> str | None:
    start = time.time_ns()
    try:
        with open(path, "rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()[:_LENGTH]
    except OSError:
        return None
    _known[_key(found)] = _Seen(found.st_size, found.st_mtime_ns, found.st_ctime_ns, start, value)
    return value


# --- between processes ----------------------------------------------------------------------


@contextlib.contextmanager
def _kept() -> Iterator[sqlite3.Connection | None]:
    """The table in the user's cache; whatever is wrong with it costs time alone."""
    connection = None
    with contextlib.suppress(OSError, sqlite3.Error):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / "digests.sqlite", timeout=5)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS seen (file TEXT PRIMARY KEY, size INTEGER, "
            "modified INTEGER, changed INTEGER, read INTEGER, digest TEXT)"
        )
    try:
        yield connection
    finally:
        if connection is not None:
            connection.close()


def _recall(kept: sqlite3.Connection | None, wanted: Iterable[os.stat_result]) -> None:
    if kept is None:
        return
    with contextlib.suppress(sqlite3.Error, TypeError):
        for found in wanted:
            key = _key(found)
            row = kept.execute(
                "SELECT size, modified, changed, read, digest FROM seen WHERE file = ?", (key,)
            ).fetchone()
            if row is not None:
                _known[key] = _Seen(*row)


def _keep(kept: sqlite3.Connection | None, read: Iterable[os.stat_result]) -> None:
    if kept is None:
        return
    rows = [(key, *_known[key]) for key in map(_key, read) if key in _known]
    with contextlib.suppress(sqlite3.Error), kept:
        kept.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?, ?)", rows)
