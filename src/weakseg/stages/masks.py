"""Stage 5: from score maps to masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.console import console, track
from weakseg.data.images import image_size, read_mask, write_mask
from weakseg.data.samples import Collection, Sample, lot
from weakseg.data.scorefile import ScoreFile, read_scores
from weakseg.data.sources import count, scan
from weakseg.digests import contents
from weakseg.errors import UserError
from weakseg.files import atomic_path, write_json
from weakseg.ops import (
    Criterion,
    ThresholdCurve,
    colour_contrast,
    contrast_threshold,
    label_free_threshold,
    power_threshold,
)
from weakseg.ops.confusion import IGNORE
from weakseg.recipe import MasksConfig, Recipe
from weakseg.runfolder import CORRECTED, RunFolder, Stage
from weakseg.stagefiles import changed_by_hand
from weakseg.stages.score import Masked, Scored, score_masks, write_quality
from weakseg.stages.seeds import scores_path

__all__ = [
    "Rule",
    "choose_rule",
    "corrected_ids",
    "edited_in_place",
    "label",
    "mask_files",
    "mask_files_inputs",
    "masks",
    "planned",
    "require_corrections_of_images",
    "require_masks_that_fit",
    "rule_settings",
    "score",
]

_BINS = 256
_NAMES: dict[Criterion, str] = {
    "cross-entropy": "cross-entropy of a two-level split",
    "expected-iou": "expected IoU, negative",
    "evidence": "distance from the mean evidence",
    "variance": "variance between the two parts, negative",
}
_WHY: dict[Criterion, str] = {
    "cross-entropy": "the split of all positive scores with the least cross-entropy",
    "expected-iou": "where the IoU to be expected is largest if scores are probabilities",
    "evidence": "the geometric mean of the mean score and the mean positive score",
    "variance": "the split of all positive scores with the largest variance between its parts",
}
_SHOWN = 10  # files that an error names
_LOOKED_AT, _SIDE = 2000, 256  # images whose colours are compared, and their longer side
_ESTIMATED = 2000  # masks whose quality a run estimates by itself; `weakseg score RUN` does all


@dataclass(frozen=True)
class Rule:
    """How background was told from foreground.

    Attributes:
        rule: ``label-free``, ``constant``, ``power``, or ``map`` where the scores have a
            background map of their own.
        threshold: Pixels whose best score is not above it are background; ``None`` with ``map``.
        margin: Scores this close to the threshold are unsure (255).
        chosen_by: One sentence.
        histogram: Counts of the best score over all pixels of the stored maps, 256 bins.
        criterion: What the label-free rule minimised: ``name``, ``thresholds``, ``values``.
    """

    rule: str
    threshold: float | None
    margin: float
    chosen_by: str
    histogram: list[int]
    criterion: dict[str, Any] | None = None


def masks(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Writes one mask for each training image, ``classes.txt`` and ``rule.json``."""
    stage, images = planned(run, recipe, collection), collection.split(*recipe.data.train)
    if stage.finished:
        return stage
    run.require("refine" if recipe.steps else "seeds")
    scores = run.scores_folder(recipe.steps)
    with stage.working():
        rule = choose_rule(recipe.masks, scores, images)
        if rule.threshold is None and recipe.masks != MasksConfig(margin=recipe.masks.margin):
            console.print(
                "  masks.rule and its thresholds have no effect: the scores have a background of "
                "their own (RecurSeed: --set seeds.head=cam gives scores without)"
            )
        write_json(stage.folder / "rule.json", asdict(rule))
        with atomic_path(stage.folder / "classes.txt") as temporary:
            temporary.write_text("".join(f"{name}\n" for name in images.classes), encoding="utf-8")
        missing = [s.id for s in images if not (stage.folder / "masks" / f"{s.id}.png").exists()]

        def write(sample_id: str) -> None:
            seed = read_scores(scores_path(scores, sample_id))
            write_mask(
                stage.folder / "masks" / f"{sample_id}.png",
                label(seed, rule.threshold, rule.margin),
            )

        with ThreadPoolExecutor() as pool:
            for _ in track(pool.map(write, missing), "masks", len(missing)):
                pass
        made = stage.folder / "masks"
        write_quality(stage.folder / "quality.csv", score(run, images, _ESTIMATED, made))
        stage.results |= {
            "images": len(images),
            "rule": rule.rule,
            "threshold": None if rule.threshold is None else round(rule.threshold, 4),
        }
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    inputs = {
        "scores": run.outcome("refine" if recipe.steps else "seeds"),
        "masks": rule_settings(recipe.masks),
        "images": collection.split(*recipe.data.train).fingerprint(),
    }
    return run.stage("masks", inputs, seed=recipe.seed)


