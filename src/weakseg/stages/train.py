"""Stage 2: train the method's network on images and tags, or take a classifier as it is.

With several devices the stage runs as a process of its own (``python -m weakseg.stages.train
RUN``), because Lightning starts the main script again in every rank.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from weakseg.console import console
from weakseg.data.loading import Augment, TrainingFeatures, TrainingImages, derive_seed
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.export.model import (
    find_model,
    initialise,
    prediction_settings,
    read_weights,
    save,
)
from weakseg.files import write_json
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Trainable, build, resolve
from weakseg.networks.backbone import Backbone, backbone_factory, weights_from
from weakseg.networks.heads import init_heads
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder, Stage, mendable
from weakseg.stages.batches import device_words, pick_device
from weakseg.stages.check import collect
from weakseg.stages.features import FEATURES, keep_features, pooled_features
from weakseg.stages.project import project, projected_inputs
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, TrainingResult, fit

__all__ = [
    "PACE",
    "augment_for",
    "launched",
    "origin",
    "placement",
    "run_training",
    "save_model",
    "saved_spec",
    "start_backbone",
    "start_from",
    "train",
    "train_inputs",
    "trains_on_features",
    "without_pace",
]


PACE = {"checkpoint_every", "features_gb", "snapshot_every"}
"""Settings of a training that do not change its result."""


def train(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Trains the method on the training splits and writes its model folder.

    Where the recipe gives a trained classifier, nothing is trained: its parts become the model.
    """
    images = collection.split(*recipe.data.train)
    given = projected_inputs(recipe, images)
    stage = run.stage("train", given or train_inputs(recipe, images), seed=recipe.seed)
    if stage.finished:
        return stage
    if given is None and stage.previous is not None and stage.previous.status == "done":
        _make_model(recipe, images)  # a finished training is cleared for one that can start
    with stage.working():
        if given is not None:
            stage.results |= project(stage.folder, recipe, images)
            return stage
        run_training(run, stage, recipe, __name__, lambda: _fit(stage.folder, recipe, images))
    return stage


def train_inputs(recipe: Recipe, images: Collection) -> dict[str, Any]:
    """Everything that decides the result of the stage."""
    return {
        "seed": recipe.seed,
        "method": _settled(recipe),
        "backbone": recipe.backbone.model_dump(mode="json"),
        "train": without_pace(recipe.train),
        "init_from": origin(recipe.train),
        "images": images.fingerprint(),
        **({"views": _views(recipe)} if trains_on_features(recipe) else {}),
    }


def trains_on_features(recipe: Recipe) -> bool:
    """Whether the features of a frozen backbone are computed once, and the method's head on them."""
    method, config = resolve(recipe.method)
    return recipe.backbone.is_frozen and method.pools(config)


def _views(recipe: Recipe) -> dict[str, Any]:
    """The views of an image whose features are kept: those of the seeds."""
    return recipe.seeds.model_dump(mode="json", include={"scales", "flip", "max_side"})


def _settled(recipe: Recipe) -> dict[str, Any]:
    """The method with every setting, so that another default later changes no trained model."""
    _, config = resolve(recipe.method)
    return {"name": recipe.method["name"], **config.model_dump(mode="json")}


def without_pace(config: TrainConfig) -> dict[str, Any]:
    """Settings of a training, less those that do not change its result."""
    return config.model_dump(mode="json", exclude={*PACE, "init_from"})


