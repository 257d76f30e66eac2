"""Tag tables: CSV, TSV, JSON lines, Parquet, and the published ``cls_labels.npy``.

A table has a column that names images and either a column of tags or one column of zeros and
ones for each class, and may have a column ``split``. What was detected is said in the notes; all
problems of a table are reported together.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.data.parquet import Column, read_columns
from weakseg.data.pickles import Array, read_pickle, shown
from weakseg.data.samples import IMAGE_SUFFIXES
from weakseg.data.sources import (
    UNTAGGED_MEND,
    Untagged,
    check_untagged,
    count,
    has_controls,
    is_split_word,
    split_name,
    tidy,
)
from weakseg.errors import UserError
from weakseg.registry import suggest

__all__ = ["Problems", "TagRow", "TagTable", "read_label_vectors", "read_table"]

_IMAGE_COLUMNS = (
    "image", "images", "file", "filename", "path", "filepath", "imagepath", "imagefile",
    "imagename", "imageid", "img", "id", "name",
)  # fmt: skip
_LABEL_COLUMNS = (
    "labels", "label", "tags", "tag", "classes", "class", "classname", "classnames",
    "categories", "category", "objects",
)  # fmt: skip
_SPLIT_COLUMNS = ("split", "subset", "partition")
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_SHOWN = 8
_BLANKS = (" ", "blank", "blanks")
_MARKS = (" ", ",", ";", "|", "/", "\\", "+", "&", ":", "#", "~", "_", "-", ".")
"""What may stand between tags of one cell."""
_MANY_TAGS = 8  # classes below which nothing can be said about how cells would be cut
_FAR_FEWER = 0.5  # share of the classes that are left when cells are cut


@dataclass(frozen=True, slots=True)
class TagRow:
    """One row of a table.

    Attributes:
        row: Its number in the file, as a spreadsheet or an editor shows it.
        name: The image as the row names it.
        tags: Class names; empty for a confirmed negative; None if the row is to be left out.
        split: Split that the row names, or None.
    """

    row: int
    name: str
    tags: tuple[str, ...] | None
    split: str | None = None


@dataclass(frozen=True)
class TagTable:
    """A tag table as read.

    Attributes:
        path: The file.
        rows: Its rows, in the order of the file.
        notes: What was detected or assumed, one sentence each.
    """

    path: Path
    rows: tuple[TagRow, ...]
    notes: tuple[str, ...] = ()


@dataclass
class Problems:
    """Collects what is wrong with the rows of a table, to report all of it at once."""

    path: Path
    found: dict[tuple[str, str | None], list[int]] = field(default_factory=dict)

    def add(self, row: int, what: str, mend: str | None = None) -> None:
        """Notes that ``what`` is wrong in row number ``row``."""
        self.found.setdefault((what, mend), []).append(row)

    def check(self) -> None:
        """Raises one UserError with everything that was added."""
        if not self.found:
            return
        total = len({row for rows in self.found.values() for row in rows})
        lines = [f"{count(total, 'row')} of the table cannot be used:"]
        # Whatever concerns most rows comes first; ties keep the order of the file.
        ordered = sorted(self.found.items(), key=lambda item: (-len(item[1]), item[1][0]))
        lines += [f"    {_row_list(rows)}: {what}" for (what, _), rows in ordered[:_SHOWN]]
        if len(ordered) > _SHOWN:
            lines.append(f"    and {len(ordered) - _SHOWN} other problems")
        mends = dict.fromkeys(mend for (_, mend), _ in ordered if mend)
        raise UserError("\n".join(lines), where=self.path, mend="; ".join(mends) or None)


def _row_list(rows: Sequence[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:5])
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


@dataclass(slots=True)
class _Raw:
    """A row before its cell is cut into tags; a tuple is already cut."""

    row: int
    name: str
    cell: str | tuple[str, ...]
    split: str | None


def read_table(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    untagged: Untagged | None = None,
    separator: str | None = None,
) -> TagTable:
    """Reads a tag table.

    Tags in one cell are separated by ``;`` or ``|``, else by ``,`` (in CSV inside quotes), else by
    blanks if each word is a known class: one of ``classes`` or, without them, the whole content
    of another cell. Between ``classes``, slashes and other marks separate too. One separator
    holds for the whole table. Where cells that would be taken whole are far fewer classes once
    they are cut at blanks or at a mark, that is an error, and ``separator`` decides.

    Args:
        path: ``.jsonl`` or ``.ndjson`` (objects with ``image`` and ``labels``), ``.parquet``,
            ``.npy`` (label vectors in the order of ``classes``), anything else as delimited text.
        classes: Allowed tags; None allows any.
        untagged: What an empty cell means; ``"drop"`` yields rows with tags None.
        separator: What stands between tags of one cell, such as ``"/"``; ``"blank"`` for blanks,
            ``"none"`` where each cell is one tag; None as above. Lists of tags are never cut.

    Raises:
        UserError: The file cannot be read, it is not clear what separates tags, or rows of it cannot be used (all of them are named).
    """
    path = Path(path)
    check_untagged(untagged)
    if separator is not None and not (isinstance(separator, str) and separator):
        raise UserError(
            f"separator is {separator!r}",
            where="data.options.separator",
            mend="give the characters between tags, such as '/', or blank, or none",
        )
    if not path.is_file():
        raise UserError("there is no such table", where=path, mend="check the path of the labels")
    problems = Problems(path)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        raws, notes = _read_vectors(path, classes)
    elif suffix in {".jsonl", ".ndjson", ".json"}:
        raws, notes = _read_jsonl(path, problems)
    elif suffix in {".parquet", ".pq"}:
        raws, notes = _read_parquet(path, classes, problems)
    else:
        raws, notes = _read_delimited(path, classes, problems)
    notes += _cut_cells(raws, classes, separator, path)
    rows, more = _validated(raws, classes, untagged, problems)
    problems.check()
    if not rows:
        raise UserError("the table has no rows", where=path, mend="write one row for each image")
    return TagTable(path, tuple(rows), tuple(f"{path.name}: {note}" for note in notes + more))


# --- readers: each yields raw rows and notes ------------------------------------------------


def _read_vectors(path: Path, classes: Sequence[str] | None) -> tuple[list[_Raw], list[str]]:
    vectors = read_label_vectors(path)
    length = next(iter(vectors.values())).size
    if classes is None or len(classes) != length:
        given = "no class names were given" if classes is None else f"{len(classes)} were given"
        raise UserError(
            f"its label vectors have {length} entries, but {given}",
            where=path,
            mend=f"give the {length} class names in the order of the vectors (classes:)",
        )
    raws = [
        _Raw(row, name, tuple(c for c, v in zip(classes, vector, strict=True) if v > 0.5), None)
        for row, (name, vector) in enumerate(vectors.items(), start=1)
    ]
    return raws, [f"{count(length, 'class', 'classes')} in the order of the label vectors."]


def _read_jsonl(path: Path, problems: Problems) -> tuple[list[_Raw], list[str]]:
    raws = []
    text = _text(path)
    if text.lstrip().startswith("{") and '"annotations"' in text and '"categories"' in text:
        raise UserError(
            "this is no table of tags but an instances file of COCO",
            where=path,
            mend="read it with its own source: --set data.source=coco",
        )
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            problems.add(row, "this is not a JSON object", "write one JSON object in each line")
            continue
        raw = _json_row(row, entry, problems)
        if raw is not None:
            raws.append(raw)
    listed = any(isinstance(raw.cell, tuple) for raw in raws)
    return raws, [f"JSON lines with tags as {'lists' if listed else 'text'}."]


def _json_row(row: int, entry: dict[str, Any], problems: Problems) -> _Raw | None:
    keys = list(entry)
    image, labels = _pick(keys, _IMAGE_COLUMNS), _pick(keys, _LABEL_COLUMNS)
    split = _pick(keys, _SPLIT_COLUMNS)
    if image is None or labels is None:
        problems.add(row, "'image' or 'labels' is missing", "give both in each object")
        return None
    name, cell = entry[keys[image]], entry[keys[labels]]
    if not isinstance(name, str):
        problems.add(row, "'image' is not text", "name the image file")
        return None
    if isinstance(cell, list) and all(isinstance(tag, str) for tag in cell):
        cell = tuple(tidy(tag) for tag in cell)
    elif cell is None:
        cell = ""
    elif not isinstance(cell, str):
        problems.add(row, "'labels' is neither text nor a list of text", "give names of classes")
        return None
    return _Raw(row, name, cell, _split_cell(entry, keys, split))


def _split_cell(entry: dict[str, Any], keys: list[str], column: int | None) -> str | None:
    value = entry[keys[column]] if column is not None else None
    return None if value is None else str(value)


def _read_parquet(
    path: Path, classes: Sequence[str] | None, problems: Problems
) -> tuple[list[_Raw], list[str]]:
    """The same columns as in delimited text; rows count from 1."""
    columns = read_columns(path)
    named = {tidy(column.name): column for column in columns}
    text = [name for name, column in named.items() if column.kind == "text"]
    image = _pick(text, _IMAGE_COLUMNS)
    if image is None:
        there = ", ".join(f"{name} ({column.type:.40})" for name, column in named.items())
        raise UserError(
            f"no column of text names images; the columns are: {there or 'none'}",
            where=path,
            mend="name the columns 'image' (text) and 'labels' (text or lists of text)",
        )
    others = [name for name in named if name != text[image]]
    labels, split = _pick(others, _LABEL_COLUMNS), _pick(others, _SPLIT_COLUMNS)
    names = named[text[image]].values()
    splits = named[others[split]].values() if split is not None else [None] * len(names)
    cells: Sequence[str | tuple[str, ...] | None]
    if labels is not None:
        cells = _tag_cells(named[others[labels]], path)
        notes = [f"images are named in column '{text[image]}', tags in column '{others[labels]}'."]
    else:
        rest = [n for i, n in enumerate(others) if i != split and named[n].kind == "numbers"]
        wanted = rest if classes is None else [n for n in rest if n in set(classes)]
        bits = {name: named[name].values() for name in wanted}
        if classes is None:
            bits = {
                n: v for n, v in bits.items() if v and set(v) - {None} and set(v) <= {0, 1, None}
            }
        if not bits:
            raise UserError(
                f"no column holds tags; the columns are: {', '.join(named)}",
                where=path,
                mend="name the column of tags 'labels', or give one column of 0 and 1 for each "
                "class",
            )
        cells = _bit_cells(bits, len(names), problems)
        notes = [f"{count(len(bits), 'column')} of 0 and 1, one for each class."]
    rows = enumerate(zip(names, cells, splits, strict=True), start=1)
    raws = [
        _Raw(row, name or "", cell, None if part is None else str(part))
        for row, (name, cell, part) in rows
        if cell is not None
    ]
    return raws, notes


def _tag_cells(column: Column, path: Path) -> list[str | tuple[str, ...] | None]:
    if column.kind not in ("text", "tags"):
        raise UserError(
            f"the column {column.name!r} of tags is of type {column.type:.60}",
            where=path,
            mend="write the names of the classes: text, or lists of text",
        )
    if column.kind == "text":
        return [value or "" for value in column.values()]
    return [tuple(tidy(tag) for tag in value or () if tag) for value in column.values()]


def _bit_cells(
    bits: dict[str, list[Any]], rows: int, problems: Problems
) -> list[tuple[str, ...] | None]:
    """Tags of each row; None where a cell is neither 0 nor 1."""
    tags: list[list[str] | None] = [[] for _ in range(rows)]
    for name, values in bits.items():
        for i, value in enumerate(values):
            own = tags[i]
            if value not in (0, 1):
                what = f"column '{name}' holds {value!r:.40}"
                problems.add(i + 1, what, "write 0 or 1 in the column of each class")
                tags[i] = None
            elif value and own is not None:
                own.append(name)
    return [None if own is None else tuple(own) for own in tags]


@dataclass(frozen=True)
class _Layout:
    """Which column of a delimited table holds what."""

    header: tuple[str, ...]
    image: int
    labels: int | None
    split: int | None
    one_hot: tuple[int, ...]
    first: int  # index of the first record that is not a header
    notes: tuple[str, ...]


def _read_delimited(
    path: Path, classes: Sequence[str] | None, problems: Problems
) -> tuple[list[_Raw], list[str]]:
    records, delimiter = _records(path)
    layout = _layout(records, path, classes)
    raws = []
    for row, record in enumerate(records[layout.first :], start=layout.first + 1):
        if not any(cell.strip() for cell in record):
            continue
        if len(record) != len(layout.header):
            problems.add(
                row,
                f"{count(len(record), 'cell')} where the header has {len(layout.header)}",
                "separate tags with ';', or put a cell that holds commas in quotes",
            )
            continue
        raw = _delimited_row(row, record, layout, problems)
        if raw is not None:
            raws.append(raw)
    written = {",": "commas", "\t": "tabs", ";": "semicolons"}[delimiter]
    return raws, [f"columns are separated by {written}.", *layout.notes]


def _records(path: Path) -> tuple[list[list[str]], str]:
    """All records under the delimiter that makes sense of the first one."""
    text = _text(path)
    best: tuple[tuple[bool, int], list[list[str]], str] | None = None
    for delimiter in ("\t", ",", ";"):
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            records = list(reader)
        except csv.Error as error:
            raise UserError(
                f"the table cannot be read ({error})", where=path, mend="save it as plain CSV"
            ) from error
        first = [tidy(cell) for cell in records[0]] if records else []
        useful = _pick(first, _IMAGE_COLUMNS) is not None or _is_headless(first)
        score = (useful and len(first) > 1, len(first))
        if best is None or score > best[0]:
            best = score, records, delimiter
    assert best is not None
    if not best[1]:
        raise UserError("the table is empty", where=path, mend="write one row for each image")
    return best[1], best[2]


def _text(path: Path) -> str:
    content = path.read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of spreadsheets
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the table is not UTF-8 text ({error.reason} at byte {error.start:,})",
            where=path,
            mend="save it as CSV with UTF-8 encoding",
        ) from error


def _layout(records: list[list[str]], path: Path, classes: Sequence[str] | None) -> _Layout:
    header = tuple(tidy(cell) for cell in records[0])
    image, labels = _pick(header, _IMAGE_COLUMNS), _pick(header, _LABEL_COLUMNS)
    split = _pick(header, _SPLIT_COLUMNS)
    if image is None and _is_headless(header):
        thirds = {tidy(record[2]) for record in records if len(record) > 2}
        third = 2 if thirds and all(map(is_split_word, thirds)) else None
        note = "no header; the first column names images, the second holds tags."
        return _Layout(header, 0, 1, third, (), 0, (note,))
    if image is None:
        raise UserError(
            f"no column names images; the columns are: {', '.join(header)}",
            where=path,
            mend="name the columns 'image' and 'labels' in the first row",
        )
    twice = sorted(
        {header[i] for i in (image, labels, split) if i is not None and header.count(header[i]) > 1}
    )
    if twice:
        raise UserError(
            f"two columns have the name {twice[0]!r}",
            where=path,
            mend="keep one of them, or give them different names",
        )
    if labels is not None:
        note = f"images are named in column '{header[image]}', tags in column '{header[labels]}'."
        return _Layout(header, image, labels, split, (), 1, (note,))
    columns, notes = _one_hot_columns(records, header, {image, split}, classes, path)
    if not columns:
        raise UserError(
            f"no column holds tags; the columns are: {', '.join(header)}",
            where=path,
            mend="name the column of tags 'labels', or give one column of 0 and 1 for each class",
        )
    return _Layout(header, image, None, split, columns, 1, notes)


def _one_hot_columns(
    records: list[list[str]],
    header: tuple[str, ...],
    taken: set[int | None],
    classes: Sequence[str] | None,
    path: Path,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    rest = [i for i, name in enumerate(header) if i not in taken and name]
    if classes is not None:
        columns = [i for i in rest if header[i] in set(classes)]
    else:
        columns = [i for i in rest if _is_one_hot(records, i)]
    named = [header[i] for i in columns]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise UserError(
            f"two columns have the name {twice!r}",
            where=path,
            mend="give each class one column",
        )
    others = [header[i] for i in rest if i not in columns]
    notes = [f"{count(len(columns), 'column')} of 0 and 1, one for each class."]
    if others:
        notes.append(f"columns left aside: {', '.join(others)}.")
    return tuple(columns), tuple(notes)


def _is_one_hot(records: list[list[str]], column: int) -> bool:
    cells = {r[column].strip().lower() for r in records[1:] if column < len(r)}
    return bool(cells - {""}) and cells - {""} <= set(_BITS)


def _delimited_row(row: int, record: list[str], layout: _Layout, problems: Problems) -> _Raw | None:
    split = record[layout.split] if layout.split is not None else None
    name = record[layout.image]
    if layout.labels is not None:
        return _Raw(row, name, record[layout.labels], split)
    tags = []
    for column in layout.one_hot:
        bit = _BITS.get(record[column].strip().lower())
        if bit is None:
            problems.add(
                row,
                f"column '{layout.header[column]}' holds {record[column]!r:.40}",
                "write 0 or 1 in the column of each class",
            )
            return None
        if bit:
            tags.append(layout.header[column])
    return _Raw(row, name, tuple(tags), split)


def _pick(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Index of the name that comes first in ``wanted``, whatever its case and separators."""
    plain = [re.sub(r"[\W_]", "", name).casefold() for name in names]
    return next((plain.index(name) for name in wanted if name in plain), None)


