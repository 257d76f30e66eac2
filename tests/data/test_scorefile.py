"""Score maps survive the disk; damaged files are named."""

import io
import pickle
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError

shared = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def scores(seed: int = 0, count: int = 2, size: tuple[int, int] = (5, 7), **settings) -> ScoreFile:
    rng = np.random.default_rng(seed)
    values = {
        "classes": np.sort(rng.choice(40, count, replace=False)).astype(np.int16),
        "scores": rng.random((count, *size), dtype=np.float32),
        "stride": 4,
        "size": (size[0] * 4 - 1, size[1] * 4),
        "probabilities": rng.random(20, dtype=np.float32),
    }
    return ScoreFile(**values | settings)


@shared
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    classifies=st.booleans(),
    dtype=st.sampled_from(["uint8", "float16"]),
)
def test_round_trip(tmp_path: Path, seed, count, size, classifies, dtype):
    given = scores(seed, count, size, **({} if classifies else {"probabilities": None}))
    if count:
        given.scores.flat[0], given.scores.flat[-1] = 0.0, 1.0
    write_scores(tmp_path / "a/b.npz", given, dtype=dtype)
    found = read_scores(tmp_path / "a/b.npz")
    assert found.scores.dtype == np.float32
    assert found.classes.dtype == np.int16
    np.testing.assert_array_equal(found.classes, given.classes)
    assert (found.stride, found.size) == (given.stride, given.size)
    step = 1 / 510 if dtype == "uint8" else 2**-11
    np.testing.assert_allclose(found.scores, given.scores, atol=step + 1e-7, rtol=0)
    if given.scores.size > 1:
        assert found.scores.flat[0] == 0
        assert found.scores.flat[-1] == 1
    if classifies:
        np.testing.assert_allclose(found.probabilities, given.probabilities, atol=2**-11)
    else:
        assert found.probabilities is None


@shared
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["uint8", "float16"]))
def test_what_was_read_is_written_as_the_same_bits(tmp_path: Path, seed, dtype):
    write_scores(tmp_path / "a.npz", scores(seed), dtype=dtype)
    write_scores(tmp_path / "b.npz", read_scores(tmp_path / "a.npz"), dtype=dtype)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_the_file_needs_no_pickle_and_has_the_documented_types(tmp_path: Path, dtype):
    write_scores(tmp_path / "a.npz", scores(), dtype=dtype)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        found = {key: str(file[key].dtype) for key in file}
    assert found == {
        "classes": "int16",
        "scores": dtype,
        "stride": "int16",
        "size": "int32",
        "probabilities": "float16",
    }


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip at all",
        b"PK\x03\x04",
        npz(scores=np.zeros((1, 2, 2))),
        npz(classes=np.zeros(1), scores=np.zeros((1, 2, 2)), stride=4, size=np.zeros(3)),
        npy(np.zeros(3)),
        pickle.dumps({"scores": 1}),
    ],
    ids=["empty", "text", "cut", "keys missing", "wrong size", "one array", "pickle"],
)
def test_files_that_are_no_score_file(tmp_path: Path, content: bytes):
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not a readable score file") as caught:
        read_scores(file)
    assert caught.value.where == str(file)
    assert caught.value.mend == "delete it and run `weakseg seeds` again"


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="not a readable score file"):
        read_scores(tmp_path / "gone.npz")


def test_nothing_is_unpickled(tmp_path: Path):
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    file = tmp_path / "a.npz"
    file.write_bytes(npz(classes=np.zeros(1), scores=trap, stride=4, size=np.zeros(2)))
    with pytest.raises(UserError):
        read_scores(file)
    with zipfile.ZipFile(file) as archive:
        assert b"touch" in archive.read("scores.npy")
    assert not (tmp_path / "sprung").exists()


@shared
@given(
    place=st.floats(0, 0.999), value=st.integers(1, 255), cut=st.booleans(), seed=st.integers(0, 9)
)
def test_damage_is_named_or_does_not_matter(tmp_path: Path, place, value, cut, seed):
    file = tmp_path / "a.npz"
    write_scores(file, scores(seed))
    whole, content = read_scores(file), bytearray(file.read_bytes())
    at = int(place * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= value
    file.write_bytes(content)
    try:
        found = read_scores(file)
    except UserError:
        return
    np.testing.assert_array_equal(found.scores, whole.scores)  # a byte that nobody reads
    np.testing.assert_array_equal(found.classes, whole.classes)


def test_best_class_and_background():
    maps = np.float32([[[0.9, 0.9]], [[0.2, 0.6]], [[0.5, 0.1]]])
    given = ScoreFile(np.int16([0, 3, 7]), maps, 4, (4, 8))
    best, winner = given.best()
    np.testing.assert_array_equal(best, np.float32([[0.5, 0.6]]))
    np.testing.assert_array_equal(winner, [[7, 3]])
    assert winner.dtype == np.uint8
    np.testing.assert_array_equal(given.background(), maps[0])
    ids, foreground = given.foreground()
    assert ids.tolist() == [3, 7]
    np.testing.assert_array_equal(foreground, maps[1:])


def test_an_image_without_tags_has_no_best_class():
    given = ScoreFile(np.int16([]), np.zeros((0, 3, 4), np.float32), 4, (12, 16))
    best, winner = given.best()
    assert best.shape == winner.shape == (3, 4)
    assert not best.any()
    assert not winner.any()
    assert given.background() is None
    assert given.full_size().scores.shape == (0, 12, 16)


def test_full_size_is_bilinear():
    ramp = np.float32([[[0.0, 1.0]]])
    full = ScoreFile(np.int16([1]), ramp, 4, (2, 8)).full_size()
    np.testing.assert_allclose(
        full.scores[0, 0], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6
    )
    assert full.scores.shape == (1, 2, 8)
    assert full.stride == 1
    assert full.full_size() is full


def test_headers_are_read_by_one_thread_at_a_time(tmp_path: Path, monkeypatch):
    """numpy parses headers with ast.literal_eval, which older CPythons do not run safely in two."""
    inside, most, read = 0, 0, np.lib.format.read_array

    def counted(*args, **kwargs):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)  # lets other threads in, if anything does
        try:
            return read(*args, **kwargs)
        finally:
            inside -= 1

    path = tmp_path / "a.npz"
    write_scores(path, ScoreFile(np.array([1]), np.ones((1, 2, 2), np.float32), 1, (2, 2)))
    monkeypatch.setattr(np.lib.format, "read_array", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_scores, [path] * 16))) == 16
    assert most == 1
