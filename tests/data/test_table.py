"""Tag tables: known answers, round trips of any tags, problems, and hostile pickles."""

import csv
import io
import json
import os
import pickle
import unicodedata
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weakseg.data.table import TagTable, read_label_vectors, read_table
from weakseg.errors import UserError


def write(folder: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def tags(table: TagTable) -> dict[str, tuple[str, ...] | None]:
    return {row.name: row.tags for row in table.rows}


WANTED = {"a.jpg": ("cat", "dog"), "b.jpg": ("cat",), "c.jpg": ("dog",)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolon.csv", "image,labels\na.jpg,cat;dog\nb.jpg,cat\nc.jpg,dog\n"),
        ("bar.csv", "image,labels\na.jpg,cat | dog\nb.jpg,cat|\nc.jpg, dog \n"),
        ("comma.csv", 'image,labels\na.jpg,"cat, dog"\nb.jpg,cat\nc.jpg,dog\n'),
        ("blank.csv", "image,labels\na.jpg,cat dog\nb.jpg,cat\nc.jpg,dog\n"),
        ("windows.csv", "\ufeffFile Name,Tags\r\na.jpg,cat;dog\r\n\r\nb.jpg,cat\r\nc.jpg,dog\r\n"),
        ("european.csv", "filename;classes\na.jpg;cat|dog\nb.jpg;cat\nc.jpg;dog\n"),
        ("tabs.tsv", "id\tlabel\na.jpg\tcat,dog\nb.jpg\tcat\nc.jpg\tdog\n"),
        ("headless.csv", "a.jpg,cat;dog\nb.jpg,cat\nc.jpg,dog\n"),
        ("bits.csv", ",image,cat,dog\n0,a.jpg,1,1\n1,b.jpg,1,0\n2,c.jpg,0,1.0\n"),
        ("mixed.csv", "cat,image,dog,width\n1,a.jpg,1,64\n1,b.jpg,0,64\n0,c.jpg,true,65\n"),
        ("list.jsonl", '{"image": "a.jpg", "labels": ["cat", "dog"]}\n'
                       '{"image": "b.jpg", "labels": ["cat"]}\n\n{"image":"c.jpg","tags":["dog"]}'),
        ("text.jsonl", '{"file": "a.jpg", "labels": "cat dog"}\n'
                       '{"file": "b.jpg", "labels": "cat"}\n{"file": "c.jpg", "labels": "dog"}\n'),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, text: str) -> None:
    table = read_table(write(tmp_path, text, name))
    assert tags(table) == WANTED
    assert table.notes and all(note.startswith(name) and note.endswith(".") for note in table.notes)


def test_utf16_of_spreadsheets(tmp_path: Path) -> None:
    text = "image\tlabels\na.jpg\tCafé\n".encode("utf-16")
    assert tags(read_table(write(tmp_path, text, "a.txt"))) == {"a.jpg": ("Café",)}


def test_blanks_cut_only_between_known_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels\na,traffic light\nb,cat dog\nc,cat\nd,dog\n")
    assert tags(read_table(path))["a"] == ("traffic light",)
    assert tags(read_table(path))["b"] == ("cat", "dog")
    named = read_table(path, classes=["cat", "dog", "traffic light"])
    assert tags(named)["a"] == ("traffic light",) and tags(named)["b"] == ("cat", "dog")


def test_a_class_of_the_list_is_never_cut(tmp_path: Path) -> None:
    path = write(tmp_path, 'image,labels\na,"hot dog"\nb,hot\nc,dog\nd,hot dog dog\n')
    assert tags(read_table(path))["a"] == ("hot", "dog")
    with pytest.raises(UserError, match="hot dog dog|'hot'"):
        read_table(path, classes=["hot dog", "dog"])


def test_half_known_cells_are_pointed_out(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels\na,zebra lion\nb,zebra\n")
    table = read_table(path)
    assert tags(table)["a"] == ("zebra lion",)
    assert any("kept as one tag" in note for note in table.notes)


SCENES = ("grass", "tree", "sky", "car", "road", "house", "cow", "boat", "water", "bird")


def crowded(mark: str, alone: int = 3) -> dict[str, tuple[str, ...]]:
    """Rows of several tags, of which only some are ever the only one of an image."""
    rng = np.random.default_rng(0)
    rows = {f"{i}.jpg": (SCENES[i],) for i in range(alone)}
    for i in range(alone, 60):
        own = rng.choice(len(SCENES), rng.integers(2, 5), replace=False)
        rows[f"{i}.jpg"] = tuple(SCENES[k] for k in own)
    return rows


def table_of(tmp_path: Path, rows: dict[str, tuple[str, ...]], mark: str, kind: str) -> Path:
    if kind == "jsonl":
        lines = [json.dumps({"image": n, "labels": mark.join(t)}) for n, t in rows.items()]
        return write(tmp_path, "\n".join(lines), "a.jsonl")
    return write(
        tmp_path, as_csv([["image", "labels"], *([n, mark.join(t)] for n, t in rows.items())], ",")
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("alone", [0, 3, 9])
@pytest.mark.parametrize("mark", [" ", "  ", "/", " / ", "+", " & ", ":", "_", "-", "\\", ".", "#"])
def test_cells_that_would_be_many_classes_are_refused(
    tmp_path: Path, mark: str, alone: int, kind: str
) -> None:
    rows = crowded(mark, alone)
    path = table_of(tmp_path, rows, mark, kind)
    with pytest.raises(UserError) as caught:
        read_table(path)
    whole = len({mark.join(t) for t in rows.values()})
    assert caught.value.where == str(path)
    assert str(len(SCENES)) in caught.value.what
    assert any(str(n) in caught.value.what for n in range(len(SCENES), whole + 1))
    # Both settings that the error names do what it says.
    name = mark.strip() or "blank"
    assert f"separator: {name if name == 'blank' else repr(mark.strip())}" in (
        caught.value.mend.replace("'\\'", repr("\\"))
    )
    assert tags(read_table(path, separator=name)) == rows
    kept = tags(read_table(path, separator="none"))
    assert kept == {n: (mark.join(t),) for n, t in rows.items()}
    # With the list of classes there is no doubt.
    assert tags(read_table(path, classes=SCENES)) == rows


def test_names_of_several_words_are_kept(tmp_path: Path) -> None:
    """They are no fewer classes when they are cut."""
    names = [f"{a} {b}" for a, b in zip(SCENES, reversed(SCENES), strict=True)]
    names += [f"{name} number {i}" for i, name in enumerate(SCENES)]
    for marked in (
        names,
        [n.replace(" ", "_") for n in names],
        [n.replace(" ", "-") for n in names],
    ):
        rows = {f"{i}.jpg": (name,) for i, name in enumerate(marked)}
        assert tags(read_table(table_of(tmp_path, rows, " ", "csv"))) == rows


def test_what_is_left_between_other_marks_is_looked_at(tmp_path: Path) -> None:
    rows = {name: ("/".join(t), "x") for name, t in crowded("/").items()}
    with pytest.raises(UserError) as caught:
        read_table(table_of(tmp_path, rows, ";", "csv"))
    assert "/" in caught.value.mend


@pytest.mark.parametrize("wrong", ["", 3, ["/"]])
def test_a_separator_is_text(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(UserError) as caught:
        read_table(write(tmp_path, "image,labels\na,x\n"), separator=wrong)  # type: ignore[arg-type]
    assert caught.value.where == "data.options.separator"


def test_one_separator_for_the_whole_table(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'image,labels\na,"salt, fine;bread"\nb,"salt, fine"\n'))
    assert tags(table) == {"a": ("salt, fine", "bread"), "b": ("salt, fine",)}


def test_split_column(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels,Split\na,x,Training\nb,x,valid\nc,x,fold 3\nd,x,\n")
    assert [row.split for row in read_table(path).rows] == ["train", "val", "fold 3", "train"]
    headless = write(tmp_path, "a.jpg,x,train\nb.jpg,y,val\n", "b.csv")
    assert [row.split for row in read_table(headless).rows] == ["train", "val"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "image,labels\na,cat\nb,\nc, ; \n"),
        ("a.csv", "image,cat,dog\na,1,0\nb,0,0\nc,0,0\n"),
        ("a.jsonl", '{"image":"a","labels":["cat"]}\n{"image":"b","labels":[]}\n'
                    '{"image":"c","labels":null}'),
    ],
)  # fmt: skip
def test_empty_cell_names_two_mends(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(UserError) as caught:
        read_table(path)
    rows = (2, 3) if name.endswith("jsonl") else (3, 4)
    assert f"rows {rows[0]}, {rows[1]}: no tags" in caught.value.what
    for mend in ("untagged: drop", "--untagged drop", "untagged: negative", "--untagged negative"):
        assert mend in (caught.value.mend or "")
    assert tags(read_table(path, untagged="drop")) == {"a": ("cat",), "b": None, "c": None}
    negative = read_table(path, untagged="negative")
    assert tags(negative) == {"a": ("cat",), "b": (), "c": ()}
    assert any("2 images without tags" in note for note in negative.notes)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "image,labels\na,cat\nb,dogg\nc,cat,dog\n,cat\nd,\n" + "e,dogg\n" * 20 + "f,cat\n",
    )
    with pytest.raises(UserError) as caught:
        read_table(path, classes=["cat", "dog"])
    text = str(caught.value)
    assert "24 rows" in text and str(path) in text
    assert "rows 3, 7, 8, 9, 10 and 16 more: tag 'dogg' is no class" in text
    assert "did you mean 'dog'?" in text
    assert "row 4: 3 cells where the header has 2" in text
    assert "row 5: no image is named" in text
    assert "row 6: no tags" in text


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "", "empty"),
        ("a.csv", "image,labels\n", "no rows"),
        ("a.csv", "picture,what\na,b\n", "no column names images"),
        ("a.csv", "image,width\na,640\n", "no column holds tags"),
        ("a.csv", b"image,labels\na,caf\xe9\n", "not UTF-8"),
        ("a.csv", "image,cat,dog\na,1,maybe\n", "no column holds tags|dog"),
        ("a.jsonl", "not json\n[1]\n", "rows 1, 2"),
        ("a.jsonl", '{"image": 3, "labels": ["x"]}', "not text"),
        ("a.jsonl", '{"image": "a", "labels": [3]}', "neither text"),
        ("a.jsonl", '{"image": "a"}', "missing"),
        ("a.npy", b"", "no readable pickle"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, text: str, match: str) -> None:
    path = write(tmp_path, text, name)
    classes = ["cat", "dog"] if "maybe" in str(text) else None
    with pytest.raises(UserError, match=match) as caught:
        read_table(path, classes=classes)
    assert str(path) in str(caught.value) and caught.value.mend


def test_missing_table_and_bad_choice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such table"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="ignore"):
        read_table(write(tmp_path, "image,labels\na,b\n"), untagged="ignore")  # type: ignore


# --- round trips ----------------------------------------------------------------------------

# NUL and lone surrogates cannot be stored as text; ; | , cut tags.
TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=";|,\ufeff"), min_size=1
).map(lambda t: unicodedata.normalize("NFC", t).strip())
TAG = TEXT.filter(bool)
WORD = TAG.filter(lambda t: len(t.split()) == 1)
NAME = TAG.map(lambda t: t + ".jpg")


