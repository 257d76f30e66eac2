"""Stage 7: masks of the trained segmenter, or of a method that is one."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from weakseg.console import Bar, console
from weakseg.data.depth import Reading
from weakseg.data.images import image_size, read_large_image, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import no_images, sample_id, scan
from weakseg.data.survey import find_reading
from weakseg.errors import UserError
from weakseg.export.model import load
from weakseg.export.runtime import Runtime, on_runtime
from weakseg.inference import Predictor
from weakseg.methods import needs_segmenter
from weakseg.recipe import PredictConfig, Recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.batches import ahead, groups_of_one_size, pick_device, read_group

_UNDECIDED = Reading()

__all__ = ["images_in", "planned", "predict", "predict_images"]


def predict(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Predicts every image of the collection; training images too, whose masks it improves."""
    stage = planned(run, recipe, collection)
    if stage.finished:
        return stage
    model = load(run.require(_network(recipe)))
    with stage.working():
        model.to(pick_device(recipe.runtime.accelerator))
        predict_images(model, collection.samples, stage.folder / "masks", recipe.predict)
        stage.results |= {"images": len(collection)}
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    network = _network(recipe)
    inputs = {
        network: run.outcome(network),
        "predict": _settings(recipe.predict),
        "images": collection.fingerprint(),
    }
    return run.stage("predict", inputs, seed=recipe.seed)


def _network(recipe: Recipe) -> str:
    """The stage whose network predicts."""
    return "segment" if needs_segmenter(recipe.method, recipe.segmenter_wanted) else "train"


def _settings(config: PredictConfig) -> dict[str, Any]:
    """What decides the masks; a tile only where there is one, for runs that know of none."""
    return config.model_dump(mode="json", exclude={"tile"} if config.tile is None else set())


def predict_images(
    predictor: Predictor,
    samples: tuple[Sample, ...],
    folder: Path,
    config: PredictConfig,
    *,
    resume: bool = True,
    runtime: Runtime = "torch",
) -> None:
    """Writes masks at the images' own sizes.

    ``resume`` keeps those that are there: only where they are known to be this model's. With
    ``config.tile``, images of any size are opened. ``runtime`` is what the network runs on.
    """
    predictor = replace(
        on_runtime(predictor.fast(), runtime),
        scales=config.scales,
        flip=config.flip,
        max_side=config.max_side,
        tile=config.tile,
        crf=config.crf,
    )
    large = [s for s in samples if config.tile and max(image_size(s.image)) > config.tile]
    apart = {s.id for s in large}
    others = tuple(s for s in samples if s.id not in apart)
    if others:
        _predict_groups(predictor, others, folder, config, resume)
    for sample in large:
        if not (resume and (folder / f"{sample.id}.png").exists()):
            _predict_large(predictor, sample, folder)


def _predict_groups(
    predictor: Predictor,
    samples: tuple[Sample, ...],
    folder: Path,
    config: PredictConfig,
    resume: bool,
) -> None:
    groups = groups_of_one_size(samples, config, full=True)
    todo = [g for g in groups if not (resume and all((folder / f"{s.id}.png").exists() for s in g))]

    def write(group: list[Sample], found: np.ndarray) -> None:
        for sample, mask in zip(group, found, strict=True):
            file = folder / f"{sample.id}.png"
            if not (resume and file.exists()):  # it may have been changed by hand since
                write_mask(file, mask)

    done = len(samples) - sum(map(len, todo))
    with ThreadPoolExecutor(1) as writer, Bar("predict", len(samples), done) as bar:
        written: list[Future[None]] = []
        for group, images in ahead(lambda g: read_group(g, None), todo):
            written.append(writer.submit(write, group, predictor.predict_batch(images)))
            while len(written) > 4:
                written.pop(0).result()
            bar.step(len(group))
        for future in written:
            future.result()


def _predict_large(predictor: Predictor, sample: Sample, folder: Path) -> None:
    image = read_large_image(sample.image, reading=sample.reading)
    with Bar(f"tiles of {sample.id}", 0) as bar:
        mask = predictor.predict_tiled(image, done=bar.of)
    del image  # writing needs memory of its own
    write_mask(folder / f"{sample.id}.png", mask)


def images_in(path: Path, reading: Reading = _UNDECIDED) -> tuple[Sample, ...]:
    """The images of a folder and its sub-folders, or one image, as samples without tags.

    Args:
        path: Folder or image.
        reading: How the model's own images were read. What it leaves open (a model of 8-bit images
            knows no range of more bits) is found in these images together, and said.

    Raises:
        UserError: There is no image, or two of them would have one mask.
    """
    if path.is_file():
        return _read_alike([Sample(path.stem, path, None)], reading)
    if not path.is_dir():
        raise UserError(
            "there is no such folder or image",
            where=path,
            mend="give a folder of images, or one image",
        )
    others: Counter[str] = Counter()
    found = scan(path, others=others)
    if not found:
        raise no_images(path, others)
    by_id: dict[str, str] = {}
    for name in found:
        other = by_id.setdefault(sample_id(name), name)
        if other != name:
            raise UserError(
                f"{other} and {name} would have one mask",
                where=path,
                mend="rename one of them, so that their names differ in more than the suffix",
            )
    return _read_alike([Sample(key, path / name, None) for key, name in by_id.items()], reading)


def _read_alike(samples: list[Sample], reading: Reading) -> tuple[Sample, ...]:
    reading, notes = find_reading(samples, reading)
    for note in notes:
        console.print(f"  [dim]{escape(note)}[/dim]")
    return tuple(replace(sample, reading=reading) for sample in samples)
