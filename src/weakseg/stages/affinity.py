"""The learned random walk's preparations: sure labels from scores, and the trained network's maps."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator

from weakseg.config import Count, Frozen, Pixels, Scale
from weakseg.console import track
from weakseg.data.images import write_mask
from weakseg.data.loading import TrainingImages, derive_seed
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores
from weakseg.inference import Normalise, Predictor, evaluating
from weakseg.methods import Trainable
from weakseg.networks.affinity import STRIDES, AffinityNetwork
from weakseg.networks.backbone import Backbone, make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import dense_crf, dense_crf_from_labels, pamr
from weakseg.ops.confusion import IGNORE
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.seeds import scores_path
from weakseg.stages.train import (
    augment_for,
    backbone_inputs,
    launched,
    placement,
    run_training,
    start_backbone,
    without_pace,
)
from weakseg.training.affinity import AffinityLearner
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, TrainingResult, fit

__all__ = [
    "AffinityConfig",
    "network_folder",
    "network_stage",
    "prepare",
    "read_affinity",
    "sure_labels",
    "train_affinity",
]

_WHERE = "refine: affinity"
_OF_NETWORK = {
    "kind",
    "place",
    "from_classifier",
    "train_backbone",
    "train_radius",
    "pairs",
    "labels",
}


class AffinityTrainConfig(TrainConfig):
    """Crops, schedule and optimiser of the affinity network."""

    epochs: PositiveFloat = Field(3.0, le=1_000_000, description="passes over the images (irn: 3)")
    resize: tuple[Scale, Scale] = Field(
        (0.75, 1.75),
        description="range of the longer side before the crop, as a share of the crop",
    )

    @model_validator(mode="after")
    def _starts_elsewhere(self) -> Any:
        if self.init_from is not None:
            raise ValueError(
                "init_from has no part in this network: it starts from the trained classifier "
                "(from_classifier: true) or from its backbone's weights (backbone.weights)"
            )
        return self


class LabelsConfig(Frozen):
    """Which pixels the network is taught with: those that two background strengths agree on.

    By default the strengths are factors on the masks' threshold, because scores of other steps have
    another range than CAM's. Published are thresholds on CAM (irn .30 and .05, Puzzle-CAM .40 and
    .10) and powers of a background map (psa 4 and 32, SEAM 4 and 24); on our data more than half of
    the foreground that is sure by irn's is wrong.
    """

    by: Literal["threshold", "score", "power"] = Field(
        "threshold",
        description="what foreground and background are: factors on the masks' threshold; scores "
        "(irn); or powers of a background map, (1 - the largest score)^power (psa)",
    )
    foreground: PositiveFloat = Field(
        1.5,
        description="foreground is sure above this; by power: where it exceeds that background",
    )
    background: float = Field(
        0.5,
        ge=0,
        description="background is sure below this; by power: where that background exceeds all",
    )
    harden: Literal["crf", "pamr", "none"] = Field(
        "crf", description="what moves the two labellings to the image's edges"
    )
    max_side: Pixels | None = Field(
        512, description="larger images are reduced to this longer side to be hardened"
    )

    @model_validator(mode="after")
    def _in_order(self) -> LabelsConfig:
        if self.by == "power" and not 0 < self.foreground <= self.background:
            raise ValueError(
                f"foreground {self.foreground:g} and background {self.background:g} are powers: "
                "the lower one makes more background, so foreground must be the lower one "
                "(psa: 4 and 32)"
            )
        return self


class AffinityConfig(Frozen):
    """The learned random walk."""

    kind: Literal["irn", "psa"] = Field(
        "irn", description="irn = boundaries at stride 4; psa = AffinityNet's features at stride 8"
    )
    place: Literal["cells", "crop"] = Field(
        "cells",
        description="where maps lie in the image: where their cells truly do, or as published "
        "(enlarged by whole factors and cut, the image filled up at the right and below)",
    )
    backbone: BackboneSpec | None = Field(None, description="null = as the method's")
    from_classifier: bool = Field(
        True, description="start the backbone from the trained classifier's"
    )
    train_backbone: bool | None = Field(
        None, description="null = as published: fixed for irn, trained for psa"
    )
    train_radius: int | None = Field(
        None,
        ge=2,
        le=256,
        description="of the pairs trained on, in cells; null = as published: irn 10, psa 5",
    )
    pairs: Literal["all", "inner"] = Field(
        "all",
        description="which pairs are trained on; inner = as published, none that starts nearer "
        "than train_radius - 1 cells to the left, right or lower border of the crop",
    )
    labels: LabelsConfig = Field(default_factory=LabelsConfig)
    train: AffinityTrainConfig = Field(default_factory=AffinityTrainConfig)
    flip: bool | None = Field(
        None,
        description="average with the maps of the mirrored image; null = as published: irn yes "
        "(logits), psa no",
    )
    radius: int = Field(
        5, ge=2, le=256, description="of the pairs that the walk goes along, in cells"
    )
    beta: PositiveFloat | None = Field(
        None, description="power of the affinities; null = as published: irn 10, psa 8"
    )
    steps: Count | None = Field(
        None, description="of the walk; null = 256 at 500 px, in proportion to the image's area"
    )
    alpha: PositiveFloat | None = Field(
        None,
        le=1_000,
        description="walks a background map (1 - the largest score)^alpha along, which takes the "
        "threshold's place (psa 16, SEAM 6); null = none",
    )

    @property
    def pairs_radius(self) -> int:
        """Radius of the pairs trained on, in cells."""
        return self.train_radius or (10 if self.kind == "irn" else 5)

    @property
    def mirrors(self) -> bool:
        """Whether maps are averaged with those of the mirrored image."""
        return self.kind == "irn" if self.flip is None else self.flip

    @model_validator(mode="after")
    def _has_inner_pairs(self) -> AffinityConfig:
        stride = STRIDES[self.kind]
        cells, needed = -(-self.train.crop // stride), 2 * self.pairs_radius - 1
        if self.pairs == "inner" and cells < needed:
            raise ValueError(
                f"pairs: inner leaves none in a crop of {self.train.crop} px, which has {cells} "
                f"cells; set train.crop to {stride * needed} or more, or pairs: all"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, values: Any) -> Any:
        """``train.preset: paper`` is what the paper of the network's kind used."""
        train = values.get("train") if isinstance(values, Mapping) else None
        if isinstance(train, Mapping) and train.get("preset") == "paper":
            return {**values, "train": {**train, "preset": values.get("kind", "irn")}}
        return values