def rows_of(tag: st.SearchStrategy[str]) -> st.SearchStrategy:
    lists = st.lists(tag, min_size=1, max_size=4, unique=True)
    return st.dictionaries(NAME, lists, min_size=1, max_size=5)


def as_csv(rows: list[list[str]], delimiter: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(rows=rows_of(TAG), mark=st.sampled_from(";|,"), delimiter=st.sampled_from(",\t;"))
def test_any_tags_survive_a_delimited_table(
    tmp_path: Path, rows: dict[str, list[str]], mark: str, delimiter: str
) -> None:
    body = [["image", "labels"], *([name, mark.join(t)] for name, t in rows.items())]
    path = write(tmp_path, as_csv(body, delimiter))
    given_list = sorted({tag for t in rows.values() for tag in t})
    assert {k: list(v or ()) for k, v in tags(read_table(path, classes=given_list)).items()} == rows
    if any(len(t) > 1 for t in rows.values()):  # the mark is seen, so no list is needed
        assert {k: list(v or ()) for k, v in tags(read_table(path)).items()} == rows


@FUZZ
@given(rows=rows_of(WORD))
def test_any_words_survive_blanks(tmp_path: Path, rows: dict[str, list[str]]) -> None:
    body = [["image", "labels"], *([name, " ".join(t)] for name, t in rows.items())]
    path = write(tmp_path, as_csv(body, ","))
    known = sorted({tag for t in rows.values() for tag in t})
    read = read_table(path, classes=known)
    assert {k: list(v or ()) for k, v in tags(read).items()} == rows


@FUZZ
@given(rows=rows_of(st.text(st.characters(exclude_categories=["Cs", "Cc"])).map(
    lambda t: unicodedata.normalize("NFC", t).strip()).filter(bool)))  # fmt: skip
def test_any_tags_survive_json_lines(tmp_path: Path, rows: dict[str, list[str]]) -> None:
    lines = [json.dumps({"image": n, "labels": t}, ensure_ascii=False) for n, t in rows.items()]
    path = write(tmp_path, "\n".join(lines), "a.jsonl")
    assert {k: list(v or ()) for k, v in tags(read_table(path)).items()} == rows


@FUZZ
@given(rows=rows_of(TAG))
def test_any_tags_survive_columns_of_bits(tmp_path: Path, rows: dict[str, list[str]]) -> None:
    taken = {"image", "labels", "split"}
    columns = sorted({f"k{tag}" for t in rows.values() for tag in t} - taken)
    bits = [[name, *(str(int(c[1:] in t)) for c in columns)] for name, t in rows.items()]
    path = write(tmp_path, as_csv([["image", *columns], *bits], ","))
    read = tags(read_table(path))
    assert {k: set(v or ()) for k, v in read.items()} == {
        k: {f"k{tag}" for tag in t} for k, t in rows.items()
    }


# --- label vectors --------------------------------------------------------------------------

CLASSES = ["cat", "dog", "fox"]


def vectors(keys: list) -> dict:
    rows = np.array([[1, 0, 1], [0, 1, 0]], dtype=np.float32)
    return dict(zip(keys, rows, strict=True))


@pytest.mark.parametrize(
    "keys",
    [["2007_000032", "2007_000033"], [np.int32(2007000032), np.int32(2007000033)],
     [2007000032, 2007000033], [np.int64(2007000032), np.int64(2007000033)]],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, bool, ">f4"])
