"""Pictures: small, faithful, and chosen without looking at results."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.data.images import voc_palette, write_mask
from weakseg.data.samples import Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.report.pictures import (
    LIMIT,
    SIDE,
    Picture,
    chip_colour,
    choose,
    heat_map,
    mask_picture,
    overlay,
    photo,
    thumbnail,
)


def pixels(picture: Picture | None) -> np.ndarray:
    assert picture is not None
    data = base64.b64decode(picture.uri.partition(",")[2])
    assert len(data) <= LIMIT
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def samples(*tags: tuple[str, ...]) -> list[Sample]:
    return [Sample(f"s{i}", Path(f"{i}.png"), t) for i, t in enumerate(tags)]


def test_pictures_are_small_even_of_pure_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    rgb = thumbnail(Sample("a", tmp_path / "a.png", None))
    assert rgb is not None
    assert max(rgb.shape) == SIDE
    pixels(photo(rgb))
    write_mask(tmp_path / "m.png", noise[..., 0])
    pixels(mask_picture(tmp_path / "m.png", (rgb.shape[0], rgb.shape[1])))


def test_a_mask_has_voc_colours(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [20, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
    write_mask(tmp_path / "m.png", mask)
    shown = pixels(mask_picture(tmp_path / "m.png", mask.shape))
    np.testing.assert_array_equal(shown, voc_palette()[mask])
    assert chip_colour(1) == "#800000"


def test_an_overlay_colours_objects_and_dims_the_rest(tmp_path: Path) -> None:
    rgb = np.full((64, 64, 3), 200, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 2
    write_mask(tmp_path / "m.png", mask)
    shown = pixels(overlay(rgb, tmp_path / "m.png")).astype(int)
    np.testing.assert_allclose(shown[32, 10], [144, 144, 144], atol=6)
    np.testing.assert_allclose(shown[32, 50], [100, 164, 100], atol=6)


@pytest.mark.parametrize("ids", [[1, 3], []])
def test_a_heat_map_is_bright_where_the_best_score_is(tmp_path: Path, ids: list[int]) -> None:
    maps = np.zeros((len(ids), 8, 8), np.float32)
    maps[1:, :, 4:] = 1
    file = tmp_path / "a.npz"
    write_scores(file, ScoreFile(np.array(ids, np.int16), maps, 8, (64, 64)))
    shown = pixels(heat_map(np.zeros((64, 64, 3), np.uint8), file, 0.5)).astype(int)
    assert shown[:, :16].mean() < 20
    assert (shown[:, 48:].mean() > 150) == bool(ids)


def test_missing_files_make_no_picture(tmp_path: Path) -> None:
    rgb = np.zeros((8, 8, 3), np.uint8)
    assert thumbnail(Sample("no", tmp_path / "no.png", None)) is None
    assert heat_map(rgb, tmp_path / "no.npz") is None
    assert mask_picture(None, (8, 8)) is None
    assert overlay(rgb, tmp_path / "no.png") is None


def test_the_choice_covers_all_classes_and_does_not_depend_on_order() -> None:
    names = [f"c{i}" for i in range(9)]
    crowd = samples(*[("c0",)] * 200, *[(name,) for name in names[1:]])
    chosen = choose(crowd, names, 10)
    assert {tag for s in chosen for tag in s.tags or ()} == set(names)
    assert len({s.id for s in chosen}) == 10
    assert choose(reversed(crowd), names, 10) == chosen


def test_the_choice_leaves_out_untagged_and_takes_what_is_there() -> None:
    few = [*samples(("a",), ("b", "a"), ()), Sample("u", Path("u.png"), None)]
    assert {s.id for s in choose(few, ["a", "b"], 10)} == {"s0", "s1"}
    assert choose([], ["a"], 10) == []
