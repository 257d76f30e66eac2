"""Groups of parameters and schedules, against their closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weakseg.networks.backbone import make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.training.config import TrainConfig
from weakseg.training.optim import learning_rate, make_optimiser


class Net(nn.Module):
    """A backbone, pretrained or not, and a head with a bias."""

    def __init__(self, from_scratch: bool, norm: str = "trained") -> None:
        super().__init__()
        self.backbone = make_backbone(
            BackboneSpec(name="test_resnet", pretrained=False, norm=norm)  # type: ignore[arg-type]
        )
        self.backbone.from_scratch = from_scratch
        self.head = nn.Conv2d(96, 2, 1)


def groups(net: Net, config: TrainConfig, parameters=None) -> dict[str, tuple[float, float, float]]:
    """(factor, lr, decay) of each parameter by name."""
    optimiser = make_optimiser(net, parameters or net.parameters(), config)
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, tuple[float, float, float]] = {}
    for group in optimiser.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found, "a parameter in two groups"
            found[names[id(p)]] = (group["factor"], group["lr"], group["weight_decay"])
    return found


def test_new_layers_learn_faster_beside_pretrained_ones():
    net = Net(from_scratch=False)
    found = groups(net, TrainConfig(lr=0.02, weight_decay=0.3, head_lr=5))
    assert set(found) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        factor = 5 if name.startswith("head") else 1
        decay = 0.3 if p.ndim > 1 else 0
        assert found[name] == (factor, pytest.approx(0.02 * factor), decay), name


def test_from_scratch_everything_learns_alike():
    found = groups(Net(from_scratch=True), TrainConfig(head_lr=5))
    assert {factor for factor, _, _ in found.values()} == {1.0}


def test_frozen_and_foreign_parameters_stay_outside():
    net = Net(from_scratch=False, norm="frozen")
    found = groups(net, TrainConfig())
    assert set(found) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert not any(".bn" in name for name in found)
    assert set(groups(net, TrainConfig(), net.head.parameters())) == {"head.weight", "head.bias"}


def test_which_optimiser():
    net = Net(from_scratch=True)
    sgd = make_optimiser(net, net.parameters(), TrainConfig(momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.7 for group in sgd.param_groups)
    adamw = make_optimiser(net, net.parameters(), TrainConfig(optimiser="adamw"))
    assert isinstance(adamw, torch.optim.AdamW)


def test_decay_pulls_weights_but_not_biases():
    net = Net(from_scratch=True)
    with torch.no_grad():
        net.head.bias.fill_(1.0)
    before = net.head.weight.detach().clone()
    optimiser = make_optimiser(net, net.parameters(), TrainConfig(lr=0.1, weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    torch.testing.assert_close(net.head.weight, before * (1 - 0.1 * 0.5))
    assert torch.equal(net.head.bias, torch.ones(2))


@settings(max_examples=50)
@given(
    step=st.integers(0, 99),
    lr=st.floats(1e-5, 1),
    power=st.floats(0.1, 3),
)
def test_poly(step: int, lr: float, power: float):
    config = TrainConfig(lr=lr, schedule="poly", power=power)
    assert learning_rate(config, step / 100) == pytest.approx(lr * (1 - step / 100) ** power)


@pytest.mark.parametrize(("progress", "share"), [(0, 1), (0.25, 0.8535534), (0.5, 0.5), (1, 0)])
def test_cosine(progress: float, share: float):
    config = TrainConfig(lr=2.0, schedule="cosine")
    assert learning_rate(config, progress) == pytest.approx(2 * share, abs=1e-6)


@pytest.mark.parametrize("progress", [0, 0.3, 1])
def test_constant(progress: float):
    assert learning_rate(TrainConfig(lr=0.3, schedule="constant"), progress) == 0.3


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_warmup_rises_linearly_and_meets_the_schedule(schedule):
    config = TrainConfig(lr=1.0, schedule=schedule, warmup=0.2)
    rising = [learning_rate(config, p) for p in (0.05, 0.1, 0.15)]
    assert rising == pytest.approx([0.25, 0.5, 0.75])
    assert 0 < learning_rate(config, 0.0) < 0.01
    assert learning_rate(config, 0.2) == pytest.approx(1.0)
    without = TrainConfig(lr=1.0, schedule=schedule)
    assert learning_rate(config, 0.6) == pytest.approx(learning_rate(without, 0.5))


@settings(max_examples=50)
@given(
    warmup=st.one_of(st.just(0.0), st.floats(1e-5, 0.99)),
    progress=st.floats(0, 1),
    schedule=st.sampled_from(["poly", "cosine", "constant"]),
)
def test_the_rate_never_exceeds_lr(warmup: float, progress: float, schedule):
    config = TrainConfig(lr=1.0, schedule=schedule, warmup=warmup)
    found = learning_rate(config, progress)
    assert 0 <= found <= 1 + 1e-12
    assert not math.isnan(found)
