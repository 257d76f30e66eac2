"""DeepLabV3+ at any size, and in batches of one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Level, make_backbone
from weakseg.networks.decoder import DeepLabDecoder, DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells


def build(stride: int = 16, **settings) -> DeepLabV3Plus:
    spec = BackboneSpec(name="test_resnet", pretrained=False, output_stride=stride, **settings)
    return DeepLabV3Plus(make_backbone(spec), 3, channels=8, dilations=(1, 2, 3))


@pytest.fixture(scope="module")
def net() -> DeepLabV3Plus:
    return build().eval()


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (33, 80), (16, 16), (17, 1)])
@pytest.mark.parametrize("stride", [8, 16])
def test_logits_have_the_size_of_the_image(net, stride: int, size: tuple[int, int]):
    network = net if stride == 16 else build(8).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, 3, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("dilate", [False, True])
def test_dilations_follow_the_output_stride(stride: int, dilate: bool):
    pyramid = [
        m.dilation[0]
        for m in build(stride, dilate=dilate).decoder.modules()
        if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)
    ]
    assert pyramid == ([2, 3] if stride == 16 else [2, 4, 6])


def test_logits_move_with_the_image(net):
    images = torch.zeros(1, 3, 96, 96)
    images[..., 32:48, 32:48] = 3.0
    with torch.no_grad():
        still, moved = net(images), net(images.roll(16, -1))
    assert (still - moved).abs().max() > 1e-4
    inner = (slice(None), slice(None), slice(16, 64), slice(16, 64))
    before, after = (still - moved)[inner], (still.roll(16, -1) - moved)[inner]
    assert after.abs().mean() < 0.6 * before.abs().mean()


def test_it_reads_the_deepest_level_and_the_deepest_of_the_fine_ones(net):
    images = torch.rand(1, 3, 32, 32)
    assert [level.stride for level in net.backbone.levels] == [4, 4, 8, 16, 16]
    with torch.no_grad():
        levels = net.backbone(images)
        for i, read in enumerate((False, True, False, False, True)):
            spoiled = [x * torch.nan if i == j else x for j, x in enumerate(levels)]
            assert bool(net.decode(images, spoiled).isnan().any()) == read


def test_padding_is_cut_off_below_and_right(net):
    """An image that needs no padding gives the same as itself padded by hand."""
    images = torch.rand(1, 3, 50, 60)
    padded = nn.functional.pad(images, (0, 4, 0, 14))
    with torch.no_grad():
        assert torch.equal(net(images), net(padded)[..., :50, :60])


def test_a_batch_is_as_its_images_alone(net):
    images = torch.rand(3, 3, 48, 40)
    with torch.no_grad():
        singles = torch.cat([net(image[None]) for image in images])
        torch.testing.assert_close(net(images), singles, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["trained", "frozen"])
def test_a_batch_of_one_trains(norm: str):
    """Global pooling leaves one value per channel, of which BatchNorm cannot take the spread."""
    network = build(norm=norm).train()
    network(torch.rand(1, 3, 64, 64)).square().mean().backward()
    grads = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_larger_batches_use_their_own_statistics():
    network = build().train()
    pooled = next(m for m in network.decoder.modules() if type(m).__name__ == "_PooledNorm")
    x = torch.randn(4, 8, 1, 1)
    plain = nn.BatchNorm2d(8).train()
    assert torch.equal(pooled(x), plain(x))
    assert torch.equal(pooled.running_mean, plain.running_mean)
    before = pooled.running_mean.clone()
    expected = plain.eval()(x[:1])
    torch.testing.assert_close(pooled(x[:1]), expected)
    assert torch.equal(pooled.running_mean, before)
    torch.testing.assert_close(pooled.eval()(x), plain(x))


@pytest.mark.parametrize("stride", [4, 32])
def test_other_strides_are_refused(stride: int):
    with pytest.raises(UserError, match="needs levels of stride 4 and of 8 or 16") as caught:
        build(stride)
    assert caught.value.where == "segmenter.backbone"


# -- where cells lie, and the dense decoder

OFFSETS = (1.0, -2.0), (7.0, 15.0)  # (down, right) of the levels of stride 4 and 16


def only_levels(offsets=OFFSETS, channels=(256, 2048)) -> SimpleNamespace:
    """What a decoder reads of a backbone: of ResNet-50, levels at strides 4 and 16."""
    cells = tuple(Cells((s, s), offset) for s, offset in zip((4, 16), offsets, strict=True))
    levels = tuple(Level("C", c, s) for c, s in zip(channels, (4, 16), strict=True))
    return SimpleNamespace(levels=levels, cells=lambda size: cells)


class First(nn.Module):
    """The first channel."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps[:, :1]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_pyramid_and_the_logits_are_enlarged_by_where_the_cells_look(axis: int):
    """The deep level holds the pixel at its cells' centres, and nothing else does anything."""
    network = DeepLabDecoder(only_levels(), 1, 8)  # type: ignore[arg-type]
    network.decoder.aspp = network.decoder.block1 = nn.Identity()
    network.decoder.block2 = network.classifier = First()
    pixels = OFFSETS[1][axis] + 16 * torch.arange(6.0)
    deep = (pixels[:, None] if axis == 0 else pixels).expand(1, 1, 6, 6)
    images = torch.zeros(1, 3, 96, 96)
    logits = network.decode(images, [torch.zeros(1, 1, 24, 24), deep])
    of_cells = OFFSETS[0][axis] + 4 * torch.arange(24.0)
    line = logits[0, 0, :, 3] if axis == 0 else logits[0, 0, 3]
    torch.testing.assert_close(line, of_cells.clamp(pixels[0], pixels[-1]))
    found = network.enlarged(logits, images, images[..., :90, :93])
    assert found.shape == (1, 1, 90, 93)
    line = found[0, 0, :, 3] if axis == 0 else found[0, 0, 3]
    inner = slice(int(pixels[0]) + 4, int(pixels[-1]) - 4)
    torch.testing.assert_close(line[inner], torch.arange(96.0)[: len(line)][inner])