def network_stage(
    run: RunFolder,
    folder: Path,
    recipe: Recipe,
    images: Collection,
    config: AffinityConfig,
    threshold: float,
    before: str | None,
) -> Stage:
    """The network's labels and training, kept apart so that another walk does not repeat them.

    ``folder`` is where the stage of refinement is made, and ``before`` the fingerprint of the scores
    that the labels are made of.
    """
    folder = folder / network_folder(run).name
    inputs = {
        "scores": before,
        "settings": config.model_dump(mode="json", include=_OF_NETWORK),
        "train": without_pace(config.train),
        "backbone": backbone_inputs(run, folder, _spec(recipe, config)),
        "classifier": run.outcome("train") if config.from_classifier else None,
        "threshold": threshold,
        "images": images.fingerprint(),
        "seed": recipe.seed,
    }
    return Stage(folder, "affinity network", inputs, recipe.seed)


def network_folder(run: RunFolder) -> Path:
    """Where a run keeps its affinity network."""
    return run.stage_folder("refine") / "network"


def train_affinity(
    run: RunFolder,
    stage: Stage,
    recipe: Recipe,
    images: Collection,
    scores: Path,
    config: AffinityConfig,
    threshold: float,
) -> Predictor:
    """The network of ``network_stage``, trained where it is not yet.

    Its maps are boundary probabilities or features.
    """
    stage.take_over(network_folder(run))
    if not stage.finished:
        with stage.working():
            labels = stage.folder / "labels"
            missing = [s for s in images if not (labels / f"{s.id}.png").exists()]
            _write_labels(missing, scores, labels, config.labels, threshold)
            folder = stage.folder
            run_training(
                run,
                stage,
                recipe,
                __name__,
                lambda: _results(_fit(run, folder, recipe, images, placement(recipe))),
            )
    where = Placement("cpu")  # it is in the last checkpoint
    model = _fit(run, stage.folder, recipe, images, where).model
    backbone = model.backbone
    return Predictor(model, ("affinity",), Normalise(tuple(backbone.mean), tuple(backbone.std)))


