"""From images to maps: several scales and flips, merged by the kind of map; and the predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from weakseg.data.depth import Reading
from weakseg.data.images import read_image, read_large_image
from weakseg.errors import UserError
from weakseg.memory import keep_freed_memory
from weakseg.methods.base import Maps, Trainable
from weakseg.networks.fold import folded
from weakseg.ops import dense_crf_many, gate, merge_maps, spans, stitch
from weakseg.ops import place as place_maps

__all__ = ["Normalise", "Placing", "Predictor", "evaluating", "inputs_at", "multi_scale"]

Placing = Literal["cells", "stretch", "crop"]
"""Where the cells of maps are taken to lie: see :func:`multi_scale`."""

_SEEN = 0.01  # largest probability below which a class takes no part in the CRF
_THRESHOLD = 0.3  # background score of a classifier for which none was chosen


@dataclass(frozen=True)
class Normalise:
    """RGB mean and standard deviation that the network's weights expect."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32, normalised."""
        return V.normalize(
            V.to_dtype(images, torch.float32, scale=True), list(self.mean), list(self.std)
        )


@contextmanager
def evaluating(model: Trainable):
    """Evaluation mode without gradients; restores the mode afterwards, also after an error."""
    keep_freed_memory()
    training = model.training
    model.eval().to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.train(training)


def multi_scale(
    model: Trainable,
    images: Tensor,
    normalise: Normalise,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size: tuple[int, int] | None = None,
    head: str | None = None,
    place: Placing = "cells",
    levels: Callable[[float], list[Tensor]] | None = None,
) -> Maps:
    """Maps of images of one size, over scales and flips.

    Args:
        model: A method or a segmenter, in evaluation mode.
        images: (B, 3, H, W) uint8.
        normalise: As the network expects.
        scales: Factors on the images' size (bicubic, antialiased).
        flip: Adds the mirrored images, in the same forward pass.
        size: (h, w) of the result; default (H, W).
        head: Head of the method.
        place: Where the maps' cells are taken to lie. ``cells``: where the network says that they
            do. ``stretch``: they share the image evenly (most published codes). ``crop``: at full
            size they share the next whole number of cells, cut to the image (irn, Puzzle-CAM).
        levels: Gives the backbone's levels at a scale, mirrored images behind the images, where
            they were computed before.

    Returns:
        Maps with scores (B, K, h, w) in [0, 1], merged by their kind; logits are those of image
        level, averaged over scales and flips. Maps that are logits are clipped at zero on their
        cells, before they are enlarged: so a weak cell does not take from its neighbour. A model
        with ``published_merging`` has probabilities enlarged by nearest neighbours, and logits
        whose sigmoid is the mean of the probabilities at image level.
    """
    image = (images.shape[-2], images.shape[-1])
    size = size or image
    scores: list[Tensor] = []
    backgrounds: list[Tensor] = []
    logits: list[Tensor] = []
    kind: Any = "logit"
    stride = model.backbone.levels[-1].stride if place == "crop" and size == image else None
    for scale in scales:
        for maps, seen, mirrored in _views(model, images, normalise, scale, flip, head, levels):
            kind = maps.kind
            cells = maps.cells if place == "cells" else None
            nearest = model.published_merging and kind == "probability"
            clipped = maps.scores.relu() if kind == "logit" else maps.scores
            for found, into in ((clipped, scores), (maps.background, backgrounds)):
                if found is None:
                    continue
                if nearest:
                    enlarged = F.interpolate(found.float(), size, mode="nearest")
                    into.append(enlarged.flip(-1) if mirrored else enlarged)
                elif stride is not None:
                    into.append(_cropped(found, stride, mirrored, size))
                else:
                    placed = place_maps(found, cells, seen, size)
                    into.append(placed.flip(-1) if mirrored else placed)
            if maps.logits is not None:
                logits.append(maps.logits.float())
    return Maps(
        merge_maps(scores, kind),
        kind=kind,
        background=merge_maps(backgrounds, "probability") if backgrounds else None,
        logits=_mean(logits, model.published_merging) if logits else None,
    )


def inputs_at(images: Tensor, normalise: Normalise, scale: float, flip: bool) -> Tensor:
    """What the network reads of images (B, 3, H, W) uint8 at a scale, the mirrored ones behind them."""
    scaled = images
    if scale != 1.0:
        side = list(_size_at(images, scale))
        scaled = V.resize(images, side, interpolation=V.InterpolationMode.BICUBIC, antialias=True)
    inputs = normalise(scaled)
    if flip:
        inputs = torch.cat([inputs, inputs.flip(-1)])
    return inputs.contiguous(memory_format=torch.channels_last)


def _size_at(images: Tensor, scale: float) -> tuple[int, int]:
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    return height, width


def _mean(logits: Sequence[Tensor], of_probabilities: bool) -> Tensor:
    """Their mean, or the logit of their probabilities' mean."""
    every = torch.stack(list(logits))
    if not of_probabilities or len(every) == 1:
        return every.mean(0)
    return every.double().sigmoid().mean(0).logit().float()


