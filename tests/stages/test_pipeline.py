"""The whole way, in one process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import weakseg
from tests.stages.conftest import TINY, contents
from weakseg import pipeline
from weakseg.data.images import read_mask, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.export.model import find_model
from weakseg.methods import resolve
from weakseg.ops import confusion_matrix, metrics
from weakseg.pipeline import run_recipe
from weakseg.recipe import InferenceConfig, load_recipe
from weakseg.report.comparison import summary, write_comparison_page
from weakseg.report.facts import gather
from weakseg.report.numbers import Comparison, Entry
from weakseg.runfolder import RunFolder
from weakseg.stages import seeds
from weakseg.stages.batches import groups_of_one_size
from weakseg.stages.check import collect
from weakseg.stages.seeds import classification_f1, gated
from weakseg.stages.train import train, train_inputs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes_root):
    """A finished tiny run, shared by tests that only look."""
    recipe = load_recipe(TINY, overrides={"data": {"root": str(shapes_root)}})
    return run_recipe(recipe, tmp_path_factory.mktemp("run") / "run")


def test_a_run_leaves_exactly_these_files(finished):
    tops = {
        p.relative_to(finished.folder).as_posix()
        for p in finished.folder.rglob("*")
        if p.is_file() and p.suffix not in (".png", ".npz") and "logs" not in p.parts
    }
    assert tops == {
        "recipe.yaml",
        "report.html",
        "1-check/stage.json",
        "1-check/check.json",
        "2-train/stage.json",
        "2-train/last.ckpt",
        "2-train/model/config.json",
        "2-train/model/model.safetensors",
        "2-train/model/README.md",
        "3-seeds/stage.json",
        "5-masks/stage.json",
        "5-masks/rule.json",
        "5-masks/quality.csv",
        "5-masks/classes.txt",
        "6-segment/stage.json",
        "6-segment/last.ckpt",
        "6-segment/model/config.json",
        "6-segment/model/model.safetensors",
        "6-segment/model/README.md",
        "7-predict/stage.json",
        "8-evaluate/stage.json",
        "8-evaluate/results.json",
        "8-evaluate/results.csv",
    }


def test_a_preset_starts_the_head_and_leaves_what_it_does_not_train(tmp_path, shapes_root):
    """psa's: uniform numbers up to sqrt(6 / (channels + classes)), and BatchNorm learns nothing."""
    data = {"root": str(shapes_root)}
    few = {"preset": "psa", "lr": 0.001, "steps": 2, "init_from": None}
    recipe = load_recipe(TINY, overrides={"data": data, "train": few})
    run = RunFolder(tmp_path / "run")
    train(run, recipe, collect(recipe.data))
    found = load_file(run.stage_folder("train") / "model" / "model.safetensors")
    head = found["head.classifier.weight"]
    classes, channels = head.shape[:2]
    largest = (6 / (channels + classes)) ** 0.5
    assert largest * 0.95 < head.abs().max() < largest * 1.05
    assert channels**-0.5 < largest * 0.9  # PyTorch's own would end there
    norms = [k.removesuffix("running_mean") for k in found if k.endswith("running_mean")]
    assert norms
    for norm in norms:
        assert set(found[norm + "weight"].tolist()) <= {0.0, 1.0}  # as they start
        assert (found[norm + "bias"] == 0).all()


def test_outputs_mirror_the_images(finished):
    train = [s.id for s in finished.collection.split("train")]
    every = [s.id for s in finished.collection]
    masks = {
        p.relative_to(finished.masks).with_suffix("").as_posix()
        for p in finished.masks.rglob("*.png")
    }
    predicted = finished.folder / "7-predict" / "masks"
    assert masks == set(train)
    assert {
        p.relative_to(predicted).with_suffix("").as_posix() for p in predicted.rglob("*.png")
    } == set(every)
    for sample in finished.collection.split("train"):
        mask = read_mask(finished.masks / f"{sample.id}.png")
        assert mask.shape == Image.open(sample.image).size[::-1]
        allowed = {0, *(finished.collection.classes.index(t) + 1 for t in sample.tags)}
        assert set(np.unique(mask)) <= allowed


