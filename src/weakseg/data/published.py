"""Score files that other code has written: the formats of published repositories, and our own.

============  =============================================================  =====================
format        one file for each image                                        written by
============  =============================================================  =====================
``psa``       ``.npy``: class from 0 -> map                                  psa, SEAM, ACR, OC-CSE
``psa-crf``   ``.npy``: 0 -> background, class + 1 -> map                    psa, SEAM after CRF
``irn``       ``.npy``: ``keys`` from 0, ``high_res`` (or ``cam``)           irn
``puzzle``    ``.npy``: ``keys`` 0, class + 1, ..., ``hr_cam`` (or ``cam``)  PuzzleCAM
``puzzle-rw`` ``.npy``: ``keys`` as above, ``rw``                            PuzzleCAM after its walk
``rs``        ``.pkl``: ``keys`` as above, ``seed``                          RS_EPM
``weakseg``   ``.npz`` of :mod:`weakseg.data.scorefile`                      this package
============  =============================================================  =====================

The format says whether classes are counted from 0 or from 1. Files are unpickled by
:mod:`weakseg.data.pickles`, which runs nothing that they ask for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from weakseg.data.pickles import Array, read_pickle, shown
from weakseg.data.samples import Sample
from weakseg.data.scorefile import read_scores
from weakseg.data.sources import count, scan
from weakseg.errors import UserError

__all__ = ["Format", "Published", "find_files", "read_published", "settle_format"]

Format = Literal["psa", "psa-crf", "irn", "puzzle", "puzzle-rw", "rs", "weakseg"]

_SUFFIXES = frozenset({".npy", ".pkl", ".npz"})
_SETTING = "seeds.given_format"
_MEND = f"write the file again, or say what wrote it ({_SETTING}: {', '.join(get_args(Format))})"
_LOOKED_AT = 64  # files whose tags tell psa from psa-crf
_ROUNDING = 1e-3  # above 1, of maps that were divided in single or half precision
_SHOWN = 8

# Key of the maps in dictionaries with ``keys``; the first that is there tells the format.
_MAPS: dict[str, tuple[Format, bool]] = {  # map key -> format, whether keys count from 1
    "hr_cam": ("puzzle", True),
    "rw": ("puzzle-rw", True),
    "seed": ("rs", True),
    "high_res": ("irn", False),
}


@dataclass(frozen=True)
class Published:
    """Score maps of one image as some code wrote them.

    Attributes:
        classes: (n,) ids as in masks, 1 to K; 0 is a background map.
        maps: (n, h, w) float32, finite and not negative; of any range.
        probabilities: (K,) at image level, where the file has them.
    """

    classes: np.ndarray
    maps: np.ndarray
    probabilities: np.ndarray | None = None

    def unit(self) -> np.ndarray:
        """(n, h, w) maps in [0, 1].

        Where any value is above 1 by more than rounding, each map is divided by its maximum, as the
        published merges do; with a background map, all by the largest, which keeps their order.
        """
        if not self.maps.size or self.maps.max() <= 1 + _ROUNDING:
            return self.maps.clip(max=1)
        axes = None if (self.classes == 0).any() else (1, 2)
        return self.maps / np.maximum(self.maps.max(axes, keepdims=True), 1e-5)


def find_files(folder: Path, samples: Sequence[Sample]) -> dict[str, Path]:
    """Sample id -> its score file, by id or, in a flat folder, by the image's bare name.

    Raises:
        UserError: Files are missing, or two files or two images may be meant; lists them.
    """
    if not folder.is_dir():
        raise UserError(
            "there is no such folder of score files", where=folder, mend="check seeds.given"
        )
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in scan(folder, suffixes=_SUFFIXES):
        by_stem[file[:-4]].append(file)
    bare: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        bare[sample.id.rpartition("/")[2]].append(sample.id)
    found, missing, doubtful = {}, [], []
    for sample in samples:
        name = sample.id.rpartition("/")[2]
        files = by_stem.get(sample.id) or (by_stem.get(name) if len(bare[name]) == 1 else None)
        if not files:
            missing.append(sample.id)
        elif len(files) > 1:
            doubtful.append(sample.id)
        else:
            found[sample.id] = folder / files[0]
    if missing or doubtful:
        ids = missing or doubtful
        what = "have no score file here" if missing else "have several score files here"
        dots = f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
        raise UserError(
            f"{len(ids):,} of {count(len(samples), 'image')} {what}: "
            f"{', '.join(ids[:_SHOWN])}{dots}",
            where=folder,
            mend=f"name one file after each image, such as {ids[0]}.npy, or leave these images out",
        )
    return found


def settle_format(
    wanted: str, files: Mapping[str, Path], tags: Mapping[str, Iterable[int]]
) -> Format:
    """The format of a folder of score files.

    ``auto`` looks at one file: its suffix and keys tell all formats apart but ``psa`` and
    ``psa-crf``, whose classes count from 0 and from 1. Those hold the tagged classes and nothing
    else, so the tags of the first files tell which of the two it is.

    Args:
        wanted: A format, or ``auto``.
        files: Sample id -> file.
        tags: Sample id -> ids of the tagged classes, 1 to K.

    Raises:
        UserError: The files fit no format, or both.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    votes: dict[Format, int] = defaultdict(int)
    for key in sorted(files)[:_LOOKED_AT]:
        kind = _kind(files[key])
        if isinstance(kind, str):
            return kind
        present = set(tags[key])
        votes["psa"] += {k + 1 for k in kind} == present
        votes["psa-crf"] += kind - {0} == present and 0 in kind
    fitting = [kind for kind, number in votes.items() if number]
    if len(fitting) == 1:
        return fitting[0]
    where = files[min(files)].parent if files else None
    raise UserError(
        "it cannot be told whether the classes of these files count from 0 (psa) or, behind a "
        "background map, from 1 (psa-crf): their classes are not those of the tags",
        where=where,
        mend=f"say what wrote them ({_SETTING}: psa or {_SETTING}: psa-crf)",
    )


