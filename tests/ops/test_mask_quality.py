"""An estimate of a mask from its image alone: what lowers it, and by how much."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from weakseg.ops import mask_agreement, mask_quality


def _scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A disc on a ground of another colour, with a little noise, and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :80]
    disc = (rows - 32) ** 2 + (columns - 40) ** 2 < 18**2
    colours = np.where(disc[..., None], (190, 60, 50), (60, 120, 180))
    image = (colours + rng.normal(0, 6, colours.shape)).clip(0, 255).astype(np.uint8)
    return image, disc.astype(np.uint8)


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_worse_masks_of_one_image_come_first():
    image, mask = _scene()
    shifted = [np.roll(mask, step, axis=1) for step in range(0, 16, 3)]
    scores = [mask_quality(image, m).score for m in shifted]
    truth = [_iou(m > 0, mask > 0) for m in shifted]
    assert spearmanr(scores, truth)[0] > 0.9
    assert scores[0] > 0.95


def test_what_spills_to_the_border_and_what_is_empty_come_before():
    image, mask = _scene()
    good = mask_quality(image, mask)
    flooded = mask_quality(image, np.where(np.arange(80) < 40, 1, mask).astype(np.uint8))
    empty = mask_quality(image, np.zeros_like(mask))
    assert good.border == 0
    assert flooded.border == pytest.approx(0.5, abs=0.02)
    assert empty.score == 0 < flooded.score < good.score
    assert flooded.score == pytest.approx(flooded.agreement * (1 - flooded.border))
    assert empty.classes == 0


def test_each_further_class_costs():
    image, mask = _scene()
    both = mask.copy()
    both[:, 40:][mask[:, 40:] > 0] = 2
    assert mask_quality(image, both).classes == 2
    assert mask_quality(image, both).score < mask_quality(image, mask).score / np.sqrt(2) + 1e-6


def test_unsure_pixels_are_neither_compared_nor_foreground():
    image, mask = _scene()
    unsure = mask.copy()
    unsure[:10] = 255
    assert mask_quality(image, unsure).score == pytest.approx(
        mask_quality(image, mask).score, abs=0.02
    )
    assert mask_quality(image, np.full_like(mask, 255)).score == 0


def test_agreement_is_the_mean_iou_of_all_ids():
    one = np.array([[0, 0, 1, 255]], np.uint8)
    other = np.array([[0, 1, 1, 7]], np.uint8)
    assert mask_agreement(one, other) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert mask_agreement(one, one) == 1


def test_another_size_is_refused():
    image, mask = _scene()
    with pytest.raises(ValueError, match="mask is"):
        mask_quality(image, mask[:-1])


def test_the_border_is_as_wide_as_a_pixel_of_80():
    image, _ = _scene()
    mask = np.zeros((64, 80), np.uint8)
    mask[:, 0] = 1
    assert mask_quality(image, mask).border == pytest.approx(64 / (2 * 80 + 2 * 62))
