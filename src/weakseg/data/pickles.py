"""Pickled arrays, read without running anything that the file asks for.

The files of published code are pickles: a dictionary of NumPy arrays or torch tensors, bare or
inside a ``.npy``. Unpickling can run any code, so a restricted unpickler rebuilds only what such
files hold. The few names of NumPy and torch that they mention are replaced by plain stand-ins
below, which check what they are given; all else is refused by name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.errors import UserError

__all__ = ["Array", "read_pickle", "shown"]

_MOST_PUTS = 1 << 16  # slack on the index of a memo entry, which is otherwise below the file's size
_MOST_SHARED = 16  # tuples that stand in several places; arrays share none
_NO_TUPLE = ("UNICODE", "UNICODE8", "STRING", "BYTES", "BYTES8", "ARRAY8", "DICT", "LIST", "GLOBAL",
             "REDUCE")  # fmt: skip  # endings of the opcodes that surely make something else


def read_pickle(path: str | Path, *, mend: str) -> Any:
    """What a pickle holds, bare or as the one object of a ``.npy``; whatever Python wrote it.

    Args:
        path: The file.
        mend: What to do about a file that cannot be read.

    Returns:
        Dictionaries, lists, tuples, text, numbers, and :class:`Array` for arrays and tensors; an
        ordinary ndarray for a ``.npy`` without pickle.

    Raises:
        UserError: The file is damaged or asks for anything else. Nothing in it is ever executed.
    """
    try:
        content = Path(path).read_bytes()
        stream = io.BytesIO(content)
        if content.startswith(np.lib.format.MAGIC_PREFIX):
            shape, fortran, kind = _read_header(stream)
            if kind != np.dtype(object):
                return _plain_array(stream, shape, fortran, kind)
            if shape != ():
                raise UserError(f"an array of shape {shape} of objects")
        value = _load(stream)
        return value.item() if isinstance(value, Array) and value.is_object else value
    except UserError as error:
        raise UserError(error.what, where=path, mend=mend) from None
    # A malformed pickle can make the interpreter of its opcodes raise nearly anything.
    except Exception as error:
        raise UserError(
            f"this is no readable pickle ({type(error).__name__}: {str(error)[:200]})",
            where=path,
            mend=mend,
        ) from error


def shown(value: object) -> str:
    """A short text of a value of a pickle; nested ones may be far too large to be written out."""
    if isinstance(value, str | bytes | int | float | bool | None):
        return repr(value[:60] if isinstance(value, str | bytes) else value)
    return f"a {type(value).__name__.lower()}"


def _read_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UserError(f"unknown version {version} of the .npy format")
    return read(stream)


def _plain_array(
    stream: io.BytesIO, shape: tuple[int, ...], fortran: bool, kind: np.dtype
) -> np.ndarray:
    if kind.hasobject or kind.kind not in "biuf":
        raise UserError(f"an array of type {kind}")
    return _filled(stream.read(), kind, shape, fortran)


def _filled(
    content: bytes | bytearray, kind: np.dtype, shape: Any, fortran: bool = False
) -> np.ndarray:
    sound = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not sound or len(shape) > 8 or math.prod(shape) * kind.itemsize != len(content):
        raise UserError("a damaged array: its content does not fill its shape")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def _load(stream: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """One pickle from the stream; persistent ids mean ``storages`` where they are given."""
    start = stream.tell()
    _refuse_bombs(stream)
    stream.seek(start)
    return _Unpickler(stream, storages).load()


def _refuse_bombs(stream: io.BytesIO) -> None:
    """Looks through a pickle for what would fill the memory or never end.

    Python reserves as much memory as the largest index of a memo entry says; and a tuple of two
    tuples, of which each is a tuple of two, and so on, takes forever as a key.
    """
    limit = len(stream.getbuffer()) + _MOST_PUTS
    known: set[int] = set()
    tuples: set[int] = set()
    shared, before = 0, ""
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "MEMOIZE" or "PUT" in name:
            index = len(known) if name == "MEMOIZE" else argument or 0
            if index > limit:
                raise UserError("a damaged pickle: it numbers more objects than it can hold")
            known.add(index)
            if not before.endswith(_NO_TUPLE):
                tuples.add(index)
        elif name == "DUP" or ("GET" in name and argument in tuples):
            shared += 1
            if shared > _MOST_SHARED:
                raise UserError("a pickle that repeats parts of itself too often; it was not read")
        before = name


# --- stand-ins for NumPy --------------------------------------------------------------------


class _Dtype:
    """Stands for ``numpy.dtype``: a kind, an item size and a byte order."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch("b1|[iu][1248]|f[248]|O[48]?", code):
            raise UserError(f"values of type {shown(code)} are no numbers")
        self._code = code
        self._order = ""

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise UserError("a damaged type description")
        self._order = order

    @property
    def is_object(self) -> bool:
        return self._code.startswith("O")

    def numpy(self) -> np.dtype:
        if self.is_object:
            raise UserError("an array of objects instead of numbers")
        return np.dtype(self._order + self._code)


