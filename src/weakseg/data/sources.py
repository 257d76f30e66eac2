"""The registry of sources, their contract, and what they share.

A *source* is a function that turns files into a :class:`~weakseg.data.samples.Collection`::

    source(*, root, labels, masks, classes, untagged, **options) -> Collection

``root``
    Folder of the images; ids are relative to it.
``labels``
    Where the tags come from: a table, a word that the source defines, or ``None`` for its default.
``masks``
    Folder of ground-truth masks that mirrors the ids with ``.png``, for evaluation only.
``classes``
    Class names in the order of mask ids, or a text file with one name in each line.
``untagged``
    What to do with images that carry no tag: ``"drop"`` leaves them out, ``"negative"`` counts
    them as confirmed images without any class, ``None`` leaves them for ``check`` to report.
``options``
    What only this source knows; an unknown one is a UserError that names the nearest.

A source scans and parses; it does not decode images (``check`` does). It returns the same
collection each time, with samples sorted by id, each id unique unless the files on disk clash,
each tag a member of ``classes``. Files that a table names but that do not exist stay in the
collection, so that ``check`` reports all of them at once.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from weakseg.data.samples import IMAGE_SUFFIXES, Collection, Sample
from weakseg.digests import digest
from weakseg.errors import UserError
from weakseg.outputs import LIST_FILE, Outputs, is_output
from weakseg.registry import Registry, suggest

__all__ = [
    "UNTAGGED_MEND",
    "Match",
    "NameIndex",
    "Source",
    "Untagged",
    "check_untagged",
    "class_list",
    "count",
    "has_controls",
    "in_class_order",
    "is_background",
    "is_split_word",
    "locate",
    "natural_key",
    "no_images",
    "outputs_note",
    "read_options",
    "require_folder",
    "require_plain_names",
    "sample_id",
    "scan",
    "settle_untagged",
    "sources",
    "split_name",
    "tidy",
    "unread_note",
    "with_masks",
]

Source = Callable[..., Collection]
Untagged = Literal["drop", "negative"]

sources: Registry[Source] = Registry("source")

UNTAGGED_MEND = (
    "'untagged: drop' (--untagged drop) leaves those images out, 'untagged: negative' "
    "(--untagged negative) counts them as confirmed images without any class"
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


# --- arguments ------------------------------------------------------------------------------


def read_options(
    source: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a source over its defaults.

    Raises:
        UserError: An option is unknown; names the nearest.
    """
    for name in options:
        if name not in defaults:
            raise UserError(
                f"source {source!r} has no option {name!r}",
                where="data.options",
                mend=suggest(name, defaults) if defaults else f"leave {name} out",
            )
    return {**defaults, **options}


def require_folder(folder: str | Path | None, *, where: str, mend: str) -> Path:
    """``folder`` as a path.

    Raises:
        UserError: None was given, or it is not a folder.
    """
    if folder is None:
        raise UserError("no folder was given", where=where, mend=mend)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {kind}", where=where, mend=mend)
    return folder


def locate(path: str | Path, root: Path, *, where: str) -> Path:
    """``path`` as given, or under ``root`` if it is only there.

    Raises:
        UserError: It is in neither place.
    """
    path = Path(path).expanduser()
    for candidate in (path, root / path):
        if candidate.exists():
            return candidate
    raise UserError(
        f"{path} does not exist",
        where=where,
        mend=f"give a path relative to the working directory or to {root}",
    )


def check_untagged(untagged: str | None) -> None:
    """Raises a UserError unless ``untagged`` is None, ``drop`` or ``negative``."""
    if untagged not in (None, "drop", "negative"):
        raise UserError(f"untagged is {untagged!r}, which is no choice", mend=UNTAGGED_MEND)


