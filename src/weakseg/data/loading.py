"""Batches for training: what is drawn depends on (seed, step) alone.

Order and augmentation derive from the seed, the epoch (a pass over the data) and the sample, never
from what was drawn before, so a training that resumes at step n sees exactly what an uninterrupted
one would have seen, with any number of loader processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from weakseg.data.images import read_mask
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.methods.base import Batch
from weakseg.ops.confusion import IGNORE

__all__ = [
    "Augment",
    "MaskBatch",
    "StepBatches",
    "TrainingFeatures",
    "TrainingImages",
    "derive_seed",
    "loader_processes",
    "training_loader",
]


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose, independent of those of other parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class MaskBatch:
    """What a segmenter trains on.

    Attributes:
        images: (B, 3, S, S) float32, normalised.
        masks: (B, S, S) int64 class ids; 255 is ignored.
        ids: B sample ids.
    """

    images: Tensor
    masks: Tensor
    ids: list[str]

    def to(self, device: Any, **kwargs: Any) -> MaskBatch:
        """The batch on another device."""
        return MaskBatch(
            self.images.to(device, **kwargs), self.masks.to(device, **kwargs), self.ids
        )

    def parts(self, count: int) -> list[MaskBatch]:
        """The batch cut into ``count`` equal parts, in order."""
        size = len(self.ids) // count
        return [
            MaskBatch(self.images[i : i + size], self.masks[i : i + size], self.ids[i : i + size])
            for i in range(0, size * count, size)
        ]


@dataclass(frozen=True)
class Augment:
    """Random views of a training image.

    Attributes:
        crop: Side of the square crop; smaller images are padded with the mean colour.
        resize: Range of the longer side, as a share of the crop.
        flip: Mirror half of the images.
        jitter: Strength of colour jitter (brightness, contrast, saturation; a third of it on hue).
        mean: RGB mean of the network's weights.
        std: RGB standard deviation of the network's weights.
    """

    crop: int
    resize: tuple[float, float]
    flip: bool
    jitter: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def views(self) -> Callable[..., Any]:
        """The torchvision transform after resizing."""
        colour = [round(255 * m) for m in self.mean]  # becomes zero when normalised
        steps: list[Any] = []
        if self.jitter:
            j = self.jitter
            steps.append(v2.ColorJitter(j, j, j, j / 3))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        fill = {tv_tensors.Image: colour, tv_tensors.Mask: IGNORE}
        steps.append(v2.RandomCrop(self.crop, pad_if_needed=True, fill=fill))
        steps.append(
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)
        )
        steps.append(v2.Normalize(self.mean, self.std))
        return v2.Compose(steps)


class TrainingImages(Dataset):
    """Augmented training images with their tags, or with masks for a segmenter.

    An item is asked for by (index, epoch): the same pair always gives the same view.

    Args:
        collection: The samples.
        augment: The views.
        seed: Seed of the views.
        masks: File of each sample's mask; ``None`` for methods, which never see masks.
    """

    def __init__(
        self,
        collection: Collection,
        augment: Augment,
        seed: int,
        masks: Sequence[Path] | None = None,
    ) -> None:
        self.samples = collection.samples
        self.tags = torch.from_numpy(collection.tag_matrix()).float()
        self.augment = augment
        self.seed = seed
        self.masks = masks
        self._views = augment.views()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(
        self, keys: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor, str]] | UserError:
        """Items of a batch. An error is handed on whole: loader processes would make it text."""
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return error

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        index, epoch = key
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: torch.manual_seed also records a traceback for CUDA.
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", epoch, index))
            low, high = self.augment.resize
            share = low + (high - low) * torch.rand(()).item()
            side = max(1, round(share * self.augment.crop))
            image = tv_tensors.Image(_to_chw(_resized(self.samples[index].pixels(side), side)))
            if self.masks is None:
                return (
                    self._views(image).as_subclass(Tensor),
                    self.tags[index],
                    self.samples[index].id,
                )
            size = (image.shape[2], image.shape[1])
            mask = cv2.resize(
                read_mask(self.masks[index]), size, interpolation=cv2.INTER_NEAREST_EXACT
            )
            view, labels = self._views(image, tv_tensors.Mask(torch.from_numpy(mask)))
            return view.as_subclass(Tensor), labels.as_subclass(Tensor), self.samples[index].id


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """The image enlarged to the longer side; reading it has already reduced larger ones."""
    height, width = image.shape[:2]
    if max(height, width) >= side:
        return image
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def _to_chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TrainingFeatures(Dataset):
    """Averages of a frozen backbone's features with the images' tags.

    An item is asked for by (index, epoch), as of :class:`TrainingImages`; each pass takes another
    view of the image.

    Args:
        collection: The samples.
        pooled: (N, V, C) float16, V views of each sample: scales, mirror images, windows.
        seed: Seed of the views.
    """

    masks = None

    def __init__(self, collection: Collection, pooled: np.ndarray, seed: int) -> None:
        self.ids = [sample.id for sample in collection.samples]
        self.tags = torch.from_numpy(collection.tag_matrix()).float()
        self.pooled = torch.from_numpy(pooled)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, str, Tensor]:
        index, epoch = key
        view = derive_seed(self.seed, "view", epoch, index) % self.pooled.shape[1]
        features = self.pooled[index, view].float()
        return torch.empty(3, 0, 0), self.tags[index], self.ids[index], features


class StepBatches(Sampler):
    """Batches of (index, epoch) for the steps from ``start`` to ``steps``.

    Epochs follow each other without gaps, so every batch is full, and a batch may join the end of
    one with the start of the next.

    Args:
        images: Size of the data set.
        batch: Images in a step, over all processes.
        steps: Steps of the whole schedule.
        seed: Seed of the order.
        start: Steps already done.
        rank: Number of this process.
        world: Number of processes; ``batch`` must be a multiple of it.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if images < 1 or batch % world:
            raise ValueError(
                f"cannot make batches of {batch} from {images} images on {world} processes"
            )
        self.images, self.batch, self.steps = images, batch, steps
        self.seed, self.start, self.rank, self.world = seed, start, rank, world

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        orders: dict[int, list[int]] = {}
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * share
            keys = [(p % self.images, p // self.images) for p in range(first, first + share)]
            epochs = {epoch for _, epoch in keys}
            orders = {e: orders[e] if e in orders else self._order(e) for e in epochs}
            yield [(orders[epoch][place], epoch) for place, epoch in keys]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.images, generator=generator).tolist()


def training_loader(
    data: TrainingImages | TrainingFeatures, batches: Iterable[list[tuple[int, int]]], workers: int
) -> DataLoader:
    """Loader of :class:`Batch` (or :class:`MaskBatch`, where the data has masks).

    In place of a batch with an unreadable image it yields the :class:`UserError`.
    """
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate_tags if data.masks is None else _collate_masks,
        worker_init_fn=_single_threaded,
        prefetch_factor=4 if workers else None,
    )


def loader_processes(wanted: int | None, accelerator: str) -> int:
    """Number of loader processes: as wanted, else one beside a CPU and more beside a GPU."""
    if wanted is not None:
        return wanted
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores - 1, 1) if accelerator == "cpu" else min(cores, 12)


def _single_threaded(_: int) -> None:
    cv2.setNumThreads(0)  # one image per process is enough work


def _collate_tags(items: list[tuple[Tensor, Tensor, str]] | UserError) -> Batch | UserError:
    if isinstance(items, UserError):
        return items
    pooled = [item[3] for item in items if len(item) > 3]  # type: ignore[misc]
    return Batch(*_stacked([item[:3] for item in items]), torch.stack(pooled) if pooled else None)


def _collate_masks(items: list[tuple[Tensor, Tensor, str]] | UserError) -> MaskBatch | UserError:
    return items if isinstance(items, UserError) else MaskBatch(*_stacked(items))


def _stacked(items: list[tuple[Tensor, Tensor, str]]) -> tuple[Tensor, Tensor, list[str]]:
    images, targets, ids = zip(*items, strict=True)
    return torch.stack(images), torch.stack(targets), list(ids)
