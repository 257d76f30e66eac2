"""Refinement as a stage: a chain of steps, each with a folder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.stages.conftest import TINY, contents
from weakseg.data.images import read_mask
from weakseg.data.scorefile import ScoreFile, read_scores
from weakseg.errors import UserError
from weakseg.inference import Normalise, Predictor
from weakseg.methods import build
from weakseg.networks.affinity import AffinityNetwork
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.ops import Cells, dense_crf, dense_crf_from_labels, place, self_correlation
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe, load_recipe, shipped_recipes
from weakseg.runfolder import RunFolder
from weakseg.stages import refine as refining
from weakseg.stages.affinity import AffinityConfig, read_affinity, sure_labels
from weakseg.stages.refine import AffinityStep, Given, SCGStep, resolve_steps, steps
from weakseg.training.affinity import AffinityLearner

TRAIN = {"steps": 2, "batch": 4, "crop": 64}
CHAINS: dict[str, list] = {
    "pamr": ["pamr"],
    "scg+pamr": [{"scg": {"levels": None}}, "pamr"],
    "affinity+crf": [{"affinity": {"train": TRAIN, "steps": 8}}, {"crf": {"iterations": 2}}],
    "psa": [
        {"affinity": {"kind": "psa", "train": TRAIN, "steps": 8, "labels": {"harden": "pamr"}}}
    ],
    "label crf": [{"crf": {"unary": "label", "preset": "label", "iterations": 1}}],
}


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, shapes_root: Path) -> Path:
    """A run up to its seeds, to be copied."""
    recipe = load_recipe(TINY, overrides={"data": {"root": str(shapes_root)}})
    return run_recipe(recipe, tmp_path_factory.mktemp("seeded") / "run", until="seeds").folder


@pytest.fixture
def started(seeded: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(seeded, tmp_path / "run"))


def _recipe(folder: Path, chain: list, **more) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides={"refine": chain, **more})


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_runs_and_masks_follow_its_last_scores(started: Path, name: str):
    recipe = _recipe(started, CHAINS[name])
    seeds = contents(started, "3-seeds/scores/**/*")
    run_recipe(recipe, started, until="masks")
    run = RunFolder(started)
    folders = [run.scores_folder(recipe.steps, i) for i in range(len(recipe.steps))]
    assert [f.parent.name for f in folders] == [f"{i + 1}-{s}" for i, s in enumerate(recipe.steps)]
    for folder in folders:
        assert {p.removeprefix("train/") for p in contents(folder, "**/*.npz")} == {
            Path(p).name for p in seeds
        }
    assert contents(started, "3-seeds/scores/**/*") == seeds
    changed = False
    for file in sorted(folders[-1].rglob("*.npz")):
        relative = file.relative_to(folders[-1])
        before = read_scores(started / "3-seeds/scores" / relative)
        after = read_scores(file)
        assert after.size == before.size
        assert set(after.foreground()[0]) == set(before.foreground()[0])
        assert after.scores.min() >= 0 and after.scores.max() <= 1
        changed |= not np.array_equal(
            after.full_size().foreground()[1], before.full_size().foreground()[1]
        )
        full = after.full_size()
        best, winner = full.best()
        limit = full.background()
        rule = json.loads((started / "5-masks/rule.json").read_text())
        if limit is None:
            limit = np.float32(rule["threshold"])
        else:
            assert rule["rule"] == "map" and rule["threshold"] is None
        mask = read_mask((started / "5-masks/masks" / relative).with_suffix(".png"))
        assert np.array_equal(mask, np.where(best > limit, winner, 0))
    assert changed


def test_a_second_run_skips_and_a_change_of_the_last_step_keeps_the_first(started: Path):
    run_recipe(_recipe(started, ["pamr", "crf"]), started, until="refine")
    first = contents(started, "4-refine/1-pamr/**/*")
    last = contents(started, "4-refine/2-crf/**/*")
    run_recipe(_recipe(started, ["pamr", "crf"]), started, until="refine")
    assert contents(started, "4-refine/2-crf/**/*") == last
    run_recipe(_recipe(started, ["pamr", {"crf": {"iterations": 1}}]), started, until="refine")
    assert contents(started, "4-refine/1-pamr/**/*") == first
    assert contents(started, "4-refine/2-crf/scores/**/*") != last
    run_recipe(_recipe(started, ["pamr"]), started, until="refine")
    assert contents(started, "4-refine/1-pamr/**/*") == first
    assert not (started / "4-refine/2-crf").exists()


def test_another_walk_does_not_train_again(started: Path):
    def walk(**settings):
        chain = [{"affinity": {"train": TRAIN, "labels": {"harden": "none"}} | settings}]
        run_recipe(_recipe(started, chain), started, until="refine")
        return (
            contents(started, "4-refine/1-affinity/scores/**/*"),
            (started / "4-refine/network/last.ckpt").stat().st_mtime_ns,
            contents(started, "4-refine/network/labels/**/*"),
        )

    first, other = walk(steps=2), walk(steps=8)
    classifier = load_file(started / "2-train/model/model.safetensors")
    kept = torch.load(started / "4-refine/network/last.ckpt", weights_only=True)["state_dict"]
    for name in (n for n in classifier if n.startswith("backbone.") and "num_" not in n):
        assert kept[f"model.network.{name}"].equal(classifier[name]), (
            "it starts there, and is fixed"
        )
    lenient = walk(labels={"harden": "pamr"})
    assert first[0] != other[0]
    assert first[1:] == other[1:]
    assert other[1] != lenient[1] and other[2] != lenient[2]
    run_recipe(_recipe(started, ["pamr"]), started, until="refine")
    assert not (started / "4-refine/network").exists()


@pytest.mark.parametrize("chain", [["pamr"], CHAINS["psa"]], ids=["pamr", "psa"])
def test_interrupted_work_goes_on_with_the_same_result(started, tmp_path, monkeypatch, chain):
    whole = Path(shutil.copytree(started, tmp_path / "whole"))
    run_recipe(_recipe(whole, chain), whole, until="refine")
    step = steps[_recipe(whole, chain).steps[0]]
    calls, original = 0, step.__call__

    def failing(self, given):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, given)

    monkeypatch.setattr(step, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(_recipe(started, chain), started, until="refine")
    assert 0 < len(contents(started, "4-refine/*/scores/**/*.npz")) < 24
    run_recipe(_recipe(started, chain), started, until="refine")
    assert calls == 25  # what was done is not done again
    pattern = "4-refine/*/scores/**/*"
    assert contents(started, pattern) == contents(whole, pattern)


def test_the_evaluation_has_a_row_for_every_step(started: Path):
    chain = ["pamr", {"crf": {"iterations": 1}}]
    run_recipe(_recipe(started, chain, segmenter={"enabled": False}), started)
    rows = json.loads((started / "8-evaluate/results.json").read_text())["rows"]
    found = {(r["stage"], r["rule"], r["crf"]) for r in rows}
    assert found == {
        ("seed", "oracle", "none"),
        ("refined: pamr", "oracle", "none"),
        ("refined: pamr + crf", "oracle", "yes"),
        ("mask", "label-free", "yes"),
    }
    threshold = next(r["threshold"] for r in rows if r["stage"] == "mask")
    assert 0 < threshold < 1  # the one that the CRF weighed the scores against
    page = (started / "report.html").read_text()
    assert "refined: pamr, then crf" in page and "refined scores" in page


def test_ground_truth_is_not_looked_at(started: Path, monkeypatch):
    from weakseg.data import images

    def forbidden(path):
        if "4-refine" in str(path):
            return original(path)  # its own sure labels
        raise AssertionError(f"{path} was opened")

    original = images.read_mask
    recipe = _recipe(started, CHAINS["affinity+crf"])
    with monkeypatch.context() as patched:
        patched.setattr(images, "read_mask", forbidden)
        patched.setattr("weakseg.data.loading.read_mask", forbidden)
        run_recipe(recipe, started, until="refine")
    assert (started / "4-refine/2-crf/stage.json").exists()


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (["pamer"], "pamr"),
        ([{"pamr": {"iteration": 3}}], "iterations"),
        ([{"crf": {"preset": "hard"}}], "soft"),
        (["affinity", "affinity"], "keep one"),
        ([{"affinity": {"labels": {"harden": "graphcut"}}}], "crf"),
        (
            [{"affinity": {"labels": {"by": "power", "foreground": 32, "background": 4}}}],
            "4 and 32",
        ),
        ([{"affinity": {"pairs": "inner", "train": {"crop": 72}}}], "76"),
    ],
)
def test_wrong_steps_are_named_before_data_are_touched(tmp_path: Path, chain: list, said: str):
    recipe = load_recipe({"data": {"root": "/nowhere"}, "refine": chain})
    with pytest.raises(UserError) as caught:
        run_recipe(recipe, tmp_path / "run")
    assert said in str(caught.value)


def test_images_without_tags_stay_empty(started: Path):
    empty = sorted((started / "3-seeds/scores").rglob("*.npz"))[0]
    with np.load(empty) as file:
        kept = dict(file)
    kept |= {"classes": kept["classes"][:0], "scores": kept["scores"][:0]}
    np.savez_compressed(empty, **kept)
    run_recipe(_recipe(started, ["pamr", "crf"]), started, until="masks")
    relative = empty.relative_to(started / "3-seeds/scores")
    assert not len(read_scores(started / "4-refine/2-crf/scores" / relative).classes)
    assert not read_mask((started / "5-masks/masks" / relative).with_suffix(".png")).any()


@pytest.mark.parametrize("name", list(steps))
def test_every_step_says_what_it_is(name: str):
    step = steps[name]
    assert step.idea and step.needs <= {"threshold", "features", "affinity"}
    assert resolve_steps([{"name": name}])[0].config == step.Config()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_name_steps_that_exist(name: str):
    recipe = load_recipe(name)
    assert len(resolve_steps(recipe.refine)) == len(recipe.steps)


@pytest.mark.parametrize(("side", "steps"), [(500, 256), (250, 64), (1000, 1024), (10, 1)])
def test_the_walk_reaches_the_same_share_of_an_image_of_any_size(monkeypatch, side, steps):
    asked = []
    for name in ("random_walk", "random_walk_from_features"):
        monkeypatch.setattr(
            refining, name, lambda maps, *rest: asked.append(rest[1:]) or maps.clone()
        )
    image = torch.zeros(1, 3, side // 2, side, dtype=torch.uint8)
    seed = _seed(np.full((1, 2, 4), 0.5), (1,))
    for kind in ("irn", "psa"):
        (step,) = resolve_steps([{"name": "affinity", "kind": kind}])
        found = step(Given(image, seed, 0.3, affinity=torch.zeros(1, 1, 2, 4)))
        assert (found.scores == 1).all(), "what the walk spread thin is brought back to one"
    assert asked == [(5, 10, steps), (5, 8, steps)]  # methods.md 11: powers of IRNet, AffinityNet


def _seed(maps: np.ndarray, ids: tuple[int, ...]) -> ScoreFile:
    return ScoreFile(np.array(ids, np.int16), maps.astype(np.float32), 1, maps.shape[1:])


def test_sure_labels_are_where_two_thresholds_agree():
    maps = np.zeros((2, 1, 6), np.float32)
    maps[0, 0, :3] = 0.9, 0.35, 0.02
    maps[1, 0, 3:] = 0.8, 0.31, 0.04
    image = np.zeros((1, 6, 3), np.uint8)
    labels = sure_labels(image, _seed(maps, (4, 7)), 0.1, 3.3, 0.5, "none")
    assert labels.tolist() == [[4, 4, 0, 7, 255, 0]]


def test_sure_labels_by_scores_leave_threshold_and_background_map_alone():
    maps = np.zeros((2, 1, 4), np.float32)
    maps[0, 0] = 0.9, 0.9, 0.1, 0.1  # background
    maps[1, 0] = 0.31, 0.29, 0.06, 0.04
    image = np.zeros((1, 4, 3), np.uint8)
    labels = sure_labels(image, _seed(maps, (0, 5)), 0.7, 0.3, 0.05, "none", "score")
    assert labels.tolist() == [[5, 255, 255, 0]]


def test_sure_labels_by_powers_compare_with_two_backgrounds():
    """(1 - .3)^4 = .24, (1 - .2)^4 = .41, (1 - .09)^24 = .10, (1 - .08)^24 = .14."""
    maps = np.zeros((2, 1, 5), np.float32)
    maps[0, 0] = 0.3, 0.2, 0.09, 0.08, 0
    maps[1, 0] = 0.1, 0.1, 0.1, 0.01, 0
    image = np.zeros((1, 5, 3), np.uint8)
    labels = sure_labels(image, _seed(maps, (4, 7)), 0.0, 4, 24, "none", "power")
    assert labels.tolist() == [[4, 255, 255, 0, 0]]
    swapped = sure_labels(image, _seed(maps, (4, 7)), 0.0, 24, 4, "none", "power")
    assert swapped.tolist() == [[4, 0, 0, 0, 0]]  # what the other one finds empty is background


@pytest.mark.parametrize(("by", "strengths"), [("score", (0.6, 0.2)), ("power", (1.0, 4.0))])
def test_the_crf_of_sure_labels_keeps_its_widths_in_pixels(by: str, strengths: tuple):
    """In an image of 60 pixels as in one of 500 (docs/refinement.md)."""
    y, x = np.mgrid[:50, :60]
    maps = np.stack([np.exp(-((y - 25) ** 2 + (x - c) ** 2) / 200) for c in (12, 40)])
    generator = np.random.default_rng(0)
    image = generator.integers(0, 40, (50, 60, 3), np.uint8) + (30 * maps.max(0)[..., None] // 1)
    image = image.astype(np.uint8)
    pixels, scores = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(maps).float()

    def labels(scale: float) -> np.ndarray:
        found = []
        for strength in strengths:
            if by == "score":
                both = torch.cat([torch.full((1, 50, 60), strength), scores]).argmax(0)[None]
                wide = {"gaussian": (3 * scale, 3), "bilateral": (50 * scale, 5, 10)}
                refined = dense_crf_from_labels(pixels, both, 3, 0.7, 10, **wide)
            else:
                both = torch.cat([(1 - scores.amax(0, keepdim=True)) ** strength, scores])[None]
                wide = {"gaussian": (3 * scale, 3), "bilateral": (80 * scale, 13, 10)}
                refined = dense_crf(pixels, both, 10, **wide)
            found.append(refined[0].argmax(0).numpy())
        strict, lenient = found
        wanted = np.where(strict > 0, np.array([0, 4, 7])[strict], np.where(lenient > 0, 255, 0))
        return np.where(lenient > 0, wanted, 0) if by == "power" else wanted

    found = sure_labels(image, _seed(maps, (4, 7)), 0.9, *strengths, "crf", by)
    assert set(np.unique(found)) == {0, 4, 7, 255}
    assert np.array_equal(found, labels(1))
    assert not np.array_equal(found, labels(60 / 500))


def test_sure_labels_of_scores_with_a_background_map_compare_with_that_map():
    maps = np.zeros((2, 1, 4), np.float32)
    maps[0, 0] = 0.4, 0.6, 0.1, 0.9  # background
    maps[1, 0] = 0.7, 0.5, 0.7, 0.1
    image = np.zeros((1, 4, 3), np.uint8)
    labels = sure_labels(image, _seed(maps, (0, 5)), 0.0, 1.5, 0.5, "none")
    assert labels.tolist() == [[5, 255, 5, 0]]


def test_sure_labels_of_an_image_without_classes_are_background():
    labels = sure_labels(
        np.zeros((4, 5, 3), np.uint8), _seed(np.zeros((0, 4, 5)), ()), 0.2, 1.5, 0.5, "crf"
    )
    assert labels.shape == (4, 5) and not labels.any()


@pytest.mark.parametrize("harden", ["crf", "pamr"])
def test_hardened_labels_follow_the_image(harden: str):
    """A blurred blob over a red square: what is sure of the class lies on the square."""
    image = np.full((48, 48, 3), 40, np.uint8)
    image[16:32, 16:32] = (220, 20, 20)
    y, x = np.mgrid[:48, :48]
    maps = np.exp(-((y - 24) ** 2 + (x - 24) ** 2) / 120)[None]
    labels = sure_labels(image, _seed(maps, (3,)), 0.1, 3, 0.5, harden)
    inside = np.zeros((48, 48), bool)
    inside[16:32, 16:32] = True
    assert (labels[inside] == 3).mean() > 0.9
    assert (labels[~inside] == 3).mean() < 0.05


def test_a_refined_score_follows_the_image():
    """What the steps are for: the map of a blob ends where the object does."""
    image = np.full((48, 48, 3), 40, np.uint8)
    image[16:32, 16:32] = (220, 20, 20)
    y, x = np.mgrid[:48, :48]
    maps = np.exp(-((y - 24) ** 2 + (x - 24) ** 2) / 120)[None]
    given = Given(torch.from_numpy(image).permute(2, 0, 1)[None], _seed(maps, (3,)), 0.3)
    inside = np.zeros((48, 48), bool)
    inside[16:32, 16:32] = True

    def contrast(scores: np.ndarray) -> float:
        return float(scores[inside].mean() - scores[~inside].mean())

    before = contrast(maps[0])
    for name in ("pamr", "crf"):
        (step,) = resolve_steps([{"name": name}])
        assert contrast(step(given).foreground()[1][0]) > before, name


def test_a_start_that_the_walks_network_would_ignore_is_refused():
    with pytest.raises(UserError, match="init_from has no part in this network"):
        resolve_steps([{"name": "affinity", "train": {"init_from": "runs/a"}}])


def test_the_stage_waits_for_what_a_step_needs():
    assert {name: set(steps[name].needs) for name in steps} == {
        "pamr": set(),
        "scg": {"features"},
        "affinity": {"threshold", "affinity"},
        "crf": {"threshold"},
    }
    assert refining.Step.needs == frozenset()


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n != "demo"])
def test_recipes_of_papers_train_the_walk_at_the_published_rate(name: str):
    """Branches are new layers, so head_lr multiplies their rate: .1 after it, in irn as in psa."""
    recipe = load_recipe(name)
    for step in resolve_steps(recipe.refine):
        if isinstance(step, AffinityStep):
            train = step.config.train
            assert train.lr * train.head_lr == pytest.approx(0.1)
            assert train.momentum < 0.01


def test_the_crf_weighs_scores_or_their_labels():
    image = torch.randint(0, 256, (1, 3, 9, 11), dtype=torch.uint8)
    maps = np.random.default_rng(0).random((2, 9, 11)).astype(np.float32)
    given = Given(image, _seed(maps, (2, 5)), 0.4)
    both = torch.cat([torch.full((1, 1, 9, 11), 0.4), torch.from_numpy(maps)[None]], 1)
    labels = dense_crf_from_labels(image, both.argmax(1), 3, 0.7, 1, preset="label")
    scores = dense_crf(image, both / both.sum(1, keepdim=True), 1, preset="soft")
    for wanted, settings in ((labels, {}), (scores, {"unary": "soft", "preset": "soft"})):
        (step,) = resolve_steps([{"name": "crf", "iterations": 1, **settings}])
        found = step(given)
        assert found.classes.tolist() == [0, 2, 5]
        np.testing.assert_allclose(found.scores, wanted[0], atol=1e-6)


def test_scg_takes_the_deepest_levels(tiny_spec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 2).eval()
    predictor = Predictor(model, ("a", "b"), Normalise((0.5,) * 3, (0.5,) * 3))
    given = Given(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), _seed(np.ones((1, 4, 4)), (1,)))
    for levels, count in ((2, 2), (None, 5)):
        found = refining._features(predictor, SCGStep.Config(levels=levels))(given).features
        wanted = model.backbone.levels[-count:]
        assert [f.shape[1] for f in found] == [level.channels for level in wanted]


def test_scg_of_the_talk_reaches_one_and_has_no_thresholds():
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 0] = 1
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    levels = torch.rand(1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    given = Given(image, _seed(maps, (2,)), features=(levels,))
    (step,) = resolve_steps([{"name": "scg", "form": "talk"}])
    raw = self_correlation(given.maps(), [levels], form="talk")[0]
    assert 0 < raw.max() < 0.9
    np.testing.assert_allclose(step(given).scores, raw / raw.max(), atol=1e-3)
    for name in ("first_threshold", "second_threshold"):
        with pytest.raises(UserError, match="form talk has no thresholds"):
            resolve_steps([{"name": "scg", "form": "talk", name: 0.1}])


def _predictor(tiny_spec, config: AffinityConfig) -> Predictor:
    network = AffinityNetwork(make_backbone(tiny_spec), config.kind, False, config.place)
    learner = AffinityLearner(network, config.pairs_radius, config.pairs).eval()
    return Predictor(learner, ("",), Normalise((0.5,) * 3, (0.5,) * 3))


def test_scg_takes_levels_where_their_cells_look(tiny_spec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 2).eval()
    predictor = Predictor(model, ("a", "b"), Normalise((0.5,) * 3, (0.5,) * 3))
    image = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    maps = np.random.default_rng(0).random((1, 8, 10)).astype(np.float32)
    given = refining._features(predictor, SCGStep.Config())(Given(image, _seed(maps, (1,))))
    assert given.cells == model.backbone.cells((64, 80))[-2:]
    (step,) = resolve_steps([{"name": "scg"}])
    # A cell of 8 pixels has its centre at 3.5, the first one of 16 of this network at 3.
    features = [place(x, Cells((2, 2), (-0.5 / 8,) * 2), (8, 10), (8, 10)) for x in given.features]
    wanted = self_correlation(given.maps((8, 10)), features)
    assert wanted.max() > 0.5
    np.testing.assert_allclose(step(given).scores, wanted[0], atol=1e-4)


def test_boundaries_of_a_mirrored_image_are_mirrored(tiny_spec):
    config = AffinityConfig()
    predictor = _predictor(tiny_spec, config)
    image = torch.randint(0, 256, (1, 3, 64, 52), dtype=torch.uint8)
    found, mirrored = (read_affinity(predictor, x, config) for x in (image, image.flip(-1)))
    assert found.std() > 0
    torch.testing.assert_close(mirrored.flip(-1), found)


@pytest.mark.parametrize("size", [(50, 37), (120, 61)])
def test_boundaries_are_the_published_mean_of_logits_of_filled_up_images(tiny_spec, size):
    """methods.md 11.5: image and mirror image, filled up to the crop's side with the mean colour."""
    config = AffinityConfig(place="crop", train={"crop": 96})
    predictor = _predictor(tiny_spec, config)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    logits = []
    for x in (image, image.flip(-1)):
        filled = torch.zeros(1, 3, max(96, size[0]), 96)
        filled[..., : size[0], : size[1]] = x / 127.5 - 1
        with torch.no_grad():
            logits.append(predictor.model.network(filled)[..., :rows, :columns].double())
    wanted = 1 / (1 + (-(logits[0] + logits[1].flip(-1)) / 2).exp())
    torch.testing.assert_close(
        read_affinity(predictor, image, config).double(), wanted, atol=1e-5, rtol=0
    )


