"""What every mix must hold: a registered mix is tested here without a file of its own.

Scenes are encoded: image i has the value i + 1 in all of its pixels and maps, and no class but the
one that bears its number. What a mix gathers before comes from images with values from 101, so a
pasted pixel says whose it is.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from weakseg.config import Frozen
from weakseg.errors import UserError
from weakseg.mixing import Mix, Scene, build_mix, mixes

K = 4
EARLIER = 100
SETTINGS: dict[str, dict[str, object]] = {"edgepredictmix": {"iterations": 0}}
"""Without PAMR, probabilities that are sure at each pixel give back the labels, but for edges."""
RELABELS = {"edgepredictmix"}
"""Mixes with labels of their own; those of others are the scene's."""

each = pytest.mark.parametrize("name", list(mixes))


def new(name: str, num_classes: int = K, **config: object) -> Mix:
    return build_mix({"name": name, **SETTINGS.get(name, {}), **config}, num_classes)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agreeing(labels: Tensor, num_classes: int) -> Tensor:
    """Probabilities (B, K + 1, h, w) that are sure of the labels, and of nothing where they are 255."""
    known = F.one_hot(labels.where(labels != 255, 0), num_classes + 1).movedim(-1, 1).float()
    return torch.where((labels == 255)[:, None], 0.3, 0.02 + 0.9 * known)


def scene_of(count: int = K, side: int = 24, grid: int = 24, first: int = 1) -> Scene:
    """Image i is all of the value ``first`` + i, with a rectangle of class 1 + i mod K."""
    values = first + torch.arange(count, dtype=torch.float32)[:, None, None, None]
    classes = 1 + torch.arange(count) % K
    generator = seeded(count)
    labels = torch.zeros(count, grid, grid, dtype=torch.int64)
    for i, c in enumerate(classes):
        y, x = torch.randint(0, grid // 3, (2,), generator=generator).tolist()
        labels[i, y : y + grid // 2, x : x + grid // 2] = c
        labels[i, -1] = 255
    return Scene(
        images=values.expand(count, 3, side, side).clone(),
        tags=F.one_hot(classes - 1, K).float(),
        labels=labels,
        maps={"rs": values.expand(count, K, grid, grid).clone()},
        probabilities=agreeing(labels, K),
        pictures=torch.rand(count, 3, grid, grid, generator=generator),
    )


def equipped(name: str, **config: object) -> Mix:
    """A mix that has seen a batch."""
    mix = new(name, **config)
    mix(scene_of(first=EARLIER + 1), seeded(0))
    return mix


def copied(scene: Scene) -> Scene:
    def copy(value: object) -> object:
        if isinstance(value, dict):
            return {k: v.clone() for k, v in value.items()}
        return value.clone() if isinstance(value, Tensor) else value

    return Scene(**{f.name: copy(getattr(scene, f.name)) for f in fields(scene)})


def assert_same(found: Scene, expected: Scene) -> None:
    for f in fields(Scene):
        one, other = getattr(found, f.name), getattr(expected, f.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), f.name
        elif f.name == "maps":
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k], other[k]) for k in one)
        else:
            assert one is other is None, f.name


# -- what it says of itself


@each
def test_it_says_what_it_is(name: str):
    mix = mixes[name]
    assert mix.paper.strip()
    assert 10 < len(mix.idea) <= 120
    assert not mix.idea.endswith(".")
    text = inspect.getdoc(inspect.getmodule(mix)) or ""
    assert len(text) > 400 and ".. math::" in text
    assert mix.__doc__


@each
def test_settings_are_explained_frozen_and_their_defaults_valid(name: str):
    config_class = mixes[name].Config
    assert issubclass(config_class, Frozen)
    assert config_class(**config_class().model_dump()) == config_class()
    for key, field in config_class.model_fields.items():
        assert field.description, key
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config_class(), key, None)


@each
def test_wrong_settings_are_refused_with_the_mend(name: str):
    with pytest.raises(UserError, match="no_such_setting: unknown key; .*\n.*mend: correct"):
        new(name, no_such_setting=1)
    assert isinstance(build_mix(name, K), mixes[name])


def test_an_unknown_mix_is_refused_with_the_names():
    with pytest.raises(UserError, match="did you mean 'cutmix'"):
        build_mix("cutmx", K)
    with pytest.raises(UserError, match="add name: .*cutmix"):
        build_mix({"beta": 1}, K)


# -- where pixels come from


