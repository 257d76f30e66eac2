"""Corrected masks in a run: what they change, and what they must not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.stages.conftest import contents
from weakseg.cli import app
from weakseg.data.images import read_mask, write_mask
from weakseg.errors import UserError
from weakseg.pipeline import collect, run_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.annotation import export_masks, import_masks, run_masks
from weakseg.stages.masks import (
    mask_files,
    mask_files_inputs,
    require_corrections_of_images,
    require_masks_that_fit,
    score,
)
from weakseg.stages.segment import segment


def test_corrected_masks_are_trained_on_and_never_measured_with(tiny, tmp_path, capsys):
    run_recipe(tiny, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    collection = collect(tiny.data)
    before = {name: run.record(name) for name in ("masks", "segment", "evaluate")}
    rows = json.loads((run.path / "8-evaluate/results.json").read_text())["rows"]
    pseudo = contents(run.path, "5-masks/**/*")
    assert before["segment"].results["corrected"] == 0

    fixed = tmp_path / "fixed"
    train, val = collection.split("train"), collection.split("val")
    for sample in (*train[:3], val[0]):
        write_mask(fixed / f"{sample.id}.png", np.full((64, 64), 1, dtype=np.uint8))
    app(["import-masks", str(fixed), "--into", str(run.path)], result_action="return_value")
    said = capsys.readouterr()
    assert said.out.startswith("4 corrected masks from masks in ")
    assert "1 mask of images that are not trained on" in " ".join(said.err.split())

    run_recipe(tiny, run.path)
    after = {name: run.record(name) for name in before}
    assert after["masks"] == before["masks"]
    assert contents(run.path, "5-masks/**/*") == pseudo
    assert after["segment"].fingerprint != before["segment"].fingerprint
    assert after["segment"].results["corrected"] == 3
    card = (run.stage_folder("segment") / "model" / "README.md").read_text(encoding="utf-8")
    assert "from 3 masks corrected by hand" in card and "no pixel label" not in card
    now = json.loads((run.path / "8-evaluate/results.json").read_text())["rows"]
    assert [r for r in now if r["stage"] != "segmenter"] == [
        r for r in rows if r["stage"] != "segmenter"
    ], "rows of the masks compare the pseudo masks"
    page = run.report_file.read_text(encoding="utf-8")
    assert "3 of these masks were corrected by hand" in page

    files = mask_files(run, train)
    assert [f.parent.parent.name for f in files[:4]] == ["corrected"] * 3 + ["masks"]
    same = mask_files_inputs(run, train)
    write_mask(run.path / "corrected" / f"{val[0].id}.png", np.zeros((64, 64), dtype=np.uint8))
    assert mask_files_inputs(run, train) == same, "only masks that are trained on count"
    write_mask(files[0], np.zeros((64, 64), dtype=np.uint8))
    assert mask_files_inputs(run, train) != same

    made = run_masks(run, tiny, collection)
    export_masks(made, "voc", tmp_path / "again")
    for i in (0, 3):
        out = tmp_path / "again/SegmentationClass" / f"{train[i].id}.png"
        assert (read_mask(out) == read_mask(files[i])).all()


@pytest.fixture
def masked(tiny, tmp_path):
    """A run with masks, made by hand in the place of the stage's."""
    run = RunFolder(tmp_path / "run")
    collection = collect(tiny.data)
    stage = run.stage("masks", {})
    with stage.working():
        for sample in collection.split("train"):
            write_mask(stage.folder / "masks" / f"{sample.id}.png", np.eye(64, dtype=np.uint8))
    run.recipe_file.write_text(tiny.to_yaml(), encoding="utf-8")
    return run, collection


def test_what_a_run_has_to_export(masked, tiny):
    run, collection = masked
    assert len(run_masks(run, tiny, collection).items) == 24
    with pytest.raises(UserError, match="no masks of val") as caught:
        run_masks(run, tiny, collection, splits=("val",))
    assert "--of predict" in (caught.value.mend or "")
    with pytest.raises(UserError, match="no split 'vall'"):
        run_masks(run, tiny, collection, splits=("vall",))
    with pytest.raises(UserError, match="'predict' has not been run"):
        run_masks(run, tiny, collection, "predict")


def test_a_method_that_is_its_own_segmenter_has_no_use_for_them(masked, tiny):
    run, collection = masked
    off = tiny.segmenter.model_copy(update={"enabled": False})
    recipe = tiny.model_copy(update={"segmenter": off})
    own = run.stage_folder("masks") / "masks"
    found = import_masks(run, recipe, collection, own, confirmed=True)
    assert "trains no segmenter" in found.notes[-1]


def test_what_nobody_changed_stays_the_runs_own(masked, tiny, tmp_path):
    run, collection = masked
    made = run.stage_folder("masks") / "masks"
    first, second, *_ = collection.split("train")
    write_mask(made / f"{second.id}.png", np.where(np.eye(64) > 0, 255, 1).astype(np.uint8))
    with pytest.raises(UserError, match="none differs from the run's"):
        import_masks(run, tiny, collection, made)
    assert not (run.path / "corrected").exists()
    edited = tmp_path / "edited"
    shutil.copytree(made, edited)
    write_mask(edited / f"{first.id}.png", np.ones((64, 64), np.uint8))
    # Unsure pixels come back as background from most formats: nobody changed them either.
    write_mask(edited / f"{second.id}.png", (np.eye(64) == 0).astype(np.uint8))
    found = import_masks(run, tiny, collection, edited)
    assert (found.ids, found.unchanged) == ((first.id,), 23)
    assert [p.stem for p in (run.path / "corrected").rglob("*.png")] == [first.id.split("/")[-1]]


