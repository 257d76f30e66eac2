import cv2
import numpy as np
import pytest

from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, write_scores
from weakseg.ops import colour_contrast, contrast_threshold, label_free_threshold
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule


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
