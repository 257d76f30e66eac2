"""CAM's claim: the classifier on pooled features keeps the places of its evidence."""

import pytest
import torch
from torch import Tensor

from weakseg.methods import Batch, build
from weakseg.methods.cam import CAM
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.heads import CAMHead
from weakseg.networks.spec import BackboneSpec

SIDE, SQUARE = 48, 16


def test_pooling_the_maps_equals_classifying_the_pooled_features():
    head = CAMHead(16, 5)
    features = torch.randn(3, 16, 7, 9)
    pooled = features.mean((2, 3)) @ head.classifier.weight[:, :, 0, 0].T
    torch.testing.assert_close(head(features).mean((2, 3)), pooled)
    assert head.classifier.bias is None


def test_a_hidden_layer_is_a_projection_and_a_relu():
    head, features = CAMHead(16, 5, hidden=8), torch.randn(2, 16, 4, 6)
    hidden = torch.einsum("hc,bcyx->bhyx", head.hidden.weight[:, :, 0, 0], features)
    assert (hidden < 0).any()
    maps = torch.einsum("kh,bhyx->bkyx", head.classifier.weight[:, :, 0, 0], hidden.clamp(min=0))
    torch.testing.assert_close(head(features), maps)


def test_logits_are_the_average_of_the_maps(tiny_spec: BackboneSpec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 4).eval()
    with torch.inference_mode():
        maps = model(torch.randn(2, 3, 64, 80))
    assert maps.kind == "logit"
    assert maps.background is None
    assert maps.scores.shape == (2, 4, 4, 5)
    torch.testing.assert_close(maps.logits, maps.scores.mean((2, 3)))


def test_the_loss_is_the_formula_of_the_docstring(tiny_spec: BackboneSpec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 3).eval()
    batch = Batch(torch.randn(2, 3, 64, 64), torch.tensor([[1.0, 0, 1], [0, 0, 0]]), ["a", "b"])
    with torch.inference_mode():
        p, y = model(batch.images).logits, batch.tags
        wanted = -(y * p.sigmoid().log() + (1 - y) * (-p).sigmoid().log()).sum() / 6
        torch.testing.assert_close(model.losses(batch, 0.0), {"cls": wanted})


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a red or green square: images, tags, and the (y, x) corners of the squares."""
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    kinds = torch.randint(0, 2, (count,), generator=generator)
    corners = torch.randint(0, SIDE - SQUARE, (count, 2), generator=generator)
    for image, kind, (y, x) in zip(images, kinds.tolist(), corners.tolist(), strict=True):
        image[kind, y : y + SQUARE, x : x + SQUARE] += 2.0
    return images, torch.nn.functional.one_hot(kinds, 2).float(), corners


@pytest.fixture(scope="module")
def trained() -> CAM:
    torch.manual_seed(0)
    spec = BackboneSpec(name="test_resnet", pretrained=False, output_stride=8)
    model = build({"name": "cam"}, backbone_factory(spec), 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(40):
        images, tags, _ = squares(8, generator)
        loss = model.losses(Batch(images, tags, [""] * 8), step / 40)["cls"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert isinstance(model, CAM)
    return model.eval()


def test_the_maximum_lies_on_the_object(trained: CAM):
    images, tags, corners = squares(64, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        maps = trained(images)
    right = (maps.logits.argmax(1) == tags.argmax(1)).float().mean()
    assert right > 0.95
    own = maps.scores[torch.arange(64), tags.argmax(1)]
    cell = SIDE // own.shape[-1]
    best = own.flatten(1).argmax(1)
    centre = torch.stack([best // own.shape[-1], best % own.shape[-1]], 1) * cell + cell / 2
    inside = ((centre > corners - cell / 2) & (centre < corners + SQUARE + cell / 2)).all(1)
    chance = (SQUARE + cell) ** 2 / SIDE**2  # 0.25
    assert inside.float().mean() > 0.9 > 3 * chance
