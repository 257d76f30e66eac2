"""Annotation formats one by one: against independent readers, and against hostile files."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage
from tests.contract.test_exporters import CLASSES, build, corrected, new_run

from weakseg.data.images import voc_palette
from weakseg.errors import UserError
from weakseg.export.annotations import Options, open_tree
from weakseg.export.annotations.coco import compress_runs
from weakseg.export.annotations.labelstudio import brush, unbrush
from weakseg.export.annotations.yolo_seg import outline
from weakseg.stages.annotation import export_masks, folder_masks, import_masks, read_scores_table

RING = np.zeros((24, 30), dtype=np.uint8)
RING[4:20, 5:25], RING[8:14, 9:18], RING[10:12, 11:14] = 1, 0, 2  # a hole with an object in it
RING[0, 0] = RING[23, 29] = 1  # three parts


@pytest.fixture
def one(tmp_path):
    """One image with the ring, its run and its collection."""
    collection, made = build(tmp_path, [RING])
    run, recipe = new_run(tmp_path)

    class One:
        folder = tmp_path

        def bring(self, source, format="auto", **options):
            options = {"confirmed": True} | options
            return import_masks(run, recipe, collection, source, format, **options)

        def back(self):
            return corrected(run)["cat/001"]

    One.collection, One.made, One.run = collection, made, run
    return One()


@contextlib.contextmanager
def mended():
    """Lets a UserError pass that says how to mend it, and nothing else."""
    try:
        yield
    except UserError as error:
        if not error.mend:
            raise


def save(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# --- COCO -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=12))
def test_compressed_runs_are_those_of_the_coco_api(runs):
    runs = [runs[0], *(run + 1 for run in runs[1:])]
    expected = coco_mask.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))
    assert compress_runs(runs).encode() == expected["counts"]


@pytest.mark.parametrize(("objects", "number"), [("component", 4), ("class", 2)])
def test_the_coco_api_reads_the_file(one, objects, number):
    one.made.options = Options(objects=objects)
    export_masks(one.made, "coco", one.folder / "out")
    api = COCO(str(one.folder / "out/annotations/instances_train.json"))
    assert [c["name"] for c in api.loadCats(api.getCatIds())] == list(CLASSES)
    drawn = np.zeros_like(RING)
    annotations = api.loadAnns(api.getAnnIds())
    for annotation in annotations:
        own = api.annToMask(annotation)
        assert not drawn[own > 0].any()
        drawn[own > 0] = annotation["category_id"]
        assert annotation["area"] == own.sum() and annotation["iscrowd"] == 0
        assert annotation["bbox"] == coco_mask.toBbox(api.annToRLE(annotation)).tolist()
    assert (drawn == RING).all() and len(annotations) == number
    image = api.loadImgs(api.getImgIds())[0]
    assert (image["file_name"], image["height"], image["width"]) == ("cat/001.png", *RING.shape)


def _instances(annotations, size=RING.shape, names=CLASSES):
    return {
        "images": [{"id": 7, "file_name": "cat/001.png", "height": size[0], "width": size[1]}],
        "annotations": [{"image_id": 7, **a} for a in annotations],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
    }


def test_polygons_and_all_run_lengths_are_drawn_in_order(one):
    left = np.zeros(RING.shape, dtype=np.uint8, order="F")
    left[:, :10] = 1
    packed = coco_mask.encode(left)
    value = _instances(
        [
            {"category_id": 10, "segmentation": [[0, 0, 30, 0, 30, 24, 0, 24]]},
            {"category_id": 11, "segmentation": {**packed, "counts": packed["counts"].decode()}},
            {"category_id": 12, "segmentation": {"size": [24, 30], "counts": [0, 24, 696]}},
        ]
    )
    one.bring(save(one.folder / "a.json", value))
    expected = np.ones(RING.shape, dtype=np.uint8)
    expected[:, :10], expected[:, :1] = 2, 3
    assert (one.back() == expected).all()


def test_coco_faults_are_named_all_at_once(one):
    value = _instances(
        [
            {"category_id": 10, "segmentation": [[0, 0, 3]]},
            {"category_id": 99},
            {"category_id": 14},
        ],
        names=(*CLASSES, "horse"),
    )
    value["annotations"].append({"image_id": 8, "category_id": 10})
    value["images"].append({"id": 9, "file_name": "bird/1.jpg", "height": 1, "width": 1})
    with pytest.raises(UserError) as caught:
        one.bring(save(one.folder / "a.json", value))
    for part in (
        "5 problems",
        "'cat/001.png' (a polygon needs x, y of at least three points)",
        "a.json: annotation 2",
        "no class of the run: 'horse'",
        "not listed: a.json: image 8",
        "'bird/1.jpg'",
    ):
        assert part in caught.value.what
    assert not (one.run.path / "corrected").exists() and not list(one.run.path.glob(".*"))


# --- CVAT and VOC ---------------------------------------------------------------------------


def test_the_archive_has_what_cvat_documents(one):
    export_masks(one.made, "cvat", one.folder / "out")
    with zipfile.ZipFile(one.folder / "out/masks.zip") as archive:
        assert archive.namelist() == [
            "labelmap.txt",
            "ImageSets/Segmentation/default.txt",
            "SegmentationClass/cat/001.png",
            "SegmentationObject/cat/001.png",
        ]
        lines = archive.read("labelmap.txt").decode().splitlines()
        assert lines[1:3] == ["background:0,0,0::", "cat:128,0,0::"]
        assert archive.read("ImageSets/Segmentation/default.txt") == b"cat/001\n"
        kinds, numbers = (
            np.array(Image.open(io.BytesIO(archive.read(f"{name}/cat/001.png"))).convert("RGB"))
            for name in ("SegmentationClass", "SegmentationObject")
        )
    assert (kinds == voc_palette()[RING]).all()
    expected = sum(ndimage.label(k == RING, np.ones((3, 3)))[1] for k in (1, 2))
    assert len(np.unique(numbers.reshape(-1, 3), axis=0)) == expected + 1
    labels = json.loads((one.folder / "out/labels.json").read_text(encoding="utf-8"))
    assert labels[0] == {"name": "cat", "color": "#800000", "attributes": []}


def test_more_objects_than_colours(tmp_path):
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[::2, ::2] = 1 + np.arange(900).reshape(30, 30) % 2
    mask[10:15, 10:15] = 2
    collection, made = build(tmp_path, [mask])
    export_masks(made, "cvat", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out/masks.zip") as archive:
        numbers = np.array(Image.open(archive.open("SegmentationObject/cat/001.png")))
    assert set(np.unique(numbers)) == set(range(255)) and ((numbers > 0) == (mask > 0)).all()
    for number in range(1, 255):
        assert len(np.unique(mask[numbers == number])) == 1, "an object has one class"
    assert (numbers == numbers[12, 12]).sum() >= 25 and len(np.unique(numbers[10:15, 10:15])) == 1


def _painted(names, colours, mask, listed=("cat/001",)):
    """What CVAT exports: colours, in an order of its own, with the task's label colours."""
    picture = np.zeros((*mask.shape, 3), dtype=np.uint8)
    lines = ["# label:color_rgb:parts:actions"]
    for name, colour in zip(names, colours, strict=True):
        lines.append(f"{name}:{','.join(map(str, colour))}::")
    for label in np.unique(mask[mask > 0]):
        picture[mask == label] = colours[names.index(CLASSES[label - 1])]
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return {
        "labelmap.txt": "\n".join(lines).encode(),
        "SegmentationClass/cat/001.png": content.getvalue(),
        "ImageSets/Segmentation/default.txt": "\n".join(listed).encode(),
    }


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_colours_become_classes_by_the_label_map(one):
    names = ["traffic light", "background", "GRÖSSER HUND", "cat", "größter Hund"]
    colours = [(10, 20, 30), (0, 0, 0), (9, 9, 9), (250, 1, 77), (1, 2, 3)]
    members = _painted(names, colours, RING)
    found = one.bring(pack(one.folder / "e.zip", members))
    assert found.format == "cvat" and (one.back() == RING).all()


