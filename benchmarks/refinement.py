"""The refinement steps on shapes-v1: one row each in results/refinement.csv, and a picture.

    uv run python benchmarks/refinement.py --seed 0

The demo's CAM is trained once; every chain refines its seeds. Writes docs/images/refinement.png:
images of shapes-v1, their scores after each chain with a line where foreground begins, and the
mask that follows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pictures import draw, image_cell, mask_cell, scores_cells
from rows import append, commit, device

from weakseg.data.samples import Sample
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.report.pictures import choose
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import judge_masks, sweep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "refinement.csv"
PICTURE = HERE.parent / "docs" / "images" / "refinement.png"
CHAINS: dict[str, list[Any]] = {
    "seed": [],
    "PAMR": ["pamr"],
    "SCG": ["scg"],
    "SCG + PAMR": ["scg", "pamr"],
    "affinity walk": [{"affinity": {"train": {"epochs": 4, "crop": 112, "resize": [1.0, 1.48]}}}],
    "walk + CRF": [
        {"affinity": {"train": {"epochs": 4, "crop": 112, "resize": [1.0, 1.48]}}},
        "crf",
    ],
}
SHOWN = 6


def main() -> None:
    """Runs all chains, writes a row and a column of the picture for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    args = parser.parse_args()
    folder = args.out / f"cam-{args.seed}"
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[Sample] = []
    for name, chain in CHAINS.items():
        recipe = load_recipe(
            "demo",
            overrides={"refine": chain, "segmenter": {"enabled": False}},
            sets=[f"seed={args.seed}"],
        )
        run = RunFolder(run_recipe(recipe, folder, until="masks").folder)
        images = collect(recipe.data).split("train")
        samples = samples or choose(images, images.classes, SHOWN)
        columns.setdefault("image", [image_cell(s) for s in samples])
        columns[name] = scores_cells(run.scores_folder(recipe.steps), images, samples)
        _append(_row(run, recipe, name, args.seed))
    masks = run.stage_folder("masks") / "masks"
    columns["mask"] = [mask_cell(masks / f"{s.id}.png") for s in samples]
    columns["ground truth"] = [mask_cell(s.mask) for s in samples if s.mask is not None]
    draw(columns, PICTURE)


def _row(run: RunFolder, recipe: Recipe, name: str, seed: int) -> dict[str, Any]:
    images = collect(recipe.data).split("train")
    scores, classes = run.scores_folder(recipe.steps), len(images.classes)
    oracle, best = sweep(images.samples, scores, classes).best()
    masks = judge_masks(images.samples, run.stage_folder("masks") / "masks", classes).metrics
    rule = run.record("masks").results
    return {
        "chain": name,
        "seed": seed,
        "images": len(images),
        "oracle_threshold": round(oracle, 4),
        "oracle_miou": round(best.miou, 4),
        "rule": rule["rule"],
        "threshold": rule["threshold"],
        "miou": round(masks.miou, 4),
        "fp": round(masks.fp, 4),
        "fn": round(masks.fn, 4),
        "device": device(),
        "commit": commit(),
        "command": f"benchmarks/refinement.py --seed {seed}",
    }


def _append(row: dict[str, Any]) -> None:
    append(RESULTS, [row])
    print(row["chain"], row["oracle_miou"], row["miou"], row["fp"], row["fn"], file=sys.stderr)


if __name__ == "__main__":
    main()
