"""Images of 12 bits through a whole run; and its model folder, copied away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import weakseg
from tests.rasters import write_tiff
from tests.stages.conftest import TINY
from weakseg import pipeline
from weakseg.cli import app
from weakseg.data.depth import Reading
from weakseg.data.drawing import draw
from weakseg.data.images import read_image, read_mask
from weakseg.errors import UserError
from weakseg.pipeline import run_recipe
from weakseg.recipe import DataConfig, Recipe, load_recipe
from weakseg.report.pictures import thumbnail
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.predict import images_in
from weakseg.stages.score import match


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """RGB of 12 bits: scenes as they are, in a folder for each class, and one dark one."""
    root = tmp_path_factory.mktemp("deep") / "photos"
    for i in range(12):
        scene = draw(0, i, 64)
        values = scene.image.astype(np.uint16) * 16 + 7
        write_tiff(root / ("cat" if i % 2 else "dog") / f"{i}.tif", values // (20 if i == 3 else 1))
    return root


def recipe_of(photos: Path, **data: object) -> Recipe:
    return load_recipe(
        {**TINY, "data": {"source": "folder", "root": str(photos), **data}},
        sets=["segmenter.enabled=false", "train.steps=2", "predict.flip=true", "masks.margin=0.02"],
    )


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory):
    return run_recipe(recipe_of(photos), tmp_path_factory.mktemp("run") / "run")


def test_the_range_is_in_the_recipe_and_the_model(finished, photos):
    kept = yaml.safe_load((finished.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["data"]["depth"] == 12 and kept["data"]["bands"] is None
    config = json.loads((finished.folder / "2-train/model/config.json").read_text())
    assert config["preprocessing"]["depth"] == 12
    assert {s.reading for s in finished.collection} == {Reading(12)}
    # What the run keeps counts from then on, whatever is found later.
    assert {s.reading for s in collect(load_recipe(finished.folder / "recipe.yaml").data)} == {
        Reading(12)
    }


def test_the_same_command_goes_on_and_says_the_range_once(finished, photos, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(pipeline.console, "print", lambda text="", **_: said.append(str(text)))
    run_recipe(recipe_of(photos), finished.folder)
    assert sum("data.depth" in line for line in said) == 1
    assert not [line for line in said if "differ" in line]
    assert sum("skipped" in line for line in said) == 4


def test_all_that_look_at_an_image_see_the_same(finished, photos, tmp_path, capsys):
    sample = next(s for s in finished.collection if s.id == "cat/3")  # the dark one
    wanted = np.rint((draw(0, 3, 64).image.astype(float) * 16 + 7) // 20 / 4095 * 255)
    np.testing.assert_array_equal(sample.pixels(), wanted.astype(np.uint8))
    np.testing.assert_array_equal(thumbnail(sample), sample.pixels())
    model = weakseg.load(finished.folder)
    assert model.reading == Reading(12)
    np.testing.assert_array_equal(model.predict(sample.image), model.predict(sample.pixels()))
    assert (read_image(sample.image) != sample.pixels()).any()  # alone it would be brighter
    dark = photos / "cat" / "3.tif"
    app(
        ["predict", str(finished.folder), str(dark), "--out", str(tmp_path)],
        result_action="return_value",
    )
    np.testing.assert_array_equal(read_mask(tmp_path / "3.png"), model.predict(sample.pixels()))
    masks = RunFolder(finished.folder).stage_folder("masks") / "masks"
    pair = next(p for p in match(masks, photos) if p.id == "cat/3")
    np.testing.assert_array_equal(pair.sample.pixels(), sample.pixels())


def test_a_model_of_8_bit_images_finds_the_range_of_those_it_predicts(photos):
    found = images_in(photos)
    assert {s.reading for s in found} == {Reading(12)}
    assert {s.reading for s in images_in(photos, Reading(16))} == {Reading(16)}


def test_another_range_is_other_data(finished, photos):
    one, other = (collect(recipe_of(photos, depth=d).data) for d in (12, [0, 3000]))
    assert one.fingerprint() == finished.collection.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    "data",
    [{"depth": 7}, {"depth": [9, 9]}, {"depth": [1, 2, 3]}, {"bands": [1, 2]}, {"bands": [0]}],
)
def test_settings_that_cannot_be_are_refused(data):
    with pytest.raises(UserError) as caught:
        load_recipe({"data": data})
    assert f"data.{next(iter(data))}" in caught.value.what


def test_settings_survive_yaml():
    for given in ({"depth": 12}, {"depth": (0.5, 2.0)}, {"bands": (4, 3, 2)}, {"bands": "alpha"}):
        recipe = Recipe(data=DataConfig(**given))
        assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


# --- a model folder that is copied away --------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target / "model")
    return target / "model"


def same_answers(one, other, images: list[Path]) -> None:
    assert one.background_score == other.background_score
    batch = torch.randint(0, 256, (2, 3, 80, 56), dtype=torch.uint8)
    assert torch.equal(one.probabilities(batch), other.probabilities(batch))
    for image in images:
        np.testing.assert_array_equal(one.predict(image), other.predict(image))


def test_a_copied_model_answers_as_in_its_run(finished, photos, tmp_path):
    rule = json.loads((finished.folder / "5-masks/rule.json").read_text())
    model = weakseg.load(finished.folder)
    assert model.threshold == rule["threshold"] and model.flip
    away = weakseg.load(copied(model.source, tmp_path))
    assert away.details["threshold rule"] == rule["rule"]
    same_answers(model, away, sorted(photos.rglob("*.tif"))[:4])
    away.save_pretrained(tmp_path / "again")
    same_answers(model, weakseg.load(tmp_path / "again"), [])
    card = (model.source / "README.md").read_text(encoding="utf-8")
    assert f"{rule['threshold']:.3g}" in card and "0 to 4095" in card


def test_what_is_decided_later_reaches_the_model(finished, photos, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    model = folder / "2-train/model"
    weights = (model / "model.safetensors").read_bytes()
    (model / "README.md").write_text("license: mine", encoding="utf-8")
    recipe = recipe_of(photos)
    for sets, threshold in (
        ({"masks": {"rule": "constant", "threshold": 0.83}}, 0.83),
        ({"predict": {"scales": [1.0, 0.5], "max_side": 48}}, None),
    ):
        changed = load_recipe(recipe.model_dump(mode="json"), overrides=sets)
        run_recipe(changed, folder)
        inference = json.loads((model / "config.json").read_text())["inference"]
        rule = json.loads((folder / "5-masks/rule.json").read_text())
        assert inference["threshold"] == rule["threshold"] == (threshold or rule["threshold"])
        assert inference["scales"] == list(changed.predict.scales)
        assert inference["max_side"] == changed.predict.max_side
        target = tmp_path / str(threshold)
        same_answers(
            weakseg.load(folder), weakseg.load(copied(model, target)), [photos / "cat/1.tif"]
        )
    # Masks of refined scores say nothing of the network's own.
    refined = load_recipe(recipe.model_dump(mode="json"), overrides={"refine": ["pamr"]})
    run_recipe(refined, folder)
    assert json.loads((model / "config.json").read_text())["inference"]["threshold"] is None
    assert (model / "model.safetensors").read_bytes() == weights
    assert (model / "README.md").read_text(encoding="utf-8") == "license: mine"