def test_the_dense_decoder_is_the_published_one():
    network = DeepLabDecoder(only_levels(), 21, dense=True).eval()  # type: ignore[arg-type]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.groups == 1 and m.bias is None for m in convolutions)
    weights = sum(m.weight.numel() for m in convolutions)
    pyramid = 2048 * 256 * (1 + 3 * 9 + 1) + 5 * 256 * 256
    assert weights == pyramid + 256 * 256 + 9 * (512 * 256 + 256 * 256 + 256 * 21)
    assert round(weights / 1e6, 1) == 17.4
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5, 0.1]
    assert [m.dilation[0] for m in convolutions if m.dilation != (1, 1)] == [6, 12, 18]
    separable = DeepLabDecoder(only_levels(), 21)  # type: ignore[arg-type]
    assert sum(m.numel() for m in separable.parameters()) < 3.3e6


def test_the_dense_decoder_enlarges_with_aligned_corners():
    network = DeepLabDecoder(only_levels(), 1, 8, dense=True)  # type: ignore[arg-type]
    network.decoder.aspp = network.decoder.block1 = nn.Identity()
    network.decoder.block2 = network.classifier = First()
    deep = torch.arange(6.0).expand(1, 1, 6, 6)
    logits = network.decode(torch.zeros(1, 3, 96, 96), [torch.zeros(1, 1, 24, 24), deep])
    torch.testing.assert_close(logits[0, 0, 3], torch.arange(24.0) * 5 / 23)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_dense_decoder_trains(batch: int):
    backbone = make_backbone(BackboneSpec(name="test_resnet", pretrained=False))
    network = DeepLabDecoder(backbone, 3, 8, (1, 2, 3), dense=True).train()
    images = torch.rand(batch, 3, 64, 48)
    logits = network.decode(images, backbone(images))
    assert logits.shape == (batch, 3, 16, 12)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
