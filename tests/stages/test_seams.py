"""What commands and stages must not do to each other."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.stages.conftest import TINY
from weakseg import load
from weakseg.cli import app
from weakseg.errors import UserError
from weakseg.export.model import update_models
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe
from weakseg.runfolder import RunFolder


@pytest.fixture(scope="module")
def classified(tmp_path_factory, shapes_root):
    """A run that ends with its masks and numbers."""
    data = {"root": str(shapes_root)}
    recipe = load_recipe(TINY, overrides={"data": data, "segmenter": {"enabled": False}})
    return run_recipe(recipe, tmp_path_factory.mktemp("seams") / "run").folder


@pytest.fixture
def run(classified, tmp_path):
    """A copy that a test may change."""
    return RunFolder(shutil.copytree(classified, tmp_path / "run"))


def _change(run: RunFolder, stage: str, **values) -> None:
    file = run.stage_folder(stage) / "stage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_scoring_a_run_leaves_its_stages_alone(run):
    before = {p: p.stat().st_mtime_ns for p in run.stage_folder("masks").rglob("*")}
    app(["score", str(run.path), "--shown", "3"], result_action="return_value")
    assert {p: p.stat().st_mtime_ns for p in run.stage_folder("masks").rglob("*")} == before
    assert (run.path / "quality.csv").is_file()


def test_a_table_that_is_none_is_refused(run, tmp_path):
    for out in (tmp_path / "q.html", tmp_path):
        with pytest.raises(UserError, match=r"no \.csv file"):
            app(["score", str(run.path), "--out", str(out)], result_action="return_value")


def test_a_classifier_takes_the_threshold_of_its_own_masks(run, monkeypatch):
    rule = json.loads((run.stage_folder("masks") / "rule.json").read_text())["threshold"]
    found = load(run.path)
    assert found.threshold == rule and found.details["threshold rule"] == "label-free"
    monkeypatch.chdir(run.stage_folder("train"))
    assert load("model").threshold == rule


@pytest.mark.parametrize("why", ["head", "given", "refined", "seeds", "running", "list"])
def test_and_no_threshold_of_other_maps(run, why):
    recipe = load_recipe(run.recipe_file).model_dump(mode="json")
    if why == "head":
        recipe["seeds"]["head"] = "another"
    elif why == "given":
        recipe["seeds"]["given"] = "elsewhere"
    elif why == "refined":
        recipe["refine"] = ["pamr"]
    elif why == "seeds":
        _change(run, "seeds", inputs={"train": "another training"})
    elif why == "running":
        _change(run, "masks", status="running")
    else:
        (run.stage_folder("masks") / "rule.json").write_text("[]")
    run.recipe_file.write_text(json.dumps(recipe))
    update_models(run, load_recipe(run.recipe_file))
    assert load(run.stage_folder("train")).threshold is None


def test_a_card_has_numbers_of_its_own_network_alone(run, tmp_path):
    load(run.path).save_pretrained(tmp_path / "first")
    assert "| seed | train | 24 |" in (tmp_path / "first" / "README.md").read_text("utf-8")
    _change(run, "train", fingerprint="trained again")
    load(run.path).save_pretrained(tmp_path / "second")
    assert "None were measured" in (tmp_path / "second" / "README.md").read_text("utf-8")


def test_boxes_that_the_data_lack_are_refused_before_anything_is_kept(run):
    kept = run.recipe_file.read_text()
    with pytest.raises(UserError, match=r"evaluate\.boxes"):
        app(["evaluate", str(run.path), "--boxes", "xml"], result_action="return_value")
    assert run.recipe_file.read_text() == kept


def test_masks_of_a_run_from_before_the_criterion_stay(run):
    recipe = load_recipe(run.recipe_file, sets=["masks.criterion=cross-entropy"])
    run_recipe(recipe, run.path)
    record = run.record("masks")
    assert "criterion" not in record.inputs["masks"]
    older = recipe.model_dump(mode="json")
    del older["masks"]["criterion"]
    run.recipe_file.write_text(json.dumps(older))
    run_recipe(load_recipe(run.recipe_file), run.path)
    assert run.record("masks") == record


def test_a_finished_training_is_not_cleared_for_one_that_cannot_start(run, tmp_path, capsys):
    recipe = load_recipe(run.recipe_file, sets=[f"backbone.weights={tmp_path / 'none.pth'}"])
    with pytest.raises(UserError, match=r"none\.pth"):
        run_recipe(recipe, run.path)
    assert (run.stage_folder("train") / "model" / "model.safetensors").is_file()
    assert "backbone.weights: None ->" in " ".join(capsys.readouterr().err.split())
