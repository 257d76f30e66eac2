"""A given classifier taken apart: the average of its maps and its bias are its own outputs."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from weakseg.errors import UserError
from weakseg.networks.backbone import make_backbone
from weakseg.networks.checkpoint import Checkpoint, read_checkpoint
from weakseg.networks.classifier import classifier_neck, take_apart
from weakseg.networks.heads import ProjectedHead
from weakseg.networks.spec import BackboneSpec, Projection

K = 5


def spec_of(name: str, **more) -> BackboneSpec:
    return BackboneSpec(name=name, pretrained=False, output_stride=32, norm="frozen", **more)


def classifier(name: str, outputs: int = K) -> nn.Module:
    """With statistics, biases and weights that no layer has by chance."""
    torch.manual_seed(1)
    if name.startswith("torchvision/"):
        model = torchvision.models.get_model(name.partition("/")[2], num_classes=outputs)
    else:
        model = timm.create_model(name, num_classes=outputs)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.8, 1.2)
            nn.init.uniform_(m.bias, -0.2, 0.2)
            nn.init.uniform_(m.running_mean, -0.1, 0.1)
            nn.init.uniform_(m.running_var, 0.8, 1.2)
        elif isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.uniform_(m.bias, -1, 1)
    return model.eval()


def test_a_head_says_its_mapping():
    """Two heads of the same weights compute different maps, so a cache must tell them apart."""
    values = {"outputs": 4, "channels": 8, "neck": (), "loss": "softmax"}
    heads = [
        ProjectedHead(Projection(**values, classes=classes), nn.Identity())
        for classes in ([[0], [1]], [[3], [2]])
    ]
    assert repr(heads[0]) != repr(heads[1])


def projected(checkpoint: Checkpoint, spec: BackboneSpec, **settings):
    parts = take_apart(checkpoint, spec)
    count, channels = parts.weight.shape
    values = {"classes": [[i] for i in range(count)], "loss": "sigmoid", **settings}
    projection = Projection(outputs=count, channels=channels, neck=parts.neck_names, **values)
    backbone = make_backbone(spec).eval()
    head = ProjectedHead(projection, classifier_neck(spec, projection.neck)).eval()
    parts.load_into(backbone, head)
    return backbone, head


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv2_100",
        "densenet121",
        "test_resnet",
        "test_efficientnet",
        "torchvision/resnet18",
        "torchvision/densenet121",
        "torchvision/mobilenet_v2",
    ],
)
def test_pooled_maps_and_bias_are_the_classifiers_own_outputs(name: str):
    whole, spec = classifier(name), spec_of(name)
    backbone, head = projected(Checkpoint(Path("x"), whole.state_dict()), spec)
    image = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        wanted = whole(image)
        maps, logits = head(backbone(image)[-1])
    assert maps.shape == (2, K, 2, 3)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(maps.mean((2, 3)) + head.bias, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(maps.mean((2, 3)), wanted, atol=1e-3)  # the bias is no part of maps


def test_several_outputs_of_a_class_combine_by_the_maximum_and_the_sum():
    whole, spec = classifier("test_resnet"), spec_of("test_resnet")
    checkpoint = Checkpoint(Path("x"), whole.state_dict())
    groups = [[3], [0, 4]]
    backbone, plain = projected(checkpoint, spec)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features, p = backbone(image)[-1], whole(image).softmax(1)
        every = plain(features)[0]
        _, soft = projected(checkpoint, spec, classes=groups, loss="softmax")
        maps, logits = soft(features)
        _, multi = projected(checkpoint, spec, classes=groups, loss="sigmoid")
        _, strongest = multi(features)
        outputs = whole(image)
    torch.testing.assert_close(maps[:, 0], every[:, 3])
    torch.testing.assert_close(maps[:, 1], torch.maximum(every[:, 0], every[:, 4]))
    torch.testing.assert_close(logits.sigmoid(), torch.stack([p[:, 3], p[:, 0] + p[:, 4]], 1))
    torch.testing.assert_close(
        strongest, torch.stack([outputs[:, 3], outputs[:, [0, 4]].amax(1)], 1)
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_convnext", "normalises after the pooling"),
        ("torchvision/mobilenet_v3_small", r"classifier.0 between its maps"),
        ("mobilenetv3_small_050", "conv_head between its maps"),
        ("test_vit", "transformer"),
        ("resnet38", "without a classifier"),
        ("torchvision/squeezenet1_1", "one linear layer"),
        ("no_such_net", "unknown backbone"),
        ("torchvision/resnet19", r"torchvision/resnet18"),
    ],
)
def test_other_forms_are_refused_with_the_reason(name: str, reason: str):
    known = name not in ("resnet38", "no_such_net", "torchvision/resnet19")
    state = classifier(name).state_dict() if known else {"fc.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError, match=reason):
        take_apart(Checkpoint(Path("x"), state), spec_of(name))


def same_as(checkpoint: Checkpoint, whole: nn.Module) -> bool:
    parts = take_apart(checkpoint, spec_of("test_resnet"))
    layer = whole.get_submodule("fc")
    layer = layer[-1] if isinstance(layer, nn.Sequential) else layer
    return torch.equal(parts.weight, layer.weight) and torch.equal(parts.bias, layer.bias)


@pytest.mark.parametrize(
    "how", ["plain", "nested", "parallel", "lightning", "script", "sequential"]
)
def test_state_dicts_as_people_save_them(how: str, tmp_path: Path):
    whole, file = classifier("test_resnet"), tmp_path / "weights.pth"
    if how == "sequential":
        whole.fc = nn.Sequential(nn.Dropout(0.5), whole.fc)
    state = whole.state_dict()
    values = {
        "plain": state,
        "sequential": state,
        "nested": {"model": state, "epoch": 3},
        "parallel": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        "lightning": {"state_dict": {f"net.body.{k}": v for k, v in state.items()}, "loops": {}},
        "script": {"state_dict": state, "arch": "test_resnet", "args": argparse.Namespace(lr=1.0)},
    }[how]
    torch.save(values, file)
    checkpoint = read_checkpoint(file)
    assert checkpoint.architecture == ("test_resnet" if how == "script" else None)
    assert same_as(checkpoint, whole)


def test_the_scripts_of_torchvision_name_their_network(tmp_path: Path):
    file = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(model="resnet18")}, file)
    assert read_checkpoint(file).architecture == "torchvision/resnet18"


def test_a_model_folder_says_what_it_is(tmp_path: Path):
    whole = classifier("test_resnet", 2)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 2,
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
            "label_names": ["n1", "n2"],
            "label_descriptions": {"n1": "cat, pussy", "n2": "dog"},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.architecture == "test_resnet"
    assert checkpoint.mean == (0.5, 0.5, 0.5)
    assert checkpoint.labels == (("n1", "cat, pussy"), ("n2", "dog"))
    assert same_as(checkpoint, whole)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="no config.json of a timm model"):
        read_checkpoint(tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.pt"
    for value in (Evil(), classifier("test_resnet")):
        torch.save(value, file)
        with pytest.raises(UserError, match="run any code|cannot be read") as error:
            read_checkpoint(file)
        assert "state_dict" in error.value.mend
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nonsense", b"\x80\x04]\x94."])
def test_files_of_something_else_are_refused(content: bytes, tmp_path: Path):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read|no state dict|more than tensors"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no model folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no file"):
        read_checkpoint(tmp_path / "none.pth")


def test_weights_of_another_network_are_refused():
    state = classifier("test_resnet").state_dict()
    with pytest.raises(UserError, match=r"not those of resnet18.*\n.*backbone.name"):
        take_apart(Checkpoint(Path("x"), state), spec_of("resnet18"))
    lacking = {k: v for k, v in state.items() if not k.startswith("layer4")}
    with pytest.raises(UserError, match="tensors are missing, such as layer4"):
        take_apart(Checkpoint(Path("x"), lacking), spec_of("test_resnet"))
    more = {**state, "layer5.weight": torch.ones(3)}
    with pytest.raises(UserError, match="no place in it, such as layer5"):
        take_apart(Checkpoint(Path("x"), more), spec_of("test_resnet"))
    two = {**state, "fc.0.weight": torch.ones(4, 96), "fc.2.weight": torch.ones(2, 4)}
    two = {k: v for k, v in two.items() if k not in ("fc.weight", "fc.bias")}
    with pytest.raises(UserError, match=r"no single linear layer 'fc'.*fc.0.weight"):
        take_apart(Checkpoint(Path("x"), two), spec_of("test_resnet"))
    nan = {**state, "fc.bias": torch.full((K,), torch.nan)}
    with pytest.raises(UserError, match="no numbers"):
        take_apart(Checkpoint(Path("x"), nan), spec_of("test_resnet"))


def test_torchvision_networks_are_backbones_with_stated_strides(tmp_path: Path):
    name = "torchvision/mnasnet0_5"
    whole = classifier(name)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    spec = BackboneSpec(name=name, weights=tmp_path / "w.pth", output_stride=16)
    backbone = make_backbone(spec)
    assert [level.stride for level in backbone.levels] == [2, 4, 8, 16, 16]
    own = whole.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in backbone.network.state_dict().items())
    torch.save({"layers.0.weight": own["layers.0.weight"]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="tensors are missing"):
        make_backbone(spec)
