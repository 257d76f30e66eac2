r"""CDA (Su et al., Context Decoupling Augmentation, ICCV 2021).

The idea. Trains run on rails, so a network learns rails for trains. Objects are taken out of images
with one tag and pasted into images where they do not belong: context stops being evidence.

What is done. Harvest: an image with one tag c, whose pixels labelled c are between 0.1 and 0.7 of
it, gives the box around those pixels, and the mask A of which pixels they are, to a bank of c.
Paste: image i with tags Y gets a class :math:`c \notin Y` of the bank, a random object
:math:`(O, A)` of it, and a random placement :math:`\phi` (size, turn, mirror, place):

.. math::
    I^{mix} = \phi(A)\, \phi(O) + (1 - \phi(A))\, I, \qquad Y^{mix} = Y \cup \{c\}

with :math:`\phi(A) \in \{0, 1\}^{h \times w}`. Pasted pixels are labelled c, and in maps c is 1 and
all else 0, the background too: an object's own label is certain wherever it is shown. An image for
which the bank has nothing stays as it was.

Paper and code. The published code trains first, harvests from masks on disk, and trains again; here
the bank fills from the pseudo labels of passing batches, up to a number of objects of each class,
of which the oldest makes room. A batch is harvested after its pasting, so no image meets its own
object in the same step. Objects are stored in half precision and no larger than ``side``, and are
used as stored, so a resumed training sees the same ones. The sizes of pasted objects are ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from weakseg.config import Count, Frozen, Pixels
from weakseg.mixing.base import Mix, Scene, enlarged, mixes, unmixed

__all__ = ["CDA"]


@dataclass(frozen=True)
class _Placement:
    """Where an object is shown: sizes are shares of the image's shorter side."""

    size: float  # of its longer side
    turn: float  # radians
    mirror: int  # 1 or -1
    place: tuple[float, float]  # x and y in -1 .. 1: as far as it stays inside, were it not turned

    def theta(self, item: Tensor, size: torch.Size) -> Tensor:
        """(1, 2, 3) for ``affine_grid``: from an image of that size to the object."""
        (rows, columns), (height, width) = item.shape[-2:], size
        scale = self.size * min(height, width) / max(rows, columns)
        room = (width - scale * columns) / 2, (height - scale * rows) / 2
        x, y = (p * max(0.0, r) for p, r in zip(self.place, room, strict=True))
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        # Pixels from the middle of the image, to pixels from the middle of the object, to its
        # halves: dx = X width / 2 - x, then turned back, then over half its drawn side.
        across = 2 * self.mirror / (scale * columns)
        down = 2 / (scale * rows)
        return torch.tensor(
            [
                [
                    across * cos * width / 2,
                    across * sin * height / 2,
                    -across * (cos * x + sin * y),
                ],
                [-down * sin * width / 2, down * cos * height / 2, down * (sin * x - cos * y)],
            ]
        )[None]


