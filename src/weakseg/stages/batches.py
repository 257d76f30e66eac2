"""Images in groups of one size, so that several go through the network together.

The groups depend on the list of images alone, never on what is already done: a stage that resumes
forms the same batches and so writes the same bits.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from weakseg.data.images import image_size
from weakseg.data.samples import Sample
from weakseg.errors import UserError
from weakseg.recipe import InferenceConfig

__all__ = ["ahead", "device_words", "groups_of_one_size", "pick_device", "read_group"]

T = TypeVar("T")
R = TypeVar("R")

_GROUP_PIXELS = 4_000_000  # of a group at its largest scale: keeps a photo of 12 megapixels alone


def groups_of_one_size(
    samples: Iterable[Sample], config: InferenceConfig, *, full: bool = False
) -> list[list[Sample]]:
    """Samples in groups whose images have one size.

    A group holds at most ``config.batch`` images, and fewer large ones, so that memory is bounded
    by what a single image needs. ``full`` says that maps are made at the images' own sizes.
    """
    samples = list(samples)
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda s: image_size(s.image), samples))
    groups: dict[tuple[int, int], list[list[Sample]]] = {}
    for sample, size in zip(samples, sizes, strict=True):
        same = groups.setdefault(size, [])
        if not same or len(same[-1]) >= _most(size, config, full):
            same.append([])
        same[-1].append(sample)
    return [group for same in groups.values() for group in same]


def _most(size: tuple[int, int], config: InferenceConfig, full: bool) -> int:
    shrink = min(1.0, (config.max_side or max(size)) / max(size))
    scale = max(shrink * max(config.scales), 1.0 if full else 0.0)
    return max(1, min(config.batch, int(_GROUP_PIXELS / (size[0] * size[1] * scale**2))))


def read_group(group: Sequence[Sample], max_side: int | None) -> Tensor:
    """(B, 3, H, W) uint8 images of a group."""
    images = np.stack([s.pixels(max_side) for s in group])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def ahead(work: Callable[[T], R], items: Sequence[T], count: int = 2) -> Iterator[tuple[T, R]]:
    """Pairs (item, work(item)) in order, with ``count`` items worked on ahead in threads."""
    with ThreadPoolExecutor(count) as pool:
        pending: list[tuple[T, Future[R]]] = []
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > count:
                done, future = pending.pop(0)
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


def device_words(device: torch.device, count: int = 1) -> str:
    """What numbers were computed on, for tables."""
    if device.type == "cpu":
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if count == 1 else f"{count} x {name}"


def pick_device(accelerator: str, devices: int = 1) -> torch.device:
    """The device that inference runs on.

    Raises:
        UserError: There are not as many GPUs as asked for.
    """
    found = torch.device("cpu")
    if accelerator != "cpu" and torch.cuda.is_available():
        found = torch.device("cuda")
    elif accelerator != "cpu" and torch.backends.mps.is_available():
        found = torch.device("mps")
    if accelerator == "gpu" and found.type == "cpu":
        raise UserError(
            "torch sees no GPU",
            where="runtime.accelerator",
            mend="set it to auto or cpu; `weakseg doctor` shows the devices",
        )
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(found.type, devices)
    if devices > gpus:
        raise UserError(
            f"{devices} devices were asked for, but there are {gpus} GPUs",
            where="runtime.devices",
            mend=f"set it to {gpus}, or train on the CPU with runtime.accelerator: cpu",
        )
    return found
