"""The run folder: numbered stage folders that describe themselves, atomic writes, resume.

A stage is finished when its ``stage.json`` says so, carries the fingerprint of the inputs it would
be run with now, *and* its files are there and readable. Whatever a stage writes appears under its
final name only when complete, so that a file that exists can be trusted after a crash.

A finished result is replaced, never cleared: work with other inputs is done in a hidden folder
beside it, ``.<stage>.next``, which takes its place when it is complete. The record of a finished
stage has the digest of each of its files; those that somebody has changed or added are told by it,
and are never removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from weakseg.errors import UserError
from weakseg.failures import mendable
from weakseg.files import (
    beside,
    is_alive,
    link_or_copy,
    put_in_place,
    remove,
    remove_leftovers,
    undo_half,
    write_json,
)
from weakseg.outputs import STAGE_FILE, STAGES, visible
from weakseg.stagefiles import (
    FORMAT,
    StageRecord,
    changed_by_hand,
    faults,
    fingerprint,
    in_the_way,
    made,
    of_somebody,
    outcome,
    read_record,
    refuse_to_lose,
)

__all__ = ["CORRECTED", "STAGES", "RunFolder", "Stage"]

CORRECTED = "corrected"
"""Folder of a run, beside those of the stages, with the masks that a person has corrected."""


class Stage:
    """One stage of one run, or one step of a stage: its folder and its record.

    Args:
        folder: Its folder.
        name: Its name.
        inputs: Everything that decides its result.
        seed: Kept in the record.
        of_parts: True for a stage made of steps with records of their own, which decide for
            themselves what stays of unfinished work.
        keeps: False for a stage whose result is worth nothing beside a newer attempt.

    Attributes:
        folder: Where its files are. While it is at work, and a finished result of other inputs
            stands there, this is a folder beside it.
        skipped: True where it was done before with the same inputs.
        changed: Inputs that differ from those of the work in the folder, in dotted keys.
        faults: Files of a finished result with the same inputs that are missing or damaged,
            relative to the folder.
        notes: What the user should know of the work, one sentence each.
        results: What the stage adds to its record.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        inputs: Mapping[str, Any],
        seed: int,
        *,
        of_parts: bool = False,
        keeps: bool = True,
    ) -> None:
        self.folder = self._home = folder
        self.name = name
        self.of_parts = of_parts
        self.notes: list[str] = []
        self._keeps = keeps
        plain = json.loads(json.dumps(dict(inputs), default=str))
        self.record = StageRecord(
            name, "running", fingerprint(plain), plain, seed=seed, format=FORMAT
        )
        self.previous = read_record(folder)
        self.changed = self._changes()
        done = self.previous is not None and self.previous.status == "done"
        self.faults: list[str] = []
        if self.previous is not None and done and self._same_inputs:
            self.faults = faults(folder, self.previous)
        self.skipped = self.finished
        if self.finished and self.previous is not None:
            self.record = self.previous
        self.results: dict[str, Any] = self.record.results

    @property
    def finished(self) -> bool:
        """True where the stage was done with the same inputs, and its files are there."""
        done = self.previous is not None and self.previous.status == "done"
        return self._same_inputs and done and not self.faults

    @property
    def resumes(self) -> bool:
        """True where unfinished work of the same inputs lies in the folder, or beside it."""
        if self._same_inputs:
            return not self.finished
        begun = read_record(_next(self._home))
        return begun is not None and begun.fingerprint == self.record.fingerprint

    @property
    def _same_inputs(self) -> bool:
        return self.previous is not None and self.previous.fingerprint == self.record.fingerprint

    def _changes(self) -> list[str]:
        if self.previous is None or self._same_inputs:
            return []
        old, new = _flat(self.previous.inputs), _flat(self.record.inputs)
        return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))

    def refuse_to_lose(self) -> None:
        """Refuses to replace what cannot be made again.

        Raises:
            UserError: Files were changed or added by hand since the stage ended, or its record is
                of an earlier version, so that nobody can know.
        """
        if not self._same_inputs:
            refuse_to_lose(self._home)

    @contextlib.contextmanager
    def working(self) -> Iterator[Stage]:
        """Marks the stage as running, then as done or failed.

        A finished result with other inputs stays where it is until this work is done.

        Raises:
            UserError: The folder cannot be written to, the disk is full, or the work failed with
                an error that the user can mend; or work of other inputs was edited by hand.
        """
        self.refuse_to_lose()
        unfinished = self._place()
        start = time.monotonic()
        before = 0.0
        others: dict[str, str | None] = {}
        try:
            if unfinished is not None:
                before = unfinished.seconds
                self.record.starts = unfinished.starts + 1
                others = self._make_way(unfinished)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(before)
            yield self
            self.record.files = made(self.folder, others)
            self.record.status = "done"
            self._save(before + time.monotonic() - start)
            if self.folder != self._home:
                put_in_place(self.folder, self._home)
                self.folder = self._home
            self.previous, self.faults = self.record, []
        except BaseException as error:
            problem = mendable(error, self.folder)
            self.record.status = "failed"
            self.record.message = str(problem or error)
            with contextlib.suppress(OSError):
                self._save(before + time.monotonic() - start)
            if problem is not None and problem is not error:
                raise problem from error
            raise

    def _place(self) -> StageRecord | None:
        """Decides where the work is done; returns the record of unfinished work that lies there.

        Work of unknown inputs is moved aside. Unfinished work of other inputs is removed, its
        record first: what is left after an interruption must not pass for anything.
        """
        if self._same_inputs:
            return self.previous
        if not os.path.lexists(self._home):
            return None
        try:
            if self.previous is None:
                if not self._home.is_dir() or self._home.is_symlink() or visible(self._home):
                    self._home.rename(_free_name(self._home, "unknown"))
                return None
            if not (self._keeps and (self.previous.status == "done" or self.previous.files)):
                if not self.of_parts:
                    _clear(self._home)
                return None
            self.folder = _next(self._home)
            begun = read_record(_next(self._home))
            if begun is not None and begun.fingerprint == self.record.fingerprint:
                return begun
            if os.path.lexists(_next(self._home)) and not self.of_parts:
                _clear(_next(self._home))
            return None
        except OSError as error:
            raise mendable(error, self._home) or error from None

    def take_over(self, folder: Path) -> None:
        """Takes a finished result of the same inputs from another folder, as links where it can."""
        other = read_record(folder)
        if self.finished or other is None or other.fingerprint != self.record.fingerprint:
            return
        if other.status != "done" or faults(folder, other) or changed_by_hand(folder):
            return
        with beside(self._home) as copy:
            shutil.copytree(folder, copy, copy_function=link_or_copy, dirs_exist_ok=True)
            put_in_place(copy, self._home)
        self.previous = self.record = other
        self.results = other.results
        self.faults, self.skipped = [], True

    def _make_way(self, unfinished: StageRecord) -> dict[str, str | None]:
        """Moves aside what the work would write over and did not make; removes leftovers.

        Returns:
            Files that stay and are not of the work's making: see :func:`of_somebody`.
        """
        remove_leftovers(self.folder, deep=True)
        if not unfinished.files:
            return {}
        self.record.files = unfinished.files  # where this stops, it is still known
        names = in_the_way(self.folder, unfinished)
        aside = _free_name(self._home, "aside")
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).rename(aside / name)
        if names:
            self.notes.append(f"{len(names)} files were not as they were made: see {aside.name}")
        return of_somebody(self.folder, unfinished)

    def _save(self, seconds: float) -> None:
        self.record.seconds = round(seconds, 2)
        self.record.versions = _versions()
        self.record.results = self.results
        write_json(self.folder / STAGE_FILE, asdict(self.record))


