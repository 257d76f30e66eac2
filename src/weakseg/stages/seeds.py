"""Stage 3: score maps of the tagged training images, of the trained network or given as files."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from weakseg.console import Bar, console, track
from weakseg.data.images import image_size, same_shape
from weakseg.data.published import (
    Format,
    Published,
    find_files,
    read_published,
    settle_format,
)
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.digests import contents
from weakseg.errors import UserError
from weakseg.export.model import load
from weakseg.inference import Predictor, evaluating, multi_scale
from weakseg.methods import Maps
from weakseg.recipe import Recipe, SeedsConfig
from weakseg.registry import suggest
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.batches import ahead, groups_of_one_size, pick_device, read_group
from weakseg.stages.features import FEATURES, frozen_levels
from weakseg.stages.train import trains_on_features
from weakseg.training.config import Precision

__all__ = [
    "check_settings",
    "classification_f1",
    "gated",
    "make_seeds",
    "planned",
    "scores_path",
    "seeds",
]

_LEAST = 1e-6  # of a pixel's probability: less is nothing, and is not divided by
_GIVEN = {"given", "given_format"}


def check_settings(recipe: Recipe) -> None:
    """Refuses before any work what would be ignored.

    Raises:
        UserError: A head of the method is named, but the scores are given.
    """
    if recipe.seeds.given is not None and recipe.seeds.head is not None:
        raise UserError(
            f"the head {recipe.seeds.head!r} is named, but the scores are given",
            where="seeds.head",
            mend="leave one of them out: seeds.head or seeds.given",
        )


def seeds(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Writes one score file for each training image, gated by its tags."""
    stage, images = planned(run, recipe, collection), collection.split(*recipe.data.train)
    if stage.finished:
        return stage
    if recipe.seeds.given is not None:
        return _given(stage, recipe, images, recipe.seeds.given)
    model = load(run.require("train"))
    heads = model.model.heads
    if recipe.seeds.head is not None and recipe.seeds.head not in heads:
        raise UserError(
            f"the method has no head {recipe.seeds.head!r}",
            where="seeds.head",
            mend=suggest(recipe.seeds.head, heads),
        )
    with stage.working():
        model.to(pick_device(recipe.runtime.accelerator))
        kept = run.stage_folder("train") / FEATURES if trains_on_features(recipe) else None
        make_seeds(
            model, images, recipe.seeds, stage.folder / "scores", kept, recipe.train.precision
        )
        stage.results |= {
            "images": len(images),
            "scales": list(recipe.seeds.scales),
            "flip": recipe.seeds.flip,
            "head": recipe.seeds.head or heads[0],
            "f1": classification_f1(images, stage.folder / "scores"),
        }
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now.

    Raises:
        UserError: Given score files are missing.
    """
    config, images = recipe.seeds, collection.split(*recipe.data.train)
    inputs: dict[str, Any] = {"images": images.fingerprint()}
    if config.given is None:
        inputs["train"] = run.outcome("train")
        inputs["seeds"] = config.model_dump(mode="json", exclude=_GIVEN)
    else:
        files = find_files(config.given, images.samples)
        inputs["given"] = contents({f"{key}{file.suffix}": file for key, file in files.items()})
        inputs["format"] = config.given_format
        inputs["seeds"] = config.model_dump(mode="json", include={"stride", "dtype", "max_side"})
    return run.stage("seeds", inputs, seed=recipe.seed)


def make_seeds(
    predictor: Predictor,
    images: Collection,
    config: SeedsConfig,
    folder: Path,
    features: Path | None = None,
    precision: Precision = "32-true",
) -> None:
    """Writes the score files that are not there yet, a group of one size at a time.

    ``features`` is the folder of those of a frozen backbone, where its head was trained on them, and
    ``precision`` the one that they were to be computed in.
    """
    predictor = predictor.fast()
    groups = groups_of_one_size(images, config)
    todo = [g for g in groups if not all(scores_path(folder, s.id).exists() for s in g)]
    tags = dict(zip((s.id for s in images), images.tag_matrix(), strict=True))
    done = len(images) - sum(map(len, todo))
    with (
        evaluating(predictor.model) as model,
        ThreadPoolExecutor(1) as writer,
        Bar("seeds", len(images), done) as bar,
    ):
        written: list[Future[None]] = []
        for group, batch in ahead(lambda g: read_group(g, config.max_side), todo):
            maps = multi_scale(
                model,
                batch.to(predictor.device),
                predictor.normalise,
                scales=config.scales,
                flip=config.flip,
                size=(-(-batch.shape[-2] // config.stride), -(-batch.shape[-1] // config.stride)),
                head=config.head,
                place=config.place,
                levels=None
                if features is None
                else frozen_levels(model.backbone, group, batch, config, features, precision),
            )
            written.append(writer.submit(_write_group, group, maps, tags, config, folder))
            while len(written) > 4:
                written.pop(0).result()
            bar.step(len(group))
        for future in written:
            future.result()


def scores_path(folder: Path, sample_id: str) -> Path:
    """File of one image's scores in a folder of score files: the seeds', or a step's of refinement."""
    return folder / f"{sample_id}.npz"


