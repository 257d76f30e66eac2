"""Tiles cover every pixel once, weights sum to one, and a local function is joined exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops import spans, stitch


@st.composite
def layouts(draw):
    overlap = draw(st.integers(2, 20))
    blend = overlap - 2 * draw(st.integers(0, (overlap - 1) // 2))
    tile = draw(st.integers(2 * overlap + 1, 2 * overlap + 30))
    return draw(st.integers(1, 200)), tile, overlap, blend


@given(layouts())
def test_spans_cover_an_axis(layout):
    length, tile, overlap, blend = layout
    found = spans(*layout)
    context = (overlap - blend) // 2
    weights = torch.zeros(length)
    for i, span in enumerate(found):
        assert span.start == i * (tile - overlap)
        assert span.stop <= length
        assert span.start <= span.first < span.last <= span.stop
        assert span.first - span.start == (context if i else 0)
        assert span.blend + span.fade <= span.last - span.first
        own = torch.ones(span.last - span.first)
        if span.blend:
            own[: span.blend] = (torch.arange(span.blend) + 0.5) / span.blend
        if span.fade:
            own[-span.fade :] = 1 - (torch.arange(span.fade) + 0.5) / span.fade
        weights[span.first : span.last] += own
    torch.testing.assert_close(weights, torch.ones(length))
    assert len(found) == 1 or length > tile - overlap


@settings(deadline=None, max_examples=40)
@given(layouts(), st.integers(1, 90), st.integers(0, 9))
def test_an_image_comes_back_from_its_tiles(layout, width: int, seed: int):
    """Also where what a tile says of its context is wrong."""
    length, tile, overlap, blend = layout
    image = torch.rand(2, length, width, generator=torch.Generator().manual_seed(seed))
    rows, columns = spans(*layout), spans(width, tile, overlap, blend)
    context = (overlap - blend) // 2

    def seen(y: slice, x: slice) -> torch.Tensor:
        found = image[:, y, x].clone()
        if context:
            if y.start:
                found[:, :context] = 99
            if y.stop < length:
                found[:, -context:] = 99
            if x.start:
                found[..., :context] = 99
            if x.stop < width:
                found[..., -context:] = 99
        return found

    joined = torch.full_like(image, torch.nan)
    for y, x, found in stitch(rows, columns, seen):
        assert joined[:, y, x].isnan().all()  # each pixel once
        joined[:, y, x] = found
    torch.testing.assert_close(joined, image)


def test_tiles_that_disagree_fade_into_each_other():
    """Every tile says its own number: rows and columns move by at most one step of the ramp."""
    rows = columns = spans(300, 100, 40, 20)
    numbers: list[float] = []

    def result(y: slice, x: slice) -> torch.Tensor:
        numbers.append(float(torch.rand(())))
        return torch.full((1, y.stop - y.start, x.stop - x.start), numbers[-1])

    joined = torch.empty(1, 300, 300)
    for y, x, found in stitch(rows, columns, result):
        joined[:, y, x] = found
    assert len(numbers) == len(rows) * len(columns) == 25
    assert joined.diff(dim=1).abs().max() <= 1 / 20 + 1e-5
    assert joined.diff(dim=2).abs().max() <= 1 / 20 + 1e-5
    assert joined.max() <= max(numbers) + 1e-6 and joined.min() >= min(numbers) - 1e-6
    assert joined[0, 0, 0] == numbers[0]


@pytest.mark.parametrize("layout", [(10, 8, 4, 2), (10, 9, 4, 0), (10, 9, 4, 3), (10, 9, 2, 4)])
def test_layouts_that_cannot_be_are_refused(layout):
    with pytest.raises(ValueError, match="cannot blend"):
        spans(*layout)
