import csv

import cv2
import numpy as np
import pytest

from weakseg.cli import app
from weakseg.data.images import write_mask
from weakseg.errors import UserError
from weakseg.stages.annotation import read_scores_table
from weakseg.stages.score import class_names, match, score_masks, write_quality


@pytest.fixture
def folders(tmp_path):
    """Three images of a disc, in sub-folders, whose masks are right, shifted, and empty."""
    rows, columns = np.mgrid[:48, :64]
    disc = (rows - 24) ** 2 + (columns - 32) ** 2 < 13**2
    image = np.where(disc[..., None], (190, 60, 50), (60, 120, 180)).astype(np.uint8)
    masks, images = tmp_path / "masks", tmp_path / "images"
    for name, mask in {
        "a/right": disc,
        "a/shifted": np.roll(disc, 9, axis=1),
        "b/empty": np.zeros_like(disc),
    }.items():
        write_mask(masks / f"{name}.png", mask)
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(images / f"{name}.jpg"), image[..., ::-1])
    (masks / "classes.txt").write_text("<b>disc\n", encoding="utf-8")
    return masks, images


def test_names_of_classes_start_behind_the_background(folders):
    masks, _ = folders
    assert class_names(masks) == ("<b>disc",)
    (masks / "classes.txt").write_text("__background__\ncat\n\ndog\n", encoding="utf-8-sig")
    assert class_names(masks) == ("cat", "dog")


def test_the_worst_come_first(folders):
    order = [s.masked.id for s in score_masks(match(*folders))]
    assert order == ["b/empty", "a/shifted", "a/right"]


def test_the_command_writes_a_table_and_a_page(folders, tmp_path, capsys):
    table = tmp_path / "out" / "quality.csv"
    app(
        ["score", *map(str, folders), "--out", str(table), "--shown", "2"],
        result_action="return_value",
    )
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["b/empty", "a/shifted", "a/right"]
    page = table.with_suffix(".html").read_text(encoding="utf-8")
    assert "2 of 3 masks" in page
    assert "&lt;b&gt;disc" in page
    assert "a/right" not in page
    assert capsys.readouterr().out.split() == [str(table), str(table.with_suffix(".html"))]


def test_masks_without_images_are_named(folders):
    masks, images = folders
    (images / "a" / "right.jpg").unlink()
    with pytest.raises(UserError, match="a/right.png"):
        match(masks, images)


def test_another_shape_is_named(folders):
    masks, images = folders
    write_mask(masks / "a" / "right.png", np.zeros((48, 48), np.uint8))
    with pytest.raises(UserError, match="another shape"):
        score_masks(match(masks, images))


def test_a_folder_without_images_says_what_to_give(folders):
    with pytest.raises(UserError, match="weakseg score MASKS IMAGES"):
        app(["score", str(folders[0])], result_action="return_value")


@pytest.mark.parametrize("size", [(30, 1200), (1200, 30), (1, 700), (700, 1), (7, 3001)])
def test_masks_of_very_long_images_are_sorted(size, tmp_path):
    """At the size of the estimate, the shorter side of 1200 x 30 pixels is 6.4 rounded."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    write_mask(tmp_path / "masks" / "a.png", np.ones(size, np.uint8))
    (found,) = score_masks(match(tmp_path / "masks", tmp_path / "images"))
    assert found.quality.foreground == 1
    write_mask(tmp_path / "masks" / "a.png", np.ones(size[::-1], np.uint8))
    with pytest.raises(UserError, match="another shape") as caught:
        score_masks(match(tmp_path / "masks", tmp_path / "images"))
    assert caught.value.where == str(tmp_path / "masks" / "a.png")


def test_names_are_no_formulas_and_come_back(folders, tmp_path):
    masks, images = folders
    for folder, suffix in ((masks, ".png"), (images, ".jpg")):
        (folder / "a" / f"right{suffix}").rename(folder / f"=1+1{suffix}")
    table = tmp_path / "quality.csv"
    write_quality(table, score_masks(match(masks, images)))
    with table.open(newline="", encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["b/empty", "a/shifted", "'=1+1"]
    assert sorted(read_scores_table(table)) == ["=1+1", "a/shifted", "b/empty"]
