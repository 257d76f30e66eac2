"""Tiny things that many tests share: a network of a second, a data set of eight images."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from weakseg.data.images import write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.networks.spec import BackboneSpec

torch.set_num_threads(1)  # for tensors this small, threads cost more than they give

CLASSES = ("red", "green")
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30)}


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    """Each test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    cv2.setNumThreads(-1)


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
