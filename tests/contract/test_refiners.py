"""What every refiner must hold. A new one adds an adapter to ``REFINERS`` and inherits all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from weakseg.ops.dense_crf import dense_crf, dense_crf_from_labels
from weakseg.ops.pamr import pamr
from weakseg.ops.random_walk import random_walk, random_walk_from_features
from weakseg.ops.scg import self_correlation

SIZE = (18, 23)
SAYS_WHAT_TO_DO = r"\b(pass|add|resize|put|wrap)\b"


@dataclass(frozen=True)
class Refiner:
    """A refiner as the suite sees it: ``refine(classes, maps, *guides)``.

    ``guides`` makes what it is guided by from a picture (B, 3, H, W) in [0, 1]; it commutes with
    mirroring. ``wrong`` makes lists of arguments that must be refused.
    """

    name: str
    guides: Callable[[Tensor], list[Tensor]]
    refine: Callable[..., Tensor]
    flip: float = 1e-5
    """Difference of a mirrored result: the largest one or, under an approximation, the mean."""
    approximate: bool = False
    """It rounds places to a lattice that is not symmetric."""
    sums: bool = True
    """Maps that sum to one over the classes still do."""
    constant: Literal["kept", "flat", "winner"] = "kept"
    """What constant maps become under a constant guide: themselves, constant, or alike in argmax."""
    labels: bool = False
    """It takes class ids (B, H, W) with 255 for unsure, not scores (B, K, H, W)."""
    wrong: Callable[[Tensor], list[Tensor]] = lambda guide: []
    """Wrong versions of the first guide: channels, size."""
    threads_at: tuple[int, int] = SIZE
    """A size that is worth several threads to it."""

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, seed: int = 0, size: tuple[int, int] = SIZE, classes: int = 4, batch: int = 2
    ) -> list[Tensor]:
        """Maps and guides."""
        scores = smooth(seed, batch, classes, size, 4).softmax(1)
        if self.labels:
            best, ids = scores.max(1)
            scores = ids.masked_fill(best < best.mean(), 255)
        return [scores, *self.guides(smooth(seed + 1, batch, 3, size, 2).sigmoid())]

    def __call__(self, inputs: list[Tensor], classes: int = 4) -> Tensor:
        return self.refine(classes, *inputs)


def smooth(seed: int, batch: int, channels: int, size: tuple[int, int], scale: float) -> Tensor:
    """(B, channels, H, W) smooth noise: what images and maps look like."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 5, 6, generator=generator)
    if 0 in coarse.shape:
        return torch.zeros(batch, channels, *size)
    return scale * F.interpolate(coarse, size, mode="bicubic", align_corners=True)


def rgb(picture: Tensor) -> list[Tensor]:
    return [picture.clone()]


def rgb8(picture: Tensor) -> list[Tensor]:
    return [(picture * 255).round().to(torch.uint8)]


def edges(picture: Tensor) -> list[Tensor]:
    """Where the picture differs from its neighbourhood; none where it is constant."""
    around = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return [(20 * (picture - around).abs().amax(1, keepdim=True)).clamp(0, 1)]


