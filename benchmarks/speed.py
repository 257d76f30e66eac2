"""Speed as ratios: ours against a reference in the same process, medians of interleaved runs.

    uv run python benchmarks/speed.py            # all; or names such as: train-step seeds sweep

Appends to results/speed.csv. A ratio is reference / ours for inference (higher is better) and
ours / reference for overheads (lower is better); ``work`` says which.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from quality import commit, device

from weakseg.data.images import read_image, read_mask
from weakseg.data.loading import Augment, StepBatches, TrainingImages, training_loader
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.inference import Normalise, Predictor
from weakseg.methods import build
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import confusion_matrix, metrics
from weakseg.recipe import DataConfig, SeedsConfig
from weakseg.stages.check import collect
from weakseg.stages.evaluate import sweep
from weakseg.stages.masks import label
from weakseg.stages.seeds import make_seeds, scores_path
from weakseg.training import fit as fitting
from weakseg.training.config import TrainConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.csv"
COLUMNS = [
    "name",
    "work",
    "device",
    "threads",
    "ours_seconds",
    "reference_seconds",
    "ratio",
    "peak_mb",
    "commit",
]
ROUNDS = 5
STEPS = 12
AHEAD = 5  # more steps, so that the loader is as far ahead at the end as at the start


@dataclass
class Measured:
    """Seconds of one piece of work done in two ways."""

    work: str
    ours: float
    reference: float
    ratio: float
    peak_mb: float


def compare(
    ours: Callable[[], float], reference: Callable[[], float]
) -> tuple[float, float, float]:
    """Medians of interleaved rounds, and ours' extra memory in MB (resident, sampled)."""
    times: tuple[list[float], list[float]] = ([], [])
    peak = 0.0
    for _ in range(ROUNDS):
        with _Peak() as memory:
            times[0].append(ours())
        peak = max(peak, memory.extra_mb)
        times[1].append(reference())
    return statistics.median(times[0]), statistics.median(times[1]), peak


