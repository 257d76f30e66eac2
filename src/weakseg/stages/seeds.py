"""Stage 3: score maps of the trained network on the tagged training images."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from weakseg.console import Bar
from weakseg.data.images import image_size
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.export.model import load
from weakseg.inference import Predictor, evaluating, multi_scale
from weakseg.methods import Maps
from weakseg.recipe import Recipe, SeedsConfig
from weakseg.registry import suggest
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.batches import ahead, groups_of_one_size, pick_device, read_group

_LEAST = 1e-6

__all__ = ["classification_f1", "gated", "make_seeds", "scores_path", "seeds"]


def seeds(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Writes one score file for each training image, gated by its tags."""
    images = collection.split(*recipe.data.train)
    trained = run.record("train")
    stage = run.stage(
        "seeds",
        {
            "train": trained.fingerprint if trained else None,
            "seeds": recipe.seeds.model_dump(mode="json"),
            "images": images.fingerprint(),
        },
        seed=recipe.seed,
    )
    if stage.finished:
        return stage
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
        make_seeds(model, images, recipe.seeds, stage.folder / "scores")
        stage.results |= {
            "images": len(images),
            "scales": list(recipe.seeds.scales),
            "flip": recipe.seeds.flip,
            "head": recipe.seeds.head or heads[0],
            "f1": classification_f1(images, stage.folder / "scores"),
        }
    return stage


def make_seeds(predictor: Predictor, images: Collection, config: SeedsConfig, folder: Path) -> None:
    """Writes the score files that are not there yet, a group of one size at a time."""
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
            )
            written.append(writer.submit(_write_group, group, maps, tags, config, folder))
            while len(written) > 4:
                written.pop(0).result()
            bar.step(len(group))
        for future in written:
            future.result()


def scores_path(folder: Path, sample_id: str) -> Path:
    """File of one image's scores in a folder of seeds."""
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
        write_scores(scores_path(folder, sample.id), own, dtype=config.dtype)