def _is_headless(record: Sequence[str]) -> bool:
    return len(record) > 1 and Path(record[0]).suffix.lower() in IMAGE_SUFFIXES


# --- cells ----------------------------------------------------------------------------------


def _cut_cells(
    raws: list[_Raw], classes: Sequence[str] | None, separator: str | None, path: Path
) -> list[str]:
    """Cuts all text cells into tags, in place, with one separator for the whole table."""
    cells = {tidy(raw.cell) for raw in raws if isinstance(raw.cell, str)} - {""}
    if not cells:
        return []
    whole = {tidy(name) for name in classes or ()}
    cut, note, sure = _cutter(cells, whole, separator)
    notes = [note]
    words = _alone(cells, whole)
    tags: set[str] = set()
    doubtful = []
    for raw in raws:
        if not isinstance(raw.cell, str):
            continue
        cell = tidy(raw.cell)
        raw.cell = (cell,) if cell in whole else cut(cell)
        tags.update(raw.cell)
        tokens = cell.split()
        if raw.cell == (cell,) and len(tokens) > 1:
            doubtful += [cell] * any(token in words for token in tokens)
    if separator is None and not whole:
        _refuse_uncut(tags, path)
        if doubtful and not sure:
            notes.append(
                f"{doubtful[0]!r} and {len(set(doubtful)) - 1} other cells were kept as one tag, "
                "although a part of them is a tag elsewhere; list the classes to have them cut."
            )
    return notes


