"""Vision transformers: maps of patch tokens, and class tokens whose attention can be looked at.

The networks are timm's ``VisionTransformer`` and its DeiT descendants (Dosovitskiy et al., ICLR
2021; Touvron et al., ICML 2021), and those whose patches are cut from the map of a convolutional
stem. Each patch of p x p pixels is a token of D numbers, and all tokens pass through L blocks of
attention; prefix tokens (class, distillation, registers) go with them and stand for no place.
Written back to their places, the patch tokens are a map of stride p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict, model_entrypoint
from timm.models.vision_transformer import Attention, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weakseg.errors import UserError
from weakseg.networks.cells import cells_of
from weakseg.networks.checkpoint import require_finite
from weakseg.networks.spec import BackboneSpec
from weakseg.ops.cells import Cells

if TYPE_CHECKING:
    from weakseg.networks.backbone import Backbone

__all__ = [
    "ClassTokens",
    "Resampling",
    "TokenMaps",
    "VisionTokens",
    "create_tokens",
    "is_transformer",
]

Resampling = Literal["timm", "bicubic", "bicubic+.1"]
"""How position embeddings of another grid of patches are made, all of them bicubic: ``timm`` with
a = -.5 and antialiasing, the others with a = -.75 and without, scaled by the grids' ratio m / n, or
by (m + .1) / n."""

_FAMILIES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # files of timm
_NOISE = 0.02


class VisionTokens(nn.Module):
    """A timm ``VisionTransformer`` without its classifier, for images of any size.

    An image whose sides are no multiples of the patch is resized to the nearest ones (one patch at
    least), so that the maps cover exactly the image. Position embeddings are resampled.

    Args:
        transformer: Built with ``dynamic_img_size``; its classifier is removed.

    Attributes:
        levels: Channels and stride of what ``forward`` returns: tokens after one third and two
            thirds of the blocks, and after all of them and the final norm.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        super().__init__()
        transformer.reset_classifier(0, "")
        self.transformer = transformer
        height, width = transformer.patch_embed.feat_ratio(as_scalar=False)
        if height != width:
            raise ValueError(f"its patches of {height} x {width} pixels are not square")
        if not isinstance(transformer.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate leaves holes in the maps")
        self.patch = height
        self.depth = len(transformer.blocks)
        self.levels = ((transformer.embed_dim, self.patch),) * 3
        without = transformer.pos_embed is None or transformer.no_embed_class
        self._embedded = 0 if without else transformer.num_prefix_tokens
        (patches,) = cells_of(transformer.patch_embed, (4 * height, 4 * width), self._patches)
        self._offset = patches.offset
        self._taps = tuple(max(0, round(self.depth * i / 3) - 1) for i in (1, 2, 3))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm says of the weights."""
        return getattr(self.transformer, "pretrained_cfg", {})

    @property
    def blocks(self) -> list[Any]:
        """Blocks of attention, in order."""
        return list(self.transformer.blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Three levels (B, D, h, w) of normalised images (B, 3, H, W)."""
        x, grid = self.embed(images, self.prefix())
        states: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            self.keep(states, i, x)
        return self.maps(states, grid)

    def own_tokens(self) -> list[nn.Parameter]:
        """The network's prefix tokens, each (1, n, D), in their order."""
        t = self.transformer
        tokens = (getattr(t, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        return [token for token in tokens if token is not None]

    def class_token(self) -> tuple[Tensor, Tensor]:
        """The network's class token and its position embedding, (D,) each; zeros where it has none."""
        t = self.transformer
        none = torch.zeros(t.embed_dim)
        if t.cls_token is None:
            return none, none
        return t.cls_token[0, 0], self._positions()[0] if self._embedded else none

    def prefix(self) -> Tensor:
        """The network's own prefix tokens with their positions, (P, D)."""
        t = self.transformer
        tokens = [next(t.parameters()).new_zeros(0, t.embed_dim)]  # of a network without any
        joined = torch.cat(tokens + [token[0] for token in self.own_tokens()])
        return joined + self._positions()[: self._embedded] if self._embedded else joined

    def embed(
        self, images: Tensor, prefix: Tensor, resampling: Resampling = "timm"
    ) -> tuple[Tensor, tuple[int, int]]:
        """What the first block reads: tokens (B, P + h * w, D) behind a prefix (P, D), and (h, w)."""
        t = self.transformer
        grid = self.grid(images.shape[-2], images.shape[-1])
        size = (grid[0] * self.patch, grid[1] * self.patch)
        if images.shape[-2:] != size:
            images = F.interpolate(
                images, size, mode="bilinear", align_corners=False, antialias=True
            )
        patches = t.patch_embed(images).flatten(1, 2)  # (B, h, w, D) before
        if t.pos_embed is not None:
            patches = patches + self._positions(grid, resampling)[self._embedded :]
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], 1)
        return t.norm_pre(t.pos_drop(tokens)), grid

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image of that size."""
        return max(1, int(height / self.patch + 0.5)), max(1, int(width / self.patch + 0.5))

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        """Where the patches lie in an image of ``size`` (H, W), which is resized to whole ones."""
        factors = [
            n / (cells * self.patch) for n, cells in zip(size, self.grid(*size), strict=True)
        ]
        (y, x) = (self.patch * f for f in factors)
        (oy, ox) = ((o + 0.5) * f - 0.5 for o, f in zip(self._offset, factors, strict=True))
        return (Cells((y, x), (oy, ox)),) * len(self.levels)

    def keep(self, states: dict[int, Tensor], block: int, tokens: Tensor) -> None:
        """Keeps the tokens behind a block if a level is made of them."""
        if block in self._taps:
            states[block] = tokens

    def maps(
        self, states: dict[int, Tensor], grid: tuple[int, int], norm: bool = True
    ) -> list[Tensor]:
        """Levels (B, D, h, w) of the tokens that ``keep`` kept, whatever their prefix.

        ``norm`` says whether those of the last level go through the final norm.
        """
        cells = grid[0] * grid[1]
        levels = [states[i][:, -cells:] for i in self._taps]
        if norm:
            for module in self.final_norms():
                levels[-1] = module(levels[-1])
        return [level.transpose(1, 2).unflatten(2, grid) for level in levels]

    def _patches(self, images: Tensor) -> list[Tensor]:
        """Embedded patches (B, D, h, w) of images whose sides are whole patches."""
        return [self.transformer.patch_embed(images).permute(0, 3, 1, 2)]

    def final_norms(self) -> tuple[nn.Module, nn.Module]:
        """What the transformer has behind its blocks: where one is, the other does nothing."""
        return self.transformer.norm, self.transformer.fc_norm

    def _positions(
        self, grid: tuple[int, int] | None = None, resampling: Resampling = "timm"
    ) -> Tensor:
        """Position embeddings (P + h * w, D); those of patches at another grid if it is given."""
        t = self.transformer
        assert t.pos_embed is not None
        own = t.patch_embed.grid_size
        grid = grid or own
        if resampling == "timm" or grid == own:
            return resample_abs_pos_embed(
                t.pos_embed, list(grid), own, num_prefix_tokens=self._embedded
            )[0]
        prefix, patches = t.pos_embed[0].split([self._embedded, own[0] * own[1]])
        maps = patches.float().T.unflatten(1, own)[None]
        if resampling == "bicubic":
            maps = F.interpolate(maps, grid, mode="bicubic")
        else:
            factors = [(new + 0.1) / old for new, old in zip(grid, own, strict=True)]
            maps = F.interpolate(maps, scale_factor=factors, mode="bicubic")
        return torch.cat([prefix, maps[0].flatten(1).T.to(prefix.dtype)])


@dataclass
class TokenMaps:
    """What class tokens and patches say of a batch of images.

    Attributes:
        tokens: (B, L, K, D) class tokens behind each block, before the final norm.
        levels: As of the backbone, (B, D, h, w) each, finest first.
        attention: (B, L, K, h, w) float32; of each class token's attention the part that goes to
            patches, the mean over heads. It sums to less than 1 over (h, w): the rest goes to
            class tokens.
        affinity: (B, N, N) float32, N = h * w, how much each patch (row) attends to each other, the
            mean over blocks and heads; where it was asked for.
    """

    tokens: Tensor
    levels: list[Tensor]
    attention: Tensor
    affinity: Tensor | None = None


class ClassTokens(nn.Module):
    """K learned tokens, one for each class, in place of a transformer's prefix tokens.

    They start as copies of its class token, with noise so that they can part. The tokens that they
    replace stay in the backbone, and are not trained.

    Attention is computed a second time, from the queries and keys of each block and only for the
    rows that are wanted: so blocks keep their fused attention, which gives none.

    Args:
        backbone: A vision transformer; it is left outside this module.
        num_classes: K.
        norm: Whether patch tokens of the last level go through the backbone's final norm; where
            they do not, it is not trained.
        resampling: How positions of another grid of patches are made.

    Attributes:
        depth: L, blocks of the backbone.

    Raises:
        UserError: The backbone is no vision transformer, or its attention is of another kind.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        norm: bool = True,
        resampling: Resampling = "timm",
    ) -> None:
        super().__init__()
        network = _transformer_of(backbone)
        self.norm, self.resampling = norm, resampling
        self.depth = network.depth
        token, position = network.class_token()
        self.tokens = nn.Parameter(_copies(token, num_classes))
        self.positions = nn.Parameter(_copies(position, num_classes))
        for replaced in network.own_tokens():
            replaced.requires_grad_(False)
        if not norm:
            for module in network.final_norms():
                module.requires_grad_(False)

    def forward(self, backbone: Backbone, images: Tensor, affinity: bool = False) -> TokenMaps:
        """Tokens, levels and attention of normalised images (B, 3, H, W).

        Args:
            backbone: The one that this was made for.
            images: Of any size.
            affinity: Whether the attention between patches is wanted.
        """
        network: VisionTokens = backbone.network  # type: ignore[assignment]
        x, grid = network.embed(images, self.tokens + self.positions, self.resampling)
        count = len(self.tokens)
        states: dict[int, Tensor] = {}
        tokens, rows = [], []
        between: Tensor | None = None
        for i, block in enumerate(network.blocks):
            with _seen(block.attn.qkv) as seen:
                x = block(x)
            network.keep(states, i, x)
            tokens.append(x[:, :count].clone())  # a view would keep all of x
            queries, keys = _queries_and_keys(block.attn, seen[0])
            with torch.autocast(x.device.type, enabled=False):
                rows.append(_attention(queries[:, :, :count], keys, count))
                if affinity:
                    more = _affinity(queries[:, :, count:], keys, count) / network.depth
                    between = more if between is None else between + more
        return TokenMaps(
            torch.stack(tokens, 1),
            network.maps(states, grid, self.norm),
            torch.stack(rows, 1).unflatten(3, grid),
            between,
        )


