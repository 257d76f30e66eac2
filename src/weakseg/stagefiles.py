"""What a stage leaves: its record, its files, and what has become of them since.

The record of a finished stage has the digest of each of its files. By it a file that is missing or
damaged is told from one that somebody has changed, however the folder was copied; what is changed
or added by hand is never removed, and stages that follow take it as other inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from weakseg.digests import contents, digest, digests
from weakseg.errors import UserError
from weakseg.files import atomic_path, write_json
from weakseg.outputs import OF_FILE_MANAGERS, STAGE_FILE

__all__ = [
    "FORMAT",
    "StageRecord",
    "added",
    "as_made",
    "changed_by_hand",
    "faults",
    "fingerprint",
    "in_the_way",
    "is_damaged",
    "made",
    "of_somebody",
    "outcome",
    "read_record",
    "refuse_to_lose",
    "rewrite",
]

FORMAT = 2  # of a record; those before it had no digests
_FOR_RESUMING = {"last.ckpt", "logs", "snapshots", "features"}
"""What a training leaves beside its result. Nothing that follows needs it, so it may be deleted."""

_TRAININGS = (".", "network")  # where it lies, in the folder of a stage

_FOR_EACH_IMAGE = {"scores", "masks", "labels"}
"""Folders of a stage with a file for each image, which is written where it is missing alone."""

_DATA = (".npz", ".png", ".safetensors")
"""What stages that follow read: where such a file is changed by hand, they run again."""


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
        files: Path relative to the folder -> digest, of everything that the stage has made.
        format: Of the record.
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
    files: dict[str, str] = field(default_factory=dict)
    format: int = 1


def read_record(folder: Path) -> StageRecord | None:
    """The record in a stage folder; ``None`` where there is none or it cannot be read."""
    try:
        values = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        record = StageRecord(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    sound = (
        isinstance(record.status, str)
        and record.status in ("running", "done", "failed")
        and all(isinstance(getattr(record, name), kind) for name, kind in _KINDS.items())
        and all(isinstance(value, str) for value in record.files.values())
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
    "files": dict,
    "format": int,
}


# --- files ----------------------------------------------------------------------------------


def outcome(folder: Path) -> str | None:
    """What depends on a stage depends on this: how it was made, and what was changed by hand since.

    ``None`` where there is no record.
    """
    record = read_record(folder)
    if record is None:
        return None
    edited = [name for name in _edited(folder, record) if name.endswith(_DATA)]
    if not edited:
        return record.fingerprint
    return f"{record.fingerprint}, by hand: {contents({n: folder / n for n in edited})}"


def changed_by_hand(folder: Path) -> list[str]:
    """Files that somebody has changed or added since the stage ended, relative to its folder.

    Damaged ones are left out. Of unfinished work nobody can know.
    """
    record = read_record(folder)
    return [] if record is None else sorted({*_edited(folder, record), *added(folder, record)})


def refuse_to_lose(folder: Path) -> None:
    """Refuses to have a stage's folder replaced, where it holds what cannot be made again.

    Raises:
        UserError: Files were changed or added by hand since the stage ended, or its record is of
            an earlier version, so that nobody can know.
    """
    record = read_record(folder)
    if record is not None and record.format < FORMAT:
        raise UserError(
            "was made by an earlier version of weakseg, and would be made again from the start",
            where=folder,
            mend="start another run with --out (what is in this one can still be exported, scored "
            "and predicted with), or delete this folder",
        )
    changed = changed_by_hand(folder)
    if changed:
        raise UserError(
            f"{len(changed)} files were changed by hand since the stage ended, such as "
            f"{changed[0]}; with other settings they would be lost",
            where=folder,
            mend="copy them elsewhere and delete the folder, or start another run with --out",
        )


def faults(folder: Path, record: StageRecord) -> list[str]:
    """Files of a finished stage that are missing, may not be read, or are damaged."""
    return [
        name
        for name, now in _now(folder, record.files).items()
        if now is None or (now != record.files[name] and is_damaged(folder / name))
    ]


def in_the_way(folder: Path, record: StageRecord) -> list[str]:
    """Files that the stage would write over if it went on, and that are not as it made them.

    Of each image's files, those that are changed by hand are not written over, so that damaged
    ones alone are in the way.
    """
    return [
        name
        for name, now in _now(folder, record.files).items()
        if now != record.files[name]
        and os.path.lexists(folder / name)
        and (_FOR_EACH_IMAGE.isdisjoint(name.split("/")[:-1]) or is_damaged(folder / name))
    ]


def of_somebody(folder: Path, record: StageRecord) -> dict[str, str | None]:
    """Files that are not as the stage made them -> their digest then, ``None`` for what was added."""
    now = _now(folder, record.files)
    changed = {name: own for name, own in record.files.items() if now[name] not in (own, None)}
    return {**changed, **dict.fromkeys(added(folder, record))}


def added(folder: Path, record: StageRecord) -> list[str]:
    """Files that somebody has put into the folder of a stage that was finished."""
    return [n for n in _files(folder) if n not in record.files] if record.files else []


def made(folder: Path, others: Mapping[str, str | None]) -> dict[str, str]:
    """The files of a finished stage with their digests, for its record.

    ``others`` are :func:`of_somebody`: those stay known as they were made, or unknown.
    """
    now = _now(folder, [name for name in _files(folder) if name not in others])
    found = {name: own for name, own in {**now, **others}.items() if own is not None}
    return dict(sorted(found.items()))


def as_made(folder: Path, name: str) -> bool:
    """Whether a file of a finished stage is what the stage made, as far as its record knows it."""
    record = read_record(folder)
    own = None if record is None else record.files.get(name)
    return own is None or digest(folder / name) == own


def rewrite(folder: Path, name: str, text: str) -> None:
    """Writes a file of a finished stage anew, as its own work and not as somebody's."""
    record = read_record(folder)
    with atomic_path(folder / name) as temporary:
        temporary.write_text(text, encoding="utf-8")
        now = digest(temporary)
        if record is not None and name in record.files and now is not None:
            record.files[name] = now
            write_json(folder / STAGE_FILE, asdict(record))