def one_level(picture: Tensor, channels: int = 6) -> list[Tensor]:
    mix = torch.randn(channels, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    return [F.conv2d(20 * picture, mix).relu()]


def two_levels(picture: Tensor) -> list[Tensor]:
    """A second level of half the size."""
    half = F.avg_pool2d(picture, 2, ceil_mode=True)
    return [*one_level(picture), *one_level(half, channels=9)]


def not_rgb(image: Tensor) -> list[Tensor]:
    """One channel, and channels last."""
    return [image[:, :1], image.permute(0, 2, 3, 1)]


def other_size(guide: Tensor) -> list[Tensor]:
    return [guide[..., :-1, :]]


REFINERS = [
    Refiner("pamr", rgb, lambda _, maps, image: pamr(image, maps), wrong=not_rgb),
    Refiner("par", rgb, lambda _, maps, image: pamr(image, maps, variant="par"), wrong=not_rgb),
    Refiner(
        "self_correlation",
        two_levels,
        lambda _, maps, *levels: self_correlation(maps, levels),
        flip=1e-4,
        sums=False,
        constant="flat",
        threads_at=(32, 33),
    ),
    Refiner(
        "self_correlation, first order",
        two_levels,
        lambda _, maps, *levels: self_correlation(maps, levels, order=1),
        flip=1e-4,
        sums=False,
        constant="flat",
        threads_at=(32, 33),
    ),
    Refiner(
        "random_walk",
        edges,
        lambda _, maps, edge: random_walk(maps, edge),
        sums=False,
        wrong=lambda edge: [torch.cat([edge, edge], 1), *other_size(edge)],
        threads_at=(60, 61),
    ),
    Refiner(
        "random_walk_from_features",
        one_level,
        lambda _, maps, features: random_walk_from_features(maps, features),
        wrong=other_size,
        threads_at=(60, 61),
    ),
    Refiner(
        "dense_crf",
        rgb8,
        lambda _, maps, image: dense_crf(image, maps),
        flip=0.02,
        approximate=True,
        constant="winner",
        wrong=not_rgb,
        threads_at=(200, 201),
    ),
    Refiner(
        "dense_crf_from_labels",
        rgb8,
        lambda classes, labels, image: dense_crf_from_labels(image, labels, classes),
        flip=0.02,
        approximate=True,
        constant="winner",
        labels=True,
        wrong=lambda image: [*not_rgb(image), *other_size(image)],
        threads_at=(200, 201),
    ),
]

each = pytest.mark.parametrize("refiner", REFINERS, ids=str)
each_of_scores = pytest.mark.parametrize("refiner", [r for r in REFINERS if not r.labels], ids=str)


def close(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads in torch, which is what all refiners go by."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- values


@each
def test_scores_stay_scores(refiner: Refiner):
    found = refiner(refiner.inputs())
    assert found.dtype == torch.float32
    assert found.shape == (2, 4, *SIZE)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-5
    assert (found.amax((-2, -1)) - found.amin((-2, -1))).max() > 0.05  # and say something
    if refiner.sums:
        close(found.sum(1), torch.ones(2, *SIZE), atol=1e-5)


@each
def test_it_changes_the_maps_and_follows_its_guide(refiner: Refiner):
    maps, *guides = refiner.inputs()
    _, *others = refiner.inputs(seed=7)
    found = refiner([maps, *guides])
    if not refiner.labels:
        assert (found - maps).abs().max() > 1e-3
    assert (found - refiner([maps, *others])).abs().max() > 1e-3


@each
def test_a_batch_of_two_is_two_singles(refiner: Refiner):
    inputs = refiner.inputs()
    both = refiner(inputs)
    for b in range(2):
        close(both[b : b + 1], refiner([x[b : b + 1] for x in inputs]))


@each
def test_classes_have_no_order(refiner: Refiner):
    maps, *guides = refiner.inputs()
    order = torch.tensor([2, 0, 3, 1])
    if refiner.labels:
        ids = order.argsort()[maps.clamp(max=3)].masked_fill(maps == 255, 255)
        permuted = refiner([ids, *guides])
    else:
        permuted = refiner([maps[:, order], *guides])
    close(permuted, refiner([maps, *guides])[:, order], atol=1e-5)


@each
def test_a_mirrored_image_has_the_mirrored_result(refiner: Refiner):
    inputs = refiner.inputs()
    mirrored = refiner([x.flip(-1) for x in inputs]).flip(-1)
    difference = (mirrored - refiner(inputs)).abs()
    assert (difference.mean() if refiner.approximate else difference.max()) <= refiner.flip


# -- sizes


@each
@settings(deadline=None, max_examples=12)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    classes=st.integers(1, 3),
    batch=st.integers(1, 2),
)
@example(size=(1, 1), classes=1, batch=1)
@example(size=(1, 1), classes=3, batch=2)
@example(size=(1, 40), classes=2, batch=1)
@example(size=(40, 1), classes=2, batch=1)
@example(size=(2, 61), classes=2, batch=2)
@example(size=(31, 33), classes=1, batch=1)
def test_any_size(refiner: Refiner, size: tuple[int, int], classes: int, batch: int):
    found = refiner(refiner.inputs(3, size, classes, batch), classes)
    assert found.shape == (batch, classes, *size)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-5


@each_of_scores
def test_no_classes_give_no_maps(refiner: Refiner):
    for size in (SIZE, (1, 1)):
        found = refiner(refiner.inputs(size=size, classes=0), 0)
        assert found.shape == (2, 0, *size)
        assert found.dtype == torch.float32


# -- constants


@each
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_constant_maps_under_a_constant_guide(refiner: Refiner, level: float):
    guides = refiner.guides(torch.full((2, 3, *SIZE), level))
    weights = torch.tensor([0.5, 0.2, 0.3])[None, :, None, None].expand(2, 3, *SIZE)
    maps = torch.zeros(2, *SIZE, dtype=torch.int64) if refiner.labels else weights
    found = refiner([maps, *guides], 3)
    assert found.isfinite().all()
    if refiner.constant == "kept":
        close(found, weights, atol=1e-5)
    elif refiner.constant == "flat":
        close(found, found[..., :1, :1].expand_as(found))
    else:
        assert found.argmax(1).eq(0).all()


@each_of_scores
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_maps_or_a_constant_guide_stay_finite(refiner: Refiner, level: float):
    maps, *guides = refiner.inputs()
    constant = refiner.guides(torch.full((2, 3, *SIZE), level))
    for inputs in ([torch.full_like(maps, level), *guides], [maps, *constant]):
        found = refiner(inputs)
        assert found.isfinite().all()
        assert found.min() >= 0
        assert found.max() <= 1 + 1e-5


# -- numbers and memory


@each_of_scores
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_computed_in_float32(refiner: Refiner, dtype: torch.dtype):
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in refiner.inputs()]
    found = refiner(inputs)
    assert found.dtype == torch.float32
    close(found, refiner([x.float() if x.is_floating_point() else x for x in inputs]))


