"""Fully connected CRF: labels that follow the image's edges (Kraehenbuehl & Koltun, NeurIPS 2011).

Every pixel is tied to every other by two Gaussian kernels, one of place, one of place and colour:

    E(x) = sum_i u_i(x_i) + sum_{i<j} [x_i != x_j] (w_g k_g(i, j) + w_b k_b(i, j))

From q_i ~ exp(-u_i), the mean field q_i ~ exp(-u_i + sum_m w_m sum_j k_m(i, j) q_j) is iterated, each
q_i summing to one. A kernel k is normalised to k(i, j) / sqrt(sum_l k(i, l) sum_l k(j, l)) and
filtered on a permutohedral lattice. Normalisation and defaults are those of pydensecrf, which the
published methods use: on the arrays compared, the most probable label is the same at every pixel.

It runs on the CPU in float32, wherever the tensors are, in at most ``torch.get_num_threads()``
threads. The result is the same bit for bit in any number of threads, and for an image in any batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.ops.checks import require_batch, require_image, require_maps, require_tensor
from weakseg.ops.permutohedral import LANES, Lattice, blurred, build_lattice
from weakseg.ops.threads import Split, bounds, jit, splitter

__all__ = ["dense_crf", "dense_crf_from_labels", "dense_crf_many"]

Preset = Literal["soft", "label", "deeplab"]
Scale = float | Literal["auto"]
Gaussian = tuple[float, float]
Bilateral = tuple[float, float, float]


class _Kernels(NamedTuple):
    gaussian: Gaussian
    bilateral: Bilateral


_PRESETS: dict[str, _Kernels] = {
    "soft": _Kernels((3, 3), (80, 13, 10)),
    "label": _Kernels((3, 3), (50, 5, 10)),
    "deeplab": _Kernels((1, 3), (67, 3, 4)),
}
_CLIP = 1e-5
_USUAL_SIDE = 500  # the longer side of the images that the presets were made for
_PIXELS_PER_THREAD = 20_000  # fewer are not worth waking a thread


def dense_crf(
    image: Tensor,
    probabilities: Tensor,
    iterations: int = 10,
    gaussian: Gaussian | None = None,
    bilateral: Bilateral | None = None,
    *,
    preset: Preset | None = None,
    scale: Scale = 1.0,
) -> Tensor:
    """Refines probabilities; the unary energy is -log of them, clipped to [1e-5, 1].

    A class that is at most 1e-5 everywhere in an image is left out there and gets zeros. An image
    with one class gets ones, and one with none stays undecided at 1 / K.

    Args:
        image: (B, 3, H, W) uint8 RGB.
        probabilities: (B, K, h, w) in [0, 1], background included; they need not sum to one.
            Resized bilinearly to the image where their size differs.
        iterations: Mean-field steps.
        gaussian: Standard deviation of place in pixels, weight. A weight of 0 leaves it out.
        bilateral: Standard deviations of place in pixels and of colour in 0 .. 255, weight.
        preset: Where the kernels come from that are not given: ``soft`` (default), (3, 3) and
            (80, 13, 10); ``label``, (3, 3) and (50, 5, 10); ``deeplab``, (1, 3) and (67, 3, 4).
        scale: Multiplies a preset's deviations of place, which were made for images of 500 pixels;
            ``auto`` is the image's longer side / 500.

    Returns:
        (B, K, H, W) float32, summing to one over K, on the device of ``probabilities``.

    Raises:
        ValueError: A wrong shape, values that are not finite, or kernels that do not make sense.
        TypeError: A wrong type.
    """
    arrays = _arrays(image, probabilities)
    kernels = _kernels(image, gaussian, bilateral, preset or "soft", scale, iterations)
    refined = _refine(*arrays, kernels, iterations, _threads(image))
    return torch.from_numpy(refined).to(probabilities.device)


def dense_crf_many(
    batches: Iterable[tuple[Tensor, Tensor]],
    iterations: int = 10,
    gaussian: Gaussian | None = None,
    bilateral: Bilateral | None = None,
    *,
    preset: Preset | None = None,
    scale: Scale = 1.0,
    threads: int | None = None,
) -> Iterator[Tensor]:
    """Refines batches of different sizes, one in each thread: for many images the faster way.

    Args:
        batches: Pairs of image (B, 3, H, W) and probabilities (B, K, h, w), as for
            :func:`dense_crf`; read as they are needed, at most two for each thread ahead.
        iterations: As for :func:`dense_crf`, like all others but ``threads``.
        gaussian: See there.
        bilateral: See there.
        preset: See there.
        scale: See there.
        threads: How many; ``torch.get_num_threads()`` by default.

    Yields:
        What :func:`dense_crf` returns, in the order of ``batches``.
    """
    threads = threads or torch.get_num_threads()
    waiting: deque[tuple[Future[np.ndarray], torch.device]] = deque()

    def first() -> Tensor:
        future, place = waiting.popleft()
        return torch.from_numpy(future.result()).to(place)

    with ThreadPoolExecutor(threads) as pool:
        for image, probabilities in batches:
            # Torch's operators have threads of their own, so they stay out of ours.
            arrays = _arrays(image, probabilities)
            kernels = _kernels(image, gaussian, bilateral, preset or "soft", scale, iterations)
            future = pool.submit(_refine, *arrays, kernels, iterations, 1)
            waiting.append((future, probabilities.device))
            if len(waiting) > 2 * threads:
                yield first()
        while waiting:
            yield first()


def dense_crf_from_labels(
    image: Tensor,
    labels: Tensor,
    num_classes: int,
    gt_prob: float = 0.7,
    iterations: int = 10,
    gaussian: Gaussian | None = None,
    bilateral: Bilateral | None = None,
    *,
    preset: Preset | None = None,
    scale: Scale = 1.0,
    ignore: int = 255,
) -> Tensor:
    """Refines hard labels; a pixel's label has probability ``gt_prob``, the others share the rest.

    ``num_classes`` sets that share, (1 - gt_prob) / (num_classes - 1), so count the classes that the
    image may hold: published methods count its tags and the background, not the data set's classes.
    Classes without a pixel take part and cost next to nothing. An image with one label gets ones
    for it, and one that is unsure everywhere stays undecided.

    Args:
        image: (B, 3, H, W) uint8 RGB.
        labels: (B, H, W) of any integer type, in 0 .. num_classes - 1 or ``ignore``.
        num_classes: K, background included.
        gt_prob: Trust in the labels, in (0, 1).
        iterations: Mean-field steps.
        gaussian: As for :func:`dense_crf`.
        bilateral: As for :func:`dense_crf`.
        preset: As for :func:`dense_crf`, ``label`` by default.
        scale: As for :func:`dense_crf`.
        ignore: Label of unsure pixels: there all classes are equally probable.

    Returns:
        (B, K, H, W) float32, summing to one over K, on the device of ``labels``.

    Raises:
        ValueError: A wrong shape, a label out of range, or kernels that do not make sense.
        TypeError: A wrong type.
    """
    require_image(image, "uint8")
    _require_labels(image, labels, num_classes, ignore)
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must lie in (0, 1), not {gt_prob}")
    kernels = _kernels(image, gaussian, bilateral, preset or "label", scale, iterations)
    ids = labels.cpu().numpy().astype(np.int64)
    refined = np.zeros((len(ids), num_classes, *ids.shape[1:]), np.float32)
    with splitter(_threads(image)) as split:
        field = _MeanField(ids.shape[1:], kernels, iterations, split)
        for image_chw, ids_hw, refined_khw in zip(image.cpu().numpy(), ids, refined, strict=True):
            present = np.setdiff1d(ids_hw, [ignore])
            if len(present) < 2:
                _settle(refined_khw, present)
                continue
            # Absent classes are alike: one of them stands for all.
            absent = np.setdiff1d(np.arange(num_classes), present)
            carried = np.append(present, absent[:1])
            copies = np.append(np.ones(len(present)), [len(absent)] * len(absent[:1]))
            shape = (len(carried), *ids_hw.shape)
            probabilities = np.full(shape, (1 - gt_prob) / (num_classes - 1), np.float32)
            probabilities[ids_hw == carried[:, None, None]] = gt_prob
            probabilities[:, ids_hw == ignore] = 1 / num_classes
            found = field.refine(image_chw, probabilities, copies)
            refined_khw[present] = found[: len(present)]
            refined_khw[absent] = found[len(present) :]
    return torch.from_numpy(refined).to(labels.device)


def _arrays(image: Tensor, probabilities: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Image (B, 3, H, W) uint8 and probabilities (B, K, H, W) float32; refuses what is wrong."""
    require_image(image, "uint8")
    require_maps("probabilities", probabilities)
    require_batch("probabilities", probabilities, image, "image")
    scores = probabilities.detach().float()
    if not scores.isfinite().all():
        raise ValueError("probabilities hold NaN or infinite values; pass values in [0, 1]")
    if scores.shape[-2:] != image.shape[-2:] and scores.numel():
        scores = F.interpolate(scores, image.shape[-2:], mode="bilinear")
    return image.cpu().numpy(), scores.cpu().numpy()


