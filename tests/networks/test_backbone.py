"""The backbone contract: stated strides, dilation, levels, weights and normalisation."""

from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from weakseg.errors import UserError
from weakseg.networks import backbone as module
from weakseg.networks.backbone import Backbone, backbone_factory, make_backbone
from weakseg.networks.spec import BackboneSpec

NETS = ["test_resnet", "test_efficientnet", "test_nfnet"]


def build(name: str = "test_resnet", **settings) -> Backbone:
    return make_backbone(BackboneSpec(name=name, **{"pretrained": False} | settings))


def convolutions(network: nn.Module) -> list[tuple]:
    return [
        (m.stride, m.dilation, m.kernel_size)
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    ]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("dilate", [False, True])
def test_levels_are_what_forward_returns(name: str, stride: int, dilate: bool):
    backbone = build(name, output_stride=stride, dilate=dilate).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 64, 96))
    assert [level.name for level in backbone.levels] == [f"C{i + 1}" for i in range(len(maps))]
    assert backbone.levels[-1].stride == stride
    for level, found in zip(backbone.levels, maps, strict=True):
        assert found.shape == (2, level.channels, 64 // level.stride, 96 // level.stride)
    strides = [level.stride for level in backbone.levels]
    assert strides == sorted(strides)


@pytest.mark.parametrize("name", NETS)
def test_stride_is_removed_with_or_without_dilation(name: str):
    """timm's ``output_stride`` dilates; the papers' networks do not. Same weights, other maps."""
    plain = build(name, output_stride=8).eval()
    dilated = build(name, output_stride=8, dilate=True).eval()
    whole = build(name, output_stride=32).eval()
    dilated.load_state_dict(plain.state_dict())
    whole.load_state_dict(plain.state_dict())
    assert all(d == (1, 1) for _, d, _ in convolutions(plain))
    assert any(d != (1, 1) for _, d, _ in convolutions(dilated))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = plain(images), dilated(images), whole(images)
    for a, b, c in list(zip(*maps, strict=True))[:3]:  # finer levels are untouched
        assert torch.equal(a, c)
        assert torch.equal(a, b)
    assert maps[0][-1].shape == maps[1][-1].shape
    assert not torch.allclose(maps[0][-1], maps[1][-1], atol=1e-6)


def test_the_dilated_network_is_timms_own():
    ours = build(dilate=True, output_stride=8).eval()
    timms = timm.create_model("test_resnet", features_only=True, output_stride=8).eval()
    timms.load_state_dict(ours.network.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(ours(images)[1:], timms(images)[1:], strict=True):
            assert torch.equal(a, b)


def test_without_dilation_only_strides_differ_from_timms_network():
    ours = build(output_stride=16)
    timms = timm.create_model("test_resnet", features_only=True)
    changed = [
        (a, b)
        for a, b in zip(convolutions(ours.network), convolutions(timms), strict=True)
        if a != b
    ]
    assert changed
    for mine, theirs in changed:
        assert (mine[0], theirs[0]) == ((1, 1), (2, 2))
        assert mine[1:] == theirs[1:]
    assert {k: v.shape for k, v in ours.network.state_dict().items()} == {
        k: v.shape for k, v in timms.state_dict().items()
    }


@pytest.mark.parametrize("name", ["test_resnet", "resnet10t"])
def test_c1_of_a_resnet_lies_behind_the_max_pool(name: str):
    backbone = build(name, output_stride=32).eval()
    assert [level.stride for level in backbone.levels] == [4, 4, 8, 16, 32]
    timms = timm.create_model(name, features_only=True).eval()
    timms.load_state_dict(backbone.network.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = backbone(images), timms(images)
    pool = dict(backbone.network.named_children())["maxpool"]
    assert torch.equal(ours[0], pool(theirs[0]))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


def test_frozen_norm_never_moves():
    backbone = build(norm="frozen").train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert norms
    for _ in range(2):
        assert backbone.training
        assert not any(norm.training for norm in norms)
        backbone(torch.rand(2, 3, 32, 32))[-1].sum().backward()
        backbone.eval().train()
    assert all(p.grad is None for norm in norms for p in norm.parameters())
    after = backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    weights = [p for p in backbone.parameters() if p.ndim > 1]
    assert all(p.grad is not None for p in weights)


def test_trained_norm_moves():
    backbone = build(norm="trained").train()
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    backbone(torch.rand(2, 3, 32, 32))[-1].sum().backward()
    assert not torch.equal(before, norm.running_mean)
    assert norm.weight.grad is not None


def test_what_auto_means_for_norm(tmp_path: Path):
    assert not BackboneSpec(pretrained=False).norm_is_frozen
    assert BackboneSpec().norm_is_frozen
    assert BackboneSpec(weights=tmp_path / "w.pth").norm_is_frozen
    assert BackboneSpec(pretrained=False, norm="frozen").norm_is_frozen
    assert not BackboneSpec(norm="trained").norm_is_frozen
    assert not BackboneSpec(norm="affine").norm_is_frozen


def test_affine_norm_learns_but_keeps_its_statistics():
    backbone = build(norm="affine").train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 32, 32))[-1].sum().backward()
    assert backbone.training
    assert norms
    assert all(p.grad is not None for norm in norms for p in norm.parameters())
    after = backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of whole timm networks, as a user would have them on disk."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_resnet", "test_convnext", "test_efficientnet"):
        network = timm.create_model(name, pretrained=False, num_classes=7)
        for p in network.parameters():
            nn.init.normal_(p, std=0.05)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    state = load_file(folder / "test_resnet.safetensors")
    torch.save(state, folder / "test_resnet.pth")
    save_file({k: v for k, v in state.items() if "layer4" not in k}, folder / "part.safetensors")
    (folder / "noise.safetensors").write_bytes(b"\x07" * 200)
    return folder


