r"""A mix in the style of Saliency Grafting (Park et al., AAAI 2022).

The idea. A box may cut out nothing but sky. Draw what is pasted among the salient cells, at random
so that not always the same most salient part goes, and weight the tags by the saliency, not the
area, that each source keeps.

What is done. Saliency :math:`s_i` of a pixel is the largest probability of a tagged class; it is
averaged over a grid of N cells. With temperature T, for image i and another image j:

.. math::
    p_i &= \mathrm{softmax}(s_i / T) \in R^N, \qquad
    G_i = [p_i > 1 / N] \cdot b, \quad b \sim \mathrm{Bernoulli}(q), \quad
    q \sim \mathrm{Beta}(\alpha, \alpha) \\
    I &= G_i I_i + (1 - G_i) I_j, \qquad
    Y = \max\Big(Y_i \sum_n G_{in} p_{in},\ Y_j \sum_n (1 - G_{in}) p_{jn}\Big)

with G enlarged to the pixels by the nearest. :math:`1 / N` is the mean of p. An image without tags,
or with the same saliency everywhere, has no salient cell and comes back as its partner. A batch of
one stays as it was.

Paper and code. *The code was never public; details are our reading, hence the name -style.* Of the
paper are the softmax, the threshold at the mean, the Bernoulli draw and labels by kept saliency.
Ours are the saliency (the paper has the activations of a teacher), the grid's size, T, and that a
class of both images takes the larger weight. Saliency ignores untagged classes: what the network
sees of them is known to be wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from weakseg.config import Count, Frozen
from weakseg.mixing.base import (
    Mix,
    Scene,
    beta_draws,
    enlarged,
    mixes,
    partners,
    paste,
    unmixed,
)
from weakseg.ops import gate

__all__ = ["SaliencyGrafting"]

_EPS = 1e-6  # equal cells must not pass their mean by rounding


@mixes.register("saliencygrafting-style")
class SaliencyGrafting(Mix):
    """Grafts random salient cells onto another image."""

    paper = "Park et al., AAAI 2022"
    idea = "random salient cells are grafted; tags are weighted by the saliency each source keeps"

    class Config(Frozen):
        """The grid, and how cells are drawn. All of it is our choice."""

        cells: Count = Field(7, description="of the grid, a side")
        temperature: float = Field(
            0.2, gt=0, description="of the softmax over cells: the lower, the fewer are salient"
        )
        keep: float | None = Field(
            None,
            ge=0,
            le=1,
            description="probability that a salient cell is grafted; null = drawn for each image",
        )
        beta: float = Field(
            2.0, ge=0.1, description="of the Beta distribution that keep is drawn from"
        )

    config: Config

    @torch.no_grad()
    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """Salient cells of each image on another image of the batch."""
        saliency = self._saliency(scene)
        count = len(saliency)
        if count < 2:
            return unmixed(scene)
        onto = partners(count, generator).to(scene.tags.device)
        graft = self._salient(saliency) & self._draws(count, generator).to(saliency.device)
        mine = _share(saliency, graft)
        theirs = _share(saliency[onto], ~graft)
        tags = torch.maximum(scene.tags * mine, scene.tags[onto] * theirs).clamp(0, 1)
        return paste(scene, enlarged(graft, scene.labels.shape[-2:]), onto, tags)

    def _saliency(self, scene: Scene) -> Tensor:
        """(B, n, n) float32 that sums to 1 over each image's cells."""
        if scene.probabilities is None:
            raise ValueError(
                "saliencygrafting-style needs probabilities; pass Scene(probabilities=...)"
            )
        best = gate(scene.probabilities[:, 1:].float(), scene.tags > 0).amax(1, keepdim=True)
        cells = F.adaptive_avg_pool2d(best, self.config.cells)
        shares = (cells.flatten(1) / self.config.temperature).softmax(1)
        return shares.view(len(cells), self.config.cells, self.config.cells)

    @staticmethod
    def _salient(saliency: Tensor) -> Tensor:
        return saliency > saliency.mean((1, 2), keepdim=True) + _EPS

    def _draws(self, count: int, generator: torch.Generator | None) -> Tensor:
        """(B, n, n) bool: which cells are grafted if they are salient."""
        if self.config.keep is None:
            keep = beta_draws(count, self.config.beta, generator)
        else:
            keep = torch.full((count,), self.config.keep, dtype=torch.float64)
        side = self.config.cells
        draws = torch.rand(count, side, side, generator=generator, dtype=torch.float64)
        return draws < keep[:, None, None]


def _share(saliency: Tensor, where: Tensor) -> Tensor:
    """(B, 1) share of each image's saliency in those cells; exactly 1 in all of them."""
    return ((saliency * where).sum((1, 2)) / saliency.sum((1, 2)))[:, None]
