"""Masks that do not speak of the tags' classes are named; white on black is converted when asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.rasters import write_tiff

from weakseg.data.check import check
from weakseg.data.images import read_binary_mask, read_mask, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.errors import UserError
from weakseg.ops import confusion_matrix, metrics
from weakseg.recipe import DataConfig, load_recipe
from weakseg.stages.check import collect

SIDE = 40


def shape(i: int) -> np.ndarray:
    """A square that wanders, as booleans."""
    found = np.zeros((SIDE, SIDE), bool)
    found[4 + i : 20 + i, 8:24] = True
    return found


def sample(folder: Path, i: int, tags: tuple[str, ...], mask: np.ndarray | None) -> Sample:
    image = folder / f"{i}.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(
        image
    )
    if mask is not None:
        write_mask(folder / "m" / f"{i}.png", mask)
    return Sample(str(i), image, tags, mask=None if mask is None else folder / "m" / f"{i}.png")


def codes(samples: list[Sample], *classes: str) -> dict[str, tuple[str, ...]]:
    report = check(Collection("c", classes, tuple(samples), "t"))
    return {p.code: p.items for p in report.problems if p.code.startswith(("mask", "class-"))}


def severity(samples: list[Sample], code: str, *classes: str) -> str:
    report = check(Collection("c", classes, tuple(samples), "t"))
    return next(p.severity for p in report.problems if p.code == code)


@pytest.mark.parametrize("value", [255, 128, 200, 2])
@pytest.mark.parametrize("number", [1, 3])
def test_masks_of_two_values_are_no_classes(tmp_path: Path, value: int, number: int) -> None:
    classes = ("cat", "dog", "cow")[:number]
    if value <= number:
        value += number
    samples = [
        sample(tmp_path, i, (classes[i % number],), shape(i) * value) for i in range(2 * number + 2)
    ]
    found = codes(samples, *classes)
    assert set(found) == {"mask-binary"} and f"{value}" in found["mask-binary"][0]
    assert severity(samples, "mask-binary", *classes) == "error"


def test_masks_without_any_class(tmp_path: Path) -> None:
    for name, mask in (("empty", shape(0) * 0), ("mixed", shape(0) * 77 + 255 * shape(9))):
        samples = [sample(tmp_path / name, i, ("cat",), np.minimum(mask, 255)) for i in range(5)]
        found = codes(samples, "cat", "dog")
        assert found["masks-without-classes"] == ("cat",)
        assert severity(samples, "masks-without-classes", "cat", "dog") == "error"


def test_a_class_that_never_has_a_pixel_is_named(tmp_path: Path) -> None:
    samples = [sample(tmp_path, i, ("cat", "dog"), shape(i) * 1) for i in range(5)]
    samples += [sample(tmp_path, 5, ("cow",), None)]  # it has no mask
    found = codes(samples, "cat", "dog", "cow")
    assert found == {"class-without-pixels": ("dog",), "masks-incomplete": ("5",)}
    assert severity(samples, "class-without-pixels", "cat", "dog", "cow") == "warning"


def test_ids_of_another_list_are_an_error(tmp_path: Path) -> None:
    """Classes in another order, or all objects as 1: the tags tell."""
    classes = ("cat", "cow", "dog")
    for name, wrong in (("shifted", {1: 2, 2: 3, 3: 1}), ("one", {1: 1, 2: 1, 3: 1})):
        samples = [
            sample(tmp_path / name, i, (classes[i % 3],), shape(i) * wrong[i % 3 + 1])
            for i in range(9)
        ]
        found = codes(samples, *classes)
        assert len(found["masks-of-other-classes"]) == (9 if name == "shifted" else 6)
        assert severity(samples, "masks-of-other-classes", *classes) == "error"


def test_some_masks_of_another_kind_are_named(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, i, ("cat",), shape(i) * (255 if i in (2, 5, 7) else 1)) for i in range(10)
    ]
    assert codes(samples, "cat") == {"mask-of-other-classes": ("2", "5", "7")}
    assert severity(samples, "mask-of-other-classes", "cat") == "warning"


def test_masks_that_fit_are_left_alone(tmp_path: Path) -> None:
    classes = ("cat", "dog")
    samples = []
    for i in range(12):
        mask = shape(i) * (1 + i % 2) + 0
        mask[:2] = 255
        samples.append(sample(tmp_path, i, (classes[i % 2],), mask))
    samples += [sample(tmp_path, 12, (), shape(0) * 0)]  # a confirmed negative
    samples += [sample(tmp_path, 13, ("cat",), shape(0) * 255)]  # a crowd
    assert codes(samples, *classes) == {}


# --- white on black ---------------------------------------------------------------------------


def _soft(shown: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(shown.astype(np.uint8) * 255).resize((SIDE, SIDE), 2))


@pytest.mark.parametrize(
    "kind", ["L", "L128", "L1", "1", "P", "RGB", "red", "RGBA", "LA", "u2.tif", "f4.tif", "jpg"]
)
def test_white_is_read_from_any_file(tmp_path: Path, kind: str) -> None:
    shown = shape(3)
    white = shown.astype(np.uint8) * {"L128": 128, "L1": 1}.get(kind, 255)
    path = tmp_path / f"m.{kind.rpartition('.')[2] if '.' in kind else 'png'}"
    if kind == "u2.tif":
        write_tiff(path, white.astype(np.uint16) * 257)
    elif kind == "f4.tif":
        write_tiff(path, shown.astype(np.float32))
    elif kind == "jpg":
        path = tmp_path / "m.jpg"
        Image.fromarray(white).save(path, quality=90)
    elif kind == "red":
        Image.fromarray(white[..., None] * np.array([1, 0, 0], np.uint8)).save(path)
    elif kind == "RGBA":  # the object is what is left
        opaque = np.full((SIDE, SIDE, 4), 255, np.uint8)
        opaque[..., 3] = white
        Image.fromarray(opaque).save(path)
    elif kind == "P":
        write_mask(path, shown)
    else:
        Image.fromarray(white).convert({"L128": "L", "L1": "L"}.get(kind, kind)).save(path)
    np.testing.assert_array_equal(read_binary_mask(path, 7), shown * np.uint8(7))


def test_soft_outlines_are_cut_in_the_middle(tmp_path: Path) -> None:
    soft = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    Image.fromarray(soft).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_binary_mask(tmp_path / "m.png", 1), soft > 127)
    Image.fromarray(soft * 0).save(tmp_path / "none.png")
    assert not read_binary_mask(tmp_path / "none.png", 1).any()
    with pytest.raises(UserError):
        read_binary_mask(tmp_path / "missing.png", 1)


def test_masks_of_16_bits_are_read_as_stored(tmp_path: Path) -> None:
    ids = shape(0).astype(np.uint16) * 3
    for orientation, wanted in ((1, ids), (6, np.rot90(ids, -1))):
        path = write_tiff(tmp_path / "m.tif", ids, orientation=orientation)
        np.testing.assert_array_equal(read_mask(path), wanted)
    with pytest.raises(UserError):
        read_mask(write_tiff(tmp_path / "f.tif", ids.astype(np.float32)))
    with pytest.raises(UserError):
        read_mask(write_tiff(tmp_path / "3.tif", np.dstack([ids] * 3)))


def folder(root: Path, *tags: str) -> DataConfig:
    lines = ["image,labels"]
    for i, own in enumerate(tags):
        one = sample(root / "images", i, (), None)
        (root / "truth").mkdir(exist_ok=True)
        Image.fromarray(shape(i).astype(np.uint8) * 255).save(root / "truth" / f"{i}.png")
        lines.append(f"{one.image.name},{own}")
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    data = {"root": root / "images", "labels": str(root / "labels.csv"), "masks": root / "truth"}
    return DataConfig.model_validate(data | {"untagged": "negative"})


def miou(collection: Collection, known: int) -> tuple[float, float]:
    """Of perfect predictions, and how many pixels count."""
    number = len(collection.classes)
    place = {name: i for i, name in enumerate(collection.classes, start=1)}
    total = np.zeros((number + 1, number + 2), np.int64)
    for i, s in enumerate(collection):
        value = place[s.tags[0]] if s.tags else 0
        total += confusion_matrix((shape(i) * value).astype(np.uint8), s.truth(), number)
    assert total.sum() == known
    return metrics(total).miou, total.sum()


def test_white_becomes_the_only_class_or_the_only_tag(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "cat", "cat", "", "cat", "cat")
    collection = collect(one)
    assert {p.code for p in check(collection).errors} >= {"mask-binary"}
    asked = collect(one.model_copy(update={"masks_are": "binary"}))
    assert [s.mask_id for s in asked] == [1] * 5
    assert "mask-binary" not in {p.code for p in check(asked).problems}

    two = folder(tmp_path / "two", "cat", "dog", "dog", "cat;dog", "")
    asked = collect(two.model_copy(update={"masks_are": "binary"}))
    assert [s.mask_id for s in asked] == [1, 2, 2, 255, 255]
    assert asked.notes[-1] and "2" in asked.notes[-1]
    assert miou(asked, 5 * SIDE**2 - 2 * shape(0).sum())[0] == 1
    assert asked.fingerprint() == collect(two).fingerprint()  # they train nothing


def test_the_setting_is_checked() -> None:
    assert load_recipe({"data": {"masks_are": "binary"}}).data.masks_are == "binary"
    with pytest.raises(UserError):
        load_recipe({"data": {"masks_are": "white"}})
