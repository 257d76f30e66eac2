"""How the project opens images and masks, and writes masks; formats of annotation tools aside.

Every stage sees an image through :func:`read_image`, so that what was checked is what is trained
on: EXIF rotation applied, any mode turned into 8-bit RGB. How values of more than 8 bits and
further bands become that is a :class:`~weakseg.data.depth.Reading`, one for all of a collection.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from weakseg.data.depth import Reading, fitting_depth, scaled, spread
from weakseg.data.tiff import MAGIC, RawTiff, by_tags
from weakseg.errors import UserError
from weakseg.files import atomic_path

__all__ = [
    "DECODE_ERRORS",
    "LARGE",
    "PIXELS_PER_BYTE",
    "MissingBandError",
    "band_values",
    "colour_bands",
    "decode",
    "has_alpha",
    "image_size",
    "is_deep",
    "open_error",
    "open_image",
    "orientation",
    "oriented_size",
    "read_binary_mask",
    "read_image",
    "read_large_image",
    "read_mask",
    "same_shape",
    "turned",
    "voc_palette",
    "write_mask",
]

LARGE = 89_478_485
"""Pixels above which an image is large: as many as Pillow warns of, a quarter of a GiB in RGB."""

PIXELS_PER_BYTE = 200
"""A large image with more pixels for each byte of its file is a decompression bomb. Photographs
of PASCAL VOC have 2 to 84; a blank page takes JPEG about 100, and deflate can reach 1,000."""

_ALONE = Reading()
_LIMIT = threading.Lock()
_ORIENTATION = 0x0112
_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_WITHOUT_BANDS = frozenset({"1", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})  # converted as ever
_ROWS = 256  # that are taken over from Pillow at a time
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged files; anything else is a bug and must surface."""


class MissingBandError(ValueError):
    """A file has fewer bands than are to be read."""


def read_image(
    path: str | Path, *, max_side: int | None = None, reading: Reading = _ALONE
) -> np.ndarray:
    """The image as the whole project sees it.

    EXIF orientation is applied. Gray and palette images become RGB, values of more than 8 bits
    are scaled by ``reading``, transparency is laid on white, CMYK is converted.

    Args:
        path: File in any format that Pillow reads; TIFF with any number of bands of 8 to 64 bits.
        max_side: If the longer side is longer than this many pixels, the image is reduced to it,
            with antialiasing. Images are never enlarged.
        reading: Range of values and bands; that of the collection (``Sample.reading``) or of the
            model, so that all images are read alike. By default an image of more than 8 bits has
            its own range.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous and writable.

    Raises:
        UserError: The file is missing, truncated or not an image.
    """
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be positive, got {max_side}")
    try:
        with open_image(path) as image:
            return decode(image, max_side=max_side, reading=reading)
    except DECODE_ERRORS as error:
        raise open_error(path, error) from error


def read_large_image(path: str | Path, *, reading: Reading = _ALONE) -> np.ndarray:
    """Like :func:`read_image` without ``max_side``, of any size and with less memory.

    Pillow holds RGB in four bytes for each pixel; it is taken over a few rows at a time, so that
    the peak is these and the result.

    Returns:
        (H, W, 3) uint8 RGB; a view of other memory order where EXIF turns the image.

    Raises:
        UserError: The file is missing, truncated or not an image.
    """
    try:
        with open_image(path) as image:
            turn = orientation(image)
            if reading.chosen is not None or isinstance(image, RawTiff) or is_deep(image):
                return decode(image, reading=reading)  # not Pillow's four bytes for each pixel
            image.load()
            width, height = image.size
            pixels = np.empty((height, width, 3), dtype=np.uint8)
            for top in range(0, height, _ROWS):
                below = min(top + _ROWS, height)
                pixels[top:below] = np.asarray(_to_rgb(image.crop((0, top, width, below)), reading))
    except DECODE_ERRORS as error:
        raise open_error(path, error) from error
    return turned(pixels, turn)


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """The image as Pillow opens it, not decoded, under a limit of the project's own.

    Pillow refuses every image of more than 179 million pixels, and a microscope's 20,000 x 20,000
    is no attack. Here an image is refused where it declares more than :data:`LARGE` pixels *and*
    more than :data:`PIXELS_PER_BYTE` of them for each byte of its file.

    Raises:
        Image.DecompressionBombError: It is refused. Nothing of it was decoded.
        OSError: And all of ``DECODE_ERRORS``, as ``Image.open``.

    Returns:
        Of a TIFF file of which Pillow would lose something, a :class:`~weakseg.data.tiff.RawTiff`.
    """
    if isinstance(source, str | Path):
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):  # a pipe would wait for its writer
            raise OSError("it is no file")
        length = found.st_size
    else:
        length = source.seek(0, os.SEEK_END)
        source.seek(0)
    if length * PIXELS_PER_BYTE < LARGE:
        image = _opened(source)
    else:
        with _LIMIT:  # the limit is Pillow's global variable
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = _opened(source)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    pixels = image.weight() if isinstance(image, RawTiff) else image.width * image.height
    if pixels > max(LARGE, length * PIXELS_PER_BYTE):
        image.close()
        raise Image.DecompressionBombError(
            f"it declares {image.width:,} x {image.height:,} pixels in {length:,} bytes, as a "
            "decompression bomb does"
        )
    return image


