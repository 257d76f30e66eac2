"""A segmenter that classifies: its classes limit masks of new images, by a threshold of tags alone."""

import numpy as np
import pytest
import torch

from tests.stages.conftest import TINY
from weakseg.data.loading import MaskBatch
from weakseg.export.model import load
from weakseg.networks.backbone import make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe
from weakseg.stages import segment
from weakseg.stages.segment import best_presence
from weakseg.training.segmenter import Segmenter


@pytest.mark.parametrize(
    ("probabilities", "tags", "wanted"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 1]], 0.5),  # anything from .2 to .75
        ([[0.3, 0.1], [0.2, 0.28]], [[1, 0], [0, 1]], 0.25),  # timid probabilities
        ([[0.9, 0.85], [0.8, 0.97]], [[1, 0], [0, 1]], 0.85),
    ],
)
def test_the_threshold_agrees_best_with_the_tags(probabilities, tags, wanted):
    found = best_presence(np.array(probabilities), np.array(tags))
    assert found == pytest.approx(wanted, abs=0.051)


def test_a_class_that_is_not_seen_is_not_predicted(tiny_spec):
    network = DeepLabV3Plus(make_backbone(tiny_spec), 3, 8, (1, 2, 3))
    model = Segmenter(network, classify=1.0).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = model(images)
    assert maps.logits.shape == (2, 2) and maps.scores.shape == (2, 2, 64, 64)
    assert model.present == 0.5
    model.presence.fill_(0.3)
    assert Segmenter(network).present == 0.5 and model.present == pytest.approx(0.3)


def test_the_loss_is_that_of_the_classes_in_the_masks(tiny_spec):
    network = DeepLabV3Plus(make_backbone(tiny_spec), 3, 8, (1, 2, 3))
    model = Segmenter(network, classify=0.5).eval()
    masks = torch.full((2, 64, 64), 255)
    masks[0, :8], masks[1, :8] = 1, 0
    batch = MaskBatch(torch.randn(2, 3, 64, 64), masks, ["a", "b"])
    logits = model.tags(model.backbone(batch.images)[-1]).mean((2, 3)).double()
    tags = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    p = logits.sigmoid()
    wanted = -0.5 * (tags * p.log() + (1 - tags) * (1 - p).log()).mean()
    torch.testing.assert_close(
        model.losses(batch, 0.0)["cls"].double(), wanted, rtol=1e-4, atol=1e-5
    )


def test_a_run_keeps_its_classes_and_their_threshold(shapes_root, tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "_CALIBRATED_FROM", 20)
    monkeypatch.setattr(segment, "_CALIBRATED_BY", 4)
    seen = []
    best = segment.best_presence
    monkeypatch.setattr(
        segment, "best_presence", lambda p, t: (seen.append(p.shape), best(p, t), 0.35)[-1]
    )
    over = {"data": {"root": str(shapes_root)}, "segmenter": {"classify": 1.0}}
    run = run_recipe(load_recipe(TINY, overrides=over), tmp_path / "run")
    assert [shape[0] for shape in seen] == [1]  # a twentieth of 24 images
    model = load(run.folder).model
    assert model.present == pytest.approx(0.35)
    assert (run.folder / "7-predict/masks").is_dir()
