"""Branches that predict affinity, on any backbone."""

import numpy as np
import pytest
import torch
from torch import nn

from weakseg.networks.affinity import AffinityNetwork
from weakseg.networks.backbone import Level, make_backbone
from weakseg.ops import Cells

KINDS = {"irn": (1, 4), "psa": (448, 8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (50, 37)])
@pytest.mark.parametrize("place", ["crop", "cells"])
def test_the_map_covers_the_image_at_the_branch_stride(tiny_spec, kind, size, place):
    channels, stride = KINDS[kind]
    network = AffinityNetwork(make_backbone(tiny_spec), kind, False, place)
    out = network(torch.randn(2, 3, *size))
    assert out.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_the_backbone_only_where_it_is_trained(tiny_spec, kind, trained):
    network = AffinityNetwork(make_backbone(tiny_spec), kind, trained)
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    reached = {
        name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None
    }
    assert reached == ({"backbone", "branch"} if trained else {"branch"})


@pytest.mark.parametrize("trained", [False, True])
def test_a_fixed_backbone_keeps_its_statistics(tiny_spec, trained):
    network = AffinityNetwork(make_backbone(tiny_spec), "irn", trained).train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items() if "running" in k}
    assert before
    network(torch.randn(4, 3, 32, 32) + 3)
    after = network.backbone.state_dict()
    moved = any(not torch.equal(v, after[k]) for k, v in before.items())
    assert moved is trained


@pytest.mark.parametrize("kind", KINDS)
def test_training_the_backbone_thaws_nothing_that_it_keeps_fixed(tiny_spec, kind):
    backbone = make_backbone(tiny_spec.model_copy(update={"norm": "frozen"}))
    fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert fixed
    AffinityNetwork(backbone, kind, train_backbone=True)
    assert {name for name, p in backbone.named_parameters() if not p.requires_grad} == fixed


def enlarged(maps, factor):
    """(B, C, h, w) float64 -> (B, C, factor h, factor w), bilinear with half-pixel centres."""
    for axis in (2, 3):
        count = maps.shape[axis]
        at = ((np.arange(count * factor) + 0.5) / factor - 0.5).clip(0, count - 1)
        low = np.floor(at).astype(int).clip(max=max(count - 2, 0))
        share = (at - low).reshape(-1, *[1] * (3 - axis))
        high = np.minimum(low + 1, count - 1)
        maps = np.take(maps, low, axis) * (1 - share) + np.take(maps, high, axis) * share
    return maps


def weights(layer):
    """(out, in) float64 of a 1 x 1 convolution."""
    return layer.weight.detach().double().numpy()[:, :, 0, 0]


