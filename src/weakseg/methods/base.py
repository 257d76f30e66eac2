"""The contract of a method.

A method trains a network so that its maps cover whole objects. It knows tensors and losses; it
knows no files, thresholds, scales, loggers or devices. A batch holds no masks, so a method cannot
peek. To add one, write one file in this package and register its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from weakseg.config import Frozen, validate
from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone, MakeBackbone
from weakseg.ops.cells import Cells
from weakseg.ops.scores import MapKind
from weakseg.registry import Registry, suggest

__all__ = [
    "INNER",
    "Batch",
    "Card",
    "Classifier",
    "Maps",
    "Method",
    "Phase",
    "Trainable",
    "build",
    "methods",
    "needs_segmenter",
    "resolve",
]


INNER = "classifier."
"""Begins the names of the weights of a classifier that a method holds inside it."""


@dataclass
class Batch:
    """What a method trains on.

    Attributes:
        images: (B, 3, S, S) float32, normalised; padding is zero, the mean colour.
        tags: (B, K) float32, 1 where the class is present.
        ids: B sample ids.
        pooled: (B, C) averages of the last level, where a frozen backbone's features were computed
            before; ``images`` then holds none (B, 3, 0, 0).
    """

    images: Tensor
    tags: Tensor
    ids: list[str]
    pooled: Tensor | None = None

    def to(self, device: Any, **kwargs: Any) -> Batch:
        """The batch on another device."""
        pooled = None if self.pooled is None else self.pooled.to(device, **kwargs)
        return Batch(
            self.images.to(device, **kwargs), self.tags.to(device, **kwargs), self.ids, pooled
        )

    def parts(self, count: int) -> list[Batch]:
        """The batch cut into ``count`` equal parts, in order."""
        size = len(self.ids) // count
        cuts = [slice(i, i + size) for i in range(0, size * count, size)]
        return [
            Batch(
                self.images[cut],
                self.tags[cut],
                self.ids[cut],
                None if self.pooled is None else self.pooled[cut],
            )
            for cut in cuts
        ]


@dataclass
class Maps:
    """What a network says of a batch of images.

    Attributes:
        scores: (B, K, h, w), one map for each foreground class.
        kind: How scales and flips merge: ``logit`` (clipped at zero on the cells, enlarged, added,
            then divided by the maximum), ``unit`` (enlarged, positive parts added, then min-max),
            ``probability`` (mean).
        background: (B, 1, h, w), with ``probability`` only.
        logits: (B, K) image-level logits, where the network classifies.
        cells: Where the cells of ``scores`` (and of ``background``) lie in the images; ``None`` =
            they share them evenly.
    """

    scores: Tensor
    kind: MapKind
    background: Tensor | None = None
    logits: Tensor | None = None
    cells: Cells | None = None


@dataclass
class Phase:
    """A loss function with the parameters that it may change and an optimiser of its own.

    Attributes:
        losses: ``losses(batch, progress)`` returns named terms, already weighted; the loop sums
            and logs them. ``progress`` is the share of the schedule in [0, 1).
        parameters: Returns the parameters that this phase trains.
        terms: Names of the terms that must have been active when training ends.
    """

    losses: Callable[[Any, float], dict[str, Tensor]]
    parameters: Callable[[], Iterable[nn.Parameter]]
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a method is, for tables and docs.

    Attributes:
        name: As in recipes.
        paper: Short reference.
        year: Of the paper.
        idea: One line.
        recipes: Names of shipped recipes.
        published: Published numbers by what they measure, on other data and weights than ours.
    """

    name: str
    paper: str
    year: int
    idea: str
    recipes: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)


