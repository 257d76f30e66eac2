"""Methods side by side: who runs with which recipe, what is shared, and what goes on where it stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import weakseg.comparison as comparison
from tests.stages.conftest import TINY
from weakseg.comparison import compare, contestants
from weakseg.errors import UserError
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def recipe_with(root: Path | None = None, **sections: object) -> Recipe:
    data = {} if root is None else {"data": {"root": str(root)}}
    return load_recipe({**TINY, **sections}, overrides=data)


def only(recipe: Recipe, label: str) -> comparison.Contestant:
    (found,) = contestants(recipe, [label], images=24)
    return found


# -- who runs with which recipe


def test_a_method_takes_the_recipe_and_its_own_defaults():
    recipe = recipe_with(method={"name": "puzzle", "alpha": 2.0})
    assert only(recipe, "puzzle").recipe == recipe
    seam = only(recipe, "seam").recipe
    assert seam.method == {"name": "seam"}, "settings of another method would be refused"
    assert seam.train == recipe.train


def test_settings_of_a_method_hold_for_its_parts_too():
    recipe = recipe_with(compare={"methods": {"recurseed": {"method": {"channels": 12}}}})
    mixed = only(recipe, "recurseed+cutmix").recipe
    assert mixed.method == {"name": "recurseed+cutmix", "channels": 12}
    own = {"recurseed": {"method": {"channels": 12}}, "recurseed+cutmix": {"train": {"batch": 2}}}
    mixed = only(recipe_with(compare={"methods": own}), "recurseed+cutmix").recipe
    assert mixed.method == {"name": "recurseed+cutmix"}
    assert mixed.train.batch == 2


def test_a_part_of_the_recipes_method_keeps_its_settings():
    recipe = recipe_with(method={"name": "recurseed", "channels": 12, "start": 0.6})
    assert only(recipe, "recurseed+cutmix").recipe.method["channels"] == 12
    plain = recipe_with(method={"name": "recurseed+cutmix", "channels": 12})
    assert only(plain, "recurseed").recipe.method == {"name": "recurseed", "channels": 12}


@pytest.mark.parametrize("name", ["default/cpu", "default/gpu"])
def test_the_default_recipes_compare_recurseed_from_its_early_start(name):
    """Alone it must learn the classes first; behind the shared CAM it need not."""
    recipe = load_recipe(name)
    assert recipe.method["name"] == "cam" or recipe.method["start"] > 0.2
    for label in ("recurseed", "recurseed+edgepredictmix"):
        assert only(recipe, label).recipe.method["start"] == 0.1


def test_a_variant_is_a_recipe_of_its_own():
    variants = {"cam + pamr": {"method": "cam", "refine": ["pamr"]}}
    recipe = recipe_with(method={"name": "seam"}, compare={"methods": variants})
    variant = only(recipe, "cam + pamr").recipe
    assert variant.method == {"name": "cam"}
    assert variant.steps == ("pamr",)
    assert variant.compare == load_recipe().compare, "a single run compares nothing"


def test_methods_go_on_from_one_cam_with_settings_of_their_own():
    after = {"train": {"steps": 3, "lr": 0.5}}
    recipe = recipe_with(
        method={"name": "puzzle", "alpha": 2.0},
        compare={"after_cam": after, "methods": {"seam": {"train": {"lr": 0.25}}}},
    )
    puzzle, seam = contestants(recipe, ["puzzle", "seam"], images=24)
    assert puzzle.from_cam
    assert (puzzle.recipe.train.steps, puzzle.recipe.train.lr) == (3, 0.5)
    assert puzzle.recipe.method == {"name": "puzzle", "alpha": 2.0}
    assert (seam.recipe.train.steps, seam.recipe.train.lr) == (3, 0.25)


def test_a_method_on_another_network_trains_alone_for_the_steps_of_both():
    own = {"backbone": {"name": "test_vit", "pretrained": False}}
    recipe = recipe_with(compare={"after_cam": {"train": {"steps": 3}}, "methods": {"cam": own}})
    alone = only(recipe, "cam")
    assert not alone.from_cam
    assert alone.recipe.train.steps == 6 + 3
    assert alone.recipe.backbone.name == "test_vit"
    assert alone.recipe.segmenter.backbone == recipe.backbone, "a segmenter cannot use tokens"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cam", "cam"], "'cam' stands twice"),
        ([" "], "no method is named"),
        (["caam"], "no method or variant 'caam'"),
        (["a b", "a-b"], "would share a folder"),
        (["shared-cam"], "would share a folder"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(labels, words):
    variants = {name: {"method": "cam"} for name in ("a b", "a-b", "shared-cam")}
    with pytest.raises(UserError, match=words) as caught:
        contestants(recipe_with(compare={"methods": variants}), labels, images=24)
    assert caught.value.mend


def test_wrong_settings_name_their_method():
    recipe = recipe_with(compare={"methods": {"seam": {"train": {"stepz": 3}}}})
    with pytest.raises(UserError, match="compare.methods: seam: .*\n.*train.stepz: unknown key"):
        only(recipe, "seam")


def test_null_is_a_value_in_what_a_method_changes():
    recipe = recipe_with(
        compare={
            "after_cam": {"predict": {"max_side": None}},
            "methods": {"cam": {"seeds": {"max_side": None}}},
        }
    )
    cam = only(recipe, "cam").recipe
    assert cam.seeds.max_side is None
    assert cam.predict.max_side is None


def test_image_steps_are_equal_where_batches_differ():
    own = {"backbone": {"name": "test_vit", "pretrained": False}}
    after = {"train": {"steps": 4, "batch": 8}}
    recipe = recipe_with(compare={"after_cam": after, "methods": {"cam": own}})
    train = only(recipe, "cam").recipe.train
    assert train.steps * train.batch == 6 * 4 + 4 * 8


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"data": {"train": ["val"]}}, "compare.after_cam: data is the same for all"),
        ({"method": {"name": "seam"}}, "compare.after_cam: method is the same for all"),
        ({"backbone": {"name": "test_vit"}}, "cannot go on from test_resnet"),
        ({"train": 3}, "compare.after_cam: train = 3 holds no keys"),
    ],
)
def test_the_shared_start_is_the_same_for_all(after, words):
    with pytest.raises(UserError, match=words):
        only(recipe_with(compare={"after_cam": after}), "cam")


@pytest.mark.parametrize("own", [{"backbone": None}, {"backbone": "resnet18"}, {"method": ["a"]}])
def test_sections_that_hold_no_keys_are_refused(own):
    with pytest.raises(UserError, match="compare.methods: seam: .* holds no keys"):
        only(recipe_with(compare={"methods": {"seam": own}}), "seam")


def test_given_scores_leave_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match="no method would be trained"):
        only(recipe_with(seeds={"given": str(tmp_path)}), "cam")


@pytest.mark.parametrize("section", ["data", "seed", "evaluate"])
def test_what_makes_methods_comparable_is_the_same_for_all(section):
    recipe = recipe_with(compare={"methods": {"seam": {section: {}}}})
    with pytest.raises(UserError, match=f"{section} is the same for all"):
        only(recipe, "seam")


def test_wrong_settings_are_found_before_anything_runs(root, tmp_path):
    recipe = recipe_with(root, compare={"methods": {"seam": {"method": {"er": -1}}}})
    with pytest.raises(UserError, match="method.er = -1"):
        compare(recipe, ["cam", "seam"], out=tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


# -- equal time


def test_equal_time_gives_dear_steps_fewer_turns(root, tmp_path, monkeypatch):
    seen, steps = [], []

    def fake(recipes, classes):
        names = {key: recipe.method["name"] for key, recipe in recipes.items()}
        seen.append(list(names.values()))
        return {key: {"cam": 2.0, "puzzle": 4.0, "seam": 1.0}[n] for key, n in names.items()}

    def stop(recipe, folder, **_):
        steps.append((recipe.method["name"], recipe.train.steps))
        raise UserError("enough")

    monkeypatch.setattr(comparison, "step_seconds", fake)
    monkeypatch.setattr(comparison, "run_recipe", stop)
    for methods in (["cam", "puzzle"], ["cam", "puzzle", "seam"]):
        with pytest.raises(UserError, match="runs failed"):
            compare(recipe_with(root), methods, out=tmp_path / "out", equal_time=True)
    assert steps == [("cam", 6), ("puzzle", 3), ("cam", 6), ("puzzle", 3), ("seam", 12)]
    assert seen == [["cam", "puzzle"], ["cam", "seam"]], "what was measured is kept"


def test_times_cannot_be_equal_where_only_some_share_a_cam(root, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "step_seconds", lambda recipes, _: dict.fromkeys(recipes, 1.0))
    own = {"alone": {"method": "cam", "backbone": {"name": "test_resnet2", "pretrained": False}}}
    monkeypatch.setattr(comparison, "checked", lambda recipe: recipe)
    recipe = recipe_with(root, compare={"after_cam": {"train": {"steps": 3}}, "methods": own})
    with pytest.raises(UserError, match="alone has a network of its own"):
        compare(recipe, "cam,alone", out=tmp_path, equal_time=True)


def test_a_shared_cam_that_fails_is_tried_once_for_each_seed(root, tmp_path, monkeypatch):
    tried = []

    def fail(recipe, folder, **options):
        tried.append(Path(folder).name)
        raise UserError("diverged")

    monkeypatch.setattr(comparison, "step_seconds", lambda recipes, _: dict.fromkeys(recipes, 1.0))
    monkeypatch.setattr(comparison, "run_recipe", fail)
    recipe = recipe_with(root, compare={"after_cam": {"train": {"steps": 3}}})
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        compare(recipe, ["cam", "seam"], out=tmp_path, seeds=2)
    assert tried == ["shared-cam-0", "shared-cam-1"]


def test_steps_of_every_method_can_be_timed():
    recipes = {
        name: recipe_with(method={"name": name}, train={"batch": 2, "crop": 64})
        for name in ("cam", "seam")
    }
    seconds = comparison.step_seconds(recipes, classes=3, rounds=1)
    assert seconds.keys() == recipes.keys()
    assert min(seconds.values()) > 0


# -- whole comparisons


def test_a_comparison_leaves_runs_and_tables_and_goes_on(root, tmp_path):
    recipe = recipe_with(
        root,
        seeds={"scales": [1.0]},
        segmenter={"enabled": False},
        compare={"after_cam": {"train": {"steps": 2}}},
    )
    first = compare(recipe, ["cam"], out=tmp_path, seeds=1, command="weakseg compare x")
    assert [e.label for e in first.entries] == ["cam"]
    before = (tmp_path / "cam-0/2-train/model/model.safetensors").stat().st_mtime_ns
    found = compare(recipe, ["cam", "puzzle"], out=tmp_path, seeds=2)
    assert [(e.label, e.seed) for e in found.entries] == [
        *(("cam", 0), ("cam", 1)),
        *(("puzzle", 0), ("puzzle", 1)),
    ]
    assert (tmp_path / "cam-0/2-train/model/model.safetensors").stat().st_mtime_ns == before
    for entry in found.entries:
        record = RunFolder(entry.folder).record("train")
        assert record is not None
        assert record.status == "done"
        assert record.results["steps"] == 2
        assert entry.recipe.seed == entry.seed
        assert entry.recipe.train.init_from == tmp_path / f"shared-cam-{entry.seed}"
    with (tmp_path / "comparison.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["seed"]) for row in rows} == {
        (e.label, str(e.seed)) for e in found.entries
    }
    assert "puzzle" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "puzzle" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_a_comparison_does_not_write_over_a_run(root, tmp_path):
    recipe = recipe_with(root)
    comparison.run_recipe(recipe, tmp_path, until="check")
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        compare(recipe, ["seam"], out=tmp_path)
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_the_shipped_comparison_knows_all_of_its_variants():
    recipe = load_recipe("shapes/compare")
    labels = {*comparison.METHODS, *recipe.compare.methods}
    for rival in contestants(recipe, sorted(labels), images=500):
        comparison.checked(rival.recipe)
        train = rival.recipe.train
        assert train.steps * train.batch == 16 * (310 if rival.from_cam else 496 + 310)


def test_a_run_that_fails_leaves_the_others_to_go_on(root, tmp_path, monkeypatch):
    whole = comparison.run_recipe

    def fragile(recipe, folder, **options):
        if recipe.method["name"] == "puzzle":
            raise UserError("diverged", mend="lower the rate")
        return whole(recipe, folder, **options)

    monkeypatch.setattr(comparison, "run_recipe", fragile)
    recipe = recipe_with(root, seeds={"scales": [1.0]}, segmenter={"enabled": False})
    with pytest.raises(UserError, match="1 of 2 runs failed: puzzle, seed 0"):
        compare(recipe, ["puzzle", "cam"], out=tmp_path)
    assert (tmp_path / "cam-0/report.html").exists()
    assert (tmp_path / "comparison.html").exists()
