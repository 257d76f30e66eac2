"""Speed as ratios: ours against a reference in the same process, medians of interleaved runs.

    uv run python benchmarks/speed.py            # all; or names such as: train-step seeds sweep

Appends to results/speed.csv. A ratio is reference / ours for inference (higher is better) and
ours / reference for overheads (lower is better); ``work`` says which.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
import scipy.sparse
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from rows import append, commit, device

from weakseg.data.images import read_image, read_mask
from weakseg.data.loading import Augment, StepBatches, TrainingImages, training_loader
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.export.runtime import Runtime, on_runtime
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Batch, build
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import confusion_matrix, metrics
from weakseg.ops.dense_crf import dense_crf, dense_crf_many
from weakseg.ops.pamr import pamr
from weakseg.ops.random_walk import edge_affinity, half_disc, random_walk
from weakseg.ops.scg import self_correlation
from weakseg.recipe import DataConfig, SeedsConfig
from weakseg.stages.check import collect
from weakseg.stages.evaluate import sweep
from weakseg.stages.masks import label
from weakseg.stages.seeds import make_seeds, scores_path
from weakseg.training import fit as fitting
from weakseg.training.config import TrainConfig
from weakseg.training.segmenter import Segmenter

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.csv"
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


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of CPU that the work takes, in all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


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


def _method_step(settings: dict[str, object], images: Collection) -> Measured:
    """Forward, backward and update of a method against those of CAM, on the same batch."""
    spec = BackboneSpec(name="resnet18", pretrained=False, norm="frozen")
    batch = Batch(
        torch.randn(8, 3, 320, 320).contiguous(memory_format=torch.channels_last),
        (torch.rand(8, len(images.classes)) < 0.1).float(),
        [""] * 8,
    )

    def steps(section: dict[str, object]) -> Callable[[], float]:
        model = build(section, backbone_factory(spec), len(images.classes)).train()
        model.to(memory_format=torch.channels_last)
        trained = [p for p in model.parameters() if p.requires_grad]
        phases = [(phase, list(phase.parameters())) for phase in model.phases().values()]
        optimisers = [
            torch.optim.SGD([p for p in own if p.requires_grad], lr=1e-4) for _, own in phases
        ]

        def step() -> None:
            for _ in range(3):
                for (phase, own), optimiser in zip(phases, optimisers, strict=True):
                    ids = {id(p) for p in own}
                    for p in trained:
                        p.requires_grad_(id(p) in ids)
                    optimiser.zero_grad()
                    torch.stack(list(phase.losses(batch, 0.9).values())).sum().backward()
                    optimiser.step()

        step()
        return lambda: timed(step)

    ours, reference, peak = compare(steps(settings), steps({"name": "cam"}))
    name = " ".join(f"{key} {value}" for key, value in settings.items())
    work = f"3 steps of 8 at 320 px, resnet18, {name}; ours / CAM"
    return Measured(work, ours, reference, ours / reference, peak)


def puzzle_step(images: Collection) -> Measured:
    """Puzzle-CAM at the same crop: at most 2.1 is wanted."""
    return _method_step({"name": "puzzle"}, images)


def seam_step(images: Collection) -> Measured:
    """SEAM with a view of 0.3: at most 1.6 is wanted."""
    return _method_step({"name": "seam", "scale": 0.3, "keys": "learned"}, images)


def seam_step_published(images: Collection) -> Measured:
    """SEAM with everything that the published code has."""
    settings = {"name": "seam", "scale": 0.3, "keys": "published", "rivals": "all", "minimum": 1}
    return _method_step(settings, images)


def acr_step(images: Collection) -> Measured:
    """ACR with the narrow reconstructor: at most 4 is wanted."""
    return _method_step({"name": "acr", "preset": "narrow"}, images)


def acr_step_published(images: Collection) -> Measured:
    """ACR with the reconstructor of the paper, as deep as the crop allows."""
    return _method_step({"name": "acr", "depth": 8}, images)


def recurseed_operators(images: Collection) -> Measured:
    """What SCG and PAMR add to a step at 224 px, 16 images: at most 1.5 is wanted."""
    whole, bare = _RecurSeedStep(images), _RecurSeedStep(images, scg=False, pamr=False)
    ours, reference, peak = compare(lambda: timed(whole.step), lambda: timed(bare.step))
    work = "a step of 16 at 224 px, resnet18, recurseed; ours / without SCG and PAMR"
    return Measured(work, ours, reference, ours / reference, peak)


def edgepredictmix_operators(images: Collection) -> Measured:
    """EdgePredictMix without its second pass, beside a step: at most 0.25 is wanted."""
    training = _RecurSeedStep(images, mix="edgepredictmix")
    model, batch = training.model, training.batch
    with torch.no_grad():
        levels = model.backbone(batch.images)
        cams, logits = model.head(levels[-1]), model.decoder.decode(batch.images, levels)
        scene = model._scene(batch, cams, levels, logits)
    bare = _RecurSeedStep(images, scg=False, pamr=False)
    ours, reference, peak = compare(
        lambda: timed(lambda: model.mix(scene)), lambda: timed(bare.step)
    )
    work = "PAMR, superpixels, vote and paste of 16 at 224 px; ours / forward and backward"
    return Measured(work, ours, reference, ours / reference, peak)


class _RecurSeedStep:
    """RecurSeed on one batch of real images."""

    def __init__(self, images: Collection, **settings: object) -> None:
        weights = HERE / "../../shared/weights/resnet18.safetensors"
        known = {"weights": weights} if weights.exists() else {"pretrained": False}
        spec = BackboneSpec(name="resnet18", norm="frozen", **known)
        torch.manual_seed(0)
        self.model = build(
            {"name": "recurseed", **settings}, backbone_factory(spec), len(images.classes)
        ).train()
        self.model.to(memory_format=torch.channels_last)
        backbone = self.model.backbone
        augment = Augment(224, (0.9, 1.3), True, 0.0, backbone.mean, backbone.std)
        data = TrainingImages(images, augment, 0)
        self.batch = next(iter(training_loader(data, StepBatches(len(data), 16, 1, 0), 0)))
        self.batch.images = self.batch.images.contiguous(memory_format=torch.channels_last)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(trained, lr=1e-3)
        self.step()

    def step(self) -> None:
        """Forward, backward and update."""
        self.optimiser.zero_grad()
        torch.stack(list(self.model.losses(self.batch, 0.9).values())).sum().backward()
        self.optimiser.step()


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


def dense_crf_per_core(images: Collection) -> Measured:
    """Our dense CRF against pydensecrf, one thread each, lattices included."""
    interpreter = os.environ.get("PYDENSECRF_PYTHON")
    if interpreter is None:
        raise AbsentError(
            "set PYDENSECRF_PYTHON to the Python of an environment of its own, made by: "
            "python -m venv crf && crf/bin/pip install numpy cython pydensecrf2"
        )
    image, probabilities = _crf_inputs()
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        file = Path(folder) / "inputs.npz"
        np.savez(
            file, image=image[0].permute(1, 2, 0).numpy(), probabilities=probabilities[0].numpy()
        )
        with subprocess.Popen(
            [interpreter, "-c", _PYDENSECRF, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None

            def theirs() -> float:
                process.stdin.write("go\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            dense_crf(image, probabilities), theirs()
            a, b, peak = compare(lambda: timed(lambda: dense_crf(image, probabilities)), theirs)
            process.stdin.close()
    work = "375 x 500, 3 labels, 10 iterations, one thread; pydensecrf / ours"
    return Measured(work, a, b, b / a, peak)


def dense_crf_threads(images: Collection) -> Measured:
    """The same image in all threads against one."""
    image, probabilities = _crf_inputs()

    def ours() -> float:
        return timed(lambda: dense_crf(image, probabilities))

    def one() -> float:
        with _one_thread():
            return ours()

    ours(), one()
    a, b, peak = compare(ours, one)
    work = f"375 x 500, 3 labels, 10 iterations; one thread / {torch.get_num_threads()} threads"
    return Measured(work, a, b, b / a, peak)


def dense_crf_images(images: Collection) -> Measured:
    """Several images, one in each thread, against one thread."""
    batches = [_crf_inputs()] * 8

    def run(threads: int) -> float:
        return timed(lambda: list(dense_crf_many(batches, threads=threads)))

    count = torch.get_num_threads()
    run(count)
    a, b, peak = compare(lambda: run(count), lambda: run(1))
    work = f"8 images of 375 x 500, 3 labels, 10 iterations; one thread / {count} threads"
    return Measured(work, a, b, b / a, peak)


_PYDENSECRF = """
import sys, time
import numpy as np
from pydensecrf.densecrf import DenseCRF2D
inputs = np.load(sys.argv[1])
image, probabilities = np.ascontiguousarray(inputs["image"]), inputs["probabilities"]
classes, height, width = probabilities.shape
for _ in sys.stdin:
    start = time.perf_counter()
    crf = DenseCRF2D(width, height, classes)
    unary = -np.log(probabilities.clip(1e-5, 1)).reshape(classes, -1)
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    np.array(crf.inference(10))
    print(time.perf_counter() - start, flush=True)