@mixes.register("cda")
class CDA(Mix):
    """Pastes objects of earlier images where their class is not tagged."""

    paper = "Su et al., ICCV 2021"
    idea = "objects are pasted into images where they do not belong, so context is no evidence"

    class Config(Frozen):
        """What is harvested, and how it is shown."""

        least: float = Field(0.1, gt=0, le=1, description="share of the image, at least (code: .1)")
        most: float = Field(0.7, gt=0, le=1, description="share of the image, at most (code: .7)")
        capacity: Count = Field(8, description="objects of each class (code: all)")
        side: Pixels = Field(128, description="largest side of a stored object, in pixels")
        smallest: float = Field(
            0.3, gt=0, le=1, description="longer side of a pasted object, as a share of the image"
        )
        largest: float = Field(0.7, gt=0, le=1, description="the same, at most")
        rotation: float = Field(15.0, ge=0, le=180, description="largest turn, in degrees")
        flip: bool = Field(True, description="mirror half of the objects")

        @model_validator(mode="after")
        def _in_order(self) -> Any:
            if self.least > self.most or self.smallest > self.largest:
                raise ValueError("least and smallest must not be above most and largest")
            return self

    config: Config

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self._bank: dict[int, deque[Tensor]] = {}  # of each class (4, a, b): pixels and mask

    @torch.no_grad()
    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """Each image with an object of a class that it does not have."""
        mixed = self._pasted(scene, generator)
        self._harvest(scene)
        return mixed

    def state(self) -> dict[str, Tensor]:
        """The bank: ``class.number``, oldest first."""
        return {f"{c}.{n}": item for c, items in self._bank.items() for n, item in enumerate(items)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with that bank."""
        self._bank = {}
        for c, n in sorted(tuple(map(int, key.split("."))) for key in state):
            self._add(c, state[f"{c}.{n}"].cpu())

    def _add(self, c: int, item: Tensor) -> None:
        self._bank.setdefault(c, deque(maxlen=self.config.capacity)).append(item)

    def _harvest(self, scene: Scene) -> None:
        single = (scene.tags > 0).sum(1) == 1
        classes = 1 + scene.tags.argmax(1)
        masks = scene.labels == classes[:, None, None]
        share = masks.float().mean((1, 2))
        fits = (share >= self.config.least) & (share <= self.config.most)
        for i in (single & fits).nonzero()[:, 0].tolist():
            mask = enlarged(masks[i : i + 1], scene.images.shape[-2:])
            self._add(int(classes[i]), self._item(scene.images[i], mask))

    def _item(self, image: Tensor, mask: Tensor) -> Tensor:
        """(4, a, b) half: the box around a mask (1, H, W), reduced if it must be, on the CPU."""
        whole = torch.cat([image.float(), mask.float()])
        rows, columns = (mask[0].any(axis).nonzero()[:, 0] for axis in (1, 0))
        item = whole[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        longest = max(item.shape[1:])
        if longest > self.config.side:
            size = [max(1, round(n * self.config.side / longest)) for n in item.shape[1:]]
            item = F.interpolate(item[None], size, mode="bilinear", antialias=True)[0]
            item[3] = (item[3] >= 0.5).float()
        return item.half().cpu()

    def _pasted(self, scene: Scene, generator: torch.Generator | None) -> Scene:
        shown = {}  # of each image that gets one: class, object and where
        for i, tagged in enumerate((scene.tags > 0).tolist()):
            foreign = [c for c in sorted(self._bank) if not tagged[c - 1]]
            if foreign:
                c = foreign[_pick(len(foreign), generator)]
                item = self._bank[c][_pick(len(self._bank[c]), generator)]
                shown[i] = c, item, self._placement(generator)
        if not shown:
            return unmixed(scene)
        images, tags, labels = scene.images.clone(), scene.tags.clone(), scene.labels.clone()
        maps = {name: values.clone() for name, values in scene.maps.items()}
        size, grid = images.shape[-2:], labels.shape[-2:]
        for i, (c, item, placement) in shown.items():
            item = item.to(images.device, torch.float32)
            theta = placement.theta(item, size).to(images.device)
            cut = _sampled(item[3:], theta, grid, "nearest", "zeros")[0] > 0
            pixels = _sampled(item[:3], theta, size, "bilinear", "border").to(images.dtype)
            wide = enlarged(cut[None], size)
            images[i] = torch.where(wide, pixels, images[i])
            labels[i] = labels[i].masked_fill(cut, c)
            for name, values in maps.items():
                target = self._certain(name, values, c)
                values[i] = torch.where(cut, target[:, None, None], values[i])
            tags[i, c - 1] = torch.where(cut.any(), 1, tags[i, c - 1])
        return replace(unmixed(scene), images=images, tags=tags, labels=labels, maps=maps)

    def _placement(self, generator: torch.Generator | None) -> _Placement:
        config = self.config
        size, turn, mirror, x, y = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        return _Placement(
            size=config.smallest + (config.largest - config.smallest) * size,
            turn=math.radians(config.rotation) * (2 * turn - 1),
            mirror=-1 if config.flip and mirror < 0.5 else 1,
            place=(2 * x - 1, 2 * y - 1),
        )

    def _certain(self, name: str, values: Tensor, c: int) -> Tensor:
        """(C,) what a map holds where an object of class c is: with or without a background."""
        before = values.shape[1] - self.num_classes
        if before not in (0, 1):
            raise ValueError(
                f"cda knows what maps of classes are in a pasted object, not {name!r} of "
                f"{values.shape[1]} channels; pass {self.num_classes} channels, or one more with "
                "the background first"
            )
        target = values.new_zeros(values.shape[1])
        target[before + c - 1] = 1
        return target


def _pick(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))


def _sampled(item: Tensor, theta: Tensor, size: torch.Size, mode: str, padding: str) -> Tensor:
    """(C, H, W) of (C, a, b) under ``theta``."""
    with torch.autocast(item.device.type, enabled=False):  # half precision would move the object
        grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
        return F.grid_sample(item[None], grid, mode, padding, align_corners=False)[0]