class _Peak:
    """Resident memory above that at the start, sampled every 5 ms."""

    def __enter__(self) -> _Peak:
        self._process, self._running = psutil.Process(), True
        self._start = self._highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.extra_mb = (self._highest - self._start) / 2**20

    def _watch(self) -> None:
        while self._running:
            self._highest = max(self._highest, self._process.memory_info().rss)
            time.sleep(0.005)


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def train_step(images: Collection) -> Measured:
    """Steps through the whole loop, loading included, against bare forward + backward."""
    config = TrainConfig(steps=STEPS + AHEAD, crop=192, batch=16, checkpoint_every=10**6)
    spec = BackboneSpec(name="resnet18", pretrained=False, norm="frozen")
    augment = Augment(192, config.resize, True, 0.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def make_model():
        return build({"name": "cam"}, backbone_factory(spec), len(images.classes))

    model = make_model().train().to(memory_format=torch.channels_last)
    data = TrainingImages(images, augment, 0)
    loader = training_loader(data, StepBatches(len(data), 16, STEPS, 0), 0)
    batches = list(loader)
    for batch in batches:
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        for batch in batches:
            model.zero_grad()
            sum(model.losses(batch, 0.0).values()).backward()

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            clock = _Clock()
            original = fitting._Show
            fitting._Show = lambda title: clock  # the clock replaces the bar
            try:
                fitting.fit(
                    Path(folder), make_model, lambda m: data, config, fitting.Placement("cpu"), 0
                )
            finally:
                fitting._Show = original
            return clock.marks[STEPS] - clock.marks[0]

    bare()
    a, b, peak = compare(ours, lambda: timed(bare))
    work = (
        f"{STEPS} steps of 16 at 192 px, resnet18, loading included; ours / bare forward + backward"
    )
    return Measured(work, a, b, a / b, peak)


class _Clock(Callback):
    """Times the ends of steps; the first one warms up."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.marks.append(time.perf_counter())


def seeds(images: Collection) -> Measured:
    """Our seed stage against one image, one scale, one flip at a time."""
    images = Collection(images.name, images.classes, images.samples[:96], images.tag_source)
    spec = BackboneSpec(name="resnet18", pretrained=False, norm="frozen")
    model = build({"name": "cam"}, backbone_factory(spec), len(images.classes)).eval()
    predictor = Predictor(
        model, images.classes, Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    config = SeedsConfig(scales=(1.0, 0.5), flip=True, max_side=256)
    plain_model = build({"name": "cam"}, backbone_factory(spec), len(images.classes)).eval()

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return timed(lambda: make_seeds(predictor, images, config, Path(folder)))

    def plain() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return timed(lambda: _plain_seeds(plain_model, predictor, images, config, Path(folder)))

    ours(), plain()
    a, b, peak = compare(ours, plain)
    return Measured(
        "96 images, scales 1 .5 + flip, side 256, resnet18; plain loop / ours", a, b, b / a, peak
    )


@torch.inference_mode()
def _plain_seeds(model, predictor, images: Collection, config: SeedsConfig, folder: Path) -> None:
    tags = images.tag_matrix()
    for i, sample in enumerate(images):
        image = torch.from_numpy(read_image(sample.image, max_side=256)).permute(2, 0, 1)[None]
        size = [-(-side // 4) for side in image.shape[-2:]]
        total = 0
        for scale in config.scales:
            side = [round(s * scale) for s in image.shape[-2:]]
            scaled = F.interpolate(image.float(), side, mode="bicubic", antialias=True).clamp(
                0, 255
            )
            inputs = predictor.normalise(scaled.round().to(torch.uint8))
            for flip in (False, True):
                maps = model(inputs.flip(-1) if flip else inputs).scores.relu()
                maps = maps.flip(-1) if flip else maps
                total = total + F.interpolate(maps, size, mode="bilinear")
        total = total[0, np.flatnonzero(tags[i])]
        total = total / (total.amax((1, 2), keepdim=True) + 1e-5)
        np.savez_compressed(folder / f"{i}.npz", (total * 255).round().numpy().astype(np.uint8))


def threshold_sweep(images: Collection) -> Measured:
    """Sixty thresholds in one pass against one threshold."""
    samples, classes = images.samples[:200], len(images.classes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(
            {"name": "cam"},
            backbone_factory(BackboneSpec(name="test_resnet", pretrained=False, norm="frozen")),
            classes,
        ).eval()
        predictor = Predictor(model, images.classes, Normalise((0.5,) * 3, (0.5,) * 3))
        subset = Collection(images.name, images.classes, samples, images.tag_source)
        make_seeds(predictor, subset, SeedsConfig(scales=(1.0,), flip=False, max_side=128), folder)

        def count(sample: Sample) -> np.ndarray:
            mask = label(read_scores(scores_path(folder, sample.id)), 0.3)
            return confusion_matrix(mask, read_mask(sample.mask), classes)

        def one() -> None:  # on as many threads as the sweep
            with ThreadPoolExecutor() as pool:
                metrics(sum(pool.map(count, samples)))

        def all_of_them() -> None:
            sweep(samples, folder, classes, 60).best()

        all_of_them(), one()
        a, b, peak = compare(lambda: timed(all_of_them), lambda: timed(one))
    return Measured("60 thresholds on 200 images; ours / one evaluation", a, b, a / b, peak)


BENCHMARKS = {"train-step": train_step, "seeds": seeds, "sweep": threshold_sweep}


def main() -> None:
    """Runs the named benchmarks on the VOC subset, or on shapes where that is absent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--voc", type=Path, default=HERE / "../../shared/data/voc2012-subset")
    args = parser.parse_args()
    voc = args.voc.resolve()
    if voc.exists():
        data = DataConfig(
            root=voc / "JPEGImages", labels=str(voc / "labels.csv"), masks=voc / "SegmentationClass"
        )
    else:
        data = DataConfig(source="shapes")
    images = collect(data).split("train")
    for name in args.names:
        found = BENCHMARKS[name](images)
        _append(name, found)
        print(f"{name}: {found.ratio:.2f} ({found.work})", file=sys.stderr)


def _append(name: str, found: Measured) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(
            {
                "name": name,
                "work": found.work,
                "device": device(),
                "threads": torch.get_num_threads(),
                "ours_seconds": round(found.ours, 3),
                "reference_seconds": round(found.reference, 3),
                "ratio": round(found.ratio, 3),
                "peak_mb": round(found.peak_mb),
                "commit": commit(),
            }
        )


if __name__ == "__main__":
    main()
