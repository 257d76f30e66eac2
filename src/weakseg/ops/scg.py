"""SCG: score maps redrawn from the correlation of features, first and second order.

Pan et al. 2021 (SPA), in the two forms that RecurSeed's authors gave (Jo et al. 2022): their first
published program, and the equations of their talk. Pixels that agree with an object's certain
pixels join it, those that agree with its certain background leave it.

Everything is computed per image on blocks of rows of symmetric N x N matrices, N = h w. What the
equations do to a column of the correlation is done here to a row of its transpose, so that a block
needs nothing from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weakseg.ops.cells import Cells, moved, place
from weakseg.ops.checks import require_batch, require_maps

__all__ = ["self_correlation"]

_EPS = 1e-10  # small beside columns that sum to 1 over N pixels
_ROUNDING = 1e-5  # of float32: less than this is no difference, and not to be brought to [0, 1]
_CHANNELS = 256  # features brought to the size of the maps at a time
_CODE_THRESHOLDS = (0.5, 0.1)  # first and second, of the published program


@torch.no_grad()
def self_correlation(
    cams: Tensor,
    features: Sequence[Tensor],
    first_threshold: float | None = None,
    second_threshold: float | None = None,
    foreground: float = 0.3,
    background: float = 0.05,
    *,
    order: Literal[1, 2] = 2,
    iterations: int = 1,
    second_weight: float = 1.0,
    form: Literal["code", "talk"] = "code",
    places: Sequence[Cells] | None = None,
    block: int | None = None,
) -> Tensor:
    """Score maps from self-correlation (SCG).

    ``form="code"``, the authors' program. With the cosine similarity S of all pairs of pixels, zero
    below ``first_threshold``, every level of features gives

        SC1 = S with columns that sum to 1,
        SC2 = P P, P = S without its diagonal and with columns that sum to 1,
              zero below second_threshold / N,
        HSC = max(SC1, second_weight SC2), with columns that sum to 1.

    The columns of HSC, summed over the levels and brought to [0, 1], are added up over the certain
    foreground of a class (score >= ``foreground``) and over its certain background (score <=
    ``background``). Each of the two sums is brought to [0, 1]; the result is the positive part of
    their difference, brought to [0, 1]. A class whose two sums are equal up to rounding becomes
    zeros.

    ``form="talk"``, the equations of their talk. With the cosine c_ij, and no threshold on it,

        SC1_ij = max(c_ij, 0),
        SC2_ij = mean over k of c_ik c_kj, each row i brought to [0, 1],
        HSC    = mean over the levels of max(SC1, second_weight SC2),
        M_j    = max(0, mean of HSC_ij over i with score > foreground
                        - mean of HSC_ij over i with score < background).

    *M is not scaled*: it is the lead of two means, and small (.05 to .2 on usual features), so
    thresholds that were made for maps with a maximum of 1 need it divided by its maxima first.

    In both, a class without certain foreground becomes zeros, and one without certain background
    has nothing taken off.

    The tensors of the code's form fit in two N x N float32 matrices (from N = 2,048 on, one
    iteration), whatever the number of channels and levels. The time goes into P P; its symmetry
    halves it, and only columns that some class uses are computed.

    Args:
        cams: (B, K, h, w) in [0, 1].
        features: One (B, C, h', w') per level; brought to the cells of the maps bilinearly.
        first_threshold: Least cosine similarity that counts; ``None`` = .5 (code). The talk has no
            thresholds.
        second_threshold: Least second-order correlation that counts, as a multiple of 1 / N;
            ``None`` = .1 (code).
        foreground: Least score of certain foreground.
        background: Greatest score of certain background.
        order: 1 leaves SC2 out.
        iterations: Code: how often P is squared; 1 gives P P. Each one more costs another product.
        second_weight: Weight of SC2.
        form: ``code`` or ``talk``, see above.
        places: Where the cells lie in the image: those of the maps, then those of each level;
            ``None`` = all share it evenly, as the published program has it.
        block: Rows computed at a time; the result does not depend on it. By default a sixteenth
            of all, but not below 128.

    Returns:
        (B, K, h, w) float32 in [0, 1].

    Raises:
        ValueError: A wrong shape, no level, a setting out of range, or one that the talk's form
            has not.
        TypeError: Maps or features that are not floating-point tensors.
    """
    require_maps("cams", cams)
    if not features:
        raise ValueError("features is empty; pass at least one level (B, C, h, w)")
    for i, level in enumerate(features):
        require_maps(f"features[{i}]", level, "B, C, h, w")
        require_batch(f"features[{i}]", level, cams, "cams")
    if places is not None and len(places) != len(features) + 1:
        raise ValueError(
            f"places has {len(places)} entries for the maps and {len(features)} levels"
        )
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order}")
    if form not in ("code", "talk"):
        raise ValueError(f'form must be "code" or "talk", not {form!r}')
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}; order=1 leaves SC2 out")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    if form == "talk":
        if first_threshold or second_threshold or iterations != 1:
            raise ValueError(
                'the talk\'s form has no thresholds and squares once; leave them out, or form="code"'
            )
        draw: Callable[..., Tensor] = _talk
        settings: tuple[float, ...] = (order, second_weight)
    else:
        first = _CODE_THRESHOLDS[0] if first_threshold is None else first_threshold
        second = _CODE_THRESHOLDS[1] if second_threshold is None else second_threshold
        draw, settings = _code, (first, second, iterations if order == 2 else 0, second_weight)

    own = None if places is None else places[0]
    others: Sequence[Cells | None] = [None] * len(features) if places is None else places[1:]
    pixels = cams.shape[-2] * cams.shape[-1]
    rows = block or max(128, -(-pixels // 16))
    refined = torch.zeros(cams.shape, device=cams.device)
    with torch.autocast(cams.device.type, enabled=False):
        for b, maps in enumerate(cams.float().flatten(2)):
            if form == "talk":
                certain, blank = maps > foreground, maps < background
            else:
                certain, blank = maps >= foreground, maps <= background
            # Background alone draws nothing: its columns are not needed either.
            sets = torch.cat([certain, blank & certain.any(1, keepdim=True)])
            used = sets.any(0)
            order_of_pixels = torch.cat([used.nonzero(), (~used).nonzero()]).flatten()
            columns = int(used.sum())
            parts = _parts(columns, pixels, rows)
            needed = [part for part in parts if part.stop <= columns]
            if not needed:
                continue
            grid = _Grid((cams.shape[-2], cams.shape[-1]), order_of_pixels, parts, needed, own)
            sets = sets[:, order_of_pixels].float()
            levels = [(level[b], there) for level, there in zip(features, others, strict=True)]
            drawn = draw(grid, levels, sets, *settings)
            refined[b].flatten(1)[:, order_of_pixels] = drawn
    return refined


_Placed = tuple[Tensor, Cells | None]  # features (C, h', w'), and where their cells lie


@dataclass(frozen=True)
class _Grid:
    """The pixels of one image, in the order and the blocks that they are worked on in.

    Attributes:
        size: (h, w).
        order: (N,) index of each pixel in h x w; used pixels come first.
        parts: Rows of each block.
        needed: Those blocks that hold used pixels.
        cells: Where they lie in the image; ``None`` = evenly, as those of all levels.
    """

    size: tuple[int, int]
    order: Tensor
    parts: list[slice]
    needed: list[slice]
    cells: Cells | None

    @property
    def pixels(self) -> int:
        """N."""
        return len(self.order)

    def correlation(self) -> Tensor:
        """Zeros, (used pixels, N)."""
        return torch.zeros((self.needed[-1].stop, self.pixels), device=self.order.device)


def _code(
    grid: _Grid,
    levels: Sequence[_Placed],
    sets: Tensor,
    first: float,
    second: float,
    iterations: int,
    weight: float,
) -> Tensor:
    """Maps (K, N) of the published program; ``sets`` (2 K, N): certain foreground, background."""
    correlation = grid.correlation()
    for level in levels:
        similarity = _similarity(level, grid, first)
        if similarity.sums().min() >= (grid.pixels - 1) * (1 - 1e-6):
            continue  # all pixels are alike: only rounding would be stretched below
        count = len(grid.needed)
        found = _hierarchy(similarity, count, second / grid.pixels, iterations, weight)
        for part, hsc in zip(grid.needed, found, strict=True):
            correlation[part] += hsc
    sums = torch.zeros_like(sets)
    for part in grid.needed:
        sums += sets[:, part] @ _unit_range(correlation[part])
    inside, outside = _unit_range(sums).chunk(2)
    lead = (inside - outside).relu()
    lead *= lead.amax(1, keepdim=True) > _ROUNDING  # or the same columns made both sums
    return _unit_range(lead)


def _talk(
    grid: _Grid, levels: Sequence[_Placed], sets: Tensor, order: int, weight: float
) -> Tensor:
    """M, (K, N), of the talk's equations; ``sets`` (2 K, N): certain foreground, background."""
    means = sets / sets.sum(1, keepdim=True).clamp(min=1) / len(levels)
    sums = torch.zeros_like(sets)
    for level in levels:
        cosine = _similarity(level, grid, None)
        for part, row in zip(grid.parts, cosine.rows, strict=True):
            row[:, part].diagonal().copy_(cosine.diagonal[part])
        scale = torch.full_like(cosine.diagonal, 1 / grid.pixels)
        products = _product(cosine, scale, len(grid.needed)) if order == 2 else None
        for i, part in enumerate(grid.needed):
            second = None if products is None else next(products)
            hsc = cosine.block(i).relu_()
            cosine.rows[i] = hsc.new_empty(0)  # later blocks read later rows only
            if second is not None:
                torch.maximum(hsc, _unit_range(second).mul_(weight), out=hsc)
            sums += means[:, part] @ hsc
    inside, outside = sums.chunk(2)
    return (inside - outside).relu()