def is_transformer(name: str) -> bool:
    """Whether a timm name, without its tag, is that of a ``VisionTransformer``."""
    return timm.is_model(name) and model_entrypoint(name).__module__.rpartition(".")[2] in _FAMILIES


def create_tokens(spec: BackboneSpec, file: Path | None) -> VisionTokens:
    """Builds the transformer that ``spec`` names and loads its weights.

    Args:
        spec: ``dilate`` makes no difference: there is no stride to take away.
        file: Weights of that network in timm's or its authors' names; None = those of timm's hub,
            or random ones, as ``spec`` says.

    Raises:
        Exception: Whatever timm and torch raise of options, downloads and files that do not do.
    """
    options = {**spec.options, "dynamic_img_size": True}
    if spec.pretrained:
        options["pretrained"] = True
    transformer = timm.create_model(spec.name, **options)
    if not isinstance(transformer, VisionTransformer):
        raise ValueError(f"these options make it a {type(transformer).__name__}")
    network = VisionTokens(transformer)
    if file is not None:
        given = load_state_dict(str(file), weights_only=True)
        require_finite(given, file)
        _load(transformer, given)
    return network


def _load(transformer: VisionTransformer, given: dict[str, Any]) -> None:
    given = checkpoint_filter_fn(given, transformer, adapt_layer_scale=True)
    own = transformer.state_dict()
    missing = [key for key in own if key not in given]
    if missing:
        raise ValueError(f"{len(missing)} of {len(own)} tensors are missing, such as {missing[0]}")
    for key, tensor in own.items():
        if given[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {tuple(given[key].shape)}, not {tuple(tensor.shape)}"
            )
    deeper = [key for key in given if key.startswith("blocks.") and key not in own]
    if deeper:
        raise ValueError(f"it has more blocks: {deeper[0]}")
    transformer.load_state_dict({key: given[key] for key in own})