def test_a_colour_without_a_label_and_a_label_without_a_class(one):
    members = _painted(
        ["background", "cat", "größter Hund"], [(0, 0, 0), (1, 1, 1), (2, 2, 2)], RING
    )
    members["labelmap.txt"] = b"background:0,0,0::\nhorse:1,1,1::"
    with pytest.raises(UserError, match="label 'horse', which is no class of the run"):
        one.bring(pack(one.folder / "e.zip", members))
    members["labelmap.txt"] = b"background:0,0,0::\ncat:1,1,1::"
    with pytest.raises(UserError, match="colour 2,2,2, which is no label"):
        one.bring(pack(one.folder / "e.zip", members))


def test_a_listed_image_without_a_mask_was_left_empty(tmp_path):
    collection, _ = build(tmp_path, [RING, RING, RING])
    tagged = [
        s.__class__(s.id, s.image, ("cat",) if i != 1 else ()) for i, s in enumerate(collection)
    ]
    collection = collection.__class__("x", CLASSES, tuple(tagged), "x")
    run, recipe = new_run(tmp_path)
    members = _painted(
        ["background", "cat", "größter Hund"], [(0, 0, 0), (1, 1, 1), (2, 2, 2)], RING
    )
    members["ImageSets/Segmentation/default.txt"] = '"cat/001"\ndog/001 1\ngröße 1/a b\n'.encode()
    source = pack(tmp_path / "e.zip", members)
    found = import_masks(run, recipe, collection, source, confirmed=True)
    assert set(found.ids) == {"cat/001", "dog/001"}, "dog/001 is a confirmed negative"
    assert "1 image left out" in found.notes[0] and "größe 1/a b" in found.notes[0]
    found = import_masks(run, recipe, collection, source, empty=True, confirmed=True)
    assert len(found.ids) == 3 and not corrected(run)["größe 1/a b"].any()