def sure_labels(
    image: np.ndarray,
    seed: ScoreFile,
    threshold: float,
    foreground: float,
    background: float,
    harden: str,
    by: str = "threshold",
) -> np.ndarray:
    """(H, W) uint8 labels of the pixels that are surely of a class or background, else 255.

    Two labellings, with a strong and a weak background beside the scores, are each moved to the
    image's edges. Where the strong background leaves a class, that is sure; where even the weak one
    leaves none, background is.

    Args:
        image: (H, W, 3) uint8.
        seed: Scores of the image.
        threshold: The masks' threshold, for ``by="threshold"``; a background map of the scores
            takes its place.
        foreground: The strong background: this many times the threshold; this score; or (1 - the
            largest score) to this power.
        background: The weak one, likewise.
        harden: ``crf`` (of labels with IRNet's widths; by power of scores with AffinityNet's; in
            pixels, whatever the image's size), ``pamr`` or ``none``.
        by: ``threshold``, ``score`` (irn) or ``power`` (psa). psa averages the scores behind its CRF
            over 8 x 8 pixels before it labels them; here pixels are labelled.
    """
    size = (image.shape[0], image.shape[1])
    seed = seed.resized(size)
    if not len(seed.foreground()[0]):
        return np.zeros(size, dtype=np.uint8)
    if harden == "pamr":
        refined = pamr(_chw(image).float() / 255, torch.from_numpy(seed.scores)[None])[0]
        seed = seed.with_maps(seed.classes, refined.numpy())
    ids, maps = seed.foreground()
    if by == "power":
        strong, weak = ((1 - maps.max(0)) ** power for power in (foreground, background))
    else:
        own = seed.background() if by == "threshold" else None
        limit = np.float32(threshold if by == "threshold" else 1) if own is None else own
        strong, weak = foreground * limit, background * limit
    sure, likely = (_labelling(image, maps, each, harden, by) for each in (strong, weak))
    local = np.where(sure > 0, sure, np.where(likely > 0, IGNORE, 0))
    if by == "power":
        local[likely == 0] = 0  # psa lets background win where both are sure, irn the class
    table = np.zeros(IGNORE + 1, dtype=np.uint8)
    table[1 : len(ids) + 1], table[IGNORE] = ids, IGNORE
    return table[local]


def _labelling(
    image: np.ndarray, maps: np.ndarray, background: np.ndarray, harden: str, by: str
) -> np.ndarray:
    """(H, W) labels 0..n of n maps (n, H, W) beside a background score."""
    if by == "power":
        both = np.concatenate([background[None], maps])
        if harden == "crf":
            both = dense_crf(_chw(image), torch.from_numpy(both)[None], preset="soft")[0].numpy()
        return both.argmax(0)
    labels = np.where(maps.max(0) > background, maps.argmax(0) + 1, 0)
    if harden != "crf":
        return labels
    given = torch.from_numpy(labels.astype(np.int64))[None]
    return dense_crf_from_labels(_chw(image), given, len(maps) + 1)[0].argmax(0).numpy()