def test_features_are_of_the_image_alone_unless_the_mirror_is_asked_for(tiny_spec):
    """methods.md 10: one view, filled up to whole cells."""
    image = torch.randint(0, 256, (1, 3, 50, 37), dtype=torch.uint8)
    config = AffinityConfig(kind="psa", place="crop")
    predictor = _predictor(tiny_spec, config)
    views = []
    for x in (image, image.flip(-1)):
        filled = torch.zeros(1, 3, 56, 40)
        filled[..., :50, :37] = x / 127.5 - 1
        with torch.no_grad():
            views.append(predictor.model.network(filled))
    one = read_affinity(predictor, image, config)
    both = read_affinity(predictor, image, config.model_copy(update={"flip": True}))
    torch.testing.assert_close(one, views[0])
    torch.testing.assert_close(both, (views[0] + views[1].flip(-1)) / 2)


def _published_walk(maps, affinity, beta, steps, stride, size):
    """The walk of methods.md 10 and 11.5 in float64: maps (n, h, w), affinity (N, N)."""
    transition = np.linalg.matrix_power(affinity**beta / (affinity**beta).sum(0), steps)
    walked = (maps.reshape(len(maps), -1) @ transition).reshape(maps.shape)
    for axis in (1, 2):
        count = walked.shape[axis]
        at = ((np.arange(count * stride) + 0.5) / stride - 0.5).clip(0, count - 1)
        low = np.floor(at).astype(int).clip(max=count - 2)
        share = (at - low).reshape(-1, *[1] * (2 - axis))
        low, high = np.take(walked, low, axis), np.take(walked, low + 1, axis)
        walked = low * (1 - share) + high * share
    walked = walked[:, : size[0], : size[1]]
    return walked / walked.max()