def class_list(
    classes: Sequence[str] | str | Path | None, root: Path
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Class names from a sequence or from a text file with one name in each line.

    A leading ``background`` is left out, because mask id 0 is the background anyway.

    Returns:
        The names, or None if none were given; and notes.

    Raises:
        UserError: The file is missing, or a name is empty or stands twice.
    """
    if classes is None:
        return None, []
    where = "classes"
    if isinstance(classes, str | Path):
        file = locate(classes, root, where="classes")
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the class list cannot be read ({error})",
                where=file,
                mend="give a UTF-8 text file with one class name in each line",
            ) from error
        classes = [line for line in text.splitlines() if line.strip()]
    names = [tidy(str(name)) for name in classes]
    notes = []
    if names and is_background(names[0]):
        notes.append(f"'{names.pop(0)}' of the class list is left out: mask id 0 is background.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or not all(names) or twice:
        what = f"class names stand twice: {', '.join(twice)}" if twice else "a class has no name"
        raise UserError(what, where=where, mend="list each class once, in the order of mask ids")
    require_plain_names(names, where)
    return tuple(names), notes


def require_plain_names(names: Iterable[str], where: object) -> None:
    """Raises a UserError where the name of a class holds control characters."""
    odd = next((name for name in names if has_controls(name)), None)
    if odd is not None:
        raise UserError(
            f"the class name {odd!r:.80} holds a line break or another control character",
            where=where,
            mend="give the class a name of one line",
        )


# --- names ----------------------------------------------------------------------------------


def tidy(text: str) -> str:
    """Text without surrounding blanks, in the Unicode form that compares equal across systems."""
    return unicodedata.normalize("NFC", text).strip()


def has_controls(text: str) -> bool:
    """Whether a name holds line breaks, NUL or other control characters."""
    return any(unicodedata.category(letter) == "Cc" for letter in text)


@lru_cache(maxsize=4096)
def natural_key(text: str) -> tuple:
    """Sort key that puts ``class 2`` before ``class 10`` and ignores case where it can."""
    parts = re.split(r"([0-9]+)", text)
    return tuple(
        (0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part.casefold())
        for part in parts
        if part
    ), text


def is_background(name: str) -> bool:
    """Whether a class name means the background."""
    return name.strip("_ ").casefold() == "background"


def split_name(text: str) -> str:
    """Name of a split: spellings of train, val and test are made one; others are kept."""
    text = tidy(text)
    return _SPLITS.get(text.casefold(), text) or "train"


def is_split_word(text: str) -> bool:
    """Whether ``text`` is a usual name of a split."""
    return text.casefold() in _SPLITS


def sample_id(relative: str) -> str:
    """Id of an image: its path relative to the root without the image suffix, with ``/``."""
    stem, suffix = os.path.splitext(relative)
    return stem if suffix.lower() in IMAGE_SUFFIXES else relative


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


# --- files ----------------------------------------------------------------------------------


def scan(
    root: Path,
    *,
    skip: Path | None = None,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    left_out: list[str] | None = None,
    others: Counter[str] | None = None,
) -> list[str]:
    """Image files under ``root`` (or those with other ``suffixes``), as sorted relative paths
    with ``/``.

    Hidden files and folders and those of file managers are left out, and so is the folder
    ``skip`` (masks may stand inside the root). Links to folders are followed, once. Runs, and
    whatever else weakseg wrote below the root, are left out too; ``left_out`` gets the names of
    such folders.

    Files with other suffixes are counted in ``others``, by suffix in lower case.

    Raises:
        UserError: A folder may not be read, or the root is the system's.
    """
    _refuse_the_system(root)
    found: list[str] = []
    written: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    if skip is not None and skip.is_dir():
        seen.add(_identity(skip))
    pending = [(os.fspath(root), "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            identity = _identity(folder)
            if identity in seen and prefix:
                continue
            seen.add(identity)
            with os.scandir(folder) as listed:
                # Sorted, so that which of two links to a folder is followed does not vary.
                entries = sorted(listed, key=lambda e: e.name)
        except PermissionError:
            raise UserError(
                "this folder may not be read",
                where=folder,
                mend="change its permissions, or move it out of the folder of images",
            ) from None
        names = {entry.name for entry in entries}
        if prefix and is_output(Path(folder), names):
            if left_out is not None:
                left_out.append(prefix.rstrip("/"))
            continue
        if LIST_FILE in names and not (own := Outputs(Path(folder))).whole:
            written |= {prefix + name: value for name, value in own.files.items()}
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if _is_folder(entry):
                pending.append((entry.path, f"{prefix}{entry.name}/"))
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in suffixes:
                found.append(prefix + entry.name)
            elif others is not None:
                others[suffix] += 1
    if written:
        found = [f for f in found if f not in written or digest(root / f) != written[f]]
    return sorted(found)


def _refuse_the_system(root: Path) -> None:
    """Whoever names the root of the file system means another folder, and would wait for hours."""
    there = root.resolve()
    if there == Path(there.anchor) or str(there).startswith(("/proc", "/sys/", "/dev/")):
        raise UserError(
            "this is the system's own folder, and no folder of images",
            where=root,
            mend="give the folder of your images",
        )


def outputs_note(outputs: Sequence[str]) -> list[str]:
    """What to say of folders that :func:`scan` left out, because weakseg wrote them."""
    if not outputs:
        return []
    names = ", ".join(sorted(outputs)[:3]) + (", ..." if len(outputs) > 3 else "")
    return [f"{count(len(outputs), 'folder')} that weakseg wrote left out: {names}."]


_READERS = {
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl"), "ImageMagick or pillow-heif"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"), "rawpy or darktable"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "pydicom"),
    **dict.fromkeys((".nii", ".nrrd", ".mha", ".mhd"), "SimpleITK"),
    **dict.fromkeys((".svs", ".ndpi", ".mrxs", ".scn"), "OpenSlide"),
    **dict.fromkeys((".czi", ".lif", ".nd2", ".oib", ".vsi", ".lsm", ".stk"), "Fiji (Bio-Formats)"),
    **dict.fromkeys((".jp2", ".j2k", ".img", ".vrt", ".ecw", ".hdf", ".h5", ".nc"), "GDAL"),
    **dict.fromkeys(
        (".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".psd"), "ImageMagick"
    ),
    **dict.fromkeys((".exr", ".hdr"), "OpenCV or ImageMagick"),
    **dict.fromkeys((".jfif", ".jpe", ".jif"), "these are JPEG files: rename them to .jpg"),
    **dict.fromkeys((".npy", ".npz"), "NumPy"),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), "ffmpeg"),
}
"""Suffixes of pictures that are not read, and what opens them and saves them as others."""


def no_images(root: Path, others: Counter[str]) -> UserError:
    """The error for a folder without images: what is there instead, and what opens it.

    Args:
        root: The folder.
        others: Files by suffix, as :func:`scan` counts them.
    """
    if not others:
        return UserError(
            "there are no images in this folder, which is empty",
            where=root,
            mend="check the path of the images",
        )
    shown = "; ".join(_suffix_words(s, n) for s, n in others.most_common(8))
    more = f"; and {len(others) - 8} other suffixes" if len(others) > 8 else ""
    return UserError(
        f"there are no images in this folder, but other files: {shown}{more}",
        where=root,
        mend=f"check the path of the images; read are {', '.join(sorted(IMAGE_SUFFIXES))}: save "
        "others as PNG, or as TIFF where they have more than 8 bits, and give files their suffix",
    )


def unread_note(others: Counter[str]) -> list[str]:
    """A note on pictures beside the images that are not read, where :func:`scan` saw some."""
    found = [
        (s, n)
        for s, n in others.most_common()
        if s in _READERS and _READERS[s] not in ("NumPy", "ffmpeg")
    ]
    if not found:
        return []
    shown = "; ".join(_suffix_words(s, n) for s, n in found)
    return [f"Files that may be images are not read: {shown}. Save them as PNG or TIFF."]


def _suffix_words(suffix: str, number: int) -> str:
    reader = f" ({_READERS[suffix]})" if suffix in _READERS else ""
    return f"{number:,} x {suffix or 'no suffix'}{reader}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


@dataclass(frozen=True)
class Match:
    """What a name of a table stands for: the files that it may mean; none if it is missing."""

    relative: str
    files: tuple[str, ...]


class NameIndex:
    """Finds the file that a row of a table means.

    A row may name a file relative to the root, with or without suffix, with the root's own
    folder in front, or by its bare name if no other file has it.

    Args:
        files: Relative paths, as :func:`scan` yields them.
        root: Folder they are relative to.
    """

    def __init__(self, files: Iterable[str], root: Path) -> None:
        self._roots = tuple(dict.fromkeys((root, root.absolute(), root.resolve())))
        self._name = root.resolve().name
        # One file for nearly all names: a list for each would take three times the memory.
        self._by_id: dict[str, str | list[str]] = {}
        self._by_stem: dict[str, str | list[str]] = {}
        for file in files:
            own = _key(sample_id(file))
            _add(self._by_id, own, file)
            _add(self._by_stem, own.rpartition("/")[2], file)

    def find(self, name: str) -> Match | None:
        """The files that ``name`` may mean; None if it leads out of the root."""
        relative = self._relative(name)
        if relative is None:
            return None
        files = self._lookup(relative)
        if not files and self._name in relative.split("/")[:-1]:
            parts = relative.split("/")
            inner = "/".join(parts[parts.index(self._name) + 1 :])
            files = self._lookup(inner)
            relative = inner if files else relative
        return Match(relative, files)

    def _relative(self, name: str) -> str | None:
        name = name.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
            inside = Path(name)
            for root in self._roots:
                if inside.is_relative_to(root):
                    return inside.relative_to(root).as_posix()
            return None
        parts = [part for part in name.split("/") if part not in ("", ".")]
        return None if ".." in parts or not parts else "/".join(parts)

    def _lookup(self, relative: str) -> tuple[str, ...]:
        key = _key(relative)
        # The tighter reading wins: the file itself, then its id, then any case, then a bare name.
        full = [*_get(self._by_id, _key(sample_id(relative))), *_get(self._by_id, key)]
        wanted = unicodedata.normalize("NFC", relative)
        exact = [(f, unicodedata.normalize("NFC", f)) for f in full]
        loose = [(f, _key(f)) for f in full]
        for files, name in ((exact, wanted), (loose, key)):
            for reading in (_same, _same_id):
                found = {f for f, shown in files if reading(shown, name)}
                if found:
                    return tuple(sorted(found))
        if "/" in key:
            return ()
        bare = [*_get(self._by_stem, sample_id(key)), *_get(self._by_stem, key)]
        names = ((f, _key(f).rpartition("/")[2]) for f in bare)
        return tuple(sorted({f for f, shown in names if key in (shown, sample_id(shown))}))


def _add(index: dict[str, str | list[str]], key: str, file: str) -> None:
    there = index.setdefault(key, file)
    if isinstance(there, list):
        there.append(file)
    elif there is not file:
        index[key] = [there, file]


def _get(index: Mapping[str, str | list[str]], key: str) -> Sequence[str]:
    found = index.get(key, ())
    return (found,) if isinstance(found, str) else found


def _key(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _same(file: str, name: str) -> bool:
    return file == name


def _same_id(file: str, name: str) -> bool:
    return sample_id(file) == name


# --- samples --------------------------------------------------------------------------------


def settle_untagged(
    samples: Sequence[Sample], untagged: Untagged | None, notes: list[str]
) -> list[Sample]:
    """Applies the user's choice to samples whose tags are None, and says so in ``notes``."""
    check_untagged(untagged)
    bare = sum(sample.tags is None for sample in samples)
    if not bare or untagged is None:
        return list(samples)
    if untagged == "drop":
        notes.append(f"{count(bare, 'untagged image')} left out (untagged: drop).")
        return [sample for sample in samples if sample.tags is not None]
    notes.append(
        f"{count(bare, 'untagged image')} counted as confirmed negatives (untagged: negative)."
    )
    return [s if s.tags is not None else replace(s, tags=()) for s in samples]


def with_masks(
    samples: Sequence[Sample], folder: str | Path | None, root: Path, notes: list[str]
) -> list[Sample]:
    """Gives each sample the mask ``folder/<id>.png``, if there is one.

    Raises:
        UserError: The folder is missing, or holds no mask of any sample.
    """
    if folder is None:
        return list(samples)
    path = locate(folder, root, where="masks")
    there = set(scan(path, suffixes=frozenset({".png"}))) if path.is_dir() else set()
    found = [replace(s, mask=_existing(path, f"{s.id}.png", there)) for s in samples]
    number = sum(s.mask is not None for s in found)
    if samples and not number:
        raise UserError(
            f"none of the {count(len(samples), 'image')} has a mask here",
            where=path,
            mend=f"name masks after the images, such as {path / (samples[0].id + '.png')}, "
            "or leave masks out: they only evaluate",
        )
    notes.append(f"{count(number, 'image')} of {len(samples):,} with a ground-truth mask.")
    return found


def _existing(folder: Path, name: str, listed: set[str]) -> Path | None:
    path = folder / name
    # Not listed as written here: a file system that ignores case may know it still.
    return path if name in listed or os.path.isfile(path) else None


def in_class_order(tags: Iterable[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Tags without repetition, in the order of the classes."""
    wanted = set(tags)
    if len(wanted) < 2:
        return tuple(name for name in wanted if name in classes)
    return tuple(name for name in classes if name in wanted)