def published_edges(network, images):
    """IRNet's boundary logits (methods.md 11.1) in float64, from the backbone's levels."""
    with torch.no_grad():
        levels = [f.double().numpy() for f in network.backbone(images)]
    rows, columns = (-(-side // 4) for side in images.shape[-2:])
    joined = []
    for level, (convolution, norm) in zip(levels, network.branch.reduce, strict=True):
        x = np.einsum("oc,bchw->bohw", weights(convolution), level)
        groups = x.reshape(len(x), 4, -1)
        groups = groups - groups.mean(2, keepdims=True)
        groups = groups / np.sqrt((groups**2).mean(2, keepdims=True) + 1e-5)
        scale, shift = (p.detach().double().numpy()[:, None, None] for p in norm.parameters())
        x = groups.reshape(x.shape) * scale + shift
        factor = -(-rows // x.shape[2])  # 1, 1, 2, 4, 4
        joined.append(np.maximum(enlarged(x, factor)[:, :, :rows, :columns], 0))
    joined = np.concatenate(joined, 1)
    bias = network.branch.join.bias.detach().double().numpy()[:, None, None]
    return np.einsum("oc,bchw->bohw", weights(network.branch.join), joined) + bias


@pytest.mark.parametrize("size", [(64, 96), (120, 100), (97, 131), (66, 81)])
def test_edges_are_those_of_the_published_network_at_any_size(tiny_spec, size):
    network = AffinityNetwork(make_backbone(tiny_spec), "irn", False)
    for norm in (m for m in network.branch.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1)
        nn.init.normal_(norm.bias)
    images = torch.randn(2, 3, *size)
    found = network(images).detach()
    np.testing.assert_allclose(found.numpy(), published_edges(network, images), atol=1e-4)


class Given(nn.Module):
    """In the place of a backbone: levels whose cells hold the pixel that they look at.

    Two levels of stride 4 and 16 (or 8 and 16), their first cells at ``offsets``.
    """

    def __init__(self, strides, offsets):
        super().__init__()
        self.levels = [Level(f"C{i}", 2, stride) for i, stride in enumerate(strides, 1)]
        self.offsets = offsets

    def cells(self, size):
        return tuple(
            Cells((level.stride, level.stride), (offset, offset))
            for level, offset in zip(self.levels, self.offsets, strict=True)
        )

    def forward(self, images):
        height, width = images.shape[-2:]
        levels = []
        for level, offset in zip(self.levels, self.offsets, strict=True):
            y = offset + level.stride * torch.arange(-(-height // level.stride)).float()
            x = offset + level.stride * torch.arange(-(-width // level.stride)).float()
            levels.append(torch.stack(torch.meshgrid(y, x, indexing="ij"))[None])
        return levels


@pytest.mark.parametrize("size", [(120, 100), (97, 131)])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (3.0, 15.0)])
def test_levels_lie_where_their_cells_look(size, offsets):
    """Each level, brought to the grid, says at each cell the pixel in that cell's middle."""
    network = AffinityNetwork(Given((4, 16), offsets), "irn", False, "cells")
    grid = [-(-side // 4) for side in size]
    middles = [(torch.arange(n) + 0.5) * side / n - 0.5 for n, side in zip(grid, size, strict=True)]
    image = torch.zeros(1, 3, *size)
    for level, bring in zip(network.backbone(image), network._to_grid(size), strict=True):
        found = bring(level)[0]
        for axis, middle in enumerate(middles):
            known = (middle >= level[0, axis].min()) & (middle <= level[0, axis].max())
            assert known.sum() >= len(middle) - 5
            line = found[axis].select(1 - axis, 0)
            torch.testing.assert_close(line[known], middle.float()[known], atol=1e-3, rtol=0)


def test_the_published_placing_displaces_coarse_levels_by_six_pixels_at_every_size():
    """What its docstring says: (16 - 4) / 2, for a level at stride 16, far from the borders."""
    network = AffinityNetwork(Given((4, 16), (0.0, 0.0)), "irn", False)
    for size in ((128, 128), (120, 100), (97, 131)):
        levels = network.backbone(torch.zeros(1, 3, *size))
        fine, coarse = (
            bring(level)[0] for level, bring in zip(levels, network._to_grid(size), strict=True)
        )
        shift = (fine - coarse)[:, 4:-6, 4:-6]
        torch.testing.assert_close(shift, torch.full_like(shift, 6.0))


def test_a_row_that_is_missing_behind_the_enlargement_is_repeated():
    """A backbone that leaves an incomplete last cell out (24 cells of 97 pixels)."""
    network = AffinityNetwork(Given((4, 16), (0.0, 0.0)), "irn", False)
    fine, coarse = network._to_grid((97, 97))
    maps = torch.rand(1, 2, 24, 24)
    assert torch.equal(fine(maps)[..., :24, :24], maps)
    assert torch.equal(fine(maps)[..., 24, :24], maps[..., 23, :])
    assert coarse(torch.rand(1, 2, 6, 6)).shape[-2:] == (25, 25)


def test_the_feature_branch_starts_as_published():
    """methods.md 10, parity.md: He's deviation for each level, gain 4 in the joining layer."""
    channels = (64, 128, 512)  # of a ResNet-38 of an eighth of its width
    backbone = Given((8, 8, 8), (0.0, 0.0, 0.0))
    backbone.levels = [Level(f"C{i}", c, 8) for i, c in enumerate(channels)]
    branch = AffinityNetwork(backbone, "psa", True).branch
    found = [float(m.weight.detach().std()) for m in (*branch.reduce, branch.join)]
    assert found == pytest.approx([0.177, 0.125, 0.0625, 0.189], rel=0.04)
    assert float(branch.join.weight.detach().abs().max()) < 4 * (6 / 896) ** 0.5
