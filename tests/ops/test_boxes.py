"""Boxes of score maps and the measures of localisation."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou as torchvision_iou

from weakseg.ops.boxes import (
    best_overlaps,
    box_iou,
    boxes,
    component_boxes,
    gt_known_localisation,
    largest_box,
    max_box_accuracy,
    top1_localisation,
)


def drawn(*parts: tuple[tuple[int, int, int, int], float], size=(24, 30)) -> Tensor:
    """(H, W): each box (x0, y0, x1, y1) filled with its value."""
    score_map = torch.zeros(size)
    for (x0, y0, x1, y1), value in parts:
        score_map[y0:y1, x0:x1] = value
    return score_map


def truth(*found: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(found)


def box_by_flooding(scores: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """The definition: flood each component over 8 neighbours, keep the one of most pixels."""
    rows, columns = scores.shape
    peak = scores.max()
    left = scores > np.float32(threshold) * peak if peak > 0 else np.zeros_like(scores, bool)
    best, key = (0, 0, 0, 0), (0, 0, 0)
    for y, x in np.argwhere(left):
        if not left[y, x]:
            continue
        left[y, x] = False
        queue, pixels = deque([(int(y), int(x))]), []
        while queue:
            v, u = queue.popleft()
            pixels.append((v, u))
            for b in range(max(v - 1, 0), min(v + 2, rows)):
                for a in range(max(u - 1, 0), min(u + 2, columns)):
                    if left[b, a]:
                        left[b, a] = False
                        queue.append((b, a))
        ys, xs = zip(*pixels, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        if (len(pixels), -box[1], -box[0]) > key:
            best, key = box, (len(pixels), -box[1], -box[0])
    return best


# -- boxes


def test_box_of_a_rectangle_is_half_open():
    box = largest_box(drawn(((3, 5, 11, 9), 0.7)))
    assert box == (3, 5, 11, 9)
    assert all(type(v) is int for v in box)
    assert largest_box(torch.ones(4, 7)) == (0, 0, 7, 4)
    assert largest_box(torch.ones(1, 1)) == (0, 0, 1, 1)


def test_threshold_is_a_share_of_the_maximum_and_exclusive():
    score_map = drawn(((0, 0, 20, 20), 0.5), ((4, 4, 8, 8), 2.0))
    assert largest_box(score_map, 0.2) == (0, 0, 20, 20)
    assert largest_box(score_map, 0.25) == (4, 4, 8, 8)
    assert largest_box(score_map, 0) == (0, 0, 20, 20)
    assert largest_box(score_map * 1024, 0.2) == (0, 0, 20, 20)


def test_largest_is_by_pixels_not_by_the_area_of_the_box():
    ring = drawn(((0, 0, 14, 14), 1.0), ((1, 1, 13, 13), 0.0), ((16, 2, 26, 10), 1.0))
    assert largest_box(ring) == (16, 2, 26, 10)  # 80 pixels against the 52 of a box of 196


def test_corners_connect():
    stairs = torch.eye(6)
    assert largest_box(stairs) == (0, 0, 6, 6)


def test_of_equals_the_higher_then_the_left_one():
    assert largest_box(drawn(((20, 2, 24, 6), 1.0), ((2, 10, 6, 14), 1.0))) == (20, 2, 24, 6)
    assert largest_box(drawn(((20, 2, 24, 6), 1.0), ((2, 2, 6, 6), 1.0))) == (2, 2, 6, 6)


def test_leftmost_is_by_the_box_and_not_by_the_first_pixel():
    hook = drawn(((10, 0, 11, 4), 1.0), ((0, 3, 10, 4), 1.0))
    block = drawn(((2, 0, 9, 2), 1.0))
    assert hook.sum() == block.sum()
    assert largest_box(hook + block) == (0, 0, 11, 4)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_no_box_without_positive_scores(value):
    score_map = torch.full((5, 6), value)
    score_map[0, 0] -= 1
    assert largest_box(score_map) == (0, 0, 0, 0)
    assert boxes(score_map[None, None]).eq(0).all()


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    threshold=st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.99]),
)
def test_box_against_flooding(seed, size, threshold):
    scores = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    assert largest_box(torch.from_numpy(scores), threshold) == box_by_flooding(scores, threshold)


def test_a_batch_is_its_maps():
    maps = torch.randn(2, 3, 17, 19)
    kept = maps.clone()
    found = boxes(maps, 0.6)
    assert found.shape == (2, 3, 4)
    assert found.dtype == torch.int64
    for b in range(2):
        for k in range(3):
            assert tuple(found[b, k].tolist()) == largest_box(maps[b, k], 0.6)
    assert torch.equal(maps, kept)
    assert torch.equal(boxes(maps.mT.contiguous().mT, 0.6), found)
    assert torch.equal(boxes(maps.bfloat16(), 0.6), boxes(maps.bfloat16().float(), 0.6))
    assert boxes(maps[:, :0]).shape == (2, 0, 4)


def test_a_mirrored_map_has_the_mirrored_box():
    maps = torch.rand(4, 2, 15, 21)
    x0, y0, x1, y1 = boxes(maps, 0.7).unbind(-1)
    mirrored = torch.stack([21 - x1, y0, 21 - x0, y1], -1)
    assert torch.equal(boxes(maps.flip(-1), 0.7), mirrored)


# -- overlap


def test_iou_by_hand():
    a = truth((0, 0, 4, 4), (0, 0, 0, 0))
    b = truth((0, 0, 4, 4), (2, 0, 6, 4), (4, 0, 8, 4), (0, 0, 0, 0))
    expected = torch.tensor([[1, 8 / 24, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(box_iou(a, b), expected)


def test_iou_of_boxes_apart_in_both_directions_is_zero():
    assert box_iou(truth((0, 0, 2, 2)), truth((5, 5, 9, 9))).item() == 0


def test_iou_against_torchvision():
    corners = torch.randint(0, 50, (30, 2, 2))
    given_boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], 1)
    a, b = given_boxes[:12], given_boxes[12:]
    found = box_iou(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torchvision_iou(a.double(), b.double()).float())
    torch.testing.assert_close(box_iou(b, a).T, found)
    assert box_iou(a[:0], b).shape == (0, 18)


# -- measures

MAPS = [
    drawn(((2, 2, 22, 12), 0.3), ((2, 2, 12, 12), 1.0)),  # right below 0.3, half of it above
    drawn(((0, 0, 30, 24), 0.1), ((5, 5, 10, 10), 1.0)),  # right above 0.1 only
    drawn(size=(8, 8)),  # empty: never right
]
TRUTH = [truth((2, 2, 22, 12)), truth((5, 5, 10, 10)), truth((0, 0, 8, 8))]


def test_max_box_accuracy_by_hand():
    found = max_box_accuracy(MAPS, TRUTH, thresholds=(0.05, 0.2, 0.5), iou=0.6)
    np.testing.assert_allclose(found.curves, [[1 / 3, 2 / 3, 1 / 3]])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.oracle_thresholds == (0.2,)
    assert found.ious == (0.6,)
    np.testing.assert_array_equal(found.thresholds, [0.05, 0.2, 0.5])


def test_the_lowest_of_the_best_thresholds():
    found = max_box_accuracy(MAPS, TRUTH)
    assert found.oracle_thresholds == (0.1,)
    assert len(found.thresholds) == 100


def test_an_overlap_of_exactly_the_limit_is_right():
    for limit, width in ((0.5, 5), (0.3, 3), (0.7, 7)):
        score_map = drawn(((0, 0, width, 10), 1.0))
        assert gt_known_localisation([score_map], [truth((0, 0, 10, 10))], iou=limit) == 1
        assert gt_known_localisation([score_map], [truth((0, 0, 10, 10))], iou=limit + 1e-4) == 0


def test_several_ious_are_averaged_each_at_its_best():
    score_map = drawn(((0, 0, 10, 10), 1.0), ((10, 0, 20, 10), 0.5))
    half = [truth((0, 0, 20, 10))]
    whole = max_box_accuracy([score_map], half, (0.2, 0.8), iou=(0.3, 0.5, 0.7))
    np.testing.assert_array_equal(whole.curves, [[1, 1], [1, 1], [1, 0]])
    assert whole.accuracy == 1
    worse = max_box_accuracy([score_map], half, (0.8,), iou=(0.3, 0.5, 0.7))
    assert worse.accuracy == pytest.approx(2 / 3)


def test_each_iou_has_a_threshold_of_its_own():
    maps = [
        drawn(((0, 0, 10, 10), 0.3), ((0, 0, 8, 10), 1.0)),  # 0.5 of the truth, then 0.4
        drawn(((0, 0, 30, 10), 0.3), ((0, 0, 18, 10), 1.0)),  # 20 / 30, then 0.9
    ]
    found = max_box_accuracy(maps, [truth((0, 0, 20, 10))] * 2, (0.1, 0.5), iou=(0.45, 0.8))
    np.testing.assert_array_equal(found.curves, [[1, 0.5], [0, 0.5]])
    assert found.accuracy == 0.75
    assert found.oracle_thresholds == (0.1, 0.5)


def test_any_of_the_true_boxes_counts():
    score_map = drawn(((2, 2, 8, 8), 1.0))
    assert gt_known_localisation([score_map], [truth((20, 2, 28, 8))]) == 0
    assert gt_known_localisation([score_map], [truth((20, 2, 28, 8), (2, 2, 8, 8))]) == 1


def test_every_component_may_fit():
    score_map = drawn(((0, 0, 10, 10), 1.0), ((20, 2, 26, 8), 1.0))
    small = [truth((20, 2, 26, 8))]
    assert max_box_accuracy([score_map], small).accuracy == 0
    assert max_box_accuracy([score_map], small, every_component=True).accuracy == 1


def test_gt_known_is_one_point_of_the_curve():
    maps = torch.rand(6, 12, 12) ** 4
    given_truth = [truth((1, 1, 12, 11))] * 6
    for threshold in (0.1, 0.2, 0.4):
        curve = max_box_accuracy(maps, given_truth, (threshold,)).curves
        assert gt_known_localisation(maps, given_truth, threshold) == curve[0, 0]


def test_top1_needs_the_class_and_the_box():
    maps, given_truth = MAPS[:2] * 2, TRUTH[:2] * 2
    classes = torch.tensor([3, 3, 5, 5])
    assert gt_known_localisation(maps, given_truth) == 1
    for predicted, expected in (([3, 3, 5, 5], 1), ([3, 1, 5, 2], 0.5), ([0, 0, 0, 0], 0)):
        found = top1_localisation(maps, given_truth, torch.tensor(predicted), classes)
        assert found == expected
    assert top1_localisation(maps, given_truth, classes, classes, threshold=0.5) == 1
    assert top1_localisation(maps, given_truth, classes, classes, threshold=0.5, iou=0.6) == 0.5


def test_overlaps_of_one_map_are_those_of_the_sequence():
    generator = torch.Generator().manual_seed(3)
    score_map = torch.rand(12, 15, generator=generator)
    given_truth, steps = truth((0, 0, 6, 6), (5, 5, 15, 12)), (0.0, 0.3, 0.6, 0.9)
    largest, every = best_overlaps(score_map, given_truth, steps)
    for i, step in enumerate(steps):
        for found, all_parts in ((largest, False), (every, True)):
            exact = [
                max_box_accuracy([score_map], [given_truth], [step], iou, every_component=all_parts)
                for iou in (float(found[i]), float(found[i]) + 1e-3)
            ]
            assert [e.accuracy for e in exact] == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least one box"):
        best_overlaps(score_map, torch.zeros(0, 4), steps)


def test_components_of_a_mask_are_boxes_the_largest_first():
    mask = np.zeros((8, 10), dtype=bool)
    mask[1:3, 1:3] = mask[3, 3] = True  # the corner connects
    mask[5:7, 5:10] = True
    assert component_boxes(mask).tolist() == [[5, 5, 10, 7], [1, 1, 4, 4]]
    assert component_boxes(np.zeros((3, 3), bool)).shape == (0, 4)
    assert component_boxes(np.ones((3, 4), bool)).tolist() == [[0, 0, 4, 3]]


def test_refusals_say_what_to_pass():
    score_map, one = torch.rand(4, 4), [truth((0, 0, 2, 2))]
    with pytest.raises(ValueError, match="pass one class of one image"):
        largest_box(score_map[None])
    with pytest.raises(TypeError, match="pass score_map.float"):
        largest_box(score_map.long())
    with pytest.raises(TypeError, match="torch.from_numpy"):
        largest_box(score_map.numpy())  # type: ignore[arg-type]
    for threshold in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share of the maximum"):
            largest_box(score_map, threshold)
    with pytest.raises(ValueError, match="add the batch"):
        boxes(score_map[None])
    with pytest.raises(ValueError, match=r"pass b.reshape\(-1, 4\)"):
        box_iou(one[0], one[0][0])
    with pytest.raises(ValueError, match="pass as many of each"):
        gt_known_localisation([score_map, score_map], one)
    with pytest.raises(ValueError, match="pass as many of each"):
        gt_known_localisation([], [])
    with pytest.raises(ValueError, match="leave maps without a box out"):
        gt_known_localisation([score_map], [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="pass x0 < x1"):
        gt_known_localisation([score_map], [truth((3, 0, 3, 2))])
    with pytest.raises(ValueError, match="at least one threshold"):
        max_box_accuracy([score_map], one, thresholds=())
    with pytest.raises(ValueError, match="pass one class id"):
        top1_localisation([score_map], one, torch.tensor([1, 2]), torch.tensor([1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_maps_on_the_gpu():
    maps = torch.rand(2, 3, 17, 19)
    found = boxes(maps.cuda(), 0.6)
    assert found.is_cuda
    assert torch.equal(found.cpu(), boxes(maps, 0.6))
    on_gpu = [b.cuda() for b in TRUTH]
    assert max_box_accuracy([m.cuda() for m in MAPS], on_gpu).accuracy == pytest.approx(2 / 3)
