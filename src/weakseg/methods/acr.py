r"""ACR (Kweon et al., Weakly Supervised Semantic Segmentation via Adversarial Learning of Classifier
and Reconstructor, CVPR 2023).

The idea. Segments are right when none can be inferred from the others. A reconstructor learns to
paint what a segment hides from what is left; wherever the segment missed a piece of the object, or
took in a piece of the ground, that remnant tells it how. The classifier learns segments that leave
it clueless. Both learn in turn, on the same batch.

:math:`I \in R^{3 \times H \times W}` is the image, t one of its classes, drawn at random,
:math:`c \in [0, 1]^{H \times W}` the map of t after min-max, enlarged to pixels, f the features of
the reconstructor's own encoder, dec its decoder, sg stops gradients, and M a random grid of 0 and
1 (stochastic random feeding, SRF): where it is 0, features stay although c would hide them, as if
the classifier had missed a piece. All means are over all pixels.

Reconstructor (RU), the classifier fixed, :math:`L_{cls}` that of the encoder's own CAM head:

.. math::
    L_{RU} = L_{cls} &+ .2\,\mathrm{mean} |dec(\mathrm{sg} f) - I|
            + .3\,\mathrm{mean} |(dec(f (1 - c M)) - I)\, c M| \\
            &+ .5\,\mathrm{mean} |(dec(f (1 - (1 - c) M)) - I)\, (1 - c) M|

Classifier (CU), the reconstructor fixed and fed without M, :math:`L_{cls}` the classifier's own:

.. math::
    L_{CU} = L_{cls} &- .8\,\mathrm{mean} |(dec(\mathrm{sg} f\, c) - I)\, [c = 0]| \\
            &- .3\,\mathrm{mean} |(dec(\mathrm{sg} f\, (1 - c)) - I)\, \mathrm{sg}\, c\,
               [t = \mathrm{argmax}]|

Paper and code. The weights above are the published code's (``preset: paper``), where gradients of
the last two terms are about a thirtieth of those of L_cls in trainings as short as ours: the
defaults of ``t``, ``nt``, ``start`` and ``dropout`` are stronger (docs/methods/acr.md). The share
of ones in M grows from .2 by one point in each of 40 epochs. The code's trainer goes on for 60
epochs at the last learning rate, and picks the epoch by masks: we do neither. By default a map whose
range is below 1 passes on its gradient in that proportion (``guard``), which the code does not do:
else weak maps can go out altogether. The arg-max is that of all maps enlarged, as in the code, but by
default maps and features are enlarged by where their cells lie (``place``; the code spreads them
evenly over the image). Its seeds are clipped at zero when they are enlarged, and the range of their
sum is brought to [0, 1] (``merge: range``); ours are clipped on their cells and divided by their
maximum, as those of the other classifiers. The reconstructor is built for any size of image
(:mod:`weakseg.networks.reconstructor`). ``acr+vit`` takes the multi-class-token transformer for
both networks; the paper names the combination and published no code: its maps c are the fused ones,
which are exactly 0 outside, and everything else is as above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from weakseg.config import Channels, Count, Frozen
from weakseg.errors import UserError
from weakseg.methods.base import (
    INNER,
    Batch,
    Card,
    Classifier,
    Maps,
    Method,
    Phase,
    methods,
    resolve,
)
from weakseg.networks.backbone import Backbone, MakeBackbone
from weakseg.networks.heads import CAMHead
from weakseg.networks.reconstructor import Reconstructor
from weakseg.ops import Cells, place

__all__ = ["ACR", "PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "narrow": {"width": 16, "detail": 2},
    "paper": {
        "t": 0.8,
        "nt": 0.3,
        "start": 0.0,
        "guard": 0.0,
        "place": "stretch",
        "merge": "range",
        "dropout": 0.5,
        "depth": 8,
    },
}
"""What the presets set; keys given beside them win."""

_EPS = 1e-5
_LEVELS = 3  # that the reconstructor reads


@methods.register("acr")
class ACR(Method):
    """A classifier whose segments must not give away what they leave out."""

    parts: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "vit": {"classifier": {"name": "mctformer"}}
    }
    card = Card(
        name="acr",
        paper="Kweon et al., CVPR 2023",
        year=2023,
        idea="a reconstructor must fail to guess the rest of an image from a class's segment",
        recipes=("voc12/acr_wr38", "voc12/acr_vit", "coco14/acr_wr38"),
        published={
            "VOC train seed mIoU (ResNet-38, oracle threshold)": 60.3,
            "VOC train mIoU of masks (ResNet-38)": 72.3,
            "VOC val mIoU of the segmenter (ResNet-38)": 71.9,
            "COCO val mIoU of the segmenter (ResNet-38)": 45.3,
            "VOC train seed mIoU (acr+vit, DeiT-S)": 65.5,
            "VOC val mIoU of the segmenter (acr+vit, DeiT-S)": 72.4,
        },
    )

    class Config(Frozen):
        """Classifier, strategy, weights of the losses (0 = off), feeding and reconstructor.

        Keys given beside ``preset`` win.
        """

        preset: Literal["default", "narrow", "paper"] = Field(
            "default",
            description="narrow = a small reconstructor for small machines (width 16, detail 2); "
            "paper = the published code",
        )
        classifier: dict[str, Any] = Field(
            default_factory=lambda: {"name": "cam"},
            validate_default=True,
            description="whose maps are trained: {name: cam, ...}, or mctformer as in acr+vit",
        )
        strategy: Literal["adversarial", "pretrained", "baseline"] = Field(
            "adversarial",
            description="pretrained = the reconstructor is fixed after its share of the schedule; "
            "baseline = none at all",
        )
        pretrain: float = Field(
            0.5, gt=0, lt=1, description="share of the schedule that teaches a fixed reconstructor"
        )
        start: float = Field(
            0.3,
            ge=0,
            lt=1,
            description="share of the schedule before the classifier is opposed (code: 0)",
        )
        t: float = Field(
            5.0, ge=0, description="weight of L_t, the rest from the segment (code: .8)"
        )
        nt: float = Field(
            1.0, ge=0, description="weight of L_nt, the segment from the rest (code: .3)"
        )
        full: float = Field(0.2, ge=0, description="RU: weight of the whole image (code: .2)")
        guard: float = Field(
            1.0,
            ge=0,
            description="logits of range below which a map is opposed in proportion to its range; "
            "0 = all alike (code)",
        )
        hidden_t: float = Field(0.3, ge=0, description="RU: weight of hidden segments (code: .3)")
        hidden_nt: float = Field(0.5, ge=0, description="RU: weight of hidden rests (code: .5)")
        srf: bool = Field(True, description="stochastic random feeding")
        share: tuple[float, float] = Field(
            (0.2, 0.6), description="share of the grid that is hidden, at the start and the end"
        )
        grid: Count = Field(16, description="cells on a side of the grid (code: 16)")
        least: float = Field(
            50 / 256**2,
            ge=0,
            lt=1,
            description="share of the features that must stay for hidden_t (code: 50 px of 256 x 256)",
        )
        width: Channels = Field(
            64, description="channels of the reconstructor (code: 64); 16 on small machines"
        )
        detail: Count = Field(
            1, description="pixels on a side of what it paints (code: 1); 2 on small machines"
        )
        depth: Count = Field(
            5, description="its halvings; crops of detail x 2^depth at least (code: 8)"
        )
        dropout: float = Field(
            0.0, ge=0, lt=1, description="of the reconstructor's deep layers (code: .5)"
        )
        place: Literal["cells", "stretch"] = Field(
            "cells",
            description="where cells of maps and features lie in the losses: cells = where the "
            "networks look; stretch = evenly over the image (code)",
        )
        merge: Literal["maximum", "range"] = Field(
            "maximum",
            description="how logit maps of scales become seeds: maximum = clipped on their cells, "
            "the sum divided by its maximum; range = clipped when they are enlarged, the range of "
            "the sum brought to [0, 1] (code)",
        )

        @model_validator(mode="before")
        @classmethod
        def _apply_preset(cls, values: Any) -> Any:
            if isinstance(values, dict):
                return {**PRESETS.get(str(values.get("preset")), {}), **values}
            return values

        @field_validator("classifier", mode="before")
        @classmethod
        def _whole_classifier(cls, value: Any) -> Any:
            """Its settings are checked with ours, and kept whole in model folders."""
            return _settled(value) if isinstance(value, str | Mapping) else value

        @field_validator("share")
        @classmethod
        def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
            if not all(0 < share <= 1 for share in value):
                raise ValueError("shares lie above 0 and at most at 1")
            return value

        @model_validator(mode="after")
        def _consistent(self) -> Any:
            if self.strategy != "baseline" and not (self.t or self.nt):
                raise ValueError("t and nt are off: set strategy: baseline, or give one a weight")
            if self.strategy != "baseline" and not (self.hidden_t or self.hidden_nt):
                raise ValueError("the reconstructor needs hidden_t or hidden_nt")
            return self

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        c = self.config
        kind, settings = resolve(c.classifier)
        classifier = kind(make_backbone, num_classes, settings)
        assert isinstance(classifier, Classifier)
        self.classifier = classifier
        self.heads = classifier.heads
        self._drawn: tuple[Tensor, dict[int, Tensor]] | None = None  # by RU, for CU
        if c.strategy == "baseline":
            return
        self.encoder = make_backbone()
        levels = self.encoder.levels[-_LEVELS:]
        hidden = getattr(settings, "hidden", None)  # the shape of the classifier's own head
        self.encoder_head = CAMHead(levels[-1].channels, num_classes, hidden)
        self.reconstructor = Reconstructor(levels, c.width, c.depth, c.dropout)

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The classifier's."""
        return self.classifier.backbone

    def phases(self) -> dict[str, Phase]:
        """RU, then CU, each with an optimiser of its own."""
        c = self.config
        adversarial = {"adv_t": c.t, "adv_nt": c.nt} if c.strategy != "baseline" else {}
        terms = (*self.classifier.terms, *(name for name, weight in adversarial.items() if weight))
        phases = {"classifier": Phase(self._classify, self.classifier.parameters, terms)}
        if c.strategy == "baseline":
            return phases
        weights = {"re_full": c.full, "re_t": c.hidden_t, "re_nt": c.hidden_nt}
        terms = ("re_cls", *(name for name, weight in weights.items() if weight))
        return {"reconstructor": Phase(self._reconstruct, self._painters, terms), **phases}

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """The classifier's maps."""
        maps = self.classifier(images, head)
        as_range = self.config.merge == "range" and maps.kind == "logit"
        return replace(maps, kind="unit") if as_range else maps

    def features(self, images: Tensor) -> list[Tensor]:
        """The classifier's features."""
        return self.classifier.features(images)

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A classifier's weights start the classifier and the reconstructor's encoder alike."""
        adopted = super().adopted(weights)
        for name, tensor in list(adopted.items()):
            for theirs, ours in (("backbone.", "encoder."), ("head.", "encoder_head.")):
                if name.startswith(theirs):
                    adopted.setdefault(ours + name.removeprefix(theirs), tensor)
            adopted.setdefault(INNER + name, tensor)
        return adopted

    def _painters(self) -> Iterator[nn.Parameter]:
        for module in (self.encoder, self.encoder_head, self.reconstructor):
            yield from module.parameters()

    def _reconstruct(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """RU: paint what segments hide."""
        c = self.config
        if c.strategy == "pretrained" and progress >= c.pretrain:
            return {}
        images = self._pictures(batch.images)
        drawn = _draw(batch.tags)
        self._remember(batch.tags, drawn)
        with torch.no_grad(), _fixed(self.classifier):
            maps, _ = self.classifier.classify(batch)
            segment = self._segment(maps, batch, drawn)
        hiding = self._grid(images, progress) if c.srf else torch.ones_like(segment)
        levels = self.encoder(batch.images)
        logits = self.encoder_head(levels[-1]).mean((2, 3)).float()
        places = self._places(batch.images)
        features = self.reconstructor.features(levels[-_LEVELS:], places)
        hidden_t, hidden_nt = segment * hiding, (1 - segment) * hiding
        full, from_rest, from_segment = self._paint(
            [features.detach(), features, features],
            [torch.ones_like(segment), 1 - hidden_t, 1 - hidden_nt],
            places,
        )
        enough = (1 - hidden_t).mean((1, 2, 3), keepdim=True) > c.least
        terms = {
            "re_full": (c.full, (full - images).abs().mean()),
            "re_t": (c.hidden_t, ((from_rest - images).abs() * hidden_t * enough).mean()),
            "re_nt": (c.hidden_nt, ((from_segment - images).abs() * hidden_nt).mean()),
        }
        cls = {"re_cls": F.multilabel_soft_margin_loss(logits, batch.tags)}
        return cls | {name: weight * term for name, (weight, term) in terms.items() if weight}

    def _classify(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """CU: segments from which the rest cannot be inferred, and the other way round."""
        c = self.config
        drawn = self._recall(batch.tags)
        maps, terms = self.classifier.classify(batch)
        if c.strategy == "baseline" or progress < self._opposed:
            return terms
        images = self._pictures(batch.images)
        drawn = _draw(batch.tags) if drawn is None else drawn
        segment = self._segment(maps, batch, drawn)
        with torch.no_grad():
            best = self._enlarged(maps.scores, maps, batch.images).argmax(1, keepdim=True)
            is_best = (best == drawn[..., None, None]).float()
            with _fixed(self.encoder):
                levels = self.encoder(batch.images)[-_LEVELS:]
            places = self._places(batch.images)
            features = self.reconstructor.features(levels, places)
        tagged = batch.tags.any(1)[:, None, None, None]
        outside = ((segment.detach() == 0) & tagged).float()
        opposed = {  # what is fed, where its painting is judged, weight
            "adv_t": (segment, outside, c.t),
            "adv_nt": (1 - segment, segment.detach() * is_best, c.nt),
        }
        opposed = {name: term for name, term in opposed.items() if term[2]}
        with _fixed(self.reconstructor):
            painted = self._paint(
                [features] * len(opposed), [fed for fed, _, _ in opposed.values()], places
            )
        for (name, (_, where, weight)), found in zip(opposed.items(), painted, strict=True):
            terms[name] = -weight * ((found - images).abs() * where).mean()
        return terms

    @property
    def _opposed(self) -> float:
        """Progress from which the classifier is opposed."""
        c = self.config
        return max(c.start, c.pretrain) if c.strategy == "pretrained" else c.start

    def _pictures(self, images: Tensor) -> Tensor:
        """The images (B, 3, H, W) in the size in which they are painted."""
        detail, depth = self.config.detail, self.config.depth
        pictures = F.avg_pool2d(images.float(), detail, ceil_mode=True) if detail > 1 else images
        side = min(pictures.shape[-2:])
        if side < 2**depth:
            raise UserError(
                f"crops of {min(images.shape[-2:])} px, painted at {side}, cannot be halved {depth} "
                "times",
                where="method.depth",
                mend=f"set method.depth: {max(1, side.bit_length() - 1)}, or a crop of at least "
                f"{detail * 2**depth}",
            )
        return pictures

    def _remember(self, tags: Tensor, drawn: Tensor) -> None:
        """Keeps what RU drew until CU asks for it, for the last batch and each of its parts."""
        whole = tags if tags._base is None else tags._base
        if self._drawn is None or self._drawn[0] is not whole:
            self._drawn = whole, {}
        self._drawn[1][int(tags.storage_offset())] = drawn

    def _recall(self, tags: Tensor) -> Tensor | None:
        """What RU drew for this batch, once: CU must oppose the segments that RU painted for."""
        whole = tags if tags._base is None else tags._base
        if self._drawn is None or self._drawn[0] is not whole:
            return None
        return self._drawn[1].pop(int(tags.storage_offset()), None)

    def _segment(self, maps: Maps, batch: Batch, drawn: Tensor) -> Tensor:
        """c in [0, 1] of the drawn class of each image, (B, 1, H, W) as pictures; 0 without a tag."""
        tagged = batch.tags.any(1)
        scores = maps.scores.float()
        own = scores.gather(1, drawn[..., None, None].expand(-1, 1, *scores.shape[-2:])).relu()
        low, high = own.amin((2, 3), keepdim=True), own.amax((2, 3), keepdim=True)
        c = (own - low - _EPS).relu() / (high - low + _EPS) * tagged[:, None, None, None]
        if self.config.guard:
            # Min-max stretches weak maps, and their gradients as much: opposed that hard they go
            # out, and an empty segment gives nothing away.
            steady = ((high - low).detach() / self.config.guard).clamp(max=1)
            c = steady * c + (1 - steady) * c.detach()
        return self._enlarged(c, maps, batch.images).clamp(0, 1)

    def _enlarged(self, scores: Tensor, maps: Maps, images: Tensor) -> Tensor:
        """Scores in the cells of ``maps``, at the pixels in which the images are painted."""
        cells = maps.cells if self.config.place == "cells" else None
        height, width = images.shape[-2:]
        painted = (-(-height // self.config.detail), -(-width // self.config.detail))
        return place(scores, cells, (height, width), painted)

    def _places(self, images: Tensor) -> tuple[Cells, ...] | None:
        """Where the cells of the encoder's last levels lie, in pixels of what is painted."""
        if self.config.place == "stretch":
            return None
        cells = self.encoder.cells((images.shape[-2], images.shape[-1]))[-_LEVELS:]
        return tuple(cell.reduced(self.config.detail) for cell in cells)

    def _grid(self, images: Tensor, progress: float) -> Tensor:
        """M (B, 1, H, W), 1 where the segment decides what is hidden."""
        first, last = self.config.share
        if self.config.strategy == "pretrained":
            progress = progress / self.config.pretrain
        share = first + (last - first) * progress
        grid = self.config.grid
        cells = torch.rand(len(images), 1, grid, grid, device=images.device) < share
        return F.interpolate(cells.float(), images.shape[-2:])

    def _paint(
        self, features: list[Tensor], keep: list[Tensor], places: tuple[Cells, ...] | None
    ) -> tuple[Tensor, ...]:
        """One painting (B, 3, H, W) for each pair, in one pass."""
        cells = None if places is None else places[0]
        painted = self.reconstructor(torch.cat(features), torch.cat(keep), cells)
        return painted.float().chunk(len(keep))