class RunFolder:
    """A folder that holds a run.

    Args:
        path: The folder; made when first written to.

    Attributes:
        expected: Outcomes of stages that are planned and not done yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.expected: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def report_file(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out of the folder, which is made where it is absent.

        What a killed process left half done is undone first. A folder that was made and stays
        empty, because what was to be done was refused, is gone afterwards.

        Raises:
            UserError: Another living process works on this run.
        """
        made = _make_folders(self.path)
        lock = self.path / ".lock"
        try:
            _take_lock(lock, self.path)
            try:
                self._undo_half()
                yield
            finally:
                lock.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()

    def restore(self) -> None:
        """Undoes what a killed process left half done, unless another one is at work."""
        if self.path.is_dir():
            with contextlib.suppress(UserError, OSError), self.locked():
                pass

    def _undo_half(self) -> None:
        refine = self.stage_folder("refine")
        for folder in (self.path, refine, _next(refine)):
            undo_half(folder)
        remove_leftovers(self.path)

    def stage_folder(self, name: str) -> Path:
        """Folder of a stage, whether or not it exists."""
        return self.path / f"{STAGES.index(name) + 1}-{name}"

    def scores_folder(self, steps: Sequence[str] = (), index: int | None = None) -> Path:
        """Folder of the score files after the last of these steps of refinement.

        Args:
            steps: Names of the recipe's steps; without any, the seeds' scores.
            index: After this step instead, counted from 0.
        """
        if not steps:
            return self.stage_folder("seeds") / "scores"
        last = len(steps) - 1 if index is None else index
        return self.stage_folder("refine") / f"{last + 1}-{steps[last]}" / "scores"

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        seed: int = 0,
        of_parts: bool = False,
        keeps: bool = True,
    ) -> Stage:
        """The stage ``name`` as it would be run with ``inputs`` now."""
        folder = self.stage_folder(name)
        return Stage(folder, name, inputs, seed, of_parts=of_parts, keeps=keeps)

    def record(self, name: str) -> StageRecord | None:
        """What was recorded of a stage, or ``None``."""
        return read_record(self.stage_folder(name))

    def outcome(self, name: str) -> str | None:
        """What stages that follow this one depend on: see :func:`weakseg.stagefiles.outcome`.

        ``None`` where it has not been run, and nothing is expected of it.
        """
        return self.expected.get(name) or outcome(self.stage_folder(name))

    def require(self, name: str) -> Path:
        """Folder of a stage that must be done.

        Raises:
            UserError: The stage is not done; names the command that does it.
        """
        record = self.record(name)
        if record is None or record.status != "done":
            state = "has not been run" if record is None else f"is not finished ({record.status})"
            raise UserError(
                f"stage {name!r} {state}",
                where=self.path,
                mend=f"run `weakseg {name} {self.path}` or `weakseg run` first",
            )
        return self.stage_folder(name)


