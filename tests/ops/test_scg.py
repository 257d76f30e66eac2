"""Self-correlation maps: against the definition, published outputs, and known answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops.cells import Cells, place
from weakseg.ops.scg import self_correlation


def unit_range(values, axis=None):
    low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
    return (values - low) / (high - low + 1e-10) * (high - low > 1e-5 * high)


def columns_to_one(matrix):
    return matrix / (matrix.sum(0, keepdims=True) + 1e-10)


def definition(
    cams,
    features,
    first=0.5,
    second=0.1,
    foreground=0.3,
    background=0.05,
    order=2,
    iterations=1,
    weight=1.0,
):
    """Level by level and class by class on whole matrices, float64; (K, h, w), [(C, h, w)]."""
    pixels = cams[0].size
    total = np.zeros((pixels, pixels))
    for level in features:
        level = level.reshape(len(level), pixels).astype(np.float64)
        level = level / (np.linalg.norm(level, axis=0) + 1e-10)
        similar = np.maximum(level.T @ level, 0)
        similar[similar < first] = 0
        hsc = columns_to_one(similar)
        if order == 2:
            others = similar.copy()
            np.fill_diagonal(others, 0)
            others = columns_to_one(others)
            for _ in range(iterations):
                others = columns_to_one(others @ others)
            others[others < second / pixels] = 0
            hsc = np.maximum(hsc, weight * others)
        total += columns_to_one(hsc)
    total = unit_range(total / len(features), 0)
    refined = []
    for scores in cams.reshape(len(cams), pixels):
        sums = [np.zeros(pixels), np.zeros(pixels)]
        for i, certain in enumerate((scores >= foreground, scores <= background)):
            if certain.any():
                sums[i] = unit_range(total[:, certain].sum(1))
        lead = np.maximum(sums[0] - sums[1], 0)
        refined.append(unit_range(lead) * (lead.max() > 1e-5))
    return np.stack(refined).reshape(cams.shape)


def talk(cams, features, foreground=0.3, background=0.05, order=2, weight=1.0):
    """The talk's equations on whole matrices, float64; (K, h, w), [(C, h, w)]."""
    pixels = cams[0].size
    hsc = np.zeros((pixels, pixels))
    for level in features:
        level = level.reshape(len(level), pixels).astype(np.float64)
        level = level / (np.linalg.norm(level, axis=0) + 1e-10)
        cosine = np.einsum("ci,cj->ij", level, level)
        second = np.einsum("ik,kj->ij", cosine, cosine) / pixels
        second = unit_range(second, 1) if order == 2 else 0
        hsc += np.maximum(np.maximum(cosine, 0), weight * second) / len(features)
    maps = []
    for scores in cams.reshape(len(cams), pixels):
        inside, outside = scores > foreground, scores < background
        lead = hsc[inside].mean(0) if inside.any() else np.zeros(pixels)
        maps.append(np.maximum(lead - (hsc[outside].mean(0) if outside.any() else 0), 0))
    return np.stack(maps).reshape(cams.shape)


def inputs(batch=1, classes=3, size=(9, 7), channels=(6, 10)):
    """Class maps with certain, unsure and empty pixels; features that partly agree."""
    cams = F.interpolate(torch.rand(batch, classes, 3, 3), size, mode="bicubic")
    cams = (cams - 0.4).clamp(min=0)
    cams = cams / cams.amax((-2, -1), keepdim=True)
    features = []
    for count in channels:
        smooth = F.interpolate(torch.rand(batch, count, 3, 3), size, mode="bicubic")
        features.append((smooth + 0.5 * torch.rand(batch, count, *size) - 0.6).relu())
    return cams, features


def same_as_definition(cams, features, settings, **more):
    found = self_correlation(cams, features, **settings, **more)
    names = {
        "first_threshold": "first",
        "second_threshold": "second",
        "second_weight": "weight",
    }
    settings = {names.get(key, key): value for key, value in settings.items()}
    reference = talk if settings.pop("form", "code") == "talk" else definition
    for b in range(len(cams)):
        expected = reference(cams[b].numpy(), [f[b].numpy() for f in features], **settings)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"order": 1},
        {"iterations": 2},
        {"iterations": 3, "second_threshold": 0.8},
        {"second_weight": 3.0},
        {"second_threshold": 0.9, "first_threshold": 0.7},
        {"first_threshold": 0.0, "foreground": 0.6, "background": 0.2},
    ],
)
def test_follows_the_definition(changed):
    cams, features = inputs(2)
    same_as_definition(cams, features, changed, block=11)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "changed",
    [{}, {"order": 1}, {"second_weight": 0.5}, {"foreground": 0.6, "background": 0.2}],
)
def test_follows_the_talk(changed, signed):
    """Features without a ReLU have negative cosines: SC1 cuts them off, SC2 does not."""
    cams, features = inputs(2, channels=(6, 10, 8))
    if signed:
        features = [f - f.mean((2, 3), keepdim=True) for f in features]
    same_as_definition(cams, features, {"form": "talk", **changed}, block=11)


