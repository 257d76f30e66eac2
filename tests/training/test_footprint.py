"""What networks need of memory, against sizes that are counted by hand."""

import pytest
import torch
from torch import nn

from weakseg import memory
from weakseg.errors import UserError
from weakseg.methods import build
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.training import footprint
from weakseg.training.config import TrainConfig
from weakseg.training.footprint import (
    inference_bytes,
    require_step_fits,
    training_bytes,
    within_memory,
)

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Sets how much memory the machine has."""

    def has(size: float) -> None:
        monkeypatch.setattr(footprint, "machine_memory", lambda: int(size))

    return has


class Two(nn.Module):
    """A convolution from 3 to 8 channels, a ReLU, and one of stride 2 to 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(8, 4, 2, stride=2)
        self.dropout = nn.Dropout()

    def forward(self, x):
        return [self.dropout(self.second(self.relu(self.first(x))))]


def test_bytes_of_a_pixel_are_those_of_the_layers():
    network = Two().train()
    # kept for the backward pass: the image, and the ReLU's result, which two layers share
    assert training_bytes(network) == 4 * (3 + 8)
    assert inference_bytes(network) == 4 * (8 + 8)  # the ReLU, of the first one's result
    assert network.training


def test_measuring_leaves_a_network_as_it_is(tiny_spec):
    backbone = make_backbone(tiny_spec)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    assert training_bytes(backbone) > inference_bytes(backbone) / 2 > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_a_frozen_backbone_keeps_nothing():
    frozen = BackboneSpec(name="test_resnet", pretrained=False, train="none")
    assert training_bytes(make_backbone(frozen)) == 12


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"batch": 16, "crop": 224}, True),
        ({"batch": 65_536, "crop": 224}, False),
        ({"batch": 65_536, "crop": 224, "accumulate": 65_536}, True),
        ({"batch": 1, "crop": 65_536}, False),
    ],
)
def test_a_step_that_cannot_be_done_is_refused(machine, tiny_spec, settings, fits):
    machine(24 * GIB)
    config = TrainConfig(**settings)
    if fits:
        require_step_fits(make_backbone(tiny_spec), config, "train")
        return
    with pytest.raises(UserError, match="24 GiB") as caught:
        require_step_fits(make_backbone(tiny_spec), config, "segmenter.train")
    assert caught.value.where == "segmenter.train.batch"


def test_the_limit_is_where_the_measure_says(machine, tiny_spec):
    backbone = make_backbone(tiny_spec)
    config = TrainConfig(batch=8, crop=128)
    needed = 8 * 128**2 * training_bytes(backbone)
    machine(needed + 1)
    require_step_fits(backbone, config, "train")
    machine(needed - 1)
    with pytest.raises(UserError):
        require_step_fits(backbone, config, "train")


def test_a_network_stops_before_it_takes_more_memory_than_there_is(machine, tiny_spec):
    factory = backbone_factory(tiny_spec)
    weights = sum(p.numel() for p in build({"name": "cam"}, factory, 3).parameters())
    machine(2 * 4 * 3 * weights)  # timm's classifier is made too, and then left out
    with within_memory("method", "x", 3):
        build({"name": "cam"}, factory, 3)
    machine(4 * 3 * weights - 1)
    with pytest.raises(UserError) as caught, within_memory("method", "x", 3):
        build({"name": "cam"}, factory, 3)
    assert caught.value.where == "method"
    build({"name": "cam"}, factory, 3)  # nothing is counted any more


def test_the_memory_of_a_container_counts(monkeypatch, tmp_path):
    own = memory.machine_memory()
    assert own is not None and own > 2**26
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("12345678\n")
    for names, expected in ((["max"], None), (["max", "limit"], 12345678), (["none"], None)):
        monkeypatch.setattr(memory, "_CGROUP_LIMITS", [tmp_path / name for name in names])
        found = memory.machine_memory()
        assert found == expected if expected else found >= own
