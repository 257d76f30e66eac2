"""What weakseg wrote: nothing else is ever written over, and none of it is taken for data.

A folder that a command writes files into gets a hidden list of them, ``.weakseg.jsonl``: a line that
names the command and says whether the folder is all its own, then a line for each file with the
digest of its content. A file that is not in the list, or no longer as the list says, was made or
changed by somebody else. Runs need no list: records lie in the folders of their stages.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from weakseg.digests import digest, digests
from weakseg.errors import UserError
from weakseg.files import remove_leftovers

__all__ = [
    "CORRECTED_FILE",
    "LIST_FILE",
    "OF_FILE_MANAGERS",
    "STAGES",
    "STAGE_FILE",
    "Outputs",
    "claim",
    "is_output",
    "require_absent",
    "set_aside",
    "visible",
]

STAGES = ("check", "train", "seeds", "refine", "masks", "segment", "predict", "evaluate")
"""The stages of a run in order; a stage's folder is its number and name, such as ``2-train``."""

STAGE_FILE = "stage.json"
"""Record of a stage, in its folder."""

CORRECTED_FILE = "corrected.json"
"""Record of imported masks, in their folder."""

LIST_FILE = ".weakseg.jsonl"
"""The list of what a command wrote into a folder, in that folder."""

_MOST = 2**28  # bytes of a list or a record that is read
_RECORDS = {STAGE_FILE: {"stage", "fingerprint"}, CORRECTED_FILE: {"imports"}}  # and their keys

OF_FILE_MANAGERS = ("Thumbs.db", "desktop.ini")
"""Files that file managers leave anywhere; their others are hidden."""


class Outputs:
    """The list of what was written into a folder.

    Args:
        folder: The folder; it need not exist.

    Attributes:
        command: What wrote into it last; empty where there is no list.
        whole: True where everything in the folder was made by it.
        files: Path relative to the folder, with ``/`` -> digest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command, self.whole = "", False
        self.files: dict[str, str] = {}
        self._lock = threading.Lock()
        for line in _lines(folder / LIST_FILE):
            name, own = line.get("file"), line.get("digest")
            if isinstance(name, str) and isinstance(own, str):
                self.files[name] = own
            elif isinstance(line.get("command"), str):
                self.command, self.whole = line["command"], line.get("whole") is True

    def foreign(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the paths where something stands that is not what weakseg wrote there."""
        there = [path for path in paths if os.path.lexists(path)]
        return [
            path
            for path, now in zip(there, digests(there), strict=True)
            if path.is_symlink() or now is None or self.files.get(self._name(path)) != now
        ]

    def begin(self, command: str, *, whole: bool = False) -> None:
        """Writes the list as it is known so far: before the first file, so that no kill hides one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, deep=self.whole)
        self.command, self.whole = command, self.whole or whole
        there = {name: own for name, own in self.files.items() if (self.folder / name).is_file()}
        lines: list[dict[str, Any]] = [{"command": command, "whole": self.whole}]
        lines += [{"file": name, "digest": own} for name, own in there.items()]
        temporary = self.folder / f"{LIST_FILE}.new"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.folder / LIST_FILE)

    def note(self, complete: Path, path: Path) -> None:
        """Lists a file that is about to be renamed to ``path`` (:func:`weakseg.files.atomic_path`)."""
        name, own = self._name(path), digest(complete)
        assert own is not None
        line = json.dumps({"file": name, "digest": own}) + "\n"
        with self._lock, (self.folder / LIST_FILE).open("a", encoding="utf-8") as file:
            file.write(line)
            self.files[name] = own

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()


def claim(folder: Path, files: Collection[str], *, overwrite: bool = False) -> Outputs:
    """The list of a folder that files are about to be written into. Nothing is written yet.

    Args:
        folder: Where; it need not exist.
        files: What will be written, relative to it, with ``/``.
        overwrite: Whatever stands there may be written over.

    Raises:
        UserError: At one of the paths stands something that weakseg did not write there, or that
            somebody has changed since; or a folder on the way to it is a link.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError("is no folder", where=folder, mend="give another name with --out")
    paths = [folder / name for name in files]
    inner = {
        folder.joinpath(*parts[:i]) for parts in map(_parts, files) for i in range(1, len(parts))
    }
    linked = next((path for path in sorted(inner) if path.is_symlink()), None)
    if linked is not None:
        raise UserError(
            "is a link: what is written there would land elsewhere",
            where=linked,
            mend="remove the link, or give another folder with --out",
        )
    outputs = Outputs(folder)
    foreign = [] if overwrite else outputs.foreign(paths)
    if foreign:
        more = f", and {len(foreign) - 1:,} others like it" if len(foreign) > 1 else ""
        raise UserError(
            f"exists already, and weakseg did not write it, or it was changed since{more}",
            where=foreign[0],
            mend="give another name with --out, or say --overwrite if it may be lost",
        )
    return outputs


def require_absent(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write over anything at all.

    Raises:
        UserError: Something stands at ``path``, be it a link that leads nowhere.
    """
    if os.path.lexists(path) and not overwrite:
        raise UserError(
            "exists already",
            where=path,
            mend="choose another name, or say --overwrite if it may be lost",
        )


def set_aside(path: Path) -> Path:
    """Renames a file that somebody has changed (``report.html`` -> ``report-1.html``)."""
    names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
    free = next(name for name in names if not os.path.lexists(name))
    path.rename(free)
    return free


def is_output(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder that holds these names is a run, a part of one, or what a command wrote."""
    if LIST_FILE in names and Outputs(folder).whole:
        return True
    if any(record in names and _is_record(folder / record) for record in _RECORDS):
        return True
    stages = [f"{i}-{name}" for i, name in enumerate(STAGES, start=1) if f"{i}-{name}" in names]
    return any("recipe.yaml" in names or (folder / name / STAGE_FILE).is_file() for name in stages)


def visible(folder: Path) -> list[str]:
    """Names in a folder, without hidden ones and those of file managers; none where it is absent."""
    if not folder.is_dir():
        return []
    names = sorted(os.listdir(folder))
    return [n for n in names if not n.startswith(".") and n not in OF_FILE_MANAGERS]


def _is_record(file: Path) -> bool:
    try:
        if file.stat().st_size > _MOST:
            return False
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and _RECORDS[file.name] <= values.keys()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The values of a list; lines that a full disk or a kill has cut are left out."""
    try:
        if file.stat().st_size > _MOST:
            return
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part)
