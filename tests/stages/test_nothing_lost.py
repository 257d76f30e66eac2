"""Finished work and work of people survive whatever command comes next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm import create_model

from tests.stages.conftest import TINY, contents
from weakseg import pipeline
from weakseg.data.images import read_mask, write_mask
from weakseg.errors import UserError
from weakseg.pipeline import Run, run_recipe
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import STAGES, RunFolder
from weakseg.stages import segment, train

EVERYTHING = ("**/*", "**/.*")


def everything(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too, but the report, whose date may change."""
    found = contents(folder, *EVERYTHING)
    return {name: data for name, data in found.items() if name != "report.html"}


def with_sets(recipe: Recipe, *sets: str) -> Recipe:
    return load_recipe(recipe.model_dump(mode="json"), sets=sets)


def copied(folder: Path, to: Path) -> Path:
    """A copy whose times are all new, as ``cp -r`` makes it."""
    return Path(shutil.copytree(folder, to, copy_function=shutil.copy))


@pytest.fixture(scope="module")
def once(tmp_path_factory, shapes_root) -> Run:
    """A finished run on class folders, for tests that copy it."""
    root = tmp_path_factory.mktemp("lost")
    photos(root / "photos")
    values = {**TINY, "data": {"root": str(root / "photos")}}
    values["train"] = {**TINY["train"], "steps": 3}
    values["segmenter"] = {**TINY["segmenter"], "train": {**TINY["segmenter"]["train"], "steps": 2}}
    return run_recipe(load_recipe(values), root / "run")


def photos(root: Path) -> Path:
    """Two classes of six photos, of two sizes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        file = root / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(90, 130, (48, 64 if i < 6 else 48, 3), dtype=np.uint8)
        image[10:30, 10:30] = (220, 40, 40) if i % 2 else (40, 200, 60)
        Image.fromarray(image).save(file)
    return root


@pytest.fixture
def finished(once: Run, tmp_path: Path) -> Run:
    """A copy of the finished run with a copy of its photos, to be spoilt."""
    shutil.copytree(once.recipe.data.root, tmp_path / "photos")
    folder = copied(once.folder, tmp_path / "run")
    recipe = with_sets(once.recipe, f"data.root={tmp_path / 'photos'}")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return Run(folder, recipe, once.collection)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the trainings that begin."""
    titles: list[str] = []

    def counted(fit: Callable) -> Callable:
        def wrapped(*given, **named):
            titles.append(given[6])
            return fit(*given, **named)

        return wrapped

    monkeypatch.setattr(train, "fit", counted(train.fit))
    monkeypatch.setattr(segment, "fit", counted(segment.fit))
    return titles


# --- what is data ---------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["weakseg-run", "cat/deep/run"])
def test_a_run_inside_the_images_is_a_run_again(once, tmp_path, out, trainings):
    root = photos(tmp_path / "photos")
    recipe = with_sets(once.recipe, f"data.root={root}")
    for stop in ("masks", None, None):  # interrupted, gone on with, and said once more
        run = run_recipe(recipe, root / out, until=stop)
        assert run.collection.classes == ("cat", "dog") and len(run.collection) == 12
    assert trainings == ["train", "segment"]


def test_what_was_touched_or_copied_without_times_is_the_same(finished, trainings):
    for file in finished.recipe.data.root.rglob("*.png"):
        os.utime(file, (1, 1))
    before = everything(finished.folder)
    run_recipe(finished.recipe, finished.folder)
    assert everything(finished.folder) == before
    assert trainings == []


