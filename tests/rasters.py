"""Files of pixels that Pillow cannot write: TIFF of any type and number of bands, PNG of 16 bits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_tiff(
    path: Path,
    values: np.ndarray,
    *,
    extra: Sequence[int] | None = None,
    photometric: int | None = None,
    order: str = "<",
    orientation: int = 1,
    planar: bool = False,
    ascii_tags: dict[int, str] | None = None,
) -> Path:
    """Writes (H, W) or (H, W, bands) values in one uncompressed strip (for each band if planar)."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, bands = values.shape
    planes = values.transpose(2, 0, 1) if planar else values[None]
    pieces = [p.astype(values.dtype.newbyteorder(order)).tobytes() for p in planes]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    photometric = (2 if bands >= 3 else 1) if photometric is None else photometric
    entries: dict[int, tuple[str, Sequence[int] | bytes]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * values.dtype.itemsize] * bands),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(pieces)),
        274: ("H", [orientation]),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [len(piece) for piece in pieces]),
        284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * bands),
    }
    if extra is not None:
        entries[338] = ("H", extra)
    for tag, text in (ascii_tags or {}).items():
        entries[tag] = ("s", text.encode() + b"\0")

    def packed(code: str, content: Sequence[int] | bytes) -> bytes:
        if isinstance(content, bytes):
            return content
        return struct.pack(f"{order}{len(content)}{code}", *content)

    table = 8 + 2 + 12 * len(entries) + 4
    beyond = sum(len(b) for b in (packed(*e) for e in entries.values()) if len(b) > 4)
    starts = np.cumsum([table + beyond, *map(len, pieces)])[:-1]
    entries[273] = ("I", [int(start) for start in starts])
    directory, outside = struct.pack(order + "H", len(entries)), b""
    for tag, (code, content) in sorted(entries.items()):
        data = packed(code, content)
        kinds = {"H": 3, "I": 4, "s": 2}
        directory += struct.pack(order + "HHI", tag, kinds[code], len(content))
        if len(data) > 4:
            directory += struct.pack(order + "I", table + len(outside))
            outside += data
        else:
            directory += data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((head, directory, b"\0" * 4, outside, *pieces)))
    return path


def write_png(path: Path, values: np.ndarray) -> Path:
    """Writes (H, W) or (H, W, bands) uint16 values: gray, gray + alpha, RGB or RGB + alpha."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
