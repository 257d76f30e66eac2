"""The contract of a mix: images of a batch are cut and pasted together with all that is known of them.

A mix knows tensors; it knows no networks and no losses. To add one, write one file in this package
and register its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.config import Frozen, validate
from weakseg.errors import UserError
from weakseg.ops.confusion import IGNORE
from weakseg.registry import Registry

__all__ = [
    "Mix",
    "Scene",
    "beta_draws",
    "build_mix",
    "enlarged",
    "mixes",
    "partners",
    "paste",
    "present",
    "settle_mix",
    "unmixed",
]


@dataclass(frozen=True)
class Scene:
    """A batch of images and what is known of them; nothing in it has a gradient.

    Attributes:
        images: (B, 3, S, S) float, normalised.
        tags: (B, K) float in [0, 1]: 1 or 0 before a mix, weighted by what is left after it.
        labels: (B, h, w) int64 pseudo labels: 0 background, 1..K classes, 255 unsure.
        maps: More targets that move with the pixels, each (B, C, h, w) float, by name.
        probabilities: (B, K + 1, h, w) float, the network's own, background first: what mixes
            choose by; not mixed, so ``None`` afterwards.
        pictures: (B, 3, h, w) float RGB in [0, 1], for operators that need colours; ``None``
            afterwards.
    """

    images: Tensor
    tags: Tensor
    labels: Tensor
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    probabilities: Tensor | None = None
    pictures: Tensor | None = None


class Mix:
    """A mix.

    Args:
        config: Its settings.
        num_classes: K, foreground classes.

    Attributes:
        paper: Short reference.
        idea: One line.
    """

    paper: ClassVar[str]
    idea: ClassVar[str]

    class Config(Frozen):
        """Settings of the mix."""

    def __init__(self, config: Any, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes

    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """A new scene of B mixed images; ``scene`` is left as it was.

        Pixels, labels and maps of a position come from the same image. A batch of one comes back
        as it was, unless the mix has pixels of its own to paste.

        Args:
            scene: With all of its fields.
            generator: Source of the random choices, on the CPU; ``None`` = torch's own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__()")

    def state(self) -> dict[str, Tensor]:
        """What the mix has gathered, for checkpoints: tensors by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what ``state`` returned."""


mixes: Registry[type[Mix]] = Registry("mix", "weakseg.mixing")
"""All mixes by name."""


def build_mix(section: Mapping[str, Any] | str, num_classes: int) -> Mix:
    """Builds the mix that a setting names: ``cutmix``, or ``{name: cutmix, beta: 1}``.

    Raises:
        UserError: No or an unknown name, or every wrong setting of the mix at once.
    """
    mix, config = _resolve(section)
    return mix(config, num_classes)


def settle_mix(section: Mapping[str, Any] | str) -> dict[str, Any]:
    """The name and every setting of a mix, so that another default later changes no trained model.

    Raises:
        UserError: As ``build_mix``.
    """
    _, config = _resolve(section)
    name = section if isinstance(section, str) else section["name"]
    return {"name": name, **config.model_dump(mode="json")}


def _resolve(section: Mapping[str, Any] | str) -> tuple[type[Mix], Frozen]:
    section = {"name": section} if isinstance(section, str) else section
    if "name" not in section:
        raise UserError("a mix needs a name", where="mix", mend=f"add name: {' | '.join(mixes)}")
    mix = mixes[section["name"]]
    settings = {key: value for key, value in section.items() if key != "name"}
    return mix, validate(mix.Config, settings, where=f"mix {section['name']}", prefix="mix")


def partners(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) index of another image of the batch for each, drawn uniformly; itself where B is 1."""
    if count < 2:
        return torch.zeros(count, dtype=torch.long)
    step = 1 + torch.randint(count - 1, (count,), generator=generator)
    return (torch.arange(count) + step) % count


def beta_draws(count: int, beta: float, generator: torch.Generator | None = None) -> Tensor:
    """(count,) float64 draws of Beta(beta, beta): of two gamma draws, the share of the first."""
    # torch.distributions knows no generator.
    first, second = torch._standard_gamma(
        torch.full((2, count), beta, dtype=torch.float64), generator=generator
    )
    return first / (first + second)


def present(labels: Tensor, num_classes: int) -> Tensor:
    """(B, K + 1) bool of (B, h, w) labels: the background and the classes that have a pixel."""
    found = labels.new_zeros((len(labels), IGNORE + 1), dtype=torch.bool)
    return found.scatter_(1, labels.flatten(1), True)[:, : num_classes + 1]


def unmixed(scene: Scene) -> Scene:
    """The scene as it was, less what no mixed scene has."""
    return replace(scene, probabilities=None, pictures=None)


def paste(scene: Scene, cut: Tensor, onto: Tensor, tags: Tensor) -> Scene:
    """Pastes the cut pixels of each image i onto image ``onto[i]``, hard.

    Args:
        scene: The batch.
        cut: (B, h, w) bool, at the labels' size.
        onto: (B,) indices of images of the batch.
        tags: (B, K) of the mixed images.
    """
    onto = onto.to(scene.images.device)
    wide = enlarged(cut, scene.images.shape[-2:])[:, None]
    return replace(
        unmixed(scene),
        images=torch.where(wide, scene.images, scene.images[onto]),
        tags=tags,
        labels=torch.where(cut, scene.labels, scene.labels[onto]),
        maps={k: torch.where(cut[:, None], m, m[onto]) for k, m in scene.maps.items()},
    )


def enlarged(cut: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) bool of (B, h, w) bool, by the nearest."""
    if tuple(cut.shape[-2:]) == tuple(size):
        return cut
    return F.interpolate(cut[:, None].float(), tuple(size), mode="nearest-exact")[:, 0] > 0
