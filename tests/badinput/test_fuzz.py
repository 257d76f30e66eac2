"""Parsers under random bytes and damaged files: a UserError or a valid result, nothing else.

``WEAKSEG_FUZZ=3000`` runs so many examples of each instead of a few.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.badinput.corpus import pixels
from tests.badinput.test_models import npz
from tests.rasters import write_png, write_tiff
from weakseg.data.check import check
from weakseg.data.images import image_size, read_image, read_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.data.sources import class_list
from weakseg.data.table import read_table
from weakseg.data.voc import listed_ids
from weakseg.errors import UserError
from weakseg.export.model import _read_config
from weakseg.recipe import Recipe, load_recipe
from weakseg.stagefiles import read_record

fuzzed = settings(
    max_examples=int(os.environ.get("WEAKSEG_FUZZ", 25)),
    deadline=None,
    derandomize="WEAKSEG_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with pieces cut out, put twice, or replaced by others."""
    piece = st.tuples(
        st.integers(0, len(content)), st.integers(0, 40), st.binary(max_size=12), st.booleans()
    )

    def damage(pieces: list[tuple[int, int, bytes, bool]]) -> bytes:
        spoiled = content
        for start, length, other, keep in pieces:
            spoiled = spoiled[:start] + other + spoiled[start if keep else start + length :]
        return spoiled

    return st.lists(piece, min_size=1, max_size=4).map(damage)


def survives(call: Callable[[Path], object], file: Path, content: bytes) -> object:
    """What the call gives, or None where it refuses the file with a mend."""
    file.write_bytes(content)
    try:
        return call(file)
    except UserError as error:
        refused = error
    finally:
        assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert refused.what and refused.mend, str(refused)
    return None


TABLE = 'image,labels,split\n1.png,"cat, dog",train\nä.png,cat,val\n'.encode()
HOT = b"image;cat;dog\n1.png;0;1\n2.png;1;1\n"
LINES = b'{"image": "1.png", "labels": ["cat"]}\n{"image": "2.png", "labels": "cat;dog"}\n'


@fuzzed
@given(
    suffix=st.sampled_from(["csv", "tsv", "jsonl", "npy"]),
    content=st.binary(max_size=200)
    | damaged(TABLE)
    | damaged(HOT)
    | damaged(LINES)
    | damaged(TABLE.decode().encode("utf-16")),
    classes=st.sampled_from([None, ("cat", "dog")]),
    untagged=st.sampled_from([None, "drop", "negative"]),
)
def test_tables(tmp_path: Path, suffix, content, classes, untagged) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    file = tmp_path / f"labels.{suffix}"
    table = survives(lambda f: read_table(f, classes=classes, untagged=untagged), file, content)
    for row in getattr(table, "rows", ()):
        assert row.name and row.row >= 1
        assert all(tag and tag == tag.strip() and "\n" not in tag for tag in row.tags or ())


@fuzzed
@given(content=st.binary(max_size=200) | damaged(b"2007_000032\n2007_000033 1\n# no\n\n"))
def test_lists(tmp_path: Path, content) -> None:
    survives(listed_ids, tmp_path / "list.txt", content)
    survives(lambda f: class_list(f, tmp_path), tmp_path / "list.txt", content)


YAML = Recipe().to_yaml().encode()
scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalar,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Recipe.model_fields, "name", "lr"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@fuzzed
@given(
    content=st.binary(max_size=100)
    | st.text(max_size=60).map(lambda t: t.encode("utf-8", "ignore"))
    | damaged(YAML)
    | values.map(lambda v: json.dumps(v).encode())
)
def test_recipes(tmp_path: Path, content) -> None:
    recipe = survives(load_recipe, tmp_path / "recipe.yaml", content)
    if recipe is not None:
        file = tmp_path / "recipe.yaml"
        assert survives(load_recipe, file, recipe.to_yaml().encode()) == recipe


RECORD = json.dumps(
    {"stage": "check", "status": "done", "fingerprint": "a", "inputs": {"x": 1}, "seconds": 1.5}
).encode()


@fuzzed
@given(
    content=st.binary(max_size=100) | damaged(RECORD) | values.map(lambda v: json.dumps(v).encode())
)
def test_records(tmp_path: Path, content) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    record = read_record(tmp_path)
    assert record is None or isinstance(record.inputs, dict)


CONFIG = {
    "format": 1, "task": "method", "method": {"name": "cam"}, "backbone": {"name": "test_resnet"},
    "classes": ["cat"], "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}, "details": {},
    "inference": {"scales": [1], "flip": True, "max_side": None, "head": None, "threshold": 0.3},
}  # fmt: skip


@fuzzed
@given(
    content=damaged(json.dumps(CONFIG).encode())
    | st.tuples(st.sampled_from(sorted(CONFIG)), values).map(
        lambda pair: json.dumps({**CONFIG, pair[0]: pair[1]}).encode()
    )
)
def test_configs(tmp_path: Path, content) -> None:
    survives(lambda f: _read_config(f.parent), tmp_path / "config.json", content)


@fuzzed
@given(content=damaged(npz()))
def test_scores(tmp_path: Path, content) -> None:
    found = survives(read_scores, tmp_path / "x.npz", content)
    if found is not None:
        assert found.full_size().scores.shape[1:] == found.size or max(found.size) > 10_000


def _picture(kind: str) -> bytes:
    if kind.startswith("deep"):
        write = {"deep-png": write_png, "deep-tiff": write_tiff}[kind]
        with tempfile.TemporaryDirectory() as folder:
            return write(Path(folder) / "x", pixels(3).astype(np.uint16) * 16).read_bytes()
    file = io.BytesIO()
    image = Image.fromarray(pixels(3))
    if kind == "mask":
        image = Image.fromarray(np.eye(40, dtype=np.uint8))
    image.save(file, {"jpg": "JPEG", "mask": "PNG"}.get(kind, kind))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["jpg", "png", "tiff", "webp", "bmp", "mask", "deep-png", "deep-tiff"]
)
@fuzzed
@given(data=st.data())
def test_images(tmp_path: Path, kind, data) -> None:
    content = data.draw(damaged(_picture(kind)))
    file = tmp_path / "x.png"
    image = survives(read_image, file, content)
    size = survives(image_size, file, content)
    assert image is None or image.shape[:2] == size
    mask = survives(read_mask, file, content)
    assert mask is None or (mask.ndim == 2 and mask.dtype == np.uint8)
    sample = Sample("x", file, ("cat",), "train", file)
    report = check(Collection("x", ("cat",), (sample,), "made up"))
    assert (image is None) == any(p.code in ERRORS for p in report.errors)


ERRORS = {"empty-file", "truncated-file", "not-an-image", "unreadable-file", "decompression-bomb"}