def _kind(path: Path) -> Format | set[int]:
    """The format, or the classes of a file of ``psa`` or ``psa-crf``."""
    if path.suffix == ".npz":
        return "weakseg"
    value = _dictionary(path)
    for key, (kind, _) in _MAPS.items():
        if "keys" in value and key in value:
            return kind
    if all(type(key) is int for key in value):
        return set(value)
    raise UserError(
        f"the file is of no known format; it holds {', '.join(map(shown, list(value)[:5]))}",
        where=path,
        mend=_MEND,
    )


def read_published(path: Path, kind: Format) -> Published:
    """Reads one score file.

    Raises:
        UserError: The file is damaged, hostile, or of another format.
    """
    if kind == "weakseg":
        own = read_scores(path)
        return Published(*_checked(own.classes, list(own.scores), path), own.probabilities)
    value = _dictionary(path)
    if kind in ("psa", "psa-crf"):
        if not all(type(key) is int for key in value):
            raise _other(path, kind, "its keys are no class numbers")
        shift = 1 if kind == "psa" else 0
        ids = [key + shift for key in value]
        return Published(*_checked(ids, [_numbers(v, path) for v in value.values()], path))
    names = [name for name, (own, _) in _MAPS.items() if own == kind]
    name = next((n for n in (*names, "cam") if n in value), None)
    if "keys" not in value or name is None:
        raise _other(path, kind, f"it has no 'keys' or no {names[0]!r}")
    keys, maps = _numbers(value["keys"], path), _numbers(value[name], path)
    if keys.ndim != 1 or keys.dtype.kind not in "iu" or maps.ndim != 3:
        raise _other(path, kind, f"'keys' and {name!r} are no list of classes and maps for them")
    ids = keys.tolist()
    if _MAPS[names[0]][1]:
        if ids[:1] != [0]:
            raise _other(path, kind, "its 'keys' do not begin with 0, the background")
        ids = ids[1:] if len(maps) == len(ids) - 1 else ids
    else:
        ids = [key + 1 for key in ids]
    if len(ids) != len(maps):
        raise _other(path, kind, f"it has {len(ids)} classes and {len(maps)} maps")
    return Published(*_checked(ids, list(maps), path))


def _dictionary(path: Path) -> dict[Any, Any]:
    value = read_pickle(path, mend=_MEND)
    if not isinstance(value, dict):
        raise UserError("the file holds no dictionary of score maps", where=path, mend=_MEND)
    return value


def _numbers(value: Any, path: Path) -> np.ndarray:
    """The array of an entry: an array, a tensor, or a list of numbers."""
    try:
        if isinstance(value, Array):
            return value.array()
        if isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value):
            return np.array(value)
    except (UserError, OverflowError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        raise UserError(what, where=path, mend=_MEND) from None
    raise UserError(f"an entry is {shown(value)}, not an array", where=path, mend=_MEND)


def _checked(
    ids: Iterable[int], maps: Sequence[np.ndarray], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Ids in order and their maps, if they can be what they should be."""
    classes = [int(k) for k in ids]
    shapes = {m.shape for m in maps}
    if len(set(classes)) < len(classes) or any(not 0 <= k <= 2**15 - 1 for k in classes):
        raise UserError("its classes stand twice or are no class numbers", where=path, mend=_MEND)
    if len(shapes) > 1 or any(len(shape) != 2 or not math.prod(shape) for shape in shapes):
        raise UserError("its maps are not (H, W) of one size", where=path, mend=_MEND)
    if any(m.dtype.kind not in "fiub" for m in maps):
        raise UserError("its maps hold no numbers", where=path, mend=_MEND)
    if not maps:
        return np.zeros(0, np.int16), np.zeros((0, 1, 1), np.float32)
    order = np.argsort(classes)
    with np.errstate(over="ignore"):
        stacked = np.stack([np.asarray(maps[i], dtype=np.float32) for i in order])
    if not np.isfinite(stacked).all():
        raise UserError("its maps hold values that are not finite", where=path, mend=_MEND)
    return np.array(classes, dtype=np.int16)[order], stacked.clip(0)


def _other(path: Path, kind: str, what: str) -> UserError:
    return UserError(f"the file is not of the format {kind!r}: {what}", where=path, mend=_MEND)
