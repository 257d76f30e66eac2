"""All methods on the VOC subset, from finished runs and by today's rules: rows in results/voc.csv.

    uv run python benchmarks/voc.py

``quality.py`` trained each method for 6,000 image steps from one CAM (``cpu`` budget). Here the masks
that follow from their scores are judged with today's label-free threshold, on ``tune_320``, where
defaults may be chosen, and on ``report_320``; the segmenters that were trained behind some of them
on ``val_160`` too. Nothing is trained. A run that is not there is left out.

The runs in runs/segmenters were started from the scores of a run in runs/quality (``seeds.given``),
with the steps and the segmenter of the budget.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from judge import judge
from rows import append, commit, device

from weakseg.data.samples import Collection
from weakseg.estimate import step_seconds
from weakseg.recipe import load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import judge_masks

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "voc.csv"
VOC = HERE / "../../shared/data/voc2012-subset"
LISTS = ("tune_320", "report_320")


class Row(NamedTuple):
    """Where a line of the table comes from: folders below runs/."""

    scores: str
    trained: str  # the run whose training made the classifier
    segmenter: str = ""  # the run whose predictions are those of the line


RUNS = {
    "cam": Row("quality/cpu-cam-0/3-seeds", "quality/cpu-cam-0", "quality/cpu-cam-0"),
    "puzzle": Row("quality/cpu-puzzle-alpha-0.5-0-refine/3-seeds", "quality/cpu-puzzle-alpha-0.5-0-refine"),
    "seam": Row("quality/cpu-seam-0-refine/3-seeds", "quality/cpu-seam-0-refine"),
    "acr, 200 steps": Row("quality/cpu-acr-200 steps-0/3-seeds", "quality/cpu-acr-200 steps-0"),
    "recurseed": Row("quality/cpu-recurseed-0/3-seeds", "quality/cpu-recurseed-0", "quality/cpu-recurseed-0"),
    "recurseed+edgepredictmix": Row(
        "quality/cpu-recurseed+edgepredictmix-0/3-seeds",
        "quality/cpu-recurseed+edgepredictmix-0",
        "quality/cpu-recurseed+edgepredictmix-0",
    ),
    "cam + pamr": Row("segmenters/cam+pamr-0/4-refine/1-pamr", "quality/cpu-cam-0"),
    "cam + scg + pamr": Row("quality/cpu-cam-0-refine/4-refine/2-pamr", "quality/cpu-cam-0"),
    "cam + walk": Row("segmenters/cam+walk-0/4-refine/1-affinity", "quality/cpu-cam-0", "segmenters/cam+walk-0"),
    "recurseed + segmenter": Row(
        "quality/cpu-recurseed-0/3-seeds", "quality/cpu-recurseed-0", "segmenters/recurseed-0"
    ),
}  # fmt: skip


def main() -> None:
    """One row for each line and list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    images = _images()
    kept = {n: args.runs / RUNS[n].trained / "recipe.yaml" for n in {"cam", *args.methods}}
    recipes = {name: load_recipe(file) for name, file in kept.items() if file.is_file()}
    seconds = step_seconds(recipes, len(images.classes))
    for name in args.methods:
        row = RUNS[name]
        scores = args.runs / row.scores / "scores"
        if not scores.is_dir():
            print(f"{name}: no {scores}", file=sys.stderr)
            continue
        cost = seconds[name] / seconds["cam"]
        for of in LISTS:
            found = judge(_part(images, of), scores) | {"step_cost": cost}
            _append(args, name, row, of, "mask", found)
        predictions = RunFolder(args.runs / row.segmenter).stage_folder("predict") / "masks"
        for of in (*LISTS, "val_160") if row.segmenter and predictions.is_dir() else ():
            part = _part(images, of)
            found = judge_masks(part.samples, predictions, len(part.classes)).metrics
            numbers = {"miou": found.miou, "fp": found.fp, "fn": found.fn, "step_cost": cost}
            _append(args, name, row, of, "segmenter", numbers)


def _images() -> Collection:
    data = {"root": str(VOC / "JPEGImages"), "labels": str(VOC / "labels.csv")}
    data["masks"] = str(VOC / "SegmentationClass")
    return collect(load_recipe({"data": data}).data)


def _part(images: Collection, of: str) -> Collection:
    text = (VOC / "ImageSets" / "Segmentation" / f"{of}.txt").read_text(encoding="utf-8")
    return images.only(text.split())


def _append(
    args: argparse.Namespace, name: str, row: Row, of: str, stage: str, found: dict[str, Any]
) -> None:
    trained = RunFolder(args.runs / row.trained).record("train")
    assert trained is not None
    keys = ("f1", "oracle_miou", "threshold", "miou", "fp", "fn", "step_cost")
    values = {
        "method": name,
        "seed": trained.seed,
        "steps": trained.results["steps"],
        "list": of,
        "stage": stage,
        **{key: found.get(key, "") for key in keys},
        "train_seconds": round(trained.seconds),
        "device": device(),
        "commit": commit(),
        "command": f"benchmarks/voc.py --methods '{name}'",
    }
    append(RESULTS, [values])
    print(name, of, stage, values["oracle_miou"], values["miou"], file=sys.stderr)


if __name__ == "__main__":
    main()