Cut = Callable[[str], tuple[str, ...]]


def _cutter(cells: set[str], whole: set[str], separator: str | None) -> tuple[Cut, str, bool]:
    """What cuts a cell into tags, what to say about it, and whether a mark was seen or given."""

    def uncut(cell: str) -> tuple[str, ...]:
        return (cell,) if cell else ()

    if separator == "none":
        return uncut, "each cell is one tag (separator: none).", True
    if separator is not None:
        shown = "blanks" if separator in _BLANKS else f"{separator.strip()!r}"
        return _at(separator), f"tags are separated by {shown} (separator).", True
    text = "\n".join(cells - whole)
    marks = [mark for mark in ";|" if mark in text] or ["," for _ in "," if "," in text]
    if marks:
        shown = " or ".join(f"'{mark}'" for mark in marks)
        return _pattern(f"[{''.join(marks)}]"), f"tags are separated by {shown}.", True
    words = _alone(cells, whole)
    for mark in _MARKS if whole else " ":
        parts = [_at(mark)(cell) for cell in cells - whole]
        if any(len(p) > 1 and all(tag in words for tag in p) for p in parts):
            shown = "blanks" if mark == " " else f"'{mark}'"
            return _between(words, mark), f"tags are separated by {shown}.", False
    return uncut, "each image has one tag at most.", False


