"""Score maps of one image on disk: an ``.npz`` without pickle.

Keys: ``classes`` int16 (n,), ids as in masks (1..K, and 0 where the method gives a background
map); ``scores`` uint8 or float16 (n, h, w); ``stride`` int16; ``size`` int32 (H, W) of the image;
and, where the network classifies, ``probabilities`` float16 (K,) at image level.
"""

from __future__ import annotations

import io
import threading
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from weakseg.errors import UserError
from weakseg.files import atomic_path

__all__ = ["ScoreFile", "read_scores", "write_scores"]

# numpy reads array headers with ast.literal_eval, which CPython before 3.11.9 and 3.12.3 does not
# run safely in two threads at once (python/cpython#106905); score files are read by many.
_HEADERS = threading.Lock()


_BYTES = 2**29  # of the arrays of a file: 20 classes of an image of 12 megapixels take a half
_PIXELS = 2**33  # of an image


@dataclass(frozen=True)
class ScoreFile:
    """Score maps of one image.

    Attributes:
        classes: (n,) int16 ids as in masks, increasing; 0 is a background map.
        scores: (n, h, w) float32 in [0, 1].
        stride: Pixels of the image in one cell.
        size: (H, W) of the image.
        probabilities: (K,) of each class at image level, where the network classifies.
    """

    classes: np.ndarray
    scores: np.ndarray
    stride: int
    size: tuple[int, int]
    probabilities: np.ndarray | None = None

    def foreground(self) -> tuple[np.ndarray, np.ndarray]:
        """(m,) ids and (m, h, w) maps of the foreground classes."""
        keep = self.classes > 0
        return self.classes[keep], self.scores[keep]

    def background(self) -> np.ndarray | None:
        """(h, w) background map, where the method gives one."""
        found = np.flatnonzero(self.classes == 0)
        return self.scores[found[0]] if found.size else None

    def resized(self, shape: tuple[int, int]) -> ScoreFile:
        """The maps bilinearly resized to (h, w)."""
        if self.scores.shape[1:] == shape:
            return self
        maps = np.empty((len(self.classes), *shape), dtype=np.float32)
        for i, score in enumerate(self.scores):
            cv2.resize(score, shape[::-1], dst=maps[i], interpolation=cv2.INTER_LINEAR)
        return self.with_maps(self.classes, maps)

    def full_size(self) -> ScoreFile:
        """The maps bilinearly resized to the image's size."""
        return self.resized(self.size)

    def with_maps(self, classes: np.ndarray, maps: np.ndarray) -> ScoreFile:
        """Other maps of the same image."""
        stride = max(1, round(self.size[0] / maps.shape[1]))
        return replace(self, classes=classes, scores=maps, stride=stride)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) largest foreground score and (h, w) uint8 id of its class; zeros without any."""
        ids, maps = self.foreground()
        if not len(ids):
            return np.zeros(self.scores.shape[1:], np.float32), np.zeros(
                self.scores.shape[1:], np.uint8
            )
        return maps.max(0), ids[maps.argmax(0)].astype(np.uint8)


def write_scores(
    path: Path, scores: ScoreFile, *, dtype: Literal["uint8", "float16"] = "uint8"
) -> None:
    """Writes a score file atomically; uint8 rounds to steps of 1/255."""
    values = scores.scores
    arrays = {
        "classes": scores.classes.astype(np.int16),
        "scores": np.rint(values * 255).astype(np.uint8)
        if dtype == "uint8"
        else values.astype(np.float16),
        "stride": np.int16(scores.stride),
        "size": np.asarray(scores.size, dtype=np.int32),
    }
    if scores.probabilities is not None:
        arrays["probabilities"] = scores.probabilities.astype(np.float16)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_scores(path: Path) -> ScoreFile:
    """Reads a score file.

    Raises:
        UserError: The file is missing, damaged, or not a score file.
    """
    try:
        file = _read_arrays(path)
        scores = file["scores"]
        if scores.dtype.kind not in "uf":
            raise ValueError(f"scores are {scores.dtype}")
        scale = np.float32(1 / 255) if scores.dtype == np.uint8 else np.float32(1)
        height, width = (int(side) for side in file["size"])
        found = ScoreFile(
            file["classes"],
            scores.astype(np.float32) * scale,
            int(file["stride"]),
            (height, width),
            file["probabilities"].astype(np.float32) if "probabilities" in file else None,
        )
        _check(found)
        return found
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on a damaged file
        raise UserError(
            f"is not a readable score file ({error})",
            where=path,
            mend="delete it and run `weakseg seeds` again",
        ) from None


def _check(found: ScoreFile) -> None:
    """Raises a ValueError where the arrays cannot be score maps of one image."""
    ids, maps = found.classes, found.scores
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or maps.ndim != 3 or len(maps) != len(ids):
        raise ValueError(f"classes {ids.shape} {ids.dtype} do not fit scores {maps.shape}")
    if len(ids) and (ids[0] < 0 or ids[-1] > 254 or (np.diff(ids.astype(np.int64)) <= 0).any()):
        raise ValueError("the classes are no increasing ids of 0 to 254")
    height, width = found.size
    if min(*maps.shape[1:], height, width, found.stride) < 1 or height * width > _PIXELS:
        raise ValueError(f"maps of {maps.shape[1:]} for an image of {height} x {width}")
    if not (np.isfinite(maps).all() and maps.min(initial=0) >= 0 and maps.max(initial=0) <= 1.001):
        raise ValueError("scores are not in [0, 1]")
    if found.probabilities is not None and not np.isfinite(found.probabilities).all():
        raise ValueError("probabilities are not finite")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, as ``np.load`` gives them, safe in any number of threads."""
    with zipfile.ZipFile(path) as file:
        declared = sum(entry.file_size for entry in file.infolist())
        if declared > _BYTES:
            raise ValueError(f"it unpacks to {declared:,} bytes")
        members = {name: file.read(name) for name in file.namelist()}
    with _HEADERS:
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(data), allow_pickle=False
            )
            for name, data in members.items()
        }
