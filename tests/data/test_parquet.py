"""Parquet tables: the columns of CSV in all their types, and damaged files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from weakseg.data.folder import folder
from weakseg.data.table import read_table
from weakseg.errors import UserError

IMAGES = ["a.jpg", "b.jpg", "c.jpg"]
WANTED = {"a.jpg": ("cat", "dog"), "b.jpg": ("cat",), "c.jpg": ("dog",)}
LISTS = [["cat", "dog"], ["cat"], ["dog"]]
TEXT = ["cat;dog", "cat", "dog"]


def write(folder: Path, columns: dict[str, Any], **more: Any) -> Path:
    path = folder / "labels.parquet"
    pq.write_table(pa.table(columns), path, **more)
    return path


def tags(path: Path, **more: Any) -> dict[str, Any]:
    return {row.name: row.tags for row in read_table(path, **more).rows}


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(TEXT),
        pa.array(["cat | dog", " cat", "dog|"], pa.large_string()),
        pa.array(TEXT).dictionary_encode(),
        pa.array(LISTS),
        pa.array(LISTS, pa.large_list(pa.large_string())),
        pa.array(LISTS, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        pa.array([["cat", "dog"], [None, "cat"], ["dog", ""]]),
        pa.array([["cat", "dog"], ["cat", None], ["dog", None]], pa.list_(pa.string(), 2)),
    ],
    ids=lambda a: str(a.type),
)
def test_tags_as_text_or_lists(tmp_path: Path, labels: pa.Array) -> None:
    path = write(tmp_path, {"width": [1, 2, 3], "File Name": IMAGES, "Tags": labels})
    table = read_table(path)
    assert tags(path) == WANTED
    assert "'File Name', tags in column 'Tags'" in table.notes[0]
    assert [row.row for row in table.rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("cat", "dog"),
    [
        ([1, 1, 0], [1, 0, 1]),
        ([True, True, False], [True, False, True]),
        (np.array([1, 1, 0], np.float32), np.array([1, 0, 1], np.uint8)),
    ],
)
def test_one_column_for_each_class(tmp_path: Path, cat: Any, dog: Any) -> None:
    columns = {"image": IMAGES, "cat": cat, "width": [64, 65, 66], "dog": dog}
    assert tags(write(tmp_path, columns)) == WANTED
    assert tags(write(tmp_path, columns), classes=["dog", "cat"]) == {
        name: tuple(found) for name, found in WANTED.items()
    }


def test_bits_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": IMAGES, "cat": [1, None, 1], "dog": [0, 1, 2]})
    with pytest.raises(UserError, match=r"row 2: column 'cat' holds None") as caught:
        read_table(path, classes=["cat", "dog"])
    assert "row 3: column 'dog' holds 2" in str(caught.value)
    with pytest.raises(UserError, match="row 2"):
        read_table(path)


def test_split_and_untagged(tmp_path: Path) -> None:
    split = pa.array(["Training", "valid", None]).dictionary_encode()
    path = write(tmp_path, {"image": IMAGES, "labels": [["x"], [], None], "split": split})
    table = read_table(path, untagged="negative")
    assert [row.split for row in table.rows] == ["train", "val", None]
    assert [row.tags for row in table.rows] == [("x",), (), ()]
    with pytest.raises(UserError, match="rows 2, 3: no tags"):
        read_table(path)


def test_embedded_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = pa.array([{"bytes": b"x", "path": None}] * 3)
    path = write(tmp_path, {"image": embedded, "file_name": IMAGES, "labels": LISTS})
    read: list[str] = []
    own = pq.ParquetFile.read

    def spy(self: Any, columns: list[str], **more: Any) -> Any:
        read.extend(columns)
        return own(self, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    assert tags(path) == WANTED and sorted(read) == ["file_name", "labels"]


def test_through_the_folder_source(tmp_path: Path) -> None:
    for name in IMAGES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    write(tmp_path, {"image": IMAGES, "labels": LISTS})
    found = folder(root=tmp_path)
    assert [s.tags for s in found] == [*WANTED.values()] and "labels.parquet" in found.tag_source


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"image": [1, 2, 3], "labels": LISTS}, r"names images; the columns are: image \(int64\)"),
        ({"image": IMAGES, "label": [0, 1, 2]}, "'label' of tags is of type int64"),
        ({"image": IMAGES, "labels": [[[1]]] * 3}, "of type list"),
        ({"image": IMAGES, "width": [5, 6, 7]}, "no column holds tags"),
        ({"image": pa.array([], pa.string()), "labels": pa.array([], pa.string())}, "no rows"),
        ({"image": ["a", None, "c"], "labels": LISTS}, "row 2: no image is named"),
        ({}, "names images"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, columns: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_table(write(tmp_path, columns))
    assert caught.value.mend and "labels.parquet" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"image,labels\na,b\n", b"PAR1" * 30])
def test_files_that_are_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match="Parquet file cannot be read") as caught:
        read_table(tmp_path / "a.parquet")
    assert caught.value.mend


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_a_user_error(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path, {"image": IMAGES, "labels": LISTS}, compression="none")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:  # the columns' own pages: text that is no text, lengths that are none
        place = data.draw(st.integers(4, len(content) // 3))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        table = read_table(path, untagged="negative")
    except UserError:
        return
    assert all(isinstance(row.name, str) for row in table.rows)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"image": IMAGES, "labels": LISTS})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="not installed") as caught:
        read_table(path)
    assert "weakseg[parquet]" in (caught.value.mend or "")