def _between(words: set[str], mark: str) -> Cut:
    """Cuts at a mark, where all that is left are known words."""
    at = _at(mark)

    def cut(cell: str) -> tuple[str, ...]:
        found = at(cell)
        return found if all(tag in words for tag in found) else (cell,)

    return cut


def _alone(cells: set[str], whole: set[str]) -> set[str]:
    """What blanks may be between: known classes, or else words that are the whole content of a cell."""
    return whole or {cell for cell in cells if len(cell.split()) == 1}


def _at(separator: str) -> Cut:
    """Cuts at a separator: blanks of any number and kind, or these characters as they stand."""
    if separator in _BLANKS:
        return lambda cell: tuple(cell.split())
    return _pattern(re.escape(separator.strip()))


def _pattern(pattern: str) -> Cut:
    return lambda cell: tuple(tag for tag in map(tidy, re.split(pattern, cell)) if tag)


def _refuse_uncut(tags: set[str], path: Path) -> None:
    """Raises a UserError where tags that look like several would be far fewer if they were cut."""
    cut = {mark: {part for tag in tags for part in _at(mark)(tag)} for mark in _MARKS}
    mark, parts = min(cut.items(), key=lambda item: len(item[1]))
    if len(tags) < _MANY_TAGS or len(parts) > _FAR_FEWER * len(tags):
        return
    longest = max(sorted(tags), key=lambda tag: len(_at(mark)(tag)))
    shown = ", ".join(sorted(parts)[:4]) + (", ..." if len(parts) > 4 else "")
    words, value = ("blanks", "blank") if mark == " " else (repr(mark), f"'{mark}'")
    raise UserError(
        f"cells seem to hold several tags with {words} between them: taken whole they are "
        f"{len(tags)} classes (such as {longest!r:.80}), cut there {len(parts)} ({shown})",
        where=path,
        mend=f"say which: data.options.separator: {value} cuts them there (--set "
        f'"data.options.separator={value}"), data.options.separator: none takes each as one class',
    )


