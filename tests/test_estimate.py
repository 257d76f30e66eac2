"""What --dry-run multiplies, with every measurement taken to be two seconds."""

from collections.abc import Callable

import pytest
import torch

from weakseg import estimate
from weakseg.data.samples import Collection
from weakseg.recipe import load_recipe


def test_seconds_are_those_of_all_steps_and_images(
    tiny_collection: Collection, monkeypatch: pytest.MonkeyPatch
):
    def two(work: Callable[[], object], _: torch.device) -> float:
        work()
        return 2.0

    monkeypatch.setattr(estimate, "_time", two)
    training = {"steps": 7, "batch": 4, "crop": 32}
    recipe = load_recipe(
        {
            "backbone": {"name": "test_resnet", "pretrained": False},
            "train": training | {"accumulate": 2},
            "segmenter": {"channels": 8, "train": training},
            "seeds": {"scales": [1.0, 0.5, 2.0]},
            "runtime": {"accelerator": "cpu"},
        }
    )
    names = ["check", "train", "seeds", "masks", "segment", "predict", "evaluate"]
    planned = {stage.name: stage for stage in estimate.plan(recipe, tiny_collection, names)}
    assert {name: stage.seconds for name, stage in planned.items()} == {
        "check": None,
        "train": 7 * 2 * 2,
        "seeds": 8 * 3 * 2,
        "masks": None,
        "segment": 7 * 2,
        "predict": 8 * len(recipe.predict.scales) * 2,
        "evaluate": None,
    }
    assert planned["train"].what == "cam on test_resnet, 7 steps of 4 images at 32 px"
    assert planned["evaluate"].what == "8 images with ground truth"


def test_a_method_that_segments_is_planned_without_a_threshold(tiny_collection):
    section = {"name": "recurseed", "channels": 8, "dilations": [1, 2, 3]}
    values = {"method": section, "backbone": {"name": "test_resnet", "pretrained": False}}
    values |= {"train": {"steps": 2, "batch": 2, "crop": 32}}
    for seeds, words in (({}, "own background"), ({"head": "cam"}, "rule label-free")):
        recipe = load_recipe(values | {"seeds": seeds})
        (planned,) = estimate.plan(recipe, tiny_collection, ["masks"])
        assert words in planned.what
