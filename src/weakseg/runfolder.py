"""The run folder: numbered stage folders that describe themselves, atomic writes, resume.

A stage is finished when its ``stage.json`` says so *and* carries the fingerprint of the inputs it
would be run with now. Whatever a stage writes appears under its final name only when complete, so
a file that exists can be trusted after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal

from weakseg.errors import UserError
from weakseg.files import write_json
from weakseg.outputs import STAGES

__all__ = ["STAGES", "RunFolder", "Stage", "StageRecord", "fingerprint", "mendable", "read_record"]


_OF_FILE_MANAGERS = ("Thumbs.db", "desktop.ini")


def fingerprint(inputs: Any) -> str:
    """Short hash of plain values (what ``json`` can write, paths and tuples included)."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class StageRecord:
    """What ``stage.json`` holds.

    Attributes:
        inputs: Everything that decides the result: settings and the fingerprints of stages before.
        results: Small numbers worth showing; figures that used ground truth say so themselves.
    """

    stage: str
    status: Literal["running", "done", "failed"]
    fingerprint: str
    inputs: dict[str, Any]
    seed: int = 0
    seconds: float = 0.0
    starts: int = 1
    message: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


class Stage:
    """One stage of one run, or one step of a stage: its folder and its record.

    Args:
        folder: Its folder.
        name: Its name.
        inputs: Everything that decides its result.
        seed: Kept in the record.
        of_parts: True for a stage made of steps with records of their own, which decide for
            themselves what stays.

    Attributes:
        skipped: True where it was done before with the same inputs.
        changed: Inputs that differ from those of the work in the folder, in dotted keys.
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
    ) -> None:
        self.folder = folder
        self.name = name
        self.of_parts = of_parts
        plain = json.loads(json.dumps(dict(inputs), default=str))
        self.record = StageRecord(name, "running", fingerprint(plain), plain, seed=seed)
        self.previous = read_record(folder)
        self.changed = self._changes()
        self.skipped = self.finished
        if self.finished and self.previous is not None:
            self.record = self.previous
        self.results: dict[str, Any] = self.record.results

    @property
    def finished(self) -> bool:
        """True where the stage was done with the same inputs."""
        return self._same_inputs and self.previous is not None and self.previous.status == "done"

    @property
    def resumes(self) -> bool:
        """True where unfinished work of the same inputs lies in the folder."""
        return self._same_inputs and not self.finished

    @property
    def _same_inputs(self) -> bool:
        return self.previous is not None and self.previous.fingerprint == self.record.fingerprint

    def _changes(self) -> list[str]:
        if self.previous is None or self._same_inputs:
            return []
        old, new = _flat(self.previous.inputs), _flat(self.record.inputs)
        return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))

    @contextlib.contextmanager
    def working(self) -> Iterator[Stage]:
        """Marks the stage as running, then as done or failed; clears work of other inputs.

        Raises:
            UserError: The folder cannot be written to, the disk is full, or the work failed with
                an error that the user can mend; or work of other inputs was edited by hand.
        """
        self._refuse_to_lose_edits()
        self._clear()
        start = time.monotonic()
        before = 0.0
        try:
            if self._same_inputs and self.previous is not None:
                before = self.previous.seconds
                self.record.starts = self.previous.starts + 1
                self._remove_leftovers()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(before)
            yield self
            self.record.status = "done"
            self._save(before + time.monotonic() - start)
            self.previous = self.record
        except BaseException as error:
            problem = mendable(error, self.folder)
            self.record.status = "failed"
            self.record.message = str(problem or error)
            with contextlib.suppress(OSError):
                self._save(before + time.monotonic() - start)
            if problem is not None and problem is not error:
                raise problem from error
            raise

    def _clear(self) -> None:
        """Removes work of other inputs; work of unknown inputs is moved aside instead.

        Where that is interrupted, no record may stay: what is left must not pass for anything.
        """
        if self._same_inputs or not self.folder.exists() or self.of_parts:
            return
        try:
            if self.previous is not None:
                (self.folder / "stage.json").unlink()
                shutil.rmtree(self.folder)
                return
            names = (self.folder.with_name(f"{self.folder.name}.unknown-{i}") for i in count(1))
            self.folder.rename(next(name for name in names if not name.exists()))
        except OSError as error:
            raise mendable(error, self.folder) or error from None

    def _remove_leftovers(self) -> None:
        """Temporary files (all are hidden) of a process that was killed while it wrote them."""
        for path in self.folder.rglob(".*"):
            if path.is_file():
                path.unlink(missing_ok=True)

    def _refuse_to_lose_edits(self) -> None:
        """Masks corrected by hand are worth more than anything that could replace them."""
        if self._same_inputs or self.previous is None or self.previous.status != "done":
            return
        if self.of_parts:
            return
        finished = (self.folder / "stage.json").stat().st_mtime
        files = (
            p
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and not p.name.startswith(".") and p.name not in _OF_FILE_MANAGERS
        )
        edited = [p for p in files if p.stat().st_mtime > finished + 1]
        if edited:
            raise UserError(
                f"{len(edited)} files were changed by hand since the stage ended, such as "
                f"{edited[0].name}; with other settings it would overwrite them",
                where=self.folder,
                mend="copy them elsewhere and delete the folder, or start another run with --out",
            )

    def _save(self, seconds: float) -> None:
        self.record.seconds = round(seconds, 2)
        self.record.versions = _versions()
        self.record.results = self.results
        write_json(self.folder / "stage.json", asdict(self.record))


class RunFolder:
    """A folder that holds a run.

    Args:
        path: The folder; made when first written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

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
        """Keeps a second process out of the folder.

        Raises:
            UserError: Another living process works on this run.
        """
        lock = self.path / ".lock"
        owner = _read_lock(lock)
        if owner is not None and owner != os.getpid() and _alive(owner):
            raise UserError(
                f"process {owner} is working on this run",
                where=self.path,
                mend=f"wait for it, or start another run with --out; if it is not so, delete {lock}",
            )
        lock.write_text(f"{socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

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
        self, name: str, inputs: Mapping[str, Any], *, seed: int = 0, of_parts: bool = False
    ) -> Stage:
        """The stage ``name`` as it would be run with ``inputs`` now."""
        return Stage(self.stage_folder(name), name, inputs, seed, of_parts=of_parts)

    def record(self, name: str) -> StageRecord | None:
        """What was recorded of a stage, or ``None``."""
        return read_record(self.stage_folder(name))

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


