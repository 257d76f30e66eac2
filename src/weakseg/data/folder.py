"""The source for your own images: a folder, with a tag table or with one folder per class.

With a table (``labels``), images may lie anywhere under ``root``. Without one, a table named
``labels.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` in the root is used; failing that, the first
folder of an image's path is its tag (``cat/001.jpg``). Folders named ``train``, ``val`` and
``test`` around the class folders are splits (``train/cat/001.jpg``).

A file that lies in several class folders under the same name and with the same content is *one*
image with all of these tags; its id is the one in the first class folder, in natural order. The
same name with different content makes different images. Images outside of any class folder are
untagged: put negatives there and say ``untagged: negative``.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import (
    NameIndex,
    Untagged,
    check_untagged,
    class_list,
    count,
    in_class_order,
    is_background,
    is_split_word,
    locate,
    natural_key,
    no_images,
    outputs_note,
    read_options,
    require_folder,
    require_plain_names,
    sample_id,
    scan,
    settle_untagged,
    sources,
    split_name,
    tidy,
    unread_note,
    with_masks,
)
from weakseg.data.table import Problems, TagTable, read_table
from weakseg.data.voc import VOC_CLASSES
from weakseg.errors import UserError
from weakseg.registry import suggest

__all__ = ["folder"]

_TABLES = ("labels.csv", "labels.tsv", "labels.jsonl", "labels.parquet")


@sources.register("folder")
def folder(
    *,
    root: str | Path | None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | str | Path | None = None,
    untagged: Untagged | None = None,
    **options: Any,
) -> Collection:
    """Images of a folder with tags from a table or from class folders.

    Args:
        root: Folder of the images.
        labels: Tag table, relative to the working directory or to ``root``; None as above.
        masks: Folder of ground-truth masks, ``<id>.png``, for evaluation only.
        classes: Class names in the order of mask ids, or a file with one in each line; by default
            all tags in natural order.
        untagged: ``"drop"`` or ``"negative"`` for images without a tag.
        options: ``separator``, what stands between tags in a cell of the table; see ``read_table``.

    Raises:
        UserError: Something is missing or contradictory; says how to mend it.
    """
    chosen = read_options("folder", options, {"separator": None})
    check_untagged(untagged)
    path = require_folder(root, where="root", mend="give the folder of your images")
    names, notes = class_list(classes, path)
    skip = locate(masks, path, where="masks") if masks is not None else None
    outputs: list[str] = []
    others: Counter[str] = Counter()
    files = scan(path, skip=skip, left_out=outputs, others=others)
    notes += outputs_note(outputs)
    if not files:
        raise no_images(path, others)
    notes += unread_note(others)
    table = _table_path(labels, path, notes)
    if table is not None:
        rows = read_table(table, classes=names, untagged=untagged, separator=chosen["separator"])
        samples = _from_table(path, files, rows, notes)
        tag_source = f"table {table.name}"
    else:
        samples = _from_class_folders(path, files, notes)
        tag_source = "class folders"
    samples = settle_untagged(samples, untagged, notes)
    known = names or _classes_of(samples, path)
    _check_tags(samples, known, path)
    samples = with_masks(samples, masks, path, notes)
    if masks is not None and names is None:
        notes += _assumed_order(known)
    samples = [
        s if s.tags is None or len(s.tags) < 2 else replace(s, tags=in_class_order(s.tags, known))
        for s in samples
    ]
    samples.sort(key=lambda s: (s.id, s.image.name))
    name = path.resolve().name or "folder"
    return Collection(name, known, tuple(samples), tag_source, tuple(notes))


# --- tags from a table ----------------------------------------------------------------------


def _table_path(labels: str | Path | None, root: Path, notes: list[str]) -> Path | None:
    if labels is not None:
        return locate(labels, root, where="labels")
    for name in _TABLES:
        if (root / name).is_file():
            notes.append(f"Tags are taken from {name}, which stands in the image folder.")
            return root / name
    for name in _TABLES:
        if (root.resolve().parent / name).is_file():
            notes.append(
                f"{name}, which stands beside the image folder, is not used: give it after the "
                "folder (labels) if it holds the tags."
            )
    return None


@dataclass(slots=True)
class _Entry:
    """What the rows of one image say together."""

    sample: Sample
    rows: list[int] = field(default_factory=list)


def _from_table(root: Path, files: list[str], table: TagTable, notes: list[str]) -> list[Sample]:
    notes += table.notes
    index, problems = NameIndex(files, root), Problems(table.path)
    entries: dict[str, _Entry] = {}
    missing, dropped = 0, set()
    for row in table.rows:
        match = index.find(row.name)
        if match is None:
            mend = f"name images relative to {root}"
            problems.add(row.row, f"{row.name!r} leads out of the image folder", mend)
            continue
        if len(match.files) > 1:
            what = f"{row.name!r} may be {' or '.join(match.files[:3])}"
            problems.add(row.row, what, "name images with folder and suffix")
            continue
        relative = match.files[0] if match.files else match.relative
        missing += not match.files
        if row.tags is None:
            dropped.add(relative)
            continue
        sample = Sample(sample_id(relative), root / relative, row.tags, row.split or "train")
        _merge(entries, relative, sample, row.row, problems)
    problems.check()
    if missing == len(table.rows):
        raise UserError(
            f"none of the images of the table, such as {table.rows[0].name!r}, is in {root}",
            where=table.path,
            mend="give the folder that the names of the table are relative to",
        )
    unlisted = len(set(files) - set(entries) - dropped)
    if unlisted:
        notes.append(f"{count(unlisted, 'image')} not listed in {table.path.name}, left out.")
    joined = sum(len(entry.rows) > 1 for entry in entries.values())
    if joined:
        notes.append(f"{count(joined, 'image')} named by several rows; their tags are joined.")
    return [entry.sample for entry in entries.values()]


def _merge(
    entries: dict[str, _Entry], relative: str, sample: Sample, row: int, problems: Problems
) -> None:
    entry = entries.setdefault(relative, _Entry(sample))
    entry.rows.append(row)
    if entry.sample.split != sample.split:
        what = f"{relative!r} is in the splits {entry.sample.split!r} and {sample.split!r}"
        problems.add(row, what, "put each image in one split")
    tags = (*(entry.sample.tags or ()), *(sample.tags or ()))
    entry.sample = replace(entry.sample, tags=tuple(dict.fromkeys(tags)))


# --- tags from class folders ----------------------------------------------------------------


def _from_class_folders(root: Path, files: list[str], notes: list[str]) -> list[Sample]:
    splits = _split_folders(files)
    if splits:
        notes.append(f"The folders {', '.join(splits)} are taken as splits.")
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    samples = []
    for file in files:
        parts = file.split("/")
        split = split_name(parts.pop(0)) if splits else "train"
        if len(parts) == 1:
            samples.append(Sample(sample_id(file), root / file, None, split))
        else:
            groups[split, parts[-1]].append((tidy(parts[0]), file))
    if not groups:
        raise UserError(
            "the folder holds images but neither a tag table nor class folders",
            where=root,
            mend="give a table of tags (labels: labels.csv), or sort images into class folders",
        )
    joined = 0
    for (split, _), members in groups.items():
        for twins in _same_content(root, members):
            tags = tuple(dict.fromkeys(tag for tag, _ in twins))
            samples.append(Sample(sample_id(twins[0][1]), root / twins[0][1], tags, split))
            joined += len(twins) > 1
    if joined:
        notes.append(
            f"{count(joined, 'image')} found in several class folders; each is one image with all "
            "of these tags."
        )
    return samples


def _split_folders(files: Iterable[str]) -> tuple[str, ...]:
    """Top folders, if all of them are named like splits and hold class folders."""
    parts = [file.split("/") for file in files]
    tops = dict.fromkeys(p[0] for p in parts)
    nested = {p[0] for p in parts if len(p) > 2}
    return tuple(tops) if nested == set(tops) and all(map(is_split_word, tops)) else ()


def _same_content(root: Path, members: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Groups (class, file) pairs of one file name by content; first class first."""
    if len(members) == 1:
        return [members]
    ordered = sorted(members, key=lambda m: (natural_key(m[0]), m[1]))
    if len({tag for tag, _ in ordered}) == 1:
        return [[member] for member in ordered]
    groups: dict[bytes, list[tuple[str, str]]] = {}
    for tag, file in ordered:
        try:
            key = hashlib.sha256((root / file).read_bytes()).digest()
        except OSError:  # the check will say so
            key = file.encode("utf-8", "surrogateescape")
        groups.setdefault(key, []).append((tag, file))
    return list(groups.values())