def _pairs(height, width, radius, affinity):
    cells = [(y, x) for y in range(height) for x in range(width)]
    matrix = np.eye(len(cells))
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            if i != j and (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2:
                matrix[i, j] = affinity(a, b)
    return matrix


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_walk_over_features_is_the_published_one_at_any_size(alpha):
    """Scores are averaged over 8 x 8 pixels, the filling with zeros included; methods.md 10."""
    generator = np.random.default_rng(0)
    size, scores = (21, 35), generator.random((2, 21, 35))
    features = generator.standard_normal((3, 3, 5))
    settings = {"name": "affinity", "kind": "psa", "place": "crop", "radius": 3, "steps": 3}
    (step,) = resolve_steps([{**settings, "alpha": alpha}])
    given = Given(
        torch.zeros(1, 3, *size, dtype=torch.uint8),
        _seed(scores, (2, 5)),
        affinity=torch.from_numpy(features)[None].float(),
    )
    maps = (
        scores if alpha is None else np.concatenate([((1 - scores.max(0)) ** alpha)[None], scores])
    )
    filled = np.zeros((len(maps), 24, 40))
    filled[:, :21, :35] = maps
    pooled = filled.reshape(-1, 3, 8, 5, 8).mean((2, 4))
    affinity = _pairs(
        3, 5, 3, lambda a, b: np.exp(-np.abs(features[:, *a] - features[:, *b]).mean())
    )
    found = step(given)
    assert found.classes.tolist() == ([2, 5] if alpha is None else [0, 2, 5])
    np.testing.assert_allclose(
        found.scores, _published_walk(pooled, affinity, 8, 3, 8, size), atol=1e-5
    )


def test_the_walk_along_edges_is_the_published_one_at_any_size():
    """Radius 2: the four nearest cells, and no cell between; methods.md 11.5."""
    generator = np.random.default_rng(1)
    size, scores, edge = (21, 15), generator.random((2, 6, 4)), generator.random((6, 4)) ** 2
    settings = {"name": "affinity", "kind": "irn", "place": "crop", "radius": 2, "steps": 5}
    (step,) = resolve_steps([{**settings, "beta": 3}])
    seed = ScoreFile(np.array((2, 5), np.int16), scores.astype(np.float32), 4, size)
    image = torch.zeros(1, 3, *size, dtype=torch.uint8)
    found = step(Given(image, seed, affinity=torch.from_numpy(edge)[None, None].float()))

    def affinity(a, b):
        """A diagonal neighbour's path holds all four cells of the square."""
        rows, columns = sorted({a[0], b[0]}), sorted({a[1], b[1]})
        return 1 - edge[np.ix_(rows, columns)].max()

    wanted = _published_walk(scores * (1 - edge), _pairs(6, 4, 2, affinity), 3, 5, 4, size)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if "/" in n and "default" not in n])
def test_recipes_of_papers_walk_as_published(name: str):
    """methods.md 12: 256 steps, SEAM 64; maps, pairs and powers as published."""
    recipe = load_recipe(name)
    for step in resolve_steps(recipe.refine):
        if isinstance(step, AffinityStep) and not name.startswith("shapes"):
            c = step.config
            assert (c.place, c.pairs, c.flip, c.radius) == ("crop", "inner", None, 5)
            assert c.steps == (64 if "seam" in name else 256)
            assert c.beta in (None, 10 if c.kind == "irn" else 8)
            assert c.alpha == (6 if "seam" in name else None)
