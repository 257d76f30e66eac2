"""What the files of one sample say: whether image and mask can be decoded, and fit."""

from __future__ import annotations

import errno
import hashlib
import io
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from weakseg.data.duplicates import thumbnail
from weakseg.data.images import (
    DECODE_ERRORS,
    LARGE,
    decode,
    open_image,
    orientation,
    oriented_size,
    read_mask,
    turned,
)
from weakseg.data.samples import Sample
from weakseg.errors import UserError

__all__ = ["ASPECT", "TINY", "Look", "look_at"]

TINY = 32
"""Shorter side in pixels, the stride of the networks: below it nothing is left of an image."""

ASPECT = 8
"""Longer side over shorter side; the most elongated photograph of PASCAL VOC 2012 has 7.0."""

_REDUCED = 64  # pixels of the shorter side that a JPEG file is decoded to at least
_ONE_LARGE = threading.Lock()  # two images of gigapixels at once may not fit into memory


@dataclass(slots=True)
class Look:
    """What one image and its mask showed.

    Attributes:
        codes: Names of the problems.
        size: (H, W) after EXIF, of an image that could be read.
        digest: Of the file.
        thumbnail: See :mod:`weakseg.data.duplicates`.
    """

    codes: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    digest: bytes | None = None
    thumbnail: np.ndarray | None = None


def look_at(sample: Sample, classes: int) -> Look:
    """Opens image and mask of a sample; may run in many threads at once."""
    look = Look()
    content = _content(sample.image, look, "missing-file", "unreadable-file")
    if content:
        look.digest = hashlib.blake2b(content, digest_size=16).digest()
        _look_at_image(content, look)
    elif content is not None:
        look.codes.append("empty-file")
    if sample.mask is not None:
        _look_at_mask(sample.mask, look, classes)
    return look


def _content(path: Path, look: Look, missing: str, unreadable: str) -> bytes | None:
    try:
        # Anything else may never end: a pipe waits for its writer.
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        look.codes.append(unreadable)
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        look.codes.append(missing if absent else unreadable)
    except ValueError:  # no file can have a name with a NUL
        look.codes.append(missing)
    return None


def _look_at_image(content: bytes, look: Look) -> None:
    try:
        with open_image(io.BytesIO(content)) as image:
            _look_at_opened(image, look)
    except UnidentifiedImageError:
        look.codes.append("not-an-image")
    except Image.DecompressionBombError:
        look.codes.append("decompression-bomb")
    except DECODE_ERRORS as error:
        short = "truncat" in str(error).lower()
        look.codes.append("truncated-file" if short else "unreadable-file")


def _look_at_opened(image: Image.Image, look: Look) -> None:
    turn, size, mode = orientation(image), oriented_size(image), image.mode
    codes = ["animated"] * _is_animated(image)
    if image.width * image.height > LARGE:
        codes.append("large-image")
        with _ONE_LARGE:
            gray = _gray(image)
    else:
        gray = _gray(image)
    codes += ["converted"] * (mode != "RGB" or "transparency" in image.info)
    codes += ["rotated"] * (turn > 1)
    codes += ["tiny-image"] * (min(size) < TINY)
    codes += ["elongated"] * (max(size) > ASPECT * min(size))
    look.codes += codes
    look.size = size
    look.thumbnail = thumbnail(turned(gray, turn))


def _is_animated(image: Image.Image) -> bool:
    # Cameras append previews and depth maps to a JPEG file as further frames of an "MPO".
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:  # a damaged later frame; the first one is what counts
        return True


def _gray(image: Image.Image) -> np.ndarray:
    """Decodes the whole file, to (h, w) uint8.

    A JPEG file is decoded at a reduced size, which takes a fifth of the time for a photograph of
    12 megapixels and still reads all of the file, so that truncation is noticed.
    """
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        image.draft("L", (_REDUCED, _REDUCED))
        image.load()
        return np.asarray(image.convert("L"))
    return cv2.cvtColor(decode(image, turn=False), cv2.COLOR_RGB2GRAY)


def _look_at_mask(path: Path, look: Look, classes: int) -> None:
    content = _content(path, look, "mask-missing-file", "mask-unreadable")
    if content is None:
        return
    try:
        mask = read_mask(io.BytesIO(content), name=path)
    except UserError:
        look.codes.append("mask-colours" if _has_colours(content) else "mask-unreadable")
        return
    if look.size is not None and mask.shape != look.size:
        look.codes.append("mask-size")
    present = np.bincount(mask.ravel(), minlength=256)
    if present[classes + 1 : 255].any():
        look.codes.append("mask-ids")


def _has_colours(content: bytes) -> bool:
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.format != "JPEG" and len(image.getbands()) > 1
    except DECODE_ERRORS:
        return False