@pytest.mark.parametrize(
    "file", ["test_resnet.safetensors", "test_resnet.pth", "test_convnext.safetensors"]
)
def test_a_file_of_weights_is_loaded_exactly(files: Path, file: str):
    name = file.split(".")[0]
    backbone = build(name, pretrained=False, weights=files / file, output_stride=32)
    given = load_file(files / f"{name}.safetensors")
    flat = {key.replace(".", "_"): tensor for key, tensor in given.items()}
    own = backbone.network.state_dict()
    assert len(own) > 20
    for key, tensor in own.items():
        assert torch.equal(tensor, flat[key.replace(".", "_")]), key
    assert not backbone.from_scratch


@pytest.mark.parametrize(
    "file", ["test_efficientnet.safetensors", "part.safetensors", "noise.safetensors"]
)
def test_a_file_of_another_network_is_refused(files: Path, file: str):
    with pytest.raises(UserError, match="the weights do not fit test_resnet") as caught:
        build("test_resnet", weights=files / file)
    assert caught.value.where == str(files / file)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer3.0.conv1.weight", float("nan")),
        ("layer1.0.bn1.bias", float("-inf")),
        ("layer2.0.bn1.running_var", -1.0),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    files: Path, tmp_path: Path, suffix: str, key: str, value: float
):
    state = load_file(files / "test_resnet.safetensors")
    state[key].view(-1)[3] = value
    file = tmp_path / f"w.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    with pytest.raises(UserError, match="damaged") as caught:
        build(weights=file)
    assert caught.value.where == str(file)
    assert key in caught.value.what


def test_a_network_whose_shapes_differ_is_refused(files: Path, tmp_path: Path):
    state = load_file(files / "test_resnet.safetensors")
    state["layer1.0.conv1.weight"] = torch.zeros(3, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="the weights do not fit test_resnet"):
        build("test_resnet", weights=tmp_path / "w.safetensors")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file '.*gone\.pth'") as caught:
        build(weights=tmp_path / "gone.pth")
    assert caught.value.where == "backbone.weights"


def test_without_network_the_message_names_the_way_out(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **settings: object):
        assert settings["pretrained"] is True
        raise OSError("Connection refused\nmore lines")

    monkeypatch.setattr(module.timm, "create_model", offline)
    with pytest.raises(UserError) as caught:
        build("resnet50.tv_in1k", pretrained=True)
    text = str(caught.value)
    assert "resnet50.tv_in1k cannot be fetched or do not exist: Connection refused" in text
    assert "more lines" not in text
    assert "`weights: path.safetensors`" in text
    assert "`pretrained: false`" in text


def test_an_unknown_tag_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="weights of test_resnet.no_such_tag"):
        build("test_resnet.no_such_tag", pretrained=True)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown backbone 'resnet5O'") as caught:
        build("resnet5O")
    assert caught.value.mend is not None
    assert "did you mean 'resnet50'" in caught.value.mend


def test_an_output_stride_that_cannot_be_had_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="whose stride cannot be removed") as caught:
        build("test_convnext", output_stride=16)
    assert caught.value.mend is not None
    assert "dilate: true" in caught.value.mend
    assert build("test_convnext", output_stride=16, dilate=True).levels[-1].stride == 16


def test_a_coarser_stride_than_the_network_has_is_refused():
    with pytest.raises(UserError, match="output_stride 32 was asked for, but .* gives 8"):
        build("test_resnet", output_stride=32, options={"output_stride": 8})


def test_wrong_options_are_a_mistake_of_the_user():
    with pytest.raises(UserError, match="test_resnet cannot be built"):
        build("test_resnet", options={"no_such_option": 1})


OPENS = {
    "checkpoint": {"checkpoint_path": "x"},
    "configuration": {"pretrained_cfg": {"file": "x"}},
    "overlay": {"pretrained_cfg_overlay": {"hf_hub_id": "owner/name"}},
    "deep": {"act_layer": {"a": [{"url": "x"}]}},
    "fetched": {"pretrained": True},
    "torchvision": {"weights": "DEFAULT"},
    "torchvision's backbone": {"weights_backbone": "DEFAULT"},
    "a cache": {"cache_dir": "x"},
    "a path": {"norm_layer": "/tmp/x"},
    "a file": {"act_layer": ["relu", "x.pth"]},
    "home": {"act_layer": "~x"},
    "an address": {"act_layer": "hf-hub:x"},
    "ours": {"num_classes": 4},
}


@pytest.mark.parametrize("name", OPENS)
def test_options_open_no_file_and_fetch_nothing(name: str):
    with pytest.raises(ValidationError, match=r"options") as caught:
        BackboneSpec(pretrained=False, options=OPENS[name])
    (error,) = caught.value.errors()
    assert error["loc"] == ("options",)


def test_options_that_only_sound_so_are_taken():
    options = {"drop_path_rate": 0.1, "pretrained_window_size": 3, "act_layer": "relu"}
    assert BackboneSpec(options=options).options == options


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "local-dir:x", "../x", "a/b", "", "a b.c"])
def test_a_name_is_no_address(name: str):
    with pytest.raises(ValidationError):
        BackboneSpec(name=name)


def test_normalisation_travels_with_the_network():
    efficient = timm.get_pretrained_cfg("test_efficientnet")
    backbone = build("test_efficientnet")
    assert (backbone.mean, backbone.std) == (efficient.mean, efficient.std)
    own = build(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_factory_builds_fresh_networks(tiny_spec: BackboneSpec):
    make = backbone_factory(tiny_spec)
    first, second = make(), make()
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared
    assert first.from_scratch
