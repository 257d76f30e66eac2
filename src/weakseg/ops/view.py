"""Random views of square images, and the way back for maps of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["View"]


@dataclass
class View:
    """A transformation A of square images, different for each image of a batch.

    Attributes:
        size: Side of the transformed images.
        theta: (B, 2, 3), coordinates in [-1, 1] of the view -> of the image; ``None`` = same.
    """

    size: int
    theta: Tensor | None = None

    @classmethod
    def draw(
        cls, images: Tensor, size: int, flip: bool, rotation: float, translation: float
    ) -> View:
        """A random view of each image, from torch's own random state.

        Args:
            images: (B, 3, S, S).
            size: Side of the view in pixels.
            flip: Mirror half of the images.
            rotation: Largest angle in degrees, to both sides.
            translation: Largest shift, as a share of the side.
        """
        if not flip and not rotation and not translation:
            return cls(size)
        count = len(images)
        angle = torch.deg2rad(rotation * (2 * torch.rand(count) - 1))
        mirror = 1 - 2.0 * (torch.rand(count) < 0.5) if flip else torch.ones(count)
        shift = 2 * translation * (2 * torch.rand(count, 2) - 1)  # the range [-1, 1] is 2 wide
        cos, sin = angle.cos(), angle.sin()
        linear = torch.stack([torch.stack([mirror * cos, -sin]), torch.stack([mirror * sin, cos])])
        theta = torch.cat([linear.permute(2, 0, 1), shift[..., None]], 2)
        return cls(size, theta.to(images.device))

    def of(self, images: Tensor) -> Tensor:
        """A(images), (B, C, size, size); what comes from outside the image is 0, the mean colour."""
        small = F.interpolate(
            images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        if self.theta is None:
            return small
        with torch.autocast(images.device.type, enabled=False):  # places need all their digits
            grid = F.affine_grid(self.theta, list(small.shape), align_corners=False)
            return F.grid_sample(small.float(), grid, align_corners=False)

    def back(
        self,
        maps: Tensor,
        size: int,
        grid: tuple[int, int],
        stride: float | tuple[float, float],
        offset: float | tuple[float, float] = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Inverse of A: brings maps of the view to the cells of the image's own maps.

        The centre of cell i is the pixel ``offset + stride * i`` (see :class:`Cells`).

        Args:
            maps: (B, C, h', w') of the view.
            size: Side of the image in pixels.
            grid: (h, w) of the image's own maps.
            stride: Pixels between cells.
            offset: Pixel at the centre of the first cell. Both are those of the image's own maps
                and those of the view's where these differ.

        Returns:
            (B, C, h, w) maps, and (B, 1, h, w), 1 where the cell lies inside the view.
        """
        own, seen = offset if isinstance(offset, tuple) else (offset, offset)
        steps, seen_steps = stride if isinstance(stride, tuple) else (stride, stride)
        y, x = (
            (2 * (own + steps * torch.arange(n, device=maps.device)) + 1) / size - 1 for n in grid
        )
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
        if self.theta is not None:
            linear, shift = self.theta[:, :, :2], self.theta[:, :, 2]
            inverse = torch.linalg.inv(linear).transpose(1, 2)[:, None]
            with torch.autocast(maps.device.type, enabled=False):
                places = (places - shift[:, None, None]) @ inverse
        inside = (places.abs() <= 1).all(-1)[:, None].float()
        pixels = (places + 1) * self.size / 2 - 0.5
        last = torch.tensor([maps.shape[-1], maps.shape[-2]], device=maps.device) - 1
        cells = (pixels - seen) / seen_steps * 2 / last.clamp(min=1) - 1
        found = F.grid_sample(maps.float(), cells, padding_mode="border", align_corners=True)
        return found * inside, inside
