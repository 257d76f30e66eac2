"""Where cells look: the computed places against the gradients of the networks themselves."""

import pytest
import torch
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from weakseg.networks.backbone import Backbone, make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells


def backbone(name, stride, **options):
    norm = "frozen" if name == "resnet38" else "auto"
    spec = BackboneSpec(
        name=name, pretrained=False, output_stride=stride, norm=norm, options=options
    )
    return make_backbone(spec).eval()


def averaging(network):
    """Convolutions that average, norms that do nothing: what a cell sees is symmetric around it."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MaxPool2dSame):
                setattr(module, name, AvgPool2dSame(child.kernel_size, child.stride))
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
                if isinstance(child, nn.LayerNorm) or type(child) is nn.BatchNorm2d:
                    setattr(module, name, nn.Identity())
                else:  # timm's, which hold the activation
                    child.running_mean.zero_(), child.running_var.fill_(1)
                    child.weight.data.fill_(1), child.bias.data.zero_()
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                child.weight.data.fill_(1 / child.weight[0].numel())
                if child.bias is not None:
                    child.bias.data.zero_()


def looked_at(network, level, size, cell):
    """(row, column) of the centre of mass of a cell's gradient."""
    images = (0.01 * torch.rand(1, 3, *size)).requires_grad_()  # small: below the bend of a ReLU6
    network(images)[level][0, :, cell[0], cell[1]].sum().backward()
    mass = images.grad.double().sum((0, 1))
    return tuple(
        float((mass.sum(1 - axis) * torch.arange(size[axis])).sum() / mass.sum()) for axis in (0, 1)
    )


@pytest.mark.parametrize(
    ("name", "stride", "options", "size"),
    [
        ("resnet18", 16, {}, (512, 512)),
        ("resnet50", 16, {}, (512, 480)),
        ("resnet38", 8, {"width": 0.125}, (384, 384)),
        ("tf_efficientnet_lite0", 16, {}, (512, 512)),
        ("tf_efficientnet_lite0", 16, {}, (513, 520)),
        ("tf_efficientnet_lite0", 32, {}, (544, 529)),
        ("convnext_atto", 32, {}, (512, 512)),
        ("torchvision/resnet18", 16, {}, (512, 512)),
    ],
)
def test_computed_places_are_those_of_the_gradients(name, stride, options, size):
    network = backbone(name, stride, **options)
    cells = network.cells(size)
    averaging(network.network)
    assert [c.stride for c in cells] == [(level.stride,) * 2 for level in network.levels]
    for i in (1, len(cells) - 1):
        cell = tuple(side // network.levels[i].stride // 2 for side in size)
        found = looked_at(network, i, size, cell)
        for axis in (0, 1):
            wanted = cells[i].offset[axis] + cells[i].stride[axis] * cell[axis]
            assert found[axis] == pytest.approx(wanted, abs=0.75)


@pytest.mark.parametrize("size", [(224, 224), (250, 100)])
def test_patches_lie_where_their_pixels_do(size):
    network = backbone("vit_tiny_patch16_224", 16)
    cells = network.cells(size)[-1]
    grid = network.network.grid(*size)
    assert cells.stride == pytest.approx((size[0] / grid[0], size[1] / grid[1]))
    embed = network.network.transformer.patch_embed
    images = torch.zeros(1, 3, *size, requires_grad=True)
    embed.proj.weight.data.fill_(1)
    network.network.embed(images, network.network.prefix())[0].reshape(1, -1, 192)[
        0, -grid[0] * grid[1] + grid[1] + 1
    ].sum().backward()  # the patch (1, 1)
    mass = images.grad[0, 0].double()
    for axis in (0, 1):
        places = torch.arange(size[axis])
        found = float((mass.sum(1 - axis) * places).sum() / mass.sum())
        assert found == pytest.approx(cells.offset[axis] + cells.stride[axis], abs=0.2)


@pytest.mark.parametrize("size", [(128, 128), (100, 123)])
def test_patches_of_a_convolutional_stem_lie_where_it_looks(size):
    network = backbone("vit_tiny_r_s16_p8_224", 8, patch_size=2, depth=1)
    cells = network.cells(size)[-1]
    timms = network.network.transformer
    timms.blocks = nn.Sequential(nn.Identity())
    stem = timms.patch_embed.backbone
    stem.conv = Conv2dSame(3, 64, 7, stride=2, bias=False)  # theirs standardises its weights
    stem.norm = nn.Identity()
    averaging(timms.patch_embed)
    for axis, found in enumerate(looked_at(network, 0, size, (6, 7))):
        wanted = cells.offset[axis] + cells.stride[axis] * (6, 7)[axis]
        assert found == pytest.approx(wanted, abs=0.3)
        even = cells.stride[axis] * ((6, 7)[axis] + 0.5) - 0.5
        assert found - even > 0.7


def test_asking_changes_nothing():
    network = backbone("tf_efficientnet_lite0", 16).train()
    images = torch.rand(1, 3, 65, 97)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.cells((65, 97))
    assert network.training and network.network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.eval()(images)[-1].shape[-2:] == (5, 7)


def test_tensorflow_padding_follows_the_size():
    network = backbone("tf_efficientnet_lite0", 16)
    assert network.cells((256, 257))[-1] == Cells((16.0, 16.0), (15.0, 0.0))
    assert network.cells((256 + 48, 257 + 16))[-1] == Cells((16.0, 16.0), (15.0, 0.0))


def test_a_mirrored_image_has_its_mirrored_map_at_the_same_places():
    """With true places a map and its mirrored image's agree; stretched evenly they lie apart."""
    from weakseg.inference import Normalise, evaluating, multi_scale
    from weakseg.methods.base import build

    torch.manual_seed(0)
    method = build({"name": "cam"}, lambda: _plain(), 1)
    averaging(method.backbone.network)
    method.head.classifier.weight.data.fill_(1)
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    images[..., 40:56, 64:80] = 255
    plain = Normalise((0.0,) * 3, (1.0,) * 3)
    apart = {}
    for how in ("cells", "stretch"):
        with evaluating(method) as model:
            one = multi_scale(model, images, plain, place=how).scores[0, 0]
            other = multi_scale(model, images.flip(-1), plain, place=how).scores[0, 0].flip(-1)
        columns = torch.arange(128.0)
        centre = [float((m.sum(0) * columns).sum() / m.sum()) for m in (one, other)]
        apart[how] = abs(centre[0] - centre[1])
    assert apart["cells"] < 2 < 5 < apart["stretch"]


def _plain() -> Backbone:
    return backbone("resnet18", 16)
