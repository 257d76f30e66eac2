"""Where cells lie, against definitions that are written out pixel by pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weakseg.ops import Cells, View, place
from weakseg.ops.cells import PIXELS, cell_means, moved


def slow(maps, cells, image, size):
    """Each value on its own: the weighted mean of the two nearest cells along each axis."""
    out = np.zeros((*maps.shape[:2], *size))
    h, w = maps.shape[-2:]
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = ((n + 0.5) * image[a] / size[a] - 0.5 for a, n in ((0, i), (1, j)))
            y = min(max((y - cells.offset[0]) / cells.stride[0], 0), h - 1)
            x = min(max((x - cells.offset[1]) / cells.stride[1], 0), w - 1)
            for row in range(h):
                for column in range(w):
                    share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
                    out[..., i, j] += share * maps[..., row, column]
    return out


@pytest.mark.parametrize(
    ("cells", "image", "size"),
    [
        (Cells((8, 8), (0, 0)), (30, 22), (30, 22)),
        (Cells((8, 8), (7, 7)), (32, 24), (8, 6)),
        (Cells((8, 4), (-1, 2.5)), (32, 12), (11, 5)),
        (Cells((16, 16), (0, 15)), (64, 40), (70, 41)),
    ],
)
def test_place_is_the_definition(cells, image, size):
    rows = -(-image[0] // int(cells.stride[0]))
    columns = -(-image[1] // int(cells.stride[1]))
    maps = torch.rand(2, 3, rows, columns)
    found = place(maps, cells, image, size)
    assert found.shape == (2, 3, *size)
    np.testing.assert_allclose(found, slow(maps.double().numpy(), cells, image, size), atol=1e-5)


@pytest.mark.parametrize("size", [(32, 24), (64, 48), (8, 6), (4, 3)])
def test_cells_that_share_the_image_evenly_are_stretched(size):
    maps, image = torch.rand(1, 2, 4, 3), (32, 24)
    even = Cells.spanning(image, (4, 3))
    assert even == Cells((8, 8), (3.5, 3.5))
    wanted = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    assert torch.equal(place(maps, even, image, size), wanted)
    assert torch.equal(place(maps, None, image, size), wanted)


@pytest.mark.parametrize(
    ("cells", "to", "grid"),
    [
        (Cells((8, 8), (0, 0)), Cells((16, 16), (0, 15)), (2, 2)),
        (Cells((16, 16), (7, 7)), Cells((8, 8), (-1, 3.5)), (6, 5)),
        (PIXELS, Cells((8, 8), (3.5, 0)), (4, 4)),
        (Cells((8, 8), (0, 0)), Cells((8, 8), (0, 0)), (5, 5)),
    ],
)
def test_maps_at_other_cells_are_the_maps_there(cells, to, grid):
    maps = torch.rand(1, 2, 5, 5)
    wanted = np.zeros((1, 2, *grid))
    for i, j in np.ndindex(*grid):
        y, x = (
            np.clip((to.offset[a] + to.stride[a] * n - cells.offset[a]) / cells.stride[a], 0, 4)
            for a, n in ((0, i), (1, j))
        )
        for row, column in np.ndindex(5, 5):
            share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            wanted[..., i, j] += share * maps[..., row, column].numpy()
    np.testing.assert_allclose(moved(maps, cells, to, grid), wanted, atol=1e-6)


def test_gradients_reach_the_cells():
    maps = torch.rand(1, 1, 3, 3, requires_grad=True)
    place(maps, Cells((8, 8), (0, 0)), (24, 24), (24, 24)).sum().backward()
    assert maps.grad.sum() == pytest.approx(24 * 24)


@pytest.mark.parametrize("offset", [0.0, 3.5, 7.0, (0.0, 7.0)])
def test_cells_of_a_view_come_back_to_the_images_cells(offset):
    """Maps that hold the column at each cell's centre: what comes back are the image's columns."""
    side, small, stride = 128, 64, 8
    own, seen = offset if isinstance(offset, tuple) else (offset, offset)
    # Pixel p of the small view shows the image at 2 p + .5.
    columns = 2 * (torch.arange(small // stride) * stride + seen) + 0.5
    maps = columns.expand(1, 1, small // stride, -1).contiguous()
    back, inside = View(small).back(maps, side, (16, 16), stride, offset)
    wanted = own + stride * torch.arange(16.0)
    known = (wanted >= columns[0]) & (wanted <= columns[-1])
    assert known.sum() > 10
    torch.testing.assert_close(back[0, 0, 8][known], wanted[known])
    assert inside.all()


def test_cells_of_a_view_may_be_others_than_the_images():
    """An image of 100 px in 13 cells, a view of 48 px in 6: as of a transformer, which resizes."""
    own, seen = Cells.spanning((100, 100), (13, 13)), Cells.spanning((48, 48), (6, 6))
    columns = (seen.offset[0] + seen.stride[0] * torch.arange(6.0) + 0.5) * 100 / 48 - 0.5
    maps = columns.expand(1, 1, 6, -1).contiguous()
    strides, offsets = (own.stride[0], seen.stride[0]), (own.offset[0], seen.offset[0])
    back, _ = View(48).back(maps, 100, (13, 13), strides, offsets)
    wanted = own.offset[0] + own.stride[0] * torch.arange(13.0)
    known = (wanted >= columns[0]) & (wanted <= columns[-1])
    assert known.sum() >= 9
    torch.testing.assert_close(back[0, 0, 6][known], wanted[known])


def slow_means(maps, cells, image, grid):
    """Each mean by pixels of a hundredth."""
    out = np.zeros((*maps.shape[:2], *grid))
    steps = [np.arange(100 * side) / 100 + 0.005 for side in image]
    for i in range(grid[0]):
        for j in range(grid[1]):
            picked = []
            for axis, n in ((0, i), (1, j)):
                centre = cells.offset[axis] + 0.5 + cells.stride[axis] * n
                centre = min(max(centre, 0.5), image[axis] - 0.5)
                near = steps[axis][np.abs(steps[axis] - centre) <= cells.stride[axis] / 2]
                picked.append((near * maps.shape[2 + axis] / image[axis]).astype(int))
            out[..., i, j] = maps[..., picked[0], :][..., picked[1]].mean((2, 3))
    return out


@pytest.mark.parametrize(
    ("cells", "image", "fine"),
    [
        (Cells((8, 8), (0, 0)), (16, 12), (16, 12)),
        (Cells((8, 8), (7, 7)), (16, 24), (8, 12)),
        (Cells((4, 8), (-1, 2.5)), (9, 12), (7, 5)),
        (Cells((16, 16), (0, 15)), (17, 10), (17, 10)),
    ],
)
def test_means_over_cells_are_the_definition(cells, image, fine):
    maps = torch.rand(2, 3, *fine)
    grid = tuple(-(-n // int(s)) for n, s in zip(image, cells.stride, strict=True))
    found = cell_means(maps, cells, image, grid)
    wanted = slow_means(maps.double().numpy(), cells, image, grid)
    np.testing.assert_allclose(found, wanted, atol=4e-3)


def test_means_over_even_cells_are_pooled():
    maps = torch.rand(2, 3, 32, 24)
    wanted = F.adaptive_avg_pool2d(maps, (4, 3))
    torch.testing.assert_close(cell_means(maps, None, (64, 48), (4, 3)), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cell_means(maps.bfloat16(), None, (64, 48), (4, 3))
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(maps.bfloat16().float(), (4, 3)))
