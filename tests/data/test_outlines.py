"""Outlines to pixels, compared with the COCO API (pycocotools) and with a slow definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as api

from weakseg.data.outlines import fill_polygons, read_runs, run_lengths

SIZE = (37, 53)


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Even-odd rule at each pixel's centre, one ray at a time."""
    filled = np.zeros(size, dtype=bool)
    for row, column in np.ndindex(size):
        x, y, hits = column + 0.5, row + 0.5, 0
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if (ax <= x) != (bx <= x):
                hits += ay + (x - ax) / (bx - ax) * (by - ay) <= y
        filled[row, column] = hits % 2
    return filled


@pytest.mark.parametrize("seed", range(6))
def test_the_centre_of_a_pixel_decides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(-15, 65, (rng.integers(3, 9), 2))
    assert (fill_polygons([points.ravel().tolist()], (23, 31)) == inside(points, (23, 31))).all()


def distance(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N,) from each centre to the outline of a polygon, in pixels."""
    start, along = points, np.roll(points, -1, axis=0) - points
    offset = centres[:, None] - start
    share = (offset * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
    nearest = start + share.clip(0, 1)[..., None] * along
    return np.linalg.norm(centres[:, None] - nearest, axis=-1).min(1)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("seed", range(20))
def test_polygons_agree_with_the_coco_api(seed: int) -> None:
    """The API rounds corners to fifths of a pixel: what differs lies next to an outline."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(rng.integers(1, 4)):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 30)))
        radius = rng.uniform(4, 16, len(angles))
        x = rng.uniform(0, SIZE[1]) + radius * np.cos(angles)
        y = rng.uniform(0, SIZE[0]) + radius * np.sin(angles)
        corners = np.stack([x.clip(0, SIZE[1]), y.clip(0, SIZE[0])], 1)
        parts.append(corners.round(2))
    flat = [part.ravel().tolist() for part in parts]
    theirs = api.decode(api.merge(api.frPyObjects(flat, *SIZE))).astype(bool)
    different = np.argwhere(fill_polygons(flat, SIZE) != theirs)
    assert len(different) <= 0.06 * theirs.sum()
    if len(different):
        centres = different[:, ::-1] + 0.5
        assert np.min([distance(centres, part) for part in parts], axis=0).max() < 0.3


def test_whole_rectangles_and_parts() -> None:
    filled = fill_polygons([[1, 1, 3, 1, 3, 4, 1, 4], [2, 2, 6, 2, 6, 3, 2, 3]], (5, 7))
    expected = np.zeros((5, 7), dtype=bool)
    expected[1:4, 1:3] = expected[2, 2:6] = True
    assert (filled == expected).all()
    assert not fill_polygons([[2, 2, 2, 5, 2, 3]], (9, 9)).any()
    assert fill_polygons([[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]], (4, 4)).all()
    assert not fill_polygons([[90, 1, 95, 1, 95, 3]], (9, 9)).any()


@pytest.mark.parametrize(
    "part", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, float("nan"), 2, 2], ["a"] * 6, [[1]]]
)
def test_bad_polygons(part: list) -> None:
    with pytest.raises(ValueError, match="polygon"):
        fill_polygons([part], (5, 5))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_run_lengths_are_those_of_the_coco_api(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    seed, share = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([0, 0.02, 0.5, 1]))
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = api.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = encoded["counts"].decode()
    runs = run_lengths(text)
    for counts in (text, runs):
        value = {"size": [height, width], "counts": counts}
        assert (read_runs(value, (height, width)) == mask).all()
    assert api.frPyObjects({"size": [height, width], "counts": runs}, height, width) == encoded


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.lists(st.integers(-3, 40)) | st.none() | st.floats())
def test_damaged_run_lengths(counts: object) -> None:
    try:
        mask = read_runs({"size": [4, 5], "counts": counts}, (4, 5))
    except ValueError:
        return
    assert mask.shape == (4, 5) and mask.dtype == bool


def test_run_lengths_of_another_size() -> None:
    for value in ({"size": [5, 4], "counts": [20]}, {"counts": [20]}, [20], {"size": [4, 5]}):
        with pytest.raises(ValueError, match="run lengths"):
            read_runs(value, (4, 5))