def test_talk_by_hand():
    """Three pixels, two of one look and the third between: c_12 = 1, c_13 = c_23 = .6.

    Rows of C C / 3: pixels 1 and 2 (2.36, 2.36, 1.8) / 3, pixel 3 (1.8, 1.8, 1.72) / 3. Over their
    ranges: (1, 1, 0) and (1, 1, 0). So HSC is (1, 1, .6) and (1, 1, 1).
    """
    features = torch.tensor([[[[1.0, 2.0, 0.6]], [[0.0, 0.0, 0.8]]]])
    cams = torch.tensor([[[[1.0, 0.2, 0.0]], [[0.0, 0.2, 1.0]], [[0.3, 0.05, 0.04]]]])
    found = self_correlation(cams, [features], form="talk")
    torch.testing.assert_close(found[0, 0], torch.tensor([[0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found[0, 1], torch.tensor([[0.0, 0.0, 0.4]]))
    assert not found[0, 2].any(), "a score of exactly .3 is not certain foreground"


def test_the_talk_has_no_thresholds():
    cams, features = inputs()
    plain = self_correlation(cams, features, form="talk")
    none = {"first_threshold": 0.0, "second_threshold": 0.0}
    assert torch.equal(self_correlation(cams, features, form="talk", **none), plain)
    for setting in ({"first_threshold": 0.5}, {"second_threshold": 0.1}, {"iterations": 2}):
        with pytest.raises(ValueError, match="no thresholds"):
            self_correlation(cams, features, form="talk", **setting)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(0, 2**31),
)
def test_follows_the_definition_at_any_size(height, width, classes, block, seed):
    torch.manual_seed(seed)
    cams, features = inputs(1, classes, (height, width), (5,))
    same_as_definition(cams, features, {}, block=block)


def test_the_settings_matter():
    cams, features = inputs()
    plain = self_correlation(cams, features)
    for change in (
        {"first_threshold": 0.8},
        {"second_threshold": 0.9},
        {"foreground": 0.7},
        {"background": 0.3},
        {"order": 1},
        {"iterations": 2},
        {"second_weight": 0.3},
        {"form": "talk"},
    ):
        assert (self_correlation(cams, features, **change) - plain).abs().max() > 1e-3, change


@pytest.mark.realdata
@pytest.mark.parametrize("form", ["code", "talk"])
def test_parity_with_the_authors(oracle, form):
    published = oracle("parity/scg")
    cams = torch.from_numpy(published["cams"]).float()
    features = [torch.from_numpy(published[f"level{i}"]).float() for i in range(5)]
    found = self_correlation(cams, features, form=form)
    np.testing.assert_allclose(found.numpy(), published[form], atol=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize("number", [0, 1])
def test_published_outputs(oracle, number):
    published = oracle(f"scg_{number}")
    cams = torch.from_numpy(published["cams"])[None]
    features = [torch.from_numpy(published[f"features_{i}"])[None] for i in range(3)]
    thresholds = ("first_threshold", "second_threshold", "foreground", "background")
    found = self_correlation(cams, features, *(float(published[name]) for name in thresholds))
    np.testing.assert_allclose(found[0].numpy(), published["refined"], atol=1e-5)


def test_two_regions_by_hand():
    left = torch.zeros(4, 6)
    left[:, :3] = 1
    features = torch.stack([left, 1 - left])[None]  # the same inside a region, orthogonal across
    cams = torch.zeros(1, 2, 4, 6)
    cams[0, 0, 1, 1] = 1  # one certain pixel of the left; everything right is background
    cams[0, 0, :, :3] += 0.1  # the rest of the left is unsure
    found = self_correlation(cams, [features], order=1)
    torch.testing.assert_close(found[0, 0], left)
    assert found[0, 1].eq(0).all()


def test_levels_are_brought_to_the_size_of_the_maps():
    cams, features = inputs(channels=(6,))
    coarse, fine = torch.rand(1, 4, 5, 3), torch.rand(1, 3, 18, 14)
    resized = [F.interpolate(f, (9, 7), mode="bilinear") for f in (coarse, fine)]
    found = self_correlation(cams, [*features, coarse, fine])
    torch.testing.assert_close(found, self_correlation(cams, [*features, *resized]))


@pytest.mark.parametrize("form", ["code", "talk"])
def test_levels_are_brought_to_where_their_cells_lie(form):
    cams, features = inputs(channels=(6,))
    own, there = Cells((8, 8), (3.5, 0)), Cells((16, 16), (11.5, 0))
    coarse = torch.rand(1, 4, 5, 4)
    on_grid = place(coarse, Cells((2, 2), (1, 0)), (9, 7), (9, 7))
    found = self_correlation(cams, [*features, coarse], form=form, places=[own, own, there])
    wanted = self_correlation(cams, [*features, on_grid], form=form)
    torch.testing.assert_close(found, wanted)
    stretched = self_correlation(cams, [*features, coarse], form=form)
    assert (found - stretched).abs().max() > 1e-3
    with pytest.raises(ValueError, match="places has 1 entries for the maps and 2 levels"):
        self_correlation(cams, [*features, coarse], places=[there])


def test_many_channels_are_the_same_as_their_sum():
    """More channels than are read at a time; repeating them leaves the cosine as it is."""
    cams, features = inputs(channels=(200,))
    found = self_correlation(cams, [features[0].repeat(1, 3, 1, 1)])
    torch.testing.assert_close(found, self_correlation(cams, features), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["code", "talk"])
@pytest.mark.parametrize("block", [1, 5, 62, 63, 1000])
def test_blocks_do_not_change_the_result(form, block):
    cams, features = inputs(2)
    expected = self_correlation(cams, features, form=form)
    torch.testing.assert_close(
        self_correlation(cams, features, form=form, block=block), expected, atol=1e-5, rtol=0
    )


def test_images_and_classes_do_not_see_each_other():
    cams, features = inputs(3)
    found = self_correlation(cams, features)
    for b in range(3):
        for k in range(3):
            alone = self_correlation(cams[b : b + 1, k : k + 1], [f[b : b + 1] for f in features])
            torch.testing.assert_close(found[b, k], alone[0, 0], atol=1e-5, rtol=0)


def test_results_span_the_unit_range_and_follow_a_flip():
    cams, features = inputs(2)
    found = self_correlation(cams, features)
    assert found.min() == 0
    torch.testing.assert_close(found.amax((-2, -1)), torch.ones(2, 3))
    flipped = self_correlation(cams.flip(-1), [f.flip(-1) for f in features])
    torch.testing.assert_close(flipped.flip(-1), found, atol=1e-5, rtol=0)


def test_empty_sets():
    cams, features = inputs()
    nothing = self_correlation(torch.zeros_like(cams), features)
    assert nothing.eq(0).all()
    cams[0, 1] = 0.2  # unsure everywhere
    assert self_correlation(cams, features)[0, 1].eq(0).all()
    cams[0, 2] = cams[0, 2].clamp(min=0.1)  # no certain background
    same_as_definition(cams, features, {})
    blank = self_correlation(cams, [torch.zeros_like(f) for f in features])
    assert blank.isfinite().all()
    assert self_correlation(torch.ones(1, 1, 1, 1), [torch.ones(1, 2, 1, 1)]).isfinite().all()


def test_rounding_is_not_evidence():
    """Foreground and background of one look point at the same pixels: their sums differ by noise."""
    looks = torch.rand(8, 5)  # five regions of 30 pixels, the same inside each
    features = looks.repeat_interleave(30, 1).reshape(1, 8, 10, 15)
    cams = torch.full((1, 20, 10, 15), 0.2)
    for k in range(20):
        cams[0, k].flatten()[: 3 + k] = 1
        cams[0, k].flatten()[25:30] = 0
    assert self_correlation(cams, [features], order=1).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    cams, features = inputs()
    cams, features = cams.to(dtype), [f.to(dtype) for f in features]
    expected = self_correlation(cams.float(), [f.float() for f in features])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = self_correlation(cams, features)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_inputs_are_left_alone():
    cams, features = inputs(2)
    cams, features = cams.transpose(2, 3), [f.transpose(2, 3) for f in features]  # strided
    copies = cams.clone(), [f.clone() for f in features]
    for tensor in (cams, *features):
        tensor.requires_grad_()
    found = self_correlation(cams, features)
    assert not found.requires_grad
    assert torch.equal(cams, copies[0])
    assert all(torch.equal(a, b) for a, b in zip(features, copies[1], strict=True))
    straight = self_correlation(cams.contiguous(), [f.contiguous() for f in features])
    assert torch.equal(found, straight)


def test_refusals():
    cams, features = inputs()
    for error, words, arguments, more in (
        (ValueError, "batch with cams", (cams[0], features), {}),
        (TypeError, "floating-point", (cams.long(), features), {}),
        (ValueError, "at least one level", (cams, []), {}),
        (ValueError, r"features\[1\]", (cams, [features[0], features[1][0]]), {}),
        (ValueError, "as many of each", (cams, [features[0].repeat(2, 1, 1, 1)]), {}),
        (ValueError, "order", (cams, features), {"order": 3}),
        (ValueError, "iterations", (cams, features), {"iterations": 0}),
        (ValueError, "form", (cams, features), {"form": "paper"}),
        (ValueError, "block", (cams, features), {"block": 0}),
    ):
        with pytest.raises(error, match=words):
            self_correlation(*arguments, **more)
