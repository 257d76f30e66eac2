"""A frozen backbone: nothing of it learns, its features are computed once, and heads train on them."""

import numpy as np
import pytest
import torch

from tests.stages.conftest import TINY, contents
from weakseg.data.scorefile import read_scores
from weakseg.export.model import load
from weakseg.methods import Batch, build
from weakseg.networks.backbone import Backbone, backbone_factory, make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe
from weakseg.stages import features

FROZEN = {
    "backbone": {"train": "none"},
    "segmenter": {"enabled": False},
    "train": {"steps": 30, "batch": 8, "checkpoint_every": 10},
}


@pytest.fixture
def frozen(shapes_root):
    base = load_recipe(TINY, overrides={"data": {"root": str(shapes_root)}})
    return load_recipe(base.model_dump(mode="json"), overrides=FROZEN)


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the inputs that went through a backbone's network, warm-up of a stage included."""
    seen = []
    forward = Backbone.forward

    def counted(self, images):
        if self._given is None and min(images.shape) > 0:
            seen.append(tuple(images.shape))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counted)
    return seen


def test_the_backbone_runs_once_for_training_and_seeds(frozen, tmp_path, passes):
    run = run_recipe(frozen, tmp_path / "run")
    images = sum(shape[0] for shape in passes if shape[-1] in (64, 32))
    assert images - 2 * 2 <= 24 * 2 * 2  # scales, mirror images; a probe of folding aside
    assert len(list((run.folder / "2-train/features").rglob("*.npz"))) == 24
    start = make_backbone(frozen.backbone).state_dict()
    torch.manual_seed(frozen.seed)
    trained = load(run.folder).model
    again = build(frozen.method, backbone_factory(frozen.backbone), 3)
    assert set(start) == set(trained.backbone.state_dict())
    assert not any(p.requires_grad for p in again.backbone.parameters())
    assert (run.folder / "5-masks/masks").is_dir()


def test_seeds_are_the_same_with_and_without_kept_maps(frozen, tmp_path):
    kept = run_recipe(frozen, tmp_path / "kept")
    none = load_recipe(frozen.model_dump(mode="json"), overrides={"train": {"features_gb": 0}})
    again = run_recipe(none, tmp_path / "none")
    with np.load(next((again.folder / "2-train/features").rglob("*.npz"))) as arrays:
        assert arrays.files == ["pooled"]
    first, second = (contents(r.folder / "3-seeds/scores", "**/*.npz") for r in (kept, again))
    assert first.keys() == second.keys() and len(first) == 24
    for name in first:
        one, other = (read_scores(r.folder / "3-seeds/scores" / name) for r in (kept, again))
        np.testing.assert_array_equal(one.scores, other.scores)


def test_a_killed_run_goes_on_to_the_same_model(frozen, tmp_path, monkeypatch):
    whole = run_recipe(frozen, tmp_path / "whole")
    write, done = features._write, []

    def killed(*args):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(write(*args))

    monkeypatch.setattr(features, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(frozen, tmp_path / "again")
    monkeypatch.setattr(features, "_write", write)
    again = run_recipe(frozen, tmp_path / "again")
    files = ("2-train/model/model.safetensors", "5-masks/masks/**/*.png")
    assert contents(whole.folder, *files) == contents(again.folder, *files)


def test_pooled_features_give_the_logits_of_the_images(tiny_spec):
    method = build({"name": "cam"}, backbone_factory(tiny_spec), 2).eval()
    images, tags = torch.randn(3, 3, 64, 48), torch.eye(3)[:, :2]
    pooled = method.backbone(images)[-1].mean((2, 3))
    whole, _ = method.classify(Batch(images, tags, ["a", "b", "c"]))
    maps, terms = method.classify(Batch(torch.empty(3, 3, 0, 0), tags, ["a", "b", "c"], pooled))
    torch.testing.assert_close(maps.logits, whole.logits)
    assert terms["cls"].requires_grad


def test_windows_are_averages_of_their_cells():
    view = torch.arange(24.0).reshape(1, 4, 6)
    whole = features._pooled(view, np.array([1, 1]), np.array([0.3, 0.9]))
    assert whole[0] == pytest.approx(view.mean())
    corner = features._pooled(view, np.array([0.5, 0.5]), np.array([1.0, 1.0]))
    assert corner[0] == pytest.approx(view[0, 2:, 3:].mean())
    cell = features._pooled(view, np.array([0.01, 0.01]), np.array([0.0, 0.5]))
    assert cell[0] == pytest.approx(view[0, 0, 2])


@pytest.mark.parametrize(("train", "moving"), [("all", 5), ("none", 0), (1, 1), (2, 2), (9, 5)])
def test_the_deepest_levels_alone_learn(train, moving):
    spec = BackboneSpec(name="test_resnet", pretrained=False, train=train)
    backbone = make_backbone(spec)
    learning = {n for n, p in backbone.network.named_parameters() if p.requires_grad}
    stages = ("conv1", "layer1", "layer2", "layer3", "layer4")
    names = {n for s in stages[len(stages) - moving :] for n in _under(backbone, s)}
    assert learning == names
    levels = backbone(torch.randn(2, 3, 64, 64))
    assert [level.requires_grad for level in levels[1:]] == [moving > 3 - i for i in range(4)]


def _under(backbone, stage):
    parts = {"conv1": ("conv1", "bn1")}.get(stage, (stage,))
    return [n for n, _ in backbone.network.named_parameters() if n.split(".")[0] in parts]


def test_a_frozen_backbone_keeps_its_statistics():
    backbone = make_backbone(BackboneSpec(name="test_resnet", pretrained=False, train="none"))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()
    backbone(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
