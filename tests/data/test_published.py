"""Score files of published code: written with real pickle, NumPy and torch; and hostile ones."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weakseg.data.pickles import Array, read_pickle
from weakseg.data.published import Published, find_files, read_published, settle_format
from weakseg.data.samples import Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.errors import UserError

H, W = 9, 12
MAPS = np.random.default_rng(0).random((2, H, W), dtype=np.float32)
SMALL = MAPS[:, ::4, ::4].copy()
IDS = (3, 7)  # as in masks
BACKGROUND = 1 - MAPS.max(0)

FORMATS: dict[str, Any] = {
    "psa": {2: MAPS[0], 6: MAPS[1]},
    "psa-crf": {0: BACKGROUND, 3: MAPS[0], 7: MAPS[1]},
    "irn": {
        "keys": torch.tensor([2, 6]),
        "cam": torch.from_numpy(SMALL),
        "high_res": MAPS,
    },
    "puzzle": {
        "keys": np.array([0, 3, 7]),
        "cam": torch.from_numpy(SMALL),
        "hr_cam": MAPS,
    },
    "puzzle-rw": {"keys": np.array([0, 3, 7]), "rw": MAPS},
    "rs": {"keys": np.array([0, 3, 7]), "seed": MAPS},
}


def put(folder: Path, kind: str, value: Any, protocol: int | None = None, name: str = "a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "weakseg":
        write_scores(folder / f"{name}.npz", value, dtype="float16")
        return folder / f"{name}.npz"
    path = folder / f"{name}.{'pkl' if kind == 'rs' else 'npy'}"
    if protocol is None and kind != "rs":
        np.save(path, value, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def same(found: Published, *, background: bool = False, maps: np.ndarray = MAPS) -> None:
    ids = (0, *IDS) if background else IDS
    expected = np.concatenate([BACKGROUND[None], maps]) if background else maps
    assert found.classes.tolist() == [*ids] and found.classes.dtype == np.int16
    assert np.array_equal(found.maps, expected) and found.maps.dtype == np.float32


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(tmp_path: Path, kind: str, protocol: int | None) -> None:
    path = put(tmp_path, kind, FORMATS[kind], protocol)
    assert settle_format("auto", {"a": path}, {"a": IDS}) == kind
    same(read_published(path, kind), background=kind == "psa-crf")


def test_our_own(tmp_path: Path) -> None:
    own = ScoreFile(np.array(IDS), MAPS, 1, (H, W), np.array([0.5, 0.25]))
    path = put(tmp_path, "weakseg", own)
    assert settle_format("auto", {"a": path}, {"a": ()}) == "weakseg"
    found = read_published(path, "weakseg")
    assert found.classes.tolist() == [*IDS] and abs(found.maps - MAPS).max() < 1e-3
    assert found.probabilities is not None and found.probabilities.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.from_numpy(MAPS).half(),
        torch.from_numpy(MAPS).double(),
        torch.from_numpy(MAPS).permute(0, 2, 1).contiguous().permute(0, 2, 1),
        torch.from_numpy(np.concatenate([MAPS, MAPS]))[1:3],
        (torch.from_numpy(MAPS) * 200).to(torch.uint8),
        torch.from_numpy(MAPS) > 0.5,
        torch.nn.Parameter(torch.from_numpy(MAPS)).detach(),
    ],
    ids=lambda t: f"{t.dtype}-{t.stride()}-{t.storage_offset()}",
)
def test_tensors_of_any_type_and_layout(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = put(tmp_path, "irn", {"keys": [2, 6], "high_res": tensor})
    found = read_published(path, "irn").maps
    assert np.array_equal(found, tensor.float().numpy())


def test_tensors_in_the_form_of_a_zip_archive(tmp_path: Path) -> None:
    storage = torch.from_numpy(MAPS).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    buffer = io.BytesIO()
    torch.save(typed, buffer)
    assert buffer.getvalue().startswith(b"PK")

    class Zipped:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    class Tensor:
        def __reduce__(self):
            parts = (Zipped(), 0, MAPS.shape, (H * W, W, 1), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, parts

    path = put(tmp_path, "irn", {"keys": [2, 6], "high_res": Tensor()})
    same(read_published(path, "irn"))


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Text is bytes there, and so is the content of an array."""
    content = MAPS[0].tobytes()
    text = b"".join(
        [
            b"\x80\x02}q\x01U\x04keysq\x02]q\x03(K\x00K\x03eU\x04seedq\x04",
            b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87R",
            b"(K\x01K\x01K\x09K\x0c\x87cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R",
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", len(content)) + content + b"tbs.",
        ]
    ).replace(b"\x03eU", b"\x03esU")
    (tmp_path / "a.pkl").write_bytes(text)
    found = read_published(tmp_path / "a.pkl", "rs")
    assert found.classes.tolist() == [3] and np.array_equal(found.maps[0], MAPS[0])


