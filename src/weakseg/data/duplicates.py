"""Finds near copies among images: re-encoded, resized, recoloured or cropped by a little.

Each image leaves a *thumbnail*, 16 x 16 in gray. Two images are near copies where both hold:

1. Their 64-bit hashes differ in at most 9 bits. A bit is the sign of one of the 64 lowest
   frequencies of the thumbnail's cosine transform (the "perceptual hash").
2. Their thumbnails correlate by at least 0.9.

Why these numbers: on the 1,632 photographs of a subset of PASCAL VOC (1.33 million pairs), the
closest two different photographs differ in 9 bits and correlate by 0.59; no other pair comes
within 12 bits, and none within 14 bits correlates by more than 0.85. Copies saved as JPEG of
quality 20, at a quarter of the size, squeezed to a square or in gray differ in 2 bits at most and
correlate by 0.99; of copies cropped by 2 % at each edge, 99 in 100 differ in 9 bits at most and
correlate by 0.94, of copies cropped by 3 %, 9 in 10. Mirrored or strongly cropped copies are not
found.

Images without contrast have no thumbnail, so that blank pages are no copies of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

__all__ = ["near_copies", "thumbnail"]

SIDE = 16
"""Width and height of a thumbnail."""

_BITS = 9
_CORRELATION = 0.9
_CONTRAST = 3.0  # gray levels, standard deviation: below it there is nothing to compare
_SURE = 0.98  # an image that has so close a copy needs no closer one
_NEIGHBOURS = 4096  # in a band that very many images share, each is compared with so many
_BLOCK = 256  # images compared with others at once

_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def thumbnail(gray: np.ndarray) -> np.ndarray | None:
    """What :func:`near_copies` compares.

    Args:
        gray: (H, W) uint8.

    Returns:
        (16, 16) uint8, or None for an image without contrast.
    """
    small = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return small if small.std() >= _CONTRAST else None


def near_copies(
    thumbnails: Sequence[np.ndarray | None], groups: Sequence[int]
) -> list[tuple[int, int]]:
    """Near copies that lie in different groups.

    Two hashes that differ in at most 7 of 64 bits agree in one of 8 bytes, so only images that
    share a byte at one place are compared: 100,000 images take some 15 seconds. Of pairs that differ in 8
    or 9 bits, 99 in 100 and more share one. Where more than 4,096 images share a byte (frames of
    one film), each is compared with the next 4,096 of them in the order of the whole hash.

    Args:
        thumbnails: Of each image, as :func:`thumbnail` makes them; None is compared with nothing.
        groups: Number of each image's group.

    Returns:
        Pairs (i, j) of positions, i < j, in order: for each image that has copies in another
        group one of them, the most similar or one that correlates by 0.98.
    """
    known = np.array([i for i, t in enumerate(thumbnails) if t is not None], dtype=np.int64)
    group = np.asarray(groups)[known]
    if len(np.unique(group)) < 2:
        return []
    small = np.stack([t for t in thumbnails if t is not None]).astype(np.float32)
    hashes, vectors = _hashes(small), _unit(small)
    best = np.full(len(known), len(known))  # row of the most similar image found so far
    closest = np.zeros(len(known), dtype=np.float32)  # and its correlation
    for head, tail in _blocks(hashes):
        # Row i of the block is compared with all that follows it, until both know a sure copy.
        wanted = np.arange(len(tail)) >= np.arange(len(head))[:, None]
        wanted &= group[head][:, None] != group[tail]
        wanted &= (closest[head] < _SURE)[:, None] | (closest[tail] < _SURE)
        i, j = np.nonzero(wanted)
        left, right = head[i], tail[j]
        near = _ONES[hashes[left] ^ hashes[right]].sum(1) <= _BITS
        left, right = left[near], right[near]
        alike = np.einsum("nd,nd->n", vectors[left], vectors[right])
        sure = alike >= _CORRELATION
        for a, b in ((left[sure], right[sure]), (right[sure], left[sure])) if sure.any() else ():
            _keep_closest(best, closest, a, b, alike[sure])
    found = np.flatnonzero(best < len(known))
    pairs = {
        (min(i, j), max(i, j)) for i, j in zip(found.tolist(), best[found].tolist(), strict=True)
    }
    return sorted((int(known[i]), int(known[j])) for i, j in pairs)


def _keep_closest(
    best: np.ndarray, closest: np.ndarray, rows: np.ndarray, others: np.ndarray, alike: np.ndarray
) -> None:
    """Enters, for each of ``rows``, the most similar of ``others``; the first one among equals."""
    order = np.lexsort((others, -alike, rows))
    rows, first = np.unique(rows[order], return_index=True)
    others, alike = others[order][first], alike[order][first]
    better = (alike > closest[rows]) | ((alike == closest[rows]) & (others < best[rows]))
    best[rows[better]], closest[rows[better]] = others[better], alike[better]


def _hashes(small: np.ndarray) -> np.ndarray:
    """(N, 8) uint8: the signs of the 64 lowest frequencies, the mean left out."""
    step = np.arange(SIDE)
    waves = np.cos(np.pi * step[:9, None] * (2 * step + 1) / (2 * SIDE)).astype(np.float32)
    spectrum = (waves @ small @ waves.T).reshape(len(small), -1)
    order = np.argsort(np.add.outer(step[:9], step[:9]).ravel(), kind="stable")
    return np.packbits(spectrum[:, order[1:65]] > 0, axis=1)


def _unit(small: np.ndarray) -> np.ndarray:
    """(N, 256) float32 of mean 0 and length 1, so that a dot product is a correlation."""
    flat = small.reshape(len(small), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _blocks(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (rows, the same rows and more without the first), of rows that share a byte."""
    order = np.lexsort(hashes.T[::-1])
    for band in range(hashes.shape[1]):
        members = order[np.argsort(hashes[order, band], kind="stable")]
        edges = np.flatnonzero(np.diff(hashes[members, band])) + 1
        for rows in np.split(members, edges):
            for start in range(0, len(rows) - 1, _BLOCK):
                yield rows[start : start + _BLOCK], rows[start + 1 : start + _BLOCK + _NEIGHBOURS]