@pytest.mark.parametrize("name", ['"b"', "a\nb", "#1"])
def test_names_that_a_list_cannot_hold(name, tmp_path):
    _, made = build(tmp_path, [RING], [name])
    for form in ("cvat", "voc"):
        with pytest.raises(UserError, match="line breaks, or a"):
            export_masks(made, form, tmp_path / form)


def test_class_names_that_a_label_map_cannot_hold(one):
    one.made.classes = ("a:b", *CLASSES[1:])
    for form in ("cvat", "voc"):
        with pytest.raises(UserError, match="label map cannot hold"):
            export_masks(one.made, form, one.folder / form)


def test_the_voc_source_reads_the_tree(tmp_path):
    from weakseg.data.voc import voc

    _, made = build(tmp_path, [RING, RING.T.copy()], ["a", "b"])
    export_masks(made, "voc", tmp_path / "out")
    found = voc(root=tmp_path / "out", classes=tmp_path / "out/classes.txt", labels="masks")
    assert [s.tags for s in found] == [CLASSES[:2]] * 2 and found.classes == CLASSES
    assert [s.mask.name for s in found] == ["a.png", "b.png"]


# --- Label Studio ---------------------------------------------------------------------------


def test_brush_bytes_of_a_known_answer():
    """Bytes that label-studio-sdk 2.1.2 writes (converter.brush.mask2rle)."""
    own = np.zeros((3, 5), dtype=bool)
    own[1, 1:4], own[2, 0] = True, True
    known = [0, 0, 0, 60, 57, 27, 254, 23, 0, 183, 255, 24, 4, 127, 247, 192, 0]
    assert unbrush(known, (3, 5)).tolist() == own.tolist()
    assert brush(own) == known[: len(brush(own))] and len(brush(own)) >= len(known) - 1


