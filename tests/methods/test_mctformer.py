"""MCTformer's claims: what its tokens, maps and losses are, and that attention finds the class."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.errors import UserError
from weakseg.export.model import load, save
from weakseg.inference import Normalise, Predictor, multi_scale
from weakseg.methods import Batch, build, resolve
from weakseg.methods.mctformer import MCTformer, _contrast, _pooled, _root, _spread
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells
from weakseg.recipe import load_recipe

SPEC = BackboneSpec(name="test_vit", pretrained=False)
PLUS = {"layers": 6, "root": True, "decay": 0.996, "contrast": 1, "positions": "bicubic"}
SIDE, SQUARE = 48, 16


def new(spec: BackboneSpec = SPEC, classes: int = 3, **settings) -> MCTformer:
    model = build({"name": "mctformer", **settings}, backbone_factory(spec), classes)
    assert isinstance(model, MCTformer)
    return model


def batch_of(size: int = 2, side: int = 64) -> Batch:
    tags = torch.zeros(size, 3)
    tags[:, 0] = tags[0, 2] = 1
    return Batch(torch.randn(size, 3, side, side), tags, [""] * size)


# -- parts by hand


def test_the_average_and_the_rank_pooling_by_hand():
    cam = torch.tensor([[[[1.0, -2], [4, 0]]]])
    assert _pooled(cam, 1.0).item() == pytest.approx(3 / 4)
    wanted = (4 + 0.5 * 1 + 0.25 * 0 - 0.125 * 2) / (1 + 0.5 + 0.25 + 0.125)
    assert _pooled(cam, 0.5).item() == pytest.approx(wanted)
    torch.testing.assert_close(_pooled(cam, 1 - 1e-7), _pooled(cam, 1.0))


def test_the_contrast_by_hand():
    """Two blocks; in the first the tokens are orthogonal, in the second those of 0 and 1 agree."""
    e = torch.eye(3)
    tokens = torch.stack([2 * e, torch.stack([e[0], 3 * e[0], -e[1]])])[None]
    apart = -math.log(math.e / (math.e + 2))
    alike = -math.log(math.e / (2 * math.e + 1))
    found = _contrast(tokens, torch.tensor([[1.0, 0, 0]]))
    assert found.item() == pytest.approx((apart + alike) / 2)
    found = _contrast(tokens, torch.tensor([[1.0, 0, 1]]))
    assert found.item() == pytest.approx(((apart + alike) / 2 + apart) / 2)
    assert _contrast(tokens, torch.zeros(1, 3)).item() == 0
    # Images weigh alike, however many classes they show; those without any have no part.
    several = tokens.expand(3, -1, -1, -1)
    found = _contrast(several, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 0, 1]]))
    assert found.item() == pytest.approx((((apart + alike) / 2 + apart) / 2 + apart) / 2)
    assert _contrast(tokens[:, :, :1], torch.ones(1, 1)).item() == pytest.approx(0)


def test_the_root_is_exact_and_steep_nowhere():
    x = torch.tensor([0.0, 1e-12, 1e-3, 0.25, 9.0], requires_grad=True)
    y = _root(x)
    assert y[0] == 0
    torch.testing.assert_close(y.detach(), x.detach().sqrt(), atol=1e-6, rtol=1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.max() <= 512


def test_spreading_is_a_matrix_product():
    scores = torch.tensor([[[[1.0, 0], [0, 4]]]])
    affinity = torch.eye(4)[None].clone()
    assert torch.equal(_spread(scores, affinity), scores)
    affinity[0, 1] = torch.tensor([0.5, 0, 0, 0.5])  # cell 1 attends to cells 0 and 3
    assert _spread(scores, affinity).flatten().tolist() == [1, 2.5, 0, 4]


def test_rows_of_one_keep_a_constant_map_constant():
    affinity = torch.rand(2, 6, 6).softmax(2)
    torch.testing.assert_close(_spread(torch.ones(2, 4, 2, 3), affinity), torch.ones(2, 4, 2, 3))


# -- the whole


@pytest.mark.parametrize("settings", [{}, PLUS], ids=["V2", "+"])
def test_the_loss_is_the_formula_of_the_docstring(settings: dict):
    model, batch = new(**settings).eval(), batch_of()
    with torch.no_grad():
        found = model.tokens(model.backbone, batch.images)
        cam = F.conv2d(found.levels[-1], model.head.weight, model.head.bias, padding=1)
        by_patch = cam.mean((2, 3))
        if settings:
            ranked = cam.flatten(2).sort(2, descending=True)[0]
            weights = torch.tensor([0.996**r for r in range(16)])
            by_patch = (ranked * weights).sum(2) / weights.sum()
        wanted = {}
        for name, p in (("cls_token", found.tokens[:, -1].mean(2)), ("cls_patch", by_patch)):
            y = batch.tags
            wanted[name] = -(y * p.sigmoid().log() + (1 - y) * (-p).sigmoid().log()).sum() / 6
        if settings:
            total = 0.0
            for b, block, k in product(range(2), range(6), range(3)):
                alike = torch.stack(
                    [
                        F.cosine_similarity(found.tokens[b, block, k], other, dim=0)
                        for other in found.tokens[b, block]
                    ]
                )
                share = batch.tags[b, k] / batch.tags[b].sum()
                total -= share * alike.log_softmax(0)[k] / 6
            wanted["contrast"] = total / 2
        losses = model.losses(batch, 0.0)
    assert tuple(losses) == model.terms
    torch.testing.assert_close(losses, wanted)


@pytest.mark.parametrize("settings", [{}, PLUS], ids=["V2", "+"])
def test_heads_are_the_formulas_of_the_docstring(settings: dict):
    model, images = new(**settings).eval(), torch.randn(2, 3, 48, 64)
    with torch.inference_mode():
        found = model.tokens(model.backbone, images, affinity=True)
        merged = {head: model(images, head) for head in model.heads}
        maps = {head: of.scores for head, of in merged.items()}
        cam = F.conv2d(found.levels[-1], model.head.weight, model.head.bias, padding=1)
    assert model.heads == ("affinity", "fused", "cam", "attention")
    assert {of.kind for of in merged.values()} == {"unit"}
    assert {of.cells for of in merged.values()} == {Cells((16.0, 16.0), (7.5, 7.5))}
    torch.testing.assert_close(maps["cam"], cam.clamp(min=0))
    attention = found.attention[:, -6 if settings else -3 :].mean(1) * 12
    torch.testing.assert_close(maps["attention"], attention)
    fused = attention * maps["cam"]
    if settings:
        fused = fused.sqrt()
    torch.testing.assert_close(maps["fused"], fused)
    assert found.affinity is not None
    spread = torch.einsum("bkn,bmn->bkm", fused.flatten(2), found.affinity)
    torch.testing.assert_close(maps["affinity"].flatten(2), spread)


def test_attention_can_count_as_it_is():
    model, images = new(relative=False).eval(), torch.randn(1, 3, 48, 64)
    relative = new().eval()
    relative.load_state_dict(model.state_dict())
    with torch.inference_mode():
        for head, factor in (("attention", 12), ("fused", 12), ("cam", 1)):
            found, wanted = model(images, head).scores * factor, relative(images, head).scores
            torch.testing.assert_close(found, wanted)


def test_the_cam_reads_tokens_as_they_leave_the_last_block():
    """Without the final norm, which is then not trained; ``norm`` puts it back."""
    model, images = new().eval(), torch.randn(1, 3, 64, 64)
    normed = new(norm=True).eval()
    for network in (model, normed):
        norm = network.backbone.network.transformer.norm
        torch.nn.init.constant_(norm.weight, 2.0)
        torch.nn.init.constant_(norm.bias, 0.5)
    normed.load_state_dict(model.state_dict())
    left: list[Tensor] = []
    model.backbone.network.blocks[-1].register_forward_hook(lambda _m, _i, out: left.append(out))
    with torch.inference_mode():
        found, wanted = model(images, "cam").scores, normed(images, "cam").scores
        tokens = left[0][:, 3:]
        for scores, x in (
            (found, tokens),
            (wanted, 2 * F.layer_norm(tokens, (64,), eps=1e-6) + 0.5),
        ):
            x = x.transpose(1, 2).unflatten(2, (4, 4))
            cam = F.conv2d(x, model.head.weight, model.head.bias, padding=1)
            torch.testing.assert_close(scores, cam.relu())
    assert not torch.allclose(found, wanted)
    for network, trained in ((model, False), (normed, True)):
        parts = network.backbone.network.transformer.norm.parameters()
        assert all(p.requires_grad is trained for p in parts)


def test_seeds_are_the_range_of_the_sum_with_the_mirrored_image():
    """So the floor that attention between patches leaves under a map is taken off."""
    model = new().eval()
    for p in model.parameters():  # far from their start, where attention is even
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    normalise = Normalise(tuple(model.backbone.mean), tuple(model.backbone.std))
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        plain = model(normalise(images)).scores
        mirrored = model(normalise(images.flip(3))).scores
        seeds = multi_scale(model, images, normalise, flip=True).scores
    assert (plain.amin((2, 3)) > 0.1 * plain.amax((2, 3))).any()  # there is one
    total = torch.zeros(1, 3, 64, 96)
    for maps, turned in ((plain, False), (mirrored, True)):
        large = F.interpolate(maps, (64, 96), mode="bilinear", align_corners=False)
        total += large.flip(3) if turned else large
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    torch.testing.assert_close(seeds, (total - low) / (high - low), atol=1e-3, rtol=0)
    assert seeds.amin((2, 3)).max() == 0


def test_the_shipped_recipes_are_the_published_forms():
    v2, plus, vit = (
        load_recipe(f"voc12/{name}")
        for name in ("mctformer_deit_s", "mctformer_plus_deit_s", "acr_vit")
    )
    _, settings = resolve(v2.method)
    assert settings == MCTformer.Config()
    assert (settings.layers, settings.norm, settings.positions) == (3, False, "bicubic+.1")
    assert (v2.seeds.scales, v2.seeds.flip) == ((1.0,), True)
    _, settings = resolve(vit.method)
    assert resolve(settings.classifier)[1] == MCTformer.Config()
    assert vit.seeds.flip
    _, settings = resolve(plus.method)
    assert settings == MCTformer.Config(
        layers=12, root=True, decay=0.996, contrast=1, positions="bicubic", relative=False
    )
    assert (plus.seeds.scales, plus.seeds.flip) == ((1.0, 0.75, 1.25), True)


def test_affinity_can_be_left_out():
    model = new(affinity=False).eval()
    assert model.heads == ("fused", "cam", "attention")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(images).scores, model(images, "fused").scores)


@pytest.mark.parametrize("settings", [{}, PLUS], ids=["V2", "+"])
def test_classify_gives_fused_maps_with_gradients_and_exact_zeros(settings: dict):
    model, batch = new(**settings), batch_of()
    maps, _ = model.classify(batch)
    assert (maps.kind, maps.cells) == ("unit", model(batch.images).cells)
    with torch.no_grad():
        cam = model(batch.images, "cam").scores
        assert maps.logits is not None
        torch.testing.assert_close(maps.logits, model(batch.images).logits)
    assert (cam <= 0).any() and (cam > 0).any()
    assert (maps.scores[cam <= 0] == 0).all()
    assert (maps.scores[cam > 0] > 0).all()
    maps.scores.square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"tokens.tokens", "tokens.positions", "head.weight"} <= reached
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_patch_cam_without_positive_parts_has_finite_gradients():
    model, batch = new(**PLUS), batch_of()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(0.0)
    maps, _ = model.classify(batch)
    assert not maps.scores.any()
    maps.scores.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_network_without_class_token_and_registers_serves_too():
    spec = SPEC.model_copy(update={"name": "test_vit2"})
    losses = new(spec, **PLUS).losses(batch_of(), 0.0)
    assert all(term.isfinite() for term in losses.values())


def test_predictor_and_model_folder(tmp_path: Path):
    """Several scales, mirrored images, folded copies and files, as for every other method."""
    model = new(**PLUS).eval()
    normalise = Normalise(tuple(model.backbone.mean), tuple(model.backbone.std))
    predictor = Predictor(model, ("a", "b", "c"), normalise, scales=(1.0, 0.5, 1.3), flip=True)
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    found = predictor.probabilities(images, torch.ones(2, 3))
    assert found.shape == (2, 4, 50, 70)
    mirrored = predictor.probabilities(images.flip(3), torch.ones(2, 3))
    torch.testing.assert_close(found, mirrored.flip(3), atol=1e-4, rtol=1e-3)
    fast = predictor.fast().probabilities(images, torch.ones(2, 3))
    torch.testing.assert_close(found, fast)
    settings = model.config.model_dump(mode="json")
    network = {
        "task": "method",
        "method": {"name": "mctformer", **settings},
        "backbone": SPEC.model_dump(mode="json"),
    }
    save(tmp_path, predictor, network, {})
    assert torch.equal(load(tmp_path).probabilities(images, torch.ones(2, 3)), found)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="which test_resnet is not"):
        new(BackboneSpec(name="test_resnet", pretrained=False))
    with pytest.raises(UserError, match="layers 7 are not there") as caught:
        new(layers=7)
    assert caught.value.mend is not None
    assert "set 6 at most" in caught.value.mend


# -- the claim


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a square of each of one or two colours: images, tags (B, 2), masks (B, 2, S, S)."""
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    tags = torch.tensor([[1.0, 0], [0, 1], [1, 1]])[
        torch.randint(0, 3, (count,), generator=generator)
    ]
    masks = torch.zeros(count, 2, SIDE, SIDE)
    for image, tag, mask in zip(images, tags, masks, strict=True):
        for kind in tag.nonzero()[:, 0].tolist():
            y = int(torch.randint(0, SIDE - SQUARE, (1,), generator=generator))
            x = int(torch.randint(0, SIDE // 2 - SQUARE, (1,), generator=generator))
            x += kind * SIDE // 2
            image[kind, y : y + SQUARE, x : x + SQUARE] += 2.0
            mask[kind, y : y + SQUARE, x : x + SQUARE] = 1
    return images, tags, masks


@pytest.fixture(scope="module")
def trained() -> MCTformer:
    torch.manual_seed(0)
    options = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    spec = BackboneSpec(
        name="vit_tiny_patch16_224", pretrained=False, output_stride=8, options=options
    )
    model = new(spec, classes=2, layers=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(120):
        images, tags, _ = squares(16, generator)
        loss = sum(model.losses(Batch(images, tags, [""] * 16), step / 120).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_the_maxima_lie_on_the_square_of_the_class(trained: MCTformer):
    """Those of the product nearly always, the others more often than by chance."""
    images, tags, masks = squares(64, torch.Generator().manual_seed(2))
    there, inside = tags.bool(), {}
    for head in ("fused", "cam", "attention"):
        with torch.inference_mode():
            maps = trained(images, head)
        assert maps.logits is not None
        assert ((maps.logits > 0) == there).float().mean() > 0.95
        best = maps.scores[there].flatten(1).argmax(1, keepdim=True)
        share = F.max_pool2d(masks, 8)[there].flatten(1)
        inside[head] = share.gather(1, best).mean().item()
    chance = F.max_pool2d(masks, 8)[there].mean().item()
    assert chance < 0.3
    assert inside["fused"] > 0.75
    assert inside["attention"] > 1.5 * chance
    assert inside["cam"] > 1.5 * chance