def _validated(
    raws: Iterable[_Raw],
    classes: Sequence[str] | None,
    untagged: Untagged | None,
    problems: Problems,
) -> tuple[list[TagRow], list[str]]:
    allowed = None if classes is None else {tidy(name) for name in classes}
    rows, empty = [], 0
    for raw in raws:
        name = tidy(raw.name)
        tags: tuple[str, ...] | None = tuple(dict.fromkeys(tag for tag in raw.cell if tag))
        if not name:
            problems.add(raw.row, "no image is named", "name the image file")
        if any(has_controls(text) for text in (name, *(tags or ()))):
            problems.add(
                raw.row,
                "a cell holds a line break or another control character",
                "close every quote that is opened, and write names of one line",
            )
            continue
        if not tags:
            empty += 1
            tags = None if untagged == "drop" else ()
            if untagged is None:
                problems.add(raw.row, "no tags", UNTAGGED_MEND)
        for tag in tags or ():
            if allowed is not None and tag not in allowed:
                mend = suggest(tag, allowed) if len(allowed) <= 30 else "use names of the classes"
                problems.add(raw.row, f"tag {tag!r} is no class", mend)
        split = split_name(raw.split) if raw.split is not None else None
        rows.append(TagRow(raw.row, name, tags, split))
    notes = []
    if empty and untagged:
        meaning = "left out" if untagged == "drop" else "counted as confirmed negatives"
        notes.append(f"{count(empty, 'image')} without tags {meaning} (untagged: {untagged}).")
    return rows, notes


