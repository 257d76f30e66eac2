"""The folder source: tables, class folders, ids, and what cannot be right."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weakseg.data.folder import folder
from weakseg.data.images import write_mask
from weakseg.data.samples import Collection
from weakseg.data.sources import NameIndex, natural_key, scan
from weakseg.data.voc import VOC_CLASSES
from weakseg.errors import UserError
from weakseg.stages.predict import images_in


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value * 25, 0, 0)).save(path)
    return path


def load(root: Path, **given: Any) -> Collection:
    keys = ("labels", "masks", "classes", "untagged")
    return folder(root=root, **{**dict.fromkeys(keys), **given})


def tags(collection: Collection) -> dict[str, tuple[str, ...] | None]:
    return {sample.id: sample.tags for sample in collection}


def said(collection: Collection, part: str) -> bool:
    return any(part in note for note in collection.notes)


# --- class folders --------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(["cat/2.jpg", "cat/deep/1.PNG", "class 10/a.b.jpg", "dog/2.jpg"]):
        put(tmp_path / name, number)
    for name in ("cat/._2.jpg", ".hidden/x.jpg", "cat/Thumbs.db", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = load(tmp_path)
    assert tags(found) == {
        "cat/2": ("cat",), "cat/deep/1": ("cat",), "class 10/a.b": ("class 10",), "dog/2": ("dog",)
    }  # fmt: skip
    assert found.classes == ("cat", "class 10", "dog") and found.splits == ("train",)
    assert found.tag_source == "class folders" and found.name == tmp_path.name
    assert found[0].image == tmp_path / "cat" / "2.jpg" and found[0].mask is None


def test_same_file_in_two_class_folders_is_one_image(tmp_path: Path) -> None:
    for name in ("zebra/1.jpg", "class 10/1.jpg", "class 9/1.jpg"):
        put(tmp_path / name, 5)
    put(tmp_path / "zebra/2.jpg", 6)
    put(tmp_path / "class 9/2.jpg", 7)
    found = load(tmp_path)
    # The first class in natural order gives the id; another content is another image.
    assert tags(found) == {
        "class 9/1": ("class 9", "class 10", "zebra"),
        "class 9/2": ("class 9",),
        "zebra/2": ("zebra",),
    }
    assert said(found, "1 image found in several class folders")


def test_split_folders_around_class_folders(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "Validation/cat/1.jpg"):
        put(tmp_path / name)
    found = load(tmp_path)
    assert [(s.id, s.split, s.tags) for s in found] == [
        ("Validation/cat/1", "val", ("cat",)),
        ("train/cat/1", "train", ("cat", "dog")),
    ]
    assert said(found, "taken as splits")


def test_a_class_named_train_is_no_split(tmp_path: Path) -> None:
    put(tmp_path / "train/1.jpg"), put(tmp_path / "test/2.jpg")
    assert load(tmp_path).classes == ("test", "train")


def test_images_outside_of_class_folders_are_untagged(tmp_path: Path) -> None:
    put(tmp_path / "cat/1.jpg"), put(tmp_path / "2.jpg")
    assert tags(load(tmp_path)) == {"2": None, "cat/1": ("cat",)}
    assert tags(load(tmp_path, untagged="negative")) == {"2": (), "cat/1": ("cat",)}
    assert tags(load(tmp_path, untagged="drop")) == {"cat/1": ("cat",)}
    assert said(load(tmp_path, untagged="drop"), "1 untagged image left out")


def test_class_list_orders_and_guards(tmp_path: Path) -> None:
    put(tmp_path / "cat/1.jpg"), put(tmp_path / "dog/2.jpg")
    (tmp_path / "classes.txt").write_text("background\ndog\n\ncat\nfox\n")
    found = load(tmp_path, classes="classes.txt")
    assert found.classes == ("dog", "cat", "fox") and said(found, "background")
    with pytest.raises(UserError, match="1 tag not in the class list: dog"):
        load(tmp_path, classes=["cat", "doge"])
    with pytest.raises(UserError, match="twice: cat"):
        load(tmp_path, classes=["cat", "dog", "cat"])
    with pytest.raises(UserError, match="no-such.txt"):
        load(tmp_path, classes=Path("no-such.txt"))


def test_background_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "cat/1.jpg"), put(tmp_path / "Background/2.jpg")
    with pytest.raises(UserError, match="untagged negative"):
        load(tmp_path)


# --- tables ---------------------------------------------------------------------------------


def table(root: Path, *rows: str, header: str = "image,labels") -> Path:
    path = root.parent / f"{root.name}-tags.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.jpg", "sub/b.png", "sub/c.jpg", "other/c.jpg", "d.v2.jpg", "E.JPG"):
        put(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.jpg", "a"), ("a", "a"), ("./a.jpg", "a"), ("images/a.jpg", "a"), ("A.jpg", "a"),
        ("b.png", "sub/b"), ("b", "sub/b"), ("sub/b", "sub/b"), ("sub\\b.png", "sub/b"),
        ("x/images/sub/c.jpg", "sub/c"), ("d.v2", "d.v2"), ("d.v2.jpg", "d.v2"), ("e.jpg", "E"),
    ],
)  # fmt: skip
def test_rows_may_name_files_in_many_ways(root: Path, name: str, wanted: str) -> None:
    found = load(root, labels=table(root, f"{name},cat"))
    assert tags(found) == {wanted: ("cat",)}
    assert found[0].image.is_file() and found.tag_source == "table images-tags.csv"
    assert said(found, "5 images not listed")


def test_rows_may_name_absolute_paths(root: Path) -> None:
    found = load(root, labels=table(root, f"{root / 'sub' / 'b.png'},cat"))
    assert tags(found) == {"sub/b": ("cat",)}


def test_names_compare_across_unicode_forms(root: Path) -> None:
    put(root / (unicodedata.normalize("NFD", "café") + ".jpg"))
    rows = table(root, unicodedata.normalize("NFC", "café.jpg") + ",cat")
    assert load(root, labels=rows)[0].image.is_file()


def test_contradictory_rows_are_reported_together(root: Path) -> None:
    rows = table(root, "c.jpg,cat", "../x.jpg,cat", "/else/x.jpg,cat", "a,cat,", "a.jpg,dog,val",
                 header="image,labels,split").read_text().replace("cat\n", "cat,\n")  # fmt: skip
    labels = root.parent / "t.csv"
    labels.write_text(rows)
    with pytest.raises(UserError) as caught:
        load(root, labels=labels)
    text = str(caught.value)
    assert "row 2: 'c.jpg' may be other/c.jpg or sub/c.jpg" in text
    assert "row 3: '../x.jpg' leads out" in text and "row 4: '/else/x.jpg' leads out" in text
    assert "row 6: 'a.jpg' is in the splits 'train' and 'val'" in text


def test_missing_files_stay_for_check(root: Path) -> None:
    found = load(root, labels=table(root, "a.jpg,cat", "gone.jpg,dog", "cat/c.jpg,dog"))
    assert tags(found) == {"a": ("cat",), "cat/c": ("dog",), "gone": ("dog",)}
    assert [s.image.exists() for s in found] == [True, False, False]
    with pytest.raises(UserError, match="none of the images of the table, such as 'gone'"):
        load(root, labels=table(root, "gone,cat"))


def test_two_files_of_one_id_are_both_kept(root: Path) -> None:
    put(root / "a.png")
    found = load(root, labels=table(root, "a.jpg,cat", "a.png,dog"))
    assert [s.id for s in found] == ["a", "a"]
    with pytest.raises(UserError, match=r"'a' may be a.jpg or a.png"):
        load(root, labels=table(root, "a,cat"))


def test_rows_of_one_image_are_joined(root: Path) -> None:
    found = load(root, labels=table(root, "a.jpg,dog", "b,cat", "a,cat"))
    assert tags(found) == {"a": ("cat", "dog"), "sub/b": ("cat",)}
    assert said(found, "1 image named by several rows")


def test_splits_and_negatives_of_a_table(root: Path) -> None:
    path = table(root, "a,cat,train", "b,,val", header="image,labels,split")
    found = load(root, labels=path, untagged="negative")
    assert [(s.id, s.tags, s.split) for s in found] == [
        ("a", ("cat",), "train"),
        ("sub/b", (), "val"),
    ]
    dropped = load(root, labels=path, untagged="drop")
    assert tags(dropped) == {"a": ("cat",)}
    assert said(dropped, "4 images not listed") and said(dropped, "untagged: drop")
    with pytest.raises(UserError, match="untagged: drop"):
        load(root, labels=path)


def test_a_table_in_the_root_is_used_and_said(root: Path) -> None:
    (root / "labels.csv").write_text("image,labels\na,cat\n")
    assert tags(load(root)) == {"a": ("cat",)}
    assert said(load(root), "labels.csv, which stands in the image folder")
    assert tags(load(root, labels="labels.csv")) == {"a": ("cat",)}


# --- masks ----------------------------------------------------------------------------------


def test_masks_mirror_ids_and_may_stand_inside(root: Path) -> None:
    write_mask(root / "masks" / "sub" / "b.png", np.zeros((6, 8), int))
    labels = table(root, "a,dog", "sub/b,cat")
    found = load(root, labels=labels, masks="masks")
    assert [s.mask for s in found] == [None, root / "masks" / "sub" / "b.png"]
    assert said(found, "1 image of 2 with a ground-truth mask")
    assert said(found, "assumed to be in natural order (1 = cat, 2 = dog)")
    assert not said(load(root, labels=labels, masks="masks", classes=["cat", "dog"]), "assumed")
    assert found.fingerprint() == load(root, labels=labels).fingerprint()


def test_masks_of_nothing_are_an_error(root: Path) -> None:
    (root.parent / "m").mkdir()
    with pytest.raises(UserError, match="a.png"):
        load(root, labels=table(root, "a,dog"), masks=root.parent / "m")
    with pytest.raises(UserError, match="no-such"):
        load(root, labels=table(root, "a,dog"), masks="no-such")


def test_voc_classes_sort_into_voc_order_but_subsets_shift(tmp_path: Path) -> None:
    assert tuple(sorted(VOC_CLASSES, key=natural_key)) == VOC_CLASSES
    for name in VOC_CLASSES[1:]:
        put(tmp_path / "i" / name / f"{name}.jpg")
    write_mask(tmp_path / "m" / "bird" / "bird.png", np.zeros((6, 8), int))
    assert said(load(tmp_path / "i", masks=tmp_path / "m"), "19 of the 20 PASCAL VOC classes")
    put(tmp_path / "i" / "aeroplane" / "1.jpg")
    full = load(tmp_path / "i", masks=tmp_path / "m")
    assert full.classes == VOC_CLASSES and not said(full, "PASCAL")


# --- what cannot be right -------------------------------------------------------------------


def test_errors_name_the_mend(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "flat" / "1.jpg"), put(tmp_path / "ok" / "cat" / "1.jpg")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path / "flat" / "1.jpg", {}, "not a folder"),
        (tmp_path / "empty", {}, "no images"),
        (tmp_path / "flat", {}, "neither a tag table nor class folders"),
        (tmp_path / "ok", {"labels": "none.csv"}, "none.csv"),
        (tmp_path / "ok", {"untagged": "ignore"}, "'ignore'"),
        (tmp_path / "ok", {"list": {}}, "no option 'list'"),
    ]
    for root, given, match in cases:
        with pytest.raises(UserError, match=match) as caught:
            load(root, **given)
        assert caught.value.mend


def test_scan_is_sorted_and_survives_loops_of_links(tmp_path: Path) -> None:
    put(tmp_path / "b" / "1.jpg"), put(tmp_path / "a" / "2.jpg"), put(tmp_path / "a.jpg")
    os.symlink(tmp_path, tmp_path / "b" / "loop", target_is_directory=True)
    os.symlink(tmp_path / "a", tmp_path / "z", target_is_directory=True)
    # Of the two names of one folder, the last is followed.
    assert scan(tmp_path) == ["a.jpg", "b/1.jpg", "z/2.jpg"]


def test_name_index_prefers_the_tighter_reading(tmp_path: Path) -> None:
    index = NameIndex(["001.jpg", "cat/001.jpg", "cat/002.jpg", "a.PNG", "A.png"], tmp_path)
    wanted = {"001": ["001.jpg"], "cat/001": ["cat/001.jpg"], "002": ["cat/002.jpg"],
              "dog/002": [], "A.png": ["A.png"], "a.PNG": ["a.PNG"]}  # fmt: skip
    for name, files in wanted.items():
        match = index.find(name)
        assert match is not None and list(match.files) == files, name
    assert index.find("../a") is None and index.find("C:\\x\\a.png") is None


@pytest.mark.parametrize("kind", ["class folders", "table", "masks"])
def test_each_folder_is_listed_once_and_no_file_is_asked_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On network drives each question costs milliseconds, and there are 100,000s of files."""
    root, masks, rows = tmp_path / "images", tmp_path / "masks", ["image,labels"]
    for a in ("cat", "dog"):
        for b in range(5):
            for c in range(20):
                name = f"{a}/{b}/{a}-{b}-{c}"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / f"{name}.jpg").touch()
                rows.append(f"{name}.jpg,{a}")
                if kind == "masks":
                    (masks / name).parent.mkdir(parents=True, exist_ok=True)
                    (masks / f"{name}.png").touch()
    table = tmp_path / "tags.csv"
    table.write_text("\n".join(rows))
    listed: list[str] = []
    asked: list[str] = []
    scandir, stat = os.scandir, os.stat

    def count_scandir(path: Any = ".") -> Any:
        listed.append(os.fspath(path))
        return scandir(path)

    def count_stat(path: Any, *more: Any, **named: Any) -> Any:
        asked.append(os.fspath(path))
        return stat(path, *more, **named)

    monkeypatch.setattr(os, "scandir", count_scandir)
    monkeypatch.setattr(os, "stat", count_stat)
    given = {"table": {"labels": table}, "masks": {"masks": masks}}.get(kind, {})
    found = load(root, **given)
    folders = 13 * (2 if kind == "masks" else 1)  # the root, 2 classes, 5 parts in each
    assert len(found) == 200 and len(listed) == len(set(listed)) == folders
    assert not [path for path in asked if path.endswith((".jpg", ".png"))]
    if kind == "masks":
        assert all(s.mask is not None for s in found)
    asked.clear()
    found.fingerprint()
    assert len(asked) == len(found), "its size and time, in one question"