def _transformer_of(backbone: Backbone) -> VisionTokens:
    name, network = backbone.spec.name, backbone.network
    if not isinstance(network, VisionTokens):
        raise UserError(
            f"class tokens need a vision transformer, which {name} is not",
            where="backbone.name",
            mend="set backbone.name: deit_small_patch16_224.fb_in1k, or another vit or deit of timm",
        )
    kinds = {type(getattr(block, "attn", block)) for block in network.blocks}
    if kinds != {Attention}:
        raise UserError(
            f"the attention of {name} is of a kind that cannot be read",
            where="backbone",
            mend="set backbone.name: deit_small_patch16_224.fb_in1k, or another plain vit or deit",
        )
    return network


def _copies(vector: Tensor, count: int) -> Tensor:
    """(count, D) noisy copies of a vector (D,)."""
    noise = nn.init.trunc_normal_(torch.empty(count, len(vector)), std=_NOISE)
    return vector.detach() + noise.to(vector)


@contextmanager
def _seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns meanwhile."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _queries_and_keys(attention: Attention, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled queries and keys, (B, heads, P + N, d) float32 each, of what ``qkv`` returned."""
    queries, keys, _ = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries = attention.q_norm(queries) * attention.scale
    return queries.float(), attention.k_norm(keys).float()


def _attention(queries: Tensor, keys: Tensor, prefix: int) -> Tensor:
    """What some tokens' attention gives to patches, (B, rows, N), the mean over heads."""
    return (queries @ keys.transpose(2, 3)).softmax(3)[..., prefix:].mean(1)


def _affinity(queries: Tensor, keys: Tensor, prefix: int) -> Tensor:
    """The same for many tokens, head by head; for the gradient it is computed again."""
    heads = queries.shape[1]
    one: Callable[..., Tensor] = partial(_attention, prefix=prefix)
    if torch.is_grad_enabled() and queries.requires_grad:
        one = partial(checkpoint, one, use_reentrant=False)
    total = one(queries[:, :1], keys[:, :1])
    for head in range(1, heads):
        total = total + one(queries[:, head : head + 1], keys[:, head : head + 1])
    return total / heads
