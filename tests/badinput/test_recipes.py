"""Recipes: whatever a file claims to be, the command names the key or the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.badinput.conftest import Weakseg, listing
from tests.badinput.corpus import World

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{k}: &{k} [{', '.join(9 * ['*' + chr(ord(k) - 1)])}]\n" for k in "bcdefghij"
)
NESTED = "a: " + "[" * 100_000

RECIPES = {
    "unknown_key": ("sead: 3", "did you mean 'seed'"),
    "unknown_inner_key": ("train: {lrr: 1}", r"train\.lrr"),
    "wrong_type": ("train: {steps: many}", r"train\.steps"),
    "section_that_is_a_list": ("train: [1, 2]", "train"),
    "top_that_is_a_list": ("- seed: 3", "keys and values"),
    "top_that_is_text": ("hello", "keys and values"),
    "key_that_is_a_number": ("3: 4", "3|keys"),
    "key_that_is_a_list": ("? [a, b]\n: 4", "YAML|unhashable|keys"),
    "key_that_is_nothing": ("~: 4", "None|null|keys"),
    "infinite_rate": ("train: {lr: .inf}", r"train\.lr"),
    "rate_that_is_no_number": ("train: {lr: .nan}", r"train\.lr"),
    "negative_seed": ("seed: -1", "seed"),
    "steps_without_end": ("train: {steps: 1" + "0" * 5000 + "}", "train.steps|YAML|integer"),
    "scales_of_zero": ("seeds: {scales: [0]}", "scales"),
    "scales_of_infinity": ("seeds: {scales: [.inf]}", "scales"),
    "scales_tiny": ("seeds: {scales: [1, 1.0e-9]}", r"seeds\.scales\.1"),
    "scales_huge": ("predict: {scales: [1.0e+9]}", r"predict\.scales\.0"),
    "scales_many": (f"seeds: {{scales: {[1] * 1000}}}", r"seeds\.scales"),
    "channels_huge": ("segmenter: {channels: 10000000}", r"segmenter\.channels"),
    "dilations_huge": ("segmenter: {dilations: [1, 2, 9999999]}", r"segmenter\.dilations"),
    "batch_huge": ("train: {batch: 100000}", r"train\.batch"),
    "batch_of_seeds_huge": ("seeds: {batch: 100000}", r"seeds\.batch"),
    "crop_huge": ("segmenter: {train: {crop: 1000000}}", r"segmenter\.train\.crop"),
    "resize_huge": ("train: {resize: [1, 1.0e+9]}", r"train\.resize\.1"),
    "epochs_huge": ("train: {epochs: 1.0e+300}", r"train\.epochs"),
    "steps_huge": ("train: {steps: 10000000000}", r"train\.steps"),
    "max_side_huge": ("predict: {max_side: 10000000}", r"predict\.max_side"),
    "tile_huge": ("predict: {max_side: null, tile: 10000000}", r"predict\.tile"),
    "stride_huge": ("seeds: {stride: 100000}", r"seeds\.stride"),
    "thresholds_huge": ("evaluate: {thresholds: 10000000}", r"evaluate\.thresholds"),
    "devices_huge": ("runtime: {devices: 1000000}", r"runtime\.devices"),
    "workers_huge": ("runtime: {workers: 1000000}", r"runtime\.workers"),
    "std_of_zero": ("backbone: {std: [1, 0, 1]}", r"backbone\.std\.1"),
    "hidden_huge": ("method: {name: cam, hidden: 10000000}", r"method\.hidden"),
    "width_huge": ("method: {name: acr, width: 10000000}", r"method\.width"),
    "grid_huge": ("method: {name: puzzle, grid: [2, 10000000]}", r"method\.grid"),
    "iterations_huge": ("refine: [{pamr: {iterations: 10000000}}]", r"iterations"),
    "radius_huge": ("refine: [{affinity: {radius: 10000000}}]", r"radius"),
    "unknown_method": ("method: camm", "did you mean 'cam'"),
    "method_without_a_name": ("method: {alpha: 3}", "name"),
    "unknown_step": ("refine: [pamrr]", "pamr"),
    "step_of_two": ("refine: [{pamr: {}, crf: {}}]", "step"),
    "unknown_source": ("data: {source: imagenet}", "source"),
    "unknown_option": ("data: {options: {colour: red}}", "colour"),
    "root_with_nul": ('data: {root: "a\\0b"}', "root|a"),
    "class_of_two_lines": ('data: {classes: ["do\\ng"]}', "line break"),
    "anchors_that_explode": (BOMB, "unknown key|aliases|anchors"),
    "anchor_in_a_circle": ("data: &d {options: *d}", "data|recursive|circle|anchor"),
    "circle_under_an_option": ("data: {options: &o {x: *o}}", "data|circle|anchor"),
    "python_object": ("seed: !!python/object/apply:os.system ['touch owned']", "YAML"),
    "not_utf8": (b"data: {root: B\xe4r}", "YAML|UTF-8|utf-8"),
    "nul_bytes": (b"seed: 1\0", "YAML"),
    "tabs": ("train:\n\tlr: 3", "YAML"),
    "open_quote": ('seed: "1', "YAML"),
    "deep_nesting": (NESTED, "YAML|deep"),
    "binary": (bytes(range(256)), "YAML"),
    "two_documents": ("seed: 1\n---\nseed: 2", "YAML"),
    "option_that_opens_a_file": (
        "backbone: {options: {checkpoint_path: /etc/passwd}}",
        r"backbone\.options",
    ),
    "option_that_fetches": (
        "segmenter: {backbone: {options: {pretrained_cfg: {hf_hub_id: a/b}}}}",
        r"segmenter\.backbone\.options",
    ),
    "name_that_fetches": ("backbone: {name: 'hf-hub:a/b'}", r"backbone\.name"),
    "empty": ("", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "key_twice": ("seed: 1\nseed: 2", "twice|duplicate"),
}


OF_THE_METHOD = (
    "unknown_method", "unknown_step", "hidden_huge", "width_huge", "grid_huge", "iterations_huge",
    "radius_huge",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe(name: str, world: World, weakseg: Weakseg) -> None:
    content, message = RECIPES[name]
    file = world.root / "recipe.yaml"
    if (
        isinstance(content, str)
        and content
        and not content.startswith(("-", "hello", "data:", "a:"))
    ):
        content += f"\ndata: {{root: '{world.images}', labels: '{world.table}'}}\n"
    elif isinstance(content, str) and content.startswith(("data: {o", "data: {c")):
        content = content.replace("data: {", f"data: {{root: '{world.images}', ")
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    before = listing(world.root)
    # The check needs no torch, and reads all of a recipe but the method and the steps.
    words = ("run", file, "--out", world.root / "out") if name in OF_THE_METHOD else ("check", file)
    weakseg(*words).refused(message)
    assert listing(world.root) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.lr", "no assignment|not an assignment"),
        ("=3", "unknown key|key"),
        ("train.lr.x=3", "train.lr"),
        ("seed.x=3", "seed|keys"),
        ("train.lr=[", "YAML"),
        ("train.lr=!!python/name:os.system", "YAML"),
        ("..=1", "key"),
        ("seed=\udcff", "seed|YAML"),
    ],
)
def test_assignment(words: str, message: str, world: World, weakseg: Weakseg) -> None:
    before = listing(world.root)
    weakseg("check", world.images, world.table, "--set", words).refused(message)
    assert listing(world.root) == before


def test_a_recipe_that_is_a_folder_or_missing(world: World, weakseg: Weakseg) -> None:
    folder = world.root / "x.yaml"
    folder.mkdir()
    weakseg("check", folder).refused("no recipe")
    weakseg("check", world.root / "y.yaml").refused("no recipe")
    weakseg("run", world.images, "--recipe", Path("..") / "x").refused("no recipe")