def _make_folders(path: Path) -> list[Path]:
    """Makes a folder with those above it; returns what was made, the deepest first.

    Raises:
        UserError: It cannot be made.
    """
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise mendable(error, path) or error from None
    return missing


def _take_lock(lock: Path, where: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(prefix=f".lock-p{os.getpid()}-", dir=where)
    except OSError as error:
        raise mendable(error, where) or error from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
        for _ in range(2):
            if _appears(name, lock):
                return
            owner = _read_lock(lock)
            if owner is not None and owner != os.getpid() and is_alive(owner):
                raise UserError(
                    f"process {owner} is working on this run",
                    where=where,
                    mend="wait for it, or start another run with --out; if it is not so, "
                    f"delete {lock}",
                )
            lock.unlink(missing_ok=True)
        os.replace(name, lock)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _appears(name: str, lock: Path) -> bool:
    """Makes the file appear as ``lock``, complete; False where there is one already."""
    try:
        os.link(name, lock)
    except FileExistsError:
        return False
    except OSError:  # of a file system without links
        if os.path.lexists(lock):
            return False
        os.replace(name, lock)
    return True


def _read_lock(lock: Path) -> int | None:
    """The process that holds the lock, where it ran on this machine."""
    with contextlib.suppress(OSError, ValueError):
        host, pid = lock.read_text(encoding="utf-8").split()
        return int(pid) if host == socket.gethostname() else None
    return None


def _next(folder: Path) -> Path:
    """Where the successor of a finished result is made."""
    return folder.with_name(f".{folder.name}.next")


def _clear(folder: Path) -> None:
    """Removes unfinished work, its record first: what is left must not pass for anything."""
    (folder / STAGE_FILE).unlink(missing_ok=True)
    remove(folder)


def _free_name(folder: Path, word: str) -> Path:
    names = (folder.with_name(f"{folder.name}.{word}-{i}") for i in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("weakseg", "torch", "torchvision", "timm", "lightning"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
