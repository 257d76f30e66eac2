"""Rules that set the background threshold without masks, and what each loses: results/thresholds.csv.

    uv run python benchmarks/thresholds.py --data shapes --runs runs/methods/cam-0 runs/methods/acr-0
    uv run python benchmarks/thresholds.py --data voc --runs runs/quality/cpu-cam-0 --network 64

For each run it takes the seeds and each step of its refinement; --scores NAME=FOLDER adds folders of
scores by hand. A rule sees images, scores and, where --network gives a number of images for it, the
run's classifier; one threshold for all images of the list, or one for each class. Ground truth is
opened to say how much mIoU the rule loses against the best threshold (``gap``). ``passes`` is the
time of what the rule has to compute, in readings of all scores.

--list tune_320 (VOC) and --data shapes are the images on which a default may be chosen; --data
shapes-held-out, --list report_320 and --data voc-val are those to report on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rows import append, commit, device

from weakseg.console import track
from weakseg.data.images import read_image
from weakseg.data.samples import Collection, Sample, lot
from weakseg.data.scorefile import read_scores
from weakseg.export.model import load
from weakseg.inference import Predictor, evaluating, multi_scale
from weakseg.ops import (
    CRITERIA,
    ThresholdCurve,
    ThresholdSweep,
    colour_contrast,
    contrast_threshold,
    label_free_threshold,
    metrics,
    pamr,
)
from weakseg.recipe import MasksConfig, SeedsConfig, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import read_list, sweep
from weakseg.stages.masks import choose_rule
from weakseg.stages.seeds import make_seeds, scores_path

RESULTS = Path(__file__).parent / "results" / "thresholds.csv"
BINS, STEPS, SIDE = 256, 100, 256
GRID = np.arange(STEPS) / STEPS
CONSTANTS = (0.15, 0.25, 0.3)
"""Published: irn's for CAM, irn's for walked maps, and a round number."""


def main() -> None:
    """Judges every rule on every folder of scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data_arguments(parser)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--network", type=int, default=0, help="images for rules that ask it")
    args = parser.parse_args()
    images = collection_of(args.data, args.voc, args.list)
    found = [(*named(text), None) for text in args.scores]
    for run in args.runs:
        found += [(name, folder, run) for name, folder in _folders(run, args.data, images)]
    for name, folder, run in found:
        if _needs_no_threshold(images, folder):
            continue
        head = name.split()[-2] if args.data == "shapes-held-out" and run else None
        rows = _judge(images, folder, run if name.endswith("seeds") else None, head, args.network)
        shared = {"data": args.data, "list": args.list, "scores": name, "images": len(images)}
        traced = {
            "device": device(),
            "commit": commit(),
            "command": f"benchmarks/thresholds.py --data {args.data}"
            + (f" --list {args.list}" if args.list else "")
            + (f" --runs {run}" if run else f" --scores {name}=..."),
        }
        append(RESULTS, [shared | row | traced for row in rows])
        for row in rows:
            print(
                f"{name:40} {row['rule']:28} {row['threshold']!s:>6.6} "
                f"{100 * row['miou']:5.1f}  gap {100 * row['gap']:4.1f}",
                file=sys.stderr,
            )


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images: ``--data``, ``--voc`` and ``--list``."""
    parser.add_argument(
        "--data", choices=("shapes", "shapes-held-out", "voc", "voc-val"), required=True
    )
    parser.add_argument("--voc", type=Path, default=Path("../shared/data/voc2012-subset"))
    parser.add_argument("--list", default="", help="of the VOC subset, such as tune_320")


def collection_of(data: str, voc: Path, chosen: str) -> Collection:
    if data.startswith("shapes"):
        options = {"seed": int(data == "shapes-held-out")}
        return collect(load_recipe("demo", overrides={"data": {"options": options}}).data).split(
            "train"
        )
    values = {"root": voc / "JPEGImages", "labels": str(voc / "labels.csv")}
    values["masks"] = voc / "SegmentationClass"
    images = collect(load_recipe({"data": values}).data)
    images = images.split("val" if data == "voc-val" else "train")
    if not chosen:
        return images
    return images.only(read_list(voc / "ImageSets" / "Segmentation" / f"{chosen}.txt"))


def named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise SystemExit(f"--scores {text}: write NAME=FOLDER")
    return name, Path(folder)


def _folders(run: Path, data: str, images: Collection) -> Iterable[tuple[str, Path]]:
    folder = RunFolder(run)
    if data == "voc-val":
        trained = folder.record("train")
        assert trained is not None
        path = run / f"val-{trained.fingerprint[:8]}"
        predictor = load(folder.stage_folder("train") / "model")
        make_seeds(predictor, images, load_recipe(folder.recipe_file).seeds, path)
        yield f"{run.name}: seeds", path
        return
    if data == "shapes-held-out":  # as benchmarks/methods.py leaves them: of this very network
        trained = folder.record("train")
        assert trained is not None
        for path in sorted(run.glob(f"held-out-*-{trained.fingerprint[:8]}")):
            yield f"{run.name}: {path.name.split('-')[2]} seeds", path
        return
    yield f"{run.name}: seeds", folder.stage_folder("seeds") / "scores"
    for path in sorted(folder.stage_folder("refine").glob("*/scores")):
        yield f"{run.name}: {path.parent.name}", path


def _needs_no_threshold(images: Collection, folder: Path) -> bool:
    files = (read_scores(scores_path(folder, sample.id)) for sample in images)
    return any(file.background() is not None for file in files if len(file.foreground()[0]))


# --- what rules look at -----------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Sums over all images, by step of the best score's grid unless it says otherwise.

    Attributes:
        histogram: (BINS,) pixels by best score.
        of_class: (K, BINS) likewise, of the pixels that each class wins.
        border: (STEPS,) pixels of the images' borders, by best score.
        inner: (STEPS,) the other pixels.
        edge: (STEPS,) colour steps across the outline at each threshold; the image's mean is 1.
        outline: (STEPS,) pairs of neighbours that the outline parts.
        spread: (STEPS,) share of the variance of an image's colours between the two sides.
        refined: (STEPS, STEPS) pixels by best score and by best score after PAMR.
        views: (STEPS, STEPS) pixels by best score at scales 1 and .5; or None.
        evidence: (STEPS,) probability of the tagged classes that is kept with what lies above the
            threshold, less that which is left without it, less the share of the area; or None.
    """

    histogram: np.ndarray
    of_class: np.ndarray
    border: np.ndarray
    inner: np.ndarray
    edge: np.ndarray
    outline: np.ndarray
    spread: np.ndarray
    refined: np.ndarray
    views: np.ndarray | None
    evidence: np.ndarray | None
    seconds: dict[str, float]