@dataclass
class _Symmetric:
    """A symmetric N x N matrix: its lower triangle, in blocks of rows.

    Attributes:
        parts: The rows of each block.
        rows: (rows of the block, N up to the block's end) each.
        diagonal: (N,) kept aside; the blocks hold zeros there.
    """

    parts: list[slice]
    rows: list[Tensor]
    diagonal: Tensor

    def block(self, i: int) -> Tensor:
        """Whole rows of block i, (rows, N); reads blocks i and later ones only."""
        mirrored = [row[:, self.parts[i]].T for row in self.rows[i + 1 :]]
        return torch.cat([self.rows[i], *mirrored], 1)

    def sums(self) -> Tensor:
        """(N,) sums of the rows without the diagonal."""
        total = torch.zeros_like(self.diagonal)
        for part, row in zip(self.parts, self.rows, strict=True):
            total[part] += row.sum(1)
            total[: part.start] += row[:, : part.start].sum(0)
        return total


def _parts(used: int, pixels: int, rows: int) -> list[slice]:
    """Blocks of rows, such that none holds both used and unused pixels."""
    starts = [*range(0, used, rows), *range(used, pixels, rows), pixels]
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _unit_range(rows: Tensor) -> Tensor:
    """Brings each row to [0, 1]; a row that is constant up to rounding becomes zeros."""
    low, high = rows.aminmax(dim=-1, keepdim=True)
    spread = high - low
    scale = (spread > _ROUNDING * high) / (spread + _EPS)
    return (rows - low).mul_(scale)