@each
@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 6),
    sizes=st.sampled_from([(24, 24), (24, 12), (32, 8), (26, 8), (29, 7)]),
    seed=st.integers(0, 10**6),
)
def test_all_of_a_position_is_of_one_image(
    name: str, count: int, sizes: tuple[int, int], seed: int
):
    side, grid = sizes
    scene = scene_of(count, side, grid)
    mix = equipped(name)
    lends = bool(mix.state()) and grid > 8  # on the coarsest an object may miss every cell's middle
    found = mix(scene, seeded(seed))
    places = ((torch.arange(side) + 0.5) * grid / side).long()  # the cell of each pixel
    numbers = found.images.round().long()
    torch.testing.assert_close(found.images, numbers.float(), atol=1e-3, rtol=0)
    assert (numbers == numbers[:, :1]).all()
    number = torch.zeros_like(scene.labels)
    number[:, places[:, None], places] = numbers[:, 0]
    assert torch.equal(number[:, places[:, None], places], numbers[:, 0]), "cells are cut"
    gathered = number > EARLIER
    assert gathered.any() or not lends
    source = (number - 1).where(~gathered, 0)
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    labels, maps = scene.labels[source, y, x], number[:, None].expand(-1, K, -1, -1).float()
    certain = F.one_hot((number - EARLIER - 1).clamp(0), K).movedim(-1, 1).float()
    if name in RELABELS:
        possible = torch.stack([torch.zeros_like(labels), labels, 1 + source % K])
        sure = found.labels != 255
        assert (possible == found.labels).any(0)[sure].all()
        assert (found.labels > 0)[sure].any()
        return
    assert torch.equal(found.labels, (number - EARLIER).where(gathered, labels))
    assert torch.equal(found.maps["rs"], certain.where(gathered[:, None], maps))


@each
@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_tags_say_what_is_shown(name: str, count: int, seed: int):
    scene = scene_of(count)
    found = equipped(name)(scene, seeded(seed))
    assert found.tags.shape == scene.tags.shape
    assert found.tags.min() >= 0 and found.tags.max() <= 1
    for i in range(count):
        numbers = set(found.images[i, 0].round().long().unique().tolist())
        classes = {(n - 1) % EARLIER % K for n in numbers}
        tagged = set(found.tags[i].nonzero()[:, 0].tolist())
        below = {k for k in tagged - classes if found.tags[i, k] == 1}  # hidden, its tag kept
        assert tagged - below <= classes
        if len(numbers) == 1:
            k = classes.pop()
            assert torch.equal(found.tags[i], F.one_hot(torch.tensor(k), K).float())
        shown = set(found.labels[i].unique().tolist()) - {0, 255}
        assert {c - 1 for c in shown} <= tagged


# -- numbers


@each
def test_shapes_and_types_stay_and_choices_are_spent(name: str):
    scene = scene_of(side=26, grid=8)
    found = equipped(name)(scene, seeded(1))
    for key in ("images", "tags", "labels"):
        one, other = getattr(found, key), getattr(scene, key)
        assert one.shape == other.shape and one.dtype == other.dtype
    assert found.maps["rs"].shape == scene.maps["rs"].shape
    assert found.probabilities is None and found.pictures is None
    assert not found.images.requires_grad


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_may_be_in_half_precision(name: str, dtype: torch.dtype):
    scene = scene_of()
    mixed = [
        equipped(name)(s, seeded(5))
        for s in (
            scene,
            replace(
                scene,
                images=scene.images.to(dtype),
                maps={k: v.to(dtype) for k, v in scene.maps.items()},
            ),
        )
    ]
    assert mixed[1].images.dtype == mixed[1].maps["rs"].dtype == dtype
    torch.testing.assert_close(mixed[0].images, mixed[1].images.float(), atol=0.5, rtol=0)
    assert torch.equal(mixed[0].labels, mixed[1].labels)


