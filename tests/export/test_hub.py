"""Saved, loaded, pushed and fetched: real folders; the hub itself is replaced at its boundary."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from tests.export.test_model import CLASSES, saved

import weakseg
from weakseg.errors import UserError
from weakseg.export.hub import is_repo_id
from weakseg.export.model import Model, load
from weakseg.files import write_json
from weakseg.networks.spec import BackboneSpec
from weakseg.stagefiles import StageRecord

ROW = {
    "stage": "segmenter", "split": "val", "images": 352, "head": "segmenter", "scales": [1.0, 0.5],
    "flip": True, "crf": "none", "tags": "none", "rule": "label-free", "threshold": 0.2852,
    "miou": 0.30448, "fp": 0.42, "fn": 0.29, "iou": [0.1, 0.2],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_spec: BackboneSpec) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub") / "run" / "6-segment" / "model"
    saved(root, "segmenter", tiny_spec)
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(model: Model) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8, generator=random)
    return model.probabilities(images)


def test_what_is_saved_is_what_is_loaded(folder: Path, tmp_path: Path):
    model = load(folder)
    assert isinstance(model, weakseg.Model) and isinstance(model, weakseg.Predictor)
    model.save_pretrained(tmp_path / "copy")
    found = Model.from_pretrained(str(tmp_path / "copy"))
    assert torch.equal(answer(found), answer(model))
    for key in ("network", "classes", "normalise", "scales", "flip", "max_side", "threshold"):
        assert getattr(found, key) == getattr(model, key), key
    same = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "copy")]
    assert same[0] == same[1]


def test_a_folded_network_cannot_be_saved(folder: Path):
    fast = load(folder).fast()
    assert not hasattr(fast, "save_pretrained")
    torch.testing.assert_close(answer(fast), answer(load(folder)), atol=1e-4, rtol=0)


def test_the_card_is_what_the_hub_reads_and_people_need(folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "6-segment" / "model")
    inputs = {}
    for stage in ("6-segment", "7-predict", "8-evaluate"):  # each on the one before it
        record = StageRecord(stage[2:], "done", f"fingerprint of {stage}", inputs)
        write_json(run / stage / "stage.json", asdict(record))
        inputs = {"before": record.fingerprint}
    rows = [ROW, ROW | {"rule": "oracle", "miou": 0.5}, ROW | {"stage": "mask", "miou": 0.9}]
    (run / "8-evaluate" / "results.json").write_text(json.dumps({"rows": rows}))
    load(run).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["library_name"] == "weakseg"
    assert said["pipeline_tag"] == "image-segmentation"
    assert "weakseg" in said["tags"]
    (result,) = said["model-index"][0]["results"]  # what saw the masks is left out
    assert result["dataset"]["split"] == "val"
    assert result["metrics"][0]["value"] == 30.45
    conditions = "scales 1 0.5, flip, CRF none, tags none, threshold label-free 0.29"
    assert result["metrics"][0]["name"] == f"mIoU % ({conditions})"
    assert f"| segmenter | val | 352 | 30.4 | 42.0 | 29.0 | {conditions} |" in body
    assert "oracle" in body and "90.0" not in body
    assert "| 3 | ä | #808000 |" in body
    again = load(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")  # numbers go with it
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == text


def test_a_name_is_a_repository_only_where_no_path_is(elsewhere: Path):
    assert is_repo_id("me/birds-v1.0")
    for name in ("birds", "a/b/c", "/me/birds", "me/", "./me/birds", "../birds", "me/bi rds"):
        assert not is_repo_id(name), name
    assert not is_repo_id(Path("me/birds"))
    (elsewhere / "me").mkdir()
    assert not is_repo_id("me/birds")
    with pytest.raises(UserError, match="holds no model"):
        load("me/birds")


def test_models_are_fetched_from_the_hub(folder: Path, elsewhere: Path, monkeypatch):
    asked = []

    def snapshot(repo_id: str, **settings):
        asked.append((repo_id, settings))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load("me/birds").classes == CLASSES
    Model.from_pretrained(
        "me/birds", revision="v1", token="t", cache_dir="c", local_files_only=True
    )
    assert asked[0][0] == "me/birds" and asked[0][1]["revision"] is None
    settings = asked[1][1]
    assert (settings["revision"], settings["token"], settings["cache_dir"]) == ("v1", "t", "c")
    assert settings["local_files_only"] is True
    assert "model.safetensors" in settings["allow_patterns"]  # and no code


class _Hub:
    """What ``HfApi`` is asked to do."""

    def __init__(self, target: Path) -> None:
        self.target, self.made = target, None

    def __call__(self, **settings):
        self.settings = settings
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.made = (repo_id, private, exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.message = commit_message
        shutil.copytree(folder_path, self.target)


def test_models_are_pushed_whole(folder: Path, tmp_path: Path, monkeypatch):
    hub = _Hub(tmp_path / "remote")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    model = load(folder)
    address = model.push_to_hub("me/birds", private=True, token="t", commit_message="first")
    assert address == "https://huggingface.co/me/birds"
    assert hub.made == ("me/birds", True, True)
    assert hub.settings["token"] == "t" and hub.message == "first"
    assert {f.name for f in hub.target.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    assert torch.equal(answer(load(hub.target)), answer(model))


def refused(kind: type, status: int) -> Exception:
    error = kind.__new__(kind)
    OSError.__init__(error, f"{status} on the hub")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "words", "mend"),
    [
        (refused(errors.RepositoryNotFoundError, 404), "no such model on the", "hf auth login"),
        (refused(errors.GatedRepoError, 403), "no such model on the", "hf auth login"),
        (refused(errors.RevisionNotFoundError, 404), "has no revision 'v9'", "a tag or a commit"),
        (refused(errors.HfHubHTTPError, 401), r"refuses access \(401\)", "allowed to write"),
        (refused(errors.HfHubHTTPError, 503), "cannot be reached", "with a network"),
        (errors.LocalEntryNotFoundError("not in the cache"), "not in the cache", "with a network"),
        (errors.HFValidationError("bad"), "is no name of a model", "owner/name"),
        (errors.LocalTokenNotFoundError("none"), "asks who you are", "hf auth login"),
        (ConnectionError("no route"), r"cannot be reached \(no route\)", "path of a model folder"),
    ],
)
def test_errors_of_the_hub_say_the_mend(elsewhere: Path, monkeypatch, error, words, mend):
    def raising(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising)
    with pytest.raises(UserError, match=words) as caught:
        Model.from_pretrained("me/birds", revision="v9")
    assert mend in caught.value.mend


def test_without_a_network_nothing_is_asked(elsewhere: Path):
    """For real: what is not in the cache is named, and no connection is tried."""
    with pytest.raises(UserError, match="cannot be reached"):
        Model.from_pretrained("me/birds", local_files_only=True, cache_dir=elsewhere / "cache")