def _similarity(level: _Placed, grid: _Grid, threshold: float | None) -> _Symmetric:
    """Cosine similarity of all pairs, from (C, h', w') features and where their cells lie.

    Zero below the threshold, and where it is negative; with ``None`` as it is.

    Inner products are gathered over chunks of channels, and their diagonal holds the norms: the
    whole feature map is never copied.
    """
    features, there = level
    parts = grid.parts
    rows = [torch.zeros((p.stop - p.start, p.stop), device=features.device) for p in parts]
    for chunk in features.split(_CHANNELS):
        if grid.cells is None or there is None:
            chunk = place(chunk[None], None, grid.size, grid.size)[0]
        else:
            chunk = moved(chunk[None], there, grid.cells, grid.size)[0]
        chunk = chunk.flatten(1)[:, grid.order]
        for part, row in zip(parts, rows, strict=True):
            row.addmm_(chunk[:, part].T, chunk[:, : part.stop])
    squares = [row[:, part].diagonal() for part, row in zip(parts, rows, strict=True)]
    scale = 1 / (torch.cat(squares).sqrt() + _EPS)
    for part, row in zip(parts, rows, strict=True):
        row.mul_(scale[part, None]).mul_(scale[: part.stop])
        if threshold is not None:
            row.masked_fill_(row < max(threshold, 0), 0)
    diagonal = torch.cat(squares)  # a copy of what the blocks lose now
    for square in squares:
        square.zero_()
    return _Symmetric(parts, rows, diagonal)


