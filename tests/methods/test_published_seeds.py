"""Seeds of the papers' recipes, from given features: sums of scales and flips as the codes make them.

The networks are stand-ins that return features by the size of their input; everything behind them is
the recipe's, and each reference is written out in numpy.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weakseg.inference import Normalise, evaluating, multi_scale
from weakseg.methods import Method, build
from weakseg.networks.backbone import Level
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells
from weakseg.recipe import Recipe, load_recipe

K = 3
SIZE = (50, 37)  # no multiple of a stride, nor are its halves and doubles


class Given(nn.Module):
    """Features of an image and, in the second row, of its mirror image; other ones for each size."""

    def __init__(self, channels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        self.levels = tuple(Level(f"C{i}", c, stride) for i, c in enumerate(channels, 1))
        self.mean, self.std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        self.spec, self.from_scratch = BackboneSpec(name="test_resnet"), False
        self.anchor = nn.Parameter(torch.zeros(()))

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        """Elsewhere than where the codes take them to lie."""
        return tuple(Cells((v.stride, v.stride), (0, 0)) for v in self.levels)

    def features(self, height: int, width: int) -> list[np.ndarray]:
        rng = np.random.default_rng(height * 1000 + width)
        stride = self.levels[0].stride
        grid = (-(-height // stride), -(-width // stride))
        return [rng.normal(-0.3, 1, (2, v.channels, *grid)).astype(np.float32) for v in self.levels]

    def forward(self, images: Tensor) -> list[Tensor]:
        assert len(images) == 2
        return [torch.from_numpy(f) for f in self.features(*images.shape[-2:])]


def made(name: str, channels: tuple[int, ...]) -> tuple[Recipe, Method, Given]:
    """A recipe, its method on given features, and these."""
    recipe = load_recipe("voc12/" + name)
    stand = Given(channels, recipe.backbone.output_stride)
    torch.manual_seed(0)
    return recipe, build(recipe.method, lambda: stand, K), stand  # type: ignore[arg-type,return-value]


def seeds(recipe: Recipe, method: Method, size: tuple[int, int] | None = None) -> np.ndarray:
    image = torch.full((1, 3, *SIZE), 150, dtype=torch.uint8)
    with evaluating(method) as model:
        maps = multi_scale(
            model,
            image,
            Normalise(method.backbone.mean, method.backbone.std),
            scales=recipe.seeds.scales,
            flip=recipe.seeds.flip,
            place=recipe.seeds.place,
            size=size,
        )
    return maps.scores[0].numpy()


def views(recipe: Recipe):
    """Sizes of the image at the recipe's scales."""
    assert recipe.seeds.flip
    assert sorted(recipe.seeds.scales) == [0.5, 1, 1.5, 2]
    for scale in recipe.seeds.scales:
        yield tuple(round(side * scale) for side in SIZE)


def enlarged(maps: np.ndarray, size: tuple[int, int], aligned: bool = False) -> np.ndarray:
    """Bilinear, (..., h, w) -> (..., H, W), as a matrix on each side."""
    for axis in (-2, -1):
        count, length = maps.shape[axis], size[axis]
        at = np.arange(length)
        at = at * (count - 1) / (length - 1) if aligned else (at + 0.5) * count / length - 0.5
        at = at.clip(0, count - 1)[:, None]
        matrix = np.maximum(0, 1 - np.abs(at - np.arange(count)))
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ matrix.T, -1, axis)
    return maps


def over_range(total: np.ndarray) -> np.ndarray:
    low, high = total.min((-2, -1), keepdims=True), total.max((-2, -1), keepdims=True)
    return np.maximum(total - low - 1e-5, 0) / (high - low + 1e-5)


