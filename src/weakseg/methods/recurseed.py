r"""RecurSeed and EdgePredictMix (Jo et al., arXiv 2204.06754, 2022).

The idea. Operators that need no training can redraw a CAM: self-correlation (SCG) extends it to
places of like features, pixel-adaptive refinement (PAMR) ends it where the image does. RecurSeed
asks the network for these redrawn maps in every step: the CAM of tomorrow is the redrawn CAM of
today, so misses and false alarms shrink together. A decoder learns to segment from the redrawn
maps' certain pixels, and is the network that is used in the end. EdgePredictMix (a mix, see
:mod:`weakseg.mixing`) pastes the decoder's confident objects onto other images.

Maps :math:`A \in R^{K \times h \times w}`, n(.) their positive part divided by each map's maximum,
0 where a class is not tagged; :math:`F_l` the features of level l, I the image, P the decoder's
probabilities of K + 1 classes, :math:`\ell` the multi-label soft-margin loss, Y the tags:

.. math::
    M &= n(\mathrm{PAMR}(\mathrm{SCG}(n(A), \{F_l\}), I)) \\
    S_x &= \arg\max_k M_{kx} \text{ if } \max_k M_{kx} > \delta_f; \;
           0 \text{ if } \max_k M_{kx} < \delta_b; \; \text{unsure otherwise} \\
    L &= \ell(\mathrm{GAP}(A), Y) + w_{seg}\, \mathrm{CE}(P, S) + w_{rec}\, d(n(A), M) \\
    L_{mix} &= w_{seg}\, \mathrm{CE}(P(I^{mix}), S^{mix}) + w_{rec}\, d(n(A(I^{mix})), M^{mix})

M, S and the mixed targets have no gradient; d is the mean of squared or absolute differences over
the cells of the maps whose target reaches .5 somewhere (a class that a mix has covered is not asked
for), or of all K.

Paper and code. No training code was published. ``preset: talk`` is the equations of the authors'
talk, with the decoder, the operators' settings, the thresholds and the inference of their programs
and with no departure of ours: SCG by the talk's equations, M without the outer n, the plain
cross-entropy over all classes and certain pixels, the mean of absolute differences over all maps,
the dense decoder, cells evenly over the image, scales merged by nearest neighbours and by the mean
of probabilities. One scaling is needed: the talk's SCG gives the lead of two means, .05 to .2, which
no threshold of .55 is made for, so each of its maps is divided by its maximum before PAMR. *Our
defaults depart from it* where the plain form predicts background alone for long or learns slowly
(docs/methods/recurseed.md): SCG is that of the first published program (``form``); M is divided by
its maxima after PAMR, which lowers them (``renormalise``); the cross-entropy is the mean over
certain foreground and the mean over certain background (``balance``), among the classes of the image
(``among``); d is squared (``distance``) and over visible maps (``over``); certain background reaches
to .2 (``background``), where the refined map is best cut; the decoder is DeepLabV3+'s with separable
convolutions; cells lie where the backbone looks (``place``). Not stated anywhere, and ours in both:
n(A) is 0 for untagged classes, rec compares on the CAM's cells. Starts are shares of the schedule,
in the published proportion of 5 to 15 epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weakseg.config import Channels, Count, Frozen
from weakseg.methods.base import Batch, Card, Maps, Method, methods
from weakseg.mixing import Scene, build_mix, mixes, present, settle_mix
from weakseg.networks.backbone import MakeBackbone
from weakseg.networks.decoder import DeepLabDecoder
from weakseg.networks.heads import CAMHead
from weakseg.ops import gate, normalise_max, pamr, self_correlation
from weakseg.ops.cells import Cells, cell_means, moved, place
from weakseg.ops.confusion import IGNORE

__all__ = ["PRESETS", "RecurSeed"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "talk": {
        "form": "talk",
        "place": "stretch",
        "detail": 1,
        "background": 0.10,
        "renormalise": False,
        "balance": False,
        "among": "all",
        "distance": "l1",
        "over": "all",
        "decoder": "dense",
        "merging": "published",
    },
}
"""What the presets set; keys given beside them win."""

_ABSENT = -1e4  # logit of a class that has no part in a softmax
_VISIBLE = 0.5  # least score that a class must reach in a mixed image for its map to be asked for


@methods.register("recurseed")
class RecurSeed(Method):
    """A CAM that learns its own refinement, and a decoder that learns to segment from it."""

    heads: tuple[str, ...] = ("decoder", "cam")
    segments: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        n: {"mix": {"name": n}} for n in mixes
    }
    card = Card(
        name="recurseed",
        paper="Jo et al., arXiv 2204.06754, 2022",
        year=2022,
        idea="learns its own refined CAM at every step; a decoder segments from the certain pixels",
        recipes=(
            "voc12/rs_r50",
            "voc12/rs_epm_r50",
            "voc12/rs_epm_r101_multistage",
            "coco14/rs_epm_r50",
            "coco14/rs_epm_r101_multistage",
        ),
        published={
            "VOC train mIoU, RecurSeed (ResNet-50)": 70.7,
            "VOC train mIoU, with EdgePredictMix (ResNet-50)": 75.2,
            "VOC val mIoU, RecurSeed single-stage (ResNet-50)": 66.5,
            "VOC val mIoU, with EdgePredictMix single-stage (ResNet-50)": 69.5,
            "VOC val mIoU, with EdgePredictMix multi-stage (ResNet-101)": 74.4,
            "COCO val mIoU, with EdgePredictMix single-stage (ResNet-50)": 42.2,
            "COCO val mIoU, with EdgePredictMix multi-stage (ResNet-101)": 46.4,
        },
    )

    class Config(Frozen):
        """Targets, losses and their starts, decoder, and the mix.

        Keys given beside ``preset`` win.
        """

        preset: Literal["default", "talk"] = Field(
            "default",
            description="talk = the published equations, thresholds, decoder and inference, without "
            "any departure of ours; that of edgepredictmix too",
        )
        start: float = Field(
            0.1, ge=0, lt=1, description="share of the schedule with classification alone"
        )
        seg: float = Field(1.0, ge=0, description="weight of the decoder's loss (code: 1)")
        rec: float = Field(1.0, ge=0, description="weight of the CAM's target (code: 1)")
        scg: bool = Field(True, description="false = the target is not redrawn by SCG")
        form: Literal["code", "talk"] = Field(
            "code",
            description="of SCG: the authors' first program, or the equations of their talk, whose "
            "maps are divided by their maxima",
        )
        place: Literal["cells", "stretch"] = Field(
            "cells",
            description="where the cells of maps lie: where the network looks, or evenly over the "
            "image (published)",
        )
        levels: Count | None = Field(
            None, description="deepest levels that SCG correlates; null = all (code at inference)"
        )
        stride: Count = Field(
            8, description="pixels in a cell of SCG (code: 8); its cost grows with the fourth power"
        )
        pamr: bool = Field(True, description="false = the target is not refined by PAMR")
        detail: Count = Field(
            2, description="pixels in a cell of PAMR, of the labels and of the decoder's loss"
        )
        foreground: float = Field(
            0.55, gt=0, lt=1, description="least score of certain foreground (code: .55)"
        )
        background: float = Field(
            0.20, gt=0, lt=1, description="greatest score of certain background (code: .10)"
        )
        renormalise: bool = Field(
            True, description="divide the target by its maxima again, which PAMR lowers"
        )
        balance: bool = Field(
            True, description="certain foreground and background weigh the same in seg"
        )
        among: Literal["tagged", "all"] = Field(
            "tagged",
            description="classes that seg weighs against each other: the image's own and the "
            "background, or all (talk)",
        )
        distance: Literal["l1", "l2"] = Field(
            "l2", description="of rec: squared differences, or absolute ones (talk)"
        )
        over: Literal["visible", "all"] = Field(
            "visible",
            description="maps that rec is the mean of: those whose target reaches .5 somewhere, or "
            "all K (talk)",
        )
        squash: Literal["max", "sigmoid"] = Field(
            "max", description="what brings the CAM to [0, 1] in rec: its maximum, or a sigmoid"
        )
        teacher: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="decay of an averaged copy that makes targets; null = the network itself",
        )
        decoder: Literal["separable", "dense"] = Field(
            "separable",
            description="DeepLabV3+'s with separable convolutions (3.2 M weights on ResNet-50), or "
            "the published one (17.4 M)",
        )
        channels: Channels = Field(256, description="width of the decoder (code: 256)")
        dilations: tuple[Count, Count, Count] = Field(
            (6, 12, 18), description="of the decoder's pyramid (code: 6, 12, 18)"
        )
        present: float = Field(
            0.34,
            ge=0,
            le=1,
            description="probability from which a class may be predicted without tags (code: .34)",
        )
        merging: Literal["default", "published"] = Field(
            "default",
            description="of scales and flips: probability of the mean logit, maps enlarged "
            "bilinearly; or the mean of probabilities, nearest neighbours (code)",
        )
        mix: dict[str, Any] | None = Field(
            None, description="{name: edgepredictmix, ...}; recurseed+edgepredictmix says the same"
        )
        mix_start: float = Field(
            0.3, ge=0, lt=1, description="share of the schedule without mixed images"
        )
        mix_seg: float = Field(1.0, ge=0, description="weight of seg on mixed images (code: 1)")
        mix_rec: float = Field(1.0, ge=0, description="weight of rec on mixed images (talk: 1)")
        mix_cls: float = Field(
            0.0, ge=0, description="weight of classification on mixed images (first version: 1)"
        )

        @model_validator(mode="before")
        @classmethod
        def _apply_preset(cls, values: Any) -> Any:
            if not isinstance(values, dict) or values.get("preset") != "talk":
                return values
            mix = values.get("mix")
            mix = {"name": mix} if isinstance(mix, str) else mix
            if isinstance(mix, Mapping) and mix.get("name") == "edgepredictmix":
                values = {**values, "mix": {"preset": "talk", **mix}}
            return {**PRESETS["talk"], **values}

        @field_validator("mix", mode="before")
        @classmethod
        def _whole_mix(cls, value: Any) -> Any:
            """Its settings are checked with ours, and kept whole in model folders."""
            return settle_mix(value) if isinstance(value, str | Mapping) else value

        @model_validator(mode="after")
        def _consistent(self) -> Any:
            if self.background >= self.foreground:
                raise ValueError("background must be below foreground")
            if not self.seg:
                raise ValueError("the decoder learns from seg alone: give it a weight")
            if self.mix is not None and not (self.mix_seg or self.mix_rec or self.mix_cls):
                raise ValueError("a mix needs mix_seg, mix_rec or mix_cls")
            return self

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        c = self.config
        self.backbone = make_backbone()
        self.head = CAMHead(self.backbone.levels[-1].channels, num_classes)
        self.decoder = DeepLabDecoder(
            self.backbone,
            num_classes + 1,
            c.channels,
            c.dilations,
            "backbone",
            dense=c.decoder == "dense",
        )
        self.present = c.present
        self.published_merging = c.merging == "published"
        self.mix = None if c.mix is None else build_mix(c.mix, num_classes)
        weights = {"cls": 1.0, "seg": c.seg, "rec": c.rec}
        if self.mix is not None:
            weights |= {"mix_seg": c.mix_seg, "mix_rec": c.mix_rec, "mix_cls": c.mix_cls}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.terms = tuple(self.weights)
        self._teacher: list[AveragedModel] = []  # in a list, so that model folders leave it out

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Classification; later the decoder's and the CAM's targets; later still mixed images."""
        batch = replace(batch, images=self.decoder.padded(batch.images))
        c, images, tags = self.config, batch.images, batch.tags
        levels = self.backbone(images)
        cams = self.head(levels[-1])
        terms = {"cls": F.multilabel_soft_margin_loss(cams.mean((2, 3)).float(), tags)}
        if progress >= c.start:
            logits = self.decoder.decode(images, levels)
            scene = self._scene(batch, cams, levels, logits)
            terms |= self._of_targets(cams, logits, scene)
            if self.mix is not None and progress >= max(c.start, c.mix_start):
                mixed = self.mix(scene)
                levels = self.backbone(mixed.images)
                cams, logits = self.head(levels[-1]), self.decoder.decode(mixed.images, levels)
                found = self._of_targets(cams, logits, mixed)
                means = cams.mean((2, 3)).float()
                found["cls"] = F.multilabel_soft_margin_loss(means, mixed.tags)
                terms |= {f"mix_{name}": term for name, term in found.items()}
        return {n: weight * terms[n] for n, weight in self.weights.items() if n in terms}

    def after_step(self, progress: float) -> None:
        """Moves the teacher, from the first step with targets on."""
        if self.config.teacher is not None and progress >= self.config.start:
            self._averaged().update_parameters(self)

    def training_state(self) -> dict[str, Any]:
        """The teacher's weights and what the mix has gathered."""
        return {
            "teacher": [teacher.state_dict() for teacher in self._teacher],
            "mix": self.mix.state() if self.mix is not None else {},
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``training_state``."""
        for weights in state["teacher"]:
            self._averaged().load_state_dict(weights)
        if self.mix is not None:
            self.mix.load_state(state["mix"])

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """``decoder``: probabilities at the images' size; ``cam``: plain maps as logits."""
        if (head or self.heads[0]) == "cam":
            cams = self.head(self.backbone(images)[-1])
            cells = self._cells((images.shape[-2], images.shape[-1]))[-1]
            return Maps(cams, kind="logit", logits=cams.mean((2, 3)), cells=cells)
        padded = self.decoder.padded(images)
        levels = self.backbone(padded)
        logits = self.decoder.decode(padded, levels)
        if self.published_merging:
            size = (padded.shape[-2], padded.shape[-1])
            found = F.interpolate(logits.float().softmax(1), size, mode="nearest")
            found = found[..., : images.shape[-2], : images.shape[-1]]
        else:
            found = self.decoder.enlarged(logits, padded, images).softmax(1)
        classified = self.head(levels[-1]).mean((2, 3))
        return Maps(found[:, 1:], kind="probability", background=found[:, :1], logits=classified)

    @torch.no_grad()
    def _scene(self, batch: Batch, cams: Tensor, levels: list[Tensor], logits: Tensor) -> Scene:
        """The batch with its targets: M as the map ``rs``, S as the labels."""
        c = self.config
        if c.teacher is not None:
            teacher = self._averaged().module
            assert isinstance(teacher, RecurSeed)
            levels = teacher.backbone(batch.images)
            cams = teacher.head(levels[-1])
            logits = teacher.decoder.decode(batch.images, levels)
        height, width = batch.images.shape[-2:]
        pictures = self.backbone.pictures(
            batch.images, (-(-height // c.detail), -(-width // c.detail))
        )
        target = self._target(
            cams.detach(), batch.tags, [x.detach() for x in levels], pictures, (height, width)
        )
        logits = self._logits(logits.detach(), batch.images, target)
        return Scene(
            batch.images,
            batch.tags,
            self._labels(target),
            {"rs": target},
            self._of_image(logits, batch.tags > 0).softmax(1),
            pictures,
        )

    def _cells(self, image: tuple[int, int]) -> Sequence[Cells | None]:
        """Where the cells of each level lie in an image of (H, W); ``None`` = evenly over it."""
        if self.config.place == "stretch":
            return [None] * len(self.backbone.levels)
        return self.backbone.cells(image)

    def _logits(self, logits: Tensor, images: Tensor, like: Tensor) -> Tensor:
        """The decoder's logits at the size of another map of the images."""
        image, size = (images.shape[-2], images.shape[-1]), (like.shape[-2], like.shape[-1])
        return place(logits, self._cells(image)[self.decoder.fine], image, size)

    def _target(
        self,
        cams: Tensor,
        tags: Tensor,
        levels: list[Tensor],
        pictures: Tensor,
        image: tuple[int, int],
    ) -> Tensor:
        """M, (B, K, h, w) in [0, 1] at the size of ``pictures``, of images of (H, W) pixels."""
        c, size = self.config, (pictures.shape[-2], pictures.shape[-1])
        # The operators' time grows with the number of maps: only tagged ones are handed over.
        count = max(1, int(tags.sum(1).max()))
        order = tags.argsort(dim=1, descending=True, stable=True)[:, :count, None, None]
        maps = gate(normalise_max(cams), tags)
        maps = maps.gather(1, order.expand(-1, -1, *maps.shape[2:]))
        cells = self._cells(image)[-1]
        if c.scg:
            maps, cells = self._correlated(maps, levels, image)
        maps = place(maps, cells, image, size)
        if c.pamr:
            maps = pamr(pictures, maps)
        if c.renormalise:
            maps = normalise_max(maps)
        whole = maps.new_zeros(len(tags), self.num_classes, *size)
        return gate(whole.scatter(1, order.expand_as(maps), maps), tags)

    def _correlated(
        self, maps: Tensor, levels: list[Tensor], image: tuple[int, int]
    ) -> tuple[Tensor, Cells | None]:
        """SCG of maps on the backbone's last cells, and where the cells of its result lie."""
        c = self.config
        grid = (-(-image[0] // c.stride), -(-image[1] // c.stride))
        first = 0 if c.levels is None else max(0, len(levels) - c.levels)
        if c.place == "stretch":
            own, places = None, None
            maps = place(maps, None, image, grid)
        else:
            cells, own = self.backbone.cells(image), Cells.spanning(image, grid)
            for level, features, there in zip(self.backbone.levels, levels, cells, strict=True):
                if level.stride == c.stride:  # its cells are the grid, so nothing moves them
                    grid, own = (features.shape[-2], features.shape[-1]), there
            maps, places = moved(maps, cells[-1], own, grid), [own, *cells[first:]]
        maps = self_correlation(maps, levels[first:], form=c.form, places=places)
        return normalise_max(maps) if c.form == "talk" else maps, own

    def _labels(self, target: Tensor) -> Tensor:
        """S, (B, h, w) int64."""
        best, winner = target.max(1)
        labels = torch.where(best > self.config.foreground, winner + 1, IGNORE)
        return labels.masked_fill(best < self.config.background, 0)

    def _of_targets(self, cams: Tensor, logits: Tensor, scene: Scene) -> dict[str, Tensor]:
        c, target = self.config, scene.maps["rs"]
        image = (scene.images.shape[-2], scene.images.shape[-1])
        wanted = cell_means(target, self._cells(image)[-1], image, (cams.shape[-2], cams.shape[-1]))
        every = c.over == "all"
        asked = scene.tags > 0 if every else target.amax((2, 3)) >= _VISIBLE
        count = asked.numel() if every else asked.sum().clamp(min=1)
        difference = (gate(self._squashed(cams), asked) - gate(wanted, asked)).abs()
        if c.distance == "l2":
            difference = difference**2
        return {
            "seg": self._cross_entropy(
                self._logits(logits, scene.images, target), scene.labels, scene.tags
            ),
            "rec": difference.mean((2, 3)).sum() / count,
        }

    def _squashed(self, cams: Tensor) -> Tensor:
        return normalise_max(cams) if self.config.squash == "max" else cams.float().sigmoid()

    def _cross_entropy(self, logits: Tensor, labels: Tensor, tags: Tensor) -> Tensor:
        """Over certain pixels; zero where there are none."""
        logits = self._of_image(logits, (tags > 0) | present(labels, self.num_classes)[:, 1:])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        sets = [labels != IGNORE]
        if self.config.balance:
            sets = [(labels > 0) & (labels != IGNORE), labels == 0]
        means = [(loss * pixels).sum() / pixels.sum().clamp(min=1) for pixels in sets]
        return torch.stack(means).mean()

    def _of_image(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Logits in which only the background and those (B, K) classes have a part."""
        if self.config.among == "all":
            return logits
        known = F.pad(classes, (1, 0), value=True)
        return logits.masked_fill(~known[..., None, None], _ABSENT)

    def _averaged(self) -> AveragedModel:
        """The teacher; at first a copy of the network."""
        if not self._teacher:
            teacher = AveragedModel(
                copy.deepcopy(self), multi_avg_fn=get_ema_multi_avg_fn(self.config.teacher)
            )
            self._teacher.append(teacher.requires_grad_(False).eval())
        # A resumed one was made before the network went to its device.
        return self._teacher[0].to(self.head.classifier.weight.device)