@each
def test_autocast_changes_nothing(refiner: Refiner):
    inputs = refiner.inputs()
    expected = refiner(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(refiner(inputs), expected)


@each
def test_the_layout_of_memory_does_not_matter(refiner: Refiner):
    inputs = refiner.inputs()
    expected = refiner(inputs)
    transposed = [x.mT.contiguous().mT for x in inputs]
    sliced = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in inputs]
    last = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    for views in (transposed, sliced, last):
        assert any(not x.is_contiguous() for x in views)
        close(refiner(views), expected)


@each
def test_same_bits_twice(refiner: Refiner):
    assert torch.equal(refiner(refiner.inputs()), refiner(refiner.inputs()))


@each
def test_same_bits_in_any_number_of_threads(refiner: Refiner):
    inputs = refiner.inputs(size=refiner.threads_at)
    with threads(1):
        one = refiner(inputs)
    with threads(2):
        two = refiner(inputs)
    if refiner.name == "self_correlation":  # some libraries share the sums of its products
        torch.testing.assert_close(two, one, atol=1e-3, rtol=0)
    else:
        assert torch.equal(two, one)


@each
def test_inputs_are_left_as_they_were(refiner: Refiner):
    inputs = refiner.inputs()
    refiner(inputs)
    for x, kept in zip(inputs, refiner.inputs(), strict=True):
        assert torch.equal(x, kept)


@each_of_scores
def test_no_gradient_flows(refiner: Refiner):
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in refiner.inputs()]
    assert not refiner(inputs).requires_grad


@each
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_gpu_gives_the_same(refiner: Refiner):
    inputs = refiner.inputs()
    found = refiner([x.cuda() for x in inputs])
    assert found.is_cuda
    close(found.cpu(), refiner(inputs), atol=1e-4)


# -- refusals


def swapped(inputs: list[Tensor], i: int, x: object) -> list:
    return [*inputs[:i], x, *inputs[i + 1 :]]


@each
def test_wrong_shapes_are_refused_with_what_to_do(refiner: Refiner):
    inputs = refiner.inputs()
    single = refiner.inputs(batch=1)  # of which the batch is easily forgotten
    cases = [swapped(single, i, x[0]) for i, x in enumerate(single)]
    cases += [swapped(inputs, i, torch.cat([x, x[:1]])) for i, x in enumerate(inputs)]
    cases += [swapped(inputs, 1, x) for x in refiner.wrong(inputs[1])]
    for case in cases:
        with pytest.raises(ValueError, match=SAYS_WHAT_TO_DO):
            refiner(case)


@each
def test_wrong_types_are_refused_with_what_to_do(refiner: Refiner):
    inputs = refiner.inputs()
    for i, x in enumerate(inputs):
        other = x.long() if x.is_floating_point() else x.float()
        for wrong in (other, x.numpy()):
            with pytest.raises(TypeError, match=SAYS_WHAT_TO_DO):
                refiner(swapped(inputs, i, wrong))
