"""Model folders: what is loaded answers bit for bit like what was saved; misfits are named."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import weakseg
from weakseg.data.depth import Reading
from weakseg.errors import UserError
from weakseg.export.model import find_model, initialise, load, save
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Trainable, build
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.training.segmenter import Segmenter

CLASSES = ("cat", "big dog", "ä")
TASKS = ("method", "segmenter")


def model_of(task: str, spec: BackboneSpec, classes: int = 3) -> Trainable:
    if task == "method":
        return build({"name": "cam"}, backbone_factory(spec), classes)
    return Segmenter(DeepLabV3Plus(make_backbone(spec), classes + 1, 8, (1, 2, 3)))


def saved(folder: Path, task: str, spec: BackboneSpec) -> Predictor:
    """A folder of a network whose weights and statistics all differ from a fresh one's."""
    model = model_of(task, spec)
    model.train()
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64))
    predictor = Predictor(
        model.eval(),
        CLASSES,
        Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        scales=(1.0, 0.5),
        flip=True,
        max_side=48,
        threshold=0.27,
        head=model.heads[0],
    )
    network: dict[str, Any] = {"task": task, "backbone": spec.model_dump(mode="json")}
    if task == "method":
        network["method"] = {"name": "cam"}
    else:
        network["decoder"] = {"channels": 8, "dilations": [1, 2, 3]}
    save(folder, predictor, network, {"steps": 7, "tags from": "table"})
    return predictor


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_spec: BackboneSpec):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {task: (root / task, saved(root / task, task, tiny_spec)) for task in TASKS}