def is_damaged(path: Path) -> bool:
    """Whether a file can be no work of anybody: empty, not to be read, or broken in its format."""
    try:
        if path.stat().st_size == 0:
            return True
        if path.suffix == ".png":
            return not _opens(path)
        if path.suffix == ".npz":
            return not _holds_scores(path)
        if path.suffix == ".json":
            return not _parses(path.read_bytes())
        if path.suffix == ".safetensors":
            return not _is_whole(path)
        with path.open("rb"):
            return False
    except OSError:
        return True


def _edited(folder: Path, record: StageRecord) -> list[str]:
    now = _now(folder, record.files)
    different = (name for name, own in record.files.items() if now[name] not in (own, None))
    return [name for name in different if not is_damaged(folder / name)]


def _now(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    names = list(names)
    return dict(zip(names, digests([folder / name for name in names]), strict=True))


def _files(folder: Path) -> list[str]:
    """What a stage's folder holds, less records and what serves resuming alone."""
    found = []
    for place, folders, files in os.walk(folder):
        inside = Path(os.path.relpath(place, folder)).as_posix()
        aside = _FOR_RESUMING if inside in _TRAININGS else set()
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in aside)
        found += [
            name if inside == "." else f"{inside}/{name}"
            for name in sorted(files)
            if not name.startswith(".") and name not in {STAGE_FILE, *OF_FILE_MANAGERS, *aside}
        ]
    return found


def _opens(path: Path) -> bool:
    from weakseg.data.images import DECODE_ERRORS, open_image

    try:
        with open_image(path) as image:
            image.load()
    except DECODE_ERRORS:
        return False
    return True


def _holds_scores(path: Path) -> bool:
    from weakseg.data.scorefile import read_scores

    try:
        read_scores(path)
    except UserError:
        return False
    return True


def _parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return False