def test_keys_may_be_numpy_numbers_or_lists(tmp_path: Path) -> None:
    value = {np.int64(6): MAPS[1], np.int32(2): np.asfortranarray(MAPS[0])}
    same(read_published(put(tmp_path, "psa", value), "psa"))
    value = {"keys": (0, 3, 7), "seed": [0.0]}
    with pytest.raises(UserError, match="no list of classes and maps"):
        read_published(put(tmp_path, "rs", value), "rs")
    ordered = collections.OrderedDict([(2, MAPS[0]), (6, MAPS[1])])
    for protocol in (0, 2, 4):
        same(read_published(put(tmp_path, "psa", ordered, protocol), "psa"))


def test_maps_without_full_size(tmp_path: Path) -> None:
    value = {key: v for key, v in FORMATS["puzzle"].items() if key != "hr_cam"}
    path = put(tmp_path, "puzzle", value)
    same(read_published(path, "puzzle"), maps=SMALL)
    with pytest.raises(UserError, match="no known format") as caught:
        settle_format("auto", {"a": path}, {"a": IDS})
    assert "seeds.given_format" in (caught.value.mend or "")


def test_a_background_map_behind_keys(tmp_path: Path) -> None:
    both = np.concatenate([BACKGROUND[None], MAPS])
    value = {"keys": np.array([0, 3, 7]), "rw": both}
    same(read_published(put(tmp_path, "puzzle-rw", value), "puzzle-rw"), background=True)


def test_images_without_classes(tmp_path: Path) -> None:
    empty = np.zeros((0, H, W), np.float32)
    for kind, value in {
        "psa": {},
        "irn": {"keys": np.zeros(0, int), "high_res": empty},
        "puzzle": {"keys": np.array([0]), "hr_cam": empty},
    }.items():
        assert read_published(put(tmp_path, kind, value), kind).classes.size == 0


def test_psa_and_psa_crf_are_told_apart_by_tags(tmp_path: Path) -> None:
    files, tags = {}, {}
    for i in range(4):
        files[str(i)] = put(tmp_path, "psa", {0: MAPS[0], 1: MAPS[1]}, name=str(i))
        tags[str(i)] = {1, 2}
    assert settle_format("auto", files, tags) == "psa"
    assert settle_format("auto", files, dict.fromkeys(tags, {1})) == "psa-crf"
    for doubtful in (dict.fromkeys(tags, {5}), {**tags, "0": {1}}):
        with pytest.raises(UserError, match="cannot be told") as caught:
            settle_format("auto", files, doubtful)
        assert "seeds.given_format: psa-crf" in (caught.value.mend or "")
    assert settle_format("psa-crf", files, dict.fromkeys(tags, {5})) == "psa-crf"


def test_unit() -> None:
    inside = Published(np.array([1, 2]), np.array([[[0.2, 1.0]], [[0.1, 0.5]]], np.float32))
    assert np.array_equal(inside.unit(), inside.maps)
    sums = Published(np.array([1, 2]), np.array([[[2, 8]], [[0.1, 0.5]]], np.float32))
    assert np.allclose(sums.unit(), [[[0.25, 1]], [[0.2, 1]]])
    nothing = Published(np.array([1]), np.zeros((1, 2, 2), np.float32))
    assert not nothing.unit().any()


# --- which file belongs to which image -------------------------------------------------------


