"""Reads parameter files of MXNet (``.params``) without MXNet, and without running anything in them.

Such a file is a list of arrays and then a list of their names, all little-endian::

    list     uint64 0x112, uint64 reserved, uint64 n, n arrays, uint64 n, n names
    array    shape, int32 device type, int32 device id, int32 element type, the elements
    name     uint64 length, UTF-8

Four forms of an array were written over the years; they differ in how the shape begins::

    0        uint32 ndim, ndim x uint32
    1        uint32 0xF993FAC8, uint32 ndim, ndim x int64
    2        uint32 0xF993FAC9, int32 storage, uint32 ndim, ndim x int64
    3        uint32 0xF993FACA, int32 storage, int32 ndim, ndim x int64

An array without a shape (ndim 0, from form 3 on -1) ends there. Storage other than dense (0) is
refused.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weakseg.errors import UserError

__all__ = ["read_params"]

_LIST = 0x112
_FORMS = {0xF993FAC8: 1, 0xF993FAC9: 2, 0xF993FACA: 3}
_ELEMENTS = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")  # by MXNet's number of the type
_MOST_DIMENSIONS = 32  # what every numpy has room for; more is a damaged shape
_SMALLEST = 12  # bytes of an array without a shape and of an empty name

_NOTHING = np.empty(0, dtype=np.float32)  # shared, so that a hostile file cannot fill the memory
_NOTHING.flags.writeable = False


def read_params(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a parameter file by their names.

    Sizes are compared with the rest of the file before memory is taken for them.

    Args:
        path: A ``.params`` file.

    Returns:
        Arrays of the stored type and shape; names as stored, such as ``arg:conv1a_weight`` and
        ``aux:bn7_moving_mean``. An array that was stored without a shape is empty.

    Raises:
        UserError: The file cannot be read, is damaged, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            return _read(_Source(file, path))
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})",
            where=path,
            mend="give the path of an MXNet .params file that you may read",
        ) from None


def _read(source: _Source) -> dict[str, np.ndarray]:
    if source.integer("Q") != _LIST:
        raise source.refuse("does not begin as a parameter file of MXNet does")
    source.integer("Q")  # reserved
    count = source.integer("Q")
    if count * _SMALLEST > source.left:
        raise source.refuse(f"is to hold {count} arrays, for which it is too short")
    arrays = [_array(source) for _ in range(count)]
    if (names := source.integer("Q")) != count:
        raise source.refuse(f"holds {count} arrays, but {names} names")
    named: dict[str, np.ndarray] = {}
    for array in arrays:
        name = _name(source)
        if name in named:
            raise source.refuse(f"holds two arrays of the name {name!r}")
        named[name] = array
    if source.left:
        raise source.refuse(f"goes on for {source.left} bytes behind its end")
    return named


def _array(source: _Source) -> np.ndarray:
    shape = _shape(source)
    if shape is None:
        return _NOTHING
    source.integers("i", 2)  # the device it once lay on
    kind = source.integer("i")
    if not 0 <= kind < len(_ELEMENTS):
        raise source.refuse(f"holds elements of the unknown type {kind}")
    return source.elements(np.dtype(_ELEMENTS[kind]), shape)


def _shape(source: _Source) -> tuple[int, ...] | None:
    """The shape in whatever form; None = the array has none and nothing follows."""
    first = source.integer("I")
    form = _FORMS.get(first, 0)
    if form >= 2 and (storage := source.integer("i")) != 0:
        raise source.refuse(f"holds an array of storage {storage}; only dense ones (0) are read")
    ndim = first if form == 0 else source.integer("i" if form == 3 else "I")
    if ndim == (-1 if form == 3 else 0):
        return None
    if not 0 <= ndim <= _MOST_DIMENSIONS:
        raise source.refuse(f"holds an array of {ndim} dimensions")
    shape = source.integers("q" if form else "I", ndim)
    if any(side < 1 for side in shape):
        raise source.refuse(f"holds an array of shape {shape}")
    return shape


def _name(source: _Source) -> str:
    raw = source.raw(source.integer("Q"))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise source.refuse("holds a name that is not text") from None


class _Source:
    """A file that knows how much of it is left, so that no size in it is believed unchecked."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.left = os.fstat(file.fileno()).st_size

    def integer(self, kind: str) -> int:
        """One integer; ``kind`` as in ``struct``."""
        return self.integers(kind, 1)[0]

    def integers(self, kind: str, count: int) -> tuple[int, ...]:
        """Several of them."""
        form = f"<{count}{kind}"
        return struct.unpack(form, self.raw(struct.calcsize(form)))

    def raw(self, size: int) -> bytes:
        """``size`` bytes as they are."""
        self._claim(size)
        found = self._file.read(size)
        if len(found) != size:
            raise self.refuse("became shorter while it was read")
        return found

    def elements(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array of its own memory."""
        count = math.prod(shape)
        self._claim(count * dtype.itemsize)
        flat = np.empty(count, dtype)
        if self._file.readinto(flat) != flat.nbytes:  # type: ignore[attr-defined]
            raise self.refuse("became shorter while it was read")
        return flat.reshape(shape)

    def refuse(self, what: str) -> UserError:
        """The error to raise about this file."""
        return UserError(
            what,
            where=self._path,
            mend="fetch the file again and compare its size with the original's: it is damaged, "
            "or no parameter file of MXNet",
        )

    def _claim(self, size: int) -> None:
        if size > self.left:
            raise self.refuse(f"ends {size - self.left} bytes too early: it was cut off or damaged")
        self.left -= size
