"""The learned random walk's two preparations: sure labels from scores, and the trained network."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from weakseg.config import Frozen
from weakseg.console import track
from weakseg.data.images import read_image, write_mask
from weakseg.data.loading import TrainingImages, derive_seed
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Trainable
from weakseg.networks.affinity import AffinityNetwork
from weakseg.networks.backbone import make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import dense_crf_from_labels, pamr
from weakseg.ops.confusion import IGNORE
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.seeds import scores_path
from weakseg.stages.train import (
    augment_for,
    launched,
    placement,
    run_training,
    start_backbone,
    without_pace,
)
from weakseg.training.affinity import AffinityLearner
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, TrainingResult, fit

__all__ = ["AffinityConfig", "network_folder", "network_stage", "sure_labels", "train_affinity"]

_OF_NETWORK = {"kind", "from_classifier", "train_backbone", "train_radius", "labels"}


class AffinityTrainConfig(TrainConfig):
    """Crops, schedule and optimiser of the affinity network."""

    epochs: PositiveFloat = Field(3.0, description="passes over the images (irn: 3)")
    resize: tuple[PositiveFloat, PositiveFloat] = Field(
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

    The strengths are factors on the masks' threshold, because scores of other steps have another
    range than CAM's. Published (irn): .30 and .05 for CAM, whose label-free threshold is about .28;
    on our data more than half of the foreground that is sure by that rule is wrong.
    """

    foreground: PositiveFloat = Field(
        1.5, description="foreground is sure above this many times the masks' threshold"
    )
    background: float = Field(
        0.5, ge=0, description="background is sure below this many times the masks' threshold"
    )
    harden: Literal["crf", "pamr", "none"] = Field(
        "crf", description="what moves the two labellings to the image's edges"
    )
    max_side: PositiveInt | None = Field(
        512, description="larger images are reduced to this longer side to be hardened"
    )


class AffinityConfig(Frozen):
    """The learned random walk."""

    kind: Literal["irn", "psa"] = Field(
        "irn", description="irn = boundaries at stride 4; psa = AffinityNet's features at stride 8"
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
        description="of the pairs trained on, in cells; null = as published: irn 10, psa 5",
    )
    labels: LabelsConfig = Field(default_factory=LabelsConfig)
    train: AffinityTrainConfig = Field(default_factory=AffinityTrainConfig)
    radius: int = Field(5, ge=2, description="of the pairs that the walk goes along, in cells")
    beta: PositiveFloat | None = Field(
        None, description="power of the affinities; null = as published: irn 10, psa 8"
    )
    steps: PositiveInt | None = Field(
        None, description="of the walk; null = 256 at 500 px, in proportion to the image's area"
    )

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
    recipe: Recipe,
    images: Collection,
    config: AffinityConfig,
    threshold: float,
    before: str | None,
) -> Stage:
    """The network's labels and training, kept apart so that another walk does not repeat them.

    ``before`` is the fingerprint of the scores that the labels are made of.
    """
    classifier = run.record("train")
    inputs = {
        "scores": before,
        "settings": config.model_dump(mode="json", include=_OF_NETWORK),
        "train": without_pace(config.train),
        "backbone": _spec(recipe, config).model_dump(mode="json"),
        "classifier": classifier.fingerprint if classifier and config.from_classifier else None,
        "threshold": threshold,
        "images": images.fingerprint(),
        "seed": recipe.seed,
    }
    return Stage(network_folder(run), "affinity network", inputs, recipe.seed)


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
    if not stage.finished:
        with stage.working():
            labels = stage.folder / "labels"
            missing = [s for s in images if not (labels / f"{s.id}.png").exists()]
            _write_labels(missing, scores, labels, config.labels, threshold)
            run_training(
                run,
                stage,
                recipe,
                __name__,
                lambda: _results(_fit(run, recipe, images, placement(recipe))),
            )
    model = _fit(run, recipe, images, Placement("cpu")).model  # from its last checkpoint
    backbone = model.backbone
    return Predictor(model, ("affinity",), Normalise(tuple(backbone.mean), tuple(backbone.std)))


