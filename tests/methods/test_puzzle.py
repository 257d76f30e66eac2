"""Puzzle-CAM's claim: tiles and wholes agree just when the network looks at nothing but places."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.methods import Batch, build
from weakseg.methods.puzzle import Puzzle, merge, tile
from weakseg.networks.backbone import Level, backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells

STRIDE, K = 4, 3


class Fake(nn.Module):
    """A backbone of one level: colours averaged over cells, and whatever ``context`` adds."""

    def __init__(self, context: str) -> None:
        super().__init__()
        self.context = context
        self.levels = (Level("C1", 3, STRIDE),)
        self.weight = nn.Parameter(torch.eye(3)[..., None, None])

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        return (Cells((STRIDE, STRIDE), (1.5, 1.5)),)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.context == "cropped":  # a convolution without padding
            return [F.avg_pool2d(F.conv2d(images, self.weight)[..., 5:, :], STRIDE)]
        cells = F.avg_pool2d(F.conv2d(images, self.weight), STRIDE)
        if self.context == "whole image":
            cells = cells - cells.mean((2, 3), keepdim=True)
        return [cells]


def puzzle(context: str = "place alone", **config: object) -> Puzzle:
    model = build({"name": "puzzle", **config}, lambda: Fake(context), K)  # type: ignore[arg-type,return-value]
    assert isinstance(model, Puzzle)
    return model


def batch_of(count: int = 2, side: int = 16) -> Batch:
    tags = torch.zeros(count, K)
    tags[:, 0] = tags[0, 2] = 1
    return Batch(torch.randn(count, 3, side, side), tags, [""] * count)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
@settings(deadline=None, max_examples=40)
def test_merging_inverts_tiling(rows: int, columns: int, batch: int, height: int, width: int):
    images = torch.randn(batch, 2, rows * height, columns * width)
    tiles = tile(images, (rows, columns))
    assert tiles.shape == (rows * columns * batch, 2, height, width)
    assert torch.equal(merge(tiles, (rows, columns)), images)


def test_tiles_are_ordered_by_place_then_image():
    images = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    tiles = tile(images, (2, 2))
    corners = tiles[:, 0, 0, 0].tolist()
    assert corners == [0, 16, 2, 18, 8, 24, 10, 26]
    assert torch.equal(tiles[2, 0], images[0, 0, :2, 2:])


def test_a_network_that_sees_places_alone_has_nothing_to_reconstruct():
    terms = puzzle().losses(batch_of(), 0.9)
    assert terms["re"] < 1e-6
    torch.testing.assert_close(terms["cls"], terms["p_cls"])


def test_a_network_that_sees_the_whole_image_has():
    assert puzzle("whole image", alpha=4).losses(batch_of(), 0.9)["re"] > 0.05


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_any_grid(grid: tuple[int, int]):
    terms = puzzle(grid=grid).losses(batch_of(side=48), 0.9)
    assert terms["re"] < 1e-6


@pytest.mark.parametrize("compare", ["mask", "select", "none"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_reconstruction_is_the_formula(compare: str, distance: str):
    model = puzzle("whole image", compare=compare, distance=distance, alpha=3.0)
    batch = batch_of()
    with torch.no_grad():
        whole = model(batch.images).scores
        quarters = [
            model(batch.images[..., y : y + 8, x : x + 8]).scores for y in (0, 8) for x in (0, 8)
        ]
        parts = torch.cat([torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)], dim=2)
        total, tagged = 0.0, 0
        for b in range(2):
            for k in range(K):
                d = (whole[b, k] - parts[b, k]).abs() ** (1 if distance == "l1" else 2)
                counts = compare == "none" or bool(batch.tags[b, k])
                total += float(d.mean()) * counts
                tagged += int(batch.tags[b, k])
        wanted = 3.0 * total / (tagged if compare == "select" else 2 * K)
        found = model.losses(batch, 0.7)["re"]
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_gradients_flow_through_both_branches():
    model = puzzle("whole image", cls=1, p_cls=0)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, maps: Tensor) -> None:
        maps.retain_grad()
        outputs.append(maps)

    model.head.register_forward_hook(keep)
    model.losses(batch_of(), 0.9)["re"].backward()
    assert [len(maps) for maps in outputs] == [2, 8]
    assert all(maps.grad is not None and maps.grad.abs().sum() > 0 for maps in outputs)


def test_the_weight_grows_over_the_first_half():
    model, batch = puzzle("whole image"), batch_of()
    found = [float(model.losses(batch, p)["re"].detach()) for p in (0.0, 0.125, 0.25, 0.5, 0.99)]
    assert found[0] == 0
    assert [v / found[-1] for v in found] == pytest.approx([0, 0.25, 0.5, 1, 1])
    at_once = puzzle("whole image", ramp=0)
    at_once.load_state_dict(model.state_dict())
    assert float(at_once.losses(batch, 0.0)["re"].detach()) == pytest.approx(found[-1])


@pytest.mark.parametrize(("crop", "weight"), [(16, 0.5), (512, 4.0)])
def test_the_weight_suits_the_crop(crop: int, weight: float):
    model = puzzle()
    assert model._alpha(crop, 0.9) == weight
    assert puzzle(alpha=1.5)._alpha(crop, 0.9) == 1.5
    assert "re" in model.terms


@pytest.mark.parametrize(
    ("off", "terms"),
    [
        ({"p_cls": 0, "alpha": 0}, {"cls"}),
        ({"alpha": 0}, {"cls", "p_cls"}),
        ({"p_cls": 0}, {"cls", "re"}),
        ({}, {"cls", "p_cls", "re"}),
    ],
)
def test_each_loss_of_the_published_ablation_can_be_off(off: dict, terms: set[str]):
    model = puzzle(**off)
    assert set(model.terms) == set(model.losses(batch_of(), 0.9)) == terms


def test_without_other_losses_it_is_cam(tiny_spec: BackboneSpec):
    batch = Batch(torch.randn(2, 3, 72, 72), torch.ones(2, K), ["", ""])  # does not divide
    cam = build({"name": "cam"}, backbone_factory(tiny_spec), K).eval()
    plain = build({"name": "puzzle", "p_cls": 0, "alpha": 0}, backbone_factory(tiny_spec), K).eval()
    plain.load_state_dict(cam.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(plain.losses(batch, 0.5), cam.losses(batch, 0.5))


@pytest.mark.parametrize("name", ["test_resnet", "resnest14d", "mobilenetv3_small_050"])
def test_crops_that_do_not_divide_are_padded(name: str):
    spec = BackboneSpec(name=name, pretrained=False, output_stride=16)
    model = build({"name": "puzzle", "grid": (2, 3)}, backbone_factory(spec), K).eval()
    assert isinstance(model, Puzzle)
    batch = batch_of(2, 72)
    padded = model._padded(batch.images)
    assert padded.shape == (2, 3, 96, 96)
    assert torch.equal(padded[..., :72, :72], batch.images)
    assert padded[..., 72:, :].abs().max() == padded[..., 72:].abs().max() == 0
    with torch.inference_mode():
        terms = model.losses(batch, 0.9)
        by_hand = model.losses(Batch(padded, batch.tags, batch.ids), 0.9)
    torch.testing.assert_close(terms, by_hand)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "tf_mobilenetv3_small_minimal_100", "torchvision/resnet18"]
)
def test_cells_of_tiles_lie_where_those_of_the_whole_image_do(name: str):
    """So that maps of tiles, laid side by side, can be compared with the image's cell by cell."""
    backbone = build(
        {"name": "cam"},
        backbone_factory(BackboneSpec(name=name, pretrained=False, output_stride=16)),
        K,
    ).backbone
    for side in (96, 160, 480):  # as padded, for 2 and for 3 tiles
        for tiles in (2, 3):
            if side % (16 * tiles):
                continue
            whole, part = (backbone.cells((n, n))[-1] for n in (side, side // tiles))
            assert part == whole
            assert part.stride == (16, 16)  # so tiles begin where cells begin


def test_a_backbone_that_does_not_divide_images_is_refused_with_the_size():
    with pytest.raises(UserError, match=r"does not divide images evenly") as caught:
        puzzle("cropped").losses(batch_of(side=32), 0.9)
    assert "multiple of" in caught.value.mend and "4 pixels" in caught.value.mend


def test_something_must_classify():
    with pytest.raises(UserError, match="nothing learns the classes"):
        puzzle(cls=0, p_cls=0)
