"""The recipe: YAML in and out, assignments, presets, and every mistake in one message."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from weakseg.errors import UserError
from weakseg.methods import resolve
from weakseg.recipe import (
    MasksConfig,
    Recipe,
    commented_yaml,
    data_values,
    load_recipe,
    shipped_recipes,
)
from weakseg.training.config import TrainConfig

OTHER = {
    "seed": 7,
    "data": {
        "source": "voc",
        "root": "/some/where",
        "classes": ["ä cat", "no", "0123"],  # text that YAML would read as other things
        "train": ["train", "extra"],
        "options": {"lists": {"train": "train_aug"}},
    },
    "method": {"name": "cam", "inner": {"rate": 1e-4}},
    "backbone": {"name": "resnet18", "pretrained": False, "mean": [0.1, 0.2, 0.3]},
    "train": {"steps": 40, "lr": 1e-5, "clip": 1.0, "ema": 0.99, "init_from": "runs/a"},
    "seeds": {"scales": [1.0, 0.5], "dtype": "float16"},
    "refine": ["pamr", {"crf": {"preset": "label"}}],
    "masks": {"rule": "power", "alpha": 4.0},
    "segmenter": {"backbone": {"name": "resnet50"}, "train": {"batch": 4}},
    "evaluate": {"lists": {"report": "lists/report.txt"}},
}


def mistakes(source=None, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, **kwargs)
    assert caught.value.mend
    return str(caught.value)


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "other values"])
@pytest.mark.parametrize("write", [Recipe.to_yaml, commented_yaml])
def test_yaml_round_trip(tmp_path: Path, values: dict, write):
    recipe = load_recipe(values)
    file = tmp_path / "recipe.yaml"
    file.write_text(write(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert load_recipe(str(file)) == recipe
    assert write(load_recipe(file)) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("pamr", [{"name": "pamr"}]),
        (["pamr", {"crf": None}], [{"name": "pamr"}, {"name": "crf"}]),
        ([{"crf": {"iterations": 1}}], [{"name": "crf", "iterations": 1}]),
        ([{"name": "crf", "iterations": 1}], [{"name": "crf", "iterations": 1}]),
        ([], []),
        (None, []),
    ],
)
def test_steps_of_refinement_may_be_written_shortly(written, steps):
    recipe = load_recipe({"refine": written})
    assert list(recipe.refine) == steps
    assert recipe.steps == tuple(step["name"] for step in steps)


@pytest.mark.parametrize("written", [[3], [{"pamr": 3}], [{"a": {}, "b": {}}], [{}]])
def test_what_is_no_step_is_named(written):
    assert "is no step" in mistakes({"refine": written})


def test_given_values_arrive():
    recipe = load_recipe(OTHER)
    assert recipe.data.classes == ("ä cat", "no", "0123")
    assert recipe.method == {"name": "cam", "inner": {"rate": 1e-4}}
    assert recipe.train.lr == 1e-5
    assert recipe.segmenter_backbone.name == "resnet50"
    assert load_recipe({"backbone": {"name": "resnet18"}}).segmenter_backbone.name == "resnet18"


def test_a_complete_recipe_from_before_the_criterion_keeps_its_rule(tmp_path):
    kept = load_recipe().model_dump(mode="json")
    assert load_recipe(kept).masks.criterion == "auto"
    del kept["masks"]["criterion"]
    assert load_recipe(kept).masks.criterion == "cross-entropy"
    assert load_recipe(kept, sets=["masks.criterion=auto"]).masks.criterion == "auto"
    assert load_recipe({"masks": {"rule": "label-free"}}).masks.criterion == "auto"


def test_recipes_know_every_criterion():
    """The recipe does not import torch, so it writes the names again."""
    from weakseg.ops import CRITERIA

    names = get_args(MasksConfig.model_fields["criterion"].annotation)
    assert set(names) == {"auto", *CRITERIA}


def test_the_commented_recipe_explains_itself():
    text = commented_yaml(Recipe())
    assert "  lr: 0.01  # learning rate of pretrained weights" in text.splitlines()
    keys = set(Recipe.model_fields) | set(TrainConfig.model_fields)
    assert all(f"{key}:" in text for key in keys)


def test_a_method_may_be_given_by_name_alone():
    assert load_recipe({"method": "cam"}).method == {"name": "cam"}
    assert load_recipe(sets=["method=cam"]).method == {"name": "cam"}
    assert load_recipe({"method": "cam"}, sets=["method.rate=2"]).method == {
        "name": "cam",
        "rate": 2,
    }


def test_sets_win_over_overrides_and_these_over_the_file(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("seed: 1\ntrain: {steps: 1, batch: 1, crop: 1}\n")
    recipe = load_recipe(
        file,
        overrides={"train": {"batch": 2, "crop": 2, "steps": None}, "data": {"root": None}},
        sets=["train.crop=3"],
    )
    assert (recipe.seed, recipe.train.steps, recipe.train.batch, recipe.train.crop) == (1, 1, 2, 3)
    assert recipe.data.root is None


def test_the_right_side_of_an_assignment_is_yaml():
    recipe = load_recipe(
        sets=[
            "train.lr=1e-4",
            "seeds.scales=[1, 0.5]",
            "train.clip=null",
            "seeds.flip=false",
            "data.options.lists.train=a=b",
            "data.classes=[cat, dog]",
            "evaluate.lists={a: x.txt}",
            " train.batch = 8",
        ]
    )
    assert recipe.train.lr == 1e-4
    assert recipe.seeds.scales == (1.0, 0.5)
    assert recipe.train.clip is None
    assert recipe.seeds.flip is False
    assert recipe.data.options == {"lists": {"train": "a=b"}}
    assert recipe.data.classes == ("cat", "dog")
    assert recipe.evaluate.lists == {"a": Path("x.txt")}
    assert recipe.train.batch == 8


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.lr", "'train.lr' is not an assignment"),
        ("seed.x=1", None),
        ("data.source.x=1", "'source' holds a value, not keys"),
        ("train.lr=[1", "the right side of 'train.lr=[1' is not YAML"),
        ("train.lrr=1", "train.lrr: unknown key; did you mean 'lr'"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("train.lr=fast", "train.lr = 'fast': Input should be a valid number"),
    ],
)
def test_wrong_assignments(assignment: str, words: str | None):
    text = mistakes({"seed": 1, "data": {"source": "voc"}}, sets=[assignment])
    assert (words or "'seed' holds a value, not keys") in text


def test_the_callers_values_are_left_alone():
    values = {"train": {"lr": 0.5}}
    load_recipe(values, overrides={"train": {"batch": 2}}, sets=["train.lr=0.1"])
    assert values == {"train": {"lr": 0.5}}


def test_the_paper_preset_is_what_the_published_code_ran():
    train = load_recipe({"train": {"preset": "paper"}}).train
    assert (train.optimiser, train.lr, train.weight_decay) == ("sgd", 0.1, 1e-4)
    assert (
        train.momentum == train.weight_decay == 1e-4
    )  # its optimiser passed decay where SGD expects momentum
    assert (train.head_lr, train.schedule, train.power) == (10, "poly", 0.9)
    default = TrainConfig()
    assert (default.momentum, default.lr) == (0.9, 0.01)
    assert train.crop == default.crop  # the preset speaks of the optimiser alone


def test_given_keys_win_over_the_preset():
    values = {"train": {"preset": "paper", "lr": 0.02}}
    train = load_recipe(values, sets=["train.momentum=0.5"]).train
    assert (train.lr, train.momentum, train.weight_decay) == (0.02, 0.5, 1e-4)


def test_one_setting_of_the_segmenter_leaves_its_other_defaults():
    default = Recipe().segmenter.train
    given = load_recipe(sets=["segmenter.train.lr=0.5"]).segmenter.train
    assert given == default.model_copy(update={"lr": 0.5})
    assert default.resize == (0.75, 2.0)
    assert default.resize != Recipe().train.resize


def test_every_mistake_at_once_one_line_for_each_key():
    text = mistakes(
        {
            "sead": 1,
            "train": {"lr": -1, "bach": 4},
            "seeds": {"scales": [0]},
            "masks": {"rule": "magic"},
            "method": {"nam": "cam"},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "recipe: 6 settings are wrong"
    keys = (
        "sead:",
        "train.lr = -1:",
        "train.bach:",
        "seeds.scales.0 =",
        "masks.rule =",
        "method =",
    )
    for key in keys:
        assert sum(line.strip().startswith(key) for line in lines) == 1, key
    assert len(lines) == 1 + len(keys) + 1
    assert lines[-1].startswith("  mend:")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"batch": 10, "accumulate": 3}, "batch 10 must be a multiple of accumulate 3"),
        ({"resize": [2, 1]}, "must be (smallest, largest)"),
        ({"warmup": 1.0}, "less than 1"),
        ({"epochs": 0}, "greater than 0"),
    ],
)
def test_rules_between_settings(train: dict, words: str):
    assert words in mistakes({"train": train})


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        (
            {"method": {"name": "recurseed", "mix_start": 0.5, "mix_seg": 1}},
            ["mix_start", "mix_seg"],
        ),
        ({"method": {"name": "recurseed+cutmix", "mix_start": 0.5}}, []),
        ({"method": {"name": "recurseed", "mix": "cutmix", "mix_start": 0.5}}, []),
        ({"segmenter": {"mix_start": 0.5}}, ["segmenter.mix_start"]),
        ({"segmenter": {"mix_start": 0.5, "mix": "cutmix"}}, []),
        ({"method": {"name": "cam", "classifier_loss": "sigmoid"}}, ["classifier_loss"]),
        ({"method": {"from_classifier": "a.pth", "classifier_loss": "sigmoid", "name": "cam"}}, []),
        ({}, []),
    ],
)
def test_settings_without_effect_are_known(values: dict, idle: list[str]):
    found = load_recipe(values).idle_settings
    assert len(found) == len(idle)
    assert all(name in words for name, words in zip(idle, found, strict=True))


def test_weights_and_pretrained_exclude_each_other():
    backbone = load_recipe({"backbone": {"weights": "w.safetensors"}}).backbone
    assert not backbone.pretrained
    assert not backbone.from_scratch
    both = {"backbone": {"weights": "w.safetensors", "pretrained": True}}
    assert "give either `weights: file` or `pretrained: true`" in mistakes(both)


def test_steps_come_from_epochs():
    assert TrainConfig(epochs=2.5, batch=16).total_steps(100) == 16  # 250 / 16 = 15.6
    assert TrainConfig(epochs=0.1, batch=16).total_steps(3) == 1
    assert TrainConfig(steps=7, epochs=9.0).total_steps(100) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not readable YAML"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("\tx: 1", "is not readable YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str):
    (tmp_path / "r.yaml").write_text(text)
    message = mistakes(tmp_path / "r.yaml")
    assert words in message
    assert str(tmp_path / "r.yaml") in message


def test_an_empty_file_is_the_default_recipe(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("# nothing changed\n")
    assert load_recipe(tmp_path / "r.yaml") == Recipe()


def test_an_unknown_recipe_is_answered_with_shipped_ones():
    assert "no recipe 'no/such'" in mistakes("no/such")
    for name in shipped_recipes():
        assert name in mistakes(name + "x")


def test_every_shipped_recipe_loads_and_survives_a_round_trip():
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe, name
        resolve(recipe.method)
        assert path.read_text(encoding="utf-8").startswith("#"), f"{name} says nothing of itself"


def test_mistakes_in_the_method_section_have_one_line_for_each_key():
    recipe = load_recipe({"method": {"name": "cam", "tiles": 4, "alpha": 1}})
    with pytest.raises(UserError) as caught:
        resolve(recipe.method)
    lines = str(caught.value).splitlines()
    assert lines[0] == "method cam: 2 settings are wrong"
    assert [line.split(";")[0] for line in lines[1:3]] == [
        "  method.tiles: unknown key",
        "  method.alpha: unknown key",
    ]
    with pytest.raises(UserError, match="unknown method 'cma'.*\n.*did you mean 'cam'"):
        resolve({"name": "cma"})


LIGHT = """
import json, sys
import weakseg, weakseg.cli
from weakseg.runfolder import RunFolder