def sure_labels(
    image: np.ndarray,
    seed: ScoreFile,
    threshold: float,
    foreground: float,
    background: float,
    harden: str,
) -> np.ndarray:
    """(H, W) uint8 labels of the pixels that are surely of a class or background, else 255.

    Args:
        image: (H, W, 3) uint8.
        seed: Scores of the image.
        threshold: The masks' threshold; a background map of the scores takes its place.
        foreground: Foreground is sure above this many times the threshold.
        background: Background is sure below this many times the threshold.
        harden: ``crf``, ``pamr`` or ``none``.
    """
    size = (image.shape[0], image.shape[1])
    seed = seed.resized(size)
    if not len(seed.foreground()[0]):
        return np.zeros(size, dtype=np.uint8)
    if harden == "pamr":
        refined = pamr(_chw(image).float() / 255, torch.from_numpy(seed.scores)[None])[0]
        seed = seed.with_maps(seed.classes, refined.numpy())
    ids, maps = seed.foreground()
    own = seed.background()
    limit = np.float32(threshold) if own is None else own
    best, winner = maps.max(0), maps.argmax(0) + 1
    strict, lenient = (np.where(best > f * limit, winner, 0) for f in (foreground, background))
    if harden == "crf":
        strict, lenient = (_hardened(image, labels, len(ids)) for labels in (strict, lenient))
    local = np.where(strict > 0, strict, np.where(lenient > 0, IGNORE, 0))
    table = np.zeros(IGNORE + 1, dtype=np.uint8)
    table[1 : len(ids) + 1], table[IGNORE] = ids, IGNORE
    return table[local]


def _hardened(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    given = torch.from_numpy(labels.astype(np.int64))[None]
    return dense_crf_from_labels(_chw(image), given, classes + 1, scale="auto")[0].argmax(0).numpy()


def _chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def _write_labels(
    samples: list[Sample], scores: Path, folder: Path, config: LabelsConfig, threshold: float
) -> None:
    def read(sample: Sample) -> tuple[np.ndarray, ScoreFile]:
        return (
            read_image(sample.image, max_side=config.max_side),
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
            )
            write_mask(folder / f"{sample.id}.png", labels)


def _spec(recipe: Recipe, config: AffinityConfig) -> BackboneSpec:
    return config.backbone or recipe.backbone


def _config(recipe: Recipe) -> AffinityConfig:
    """Settings of the recipe's affinity step; a recipe holds one at most."""
    step = recipe.refine[recipe.steps.index("affinity")]
    of_network = AffinityConfig.model_fields
    return AffinityConfig.model_validate({k: v for k, v in step.items() if k in of_network})


def _fit(run: RunFolder, recipe: Recipe, images: Collection, where: Placement) -> TrainingResult:
    folder, config = network_folder(run), _config(recipe)
    spec = _spec(recipe, config)
    if config.from_classifier:  # all of its weights come from there
        norm = "frozen" if spec.norm_is_frozen else "trained"
        spec = spec.model_copy(update={"pretrained": False, "weights": None, "norm": norm})

    def make_model() -> AffinityLearner:
        backbone = make_backbone(spec)
        if config.from_classifier:
            start_backbone(backbone, run.stage_folder("train"), "refine: affinity")
        backbone.from_scratch = False
        trained = config.kind == "psa" if config.train_backbone is None else config.train_backbone
        network = AffinityNetwork(backbone, config.kind, trained)
        return AffinityLearner(network, config.train_radius or (10 if config.kind == "irn" else 5))

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


def _main(run: RunFolder, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    images = collection.split(*recipe.data.train)
    return _results(_fit(run, recipe, images, placement(recipe)))


if __name__ == "__main__":
    launched(network_folder, _main)