def test_published_label_vectors(tmp_path: Path, keys: list, dtype: object) -> None:
    path = tmp_path / "cls_labels.npy"
    content = {k: v.astype(dtype) for k, v in vectors(keys).items()}
    np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
    table = read_table(path, classes=CLASSES)
    assert tags(table) == {"2007_000032": ("cat", "fox"), "2007_000033": ("dog",)}


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_label_vectors_of_any_numpy(tmp_path: Path, protocol: int, module: bytes) -> None:
    array = np.array(vectors([np.int32(2007000032), "x"]), dtype=object)
    content = pickle.dumps(array, protocol=protocol)
    if module == b"numpy.core" and protocol == 4:  # this protocol stores lengths of names
        content = content.replace(
            b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
        )
        content = content[:2] + content[11:]  # and a frame's length, which may be left out
    else:
        content = content.replace(b"numpy._core", module)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = write(tmp_path, head.getvalue() + content, "a.npy")
    read = read_label_vectors(path)
    assert {k: v.tolist() for k, v in read.items()} == {"2007_000032": [1, 0, 1], "x": [0, 1, 0]}
    assert all(v.dtype == np.float32 for v in read.values())


def test_label_vectors_need_the_right_number_of_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(["a", "b"]), allow_pickle=True)  # type: ignore[arg-type]
    for classes in (None, ["cat"]):
        with pytest.raises(UserError, match="3 entries"):
            read_table(tmp_path / "a.npy", classes=classes)