def rule_settings(config: MasksConfig) -> dict[str, Any]:
    """What decides the threshold, beside scores and images.

    The criterion of earlier versions goes without saying, so that their masks stay as they are.
    """
    settings = config.model_dump(mode="json")
    if config.criterion == "cross-entropy":
        del settings["criterion"]
    return settings


def score(
    run: RunFolder, images: Collection, limit: int | None = None, folder: Path | None = None
) -> list[Scored]:
    """Sorts a run's masks by their estimated quality; those that were corrected are left out.

    Args:
        run: A run with masks.
        images: Its training images.
        limit: At most so many, drawn by a fixed lot; default all.
        folder: Of the masks; default: the run's.
    """
    folder = folder or run.stage_folder("masks") / "masks"
    done = corrected_ids(run, images)
    chosen = sorted((s for s in images if s.id not in done), key=lambda s: lot(s.id))
    masked = [Masked(s, folder / f"{s.id}.png") for s in chosen[:limit]]
    return score_masks(masked)


def edited_in_place(run: RunFolder) -> bool:
    """Whether masks of the stage itself were changed by hand."""
    changed = changed_by_hand(run.stage_folder("masks"))
    return any(name.startswith("masks/") for name in changed)


def corrected_ids(run: RunFolder, images: Collection) -> list[str]:
    """Ids of these images that have a corrected mask."""
    folder = run.path / CORRECTED
    if not folder.is_dir():
        return []
    return [s.id for s in images if (folder / f"{s.id}.png").is_file()]


def mask_files(run: RunFolder, images: Collection) -> list[Path]:
    """What a segmenter is trained on: each image's corrected mask, or else its pseudo mask."""
    corrected = set(corrected_ids(run, images))
    made = run.stage_folder("masks") / "masks"
    return [(run.path / CORRECTED if s.id in corrected else made) / f"{s.id}.png" for s in images]


def mask_files_inputs(run: RunFolder, images: Collection) -> str | None:
    """What a training on :func:`mask_files` depends on: the masks, and the corrected ones of these images."""
    made = run.outcome("masks")
    corrected = {i: run.path / CORRECTED / f"{i}.png" for i in corrected_ids(run, images)}
    if made is None or not corrected:
        return made
    return f"{made}, imported: {contents(corrected)}"


def require_corrections_of_images(run: RunFolder, collection: Collection) -> None:
    """Refuses corrected masks that nothing would use.

    Raises:
        UserError: Their names are those of no image, or they are links to nothing; with the files.
    """
    folder = run.path / CORRECTED
    if not folder.is_dir():
        return
    known = {f"{s.id}.png" for s in collection}
    strays = [n for n in scan(folder) if n not in known or not (folder / n).is_file()]
    if strays:
        example = next((s.id for s in collection), "cat/001")
        raise UserError(
            f"{count(len(strays), 'corrected mask')} that no image of the run would use: "
            f"{_few(strays)}",
            where=folder,
            mend=f"name each like its image, with the suffix .png ({example}.png), or take them "
            "out of this folder",
        )


