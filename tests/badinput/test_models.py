"""Model folders and score files that lie: each is named, and nothing is executed."""

from __future__ import annotations

import io
import json
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.test_model import saved
from weakseg.data import scorefile
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.export.model import initialise, load
from weakseg.methods import build
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import load_recipe
from weakseg.stages.project import with_classifier
from weakseg.training import footprint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_spec: BackboneSpec) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved(folder, "method", tiny_spec)
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((sound / name).read_bytes())
    return folder


def refused(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        load(folder)
    text = str(error.value)
    assert error.value.mend
    assert any(named in text for named in (str(folder), "backbone.name", "unknown method"))


CONFIGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "task_unknown": (("task",), "detector"),
    "task_list": (("task",), ["method"]),
    "classes_number": (("classes",), 5),
    "classes_of_numbers": (("classes",), [1, 2, 3]),
    "classes_empty": (("classes",), []),
    "classes_missing_one": (("classes",), ["cat", "dog"]),
    "classes_text": (("classes",), "abc"),
    "backbone_text": (("backbone",), "resnet"),
    "backbone_unknown": (("backbone", "name"), "resnet9000"),
    "backbone_path": (("backbone", "name"), "../../etc/passwd"),
    "method_missing": (("method",), None),
    "method_text": (("method",), 3),
    "method_unknown": (("method", "name"), "camm"),
    "mean_of_two": (("preprocessing", "mean"), [0.1, 0.2]),
    "mean_text": (("preprocessing", "mean"), ["a", "b", "c"]),
    "std_zero": (("preprocessing", "std"), [0, 1, 1]),
    "preprocessing_list": (("preprocessing",), []),
    "scales_empty": (("inference", "scales"), []),
    "scales_negative": (("inference", "scales"), [-1]),
    "scales_tiny": (("inference", "scales"), [1e-9]),
    "scales_huge": (("inference", "scales"), [1.0, 1e9]),
    "scales_many": (("inference", "scales"), [1.0] * 1000),
    "max_side_huge": (("inference", "max_side"), 10**9),
    "tile_huge": (("inference", "tile"), 10**9),
    "hidden_huge": (("method", "hidden"), 10**9),
    "scales_text": (("inference", "scales"), "many"),
    "max_side_text": (("inference", "max_side"), "big"),
    "max_side_negative": (("inference", "max_side"), -5),
    "flip_text": (("inference", "flip"), "perhaps"),
    "crf_unknown": (("inference", "crf"), "hard"),
    "head_unknown": (("inference", "head"), "tail"),
    "threshold_text": (("inference", "threshold"), "high"),
    "inference_missing_keys": (("inference",), {}),
    "details_list": (("details",), [1]),
    "format_of_tomorrow": (("format",), 99),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config(name: str, model: Path) -> None:
    path, value = CONFIGS[name]
    config = json.loads((model / "config.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (model / "config.json").write_text(json.dumps(config))
    refused(model)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', bytes(99)]
)
def test_config_that_is_none(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    refused(model)


def _header(change: Callable[[dict], Any], grow: int = 0) -> Callable[[bytes], bytes]:
    def lie(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text) + grow) + text + content[8 + length :]

    return lie


def _first(header: dict) -> dict:
    return header[next(key for key in header if key != "__metadata__")]


WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "cut": lambda c: c[: len(c) // 2],
    "cut_header": lambda c: c[:20],
    "header_length_of_exabytes": lambda c: struct.pack("<Q", 2**63) + c[8:],
    "header_length_zero": lambda c: struct.pack("<Q", 0) + c[8:],
    "header_longer_than_it_is": _header(lambda h: None, grow=5),
    "header_of_a_list": _header(lambda h: [1, 2]),
    "header_of_garbage": lambda c: c[:8] + b"\xff" * 50 + c[58:],
    "offsets_beyond_the_end": _header(lambda h: _first(h).update(data_offsets=[0, 10**12])),
    "offsets_negative": _header(lambda h: _first(h).update(data_offsets=[-8, 8])),
    "offsets_crossed": _header(lambda h: _first(h).update(data_offsets=[8, 0])),
    "shape_that_does_not_fit": _header(lambda h: _first(h).update(shape=[7, 7, 7, 7])),
    "shape_huge": _header(lambda h: _first(h).update(shape=[2**40, 2**40])),
    "dtype_unknown": _header(lambda h: _first(h).update(dtype="F3")),
    "pickle": lambda c: pickle.dumps({"a": 1}),
    "zip": lambda c: b"PK\x03\x04" + c,
}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weights(name: str, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(WEIGHTS[name](file.read_bytes()))
    refused(model)


@pytest.mark.parametrize("kind", ["missing", "more", "shape"])
def test_tensors(kind: str, model: Path) -> None:
    file = model / "model.safetensors"
    state = load_file(file)
    name = next(key for key in state if state[key].ndim == 4)
    if kind == "missing":
        del state[name]
    elif kind == "more":
        state["another.weight"] = state[name].clone()
    else:
        state[name] = state[name][:1].clone()
    save_file(state, file)
    refused(model)


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A pickle that a model may ask for; opening it, or the network, is noted in ``opened``."""
    trap, opened = tmp_path / "trap.pth", tmp_path / "opened"
    torch.save({"a": torch.zeros(1)}, trap)
    real = torch.load

    def load_file(file: Any, *args: Any, **settings: Any) -> Any:
        opened.touch()
        return real(file, *args, **settings)

    def connect(*_: Any, **__: Any) -> Any:
        opened.touch()
        raise OSError("no network in tests")

    monkeypatch.setattr(torch, "load", load_file)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    return trap


def changed(model: Path, **backbone: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    config["backbone"] |= backbone
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["fetched", "given"])
def test_a_model_loads_its_own_tensors_alone(
    kind: str, model: Path, sound: Path, traps: Path
) -> None:
    """Whatever weights its configuration asks for; its answers stay those of the sound one."""
    if kind == "fetched":
        changed(model, pretrained=True, name="test_resnet.r160_in1k")
    else:
        changed(model, weights=str(traps))
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    assert torch.equal(load(model).probabilities(images), load(sound).probabilities(images))
    assert not (traps.parent / "opened").exists()


OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "checkpoint": lambda file: {"checkpoint_path": file},
    "configuration": lambda file: {"pretrained_cfg": {"file": file}, "pretrained": True},
    "overlay": lambda file: {"pretrained_cfg_overlay": {"file": file}},
    "hub": lambda file: {"pretrained_cfg": {"hf_hub_id": "owner/name"}},
    "address": lambda file: {"pretrained_cfg": {"url": "https://example.com/x.pth"}},
    "weights": lambda file: {"weights": "DEFAULT"},
    "cache": lambda file: {"cache_dir": file},
    "hidden": lambda file: {"block_args": [{"x": file}]},
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_of_a_model_open_nothing(name: str, model: Path, traps: Path) -> None:
    changed(model, options=OPTIONS[name](str(traps)))
    refused(model)
    assert not (traps.parent / "opened").exists()


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "local-dir:/tmp", "torchvision/../x"])
def test_the_name_of_a_models_backbone_opens_nothing(name: str, model: Path, traps: Path) -> None:
    changed(model, name=name)
    refused(model)
    assert not (traps.parent / "opened").exists()


def test_a_network_larger_than_the_machine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers fit no file, and nobody need find that out by filling the memory."""
    monkeypatch.setattr(footprint, "machine_memory", lambda: 10**8)
    config = json.loads((model / "config.json").read_text())
    config["method"]["hidden"] = 16_384
    (model / "config.json").write_text(json.dumps(config))
    refused(model)
    config["backbone"]["options"] = {"channels": [64, 128, 256, 60_000]}
    del config["method"]["hidden"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of memory") as error:
        load(model)
    assert error.value.where == str(model / "config.json")


@pytest.mark.parametrize(
    "said",
    [
        {"architecture": "test_resnet", "model_args": {"checkpoint_path": "TRAP"}},
        {"architecture": "test_resnet", "model_args": {"pretrained_cfg": {"file": "TRAP"}}},
        {"architecture": "hf-hub:owner/name"},
        {"architecture": "local-dir:TRAP"},
    ],
)
def test_what_a_given_classifier_says_of_itself_opens_nothing(said: dict, traps: Path) -> None:
    folder = traps.parent / "classifier"
    folder.mkdir()
    text = json.dumps(said).replace("TRAP", str(traps))
    (folder / "config.json").write_text(text)
    save_file({"fc.weight": torch.zeros(3, 4)}, folder / "model.safetensors")
    recipe = load_recipe({"method": {"name": "cam", "from_classifier": str(folder)}})
    with pytest.raises(UserError) as error:
        with_classifier(recipe)
    assert error.value.where == str(folder / "model.safetensors")
    assert not (traps.parent / "opened").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, model: Path) -> None:
    """One number among hundreds of thousands makes every prediction background."""
    file = model / "model.safetensors"
    state = {key: v.to(dtype) if v.is_floating_point() else v for key, v in load_file(file).items()}
    key = max(state, key=lambda k: state[k].numel())
    state[key].view(-1)[-1] = value
    save_file(state, file)
    refused(model)
    with pytest.raises(UserError) as error:
        initialise(build({"name": "cam"}, backbone_factory(tiny()), 3), model)
    assert error.value.where == str(file)
    assert key in error.value.what


def tiny() -> BackboneSpec:
    return BackboneSpec(name="test_resnet", pretrained=False)


# --- score files ----------------------------------------------------------------------------


def npz(**arrays: Any) -> bytes:
    """A sound score file of two classes, with other or fewer (None) arrays."""
    values: dict[str, Any] = {
        "classes": np.array([1, 3], np.int16),
        "scores": np.zeros((2, 5, 6), np.uint8),
        "stride": np.int16(4),
        "size": np.array([20, 24], np.int32),
    }
    values |= arrays
    file = io.BytesIO()
    np.savez_compressed(file, **{k: v for k, v in values.items() if v is not None})
    return file.getvalue()


def member(name: str, header: bytes, data: bytes = b"") -> bytes:
    """A score file in which one array is written by hand."""
    file = io.BytesIO(npz(**{name: None}))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        head = header.ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data
        archive.writestr(f"{name}.npy", content)
    return file.getvalue()


SCORES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a zip",
    "cut": lambda: npz()[:200],
    "no_scores": lambda: npz(scores=None),
    "no_classes": lambda: npz(classes=None),
    "no_size": lambda: npz(size=None),
    "no_stride": lambda: npz(stride=None),
    "more_maps_than_classes": lambda: npz(scores=np.zeros((3, 5, 6), np.uint8)),
    "flat_scores": lambda: npz(scores=np.zeros(60, np.uint8)),
    "empty_maps": lambda: npz(scores=np.zeros((2, 0, 6), np.uint8)),
    "scores_of_text": lambda: npz(scores=np.full((2, 5, 6), "a")),
    "scores_of_objects": lambda: npz(scores=np.full((2, 5, 6), None)),
    "scores_not_finite": lambda: npz(scores=np.full((2, 5, 6), np.nan, np.float16)),
    "scores_beyond_one": lambda: npz(scores=np.full((2, 5, 6), 7, np.float16)),
    "scores_complex": lambda: npz(scores=np.zeros((2, 5, 6), np.complex64)),
    "classes_negative": lambda: npz(classes=np.array([-1, 3], np.int16)),
    "classes_beyond_masks": lambda: npz(classes=np.array([1, 300], np.int16)),
    "classes_twice": lambda: npz(classes=np.array([3, 3], np.int16)),
    "classes_not_whole": lambda: npz(classes=np.array([1.5, 3.0])),
    "size_zero": lambda: npz(size=np.array([0, 24], np.int32)),
    "size_of_three": lambda: npz(size=np.array([1, 2, 3], np.int32)),
    "size_huge": lambda: npz(size=np.array([2**31 - 1, 2**31 - 1], np.int32)),
    "stride_zero": lambda: npz(stride=np.int16(0)),
    "probabilities_not_finite": lambda: npz(probabilities=np.full(3, np.inf, np.float16)),
    "probabilities_of_text": lambda: npz(probabilities=np.array(["a"])),
    "huge_shape": lambda: member(
        "scores", b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1000000, 1000000), }"
    ),
    "header_of_code": lambda: member("scores", b"__import__('os').system('touch owned')"),
    "header_of_negative_shape": lambda: member(
        "scores", b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 5, 6), }"
    ),
}


@pytest.mark.parametrize("name", sorted(SCORES))
def test_score_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    file.write_bytes(SCORES[name]())
    with pytest.raises(UserError) as error:
        read_scores(file)
    assert str(file) in str(error.value) and "seeds" in (error.value.mend or "")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.npz"
    file.write_bytes(npz(scores=np.zeros((2, 500, 600), np.uint8)))
    assert file.stat().st_size < 10_000
    read_scores(file)
    monkeypatch.setattr(scorefile, "_BYTES", 500_000)
    with pytest.raises(UserError, match="unpacks to 60"):
        read_scores(file)


def test_the_sound_file_of_these_tests_is_sound(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    file.write_bytes(npz())
    assert read_scores(file).size == (20, 24)
    none = ScoreFile(np.zeros(0, np.int16), np.zeros((0, 5, 6), np.float32), 4, (20, 24))
    write_scores(file, none)
    assert read_scores(file).scores.shape == (0, 5, 6)
