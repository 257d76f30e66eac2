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

import cv2
import numpy as np
from rows import append, commit, device

from weakseg.data.images import read_image, read_mask, voc_palette
from weakseg.data.samples import Sample
from weakseg.data.scorefile import read_scores
from weakseg.pipeline import run_recipe
from weakseg.recipe import MasksConfig, Recipe, load_recipe
from weakseg.report.pictures import choose
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import judge_masks, sweep
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.seeds import scores_path

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
SIDE = 128


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
        columns.setdefault("image", [_image(s) for s in samples])
        columns[name] = [_scores(run, recipe, s) for s in samples]
        _append(_row(run, recipe, name, args.seed))
    columns["mask"] = [_mask(run.stage_folder("masks") / "masks" / f"{s.id}.png") for s in samples]
    columns["ground truth"] = [_mask(s.mask) for s in samples if s.mask is not None]
    _draw(columns)


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


def _image(sample: Sample) -> np.ndarray:
    return cv2.resize(read_image(sample.image), (SIDE, SIDE))


def _scores(run: RunFolder, recipe: Recipe, sample: Sample) -> np.ndarray:
    """The best score as a heat map over the dimmed image, foreground outlined."""
    folder = run.scores_folder(recipe.steps)
    rule = choose_rule(MasksConfig(), folder, collect(recipe.data).split("train"))
    seed = read_scores(scores_path(folder, sample.id))
    best, _ = seed.full_size().best()
    heat = cv2.applyColorMap(np.rint(best * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    gray = cv2.cvtColor(
        cv2.cvtColor(read_image(sample.image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB
    )
    picture = np.ascontiguousarray(cv2.addWeighted(heat, 0.8, gray, 0.25, 0))
    foreground = (label(seed, rule.threshold) > 0).astype(np.uint8)
    edges, _ = cv2.findContours(foreground, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.resize(cv2.drawContours(picture, edges, -1, (255, 255, 255), 1), (SIDE, SIDE))


def _mask(path: Path) -> np.ndarray:
    colours = voc_palette()[read_mask(path)]
    return cv2.resize(colours, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


def _draw(columns: dict[str, list[np.ndarray]]) -> None:
    gap, head = 6, 22
    rows = max(map(len, columns.values()))
    canvas = np.full(
        (head + rows * (SIDE + gap), len(columns) * (SIDE + gap) - gap, 3), 255, np.uint8
    )
    for x, (name, cells) in enumerate(columns.items()):
        left = x * (SIDE + gap)
        cv2.putText(
            canvas, name, (left + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40,) * 3, 1, cv2.LINE_AA
        )
        for y, cell in enumerate(cells):
            top = head + y * (SIDE + gap)
            canvas[top : top + SIDE, left : left + SIDE] = cell
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(PICTURE), canvas[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