def test_name_index_in_a_large_flat_folder_of_equal_names(tmp_path: Path) -> None:
    files = [f"{i}/rgb.png" for i in range(3)] + ["x/a.jpg.png", "Y/b.JPG", "top.png"]
    index = NameIndex(files, tmp_path)
    found = {
        "0/rgb.png": ("0/rgb.png",),
        "1/rgb": ("1/rgb.png",),
        "rgb": tuple(files[:3]),
        "rgb.png": tuple(files[:3]),
        "rgb.jpg": (),
        "a.jpg": ("x/a.jpg.png",),
        "x/a.jpg": ("x/a.jpg.png",),
        "a": (),
        "b.jpg": ("Y/b.JPG",),
        "y/B": ("Y/b.JPG",),
        "9/rgb": (),
        "TOP": ("top.png",),
        f"{tmp_path.name}/2/rgb": ("2/rgb.png",),
    }
    assert {name: index.find(name).files for name in found} == found
    assert index.find("../top.png") is None


# --- what weakseg wrote ---------------------------------------------------------------------


def outputs(root: Path) -> None:
    """A run, imported masks and predictions, each with pictures in it."""
    from weakseg.outputs import Outputs

    for stage in ("5-masks", "7-predict"):
        put(root / "weakseg-run" / stage / "masks/cat/1.png")
        record = '{"stage": "masks", "fingerprint": "f"}'
        (root / "weakseg-run" / stage / "stage.json").write_text(record)
    put(root / "weakseg-run/corrected/cat/1.png")
    put(root / "weakseg-run/5-masks.unknown-1/masks/cat/1.png")
    put(root / "cat/masks-of-it/masks/a.png")
    (root / "cat/masks-of-it/stage.json").write_text(record)
    Outputs(root / "predicted").begin("predict", whole=True)
    put(root / "predicted/cat/1.png")


