"""DeepLabV3+ at any size, and in batches of one."""

import pytest
import torch
from torch import nn

from weakseg.errors import UserError
from weakseg.networks.backbone import make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec


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
