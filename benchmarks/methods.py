"""Methods and their ablations on shapes-v1, at equal image steps: rows in results/methods.csv.

    uv run python benchmarks/methods.py --variants cam puzzle seam --seeds 0 1 2

The demo's network is first trained as a CAM for 496 steps (once per seed, shared by all), then each
variant trains on from there for 310 steps, CAM included, with frozen BatchNorm; mctformer and acr+vit
go on from an MCTformer of as many steps on a small transformer from scratch. Seeds are made on the
500 training images, on which defaults were chosen, and on 500 of another seed of the generator.
``equivariance`` is the mean difference between a map and the map of the half-sized image, both
min-max-normalised, over tagged maps. Interrupted runs go on. gallery.py draws pictures from them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import judge
from rows import append, commit, device

from weakseg.data.drawing import VERSION
from weakseg.data.images import read_image
from weakseg.data.samples import Collection
from weakseg.export.model import load
from weakseg.inference import Predictor, evaluating
from weakseg.mixing import mixes
from weakseg.ops import Cells, View, normalise_min_max
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.seeds import make_seeds

RESULTS = Path(__file__).parent / "results" / "methods.csv"
HELD_OUT = 1  # seed of the generator; the demo trains on 0

LEARNED = {"name": "seam", "keys": "learned"}
CODE = {"keys": "published", "levels": [-3, -2], "power": 1, "rivals": "all", "minimum": 1}
RECURSEED = {"name": "recurseed", "channels": 48}
ACR = {"name": "acr", "width": 16, "detail": 2, "dropout": 0}
MCTFORMER = {"name": "mctformer", "layers": 4, "root": True, "affinity": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "cam": {"name": "cam"},
    "puzzle": {"name": "puzzle", "alpha": 4},
    "puzzle: cls": {"name": "puzzle", "p_cls": 0, "alpha": 0},
    "puzzle: cls, p-cls": {"name": "puzzle", "alpha": 0},
    "puzzle: cls, re": {"name": "puzzle", "p_cls": 0, "alpha": 4},
    "puzzle: alpha .5": {"name": "puzzle", "alpha": 0.5},
    "seam": {"name": "seam"},
    "seam: cls": {"name": "seam", "pcm": False, "er": 0},
    "seam: cls, er": {"name": "seam", "pcm": False},
    "seam: cls, pcm": {"name": "seam", "er": 0},
    "seam: learned keys, ecr": LEARNED,
    "seam: learned keys, ecr without selection": LEARNED | {"top": 1},
    "seam: published pcm": {"name": "seam", **CODE},
    "seam: scale .5": {"name": "seam", "scale": 0.5},
    "seam: scale, flip": {"name": "seam", "flip": True},
    "seam: scale, rotation": {"name": "seam", "rotation": 20},
    "seam: scale, translation": {"name": "seam", "translation": 0.05},
    "seam: flip": {"name": "seam", "scale": 1, "flip": True},
    "seam: all": {"name": "seam", "flip": True, "rotation": 20, "translation": 0.05},
    "acr": ACR,
    "acr: without t": ACR | {"t": 0},
    "acr: without nt": ACR | {"nt": 0},
    "acr: baseline": ACR | {"strategy": "baseline"},
    "acr: pretrained": ACR | {"strategy": "pretrained", "srf": False},
    "acr: pretrained, srf": ACR | {"strategy": "pretrained"},
    "acr: adversarial": ACR | {"srf": False},
    "mctformer": MCTFORMER,
    "mctformer: norm": MCTFORMER | {"norm": True},
    "mctformer: affinity": MCTFORMER | {"affinity": True},
    "acr+vit": ACR | {"name": "acr+vit", "classifier": MCTFORMER},
    "recurseed": RECURSEED,
    "recurseed: without scg": RECURSEED | {"scg": False},
    "recurseed: without pamr": RECURSEED | {"pamr": False},
    "recurseed: without scg, pamr": RECURSEED | {"scg": False, "pamr": False},
    "recurseed: without rec": RECURSEED | {"rec": 0},
    "recurseed: plain form": RECURSEED
    | {"renormalise": False, "balance": False, "among": "all", "distance": "l1"},
    "recurseed+edgepredictmix: predicted below": RECURSEED
    | {"name": "recurseed+edgepredictmix", "mix": {"below": "predicted"}},
    **{f"recurseed+{mix}": RECURSEED | {"name": f"recurseed+{mix}"} for mix in mixes},
}


TRANSFORMERS = {
    "mctformer": MCTFORMER,
    "mctformer: norm": MCTFORMER | {"norm": True},
    "mctformer: affinity": MCTFORMER,
    "acr+vit": MCTFORMER,
}
"""They go on from such an MCTformer on a network of their own, instead of the CAM."""
VIT = {
    "name": "vit_tiny_r_s16_p8_224",  # patches of 2 cells of a convolutional stem of stride 4
    "pretrained": False,
    "output_stride": 8,
    "options": {
        "img_size": 128,
        "patch_size": 2,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "init_values": 0.05,
    },
}


def main() -> None:
    """Trains each variant for each seed and looks at its seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["cam", "puzzle", "seam"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--name", default="", help="name of the settings given with --set")
    parser.add_argument(
        "--on", nargs="+", choices=("train", "held-out"), default=["train", "held-out"]
    )
    args = parser.parse_args()
    for seed in args.seeds:
        for variant in args.variants:
            start = TRANSFORMERS.get(variant)
            kind = "" if start is None else "vit-norm-" if start.get("norm") else "vit-"
            warm = args.out / f"warmup-{kind}{seed}"
            run_recipe(recipe_of(seed, start=start), warm, until="train")
            name = variant + (f" ({args.name})" if args.name else "")
            folder = folder_of(args.out, name, seed)
            recipe = recipe_of(seed, VARIANTS[variant], warm, args.sets, start)
            last = "seeds" if "train" in args.on else "train"
            run = RunFolder(run_recipe(recipe, folder, until=last).folder)
            command = f"benchmarks/methods.py --variants '{variant}' --seeds {seed}"
            command += "".join(f" --set {s}" for s in args.sets)
            for images in args.on:
                _measure(run, recipe, name, images, command)


def recipe_of(
    seed: int,
    method: dict[str, Any] | None = None,
    warm: Path | None = None,
    sets: list[str] | None = None,
    start: dict[str, Any] | None = None,
) -> Recipe:
    """The demo, or a training that goes on from it; ``start`` is the method of a transformer's."""
    demo = load_recipe("demo").model_dump(mode="json")
    demo |= {"seed": seed, "segmenter": {"enabled": False}}
    demo["train"] |= {"crop": 128, "resize": [0.875, 1.3], "snapshot_every": 31}  # an epoch
    if start is not None:
        demo |= {"method": start, "backbone": VIT}
        demo["train"] |= {"lr": 0.002, "weight_decay": 0.05, "clip": 1.0}
    if method is not None:
        demo["method"] = method
        demo["backbone"] = demo["backbone"] | {"norm": "frozen"}
        demo["train"] |= {"init_from": str(warm), "steps": 310, "lr": 0.002, "warmup": 0.1}
    return load_recipe(demo, sets=sets or [])


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-{seed}"


def _measure(run: RunFolder, recipe: Recipe, name: str, on: str, command: str) -> None:
    """One row for each head of the trained network."""
    options = {} if on == "train" else {"data": {"options": {"seed": HELD_OUT}}}
    images = collect(load_recipe("demo", overrides=options).data).split("train")
    predictor = load(run.path)
    trained = run.record("train")
    assert trained is not None
    for head in predictor.model.heads:
        scores = run.stage_folder("seeds") / "scores"
        if on != "train" or head != predictor.model.heads[0]:
            # Of this very network: a run that was trained again must not meet its old seeds.
            scores = run.path / f"{on}-{head}-{trained.fingerprint[:8]}"
            make_seeds(predictor, images, recipe.seeds.model_copy(update={"head": head}), scores)
        row = {
            "data": VERSION,
            "set": on,
            "images": len(images),
            "variant": name,
            "head": head,
            "seed": recipe.seed,
            "steps": recipe.train.steps,
            "batch": recipe.train.batch,
            **judge(images, scores),
            "equivariance": "" if head == "decoder" else _equivariance(predictor, images, head),
            "seconds": trained.seconds,
            "device": device(),
            "commit": commit(),
            "command": command,
        }
        append(RESULTS, [row])
        print(name, head, row["oracle_miou"], row["miou"], row["f1"], file=sys.stderr)


def _equivariance(predictor: Predictor, images: Collection, head: str, count: int = 100) -> float:
    """Mean |cam(x) - back(cam(A(x)))| of tagged maps, A halving the image."""
    tags = torch.from_numpy(images.tag_matrix()[:count]).bool()
    pixels = np.stack([read_image(s.image) for s in images.samples[:count]])
    batch = predictor.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    size = batch.shape[-1]
    view = View(size // 2)
    with evaluating(predictor.model) as model:
        whole, part = model(batch, head), model(view.of(batch), head)
    own, seen = (
        maps.cells or Cells.spanning((side, side), (maps.scores.shape[-2], maps.scores.shape[-1]))
        for maps, side in ((whole, size), (part, size // 2))
    )
    scores = normalise_min_max(whole.scores.relu())
    found, _ = view.back(
        normalise_min_max(part.scores.relu()),
        size,
        (scores.shape[-2], scores.shape[-1]),
        seen.stride[0],
        (own.offset[0], seen.offset[0]),
    )
    return (scores - found).abs()[tags].mean().item()


if __name__ == "__main__":
    main()