"""


def _crf_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """An image of soft shapes with a little noise, and coarse probabilities of three labels."""
    random = torch.Generator().manual_seed(0)
    size = (375, 500)
    coarse = torch.rand(1, 3, 8, 10, generator=random)
    noise = 0.02 * torch.randn(1, 3, *size, generator=random)
    image = F.interpolate(coarse, size, mode="bicubic") + noise
    logits = 4 * torch.rand(1, 3, 24, 32, generator=random)
    probabilities = F.interpolate(logits, size, mode="bilinear").softmax(1)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), probabilities


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pamr_gather(images: Collection) -> Measured:
    """Our PAMR against the definition that gathers the 48 neighbours of every map."""
    random = torch.Generator().manual_seed(0)
    size = (320, 320)
    coarse = torch.rand(1, 3, 8, 8, generator=random)
    noise = 0.02 * torch.randn(1, 3, *size, generator=random)
    image = (F.interpolate(coarse, size, mode="bicubic") + noise).clamp(0, 1)
    logits = 4 * torch.rand(1, 21, 20, 20, generator=random)
    maps = F.interpolate(logits, size, mode="bilinear").softmax(1)

    def ours() -> float:
        return timed(lambda: pamr(image, maps))

    def plain() -> float:
        return timed(lambda: _plain_pamr(image, maps))

    torch.testing.assert_close(pamr(image, maps), _plain_pamr(image, maps), atol=1e-5, rtol=0)
    a, b, peak = compare(ours, plain)
    return Measured("320 x 320, 21 maps, 10 iterations; gathering / ours", a, b, b / a, peak)


@torch.no_grad()
def _plain_pamr(image: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    dilations = (1, 2, 4, 8, 12, 24)
    reach, (height, width) = max(dilations), image.shape[-2:]

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        shifted = [
            padded[..., reach + y : reach + y + height, reach + x : reach + x + width]
            for d in dilations
            for y in (-d, 0, d)
            for x in (-d, 0, d)
            if (y, x) != (0, 0)
        ]
        return torch.stack(shifted, 2)

    around, centre = neighbours(image), image[:, :, None]
    samples = torch.cat([around, centre.expand(-1, -1, len(dilations), -1, -1)], 2)
    scale = 1e-8 + 0.1 * samples.std(2, keepdim=True)
    weights = (-(around - centre).abs() / scale).mean(1, keepdim=True).softmax(2)
    for _ in range(10):
        maps = (neighbours(maps) * weights).sum(2)
    return maps


def self_correlation_plain(images: Collection) -> Measured:
    """Our second-order self-correlation against whole matrices, level by level, class by class."""
    random, size = torch.Generator().manual_seed(0), (64, 64)

    def smooth(channels: int, side: int) -> torch.Tensor:
        coarse = torch.rand(1, channels, side, side, generator=random)
        return F.interpolate(coarse, size, mode="bicubic")

    cams = (smooth(4, 5) - 0.45).clamp(min=0)
    cams = cams / cams.amax((-2, -1), keepdim=True)
    features = [
        (smooth(c, side) + 0.2 * torch.rand(1, c, *size, generator=random) - 0.5).relu()
        for c, side in ((512, 16), (1024, 12), (2048, 8))
    ]

    def ours() -> float:
        return timed(lambda: self_correlation(cams, features))

    def plain() -> float:
        return timed(lambda: _plain_self_correlation(cams[0], features))

    # Thresholds at a similarity of 0.5 fall differently for a few of the 17 million pairs.
    found, expected = (
        self_correlation(cams, features)[0],
        _plain_self_correlation(cams[0], features),
    )
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    a, b, peak = compare(ours, plain)
    work = "64 x 64, 4 classes, levels of 512 1024 2048, second order; whole matrices / ours"
    return Measured(work, a, b, b / a, peak)


@torch.no_grad()
def _plain_self_correlation(cams: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    def columns_to_one(matrix: torch.Tensor) -> torch.Tensor:
        return matrix / (matrix.sum(0, keepdim=True) + 1e-10)

    def unit_range(x: torch.Tensor) -> torch.Tensor:
        low, high = x.aminmax(dim=0, keepdim=True)
        return (x - low) / (high - low + 1e-10)

    total, zero = 0, cams.new_zeros(cams[0].numel())
    for level in features:
        level = F.normalize(level[0].flatten(1), dim=0, eps=1e-10)
        similar = (level.T @ level).relu()
        similar[similar < 0.5] = 0
        first = columns_to_one(similar)
        second = columns_to_one(similar.fill_diagonal_(0))
        second = columns_to_one(second @ second)
        second[second < 0.1 / len(zero)] = 0
        total = total + columns_to_one(torch.maximum(first, second))
    refined = []
    for scores in cams.flatten(1):
        inside, outside = (
            unit_range(unit_range(total[:, certain]).sum(1)) if certain.any() else zero
            for certain in (scores >= 0.3, scores <= 0.05)
        )
        refined.append(unit_range((inside - outside).relu()))
    return torch.stack(refined).reshape(cams.shape)


def random_walk_sparse(images: Collection) -> Measured:
    """Our random walk against as many products with the same transition as a sparse matrix."""
    random, size = torch.Generator().manual_seed(0), (94, 125)

    def smooth(channels: int, side: int) -> torch.Tensor:
        coarse = torch.rand(1, channels, side, side, generator=random)
        return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)

    scores, edge = smooth(5, 8), smooth(1, 24) ** 4
    cells = np.arange(size[0] * size[1]).reshape(size)
    rows, columns, values = [], [], []
    for (dy, dx), pairs in zip(
        half_disc(5), edge_affinity(edge, 5)[0].double().numpy(), strict=True
    ):
        here = np.s_[: size[0] - dy, max(-dx, 0) : size[1] - max(dx, 0)]
        there = np.s_[dy:, max(dx, 0) : size[1] - max(-dx, 0)]
        rows.append(cells[here].ravel()), columns.append(cells[there].ravel())
        values.append(pairs[here].ravel() ** 10)
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    half = scipy.sparse.csr_array(entries, shape=(cells.size, cells.size))
    affinity = half + half.T + scipy.sparse.eye_array(cells.size)
    averages = scipy.sparse.diags_array(1 / affinity.sum(0)) @ affinity
    averages = averages.tocsr().astype(np.float32)
    start = (scores * (1 - edge))[0].flatten(1).T.contiguous().numpy()

    def sparse() -> np.ndarray:
        x = start
        for _ in range(256):
            x = averages @ x
        return x.T.reshape(scores[0].shape)

    np.testing.assert_allclose(random_walk(scores, edge)[0].numpy(), sparse(), atol=1e-3)
    a, b, peak = compare(
        lambda: timed(lambda: random_walk(scores, edge)), lambda: timed(lambda: sparse())
    )
    work = (
        "500 x 375 at stride 4, 5 maps, radius 5, 256 steps, affinities included; scipy.sparse"
        " products with the same transition, ready-made / ours (the dense definition takes 26 TFLOP)"
    )
    return Measured(work, a, b, b / a, peak)


def predict_runtime(name: str, runtime: Runtime) -> Callable[[Collection], Measured]:
    """A segmenter's prediction on another runtime, against folded PyTorch.

    In CPU seconds of one thread: threads that wait for each other measure the machine's other work.
    """

    def benchmark(images: Collection) -> Measured:
        weights = HERE / f"../../shared/weights/{name}.safetensors"
        known = {"weights": weights} if weights.exists() else {"pretrained": False}
        torch.manual_seed(0)
        backbone = make_backbone(BackboneSpec(name=name, norm="frozen", **known))
        network = DeepLabV3Plus(backbone, len(images.classes) + 1)
        plain = Predictor(
            Segmenter(network).eval(), images.classes, Normalise(backbone.mean, backbone.std)
        ).fast()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        graph = on_runtime(plain, runtime)
        pixels = cv2.resize(read_image(images.samples[0].image), (512, 512))
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]

        def ours() -> float:
            return cpu_seconds(lambda: graph.probabilities(picture))

        def reference() -> float:
            return cpu_seconds(lambda: plain.probabilities(picture))

        ours(), reference()
        rounds = [(ours(), reference()) for _ in range(ROUNDS)]  # memory's watch would count too
        a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
        torch.set_num_threads(threads)
        work = (
            f"DeepLabV3+ on {name}, an image of 512 x 512, CPU seconds of one thread; "
            f"PyTorch with folded BatchNorm / {runtime}"
        )
        return Measured(work, a, b, b / a, 0.0)

    return benchmark


class AbsentError(Exception):
    """What a benchmark compares with is not installed; says how to get it."""


BENCHMARKS = {
    "train-step": train_step,
    "puzzle-step": puzzle_step,
    "seam-step": seam_step,
    "seam-step-published": seam_step_published,
    "acr-step": acr_step,
    "acr-step-published": acr_step_published,
    "recurseed-operators": recurseed_operators,
    "edgepredictmix-operators": edgepredictmix_operators,
    "seeds": seeds,
    "sweep": threshold_sweep,
    "dense-crf": dense_crf_per_core,
    "dense-crf-threads": dense_crf_threads,
    "dense-crf-images": dense_crf_images,
    "pamr": pamr_gather,
    "scg": self_correlation_plain,
    "random-walk": random_walk_sparse,
    "predict-onnx-r18": predict_runtime("resnet18", "onnx"),
    "predict-openvino-r18": predict_runtime("resnet18", "openvino"),
    "predict-onnx-r50": predict_runtime("resnet50", "onnx"),
    "predict-openvino-r50": predict_runtime("resnet50", "openvino"),
}


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
        try:
            found = BENCHMARKS[name](images)
        except AbsentError as absent:
            print(f"{name}: left out; {absent}", file=sys.stderr)
            continue
        _append(name, found)
        print(f"{name}: {found.ratio:.2f} ({found.work})", file=sys.stderr)


def _append(name: str, found: Measured) -> None:
    row = {
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
    append(RESULTS, [row])


if __name__ == "__main__":
    main()
