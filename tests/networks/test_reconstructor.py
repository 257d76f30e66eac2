"""The reconstructor: the same as enlarging everything first, at any size, in little memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.networks.backbone import Level
from weakseg.networks.reconstructor import Reconstructor, _doubled, _MaskedTaps
from weakseg.ops import Cells, place

LEVELS = (Level("C3", 8, 8), Level("C4", 12, 16), Level("C5", 16, 16))
SIZES = [(64, 64), (65, 47), (40, 90)]


def levels_of(height: int, width: int, batch: int = 2) -> list[Tensor]:
    return [
        torch.randn(batch, v.channels, -(-height // v.stride), -(-width // v.stride))
        for v in LEVELS
    ]


@pytest.mark.parametrize("cells", [None, Cells((8, 8), (0, 0)), Cells((4, 8), (-1.25, 7))])
@pytest.mark.parametrize("size", SIZES)
def test_masked_entry_is_the_convolution_of_enlarged_and_masked_features(
    size: tuple[int, int], cells: Cells | None
):
    network = Reconstructor(LEVELS, width=4, depth=3)
    features = network.features(levels_of(*size)).detach().requires_grad_()
    keep = torch.rand(2, 1, *size, requires_grad=True)
    found = network._masked_entry(features, keep, cells)
    enlarged = place(features, cells, size, size)
    wanted = network.entry(enlarged * keep)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    above = torch.randn_like(wanted)
    sources = (features, keep, network.entry.weight)
    pairs = zip(
        torch.autograd.grad(found, sources, above),
        torch.autograd.grad(wanted, sources, above),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_levels_meet_where_their_cells_lie():
    """Levels that hold the column at each cell's centre, and projections that pass one channel on."""
    network = Reconstructor(LEVELS, width=4, depth=3)
    cells = [Cells((8, 8), (0, 0)), Cells((16, 16), (0, 0)), Cells((16, 16), (15, 15))]
    counts = (8, 4, 4)
    levels = []
    for level, own, count, project in zip(LEVELS, cells, counts, network.projections, strict=True):
        columns = own.offset[1] + own.stride[1] * torch.arange(float(count))
        levels.append(columns.expand(1, level.channels, count, -1).contiguous())
        with torch.no_grad():
            project.weight.fill_(1 / level.channels)
    found = network.features(levels, cells).detach()[0, :, 4].split([4, 8, 16])
    columns = 8 * torch.arange(8.0)
    for part, nearest in zip(
        found, (columns, columns.clamp(max=48), columns.clamp(min=15)), strict=True
    ):
        torch.testing.assert_close(part, nearest.expand_as(part))
    evenly = network.features(levels)[:, 4:12]
    wanted = F.interpolate(levels[1][:, :1], (8, 8), mode="bilinear").expand(-1, 8, -1, -1)
    torch.testing.assert_close(evenly, wanted)


def test_doubling_convolution_is_the_convolution_of_the_doubled():
    convolution = torch.nn.Conv2d(5, 3, 3, padding=1)
    x = torch.randn(2, 5, 7, 9)
    wanted = convolution(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(_doubled(x, convolution, (14, 18)), wanted, atol=1e-6, rtol=1e-5)
    odd = _doubled(x, convolution, (15, 18))
    torch.testing.assert_close(odd[..., :14, :], wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(odd[..., 14, :], odd[..., 13, :])


@pytest.mark.parametrize("size", SIZES)
def test_paints_images_of_any_size(size: tuple[int, int]):
    network = Reconstructor(LEVELS, width=4, depth=5)
    painted = network(network.features(levels_of(*size)), torch.ones(2, 1, *size))
    assert painted.shape == (2, 3, *size)
    assert painted.isfinite().all()


def test_hidden_features_do_not_matter():
    network = Reconstructor(LEVELS, width=4, depth=3).eval()
    features = network.features(levels_of(64, 64)).detach()
    keep = torch.ones(2, 1, 64, 64)
    keep[..., 24:48, 16:40] = 0
    other = features.clone()
    other[..., 4:5, 3:4] += 10  # a cell whose neighbours are hidden too
    with torch.inference_mode():
        assert torch.equal(network(features, keep), network(other, keep))
        assert not torch.allclose(network(features, keep * 0 + 1), network(other, keep * 0 + 1))


def test_from_nothing_one_colour_is_painted():
    """No convolution but the last has a bias."""
    network = Reconstructor(LEVELS, width=4, depth=3).eval()
    biases = [n for n, _ in network.named_parameters() if n.endswith("bias")]
    assert biases == ["paint.bias"]
    features = network.features(levels_of(64, 64)).detach()
    with torch.inference_mode():
        painted = network(features, torch.zeros(2, 1, 64, 64))
    torch.testing.assert_close(painted, network.paint.bias[:, None, None].expand_as(painted))


def test_widths_and_depth_of_the_paper():
    paper = Reconstructor((Level("a", 512, 8), Level("b", 1024, 8), Level("c", 4096, 8)), 64, 8)
    assert [p.weight.shape[0] for p in paper.projections] == [64, 128, 256]
    assert paper.entry.in_channels == 448
    assert [d.convolution.out_channels for d in paper.down] == [128, 256, *[512] * 5]
    assert [u.convolution.out_channels for u in paper.up] == [*[512] * 4, 256, 128, 64]
    assert paper.paint.in_channels == 128
    assert [d.dropout.p for d in paper.down] == [0, 0, *[0.5] * 5]
    assert [u.dropout.p for u in paper.up] == [*[0.5] * 4, 0, 0, 0]


def test_what_backward_needs_is_smaller_than_one_full_size_copy():
    network = Reconstructor(LEVELS, width=4, depth=3)
    features = network.features(levels_of(128, 128, 1)).detach().requires_grad_()
    kept: dict[int, int] = {}

    def keep_size(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep_size, lambda tensor: tensor):
        network._masked_entry(features, torch.rand(1, 1, 128, 128, requires_grad=True))
    full_size_copy = features.shape[1] * 128 * 128
    assert sum(kept.values()) < 0.2 * full_size_copy


def test_half_precision_stays_finite_and_close():
    network = Reconstructor(LEVELS, width=4, depth=3).eval()
    features, keep = network.features(levels_of(64, 64)).detach(), torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        wanted = network(features, keep)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(features, keep)
    assert (found.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean().clamp(min=1)


def test_backward_inside_autocast_is_not_rounded():
    taps, keep = torch.randn(2, 16, 4, 8, 8, requires_grad=True), torch.rand(2, 1, 64, 64)
    keep.requires_grad_()
    above = torch.randn(2, 4, 32, 32)
    cells = Cells.spanning((64, 64), (8, 8))
    painted = _MaskedTaps.apply(taps, keep, cells)
    wanted = torch.autograd.grad(painted, (taps, keep), above, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(painted, (taps, keep), above)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