def require_masks_that_fit(run: RunFolder, images: Collection) -> None:
    """Looks at every mask that a segmenter is to be trained on, before it is.

    Raises:
        UserError: Masks that cannot be read, of another size than their image, or with ids of no
            class; all of them at once, by image.
    """
    files = mask_files(run, images)
    most = len(images.classes)

    def look(pair: tuple[Sample, Path]) -> str | None:
        sample, file = pair
        if not file.is_file():
            return "there is no such file"
        try:
            mask = read_mask(file)
        except UserError as error:
            return error.what
        (height, width), size = mask.shape, image_size(sample.image)
        if mask.shape != size:
            return f"{width} x {height} pixels, and the image has {size[1]} x {size[0]}"
        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        beyond = present[(present > most) & (present != IGNORE)]
        if len(beyond):
            ids = ", ".join(map(str, beyond[:5]))
            return f"holds the id {ids}, and the classes are 1 to {most}"
        return None

    with ThreadPoolExecutor() as pool:
        pairs = list(zip(images, files, strict=True))
        found = list(track(pool.map(look, pairs), "masks to train on", len(pairs)))
    faults = [(f, fault) for f, fault in zip(files, found, strict=True) if fault is not None]
    if not faults:
        return
    lines = [f"  {file.relative_to(run.path).as_posix()}: {fault}" for file, fault in faults]
    more = [f"  and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    by_hand = any(file.is_relative_to(run.path / CORRECTED) for file, _ in faults)
    raise UserError(
        f"{len(faults):,} of {count(len(files), 'mask')} cannot be trained on\n"
        + "\n".join(lines[:_SHOWN] + more),
        where=run.path,
        mend="a mask is an 8-bit indexed PNG of its image's size: 0 is background, 255 unsure, "
        f"and 1 to {most} are the classes of {run.stage_folder('masks').name}/classes.txt; write "
        "these anew"
        + (f", or take them out of {CORRECTED}: the run's own masks take their place" * by_hand)
        + f"; delete {run.stage_folder('masks').name} to have the run's own masks made again",
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def label(seed: ScoreFile, threshold: float | None, margin: float = 0.0) -> np.ndarray:
    """(H, W) uint8 mask of one image: the best class where it is above the background.

    Where the method gave a background map, that map takes the threshold's place.
    """
    full = seed.full_size()
    best, winner = full.best()
    background = full.background()
    limit = np.float32(threshold or 0) if background is None else background
    mask = np.where(best > limit, winner, 0).astype(np.uint8)
    if margin:
        mask[np.abs(best - limit) <= margin] = IGNORE
    return mask


def choose_rule(config: MasksConfig, scores: Path, images: Collection) -> Rule:
    """The threshold of the recipe's rule; no ground truth is looked at."""
    histogram = np.zeros(_BINS, dtype=np.int64)
    for best in track(_best_scores(scores, images), "scores", len(images)):
        bins = np.minimum((best * _BINS).astype(np.int64), _BINS - 1)
        histogram += np.bincount(bins.ravel(), minlength=_BINS)
    if _have_background(scores, images):
        return Rule(
            "map",
            None,
            config.margin,
            "the scores have a background map of their own, pixel by pixel",
            histogram.tolist(),
        )
    threshold: float
    if config.rule == "constant":
        threshold, why = config.threshold, "set in the recipe (masks.threshold)"
    elif config.rule == "power":
        threshold = power_threshold(config.alpha)
        why = f"background score (1 - max)^{config.alpha:g}, which equals this threshold"
    else:
        return _label_free(config, histogram, scores, images)
    return Rule(config.rule, threshold, config.margin, why, histogram.tolist())


def _have_background(scores: Path, images: Collection) -> bool:
    files = (read_scores(scores_path(scores, sample.id)) for sample in images)
    first = next((file for file in files if len(file.foreground()[0])), None)
    return first is not None and first.background() is not None


def _label_free(
    config: MasksConfig, histogram: np.ndarray, scores: Path, images: Collection
) -> Rule:
    name: Criterion = "expected-iou" if config.criterion == "auto" else config.criterion
    curve = label_free_threshold(histogram, name)
    if curve is None:
        why = "the scores are all alike, so nothing could be learnt from them: the recipe's masks.threshold"
        return Rule("constant", config.threshold, config.margin, why, histogram.tolist())
    threshold, why = curve.threshold, f"{_WHY[name]}; no mask was looked at"
    if config.criterion == "auto":
        threshold, why = _median(curve, histogram, scores, images)
    criterion = {
        "name": _NAMES[name],
        "thresholds": curve.thresholds.round(4).tolist(),
        "values": curve.values.round(6).tolist(),
    }
    return Rule(config.rule, threshold, config.margin, why, histogram.tolist(), criterion)


def _median(
    expected: ThresholdCurve, histogram: np.ndarray, scores: Path, images: Collection
) -> tuple[float, str]:
    """The middle one of three thresholds, and why."""
    evidence = label_free_threshold(histogram, "evidence")
    contrast = contrast_threshold(_contrast(scores, images))
    found = {
        _WHY["expected-iou"]: expected,
        _WHY["evidence"]: evidence,
        "where colours of the two sides differ most": contrast,
    }
    said = {why: curve.threshold for why, curve in found.items() if curve is not None}
    words = ", ".join(f"{value:.2f} ({why})" for why, value in said.items())
    middle = sorted(said.values())[(len(said) - 1) // 2]
    return middle, f"as the middle one of {words}; no mask was looked at"


def _contrast(scores: Path, images: Collection) -> np.ndarray:
    """Sum of the colour contrast of a few images, drawn by a fixed lot."""
    chosen = sorted((s for s in images if s.tags), key=lambda s: lot(s.id))[:_LOOKED_AT]

    def one(sample: Sample) -> np.ndarray:
        image = sample.pixels(_SIDE)
        seed = read_scores(scores_path(scores, sample.id)).resized(image.shape[:2])
        return colour_contrast(image, seed.best()[0])

    total = np.zeros(100)
    with ThreadPoolExecutor() as pool:
        for contrast in track(pool.map(one, chosen), "colours", len(chosen)):
            total += contrast
    return total


def _best_scores(scores: Path, images: Collection) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda s: read_scores(scores_path(scores, s.id)).best()[0], images)
