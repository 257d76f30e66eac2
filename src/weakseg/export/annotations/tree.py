"""Files of strangers: a folder, a zip archive or one file, read without trusting its names.

Nothing is unpacked onto the disk. Names that lead out of an archive, links, and members whose
declared size is beyond any mask's are refused by name before anything is read.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from weakseg.errors import UserError

__all__ = ["Problems", "Tree", "open_tree", "shorten"]

_MOST_BYTES = 2**28  # of one member of an archive: 256 MiB
_MOST_TEXT = 2**31  # of one JSON file
_SHOWN = 20
_DAMAGED = "export the file again from its tool"
_READ_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
)


class Problems:
    """Collects what is wrong with a source, to report all of it at once.

    Args:
        where: The source.
    """

    def __init__(self, where: object) -> None:
        self.where = where
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, what: str, name: object, mend: str) -> None:
        """Notes that ``what`` is wrong with ``name``."""
        names = self._found.setdefault((what, mend), [])
        if str(name) not in names[-1:]:
            names.append(str(name))

    def check(self) -> None:
        """Raises one UserError that holds everything that was added."""
        if not self._found:
            return
        total = sum(len(names) for names in self._found.values())
        lines = [f"nothing was imported, because of {total:,} {'problem' + 's' * (total > 1)}:"]
        for (what, _), names in self._found.items():
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            lines.append(f"    {what}: {', '.join(names[:_SHOWN])}{more}")
        mends = dict.fromkeys(mend for _, mend in self._found)
        raise UserError("\n".join(lines), where=self.where, mend="; ".join(mends))


class Tree(ABC):
    """Named files. Names are relative, with ``/``.

    Attributes:
        where: What the user gave.
        names: All files, sorted, without hidden ones and those of file managers.
    """

    where: Path
    names: tuple[str, ...]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            UserError: It cannot be read.
        """

    def below(self, folder: str, suffix: str) -> dict[str, str]:
        """Files inside folders of this name, at any depth: name without folder and suffix -> file."""
        found = {}
        for name in self.names:
            parts = name.split("/")
            if folder in parts[:-1] and name.lower().endswith(suffix):
                inner = "/".join(parts[parts.index(folder) + 1 :])
                found[inner[: -len(suffix)]] = name
        return found

    def named(self, name: str) -> str | None:
        """The file of this name that lies least deep."""
        same = [n for n in self.names if n.rpartition("/")[2] == name]
        return min(same, key=lambda n: (n.count("/"), n), default=None)

    def ending(self, suffix: str) -> list[str]:
        """Files with this suffix, in lower case."""
        return [name for name in self.names if name.lower().endswith(suffix)]

    def text(self, name: str) -> str:
        """Content of a text file.

        Raises:
            UserError: It is not UTF-8.
        """
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is no UTF-8 text ({error})", where=self.where, mend=_DAMAGED
            ) from None

    def json(self, name: str) -> Any:
        """Content of a JSON file.

        Raises:
            UserError: It is not JSON.
        """
        try:
            return json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name} is no readable JSON ({error})", where=self.where, mend=_DAMAGED
            ) from None


class _Folder(Tree):
    def __init__(self, path: Path) -> None:
        self.where, names = path, []
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(f for f in folders if not _hidden(f))
            inside = os.path.relpath(folder, path).replace(os.sep, "/")
            names += [f"{inside}/{f}".removeprefix("./") for f in files if not _hidden(f)]
        self.names = tuple(sorted(names))

    def read(self, name: str) -> bytes:
        file = self.where / name
        try:
            # Exports link images; a mask or a list that is a link to somewhere else is a trap.
            if file.is_symlink() and not file.resolve().is_relative_to(self.where.resolve()):
                raise UserError(
                    f"{name} is a link that leads out of the folder",
                    where=self.where,
                    mend="put the file itself there",
                )
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"{name} is no file", where=self.where, mend="leave it out")
            if file.stat().st_size > _MOST_TEXT:
                raise UserError(f"{name} is larger than 2 GiB", where=self.where, mend=_DAMAGED)
            return file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{name} cannot be read ({error})", where=self.where, mend="check its permissions"
            ) from None


class _File(_Folder):
    def __init__(self, path: Path) -> None:
        self.where, self.names = path.parent, (path.name,)


class _Archive(Tree):
    def __init__(self, path: Path) -> None:
        self.where = path
        try:
            self._zip = zipfile.ZipFile(path)
            members = self._zip.infolist()
        except _READ_ERRORS as error:
            raise UserError(
                f"the archive cannot be read ({error})", where=path, mend=_DAMAGED
            ) from None
        problems = Problems(path)
        names: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            fault = _fault(member)
            if fault:
                problems.add(fault, repr(member.filename)[:120], _DAMAGED)
            elif not member.is_dir() and not any(map(_hidden, member.filename.split("/"))):
                if member.filename in names:
                    problems.add("members that stand twice", repr(member.filename)[:120], _DAMAGED)
                names[member.filename] = member
        problems.check()
        self._members = names
        self.names = tuple(sorted(names))

    def read(self, name: str) -> bytes:
        try:
            with self._zip.open(self._members[name]) as file:
                return file.read()
        except _READ_ERRORS as error:
            raise UserError(
                f"{name} of the archive cannot be read ({error})", where=self.where, mend=_DAMAGED
            ) from None


def _fault(member: zipfile.ZipInfo) -> str | None:
    """Why a member of an archive is refused."""
    name = member.orig_filename if "\0" in member.orig_filename else member.filename
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or (len(name) > 1 and name[1] == ":") or "\0" in name:
        return "names that are not relative"
    if ".." in path.parts:
        return "names that lead out of the archive"
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "members that are links or devices, not files"
    text = path.suffix.lower() == ".json"
    if member.file_size > (_MOST_TEXT if text else _MOST_BYTES):
        return f"members that claim to be larger than {'2 GiB' if text else '256 MiB'}"
    return None


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def open_tree(path: Path) -> Tree:
    """A folder, a zip archive or one file.

    Raises:
        UserError: It does not exist, or holds what must not be trusted.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise UserError(
            "does not exist", where=path, mend="give the file or folder that the tool exported"
        )
    return _Archive(path) if zipfile.is_zipfile(path) else _File(path)


def shorten(names: Iterable[object], most: int = 5) -> str:
    """The first names of many, for a sentence."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