def _hierarchy(
    similarity: _Symmetric, count: int, threshold: float, iterations: int, weight: float
) -> Iterator[Tensor]:
    """The first ``count`` blocks of HSC's transpose, (rows, N) each; uses up the similarity."""
    degrees = similarity.sums()
    firsts, scale = 1 / (degrees + similarity.diagonal + _EPS), 1 / (degrees + _EPS)
    # (P P)^T = D^-1 (S D^-1 S) with D the row sums of S: all but the factor in front is symmetric.
    chain = similarity
    for _ in range(iterations - 1):
        blocks = zip(chain.parts, _product(chain, scale, len(chain.parts)), strict=True)
        rows = [block[:, : part.stop].clone() for part, block in blocks]
        chain = _Symmetric(chain.parts, rows, torch.zeros_like(scale))
    products = _product(chain, scale, count) if iterations else None
    for i, part in enumerate(similarity.parts[:count]):
        second = next(products).mul_(scale[part, None]) if products else None
        hsc = similarity.block(i)
        similarity.rows[i] = hsc.new_empty(0)  # later blocks read later rows only
        hsc[:, part].diagonal().copy_(similarity.diagonal[part])
        hsc.mul_(firsts[part, None])
        if second is not None:
            second.masked_fill_(second < threshold, 0)
            torch.maximum(hsc, second.mul_(weight), out=hsc)
        yield hsc.div_(hsc.sum(1, keepdim=True) + _EPS)


def _product(matrix: _Symmetric, scale: Tensor, count: int) -> Iterator[Tensor]:
    """The first ``count`` blocks of M diag(scale) M, (rows, N) each.

    What lies left of a diagonal block has been computed above it, and waits, mirrored.
    """
    waiting: list[list[Tensor]] = [[] for _ in range(count)]
    for i in range(count):
        block = _product_block(matrix, scale, i)
        if waiting[i]:
            block[:, : matrix.parts[i].start] = torch.cat(waiting[i], 1)
            waiting[i].clear()
        for j in range(i + 1, count):
            waiting[j].append(block[:, matrix.parts[j]].T.clone())
        yield block
        del block  # before the next one is made


def _product_block(matrix: _Symmetric, scale: Tensor, i: int) -> Tensor:
    """Block i of M diag(scale) M, (rows, N), zeros left of its diagonal block."""
    left = matrix.block(i).mul_(scale)
    block = torch.zeros_like(left)
    start = matrix.parts[i].start
    for part, row in zip(matrix.parts[i:], matrix.rows[i:], strict=True):
        before = slice(start, part.start)
        block[:, part].addmm_(left[:, : part.stop], row.T)
        block[:, before].addmm_(left[:, part], row[:, before])
    return block
