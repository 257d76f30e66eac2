"""The VOC source on a small devkit tree, and on the real subset where it is at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weakseg.data.check import check
from weakseg.data.images import write_mask
from weakseg.data.samples import Box, Collection
from weakseg.data.voc import VOC_CLASSES, listed_ids, voc
from weakseg.errors import UserError

PERSON, CAT = 15, 8
BLANK = "\ufeff \r"


def load(root: Path, **given: Any) -> Collection:
    keys = ("labels", "masks", "classes", "untagged")
    return voc(root=root, **{**dict.fromkeys(keys), **given})


def tags(collection: Collection) -> dict[str, tuple[str, ...] | None]:
    return {sample.id: sample.tags for sample in collection}


def said(collection: Collection, part: str) -> bool:
    return any(part in note for note in collection.notes)


def annotate(root: Path, key: str, *names: str) -> None:
    objects = "".join(
        f"<object><name>{name}</name><difficult>{int(i > 0)}</difficult>"
        "<part><name>head</name></part></object>"
        for i, name in enumerate(names)
    )
    path = root / "Annotations" / f"{key}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<annotation><filename>{key}.jpg</filename>{objects}</annotation>")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(1, 6):
        Image.new("RGB", (8, 6)).save(root / "JPEGImages" / f"2007_00000{i}.jpg")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000001\n2007_000002\n")
    (lists / "train_aug.txt").write_text(
        "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n"
        "/JPEGImages/2007_000004.jpg /SegmentationClassAug/2007_000004.png\n"
    )
    (lists / "val.txt").write_text("2007_000003\n")
    annotate(root, "2007_000001", "person", "cat", "cat")
    annotate(root, "2007_000002", "dog")
    annotate(root, "2007_000003", "tvmonitor")
    annotate(root, "2007_000004", "sofa")
    mask = np.zeros((6, 8), int)
    mask[0], mask[1] = PERSON, 255
    write_mask(root / "SegmentationClass" / "2007_000001.png", mask)
    write_mask(root / "SegmentationClassAug" / "2007_000001.png", np.full((6, 8), 1))
    write_mask(root / "SegmentationClassAug" / "2007_000004.png", np.full((6, 8), CAT))
    return root


def test_xml_is_the_default_and_counts_difficult_objects(devkit: Path) -> None:
    found = load(devkit)
    assert found.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert [(s.id, s.split, s.tags) for s in found] == [
        ("2007_000001", "train", ("cat", "person")),
        ("2007_000002", "train", ("dog",)),
        ("2007_000003", "val", ("tvmonitor",)),
    ]
    assert found[0].image == devkit / "JPEGImages" / "2007_000001.jpg"
    assert "XML" in found.tag_source and "difficult" in found.tag_source
    assert said(found, "2 images in no list") and load(devkit, labels="xml") == found


def test_official_masks_win_over_augmented(devkit: Path) -> None:
    found = load(devkit, lists={"train": "train_aug"})
    assert [s.mask and s.mask.parent.name for s in found] == [
        "SegmentationClass",
        "SegmentationClassAug",
    ]
    only = load(devkit, lists={"train": "train_aug"}, masks="SegmentationClassAug")
    assert {s.mask.parent.name for s in only if s.mask} == {"SegmentationClassAug"}
    with pytest.raises(UserError, match="no mask"):
        load(devkit, masks="JPEGImages")


def test_tags_from_masks_are_said_loudly(devkit: Path) -> None:
    found = load(devkit, labels="masks", lists={"train": "train_aug"})
    assert tags(found) == {"2007_000001": ("person",), "2007_000004": ("cat",)}
    assert "masks" in found.tag_source and said(found, "ATTENTION")
    assert load(devkit, labels="masks")[1].tags is None  # no mask, no tag
    with pytest.raises(UserError, match="class id 15"):
        load(devkit, labels="masks", classes=["a", "b"])


def test_tags_from_tables(devkit: Path) -> None:
    (devkit / "labels.csv").write_text(
        "image,labels,split\n2007_000001.jpg,dog cat,val\n2007_000002,dog,train\n"
        "JPEGImages/2007_000003.jpg,cat,train\n2007_000005.jpg,bus,train\n"
    )
    found = load(devkit, labels="labels.csv")
    # The lists make the splits, whatever the table says.
    assert [(s.split, s.tags) for s in found] == [
        ("train", ("cat", "dog")),
        ("train", ("dog",)),
        ("val", ("cat",)),
    ]
    assert found.tag_source == "table labels.csv" and said(found, "1 row of labels.csv")
    for file in (devkit / "Annotations").iterdir():
        file.unlink()
    (devkit / "Annotations").rmdir()
    fallback = load(devkit)
    assert tags(fallback) == tags(found) and said(fallback, "no XML annotations")
    (devkit / "labels.csv").unlink()
    with pytest.raises(UserError, match="neither Annotations nor"):
        load(devkit)


@pytest.mark.parametrize("integer", [True, False])
def test_published_label_vectors(devkit: Path, integer: bool) -> None:
    vector = np.zeros(20, np.float32)
    vector[[CAT - 1, PERSON - 1]] = 1
    names = ["2007_000001", "2007_000002", "2007_000003", "2011_009999"]
    keys = [np.int32(n.replace("_", "")) if integer else n for n in names]
    np.save(devkit / "cls_labels.npy", dict.fromkeys(keys, vector), allow_pickle=True)  # type: ignore
    found = load(devkit, labels=devkit / "cls_labels.npy")
    assert set(tags(found).values()) == {("cat", "person")}
    assert found.tag_source == "table cls_labels.npy"


@pytest.mark.parametrize(
    "line",
    ["2007_000001", "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png",
     "  2007_000001 -1", "dataset/img/2007_000001.jpg dataset/cls/2007_000001.mat",
     "JPEGImages\\2007_000001.jpg", "\ufeff2007_000001.jpg\r"],
)  # fmt: skip
def test_list_lines_of_all_repositories(tmp_path: Path, line: str) -> None:
    (tmp_path / "l.txt").write_text(
        f"{line}\n\n2007_000002\n{line.strip(BLANK)}\n", encoding="utf-8"
    )
    assert listed_ids(tmp_path / "l.txt") == ["2007_000001", "2007_000002"]


def test_lists(devkit: Path) -> None:
    own = devkit.parent / "mine.txt"
    own.write_text("2007_000005\n2007_000009\n")
    found = load(devkit, lists={"train": own, "extra": "val"})
    assert [(s.id, s.split) for s in found] == [
        ("2007_000003", "extra"), ("2007_000005", "train"), ("2007_000009", "train")
    ]  # fmt: skip
    assert [s.image.exists() for s in found] == [True, True, False]
    assert [s.tags for s in found] == [("tvmonitor",), None, None]
    assert len(load(devkit, lists={"train": own, "val": "val"}, untagged="drop")) == 1
    (devkit / "ImageSets" / "Segmentation" / "val.txt").unlink()
    assert load(devkit).splits == ("train",) and said(load(devkit), "no split 'val'")


def test_an_image_in_two_lists_is_found_by_check(devkit: Path) -> None:
    found = load(devkit, lists={"train": "train", "val": "train_aug"})
    codes = {p.code for p in check(found).errors}
    assert "duplicate-id" in codes


def test_own_classes_in_the_devkit_layout(devkit: Path) -> None:
    annotate(devkit, "2007_000002", "crack", "rust")
    with pytest.raises(UserError, match="2 unknown classes: crack, rust"):
        load(devkit)
    names = ["crack", "rust", "cat", "person", "tvmonitor"]
    assert load(devkit, classes=names)[1].tags == ("crack", "rust")


def test_annotations_without_objects_are_untagged(devkit: Path) -> None:
    annotate(devkit, "2007_000002")
    (devkit / "Annotations" / "2007_000003.xml").unlink()
    assert [s.tags for s in load(devkit)][1:] == [None, None]
    assert [s.tags for s in load(devkit, untagged="negative")][1:] == [(), ()]


def test_the_devkit_is_found_from_above(devkit: Path) -> None:
    assert tags(load(devkit.parent)) == tags(load(devkit))
    devkit.parent.joinpath("VOCdevkit").mkdir()
    devkit.rename(devkit.parent / "VOCdevkit" / "VOC2012")
    assert said(load(devkit.parent), "VOCdevkit/VOC2012")


def test_errors_name_the_mend(devkit: Path) -> None:
    (devkit / "Annotations" / "2007_000004.xml").write_text("<annotation>")
    (devkit / "empty.txt").write_text("\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"root": devkit / "none"}, "does not exist"),
        ({"root": devkit / "JPEGImages"}, "no folder JPEGImages"),
        ({"lists": {"train": "trainaug"}}, "no list 'trainaug'"),
        ({"lists": "train"}, "not a mapping"),
        ({"lists": {"train": "empty.txt"}}, "the list is empty"),
        ({"lists": {"train": "train_aug"}}, "1 XML file cannot be read, such as 2007_000004.xml"),
        ({"list": {"train": "train"}}, "no option 'list'"),
        ({"labels": "none.csv"}, "none.csv does not exist"),
        ({"untagged": "keep"}, "'keep'"),
    ]
    for given, match in cases:
        with pytest.raises(UserError, match=match) as caught:
            load(**{"root": devkit, **given})
        assert caught.value.mend, match


# --- boxes and hostile files ----------------------------------------------------------------


def write_xml(root: Path, key: str, *objects: str, head: str = "") -> None:
    text = "".join(f"<object>{thing}</object>" for thing in objects)
    (root / "Annotations" / f"{key}.xml").write_text(f"{head}<annotation>{text}</annotation>")


def box(*sides: object) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{n}>{s}</{n}>" for n, s in zip(names, sides, strict=True))
    return f"<bndbox>{inner}</bndbox>"


def test_boxes_count_from_1_and_hold_their_last_pixel(devkit: Path) -> None:
    part = f"<part><name>head</name>{box(2, 2, 3, 3)}</part>"
    person = f"<name>person</name>{box(1, 1, 8, 6)}{part}"
    cat = f"<name>cat</name><difficult>1</difficult>{box(2.5, 3, 2.5, 4)}"
    write_xml(devkit, "2007_000001", person, cat)
    found = load(devkit)
    boxes = {s.id: s.boxes for s in found}
    assert boxes["2007_000001"] == (Box("person", 0, 0, 8, 6), Box("cat", 1.5, 2, 2.5, 4))
    assert boxes["2007_000002"] is None, "an object without a box"
    assert said(found, "1 image with boxes, those of difficult objects included")
    write_xml(devkit, "2007_000001", "<name>person</name>", "<name>cat</name>")
    assert load(devkit).fingerprint() == found.fingerprint()


def test_boxes_come_with_other_tags_too(devkit: Path) -> None:
    write_xml(devkit, "2007_000001", f"<name>person</name>{box(1, 1, 2, 2)}")
    write_xml(devkit, "2007_000002", "<name>")
    (devkit / "labels.csv").write_text("image,labels\n2007_000001,cat\n2007_000002,dog\n")
    found = load(devkit, labels="labels.csv")
    assert [s.boxes for s in found][:2] == [(Box("person", 0, 0, 2, 2),), None]


@pytest.mark.parametrize(
    "bad", ["", box(1, 1, "x", 2), box(5, 1, 4, 2), box("nan", 1, 4, 2), box(1, 1, 1e9, 2)]
)
def test_what_is_no_box_does_not_spoil_the_tags(devkit: Path, bad: str) -> None:
    write_xml(
        devkit, "2007_000001", f"<name>person</name>{box(1, 1, 2, 2)}", f"<name>cat</name>{bad}"
    )
    found = load(devkit)
    assert tags(found)["2007_000001"] == ("cat", "person") and found[0].boxes is None


def test_document_types_are_refused(devkit: Path, tmp_path: Path) -> None:
    """Entities can be nested until they fill the memory, and can read other files."""
    laughs = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 12))
    secret = tmp_path / "secret"
    secret.write_text("cat")
    for entities in (
        f"<!ENTITY a0 'ha'>{laughs}<!ENTITY x '&a11;'>",
        f"<!ENTITY x SYSTEM '{secret}'>",
        "<!ENTITY x 'cat'>",
    ):
        head = f"<!DOCTYPE annotation [{entities}]>"
        write_xml(devkit, "2007_000001", "<name>&x;</name>", head=head)
        with pytest.raises(UserError, match="DOCTYPE") as caught:
            load(devkit)
        assert "2007_000001.xml" in caught.value.what and caught.value.mend
        text = (devkit / "Annotations" / "2007_000001.xml").read_text()
        (devkit / "Annotations" / "2007_000001.xml").write_bytes(text.encode("utf-16"))
        with pytest.raises(UserError, match="DOCTYPE"):
            load(devkit)


# --- real data ------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_subset(voc_subset: Path) -> None:
    found = load(voc_subset)
    assert len(found.split("train")) > 1000 and all(s.mask and s.image.exists() for s in found)
    lists = {"train": "report_320", "val": "val_160"}
    if (voc_subset / "ImageSets" / "Segmentation" / "report_320.txt").is_file():
        small = load(voc_subset, lists=lists)
        assert [len(small.split(name)) for name in lists] == [320, 160]


@pytest.mark.realdata
def test_real_subset_is_sound(voc_subset: Path) -> None:
    found = load(voc_subset).split("train")
    part = found.only([s.id for s in found][::16])
    report = check(part)
    assert not report.errors and len(report.sizes) == len(part)


@pytest.mark.realdata
def test_real_masks_agree_with_tags(voc_subset: Path) -> None:
    lists = {"val": "val"}
    given, computed = load(voc_subset, lists=lists), load(voc_subset, lists=lists, labels="masks")
    pairs = [(a.tags, b.tags) for a, b in zip(given, computed, strict=True)]
    assert sum(set(b or ()) <= set(a or ()) for a, b in pairs) > 0.9 * len(pairs)
