"""ONNX files answer like PyTorch, for any size, and say what they are; so do the CPU's runtimes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from weakseg.cli import app
from weakseg.errors import UserError
from weakseg.export import onnx as module
from weakseg.export import runtime
from weakseg.export.model import save
from weakseg.export.onnx import export_onnx
from weakseg.export.runtime import Graph, on_runtime
from weakseg.inference import Normalise, Predictor
from weakseg.methods import build
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.training.segmenter import Segmenter

CLASSES = ("cat", "big dog", "ä")
SIZES = ((64, 64), (33, 47), (120, 51))


def made(task: str, spec: BackboneSpec) -> tuple[Predictor, dict]:
    """A network whose statistics differ from a fresh one's, with sharp answers."""
    torch.manual_seed(2)
    network = {"task": task, "backbone": spec.model_dump(mode="json")}
    if task == "method":
        model = build({"name": "cam"}, backbone_factory(spec), 3)
        network["method"] = {"name": "cam"}
    else:
        model = Segmenter(DeepLabV3Plus(make_backbone(spec), 4, 8, (1, 2, 3)))
        network["decoder"] = {"channels": 8, "dilations": [1, 2, 3]}
    model.train()
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64))
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight *= 20
    settings = {"threshold": 0.4} if task == "method" else {}
    normalise = Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    flips = {"scales": (1.0, 0.5), "flip": True, "max_side": 48}
    return Predictor(model.eval(), CLASSES, normalise, **settings, **flips), network


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_spec: BackboneSpec):
    root = tmp_path_factory.mktemp("onnx")
    found = {}
    for task in ("method", "segmenter"):
        predictor, network = made(task, tiny_spec)
        save(root / task, predictor, network, {"steps": 7})
        if task == "method":
            app(
                ["export", str(root / task), "--to", "onnx", "--out", str(root / "method.onnx")],
                result_action="return_value",
            )
        else:
            export_onnx(root / task, root / "segmenter.onnx")
        found[task] = (replace(predictor, scales=(1.0,), flip=False), root / f"{task}.onnx")
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", ["method", "segmenter"])
@pytest.mark.parametrize("count", [1, 3])
def test_files_answer_like_pytorch(exported, task: str, size, count: int):
    predictor, file = exported[task]
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found, mask = session.run(["probabilities", "mask"], {"images": images.numpy()})
    wanted = predictor.probabilities(images).numpy()
    assert wanted.std() > 0.05  # there is something to be wrong about
    assert found.dtype == np.float32 and mask.dtype == np.uint8
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (mask != wanted.argmax(1)).mean() < 1e-3