@pytest.fixture
def copied(folders, tmp_path: Path) -> Path:
    """A method's folder that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders["method"][0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_loaded_models_answer_bit_for_bit_alike(folders, task: str):
    folder, given = folders[task]
    found = load(folder)
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    assert not found.model.training
    assert torch.equal(found.probabilities(images), given.probabilities(images))
    assert (found.predict_batch(images) == given.predict_batch(images)).all()
    for key in ("classes", "normalise", "scales", "flip", "max_side", "threshold", "head"):
        assert getattr(found, key) == getattr(given, key), key
    assert found.details == {"steps": 7, "tags from": "table"}


def test_every_setting_of_inference_is_kept(folders, tmp_path: Path):
    given = replace(load(folders["segmenter"][0]), tile=512, crf="label", max_side=None, flip=False)
    for reading in (Reading(12, (3, 2, 1)), Reading((-1.5, 99.0), "alpha"), Reading()):
        given.reading = reading
        given.save_pretrained(tmp_path / "again")
        found = load(tmp_path / "again")
        for field in fields(Predictor):
            if field.name != "model":
                assert getattr(found, field.name) == getattr(given, field.name), field.name


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 0), ("depth", [5, 5]), ("depth", [1, "x"]), ("bands", [1, 2]), ("bands", "beta")],
)
def test_a_range_that_cannot_be_is_named(copied: Path, key: str, value: Any):
    file = copied / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["preprocessing"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(copied)
    assert caught.value.where == str(file) and f"preprocessing.{key}" in caught.value.what


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_describes_itself(folders, task: str):
    folder, _ = folders[task]
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == list(CLASSES)
    assert config["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert config["inference"]["threshold"] == 0.27
    assert config["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert config["preprocessing"]["std"] == [0.4, 0.5, 0.6]
    assert config["task"] == task
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "3 classes: cat, big dog, ä" in card
    assert "* steps: 7" in card


def test_loading_fetches_nothing_and_needs_no_weights_of_the_backbone(folders, monkeypatch):
    from weakseg.networks import backbone as module

    create = module.timm.create_model

    def offline(*args: Any, **settings: Any):
        assert not settings.get("pretrained")
        return create(*args, **settings)

    monkeypatch.setattr(module.timm, "create_model", offline)
    assert load(str(folders["method"][0])).classes == CLASSES


def test_the_best_model_of_a_run_is_found(folders, tmp_path: Path):
    for stage, task in (("2-train", "method"), ("6-segment", "segmenter")):
        target = tmp_path / stage / "model"
        target.mkdir(parents=True)
        for file in folders[task][0].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        assert find_model(tmp_path) == target
        assert find_model(tmp_path / stage) == target
    assert isinstance(weakseg.load(tmp_path).model, Segmenter)


def test_a_folder_without_a_model_is_named(tmp_path: Path, copied: Path):
    with pytest.raises(UserError, match="holds no model") as caught:
        load(tmp_path / "nothing")
    assert caught.value.where == str(tmp_path / "nothing")
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model"):
        load(copied)


@pytest.mark.parametrize("keep", [0, 7, 1000, -10])
def test_damaged_weights_are_named(copied: Path, keep: int):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(copied)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: "{", "is not JSON"),
        (lambda c: [], "has format None"),
        (lambda c: {}, "has format None"),
        (lambda c: c | {"format": 99}, "has format 99, this version reads 1"),
        (lambda c: {"format": 1, "task": "method"}, "lacks backbone, classes, preprocessing"),
        (lambda c: c | {"backbone": {"nam": "x"}}, "backbone.nam: unknown key"),
        (lambda c: c | {"classes": ["cat"]}, "the weights do not fit the configuration"),
        (lambda c: c | {"method": {"name": "cma"}}, "unknown method 'cma'"),
    ],
)
def test_configurations_that_do_not_fit_are_named(copied: Path, change, words: str):
    file = copied / "config.json"
    config = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=words):
        load(copied)


@pytest.mark.parametrize("change", ["lack", "extra"])
def test_weights_of_another_network_are_named(copied: Path, change: str):
    file = copied / "model.safetensors"
    state = load_file(file)
    if change == "lack":
        del state["head.classifier.weight"]
    else:
        state["head.extra"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(UserError, match="the weights do not fit the configuration") as caught:
        load(copied)
    assert caught.value.where == str(copied)


def test_an_interrupted_save_leaves_the_old_weights(copied: Path, folders, monkeypatch):
    before = (copied / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weakseg.export.model.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(copied, folders["method"][1], {"task": "method"}, {})
    assert (copied / "model.safetensors").read_bytes() == before
    assert len(list(copied.iterdir())) == 3


# -- starting from other weights


def test_starting_from_the_same_network_takes_everything(folders, tiny_spec: BackboneSpec):
    folder, given = folders["method"]
    model = model_of("method", tiny_spec)
    assert initialise(model, folder) == []
    own, wanted = model.state_dict(), given.model.state_dict()
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)


def test_starting_with_other_classes_takes_the_backbone(folders, tiny_spec: BackboneSpec):
    folder, given = folders["method"]
    model = model_of("method", tiny_spec, classes=5)
    head = model.state_dict()["head.classifier.weight"].clone()
    assert initialise(model, folder) == ["head.classifier.weight"]
    own, wanted = model.state_dict(), given.model.state_dict()
    assert torch.equal(own["head.classifier.weight"], head)
    backbone = [key for key in own if key.startswith("backbone.")]
    assert len(backbone) > 20
    assert all(torch.equal(own[key], wanted[key]) for key in backbone)


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet10t"])
def test_starting_from_another_backbone_is_refused(folders, name: str):
    """Also where names agree: a ResNet's counters of batches fit any other ResNet."""
    model = model_of("method", BackboneSpec(name=name, pretrained=False), classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="no tensor of this model fits the network"):
        initialise(model, folders["method"][0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "*x*",
    "[a](http://x.example)",
    "`x`",
    "# h",
    "line\nbreak",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_shows_names_as_they_are(name: str, folders, tmp_path: Path):
    """Names of classes, files, data sets and splits are words of others."""
    model = load(folders["method"][0])

    def shape(word: str) -> list[str]:
        row: dict[str, Any] = dict.fromkeys(("stage", "split", "tags", "rule"), word)
        row |= {"images": 3, "scales": [1.0], "flip": False, "crf": "none", "threshold": 0.3}
        row |= {"miou": 0.5, "fp": 0.1, "fn": 0.2}
        details = {"data": word, "classifier": word, word: "x", "threshold rule": word}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        replace(
            model, classes=(word, "cat", "dog"), details={**details, "numbers": [row]}
        ).save_pretrained(folder)
        text = (folder / "README.md").read_text(encoding="utf-8")
        front, body = text.split("\n---\n", 1)
        (result,) = yaml.safe_load(front.removeprefix("---\n"))["model-index"][0]["results"]
        assert result["dataset"]["name"] == word
        parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        tokens = parser.parse(body)
        return [t.type for token in tokens for t in [token, *(token.children or [])]]

    assert shape(name) == shape("x")


def test_a_model_folder_places_maps_as_its_run_did(tmp_path, tiny_spec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 2)
    normalise = Normalise((0.5,) * 3, (0.5,) * 3)
    network = {
        "task": "method",
        "method": {"name": "cam"},
        "backbone": tiny_spec.model_dump(mode="json"),
    }
    images = torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8)
    found = {}
    for place in ("cells", "stretch"):
        predictor = Predictor(model.eval(), ("a", "b"), normalise, place=place, threshold=0.4)
        save(tmp_path / place, predictor, network, {})
        found[place] = load(tmp_path / place).probabilities(images)
        assert torch.equal(found[place], predictor.probabilities(images))
    assert not torch.equal(found["cells"], found["stretch"])