def test_brush_bytes_with_literal_values():
    """rle-pack also stores literal values: of 60 rising ones, every fourth is the alpha channel."""
    alpha = np.arange(60).reshape(3, 5, 4)[..., 3]
    bits = f"{60:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    bits += "0" + "10" + f"{59:08b}" + "".join(f"{4 * v:08b}" for v in range(60))
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert (unbrush(code, (3, 5)) == (4 * alpha > 127)).all()


@settings(max_examples=40)
@given(st.lists(st.integers(-5, 300), max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_damaged_brush_bytes_are_a_value_error(code, height, width):
    total = 4 * height * width
    for damaged in (code, [0, 0, 0, total, *code]):
        with contextlib.suppress(ValueError):
            assert unbrush(damaged, (height, width)).shape == (height, width)


def test_the_labeling_configuration_and_the_tasks(one):
    notes = export_masks(one.made, "labelstudio", one.folder / "out")
    view = ElementTree.parse(one.folder / "out/config.xml").getroot()
    assert [e.get("value") for e in view.iter("Label")] == list(CLASSES)
    assert view.find("BrushLabels").get("toName") == view.find("Image").get("name") == "image"
    (task,) = json.loads((one.folder / "out/tasks.json").read_text(encoding="utf-8"))
    assert task["data"]["image"] == "/data/local-files/?d=photos/cat/001.png"
    assert f"LOCAL_FILES_DOCUMENT_ROOT={one.folder}" in notes[0]
    results = task["predictions"][0]["result"]
    assert [r["value"]["brushlabels"] for r in results] == [["cat"], ["größter Hund"]]
    assert {(r["original_height"], r["original_width"]) for r in results} == {RING.shape}


def _task(url, *annotations):
    return {"id": 1, "data": {"image": url}, "annotations": list(annotations)}


def _region(own, label="cat", **changes):
    return {
        "type": "brushlabels",
        "original_width": own.shape[1],
        "original_height": own.shape[0],
        "value": {"format": "rle", "rle": brush(own), "brushlabels": [label]},
        **changes,
    }


@pytest.mark.parametrize(
    "url",
    [
        "/data/local-files/?d=some/photos/cat/001.png",
        "/data/upload/3/0a1b2c3d-001.png",
        "https://host:80/a%20b/cat/001.png?x=1#y",
        "s3://bucket/cat/001.png",
    ],
)
def test_images_are_found_by_their_urls(url, one):
    one.bring(save(one.folder / "e.json", [_task(url, {"result": [_region(RING == 1)]})]))
    assert (one.back() == (RING == 1)).all()


def test_the_annotation_that_counts(one):
    def by_hand(label, **extra):
        return {"result": [_region(RING > 0, label)], **extra}

    old, new = {"updated_at": "2026-01-01T00:00:00Z"}, {"updated_at": "2026-02-01T00:00:00Z"}
    url = "x/cat/001.png"
    for expected, several in (
        (3, [by_hand("traffic light", **new), by_hand("cat", **old)]),
        (1, [by_hand("traffic light", **new), by_hand("cat", **old, ground_truth=True)]),
        (1, [by_hand("traffic light", **new, was_cancelled=True), by_hand("cat", **old)]),
    ):
        one.bring(save(one.folder / "e.json", [_task(url, *several)]))
        assert (one.back() == expected * (RING > 0)).all()


def test_polygons_of_label_studio_are_in_percent(one):
    region = {
        "type": "polygonlabels",
        "original_width": 30,
        "original_height": 24,
        "value": {"points": [[0, 0], [50, 0], [50, 100], [0, 100]], "polygonlabels": ["no"]},
    }
    one.bring(save(one.folder / "e.json", [_task("cat/001", {"result": [region]})]))
    assert (one.back()[:, :15] == 4).all() and not one.back()[:, 15:].any()


def test_tasks_that_nobody_annotated_are_no_corrections(one):
    with pytest.raises(UserError, match="holds no corrected mask"):
        one.bring(save(one.folder / "e.json", [_task("cat/001.png")]))
    one.bring(save(one.folder / "e.json", [_task("cat/001.png", {"result": []})]))
    assert not one.back().any(), "a person who removes everything means it"


@pytest.mark.parametrize(
    ("region", "match"),
    [
        (_region(RING.T == 1), "it is 24 x 30, the image 30 x 24"),
        (_region(RING == 1, "horse"), "no class of the run: 'horse'"),
        (_region(RING == 1, type="rectanglelabels"), "neither brush nor polygon"),
        (_region(RING == 1, image_rotation=90), "rotated"),
        (_region(RING == 1, value={"rle": [1, 2, 3], "brushlabels": ["cat"]}), "no list of bytes"),
        (_region(RING == 1, value={"brushlabels": ["cat", "no"]}), "without one label"),
        ("text", "neither brush nor polygon"),
    ],
)
def test_regions_that_cannot_be_used(region, match, one):
    source = save(one.folder / "e.json", [_task("cat/001.png", {"result": [region]})])
    with pytest.raises(UserError, match=match):
        one.bring(source, "labelstudio")


# --- YOLO -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_an_outline_is_one_closed_path_along_pixel_edges(own):
    parts, number = ndimage.label(own)
    for i in range(1, number + 1):
        points = outline(parts == i)
        steps = np.roll(points, -1, axis=0) - points
        holes = ndimage.label(parts != i, np.ones((3, 3)))[1] - (_touches_border(parts != i))
        if not holes:
            assert (np.count_nonzero(steps, axis=1) == 1).all(), "edges run along the grid"
            x, y = points[:, 0], points[:, 1]
            area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
            assert area == (parts == i).sum()


def _touches_border(free):
    """Number of free areas that reach the border of the array."""
    parts, _ = ndimage.label(free, np.ones((3, 3)))
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return len(set(border.tolist()) - {0})


def test_opencv_fills_shapes_without_holes_like_the_masks(tmp_path):
    y, x = np.mgrid[:160, :200]
    mask = ((x - 90) ** 2 / 4 + (y - 80) ** 2 < 1600).astype(np.uint8)
    mask[100:150, 150:190] = 2
    _, made = build(tmp_path, [mask])
    export_masks(made, "yolo-seg", tmp_path / "out")
    drawn = np.zeros_like(mask)
    for line in (tmp_path / "out/labels/train/cat/001.txt").read_text().splitlines():
        kind, *shares = line.split()
        points = np.array(shares, dtype=float).reshape(-1, 2) * (200, 160)
        cv2.fillPoly(drawn, [np.rint(points - 0.5).astype(np.int32)], int(kind) + 1)
    for label in (1, 2):
        union = ((mask == label) | (drawn == label)).sum()
        assert ((mask == label) & (drawn == label)).sum() / union > 0.95
    names = yaml.safe_load((tmp_path / "out/data.yaml").read_text(encoding="utf-8"))
    assert names["names"] == dict(enumerate(CLASSES))
    assert names["train"] == names["val"] == "images/train"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("0 0.1 0.1 0.5 0.5", "boxes have four numbers"),
        ("7 0 0 1 0 1 1", "without a name"),
        ("0 0 0 nan 0 1 1", "no outlines"),
        ("zero 0 0 1 0 1 1", "not numbers"),
        ("0 0 0 20 0 20 20", "in pixels, not in shares"),
    ],
)
def test_lines_that_cannot_be_used(line, match, one):
    folder = one.folder / "yolo"
    (folder / "labels/cat").mkdir(parents=True)
    (folder / "labels/cat/001.txt").write_text(line)
    (folder / "data.yaml").write_text("names: [cat]")
    with pytest.raises(UserError, match=match):
        one.bring(folder)


