"""Stage 6: train a segmentation network on the masks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.data.loading import TrainingImages, derive_seed
from weakseg.data.samples import Collection, lot
from weakseg.errors import UserError
from weakseg.inference import Normalise, evaluating, multi_scale
from weakseg.methods import Trainable, needs_segmenter
from weakseg.mixing import build_mix, settle_mix
from weakseg.networks.backbone import make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.tokens import is_transformer
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.batches import groups_of_one_size, pick_device, read_group
from weakseg.stages.masks import (
    corrected_ids,
    edited_in_place,
    mask_files,
    mask_files_inputs,
    require_corrections_of_images,
    require_masks_that_fit,
)
from weakseg.stages.train import (
    augment_for,
    backbone_inputs,
    launched,
    origin,
    placement,
    run_training,
    save_model,
    saved_spec,
    start_backbone,
    start_from,
    without_pace,
)
from weakseg.training.fit import fit
from weakseg.training.segmenter import Segmenter

__all__ = ["best_presence", "check_settings", "planned", "prepare", "segment"]

_CALIBRATED_FROM = 200  # images
_CALIBRATED_BY = 200
_FROM_CLASSIFIER = "segmenter.from_classifier"


def segment(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Trains DeepLabV3+ on the masks of the training images and writes its model folder.

    Where a person has corrected a mask (``RUN/corrected``), that one takes the pseudo mask's place.
    """
    require_corrections_of_images(run, collection)
    stage, images = planned(run, recipe, collection), collection.split(*recipe.data.train)
    if stage.finished:
        return stage
    run.require("masks")
    require_masks_that_fit(run, images)
    with stage.working():
        work = partial(_fit, run, stage.folder, recipe, images)
        run_training(run, stage, recipe, __name__, work)
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    images, folder = collection.split(*recipe.data.train), run.stage_folder("segment")
    inputs = {
        "seed": recipe.seed,
        "masks": mask_files_inputs(run, images),
        "backbone": backbone_inputs(run, folder, recipe.segmenter_backbone),
        "segmenter": _settings(recipe),
        "train": without_pace(recipe.segmenter.train),
        "init_from": origin(recipe.segmenter.train),
    }
    return run.stage("segment", inputs, seed=recipe.seed)


