"""What plain CAM gets wrong on shapes-v1, on training images and on a held-out seed of the generator.

    uv run python benchmarks/shapes.py --seeds 0 1 2

One row per seed and set in results/shapes.csv: oracle and label-free mIoU of the seeds, recall of
the shared bodies and of the heads at the oracle threshold, and the false-positive rate of the
class that suffers most from its context.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rows import append, commit, device

from weakseg.data.drawing import CLASSES, VERSION, draw
from weakseg.data.samples import Collection
from weakseg.data.scorefile import read_scores
from weakseg.export.model import load
from weakseg.ops import metrics
from weakseg.pipeline import run_recipe
from weakseg.recipe import MasksConfig, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import sweep
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.seeds import classification_f1, make_seeds, scores_path

RESULTS = Path(__file__).parent / "results" / "shapes.csv"
HELD_OUT = 1  # seed of the generator; the demo trains on 0


def main() -> None:
    """Trains the demo's CAM for each seed and looks at its seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    args = parser.parse_args()
    for seed in args.seeds:
        recipe = load_recipe("demo", sets=[f"seed={seed}", "segmenter.enabled=false"])
        run = RunFolder(run_recipe(recipe, args.out / f"cam-{seed}", until="seeds").folder)
        train = collect(recipe.data).split("train")
        _append(seed, "train", 0, train, run.stage_folder("seeds") / "scores")
        unseen = load_recipe("demo", sets=[f"data.options.seed={HELD_OUT}"])
        held_out, scores = collect(unseen.data).split("train"), run.path / "held-out"
        make_seeds(load(run.path), held_out, recipe.seeds, scores)
        _append(seed, "held-out", HELD_OUT, held_out, scores)


def _append(seed: int, name: str, generator: int, images: Collection, scores: Path) -> None:
    swept = sweep(images.samples, scores, len(CLASSES))
    threshold, best = swept.best()
    rule = choose_rule(MasksConfig(), scores, images)
    ours = metrics(swept.confusions()[int(np.abs(swept.thresholds - rule.threshold).argmin())])
    body, head = _part_recall(generator, images, scores, threshold)
    worst = int(np.nanargmax(best.class_fp[1:])) + 1
    row: dict[str, Any] = {
        "data": VERSION,
        "set": name,
        "images": len(images),
        "seed": seed,
        "f1": classification_f1(images, scores),
        "oracle_threshold": threshold,
        "oracle_miou": best.miou,
        "label_free_threshold": rule.threshold,
        "label_free_miou": ours.miou,
        "body_recall": body,
        "head_recall": head,
        "worst_context": CLASSES[worst - 1],
        "worst_fp": best.class_fp[worst],
        "device": device(),
        "commit": commit(),
        "command": f"benchmarks/shapes.py --seeds {seed}",
    }
    append(RESULTS, [row])
    print(row, file=sys.stderr)


def _part_recall(
    generator: int, images: Collection, scores: Path, threshold: float
) -> tuple[float, float]:
    """Share of body and of head pixels that are labelled as their object's class."""
    hit, all_of = np.zeros(3), np.zeros(3)
    for index, sample in enumerate(images):
        drawing = draw(generator, index)
        mask = label(read_scores(scores_path(scores, sample.id)), threshold)
        right = mask == drawing.mask
        for part in (1, 2):
            hit[part] += (right & (drawing.parts == part)).sum()
            all_of[part] += (drawing.parts == part).sum()
    return float(hit[1] / all_of[1]), float(hit[2] / all_of[2])


if __name__ == "__main__":
    main()