def test_runs_and_other_outputs_are_no_images(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"{'cat' if i % 2 else 'dog'}/{i}.png", i)
    before = load(tmp_path)
    outputs(tmp_path)
    found = load(tmp_path)
    assert tags(found) == tags(before) and found.classes == ("cat", "dog")
    assert found.fingerprint() == before.fingerprint()
    assert said(found, "3 folders that weakseg wrote left out: cat/masks-of-it, predicted, weak")
    assert scan(tmp_path / "predicted") == ["cat/1.png"], "where they are asked for by name"
    assert scan(tmp_path / "weakseg-run/5-masks") == ["masks/cat/1.png"]
    os.symlink(tmp_path / "weakseg-run", tmp_path / "cat" / "link", target_is_directory=True)
    assert tags(load(tmp_path)) == tags(before)


def test_predictions_among_images_are_left_out_until_they_are_replaced(tmp_path: Path) -> None:
    from weakseg.files import atomic_path
    from weakseg.outputs import Outputs

    put(tmp_path / "cat/1.jpg"), put(tmp_path / "dog/2.jpg", 1)
    written = Outputs(tmp_path)
    written.begin("predict")
    for name in ("cat/1.png", "dog/2.png"):
        with atomic_path(tmp_path / name, note=written.note) as temporary:
            Image.new("L", (8, 6)).save(temporary)
    assert scan(tmp_path) == ["cat/1.jpg", "dog/2.jpg"]
    put(tmp_path / "dog/2.png", 7)
    assert scan(tmp_path) == ["cat/1.jpg", "dog/2.jpg", "dog/2.png"]