def _steps_of(best: np.ndarray, steps: int = STEPS) -> np.ndarray:
    return np.minimum((best * steps).astype(np.int64), steps - 1)


def _histograms(images: Collection, scores: Path) -> tuple[np.ndarray, np.ndarray]:
    """By best score: of all pixels, and of those that each class wins."""
    total = np.zeros((len(images.classes) + 1, BINS), np.int64)

    def one(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        best, winner = read_scores(scores_path(scores, sample.id)).best()
        return _steps_of(best, BINS).ravel(), winner.ravel().astype(np.int64)

    with ThreadPoolExecutor() as pool:
        for bins, winner in pool.map(one, images):
            total += np.bincount(winner * BINS + bins, minlength=total.size).reshape(total.shape)
    return total.sum(0), total[1:]


def _look(
    images: Collection, scores: Path, run: Path | None, head: str | None, network: int
) -> Seen:
    start = time.perf_counter()
    histogram, of_class = _histograms(images, scores)
    seconds = {"histogram": time.perf_counter() - start}
    sums = {name: np.zeros(STEPS) for name in ("border", "inner", "edge", "outline", "spread")}
    refined = np.zeros((STEPS, STEPS))
    for name in ("border", "edge", "spread", "refined", "views", "evidence"):
        seconds[name] = 0.0
    for i, sample in enumerate(track(images, "looks", len(images))):
        seed = read_scores(scores_path(scores, sample.id))
        image = read_image(sample.image, max_side=SIDE)
        seed = seed.resized(image.shape[:2])
        best, _ = seed.best()
        steps = _steps_of(best)
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        clock = time.perf_counter()
        border, inner = _border(steps)
        sums["border"] += border
        sums["inner"] += inner
        clock = _timed(seconds, "border", clock)
        edge, outline = _edges(steps, cv2.GaussianBlur(lab, (0, 0), 1))
        sums["edge"] += edge
        sums["outline"] += outline
        clock = _timed(seconds, "edge", clock)
        sums["spread"] += colour_contrast(image, best)
        clock = _timed(seconds, "spread", clock)
        maps = seed.foreground()[1]
        if len(maps) and i % 4 == 0:  # a quarter of the images: PAMR takes its time
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            after = pamr(pixels, torch.from_numpy(maps)[None])[0].numpy().max(0)
            refined += _joint(steps, _steps_of(after))
            _timed(seconds, "refined", clock)
    views = evidence = None
    if run is not None and network:
        predictor = load(RunFolder(run).stage_folder("train") / "model").fast()
        config = load_recipe(RunFolder(run).recipe_file).seeds
        config = config if head is None else config.model_copy(update={"head": head})
        start = time.perf_counter()
        views = _two_scales(predictor, images, config, network)
        start = _timed(seconds, "views", start)
        evidence = _ask(predictor, images, scores, network)
        _timed(seconds, "evidence", start)
    return Seen(
        histogram,
        of_class,
        **sums,
        refined=refined,
        views=views,
        evidence=evidence,
        seconds=seconds,
    )


def _timed(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] += now - since
    return now


def _border(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = max(2, round(0.03 * max(steps.shape)))
    rim = np.ones(steps.shape, bool)
    rim[wide:-wide, wide:-wide] = False
    return (
        np.bincount(steps[rim], minlength=STEPS),
        np.bincount(steps[~rim], minlength=STEPS),
    )


def _edges(steps: np.ndarray, lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pair of neighbours is parted by every threshold between their scores."""
    edge, outline = np.zeros(STEPS + 1), np.zeros(STEPS + 1)
    for one, other in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        low = np.minimum(steps[one], steps[other]).ravel() + 1
        high = np.maximum(steps[one], steps[other]).ravel() + 1
        step = np.abs(lab[one] - lab[other]).sum(-1).ravel()
        step = step / max(float(step.mean()), 1e-6)
        edge += np.bincount(low, step, STEPS + 1) - np.bincount(high, step, STEPS + 1)
        outline += np.bincount(low, minlength=STEPS + 1) - np.bincount(high, minlength=STEPS + 1)
    return edge.cumsum()[:STEPS], outline.cumsum()[:STEPS]


def _joint(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bincount((one * STEPS + other).ravel(), minlength=STEPS**2).reshape(STEPS, STEPS)


def _two_scales(
    predictor: Predictor, images: Collection, config: SeedsConfig, count: int
) -> np.ndarray | None:
    """(100, 100) counts of pixels by best tagged score at the image's size and at half of it.

    Of a few tagged images, drawn by a fixed lot. ``None`` where the head gives a background map.
    """
    tagged = sorted((s for s in images if s.tags), key=lambda s: lot(s.id))[:count]
    column = {name: k for k, name in enumerate(images.classes)}
    joint = np.zeros((STEPS, STEPS), np.int64)
    with evaluating(predictor.model) as model:
        for sample in track(tagged, "two scales", len(tagged)):
            pixels = torch.from_numpy(read_image(sample.image, max_side=config.max_side))
            pixels = pixels.permute(2, 0, 1)[None].to(predictor.device)
            size = (
                -(-pixels.shape[-2] // config.stride),
                -(-pixels.shape[-1] // config.stride),
            )
            bins = []
            for scale in (1.0, 0.5):
                maps = multi_scale(
                    model,
                    pixels,
                    predictor.normalise,
                    scales=(scale,),
                    flip=True,
                    size=size,
                    head=config.head,
                )
                if maps.background is not None:
                    return None
                best = maps.scores[0][[column[tag] for tag in sample.tags or ()]].amax(0)
                bins.append((best * STEPS).long().clamp(max=STEPS - 1).cpu().numpy())
            joint += np.bincount((bins[0] * STEPS + bins[1]).ravel(), minlength=STEPS**2).reshape(
                STEPS, STEPS
            )
    return joint


def _ask(predictor: Predictor, images: Collection, scores: Path, number: int) -> np.ndarray | None:
    """What the classifier says to both sides of every fifth threshold."""
    column = {name: k for k, name in enumerate(images.classes)}
    chosen = np.random.default_rng(0).permutation(len(images))[:number]
    grid = GRID[5:75:5]
    kept, area = np.zeros(len(grid)), np.zeros(len(grid))
    with evaluating(predictor.model):
        for i in track(chosen, "network", len(chosen)):
            tags = [column[tag] for tag in images[int(i)].tags or ()]
            if not tags:
                continue
            image = read_image(images[int(i)].image, max_side=SIDE)
            seed = read_scores(scores_path(scores, images[int(i)].id)).resized(image.shape[:2])
            above = seed.best()[0] > grid[:, None, None]
            area += above.mean((1, 2))
            kept += _kept(predictor, image, above, tags)
    evidence = np.full(STEPS, -np.inf)
    evidence[5:75:5] = (kept - area) / max(1, len(chosen))
    return evidence if kept.any() else None


def _kept(
    predictor: Predictor, image: np.ndarray, above: np.ndarray, tags: Sequence[int]
) -> np.ndarray:
    """Probability of the tags with all but the foreground blurred, less that of the opposite."""
    blurred = cv2.GaussianBlur(image, (0, 0), image.shape[0] / 10)
    both = [np.where(side[..., None], image, blurred) for side in (*above, *~above)]
    found = []
    for batch in torch.from_numpy(np.stack(both)).permute(0, 3, 1, 2).split(8):
        logits = predictor.model(predictor.normalise(batch)).logits
        if logits is None:
            return np.zeros(len(above))
        found.append(logits.sigmoid()[:, list(tags)].mean(1))
    probability = torch.cat(found).numpy()
    return probability[: len(above)] - probability[len(above) :]


# --- rules ------------------------------------------------------------------------------------


def _agreement(joint: np.ndarray) -> ThresholdCurve | None:
    """The threshold at which the foregrounds of two scales agree best, beyond chance.

    At a threshold let a be the foreground's share of all pixels (the mean of both scales) and IoU
    that of the two foregrounds, over all images together. Two unrelated foregrounds of that share
    have ``chance = a / (2 - a)``; the criterion is ``-(IoU - chance) / (1 - chance)``. Maps of a
    network that knows whole objects agree up to high thresholds; where only the most telling part
    lights up, scales agree in the pale rest alone, and the threshold falls.

    Args:
        joint: (T, T) counts of pixels by best score at one scale (rows) and at another, T even bins
            over [0, 1].

    Returns:
        The threshold with its curve; ``None`` where there is no foreground at any threshold.
    """
    both = np.asarray(joint, np.float64) + np.asarray(joint, np.float64).T
    above = both[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1].diagonal()
    one = both.sum(1)[::-1].cumsum()[::-1]
    thresholds = np.arange(len(both)) / len(both)
    inside = np.flatnonzero((thresholds >= 0.05) & (thresholds < 0.75) & (one > 0))
    if not len(inside) or one[inside[0]] == both.sum():
        return None
    share = one[inside] / both.sum()
    iou = above[inside] / (2 * one[inside] - above[inside])
    chance = share / (2 - share)
    values = -(iou - chance) / np.maximum(1 - chance, 1e-9)
    return ThresholdCurve(float(thresholds[inside][values.argmin()]), thresholds[inside], values)


def _sides(seen: Seen) -> np.ndarray:
    """Share of the inner pixels above each threshold, less that of the border's."""
    inner, border = (v[::-1].cumsum()[::-1] / v.sum() for v in (seen.inner, seen.border))
    return inner - border


def _edge_strength(seen: Seen) -> np.ndarray:
    rare = seen.outline < 0.05 * seen.outline.max()
    with np.errstate(all="ignore"):
        return np.convolve(np.where(rare, 0, seen.edge / seen.outline), np.ones(3), "same")


def _stable(seen: Seen) -> np.ndarray:
    """Minus the relative loss of area around each threshold."""
    area = seen.histogram.reshape(-1)[::-1].cumsum()[::-1]
    area = np.interp(GRID, np.arange(BINS) / BINS, area)
    return np.convolve(np.gradient(np.log(np.maximum(area, 1))), np.ones(9), "same")


def _largest(values: np.ndarray, low: float = 0.05, high: float = 0.75) -> float:
    inside = (low <= GRID) & (high > GRID)
    return float(GRID[np.where(inside, values, -np.inf).argmax()])


CURVES: dict[str, tuple[str, Callable[[Seen], np.ndarray]]] = {
    "stable area": ("histogram", _stable),
    "centre against border": ("border", _sides),
    "colour edges": ("edge", _edge_strength),
    "classifier consistency": ("evidence", lambda seen: seen.evidence),
}
"""Rule -> what it has to compute, and a curve that is largest at its threshold."""


def _judge(
    images: Collection, scores: Path, run: Path | None, head: str | None, network: int
) -> list[dict[str, Any]]:
    swept = sweep(images.samples, scores, len(images.classes), STEPS)
    confusions = swept.confusions()
    oracle, best = swept.best()
    seen = _look(images, scores, run, head, network)
    reading = seen.seconds["histogram"]

    def row(rule: str, threshold: float | str, miou: float, looked: str | None) -> dict[str, Any]:
        return {
            "rule": rule,
            "threshold": threshold,
            "miou": miou,
            "oracle_threshold": oracle,
            "oracle_miou": best.miou,
            "gap": best.miou - miou,
            "passes": 0.0 if looked is None else seen.seconds[looked] / reading,
        }

    def at(threshold: float) -> float:
        return metrics(confusions[min(int(round(threshold * STEPS)), STEPS - 1)]).miou

    rows = [row(f"constant {value:g}", value, at(value), None) for value in CONSTANTS]
    for criterion in CRITERIA:
        curve = label_free_threshold(seen.histogram, criterion)
        assert curve is not None
        rows.append(row(criterion, curve.threshold, at(curve.threshold), "histogram"))
        rows.append(
            row(f"{criterion}, by class", "", _by_class(swept, seen, criterion), "histogram")
        )
    for rule, (looked, curve_of) in CURVES.items():
        if looked == "evidence" and seen.evidence is None:
            continue
        curve_values = curve_of(seen)
        if not np.any(np.isfinite(curve_values) & (curve_values != 0)):
            continue
        threshold = _largest(curve_values)
        rows.append(row(rule, threshold, at(threshold), looked))
    expected = label_free_threshold(seen.histogram, "expected-iou")
    found = {
        "colour contrast": ("spread", contrast_threshold(seen.spread)),
        "agreement with PAMR": ("refined", _agreement(seen.refined)),
        "agreement of scales": ("views", None if seen.views is None else _agreement(seen.views)),
    }
    for rule, (looked, curve) in found.items():
        if curve is None:
            continue
        rows.append(row(rule, curve.threshold, at(curve.threshold), looked))
        if looked == "views" and expected is not None:
            half = (curve.threshold + expected.threshold) / 2
            rows.append(row("expected-iou and scales, halfway", half, at(half), looked))
    rule = choose_rule(MasksConfig(), scores, images)
    assert rule.threshold is not None
    rows.append(row("auto", rule.threshold, at(rule.threshold), "spread"))
    return rows


def _by_class(swept: ThresholdSweep, seen: Seen, criterion: Any) -> float:
    whole = label_free_threshold(seen.histogram, criterion)
    assert whole is not None
    curves = [label_free_threshold(h, criterion) for h in seen.of_class]
    own = np.array([whole.threshold if c is None else c.threshold for c in curves])
    return metrics(swept.confusion(own)).miou


if __name__ == "__main__":
    main()