def _opened(source: str | Path | BinaryIO) -> Image.Image:
    if _head(source, 4) not in MAGIC:
        return Image.open(source)
    given = source if not isinstance(source, str | Path) else os.fspath(source)
    try:
        found, error = RawTiff(given), None
    except (SyntaxError, ValueError) as unknown:  # of a layout that only Pillow knows
        found, error = None, unknown
    if found is not None and not found.plain:
        return found
    if isinstance(source, str | Path):
        if found is not None:
            found.close()
    else:
        source.seek(0)
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        if error is None:
            return RawTiff(given)
        raise OSError(str(error)) from None


def _head(source: str | Path | BinaryIO, count: int) -> bytes:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return file.read(count)
    source.seek(0)
    found = source.read(count)
    source.seek(0)
    return found


def decode(
    image: Image.Image,
    *,
    max_side: int | None = None,
    turn: bool = True,
    reading: Reading = _ALONE,
) -> np.ndarray:
    """Like :func:`read_image`, for an image that has been opened but not yet decoded.

    Without ``turn``, the EXIF orientation is not applied. Raises whatever Pillow's decoder raises.
    """
    rotation = _TURNS.get(orientation(image)) if turn else None
    target = _reduced(image.size, max_side)
    if target != image.size:
        # Twice the target keeps the antialiased resize in charge of the quality.
        image.draft(None, (2 * target[0], 2 * target[1]))
    rgb = _to_rgb(image, reading)
    if rgb.size != target:
        pixels = cv2.resize(np.asarray(rgb), target, interpolation=cv2.INTER_AREA)
        rgb = Image.fromarray(pixels)
    return np.array(rgb.transpose(rotation) if rotation is not None else rgb)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W) or (H, W, bands) pixels after an EXIF orientation of 1 to 8: a view of them."""
    swapped = pixels.swapaxes(0, 1)
    views = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }
    return views.get(orientation, pixels)


def image_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of the image as :func:`read_image` would return it; reads the header only.

    Raises:
        UserError: The file is missing or not an image.
    """
    try:
        with open_image(path) as image:
            return oriented_size(image)
    except DECODE_ERRORS as error:
        raise open_error(path, error) from error


def same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two (H, W) can be one image at two sizes, each side rounded to whole pixels, and to
    one at least."""
    (h, w), (height, width) = first, second
    rounding = 1.0 if 1 in (h, w, height, width) else 0.5
    return abs(h * width - w * height) <= rounding * max(h + w, height + width)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of an opened image after its EXIF orientation."""
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def orientation(image: Image.Image) -> int:
    """What is left to be applied of the EXIF orientation, 1 to 8; must be asked before decoding."""
    if isinstance(image, RawTiff):
        return image.turn
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF files itself, and reports the turned size
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # otherwise Pillow decodes the whole file to look for a trailing EXIF chunk
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1  # broken metadata does not spoil an image
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def open_error(path: str | Path, error: BaseException) -> UserError:
    """The UserError for what Pillow raised while it opened or decoded ``path``."""
    if isinstance(error, FileNotFoundError):
        return UserError(
            "there is no such image file", where=path, mend="restore it or leave it out"
        )
    if isinstance(error, PermissionError):
        return UserError(
            "the image may not be read", where=path, mend="change the permissions of the file"
        )
    if isinstance(error, UnidentifiedImageError):
        return UserError("this file is not an image", where=path, mend="replace it or leave it out")
    if isinstance(error, MissingBandError):
        return UserError(
            str(error), where=path, mend="set data.bands to bands that all images have, or to null"
        )
    return UserError(
        f"the image cannot be read ({_first_line(error)})",
        where=path,
        mend="copy the file again from its origin, or leave it out",
    )