def test_content_and_not_time_makes_other_images(tmp_path: Path) -> None:
    put(tmp_path / "a/cat/1.png"), put(tmp_path / "a/dog/2.png", 1)
    first = load(tmp_path / "a").fingerprint()
    os.utime(tmp_path / "a/cat/1.png", (7, 7))
    assert load(tmp_path / "a").fingerprint() == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(tmp_path / "b").fingerprint() == first, "nor the place"
    stamp = (tmp_path / "b/cat/1.png").stat()
    put(tmp_path / "b/cat/1.png", 2)
    os.utime(tmp_path / "b/cat/1.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load(tmp_path / "b").fingerprint() != first


@pytest.mark.parametrize("suffix", [".dcm", ".heic", ".npy", ".gif", ".xyz", ""])
def test_files_of_unknown_suffixes_are_named(tmp_path: Path, suffix: str) -> None:
    for i in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}{suffix}").write_bytes(b"x")
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / ".hidden.raw").write_text("x")
    for look in (lambda: folder(root=tmp_path), lambda: images_in(tmp_path)):
        with pytest.raises(UserError) as caught:
            look()
        assert caught.value.where == str(tmp_path)
        assert f"3 x {suffix or 'no suffix'}" in caught.value.what
        assert "1 x .txt" in caught.value.what and "hidden" not in caught.value.what
        assert all(known in caught.value.mend for known in (".jpg", ".png", ".tif"))


def test_an_empty_folder_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        folder(root=tmp_path)
    assert " x " not in caught.value.what


def test_pictures_that_are_not_read_are_said(tmp_path: Path) -> None:
    for name in (
        "cat/1.png",
        "cat/2.HEIC",
        "dog/3.heic",
        "dog/4.png",
        "dog/5.dcm",
        "dog/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    said = " ".join(folder(root=tmp_path).notes)
    assert "2 x .heic" in said and "1 x .dcm" in said and ".txt" not in said
