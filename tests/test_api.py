"""What a run starts from that names no recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weakseg import api
from weakseg.recipe import load_recipe


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine seems to have."""

    def has(kind: str) -> None:
        def pick(accelerator: str, devices: int = 1) -> torch.device:
            return torch.device("cpu" if accelerator == "cpu" else kind)

        monkeypatch.setattr(api, "pick_device", pick)

    return has


@pytest.mark.parametrize(
    ("kind", "name"), [("cpu", "default/cpu"), ("cuda", "default/gpu"), ("mps", "default/cpu")]
)
def test_each_machine_has_its_default(machine, kind, name):
    machine(kind)
    assert api.default_recipe() == name
    assert api.starting_recipe({}, []) == load_recipe(name)


def test_settings_win_over_the_default_and_the_accelerator_decides(machine):
    machine("cuda")
    sets = ["runtime.accelerator=cpu", "train.steps=7"]
    recipe = api.starting_recipe({"data": {"root": "photos"}}, sets)
    assert recipe.data.root == Path("photos")
    assert recipe == load_recipe("default/cpu", overrides={"data": {"root": "photos"}}, sets=sets)
    assert recipe.train.steps == 7


@pytest.mark.parametrize("name", ["default/gpu", "default/cpu", None])
def test_a_run_keeps_the_default_it_was_started_with(machine, tmp_path, name):
    sets = ["train.steps=7"]
    started = load_recipe(name, sets=sets)
    kept = tmp_path / "recipe.yaml"
    kept.write_text(started.to_yaml(), encoding="utf-8")
    for kind in ("cpu", "cuda"):
        machine(kind)
        assert api.starting_recipe({}, sets, kept) == started


@pytest.mark.parametrize("name", ["default/gpu", "default/cpu", None])
@pytest.mark.parametrize("change", ["predict.crf=soft", "train.steps=8", "data.masks=truth"])
def test_another_setting_does_not_swap_the_recipe_below_a_run(machine, tmp_path, name, change):
    """Hours of training would be cleared for a mask rule."""
    kept = tmp_path / "recipe.yaml"
    kept.write_text(load_recipe(name).to_yaml(), encoding="utf-8")
    for kind in ("cpu", "cuda"):
        machine(kind)
        assert api.starting_recipe({}, [change], kept) == load_recipe(name, sets=[change])


def test_a_recipe_of_ones_own_does_not_bind_a_run_that_names_none(machine, tmp_path):
    kept = tmp_path / "recipe.yaml"
    own = {"method": "seam", "backbone": {"name": "resnet34"}, "train": {"steps": 3}}
    kept.write_text(load_recipe(own).to_yaml(), encoding="utf-8")
    machine("cuda")
    assert api.starting_recipe({}, [], kept).method["name"] == "recurseed"


def test_a_classifier_that_is_given_needs_no_methods_recipe(machine):
    machine("cpu")
    sets = ["method.name=cam", "method.from_classifier=weights.pth"]
    recipe = api.starting_recipe({}, sets)
    assert recipe == load_recipe(None, sets=sets)


def test_the_default_method_takes_settings_without_its_name(machine):
    machine("cpu")
    recipe = api.starting_recipe({}, ["method.hidden=8"])
    assert (recipe.method["name"], recipe.method["hidden"]) == ("cam", 8)


def test_a_method_that_trains_the_backbone_gets_one_that_learns(machine):
    machine("cpu")
    assert api.starting_recipe({}, []).backbone.is_frozen
    for sets in (["method.name=seam"], ["method.name=recurseed"], ["method.hidden=8"]):
        recipe = api.starting_recipe({}, sets)
        assert recipe.backbone.train == "all" and recipe.backbone.output_stride == 16


def test_any_method_can_be_named_over_the_defaults(machine):
    """Settings that suit one method alone would make every other name an error."""
    from weakseg.methods import methods, resolve

    for kind in ("cpu", "cuda"):
        machine(kind)
        for name in methods:
            resolve(api.starting_recipe({}, [f"method.name={name}"]).method)
