import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weakseg.ops import label_free_threshold


def _cross_entropy(scores: np.ndarray, threshold: float) -> float:
    """The definition, on the scores themselves."""
    low, high = scores[scores < threshold], scores[scores >= threshold]
    return -sum(part.sum() * np.log(part.mean()) for part in (low, high))


@given(st.lists(st.tuples(st.integers(1, 31), st.integers(1, 50)), min_size=2, max_size=20))
def test_it_minimises_the_definition(filled):
    histogram = np.zeros(32)
    for place, count in filled:
        histogram[place] += count
    scores = np.repeat((np.arange(32) + 0.5) / 32, histogram.astype(int))
    curve = label_free_threshold(histogram)
    if len(np.unique(scores)) < 2:
        assert curve is None
        return
    values = [_cross_entropy(scores, t) for t in curve.thresholds]
    np.testing.assert_allclose(curve.values * scores.sum(), values, rtol=1e-9, atol=1e-9)
    assert _cross_entropy(scores, curve.threshold) <= min(values) + 1e-9


def test_two_clusters_are_told_apart_and_zeros_do_not_count():
    histogram = np.zeros(256)
    histogram[20:40] = 100
    histogram[180:220] = 30
    assert 40 / 256 <= label_free_threshold(histogram).threshold <= 180 / 256
    with_zeros = histogram.copy()
    with_zeros[0] = 10**9
    assert label_free_threshold(with_zeros).threshold == label_free_threshold(histogram).threshold


def test_nothing_to_split():
    assert label_free_threshold(np.zeros(256)) is None
    assert label_free_threshold(np.eye(256)[7] * 5) is None