def test_files_are_found_by_id_or_by_bare_name(tmp_path: Path) -> None:
    samples = [Sample(f"{d}/{n}", Path("x"), ()) for d, n in (("a", "1"), ("b", "1"), ("b", "2"))]
    put(tmp_path / "a", "psa", {}, name="1"), put(tmp_path / "b", "psa", {}, name="1")
    put(tmp_path, "psa", {}, name="2")
    found = find_files(tmp_path, samples)
    assert [found[s.id].relative_to(tmp_path).as_posix() for s in samples] == [
        "a/1.npy",
        "b/1.npy",
        "2.npy",
    ]
    (tmp_path / "a/1.npy").unlink()
    put(tmp_path, "psa", {}, name="1")  # two images have this name
    with pytest.raises(UserError, match=r"1 of 3 images have no score file here: a/1"):
        find_files(tmp_path, samples)
    put(tmp_path / "a", "psa", {}, name="1"), put(tmp_path / "a", "rs", {}, name="1")
    with pytest.raises(UserError, match="several score files"):
        find_files(tmp_path, samples)
    with pytest.raises(UserError, match="no such folder"):
        find_files(tmp_path / "none", samples)


# --- damaged and hostile files ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        ("psa", {"a": MAPS[0]}, "no class numbers"),
        ("psa", {-1: MAPS[0], 0: MAPS[1], -2: MAPS[0]}, "no class numbers"),
        ("psa", {0: MAPS[0], 1: MAPS[1, :3]}, "one size"),
        ("psa", {0: MAPS}, "one size"),
        ("psa", {0: MAPS[0] * np.nan}, "not finite"),
        ("psa", {0: np.full((2, 2), 1e300)}, "not finite"),
        ("psa", {0: "text"}, "not an array"),
        ("psa", {0: np.array([["a", None]], object)}, "objects"),
        ("psa", {0: MAPS[0].astype(complex)}, "no numbers"),
        ("psa", [MAPS], "no dictionary"),
        ("psa", MAPS, "no dictionary"),
        ("irn", {"keys": [2, 6]}, "no 'high_res'"),
        ("irn", {"keys": [2, 6, 7], "high_res": MAPS}, "3 classes and 2 maps"),
        ("irn", {"keys": [2, 2], "high_res": MAPS}, "stand twice"),
        ("irn", {"keys": [0.5, 2], "high_res": MAPS}, "no list of classes"),
        ("irn", {"keys": [10**9, 2], "high_res": MAPS}, "no class numbers"),
        ("puzzle", {"keys": [3, 7], "hr_cam": MAPS}, "do not begin with 0"),
        ("rs", {"keys": [0, 3], "seed": MAPS[:, :0]}, "one size|maps"),
    ],
)  # fmt: skip
def test_files_that_fit_no_format(tmp_path: Path, kind: str, value: Any, match: str) -> None:
    path = put(tmp_path, kind, value)
    with pytest.raises(UserError, match=match) as caught:
        read_published(path, kind)
    assert str(path) in str(caught.value) and "seeds.given_format" in (caught.value.mend or "")


