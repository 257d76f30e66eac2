import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.ops import CRITERIA, colour_contrast, contrast_threshold, label_free_threshold


def _cross_entropy(scores: np.ndarray, threshold: float) -> float:
    low, high = scores[scores < threshold], scores[scores >= threshold]
    return -sum(part.sum() * np.log(part.mean()) for part in (low, high)) / scores.sum()


def _variance(scores: np.ndarray, threshold: float) -> float:
    """Variance within the two parts; the criterion leaves out the whole variance."""
    parts = scores[scores < threshold], scores[scores >= threshold]
    within = sum(len(part) * part.var() for part in parts) / len(scores)
    return within - scores.var()


def _expected_iou(scores: np.ndarray, threshold: float) -> float:
    high = scores[scores >= threshold]
    missed = scores[scores < threshold].sum()
    return -high.sum() / (len(high) + missed)


def _evidence(scores: np.ndarray, threshold: float, zeros: int = 0) -> float:
    return abs(threshold - np.sqrt(scores.mean() * scores.sum() / (len(scores) + zeros)))


DEFINITIONS = {
    "cross-entropy": _cross_entropy,
    "expected-iou": _expected_iou,
    "evidence": _evidence,
    "variance": _variance,
}


@pytest.mark.parametrize("criterion", CRITERIA)
@given(st.lists(st.tuples(st.integers(1, 31), st.integers(1, 50)), min_size=2, max_size=20))
def test_it_minimises_the_definition(criterion, filled):
    histogram = np.zeros(32)
    for place, count in filled:
        histogram[place] += count
    scores = np.repeat((np.arange(32) + 0.5) / 32, histogram.astype(int))
    curve = label_free_threshold(histogram, criterion)
    if len(np.unique(scores)) < 2:
        assert curve is None
        return
    values = [DEFINITIONS[criterion](scores, t) for t in curve.thresholds]
    np.testing.assert_allclose(curve.values, values, rtol=1e-9, atol=1e-9)
    assert DEFINITIONS[criterion](scores, curve.threshold) <= min(values) + 1e-9


def test_evidence_counts_what_shows_nothing():
    histogram = np.zeros(32)
    histogram[[4, 9, 20]] = 30, 20, 10
    scores = np.repeat((np.arange(32) + 0.5) / 32, histogram.astype(int))
    histogram[0] = 500
    curve = label_free_threshold(histogram, "evidence")
    values = [_evidence(scores, t, zeros=500) for t in curve.thresholds]
    np.testing.assert_allclose(curve.values, values)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "evidence"])
def test_two_clusters_are_told_apart_and_zeros_do_not_count(criterion):
    histogram = np.zeros(256)
    histogram[20:40] = 100
    histogram[180:220] = 30
    found = label_free_threshold(histogram, criterion).threshold
    assert 40 / 256 <= found <= 180 / 256
    with_zeros = histogram.copy()
    with_zeros[0] = 10**9
    assert label_free_threshold(with_zeros, criterion).threshold == found


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_to_split(criterion):
    assert label_free_threshold(np.zeros(256), criterion) is None
    assert label_free_threshold(np.eye(256)[7] * 5, criterion) is None


def _share(image: np.ndarray, best: np.ndarray, threshold: float) -> float:
    """Share of the variance of the colours between the two sides, by its definition."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    above = best.ravel() >= threshold
    if above.all() or not above.any():
        return 0.0
    means = lab[above].mean(0) - lab[~above].mean(0)
    return above.mean() * (1 - above.mean()) * (means**2).sum() / lab.var(0).sum()


@given(st.integers(0, 10**6))
def test_colour_contrast_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (9, 13, 3)).astype(np.uint8)
    best = rng.integers(0, 100, (9, 13)) / 100 + 0.005
    found = colour_contrast(image, best)
    expected = [_share(image, best, t / 100) for t in range(100)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_threshold_that_follows_the_colours_is_found():
    rows, columns = np.mgrid[:40, :40]
    distance = np.hypot(rows - 20, columns - 20)
    best = (1 - distance / 40).clip(0.01, 0.99)  # .7 at a radius of 12
    image = np.where((distance < 12)[..., None], (200, 40, 40), (40, 80, 200)).astype(np.uint8)
    assert contrast_threshold(colour_contrast(image, best)).threshold == pytest.approx(
        0.7, abs=0.02
    )


def test_no_contrast_without_colours_or_scores():
    gray, best = np.full((8, 8, 3), 90, np.uint8), np.linspace(0, 0.99, 64).reshape(8, 8)
    assert contrast_threshold(colour_contrast(gray, best)) is None
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert contrast_threshold(colour_contrast(image, np.zeros((8, 8)))) is None


def test_contrast_is_looked_for_where_masks_can_be():
    contrast = np.zeros(100)
    contrast[[2, 60, 75, 90]] = 0.9, 0.5, 0.8, 1.0
    assert contrast_threshold(contrast).threshold == pytest.approx(0.6)