def test_masks_follow_from_the_stored_scores_and_rule(finished):
    rule = json.loads((finished.folder / "5-masks" / "rule.json").read_text())
    sample = finished.collection.split("train")[0]
    seed = read_scores(finished.folder / "3-seeds" / "scores" / f"{sample.id}.npz").full_size()
    ids, maps = seed.foreground()
    expected = np.where(maps.max(0) > np.float32(rule["threshold"]), ids[maps.argmax(0)], 0)
    assert (read_mask(finished.masks / f"{sample.id}.png") == expected).all()
    assert sum(rule["histogram"]) > 0


def test_results_say_where_they_come_from(finished):
    rows = json.loads((finished.folder / "8-evaluate" / "results.json").read_text())["rows"]
    by = {(r["stage"], r["split"], r["rule"]): r for r in rows}
    assert set(by) == {
        ("seed", "train", "oracle"),
        ("seed", "train", "label-free"),
        ("mask", "train", "label-free"),
        ("segmenter", "train", "label-free"),
        ("segmenter", "val", "label-free"),
    }
    assert by["seed", "train", "oracle"]["miou"] >= by["seed", "train", "label-free"]["miou"]
    for row in rows:
        assert 0 <= row["miou"] <= 1
        assert row["images"] == (6 if row["split"] == "val" else 24)
    assert by["segmenter", "val", "label-free"]["tags"] == "none"