codes = []
for words in (["--help"], ["--version"], ["run", "--help"], ["run", ".", "--set", "train.lrr=1"]):
    sys.argv = ["weakseg", *words]
    try:
        weakseg.cli.main()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
heavy = ("torch", "torchvision", "timm", "lightning", "scipy", "cv2", "numba")
print(json.dumps([codes, [m for m in heavy if m in sys.modules]]))
"""


def test_help_and_mistakes_do_not_import_torch(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert codes == [0, 0, 0, 2]
    assert "train.lrr: unknown key; did you mean 'lr'" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_preset_that_is_set_wins_over_keys_that_are_written_out():
    written = load_recipe({"train": {"lr": 0.3, "steps": 7}}).model_dump(mode="json")
    paper = load_recipe(written, sets=["train.preset=paper"]).train
    assert (paper.lr, paper.momentum, paper.steps) == (0.1, 1e-4, 7)
    own = load_recipe(written, sets=["train.preset=paper", "train.lr=0.02"]).train
    assert (own.lr, own.momentum) == (0.02, 1e-4)


def test_an_empty_section_means_the_defaults():
    assert load_recipe({"train": None, "seed": 4}) == load_recipe({"seed": 4})


def test_paths_of_arguments_hold_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.csv").write_text("image,labels")
    monkeypatch.chdir(tmp_path)
    found = data_values("photos", "labels.csv", "masks", ["a", "b"])
    assert found == {
        "root": str(tmp_path / "photos"),
        "labels": str(tmp_path / "labels.csv"),
        "masks": "masks",
        "classes": ["a", "b"],
    }
    assert data_values(None, "xml", None, None)["labels"] == "xml"


def test_another_method_leaves_settings_of_the_first_behind():
    recipe = {"method": {"name": "recurseed", "channels": 12}, "train": {"steps": 5}}
    other = load_recipe(recipe, sets=["method.er=0.5", "method.name=seam"])
    assert other.method == {"name": "seam", "er": 0.5}
    assert other.train.steps == 5
    part = load_recipe(recipe, sets=["method.name=recurseed+cutmix"])
    assert part.method == {"name": "recurseed+cutmix", "channels": 12}