def read_mask(source: str | Path | BinaryIO, *, name: str | Path | None = None) -> np.ndarray:
    """Class ids of an indexed mask: 0 background, 1..K classes, 255 unsure.

    Args:
        source: Palette or 8-bit gray file (16-bit if all values fit in 8 bits), or an open one.
        name: What to call it in an error, where ``source`` is not a path.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: The file cannot be read, is lossy (JPEG), or holds colours instead of ids.
    """
    where = name if name is not None else source
    try:
        with open_image(source) as image:
            kind, mode, ids = image.format, image.mode, _stored(image)
    except DECODE_ERRORS as error:
        raise _mask_error(error, where) from error
    if kind == "JPEG":
        raise UserError(
            "a JPEG file cannot hold a mask: its compression changes class ids",
            where=where,
            mend="save masks as indexed PNG files",
        )
    single = ids.shape[2] == 1 and ids.dtype.kind != "f"
    if not single or ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise UserError(
            f"a mask holds one class id of 0 to 255 for each pixel, this one has mode {mode}",
            where=where,
            mend="turn colours into ids and save it as an 8-bit indexed PNG; where white is the one "
            "object and black is not, set data.masks_are: binary",
        )
    return ids[..., 0].astype(np.uint8)


def read_binary_mask(
    source: str | Path | BinaryIO, value: int, *, name: str | Path | None = None
) -> np.ndarray:
    """An object in white (any gray, colour or index above 0) on black, as ids.

    Pixels count as the object above half of the mask's largest value, so that soft outlines are
    cut in the middle; in JPEG files from 128.

    Args:
        source: Image file of any mode, or an open one.
        value: Id of the object; 255 for pixels of which nobody says what they are.
        name: What to call it in an error, where ``source`` is not a path.

    Returns:
        (H, W) uint8 of 0 and ``value``.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with open_image(source) as image:
            lossy, clear = image.format == "JPEG", has_alpha(image)
            stored = _stored(image)
    except DECODE_ERRORS as error:
        raise _mask_error(error, name if name is not None else source) from error
    if clear:
        stored = stored[..., :-1] * (stored[..., -1:] > 0)
    most = np.nan_to_num(stored).max(axis=2)
    least = 127 if lossy else most.max(initial=0) / 2
    return np.where(most > least, value, 0).astype(np.uint8)


def _stored(image: Image.Image) -> np.ndarray:
    """(H, W, bands) values; Pillow turns TIFF files itself."""
    turn = image.turn if isinstance(image, RawTiff) else 1
    return turned(band_values(image), turn)


def _mask_error(error: BaseException, where: object) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(
            "the mask may not be read", where=where, mend="change the permissions of the file"
        )
    return UserError(
        f"the mask cannot be read ({_first_line(error)})",
        where=where,
        mend="write it again as an 8-bit indexed PNG",
    )


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Writes class ids as a palette PNG in VOC colours, whole or not at all.

    Args:
        path: File to write; its folder is made if need be.
        mask: (H, W) integers of 0 to 255, or booleans.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise ValueError(f"a mask is (H, W) of integers, got {mask.shape} {mask.dtype}")
    if mask.size and (mask.min() < 0 or mask.max() > 255):
        raise ValueError(f"class ids are 0 to 255, got {mask.min()} to {mask.max()}")
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(voc_palette().tobytes())
    with atomic_path(Path(path)) as temporary:
        image.save(temporary, format="PNG")


def voc_palette() -> np.ndarray:
    """(256, 3) uint8: colour of each class id in PASCAL VOC masks; 255 is (224, 224, 192).

    Bits 0, 1, 2 of the id go to R, G, B, first to bit 7, then those of ``id >> 3`` to bit 6, ...
    """
    ids = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.int64)
    for step in range(8):
        bits = (ids >> (3 * step + np.arange(3))) & 1
        colours |= bits << (7 - step)
    return colours.astype(np.uint8)


def _reduced(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    scale = max_side / longer
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image that is not decoded yet holds values of more than 8 bits."""
    if isinstance(image, RawTiff):
        return image.dtype != np.uint8
    return image.mode.startswith(("I", "F")) or _is_deep_png(image)


