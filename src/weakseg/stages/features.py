"""Features of a frozen backbone, computed once: what heads train on and seeds are made from.

Where nothing of a backbone learns (``backbone.train: none``), each image's last level at each scale,
with the mirrored image, is computed once and kept in float16 under the train stage. The head of a
classifier needs only averages of them: over the whole image and over random windows of it, which
take the place of random crops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakseg.console import Bar, console
from weakseg.data.loading import TrainingFeatures, derive_seed
from weakseg.data.samples import Collection, Sample
from weakseg.files import atomic_path
from weakseg.inference import Normalise, evaluating, inputs_at
from weakseg.methods import Trainable
from weakseg.networks.backbone import Backbone
from weakseg.recipe import SeedsConfig
from weakseg.stages.batches import ahead, groups_of_one_size, read_group
from weakseg.training.config import Precision
from weakseg.training.precision import autocast, chosen_precision

__all__ = ["FEATURES", "features_path", "frozen_levels", "keep_features", "pooled_features"]

FEATURES = "features"
"""Folder of the train stage that holds them."""

_POOLED_BYTES = 2**30  # of all windows' averages together, which are held in memory
_WINDOWS = 8  # of each view at most, the whole image among them
_PROBE = 256  # side of the images that the precision is measured on
_SMALLEST = 0.5  # side of a window, as a share of the image's


def features_path(folder: Path, sample_id: str) -> Path:
    """File of one image's features."""
    return folder / f"{sample_id}.npz"


def keep_features(
    model: Trainable,
    images: Collection,
    config: SeedsConfig,
    folder: Path,
    most: float,
    wanted: Precision = "32-true",
) -> None:
    """Computes what is not there yet: the last level of each image's views, and its averages.

    Args:
        model: Its backbone is the frozen one.
        images: Training images.
        config: Scales, flip and size of the views: those of the seeds.
        folder: Gets a file for each image; the maps are left out of it where all of them together
            would take more than ``most`` gigabytes, and are computed again for the seeds.
        most: Gigabytes.
        wanted: Precision that the features are computed in.
    """
    groups = groups_of_one_size(images, config)
    todo = [g for g in groups if not all(features_path(folder, s.id).exists() for s in g)]
    backbone, views = model.backbone, len(config.scales) * (1 + config.flip)
    channels = backbone.levels[-1].channels
    windows = int(_POOLED_BYTES / (len(images) * views * channels * 2))
    windows = min(max(windows, 1), _WINDOWS)
    with_maps: bool | None = None
    done = len(images) - sum(map(len, todo))
    with evaluating(model), Bar("features", len(images), done) as bar:
        precision = _precision(backbone, folder, wanted)
        for group, batch in ahead(lambda g: read_group(g, config.max_side), todo):
            levels = [
                _features(backbone, batch, scale, config.flip, precision) for scale in config.scales
            ]
            if with_maps is None:  # the first group stands for all
                size = sum(level.nbytes for level in levels) / len(group) / 2 * len(images) / 1e9
                with_maps = size <= most
                if not with_maps:
                    console.print(
                        f"  Features of all images take {size:,.0f} GB, more than "
                        f"train.features_gb ({most:g}): those of the seeds are computed again."
                    )
            for i, sample in enumerate(group):
                own = [level[i :: len(group)] for level in levels]  # the image, its mirror image
                _write(folder, sample, own, windows, with_maps)
            bar.step(len(group))


def frozen_levels(
    backbone: Backbone,
    group: list[Sample],
    batch: Tensor,
    config: SeedsConfig,
    folder: Path,
    wanted: Precision = "32-true",
) -> Callable[[float], list[Tensor]]:
    """Gives the last level of a group's views at a scale: as kept, else computed in the same way."""
    kept = _kept(group, config, folder)

    def at(scale: float) -> list[Tensor]:
        if kept is None:
            precision = _precision(backbone, folder, wanted)
            return [_features(backbone, batch, scale, config.flip, precision)]
        views = np.stack([own[config.scales.index(scale)] for own in kept], 1)  # (V, B, C, h, w)
        return [torch.from_numpy(views.reshape(-1, *views.shape[2:])).to(batch.device).float()]

    return at


def _kept(group: list[Sample], config: SeedsConfig, folder: Path) -> list[list[np.ndarray]] | None:
    """Maps (V, C, h, w) float16 of each image at each scale, where they were kept."""
    kept = []
    for sample in group:
        path = features_path(folder, sample.id)
        if not path.exists():
            return None
        with np.load(path) as arrays:
            if "maps0" not in arrays.files:
                return None
            kept.append([arrays[f"maps{i}"] for i in range(len(config.scales))])
    return kept


def _precision(backbone: Backbone, folder: Path, wanted: Precision) -> Precision:
    device = next(backbone.parameters()).device
    images = torch.zeros(2, 3, _PROBE, _PROBE, device=device)
    return chosen_precision(folder, wanted, device, lambda: backbone(images))


def _features(
    backbone: Backbone, images: Tensor, scale: float, flip: bool, precision: Precision
) -> Tensor:
    """The last level (V B, C, h, w) of images (B, 3, H, W) uint8 at a scale, rounded to float16.

    The mirrored images come behind the images.
    """
    device = next(backbone.parameters()).device
    normalise = Normalise(tuple(backbone.mean), tuple(backbone.std))
    inputs = inputs_at(images.to(device), normalise, scale, flip)
    with autocast(precision, device):
        return backbone(inputs)[-1].half().float()


def pooled_features(images: Collection, folder: Path, seed: int) -> TrainingFeatures:
    """The averages of all images' windows, as training data."""
    rows = []
    for sample in images:
        with np.load(features_path(folder, sample.id)) as arrays:
            rows.append(arrays["pooled"])
    return TrainingFeatures(images, np.stack(rows), seed)


def _write(
    folder: Path, sample: Sample, levels: list[Tensor], windows: int, with_maps: bool
) -> None:
    rng = np.random.default_rng(derive_seed("windows", sample.id))
    shares = rng.uniform(_SMALLEST, 1, (windows, 2))
    places = rng.uniform(0, 1, (windows, 2))
    shares[0] = 1
    pooled = np.stack(
        [
            _pooled(view, share, place)
            for level in levels
            for view in level
            for share, place in zip(shares, places, strict=True)
        ]
    )
    arrays = {"pooled": pooled.astype(np.float16)}
    if with_maps:
        arrays |= {f"maps{i}": level.half().cpu().numpy() for i, level in enumerate(levels)}
    with atomic_path(features_path(folder, sample.id)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _pooled(view: Tensor, share: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Average (C,) of a window of a map (C, h, w): its sides and place as shares of the map's."""
    spans = []
    for side, s, p in zip(view.shape[1:], share, place, strict=True):
        length = max(1, round(side * s))
        start = round((side - length) * p)
        spans.append(slice(start, start + length))
    return view[:, spans[0], spans[1]].mean((1, 2)).cpu().numpy()
