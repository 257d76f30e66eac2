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

from weakseg.data.depth import Reading
from weakseg.data.duplicates import thumbnail
from weakseg.data.images import (
    DECODE_ERRORS,
    LARGE,
    MissingBandError,
    band_values,
    colour_bands,
    decode,
    is_deep,
    open_image,
    orientation,
    oriented_size,
    turned,
)
from weakseg.data.samples import Sample
from weakseg.data.tiff import RawTiff
from weakseg.errors import UserError

__all__ = ["ASPECT", "TINY", "Look", "look_at"]

TINY = 32
"""Shorter side in pixels, the stride of the networks: below it nothing is left of an image."""

ASPECT = 8
"""Longer side over shorter side; the most elongated photograph of PASCAL VOC 2012 has 7.0."""

_FAINT = 16  # of 256 levels that 99 % of the pixels of an image of more than 8 bits span, at least
_BEYOND = 0.05  # share of its values that may lie beyond the range that becomes 0 to 255
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
        mask_ids: (256,) bool, the ids in a mask that could be read.
    """

    codes: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    digest: bytes | None = None
    thumbnail: np.ndarray | None = None
    mask_ids: np.ndarray | None = None


def look_at(sample: Sample) -> Look:
    """Opens image and mask of a sample; may run in many threads at once."""
    look = Look()
    content = _content(sample.image, look, "missing-file", "unreadable-file")
    if content:
        look.digest = hashlib.blake2b(content, digest_size=16).digest()
        _look_at_image(content, look, sample.reading)
    elif content is not None:
        look.codes.append("empty-file")
    if sample.mask is not None:
        _look_at_mask(sample, look)
    return look


def _content(path: Path, look: Look, missing: str, unreadable: str) -> bytes | None:
    try:
        # Anything else may never end: a pipe waits for its writer.
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        look.codes.append(unreadable)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            look.codes.append("forbidden-file" if missing == "missing-file" else "mask-forbidden")
            return None
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        look.codes.append(missing if absent else unreadable)
    except ValueError:  # no file can have a name with a NUL
        look.codes.append(missing)
    return None


def _look_at_image(content: bytes, look: Look, reading: Reading) -> None:
    try:
        with open_image(io.BytesIO(content)) as image:
            _look_at_opened(image, look, reading)
    except UnidentifiedImageError:
        look.codes.append("not-an-image")
    except Image.DecompressionBombError:
        look.codes.append("decompression-bomb")
    except MissingBandError:
        look.codes.append("missing-band")
    except DECODE_ERRORS as error:
        short = "truncat" in str(error).lower()
        look.codes.append("truncated-file" if short else "unreadable-file")


def _look_at_opened(image: Image.Image, look: Look, reading: Reading) -> None:
    turn, size, mode = orientation(image), oriented_size(image), image.mode
    codes = ["animated"] * _is_animated(image)
    plain = mode == "RGB" and not (is_deep(image) or isinstance(image, RawTiff))
    plain = plain and "transparency" not in image.info
    if image.width * image.height > LARGE:
        codes.append("large-image")
        with _ONE_LARGE:
            gray = _gray(image, reading, codes)
    else:
        gray = _gray(image, reading, codes)
    codes += ["converted"] * (not plain)
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


def _gray(image: Image.Image, reading: Reading, codes: list[str]) -> np.ndarray:
    """Decodes the whole file, to (h, w) uint8; adds what is wrong with its range of values.

    A JPEG file is decoded at a reduced size, which takes a fifth of the time for a photograph of
    12 megapixels and still reads all of the file, so that truncation is noticed.
    """
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        colour_bands(len(image.getbands()), None, reading)  # are they there?
        image.draft("L", (_REDUCED, _REDUCED))
        image.load()
        return np.asarray(image.convert("L"))
    deep = is_deep(image)
    limits = reading.limits
    if deep and limits is not None:
        values = band_values(image)
        beyond = ((values < limits[0]) | (values > limits[1])).mean()
        codes += ["beyond-depth"] * bool(beyond > _BEYOND)
    rgb = decode(image, turn=False, reading=reading)
    if deep:
        low, high = np.percentile(rgb, (0.5, 99.5))
        codes += ["faint-image"] * bool(high - low < _FAINT)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def _look_at_mask(sample: Sample, look: Look) -> None:
    assert sample.mask is not None
    content = _content(sample.mask, look, "mask-missing-file", "mask-unreadable")
    if content is None:
        return
    try:
        mask = sample.truth(io.BytesIO(content))
    except UserError:
        look.codes.append("mask-colours" if _has_colours(content) else "mask-unreadable")
        return
    if look.size is not None and mask.shape != look.size:
        look.codes.append("mask-size")
    look.mask_ids = np.bincount(mask.ravel(), minlength=256) > 0


def _has_colours(content: bytes) -> bool:
    try:
        with open_image(io.BytesIO(content)) as image:
            bands = image.bands if isinstance(image, RawTiff) else len(image.getbands())
            return image.format != "JPEG" and bands > 1
    except DECODE_ERRORS:
        return False
