"""Normalising, gating, merging and background rules of score maps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops import (
    add_background,
    gate,
    merge_maps,
    normalise_max,
    normalise_min_max,
    power_threshold,
)


def test_normalise_max_by_hand():
    maps = torch.tensor([[[[-1.0, 0.0], [2.0, 4.0]], [[-3.0, -2.0], [-1.0, -5.0]]]])
    found = normalise_max(maps)
    expected = torch.tensor([[0.0, 0.0], [2 / 4.00001, 4 / 4.00001]])
    torch.testing.assert_close(found[0, 0], expected)
    assert found[0, 1].eq(0).all()  # a map without positive values is empty, not noise


def test_normalise_min_max_by_hand():
    maps = torch.tensor([[[[-1.0, 0.0], [1.0, 3.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    found = normalise_min_max(maps)
    torch.testing.assert_close(found[0, 0], torch.tensor([[0, 0.25], [0.5, 1]]), atol=1e-4, rtol=0)
    assert found[0, 1].eq(0).all()


@pytest.mark.parametrize("normalise", [normalise_max, normalise_min_max])
def test_each_map_is_normalised_for_itself(normalise):
    maps = torch.randn(3, 4, 5, 6) * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None, None]
    whole = normalise(maps)
    for b in range(3):
        for k in range(4):
            torch.testing.assert_close(whole[b, k], normalise(maps[b, k]))
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert whole.amax((-2, -1)).min() > 0.99


@pytest.mark.parametrize("normalise", [normalise_max, normalise_min_max])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float32(normalise, dtype):
    maps = torch.randn(1, 2, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = normalise(maps)
    assert found.dtype == torch.float32
    assert torch.equal(found, normalise(maps.float()))
    faint = torch.full((1, 1, 2, 2), 1e-7, dtype=dtype)  # the constant must keep it faint
    assert normalise(faint).max() < 0.02


def test_gate_leaves_only_present_classes():
    scores = torch.rand(2, 3, 4, 4) + 0.1
    tags = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.uint8)
    found = gate(scores, tags)
    assert torch.equal(found[0, 0], scores[0, 0])
    assert torch.equal(found[1, 1:], scores[1, 1:])
    assert found[0, 1:].eq(0).all()
    assert found[1, 0].eq(0).all()
    assert found.dtype == scores.dtype


def test_merging_by_hand():
    a, b = torch.tensor([[[[-4.0, 1.0, 2.0]]]]), torch.tensor([[[[2.0, 1.0, 0.0]]]])
    logit = merge_maps([a, b], "logit")  # positive parts sum to 2, 2, 2: all are the maximum
    torch.testing.assert_close(logit, torch.full_like(a, 2 / 2.00001))
    unit = merge_maps([a, b], "unit")  # positive parts sum to 2, 2, 2: a constant map
    torch.testing.assert_close(unit, torch.zeros_like(a))
    c = torch.tensor([[[[1.0, 3.0, 0.5]]]])  # with b: 3, 4, .5
    unit = merge_maps([c, b], "unit")
    wanted = torch.tensor([[[[2.5, 3.5, 0.0]]]]) / 3.5
    torch.testing.assert_close(unit, wanted, atol=1e-4, rtol=0)
    probability = merge_maps([a, b], "probability")
    assert torch.equal(probability, torch.tensor([[[[-1.0, 1, 1]]]]))


@pytest.mark.parametrize("kind", ["logit", "unit", "probability"])
def test_merging_does_not_depend_on_order(kind):
    maps = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    torch.testing.assert_close(merge_maps(maps, kind), merge_maps(maps[::-1], kind))
    torch.testing.assert_close(merge_maps(maps[:1] * 3, kind), merge_maps(maps[:1], kind))


def test_background_by_hand():
    scores = torch.tensor([0.2, 0.5]).reshape(1, 2, 1, 1)
    assert add_background(scores, threshold=0.3)[0, 0].item() == pytest.approx(0.3)
    assert add_background(scores, alpha=3)[0, 0].item() == pytest.approx(0.125)
    assert torch.equal(add_background(scores, alpha=3)[:, 1:], scores)
    for wrong in ({}, {"threshold": 0.1, "alpha": 1.0}):
        with pytest.raises(ValueError, match="either threshold or alpha"):
            add_background(scores, **wrong)


def test_a_small_alpha_gives_more_background():
    best = torch.rand(1, 1, 20, 20)
    low, high = (add_background(best, alpha=a).argmax(1).eq(0).sum() for a in (4, 24))
    assert low > high
    assert power_threshold(4) > power_threshold(24)


def test_power_threshold_of_known_roots():
    assert power_threshold(1.0) == pytest.approx(0.5)
    assert power_threshold(2.0) == pytest.approx((3 - 5**0.5) / 2)  # t = (1 - t)^2


@settings(deadline=None, max_examples=50)
@given(st.floats(0.2, 40), st.integers(0, 2**32 - 1))
def test_power_threshold_labels_as_the_power_rule(alpha: float, seed: int):
    rng = np.random.default_rng(seed)
    scores = rng.random((1, 3, 8, 8)) ** rng.choice([1, 4])
    threshold = power_threshold(alpha)
    best = scores.max(1)
    sure = np.abs(best - threshold) > 1e-5  # on the boundary float32 decides
    by_power = add_background(torch.from_numpy(scores), alpha=alpha).argmax(1).numpy()
    by_threshold = np.where(best > threshold, scores.argmax(1) + 1, 0)
    np.testing.assert_array_equal(by_power[sure], by_threshold[sure])