def _refine(
    image: np.ndarray, scores: np.ndarray, kernels: _Kernels, iterations: int, threads: int
) -> np.ndarray:
    refined = np.zeros((*scores.shape[:2], *image.shape[-2:]), np.float32)
    with splitter(threads) as split:
        field = _MeanField(image.shape[-2:], kernels, iterations, split)
        for image_chw, scores_khw, refined_khw in zip(image, scores, refined, strict=True):
            present = np.flatnonzero((scores_khw > _CLIP).any((1, 2)))
            if len(present) < 2:
                _settle(refined_khw, present)
                continue
            probabilities = scores_khw[present].clip(_CLIP, 1)
            refined_khw[present] = field.refine(image_chw, probabilities, np.ones(len(present)))
    return refined


def _settle(refined: np.ndarray, present: np.ndarray) -> None:
    """Fills in what there is no doubt about, or no evidence: one class present, or none."""
    if len(present):
        refined[present] = 1
    elif len(refined):
        refined[:] = 1 / len(refined)


class _MeanField:
    """Mean fields of images of one size, which share the Gaussian lattice."""

    def __init__(
        self, size: tuple[int, ...], kernels: _Kernels, iterations: int, split: Split
    ) -> None:
        self._size = math.prod(size)
        y, x = np.indices(size, np.float32).reshape(2, -1)
        self._place = np.stack([x, y])
        self._kernels, self._iterations, self._split = kernels, iterations, split

    @cached_property
    def _gaussian(self) -> list[Lattice]:
        deviation, weight = self._kernels.gaussian
        return self._lattice(self._place / np.float32(deviation), weight)

    def _bilateral(self, image: np.ndarray) -> list[Lattice]:
        place, colour, weight = self._kernels.bilateral
        parts = (self._place / np.float32(place), image / np.float32(colour))
        return self._lattice(np.concatenate(parts), weight)

    def _lattice(self, features: np.ndarray, weight: float) -> list[Lattice]:
        """The lattice of a normalised kernel, or none where the weight is zero."""
        if weight == 0:
            return []
        lattice = build_lattice(features, self._split)
        ones = np.ones((self._size, LANES), np.float32)
        sums = np.zeros_like(ones)
        spread = blurred([lattice], ones, [lattice.buffers(LANES)], self._split)[0]

        def gather(part: int, parts: int) -> None:
            lattice.slice(spread, sums, sums, *bounds(self._size, part, parts))

        self._split(gather)
        lattice.scale(1 / np.sqrt(sums[:, 0]), weight, self._split)
        return [lattice]

    def refine(
        self, image: np.ndarray, probabilities: np.ndarray, copies: np.ndarray
    ) -> np.ndarray:
        """Iterates the mean field of one image.

        Args:
            image: (3, H, W) uint8.
            probabilities: (K, H, W) float32 above zero.
            copies: (K,) how many classes each of them stands for.

        Returns:
            (K, H, W) float32.
        """
        labels = len(probabilities)
        lanes = -(-labels // LANES) * LANES
        unary = np.empty((self._size, lanes), np.float32)
        counts = np.zeros(lanes, np.float32)
        counts[:labels] = copies
        lattices = self._gaussian + self._bilateral(image.reshape(3, -1))
        buffers = [lattice.buffers(lanes) for lattice in lattices]
        energy, q = np.empty_like(unary), np.empty_like(unary)
        flat = probabilities.reshape(labels, -1)
        refined = np.empty_like(flat)

        def start(part: int, parts: int) -> None:
            some = slice(*bounds(self._size, part, parts))
            np.log(flat[:, some].T, out=unary[some, :labels])
            unary[some, labels:] = -np.inf  # lanes without a label stay at probability 0
            _normalise_exp(unary, counts, q, some.start, some.stop)

        def update(part: int, parts: int) -> None:
            some = bounds(self._size, part, parts)
            base = unary
            for lattice, message in zip(lattices, messages, strict=True):
                lattice.slice(message, base, energy, *some)
                base = energy
            _normalise_exp(energy, counts, q, *some)

        def finish(part: int, parts: int) -> None:
            some = slice(*bounds(self._size, part, parts))
            refined[:, some] = q[some, :labels].T

        self._split(start)
        for _ in range(self._iterations if lattices else 0):
            messages = blurred(lattices, q, buffers, self._split)
            self._split(update)
        self._split(finish)
        return refined.reshape(probabilities.shape)


def _normalise_exp(
    energy: np.ndarray, counts: np.ndarray, q: np.ndarray, start: int, stop: int
) -> None:
    """Sets q to exp(energy), divided by its sum over labels, each counted as often as it stands."""
    some = q[start:stop]
    _below_top(energy[start:stop], some)
    np.exp(some, out=some)  # numpy's is vectorised
    _divide_by_sum(counts, some)


@jit
def _below_top(energy, out):
    for i in range(len(energy)):
        top = energy[i, 0]
        for k in range(1, energy.shape[1]):
            top = max(top, energy[i, k])
        for k in range(energy.shape[1]):
            out[i, k] = energy[i, k] - top


@jit
def _divide_by_sum(counts, q):
    for i in range(len(q)):
        total = np.float32(0)
        for k in range(q.shape[1]):
            total += counts[k] * q[i, k]
        for k in range(q.shape[1]):
            q[i, k] /= total


def _kernels(
    image: Tensor,
    gaussian: Gaussian | None,
    bilateral: Bilateral | None,
    preset: str,
    scale: Scale,
    iterations: int,
) -> _Kernels:
    """The kernels to use on an image; refuses settings that make no sense."""
    if iterations < 0:
        raise ValueError(f"iterations must not be negative: {iterations}")
    if preset not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, not {preset!r}")
    if scale != 1 and (gaussian is not None or bilateral is not None):
        raise ValueError(
            "scale is for presets alone: deviations that you give are in pixels; multiply them"
        )
    if scale == "auto":
        scale = max(image.shape[-2:]) / _USUAL_SIDE
    if not (isinstance(scale, float | int) and scale > 0):
        raise ValueError(f'scale must be a positive number or "auto", not {scale!r}')
    (near, weight), (far, colour, far_weight) = _PRESETS[preset]
    kernels = _Kernels(
        (near * scale, weight) if gaussian is None else gaussian,
        (far * scale, colour, far_weight) if bilateral is None else bilateral,
    )
    for name, kernel, meaning in (
        ("gaussian", kernels.gaussian, "(deviation of place, weight)"),
        ("bilateral", kernels.bilateral, "(deviation of place, deviation of colour, weight)"),
    ):
        deviations, weight = kernel[:-1], kernel[-1]
        right = all(deviation > 0 for deviation in deviations) and weight >= 0
        if len(kernel) != meaning.count(",") + 1 or not right:
            raise ValueError(
                f"{name} must be {meaning}, deviations above 0 and the weight at least 0, "
                f"not {kernel}"
            )
    return kernels


def _threads(image: Tensor) -> int:
    pixels = image.shape[-2] * image.shape[-1]
    return max(1, min(torch.get_num_threads(), pixels // _PIXELS_PER_THREAD))


def _require_labels(image: Tensor, labels: Tensor, num_classes: int, ignore: int) -> None:
    require_tensor("labels", labels)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels must be class ids of an integer type, not {labels.dtype}; pass labels.long()"
        )
    expected = (len(image), *image.shape[-2:])
    if labels.shape != expected:
        mend = (
            "add the batch with labels[None]"
            if labels.ndim == 2
            else 'resize them with mode="nearest"'
        )
        raise ValueError(
            f"labels must have the image's (B, H, W), {expected}, not {tuple(labels.shape)}; {mend}"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if 0 <= ignore < num_classes:
        raise ValueError(f"ignore={ignore} is the id of a class; pass another id for unsure pixels")
    ids = labels.long()
    wrong = ids[(ids != ignore) & ((ids < 0) | (ids >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"labels hold {wrong[0].item()}; pass ids of 0 .. {num_classes - 1}, or {ignore} where "
            "unsure"
        )
