"""A run on a classifier that the user has already: nothing is trained, everything else follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import weakseg
from weakseg import cli
from weakseg.data.scorefile import read_scores
from weakseg.errors import UserError
from weakseg.estimate import plan
from weakseg.export.model import load
from weakseg.methods import methods, resolve
from weakseg.methods.cam import CAM
from weakseg.pipeline import run_recipe, stages_of
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.check import collect
from weakseg.stages.project import map_outputs, with_classifier
from weakseg.stages.train import train_inputs

from .conftest import TINY


@pytest.fixture
def weights(tmp_path: Path, tiny: Recipe) -> Path:
    """A checkpoint of timm's training script: as many outputs as the data has classes."""
    torch.manual_seed(0)
    count = len(collect(tiny.data).classes)
    model = timm.create_model("test_resnet", num_classes=count)
    torch.save({"state_dict": model.state_dict(), "arch": "test_resnet"}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def recipe_for(weights: Path, root: Path, **method) -> Recipe:
    values = {k: v for k, v in TINY.items() if k not in ("method", "backbone")}
    section = {"name": "cam", "from_classifier": str(weights), **method}
    return load_recipe({**values, "method": section}, overrides={"data": {"root": str(root)}})


def test_a_run_trains_no_classifier_and_keeps_all_stages(
    weights, shapes_root, tmp_path, monkeypatch, capsys
):
    recipe = recipe_for(weights, shapes_root, classifier_loss="sigmoid")
    monkeypatch.setattr(
        "weakseg.stages.train.fit", lambda *a, **k: pytest.fail("the method was trained")
    )
    assert recipe.backbone.output_stride == 32
    done = run_recipe(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert done.recipe.backbone.name == "test_resnet"  # the checkpoint said so
    assert not done.recipe.backbone.pretrained
    assert done.recipe.segmenter_backbone.output_stride == 16
    assert done.recipe.segmenter_starts_from_classifier
    record = run.record("train")
    assert record.results["classifier"] == "weights.pth, not trained"
    assert record.results["classes"].startswith("in order")
    files = {p.name for p in run.stage_folder("train").rglob("*") if p.is_file()}
    assert files == {"stage.json", "README.md", "config.json", "model.safetensors"}
    assert str(tmp_path) not in (run.stage_folder("train") / "model/config.json").read_text()
    assert "weakseg trained nothing" in (run.stage_folder("train") / "model/README.md").read_text()
    assert run.record("segment").status == "done"  # it starts from the same backbone
    report = run.report_file.read_text(encoding="utf-8")
    assert "Nothing was trained for the score maps" in report
    assert "was trained on" not in report
    assert "nothing is trained" in " ".join(capsys.readouterr().err.split())

    # What the run keeps is the classifier itself, bias included, at its own stride.
    predictor = load(run.stage_folder("train"))
    whole = timm.create_model("test_resnet", num_classes=len(predictor.classes))
    whole.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = whole.eval()(image)
        maps = predictor.model(image)
    torch.testing.assert_close(maps.logits, wanted, rtol=1e-4, atol=1e-5)
    sample = done.collection.split("train")[0]
    assert read_scores(run.scores_folder() / f"{sample.id}.npz").probabilities is not None


def test_other_weights_and_other_classes_run_again(weights, shapes_root, tmp_path):
    recipe = recipe_for(weights, shapes_root)
    values = torch.load(weights, weights_only=True)
    run_recipe(recipe, tmp_path / "run", until="train")
    first = RunFolder(tmp_path / "run").record("train").fingerprint
    weights = weights.rename(tmp_path / "moved.pth")
    run_recipe(recipe_for(weights, shapes_root), tmp_path / "run", until="train")
    assert RunFolder(tmp_path / "run").record("train").fingerprint == first
    values["state_dict"]["fc.bias"] += 1
    torch.save(values, weights)
    run_recipe(recipe_for(weights, shapes_root), tmp_path / "run", until="train")
    second = RunFolder(tmp_path / "run").record("train").fingerprint
    names = list(reversed(collect(recipe.data).classes))
    again = recipe_for(weights, shapes_root, classifier_classes=names)
    run_recipe(again, tmp_path / "run", until="train")
    third = RunFolder(tmp_path / "run").record("train")
    assert len({first, second, third.fingerprint}) == 3
    assert third.results["classes"] == "by the given names"


def test_it_can_be_trained_further(weights, shapes_root, tiny, tmp_path):
    run_recipe(recipe_for(weights, shapes_root), tmp_path / "run", until="train")
    further = load_recipe(tiny.model_dump(), sets=[f"train.init_from={tmp_path / 'run'}"])
    run_recipe(further, tmp_path / "more", until="train")
    start = torch.load(weights, weights_only=True)["state_dict"]["conv1.0.weight"]
    model = load(tmp_path / "more").model
    assert isinstance(model, CAM)
    now = model.backbone.network.state_dict()["conv1.0.weight"]
    assert not now.equal(start)
    assert torch.corrcoef(torch.stack([now.flatten(), start.flatten()]))[0, 1] > 0.9


def test_a_stride_that_is_written_out_wins():
    given = {"name": "cam", "from_classifier": "w.pth"}
    written = load_recipe({"method": given, "backbone": {"output_stride": 16}})
    assert written.backbone.output_stride == written.segmenter_backbone.output_stride == 16
    assert load_recipe({"method": given}).backbone.output_stride == 32
    sets = ["method.name=cam", "method.from_classifier=w.pth"]
    assert load_recipe(None, sets=sets).backbone.output_stride == 32
    assert load_recipe({"method": "cam"}).backbone.output_stride == 16


def test_dry_run_says_that_nothing_is_trained(weights, shapes_root, capsys, tmp_path):
    recipe = with_classifier(recipe_for(weights, shapes_root))
    collection = collect(recipe.data)
    names = [name for name, _ in stages_of(recipe, collection)]
    train = next(s for s in plan(recipe, collection, names) if s.name == "train")
    assert train.what == "weights.pth as it is (test_resnet): nothing is trained"
    assert train.seconds is None
    (tmp_path / "r.yaml").write_text(recipe_for(weights, shapes_root).to_yaml(), encoding="utf-8")
    capsys.readouterr()
    cli.app(["run", str(tmp_path / "r.yaml"), "--dry-run"], result_action="return_value")
    assert "nothing is trained" in " ".join(capsys.readouterr().err.split())


def test_contradictions_are_refused(weights, shapes_root, tmp_path):
    def refused(reason: str, sets: tuple[str, ...] = (), **method):
        values = recipe_for(weights, shapes_root, **method).model_dump()
        with pytest.raises(UserError, match=reason):
            run_recipe(load_recipe(values, sets=sets), tmp_path / "run")

    refused("backbone.weights", (f"backbone.weights={weights}", "backbone.pretrained=false"))
    refused("says that it is a test_resnet", ("backbone.name=resnet18",))
    refused("no hidden layer", hidden=8)
    refused("no file", classifier_classes=str(tmp_path / "none.txt"))
    refused("no file", from_classifier=str(tmp_path / "none.pth"))
    assert not (tmp_path / "run" / "2-train" / "model").exists()


@pytest.mark.parametrize("name", sorted(set(methods) - {"cam"}))
def test_other_methods_refuse_the_key(name: str):
    with pytest.raises(UserError, match="from_classifier"):
        resolve({"name": name, "from_classifier": "w.pth"})


def test_acr_refuses_it_inside():
    with pytest.raises(UserError, match=r"init_from"):
        resolve({"name": "acr", "classifier": {"name": "cam", "from_classifier": "w.pth"}})


def test_the_settings_of_other_runs_stay_what_they_were(tiny, tmp_path):
    assert train_inputs(RunFolder(tmp_path / "run"), tiny, collect(tiny.data))["method"] == {
        "name": "cam",
        "hidden": None,
    }
    with pytest.raises(UserError, match="goes with from_classifier alone"):
        resolve({"name": "cam", "classifier_classes": ["a"]})


# -- which outputs stand for which class


def test_by_order_and_by_names():
    assert map_outputs(("a", "b"), 2, None) == (((0,), (1,)), "in order (a, b)")
    names = ["dog", "Cat", "a_cow"]
    assert map_outputs(("cat", "dog"), 3, names).outputs == ((1,), (0,))
    labels = [("n1", "tabby, tabby cat"), ("n2", "dog")]
    found = map_outputs(("dog", "tabby-cat"), 2, None, labels)
    assert found == (((1,), (0,)), "by the names in the weights")
    nothing_alike = [("LABEL_0",), ("LABEL_1",)]
    assert map_outputs(("a", "b"), 2, None, nothing_alike).how.startswith("in order")


def test_imagenets_names_are_known():
    found = map_outputs(("goldfish", "n01440764", "Egyptian cat"), 1000, None)
    assert found == (((1,), (0,), (285,)), "by ImageNet's names")
    with pytest.raises(UserError, match=r"several outputs: crane \(134, 517\)"):
        map_outputs(("crane",), 1000, None)
    mapped = {"cat": ["tabby", "Egyptian cat"], "dog": 151}
    assert map_outputs(("dog", "cat"), 1000, mapped).outputs == ((151,), (281, 285))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("n.txt", "\ufeffcat\r\ndog\r\n\r\n", ((1,), (0,))),
        ("n.json", '["cat", "dog"]', ((1,), (0,))),
        ("n.json", '{"0": "cat", "1": "dog"}', ((1,), (0,))),
        ("n.json", '{"1": ["n2", "dog"], "0": ["n1", "cat"]}', ((1,), (0,))),
        ("n.yaml", "cat: 0\ndog: [0, 1]\n", ((0, 1), (0,))),
    ],
)
def test_files_of_names(name: str, text: str, wanted, tmp_path: Path):
    (tmp_path / name).write_bytes(text.encode())
    assert map_outputs(("dog", "cat"), 2, tmp_path / name).outputs == wanted