def prepare(run: RunFolder, recipe: Recipe, collection: Collection) -> None:
    """Builds the network with its weights: what cannot be built is refused before anything is done.

    Raises:
        UserError: Whatever is wrong with the network, its weights or ``init_from``; or there are
            corrected masks of no image.
    """
    require_corrections_of_images(run, collection)
    model = _build(recipe, len(collection.classes))
    if recipe.segmenter_starts_from_classifier:
        start_backbone(model.backbone, run.path, _FROM_CLASSIFIER, trained=recipe.backbone)
    start_from(model, recipe.segmenter.train, say=False)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the result, less what has entries of its own or no effect."""
    none = {"train", "backbone", "enabled"}
    mix = recipe.segmenter.mix
    if mix is None:
        return recipe.segmenter.model_dump(mode="json", exclude={*none, "mix", "mix_start"})
    return recipe.segmenter.model_dump(mode="json", exclude=none) | {"mix": settle_mix(mix)}


def check_settings(recipe: Recipe) -> None:
    """Refuses before any training what would fail behind it.

    Raises:
        UserError: Wrong settings of the mix, a backbone that the decoder cannot stand on, or
            weights of a classifier where none is trained.
    """
    if recipe.segmenter.mix is not None:
        build_mix(recipe.segmenter.mix, 1)
    wanted = needs_segmenter(recipe.method, recipe.segmenter_wanted)
    if wanted and recipe.seeds.given is not None and recipe.segmenter.from_classifier:
        raise UserError(
            "there is no classifier to start from: the scores are given",
            where="segmenter.from_classifier",
            mend="leave it out, or set segmenter.train.init_from to a model of your own",
        )
    name = recipe.segmenter_backbone.name
    if wanted and is_transformer(name.split(".")[0]):
        raise UserError(
            f"DeepLabV3+ needs a convolutional backbone, and {name} is a transformer",
            where="segmenter.backbone",
            mend="give the segmenter one of its own, such as "
            "--set segmenter.backbone.name=resnet50.tv_in1k, or set segmenter.enabled: false",
        )


def _build(recipe: Recipe, classes: int) -> Segmenter:
    config = recipe.segmenter
    backbone = make_backbone(recipe.segmenter_backbone)
    network = DeepLabV3Plus(backbone, classes + 1, config.channels, config.dilations)
    mix = None if config.mix is None else build_mix(config.mix, classes)
    return Segmenter(network, mix, config.mix_start, config.classify)


def _fit(run: RunFolder, folder: Path, recipe: Recipe, images: Collection) -> dict[str, Any]:
    config, spec = recipe.segmenter, recipe.segmenter_backbone
    decoder: dict[str, Any] = {"channels": config.channels, "dilations": list(config.dilations)}
    given = images
    if config.classify:
        decoder["classifies"] = True
        held_out = _held_out(given, corrected_ids(run, given))
        images = given.only(s.id for s in given if s.id not in held_out)

    def make_model() -> Segmenter:
        model = _build(recipe, len(images.classes))
        if recipe.segmenter_starts_from_classifier:
            start_backbone(model.backbone, run.stage_folder("train"), _FROM_CLASSIFIER)
            if recipe.method.get("from_classifier"):  # weights that others have trained
                model.backbone.from_scratch = False
        start_from(model, config.train)
        return model

    def make_data(model: Trainable) -> TrainingImages:
        seed = derive_seed(recipe.seed, "segment")
        masks = mask_files(run, images)
        return TrainingImages(images, augment_for(model, config.train), seed, masks)

    result = fit(
        folder,
        make_model,
        make_data,
        config.train,
        placement(recipe),
        derive_seed(recipe.seed, "segment") % 2**31,
        "segment",
        "segmenter.train",
    )
    if config.classify:
        _calibrate(result.model, given.only(held_out), recipe)
    network = {"task": "segmenter", "decoder": decoder, "backbone": saved_spec(spec, result.model)}
    corrected = len(corrected_ids(run, images))
    by_hand = corrected or ("some" if edited_in_place(run) else None)
    more = {"network": "DeepLabV3+", **({"corrected masks": by_hand} if by_hand else {})}
    save_model(folder, recipe, result, images, network, more)
    return {
        "images": len(images),
        "corrected": corrected,
        "steps": result.steps,
        "active_steps": result.active_steps,
    }


def _held_out(images: Collection, corrected: list[str]) -> set[str]:
    """Ids of images by whose tags the classes' threshold is chosen: a twentieth, 200 at most.

    None of few images, and none that a person has corrected: these are worth more as masks.
    """
    if len(images) < _CALIBRATED_FROM:
        return set()
    free = sorted((s.id for s in images if s.id not in set(corrected)), key=lot)
    return set(free[: min(len(images) // 20, _CALIBRATED_BY)])


def _calibrate(model: Trainable, images: Collection, recipe: Recipe) -> None:
    """Sets the probability above which a class may be predicted: the best F1 on held-out tags."""
    if not len(images):
        return
    assert isinstance(model, Segmenter)
    config, found, rows = recipe.predict, [], []
    device = pick_device(recipe.runtime.accelerator)
    backbone = model.backbone
    normalise = Normalise(tuple(backbone.mean), tuple(backbone.std))
    tags = dict(zip((s.id for s in images), images.tag_matrix(), strict=True))
    with evaluating(model.to(device)):
        for group in groups_of_one_size(images, config):
            batch = read_group(group, config.max_side).to(device)
            maps = multi_scale(
                model, batch, normalise, scales=config.scales, flip=config.flip, size=(1, 1)
            )
            assert maps.logits is not None
            found.append(maps.logits.sigmoid().cpu().numpy())
            rows += [tags[s.id] for s in group]
    threshold = best_presence(np.concatenate(found), np.stack(rows))
    model.cpu()
    model.presence.fill_(threshold)


def best_presence(probabilities: np.ndarray, tags: np.ndarray) -> float:
    """The threshold whose decisions agree best with the tags: the largest F1 over all of them.

    Args:
        probabilities: (N, K).
        tags: (N, K), 1 where the class is present.

    Returns:
        One of .05, .1, ... .95; the middle one of those that are equally good.
    """
    thresholds = np.arange(1, 20) / 20
    scores = []
    for threshold in thresholds:
        decided = probabilities > threshold
        scores.append(2 * (decided & (tags > 0)).sum() / max(1, decided.sum() + tags.sum()))
    best = np.flatnonzero(np.isclose(scores, max(scores)))
    return float(thresholds[best[len(best) // 2]])


def _main(run: RunFolder, folder: Path, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    return _fit(run, folder, recipe, collection.split(*recipe.data.train))


if __name__ == "__main__":
    launched(_main)