# --- plain masks, and all of them together --------------------------------------------------


def test_plain_masks_with_a_class_list_of_their_own(one):
    folder = one.folder / "mine"
    (folder / "cat").mkdir(parents=True)
    Image.fromarray((RING == 1).astype(np.uint8) * 2).save(folder / "cat/001.png")
    (folder / "classes.txt").write_text("background\nno\ntraffic light\n", encoding="utf-8")
    assert one.bring(folder).format == "masks"
    assert (one.back() == 3 * (RING == 1)).all()


def test_everything_that_is_wrong_is_listed_and_nothing_is_imported(tmp_path):
    collection, _ = build(tmp_path, [RING] * 4)
    run, recipe = new_run(tmp_path)
    good = tmp_path / "good"
    (good / "cat").mkdir(parents=True)
    Image.fromarray(RING).save(good / "cat/001.png")
    import_masks(run, recipe, collection, good)
    bad = tmp_path / "bad"
    (bad / "cat").mkdir(parents=True), (bad / "dog").mkdir(), (bad / "größe 1").mkdir()
    Image.fromarray(RING * 0).save(bad / "cat/001.png")
    Image.fromarray(RING.T.copy()).save(bad / "dog/001.png")
    Image.fromarray(RING * 7).save(bad / "größe 1/a b.png")
    Image.fromarray(RING).save(bad / "nobody.png")
    (bad / "日本").mkdir(), (bad / "日本/猫.png").write_bytes(b"\x89PNG no")
    with pytest.raises(UserError) as caught:
        import_masks(run, recipe, collection, bad)
    for part in (
        "4 problems",
        "24 x 30, the image 30 x 24",
        "class id 7",
        "'nobody'",
        "no readable PNG",
    ):
        assert part in caught.value.what
    assert list(corrected(run)) == ["cat/001"] and (corrected(run)["cat/001"] == RING).all()
    assert {p.name for p in run.path.iterdir()} == {"corrected"}


