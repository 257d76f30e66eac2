"""A whole run small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weakseg.recipe import Recipe, load_recipe

TINY: dict[str, Any] = {
    "data": {"source": "shapes", "options": {"train": 24, "val": 6, "size": 64, "seed": 3}},
    "method": {"name": "cam"},
    "backbone": {"name": "test_resnet", "pretrained": False},
    "train": {"steps": 6, "batch": 4, "crop": 64, "checkpoint_every": 2},
    "seeds": {"scales": [1.0, 0.5], "flip": True},
    "segmenter": {
        "channels": 16,
        "train": {"steps": 4, "batch": 4, "crop": 64, "checkpoint_every": 2},
    },
    "runtime": {"accelerator": "cpu", "workers": 0},
}


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One drawing of the data set for all tests."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def tiny(shapes_root: Path) -> Recipe:
    """The tiny recipe."""
    return load_recipe(TINY, overrides={"data": {"root": str(shapes_root)}})


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Bytes of the files that match, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for pattern in patterns
        for p in sorted(folder.glob(pattern))
        if p.is_file()
    }
