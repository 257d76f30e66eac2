"""RecurSeed by epoch: does the recursion lower misses and false alarms? Rows in results/recurseed.csv.

    uv run python benchmarks/recurseed.py --variants recurseed recurseed+edgepredictmix --seeds 0 1 2
    uv run python benchmarks/recurseed.py --run runs/quality/cpu-recurseed-long-0
    uv run python benchmarks/recurseed.py --picture

Trainings of benchmarks/methods.py, or a run of benchmarks/quality.py whose ``train.snapshot_every``
was set: both heads are judged at each snapshot, on 125 of the training images of shapes-v1, or on
the ``tune_320`` list of the VOC subset. Tags given, one scale and flip, no CRF; the decoder's masks
are its most probable classes, the CAM's are those of the best threshold (oracle) and the label-free
one. --picture draws docs/images/recurseed-*.svg from the rows.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from judge import judge
from rows import append, commit, device
from safetensors.torch import load_file

from methods import VARIANTS, folder_of, recipe_of
from weakseg.data.drawing import VERSION
from weakseg.data.samples import Collection
from weakseg.export.model import load
from weakseg.inference import Predictor
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.report.charts import Series, line_chart
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.evaluate import read_list
from weakseg.stages.seeds import make_seeds

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recurseed.csv"
IMAGES = HERE.parent / "docs" / "images"
COUNT = 125
_STYLE = (
    "text{font:13px sans-serif;fill:#444}.grid{stroke:#ddd}.axis{stroke:#888}"
    ".line{fill:none;stroke-width:2.2}.s0{stroke:#1f6feb}.s1{stroke:#d1622b}"
    ".hit{fill:transparent}"
)


def main() -> None:
    """Trains what is not trained yet, and judges each snapshot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["recurseed"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--run", type=Path, help="a run on the VOC subset, instead of shapes-v1")
    parser.add_argument("--list", type=Path, help="ids to judge --run on; default tune_320")
    parser.add_argument("--every", type=int, default=1, help="judge every n-th of the list")
    parser.add_argument("--picture", action="store_true", help="draw, and measure nothing")
    args = parser.parse_args()
    if args.picture:
        _pictures()
        return
    if args.run:
        recipe = load_recipe(args.run / "recipe.yaml")
        images = collect(recipe.data)
        path = (
            args.list or Path(str(recipe.data.masks)).parent / "ImageSets/Segmentation/tune_320.txt"
        )
        images = images.only(read_list(path)[:: args.every])
        command = f"--run {args.run} --every {args.every}"
        _judge(args.run, recipe, images, recipe.method["name"], "VOC subset", command)
        return
    for seed in args.seeds:
        for variant in args.variants:
            recipe = recipe_of(seed, VARIANTS[variant], args.out / f"warmup-{seed}")
            folder = folder_of(args.out, variant, seed)
            run_recipe(recipe, folder, until="train")
            images = collect(recipe.data).split("train")
            images = images.only([s.id for s in images][:COUNT])
            command = f"--variants '{variant}' --seeds {seed}"
            _judge(folder, recipe, images, variant, VERSION, command)


def snapshots(folder: Path) -> Iterator[tuple[int, Predictor]]:
    """The network at each snapshot."""
    predictor = load(RunFolder(folder).stage_folder("train"))
    for path in sorted(
        (RunFolder(folder).stage_folder("train") / "snapshots").glob("*.safetensors")
    ):
        predictor.model.load_state_dict(load_file(path))
        yield int(path.stem), predictor


def _judge(
    folder: Path, recipe: Recipe, images: Collection, variant: str, data: str, command: str
) -> None:
    seeds = recipe.seeds.model_copy(update={"scales": (1.0,), "stride": 4})
    for step, predictor in snapshots(folder):
        for head in predictor.model.heads:
            with tempfile.TemporaryDirectory() as scores:
                wanted = seeds.model_copy(update={"head": head})
                make_seeds(predictor, images, wanted, Path(scores))
                found = judge(images, Path(scores))
            row = {
                "data": data,
                "images": len(images),
                "variant": variant,
                "seed": recipe.seed,
                "steps": recipe.train.steps,
                "step": step,
                "epoch": step * recipe.train.batch / len(collect(recipe.data).split("train")),
                "head": head,
                **found,
                "device": device(),
                "commit": commit(),
                "command": f"benchmarks/recurseed.py {command}",
            }
            append(RESULTS, [row])
            print(variant, step, head, row["oracle_miou"], row["miou"], file=sys.stderr)


def _pictures() -> None:
    """Curves of every variant and data set that has rows."""
    for (data, variant), rows in _latest(RESULTS).items():
        name = f"{variant}-{'shapes' if data == VERSION else 'voc'}".replace("+", "-")
        curves = {}
        for number, what in (("miou", "mIoU"), ("fp", "FP rate"), ("fn", "FN rate")):
            # Of the CAM at its best threshold (oracle), so that no rule stands between it and us.
            lines = {"decoder": number, "cam": f"oracle_{number}"}
            curves[what] = [Series(head, _mean(rows[head], key)) for head, key in lines.items()]
        _draw_curves(curves, IMAGES / f"recurseed-curves-{name.removeprefix('recurseed-')}.svg")


def _latest(path: Path) -> dict[tuple[str, str], dict[str, list[dict[str, str]]]]:
    """Rows by data and variant, then by head; the last one of each seed and step."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = {
            (r["data"], r["variant"], r["head"], r["seed"], r["step"]): r
            for r in csv.DictReader(file)
        }
    groups: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for (data, variant, head, *_), row in rows.items():
        groups.setdefault((data, variant), {}).setdefault(head, []).append(row)
    return groups


def _mean(rows: list[dict[str, str]], key: str) -> list[tuple[float, float]]:
    """Mean over seeds at each epoch."""
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(float(row["epoch"]), []).append(float(row[key]))
    return [(epoch, float(np.mean(values))) for epoch, values in sorted(at.items())]


def _draw_curves(curves: dict[str, list[Series]], path: Path) -> None:
    """Charts side by side in one SVG that needs no page around it."""
    parts = []
    for i, (what, series) in enumerate(curves.items()):
        chart = line_chart(series, x_label="epoch", y_label=what, percent=True)
        place = f'<svg x="{470 * i}" y="0" width="460" height="250" '
        parts.append(str(chart).replace("<svg ", place, 1))
    names = [series.name for series in next(iter(curves.values()))]
    for i, name in enumerate(names):
        parts.append(
            f'<line class="line s{i}" x1="{60 + 110 * i}" x2="{84 + 110 * i}" y1="264" y2="264"/>'
            f'<text class="lab" x="{90 + 110 * i}" y="268">{name}</text>'
        )
    width = 470 * len(curves) - 10
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 276">'
        f"<style>{_STYLE}</style><rect width='{width}' height='276' fill='#fff'/>"
        f"{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
