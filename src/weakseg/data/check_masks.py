"""Whether ground-truth masks speak of the classes that the tags name; nothing else of them is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from weakseg.data.samples import Collection

__all__ = ["check_masks"]

# Share of images whose masks show none of their classes: crowds and drawings that were forgotten;
# what must be looked at; ids of another list, or of no classes at all.
_SOME, _MOST = 0.1, 0.5
_FEW = 4  # images with tags and a mask, below which that share says nothing


def check_masks(
    collection: Collection, ids: Sequence[np.ndarray | None]
) -> Iterator[tuple[str, str]]:
    """Pairs (code, item) of what is wrong with the ids of all masks together.

    Args:
        collection: The samples.
        ids: (256,) bool of each sample, the ids in its mask; None where there is none, or where it
            cannot be read.
    """
    number = len(collection.classes)
    known = [(s, found) for s, found in zip(collection, ids, strict=True) if found is not None]
    if not known:
        return
    place = {name: i for i, name in enumerate(collection.classes, start=1)}
    tags = [{place[tag] for tag in s.tags or () if place.get(tag, 255) < 255} for s, _ in known]
    tagged = sorted(set().union(*tags))
    seen = np.any([found for _, found in known], axis=0)
    others = np.flatnonzero(seen[1:]) + 1
    if tagged and not seen[tagged].any():
        if len(others) == 1 and others[0] > number:
            yield "mask-binary", f"0 and {others[0]} in {len(known):,} masks"
            return
        for i in tagged:
            yield "masks-without-classes", collection.classes[i - 1]
    else:
        for i in tagged:
            if not seen[i]:
                yield "class-without-pixels", collection.classes[i - 1]
        yield from _others(known, tags)
    for sample, found in known:
        if found[number + 1 : 255].any():
            yield "mask-ids", sample.id


def _others(known: Sequence[tuple], tags: Sequence[set[int]]) -> Iterator[tuple[str, str]]:
    """Images whose masks show none of their own classes, where these are many."""
    judged = [(s, found, own) for (s, found), own in zip(known, tags, strict=True) if own]
    wrong = [s.id for s, found, own in judged if not found[list(own)].any()]
    if len(judged) < _FEW or len(wrong) <= _SOME * len(judged):
        return
    most = len(wrong) > _MOST * len(judged)
    for sample_id in wrong:
        yield "masks-of-other-classes" if most else "mask-of-other-classes", sample_id
