"""What is drawn depends on (seed, pass, sample) alone, and masks follow their images."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weakseg.data.images import write_mask
from weakseg.data.loading import (
    Augment,
    MaskBatch,
    StepBatches,
    TrainingImages,
    derive_seed,
    loader_processes,
    training_loader,
)
from weakseg.data.samples import Collection, Sample
from weakseg.methods import Batch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
AUGMENT = Augment(crop=32, resize=(0.5, 1.5), flip=True, jitter=0.3, mean=MEAN, std=STD)


def pixels(view: torch.Tensor) -> torch.Tensor:
    """(3, S, S) in 0..255, normalisation undone."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return 255 * (view * std + mean)


# -- order


orders = {
    "images": st.integers(1, 20),
    "share": st.integers(1, 8),
    "world": st.integers(1, 4),
    "seed": st.integers(0, 5),
}


@settings(deadline=None)
@given(**orders, steps=st.integers(1, 8), start=st.integers(0, 8))
def test_a_later_start_is_the_tail(images, share, world, seed, steps, start):
    batch = share * world
    whole = list(StepBatches(images, batch, steps, seed))
    late = StepBatches(images, batch, steps, seed, start=start)
    assert list(late) == whole[start:]
    assert len(late) == len(whole[start:])


@settings(deadline=None)
@given(**orders)
def test_processes_share_the_batch_of_one(images, share, world, seed):
    batch = share * world
    alone = list(StepBatches(images, batch, 5, seed))
    ranks = [list(StepBatches(images, batch, 5, seed, rank=r, world=world)) for r in range(world)]
    for step, wanted in enumerate(alone):
        assert [key for rank in ranks for key in rank[step]] == wanted


