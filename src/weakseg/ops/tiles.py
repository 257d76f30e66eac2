"""Large images in overlapping tiles whose results join without seams, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Span", "spans", "stitch"]


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in pixels of the image.

    Attributes:
        start: First pixel that the network sees.
        stop: One behind the last that it sees.
        first: First pixel whose result counts; what lies before is context.
        last: One behind the last whose result counts.
        blend: Pixels behind ``first`` that are shared with the tile before; 0 at the image's edge.
        fade: Pixels before ``last`` that are shared with the next tile; likewise.
    """

    start: int
    stop: int
    first: int
    last: int
    blend: int
    fade: int


def spans(length: int, tile: int, overlap: int, blend: int) -> list[Span]:
    """Tiles that cover an axis.

    Neighbours share ``overlap`` pixels: context on both sides, and ``blend`` in their middle over
    which one fades into the other. Every tile begins at a multiple of ``tile - overlap``, so that
    the cells of a network with strides fall where they fall in the whole image; the last tile is
    cut at the image's edge.

    Args:
        length: Pixels of the axis.
        tile: Pixels of a tile.
        overlap: Pixels that neighbours share, less than ``tile / 2``.
        blend: Pixels of them in which both count, 1 to ``overlap``; even where ``overlap`` is.
    """
    if not 0 < blend <= overlap < tile / 2 or (overlap - blend) % 2:
        raise ValueError(f"tiles of {tile} with an overlap of {overlap} cannot blend {blend}")
    step, context = tile - overlap, (overlap - blend) // 2
    starts = range(0, max(1, length - overlap), step)
    found = []
    for start in starts:
        stop = min(start + tile, length)
        begins, ends = start == 0, start == starts[-1]
        found.append(
            Span(
                start,
                stop,
                0 if begins else start + context,
                length if ends else stop - context,
                0 if begins else blend,
                0 if ends else blend,
            )
        )
    return found


def stitch(
    rows: list[Span], columns: list[Span], result: Callable[[slice, slice], Tensor]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Results of tiles, blended: a weighted mean whose weights fall linearly to 0.

    What is kept at a time is one tile, its strip shared with the next one, and as many rows of the
    whole image as the tiles above and below share.

    Args:
        rows: Tiles of the vertical axis.
        columns: Tiles of the horizontal axis.
        result: Gives (C, h, w) of the pixels in two slices of the image.

    Yields:
        Slices of rows and columns, and (C, h, w) of the pixels there, on the tiles' device; each
        pixel once.
    """
    width = columns[-1].last
    above: Tensor | None = None  # (C, blend, width), already weighted
    for row in rows:
        beside: Tensor | None = None
        for column in columns:
            found = result(slice(row.start, row.stop), slice(column.start, column.stop))
            found = found[
                :,
                row.first - row.start : row.last - row.start,
                column.first - column.start : column.last - column.start,
            ].clone()
            # Along the row first: what is then handed down is blended already.
            if beside is not None:
                found[..., : column.blend] *= _rise(column.blend, found)
                found[..., : column.blend] += beside
            beside = None
            if column.fade:
                beside = found[..., -column.fade :] * (1 - _rise(column.fade, found))
            right = column.last - column.fade
            found = found[..., : right - column.first]
            here = slice(column.first, right)
            if row.blend and above is not None:
                found[:, : row.blend] *= _rise(row.blend, found)[:, None]
                found[:, : row.blend] += above[..., here]
            if row.fade:
                if above is None:
                    above = found.new_empty(len(found), row.fade, width)
                above[..., here] = found[:, -row.fade :] * (1 - _rise(row.fade, found)[:, None])
            below = row.last - row.fade
            yield slice(row.first, below), here, found[:, : below - row.first]


def _rise(count: int, like: Tensor) -> Tensor:
    """Weights of the later tile over the pixels that two tiles share."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count