class Array:
    """Stands for ``numpy.ndarray`` and for a tensor: checked when its numbers are asked for."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise UserError("a damaged array")
        self._state = state[1:]

    def _parts(self) -> tuple[Any, ...]:
        if not self._state:
            raise UserError("an array without content")
        return self._state

    @property
    def is_object(self) -> bool:
        """True for an array of objects."""
        return bool(self._parts()[1].is_object)

    def item(self) -> Any:
        """The one object of a 0-d object array.

        Raises:
            UserError: It is none.
        """
        shape, dtype, _, content = self._parts()
        if shape != () or not dtype.is_object or not isinstance(content, list) or len(content) != 1:
            raise UserError("an array of objects where one dictionary is needed")
        return content[0]

    def array(self) -> np.ndarray:
        """The numbers.

        Raises:
            UserError: There are none, or the array is damaged.
        """
        shape, dtype, fortran, content = self._parts()
        kind = dtype.numpy()
        return _filled(_bytes(content), kind, shape, bool(fortran))


class _Tensor(Array):
    """Stands for a torch tensor: a view of a storage."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        super().__init__()
        if not isinstance(storage, _Storage):
            raise UserError("a tensor without a storage")
        self._storage, self._view = storage, (offset, size, stride)

    def __setstate__(self, state: Any) -> None:
        raise UserError("a damaged tensor")

    @property
    def is_object(self) -> bool:
        return False

    def item(self) -> Any:
        raise UserError("a tensor where a dictionary is needed")

    def array(self) -> np.ndarray:
        offset, size, stride = self._view
        numbers = self._storage.numbers()
        pair = (size, stride)
        sound = all(
            isinstance(p, tuple) and all(type(n) is int and n >= 0 for n in p) for p in pair
        )
        if not sound or type(offset) is not int or offset < 0 or len(size) != len(stride):
            raise UserError("a damaged tensor")
        total = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # An expanded tensor could stand for more numbers than fit in any memory.
        if len(size) > 8 or total > len(numbers) or (total and last >= len(numbers)):
            raise UserError("a damaged tensor: its storage does not fill its shape")
        if not total:
            return np.empty(size, numbers.dtype)
        steps = [step * numbers.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(
            numbers[offset:], size, steps, writeable=False
        ).copy()


def _reconstruct(kind: Any, *_: Any) -> Array:
    if not isinstance(kind, _Admitted) or kind.make is not Array:
        raise UserError("an array of an unknown kind")
    return Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    """How pickle protocol 5 spells an array."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: Any, content: Any = b"") -> int | float:
    if not isinstance(dtype, _Dtype):
        raise UserError("a damaged number")
    return np.frombuffer(_bytes(content), dtype.numpy(), count=1)[0].item()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """How pickle protocol 2 spells bytes."""
    if not isinstance(text, str) or codec != "latin1":
        raise UserError("damaged bytes")
    return text.encode("latin1")


def _bytes(content: Any) -> bytes | bytearray:
    if isinstance(content, str):  # bytes of Python 2
        return content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise UserError("a damaged array")
    return content


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


# --- stand-ins for torch --------------------------------------------------------------------

_MAGIC = 0x1950A86A20F9469CFC6C
_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}


class _Storage:
    """Stands for a torch storage: a type, and numbers once they were read."""

    def __init__(self, code: str, count: int) -> None:
        self.kind, self.count = np.dtype("<" + code), count
        self.content: bytes | None = None

    def numbers(self) -> np.ndarray:
        if self.content is None:
            raise UserError("a storage without content")
        return np.frombuffer(self.content, self.kind)


def _load_storage(content: Any) -> _Storage:
    """The storage that ``torch.save`` wrote, in its old form (three pickles before the object, the
    numbers behind it) or its new one (a zip archive)."""
    data = bytes(_bytes(content))
    storages: dict[str, _Storage] = {}
    stream = io.BytesIO(data)
    if data.startswith(b"PK"):
        return _from_zip(stream, storages)
    if _load(stream) != _MAGIC or _load(stream) != 1001:
        raise UserError("a tensor in an unknown format")
    info = _load(stream)
    if not isinstance(info, dict) or info.get("little_endian") is False:
        raise UserError("a tensor with another byte order")
    storage = _load(stream, storages)
    keys = _load(stream)
    if not isinstance(keys, list) or not isinstance(storage, _Storage):
        raise UserError("a damaged tensor")
    for key in keys:
        own = storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(stream.read(8), "little")
        if own is None or count != own.count:
            raise UserError("a damaged tensor")
        _fill(own, stream.read(min(count * own.kind.itemsize, len(data))))
    return storage


def _from_zip(stream: io.BytesIO, storages: dict[str, _Storage]) -> _Storage:
    with zipfile.ZipFile(stream) as file:
        names = {name.partition("/")[2]: name for name in file.namelist()}
        if any(i.compress_type != zipfile.ZIP_STORED for i in file.infolist()):
            raise UserError("a tensor in an unknown format")
        if "byteorder" in names and file.read(names["byteorder"]) != b"little":
            raise UserError("a tensor with another byte order")
        storage = _load(io.BytesIO(file.read(names["data.pkl"])), storages)
        for key, own in storages.items():
            _fill(own, file.read(names[f"data/{key}"]))
    if not isinstance(storage, _Storage):
        raise UserError("a damaged tensor")
    return storage


def _fill(storage: _Storage, content: bytes) -> None:
    if len(content) != storage.count * storage.kind.itemsize:
        raise UserError("a tensor that ends too early")
    storage.content = content


class _Admitted:
    """A stand-in as the pickle sees it: it can be called, and nothing on it can be set."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise UserError("the file tries to change what reads it; it was not read")


class _StorageType(_Admitted):
    """A storage's class: only ever named, in the id of a storage."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        super().__init__(_refuse_call)
        self.code = code


def _refuse_call(*_: Any) -> Any:
    raise UserError("a storage outside of a tensor")


# NumPy 1 and 2 name the same functions in different modules.
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and the stand-ins above, and refuses all else."""

    def __init__(self, stream: io.BytesIO, storages: dict[str, _Storage] | None) -> None:
        super().__init__(stream, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return _StorageType(_TYPES[name])
        try:
            return _Admitted(_ADMITTED[module, name])
        except KeyError:
            raise UserError(
                f"the file asks for {module}.{name}, which arrays do not need; it may be harmful "
                "and was not read"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None:
            raise UserError("the file refers to objects outside of itself")
        known = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        if not known or not isinstance(pid[1], _StorageType) or not isinstance(pid[2], str):
            raise UserError("a damaged tensor")
        if type(pid[4]) is not int or pid[4] < 0:
            raise UserError("a damaged tensor")
        return self._storages.setdefault(pid[2], _Storage(pid[1].code, pid[4]))
