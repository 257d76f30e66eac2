"""Runs on score files of other code: no training, the same way from there on."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.stages.conftest import TINY, contents
from weakseg.cli import _show_plan
from weakseg.data.images import image_size, read_mask
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.export.model import find_model
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.report.facts import gather
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.seeds import seeds


def recipe_of(root: Path, given: Path, **more: object) -> Recipe:
    sets = [f"{key}={json.dumps(value)}" for key, value in more.items()]
    return load_recipe(
        TINY,
        overrides={"data": {"root": str(root)}},
        sets=[f"seeds.given={given}", "seeds.stride=1", "seeds.dtype=float16", *sets],
    )


def write_all(root: Path, folder: Path, kind: str, *, flat: bool = True) -> dict[str, np.ndarray]:
    """Blurred true masks of the training images, as the given format holds them."""
    collection = collect(load_recipe(TINY, overrides={"data": {"root": str(root)}}).data)
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for sample in collection.split("train"):
        truth = read_mask(sample.mask)
        ids = [collection.classes.index(tag) + 1 for tag in sample.tags]
        maps = np.stack([cv2.blur((truth == k).astype(np.float32), (5, 5)) for k in ids])
        background = 1 - maps.max(0)
        expected[sample.id] = maps
        small = torch.from_numpy(maps[:, ::4, ::4].copy())
        value = {
            "psa": {k - 1: m for k, m in zip(ids, maps, strict=True)},
            "psa-crf": {0: background} | dict(zip(ids, maps, strict=True)),
            "irn": {"keys": torch.tensor(ids) - 1, "cam": small, "high_res": maps},
            "puzzle": {"keys": np.array([0, *ids]), "cam": small, "hr_cam": maps},
            "puzzle-rw": {"keys": np.array([0, *ids]), "rw": maps},
            "rs": {"keys": np.array([0, *ids]), "seed": maps},
            "weakseg": ScoreFile(np.array(ids), maps, 1, truth.shape),
        }[kind]
        stem = folder / (sample.id.rpartition("/")[2] if flat else sample.id)
        stem.parent.mkdir(parents=True, exist_ok=True)
        if kind == "weakseg":
            write_scores(stem.with_suffix(".npz"), value, dtype="float16")
        elif kind == "rs":
            stem.with_suffix(".pkl").write_bytes(pickle.dumps(value))
        else:
            np.save(stem.with_suffix(".npy"), value, allow_pickle=True)
    return expected


@pytest.mark.parametrize("kind", ["psa", "psa-crf", "irn", "puzzle", "puzzle-rw", "rs", "weakseg"])
def test_every_format_becomes_the_same_scores(shapes_root, tmp_path, kind):
    expected = write_all(shapes_root, tmp_path / "given", kind, flat=kind == "irn")
    recipe = recipe_of(shapes_root, tmp_path / "given")
    collection = collect(recipe.data)
    stage = seeds(RunFolder(tmp_path / "run"), recipe, collection)
    assert stage.results["head"] == f"given scores ({kind})"
    for sample in collection.split("train"):
        found = read_scores(stage.folder / "scores" / f"{sample.id}.npz")
        ids, maps = found.foreground()
        assert ids.tolist() == [collection.classes.index(tag) + 1 for tag in sample.tags]
        wanted = expected[sample.id]
        if kind == "psa-crf":  # with a background, they become probabilities
            background = 1 - wanted.max(0)
            total = background + wanted.sum(0)
            assert np.allclose(found.background(), background / total, atol=2e-3)
            wanted = wanted / total
        assert np.allclose(maps, wanted, atol=2e-3)
    assert seeds(RunFolder(tmp_path / "run"), recipe, collection).skipped


def test_a_whole_run(shapes_root, tmp_path, monkeypatch):
    """Good scores give good masks; then the segmenter, predictions, evaluation and report."""
    write_all(shapes_root, tmp_path / "given", "irn")
    recipe = recipe_of(
        shapes_root, tmp_path / "given", refine=["pamr"], **{"segmenter.train.steps": 2}
    )
    monkeypatch.setattr("weakseg.stages.train.train", None)
    done = run_recipe(recipe, tmp_path / "run")
    names = {p.name for p in done.folder.iterdir()}
    assert "2-train" not in names and {"6-segment", "7-predict", "report.html"} <= names
    rows = json.loads((done.folder / "8-evaluate/results.json").read_text())["rows"]
    seed = next(r for r in rows if r["stage"] == "seed")
    mask = next(r for r in rows if r["stage"] == "mask")
    assert seed["miou"] > 0.9 and mask["miou"] > 0.5
    assert seed["head"] == "given scores (irn)" and seed["scales"] == [] and seed["f1"] is None
    segmenter = next(r for r in rows if r["stage"] == "segmenter")
    assert segmenter["head"] == "segmenter" and segmenter["scales"] == [1.0]
    facts = gather(RunFolder(done.folder), done.collection, recipe)
    assert "train" not in facts.expected and facts.done("segment")
    report = done.report.read_text()
    assert "were given" in report and "given scores (irn)" in report
    assert "The method <code>cam" not in report
    assert done.model.classes == done.collection.classes


def test_changed_files_are_converted_again(shapes_root, tmp_path):
    write_all(shapes_root, tmp_path / "given", "psa")
    recipe = recipe_of(shapes_root, tmp_path / "given")
    run_recipe(recipe, tmp_path / "run", until="masks")
    before = contents(tmp_path / "run", "3-seeds/scores/**/*")
    first = sorted((tmp_path / "given").iterdir())[0]
    value = {k: np.zeros_like(m) for k, m in np.load(first, allow_pickle=True).item().items()}
    np.save(first, value, allow_pickle=True)
    run_recipe(recipe, tmp_path / "run", until="masks")
    after = contents(tmp_path / "run", "3-seeds/scores/**/*")
    assert sum(before[key] != after[key] for key in before) == 1


def test_given_scores_after_a_training(tiny, shapes_root, tmp_path):
    """What an earlier recipe trained is neither shown nor used."""
    run_recipe(tiny, tmp_path / "run", until="seeds")
    record = RunFolder(tmp_path / "run").record("seeds")
    write_all(shapes_root, tmp_path / "given", "psa")
    other = recipe_of(shapes_root, tmp_path / "given", **{"segmenter.enabled": False})
    done = run_recipe(other, tmp_path / "run")
    assert RunFolder(done.folder).record("seeds").fingerprint != record.fingerprint
    facts = gather(RunFolder(done.folder), done.collection, other)
    assert "train" not in facts.records and "segment" not in facts.expected
    with pytest.raises(UserError, match="holds no model"):
        find_model(done.folder)


def test_a_finished_run_keeps_its_fingerprint(tiny):
    """The new settings must not make old seeds stale."""
    from weakseg.stages.seeds import _GIVEN

    kept = tiny.seeds.model_dump(mode="json", exclude=_GIVEN)
    assert set(kept) == {
        *("scales", "flip", "max_side", "batch", "head", "place", "stride", "dtype")
    }


def test_sizes(shapes_root, tmp_path):
    """Coarser maps stay as they are, larger ones are reduced, others are refused."""
    expected = write_all(shapes_root, tmp_path / "given", "psa")
    recipe = recipe_of(shapes_root, tmp_path / "given", **{"seeds.stride": 4})
    collection = collect(recipe.data)
    stage = seeds(RunFolder(tmp_path / "run"), recipe, collection)
    sample = collection.split("train")[0]
    found = read_scores(stage.folder / "scores" / f"{sample.id}.npz")
    assert found.scores.shape[1:] == (16, 16) and found.stride == 4 and found.size == (64, 64)
    blocks = expected[sample.id].reshape(-1, 16, 4, 16, 4).mean((2, 4))
    assert np.allclose(found.scores, blocks, atol=2e-3)
    file = tmp_path / "given" / f"{sample.id.rpartition('/')[2]}.npy"
    value = np.load(file, allow_pickle=True).item()
    for shape, fits in (((8, 8), True), ((64, 60), False), ((65, 65), False), ((32, 33), True)):
        changed = {k: cv2.resize(m, shape[::-1]) for k, m in value.items()}
        np.save(file, changed, allow_pickle=True)
        run = RunFolder(tmp_path / f"{shape}")
        if fits:
            made = seeds(run, recipe, collection).folder / "scores" / f"{sample.id}.npz"
            assert read_scores(made).scores.shape[1:] == ((8, 8) if shape == (8, 8) else (16, 16))
            assert read_scores(made).full_size().scores.shape[1:] == image_size(sample.image)
        else:
            with pytest.raises(UserError, match=f"{shape[0]} x {shape[1]} do not fit") as caught:
                seeds(run, recipe, collection)
            assert str(file) in str(caught.value)


def test_what_does_not_fit(shapes_root, tmp_path):
    given = tmp_path / "given"
    write_all(shapes_root, given, "irn")
    (given / "00003.npy").unlink(), (given / "00005.npy").unlink()
    recipe = recipe_of(shapes_root, given)
    with pytest.raises(UserError, match="2 of 24 images have no score file here: train/00003"):
        run_recipe(recipe, tmp_path / "a", until="masks")
    shutil.rmtree(given)
    write_all(shapes_root, given, "psa")
    wrong = recipe_of(shapes_root, given, **{"seeds.given_format": "psa-crf"})
    with pytest.raises(UserError, match="no map of a tagged class") as caught:
        run_recipe(wrong, tmp_path / "b", until="masks")
    assert "seeds.given_format" in (caught.value.mend or "")
    with pytest.raises(UserError, match="no stage 'train'") as caught:
        run_recipe(recipe, tmp_path / "c", until="train")
    assert "seeds.given=null" in (caught.value.mend or "")


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"refine": ["scg"]}, "scg needs the features"),
        ({"refine": ["affinity"]}, "affinity starts from a trained classifier"),
        ({"segmenter.from_classifier": True}, "no classifier to start from"),
        ({"seeds.head": "cam"}, "head 'cam'"),
        ({"seeds.given_format": "seam"}, "given_format"),
    ],
)
def test_what_needs_a_classifier_is_refused_at_once(shapes_root, tmp_path, sets, match):
    with pytest.raises(UserError, match=match) as caught:
        run_recipe(recipe_of(shapes_root, tmp_path / "none", **sets), tmp_path / "run")
    assert caught.value.mend and not (tmp_path / "run").exists()


def test_affinity_with_its_own_backbone(shapes_root, tmp_path):
    write_all(shapes_root, tmp_path / "given", "psa")
    train = {"steps": 2, "batch": 4, "crop": 64}
    step = {"affinity": {"from_classifier": False, "train": train, "labels": {"harden": "none"}}}
    recipe = recipe_of(shapes_root, tmp_path / "given", refine=[step])
    run_recipe(recipe, tmp_path / "run", until="masks")
    assert (tmp_path / "run" / "4-refine" / "network" / "stage.json").exists()


def test_the_plan(shapes_root, tmp_path, capsys):
    write_all(shapes_root, tmp_path / "given", "psa")
    _show_plan(recipe_of(shapes_root, tmp_path / "given"))
    shown = capsys.readouterr().err
    assert "given scores" in shown and "train " not in shown and "segment" in shown
