"""A U-Net that paints an image from the features that a mask leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.networks.backbone import Level
from weakseg.ops.cells import Cells, moved

__all__ = ["Reconstructor"]

_TAPS = 4  # of the convolutions that halve
_SLOPE = 0.2
_FIRST_DROPOUT = 3  # the fourth halving
_LAST_DROPOUT = 4  # doublings


class Reconstructor(nn.Module):
    """Projections of features, and a U-Net from their masked form to RGB.

    The published network (ACR; a U-Net as in pix2pix) has projections to 64, 128 and 256 channels,
    width 64 and eight halvings; none of its convolutions but the last has a bias, so that nothing is
    painted from nothing but one colour. It enlarges the 448 channels to the image's size before it masks
    them: 112 MiB for each sample and mask at 256 px. Here its first convolution mixes the channels
    while they are small, which is the same by linearity; what is enlarged is one tap at a time.

    Args:
        levels: Of the features, finest first; each one's projection is twice as wide as the one
            before.
        width: Channels of the first projection and the first halving; the paper has 64, and 16 does
            on small machines.
        depth: Halvings; the paper has 8. The shorter side of an image must be at least 2^depth.
        dropout: Of the deep halvings and the first four doublings, as in pix2pix.
    """

    def __init__(
        self, levels: Sequence[Level], width: int = 64, depth: int = 6, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Conv2d(level.channels, width * 2**i, 1, bias=False) for i, level in enumerate(levels)
        )
        narrow = width * (2 ** len(levels) - 1)
        down = [width * min(2**i, 8) for i in range(depth)]
        self.entry = nn.Conv2d(narrow, down[0], _TAPS, stride=2, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Halve(
                down[i - 1],
                down[i],
                norm=i < depth - 1,
                dropout=dropout if i >= _FIRST_DROPOUT else 0,
            )
            for i in range(1, depth)
        )
        self.up = nn.ModuleList()
        above = down[-1]
        for i, channels in enumerate(reversed(down[:-1])):
            self.up.append(_Double(above, channels, dropout if i < _LAST_DROPOUT else 0))
            above = 2 * channels
        self.paint = nn.Conv2d(above, 3, 3, padding=1)

    def features(self, levels: Sequence[Tensor], cells: Sequence[Cells] | None = None) -> Tensor:
        """What ``forward`` masks: projections of the levels, all in the cells of the first.

        Args:
            levels: (B, C_i, h_i, w_i).
            cells: Where the levels' cells lie in the image; ``None`` = they share it evenly.

        Returns:
            (B, C, h, w).
        """
        size = (levels[0].shape[-2], levels[0].shape[-1])
        parts = [project(level) for project, level in zip(self.projections, levels, strict=True)]
        if cells is None:
            cells = [Cells.spanning(size, (p.shape[-2], p.shape[-1])) for p in parts]
        return torch.cat(
            [moved(p, own, cells[0], size) for p, own in zip(parts, cells, strict=True)], 1
        )

    def forward(self, features: Tensor, keep: Tensor, cells: Cells | None = None) -> Tensor:
        """The images that the kept features suggest.

        Args:
            features: (B, C, h, w) of ``features``; they cover the image.
            keep: (B, 1, H, W) in [0, 1], share of the features that each pixel keeps.
            cells: Where the features' cells lie in the pixels of ``keep``; ``None`` = they share
                them evenly.

        Returns:
            (B, 3, H, W), in the normalisation that it was trained with, unbounded.
        """
        x = F.leaky_relu(self._masked_entry(features, keep, cells), _SLOPE)
        skips = [x]
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            skip = skips.pop()
            x = torch.cat([up(x, skip.shape[-2:]), skip], 1)
        return _doubled(x, self.paint, (keep.shape[-2], keep.shape[-1]))

    def _masked_entry(self, features: Tensor, keep: Tensor, cells: Cells | None = None) -> Tensor:
        """``entry`` of the features, enlarged to the size of ``keep`` and multiplied with it."""
        if cells is None:
            image, grid = (keep.shape[-2], keep.shape[-1]), (features.shape[-2], features.shape[-1])
            cells = Cells.spanning(image, grid)
        out, channels = self.entry.weight.shape[:2]
        taps = self.entry.weight.permute(2, 3, 0, 1).reshape(-1, channels, 1, 1)
        mixed = F.conv2d(features, taps).unflatten(1, (_TAPS * _TAPS, out))
        with torch.autocast(features.device.type, enabled=False):
            return _MaskedTaps.apply(mixed.float(), keep.float(), cells)


class _Halve(nn.Module):
    """4 x 4 convolution with stride 2, instance normalisation, leaky ReLU, dropout."""

    def __init__(self, before: int, after: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, _TAPS, stride=2, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(after) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.leaky_relu(self.norm(self.convolution(x)), _SLOPE))


class _Double(nn.Module):
    """Transposed convolution to twice the size, instance normalisation, ReLU, dropout."""

    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(before, after, _TAPS, 2, 1, bias=False)
        self.norm = nn.InstanceNorm2d(after)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        x = self.convolution(x, output_size=list(size))  # an odd side loses a row when halved
        return self.dropout(F.relu(self.norm(x)))


class _MaskedTaps(torch.autograd.Function):
    """Sum over the taps of a 4 x 4 convolution with stride 2 of enlarged maps times a mask.

    Enlarging is bilinear and separable, so each tap is enlarged straight to the pixels that it
    reads; backward does it again instead of keeping all sixteen.
    """

    @staticmethod
    def forward(ctx: Any, taps: Tensor, keep: Tensor, cells: Cells) -> Tensor:
        """(B, 16, O, h, w) and (B, 1, H, W) -> (B, O, H // 2, W // 2)."""
        ctx.save_for_backward(taps, keep)
        ctx.cells = cells
        batch, _, channels = taps.shape[:3]
        total = taps.new_zeros(batch, channels, keep.shape[-2] // 2, keep.shape[-1] // 2)
        for tap, kept, rows, columns in _each_tap(taps, keep, cells):
            total.addcmul_(_enlarge(tap, rows, columns), kept)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of the taps and of the mask."""
        (above,) = gradients
        with torch.autocast(above.device.type, enabled=False):  # it may be on around backward
            return *_gradients(ctx, above.float()), None


def _gradients(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None]:
    taps, keep = ctx.saved_tensors
    of_taps = torch.empty_like(taps) if ctx.needs_input_grad[0] else None
    padded = _padded(torch.zeros_like(keep)) if ctx.needs_input_grad[1] else None
    height, width = above.shape[-2:]
    for k, (tap, kept, rows, columns) in enumerate(_each_tap(taps, keep, ctx.cells)):
        if of_taps is not None:
            of_taps[:, k] = rows.T @ ((above * kept) @ columns)
        if padded is not None:
            found = (above * _enlarge(tap, rows, columns)).sum(1, keepdim=True)
            padded[_pixels(k, height, width)] += found
    inner = None if padded is None else padded[..., 1 : 1 + keep.shape[-2], 1 : 1 + keep.shape[-1]]
    return of_taps, inner


def _each_tap(taps: Tensor, keep: Tensor, cells: Cells):
    """Each tap's maps (B, O, h, w), the mask at its pixels, and what enlarges to them."""
    height, width = keep.shape[-2] // 2, keep.shape[-1] // 2
    rows = [_bilinear(taps.shape[-2], height, i, cells, 0, taps) for i in range(_TAPS)]
    columns = [_bilinear(taps.shape[-1], width, j, cells, 1, taps) for j in range(_TAPS)]
    padded = _padded(keep)
    for k in range(_TAPS * _TAPS):
        i, j = divmod(k, _TAPS)
        yield taps[:, k], padded[_pixels(k, height, width)], rows[i], columns[j]


def _padded(keep: Tensor) -> Tensor:
    return F.pad(keep, (1, 2, 1, 2))  # 2, so that an odd side has a last pixel to read too


def _pixels(k: int, height: int, width: int) -> tuple[Any, ...]:
    """Index of the pixels, in a padded mask, that tap k reads for each output."""
    i, j = divmod(k, _TAPS)
    return (..., slice(i, i + 2 * height, 2), slice(j, j + 2 * width, 2))


def _enlarge(tap: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows @ (tap @ columns.T)


def _bilinear(count: int, length: int, tap: int, cells: Cells, axis: int, like: Tensor) -> Tensor:
    """(length, count) weights of the cells along an axis at its pixels 2 y + tap - 1."""
    at = 2 * torch.arange(length, device=like.device) + tap - 1
    place = ((at - cells.offset[axis]) / cells.stride[axis]).clamp(0, count - 1)
    low = place.floor().long()
    part = (place - low)[:, None]
    near = F.one_hot(low, count) * (1 - part)
    return (near + F.one_hot((low + 1).clamp(max=count - 1), count) * part).to(like.dtype)


def _doubled(x: Tensor, convolution: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """A 3 x 3 convolution of x enlarged twice (nearest), without enlarging x.

    Of the nine pixels that an output sees, those of one cell are equal: their weights add up, and
    differ between the four places in a cell.
    """
    # [place, cell before | same | after, tap]: which taps fall into which cell
    sums = torch.tensor(
        [[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]],
        dtype=convolution.weight.dtype,
        device=x.device,
    )
    weight = torch.einsum("auy,bvx,ocyx->oabcuv", sums, sums, convolution.weight).flatten(0, 2)
    assert convolution.bias is not None
    out = F.pixel_shuffle(F.conv2d(x, weight, convolution.bias.repeat_interleave(4), padding=1), 2)
    more = (size[0] - out.shape[-2], size[1] - out.shape[-1])
    return out if more == (0, 0) else F.pad(out, (0, more[1], 0, more[0]), mode="replicate")