def _views(
    model: Trainable,
    images: Tensor,
    normalise: Normalise,
    scale: float,
    flip: bool,
    head: str | None,
    levels: Callable[[float], list[Tensor]] | None,
) -> Iterator[tuple[Maps, tuple[int, int], bool]]:
    """Maps of the images at a scale, their size there, and whether they are mirrored."""
    if levels is None:
        inputs = inputs_at(images, normalise, scale, flip)
        both = model(inputs, head)
    else:  # the images' size alone is read
        inputs = images.new_empty(1, dtype=torch.float32).expand(
            (1 + flip) * len(images), 3, *_size_at(images, scale)
        )
        with model.backbone.giving(levels(scale)):
            both = model(inputs, head)
    seen = (inputs.shape[-2], inputs.shape[-1])
    if not flip:
        yield both, seen, False
        return
    count = len(images)
    for rows, mirrored in ((slice(0, count), False), (slice(count, None), True)):
        part = replace(
            both,
            scores=both.scores[rows],
            background=None if both.background is None else both.background[rows],
            logits=None if both.logits is None else both.logits[rows],
        )
        yield part, seen, mirrored


def _cropped(maps: Tensor, stride: int, mirrored: bool, size: tuple[int, int]) -> Tensor:
    """Maps over the next whole number of cells, cut to the image's size."""
    upright = maps.float().flip(-1) if mirrored else maps.float()
    whole = [-(-side // stride) * stride for side in size]
    enlarged = F.interpolate(upright, whole, mode="bilinear", align_corners=False)
    return enlarged[..., : size[0], : size[1]]


@dataclass
class Predictor:
    """A trained model, ready to use on images.

    Attributes:
        model: A method or a segmenter.
        classes: K foreground classes; ids 1..K in masks.
        normalise: As the network expects.
        scales: Factors on the image's size.
        flip: Whether the mirrored image is added.
        max_side: Larger images are reduced to this longer side first.
        tile: Larger images are predicted in overlapping tiles of this side, at their own size;
            ``max_side`` then says nothing. For segmentation networks alone.
        crf: Preset of a dense CRF on the probabilities of ``predict``, at the reduced size.
        threshold: Background score; for models that give no background map.
        head: Head of the method.
        place: Where the cells of its maps are taken to lie, as in the seeds of its run.
        reading: How pixels of image files become 8-bit RGB: as those that the model was trained on.
        details: Everything else that the model folder says.
    """

    model: Trainable
    classes: tuple[str, ...]
    normalise: Normalise
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_side: int | None = None
    tile: int | None = None
    crf: Literal["soft", "label", "deeplab"] | None = None
    threshold: float | None = None
    head: str | None = None
    place: Placing = "cells"
    reading: Reading = Reading()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def background_score(self) -> float:
        """Score that a class must exceed, where the model gives no background map."""
        return _THRESHOLD if self.threshold is None else self.threshold

    def to(self, device: str | torch.device) -> Predictor:
        """Moves the model."""
        self.model.to(device)
        return self

    def fast(self) -> Predictor:
        """The same predictor with BatchNorm folded into convolutions, for many images."""
        if not any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            return self
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, 3, 64, 64, generator=generator).to(self.device)
        return replace(self, model=folded(self.model, lambda m: m(probe, self.head).scores.float()))

    def probabilities(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Class probabilities of images of one size.

        Args:
            images: (B, 3, H, W) uint8, RGB.
            tags: (B, K), 1 where the class is present; without it a classifier's own decision
                gates its maps.

        Returns:
            (B, K + 1, H, W) float32 that sums to 1 over classes, background first.

        Raises:
            UserError: Wrong shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}",
                mend="give (B, 3, H, W) uint8 in RGB order",
            )
        with evaluating(self.model):
            maps = multi_scale(
                self.model,
                images.to(self.device),
                self.normalise,
                scales=self.scales,
                flip=self.flip,
                head=self.head,
                place=self.place,
            )
        return self.posterior(maps, tags)

    def posterior(self, maps: Maps, tags: Tensor | None = None) -> Tensor:
        """Class probabilities (B, K + 1, h, w) of merged maps, as ``probabilities`` gives them."""
        scores = maps.scores
        if tags is None and maps.logits is not None:
            tags = (maps.logits.sigmoid() > self.model.present).float()
        if tags is not None:
            scores = gate(scores, tags.to(scores.device))
        background = maps.background
        if background is None:
            background = torch.full_like(scores[:, :1], self.background_score)
        both = torch.cat([background, scores], 1)
        return both / both.sum(1, keepdim=True).clamp(min=1e-8)

    def predict(
        self, image: str | Path | np.ndarray, tags: Sequence[str] | None = None
    ) -> np.ndarray:
        """The mask of one image.

        Args:
            image: File, or (H, W, 3) uint8 RGB. Values of more than 8 bits have the range of the
                images that the model was trained on, or else, where these had 8 bits, their own.
            tags: Names of the classes present, where known: no other class is predicted.

        Returns:
            (H, W) uint8 at the image's size: 0 background, i + 1 for ``classes[i]``.

        Raises:
            UserError: The image cannot be read, or a tag is not one of the classes; or it is to
                be predicted in tiles, and the network gives no probabilities.
        """
        if isinstance(image, (str, Path)):
            full = (read_image if self.tile is None else read_large_image)(
                Path(image), reading=self.reading
            )
        else:
            full = np.asarray(image)
        if full.ndim != 3 or full.shape[2] != 3 or full.dtype != np.uint8:
            raise UserError(
                f"the image is {full.shape} {full.dtype}", mend="give (H, W, 3) uint8 in RGB order"
            )
        if self.tile is not None and max(full.shape[:2]) > self.tile:
            return self.predict_tiled(full, self._tags(tags))
        return self.predict_batch(
            torch.from_numpy(full.copy()).permute(2, 0, 1)[None], self._tags(tags)
        )[0]

    def predict_tiled(
        self,
        image: np.ndarray,
        tags: Tensor | None = None,
        done: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The mask of an image of any size, in tiles of side ``tile``.

        Neighbouring tiles share a quarter of their side: three eighths of it on each side are
        context that only the network sees, and over the middle their probabilities fade into each
        other. Scales, flips and the CRF work inside each tile. Tiles begin where the network's
        cells begin, so that one whose field of view is no wider than the context gives what it
        would give of the whole image; what looks at everything, as the pooling in DeepLabV3+ does,
        looks at its tile.

        Args:
            image: (H, W, 3) uint8 RGB.
            tags: (1, K), 1 where the class is present.
            done: Called with the tiles that are done, and all of them.

        Returns:
            (H, W) uint8. Beside it a few rows of probabilities are kept at a time.

        Raises:
            UserError: The network is a classifier.
        """
        side, overlap, blend = self._tiling()
        rows, columns = (spans(length, side, overlap, blend) for length in image.shape[:2])
        mask = np.empty(image.shape[:2], dtype=np.uint8)
        count = 0

        def result(y: slice, x: slice) -> Tensor:
            nonlocal count
            tile = torch.from_numpy(image[y, x].copy()).permute(2, 0, 1)[None]
            found = self._refined(tile, self.probabilities(tile, tags))[0]
            count += 1
            if done is not None:
                done(count, len(rows) * len(columns))
            return found

        for y, x, probabilities in stitch(rows, columns, result):
            mask[y, x] = probabilities.argmax(0).to(torch.uint8).cpu().numpy()
        return mask

    def _tiling(self) -> tuple[int, int, int]:
        """Side, overlap and blended part of tiles, in pixels."""
        assert self.tile is not None
        with evaluating(self.model):
            probe = torch.zeros(1, 3, 64, 64, device=self.device)
            if self.model(probe, self.head).background is None:
                raise UserError(
                    "a classifier cannot be used in tiles: its maps are divided by the largest "
                    "value in the whole image",
                    where="tile",
                    mend="give the model of a segmenter (weakseg segment RUN), or leave the tile "
                    "out and set max_side",
                )
        stride = max(level.stride for level in self.model.backbone.levels)
        step = stride * lcm(*(Fraction(s).limit_denominator(16).denominator for s in self.scales))
        step = step if step <= self.tile // 8 else stride  # at odd scales cells fall where they may
        overlap = max(2, self.tile // 4 // step) * step
        side = max(-(-self.tile // step) * step, 2 * overlap + step)
        return side, overlap, overlap - 2 * (3 * overlap // 8)

    def predict_batch(self, images: Tensor, tags: Tensor | None = None) -> np.ndarray:
        """Masks (B, H, W) uint8 of images (B, 3, H, W) uint8 of one size."""
        size = images.shape[-2:]
        reduced = _reduced(images, self.max_side)
        probabilities = self.probabilities(reduced, tags)
        probabilities = self._refined(reduced, probabilities)
        if probabilities.shape[-2:] != size:
            probabilities = F.interpolate(probabilities, size, mode="bilinear", align_corners=False)
        return probabilities.argmax(1).to(torch.uint8).cpu().numpy()

    def _refined(self, images: Tensor, probabilities: Tensor) -> Tensor:
        """Probabilities (B, K + 1, H, W) behind the CRF, where there is one."""
        if self.crf is None:
            return probabilities
        # The CRF leaves out classes that are zero: with 80 of them, most of its time.
        seen = probabilities.amax((2, 3), keepdim=True) >= _SEEN
        pairs = zip(images.split(1), (probabilities * seen).split(1), strict=True)
        return torch.cat(list(dense_crf_many(pairs, preset=self.crf)))

    def _tags(self, names: Sequence[str] | None) -> Tensor | None:
        if names is None:
            return None
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise UserError(
                f"unknown tags {unknown}", mend=f"use some of: {', '.join(self.classes)}"
            )
        return torch.tensor([[float(c in names) for c in self.classes]])


def _reduced(images: Tensor, max_side: int | None) -> Tensor:
    height, width = images.shape[-2:]
    if max_side is None or max(height, width) <= max_side:
        return images
    scale = max_side / max(height, width)
    return V.resize(
        images, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True
    )