# --- cls_labels.npy -------------------------------------------------------------------------

_VECTOR_MEND = "give the tags as a CSV table with the columns image and labels"


def read_label_vectors(path: str | Path) -> dict[str, np.ndarray]:
    """Image ids and label vectors of a ``cls_labels.npy`` file.

    Such a file is a 0-d object array around a pickled dict: image id -> vector of zeros and ones.
    Integer keys such as ``2007000032`` become ``"2007_000032"``, the form of VOC file names.

    Args:
        path: A ``.npy`` file around a pickled dict, or a bare pickled dict.

    Returns:
        Id -> (K,) float32.

    Raises:
        UserError: The file holds anything else. Nothing in it is ever executed.
    """
    value = read_pickle(path, mend=_VECTOR_MEND)
    if isinstance(value, np.ndarray):
        raise UserError(
            f"an array of shape {value.shape} and type {value.dtype} names no images; a dictionary "
            "from ids to label vectors is needed",
            where=path,
            mend=_VECTOR_MEND,
        )
    if not isinstance(value, dict):
        raise UserError(
            "this file holds no dictionary of label vectors", where=path, mend=_VECTOR_MEND
        )
    return _checked_vectors(value, path)


def _checked_vectors(value: dict[Any, Any], path: str | Path) -> dict[str, np.ndarray]:
    vectors: dict[str, np.ndarray] = {}
    for key, entry in value.items():
        name = _vector_name(key)
        try:
            vector = entry.array() if isinstance(entry, Array) else None
        except UserError as error:
            raise UserError(error.what, where=path, mend=_VECTOR_MEND) from None
        fits = vector is not None and vector.ndim == 1 and vector.size > 0
        if vector is None or name is None or not fits or not np.isfinite(vector).all():
            raise UserError(
                f"entry {shown(key)} is not an image id with a vector of numbers",
                where=path,
                mend=_VECTOR_MEND,
            )
        vectors[name] = vector.astype(np.float32)
    if not vectors or len({v.size for v in vectors.values()}) > 1:
        what = "its label vectors differ in length" if vectors else "it holds no image"
        raise UserError(what, where=path, mend=_VECTOR_MEND)
    return vectors


def _vector_name(key: object) -> str | None:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        digits = str(key)
        return f"{digits[:4]}_{digits[4:]}" if len(digits) == 10 else digits
    return None