def test_data_that_moved_are_the_same_data(finished, tmp_path, trainings):
    before = contents(finished.folder, "[1-8]*/**/*")
    moved = copied(finished.recipe.data.root, tmp_path / "elsewhere")
    shutil.rmtree(finished.recipe.data.root)
    recipe = with_sets(finished.recipe, f"data.root={moved}")
    run_recipe(recipe, finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before
    assert load_recipe(finished.folder / "recipe.yaml").data.root == moved
    assert trainings == []


def test_other_data_there_are_refused_and_nothing_is_written(finished, tmp_path):
    moved = copied(finished.recipe.data.root, tmp_path / "elsewhere")
    Image.new("RGB", (48, 48)).save(moved / "cat/1.png")
    before = everything(finished.folder)
    with pytest.raises(UserError, match="other data"):
        run_recipe(with_sets(finished.recipe, f"data.root={moved}"), finished.folder)
    assert everything(finished.folder) == before


def test_ground_truth_that_moved_is_the_same(finished, tmp_path):
    for name in ("truth", "moved"):
        for sample in finished.collection:
            size = Image.open(sample.image).size[::-1]
            mask = np.zeros(size, np.uint8)
            for row, tag in enumerate(sample.tags or ()):
                mask[row] = finished.collection.classes.index(tag) + 1
            write_mask(tmp_path / name / f"{sample.id}.png", mask)
    runs = [with_sets(finished.recipe, f"data.masks={tmp_path / n}") for n in ("truth", "moved")]
    run_recipe(runs[0], finished.folder)
    before = contents(finished.folder, "[1-8]*/**/*")
    run_recipe(runs[1], finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before


def test_weights_that_moved_are_the_same_and_others_are_not(once, tmp_path, trainings):
    root = photos(tmp_path / "photos")
    for name, seed in (("a", 0), ("c", 1)):
        torch.manual_seed(seed)
        torch.save(create_model("test_resnet").state_dict(), tmp_path / f"{name}.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    recipe = with_sets(once.recipe, f"data.root={root}", "segmenter.enabled=false")
    given = [
        with_sets(recipe, "backbone.pretrained=false", f"backbone.weights={tmp_path / n}.pth")
        for n in "abc"
    ]
    for i, count in ((0, 1), (1, 1), (2, 2), (2, 2)):
        run_recipe(given[i], tmp_path / "run", until="train")
        assert trainings == ["train"] * count
    (tmp_path / "c.pth").unlink()
    run_recipe(given[2], tmp_path / "run", until="train")
    assert trainings == ["train"] * 2, "a finished training needs them no more"


# --- refused before anything is done --------------------------------------------------------


def refused(run: Run, *sets: str, match: str = "") -> UserError:
    """The command with other settings is refused, and nothing at all has changed."""
    before = everything(run.folder)
    with pytest.raises(UserError, match=match) as caught:
        run_recipe(with_sets(run.recipe, *sets), run.folder)
    assert everything(run.folder) == before
    return caught.value


@pytest.mark.parametrize("section", ["backbone", "segmenter.backbone"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "nope"},
        {"name": "test_resnet", "pretrained": False, "output_stride": 8, "dilate": True},
        {"name": "test_resnet", "weights": "SPOILT"},
        {"name": "test_resnet", "weights": "missing.pth"},
    ],
    ids=lambda s: str(s.get("weights") or s.get("output_stride") or s["name"]),
)
def test_a_network_that_cannot_be_built(finished, tmp_path, section, settings, trainings):
    (tmp_path / "spoilt.pth").write_bytes(b"PK\x03\x04 no weights")
    if settings.get("weights") == "SPOILT":
        settings = {**settings, "weights": str(tmp_path / "spoilt.pth")}
    if settings.get("output_stride"):
        settings = {**settings, "name": "resnet18", "output_stride": 4}
    error = refused(finished, f"{section}={json.dumps(settings)}")
    assert error.where and error.mend
    assert trainings == []


def test_a_start_that_does_not_fit(finished, tmp_path):
    error = refused(finished, f"train.init_from={tmp_path}")
    assert error.where == str(tmp_path)
    error = refused(finished, f"segmenter.train.init_from={tmp_path}")
    assert error.where == str(tmp_path)
    backbone = json.dumps({"name": "resnet18", "pretrained": False})
    error = refused(finished, f"segmenter.backbone={backbone}", "segmenter.from_classifier=true")
    assert error.where == "segmenter.from_classifier"


def test_the_affinity_network_is_built_too(finished):
    step = {"affinity": {"from_classifier": False, "backbone": {"name": "nope"}}}
    assert refused(finished, f"refine={json.dumps([step])}").where == "backbone.name"


def test_lists_and_given_scores_that_are_not_there(finished, tmp_path):
    truth = tmp_path / "truth"
    for sample in finished.collection:
        size = Image.open(sample.image).size[::-1]
        write_mask(truth / f"{sample.id}.png", np.zeros(size, np.uint8))
    masks = f"data.masks={truth}"
    refused(finished, masks, f"evaluate.lists={{mine: {tmp_path / 'none.txt'}}}")
    refused(finished, f"seeds.given={tmp_path / 'none'}")


def test_a_stage_that_does_not_exist(finished):
    before = everything(finished.folder)
    with pytest.raises(UserError, match="no stage"):
        run_recipe(with_sets(finished.recipe, "seed=5"), finished.folder, until="refine")
    assert everything(finished.folder) == before


def test_a_refused_start_leaves_no_folder(once, tmp_path):
    with pytest.raises(UserError):
        run_recipe(with_sets(once.recipe, "segmenter.backbone={name: nope}"), tmp_path / "a/b/run")
    assert list(tmp_path.iterdir()) == []


def test_a_running_run_keeps_its_recipe(finished):
    lock = finished.folder / ".lock"
    with RunFolder(finished.folder).locked():
        owner = lock.read_text().split()
        lock.write_text(f"{owner[0]} {os.getppid()}\n")
        error = refused(finished, "train.lr=0.5", match="is working on this run")
        assert "wait for it" in error.mend
    run_recipe(finished.recipe, finished.folder)


# --- an earlier result stays until its successor is done ------------------------------------


def test_a_training_that_fails_leaves_the_earlier_one(finished, trainings):
    before = contents(finished.folder, "[1-8]*/**/*")
    hot = with_sets(finished.recipe, "segmenter.train.lr=1e18", "segmenter.train.steps=8")
    for _ in range(2):
        with pytest.raises(UserError, match="became"):
            run_recipe(hot, finished.folder)
        assert contents(finished.folder, "[1-8]*/**/*") == before
    trainings.clear()
    run_recipe(finished.recipe, finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before
    assert trainings == []


def stopped_in(monkeypatch, module, name: str, calls: int) -> None:
    """Ctrl-C at a call of a function."""
    original, done = getattr(module, name), []

    def stops(*given, **named):
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(module, name, stops)


def test_an_interrupted_successor_goes_on_and_the_earlier_result_can_be_had_back(
    finished, monkeypatch, tmp_path
):
    from weakseg.stages import seeds

    before = contents(finished.folder, "[1-8]*/**/*")
    other = with_sets(finished.recipe, "seeds.scales=[1.0]")
    stopped_in(monkeypatch, seeds, "write_scores", 5)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before
    monkeypatch.undo()
    made = contents(finished.folder, ".3-seeds.next/scores/**/*.npz")
    assert 0 < len(made) < 12
    run_recipe(finished.recipe, finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before
    run = run_recipe(other, finished.folder)
    assert RunFolder(run.folder).record("seeds").starts == 2
    assert not list(finished.folder.glob(".*"))
    clean = run_recipe(other, tmp_path / "clean")
    for pattern in ("3-seeds/scores/**/*", "5-masks/masks/**/*", "*/model/model.safetensors"):
        assert contents(run.folder, pattern) == contents(clean.folder, pattern)


def test_refinement_stays_whole_until_the_new_chain_is(finished, monkeypatch):
    from weakseg.stages import refine

    chain = with_sets(finished.recipe, "refine=[pamr, {pamr: {iterations: 2}}]")
    run_recipe(chain, finished.folder, until="masks")
    before = contents(finished.folder, "[1-8]*/**/*")
    other = with_sets(finished.recipe, "refine=[pamr, {pamr: {iterations: 3}}]")
    stopped_in(monkeypatch, refine, "write_scores", 5)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, finished.folder, until="masks")
    monkeypatch.undo()
    assert contents(finished.folder, "[1-8]*/**/*") == before
    run_recipe(chain, finished.folder, until="masks")
    assert contents(finished.folder, "[1-8]*/**/*") == before
    first = {n: d for n, d in before.items() if n.startswith("4-refine/1-pamr/")}
    run_recipe(other, finished.folder, until="masks")
    after = contents(finished.folder, "[1-8]*/**/*")
    assert first.items() <= after.items(), "the step that stays the same is taken over"
    assert before["4-refine/2-pamr/stage.json"] != after["4-refine/2-pamr/stage.json"]
    run_recipe(with_sets(finished.recipe, "refine=[pamr]"), finished.folder, until="masks")
    assert sorted(p.name for p in (finished.folder / "4-refine").iterdir()) == [
        "1-pamr",
        "stage.json",
    ]


# --- missing and damaged files --------------------------------------------------------------

DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:60]),
    "other": lambda file: file.write_bytes(b"\x93NUMPY no such thing"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["3-seeds/scores/cat/3.npz", "5-masks/masks/cat/3.png"])
def test_a_file_for_an_image_is_made_again_and_nothing_else(finished, name, damage, trainings):
    before = contents(finished.folder, "[2-8]*/**/*.*")
    DAMAGES[damage](finished.folder / name)
    run_recipe(finished.recipe, finished.folder)
    after = contents(finished.folder, "[2-8]*/**/*.*")
    changed = {n for n in before if before[n] != after.get(n)}
    assert changed <= {f"{name.partition('/')[0]}/stage.json"}
    assert trainings == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_scores_are_made_again_before_masks_of_another_rule(finished, damage):
    scores = contents(finished.folder, "3-seeds/scores/**/*")
    DAMAGES[damage](finished.folder / "3-seeds/scores/cat/3.npz")
    other = with_sets(finished.recipe, "masks.rule=constant", "masks.threshold=0.5")
    run_recipe(other, finished.folder, until="masks")
    assert contents(finished.folder, "3-seeds/scores/**/*") == scores
    assert RunFolder(finished.folder).record("masks").results["threshold"] == 0.5


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("stage", ["2-train", "6-segment"])
def test_a_model_is_written_again_from_the_last_checkpoint(finished, stage, file, trainings):
    before = contents(finished.folder, "[2-8]*/**/*.*")
    for damage in ("missing", "cut"):
        DAMAGES[damage](finished.folder / stage / "model" / file)
        run_recipe(finished.recipe, finished.folder)
        after = contents(finished.folder, "[2-8]*/**/*.*")
        assert {n for n in before if before[n] != after.get(n)} <= {f"{stage}/stage.json"}


def test_the_evaluation_and_the_check_are_made_again(finished, tmp_path):
    for name in ("1-check/check.json", "5-masks/classes.txt", "5-masks/rule.json"):
        kept = (finished.folder / name).read_bytes()
        (finished.folder / name).unlink()
        run_recipe(finished.recipe, finished.folder)
        assert (finished.folder / name).read_bytes() == kept


def test_what_serves_resuming_alone_may_be_deleted(finished, trainings):
    for stage in ("2-train", "6-segment"):
        shutil.rmtree(finished.folder / stage / "logs")
        (finished.folder / stage / "last.ckpt").unlink()
    run_recipe(finished.recipe, finished.folder)
    assert trainings == []


# --- work of people -------------------------------------------------------------------------


def edit(run: Path, sample: str = "cat/3") -> bytes:
    file = run / "5-masks/masks" / f"{sample}.png"
    write_mask(file, np.full_like(read_mask(file), 2))
    return file.read_bytes()


@pytest.mark.parametrize("times", ["kept", "new", "old"])
def test_an_edit_is_never_replaced_however_the_run_was_copied(finished, tmp_path, times):
    edited = edit(finished.folder)
    how = shutil.copy2 if times == "kept" else shutil.copy
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy", copy_function=how))
    if times == "old":
        for file in folder.rglob("*"):
            os.utime(file, (1, 1))
    run = Run(folder, finished.recipe, finished.collection)
    for sets in (["masks.margin=0.1"], ["seed=3"], ["seeds.scales=[1.0]"]):
        error = refused(run, *sets)
        assert error.where == str(folder / "5-masks")
        assert "masks/cat/3.png" in error.what
    assert (folder / "5-masks/masks/cat/3.png").read_bytes() == edited


def test_a_copy_that_nobody_edited_is_no_edit(finished, tmp_path):
    folder = copied(finished.folder, tmp_path / "copy")
    os.utime(folder / "5-masks/stage.json", (1, 1))
    (folder / "5-masks/Thumbs.db").write_text("of a file manager")
    other = with_sets(finished.recipe, "masks.rule=constant")
    run_recipe(other, folder, until="masks")
    assert RunFolder(folder).record("masks").results["rule"] == "constant"


@pytest.mark.parametrize(
    "name", ["3-seeds/scores/cat/3.npz", "2-train/model/README.md", "7-predict/masks/cat/3.png"]
)
def test_edits_of_any_file_count(finished, name):
    file = finished.folder / name
    if name.endswith(".md"):
        file.write_text("my own words")
    elif name.endswith(".png"):
        write_mask(file, np.full_like(read_mask(file), 255))
    else:
        shutil.copy(file.with_name("5.npz"), file)
    error = refused(finished, "seed=3")
    assert name.partition("/")[2] in error.what


def test_files_that_were_added_count(finished):
    note = finished.folder / "6-segment/notes.txt"
    note.write_text("this one is good")
    assert "notes.txt" in refused(finished, "segmenter.train.lr=0.2").what
    run_recipe(finished.recipe, finished.folder)
    assert note.read_text() == "this one is good"


def test_edited_scores_make_other_masks(finished, trainings):
    """What follows from a file that somebody has replaced runs again."""
    before = RunFolder(finished.folder).record("masks")
    scores = finished.folder / "3-seeds/scores/cat"
    shutil.copy(scores / "5.npz", scores / "3.npz")
    run_recipe(finished.recipe, finished.folder)
    run = RunFolder(finished.folder)
    assert run.record("masks").fingerprint != before.fingerprint
    assert trainings == ["segment"]
    after = everything(finished.folder)
    run_recipe(finished.recipe, finished.folder)
    assert everything(finished.folder) == after


def test_edits_outlive_what_is_made_again(finished, trainings):
    """One mask edited, another missing, and a table annotated: all in one stage."""
    edited = edit(finished.folder)
    run_recipe(finished.recipe, finished.folder)
    assert trainings == ["segment"]
    (finished.folder / "5-masks/masks/dog/2.png").unlink()
    (finished.folder / "5-masks/quality.csv").write_text("looked at by me")
    run_recipe(finished.recipe, finished.folder)
    assert (finished.folder / "5-masks/masks/cat/3.png").read_bytes() == edited
    assert (finished.folder / "5-masks/masks/dog/2.png").is_file()
    kept = finished.folder / "5-masks.aside-1/quality.csv"
    assert kept.read_text() == "looked at by me"
    assert trainings == ["segment"], "the edit is still known as one"
    assert "masks/cat/3.png" in refused(finished, "masks.margin=0.1").what


def test_a_recipe_in_own_words_is_kept(finished):
    file = finished.folder / "recipe.yaml"
    own = "# do not touch\n" + file.read_text(encoding="utf-8")
    file.write_text(own, encoding="utf-8")
    run_recipe(finished.recipe, finished.folder)
    assert file.read_text(encoding="utf-8") == own, "it says the same"
    run_recipe(with_sets(finished.recipe, "predict.flip=true"), finished.folder)
    assert (finished.folder / "recipe-1.yaml").read_text(encoding="utf-8") == own
    assert load_recipe(file).predict.flip
    run_recipe(finished.recipe, finished.folder)
    assert not (finished.folder / "recipe-2.yaml").exists(), "that was weakseg's own"


def test_a_run_of_an_earlier_version_is_not_trained_anew(finished):
    for file in finished.folder.glob("*/stage.json"):
        record = json.loads(file.read_text())
        del record["files"], record["format"]
        record["fingerprint"] = "of times"
        file.write_text(json.dumps(record))
    error = refused(finished, match="earlier version")
    assert error.where == str(finished.folder / "1-check")
    assert finished.model.predict(np.zeros((40, 40, 3), np.uint8)).shape == (40, 40)


def test_what_a_kill_between_two_renames_left_is_restored(finished, trainings):
    before = contents(finished.folder, "[1-8]*/**/*")
    for name in ("2-train", "5-masks"):
        (finished.folder / name).rename(finished.folder / f".{name}.replaced")
    shutil.copytree(finished.folder / "6-segment", finished.folder / ".6-segment.replaced")
    (finished.folder / f".recipe-p{99999999}-abc.yaml").write_text("half")
    run_recipe(finished.recipe, finished.folder)
    assert contents(finished.folder, "[1-8]*/**/*") == before
    assert trainings == []
    assert not list(finished.folder.glob(".*"))


def test_a_successor_that_was_done_but_not_in_place_is_put_there(finished, monkeypatch):
    from weakseg import runfolder

    other = with_sets(finished.recipe, "segmenter.train.lr=0.02")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runfolder, "put_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, finished.folder)
    monkeypatch.undo()
    run_recipe(other, finished.folder)
    record = RunFolder(finished.folder).record("segment")
    assert record.inputs["train"]["lr"] == 0.02 and record.status == "done"
    assert not list(finished.folder.glob(".*"))


def test_every_stage_has_a_plan():
    """A stage without one would be refused in the middle of a run."""
    assert tuple(pipeline._PLANNED) == STAGES
