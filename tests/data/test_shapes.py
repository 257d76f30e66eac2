"""The built-in dataset: frozen to the byte, consistent, and bound to context as it claims."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.data.drawing import CLASSES, GROUPS, Drawing, checksum, draw, ground_of
from weakseg.data.images import read_image, read_mask
from weakseg.data.shapes import shapes
from weakseg.data.sources import sources
from weakseg.errors import UserError

FROZEN = "1e7d359bde7d5e7d8118a39b1232794509070f99763edb30c4674ebe4316b701"


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw(0, index, 64) for index in range(300)]


def names(mask: np.ndarray) -> tuple[str, ...]:
    return tuple(CLASSES[k - 1] for k in np.unique(mask) if k)


def test_pixels_never_change() -> None:
    assert checksum(16, 64, 0) == FROZEN


def test_another_process_draws_the_same() -> None:
    code = "from weakseg.data.drawing import checksum; print(checksum(2, 48, 7))"
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == checksum(2, 48, 7)


def test_drawing_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    draw(0, 0, 32)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (0, 1_000_000)])
def test_every_seed_and_index_is_another_image(other: tuple[int, int]) -> None:
    assert not np.array_equal(draw(0, 0, 32).image, draw(*other, 32).image)


@pytest.mark.parametrize("size", [32, 33, 100, 257])
def test_any_size(size: int) -> None:
    image, mask, parts, tags = draw(3, 5, size)
    assert image.shape == (size, size, 3)
    assert mask.shape == parts.shape == (size, size)
    assert image.dtype == mask.dtype == parts.dtype == np.uint8
    assert tags == names(mask)


def test_a_scene_looks_the_same_at_every_size() -> None:
    small, large = draw(0, 2, 64).mask, draw(0, 2, 192).mask[1::3, 1::3]
    assert (small == large).mean() > 0.97


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        draw(0, 0, 31)


def test_tags_are_the_classes_of_the_mask(drawings: list[Drawing]) -> None:
    assert all(d.tags == names(d.mask) for d in drawings)
    assert all(1 <= len(d.tags) <= 3 for d in drawings)
    assert sum(len(d.tags) <= 2 for d in drawings) > 0.9 * len(drawings)


@pytest.mark.parametrize("size", [32, 128])
def test_even_the_smallest_image_has_an_object(size: int) -> None:
    assert all(draw(1, index, size).tags for index in range(200))


def test_every_class_is_common(drawings: list[Drawing]) -> None:
    share = Counter(tag for d in drawings for tag in d.tags)
    assert sorted(share) == sorted(CLASSES)
    assert min(share.values()) > 0.06 * len(drawings)


def test_tagged_objects_show_body_and_head(drawings: list[Drawing]) -> None:
    for d in drawings:
        for tag in d.tags:
            own = d.parts[d.mask == CLASSES.index(tag) + 1]
            assert {1, 2} == set(own.tolist())


def test_parts_cover_exactly_the_mask(drawings: list[Drawing]) -> None:
    assert all(np.array_equal(d.parts > 0, d.mask > 0) for d in drawings)


def test_heads_are_small(drawings: list[Drawing]) -> None:
    parts = np.stack([d.parts for d in drawings])
    assert 0.1 < (parts == 2).sum() / (parts > 0).sum() < 0.25


def test_objects_are_large_and_small(drawings: list[Drawing]) -> None:
    shares = [(d.mask > 0).mean() for d in drawings]
    assert min(shares) < 0.1
    assert max(shares) > 0.35
    assert 0.15 < float(np.mean(shares)) < 0.35


def test_groups_hold_every_class_once() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(CLASSES)
    assert all(len(group) >= 2 for group in GROUPS.values())


def test_bodies_of_a_group_look_alike_and_heads_do_not() -> None:
    """Mean colours, over many images, in which light and tint average out."""
    colours = _mean_colours(400)
    for group in GROUPS.values():
        for a, b in itertools.pairwise(group):
            body = np.abs(colours[a, 1] - colours[b, 1]).max()
            head = np.abs(colours[a, 2] - colours[b, 2]).max()
            assert body < 20 < 30 < head


def _mean_colours(count: int) -> dict[tuple[str, int], np.ndarray]:
    pixels: dict[tuple[str, int], list[np.ndarray]] = {}
    for index in range(count):
        d = draw(0, index, 32)
        for tag in d.tags:
            for part in (1, 2):
                where = (d.mask == CLASSES.index(tag) + 1) & (d.parts == part)
                pixels.setdefault((tag, part), []).append(d.image[where].mean(0))
    return {key: np.mean(value, axis=0) for key, value in pixels.items()}


@pytest.mark.parametrize(
    ("ground", "name", "bound"), [("water", "duck", 0.6), ("track", "train", 0.6)]
)
def test_bound_classes_and_their_grounds_come_together(
    drawings: list[Drawing], ground: str, name: str, bound: float
) -> None:
    here = np.array([ground_of(0, index) == ground for index in range(len(drawings))])
    tagged = np.array([name in d.tags for d in drawings])
    assert (here & tagged).sum() / here.sum() > bound
    assert (here & tagged).sum() / tagged.sum() > bound


def test_free_classes_stand_on_every_free_ground(drawings: list[Drawing]) -> None:
    grounds = {ground_of(0, i) for i, d in enumerate(drawings) if "hen" in d.tags}
    assert grounds >= {"meadow", "straw", "wall"}


# ---------------------------------------------------------------- the source


def test_the_source_writes_what_is_drawn(tmp_path: Path) -> None:
    found = shapes(root=tmp_path, train=3, val=2, size=40, seed=5)
    train = [f"train/0000{i}" for i in range(3)]
    assert [s.id for s in found] == [*train, "val/00000", "val/00001"]
    assert found.splits == ("train", "val")
    assert found.classes == CLASSES
    for sample, index in zip(found, [0, 1, 2, 1_000_000, 1_000_001], strict=True):
        drawing = draw(5, index, 40)
        assert np.array_equal(read_image(sample.image), drawing.image)
        assert np.array_equal(read_mask(sample.mask), drawing.mask)
        assert sample.tags == drawing.tags
    assert Image.open(found[0].mask).mode == "P"


def test_files_are_written_once_and_only_what_is_missing(tmp_path: Path) -> None:
    first = shapes(root=tmp_path, train=3, val=1, size=32)
    stamps = {s.id: s.image.stat().st_mtime_ns for s in first}
    first[1].image.unlink()
    more = shapes(root=tmp_path, train=5, val=1, size=32)
    again = {s.id: s.image.stat().st_mtime_ns for s in more}
    assert len(more.split("train")) == 5
    assert {i for i in stamps if stamps[i] == again[i]} == {
        "train/00000",
        "train/00002",
        "val/00000",
    }
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_the_number_of_images_changes_no_image(tmp_path: Path) -> None:
    many = shapes(root=tmp_path / "many", train=4, val=2, size=32)
    few = shapes(root=tmp_path / "few", train=2, val=1, size=32)
    by_id = {s.id: s for s in many}
    for sample in few:
        assert sample.image.read_bytes() == by_id[sample.id].image.read_bytes()
        assert sample.tags == by_id[sample.id].tags
    fewer = shapes(root=tmp_path / "many", train=2, val=1, size=32)
    assert [s.id for s in fewer] == [s.id for s in few]


def test_val_is_held_out(tmp_path: Path) -> None:
    found = shapes(root=tmp_path, train=10, val=10, size=32)
    images = {s.image.read_bytes() for s in found}
    assert len(images) == 20


def test_an_interrupted_write_is_finished(tmp_path: Path) -> None:
    whole = shapes(root=tmp_path, train=2, val=1, size=32)
    (tmp_path / "shapes.json").unlink()
    whole[0].image.write_bytes(b"half")
    again = shapes(root=tmp_path, train=2, val=1, size=32)
    assert np.array_equal(read_image(again[0].image), draw(0, 0, 32).image)


def test_the_cache_is_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEAKSEG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = sources["shapes"](root=None, train=1, val=0, size=32)
    assert found[0].image.is_relative_to(tmp_path / "xdg" / "weakseg" / "shapes-v1")
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "own"))
    found = sources["shapes"](root=None, train=1, val=0, size=32)
    assert found[0].image.is_relative_to(tmp_path / "own" / "shapes-v1")


@pytest.mark.parametrize("name", ["labels", "masks", "classes"])
def test_it_brings_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="shapes brings its own"):
        shapes(root=tmp_path, **{name: "x"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 31},
        {"train": -1},
        {"val": True},
        {"seed": "zero"},
        {"sized": 64},
        {"untagged": "x"},
    ],
)
def test_wrong_arguments_are_explained(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        shapes(root=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_a_root_of_other_settings_is_refused(tmp_path: Path) -> None:
    shapes(root=tmp_path, train=1, val=0, size=32)
    with pytest.raises(UserError, match="other settings"):
        shapes(root=tmp_path, train=1, val=0, size=48)
