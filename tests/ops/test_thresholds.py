import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.ops import CRITERIA, agreement_threshold, label_free_threshold


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


def _beyond_chance(one: np.ndarray, other: np.ndarray, threshold: float) -> float:
    a, b = one >= threshold, other >= threshold
    iou = (a & b).sum() / (a | b).sum()
    share = (a.mean() + b.mean()) / 2
    chance = share / (2 - share)
    return (iou - chance) / (1 - chance)


def _joint(one: np.ndarray, other: np.ndarray, steps: int = 20) -> np.ndarray:
    joint = np.zeros((steps, steps), np.int64)
    np.add.at(joint, ((one * steps).astype(int), (other * steps).astype(int)), 1)
    return joint


@given(st.integers(0, 10**6))
def test_agreement_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    one = rng.random(400) ** 2
    other = (one + rng.normal(0, 0.2, 400)).clip(0, 0.999)
    curve = agreement_threshold(_joint(one, other))
    steps = (np.floor(one * 20) / 20, np.floor(other * 20) / 20)
    expected = [-_beyond_chance(*steps, t - 1e-9) for t in curve.thresholds]
    np.testing.assert_allclose(curve.values, expected, atol=1e-9)
    assert curve.threshold == curve.thresholds[np.argmin(expected)]
    assert 0.05 <= curve.threshold < 0.75


def test_scales_that_agree_in_the_pale_rest_alone_set_a_low_threshold():
    rng = np.random.default_rng(0)
    whole = np.zeros((64, 64))
    whole[16:48, 16:48] = 0.2
    ground = rng.random((2, 64, 64)) * 0.1
    known = [np.where(whole > 0, 0.8, g).ravel() for g in ground]
    telling = []
    for g in ground:  # each scale lights up another place of the object
        peaks = np.where(rng.random((64, 64)) < 0.2, 0.9, whole)
        telling.append(np.where(whole > 0, peaks, g).ravel())
    assert agreement_threshold(_joint(*telling)).threshold <= 0.2
    sharp = agreement_threshold(_joint(*known))
    assert -sharp.values[np.abs(sharp.thresholds - 0.7).argmin()] == pytest.approx(1)


def test_no_agreement_without_foreground():
    assert agreement_threshold(_joint(np.zeros(9), np.zeros(9))) is None
    assert agreement_threshold(np.zeros((20, 20))) is None