@settings(deadline=None)
@given(**orders)
def test_every_pass_sees_every_image_once(images, share, world, seed):
    batch = share * world
    steps = -(-3 * images // batch)
    keys = [key for step in StepBatches(images, batch, steps, seed) for key in step]
    for turn in range(3):
        own = [index for index, t in keys if t == turn]
        assert sorted(own) == list(range(images))
    assert [turn for _, turn in keys] == sorted(turn for _, turn in keys)


def test_passes_and_seeds_differ():
    def order(seed: int, turn: int) -> list[int]:
        keys = [key for step in StepBatches(50, 10, 10, seed) for key in step]
        return [index for index, t in keys if t == turn]

    assert len({tuple(order(seed, turn)) for seed in (0, 1) for turn in (0, 1)}) == 4


@pytest.mark.parametrize(("images", "batch", "world"), [(0, 4, 1), (5, 4, 3)])
def test_impossible_batches(images: int, batch: int, world: int):
    with pytest.raises(ValueError, match="cannot make batches"):
        StepBatches(images, batch, 1, 0, world=world)


def test_seeds_of_different_purposes_differ():
    parts = [(0, "view", t, i) for t in range(20) for i in range(20)] + [(0, "order", 1)]
    found = {derive_seed(*p) for p in parts}
    assert len(found) == len(parts)
    assert all(0 <= seed < 2**63 for seed in found)
    assert derive_seed(1, "23") != derive_seed(12, "3")
    assert derive_seed(0, "view", 0, 0) == derive_seed(0, "view", 0, 0)


def test_loader_processes(monkeypatch: pytest.MonkeyPatch):
    assert loader_processes(0, "gpu") == 0
    assert loader_processes(5, "cpu") == 5
    for cores, wanted in ((1, 0), (2, 1), (16, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert loader_processes(None, "cpu") == wanted
    assert loader_processes(None, "gpu") == 12


# -- views


def test_a_view_depends_on_seed_pass_and_index_alone(tiny_collection: Collection):
    data = TrainingImages(tiny_collection, AUGMENT, seed=3)
    first = data[1, 0][0]
    torch.rand(7)
    data[4, 2]
    np.random.default_rng(5)
    state = torch.get_rng_state()
    assert torch.equal(TrainingImages(tiny_collection, AUGMENT, seed=3)[1, 0][0], first)
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing from the caller
    others = [
        data[1, 1][0],
        data[3, 0][0],
        TrainingImages(tiny_collection, AUGMENT, seed=4)[1, 0][0],
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_images_of_one_pass_have_views_of_their_own(tiny_collection: Collection):
    one = tiny_collection[4]
    twice = replace(tiny_collection, samples=(one, replace(one, id="again")))
    data = TrainingImages(twice, AUGMENT, seed=0)
    assert not torch.equal(data[0, 0][0], data[1, 0][0])


def test_items_carry_tags_and_ids(tiny_collection: Collection):
    data = TrainingImages(tiny_collection, AUGMENT, seed=0)
    assert len(data) == 8
    view, tags, name = data[0, 0]
    assert type(view) is torch.Tensor
    assert (view.shape, view.dtype) == ((3, 32, 32), torch.float32)
    assert (tags.tolist(), name) == ([1.0, 0.0], "a/0")
    assert data[7, 0][1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("masked", [False, True], ids=["tags", "masks"])
def test_loader_processes_change_nothing(tiny_collection: Collection, masked: bool):
    masks = [s.mask for s in tiny_collection if s.mask] if masked else None
    data = TrainingImages(tiny_collection, AUGMENT, 0, masks)
    here, there = (
        list(training_loader(data, StepBatches(8, 4, 5, seed=0), workers)) for workers in (0, 2)
    )
    assert len(here) == len(there) == 5
    for a, b in zip(here, there, strict=True):
        assert isinstance(a, MaskBatch if masked else Batch)
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
        key = "masks" if masked else "tags"
        assert torch.equal(getattr(a, key), getattr(b, key))


@pytest.fixture
def painted(tmp_path: Path) -> TrainingImages:
    """A mask that can be read off its image: class 0, 1 or 2 by the brightest channel."""
    rng = np.random.default_rng(0)
    height, width = 36, 48
    mask = np.zeros((height, width), np.uint8)
    for _ in range(12):
        y, x, c = rng.integers((height, width, 3))
        mask[y : y + 9, x : x + 9] = c
    image = np.full((height, width, 3), 40, np.uint8)
    for c in range(3):
        image[mask == c, c] = 200
    Image.fromarray(image).save(tmp_path / "i.png")
    write_mask(tmp_path / "m.png", mask)
    collection = Collection("one", ("a", "b"), (Sample("i", tmp_path / "i.png", ("a",)),), "")
    augment = Augment(40, (48 / 40, 48 / 40), flip=True, jitter=0.0, mean=MEAN, std=STD)
    return TrainingImages(collection, augment, 0, [tmp_path / "m.png"])


def test_masks_follow_images_through_flip_crop_and_padding(painted: TrainingImages):
    seen = set()
    for turn in range(12):
        view, mask, _ = painted[0, turn]
        assert (mask.shape, mask.dtype) == ((40, 40), torch.int64)
        inside = mask != 255
        assert torch.equal(pixels(view).argmax(0)[inside], mask[inside])
        assert view[:, ~inside].abs().max() < 0.01  # the mean colour, to the step of a byte
        assert inside.sum() == 36 * 40
        seen.add(mask.numpy().tobytes())
    assert len(seen) > 3


@pytest.mark.parametrize("side", [24, 31, 60, 96])
def test_masks_follow_images_to_other_sizes(painted: TrainingImages, side: int):
    augment = Augment(side, (1.0, 1.0), flip=True, jitter=0.0, mean=MEAN, std=STD)
    painted.augment, painted._views = augment, augment.views()
    for turn in range(4):
        view, mask, _ = painted[0, turn]
        inside = (mask != 255).numpy()
        assert inside.sum() == side * round(side * 36 / 48)
        labels = np.where(inside, mask.numpy(), 0).astype(np.uint8)
        flat = cv2.erode(labels, np.ones((5, 5))) == cv2.dilate(labels, np.ones((5, 5)))
        flat &= cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) > 0
        assert flat.sum() > 10
        wrong = pixels(view).argmax(0)[flat] != mask[flat]
        assert wrong.sum() <= 2  # at the rim, where what lies beyond is not seen
        agree = pixels(view).argmax(0)[inside] == mask[inside]
        assert agree.float().mean() > 0.9


def test_reducing_a_mask_moves_it_nowhere(tmp_path: Path):
    """The centre of a small object stays in place; a corner-aligned resize would shift it."""
    mask = np.zeros((90, 90), np.uint8)
    mask[30:60, 30:60] = 1
    Image.fromarray(np.repeat(mask[..., None] * 200, 3, 2)).save(tmp_path / "i.png")
    write_mask(tmp_path / "m.png", mask)
    collection = Collection("one", ("a",), (Sample("i", tmp_path / "i.png", ("a",)),), "")
    for side in (18, 21, 30, 35):
        augment = Augment(side, (1.0, 1.0), flip=False, jitter=0.0, mean=MEAN, std=STD)
        data = TrainingImages(collection, augment, 0, [tmp_path / "m.png"])
        labels = data[0, 0][1].float()
        places = torch.arange(side).float()
        for dim in (0, 1):
            centre = (labels.sum(dim) * places).sum() / labels.sum()
            assert centre == pytest.approx((side - 1) / 2, abs=0.01), side


def test_small_images_are_padded_with_the_mean_colour(tiny_collection: Collection):
    augment = Augment(64, (0.5, 0.5), flip=False, jitter=0.0, mean=MEAN, std=STD)
    view = TrainingImages(tiny_collection, augment, 0)[7, 0][0]  # 40 x 40, reduced to 32 x 32
    padding = view.abs().amax(0) < 0.01
    assert padding.sum() >= 64 * 64 - 32 * 32
    assert (~padding).sum() > 0.9 * 32 * 32


def test_longer_sides_lie_in_the_range_given(tiny_collection: Collection):
    masks = [s.mask for s in tiny_collection if s.mask]
    augment = Augment(64, (0.5, 1.0), flip=False, jitter=0.0, mean=MEAN, std=STD)
    data = TrainingImages(tiny_collection, augment, 0, masks)
    sides = []
    for turn in range(20):
        inside = data[0, turn][1] != 255
        height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
        assert abs(height - width * 48 / 64) <= 1
        sides.append(width)
    assert 32 <= min(sides) < 40
    assert 56 < max(sides) <= 64


def test_flip_mirrors_half_of_the_images(tmp_path: Path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    Image.fromarray(image).save(tmp_path / "i.png")
    collection = Collection("one", ("a",), (Sample("i", tmp_path / "i.png", ("a",)),), "")
    for flip, low, high in ((True, 10, 30), (False, 0, 0)):
        augment = Augment(32, (1.0, 1.0), flip=flip, jitter=0.0, mean=MEAN, std=STD)
        data = TrainingImages(collection, augment, 0)
        mirrored = sum(int(data[0, t][0][0, 0, 0] < data[0, t][0][0, 0, -1]) for t in range(40))
        assert low <= mirrored <= high


def test_jitter_changes_colours_only_when_asked(tiny_collection: Collection):
    def colours(jitter: float) -> set[bytes]:
        augment = Augment(64, (1.0, 1.0), flip=False, jitter=jitter, mean=MEAN, std=STD)
        data = TrainingImages(tiny_collection, augment, 0)
        return {data[4, t][0].numpy().tobytes() for t in range(4)}

    assert len(colours(0.0)) == 1
    assert len(colours(0.3)) == 4


# -- batches


def test_parts_of_a_batch_are_in_order():
    batch = Batch(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6.0)[:, None], list("abcdef"))
    parts = batch.parts(3)
    assert [p.ids for p in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
    assert torch.equal(torch.cat([p.tags for p in parts]), batch.tags)
    masks = MaskBatch(batch.images, torch.arange(6).view(6, 1, 1), batch.ids)
    assert torch.equal(torch.cat([p.masks for p in masks.parts(2)]), masks.masks)