@pytest.mark.parametrize(
    ("classes", "count", "names", "reason"),
    [
        (("a", "b"), 3, None, "3 outputs, and the collection 2 classes"),
        (("a", "b"), 3, ["a", "b"], "2 names are given, and the classifier has 3"),
        (("a", "x", "y"), 3, ["a", "b", "c"], "2 names are of no output: x, y"),
        (("a",), 2, ["a", "A"], r"several outputs: a \(0, 1\)"),
        (("a", "b", "c"), 3, {"a": 0}, "names no outputs of b, c"),
        (("a",), 3, {"a": 0, "z": 1}, "no class z"),
        (("a",), 3, {"a": [0, 3, -1]}, "2 names are of no output: 3, -1"),
        (("a",), 3, {"a": []}, "names no outputs of a"),
    ],
)
def test_what_cannot_be_told_is_one_error(classes, count, names, reason):
    with pytest.raises(UserError, match=reason) as error:
        map_outputs(classes, count, names)
    assert error.value.mend


@pytest.mark.parametrize("text", ["{", "3", "- [", "\xff\xfe"])
def test_broken_files_of_names_are_refused(text: str, tmp_path: Path):
    (tmp_path / "n.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"n.yaml"):
        map_outputs(("a",), 1, tmp_path / "n.yaml")


@given(st.permutations(["cat", "dog", "cow", "sea lion"]), st.integers(1, 4))
def test_names_pick_their_own_outputs(order: list[str], count: int):
    classes = order[:count]
    shown = sorted(order)
    found = map_outputs(classes, 4, [n.upper().replace(" ", "_") for n in shown])
    assert [shown[group[0]] for group in found.outputs] == classes
    assert np.shape(found.outputs) == (count, 1)


def test_the_config_of_a_model_folder_is_plain(weights, shapes_root, tmp_path):
    run_recipe(recipe_for(weights, shapes_root), tmp_path / "run", until="train")
    config = json.loads((tmp_path / "run/2-train/model/config.json").read_text())
    assert set(config["method"]) == {"name", "projection"}
    assert weakseg.load(tmp_path / "run").classes == tuple(config["classes"])
