"""Quality on the VOC subset: one row for each stage and list, appended to results/quality.csv.

    uv run python benchmarks/quality.py --method cam --seeds 0 1 2 --out runs/quality
    uv run python benchmarks/quality.py --refine pamr scg scg,pamr affinity affinity,crf
    uv run python benchmarks/quality.py --recipe default/cpu --seeds 0

The ``cpu`` budget is that of docs/architecture.md: resnet18, crop 192, batch 16; a CAM warm-up of
10,000 image steps, made once per seed and shared by all methods, then 6,000 image steps of the
method; seeds at scales {1, 0.5} + flip on images of at most 256 px; a segmenter of 6,000 image
steps. With --refine, chains of steps are run on the seeds of such a run instead (``none`` leaves the
seeds as they are), and masks are made of their scores, without a segmenter. Interrupted runs go on.
Masks of the subset are opened by the evaluation alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rows import append, commit, device

from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import STAGES, RunFolder

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.csv"
COLUMNS = [
    "budget",
    "supervision",
    "data",
    "list",
    "method",
    "variant",
    "backbone",
    "crop",
    "steps",
    "batch",
    "seed",
    "stage",
    "head",
    "scales",
    "crf",
    "tags",
    "images",
    "rule",
    "threshold",
    "miou",
    "fp",
    "fn",
    "precision",
    "recall",
    "f1",
    "active_steps",
    "seconds",
    "device",
    "commit",
    "command",
]

BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "backbone": "resnet18",
        "warmup_steps": 625,
        "train": {"steps": 375, "crop": 192, "batch": 16},
        "seeds": {"scales": [1, 0.5], "flip": True, "max_side": 256},
        "segmenter": {"train": {"steps": 375, "crop": 192, "batch": 16, "resize": [0.75, 1.75]}},
        "steps": {
            "affinity": {
                "labels": {"max_side": 256},
                "train": {"steps": 240, "crop": 256, "batch": 16},
            },
        },
        "method": {
            "recurseed": {"channels": 128},
            "acr": {"width": 16, "detail": 2},
        },
        "predict": {"max_side": 256},
        "lists": ("report_320", "val_160"),
    },
    "gpu": {
        "backbone": "resnet50",
        "warmup_steps": 800,
        "train": {"steps": 800, "crop": 512, "batch": 16},
        "seeds": {"scales": [1, 0.5, 1.5, 2], "flip": True},
        "segmenter": {"train": {"steps": 4000, "crop": 512, "batch": 16}},
        "steps": {"affinity": {"train": {"epochs": 3, "crop": 512, "batch": 32}}},
        "method": {},
        "predict": {},
        "lists": ("report_320", "val_160"),
    },
}


def main() -> None:
    """Runs the budget for each seed."""
    args = _arguments()
    for seed in args.seeds:
        if args.recipe:
            recipe = _shipped(args, seed)
            folder = (
                args.out
                / f"{args.recipe.replace('/', '-')}{args.variant and '-' + args.variant}-{seed}"
            )
            run_recipe(recipe, folder)
            _append(_rows(args, recipe, RunFolder(folder), seed))
            continue
        folder = (
            args.out / f"{args.budget}-{args.method}{args.variant and '-' + args.variant}-{seed}"
        )
        warm = args.out / f"{args.budget}-warmup-{seed}"
        run_recipe(_recipe(args, seed, None), warm, until="train")
        recipe = _recipe(args, seed, warm)
        if not args.refine:
            run_recipe(recipe, folder)
            _append(_rows(args, recipe, RunFolder(folder), seed))
            continue
        run_recipe(recipe, folder, until="seeds")
        for chain in args.refine:
            branch = _branch(folder)
            recipe = _recipe(args, seed, warm, () if chain == "none" else tuple(chain.split(",")))
            run_recipe(recipe, branch)
            _append(_rows(args, recipe, RunFolder(branch), seed))


def _branch(folder: Path) -> Path:
    """A run that shares the classifier and its seeds with another, and refines them."""
    branch = folder.with_name(f"{folder.name}-refine")
    for part in ("recipe.yaml", "1-check", "2-train", "3-seeds"):
        if not (branch / part).exists():
            branch.mkdir(exist_ok=True)
            source = folder / part
            if source.is_file():
                shutil.copy(source, branch / part)
            else:
                shutil.copytree(source, branch / part, copy_function=os.link)
    return branch


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", default="cam")
    parser.add_argument("--variant", default="", help="name of the settings given with --set")
    parser.add_argument(
        "--refine", nargs="+", default=[], help="chains such as scg,pamr; none = the seeds"
    )
    parser.add_argument("--recipe", help="a shipped recipe as it is, such as default/cpu")
    parser.add_argument("--lists", nargs="+", default=None, help="default: those of the budget")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--voc", type=Path, default=HERE / "../../shared/data/voc2012-subset")
    parser.add_argument("--weights", type=Path, default=HERE / "../../shared/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--set", dest="sets", action="append", default=[])
    return parser.parse_args()


def _recipe(
    args: argparse.Namespace, seed: int, warm: Path | None, steps: tuple[str, ...] = ()
) -> Recipe:
    budget, voc = BUDGETS[args.budget], args.voc.resolve()
    lists = voc / "ImageSets" / "Segmentation"
    train = dict(budget["train"])
    method = args.method if warm is not None else "cam"
    if warm is None:
        train["steps"] = budget["warmup_steps"]
    else:
        train["init_from"] = str(warm)
    values = {
        "seed": seed,
        "data": {
            "root": str(voc / "JPEGImages"),
            "labels": str(voc / "labels.csv"),
            "masks": str(voc / "SegmentationClass"),
        },
        "method": {"name": method, **budget["method"].get(method.partition("+")[0], {})},
        "backbone": {
            "name": budget["backbone"],
            "weights": str(args.weights.resolve() / f"{budget['backbone']}.safetensors"),
        },
        "train": train,
        "seeds": budget["seeds"],
        "refine": [{step: budget["steps"].get(step)} for step in steps],
        "segmenter": budget["segmenter"] | {"enabled": False if args.refine else None},
        "predict": budget["predict"],
        "evaluate": {"lists": {name: str(lists / f"{name}.txt") for name in _lists(args)}},
    }
    return load_recipe(values, sets=args.sets if warm is not None else ())


def _shipped(args: argparse.Namespace, seed: int) -> Recipe:
    """A shipped recipe on the VOC subset, with the lists of the photo budget."""
    voc = args.voc.resolve()
    lists = voc / "ImageSets" / "Segmentation"
    over = {
        "seed": seed,
        "data": {
            "root": str(voc / "JPEGImages"),
            "labels": str(voc / "labels.csv"),
            "masks": str(voc / "SegmentationClass"),
        },
        "evaluate": {"lists": {name: str(lists / f"{name}.txt") for name in _lists(args)}},
    }
    return load_recipe(args.recipe, overrides=over, sets=args.sets)


def _rows(
    args: argparse.Namespace, recipe: Recipe, run: RunFolder, seed: int
) -> list[dict[str, Any]]:
    found = json.loads((run.stage_folder("evaluate") / "results.json").read_text())["rows"]
    trained = run.record("train")
    common = {
        "budget": args.recipe or args.budget,
        "supervision": "tags",
        "data": "VOC subset",
        "method": recipe.method["name"],
        "variant": args.variant or "+".join(recipe.steps),
        "backbone": recipe.backbone.name,
        "crop": recipe.train.crop,
        "batch": recipe.train.batch,
        "seed": seed,
        "active_steps": " ".join(f"{k}:{n}" for k, n in trained.results["active_steps"].items()),
        "device": device(),
        "commit": commit(),
        "command": "benchmarks/quality.py " + _portable(args),
    }
    last = {"seed": "seeds", "mask": "masks", "segmenter": "predict"}
    rows = []
    for row in found:
        if row["split"] not in _lists(args):
            continue
        if (
            not args.recipe
            and recipe.steps
            and row["stage"] not in ("mask", "refined: " + " + ".join(recipe.steps))
        ):
            continue  # the scores before have rows of their own chain
        training = recipe.segmenter.train if row["stage"] == "segmenter" else recipe.train
        scales = " ".join(f"{s:g}" for s in row["scales"]) + (" flip" if row["flip"] else "")
        seconds = sum(
            r.seconds for r in map(run.record, _until(last.get(row["stage"], "refine"))) if r
        )
        rows.append(
            common
            | {k: row[k] for k in ("stage", "head", "crf", "tags", "images", "rule")}
            | {
                k: "" if row[k] is None else round(row[k], 4)
                for k in ("threshold", "miou", "fp", "fn", "precision", "recall", "f1")
            }
            | {
                "list": row["split"],
                "steps": training.steps or trained.results["steps"],
                "scales": scales,
                "seconds": round(seconds),
            }
        )
    return rows


def _lists(args: argparse.Namespace) -> tuple[str, ...]:
    shipped = ("report_320", "tune_320", "val_160")
    return tuple(args.lists or (shipped if args.recipe else BUDGETS[args.budget]["lists"]))


def _until(stage: str) -> tuple[str, ...]:
    return STAGES[1 : STAGES.index(stage) + 1]


def _portable(args: argparse.Namespace) -> str:
    what = (
        f"--recipe {args.recipe}"
        if args.recipe
        else f"--method {args.method} --budget {args.budget}"
    )
    parts = [f"{what} --seeds {' '.join(map(str, args.seeds))}"]
    parts += [f"--refine {' '.join(args.refine)}"] if args.refine else []
    parts += [f"--lists {' '.join(args.lists)}"] if args.lists else []
    parts += [f"--variant {args.variant}"] if args.variant else []
    return " ".join(parts + [f"--set {s}" for s in args.sets])


def _append(rows: list[dict[str, Any]]) -> None:
    append(RESULTS, [{key: row[key] for key in COLUMNS} for row in rows])
    for row in rows:
        print(
            row["list"], row["stage"], row["rule"], row["threshold"], row["miou"], file=sys.stderr
        )


if __name__ == "__main__":
    main()
