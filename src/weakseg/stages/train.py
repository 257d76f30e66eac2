"""Stage 2: train the method's network on images and tags, or take a classifier as it is.

With several devices the stage runs as a process of its own (``python -m weakseg.stages.train
RUN``), because Lightning starts the main script again in every rank.
"""

from __future__ import annotations

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
from weakseg.digests import digest
from weakseg.errors import UserError
from weakseg.export.model import (
    find_model,
    initialise,
    prediction_settings,
    read_weights,
    save,
)
from weakseg.failures import mendable
from weakseg.files import write_json
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Trainable, build, resolve
from weakseg.networks.backbone import Backbone, backbone_factory, make_backbone, weights_from
from weakseg.networks.heads import init_heads
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stagefiles import read_record
from weakseg.stages.batches import device_words, pick_device
from weakseg.stages.check import collect
from weakseg.stages.features import FEATURES, keep_features, pooled_features
from weakseg.stages.project import project, projected_inputs
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, TrainingResult, fit

__all__ = [
    "PACE",
    "augment_for",
    "backbone_inputs",
    "launched",
    "origin",
    "placement",
    "planned",
    "prepare",
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
    stage, images = planned(run, recipe, collection), collection.split(*recipe.data.train)
    if stage.finished:
        return stage
    with stage.working():
        if recipe.method.get("from_classifier") is not None:
            stage.results |= project(stage.folder, recipe, images)
            return stage
        run_training(run, stage, recipe, __name__, lambda: _fit(stage.folder, recipe, images))
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    images = collection.split(*recipe.data.train)
    inputs = projected_inputs(recipe, images) or train_inputs(run, recipe, images)
    return run.stage("train", inputs, seed=recipe.seed)


def prepare(run: RunFolder, recipe: Recipe, collection: Collection) -> None:
    """Builds the method with its weights: what cannot be built is refused before anything is done.

    Raises:
        UserError: Whatever is wrong with the network, its weights or ``init_from``.
    """
    if recipe.method.get("from_classifier") is None:
        _make_model(recipe, collection.split(*recipe.data.train), say=False)


def train_inputs(run: RunFolder, recipe: Recipe, images: Collection) -> dict[str, Any]:
    """Everything that decides the result of the stage."""
    return {
        "seed": recipe.seed,
        "method": _settled(recipe),
        "backbone": backbone_inputs(run, run.stage_folder("train"), recipe.backbone),
        "train": without_pace(recipe.train),
        "init_from": origin(recipe.train),
        "images": images.fingerprint(),
        **({"views": _views(recipe)} if trains_on_features(recipe) else {}),
    }


def backbone_inputs(run: RunFolder, folder: Path, spec: BackboneSpec) -> dict[str, Any]:
    """The settings of a backbone, with the digest of a weights file in the place of its path.

    A file that the run was started with, and that is gone, is taken to be what it was: the record
    in the folder of the stage says what.
    """
    values = spec.model_dump(mode="json")
    if spec.weights is not None:
        found = digest(spec.weights.expanduser())
        values["weights"] = found or _weights_before(run, folder, spec) or str(spec.weights)
    return values


def _weights_before(run: RunFolder, folder: Path, spec: BackboneSpec) -> str | None:
    record = read_record(folder)
    inputs = record.inputs.get("backbone") if record is not None else None
    try:
        kept = load_recipe(run.recipe_file)
    except UserError:
        return None
    same = spec.weights in (kept.backbone.weights, kept.segmenter_backbone.weights)
    return inputs.get("weights") if same and isinstance(inputs, dict) else None


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
    return digest(find_model(config.init_from) / "model.safetensors")


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
    words = [sys.executable, "-m", module, str(run.path), str(stage.folder)]
    done = subprocess.run(words, check=False)
    if failure.exists():
        raise UserError(**json.loads(failure.read_text(encoding="utf-8")))
    if done.returncode or not results.exists():
        raise UserError(
            f"a training process ended with code {done.returncode}",
            where=stage.folder,
            mend="its last lines above say why; run the same command again to go on",
        )
    stage.results |= json.loads(results.read_text(encoding="utf-8"))
    results.unlink()


def launched(work: Callable[[RunFolder, Path, Recipe, Collection], dict[str, Any]]) -> None:
    """Body of a launched training process: every rank runs it, the first one writes and reports.

    ``work`` gets the run, and the folder that its parent looks for the results in.
    """
    run, folder = RunFolder(sys.argv[1]), Path(sys.argv[2])
    recipe = load_recipe(run.recipe_file)
    try:
        results = work(run, folder, recipe, collect(recipe.data))
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


def _make_model(recipe: Recipe, images: Collection, *, say: bool = True) -> Trainable:
    model = build(recipe.method, backbone_factory(recipe.backbone), len(images.classes))
    init_heads(model, recipe.train.head_init)
    start_from(model, recipe.train, say=say)
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


def start_backbone(
    backbone: Backbone, folder: Path, where: str, *, trained: BackboneSpec | None = None
) -> None:
    """Starts a backbone from that of a trained model.

    Args:
        backbone: The backbone.
        folder: A model folder or a stage with one.
        where: The recipe's key that asked for it.
        trained: Where the model is not trained yet: its backbone, to see whether they fit.

    Raises:
        UserError: They differ.
    """
    if trained is None:
        own = {
            key.partition("backbone.")[2]: tensor
            for key, tensor in read_weights(find_model(folder)).items()
            if key.startswith(("backbone.", "classifier.backbone."))
        }
    else:
        without = trained.model_copy(update={"pretrained": False, "weights": None})
        own = make_backbone(without).state_dict()
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


def start_from(model: Trainable, config: TrainConfig, *, say: bool = True) -> None:
    """Starts a model from the weights of ``init_from``, where it is set; says what is not in them."""
    if config.init_from is None:
        return
    missing = initialise(model, config.init_from)
    if missing and say:
        console.print(
            f"  {len(missing)} tensors start fresh, such as {missing[0]}: {config.init_from} has none "
            "of that name (a part that its method does not have, such as a decoder)"
        )


def _main(run: RunFolder, folder: Path, recipe: Recipe, collection: Collection) -> dict[str, Any]:
    return _fit(folder, recipe, collection.split(*recipe.data.train))


if __name__ == "__main__":
    launched(_main)