class Evil:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(marker: Path) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "system": Evil(os.system, command),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Evil(getattr, "x", "upper"),
        "partial": Evil(__import__("functools").partial, os.system, command),
        "loads": Evil(pickle.loads, pickle.dumps(Evil(os.system, command))),
        "load": Evil(np.load, str(marker)),
        "ordered": OrderedDict(a=1),
        "path": Path("x"),
    }


@pytest.mark.parametrize("kind", sorted(hostile(Path("x"))))
@pytest.mark.parametrize("place", ["bare", "array", "key", "value", "vector"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_are_refused(tmp_path: Path, kind: str, place: str, protocol: int) -> None:
    marker = tmp_path / "pwned"
    evil = hostile(marker)[kind]
    vector = np.zeros(3, np.float32)
    try:
        content = {
            "bare": evil,
            "array": np.array(evil, dtype=object),
            "key": {"a": vector, ("b",): evil},
            "value": {"a": evil, "b": vector},
            "vector": {"a": np.array([evil, 1], dtype=object)},
        }[place]
    except TypeError:
        pytest.skip("this object cannot stand there")
    path = write(tmp_path, pickle.dumps(content, protocol=protocol), "a.npy")
    with pytest.raises(UserError) as caught:
        read_label_vectors(path)
    assert not marker.exists()
    assert str(path) in str(caught.value) and caught.value.mend


def test_the_reader_cannot_be_changed_from_a_pickle(tmp_path: Path) -> None:
    # BUILD with a pair sets attributes on what stands on the stack: here on an admitted function.
    attack = b"cnumpy.core.multiarray\nscalar\n(NS'__defaults__'\n(S'x'\ntd\nI0\n\x86b."
    for content in (attack, b"cnumpy\nndarray\n(dS'x'\nS'y'\nsb.", b"cnumpy\ndtype\n}b."):
        with pytest.raises(UserError):
            read_label_vectors(write(tmp_path, content, "a.npy"))
    np.save(tmp_path / "b.npy", vectors([np.int32(1), np.int32(2)]), allow_pickle=True)  # type: ignore
    assert set(read_label_vectors(tmp_path / "b.npy")) == {"1", "2"}


@FUZZ
@given(data=st.data())
def test_damaged_label_vectors_never_raise_anything_else(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, vectors([np.int32(2007000032), np.int32(5)]), allow_pickle=True)  # type: ignore
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] or content)
    try:
        read = read_label_vectors(path)
    except UserError:
        return
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in read.values())


def test_plain_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match="shape"):
        read_label_vectors(tmp_path / "a.npy")
    nan = {"a": np.array([np.nan], np.float32)}
    np.save(tmp_path / "b.npy", nan, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'a'"):
        read_label_vectors(tmp_path / "b.npy")