def _read_lock(lock: Path) -> int | None:
    """The process that holds the lock, where it ran on this machine."""
    with contextlib.suppress(OSError, ValueError):
        host, pid = lock.read_text(encoding="utf-8").split()
        return int(pid) if host == socket.gethostname() else None
    return None


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return False  # there, signal 0 would end the process; such a lock is taken over
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_record(folder: Path) -> StageRecord | None:
    """The record in a stage folder; ``None`` where there is none or it cannot be read."""
    try:
        values = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        record = StageRecord(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    sound = (
        isinstance(record.status, str)
        and record.status in ("running", "done", "failed")
        and all(isinstance(getattr(record, name), kind) for name, kind in _KINDS.items())
    )
    return record if sound else None


_KINDS = {
    "stage": str,
    "fingerprint": str,
    "inputs": dict,
    "seed": int,
    "seconds": int | float,
    "starts": int,
    "message": str,
    "versions": dict,
    "results": dict,
}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def mendable(error: BaseException, folder: Path) -> UserError | None:
    """What a user can do about an error of the disk or of memory; ``None`` for other errors."""
    if isinstance(error, UserError):
        return error
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return UserError(
            f"the memory of the GPU is full ({str(error).splitlines()[0]})",
            where=folder,
            mend="lower the batch (train.batch, seeds.batch, predict.batch) or cut it into parts "
            "(train.accumulate), or reduce large images first (seeds.max_side, predict.max_side)",
        )
    if not isinstance(error, OSError):
        return None
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            "the disk is full",
            where=where,
            mend="free some space and run the same command again: it goes on where it stopped",
        )
    if error.errno == errno.EACCES and os.path.isfile(where) and not os.access(where, os.R_OK):
        return UserError("may not be read", where=where, mend="change its permissions")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return UserError(
            "a file stands where a folder is needed, or the other way round",
            where=where,
            mend="give another path, or move what stands there",
        )
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        what = "too long" if error.errno == errno.ENAMETOOLONG else "a link that leads to itself"
        return UserError(f"this name is {what}", where=where, mend="give another path")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            "cannot write here",
            where=where,
            mend="choose another folder with --out, or change its permissions",
        )
    return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("weakseg", "torch", "torchvision", "timm", "lightning"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
