"""MXNet's parameter files: every form is read exactly, and no damage does harm."""

import contextlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weakseg.errors import UserError
from weakseg.networks.mxnet import read_params

FORMS = (0, 1, 2, 3)
KINDS = {"f4": 0, "f8": 1, "f2": 2, "u1": 3, "i4": 4, "i1": 5, "i8": 6}


def pack_array(array: np.ndarray, form: int) -> bytes:
    """One array in one of MXNet's four forms; written by the format's description alone."""
    out, ndim = b"", array.ndim
    if form == 0:
        out += struct.pack("<I", ndim) + struct.pack(f"<{ndim}I", *array.shape)
    elif form == 1:
        out += struct.pack("<II", 0xF993FAC8, ndim) + struct.pack(f"<{ndim}q", *array.shape)
    else:
        magic = 0xF993FAC9 if form == 2 else 0xF993FACA
        out += struct.pack("<Iii", magic, 0, ndim) + struct.pack(f"<{ndim}q", *array.shape)
    kind = KINDS[array.dtype.str[1:]]
    return out + struct.pack("<iii", 1, 0, kind) + array.tobytes()


def join(arrays: list[bytes], names: list[bytes]) -> bytes:
    head = struct.pack("<QQQ", 0x112, 0, len(arrays))
    tail = struct.pack("<Q", len(names))
    return head + b"".join(arrays) + tail + b"".join(struct.pack("<Q", len(n)) + n for n in names)


def pack(arrays: dict[str, np.ndarray], form: int) -> bytes:
    """A whole file."""
    return join([pack_array(a, form) for a in arrays.values()], [n.encode() for n in arrays])


ARRAYS = {
    "arg:weight": np.arange(12, dtype="<f4").reshape(2, 3, 1, 2) / 7,
    "aux:mean": np.array([1.5, -2.0], dtype="<f8"),
}


def read(folder: Path, content: bytes) -> dict[str, np.ndarray]:
    file = folder / "w.params"
    file.write_bytes(content)
    return read_params(file)


def refused(folder: Path, content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, content)
    assert caught.value.where == str(folder / "w.params")
    assert "fetch the file again" in str(caught.value.mend)
    return caught.value.what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_and_type_is_read_exactly(tmp_path: Path, form: int, kind: str):
    rng = np.random.default_rng(form)
    stored = {
        "arg:a": rng.integers(0, 100, (3, 2, 1, 4)).astype(f"<{kind}"),
        "aux:ä": rng.integers(0, 100, 5).astype(f"<{kind}"),
    }
    found = read(tmp_path, pack(stored, form))
    assert list(found) == list(stored)
    for name, array in stored.items():
        assert found[name].dtype == array.dtype
        assert found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)


def test_forms_may_be_mixed_and_a_file_may_be_empty(tmp_path: Path):
    array = ARRAYS["arg:weight"]
    names = [b"%d" % form for form in FORMS]
    found = read(tmp_path, join([pack_array(array, form) for form in FORMS], names))
    for form in FORMS:
        np.testing.assert_array_equal(found[str(form)], array)
    assert read(tmp_path, join([], [])) == {}


def test_arrays_without_a_shape_end_after_it_and_scalars_do_not(tmp_path: Path):
    nothing = [
        struct.pack("<I", 0),
        struct.pack("<II", 0xF993FAC8, 0),
        struct.pack("<Iii", 0xF993FAC9, 0, 0),
        struct.pack("<Iii", 0xF993FACA, 0, -1),
    ]
    scalar = pack_array(np.array(2.5, dtype="<f4"), 3)
    found = read(tmp_path, join([*nothing, scalar], [b"0", b"1", b"2", b"3", b"scalar"]))
    assert [found[str(form)].size for form in FORMS] == [0, 0, 0, 0]
    assert found["scalar"].shape == ()
    assert found["scalar"] == 2.5


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, form: int):
    whole = pack(ARRAYS, form)
    assert len(read(tmp_path, whole)) == 2
    for end in range(len(whole)):
        refused(tmp_path, whole[:end])
    assert "goes on for 1 bytes" in refused(tmp_path, whole + b"\0")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FORMS), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_damage_is_refused_or_stays_in_the_numbers(
    tmp_path: Path, form: int, place: int, noise: bytes
):
    whole = pack(ARRAYS, form)
    place %= len(whole)
    damaged = (whole[:place] + noise + whole[place + len(noise) :])[: len(whole)]
    tracemalloc.start()
    try:
        found = read(tmp_path, damaged)
    except UserError:
        found = {}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20
    assert sum(array.nbytes for array in found.values()) <= len(whole)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_noise_behind_a_good_beginning_does_no_harm(tmp_path: Path, noise: bytes):
    with contextlib.suppress(UserError):
        read(tmp_path, struct.pack("<QQQ", 0x112, 0, 1) + noise)


HUGE = 2**62


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (struct.pack("<IIq", 0xF993FAC8, 1, HUGE), "bytes too early"),
        (struct.pack("<Iii2q", 0xF993FAC9, 0, 2, HUGE, HUGE), "bytes too early"),
        (struct.pack("<III", 2, 2**32 - 1, 2**32 - 1), "bytes too early"),
        (struct.pack("<II", 0xF993FAC8, 2**31), "2147483648 dimensions"),
        (struct.pack("<Iii", 0xF993FACA, 0, -2), "-2 dimensions"),
        (struct.pack("<I", 0xF993FAC7), "4187224775 dimensions"),
        (struct.pack("<IIqq", 0xF993FAC8, 2, -1, -4), r"shape (-1, -4)"),
        (struct.pack("<IIqq", 0xF993FAC8, 2, HUGE, 0), f"shape ({HUGE}, 0)"),
        (struct.pack("<Iii", 0xF993FAC9, 1, 1), "an array of storage 1"),
        (struct.pack("<IIiii", 1, 1, 1, 0, 7), "unknown type 7"),
        (struct.pack("<IIiii", 1, 1, 1, 0, -1), "unknown type -1"),
    ],
)
def test_what_an_array_may_not_be_is_named(tmp_path: Path, array: bytes, what: str):
    elements = struct.pack("<iii", 1, 0, 0) if "early" in what else b""
    assert what in refused(tmp_path, join([array + elements + bytes(8)], [b"name"]))


def test_what_a_list_may_not_be_is_named(tmp_path: Path):
    array = pack_array(ARRAYS["aux:mean"], 2)
    assert "does not begin as" in refused(tmp_path, b"\x13" + join([array], [b"a"])[1:])
    assert "two arrays of the name 'a'" in refused(tmp_path, join([array] * 2, [b"a", b"a"]))
    assert "holds 1 arrays, but 0 names" in refused(tmp_path, join([array], []))
    assert "holds 1 arrays, but 2 names" in refused(tmp_path, join([array], [b"a", b"b"]))
    assert "not text" in refused(tmp_path, join([array], [b"\xff"]))
    many = struct.pack("<QQQ", 0x112, 0, HUGE)
    assert f"is to hold {HUGE} arrays" in refused(tmp_path, many + bytes(100))
    long = join([array], [b"a"])[:-9] + struct.pack("<Q", 2**64 - 1) + b"a"
    assert "bytes too early" in refused(tmp_path, long)


def test_what_is_no_file_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "gone.params"):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_params(path)
        assert caught.value.where == str(path)