@each
def test_autocast_changes_nothing(name: str):
    plain = equipped(name)(scene_of(), seeded(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(equipped(name)(scene_of(), seeded(3)), plain)


@each
def test_the_scene_is_left_as_it_was(name: str):
    scene = scene_of()
    kept = copied(scene)
    mix = equipped(name)
    first = mix(scene, seeded(2))
    assert_same_all(scene, kept)
    first.images.zero_()  # nor does what comes back share memory that the mix goes on with
    assert_same_all(scene, kept)


def assert_same_all(found: Scene, expected: Scene) -> None:
    for key in ("images", "tags", "labels", "probabilities", "pictures"):
        assert torch.equal(getattr(found, key), getattr(expected, key)), key
    assert torch.equal(found.maps["rs"], expected.maps["rs"])


@each
def test_the_generator_decides(name: str):
    def mixed(seed: int) -> Scene:
        return equipped(name)(scene_of(), seeded(seed))

    assert_same(mixed(1), mixed(1))
    assert any(not torch.equal(mixed(1).images, mixed(seed).images) for seed in range(2, 7))
    state = torch.get_rng_state()
    mixed(1)
    assert torch.equal(torch.get_rng_state(), state), "another source of randomness"


@each
def test_without_a_generator_torchs_own_decides(name: str):
    mix = equipped(name)
    state = mix.state()
    results = []
    for seed in (1, 1, 2, 3, 4, 5):
        mix.load_state(state)
        torch.manual_seed(seed)
        results.append(mix(scene_of()))
    assert_same(results[0], results[1])
    assert any(not torch.equal(results[0].images, r.images) for r in results[2:])


# -- edges of what may come


@each
@pytest.mark.parametrize("num_classes", [1, 3])
def test_images_without_anything_are_mixed_without_harm(name: str, num_classes: int):
    shape = (3, 12, 12)
    for label in (0, 255):
        labels = torch.full(shape, label)
        scene = Scene(
            images=torch.randn(3, 3, 24, 24),
            tags=torch.zeros(3, num_classes),
            labels=labels,
            maps={"rs": torch.rand(3, num_classes, 12, 12)},
            probabilities=agreeing(labels, num_classes),
            pictures=torch.rand(3, 3, 12, 12),
        )
        found = new(name, num_classes)(scene, seeded(0))
        assert not found.tags.any()
        assert found.images.isfinite().all()
        assert found.labels.unique().tolist() in ([0], [255], [0, 255])
        whole = [
            {image.sum().item() for image in images} for images in (found.images, scene.images)
        ]
        if name != "cutmix":
            assert whole[0] <= whole[1], "an image was cut though nothing is there to paste"


@each
def test_one_class_is_enough(name: str):
    labels = torch.zeros(2, 12, 12, dtype=torch.int64)
    labels[0, 2:8, 2:8] = 1
    scene = Scene(
        images=torch.randn(2, 3, 12, 12),
        tags=torch.tensor([[1.0], [0.0]]),
        labels=labels,
        maps={"rs": torch.rand(2, 1, 12, 12)},
        probabilities=agreeing(labels, 1),
        pictures=torch.rand(2, 3, 12, 12),
    )
    mix = new(name, 1)
    for seed in range(3):
        found = mix(scene, seeded(seed))
        assert found.tags.shape == (2, 1)
        assert found.tags.min() >= 0 and found.tags.max() <= 1


@each
def test_labels_that_are_all_unsure_stay_so(name: str):
    scene = scene_of()
    labels = torch.full_like(scene.labels, 255)
    scene = replace(scene, labels=labels, probabilities=agreeing(labels, K))
    found = new(name)(scene, seeded(0))
    assert (found.labels == 255).all()


@each
def test_a_batch_of_one_stays_or_gets_what_was_gathered(name: str):
    scene = scene_of(1)
    expected = replace(scene, probabilities=None, pictures=None)
    for seed in range(5):
        assert_same(new(name)(scene, seeded(seed)), expected)
    mix = equipped(name)
    found = mix(scene, seeded(0))
    own = found.images.round() <= EARLIER
    assert torch.equal(found.images[own], scene.images[own])
    assert bool(own.all()) == (not mix.state())


# -- checkpoints


@each
def test_a_resumed_mix_goes_on_alike(name: str):
    mix, fresh = new(name), new(name)
    scenes = [scene_of(count=3 + n, first=1 + 10 * n) for n in range(3)]
    for n, scene in enumerate(scenes):  # numbers that half precision cannot hold
        scene.images.add_(torch.rand(scene.images.shape, generator=seeded(n)))
    for n in range(2):
        mix(scenes[n], seeded(n))
    state = {k: v.clone() for k, v in mix.state().items()}
    expected = mix(scenes[2], seeded(2))
    fresh.load_state(state)
    assert fresh.state().keys() == state.keys()
    assert all(torch.equal(fresh.state()[k], v) for k, v in state.items())
    assert_same(fresh(scenes[2], seeded(2)), expected)
    again = fresh.state()
    assert again.keys() == mix.state().keys()
    assert all(torch.equal(again[k], v) for k, v in mix.state().items())


@each
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_gpu_gives_the_same(name: str):
    def moved(scene: Scene, device: str) -> Scene:
        tensors = {
            f.name: value.to(device)
            for f in fields(scene)
            if isinstance(value := getattr(scene, f.name), Tensor)
        }
        return replace(scene, **tensors, maps={k: v.to(device) for k, v in scene.maps.items()})

    mix = equipped(name)
    state = mix.state()
    expected = mix(scene_of(), seeded(1))
    mix.load_state(state)
    found = mix(moved(scene_of(), "cuda"), seeded(1))
    assert found.images.is_cuda and found.labels.is_cuda and found.tags.is_cuda
    found = moved(found, "cpu")
    torch.testing.assert_close(found.images, expected.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.tags, expected.tags)
    assert (found.labels == expected.labels).float().mean() > 0.98
