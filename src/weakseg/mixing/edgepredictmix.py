r"""EdgePredictMix (Jo et al., RecurSeed and EdgePredictMix, 2022).

The idea. The decoder's confident objects are cut out along edges of its own probabilities and
pasted onto another image. Where the decoder is unsure, superpixels decide: regions between edges
of the class probabilities, in which the most frequent label wins.

What is done, with pictures :math:`I \in [0, 1]^{3 \times h \times w}`, probabilities
:math:`p \in [0, 1]^{(K+1) \times h \times w}` of which those of untagged classes are 0, CF the
certainty filter (the class where its probability exceeds :math:`\delta_f`, 0 where no class reaches
:math:`\delta_b`, 255 otherwise) and EP the vote in superpixels:

.. math::
    M_{dec} &= \mathrm{PAMR}(p; I), \qquad M_{ep} = \mathrm{EP}(\mathrm{CF}(M_{dec})) \\
    F_i &= [M_{ep}^i \in \{1..K\}], \qquad
    I^{mix} = F_i I_i + (1 - F_i) I_j, \qquad
    M_{seg}^{mix} = F_i M_{ep}^i + (1 - F_i) S_j

with j uniform among the other images, and :math:`S_j` the labels that the batch came with; other
maps follow the same F. All confident foreground is pasted, hard. An image without any comes back
as its partner. A batch of one has no partner and stays as it was, its labels too.

Paper and code. Only helpers are public, no training code. ``preset: talk`` is the talk's equations
with those helpers; *our defaults depart from them* in three settings. ``below: predicted``: the
image below has :math:`M_{ep}^j` as its labels too; in short trainings the decoder then confirms its
own misses (held-out images of shapes-v1, on which this was chosen, seed 0: 53.6 mIoU against 58.7,
and 58.0 without a mix; docs/methods/mixes.md). ``vote: all``: unsure pixels vote too, so that a
mostly unsure superpixel stays unsure; by default certain pixels alone vote. ``edges: foreground``:
the edges are those of the largest foreground probability, by default those of each class's. The
helpers filter first and the vote fills unsure pixels only, which the paper's figure shows too:
``filter-first``. The slides' formula is ``vote-first``: each pixel takes its superpixel's dominant
class of largest probability, and is sure where its own probability of that class exceeds
:math:`\delta_f` (background alike, so :math:`\delta_b` has no part in it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from weakseg.config import Count, Frozen
from weakseg.mixing.base import Mix, Scene, mixes, partners, paste, present, unmixed
from weakseg.ops import majority_vote, pamr, superpixels
from weakseg.ops.confusion import IGNORE

__all__ = ["PRESETS", "EdgePredictMix"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "talk": {"vote": "all", "edges": "foreground", "below": "predicted"},
}
"""What the presets set; keys given beside them win."""


@mixes.register("edgepredictmix")
class EdgePredictMix(Mix):
    """Pastes the decoder's confident objects, cut along its own edges."""

    paper = "Jo et al., 2022"
    idea = "confident objects, cut along edges of the class probabilities, are pasted onto others"

    class Config(Frozen):
        """Thresholds of certainty, superpixels and PAMR; keys given beside ``preset`` win."""

        preset: Literal["default", "talk"] = Field(
            "default", description="talk = the talk's equations and the published helpers"
        )
        foreground: float = Field(
            0.55, ge=0, le=1, description="a class is sure above this probability (code: .55)"
        )
        background: float = Field(
            0.10, ge=0, le=1, description="background is sure below this one (code: .10)"
        )
        order: Literal["filter-first", "vote-first"] = Field(
            "filter-first",
            description="the vote fills what the filter left unsure (code), or is filtered (slides)",
        )
        below: Literal["given", "predicted"] = Field(
            "given",
            description="labels of the image below: the batch's own, or M_ep as well (talk)",
        )
        vote: Literal["all", "certain"] = Field(
            "certain",
            description="who votes in a superpixel: all pixels, unsure ones for unsure (code), or "
            "the certain ones",
        )
        edges: Literal["classes", "foreground"] = Field(
            "classes",
            description="edges of each class's probability, or of the largest foreground one (code)",
        )
        low: float = Field(10.0, ge=0, description="an edge is followed down to this (code: 10)")
        high: float = Field(100.0, ge=0, description="an edge starts at this (code: 100)")
        iterations: int = Field(10, ge=0, le=1_024, description="of PAMR (code: 10); 0 = no PAMR")
        dilations: tuple[Count, ...] = Field(
            (1, 2, 4, 8, 12, 24), min_length=1, description="of PAMR, in pixels (code)"
        )

        @model_validator(mode="before")
        @classmethod
        def _apply_preset(cls, values: Any) -> Any:
            if isinstance(values, dict):
                return {**PRESETS.get(str(values.get("preset")), {}), **values}
            return values

        @model_validator(mode="after")
        def _in_order(self) -> Any:
            if self.background > self.foreground:
                raise ValueError("background is above foreground: pixels between would be both")
            return self

    config: Config

    @torch.no_grad()
    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """The confident foreground of each image on another image of the batch."""
        labels = self._labels(scene)
        if len(labels) < 2:
            return unmixed(scene)
        onto = partners(len(labels), generator).to(scene.tags.device)
        cut = (labels != 0) & (labels != IGNORE)
        pasted = present(labels, self.num_classes)[:, 1:]
        tags = torch.maximum(scene.tags * pasted, scene.tags[onto])
        mixed = paste(replace(scene, labels=labels), cut, onto, tags)
        if self.config.below == "predicted":
            return mixed
        return replace(mixed, labels=torch.where(cut, labels, scene.labels[onto]))

    def _labels(self, scene: Scene) -> Tensor:
        """(B, h, w): M_ep."""
        if scene.probabilities is None or scene.pictures is None:
            raise ValueError(
                "edgepredictmix needs probabilities and pictures; "
                "pass both: Scene(probabilities=..., pictures=...)"
            )
        config = self.config
        maps, ids = _packed(scene.probabilities, scene.tags)
        maps = pamr(scene.pictures, maps, config.dilations, config.iterations)
        regions = superpixels(maps, edges=config.edges, low=config.low, high=config.high)
        if config.order == "filter-first":
            best, channel = maps[:, 1:].max(1)
            channel = torch.where(best < config.background, 0, channel + 1)
            unsure = (best <= config.foreground) & (best >= config.background)
            voted = majority_vote(
                channel.masked_fill(unsure, IGNORE), regions, unsure_votes=config.vote == "all"
            )
        else:
            voted = majority_vote(maps.argmax(1), regions, overwrite=True)
            own = maps.gather(1, voted.where(voted != IGNORE, 0)[:, None])[:, 0]
            voted = voted.masked_fill(own <= config.foreground, IGNORE)
        # From channels back to class ids; unsure pixels look up a column of their own.
        table = F.pad(ids, (0, IGNORE + 1 - ids.shape[1]), value=IGNORE)
        return table.gather(1, voted.flatten(1)).view_as(voted)


def _packed(probabilities: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of each image's own classes, and whose they are.

    PAMR costs in proportion to the channels, and an image has few of the K classes.

    Returns:
        (B, C, h, w) float32, background first, 0 beyond an image's last class; and (B, C) ids of
        the channels in ``probabilities``.
    """
    tagged = F.pad(tags > 0, (1, 0), value=True)
    channels = max(2, int(tagged.sum(1).max())) if len(tags) else 2
    ids = (~tagged).int().argsort(dim=1, stable=True)[:, :channels]
    rows = torch.arange(len(tags), device=ids.device)[:, None]
    return probabilities.float()[rows, ids] * tagged.gather(1, ids)[..., None, None], ids
