"""The rule that sets the background, and the masks that follow from it."""

import cv2
import numpy as np
import pytest

from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.ops import colour_contrast, contrast_threshold, label_free_threshold
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule, label


@pytest.fixture
def seeds(tmp_path):
    """Scores of three images of one class; returns their folder, the images and the collection."""
    rng = np.random.default_rng(0)
    samples, images, maps = [], [], []
    for i in range(3):
        scores = (rng.random((1, 64, 64)) ** 3).astype(np.float32)
        image = np.where(scores[0, ..., None] > 0.45, (200, 50, 40), (30, 90, 200)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image[..., ::-1])
        file = ScoreFile(np.array([1], np.int16), scores, stride=1, size=(64, 64))
        write_scores(tmp_path / "scores" / f"{i}.npz", file, dtype="float16")
        samples.append(Sample(str(i), tmp_path / f"{i}.png", ("cat",)))
        images.append(image)
        maps.append(scores[0].astype(np.float16).astype(np.float32))
    contrast = sum(map(colour_contrast, images, maps))
    return tmp_path / "scores", Collection("three", ("cat",), tuple(samples), "by hand"), contrast


def test_auto_is_the_middle_one_of_three(seeds):
    folder, images, contrast = seeds
    rule = choose_rule(MasksConfig(), folder, images)
    histogram = np.array(rule.histogram)
    found = sorted(
        (
            label_free_threshold(histogram, "expected-iou").threshold,
            label_free_threshold(histogram, "evidence").threshold,
            contrast_threshold(contrast).threshold,
        )
    )
    assert found[0] < found[1] < found[2]
    assert rule.threshold == found[1]
    assert all(f"{value:.2f} (" in rule.chosen_by for value in found)


def test_images_of_one_colour_leave_the_lower_of_two(seeds):
    folder, images, _ = seeds
    for sample in images:
        cv2.imwrite(str(sample.image), np.full((64, 64, 3), 80, np.uint8))
    rule = choose_rule(MasksConfig(), folder, images)
    histogram = np.array(rule.histogram)
    two = [label_free_threshold(histogram, c).threshold for c in ("expected-iou", "evidence")]
    assert rule.threshold == min(two)


def test_a_criterion_that_is_named_is_the_one(seeds):
    folder, images, _ = seeds
    rule = choose_rule(MasksConfig(criterion="variance"), folder, images)
    assert rule.threshold == label_free_threshold(np.array(rule.histogram), "variance").threshold
    assert rule.criterion["name"].startswith("variance")


def test_the_power_rule_is_its_threshold(seeds):
    folder, images, _ = seeds
    rule = choose_rule(MasksConfig(rule="power", alpha=2), folder, images)
    assert rule.rule == "power"
    assert rule.threshold == pytest.approx((3 - 5**0.5) / 2)  # t = (1 - t)^2


def test_scores_near_the_threshold_are_unsure():
    scores = np.float32([[[0.1, 0.24, 0.26, 0.34, 0.36, 0.9]]])
    seed = ScoreFile(np.array([3], np.int16), scores, 1, (1, 6))
    assert label(seed, 0.3).tolist() == [[0, 0, 0, 3, 3, 3]]
    assert label(seed, 0.3, 0.05).tolist() == [[0, 0, 255, 255, 3, 3]]


def test_a_background_map_is_the_limit():
    scores = np.float32([[[0.9, 0.2, 0.5]], [[0.5, 0.4, 0.55]]])
    seed = ScoreFile(np.array([0, 7], np.int16), scores, 1, (1, 3))
    assert label(seed, 0.3).tolist() == [[0, 7, 7]]
    assert label(seed, None, 0.1).tolist() == [[0, 7, 255]]
