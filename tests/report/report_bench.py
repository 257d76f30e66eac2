"""A tiny run folder, written by hand: no network, no training."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.data.check import check
from weakseg.data.images import write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.errors import UserError
from weakseg.files import write_json
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder

CLASSES = ("cat", "<b>x", "owl")
SIDE = 24


def scene(index: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Image, mask and tags: one square of one class, every fourth with a second class."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:14, 4:14] = 1 + index % 3
    if index % 4 == 0:
        mask[15:22, 15:22] = 1 + (index + 1) % 3
    mask[0] = 255
    return image, mask, tuple(CLASSES[k - 1] for k in np.unique(mask) if 0 < k < 255)


def make_collection(root: Path) -> Collection:
    samples = []
    for index in range(16):
        image, mask, tags = scene(index)
        split = "train" if index < 12 else "val"
        path = root / f"{index}.png"
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        write_mask(root / f"{index}-mask.png", mask)
        samples.append(Sample(f"{split}/{index}", path, tags, split, root / f"{index}-mask.png"))
    notes = ("Found <script>alert(1)</script> in the table.",)
    return Collection("tiny & co", CLASSES, tuple(samples), "table <i>labels.csv", notes)


@dataclass
class Workbench:
    """A run that is written stage by stage."""

    run: RunFolder
    collection: Collection
    recipe: Recipe

    def stage(self, name: str, files=None, **results) -> None:
        stage = self.run.stage(name, {"made": "by hand"})
        with stage.working():
            if files is not None:
                files(stage.folder)
            stage.results |= results

    def fail(self, name: str, message: str) -> None:
        def files(folder: Path) -> None:
            raise UserError(message, where="train.lr", mend="lower it")

        with pytest.raises(UserError):
            self.stage(name, files)

    def check(self) -> None:
        report = check(self.collection).to_dict()
        self.stage("check", lambda f: write_json(f / "check.json", report), images=16)

    def train(self, name: str = "train") -> None:
        def files(folder: Path) -> None:
            log = folder / "logs" / "from-0000000"
            log.mkdir(parents=True)
            rows = [f"{s},0,{1 / s + 0.1:.4f},{0.01:.4f}" for s in range(1, 61)]
            log.joinpath("metrics.csv").write_text("\n".join(["step,epoch,loss<1>,lr", *rows]))

        self.stage(name, files, steps=60, active_steps={"loss<1>": 60}, images=12)

    def seeds(self) -> None:
        def files(folder: Path) -> None:
            for sample in self.collection.split("train"):
                ids = np.array([CLASSES.index(t) + 1 for t in sample.tags or ()], np.int16)
                maps = np.linspace(0, 1, len(ids) * 36, dtype=np.float32).reshape(-1, 6, 6)
                seed = ScoreFile(ids, maps, 4, (SIDE, SIDE))
                write_scores(folder / "scores" / f"{sample.id}.npz", seed)

        self.stage("seeds", files, images=12, f1=0.5, scales=[1.0], flip=True, head="cam")

    def masks(self) -> None:
        def files(folder: Path) -> None:
            self._write_masks(folder, self.collection.split("train"))
            rule = {"rule": "label-free", "threshold": 0.27, "chosen_by": "from the scores alone"}
            rule |= {"margin": 0.0, "histogram": [500, 400, *[1] * 254]}
            write_json(folder / "rule.json", rule)

        self.stage("masks", files, images=12, rule="label-free", threshold=0.27)

    def predict(self) -> None:
        self.stage("predict", lambda f: self._write_masks(f, self.collection), images=16)

    def _write_masks(self, folder: Path, samples) -> None:
        for sample in samples:
            write_mask(
                folder / "masks" / f"{sample.id}.png", scene(int(sample.id.split("/")[1]))[1]
            )

    def evaluate(self) -> None:
        results = {
            "rows": [
                row("seed", "train", 0.412, "oracle"),
                row("mask", "train", 0.381, "label-free"),
                row("segmenter", "val", 0.439, "label-free"),
            ],
            "sweep": {
                "split": "train",
                "thresholds": [0.0, 0.25, 0.5, 0.75],
                "miou": [0.2, 0.35, 0.412, 0.1],
                "fp": [0.7, 0.4, 0.2, 0.0],
                "fn": [0.0, 0.2, 0.3, 0.9],
            },
            "worst": {"mask": [["train/3", 0.1], ["gone", 0.2]], "segmenter": [["val/13", 0.05]]},
        }
        self.stage("evaluate", lambda f: write_json(f / "results.json", results), rows=3)

    def everything(self) -> None:
        self.check()
        self.train()
        self.seeds()
        self.masks()
        self.train("segment")
        self.predict()
        self.evaluate()


def row(stage: str, split: str, miou: float, rule: str) -> dict:
    return {
        "stage": stage, "split": split, "images": 12, "head": "cam", "scales": [1.0, 0.5],
        "flip": True, "crf": "none", "tags": "given", "rule": rule, "threshold": 0.27,
        "miou": miou, "fp": 0.3, "fn": 0.1, "precision": 0.6, "recall": 0.7,
        "iou": [0.8, 0.5, None, 0.1],
    }  # fmt: skip


def overwrite(path: Path, value: object) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