def test_predictions_of_an_earlier_network_are_not_exported(tiny, tmp_path):
    run = RunFolder(run_recipe(tiny, tmp_path / "run").folder)
    collection = collect(tiny.data)
    assert run_masks(run, tiny, collection, "predict").items
    write_mask(tmp_path / "fixed" / f"{collection[0].id}.png", np.ones((64, 64), np.uint8))
    import_masks(run, tiny, collection, tmp_path / "fixed", confirmed=True)
    run_recipe(tiny, run.path, until="segment")
    with pytest.raises(UserError, match="older than the network"):
        run_masks(run, tiny, collection, "predict")


def test_masks_that_were_corrected_are_not_scored(masked):
    run, collection = masked
    train = collection.split("train")
    write_mask(run.path / "corrected" / f"{train[5].id}.png", np.ones((64, 64), np.uint8))
    scored = {s.masked.id for s in score(run, train)}
    assert scored == {s.id for s in train} - {train[5].id}


def test_the_command_line(masked, tmp_path, capsys):
    run, _ = masked
    words = ["export", str(run.path), "--to", "coco", "--out", str(tmp_path / "out")]
    app([*words, "--split", "train", "--objects", "class"], result_action="return_value")
    assert capsys.readouterr().out == f"24 masks in {tmp_path / 'out'}\n"
    file = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert len(file["annotations"]) == 24
    with pytest.raises(UserError, match="holds no run"):
        app(["export", str(tmp_path), "--to", "coco", "--out", str(tmp_path / "x")])


def _jpeg(file, shape):
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, "JPEG")


def _colours(file, shape):
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(file, "PNG")


FAULTS = {
    "id beyond the classes": lambda f: write_mask(f, np.full((64, 64), 21, np.uint8)),
    "largest id": lambda f: write_mask(f, np.full((64, 64), 254, np.uint8)),
    "one pixel of it": lambda f: write_mask(
        f, np.pad([[100]], ((0, 63), (63, 0))).astype(np.uint8)
    ),
    "wider": lambda f: write_mask(f, np.zeros((64, 65), np.uint8)),
    "half as large": lambda f: write_mask(f, np.zeros((32, 32), np.uint8)),
    "JPEG": lambda f: _jpeg(f, (64, 64)),
    "colours": lambda f: _colours(f, (64, 64)),
    "text": lambda f: f.write_text("no mask"),
    "empty": lambda f: f.write_bytes(b""),
}


@pytest.mark.parametrize("where", ["corrected", "5-masks/masks"])
@pytest.mark.parametrize("name", FAULTS)
def test_masks_that_do_not_fit_are_found_before_training(masked, tiny, name, where):
    run, collection = masked
    first, other = collection.split("train")[2], collection.split("train")[5]
    for sample in (first, other):
        file = run.path / where / f"{sample.id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        FAULTS[name](file)
    with pytest.raises(UserError) as caught:
        segment(run, tiny, collection)
    assert caught.value.where == str(run.path)
    for sample in (first, other):
        assert f"{where}/{sample.id}.png: " in caught.value.what
    assert caught.value.what.startswith("2 of 24")
    assert ("corrected" in caught.value.mend) == (where == "corrected")
    assert not run.stage_folder("segment").exists()


@pytest.mark.parametrize(
    "name", ["of-no-image.png", "train/other.png", "FIRST.jpg", "FIRST.PNG", "link/FIRST.png"]
)
def test_corrections_of_no_image_are_found(masked, tiny, name):
    """What nobody would ever train on is no correction, whatever its sender thinks."""
    run, collection = masked
    linked = name.startswith("link/")
    name = name.removeprefix("link/").replace("FIRST", collection.split("train")[0].id)
    file = run.path / "corrected" / name
    file.parent.mkdir(parents=True)
    file.symlink_to("gone.png") if linked else file.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        segment(run, tiny, collection)
    assert caught.value.where == str(run.path / "corrected")
    assert file.name in caught.value.what
    assert not run.stage_folder("segment").exists()


def test_corrections_that_fit_pass(masked):
    run, collection = masked
    train, val = collection.split("train"), collection.split("val")
    corrected = run.path / "corrected"
    write_mask(corrected / f"{train[0].id}.png", np.full((64, 64), 255, np.uint8))
    write_mask(corrected / f"{train[1].id}.png", np.full((64, 64), len(train.classes), np.uint8))
    write_mask(corrected / f"{val[0].id}.png", np.zeros((9, 9), np.uint8))  # trained on by nobody
    (corrected / "corrected.json").write_text("{}")
    require_corrections_of_images(run, collection)
    require_masks_that_fit(run, train)
