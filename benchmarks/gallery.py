"""The pictures of docs/methods and of the first page, from runs: docs/images/methods/*.png.

    uv run python benchmarks/methods.py --variants cam puzzle seam recurseed acr mctformer acr+vit \\
        recurseed+cutmix recurseed+cda recurseed+edgepredictmix --seeds 0
    uv run weakseg demo
    uv run python benchmarks/gallery.py

Every page shows the same held-out images of shapes-v1 (chosen by ids and tags alone), CAM's scores,
the method's, the mask of the last column, and the truth. ``acr-painted`` shows what ACR's
reconstructor paints, ``recurseed-epochs`` RecurSeed's maps along its training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pictures import SIDE, class_cells, draw, image_cell, mask_cell, masks_cells, scores_cells
from recurseed import snapshots
from torch import Tensor

from methods import HELD_OUT, folder_of
from weakseg.data.images import read_image
from weakseg.data.samples import Collection, Sample
from weakseg.export.model import load
from weakseg.inference import evaluating
from weakseg.methods import Batch
from weakseg.methods.acr import ACR, _draw
from weakseg.recipe import load_recipe
from weakseg.report.pictures import choose
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.seeds import make_seeds

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHOWN = 4
CAM = {"CAM": ("cam", "cam")}
PAGES: dict[str, dict[str, tuple[str, str]]] = {  # column: variant and head
    "all": CAM
    | {
        "Puzzle-CAM": ("puzzle", "cam"),
        "SEAM": ("seam", "pcm"),
        "ACR": ("acr", "cam"),
        "MCTformer": ("mctformer", "fused"),
        "RecurSeed": ("recurseed", "decoder"),
    },
    "cam": CAM,
    "puzzle": CAM | {"Puzzle-CAM": ("puzzle", "cam")},
    "seam": CAM | {"SEAM, plain map": ("seam", "cam"), "SEAM, PCM": ("seam", "pcm")},
    "recurseed": CAM
    | {"RecurSeed, CAM": ("recurseed", "cam"), "decoder": ("recurseed", "decoder")},
    "mixes": CAM
    | {
        "RecurSeed": ("recurseed", "decoder"),
        "+ CutMix": ("recurseed+cutmix", "decoder"),
        "+ CDA": ("recurseed+cda", "decoder"),
        "+ EdgePredictMix": ("recurseed+edgepredictmix", "decoder"),
    },
    "acr": CAM | {"ACR": ("acr", "cam")},
    "mctformer": CAM
    | {
        "attention": ("mctformer", "attention"),
        "CAM of patches": ("mctformer", "cam"),
        "product": ("mctformer", "fused"),
        "acr+vit": ("acr+vit", "fused"),
    },
}
STRIP = (62, 124, 310)
"""Steps of RecurSeed's training that are shown."""


