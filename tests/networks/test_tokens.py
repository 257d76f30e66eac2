"""Transformers behind the backbone contract, and class tokens whose attention is timm's own."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.networks.tokens import (
    ClassTokens,
    Resampling,
    TokenMaps,
    VisionTokens,
    is_transformer,
)

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64}
DEIT = ("deit_tiny_patch16_224", TINY)
NETWORKS = {
    "class token": ("test_vit", {}),
    "register instead of class token": ("test_vit2", {}),
    "rms norm": ("test_vit4", {}),
    "attention pooling": ("test_vit3", {}),
    "deit": DEIT,
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "deit3, class token without position": ("deit3_small_patch16_224", TINY),
    "registers": ("vit_small_patch16_224", TINY | {"reg_tokens": 3}),
    "no prefix": ("vit_small_patch16_224", TINY | {"class_token": False, "global_pool": "avg"}),
    "norm before the blocks": ("vit_base_patch16_clip_224", TINY),
    "normed queries": ("vit_small_patch16_224", TINY | {"qk_norm": True}),
    "convolutional stem": ("vit_tiny_r_s16_p8_224", TINY | {"patch_size": 4}),
    "no positions": ("vit_small_patch16_224", TINY | {"pos_embed": "none"}),
}
PLAIN = [
    "class token",
    "convolutional stem",
    "distilled",
    "no prefix",
    "registers",
    "normed queries",
]


def build(name: str = "test_vit", **settings) -> Backbone:
    return make_backbone(BackboneSpec(name=name, **{"pretrained": False} | settings))


def scattered(network: nn.Module) -> nn.Module:
    """Weights far from their start, at which tokens and positions are nearly zero."""
    for p in network.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return network


def of(kind: str) -> Backbone:
    name, options = NETWORKS[kind]
    backbone = build(name, options=options).eval()
    scattered(backbone)
    return backbone


def network_of(backbone: Backbone) -> VisionTokens:
    assert isinstance(backbone.network, VisionTokens)
    return backbone.network


@pytest.mark.parametrize("kind", NETWORKS)
def test_levels_are_timms_tokens(kind: str):
    backbone = of(kind)
    timms = network_of(backbone).transformer
    size = 64 if timms.pos_embed is None or timms.patch_embed.grid_size == (4, 4) else 160
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        maps = backbone(images)
        final, between = timms.forward_intermediates(
            images, [len(timms.blocks) // 3 - 1, 2 * len(timms.blocks) // 3 - 1]
        )
        if timms.num_prefix_tokens:
            final = final[:, timms.num_prefix_tokens :]
    assert [v.stride for v in backbone.levels] == [16, 16, 16]
    assert [v.channels for v in backbone.levels] == [timms.embed_dim] * 3
    if len(timms.blocks) % 3 == 0:
        for ours, theirs in zip(maps[:2], between, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), timms.fc_norm(final))


@pytest.mark.parametrize("size", [(64, 96), (65, 47), (31, 100), (5, 200), (7, 3)])
def test_any_size(size: tuple[int, int]):
    maps = build().eval()(torch.randn(1, 3, *size))
    cells = tuple(max(1, int(side / 16 + 0.5)) for side in size)
    assert {m.shape for m in maps} == {(1, 64, *cells)}


def test_maps_cover_the_whole_image_at_any_size():
    """The patch that sees a blob stands where the blob is, as a share of the image."""
    backbone = build(options={"depth": 1})
    network_of(backbone).transformer.blocks = nn.Sequential(nn.Identity())
    for height, width in ((128, 128), (121, 135), (137, 90)):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = (0.78 * height, 0.3 * width)
        blob = torch.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 50)
        images = torch.stack([blob.expand(3, -1, -1), torch.zeros(3, height, width)])
        with torch.no_grad():
            level = backbone(images)[0]
        change = (level[0] - level[1]).norm(dim=0)
        rows, columns = change.shape
        found = ((change.sum(1) * (torch.arange(rows) + 0.5)).sum() / change.sum() / rows).item()
        assert found == pytest.approx(0.78, abs=0.03)
        found = (change.sum(0) * (torch.arange(columns) + 0.5)).sum() / change.sum() / columns
        assert found.item() == pytest.approx(0.3, abs=0.03)


def test_the_stride_is_the_patch():
    with pytest.raises(UserError, match="output_stride 16 .* gives 14") as caught:
        build("vit_small_patch14_dinov2", options=TINY | {"img_size": 56})
    assert caught.value.mend is not None
    assert "set output_stride: 14" in caught.value.mend
    backbone = build("vit_small_patch14_dinov2", output_stride=14, options=TINY | {"img_size": 56})
    assert backbone.eval()(torch.randn(1, 3, 60, 100))[-1].shape == (1, 24, 4, 7)
    small = build(output_stride=8, options={"patch_size": 8})
    assert small.eval()(torch.randn(1, 3, 64, 64))[-1].shape[2:] == (8, 8)
    with pytest.raises(UserError, match="gives 12") as caught:
        build(options={"patch_size": 12})
    assert caught.value.mend == "take another backbone"


@pytest.mark.parametrize("options", [{"patch_drop_rate": 0.5}, {"patch_size": (8, 16)}, {"no": 1}])
def test_options_that_do_not_do_are_named(options: dict):
    with pytest.raises(UserError, match="test_vit cannot be built: ") as caught:
        build(options=options)
    assert "backbone.options" in str(caught.value)


def test_only_vision_transformers_come_this_way():
    names = [name for name in timm.list_models() if is_transformer(name)]
    assert {"deit_small_patch16_224", "deit3_base_patch16_224", "vit_small_patch8_224"} <= set(
        names
    )
    assert not {"resnet50", "swin_tiny_patch4_window7_224", "test_convnext"} & set(names)


def test_a_decoder_that_needs_finer_levels_says_so():
    with pytest.raises(UserError, match="levels of stride 4") as caught:
        DeepLabV3Plus(build(), 3)
    assert caught.value.mend is not None
    assert "convolutional" in caught.value.mend


def test_every_weight_is_trained_and_normalisation_travels():
    backbone = build("test_vit3")  # whose classifier has attention of its own
    backbone(torch.randn(2, 3, 48, 48))[-1].square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    cfg = timm.get_pretrained_cfg("test_vit3")
    assert (backbone.mean, backbone.std) == (cfg.mean, cfg.std)


# -- weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_vit", "test_vit2"):
        network = scattered(timm.create_model(name, pretrained=False, num_classes=7))
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        torch.save({"model": network.state_dict()}, folder / f"{name}.pth")
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file({k: v for k, v in state.items() if "blocks.3" not in k}, folder / "part.safetensors")
    return folder


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_weights_is_loaded_exactly(files: Path, name: str, suffix: str):
    backbone = build(name, weights=files / f"{name}.{suffix}")
    given = torch.load(files / f"{name}.pth")["model"]
    own = network_of(backbone).transformer.state_dict()
    assert set(given) - set(own) == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, given[key]) for key, tensor in own.items())
    assert not backbone.from_scratch


def test_weights_serve_another_size_of_image_and_patch(files: Path):
    options = {"img_size": 64, "patch_size": 8}
    backbone = build(output_stride=8, weights=files / "test_vit.safetensors", options=options)
    timms = network_of(backbone).transformer
    assert timms.pos_embed.shape[1] == 1 + 64
    assert timms.patch_embed.proj.weight.shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("file", "options", "reason"),
    [
        ("part", {}, "12 of 78 tensors are missing, such as blocks.3.norm1.weight"),
        ("test_vit", {"depth": 4}, "more blocks: blocks.4"),
        ("test_vit", {"mlp_ratio": 2}, "has shape"),
        ("test_vit2", {}, ""),
    ],
)
def test_a_file_of_another_network_is_refused(files: Path, file: str, options: dict, reason: str):
    with pytest.raises(UserError, match=f"the weights do not fit test_vit: .*{reason}"):
        build(weights=files / f"{file}.safetensors", options=options)


# -- class tokens


def read(backbone: Backbone, tokens: ClassTokens, images: Tensor, **kwargs) -> TokenMaps:
    with torch.no_grad():
        return tokens(backbone, images, **kwargs)


def unfused(backbone: Backbone, prefix: Tensor, images: Tensor) -> list[Tensor]:
    """Attention (B, heads, P + N, P + N) of every block, from timm's own unfused passage."""
    network = network_of(backbone)
    found: list[Tensor] = []
    for block in network.transformer.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        x, _ = network.embed(images, prefix)
        network.transformer.blocks(x)
    return found


