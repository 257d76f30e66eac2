"""Stage 6: train a segmentation network on the masks."""

from __future__ import annotations

from typing import Any

from weakseg.data.loading import TrainingImages, derive_seed
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.methods import Trainable, needs_segmenter
from weakseg.mixing import build_mix, settle_mix
from weakseg.networks.backbone import make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.tokens import is_transformer
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder, Stage
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

__all__ = ["check_settings", "segment"]


def segment(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Trains DeepLabV3+ on the masks of the training images and writes its model folder.

    Where a person has corrected a mask (``RUN/corrected``), that one takes the pseudo mask's place.
    """
    images = collection.split(*recipe.data.train)
    require_corrections_of_images(run, collection)
    stage = run.stage(
        "segment",
        {
            "seed": recipe.seed,
            "masks": mask_files_inputs(run, images),
            "backbone": recipe.segmenter_backbone.model_dump(mode="json"),
            "segmenter": _settings(recipe),
            "train": without_pace(recipe.segmenter.train),
            "init_from": origin(recipe.segmenter.train),
        },
        seed=recipe.seed,
    )
    if stage.finished:
        return stage
    run.require("masks")
    require_masks_that_fit(run, images)
    with stage.working():
        run_training(run, stage, recipe, __name__, lambda: _fit(run, recipe, images))
    return stage


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


def _fit(run: RunFolder, recipe: Recipe, images: Collection) -> dict[str, Any]:
    folder, config, spec = run.stage_folder("segment"), recipe.segmenter, recipe.segmenter_backbone
    decoder = {"channels": config.channels, "dilations": list(config.dilations)}

    def make_model() -> Segmenter:
        classes = len(images.classes)
        network = DeepLabV3Plus(make_backbone(spec), classes + 1, config.channels, config.dilations)
        mix = None if config.mix is None else build_mix(config.mix, classes)
        model = Segmenter(network, mix, config.mix_start)
        if recipe.segmenter_starts_from_classifier:
            start_backbone(model.backbone, run.stage_folder("train"), "segmenter.from_classifier")
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


def _main(run: RunFolder, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    return _fit(run, recipe, collection.split(*recipe.data.train))


if __name__ == "__main__":
    launched(lambda run: run.stage_folder("segment"), _main)
