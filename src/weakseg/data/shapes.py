"""The source ``shapes``: the drawn dataset ``shapes-v1``, written to disk when it is first asked for.

What is drawn, and why, is in :mod:`weakseg.data.drawing`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from weakseg.data.drawing import CLASSES, VERSION, draw
from weakseg.data.images import write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import check_untagged, read_options, sources
from weakseg.errors import UserError
from weakseg.files import atomic_path, cache_folder

__all__ = ["shapes"]

_OPTIONS = {"train": 500, "val": 100, "size": 128, "seed": 0}
_MOST = 100_000  # ids have five digits, so that their order is the order of names
_FIRST_INDEX = {"train": 0, "val": 1_000_000}  # val is held out for every number of train images
_MARKER = "shapes.json"


@sources.register("shapes")
def shapes(
    *,
    root: str | Path | None = None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Any = None,
    untagged: str | None = None,
    train: int = 500,
    val: int = 100,
    size: int = 128,
    seed: int = 0,
    **unknown: Any,
) -> Collection:
    """The drawn dataset, written to disk the first time it is asked for.

    Args:
        root: Folder to write to, as ``images/<id>.png`` and ``masks/<id>.png``; by default one in
            the user's cache (``$WEAKSEG_CACHE``, else ``$XDG_CACHE_HOME/weakseg``, else
            ``~/.cache/weakseg``).
        labels: Must be None, as ``masks`` and ``classes``: the drawing brings its own.
        masks: See ``labels``.
        classes: See ``labels``.
        untagged: Without effect: every image has a tag.
        train: Number of training images.
        val: Number of held-out images.
        size: Side of the images in pixels, at least 32.
        seed: Which set.
        unknown: None are known.

    Raises:
        UserError: An argument is out of range, or ``root`` holds shapes of other settings.
    """
    read_options("shapes", unknown, _OPTIONS)
    check_untagged(untagged)
    _refuse(labels=labels, masks=masks, classes=classes)
    _check_numbers(train=train, val=val, size=size, seed=seed)
    folder = _cache(size, seed) if root is None else Path(root).expanduser()
    tags = _written(folder, {"train": train, "val": val}, size, seed)
    samples = tuple(
        _sample(folder, split, i, found)
        for split, rows in tags.items()
        for i, found in enumerate(rows)
    )
    note = f"{VERSION}: drawn images of {size} pixels, seed {seed}, in {folder}."
    return Collection("shapes", CLASSES, samples, f"{VERSION} (exact)", (note,))


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name} was given, but shapes brings its own",
                where="source 'shapes'",
                mend=f"leave {name} out, or use the source 'folder' for own images",
            )


def _check_numbers(**numbers: int) -> None:
    ranges = {"train": (0, _MOST), "val": (0, _MOST), "size": (32, 4096), "seed": (0, 2**32 - 1)}
    for name, value in numbers.items():
        low, high = ranges[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UserError(
                f"{name} is {value!r}, not a whole number from {low} to {high}",
                where="source 'shapes'",
                mend=f"leave {name} out for its default, {_OPTIONS[name]}",
            )


def _cache(size: int, seed: int) -> Path:
    return cache_folder() / VERSION / f"{size}px-seed{seed}"


def _files(folder: Path, split: str, i: int) -> tuple[Path, Path]:
    name = f"{i:05}.png"
    return folder / "images" / split / name, folder / "masks" / split / name


def _sample(folder: Path, split: str, i: int, tags: tuple[str, ...]) -> Sample:
    image, mask = _files(folder, split, i)
    return Sample(f"{split}/{i:05}", image, tags, split, mask)


Tags = dict[str, list[tuple[str, ...]]]


def _written(folder: Path, counts: dict[str, int], size: int, seed: int) -> Tags:
    """Tags of all images; draws and writes those that are not there yet."""
    known = _read_marker(folder, size, seed)
    wanted: Tags = {}
    for split, count in counts.items():
        wanted[split] = known[split][:count]
        for i in range(count):
            image, mask = _files(folder, split, i)
            if i < len(known[split]) and image.is_file() and mask.is_file():
                continue
            drawing = draw(seed, _FIRST_INDEX[split] + i, size)
            _write_image(image, drawing.image)
            write_mask(mask, drawing.mask)
            wanted[split][i : i + 1] = [drawing.tags]
    longest = {s: max(known[s], wanted[s], key=len) for s in counts}
    if longest != known or not (folder / _MARKER).is_file():
        _write_marker(folder, longest, size, seed)
    return wanted


def _read_marker(folder: Path, size: int, seed: int) -> Tags:
    """Tags of the images that were written before; the marker comes last, so it vouches for all."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        settings = {name: marker[name] for name in ("version", "size", "seed")}
        known = {s: [tuple(tags) for tags in marker["tags"][s]] for s in _FIRST_INDEX}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {split: [] for split in _FIRST_INDEX}
    if settings != {"version": VERSION, "size": size, "seed": seed}:
        raise UserError(
            f"this folder holds shapes of other settings ({settings})",
            where=folder,
            mend="give another root, or leave it out to use the cache",
        )
    return known


def _write_marker(folder: Path, tags: Tags, size: int, seed: int) -> None:
    marker = {"version": VERSION, "size": size, "seed": seed, "tags": tags}
    with atomic_path(folder / _MARKER) as temporary:
        temporary.write_text(json.dumps(marker), encoding="utf-8")


def _write_image(path: Path, image: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        # Noise hardly compresses: a higher level costs time and saves little.
        Image.fromarray(image).save(temporary, format="PNG", compress_level=1)
