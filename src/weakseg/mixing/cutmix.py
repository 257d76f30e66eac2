r"""CutMix (Yun et al., Regularization Strategy with Localizable Features, ICCV 2019).

The idea. A box of another image hides a part of this one. The network must recognise both from
what is left of each, so it cannot rely on the most telling part alone.

What is done, with side S of the labels' grid, for each image i and another image j:

.. math::
    \lambda &\sim \mathrm{Beta}(\beta, \beta), \qquad
    \text{box} = \sqrt{1 - \lambda}\, S \text{ a side, its centre uniform, clipped to the image} \\
    \lambda' &= 1 - |\text{box}| / S^2, \qquad
    Y = \lambda' Y_i + (1 - \lambda') Y_j

Image j shows inside the box and image i around it. :math:`\lambda'` is counted after clipping.

Paper and code. The published code draws one box for a batch and halves its side in whole pixels;
ours draws one for each image and rounds the box's borders, since the labels' grid may be coarse.
Labels of pixels are pasted by the same box. The paper has single labels; for tags, its weights and
the union are offered. How RecurSeed's authors mixed tags is not stated.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from weakseg.config import Frozen
from weakseg.mixing.base import Mix, Scene, beta_draws, mixes, partners, paste

__all__ = ["CutMix"]


@mixes.register("cutmix")
class CutMix(Mix):
    """Shows a box of another image."""

    paper = "Yun et al., ICCV 2019"
    idea = "a box of another image hides a part of this one"

    class Config(Frozen):
        """The box, and what becomes of the tags."""

        beta: float = Field(
            1.0, ge=0.1, description="of the Beta distribution of areas (paper: 1 = uniform)"
        )
        probability: float = Field(
            1.0, ge=0, le=1, description="share of images that are mixed (code: 1 on ImageNet)"
        )
        tags: Literal["weighted", "union"] = Field(
            "weighted", description="tags are weighted by area (paper), or kept whole"
        )

    config: Config

    @torch.no_grad()
    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """Each image with a box of another one in it."""
        count, height, width = scene.labels.shape
        onto = partners(count, generator).to(scene.tags.device)
        kept = ~self._boxes(count, height, width, generator)
        share = kept.float().mean((1, 2))[:, None].to(scene.tags.device)
        kept = kept.to(scene.labels.device)
        mine, theirs = scene.tags, scene.tags[onto]
        if self.config.tags == "weighted":
            tags = torch.lerp(theirs, mine, share.to(mine))  # exact where both are the same
        else:
            tags = torch.maximum(mine * (share > 0), theirs * (share < 1))
        return paste(scene, kept, onto, tags)

    def _boxes(
        self, count: int, height: int, width: int, generator: torch.Generator | None
    ) -> Tensor:
        """(B, h, w) bool: one box for each image, empty where it is not to be mixed."""
        area = 1 - beta_draws(count, self.config.beta, generator)
        mixed = torch.rand(count, generator=generator) < self.config.probability
        side = torch.where(mixed, area.sqrt(), 0)
        centre = torch.rand(2, count, generator=generator, dtype=torch.float64)
        first, last = centre - side / 2, centre + side / 2
        inside = []
        for axis, length in enumerate((height, width)):
            cells = torch.arange(length)
            low, high = ((x[axis, :, None] * length).round() for x in (first, last))
            inside.append((cells >= low) & (cells < high))
        return inside[0][:, :, None] & inside[1][:, None, :]
