"""Near copies: all that the rule allows are found, whatever the order and the groups."""

from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from weakseg.data.duplicates import near_copies, thumbnail


def scenes(number: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (number, 5, 5)).astype(np.uint8)
    return np.stack([cv2.resize(c, (16, 16), interpolation=cv2.INTER_CUBIC) for c in coarse])


def noisy(small: np.ndarray, seed: int, size: int = 2) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-size, size + 1, small.shape)
    return np.clip(small.astype(int) + noise, 0, 255).astype(np.uint8)


def bits(small: np.ndarray) -> np.ndarray:
    """The definition: signs of the 64 lowest frequencies, by OpenCV's transform."""
    spectrum = cv2.dct(small.astype(np.float64))[:9, :9]
    order = sorted((i + j, i, j) for i in range(9) for j in range(9))[1:65]
    return np.array([spectrum[i, j] > 0 for _, i, j in order])


def slow(thumbnails: list[np.ndarray], groups: list[int]) -> set[tuple[int, int]]:
    """All pairs by the definition, at most 7 bits apart so that the index must find them."""
    found = set()
    for i, j in combinations(range(len(thumbnails)), 2):
        a, b = thumbnails[i], thumbnails[j]
        apart = (bits(a) != bits(b)).sum()
        alike = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        if groups[i] != groups[j] and apart <= 7 and alike >= 0.9:
            found.add((i, j))
    return found


def test_agrees_with_the_definition() -> None:
    originals = scenes(60)
    thumbnails = [*originals, *noisy(originals[:30], 1), *noisy(originals[:10], 2, 60)]
    groups = [0] * 60 + [1] * 40
    expected, found = slow(thumbnails, groups), set(near_copies(thumbnails, groups))
    assert len(expected) >= 30 and len(found) >= 30
    for i, j in expected:  # its own pair, or one with a copy that is at least as close
        assert {i, j} & {k for pair in found for k in pair}
    assert {(i, 60 + i) for i in range(30)} <= found
    for i, j in found:
        assert (bits(thumbnails[i]) != bits(thumbnails[j])).sum() <= 9


def test_frequencies_of_like_signs_alone_are_no_copy() -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (9, 9))
    found = []
    for strong in ((0, 1), (1, 0)):
        spectrum = np.zeros((16, 16))
        spectrum[:9, :9] = 15 * signs
        spectrum[strong] *= 8  # so that they correlate by two thirds
        spectrum[0, 0] = 16 * 128  # a mean of 128
        found.append(cv2.idct(spectrum).clip(0, 255).round().astype(np.uint8))
    assert (bits(found[0]) != bits(found[1])).sum() <= 7
    assert near_copies(found, [0, 1]) == []
    assert near_copies([found[0], noisy(found[0], 0, 1)], [0, 1]) == [(0, 1)]


def test_the_closest_copy_is_named() -> None:
    originals = scenes(20)
    thumbnails = [*originals, *noisy(originals[:1], 1, 30), *noisy(originals[:1], 2, 1)]
    assert (0, 21) in near_copies(thumbnails, [0] * 20 + [1, 1])


def test_the_order_of_images_does_not_matter() -> None:
    thumbnails = [*scenes(50), *noisy(scenes(50), 3)]
    groups = [0] * 50 + [1] * 50
    order = np.random.default_rng(0).permutation(100)
    turned = near_copies([thumbnails[k] for k in order], [groups[k] for k in order])
    there = {tuple(sorted((int(order[i]), int(order[j])))) for i, j in turned}
    assert there == set(near_copies(thumbnails, groups)) >= {(i, 50 + i) for i in range(50)}


def test_a_film_is_bounded() -> None:
    film = [frame for k in range(3000) for frame in noisy(scenes(1), k, 2)]
    found = near_copies(film, [k % 2 for k in range(3000)])
    assert {k for pair in found for k in pair} == set(range(3000)) and len(found) <= 3000


def test_one_group_and_no_images() -> None:
    assert near_copies([], []) == [] and near_copies([None, None], [0, 1]) == []
    assert near_copies([*scenes(3), *scenes(3)], [0] * 6) == []


def test_flat_images_have_no_thumbnail() -> None:
    assert thumbnail(np.full((50, 70), 90, np.uint8)) is None
    assert thumbnail(np.zeros((1, 1), np.uint8)) is None
    ramp = np.tile(np.arange(0, 140, 2, dtype=np.uint8), (50, 1))
    assert thumbnail(ramp).shape == (16, 16)


@pytest.mark.realdata
def test_different_photographs_are_no_copies(voc_subset: Path) -> None:
    files = sorted((voc_subset / "JPEGImages").glob("*.jpg"))
    assert files
    thumbnails = []
    for file in files[:400]:
        with Image.open(file) as image:
            image.draft("L", (64, 64))
            thumbnails.append(thumbnail(np.asarray(image.convert("L"))))
    assert near_copies(thumbnails, range(len(thumbnails))) == []