def main() -> None:
    """Draws what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [*PAGES, "acr-painted", "recurseed-epochs", "demo"]
    parser.add_argument("--pictures", nargs="+", choices=names, default=names)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="of methods.py")
    parser.add_argument("--demo", type=Path, default=Path("weakseg-demo"), help="a run of the demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = load_recipe("demo", overrides={"data": {"options": {"seed": HELD_OUT}}}).data
    images = collect(data).split("train")
    samples = choose(images, images.classes, SHOWN)
    for name in args.pictures:
        if name == "demo":
            columns = _of_demo(args.demo)
        elif name == "acr-painted":
            columns = _painted(folder_of(args.runs, "acr", args.seed), images, samples)
        elif name == "recurseed-epochs":
            columns = _by_epoch(folder_of(args.runs, "recurseed", args.seed))
        else:
            columns = _of_page(name, args.runs, args.seed, images, samples)
        draw(columns, IMAGES / ("demo.png" if name == "demo" else f"methods/{name}.png"))


def _of_page(
    name: str, runs: Path, seed: int, images: Collection, samples: Sequence[Sample]
) -> dict[str, list[np.ndarray]]:
    columns = {"image": [image_cell(s) for s in samples]}
    for title, (variant, head) in PAGES[name].items():
        run = RunFolder(folder_of(runs, variant, seed))
        trained = run.record("train")
        assert trained is not None
        scores = run.path / f"held-out-{head}-{trained.fingerprint[:8]}"
        if name == "cam":
            columns["first class"] = class_cells(scores, samples, 0)
            columns["second class"] = class_cells(scores, samples, 1)
        columns[title] = scores_cells(scores, images, samples)
    if name != "all":
        columns["mask"] = masks_cells(scores, images, samples)
    return columns | _truth(samples)


def _of_demo(folder: Path) -> dict[str, list[np.ndarray]]:
    """What a run makes of its images: scores, masks, and the predictions of what it trained."""
    run = RunFolder(folder)
    images = collect(load_recipe(folder / "recipe.yaml").data).split("train")
    samples = choose(images, images.classes, SHOWN)
    columns = {"image": [image_cell(s) for s in samples]}
    columns["scores"] = scores_cells(run.stage_folder("seeds") / "scores", images, samples)
    for title, stage in (("mask", "masks"), ("segmenter", "predict")):
        masks = run.stage_folder(stage) / "masks"
        columns[title] = [mask_cell(masks / f"{s.id}.png") for s in samples]
    return columns | _truth(samples)


def _by_epoch(folder: Path) -> dict[str, list[np.ndarray]]:
    """Training images, and both heads' maps as the training goes on."""
    recipe = load_recipe(folder / "recipe.yaml")
    images = collect(recipe.data).split("train")
    samples = choose(images, images.classes, SHOWN)
    shown = images.only(s.id for s in samples)
    columns = {"image": [image_cell(s) for s in samples]}
    for step, predictor in snapshots(folder):
        for head in reversed(predictor.model.heads) if step in STRIP else ():
            with tempfile.TemporaryDirectory() as scores:
                wanted = recipe.seeds.model_copy(update={"head": head})
                make_seeds(predictor, shown, wanted, Path(scores))
                epoch = round(step * recipe.train.batch / len(images))
                columns[f"{head}, epoch {epoch}"] = scores_cells(Path(scores), shown, samples)
    return columns | _truth(samples)


def _painted(
    folder: Path, images: Collection, samples: Sequence[Sample]
) -> dict[str, list[np.ndarray]]:
    """Of one class of each image: its map c, what is left of it and of the rest, and the paintings.

    Grey is hidden; the grid of the training is left out.
    """
    predictor = load(folder)
    assert isinstance(predictor.model, ACR)
    columns = {"image": [image_cell(s) for s in samples]}
    names = ("c", "rest", "painted", "segment", "painted ")
    columns |= {name: [] for name in names}
    for sample in samples:
        pixels = torch.from_numpy(read_image(sample.image)).permute(2, 0, 1)[None]
        tags = torch.tensor([[float(name in (sample.tags or ())) for name in images.classes]])
        with evaluating(predictor.model) as model:
            torch.manual_seed(0)  # which class it is
            cells = _cells(model, Batch(predictor.normalise(pixels), tags, [sample.id]))
        for name, cell in zip(names, cells, strict=True):
            columns[name].append(cell)
    return columns | _truth(samples)


def _cells(model: ACR, batch: Batch) -> list[np.ndarray]:
    pictures = model._pictures(batch.images)
    maps, _ = model.classifier.classify(batch)
    segment, places = model._segment(maps, batch, _draw(batch.tags)), model._places(batch.images)
    features = model.reconstructor.features(model.encoder(batch.images)[-3:], places)
    from_rest, from_segment = model._paint([features] * 2, [1 - segment, segment], places)

    def cell(picture: Tensor) -> np.ndarray:
        rgb = model.backbone.pictures(picture, (picture.shape[-2], picture.shape[-1]))
        rgb = F.interpolate(rgb, (SIDE, SIDE), mode="bilinear")
        return (rgb[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)

    heat = cv2.applyColorMap((segment[0, 0].numpy() * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return [
        cv2.resize(np.ascontiguousarray(heat[..., ::-1]), (SIDE, SIDE)),
        cell(pictures * (1 - segment)),
        cell(from_rest),
        cell(pictures * segment),
        cell(from_segment),
    ]


def _truth(samples: Sequence[Sample]) -> dict[str, list[np.ndarray]]:
    return {"ground truth": [mask_cell(s.mask) for s in samples if s.mask is not None]}


if __name__ == "__main__":
    main()