def _draw(tags: Tensor) -> Tensor:
    """(B, 1) int64: one tagged class of each image, any class where none is tagged."""
    untagged = ~tags.any(1, keepdim=True)
    return torch.multinomial(tags + untagged.to(tags.dtype), 1)


def _settled(section: Any) -> dict[str, Any]:
    """The name and every setting of the classifier.

    Raises:
        UserError: No or an unknown name, wrong settings, or a method that is no classifier.
    """
    section = {"name": section} if isinstance(section, str) else dict(section)
    if "name" not in section:
        raise UserError("no name", where="method.classifier", mend="add name: cam")
    kind, settings = resolve(section, "method.classifier")
    if not issubclass(kind, Classifier):
        raise UserError(
            f"{section['name']} does more than classify",
            where="method.classifier",
            mend="take one of: "
            + ", ".join(name for name in methods if issubclass(methods[name], Classifier)),
        )
    given = [key for key in ("from_classifier", "projection") if getattr(settings, key, None)]
    if given:
        raise UserError(
            f"{given[0]} is of the method cam alone, which trains nothing then",
            where="method.classifier",
            mend="leave it out; to train from such weights give a run of it as train.init_from",
        )
    return {"name": section["name"], **settings.model_dump(mode="json")}


@contextmanager
def _fixed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    mode = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(mode)
