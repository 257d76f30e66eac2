"""Superpixels from class probabilities, and the vote in them."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from weakseg.ops.superpixels import majority_vote, superpixels

CROSS = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def squares(*corners: tuple[int, int, int, int], size: tuple[int, int] = (40, 48)) -> Tensor:
    """(1, 1 + n, H, W): background and n classes, each sure inside its box (x0, y0, x1, y1)."""
    maps = torch.zeros(1, 1 + len(corners), *size)
    for k, (x0, y0, x1, y1) in enumerate(corners):
        maps[0, k + 1, y0:y1, x0:x1] = 1
    maps[:, 0] = 1 - maps[:, 1:].amax(1)
    return maps


def blobs(seed: int, classes: int, size: tuple[int, int]) -> Tensor:
    """(2, classes, H, W) smooth random probabilities."""
    noise = torch.randn(2, classes, 4, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(6 * noise, size, mode="bicubic").softmax(1)


def vote_by_loop(
    labels: np.ndarray, regions: np.ndarray, ignore: int, overwrite: bool, unsure_votes: bool = True
):
    """The definition: one image after the other, one region after the other."""
    out = labels.copy()
    for image, region, result in zip(labels, regions, out, strict=True):
        for r in np.unique(region):
            here = region == r
            if r == 0:
                result[here & (image == 0)] = ignore
                continue
            counts = Counter(int(v) for v in image[here] if v != ignore or unsure_votes)
            if counts:
                most = [v for v, n in counts.items() if n == max(counts.values())]
                winner = min(most, key=lambda v: (v == ignore, v))
                result[here if overwrite else here & (image == ignore)] = winner
    return out


# -- superpixels


def test_two_squares_are_two_regions():
    found = superpixels(squares((4, 4, 18, 30), (28, 8, 44, 36)))[0]
    inside = {int(found[15, 10]), int(found[20, 36])}
    assert len(inside) == 2
    assert int(found[0, 0]) not in inside
    assert (found[:2] == found[0, 0]).all()
    assert found.unique().tolist() == [0, 1, 2, 3]
    for x0, y0, x1, y1, y, x in ((4, 4, 18, 30, 15, 10), (28, 8, 44, 36, 20, 36)):
        region = found == found[y, x]
        square = torch.zeros_like(region)
        square[y0 - 2 : y1 + 2, x0 - 2 : x1 + 2] = True
        assert not (region & ~square).any()
        square[:] = False
        square[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True
        assert region[square].all()


def test_regions_are_the_components_between_cannys_edges():
    maps = blobs(0, 4, (60, 52))
    for b, found in enumerate(superpixels(maps).numpy()):
        edge = np.zeros((60, 52), bool)
        for level in np.rint(maps[b].numpy() * np.float32(255)).astype(np.uint8):
            edge |= cv2.Canny(cv2.GaussianBlur(level, (5, 5), 0), 10, 100) > 0
        assert edge.any()
        np.testing.assert_array_equal(found == 0, edge)
        expected, count = ndimage.label(~edge, CROSS)
        assert found.max() == count
        pairs = np.unique(np.stack([expected.ravel(), found.ravel()]), axis=1)
        assert pairs.shape[1] == count + 1  # one of ours for each of theirs


def test_two_classes_that_touch_are_parted_by_classes_and_not_by_foreground():
    maps = squares((4, 4, 24, 36), (24, 4, 44, 36))
    by_class, by_foreground = superpixels(maps)[0], superpixels(maps, edges="foreground")[0]
    assert by_class[20, 10] != by_class[20, 38]
    assert by_foreground[20, 10] == by_foreground[20, 38] != by_foreground[0, 0]


def test_foreground_is_the_maximum_without_the_background():
    maps = blobs(1, 4, (40, 40))
    alone = superpixels(maps[:, 1:].amax(1, keepdim=True))
    assert torch.equal(superpixels(maps, edges="foreground"), alone)
    assert not torch.equal(superpixels(maps), alone)


def test_thresholds_of_canny():
    faint = squares((8, 8, 30, 30)) * 0.2
    assert superpixels(faint).unique().tolist() == [0, 1, 2]
    assert superpixels(faint, high=2000).unique().tolist() == [1]


def test_absent_classes_and_no_classes_have_no_edges():
    maps = squares((8, 8, 30, 30))
    more = torch.cat([maps, torch.zeros(1, 3, 40, 48)], 1)
    assert torch.equal(superpixels(more), superpixels(maps))
    for edges in ("classes", "foreground"):
        for classes in (0, 1):
            assert superpixels(torch.ones(2, classes, 5, 6), edges=edges).eq(1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (33, 47)])
def test_any_size_and_one_image_after_the_other(size):
    maps = blobs(2, 3, size)
    found = superpixels(maps)
    assert found.shape == (2, *size)
    assert found.dtype == torch.int64
    for b in range(2):
        assert torch.equal(superpixels(maps[b : b + 1])[0], found[b])


def test_layout_and_precision_of_the_input():
    maps = blobs(3, 4, (40, 44))
    kept = maps.clone()
    found = superpixels(maps)
    assert torch.equal(maps, kept)
    assert torch.equal(superpixels(maps.to(memory_format=torch.channels_last)), found)
    assert torch.equal(superpixels(maps.mT.contiguous().mT), found)
    half = maps.half()
    assert torch.equal(superpixels(half), superpixels(half.float()))
    assert torch.equal(superpixels(3 * maps - 1), superpixels((3 * maps - 1).clamp(0, 1)))


def test_superpixels_says_what_to_pass():
    maps = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="add the batch"):
        superpixels(maps[0])
    with pytest.raises(ValueError, match="pass 'classes' or 'foreground'"):
        superpixels(maps, edges="both")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass probabilities.float"):
        superpixels(maps.long())
    with pytest.raises(TypeError, match="torch.from_numpy"):
        superpixels(maps.numpy())  # type: ignore[arg-type]


# -- vote


def test_vote_by_hand():
    regions = torch.tensor([[[1, 1, 1, 0, 2, 2], [1, 1, 1, 0, 2, 3]]])
    labels = torch.tensor([[[5, 5, 255, 0, 255, 7], [0, 255, 5, 9, 255, 255]]], dtype=torch.uint8)
    # 5 wins region 1 and its 0 stays; background on the edge becomes unsure; region 2 is mostly
    # unsure, so its 7 wins only among certain pixels; region 3 knows nothing
    expected = torch.tensor([[[5, 5, 5, 255, 255, 7], [0, 5, 5, 9, 255, 255]]], dtype=torch.uint8)
    found = majority_vote(labels, regions)
    assert torch.equal(found, expected)
    assert found.dtype == torch.uint8
    certain = expected.clone()
    certain[0, :, 4] = 7
    assert torch.equal(majority_vote(labels, regions, unsure_votes=False), certain)
    certain[0, 1, 0] = 5
    assert torch.equal(majority_vote(labels, regions, overwrite=True, unsure_votes=False), certain)
    expected[0, 1, 0], expected[0, 0, 5] = 5, 255
    assert torch.equal(majority_vote(labels, regions, overwrite=True), expected)


def test_the_smaller_label_wins_a_tie():
    labels = torch.tensor([[[3, 2, 255, 2, 3]]])
    assert majority_vote(labels, torch.ones_like(labels))[0, 0, 2] == 2


@pytest.mark.parametrize("ignore", [255, 0])
def test_any_label_wins_a_tie_with_unsure(ignore):
    labels = torch.tensor([[[3, ignore, 3, ignore]]])
    assert majority_vote(labels, torch.ones_like(labels), ignore).eq(3).all()


def test_regions_of_two_images_do_not_share_votes():
    labels = torch.tensor([[[1, 1, 255]], [[2, 255, 255]], [[2, 2, 255]]])
    found = majority_vote(labels, torch.ones_like(labels))
    assert found.tolist() == [[[1, 1, 1]], [[2, 255, 255]], [[2, 2, 2]]]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    classes=st.integers(1, 5),
    count=st.integers(0, 6),
    ignore=st.sampled_from([255, 21, 0]),
    overwrite=st.booleans(),
    unsure_votes=st.booleans(),
)
def test_vote_against_the_definition(seed, shape, classes, count, ignore, overwrite, unsure_votes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape)
    labels[rng.random(shape) < rng.random()] = ignore
    regions = rng.integers(0, count + 1, shape)
    given_labels = torch.from_numpy(labels)
    how = {"overwrite": overwrite, "unsure_votes": unsure_votes}
    found = majority_vote(given_labels, torch.from_numpy(regions), ignore, **how)
    np.testing.assert_array_equal(found, vote_by_loop(labels, regions, ignore, **how))
    np.testing.assert_array_equal(given_labels, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_vote_keeps_the_type(dtype):
    labels = torch.tensor([[[4, 255], [4, 4]]]).to(dtype)
    found = majority_vote(labels, torch.ones(1, 2, 2, dtype=torch.int32))
    assert found.dtype == dtype
    assert found.eq(4).all()


def test_vote_in_nothing():
    empty = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert majority_vote(empty, empty).shape == (0, 4, 4)
    unsure = torch.full((1, 4, 4), 255)
    assert torch.equal(majority_vote(unsure, torch.ones_like(unsure)), unsure)


def test_vote_says_what_to_pass():
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="add the batch"):
        majority_vote(labels[0], labels[0])
    with pytest.raises(ValueError, match="pass superpixels of the labels' size"):
        majority_vote(labels, labels[:, :3])
    with pytest.raises(ValueError, match="pass values from 0"):
        majority_vote(labels - 1, labels)
    with pytest.raises(ValueError, match="pass labels.long"):
        majority_vote(labels.to(torch.int8), labels)
    with pytest.raises(TypeError, match="pass labels.long"):
        majority_vote(labels.float(), labels)
    with pytest.raises(TypeError, match="pass superpixels.long"):
        majority_vote(labels, labels.bool())
    with pytest.raises(TypeError, match="torch.from_numpy"):
        majority_vote(labels.numpy(), labels)  # type: ignore[arg-type]


def test_uncertain_rim_of_an_object_takes_the_objects_label():
    """The whole step of EdgePredictMix: certainty first, then the vote fills what is left."""
    maps = squares((10, 8, 36, 32))
    truth = maps.argmax(1)
    unsure = torch.zeros_like(truth, dtype=torch.bool)
    unsure[:, 20:32, 10:36] = True  # the lower half of the object
    unsure[:, 34:, :] = True  # and some of the background
    found = majority_vote(truth.masked_fill(unsure, 255), superpixels(maps))
    regions = superpixels(maps)
    assert torch.equal(found[regions > 0], regions.eq(regions[0, 20, 20]).long()[regions > 0])
    assert found[truth == 0].ne(1).sum() > 0
    assert found.ne(255).sum() > truth.masked_fill(unsure, 255).ne(255).sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_results_stay_on_the_gpu():
    maps = blobs(4, 3, (40, 40))
    found = superpixels(maps.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), superpixels(maps))
    labels = maps.argmax(1).masked_fill(maps.amax(1) < 0.7, 255)
    voted = majority_vote(labels.cuda(), found)
    assert voted.is_cuda
    assert torch.equal(voted.cpu(), majority_vote(labels, found.cpu()))