class Evil:
    """Asks for a call when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self):
        return self.call


def hostile(marker: Path) -> dict[str, Any]:
    command = f"touch {marker}"
    return {
        "system": Evil(os.system, command),
        "popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "import": Evil(__import__, "antigravity"),
        "partial": Evil(functools.partial, os.system, command),
        "loads": Evil(pickle.loads, pickle.dumps(Evil(os.system, command))),
        "torch": Evil(torch.load, str(marker)),
        "nested": Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.system, command))),
        "np.load": Evil(np.load, str(marker)),
        "path": Path("x"),
        "counter": collections.Counter("a"),
        "frame": sys.exit,
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", sorted(hostile(Path("x"))))
def test_nothing_is_executed(tmp_path: Path, kind: str, protocol: int) -> None:
    marker = tmp_path / "pwned"
    evil = hostile(marker)[kind]
    for place in (evil, {0: evil}, {"keys": evil, "high_res": MAPS}, [evil]):
        path = put(tmp_path, "psa", place, protocol)
        with pytest.raises(UserError) as caught:
            read_published(path, "irn" if isinstance(place, dict) and "keys" in place else "psa")
        assert not marker.exists()
        assert str(path) in str(caught.value) and caught.value.mend


def test_the_error_names_what_was_asked_for(tmp_path: Path) -> None:
    path = put(tmp_path, "psa", {0: Evil(os.system, "true")})
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        read_published(path, "psa")


def rebuilt(*parts: Any) -> Any:
    return Evil(torch._utils._rebuild_tensor_v2, *parts)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((2, 10**9, 10**9), (0, 0, 0), 0),
        ((10**18,), (1,), 0),
        ((2, H, W), (H * W, W, 1), 1),
        ((2, H, W), (H * W, W, 10**12), 0),
        ((2, H, W), (H * W, W, -1), 0),
        ((2, H, W), (H * W, W), 0),
        ((2, H, W), (H * W, W, 1), -1),
        ((-2, H, W), (1, 1, 1), 0),
        (("a",), (1,), 0),
        (None, None, 0),
    ],
)
def test_tensors_with_lies_in_them(tmp_path: Path, size: Any, stride: Any, offset: int) -> None:
    typed = torch.from_numpy(MAPS)._typed_storage()
    tensor = rebuilt(typed, offset, size, stride, False, collections.OrderedDict())
    path = put(tmp_path, "irn", {"keys": [2, 6], "high_res": tensor})
    with pytest.raises(UserError, match="damaged tensor"):
        read_published(path, "irn")


def test_arrays_with_lies_in_them(tmp_path: Path) -> None:
    sound = pickle.dumps({0: np.zeros((3, 5), np.float32)}, protocol=2)
    for shape in (b"K\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"):
        (tmp_path / "a.npy").write_bytes(sound.replace(b"K\x03K\x05", shape + b"K\x05"))
        with pytest.raises(UserError, match="fill its shape|damaged"):
            read_published(tmp_path / "a.npy", "psa")


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def laughs() -> bytes:
    """A list of two lists of two lists ..., 2^64 in all, in two hundred bytes."""
    return (
        b"\x80\x02]q\x00"
        + b"".join(
            b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(64)
        )
        + b"."
    )


def towers(*, memo: bool) -> bytes:
    """A tuple of two tuples of two tuples ..., 2^60 in all, as the key of a dictionary."""
    if not memo:
        return b"\x80\x02}N\x85" + b"2\x86" * 60 + b"Ns."
    levels = (
        b"h" + bytes([i]) + b"\x86N0q" + bytes([i + 1]) for i in range(60)
    )  # N0 hides that what is numbered is a tuple
    return b"\x80\x02}N\x85q\x00" + b"".join(levels) + b"Ns."


@pytest.mark.parametrize("memo", [True, False])
def test_keys_that_would_take_forever(tmp_path: Path, memo: bool) -> None:
    (tmp_path / "a.npy").write_bytes(towers(memo=memo))
    with pytest.raises(UserError, match="repeats parts of itself"):
        read_published(tmp_path / "a.npy", "psa")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x00v\x00{}",
        b"\x80\x02}.",
        nested(100_000),
        laughs(),
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of four billion entries
        b"Np99999999999999999999\n.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes longer than any memory
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\x00\x00.",
        b"\x80\x05\x97.",
        b"\x80\x02(S'storage'\nNtQ.",
        b"cnumpy\nndarray\n(dS'x'\nS'y'\nsb.",
        b"ccollections\nOrderedDict\n(dS'__call__'\nS'y'\nsb.",
        b"ctorch\nFloatStorage\n(tR.",
        b"ctorch\nFloatStorage\n(dS'code'\nS'y'\nsb.",
    ],
    ids=range(18),
)
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    if content == b"\x80\x02}.":
        assert read_published(tmp_path / "a.npy", "psa").classes.size == 0
        return
    with pytest.raises(UserError):
        read_published(tmp_path / "a.npy", "psa")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_give_maps_or_a_user_error(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*FORMATS]))
    protocol = data.draw(st.sampled_from([None, 2, 5]))
    path = put(tmp_path, kind, FORMATS[kind], protocol)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        # The structure stands in the first and last bytes; what lies between is numbers.
        place = data.draw(st.integers(0, min(len(content) - 1, 700)))
        place = len(content) - 1 - place if data.draw(st.booleans()) else place
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 4)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    for read in (
        lambda: read_published(path, kind),
        lambda: settle_format("auto", {"a": path}, {"a": IDS}),
    ):
        try:
            found = read()
        except UserError:
            continue
        if isinstance(found, Published):
            assert found.maps.dtype == np.float32 and np.isfinite(found.maps).all()
            assert len(found.maps) == len(found.classes) and found.maps.ndim == 3


def test_plain_arrays_are_read_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", MAPS)
    assert np.array_equal(read_pickle(tmp_path / "a.npy", mend="x"), MAPS)
    value = read_pickle(put(tmp_path, "psa", FORMATS["psa"]), mend="x")
    assert isinstance(value[2], Array) and np.array_equal(value[2].array(), MAPS[0])