def test_files_say_what_they_are(exported):
    for task, (_, file) in exported.items():
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        said = session.get_modelmeta().custom_metadata_map
        said = {k.removeprefix("weakseg."): json.loads(v) for k, v in said.items()}
        assert said["classes"] == ["background", *CLASSES]
        assert said["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
        assert said["format"] == 1
        assert said["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
        assert said["left out"]["scales"] == [1.0, 0.5] and said["left out"]["max_side"] == 48
        wanted = (
            {"rule": "constant", "value": 0.4}
            if task == "method"
            else {"rule": "map", "value": None}
        )
        assert said["threshold"] == wanted
        assert said["details"] == {"steps": 7}


def test_a_file_that_answers_otherwise_is_not_written(exported, tmp_path, monkeypatch):
    predictor, _ = exported["method"]
    other = tmp_path / "other.onnx"
    monkeypatch.setattr(module, "trace", lambda *_: _Copy(exported["segmenter"][1]))
    with pytest.raises(UserError, match="probabilities differ from PyTorch's by"):
        export_onnx(predictor, other)
    assert list(tmp_path.iterdir()) == []


class _Copy:
    """A traced program that is a file of another network."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.model = self
        self.metadata_props: dict = {}

    def save(self, target: str) -> None:
        Path(target).write_bytes(self.file.read_bytes())


def test_a_file_needs_its_packages_and_its_name(exported, tmp_path, monkeypatch):
    predictor, _ = exported["method"]
    with pytest.raises(UserError, match=r"is no \.onnx file"):
        export_onnx(predictor, tmp_path / "model.bin")
    with pytest.raises(UserError, match="this network takes any"):
        export_onnx(predictor, tmp_path / "model.onnx", size=(64, 64))
    hide(monkeypatch, "onnxruntime")
    with pytest.raises(UserError, match="onnxruntime") as caught:
        export_onnx(predictor, tmp_path / "model.onnx")
    assert caught.value.mend == "install them: pip install 'weakseg[onnx]'"
    with pytest.raises(UserError, match="not installed"):
        on_runtime(predictor, "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def hide(monkeypatch, name: str) -> None:
    real = module.import_module

    def importing(package: str):
        if package == name:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(package)

    monkeypatch.setattr(module, "import_module", importing)


def test_a_transformer_takes_whole_patches_and_no_runtime(tmp_path):
    spec = BackboneSpec(name="test_vit", pretrained=False)
    model = build({"name": "mctformer"}, backbone_factory(spec), 3).eval()
    predictor = Predictor(model, CLASSES, Normalise((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(UserError, match="no whole patches of 16"):
        export_onnx(predictor, tmp_path / "model.onnx", size=(64, 90))
    with pytest.raises(UserError, match="vision transformer") as caught:
        on_runtime(predictor, "openvino", tmp_path)
    assert caught.value.mend == "use --runtime torch"


# -- runtimes


@pytest.fixture(scope="module")
def cache(exported, tmp_path_factory) -> Path:
    """A folder of graphs with one in it: the segmenter's."""
    folder = tmp_path_factory.mktemp("graphs")
    on_runtime(exported["segmenter"][0], "onnx", folder)
    return folder


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_runtimes_answer_like_pytorch(exported, cache: Path, name: str):
    predictor = replace(exported["segmenter"][0], scales=(1.0, 0.5), flip=True, max_side=None)
    graph = on_runtime(predictor, name, cache)
    assert isinstance(graph.model, Graph)
    for size in SIZES:
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        found, wanted = graph.probabilities(images), predictor.probabilities(images)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert (graph.predict_batch(images) != predictor.predict_batch(images)).mean() < 1e-3
    large = np.random.default_rng(0).integers(0, 256, (150, 140, 3), dtype=np.uint8)
    tiled = [replace(p, tile=128).predict(large) for p in (graph, predictor)]
    assert (tiled[0] != tiled[1]).mean() < 1e-3


def test_a_graph_is_traced_once(exported, cache: Path, monkeypatch):
    predictor = exported["segmenter"][0]
    files = list(cache.iterdir())
    assert len(files) == 1

    def again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(runtime, "_trace", again)
    on_runtime(predictor, "onnx", cache)
    other = replace(predictor, model=copy.deepcopy(predictor.model))
    with torch.no_grad():
        other.model.network.classifier.bias += 1
    with pytest.raises(AssertionError):
        on_runtime(other, "onnx", cache)  # of the same network with other weights
    assert list(cache.iterdir()) == files


def test_torch_is_the_predictor_itself(exported):
    predictor = exported["method"][0]
    assert on_runtime(predictor, "torch") is predictor
    with pytest.raises(UserError, match="unknown runtime 'tensorrt'"):
        on_runtime(predictor, "tensorrt")


def test_a_graph_with_other_answers_is_refused(exported, cache, tmp_path, monkeypatch):
    def doubled(file: Path):
        run = onnx_session(file)
        return lambda images: [x**2 for x in run(images)]

    onnx_session, traced = runtime._onnx, next(cache.iterdir()).read_bytes()
    monkeypatch.setattr(runtime, "_onnx", doubled)
    monkeypatch.setattr(runtime, "_trace", lambda _, file: file.write_bytes(traced))
    with pytest.raises(UserError, match="probabilities differ from PyTorch's by"):
        on_runtime(exported["segmenter"][0], "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_with_tensorflows_padding_says_where_its_maps_lie(tmp_path):
    """Its cells move with the size of the image, so a file must be made for one."""
    spec = BackboneSpec(name="tf_efficientnet_lite0", pretrained=False, output_stride=32)
    predictor, _ = made("method", spec)
    predictor = replace(predictor, scales=(1.0,), flip=False)
    with pytest.raises(UserError) as caught:
        export_onnx(predictor, tmp_path / "m.onnx")
    assert caught.value.where == "size"
    assert predictor.model.backbone.cells((80, 97))[-1].offset == (15.0, 0.0)
