"""Tall, wide and tiny images go the whole way, next to usual ones."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.stages.conftest import TINY
from weakseg.data.images import read_mask, write_mask
from weakseg.data.scorefile import read_scores
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe

SIZES = [(30, 1200), (1200, 30), (1, 40), (40, 1), (1, 1), (3, 900), (1500, 1), (64, 64), (48, 80)]
SETTINGS = {
    "plain": ["seeds.max_side=null"],
    "reduced": ["seeds.max_side=100", "predict.max_side=90", "predict.crf=label"],
    "refined": ["refine=[pamr,scg,crf]", "segmenter.enabled=false"],
    "tiles": ["seeds.stride=32", "predict.max_side=null", "predict.tile=128"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image of each size; masks beside them hold one class each."""
    root = tmp_path_factory.mktemp("elongated")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    rows = ["image,labels"]
    for i, size in enumerate(SIZES):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        write_mask(root / "masks" / f"{i}.png", np.full(size, i % 2 + 1, np.uint8))
        rows.append(f"{i}.png,{('cat', 'dog')[i % 2]}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("name", SETTINGS)
def test_the_whole_way(images, tmp_path, name):
    data = {
        "source": "folder",
        "root": str(images / "images"),
        "labels": str(images / "labels.csv"),
        "masks": str(images / "masks"),
    }
    tiny = {**TINY, "data": data}
    run = run_recipe(load_recipe(tiny, sets=SETTINGS[name]), tmp_path / "run")
    for i, size in enumerate(SIZES):
        assert read_mask(run.masks / f"{i}.png").shape == size
        assert read_scores(run.folder / f"3-seeds/scores/{i}.npz").size == size
        if name != "refined":
            assert read_mask(run.folder / f"7-predict/masks/{i}.png").shape == size
    lines = (run.folder / "5-masks/quality.csv").read_text().splitlines()
    assert len(lines) == 1 + len(SIZES)
    rows = json.loads((run.folder / "8-evaluate/results.json").read_text())["rows"]
    assert {row["images"] for row in rows} == {len(SIZES)}
