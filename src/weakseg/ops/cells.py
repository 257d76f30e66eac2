"""Where the cells of a map lie in its image, and bringing maps to pixels by these places.

A convolution with zero padding to both sides looks at stride x i with cell i, not at the middle of
the stride pixels that F.interpolate (align_corners=False) takes for it; TensorFlow's "same" padding
looks elsewhere again, by the parity of the size. On a coarse map the difference is half a cell, to
the right in an image and to the left in its mirror image, which blurs their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PIXELS", "Cells", "cell_means", "moved", "place"]


@dataclass(frozen=True)
class Cells:
    """Where the cells of a map lie in the image that the map was made from.

    The centre of cell (i, j) is at the pixel (offset[0] + stride[0] * i, offset[1] + stride[1] * j),
    with pixels counted from 0 at their own centres.

    Attributes:
        stride: Pixels between neighbouring cells, (down, right).
        offset: Pixel at the centre of cell (0, 0), (down, right).
    """

    stride: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def spanning(cls, size: tuple[int, int], grid: tuple[int, int]) -> Cells:
        """Cells that share an image of ``size`` (H, W) evenly: h x w rectangles, without overlap."""
        stride = (size[0] / grid[0], size[1] / grid[1])
        return cls(stride, (stride[0] / 2 - 0.5, stride[1] / 2 - 0.5))

    def reduced(self, factor: int) -> Cells:
        """The same cells in an image whose pixels are squares of ``factor`` of these pixels."""
        (sy, sx), (oy, ox) = self.stride, self.offset
        return Cells(
            (sy / factor, sx / factor), ((oy + 0.5) / factor - 0.5, (ox + 0.5) / factor - 0.5)
        )

    def spans(self, size: tuple[int, int], grid: tuple[int, int]) -> bool:
        """Whether ``grid`` (h, w) of these cells shares an image of ``size`` (H, W) evenly."""
        if torch.compiler.is_exporting():  # sizes are symbols, which have no answer
            return False
        even = Cells.spanning(size, grid)
        pairs = zip((*self.stride, *self.offset), (*even.stride, *even.offset), strict=True)
        return all(abs(a - b) < 1e-6 for a, b in pairs)


PIXELS = Cells((1.0, 1.0), (0.0, 0.0))
"""Those of the image itself."""


def place(
    maps: Tensor, cells: Cells | None, image: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Maps at the size of an image, or at another grid over it, by where their cells really lie.

    Bilinear between the centres of the cells; beyond the outermost ones the nearest value.

    Args:
        maps: (B, C, h, w).
        cells: Where the cells lie; ``None`` = they share the image evenly.
        image: (H, W) of the image that the maps were made from.
        size: (h', w') of the result, which shares the image evenly: (H, W) gives one value a pixel.

    Returns:
        (B, C, h', w') float32.
    """
    maps = maps.float()
    grid = (maps.shape[-2], maps.shape[-1])
    if cells is None or cells.spans(image, grid):
        if grid == tuple(size):
            return maps
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return _at(maps, *(_coordinates(cells, image, size, axis, maps.device) for axis in (0, 1)))


def moved(maps: Tensor, cells: Cells, to: Cells, grid: tuple[int, int]) -> Tensor:
    """Maps at the centres of other cells of the same image.

    Bilinear, as :func:`place`.

    Args:
        maps: (B, C, h, w); an image is a map whose cells are its pixels, :data:`PIXELS`.
        cells: Where the maps' cells lie.
        to: Where the cells of the result lie.
        grid: (h', w') of the result.

    Returns:
        (B, C, h', w') float32.
    """
    maps = maps.float()
    exporting = torch.compiler.is_exporting()  # then sizes are symbols, which have no answer
    if cells == to and not exporting and grid == (maps.shape[-2], maps.shape[-1]):
        return maps
    rows, columns = (
        (to.offset[i] + to.stride[i] * torch.arange(grid[i], device=maps.device) - cells.offset[i])
        / cells.stride[i]
        for i in (0, 1)
    )
    return _at(maps, rows, columns)


def cell_means(
    maps: Tensor, cells: Cells | None, image: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The other way round: means of a finer map over each cell, a rectangle around its centre.

    Args:
        maps: (B, C, h', w') that shares the image evenly, such as one value a pixel.
        cells: Where the cells lie; ``None`` = they share the image evenly.
        image: (H, W) of the image.
        grid: (h, w) of the cells. Of a rectangle that reaches over the border the part inside
            counts; one that lies outside moves to the border.

    Returns:
        (B, C, h, w) float32.
    """
    cells = cells or Cells.spanning(image, grid)
    rows, columns = (
        _shares(cells, image, maps.shape[axis - 2], grid[axis], axis, maps.device)
        for axis in (0, 1)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps.float() @ columns.T


def _shares(
    cells: Cells, image: tuple[int, int], fine: int, count: int, axis: int, device: torch.device
) -> Tensor:
    """(count, fine): share of each fine cell in the mean over a coarse one, along an axis."""
    stride, width = cells.stride[axis], image[axis] / fine
    centres = cells.offset[axis] + 0.5 + stride * torch.arange(count, device=device).double()
    centres = centres.clamp(0.5, image[axis] - 0.5)[:, None]
    start = width * torch.arange(fine, device=device).double()
    ends = torch.minimum(centres + stride / 2, start + width)
    overlap = (ends - torch.maximum(centres - stride / 2, start)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def _coordinates(
    cells: Cells,
    image: tuple[int, int],
    size: tuple[int, int],
    axis: int,
    device: torch.device,
) -> Tensor:
    """Cell coordinates (n,) of the n centres along one axis of an even grid over the image."""
    centres = torch.arange(size[axis], device=device, dtype=torch.float32)
    if size != image:
        centres = (centres + 0.5) * (image[axis] / size[axis]) - 0.5
    return (centres - cells.offset[axis]) / cells.stride[axis]


def _at(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values at fractional cells along both axes, linear; beyond the ends the nearest one.

    As products with matrices of at most two weights a row: several times faster than picking, there
    and, above all, back.
    """
    shares = []
    for coordinates, count in ((rows, maps.shape[-2]), (columns, maps.shape[-1])):
        cells = torch.arange(count, device=maps.device)
        inside = coordinates.clamp(0, count - 1)
        shares.append((1 - (inside[:, None] - cells).abs()).clamp(min=0))
    with torch.autocast(maps.device.type, enabled=False):
        return shares[0] @ maps @ shares[1].T
