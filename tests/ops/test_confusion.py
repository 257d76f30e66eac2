"""Dataset-level evaluation against a definition spelled out in plain loops."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weakseg.ops import ThresholdSweep, confusion_matrix, metrics
from weakseg.ops.confusion import IGNORE

K = 3


def images(seed: int, count: int = 4, unsure: float = 0.1) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        shape = tuple(rng.integers(1, 12, 2))
        pair = [rng.integers(0, K + 1, shape).astype(np.uint8) for _ in range(2)]
        for mask in pair:
            mask[rng.random(shape) < unsure] = IGNORE
        pairs.append((pair[0], pair[1]))
    return pairs


def reference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """By the definitions of P, T and TP alone, pixel by pixel, in float64."""
    predicted, true, hit = np.zeros(K + 1), np.zeros(K + 1), np.zeros(K + 1)
    for prediction, truth in pairs:
        for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if t == 255:
                continue
            true[t] += 1
            if p != 255:
                predicted[p] += 1
            hit[t] += p == t
    with np.errstate(invalid="ignore", divide="ignore"):
        union = predicted + true - hit
        return {
            "iou": hit / union,
            "class_fp": (predicted - hit) / union,
            "class_fn": (true - hit) / union,
            "precision": hit / predicted,
            "recall": hit / true,
        }


def total(pairs) -> np.ndarray:
    return np.sum([confusion_matrix(p, t, K) for p, t in pairs], axis=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.9]))
def test_metrics_equal_the_definition(seed: int, unsure: float):
    pairs = images(seed, unsure=unsure)
    found, wanted = metrics(total(pairs)), reference(pairs)
    for name in ("iou", "class_fp", "class_fn"):
        np.testing.assert_allclose(getattr(found, name), wanted[name], rtol=1e-12)
    with np.errstate(all="ignore"):
        for name, values in (
            ("miou", wanted["iou"]),
            ("fp", wanted["class_fp"][1:]),
            ("fn", wanted["class_fn"][1:]),
            ("precision", wanted["precision"][1:]),
            ("recall", wanted["recall"][1:]),
        ):
            mean = np.nan if np.isnan(values).all() else np.nanmean(values)
            np.testing.assert_allclose(getattr(found, name), mean, rtol=1e-12)
    known = ~np.isnan(found.iou)
    np.testing.assert_allclose((found.iou + found.class_fp + found.class_fn)[known], 1)


def test_counts_by_hand():
    truth = np.array([[0, 1, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 255, 2]], np.uint8)
    counts = confusion_matrix(prediction, truth, 2)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    found = metrics(counts)
    np.testing.assert_allclose(found.iou, [1, 0.5, np.nan])
    assert found.miou == 0.75  # class 2 is neither true nor predicted: left out
    assert (found.fp, found.fn) == (0.0, 0.5)  # unsure is a miss, not a spill


def test_unsure_in_the_truth_is_left_out_whatever_is_predicted():
    truth = np.full((3, 3), IGNORE, np.uint8)
    assert confusion_matrix(np.arange(9, dtype=np.uint8).reshape(3, 3) % 3, truth, K).sum() == 0


def test_unsure_in_the_prediction_is_wrong_everywhere():
    truth = np.array([[0, 1, 2, 3]], np.uint8)
    found = metrics(confusion_matrix(np.full_like(truth, IGNORE), truth, K))
    assert found.miou == 0
    assert found.fn == 1
    assert np.isnan(found.precision)


def test_absent_classes_are_left_out_and_spilled_ones_are_not():
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    found = metrics(confusion_matrix(np.array([[0, 2, 1, 1]], np.uint8), truth, K))
    np.testing.assert_allclose(found.iou, [0.5, 1, 0, np.nan])
    assert found.miou == pytest.approx(0.5)
    assert found.class_fp[2] == 1


def test_nothing_at_all_has_no_score():
    found = metrics(np.zeros((K + 1, K + 2), np.int64))
    assert np.isnan([found.miou, found.fp, found.fn, found.precision, found.recall]).all()


def test_the_data_set_is_judged_as_a_whole():
    """Not the mean over images: a class that fills one image must not weigh as much as two."""
    pairs = images(3, unsure=0)
    whole = (
        np.concatenate([p.ravel() for p, _ in pairs]),
        np.concatenate([t.ravel() for _, t in pairs]),
    )
    np.testing.assert_array_equal(total(pairs), confusion_matrix(*whole, K))
    means = [metrics(confusion_matrix(p, t, K)).miou for p, t in pairs]
    assert abs(metrics(total(pairs)).miou - np.mean(means)) > 1e-3


@pytest.mark.parametrize("num_classes", [1, 3, 20, 254])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_each_cell_counts_its_own_pixels(num_classes: int, dtype: type):
    """One cell after the other, each from the two masks alone; views and every type of integer."""
    rng = np.random.default_rng(num_classes)
    ids = np.array([*range(num_classes + 1), IGNORE])
    prediction, truth = (rng.choice(ids, (40, 31)).astype(dtype)[::2, ::-1] for _ in range(2))
    counts = confusion_matrix(prediction, truth, num_classes)
    assert counts.shape == (num_classes + 1, num_classes + 2) and counts.dtype == np.int64
    for i in ids[:-1]:
        for column, j in enumerate(ids):
            assert counts[i, column] == ((truth == i) & (prediction == j)).sum()


def test_only_pixels_with_a_truth_are_counted():
    (prediction, truth), *_ = images(7, count=1, unsure=0.5)
    assert confusion_matrix(prediction, truth, K).sum() == (truth != IGNORE).sum()


def test_counts_beyond_float32():
    """A float32 counter stops at 2**24."""
    truth = np.zeros((1, 2**16), np.uint8)
    one = confusion_matrix(truth, truth, 1)
    counts = one * 2**10 + confusion_matrix(np.ones((1, 1), np.uint8), truth[:, :1], 1)
    assert counts[0].tolist() == [2**26, 1, 0]
    assert counts.dtype == np.int64
    assert metrics(counts).miou < 1
    sweep = ThresholdSweep(1, 4)
    side = 2**12 + 1
    sweep.update(np.ones((side, side)), np.ones((side, side), int), np.ones((side, side), np.uint8))
    sweep.update(np.ones((1, 1)), np.ones((1, 1), int), np.ones((1, 1), np.uint8))
    assert sweep.confusions()[0, 1, 1] == side**2 + 1


def test_wrong_masks_are_refused():
    good = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\), truth is \(2, 2\)"):
        confusion_matrix(np.zeros((2, 3), np.uint8), good, K)
    with pytest.raises(ValueError, match="truth holds id 4, but there are 3 classes"):
        confusion_matrix(good, good + 4, K)
    with pytest.raises(ValueError, match="prediction holds id 254"):
        confusion_matrix(good + 254, good, K)
    with pytest.raises(ValueError, match="prediction holds id -1"):
        confusion_matrix(good.astype(int) - 1, good, K)
    with pytest.raises(ValueError, match="truth holds id 257"):
        confusion_matrix(good, good.astype(int) + 257, K)
    with pytest.raises(ValueError, match="255 classes"):
        confusion_matrix(good, good, 255)


def scored(seed: int, dtype: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _, truth in images(seed):
        best = rng.random(truth.shape).astype(np.float32)
        if dtype == "uint8":  # as stored: many scores lie exactly on a threshold
            best = rng.integers(0, 256, truth.shape).astype(np.float32) * np.float32(1 / 255)
        elif dtype == "float16":
            best = best.astype(np.float16).astype(np.float32)
        elif dtype == "ends":
            best = rng.choice(np.float32([0, 0.25, 0.5, 1]), truth.shape)
        found.append((best, rng.integers(1, K + 1, truth.shape), truth))
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 4, 15, 60, 100]),
    st.sampled_from(["float32", "float16", "uint8", "ends"]),
)
@example(0, 100, "uint8")
def test_a_sweep_equals_judging_each_threshold_alone(seed: int, count: int, dtype: str):
    data = scored(seed, dtype)
    sweep = ThresholdSweep(K, count)
    for best, winner, truth in data:
        sweep.update(best, winner, truth)
    np.testing.assert_allclose(sweep.thresholds, np.linspace(0, 1, count, endpoint=False))
    matrices = sweep.confusions()
    assert matrices.dtype == np.int64
    for threshold, matrix in zip(sweep.thresholds, matrices, strict=True):
        alone = [
            confusion_matrix(
                np.where(best > np.float32(threshold), winner, 0).astype(np.uint8), truth, K
            )
            for best, winner, truth in data
        ]
        np.testing.assert_array_equal(matrix, np.sum(alone, axis=0))


def test_every_stored_level_falls_on_the_right_side_of_every_threshold():
    levels = (np.arange(256, dtype=np.float32) * np.float32(1 / 255))[None]
    for count in (20, 60, 100, 255):
        sweep = ThresholdSweep(1, count)
        sweep.update(levels, np.ones(levels.shape, int), np.ones(levels.shape, np.uint8))
        above = [(levels > np.float32(t)).sum() for t in sweep.thresholds]
        np.testing.assert_array_equal(sweep.confusions()[:, 1, 1], above)


def test_a_threshold_for_each_class_equals_judging_its_masks():
    rng = np.random.default_rng(3)
    sweep, total = ThresholdSweep(3, 20), np.zeros((4, 5), np.int64)
    own = np.array([0.1, 0.35, 0.8])
    for _ in range(4):
        best, truth = rng.random((9, 11), np.float32), rng.integers(0, 4, (9, 11)).astype(np.uint8)
        winner = rng.integers(1, 4, (9, 11)).astype(np.uint8)
        sweep.update(best, winner, truth)
        mask = np.where(best > own[winner - 1].astype(np.float32), winner, 0).astype(np.uint8)
        total += confusion_matrix(mask, truth, 3)
    np.testing.assert_array_equal(sweep.confusion(own), total)
    np.testing.assert_array_equal(sweep.confusion(np.full(3, 0.4)), sweep.confusions()[8])


def test_the_best_threshold_is_found():
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    sweep = ThresholdSweep(1, 10)
    sweep.update(np.float32([[0.1, 0.35, 0.65, 0.9]]), np.ones((1, 4), int), truth)
    threshold, found = sweep.best()
    assert threshold == pytest.approx(0.4)  # the first of 0.4, 0.5, 0.6
    assert found.miou == 1


def test_a_sweep_refuses_ids_of_other_classes():
    with pytest.raises(ValueError, match="holds id 3"):
        ThresholdSweep(2).update(np.ones((1, 1)), np.ones((1, 1), int), np.full((1, 1), 3))
