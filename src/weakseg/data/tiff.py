"""TIFF files that Pillow reads with a loss or not at all: their values as they are stored.

Pillow keeps the upper 8 bits of RGB with 16, and knows no floats or signed numbers in several
bands. Here the layout is read from the file's tags, and only the decompression is left to libtiff
(through Pillow): it is told that the bytes are those of a gray 8-bit image.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

__all__ = ["MAGIC", "RawTiff", "by_tags"]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF file."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 317, 322, 323, 324, 325
_EXTRA, _FORMAT, _NO_DATA = 338, 339, 42113
_DEFLATED = (5, 8, 32773, 32946, 34925, 50000)  # LZW, Deflate, PackBits, LZMA, Zstandard
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # of SampleFormat; 4 says nothing
_TYPES = ("u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")
_MOST_BANDS = 4096
_PADDED = 16  # tiles may hold so many times the pixels of the image
_BYTES_PER_PIXEL = 4  # as Pillow holds RGB


def by_tags(image: Image.Image) -> RawTiff | None:
    """The file of an opened and undecoded image read by its tags, where these say how."""
    if isinstance(image, RawTiff):
        return image
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.fp is None:
        return None
    image.fp.seek(0)
    try:
        return RawTiff(image.fp)
    except (SyntaxError, ValueError, OSError):
        return None
    finally:
        image.fp.seek(0)


class RawTiff(ImageFile.ImageFile):
    """A TIFF file opened by its tags; :meth:`values` decodes it.

    Attributes:
        turn: EXIF orientation that is left to be applied, 1 to 8.
        dtype: Of one value.
        bands: Values of a pixel.
        alpha: Index of the band that is tagged as transparency.
        premultiplied: Colours are multiplied with the transparency already.
        inverted: The smallest value is white.

    Raises:
        SyntaxError: No TIFF file, or one of a layout that is not read here; says which.
    """

    format = "TIFF"
    format_description = "TIFF, by its tags"

    def _open(self) -> None:
        assert self.fp is not None
        tags = _tags(self.fp)
        width, height = _one(tags, _WIDTH, 0), _one(tags, _HEIGHT, 0)
        self.bands = _one(tags, _SAMPLES, 1)
        bits = set(_all(tags, _BITS) or (1,))
        kinds = {_KINDS.get(kind) for kind in _all(tags, _FORMAT) or (1,)}
        one = len(kinds) == len(bits) == 1 and not min(bits) % 8
        name = f"{min(kinds, key=str)}{min(bits) // 8}" if one else ""
        compression, photometric = _one(tags, _COMPRESSION, 1), _one(tags, _PHOTOMETRIC, 1)
        known = (
            name in _TYPES
            and photometric in (0, 1, 2)
            and compression in (1, *_DEFLATED)
            and _one(tags, _FILL_ORDER, 1) == 1
            and 1 <= self.bands <= _MOST_BANDS
            and width > 0
            and height > 0
        )
        if not known:
            raise SyntaxError(
                f"a TIFF of {self.bands} bands with {_words(bits)} bits, "
                f"photometric {photometric}, compression {compression}, cannot be read"
            )
        self.dtype = np.dtype(name)
        self._tags = tags
        self._stored = (height, width)
        turn = _one(tags, _ORIENTATION, 1)
        self.turn = turn if 1 <= turn <= 8 else 1
        self.inverted = photometric == 0
        self.alpha, self.premultiplied = _alpha(tags, self.bands, photometric)
        self._size = (width, height)
        self._mode = "RGB" if self.bands >= 3 else "L"
        self.tile = []
        self.is_animated = bool(tags.next)  # pages, as Pillow calls them

    @property
    def plain(self) -> bool:
        """Whether Pillow reads it without a loss, if it does."""
        return self.dtype == np.uint8 and self.bands <= 4

    def weight(self) -> int:
        """Pixels of an RGB image that takes as much memory as the values."""
        height, width = self._stored
        return height * width * self.bands * self.dtype.itemsize // _BYTES_PER_PIXEL

    def values(self) -> np.ndarray:
        """(H, W, bands) values as stored, in this machine's byte order; floats that are marked as
        no data become NaN.

        Raises:
            OSError: The file is truncated or damaged.
        """
        planar = _one(self._tags, _PLANAR, 1) == 2 and self.bands > 1
        groups = self.bands if planar else 1
        chunks = self._chunks(groups)
        planes = [self._plane(part, self.bands // groups) for part in chunks]
        values = planes[0] if groups == 1 else np.concatenate(planes, axis=2)
        if self.dtype.kind == "f":
            values[values == self._no_data()] = np.nan
        return values

    def _no_data(self) -> float:
        said = str(self._tags.get(_NO_DATA, "nan")).strip("\0 ")
        try:
            with np.errstate(over="ignore"):
                return self.dtype.type(float(said))
        except ValueError:
            return float("nan")

    def _chunks(self, groups: int) -> list[list[bytes]]:
        """The compressed pieces of each group of bands."""
        tiled = _TILES in self._tags
        offsets = _all(self._tags, _TILES if tiled else _STRIPS)
        counts = _all(self._tags, _TILE_BYTES if tiled else _STRIP_BYTES)
        if not offsets or len(offsets) != len(counts) or len(offsets) % groups:
            raise OSError("the table of its strips is damaged")
        assert self.fp is not None
        pieces = []
        for offset, length in zip(offsets, counts, strict=True):
            self.fp.seek(offset)
            piece = self.fp.read(length)
            if len(piece) < length:
                raise OSError("image file is truncated")
            pieces.append(piece)
        each = len(pieces) // groups
        return [pieces[i * each : (i + 1) * each] for i in range(groups)]

    def _plane(self, pieces: list[bytes], bands: int) -> np.ndarray:
        """(H, W, bands) of the pieces of one group."""
        height, width = self._stored
        if _TILES in self._tags:
            across, down = _one(self._tags, _TILE_WIDTH, 0), _one(self._tags, _TILE_HEIGHT, 0)
        else:
            across, down = width, min(height, _one(self._tags, _ROWS, height))
        if across < 1 or down < 1:
            raise OSError("its tiles have no size")
        columns, rows = -(-width // across), -(-height // down)
        if len(pieces) != columns * rows:
            raise OSError("the table of its strips is damaged")
        size = across * bands * self.dtype.itemsize
        if columns * across * rows * down > _PADDED * max(width * height, 2**16):
            raise OSError("its tiles are far larger than the image")
        tall = rows * down if _TILES in self._tags else height
        if _one(self._tags, _COMPRESSION, 1) == 1:
            data = _placed(pieces, columns, size, down, tall)
        else:
            data = self._inflated(pieces, columns, size, down, tall)
        values = self._undone(data.reshape(tall, columns, size), across, bands)
        return values.reshape(tall, columns * across, bands)[:height, :width]

    def _inflated(
        self, pieces: list[bytes], columns: int, size: int, down: int, tall: int
    ) -> np.ndarray:
        """(tall, columns * size) bytes, decompressed."""
        lengths = [len(piece) for piece in pieces]
        starts = np.cumsum([0, *lengths[:-1]])
        tags: dict[int, list[int]] = {
            _WIDTH: [columns * size],
            _HEIGHT: [tall],
            _BITS: [8],
            _COMPRESSION: [_one(self._tags, _COMPRESSION, 1)],
            _PHOTOMETRIC: [1],
            _SAMPLES: [1],
        }
        if _TILES in self._tags:
            tags |= {_TILE_WIDTH: [size], _TILE_HEIGHT: [down], _TILE_BYTES: lengths}
        else:
            tags |= {_ROWS: [down], _STRIP_BYTES: lengths}
        file = _written(tags, _TILES if _TILES in self._tags else _STRIPS, starts, pieces)
        # Not Image.open, whose limit counts these bytes as pixels; the caller has checked them.
        with TiffImagePlugin.TiffImageFile(io.BytesIO(file)) as image:
            return np.array(image)

    def _undone(self, data: np.ndarray, across: int, bands: int) -> np.ndarray:
        """(tall, columns, across, bands) values of bytes that a predictor may have made small."""
        predictor = _one(self._tags, _PREDICTOR, 1)
        tall, columns, size = data.shape
        if predictor == 3:
            sums = np.cumsum(data.reshape(tall, columns, -1, bands), axis=2, dtype=np.uint8)
            parts = sums.reshape(tall, columns, self.dtype.itemsize, across * bands)
            joined = np.ascontiguousarray(parts.swapaxes(2, 3))
            values = joined.view(self.dtype.newbyteorder(">"))
        else:
            little = self._tags.prefix == b"II"
            values = np.ascontiguousarray(data).view(
                self.dtype.newbyteorder("<" if little else ">")
            )
        values = values.reshape(tall, columns, across, bands).astype(self.dtype, copy=False)
        if predictor == 2:
            whole = np.dtype(f"u{self.dtype.itemsize}")
            values = np.cumsum(values.view(whole), axis=2, dtype=whole).view(self.dtype)
        return values


def _placed(pieces: Sequence[bytes], columns: int, size: int, down: int, tall: int) -> np.ndarray:
    """(tall, columns * size) bytes of pieces that are not compressed."""
    data = np.empty((tall, columns, size), dtype=np.uint8)
    for i, piece in enumerate(pieces):
        top = i // columns * down
        rows = min(down, tall - top)
        if len(piece) < rows * size:
            raise OSError("image file is truncated")
        found = np.frombuffer(piece, np.uint8, rows * size)
        data[top : top + rows, i % columns] = found.reshape(rows, size)
    return data


def _written(
    tags: dict[int, list[int]], places: int, starts: np.ndarray, pieces: Sequence[bytes]
) -> bytes:
    """A little-endian TIFF file of these tags and pieces."""
    entries = {**tags, places: [0] * len(pieces)}
    table = 8 + 2 + 12 * len(entries) + 4
    beyond = sum(4 * len(v) for v in entries.values() if len(v) > 1)
    entries[places] = [table + beyond + int(start) for start in starts]
    directory, outside = struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            place = struct.pack("<I", table + len(outside))
            outside += packed
            packed = place
        directory += struct.pack("<HHI", tag, 4, len(values)) + packed
    head = b"II*\0" + struct.pack("<I", 8)
    return b"".join((head, directory, struct.pack("<I", 0), outside, *pieces))


def _tags(file: IO[bytes]) -> Any:
    head = file.read(8)
    if not head.startswith(MAGIC):
        raise SyntaxError("no TIFF file")
    if head.startswith(b"MM\0+"):
        raise SyntaxError("a BigTIFF with the high byte first cannot be read")
    if head.startswith(b"II+"):
        head += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _all(tags: Any, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _one(tags: Any, tag: int, default: int) -> int:
    values = _all(tags, tag)
    return int(values[0]) if values else default


def _alpha(tags: Any, bands: int, photometric: int) -> tuple[int | None, bool]:
    """Index of the band of transparency, and whether colours are multiplied with it."""
    colours = 3 if photometric == 2 else 1
    extra = _all(tags, _EXTRA)
    if not extra and (colours, bands) == (3, 4):
        return 3, False  # as Pillow and others take it
    for i, kind in enumerate(extra):
        if kind in (1, 2) and colours + i < bands:
            return colours + i, kind == 1
    return None, False


def _words(bits: set[int]) -> str:
    return ", ".join(map(str, sorted(bits)))
