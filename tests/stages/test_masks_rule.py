import json

import numpy as np
import pytest

from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.ops import agreement_threshold, label_free_threshold
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule
from weakseg.stages.seeds import AGREEMENT


@pytest.fixture
def seeds(tmp_path):
    """Scores of three images of one class; returns their folder and the collection."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(3):
        scores = (rng.random((1, 16, 16)) ** 3).astype(np.float32)
        file = ScoreFile(np.array([1], np.int16), scores, stride=4, size=(64, 64))
        write_scores(tmp_path / "scores" / f"{i}.npz", file, dtype="float16")
        samples.append(Sample(str(i), tmp_path / f"{i}.png", ("cat",)))
    return tmp_path / "scores", Collection("three", ("cat",), tuple(samples), "by hand")


def _two_scales() -> np.ndarray:
    rng = np.random.default_rng(1)
    one = rng.random(2000) ** 2
    other = (one + rng.normal(0, 0.1, 2000)).clip(0, 0.999)
    joint = np.zeros((100, 100), np.int64)
    np.add.at(joint, ((one * 100).astype(int), (other * 100).astype(int)), 1)
    return joint


def test_auto_lies_halfway_between_expected_iou_and_the_agreement_of_scales(seeds):
    folder, images = seeds
    joint = _two_scales()
    (folder.parent / AGREEMENT).write_text(json.dumps({"joint": joint.tolist()}))
    rule = choose_rule(MasksConfig(), folder, images)
    expected = label_free_threshold(np.array(rule.histogram), "expected-iou").threshold
    agreed = agreement_threshold(joint).threshold
    assert agreed != expected
    assert rule.threshold == pytest.approx((expected + agreed) / 2)
    assert "two scales" in rule.chosen_by


@pytest.mark.parametrize("text", ["", "{}", '{"joint": [[1, 2], [3]]}', '{"joint": [1, 2]}', "[]"])
def test_without_a_second_scale_it_is_the_expected_iou(seeds, text):
    folder, images = seeds
    (folder.parent / AGREEMENT).write_text(text)
    rule = choose_rule(MasksConfig(), folder, images)
    expected = label_free_threshold(np.array(rule.histogram), "expected-iou").threshold
    assert rule.threshold == expected


def test_a_criterion_that_is_named_is_the_one(seeds):
    folder, images = seeds
    (folder.parent / AGREEMENT).write_text(json.dumps({"joint": _two_scales().tolist()}))
    rule = choose_rule(MasksConfig(criterion="variance"), folder, images)
    assert rule.threshold == label_free_threshold(np.array(rule.histogram), "variance").threshold
    assert rule.criterion["name"].startswith("variance")