def origin(config: TrainConfig) -> str | None:
    """Digest of the weights that ``init_from`` points to: others there mean other inputs."""
    if config.init_from is None:
        return None
    with (find_model(config.init_from) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def run_training(
    run: RunFolder, stage: Stage, recipe: Recipe, module: str, work: Callable[[], dict[str, Any]]
) -> None:
    """Runs a training stage here, or in processes of its own for several devices.

    ``work`` trains, writes the model folder and returns the stage's results.
    """
    if recipe.runtime.devices * recipe.runtime.nodes == 1:
        stage.results |= work()
        return
    results, failure = stage.folder / "results.json", stage.folder / "failure.json"
    for old in (results, failure):
        old.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", module, str(run.path)], check=False)
    if failure.exists():
        raise UserError(**json.loads(failure.read_text(encoding="utf-8")))
    if done.returncode or not results.exists():
        raise UserError(
            f"a training process ended with code {done.returncode}",
            where=stage.folder,
            mend="its last lines above say why; run the same command again to go on",
        )
    stage.results |= json.loads(results.read_text(encoding="utf-8"))


def launched(
    find: Callable[[RunFolder], Path],
    work: Callable[[RunFolder, Recipe, Collection], dict[str, Any]],
) -> None:
    """Body of a launched training process: every rank runs it, the first one writes and reports.

    ``find`` gives the folder of the stage, in which its parent looks for the results.
    """
    run = RunFolder(sys.argv[1])
    recipe = load_recipe(run.recipe_file)
    folder = find(run)
    try:
        results = work(run, recipe, collect(recipe.data))
    except Exception as raised:
        error = mendable(raised, folder)
        if error is None:
            raise
        write_json(
            folder / "failure.json", {"what": error.what, "where": error.where, "mend": error.mend}
        )
        raise SystemExit(2) from None
    if _is_first():
        write_json(folder / "results.json", results)


def placement(recipe: Recipe) -> Placement:
    """Where the recipe's trainings run."""
    r = recipe.runtime
    return Placement(r.accelerator, r.devices, r.nodes, r.workers)


def augment_for(model: Trainable, config: TrainConfig) -> Augment:
    """The views of a training, normalised as the model's backbone expects."""
    backbone = model.backbone
    return Augment(
        config.crop, config.resize, config.flip, config.jitter, backbone.mean, backbone.std
    )


def saved_spec(spec: BackboneSpec, model: Trainable) -> dict[str, Any]:
    """The backbone as a model folder describes it: same network, weights from the folder."""
    own = spec.model_dump(mode="json")
    return own | {
        "pretrained": False,
        "weights": None,
        "norm": spec.resolved_norm,
        "mean": list(model.backbone.mean),
        "std": list(model.backbone.std),
    }


def _make_model(recipe: Recipe, images: Collection) -> Trainable:
    model = build(recipe.method, backbone_factory(recipe.backbone), len(images.classes))
    init_heads(model, recipe.train.head_init)
    start_from(model, recipe.train)
    return model


def _fit(folder: Path, recipe: Recipe, images: Collection) -> dict[str, Any]:
    config = recipe.train

    def make_model() -> Trainable:
        return _make_model(recipe, images)

    def make_data(model: Trainable) -> TrainingImages | TrainingFeatures:
        seed = derive_seed(recipe.seed, "train")
        if not trains_on_features(recipe):
            return TrainingImages(images, augment_for(model, config), seed)
        kept = folder / FEATURES
        if _is_first():
            device = pick_device(recipe.runtime.accelerator)
            keep_features(
                model.to(device),
                images,
                recipe.seeds,
                kept,
                config.features_gb,
                config.precision,
            )
            model.cpu()
        return pooled_features(images, kept, seed)

    console.print(f"  {recipe.backbone.name}: weights from {weights_from(recipe.backbone)}")
    result = fit(folder, make_model, make_data, config, placement(recipe), recipe.seed, "train")
    network = {
        "task": "method",
        "method": _settled(recipe),
        "backbone": saved_spec(recipe.backbone, result.model),
    }
    save_model(folder, recipe, result, images, network)
    runtime = recipe.runtime
    device = pick_device(runtime.accelerator)
    return {
        "images": len(images),
        "steps": result.steps,
        "active_steps": result.active_steps,
        "device": device_words(device, runtime.devices * runtime.nodes),
    }


def save_model(
    folder: Path,
    recipe: Recipe,
    result: TrainingResult,
    images: Collection,
    network: dict[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model folder of a training stage, from the first process alone.

    Statistics of a trained BatchNorm differ between processes: the first one's count. ``network``
    is what rebuilds the model, as ``export.model.save`` takes it, and ``more`` are facts for the
    card.
    """
    if not _is_first():
        return
    backbone = result.model.backbone
    segments = network["task"] == "segmenter" or getattr(result.model, "segments", False)
    predictor = Predictor(
        result.model,
        images.classes,
        Normalise(tuple(backbone.mean), tuple(backbone.std)),
        reading=images.reading,
        **prediction_settings(recipe, segments=segments),
    )
    details = {
        "data": images.name,
        "images": len(images),
        "tags from": images.tag_source,
        "method": recipe.method["name"] if recipe.seeds.given is None else "given scores",
        "backbone": backbone.spec.name,
        "steps": result.steps,
        "seed": recipe.seed,
        **(more or {}),
    }
    save(folder / "model", predictor, network, details)


def start_backbone(backbone: Backbone, folder: Path, where: str) -> None:
    """Starts a backbone from that of a trained model.

    Raises:
        UserError: They differ; ``where`` is the recipe's key that asked for it.
    """
    weights = read_weights(find_model(folder))
    own = {
        key.partition("backbone.")[2]: tensor
        for key, tensor in weights.items()
        if key.startswith(("backbone.", "classifier.backbone."))
    }
    try:
        backbone.load_state_dict(own)
    except RuntimeError:
        raise UserError(
            "the backbone differs from the classifier's",
            where=where,
            mend="set from_classifier: false, or leave the backbone out",
        ) from None


def _is_first() -> bool:
    """True in a single process, and in the first of those that train together."""
    return getattr(rank_zero_only, "rank", 0) == 0


def start_from(model: Trainable, config: TrainConfig) -> None:
    """Starts a model from the weights of ``init_from``, where it is set; says what is not in them."""
    if config.init_from is None:
        return
    missing = initialise(model, config.init_from)
    if missing:
        console.print(
            f"  {len(missing)} tensors start fresh, such as {missing[0]}: {config.init_from} has none "
            "of that name (a part that its method does not have, such as a decoder)"
        )


def _main(run: RunFolder, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    return _fit(run.stage_folder("train"), recipe, collection.split(*recipe.data.train))


if __name__ == "__main__":
    launched(lambda run: run.stage_folder("train"), _main)