def read_affinity(
    predictor: Predictor, image: torch.Tensor, config: AffinityConfig
) -> torch.Tensor:
    """What the walk goes by: boundary probabilities (1, 1, h, w) or features (1, 448, h, w).

    irn's boundaries are the sigmoid of the mean logit of the image and its mirror image. With
    ``place: crop`` both are filled up with the mean colour at the right and below, as published:
    for irn to the side of the training crops, which its GroupNorm has seen; for psa to whole cells.
    IRNet cuts larger images to that side; here they stay whole.

    Args:
        predictor: Of :func:`train_affinity`.
        image: (1, 3, H, W) uint8, on the predictor's device.
        config: Of the walk.

    Returns:
        Maps of ceil(H / stride) x ceil(W / stride) cells.
    """
    learner = predictor.model
    assert isinstance(learner, AffinityLearner)
    stride = learner.network.stride
    grid = (-(-image.shape[-2] // stride), -(-image.shape[-1] // stride))
    views = predictor.normalise(image)
    if config.mirrors:
        views = torch.cat([views, views.flip(-1)])
    if config.place == "crop":
        least = config.train.crop if config.kind == "irn" else 0
        height, width = (max(stride * cells, least) for cells in grid)
        views = F.pad(views, (0, width - image.shape[-1], 0, height - image.shape[-2]))
    with evaluating(learner):
        found = learner.network(views.contiguous(memory_format=torch.channels_last)).float()
        maps = found[:1, :, : grid[0], : grid[1]]
        if config.mirrors:
            maps = (maps + found[1:, :, : grid[0], : grid[1]].flip(-1)) / 2
        return (maps.sigmoid() if config.kind == "irn" else maps).clone()


def _chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def _write_labels(
    samples: list[Sample], scores: Path, folder: Path, config: LabelsConfig, threshold: float
) -> None:
    def read(sample: Sample) -> tuple[np.ndarray, ScoreFile]:
        return (
            sample.pixels(config.max_side),
            read_scores(scores_path(scores, sample.id)),
        )

    with ThreadPoolExecutor(1) as pool:
        pending = pool.map(read, samples)
        for sample, (image, seed) in zip(
            samples, track(pending, "sure labels", len(samples)), strict=True
        ):
            labels = sure_labels(
                image,
                seed,
                threshold,
                config.foreground,
                config.background,
                config.harden,
                config.by,
            )
            write_mask(folder / f"{sample.id}.png", labels)


def _spec(recipe: Recipe, config: AffinityConfig) -> BackboneSpec:
    return config.backbone or recipe.backbone


def _config(recipe: Recipe) -> AffinityConfig:
    """Settings of the recipe's affinity step; a recipe holds one at most."""
    step = recipe.refine[recipe.steps.index("affinity")]
    of_network = AffinityConfig.model_fields
    return AffinityConfig.model_validate({k: v for k, v in step.items() if k in of_network})


def prepare(run: RunFolder, recipe: Recipe) -> None:
    """Builds the network with its weights: what cannot be built is refused before anything is done.

    Raises:
        UserError: Whatever is wrong with the network or its weights.
    """
    backbone = _backbone(recipe)
    config = _config(recipe)
    if config.from_classifier:
        start_backbone(backbone, run.path, _WHERE, trained=recipe.backbone)
    AffinityNetwork(backbone, config.kind, False, config.place)


def _backbone(recipe: Recipe) -> Backbone:
    config = _config(recipe)
    spec = _spec(recipe, config)
    if config.from_classifier:  # all of its weights come from there
        update = {"pretrained": False, "weights": None, "norm": spec.resolved_norm}
        spec = spec.model_copy(update=update)
    return make_backbone(spec)


def _fit(
    run: RunFolder, folder: Path, recipe: Recipe, images: Collection, where: Placement
) -> TrainingResult:
    config = _config(recipe)

    def make_model() -> AffinityLearner:
        backbone = _backbone(recipe)
        if config.from_classifier:
            start_backbone(backbone, run.stage_folder("train"), _WHERE)
        backbone.from_scratch = False
        trained = config.kind == "psa" if config.train_backbone is None else config.train_backbone
        network = AffinityNetwork(backbone, config.kind, trained, config.place)
        return AffinityLearner(network, config.pairs_radius, config.pairs)

    def make_data(model: Trainable) -> TrainingImages:
        labels = [folder / "labels" / f"{s.id}.png" for s in images]
        seed = derive_seed(recipe.seed, "affinity")
        return TrainingImages(images, augment_for(model, config.train), seed, labels)

    return fit(
        folder,
        make_model,
        make_data,
        config.train,
        where,
        derive_seed(recipe.seed, "affinity") % 2**31,
        "affinity",
        "refine: affinity.train",
    )


def _results(result: TrainingResult) -> dict[str, Any]:
    return {"steps": result.steps, "active_steps": result.active_steps}


def _main(run: RunFolder, folder: Path, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    images = collection.split(*recipe.data.train)
    return _results(_fit(run, folder, recipe, images, placement(recipe)))


if __name__ == "__main__":
    launched(_main)
