"""Folding changes the speed and nothing else."""

import torch
from torch import nn

from weakseg.networks.backbone import make_backbone
from weakseg.networks.fold import folded


def _with_statistics(network: nn.Module) -> nn.Module:
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)
    return network


def test_a_backbone_keeps_its_outputs_and_loses_its_norms(tiny_spec):
    network = _with_statistics(make_backbone(tiny_spec)).train()
    images = torch.randn(2, 3, 64, 64)
    fast = folded(network, lambda m: m(images)[-1])
    assert network.training, "the original is left alone"
    assert _norms(fast) < _norms(network) / 3
    network.eval()
    for expected, found in zip(network(images), fast(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


class _Crossed(nn.Module):
    """The BatchNorm behind the convolution normalises something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.norm(x)


def test_where_the_order_of_children_misleads_nothing_is_folded():
    network = _with_statistics(_Crossed())
    images = torch.randn(1, 3, 8, 8)
    kept = folded(network, lambda m: m(images))
    assert isinstance(kept.norm, nn.BatchNorm2d)
    torch.testing.assert_close(kept(images), network.eval()(images))