def gated(
    maps: np.ndarray, background: np.ndarray | None, tags: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ids and (n, h, w) maps of the tagged classes, after the background where there is one.

    Maps with a background are probabilities among the tagged classes: they sum to 1.
    """
    present = np.flatnonzero(tags)
    ids, kept = present + 1, maps[present]
    if background is not None:
        ids, kept = np.concatenate([[0], ids]), np.concatenate([background, kept])
        # What absent classes had of a pixel is shared out; where they had all, it is background.
        kept[0] += kept.sum(0) < _LEAST
        kept = kept / kept.sum(0)
    return ids.astype(np.int16), kept.clip(0, 1)


def classification_f1(images: Collection, folder: Path) -> float | None:
    """Macro F1 of the predicted against the given tags; ``None`` without a classifier."""
    predicted, given = [], []
    for sample, tags in zip(images, images.tag_matrix(), strict=True):
        probabilities = read_scores(scores_path(folder, sample.id)).probabilities
        if probabilities is None:
            return None
        predicted.append(probabilities > 0.5)
        given.append(tags > 0)
    p, t = np.array(predicted), np.array(given)
    hits, total = (p & t).sum(0), p.sum(0) + t.sum(0)
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


def _write_group(
    group: list[Sample], maps: Maps, tags: dict[str, np.ndarray], config: SeedsConfig, folder: Path
) -> None:
    scores = maps.scores.cpu().numpy()
    background = None if maps.background is None else maps.background.cpu().numpy()
    probabilities = None if maps.logits is None else maps.logits.sigmoid().cpu().numpy()
    for i, sample in enumerate(group):
        size = image_size(sample.image)
        ids, kept = gated(scores[i], None if background is None else background[i], tags[sample.id])
        own = ScoreFile(
            ids,
            kept,
            stride=round(size[0] / kept.shape[1]),
            size=size,
            probabilities=None if probabilities is None else probabilities[i],
        )
        _write_missing(folder, sample, own, config)


def _write_missing(folder: Path, sample: Sample, scores: ScoreFile, config: SeedsConfig) -> None:
    """A file that is there is complete, and may have been changed by hand since."""
    path = scores_path(folder, sample.id)
    if not path.exists():
        write_scores(path, scores, dtype=config.dtype)


# --- given scores ---------------------------------------------------------------------------


def _given(stage: Stage, recipe: Recipe, images: Collection, folder: Path) -> Stage:
    """Turns the score files of other code into this stage's."""
    config = recipe.seeds
    files = find_files(folder, images.samples)
    tags = dict(zip((s.id for s in images), images.tag_matrix(), strict=True))
    present = {key: (np.flatnonzero(row) + 1).tolist() for key, row in tags.items()}
    kind = settle_format(config.given_format, files, present)
    with stage.working():
        scores = stage.folder / "scores"
        convert = partial(_convert, files=files, kind=kind, tags=tags, config=config, folder=scores)
        with ThreadPoolExecutor() as pool:
            results = track(pool.map(convert, images), "given scores", len(images))
            unlike = [s.id for s, fits in zip(images, results, strict=True) if not fits]
        _say_unlike(unlike, len(images), folder, kind)
        stage.results |= {
            "images": len(images),
            "head": f"given scores ({kind})",
            "without_tagged_class": len(unlike),
            "f1": classification_f1(images, scores),
        }
    return stage


def _convert(
    sample: Sample,
    *,
    files: dict[str, Path],
    kind: Format,
    tags: dict[str, np.ndarray],
    config: SeedsConfig,
    folder: Path,
) -> bool:
    """Writes one score file; False where the given one lacks a tagged class."""
    path, own = files[sample.id], tags[sample.id]
    found = read_published(path, kind)
    if len(found.classes) and found.classes[-1] > len(own):
        raise UserError(
            f"it holds the class {found.classes[-1]}, but there are {len(own)} classes",
            where=path,
            mend="give all classes in the order of the score files (data.classes), or the format "
            "that counts them right (seeds.given_format)",
        )
    size = image_size(sample.image)
    maps = np.zeros((len(own), *_stored(found, size, config, path)), dtype=np.float32)
    background = None
    for k, score in zip(found.classes, found.unit(), strict=True):
        small = _reduced(score, (maps.shape[1], maps.shape[2]))
        if k:
            maps[k - 1] = small
        else:
            background = small[None]
    ids, kept = gated(maps, background, own)
    fits = found.probabilities is not None and found.probabilities.shape == own.shape
    result = ScoreFile(
        ids,
        kept,
        stride=max(1, round(size[0] / kept.shape[1])),
        size=size,
        probabilities=found.probabilities if fits else None,
    )
    _write_missing(folder, sample, result, config)
    return set(np.flatnonzero(own) + 1) <= set(found.classes.tolist())


def _stored(
    found: Published, size: tuple[int, int], config: SeedsConfig, path: Path
) -> tuple[int, int]:
    """(h, w) of the stored maps: the stage's stride, or coarser where the given maps are."""
    longer = max(size)
    scale = min(1.0, (config.max_side or longer) / longer)
    height, width = (max(1, -(-round(side * scale) // config.stride)) for side in size)
    if not len(found.classes):
        return height, width
    h, w = found.maps.shape[1:]
    if h > size[0] or w > size[1] or not same_shape((h, w), size):
        raise UserError(
            f"its maps of {h} x {w} do not fit the image of {size[0]} x {size[1]}",
            where=path,
            mend="make the scores from the same images, at their size or reduced by one factor",
        )
    return (h, w) if h < height or w < width else (height, width)


def _reduced(score: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if score.shape == shape:
        return score
    return cv2.resize(score, shape[::-1], interpolation=cv2.INTER_AREA)


def _say_unlike(unlike: list[str], total: int, folder: Path, kind: str) -> None:
    """Warns of files that lack a tagged class; refuses them where most do.

    Raises:
        UserError: More than half of the files lack a class: they mean other classes.
    """
    if 2 * len(unlike) > total:
        raise UserError(
            f"{len(unlike):,} of {total:,} files have no map of a tagged class, such as that of "
            f"{unlike[0]}, read as {kind}",
            where=folder,
            mend="give the classes in the order of the score files (data.classes), or the format "
            "that counts them right (seeds.given_format)",
        )
    if unlike:
        console.print(
            f"  {len(unlike):,} of {total:,} files have no map of a tagged class, such as that of "
            f"{unlike[0]}: that class gets no pixels there"
        )
