"""PAMR and PAR: a slow definition, published outputs, both paths, and what refinement must keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops.pamr import _rule, _with_tensors, pamr

FACTOR = {"pamr": 0.1, "par": 0.3}
VARIANTS = pytest.mark.parametrize("variant", ["pamr", "par"])
SIX = (1, 2, 4, 8, 12, 24)


def slow(image, maps, dilations, iterations, variant, normalise=True):
    """The definition, pixel by pixel in float64: image (3, H, W), maps (K, H, W)."""
    image, maps = image.double().numpy(), maps.double().numpy()
    height, width = image.shape[1:]
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    neighbours, weights = {}, {}
    for y in range(height):
        for x in range(width):
            around = [
                (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
                for dy, dx in steps
            ]
            colours = np.array([image[:, v, u] for v, u in around])  # (P, 3)
            difference = np.abs(colours - image[:, y, x])
            if variant == "pamr":
                samples = np.concatenate([colours, [image[:, y, x]] * len(dilations)])
                scaled = difference / (1e-8 + 0.1 * samples.std(0, ddof=1))
                weight = softmax(-scaled.mean(1))
            else:
                scaled = difference / (colours.std(0, ddof=1) + 1e-8) / 0.3
                distance = np.array([(dy**2 + dx**2) ** 0.5 for dy, dx in steps])
                near = distance / (distance.std(ddof=1) + 1e-8) / 0.3
                weight = softmax(-(scaled**2).mean(1)) + 0.01 * softmax(-(near**2))
                weight = weight / weight.sum() if normalise else weight
            neighbours[y, x], weights[y, x] = around, weight
    for _ in range(iterations):
        old, maps = maps, np.empty_like(maps)
        for y, x in neighbours:
            values = np.array([old[:, v, u] for v, u in neighbours[y, x]])  # (P, K)
            maps[:, y, x] = weights[y, x] @ values
    return torch.from_numpy(maps).float()


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_tensors(image, maps, dilations=SIX, iterations=10, variant="pamr", normalise=True):
    """The path of other devices, run on the CPU."""
    rule = _rule(variant, dilations, FACTOR[variant], normalise)
    return _with_tensors(image, maps, dilations, iterations, rule)


def photo(batch=1, height=24, width=20):
    """Smooth colours and a little noise."""
    coarse = F.interpolate(torch.rand(batch, 3, 4, 4), (height, width), mode="bilinear")
    return (coarse + 0.05 * torch.randn(batch, 3, height, width)).clamp(0, 1)


@VARIANTS
@pytest.mark.parametrize("normalise", [True, False])
def test_both_paths_follow_the_definition(variant, normalise):
    image, maps = photo(1, 9, 12), torch.rand(1, 3, 9, 12)
    expected = slow(image[0], maps[0], (1, 2, 5), 3, variant, normalise)[None]
    found = pamr(image, maps, (1, 2, 5), 3, variant=variant, normalise=normalise)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found = by_tensors(image, maps, (1, 2, 5), 3, variant, normalise)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from(["pamr", "par"]),
    st.integers(0, 2**31),
)
def test_any_size_and_any_dilation(height, width, dilations, variant, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(4, (1, 3, height, width), generator=generator) / 3  # with equal colours
    maps = torch.rand(1, 2, height, width, generator=generator)
    expected = slow(image[0], maps[0], dilations, 2, variant)[None]
    found = pamr(image, maps, dilations, 2, variant=variant)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found = by_tensors(image, maps, tuple(dilations), 2, variant)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["pamr_0", "pamr_1"])
def test_published_implementation(oracle, name):
    arrays = oracle(name)
    image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None] / 255
    maps, dilations = torch.from_numpy(arrays["scores"])[None], tuple(arrays["dilations"].tolist())
    expected = torch.from_numpy(arrays["refined"])[None]
    found = pamr(image, maps, dilations, int(arrays["iterations"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found = by_tensors(image, maps, dilations, int(arrays["iterations"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@VARIANTS
def test_both_paths_agree_on_six_dilations(variant):
    image, maps = photo(2, 40, 56), torch.randn(2, 5, 40, 56)
    found = pamr(image, maps, variant=variant)
    torch.testing.assert_close(found, by_tensors(image, maps, variant=variant), atol=1e-5, rtol=0)


@VARIANTS
def test_a_map_moves_to_the_edge_of_the_object(variant):
    inside = torch.zeros(1, 1, 32, 32)
    inside[..., 8:24, 10:26] = 1
    image = torch.tensor([0.2, 0.5, 0.3])[:, None, None] + 0.4 * inside
    blurred = F.avg_pool2d(inside, 9, 1, 4, count_include_pad=False)
    refined = pamr(image, blurred, variant=variant)
    assert (blurred - inside).abs().mean() > 0.05
    assert (refined - inside).abs().mean() < 0.7 * (blurred - inside).abs().mean()


def test_a_smaller_sigma_factor_leaks_less_over_an_edge():
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., :8] = 1
    image = 0.5 * inside.expand(1, 3, 16, 16) + 0.02 * torch.rand(1, 3, 16, 16)
    loss = [(pamr(image, inside, sigma_factor=f) - inside).abs().mean() for f in (0.1, 0.3, 1.0)]
    assert loss[0] < 0.5 * loss[1] < 0.25 * loss[2]


@VARIANTS
@pytest.mark.parametrize("path", [pamr, by_tensors])
def test_a_constant_image_gives_plain_means(variant, path):
    image, maps = torch.full((1, 3, 5, 5), 0.3), torch.zeros(1, 1, 5, 5)
    maps[..., 2, 2] = 1
    found = path(image, maps, (1,), 1, variant=variant)[0, 0]
    near = np.exp(-((np.array([1, 2**0.5]) / np.std([1, 2**0.5] * 4, ddof=1) / 0.3) ** 2))
    near = (1 / 8 + 0.01 * near / (4 * near.sum())) / 1.01 if variant == "par" else [1 / 8, 1 / 8]
    cross, corner = float(near[0]), float(near[1])
    expected = torch.tensor(
        [[corner, cross, corner], [cross, 0.0, cross], [corner, cross, corner]]
    )  # the centre itself is no neighbour
    torch.testing.assert_close(found[1:4, 1:4], expected, atol=1e-6, rtol=0)
    assert found[0].eq(0).all() and found[:, 4].eq(0).all()


@VARIANTS
@pytest.mark.parametrize("path", [pamr, by_tensors])
def test_one_pixel_stays(variant, path):
    maps = torch.tensor([0.25, -3.0]).reshape(1, 2, 1, 1)
    found = path(torch.rand(1, 3, 1, 1), maps, variant=variant)
    torch.testing.assert_close(found, maps, atol=1e-5, rtol=0)


@VARIANTS
def test_range_and_sum_are_kept(variant):
    image, maps = photo(2), torch.rand(2, 4, 24, 20).mul(5).softmax(1)
    found = pamr(image, maps, variant=variant)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 24, 20), atol=1e-5, rtol=0)
    for b in range(2):
        for k in range(4):
            assert found[b, k].min() >= maps[b, k].min() - 1e-6
            assert found[b, k].max() <= maps[b, k].max() + 1e-6
    assert found.std() < 0.7 * maps.std()  # and something was done


def test_published_par_grows_by_a_hundredth_per_iteration():
    ones = torch.ones(1, 1, 24, 20)
    grown = pamr(photo(), ones, variant="par", normalise=False)
    torch.testing.assert_close(grown, 1.01**10 * ones, atol=1e-5, rtol=0)


@VARIANTS
def test_flipping_commutes(variant):
    image, maps = photo(), torch.rand(1, 3, 24, 20)
    expected = pamr(image, maps, variant=variant)
    for axis in (-1, -2):
        found = pamr(image.flip(axis), maps.flip(axis), variant=variant).flip(axis)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_maps_are_refined_each_for_itself():
    image, maps = photo(3), torch.randn(3, 4, 24, 20)
    whole = pamr(image, maps)
    assert torch.equal(whole, pamr(image, maps))
    for b in range(3):
        assert torch.equal(whole[b : b + 1], pamr(image[b : b + 1], maps[b : b + 1]))
    for k in range(4):
        assert torch.equal(whole[:, k : k + 1], pamr(image, maps[:, k : k + 1]))


def test_threads_change_nothing():
    image, maps = photo(), torch.randn(1, 4, 24, 20)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pamr(image, maps))
            assert torch.get_num_threads() == threads  # what torch does next is as before
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_maps_are_brought_to_the_size_of_the_image():
    image, maps = photo(2), torch.rand(2, 3, 6, 7)
    large = F.interpolate(maps, (24, 20), mode="bilinear", align_corners=True)
    assert torch.equal(pamr(image, maps, iterations=0), large)
    assert torch.equal(pamr(image, maps), pamr(image, large))


@pytest.mark.parametrize("path", [pamr, by_tensors])
def test_inputs_are_not_touched(path):
    image, maps = photo(), torch.rand(1, 2, 24, 20)
    before = image.clone(), maps.clone()
    for iterations in (0, 1, 2):
        found = path(image, maps, SIX, iterations)
        found.add_(1)
        assert torch.equal(image, before[0]) and torch.equal(maps, before[1])
    image, maps = photo(1, 4, 1), torch.rand(1, 2, 4, 1)  # nothing to pad in the columns
    before = maps.clone()
    path(image, maps, (1,), 2).add_(1)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_float32(dtype):
    image, maps = photo().to(dtype), torch.rand(1, 3, 6, 7).to(dtype)
    expected = pamr(image.float(), maps.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pamr(image, maps)
        tensors = by_tensors(image.float(), found)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(tensors, by_tensors(image.float(), expected))


def test_non_contiguous_and_differentiable_inputs():
    image, maps = photo(), torch.rand(1, 3, 24, 20)
    expected = pamr(image, maps)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    reversed_image = image.flip(1)[:, [2, 1, 0]].transpose(-1, -2).contiguous().transpose(-1, -2)
    found = pamr(reversed_image.requires_grad_(), strided.requires_grad_())
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("shape", [(1, 0, 6, 7), (0, 3, 6, 7)])
def test_nothing_to_refine(shape):
    found = pamr(photo(shape[0]) if shape[0] else torch.rand(0, 3, 24, 20), torch.rand(shape))
    assert found.shape == (*shape[:2], 24, 20)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.rand(3, 8, 8)}, ValueError, r"image\[None\]"),
        ({"image": torch.rand(1, 8, 8, 3)}, ValueError, "permute"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "255"),
        ({"maps": torch.rand(2, 8, 8)}, ValueError, r"maps\[None\]"),
        ({"maps": torch.zeros(1, 2, 8, 8, dtype=torch.long)}, TypeError, "float"),
        ({"maps": torch.rand(2, 2, 8, 8)}, ValueError, "2 images"),
        ({"dilations": ()}, ValueError, "dilations"),
        ({"dilations": (1, 0)}, ValueError, "dilations"),
        ({"dilations": (1.5,)}, ValueError, "dilations"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"variant": "crf"}, ValueError, "'par'"),
        ({"sigma_factor": 0.0}, ValueError, "sigma_factor"),
    ],
)
def test_refusals(change, error, message):
    given = {"image": torch.rand(1, 3, 8, 8), "maps": torch.rand(1, 2, 8, 8)} | change
    with pytest.raises(error, match=message):
        pamr(**given)