class Trainable(nn.Module):
    """What the training loop and inference need of a network: a method or a segmenter.

    Attributes:
        backbone: The trunk; its normalisation is that of the images.
        heads: Names of the heads; the first is the default one.
        terms: Loss terms of the one phase, where ``phases`` is not overridden.
        present: Probability above which a class may be predicted where no tags are given.
        published_merging: Scales and flips are merged as in RecurSeed's published inference.
    """

    backbone: Backbone
    heads: tuple[str, ...]
    terms: tuple[str, ...] = ()
    present: float = 0.5
    published_merging: bool = False

    def phases(self) -> dict[str, Phase]:
        """Phases that run in order on every batch; most models have one."""
        return {"main": Phase(self.losses, self.parameters, self.terms)}

    def losses(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """Named loss terms, already weighted; a term that is off at this step is left out."""
        raise NotImplementedError(f"{type(self).__name__} must define losses() or phases()")

    def after_step(self, progress: float) -> None:
        """Called after the optimisers' steps: moving-average teachers and the like."""

    def training_state(self) -> dict[str, Any]:
        """What a training that goes on needs beside the weights: tensors in dicts and lists.

        It is kept in checkpoints and left out of model folders. Where several processes train, it
        is the first one's.
        """
        return {}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``training_state`` returned."""

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another model under their names in this one, for ``init_from``.

        A classifier inside a method gives its weights as if it stood alone.
        """
        inner = {k.removeprefix(INNER): v for k, v in weights.items() if k.startswith(INNER)}
        return {**inner, **weights}

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Maps of normalised images (B, 3, H, W); no tags, thresholds or scales here."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class Method(Trainable):
    """Base class of all methods.

    Args:
        make_backbone: Builds a fresh backbone at each call.
        num_classes: K, foreground classes.
        config: Settings of the method.

    Attributes:
        card: What the method is.
        segments: Its first head is a segmentation network: no other is trained on its masks,
            unless a recipe asks for one.
        parts: Settings that a part stands for, in ``name: method+part``; each is a mapping with
            a name.
    """

    card: ClassVar[Card]
    segments: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    heads: tuple[str, ...] = ("cam",)

    class Config(Frozen):
        """Settings of the method."""

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.config = config

    @classmethod
    def pools(cls, config: Frozen) -> bool:
        """Whether losses read nothing of an image but the average of the backbone's last level.

        Those of a frozen backbone are then computed once (``Batch.pooled``).
        """
        return False

    def features(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of each level, finest first, for refiners that need them."""
        return self.backbone(images)


class Classifier(Method):
    """A method that learns from tags and the images as they are; others may build on its maps."""

    def classify(self, batch: Batch) -> tuple[Maps, dict[str, Tensor]]:
        """Maps of the images with gradients, and the named loss terms that teach them."""
        raise NotImplementedError(f"{type(self).__name__} must define classify()")

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The classifier's own terms."""
        return self.classify(batch)[1]


methods: Registry[type[Method]] = Registry("method", "weakseg.methods", group="weakseg.methods")
"""All methods by name: those of this package, and those that installed packages declare as entry
points of the group ``weakseg.methods``."""


def resolve(section: Mapping[str, Any], key: str = "method") -> tuple[type[Method], Frozen]:
    """The class and validated settings that a recipe's ``method`` section names.

    ``name: recurseed+cutmix`` is the method with the settings of one of its ``parts``. ``key`` is
    where in the recipe the section stands, for errors.

    Raises:
        UserError: Unknown method or part, or every wrong setting of it at once.
    """
    settings = {k: v for k, v in section.items() if k != "name"}
    name, plus, part = section["name"].partition("+")
    method = methods[name]
    if plus:
        if part not in method.parts:
            mend = suggest(part, method.parts) if method.parts else f"write {name} alone"
            raise UserError(f"{name} has no part {part!r}", where=f"{key}.name", mend=mend)
        settings |= {k: _merged(section, k, v) for k, v in method.parts[part].items()}
    return method, validate(method.Config, settings, where=f"method {section['name']}", prefix=key)


def _merged(section: Mapping[str, Any], key: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a method's name sets, with more settings of the same thing beside it."""
    given = section.get(key, {})
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or given.get("name", own["name"]) != own["name"]:
        raise UserError(
            f"{section['name']} and {key}: {section[key]!r} contradict each other",
            where=f"method.{key}",
            mend=f"leave {key} out, or the part out of the name",
        )
    return {**own, **given}


def needs_segmenter(section: Mapping[str, Any], enabled: bool | None) -> bool:
    """Whether a segmenter is trained on the method's masks: as ``enabled`` says, or, where that is
    ``None``, unless the method is one itself."""
    return not resolve(section)[0].segments if enabled is None else enabled


def build(section: Mapping[str, Any], make_backbone: MakeBackbone, num_classes: int) -> Method:
    """Builds the method that a recipe's ``method`` section names."""
    method, config = resolve(section)
    return method(make_backbone, num_classes, config)