# --- classes --------------------------------------------------------------------------------


def _classes_of(samples: Iterable[Sample], root: Path) -> tuple[str, ...]:
    tags = {tag for sample in samples for tag in sample.tags or ()}
    if not tags:
        raise UserError("no image has a tag", where=root, mend="tag images of at least one class")
    return tuple(sorted(tags, key=natural_key))


def _check_tags(samples: Iterable[Sample], classes: Sequence[str], root: Path) -> None:
    """Tags of a table were checked by row; this catches class folders and a class 'background'."""
    tags = {tag for sample in samples for tag in sample.tags or ()}
    background = next((tag for tag in sorted(tags) if is_background(tag)), None)
    if background is not None:
        raise UserError(
            f"{background!r} cannot be a class: it is what no class covers",
            where=root,
            mend="leave these images without a tag and say 'untagged: negative' "
            "(--untagged negative)",
        )
    require_plain_names(sorted(tags), root)
    unknown = sorted(tags - set(classes))
    if unknown:
        raise UserError(
            f"{count(len(unknown), 'tag')} not in the class list: {', '.join(unknown[:10])}",
            where=root,
            mend=suggest(unknown[0], classes),
        )


def _assumed_order(classes: Sequence[str]) -> list[str]:
    shown = ", ".join(f"{i} = {name}" for i, name in enumerate(classes[:4], start=1))
    dots = ", ..." if len(classes) > 4 else ""
    notes = [
        f"No class list was given: mask ids are assumed to be in natural order ({shown}{dots})."
    ]
    # All 20 VOC names sort into VOC order, but with a gap all ids behind it are shifted.
    if len(classes) >= 10 and set(classes) < set(VOC_CLASSES):
        notes.append(
            f"Only {len(classes)} of the 20 PASCAL VOC classes occur: if the masks use VOC ids, "
            "give all 20 classes, else every id behind a gap means another class."
        )
    return notes
