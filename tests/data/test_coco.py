"""The source ``coco``: tags, boxes and masks with known answers, compared with pycocotools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from weakseg.data import coco as module
from weakseg.data.coco import coco
from weakseg.data.images import read_mask
from weakseg.data.samples import Box, Collection
from weakseg.data.table import read_table
from weakseg.errors import UserError
from weakseg.recipe import load_recipe
from weakseg.stages.check import collect

CATEGORIES = [
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 18, "name": "dog"},
]
HEIGHT, WIDTH = 20, 30


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def thing(image: Any, category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    value = {"image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0}
    if isinstance(segmentation, list) and segmentation:
        corners = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
        low, high = corners.min(0), corners.max(0)
        value["bbox"] = [*map(float, low), *map(float, high - low)]
    return value | more


RING = np.zeros((HEIGHT, WIDTH), dtype=int)
RING[2:12, 2:12], RING[5:8, 5:8] = 1, 0


def runs(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": [*mask.shape], "counts": counts.tolist()}


ANNOTATIONS = [
    thing(7, 1, [square(2, 2, 10), square(14, 2, 4)]),  # two parts, and ...
    thing(7, 18, [square(4, 4, 3)]),  # ... a smaller one on the first
    thing(7, 90, runs(RING[:, ::-1]), bbox=[18, 2, 10, 10]),  # with a hole
    thing(9, 1, runs(np.ones((HEIGHT, WIDTH), int)), iscrowd=1, bbox=[0, 0, 30, 20]),
    thing(9, 18, [square(1, 1, 5)]),
    thing(12, 1, runs(RING), iscrowd=1, bbox=[2, 2, 10, 10]),
    thing(20, 18, [], bbox=[3, 3, 6, 5]),  # a box alone
]


def write(
    root: Path,
    annotations: list[dict[str, Any]] = ANNOTATIONS,
    ids: tuple[Any, ...] = (7, 9, 12, 20, 33),
    split: str = "train",
    year: int = 2014,
    folder: str | None = None,
    **more: Any,
) -> Path:
    images = []
    for key in ids:
        name = f"COCO_{split}{year}_{key:012}.png" if isinstance(key, int) else f"{key}.png"
        images.append({"id": key, "file_name": name, "height": HEIGHT, "width": WIDTH})
        file = root / (f"{split}{year}" if folder is None else folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    path = root / "annotations" / f"instances_{split}{year}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": i, **a} for i, a in enumerate(annotations)]
    content = {"info": {"year": year}, "images": images, "annotations": numbered}
    path.write_text(json.dumps({**content, "categories": CATEGORIES, **more}))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "coco")
    write(tmp_path / "coco", [thing(5, 90, [square(1, 1, 4)])], (5,), "val")
    return tmp_path / "coco"


def by_number(found: Collection) -> dict[int, Any]:
    return {int(s.id.rpartition("_")[2]): s for s in found}


def test_the_usual_layout_is_found(root: Path, cache: Path) -> None:
    found = coco(root=root)
    assert found.classes == ("person", "dog", "toothbrush")
    samples = by_number(found)
    assert samples[7].tags == ("person", "dog", "toothbrush")
    assert samples[9].tags == ("person", "dog") and samples[12].tags == ("person",)
    assert samples[33].tags is None and samples[5].split == "val" and samples[5].mask is None
    assert samples[7].id == "train2014/COCO_train2014_000000000007"
    assert "1 to 90 become 1 to 3" in " ".join(found.notes)
    assert "untagged: negative" in " ".join(found.notes)
    assert not cache.exists(), "nothing is drawn unless asked for"


def test_boxes(root: Path) -> None:
    samples = by_number(coco(root=root))
    assert samples[7].boxes == (
        Box("person", 2, 2, 18, 12),
        Box("dog", 4, 4, 7, 7),
        Box("toothbrush", 18, 2, 28, 12),
    )
    assert samples[9].boxes == (Box("dog", 1, 1, 6, 6),), "a crowd is no object"
    assert samples[12].boxes == () and samples[20].boxes == (Box("dog", 3, 3, 9, 8),)


def test_masks(root: Path) -> None:
    samples = by_number(coco(root=root, masks="coco"))
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:12, 2:12] = expected[2:6, 14:18] = 1
    expected[RING[:, ::-1] > 0] = 3
    expected[4:7, 4:7] = 2
    assert (read_mask(samples[7].mask) == expected).all()
    crowd = np.full((HEIGHT, WIDTH), 255)
    crowd[1:6, 1:6] = 2
    assert (read_mask(samples[9].mask) == crowd).all()
    assert (read_mask(samples[12].mask) == 255 * RING).all(), "the hole is background"
    box = np.zeros((HEIGHT, WIDTH))
    box[3:8, 3:9] = 255
    assert (read_mask(samples[20].mask) == box).all()
    assert not read_mask(samples[33].mask).any()


def test_masks_are_drawn_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = coco(root=root, masks="coco")
    monkeypatch.setattr(module, "_drawn", None)
    assert coco(root=root, masks="coco") == first
    assert first.fingerprint() == coco(root=root).fingerprint()
    with pytest.raises(TypeError):
        coco(root=root, masks="coco", overlap="drawing-order")


def test_options(root: Path) -> None:
    object_crowd = by_number(coco(root=root, masks="coco", crowd="object"))
    assert (read_mask(object_crowd[12].mask) == RING).all()
    no_crowd = by_number(coco(root=root, masks="coco", crowd="background", crowd_tags=False))
    assert not read_mask(no_crowd[12].mask).any()
    assert no_crowd[12].tags is None and no_crowd[9].tags == ("dog",)
    over = ANNOTATIONS[1::-1] + ANNOTATIONS[2:]
    write(root, over)
    order = by_number(coco(root=root, masks="coco", overlap="drawing-order"))
    assert read_mask(order[7].mask)[5, 5] == 1
    assert read_mask(by_number(coco(root=root, masks="coco"))[7].mask)[5, 5] == 2
    for name, value in {"crowd": "maybe", "overlap": "up", "crowd_tags": "yes"}.items():
        with pytest.raises(UserError, match=f"{name} is '{value}'"):
            coco(root=root, **{name: value})


def test_classes_reorder_and_leave_out(root: Path) -> None:
    found = by_number(coco(root=root, masks="coco", classes=["toothbrush", "dog"]))
    assert found[7].tags == ("toothbrush", "dog") and found[12].tags == ()
    assert set(np.unique(read_mask(found[7].mask))) == {0, 1, 2}
    assert found[33].tags is None and found[5].tags == ("toothbrush",)
    with pytest.raises(UserError, match="doog") as caught:
        coco(root=root, classes=["doog"])
    assert "dog" in (caught.value.mend or "")


def test_untagged(root: Path) -> None:
    assert by_number(coco(root=root, untagged="negative"))[33].tags == ()
    assert 33 not in by_number(coco(root=root, untagged="drop", masks="coco"))


def test_one_json_and_named_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a", folder="", year=1)
    only = coco(root=tmp_path / "a", labels=str(path))
    assert only.splits == ("train",) and "/" not in only[0].id
    write(tmp_path / "a", [thing("x", 1, [square(0, 0, 3)])], ("x",), "val", 3, "more/photos")
    named = {"train": "instances_train1.json", "validation": "annotations/instances_val3.json"}
    both = coco(root=tmp_path / "a", annotations=named)
    assert [s.id for s in both if s.split == "val"] == ["more/photos/x"]
    with pytest.raises(UserError, match="both given"):
        coco(root=tmp_path / "a", labels=str(path), annotations=named)
    with pytest.raises(UserError, match="no annotations"):
        coco(root=tmp_path / "a")


def test_two_years(tmp_path: Path) -> None:
    write(tmp_path, year=2014), write(tmp_path, year=2017, folder="train2017")
    with pytest.raises(UserError, match="several years"):
        coco(root=tmp_path)
    for file in (tmp_path / "train2017").iterdir():
        file.unlink()
    (tmp_path / "train2017").rmdir()
    assert coco(root=tmp_path).samples[0].id.startswith("train2014/")


def test_same_names_in_both_splits(tmp_path: Path) -> None:
    """The folder of the split wins over a bare name that two files have."""
    for split in ("train", "val"):
        write(tmp_path, [thing("a", 1, [square(0, 0, 3)])], ("a",), split, 2017)
    assert [s.id for s in coco(root=tmp_path)] == ["train2017/a", "val2017/a"]


def test_through_a_recipe(root: Path) -> None:
    recipe = load_recipe(None, sets=["data.source=coco", f"data.root={root}", "data.masks=coco"])
    assert any(s.mask is not None for s in collect(recipe.data))


def test_another_source_says_which_one_reads_it(root: Path) -> None:
    with pytest.raises(UserError, match="instances file of COCO") as caught:
        read_table(root / "annotations" / "instances_train2014.json")
    assert "data.source=coco" in (caught.value.mend or "")


def test_tags_agree_with_pycocotools(root: Path, capsys: pytest.CaptureFixture) -> None:
    theirs = COCO(str(root / "annotations" / "instances_train2014.json"))
    for number, sample in by_number(coco(root=root).split("train")).items():
        ids = {a["category_id"] for a in theirs.imgToAnns[number]}
        assert set(sample.tags or ()) == {theirs.cats[i]["name"] for i in ids}


def test_missing_images_stay_for_the_check(root: Path) -> None:
    (root / "train2014" / "COCO_train2014_000000000009.png").unlink()
    found = by_number(coco(root=root, masks="coco"))
    assert not found[9].image.exists() and found[9].mask is None
    with pytest.raises(UserError, match="none of the 5 images"):
        coco(root=root / "annotations", labels=str(root / "annotations/instances_train2014.json"))


BASE = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": CATEGORIES}
SOUND = {"image_id": 1, "category_id": 1}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no JSON object"),
        (b"\xff\xfe{", "not readable JSON"),
        (b'{"images": [', "not readable JSON"),
        (b'{"images": ' + b"[" * 100_000, "not readable JSON"),
        (b"[1, 2]", "a list"),
        (b"3", "no JSON object"),
        (b"{}", "lists no images"),
        ({**BASE, "categories": []}, "lists no categories"),
        ({**BASE, "images": [3]}, "image without an id"),
        ({**BASE, "images": [None, *BASE["images"]]}, "image without an id"),
        ({**BASE, "images": [{"id": 1}]}, "without a file_name"),
        ({**BASE, "images": BASE["images"] * 2}, "stands twice"),
        ({**BASE, "images": [{"id": 1, "file_name": "../a.png"}]}, "leads out"),
        ({**BASE, "images": [{"id": 1, "file_name": "/etc/passwd"}]}, "leads out"),
        ({**BASE, "categories": [{"id": "1", "name": "x"}]}, "no whole number"),
        ({**BASE, "categories": [{"id": 1, "name": " "}]}, "without a name"),
        ({**BASE, "categories": CATEGORIES * 2}, "stands twice"),
        ({**BASE, "annotations": [{}]}, "without an image_id"),
        ({**BASE, "annotations": [{**SOUND, "image_id": 9}]}, "not listed"),
        ({**BASE, "annotations": [{**SOUND, "category_id": 2}]}, "category that is not listed"),
        ({**BASE, "annotations": [{**SOUND, "category_id": None}]}, "category_id"),
        ({**BASE, "annotations": [{**SOUND, "iscrowd": "no"}]}, "iscrowd"),
        ({**BASE, "annotations": [{**SOUND, "bbox": [1, 2, 3]}]}, "bbox"),
        ({**BASE, "annotations": [{**SOUND, "bbox": [1, 2, 3, 1e999]}]}, "bbox"),
        ({**BASE, "annotations": [{**SOUND, "segmentation": [["a"] * 6]}]}, "polygon"),
        ({**BASE, "annotations": [{**SOUND, "segmentation": "x"}]}, "neither polygons"),
        ({**BASE, "annotations": [{**SOUND, "segmentation": {"counts": [9], "size": [6, 8]}}]},
         "fill the image"),
        ({**BASE, "images": [{"id": 1, "file_name": "a.png", "width": 10**6, "height": 10**6}]},
         "pixels"),
        ({**BASE, "images": [{"id": 1, "file_name": "a.png", "width": "8", "height": 6}]},
         "no whole numbers"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, content: Any, match: str) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError, match=match) as caught:
        coco(root=tmp_path, labels="x.json", masks="coco")
    assert caught.value.mend and str(path) in str(caught.value)


def test_splits_must_agree_on_categories(root: Path) -> None:
    write(root, [], (5,), "val", categories=[{"id": 1, "name": "cat"}])
    with pytest.raises(UserError, match="differ"):
        coco(root=root)


def test_background_is_no_class(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "_background_"}, *CATEGORIES]
    write(tmp_path, [*ANNOTATIONS, thing(33, 0, [square(0, 0, 20)])], categories=categories)
    found = by_number(coco(root=tmp_path))
    assert found[33].tags == () and coco(root=tmp_path).classes[0] == "person"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_never_raise_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / "fuzz"
    path = root / "annotations" / "instances_train2014.json"
    if not root.exists():
        write(root)
        (tmp_path / "sound.json").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "sound.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from(
                [b"", b"0", b"-", b"9", b"]", b"}", b'"', b",", b"null", b"\xc3", b"e9"]
            )
        )
    path.write_bytes(content)
    try:
        found = coco(root=root, masks="coco")
    except UserError:
        return
    for sample in found:
        assert sample.image.resolve().is_relative_to(root.resolve())
        assert sample.mask is None or sample.mask.is_relative_to(tmp_path / "cache")