@pytest.mark.parametrize("kind", PLAIN)
def test_attention_is_timms(kind: str):
    backbone = of(kind)
    tokens = ClassTokens(backbone, 5).eval()
    scattered(tokens)
    images = torch.randn(2, 3, 48, 64)
    maps = read(backbone, tokens, images, affinity=True)
    wanted = torch.stack(
        [a.mean(1) for a in unfused(backbone, tokens.tokens + tokens.positions, images)], 1
    )
    assert maps.attention.shape[2:] == (5, 3, 4)
    torch.testing.assert_close(maps.attention.flatten(3), wanted[:, :, :5, 5:])
    assert maps.affinity is not None
    torch.testing.assert_close(maps.affinity, wanted[:, :, 5:, 5:].mean(1))


def test_with_the_networks_own_token_the_passage_is_timms():
    backbone = of("deit")
    tokens = ClassTokens(backbone, 1)
    timms = network_of(backbone).transformer
    with torch.no_grad():
        tokens.tokens.copy_(timms.cls_token[0])
        tokens.positions.copy_(timms.pos_embed[0, :1])
    images = torch.randn(2, 3, 64, 64)
    maps = read(backbone, tokens, images)
    with torch.no_grad():
        final, blocks = timms.forward_intermediates(
            images, return_prefix_tokens=True, output_fmt="NLC"
        )
        assert torch.equal(final, timms.forward_features(images))
    torch.testing.assert_close(maps.levels[-1].flatten(2).transpose(1, 2), final[:, 1:])
    for ours, (_, theirs) in zip(maps.tokens.unbind(1), blocks, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(maps.levels, backbone(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def cubic(x: float) -> float:
    """Keys' kernel with a = -.75."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(old: int, new: int, factor: float) -> Tensor:
    """(new, old) weights of cubic interpolation, with cells beyond the border as the last one."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = (i + 0.5) / factor - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic(place - tap)
    return weights


@pytest.mark.parametrize(("way", "more"), [("bicubic", 0.0), ("bicubic+.1", 0.1)])
@pytest.mark.parametrize("grid", [(7, 3), (2, 4), (4, 4)])
def test_positions_of_another_grid_by_hand(way: Resampling, more: float, grid: tuple[int, int]):
    backbone = of("deit")  # its own grid is 4 x 4, behind one class token
    timms = network_of(backbone).transformer
    own = timms.pos_embed[0].detach().double()
    rows, columns = (resampling(4, new, (new + more) / 4) for new in grid)
    wanted = torch.einsum("yi,xj,ijd->yxd", rows, columns, own[1:].unflatten(0, (4, 4)))
    if grid == (4, 4):
        wanted = own[1:].unflatten(0, (4, 4))
    tokens = ClassTokens(backbone, 2, resampling=way)
    images = torch.zeros(1, 3, 16 * grid[0], 16 * grid[1])
    seen: list[Tensor] = []
    timms.blocks[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    read(backbone, tokens, images)
    with torch.no_grad():
        patches = timms.patch_embed(images)[0]
    found = seen[0][0, 2:].unflatten(0, grid) - patches
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class token", "distilled", "no prefix", "no positions"])
def test_tokens_start_near_the_networks_own(kind: str):
    backbone = of(kind)
    tokens, timms = ClassTokens(backbone, 50), network_of(backbone).transformer
    own = torch.zeros(2, timms.embed_dim)
    if timms.cls_token is not None:
        own[0] = timms.cls_token[0, 0].detach()
        if timms.pos_embed is not None:
            own[1] = timms.pos_embed[0, 0].detach()
    for start, wanted in zip((tokens.tokens, tokens.positions), own, strict=True):
        noise = start - wanted
        assert noise.std().item() == pytest.approx(0.02, rel=0.1)
        assert noise.abs().max() < 0.3


def test_tokens_that_are_replaced_are_not_trained():
    backbone = of("distilled")
    tokens = ClassTokens(backbone, 3)
    maps = tokens(backbone, torch.randn(1, 3, 32, 32))
    (maps.tokens.square().sum() + maps.levels[-1].square().sum()).backward()
    timms = network_of(backbone).transformer
    fixed = {name for name, p in timms.named_parameters() if not p.requires_grad}
    assert fixed == {"cls_token", "dist_token"}
    trained = [p for p in (*backbone.parameters(), *tokens.parameters()) if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_gradients_of_attention_and_affinity():
    """Those of a plain, unfused passage, though affinities are computed again for them."""
    backbone = of("class token")
    tokens = ClassTokens(backbone, 2)
    scattered(tokens)
    images = torch.randn(1, 3, 32, 48)
    maps = tokens(backbone, images, affinity=True)
    assert maps.affinity is not None
    weights = torch.randn(6, 6), torch.randn(2, 2, 3)
    value = (maps.affinity * weights[0]).sum() + (maps.attention * weights[1]).sum()
    (ours,) = torch.autograd.grad(value, tokens.tokens)
    network = network_of(backbone)
    x, _ = network.embed(images, tokens.tokens + tokens.positions)
    value = torch.zeros(())
    for block in network.transformer.blocks:
        a = block.attn
        q, k, _ = a.qkv(block.norm1(x)).reshape(1, 8, 3, 2, 32).permute(2, 0, 3, 1, 4)
        rows = (q @ k.mT * a.scale).softmax(-1).mean(1)[0, :, 2:]
        value = value + (rows[2:] * weights[0]).sum() / 6
        value = value + (rows[:2] * weights[1].flatten(1)).sum()
        x = block(x)
    (theirs,) = torch.autograd.grad(value, tokens.tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_attention_is_in_float32_under_autocast():
    backbone = of("class token")
    tokens = ClassTokens(backbone, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = read(backbone, tokens, torch.randn(1, 3, 32, 32), affinity=True)
    assert maps.affinity is not None
    assert maps.attention.dtype == maps.affinity.dtype == torch.float32
    assert (maps.affinity.sum(2) < 1).all()


def test_watching_leaves_nothing_behind():
    backbone = of("class token")
    tokens = ClassTokens(backbone, 2)
    network = network_of(backbone)
    block = network.transformer.blocks[1]
    fine = block.forward
    block.forward = lambda x: F.linear(x, torch.zeros(2, 2))
    with pytest.raises(RuntimeError):
        read(backbone, tokens, torch.randn(1, 3, 32, 32))
    block.forward = fine
    assert not any(m._forward_hooks for m in network.modules())
    read(backbone, tokens, torch.randn(1, 3, 32, 32))
    assert not any(m._forward_hooks for m in network.modules())


def test_what_has_no_readable_attention_is_refused():
    convolutional = make_backbone(BackboneSpec(name="test_resnet", pretrained=False))
    with pytest.raises(UserError, match="need a vision transformer, which test_resnet") as caught:
        ClassTokens(convolutional, 2)
    assert caught.value.where == "backbone.name"
    parallel = build("vit_small_patch16_18x2_224", options=TINY)
    with pytest.raises(UserError, match="of a kind that cannot be read"):
        ClassTokens(parallel, 2)
    assert parallel.eval()(torch.randn(1, 3, 32, 32))[0].shape == (1, 24, 2, 2)