def test_lists_of_images_have_rows_of_their_own_and_the_worst_are_named(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    train = finished.collection.split("train").samples
    (tmp_path / "list.txt").write_text(f"{train[3].id}\n{train[8].id}\n")
    recipe = load_recipe(folder / "recipe.yaml", sets=[f"evaluate.lists.two={tmp_path}/list.txt"])
    run_recipe(recipe, folder)
    results = json.loads((folder / "8-evaluate/results.json").read_text())

    def counted(samples):
        pairs = ((folder / "5-masks/masks" / f"{s.id}.png", s.mask) for s in samples)
        return sum(
            confusion_matrix(*map(read_mask, p), len(finished.collection.classes)) for p in pairs
        )

    (row,) = (r for r in results["rows"] if (r["stage"], r["split"]) == ("mask", "two"))
    assert row["images"] == 2
    assert row["miou"] == pytest.approx(metrics(counted([train[3], train[8]])).miou)
    alone = sorted((metrics(counted([s])).miou, s.id) for s in train)
    assert results["worst"]["mask"] == [[name, pytest.approx(v)] for v, name in alone[:12]]


def test_the_segmenter_starts_from_the_classifier(finished):
    """Where both have one backbone that nobody trained before: four steps leave it near."""
    classifier, segmenter = (
        load_file(finished.folder / stage / "model/model.safetensors")
        for stage in ("2-train", "6-segment")
    )
    names = [n for n, w in classifier.items() if n.startswith("backbone.") and w.ndim > 1]
    start = torch.cat([classifier[n].flatten() for n in names])
    found = torch.cat([segmenter[f"network.{n}"].flatten() for n in names])
    assert not found.equal(start)
    assert torch.corrcoef(torch.stack([start, found]))[0, 1] > 0.9


def test_a_second_run_skips_everything(finished, monkeypatch):
    before = contents(finished.folder, "[2-8]*/**/*")
    said = []
    monkeypatch.setattr(pipeline.console, "print", lambda text="", **_: said.append(str(text)))
    run_recipe(finished.recipe, finished.folder)
    assert contents(finished.folder, "[2-8]*/**/*") == before
    assert sum("skipped" in line for line in said) == 7


def test_only_what_a_change_concerns_runs_again(tiny, tmp_path):
    run_recipe(tiny, tmp_path / "run", until="masks")
    made = ("2-train/*.ckpt", "2-train/**/*.safetensors", "3-seeds/**/*")
    kept = contents(tmp_path / "run", *made)
    assert len(kept) > 24
    masks = contents(tmp_path / "run", "5-masks/masks/**/*")
    run = RunFolder(tmp_path / "run")
    trained = run.record("train")
    other = tiny.model_copy(
        update={"masks": tiny.masks.model_copy(update={"rule": "constant", "threshold": 0.95})}
    )
    run_recipe(other, run.path, until="masks")
    assert contents(run.path, *made) == kept
    again = run.record("train")
    assert (again.fingerprint, again.seconds) == (trained.fingerprint, trained.seconds)
    assert contents(run.path, "5-masks/masks/**/*") != masks
    assert run.record("masks").results["threshold"] == 0.95
    # The model folder answers by the masks' threshold wherever it is copied.
    config = json.loads((run.stage_folder("train") / "model/config.json").read_text())
    assert config["inference"]["threshold"] == 0.95


def test_masks_corrected_by_hand_are_trained_on(tiny, tmp_path):
    run_recipe(tiny, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    before = {name: run.record(name) for name in ("masks", "segment", "evaluate")}
    sample = pipeline.collect(tiny.data).split("train")[0]
    path = run.stage_folder("masks") / "masks" / f"{sample.id}.png"
    corrected = np.full_like(read_mask(path), 255)
    write_mask(path, corrected)
    run_recipe(tiny, run.path)
    assert (read_mask(path) == corrected).all()
    assert run.record("masks") == before["masks"]
    assert run.record("segment").fingerprint != before["segment"].fingerprint
    assert run.record("evaluate").fingerprint != before["evaluate"].fingerprint


def test_other_splits_can_be_trained_on(tiny, tmp_path):
    swapped = {"train": ("val",), "val": ("train",)}
    recipe = tiny.model_copy(update={"data": tiny.data.model_copy(update=swapped)})
    run_recipe(recipe, tmp_path / "run", until="seeds")
    assert RunFolder(tmp_path / "run").record("seeds").results["images"] == 6


def test_a_list_of_other_images_is_refused(tiny, tmp_path):
    (tmp_path / "list.txt").write_text("nobody\n")
    evaluate = tiny.evaluate.model_copy(update={"lists": {"mine": tmp_path / "list.txt"}})
    with pytest.raises(UserError, match="'mine'"):
        run_recipe(tiny.model_copy(update={"evaluate": evaluate}), tmp_path / "run")


def test_a_list_may_go_across_splits(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "list.txt").write_text("train/00001\ntrain/00002\nval/00003\n")
    evaluate = finished.recipe.evaluate.model_copy(
        update={"lists": {"mine": tmp_path / "list.txt"}}
    )
    recipe = finished.recipe.model_copy(update={"evaluate": evaluate})
    run_recipe(recipe, tmp_path / "run")
    results = json.loads((tmp_path / "run/8-evaluate/results.json").read_text())
    images = {r["stage"]: r["images"] for r in results["rows"] if r["split"] == "mine"}
    assert images == {"seed": 2, "mask": 2, "segmenter": 3}, "only trained images have masks"


def test_without_a_segmenter_the_model_is_the_classifier(tiny, tmp_path):
    run_recipe(tiny, tmp_path / "run")
    off = tiny.model_copy(
        update={"segmenter": tiny.segmenter.model_copy(update={"enabled": False})}
    )
    run = run_recipe(off, tmp_path / "run")
    assert run.model.model.heads == ("cam",)
    rows = json.loads((run.folder / "8-evaluate" / "results.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {"seed", "mask"}


def test_a_segmenter_that_diverges_names_its_own_settings(tiny, tmp_path):
    hot = tiny.segmenter.train.model_copy(update={"lr": 1e18, "steps": 8})
    recipe = tiny.model_copy(update={"segmenter": tiny.segmenter.model_copy(update={"train": hot})})
    with pytest.raises(UserError, match="became") as error:
        run_recipe(recipe, tmp_path / "run", until="segment")
    assert error.value.where == "segmenter.train"
    assert "lower segmenter.train.lr" in error.value.mend


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ZeroDivisionError("no\n  images [red]"), "ZeroDivisionError: no images \\[red]"),
        (UserError("the disk is full", where="x", mend="free some space"), "the disk is full"),
    ],
)
def test_a_report_that_fails_after_a_failure_says_so(tiny, tmp_path, monkeypatch, error, shown):
    def fail(*_):
        raise error

    def stop(*_):
        raise UserError("the data has errors", where="here")

    said = []
    monkeypatch.setattr(pipeline.console, "print", lambda text="", **_: said.append(str(text)))
    monkeypatch.setattr(pipeline, "write_report", fail)
    monkeypatch.setattr(pipeline.check, "check", stop)
    with pytest.raises(UserError) as caught:
        run_recipe(tiny, tmp_path / "run")
    assert caught.value.where == "here"  # the first error is the one that is raised
    lines = [line for line in said if shown in line]
    assert len(lines) == 1 and "\n" not in lines[0]


def test_ground_truth_changes_nothing_but_the_evaluation(tiny, tmp_path, monkeypatch):
    """The same run without ground truth gives the same model, seeds, masks and predictions."""
    run_recipe(tiny, tmp_path / "with")
    blind = lambda data: _without_masks(pipeline_collect(data))  # noqa: E731
    pipeline_collect = pipeline.collect
    monkeypatch.setattr(pipeline, "collect", blind)
    run_recipe(tiny, tmp_path / "without")
    patterns = (
        "*/model/model.safetensors",
        "3-seeds/scores/**/*",
        "5-masks/masks/**/*",
        "7-predict/masks/**/*",
    )
    assert contents(tmp_path / "with", *patterns) == contents(tmp_path / "without", *patterns)
    assert not (tmp_path / "without" / "8-evaluate").exists()


def _without_masks(collection):
    return replace(collection, samples=tuple(replace(s, mask=None) for s in collection.samples))


def test_the_api_gives_masks_and_a_model(finished):
    image = finished.collection[0].image
    mask = finished.model.predict(image)
    assert mask.shape == Image.open(image).size[::-1]
    assert mask.max() <= len(finished.collection.classes)
    same = weakseg.load(finished.folder / "6-segment" / "model").predict(
        np.asarray(Image.open(image).convert("RGB"))
    )
    assert (same == mask).all()
    assert finished.report.exists()


def test_run_takes_a_folder_and_a_table(tmp_path, finished):
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    lines = ["image,labels"]
    for i, sample in enumerate(finished.collection.split("train").samples[:12]):
        Image.open(sample.image).resize((50 + i, 61)).save(photos / f"{i}.jpg")
        lines.append(f"deep/{i}.jpg,{';'.join(sample.tags)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    tags = {tag for s in finished.collection.split("train").samples[:12] for tag in s.tags}
    classes = sorted(tags, reverse=True)
    run = weakseg.run(
        tmp_path / "photos",
        tmp_path / "labels.csv",
        out=tmp_path / "out",
        classes=classes,
        sets=["seed=5"],
        recipe=finished.recipe.model_dump(exclude={"data"}, mode="json"),
    )
    assert read_mask(run.masks / "deep" / "3.png").shape == (61, 53)
    assert run.collection.classes == tuple(classes) and run.recipe.seed == 5
    assert not (tmp_path / "out" / "8-evaluate").exists()


def test_bad_method_settings_stop_before_the_data_is_touched(tiny, tmp_path):
    wrong = tiny.model_copy(update={"method": {"name": "cam", "alpha": 4}})
    with pytest.raises(UserError, match="method.alpha"):
        run_recipe(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("gpus", "asked"), [(0, 1), (2, 3)])
def test_missing_gpus_are_said_before_anything_is_touched(tiny, tmp_path, monkeypatch, gpus, asked):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    runtime = tiny.runtime.model_copy(update={"accelerator": "gpu", "devices": asked})
    with pytest.raises(UserError, match="GPU"):
        run_recipe(tiny.model_copy(update={"runtime": runtime}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_not_written_to(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        run_recipe(tiny, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_image_that_turns_unreadable_names_itself_and_loses_nothing(tiny, tmp_path, monkeypatch):
    recipe = tiny.model_copy(
        update={"data": tiny.data.model_copy(update={"root": tmp_path / "own"})}
    )
    run_recipe(recipe, tmp_path / "run", until="train")
    collection = pipeline.collect(recipe.data)
    victim = collection.split("train").samples[-1].image
    whole = victim.read_bytes()
    original = seeds.make_seeds

    def spoil(*given):
        victim.write_bytes(whole[:200])
        return original(*given)

    monkeypatch.setattr(seeds, "make_seeds", spoil)
    with pytest.raises(UserError) as error:  # it turned so after the check
        run_recipe(recipe, tmp_path / "run")
    assert victim.name in str(error.value)
    assert RunFolder(tmp_path / "run").record("seeds").status == "failed"
    trained = RunFolder(tmp_path / "run").record("train")
    monkeypatch.undo()
    with pytest.raises(UserError, match="the data has errors"):
        run_recipe(recipe, tmp_path / "run")
    victim.write_bytes(whole)
    run_recipe(recipe, tmp_path / "run")
    again = RunFolder(tmp_path / "run").record("train")
    assert (again.fingerprint, again.seconds) == (trained.fingerprint, trained.seconds)
    run_recipe(recipe, tmp_path / "clean")
    pattern = "3-seeds/scores/**/*"
    assert contents(tmp_path / "run", pattern) == contents(tmp_path / "clean", pattern)


def test_a_run_on_other_data_is_not_cleared(finished, tmp_path):
    options = {**finished.recipe.data.options, "seed": 4}
    other = finished.recipe.data.model_copy(update={"root": tmp_path / "other", "options": options})
    before = contents(finished.folder, "2-train/model/*")
    with pytest.raises(UserError, match="other data"):
        run_recipe(finished.recipe.model_copy(update={"data": other}), finished.folder)
    assert contents(finished.folder, "2-train/model/*") == before


def test_large_images_go_alone_and_small_ones_together(tmp_path):
    samples = []
    for i in range(6):
        size = (3000, 2000) if i % 2 else (300, 200)
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}", tmp_path / f"{i}.png", None))

    def lengths(config, full=False):
        return sorted(len(g) for g in groups_of_one_size(samples, config, full=full))

    assert lengths(InferenceConfig(max_side=None)) == [1, 1, 1, 3]
    assert lengths(InferenceConfig(max_side=300)) == [3, 3]
    assert lengths(InferenceConfig(max_side=300), full=True) == [1, 1, 1, 3]


def test_a_training_knows_every_setting_of_its_method(tiny_collection):
    """So that neither a model folder nor a finished stage changes when a default does."""
    section = {"name": "puzzle", "alpha": 1.5}
    recipe = load_recipe({"method": section})
    kept = train_inputs(RunFolder("none"), recipe, tiny_collection)["method"]
    assert set(kept) == {"name", *resolve(section)[0].Config.model_fields}
    assert kept["alpha"] == 1.5
    assert resolve(kept)[1] == resolve(section)[1]


RECURSEED = {"name": "recurseed+edgepredictmix", "channels": 8, "dilations": [1, 2, 3], "start": 0}


@pytest.fixture(scope="module")
def single_stage(tmp_path_factory, shapes_root):
    """A finished tiny run of a method that is its own segmenter."""
    recipe = load_recipe(
        {**TINY, "method": RECURSEED},
        overrides={
            "data": {"root": str(shapes_root)},
            "train": {"snapshot_every": 3},
        },
    )
    return run_recipe(recipe, tmp_path_factory.mktemp("single") / "run")


def test_a_method_that_segments_needs_no_segmenter(single_stage):
    run = RunFolder(single_stage.folder)
    assert run.record("segment") is None
    assert {s.id for s in single_stage.collection} == {
        p.relative_to(run.stage_folder("predict") / "masks").with_suffix("").as_posix()
        for p in (run.stage_folder("predict") / "masks").rglob("*.png")
    }
    assert single_stage.model.model.heads == ("decoder", "cam")
    rows = json.loads((run.stage_folder("evaluate") / "results.json").read_text())["rows"]
    of = {row["stage"]: (row["head"], row["tags"], row["rule"]) for row in rows}
    assert of["mask"] == ("decoder", "given", "map")
    assert of["segmenter"] == ("decoder", "predicted", "map")
    report = (single_stage.folder / "report.html").read_text(encoding="utf-8")
    assert "The method is a segmentation network itself" in report


def test_it_trains_one_where_the_recipe_asks_for_it(single_stage):
    asked = single_stage.recipe.model_copy(
        update={"segmenter": single_stage.recipe.segmenter.model_copy(update={"enabled": True})}
    )
    names = [name for name, _ in pipeline.stages_of(asked, single_stage.collection)]
    assert names == ["check", "train", "seeds", "masks", "segment", "predict", "evaluate"]
    none = single_stage.recipe.model_copy(
        update={"segmenter": single_stage.recipe.segmenter.model_copy(update={"enabled": False})}
    )
    names = [name for name, _ in pipeline.stages_of(none, single_stage.collection)]
    assert names == ["check", "train", "seeds", "masks", "evaluate"]


def test_finished_runs_can_be_compared(finished, single_stage, tmp_path):
    entries = [
        Entry(run.recipe.method["name"], 0, run.folder, run.recipe)
        for run in (finished, single_stage)
    ]
    both = Comparison(tuple(entries), finished.collection, 2, "steps", "weakseg compare")
    cam, recurseed = summary(both)
    assert recurseed.own
    assert recurseed.cells["segmenter"].endswith("†")
    assert recurseed.cells["seed"] == "–"
    assert "–" not in cam.cells.values()
    rows = {
        (r["stage"], r["split"], r["rule"]): r["miou"]
        for r in json.loads((finished.folder / "8-evaluate" / "results.json").read_text())["rows"]
    }
    assert cam.cells["masks"] == f"{100 * rows['mask', 'train', 'label-free']:.1f}"
    assert cam.cells["segmenter"] == f"{100 * rows['segmenter', 'val', 'label-free']:.1f}"
    page = write_comparison_page(both, tmp_path).read_text(encoding="utf-8")
    assert "Equal for all: 24 image steps of training, in batches of 4" in page
    device = RunFolder(finished.folder).record("train").results["device"]
    assert f"Trained on {device}." in page


def test_a_segmenter_of_an_earlier_recipe_is_not_the_model(single_stage, tmp_path):
    """A folder whose method was changed: what stands there of the old recipe misleads nobody."""
    run = tmp_path / "run"
    shutil.copytree(single_stage.folder, run)
    shutil.copytree(run / "2-train/model", run / "6-segment/model")
    shutil.copy(run / "2-train/stage.json", run / "6-segment/stage.json")
    assert find_model(run) == run / "2-train/model"
    facts = gather(RunFolder(run), single_stage.collection, single_stage.recipe)
    assert "segment" not in facts.records
    assert "segment" not in facts.losses


def test_probabilities_are_among_the_tagged_classes():
    background = np.array([[[0.2, 0.0, 0.5]]])
    maps = np.array([[[0.2, 0.0, 0.5]], [[0.6, 1.0, 0.0]]])
    ids, kept = gated(maps, background, np.array([1, 0]))
    assert ids.tolist() == [0, 1]
    np.testing.assert_allclose(kept, [[[0.5, 1, 0.5]], [[0.5, 0, 0.5]]])


def test_the_f1_of_a_classifier_is_the_mean_over_classes(tmp_path):
    tags, found = ("a", "ab", "b"), ([0.9, 0.6, 0.1], [0.8, 0.4, 0.1], [0.2, 0.9, 0.1])
    samples = []
    for i, (own, shares) in enumerate(zip(tags, found, strict=True)):
        samples.append(Sample(f"{i}", tmp_path / f"{i}.png", tuple(own)))
        none = ScoreFile(np.zeros(0, np.int16), np.zeros((0, 2, 2)), 1, (2, 2), np.float32(shares))
        write_scores(tmp_path / f"{i}.npz", none)
    images = Collection("three", ("a", "b", "c"), tuple(samples), "by hand")
    # a: two of two, and no other; b: one of two, and one other; c is neither given nor found.
    assert classification_f1(images, tmp_path) == pytest.approx((1 + 0.5) / 2)


def test_scores_of_a_decoder_bring_their_own_background(single_stage):
    sample = next(iter(single_stage.collection.split("train")))
    scores = read_scores(RunFolder(single_stage.folder).scores_folder() / f"{sample.id}.npz")
    ids = [0, *(single_stage.collection.classes.index(t) + 1 for t in sorted(sample.tags))]
    assert sorted(scores.classes.tolist()) == sorted(ids)


def test_without_tags_only_classes_that_are_found_are_predicted(single_stage, monkeypatch):
    model, sample = single_stage.model, next(iter(single_stage.collection))
    image = torch.from_numpy(np.asarray(Image.open(sample.image))).permute(2, 0, 1)[None]
    for present, some in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(model.model, "present", present)
        assert bool(model.probabilities(image)[:, 1:].any()) == some


def test_snapshots_are_weights_along_the_way(single_stage):
    folder = RunFolder(single_stage.folder).stage_folder("train")
    found = sorted(p.name for p in (folder / "snapshots").iterdir())
    assert found == ["0000003.safetensors", "0000006.safetensors"]
    first, last = (load_file(folder / "snapshots" / name) for name in found)
    final = load_file(folder / "model" / "model.safetensors")
    assert all(last[key].equal(final[key]) for key in final)
    assert not all(first[key].equal(final[key]) for key in final)


def test_a_mix_of_a_segmenter_is_checked_before_the_data(tiny, tmp_path):
    recipe = load_recipe(tiny.model_dump(mode="json"), sets=["segmenter.mix=cutmx"])
    with pytest.raises(UserError, match="unknown mix 'cutmx'"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_without_effect_are_said(tiny, tmp_path, capsys):
    recipe = load_recipe(tiny.model_dump(mode="json"), sets=["segmenter.mix_start=0.5"])
    run_recipe(recipe, tmp_path / "run", until="check")
    assert "without effect: segmenter.mix_start" in capsys.readouterr().err


def test_a_segmenter_says_which_weights_it_was_not_given(tiny, finished, tmp_path, capsys):
    start = f"segmenter.train.init_from={finished.folder}"
    wider = ["segmenter.train.steps=1", "segmenter.channels=24", start]
    recipe = load_recipe(tiny.model_dump(mode="json"), sets=wider)
    run_recipe(recipe, tmp_path / "run", until="segment")
    assert "start fresh, such as network." in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("name", ["root", "untagged"])
def test_options_that_are_settings_of_every_source(tiny, name):
    data = tiny.data.model_copy(update={"options": {name: "x"}})
    with pytest.raises(UserError, match="not an option") as caught:
        collect(data)
    assert caught.value.mend == f"write data.{name}"


def test_a_segmenter_on_a_transformer_is_refused_before_the_data(tiny, tmp_path):
    values = tiny.model_dump(mode="json") | {"method": {"name": "mctformer"}}
    values["backbone"] |= {"name": "test_vit", "output_stride": 16, "options": {}}
    with pytest.raises(UserError, match="segmenter.backbone"):
        run_recipe(load_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
