"""One page of masks sorted by their estimated quality, for those who rather look than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weakseg.data.images import read_mask
from weakseg.data.samples import Sample
from weakseg.ops import MaskQuality
from weakseg.report.page import render, write_text
from weakseg.report.pictures import chip_colour, overlay, photo, thumbnail

__all__ = ["write_quality_page"]

Row = tuple[Sample, Path, MaskQuality]
"""Image, mask, estimate."""


def write_quality_page(
    path: Path, rows: Sequence[Row], total: int, classes: Sequence[str] = ()
) -> None:
    """Writes a self-contained HTML page.

    Args:
        path: File to write.
        rows: What to show, in this order.
        total: How many masks there are in all.
        classes: Names of the ids 1..K, where known.
    """
    shown = []
    for place, (sample, mask, quality) in enumerate(rows, start=1):
        rgb = thumbnail(sample)
        shown.append(
            {
                "place": place,
                "id": sample.id,
                "quality": quality,
                "why": _why(quality),
                "chips": _chips(mask, classes),
                "image": None if rgb is None else photo(rgb),
                "overlay": None if rgb is None else overlay(rgb, mask),
            }
        )
    write_text(path, render("quality.html.j2", {"rows": shown, "total": total}))


def _chips(mask: Path, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Name and colour of each class in the mask."""
    ids = [int(c) for c in np.unique(read_mask(mask)) if c not in (0, 255)]
    return [(classes[c - 1] if c <= len(classes) else f"class {c}", chip_colour(c)) for c in ids]


def _why(quality: MaskQuality) -> str:
    """What lowers the estimate most, in words."""
    if not quality.classes:
        return "no foreground at all"
    losses = {
        "its outline does not follow the image's colours": 1 - quality.agreement,
        f"{quality.border:.0%} of the image's border is foreground": quality.border,
        f"{quality.classes} classes, which are easily confused": 1 - quality.classes**-0.5,
    }
    worst = max(losses, key=lambda words: losses[words])
    return worst if losses[worst] > 0.05 else "nothing stands out"
