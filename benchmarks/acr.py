"""What ACR's reconstructor sees and paints on shapes-v1: docs/images/acr.png.

    uv run python benchmarks/methods.py --variants cam acr --seeds 0
    uv run python benchmarks/acr.py

Reads the run of methods.py. For a tagged class of each image: its map c after min-max; what c leaves
(grey is hidden) and what is painted from that, in training without the grid; what c keeps, and what
is painted from that; the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pictures import SIDE, draw, image_cell, mask_cell
from torch import Tensor

from methods import VARIANTS, folder_of, recipe_of
from weakseg.data.images import read_image
from weakseg.export.model import load
from weakseg.inference import evaluating
from weakseg.methods import Batch
from weakseg.methods.acr import ACR
from weakseg.report.pictures import choose
from weakseg.stages.check import collect

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "acr.png"
SHOWN = 7


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="acr")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    args = parser.parse_args()
    images = collect(recipe_of(args.seed).data).split("train")
    samples = choose(images, images.classes, SHOWN)
    predictor = load(folder_of(args.runs, args.variant, args.seed))
    assert isinstance(predictor.model, ACR)
    columns: dict[str, list[np.ndarray]] = {"image": [image_cell(s) for s in samples]}
    names = ("c", "rest", "painted", "segment", "painted ")
    columns |= {name: [] for name in names}
    for sample in samples:
        pixels = torch.from_numpy(read_image(sample.image)).permute(2, 0, 1)[None]
        tags = torch.tensor([[float(name in sample.tags) for name in images.classes]])
        with evaluating(predictor.model) as model:
            torch.manual_seed(args.seed)
            cells = _cells(model, Batch(predictor.normalise(pixels), tags, [sample.id]))
        for name, cell in zip(names, cells, strict=True):
            columns[name].append(cell)
    columns["ground truth"] = [mask_cell(s.mask) for s in samples if s.mask is not None]
    draw(columns, PICTURE)


def _cells(model: ACR, batch: Batch) -> list[np.ndarray]:
    pictures = model._pictures(batch.images)
    maps, _ = model.classifier.classify(batch)
    segment, _ = model._segment(maps, batch.tags, pictures)
    features = model.reconstructor.features(model.encoder(batch.images)[-3:])
    from_rest, from_segment = model._paint([features] * 2, [1 - segment, segment])

    def cell(picture: Tensor) -> np.ndarray:
        rgb = model.backbone.pictures(picture, (picture.shape[-2], picture.shape[-1]))
        rgb = F.interpolate(rgb, (SIDE, SIDE), mode="bilinear")
        return (rgb[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)

    heat = cv2.applyColorMap((segment[0, 0].numpy() * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[
        ..., ::-1
    ]
    return [
        cv2.resize(heat, (SIDE, SIDE)),
        cell(pictures * (1 - segment)),
        cell(from_rest),
        cell(pictures * segment),
        cell(from_segment),
    ]


if __name__ == "__main__":
    main()
