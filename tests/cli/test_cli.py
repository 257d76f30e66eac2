"""The command line: its surface, its errors, its exit codes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg import cli
from weakseg.cli import app
from weakseg.comparison import METHODS
from weakseg.data.depth import Reading
from weakseg.data.images import read_mask, write_mask
from weakseg.errors import UserError
from weakseg.methods import needs_segmenter
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe, shipped_recipes
from weakseg.runfolder import RunFolder

SURFACE = {
    "check": {"--masks", "--classes", "--untagged", "--json", "--report", "--set"},
    "compare": {
        "--methods",
        "--seeds",
        "--equal-time",
        "--out",
        "--recipe",
        "--masks",
        "--classes",
        "--untagged",
        "--dry-run",
        "--set",
    },
    "demo": {"--out", "--set"},
    "doctor": set(),
    "evaluate": {"--boxes", "--set"},
    "export": {
        "--to",
        "--out",
        "--of",
        "--split",
        "--objects",
        "--unsure",
        "--scores",
        "--image-url",
        "--copy",
        "--images",
        "--classes",
        "--size",
    },
    "import-masks": {"--into", "--format", "--empty", "--confirmed"},
    "init": {"--like"},
    "masks": {"--set"},
    "methods": set(),
    "predict": {
        "--out",
        "--scales",
        "--flip",
        "--no-flip",
        "--max-side",
        "--tile",
        "--crf",
        "--runtime",
    },
    "report": set(),
    "run": {"--out", "--recipe", "--masks", "--classes", "--untagged", "--dry-run", "--set"},
    "score": {"--out", "--shown"},
    "seeds": {"--set"},
    "refine": {"--set"},
    "segment": {"--set"},
    "sweep": {"--thresholds"},
    "train": {"--set"},
}
"""Adding a flag is a decision: prefer a key of the recipe."""


def test_the_surface_is_frozen():
    found = {}
    for name in app:
        if name.startswith("-"):
            continue
        arguments = app[name].assemble_argument_collection()
        found[name] = {flag for a in arguments for flag in a.names if flag.startswith("--")}
    assert found == SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        app([name, "--help"])
    assert stop.value.code == 0
    assert name in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["image,labels"]
    for i in range(12):
        Image.new("RGB", (40, 32), (20 * i, 90, 30)).save(folder / f"{i}.png")
        rows.append(f"{i},{'cat' if i % 2 else 'dog'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return folder


def _call(*words: object) -> int:
    try:
        app([str(w) for w in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_check_counts_and_exits_with_two_on_errors(photos, capsys):
    labels = photos.parent / "labels.csv"
    assert _call("check", photos, labels, "--json") == 0
    clean = json.loads(capsys.readouterr().out)
    assert clean["images_per_class"]["train"] == {"cat": 6, "dog": 6}
    (photos / "3.png").write_bytes(b"")
    assert _call("check", photos, labels, "--json") == 2
    broken = json.loads(capsys.readouterr().out)
    assert any(p["severity"] == "error" and "3" in p["items"] for p in broken["problems"])


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"demo"}))
def test_every_recipe_of_a_paper_plans_its_run(name: str, photos, tmp_path, capsys):
    """On a network and crops of a second; everything else is the recipe's own."""
    recipe = load_recipe(name)
    own = recipe.backbone.name == "resnet38"
    transformer = recipe.backbone.name.startswith("deit")
    small = "resnet38" if own else "test_vit" if transformer else "test_resnet"
    convolutional = {"name": "test_resnet", "pretrained": False}
    sets = {
        "data": {"root": str(photos), "labels": str(photos.parent / "labels.csv")},
        "backbone.name": small,
        "backbone.options": {"width": 0.0625} if own else {},
        "backbone.pretrained": False,
        "backbone.weights": None,
        "train.crop": 64,
        "train.batch": 4,
        "segmenter.train.crop": 64,
        "segmenter.train.batch": 4,
        "segmenter.channels": 8,
        "segmenter.backbone": convolutional if transformer else None,
        "seeds.max_side": 64,
        "predict.max_side": 64,
    }
    if "layers" in recipe.method:  # of twelve; the small transformer has six
        sets["method.layers"] = 6
    if recipe.method["name"].startswith("acr"):
        sets |= {"method.depth": 4, "method.width": 4}
    words = [
        word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    assert _call("run", name, "--out", tmp_path / "out", "--dry-run", *words) == 0
    printed = capsys.readouterr().err
    assert all(stage in printed for stage in ("train", "seeds", "masks", "predict"))
    wanted = needs_segmenter(recipe.method, recipe.segmenter.enabled)
    assert ("DeepLabV3+" in printed) == wanted
    assert " + ".join(recipe.steps) in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_plans_and_writes_nothing(photos, tmp_path, capsys):
    sets = (
        "--set",
        "backbone.name=test_resnet",
        "--set",
        "train.crop=64",
        "--set",
        "segmenter.train.crop=64",
    )
    labels = tmp_path / "labels.csv"
    before = sorted(p.name for p in tmp_path.iterdir())
    assert _call("run", photos, labels, "--out", tmp_path / "out", "--dry-run", *sets) == 0
    printed = capsys.readouterr().err
    for word in (
        "check",
        "train",
        "seeds",
        "masks",
        "segment",
        "predict",
        "12 images",
        "2 classes",
        " s",
    ):
        assert word in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_dry_run_of_a_method_with_a_phase_that_has_ended(photos, tmp_path):
    settings = ("name=acr", "strategy=pretrained", "width=4", "depth=4")
    sets = [word for s in settings for word in ("--set", f"method.{s}")]
    for s in ("backbone.name=test_resnet", "train.crop=64", "segmenter.enabled=false"):
        sets += ["--set", s]
    labels = tmp_path / "labels.csv"
    assert _call("run", photos, labels, "--out", tmp_path / "out", "--dry-run", *sets) == 0


def test_init_writes_a_recipe_that_is_kept(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    assert _call("init", path, "--like", "demo") == 0
    assert "# seed of every random choice" in path.read_text()
    with pytest.raises(UserError, match="exists already"):
        app(["init", str(path)])


def test_compare_names_the_same_methods_as_its_function():
    """The command line spells them out, so that --help shows them without torch."""
    command, _, _ = app.parse_args(["compare", "photos"], exit_on_error=False)
    spelled = inspect.signature(command).parameters["methods"].default
    assert tuple(spelled.split(",")) == METHODS


def test_init_writes_what_a_run_would_take(tmp_path):
    from weakseg.api import starting_recipe

    assert _call("init", tmp_path / "own.yaml") == 0
    assert load_recipe(tmp_path / "own.yaml") == starting_recipe({}, [])


def test_errors_are_shown_with_their_mend_and_code_two(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "sys.argv",
        ["weakseg", "run", str(tmp_path / "none"), "--set", "train.lr=-1", "--set", "sead=3"],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "train.lr" in printed
    assert "did you mean 'seed'" in printed
    assert "mend" in printed


def test_markup_in_a_message_is_shown_as_it_is(monkeypatch, capsys, tmp_path):
    odd = tmp_path / "[red]odd.yaml"
    odd.write_text("seed: -1")
    monkeypatch.setattr("sys.argv", ["weakseg", "run", str(odd)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "[red]odd.yaml" in capsys.readouterr().err.replace("\n", "")


def test_predict_mirrors_folders_and_sizes(tiny, tmp_path, capsys):
    run_recipe(
        tiny.model_copy(update={"segmenter": tiny.segmenter.model_copy(update={"enabled": False})}),
        tmp_path / "run",
    )
    images = tmp_path / "new"
    (images / "a" / "b").mkdir(parents=True)
    Image.new("RGB", (70, 45)).save(images / "a" / "b" / "one.jpg")
    Image.new("RGB", (33, 80)).save(images / "two.png")
    assert (
        _call("predict", tmp_path / "run", images, "--out", tmp_path / "out", "--max-side", 64) == 0
    )
    assert Image.open(tmp_path / "out" / "a" / "b" / "one.png").size == (70, 45)
    assert Image.open(tmp_path / "out" / "two.png").size == (33, 80)
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[0] == "cat"
    other = np.full((80, 33), 255, np.uint8)  # of another model: nothing tells whose a mask is
    write_mask(tmp_path / "out" / "two.png", other)
    assert _call("predict", tmp_path / "run", images, "--out", tmp_path / "out") == 0
    assert (read_mask(tmp_path / "out" / "two.png") != 255).all()


def test_predict_refuses_what_would_lose_images(tmp_path, monkeypatch):
    monkeypatch.setattr("weakseg.export.model.load", lambda _: _Model())
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match="overwrite"):
        app(["predict", "run", tmp_path.name, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="overwrite"):
        cli.predict(tmp_path, tmp_path, out=tmp_path)
    with pytest.raises(UserError, match=r"scales\.0"):
        cli.predict(tmp_path, tmp_path, out=tmp_path / "out", scales=(0.0,))
    Image.new("RGB", (8, 8)).save(tmp_path / "one.jpg")
    with pytest.raises(UserError, match=r"one\.jpg and one\.png"):
        cli.predict(tmp_path, tmp_path, out=tmp_path / "out")


class _Model:
    scales, flip, max_side, tile, crf = (1.0,), False, None, None, None
    reading = Reading()

    def to(self, _):
        return self


def test_a_file_that_may_not_be_read_is_no_traceback(monkeypatch, capsys, tmp_path):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "labels.csv"))

    monkeypatch.setattr(cli, "_settings", denied)
    monkeypatch.setattr("sys.argv", ["weakseg", "run", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "labels.csv" in capsys.readouterr().err.replace("\n", "")


def test_a_stage_command_goes_on_with_a_run(tiny, tmp_path, capsys):
    run_recipe(tiny, tmp_path / "run", until="check")
    assert (
        _call(
            "masks",
            tmp_path / "run",
            "--set",
            "masks.rule=constant",
            "--set",
            "masks.threshold=0.4",
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "5-masks" / "rule.json").read_text())["threshold"] == 0.4
    assert str(tmp_path / "run" / "5-masks" / "masks") in capsys.readouterr().out
    assert _call("sweep", tmp_path / "run", "--thresholds", 10) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "threshold,miou,fp,fn"
    assert len(lines) == 11
    with pytest.raises(UserError, match="holds no run"):
        app(["train", str(tmp_path / "nowhere")])


def test_the_summary_of_a_run_without_ground_truth_is_a_table_too(tmp_path, capsys):
    with RunFolder(tmp_path).stage("masks", {}).working() as stage:
        stage.results |= {"images": 12, "rule": "label-free", "threshold": 0.234}
    cli._show_summary(tmp_path)
    assert "images 12, rule label-free, threshold 0.23" in capsys.readouterr().err


def test_doctor_names_a_broken_pair_and_its_mend(monkeypatch, capsys):
    import torchvision.ops

    from weakseg.doctor import examine

    assert not any(f.mend for f in examine())

    def broken(*_: object):
        raise RuntimeError("operator torchvision::nms does not exist")

    with monkeypatch.context() as patched:
        patched.setattr("weakseg.doctor.metadata.version", lambda _: "2.6.2")
        (finding,) = (f for f in examine() if f.mend)
        assert finding.name == "lightning" and "change your secrets" in finding.mend
    monkeypatch.setattr(torchvision.ops, "nms", broken)
    finding = next(f for f in examine() if f.name == "torch + torchvision")
    assert "nms does not exist" in finding.value
    assert "--reinstall-package" in (finding.mend or "")


def test_methods_lists_cards_and_recipes(capsys):
    assert _call("methods") == 0
    printed = capsys.readouterr().err
    assert "cam" in printed
    assert "demo" in printed
    assert "pamr" in printed and "crf" in printed
    assert "edgepredictmix" in printed and "recurseed+<mix>" in printed
    assert "acr+vit" in printed and "classifier: mctformer" in printed


def test_check_writes_a_page(photos, tmp_path):
    page = tmp_path / "out" / "check.html"
    _call("check", photos, tmp_path / "labels.csv", "--report", page)
    assert "Images of each class" in page.read_text()
    with pytest.raises(UserError, match="no name of a page"):
        _call("check", photos, tmp_path / "labels.csv", "--report", tmp_path / "out")


class SIGTERMException(SystemExit):  # noqa: N818
    """As Lightning raises when training is told to end."""


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt, 130), (SIGTERMException, 143)])
def test_who_stops_it_is_told_how_to_go_on(monkeypatch, capsys, signal, code):
    def stop():
        raise signal

    monkeypatch.setattr("weakseg.doctor.examine", stop)
    monkeypatch.setattr("sys.argv", ["weakseg", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert "run the same command again" in capsys.readouterr().err