def test_later_imports_add_to_earlier_ones(tmp_path):
    collection, _ = build(tmp_path, [RING] * 2)
    run, recipe = new_run(tmp_path)
    for number, (name, mask) in enumerate({"cat": RING, "dog": RING, "./cat": RING * 0}.items()):
        folder = tmp_path / str(number)
        (folder / name).mkdir(parents=True)
        Image.fromarray(mask).save(folder / name / "001.png")
        import_masks(run, recipe, collection, folder)
    assert not corrected(run)["cat/001"].any() and (corrected(run)["dog/001"] == RING).all()
    record = json.loads((run.path / "corrected/corrected.json").read_text())["imports"]
    assert [r["ids"] for r in record] == [["cat/001"], ["dog/001"], ["cat/001"]]
    assert {r["format"] for r in record} == {"masks"} and record[0]["source"] == str(tmp_path / "0")


def _member(name, mode):
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    return member


@pytest.mark.parametrize(
    ("name", "mode", "match"),
    [
        ("../../evil.png", stat.S_IFREG, "lead out of the archive"),
        ("a/../../evil.png", stat.S_IFREG, "lead out of the archive"),
        ("/etc/evil.png", stat.S_IFREG, "not relative"),
        ("C:/evil.png", stat.S_IFREG, "not relative"),
        ("..\\evil.png", stat.S_IFREG, "not relative"),
        ("link.png", stat.S_IFLNK, "links or devices"),
    ],
)
def test_hostile_members_are_refused_by_name(name, mode, match, one):
    path = one.folder / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/001.png", b"")
        archive.writestr(_member(name, mode | 0o644), "/etc/passwd")
    before = sorted(p for p in one.folder.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        one.bring(path)
    assert "evil" in caught.value.what or "link" in caught.value.what
    assert sorted(p for p in one.folder.rglob("*")) == before


def test_members_that_claim_to_be_huge_are_refused(one):
    path = pack(one.folder / "huge.zip", {"cat/001.png": b"x" * 100})
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02") + 24  # the size in the central directory
    content[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="larger than 256 MiB: 'cat/001.png'"):
        one.bring(path)


def test_a_png_that_claims_to_be_huge_is_not_decoded(one):
    content = io.BytesIO()
    Image.fromarray(RING).save(content, "PNG")
    lie = bytearray(content.getvalue())
    lie[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(UserError, match="cat/001"):
        one.bring(pack(one.folder / "e.zip", {"cat/001.png": bytes(lie)}))


def test_a_link_that_leads_out_of_the_folder_is_refused(one):
    secret = one.folder / "secret.png"
    Image.fromarray(RING).save(secret)
    (one.folder / "given/cat").mkdir(parents=True)
    (one.folder / "given/cat/001.png").symlink_to(secret)
    with pytest.raises(UserError, match="cat/001.png is a link that leads out"):
        one.bring(one.folder / "given")
    assert not (one.run.path / "corrected").exists()


@settings(max_examples=25, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["images", "annotations", "categories", "id", "image_id", "file_name", "data",
                     "category_id", "segmentation", "counts", "size", "result", "image", "value"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )
)  # fmt: skip
def test_any_json_ends_in_a_user_error(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("json")
    collection, _ = build(folder, [RING])
    run, recipe = new_run(folder)
    for wrapped in (value, [{"data": value, "annotations": value}], [{"data": {"image": "cat/001"},
        "annotations": [{"result": [value, {"type": "brushlabels", "value": value}]}]}],
        {"images": value, "annotations": [value], "categories": [value]},
        {"images": [value, {"id": 1, "file_name": "cat/001.png", "height": 24, "width": 30}],
         "categories": [{"id": 1, "name": "cat"}],
         "annotations": [{"image_id": 1, "category_id": 1, "segmentation": value}]},
    ):  # fmt: skip
        source = save(folder / "any.json", wrapped)
        for form in ("auto", "coco", "labelstudio"):
            with mended():
                import_masks(run, recipe, collection, source, form)


def test_damaged_archives_end_in_a_user_error(one):
    export_masks(one.made, "cvat", one.folder / "out")
    content = (one.folder / "out/masks.zip").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 4):
            damaged[at] = rng.integers(256)
        (one.folder / "d.zip").write_bytes(damaged)
        with mended():
            one.bring(one.folder / "d.zip")


@pytest.mark.parametrize("name", ["x.zip", "x.json"])
def test_a_folder_is_not_named_like_a_file(name, one):
    with pytest.raises(UserError, match="an export is a folder"):
        export_masks(one.made, "coco", one.folder / name)


def test_masks_of_a_plain_folder_go_out_too(one):
    (one.folder / "made/classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    made = folder_masks(one.folder / "made", one.folder / "photos", None)
    export_masks(made, "coco", one.folder / "out")
    api = COCO(str(one.folder / "out/annotations/instances_train.json"))
    assert len(api.getAnnIds()) == 4
    # A list that is asked for and missing must not be replaced by the one beside the masks.
    with pytest.raises(UserError, match="does not exist"):
        folder_masks(one.folder / "made", one.folder / "photos", one.folder / "mistyped.txt")
    (one.folder / "made/classes.txt").unlink()
    with pytest.raises(UserError, match="nothing names the classes"):
        folder_masks(one.folder / "made", one.folder / "photos", None)


def test_a_table_of_scores(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("\ufeffid,score,more\ncat/001,0.5,x\n", encoding="utf-8")
    assert read_scores_table(path) == {"cat/001": 0.5}
    for text in (
        "name,score\na,1\n",
        "id,score\na,high\n",
        "id,score\na,1.5\n",
        "id,score\na,nan\n",
        "id\na\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="scores.csv") as caught:
            read_scores_table(path)
        assert "score" in str(caught.value)


def test_a_source_that_is_nothing_of_this(tmp_path):
    (tmp_path / "empty").mkdir()
    collection, _ = build(tmp_path, [RING])
    run, recipe = new_run(tmp_path)
    with pytest.raises(UserError, match="nothing in it looks like"):
        import_masks(run, recipe, collection, tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        import_masks(run, recipe, collection, tmp_path / "none")
    with pytest.raises(UserError, match="unknown format 'fiftyone'"):
        import_masks(run, recipe, collection, tmp_path / "empty", "fiftyone")
    assert open_tree(tmp_path / "empty").names == ()