@pytest.mark.parametrize("name", ["puzzle_r50", "cam_r50", "irn_r50"])
@pytest.mark.parametrize("stride", [1, 4])
def test_irn_and_puzzle_cam(name: str, stride: int):
    """Clipped and added to the mirror image's on the cells; at full size enlarged to whole cells of
    16 px and cut to the image, at stride 4 stretched."""
    recipe, method, stand = made(name, (8, K))
    with torch.no_grad():
        method.head.classifier.weight.copy_(torch.eye(K)[..., None, None])  # type: ignore[union-attr]
    size = tuple(-(-side // stride) for side in SIZE)
    total = np.zeros((K, *size))
    for view in views(recipe):
        plain, mirrored = np.maximum(stand.features(*view)[-1], 0)
        both = plain + mirrored[..., ::-1]
        whole = tuple(-(-side // 16) * 16 for side in size) if stride == 1 else size
        total += enlarged(both, whole)[:, : size[0], : size[1]]
    wanted = total / (total.max((-2, -1), keepdims=True) + 1e-5)
    found = seeds(recipe, method, None if stride == 1 else size)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_acr():
    """Enlarged with their sign, evenly over the image; then clipped, added and brought to [0, 1]."""
    recipe, method, stand = made("acr_wr38", (8, 8, 2 * K))
    head = method.classifier.head  # type: ignore[union-attr]
    with torch.no_grad():  # behind a ReLU: positive parts less negative parts
        head.hidden.weight.zero_()
        head.classifier.weight.zero_()
        for k in range(K):
            head.hidden.weight[2 * k, k], head.hidden.weight[2 * k + 1, k] = 1, -1
            head.classifier.weight[k, 2 * k], head.classifier.weight[k, 2 * k + 1] = 1, -1
    total = np.zeros((K, *SIZE))
    for view in views(recipe):
        plain, mirrored = enlarged(stand.features(*view)[-1][:, :K], SIZE)
        total += np.maximum(plain, 0) + np.maximum(mirrored, 0)[..., ::-1]
    np.testing.assert_allclose(seeds(recipe, method), over_range(total), atol=1e-4)


def pcm(evidence: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(K + 1, N) and (D, N) -> (K + 1, N)."""
    keys = keys / (np.linalg.norm(keys, axis=0) + 1e-5)
    affinity = np.maximum(keys.T @ keys, 0)
    return evidence @ (affinity / (affinity.sum(0) + 1e-5))


def test_seam():
    """PCM's maps enlarged to the input with corners aligned, these evenly to the image; added, then
    brought to [0, 1]."""
    recipe, method, stand = made("seam_wr38", (6, 7, K))
    weights = {
        n: p.detach().numpy()[:, :, 0, 0] for n, p in method.named_parameters() if p.ndim == 4
    }
    colour = (150 / 255 - np.array(stand.mean)) / np.array(stand.std)
    total = np.zeros((K, *SIZE))
    for view in views(recipe):
        low, high, last = stand.features(*view)
        for row, mirrored in ((0, False), (1, True)):
            grid = last.shape[-2:]
            flat = [f[row].reshape(len(f[row]), -1) for f in (low, high, last)]
            cam = np.maximum(weights["head.classifier.weight"] @ flat[2], 0)
            scores = np.maximum(cam - 1e-5, 0) / (cam.max(1, keepdims=True) + 1e-5)
            best = scores.max(0, keepdims=True)
            evidence = np.concatenate([1 - best, np.where(scores == best, scores, 0)])
            parts = [np.repeat(colour[:, None], flat[0].shape[1], 1)]
            for name, level in (("pcm.low.weight", flat[0]), ("pcm.high.weight", flat[1])):
                parts.append(np.maximum(weights[name] @ level, 0))
            found = pcm(evidence, weights["pcm.keys.weight"] @ np.concatenate(parts))
            found = enlarged(enlarged(found[1:].reshape(K, *grid), view, aligned=True), SIZE)
            total += found[..., ::-1] if mirrored else found
    np.testing.assert_allclose(seeds(recipe, method), over_range(total), atol=1e-4)
