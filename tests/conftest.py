"""Tiny things that many tests share: a network of a second, a data set of eight images."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from weakseg.data.images import write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.networks.spec import BackboneSpec

torch.set_num_threads(1)  # for tensors this small, threads cost more than they give
settings.register_profile("weakseg", deadline=None)  # no test is about the time that it takes
settings.load_profile("weakseg")

CLASSES = ("red", "green")
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30)}
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Files beside the repository that some tests take where they are: marked ``realdata``."""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for its ``-n auto``
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for each core, four at most, runs the whole suite; a part of it needs no second.

    Each takes seconds to import torch and up to 2 GB. ``-n 0`` and ``-n 3`` say another number.
    """
    part = config.args_source is config.ArgsSource.ARGS or config.option.keyword
    part = part or config.option.markexpr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if part or cores == 1 else min(cores or 1, 4)


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    """Each test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    cv2.setNumThreads(-1)


@pytest.fixture
def oracle() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads the arrays of an oracle by its name; skips where it is not there."""

    def read(name: str) -> dict[str, np.ndarray]:
        file = SHARED / "oracles" / f"{name}.npz"
        if not file.exists():
            pytest.skip(f"no file {file}")
        with np.load(file) as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def tiny_spec() -> BackboneSpec:
    """A ResNet of 370,000 weights, from scratch; levels at strides 4, 4, 8, 16 and 16."""
    return BackboneSpec(name="test_resnet", pretrained=False)


@pytest.fixture
def tiny_collection(tmp_path: Path) -> Collection:
    """Eight images with a square of a class's colour, their tags and their masks.

    Four are 48 x 64 and four 40 x 40; ids are ``a/0`` to ``a/7``; the last one is a negative.
    """
    rng = np.random.default_rng(0)
    samples = []
    for i in range(8):
        height, width = (48, 64) if i < 4 else (40, 40)
        image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        tags = () if i == 7 else (CLASSES[i % 2],)
        for tag in tags:
            y, x = rng.integers(0, (height - 16, width - 16))
            image[y : y + 16, x : x + 16] = COLOURS[tag]
            mask[y : y + 16, x : x + 16] = CLASSES.index(tag) + 1
        file, truth = tmp_path / "images/a" / f"{i}.png", tmp_path / "truth/a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        write_mask(truth, mask)
        samples.append(Sample(f"a/{i}", file, tags, "train", truth))
    return Collection("tiny", CLASSES, tuple(samples), "made up")


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """A devkit folder of real photographs; skips where there is none."""
    path = Path(os.environ.get("WEAKSEG_VOC", SHARED / "data/voc2012-subset"))
    if not (path / "JPEGImages").is_dir():
        pytest.skip(f"no VOC data in {path} (set WEAKSEG_VOC to a devkit folder)")
    return path