def has_alpha(image: Image.Image) -> bool:
    """Whether the last one of two or four bands of an opened image is tagged as transparency."""
    if isinstance(image, RawTiff):
        return image.alpha is not None
    return image.mode in _WITH_ALPHA


def band_values(image: Image.Image) -> np.ndarray:
    """(H, W, bands) values of an opened image as they are stored, in the file's own type.

    The image must not have been decoded before, unless its values are of 8 bits; palettes are not
    resolved, and the EXIF orientation is not applied. Raises whatever the decoder raises.
    """
    tags = by_tags(image)
    if tags is not None and image.mode != "P":
        return tags.values()
    if _is_deep_png(image):
        return _deep_png(image)
    image.load()
    values = np.asarray(image)
    return values[..., None] if values.ndim == 2 else values


def _is_deep_png(image: Image.Image) -> bool:
    """Pillow keeps the upper 8 bits of colours in PNG files of 16; gray ones it keeps whole."""
    if not isinstance(image, PngImageFile) or image.mode not in {"RGB", "RGBA"} or not image.tile:
        return False
    return "16" in str(image.tile[0][3])


def _deep_png(image: Image.Image) -> np.ndarray:
    assert isinstance(image, PngImageFile) and image.fp is not None
    image.fp.seek(0)
    content = image.fp.read()
    with Image.open(io.BytesIO(content)) as whole:
        whole.load()  # OpenCV does not mind a file that ends too early
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise OSError("its 16-bit values cannot be decoded")
    return values[..., [2, 1, 0, 3][: values.shape[2]]]


def _to_rgb(image: Image.Image, reading: Reading) -> Image.Image:
    """Decodes, and converts any mode to RGB."""
    chosen = None if image.mode in _WITHOUT_BANDS else reading.chosen
    if is_deep(image) or isinstance(image, RawTiff) or chosen is not None:
        return Image.fromarray(_of_bands(image, reading))
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "transparency" in image.info or image.mode in _WITH_ALPHA:
        return _on_white(image)
    return image.convert("RGB")


def _of_bands(image: Image.Image, reading: Reading) -> np.ndarray:
    """(H, W, 3) uint8 of values of any type and any number of bands."""
    tags = by_tags(image)
    alpha = tags.alpha if tags is not None else _last(image) if has_alpha(image) else None
    values = band_values(image)
    bands = colour_bands(values.shape[2], alpha, reading)
    colours = values[..., list(bands)]
    if colours.dtype != np.uint8:
        found = spread(colours)
        depth = reading.depth or (fitting_depth(found) if found is not None else 8)
        colours = scaled(colours, depth)
    if tags is not None and tags.inverted:
        colours = 255 - colours
    rgb = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    if alpha is None or reading.chosen is not None:
        return np.ascontiguousarray(rgb)
    return _blended(rgb, values[..., alpha], premultiplied=tags is not None and tags.premultiplied)


def _last(image: Image.Image) -> int:
    return len(image.getbands()) - 1


def colour_bands(number: int, alpha: int | None, reading: Reading) -> tuple[int, ...]:
    """Indices of the bands of a file that become red, green and blue, or gray.

    Args:
        number: Bands of the file.
        alpha: Index of the one that is tagged as transparency.
        reading: May choose others. Files of one or two bands are gray where colours are chosen.

    Raises:
        MissingBandError: The file lacks a chosen band.
    """
    colours = number - (alpha is not None)
    first = (0, 1, 2) if colours >= 3 else (0,)
    chosen = reading.chosen
    if chosen is None or (number <= 2 and set(chosen) == {1, 2, 3}):
        return first
    if max(chosen) > number:
        raise MissingBandError(
            f"it has {number} band{'s' * (number > 1)}, and band {max(chosen)} is to be read"
        )
    return tuple(band - 1 for band in chosen)


def _blended(rgb: np.ndarray, alpha: np.ndarray, *, premultiplied: bool) -> np.ndarray:
    """(H, W, 3) uint8 colours on white by (H, W) transparency of any type; 0 is transparent."""
    if alpha.dtype == np.uint8 and not premultiplied:
        return np.asarray(_on_white(Image.fromarray(np.dstack([rgb, alpha]))))
    most = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1.0
    share = np.clip(np.nan_to_num(alpha[..., None].astype(np.float32) / most), 0, 1)
    shown = rgb * (1.0 if premultiplied else share) + 255 * (1 - share)
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in {"La", "PA"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
