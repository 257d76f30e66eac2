"""SEAM's claims: maps follow the image, and PCM moves evidence between alike pixels alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.data.drawing import CLASSES, draw
from weakseg.errors import UserError
from weakseg.methods import Batch, Method, build, resolve
from weakseg.methods.seam import SEAM, Keys, PixelCorrelation, _target
from weakseg.networks.backbone import Level, backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells, View, gate, normalise_min_max

STRIDE, K = 8, 3
MIDDLE = 3.5  # of the pixels that a cell averages
KINDS: tuple[Keys, ...] = ("features", "learned", "published")


class Fake(nn.Module):
    """A backbone whose cells are the mean of their pixels: equivariant but for blur."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = tuple(Level(f"C{i}", 3, STRIDE) for i in (1, 2, 3))
        self.weight = nn.Parameter(torch.eye(3)[..., None, None])

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        return (Cells((STRIDE, STRIDE), (MIDDLE, MIDDLE)),) * 3

    def forward(self, images: Tensor) -> list[Tensor]:
        cells = F.conv2d(F.avg_pool2d(images, STRIDE), self.weight)
        return [cells, cells, cells]


def seam(**config: object) -> SEAM:
    model = build({"name": "seam", **config}, Fake, K)  # type: ignore[arg-type]
    assert isinstance(model, SEAM)
    return model


def smooth(count: int, side: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [torch.sin(x / 17 + i) + torch.cos(y / 23 + x / 40 * i) for i in range(count)]
    return torch.stack(waves)[:, None].float().expand(-1, 3, -1, -1) * torch.rand(1, 3, 1, 1)


def batch_of(count: int = 2, side: int = 64) -> Batch:
    tags = torch.zeros(count, K)
    tags[:, 0] = tags[0, 2] = 1
    return Batch(smooth(count, side), tags, [""] * count)


# -- views


@pytest.mark.parametrize("size", [96, 48, 32])
@pytest.mark.parametrize(
    "moves",
    [
        (False, 0, 0),
        (True, 0, 0),
        (False, 25, 0),
        (False, 0, 0.2),
        (True, 180, 0.1),
    ],
)
def test_maps_of_a_view_come_back_to_where_they_were(size: int, moves: tuple):
    images = smooth(4, 96)
    view = View.draw(images, size, *moves)
    maps = F.avg_pool2d(images, STRIDE)
    back, inside = view.back(F.avg_pool2d(view.of(images), STRIDE), 96, (12, 12), STRIDE, MIDDLE)
    error = (back - maps).abs()[:, :, 2:-2, 2:-2] * inside[:, :, 2:-2, 2:-2]
    # A wrong place, sign or order is off by as much as another image is; coarse views by less.
    chance = (maps.roll(1, 0) - maps).abs().mean()
    assert error.mean() < chance * {96: 0.03, 48: 0.15, 32: 0.3}[size]
    assert inside.mean() > 0.4
    if not moves[1] and not moves[2]:
        assert inside[:, :, 1:-1, 1:-1].all()


def test_a_view_without_moves_only_shrinks():
    images = smooth(2, 64)
    view = View.draw(images, 32, False, 0, 0)
    assert view.theta is None
    wanted = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(view.of(images), wanted)


def test_views_differ_between_images_and_derive_from_the_seed():
    images = smooth(8, 32)
    first, again = (
        (torch.manual_seed(3), View.draw(images, 32, True, 20, 0.1).theta)[1] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert len(first.flatten(1).unique(dim=0)) == 8
    linear, shift = first[:, :, :2], first[:, :, 2]
    torch.testing.assert_close(torch.linalg.det(linear).abs(), torch.ones(8))
    assert shift.abs().max() <= 0.2
    assert {-1, 1} == set(torch.linalg.det(linear).round().int().tolist())


# -- the pixel correlation module


def reference(maps: np.ndarray, keys: np.ndarray, power: float) -> np.ndarray:
    """PCM pixel by pixel: (C, N) maps and (D, N) keys."""
    pixels = maps.shape[1]
    out = np.zeros_like(maps)
    for j in range(pixels):
        weights = np.zeros(pixels)
        for i in range(pixels):
            length = np.linalg.norm(keys[:, i]) * np.linalg.norm(keys[:, j])
            weights[i] = max(0.0, keys[:, i] @ keys[:, j] / length) ** power
        out[:, j] = maps @ (weights / weights.sum())
    return out


def pcm_inputs(side: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, side), (3, 4 * side), (5, 2 * side), (7, side))
    return tuple(torch.rand(2, c, s, s, generator=generator) for c, s in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_pcm_is_the_formula(kind: Keys, power: float):
    module, (maps, image, low, high) = PixelCorrelation((5, 7), kind, power), pcm_inputs()
    with torch.no_grad():
        found = module(maps, image, low, high)
        parts = [image, low, high]
        if kind != "features":
            parts = [image, module.low(low), module.high(high)]
        if kind == "published":
            parts[1:] = [part.clamp(min=0) for part in parts[1:]]
        parts = [F.interpolate(p, (6, 6), mode="bilinear", align_corners=True) for p in parts]
        if kind != "published":
            lengths = [p.square().sum(1).sqrt().mean((1, 2)) for p in parts]
            parts = [p / n[:, None, None, None] for p, n in zip(parts, lengths, strict=True)]
        keys = torch.cat(parts, 1)
        if kind != "features":
            keys = module.keys(keys)
        if kind != "published":
            keys = keys - keys.mean((2, 3), keepdim=True)
    for i in range(2):
        wanted = reference(maps[i].flatten(1).numpy(), keys[i].flatten(1).numpy(), power)
        np.testing.assert_allclose(found[i].flatten(1).numpy(), wanted, atol=2e-5)


def test_pcm_in_blocks_is_the_same_with_the_same_gradients():
    found = []
    for block in (None, 7, 1):
        torch.manual_seed(0)
        module = PixelCorrelation((5, 7), "learned", 2.0, block)
        out = module(*pcm_inputs())
        (out * torch.linspace(0, 1, 36).reshape(6, 6)).sum().backward()
        found.append((out.detach(), *(p.grad for p in module.parameters())))
    for other in found[1:]:
        for mine, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pcm_keeps_the_range_and_a_constant_map(kind: Keys):
    module, (maps, *rest) = PixelCorrelation((5, 7), kind), pcm_inputs()
    with torch.no_grad():
        found = module(maps, *rest)
        assert found.min() >= maps.min() - 1e-4 and found.max() <= maps.max()
        flat = module(torch.full_like(maps, 0.5), *rest)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5), atol=1e-4, rtol=0)


def test_keys_that_are_not_the_published_tell_pixels_apart_from_the_start():
    """Published ones need training: any two pixels of positive features nearly agree."""
    _, image, low, high = pcm_inputs()
    maps = torch.zeros(2, 36, 6, 6)
    maps.flatten(2)[:] = torch.eye(36)
    shares = {}
    for kind in KINDS:
        with torch.no_grad():
            weights = PixelCorrelation((5, 7), kind)(maps, image, low, high).flatten(2)
        shares[kind] = (1 / weights.square().sum(1)).mean() / 36
    assert max(shares["features"], shares["learned"]) < 0.6 < 0.9 < shares["published"]


def test_pixels_that_look_alike_share_their_evidence():
    module = PixelCorrelation((2, 2), "published")
    image = torch.zeros(1, 3, 4, 4)
    sides = torch.zeros(1, 2, 4, 4)
    sides[:, 0, :, :2] = sides[:, 1, :, 2:] = 1.0
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 1, 1] = 1.0  # one pixel of the left half is known
    with torch.no_grad():
        for convolution in (module.low, module.high):
            convolution.weight.zero_()
            convolution.weight[0, 0] = convolution.weight[1, 1] = 1
        module.keys.weight.zero_()
        module.keys.weight[0, 3] = module.keys.weight[1, 4] = 1
        found = module(maps, image, sides, sides)[0, 0]
    torch.testing.assert_close(found[:, :2], torch.full((4, 2), 1 / 8), atol=1e-3, rtol=0)
    assert found[:, 2:].abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["learned", "published"])
def test_pcm_learns_through_the_affinity_alone(kind: Keys):
    module = PixelCorrelation((5, 7), kind)
    inputs = [t.requires_grad_() for t in pcm_inputs()]
    module(*inputs).square().sum().backward()
    assert all(t.grad is None for t in inputs)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    # With one map value everywhere the affinity cannot matter, so nothing is learnt.
    module.zero_grad()
    maps, *rest = pcm_inputs()
    module(torch.ones_like(maps), *rest).square().sum().backward()
    assert all(p.grad.abs().max() < 1e-4 for p in module.parameters())


# -- losses


@pytest.mark.parametrize("moves", [{"scale": 0.5}, {"scale": 1.0, "flip": True}])
def test_an_equivariant_network_has_no_equivariance_loss(moves: dict, monkeypatch):
    model, batch = seam(**moves), batch_of(2, 128)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.zeros(size))  # every image is mirrored
    assert model.losses(batch, 0.0)["er"] < 0.02
    monkeypatch.setattr(View, "back", lambda self, maps, *_: (astray(maps), torch.ones(1)))
    assert model.losses(batch, 0.0)["er"] > 0.04, "what the loss is without the way back"


class Looking(Fake):
    """Cells that are the mean of the pixels around the one where they begin, as with padding."""

    offset = -0.5  # half of the eight pixels lie before it

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        return (Cells((STRIDE, STRIDE), (self.offset, self.offset)),) * 3

    def forward(self, images: Tensor) -> list[Tensor]:
        half = STRIDE // 2
        return super().forward(
            F.pad(images, (half, half, half, half), mode="replicate")[..., :-half, :-half]
        )


def test_maps_are_compared_where_the_networks_cells_lie():
    """The same network, whose cells are said to lie elsewhere, is thought not to be equivariant."""
    batch, found = batch_of(2, 128), []
    for offset in (Looking.offset, MIDDLE):
        backbone = Looking()
        backbone.offset = offset
        model = build({"name": "seam", "scale": 0.5}, lambda made=backbone: made, K)
        assert isinstance(model, SEAM)
        found.append(float(model.losses(batch, 0.0)["er"].detach()))
    assert found[0] < 0.5 * found[1]


def test_pcm_compares_what_lies_at_its_cells():
    """Cells of 4 px whose centres are the pixels 1, 5, 9 ...; levels of 2 px with centres 0, 2 ..."""
    module = PixelCorrelation((5, 7), "features")
    maps, image, low, high = (
        torch.rand(1, 4, 6, 6),
        *(torch.rand(1, c, s, s) for c, s in ((3, 24), (5, 12), (7, 6))),
    )
    own, finer = Cells((4, 4), (1, 1)), Cells((2, 2), (0, 0))
    found = module(maps, image, low, high, (own, finer, own))
    between = (low + low.roll(-1, 3)) / 2  # pixels 1, 3, 5 ... lie between two of its cells
    between = (between + between.roll(-1, 2)) / 2
    wanted = module(maps, image[..., 1::4, 1::4], between[..., ::2, ::2], high)
    torch.testing.assert_close(found, wanted)


def astray(maps: Tensor) -> Tensor:
    """Small maps mirrored though their view was not, and the other way round."""
    return F.interpolate(maps.flip(-1) if maps.shape[-1] < 16 else maps, (16, 16))


def test_losses_are_the_formulas_on_equal_views():
    model = seam(scale=1.0, keys="learned", minimum=1, translation=1e-9)
    batch = batch_of()
    with torch.no_grad():
        found = model.losses(batch, 0.0)
        maps, revised = model._maps(batch.images, batch.tags)
    y = batch.tags
    p = maps.mean((2, 3))
    cls = -(y * p.sigmoid().log() + (1 - y) * (-p).sigmoid().log()).mean()
    torch.testing.assert_close(found["cls"], cls)

    ecr, low = 0.0, 0.0
    plain = gate(normalise_min_max(maps.relu()), y)
    for b in range(2):
        flat = plain[b].flatten(1).numpy()
        target = np.where(flat == flat.max(0), flat, 0)
        target = np.concatenate([1 - flat.max(0, keepdims=True), target])
        mine = revised[b].flatten(1)
        mine = (mine - mine.min(1, keepdim=True)[0]) / (
            mine.max(1, keepdim=True)[0] - mine.min(1, keepdim=True)[0] + 1e-5
        )
        mine = mine.numpy() * np.array([1, *y[b].tolist()])[:, None]
        differences = np.sort(np.abs(target - mine).ravel())[::-1]
        ecr += 2 * differences[: int(0.2 * len(differences))].mean() / 2
        best = np.sort((revised[b, 1:].flatten(1).numpy() * y[b][:, None].numpy()).max(0))
        low += best[: len(best) // 4].mean() / 2
    assert float(found["ecr"]) == pytest.approx(ecr, rel=1e-4)
    assert float(found["min"]) == pytest.approx(low, rel=1e-4)
    assert set(found) == set(model.terms) == {"cls", "er", "ecr", "min"}


def aligned(maps: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with aligned corners, (..., n, n) -> (..., size, size), as a matrix on each side."""
    count = maps.shape[-1]
    matrix = np.zeros((size, count))
    for i in range(size):
        at = i * (count - 1) / (size - 1)
        low = min(int(at), count - 2)
        matrix[i, low], matrix[i, low + 1] = 1 - (at - low), at - low
    return matrix @ maps @ matrix.T


def over_range(maps: np.ndarray) -> np.ndarray:
    maps = np.maximum(maps, 0)
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return np.maximum(maps - low - 1e-5, 0) / (high - low + 1e-5)


def behind_background(maps: np.ndarray) -> np.ndarray:
    """H of (K, n, n)."""
    best = maps.max(0, keepdims=True)
    return np.concatenate([1 - best, np.where(maps == best, maps, 0)])


def test_the_published_form_is_the_codes_in_pixels():
    """A crop of 70 px at .3: view 2 has 21 px, no whole number of cells of 8."""
    side, small = 70, 21
    model, batch = seam(preset="paper", dropout=0.0), batch_of(2, side)
    images, y = batch.images, batch.tags.numpy()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        found = model.losses(batch, 0.0)
        maps = [model._maps(x) for x in (images, seen[1])]
    assert [m[0].shape[-1] for m in maps] == [8, 2]
    np.testing.assert_allclose(seen[1], aligned(images.numpy(), small), atol=1e-6)
    plain1, y1 = (aligned(m.numpy(), side) for m in maps[0])
    plain2, y2 = (aligned(m.numpy(), small) for m in maps[1])

    def soft_margin(logits: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-logits))
        return -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))

    cls = (soft_margin(plain1.mean((2, 3))) + soft_margin(plain2.mean((2, 3)))) / 2
    assert float(found["cls"]) == pytest.approx(cls, rel=1e-5)
    tagged, all_tagged = y[:, :, None, None], np.pad(y, ((0, 0), (1, 0)), constant_values=1)
    n1, n2 = aligned(over_range(plain1), small) * tagged, over_range(plain2) * tagged
    assert float(found["er"]) == pytest.approx(np.abs(n1 - n2).mean(), rel=1e-4)
    v1 = aligned(over_range(y1), small) * all_tagged[:, :, None, None]
    v2 = over_range(y2) * all_tagged[:, :, None, None]
    ecr, low = 0.0, 0.0
    for b in range(2):
        for mine, theirs in ((v1[b], n2[b]), (v2[b], n1[b])):
            differences = np.sort(np.abs(behind_background(theirs) - mine).ravel())[::-1]
            ecr += differences[: int(0.2 * len(differences))].mean() / 2
        for revised in (y1[b], y2[b]):
            best = np.sort((revised[1:] * tagged[b]).max(0).ravel())
            low += best[: len(best) // 4].mean() / 4
    assert float(found["ecr"]) == pytest.approx(ecr, rel=1e-4)
    assert float(found["min"]) == pytest.approx(low, rel=1e-4)


def test_published_seeds_are_as_large_as_their_input():
    """So that whoever enlarges them further starts from pixels, as the code does."""
    model, images = seam(preset="paper").eval(), smooth(1, 70)
    with torch.no_grad():
        _, revised = model._maps(images)
        found = model(images)
    assert revised is not None and revised.shape[-1] == 8
    np.testing.assert_allclose(found.scores, aligned(revised[:, 1:].numpy(), 70), atol=1e-5)


def test_the_preset_is_the_published_form_and_gives_way_to_keys_beside_it():
    paper = resolve({"name": "seam", "preset": "paper", "dropout": 0.1})[1]
    assert isinstance(paper, SEAM.Config)
    assert (paper.keys, paper.rivals, paper.compare) == ("published", "all", "pixels")
    assert (paper.scale, paper.minimum, paper.power, paper.levels) == (0.3, 1, 1, (-3, -2))
    assert paper.dropout == 0.1
    assert SEAM.Config.model_validate(paper.model_dump(mode="json")) == paper
    with pytest.raises(UserError, match="compare: cells"):
        seam(preset="paper", flip=True)


def test_targets_are_copies_without_gradient():
    scores = torch.rand(2, K, 5, 5, requires_grad=True)
    kept = scores.detach().clone()
    target = _target(scores)
    assert not target.requires_grad
    target.mul_(0)
    assert torch.equal(scores.detach(), kept)
    assert _target(scores).count_nonzero(1).max() == 2  # the background and one class


@pytest.mark.parametrize(
    ("config", "terms"),
    [
        ({"keys": "published", "minimum": 1}, ("cls", "er", "ecr", "min")),
        ({"keys": "learned"}, ("cls", "er", "ecr")),
        ({"keys": "learned", "er": 0}, ("cls", "ecr")),
        ({"pcm": False}, ("cls", "er")),
        ({}, ("cls", "er")),
        ({"er": 0}, ("cls",)),
    ],
)
def test_each_loss_can_be_off(config: dict, terms: tuple[str, ...]):
    model = seam(**config)
    assert tuple(model.losses(batch_of(), 0.0)) == model.terms == terms
    assert model.heads == (("pcm", "cam") if config.get("pcm", True) else ("cam",))
    assert model(torch.randn(1, 3, 32, 32)).kind == ("unit" if "pcm" in model.heads else "logit")


@pytest.mark.parametrize(
    "config", [{"pcm": False, "ecr": 1}, {"minimum": 1}, {"keys": "learned", "ecr": 0}]
)
def test_settings_that_contradict_each_other_are_refused(config: dict):
    with pytest.raises(UserError, match="PCM's projections"):
        seam(**config)


def test_a_view_that_is_the_image_is_refused():
    with pytest.raises(UserError, match="both views are the same"):
        seam(scale=1)
    with pytest.raises(UserError, match="count from the last: -1 to -3"):
        seam(levels=(-4, -1))


def test_views_keep_their_places_in_half_precision():
    images = smooth(4, 96)
    view = View.draw(images, 64, True, 30, 0.1)
    maps = F.avg_pool2d(images, STRIDE)
    exact = view.of(images), *view.back(maps, 96, (12, 12), STRIDE, MIDDLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = view.of(images), *view.back(maps, 96, (12, 12), STRIDE, MIDDLE)
    torch.testing.assert_close(half, exact)


@pytest.mark.parametrize(
    ("crop", "scale", "size"),
    [
        (448, None, 136),
        (192, None, 96),
        (320, None, 96),
        (128, None, 96),
        (64, None, 48),
        (192, 0.3, 56),
        (64, 0.05, 8),
    ],
)
def test_the_second_view_is_a_whole_number_of_cells(crop: int, scale: float | None, size: int):
    assert seam(scale=scale)._view_size(crop) == size


@pytest.mark.parametrize(("crop", "size"), [(448, 134), (128, 38), (70, 21), (2, 1)])
def test_the_second_view_of_the_published_form_is_cut_to_pixels(crop: int, size: int):
    assert seam(preset="paper")._view_size(crop) == size


def test_rivals_decide_what_pcm_spreads():
    plain = torch.tensor([[4.0, 0.0], [3.0, 1.0]])[None, :, :, None] * torch.ones(1, 2, 2, 2)
    evidence = {}
    for rivals in ("all", "predicted", "none"):
        model = seam(rivals=rivals)
        evidence[rivals] = model._evidence(plain, None)
        assert evidence[rivals].shape == (1, 3, 2, 2)
        torch.testing.assert_close(
            evidence[rivals][:, 0], 1 - evidence[rivals][:, 1:].amax(1), atol=1e-6, rtol=0
        )
    assert evidence["none"][0, 1:].count_nonzero() > evidence["all"][0, 1:].count_nonzero()
    assert evidence["predicted"][:, 1:].amax() < 1


def test_without_rivals_tags_change_nothing_but_the_background():
    model, images = seam(rivals="none"), smooth(2, 64)
    plain, free = model._maps(images)
    _, tagged = model._maps(images, torch.tensor([[1.0, 0, 0], [1, 0, 1]]))
    assert torch.equal(tagged[:, 1], free[:, 1])
    assert tagged[:, 2].abs().max() == 0
    assert (tagged[:, 0] >= free[:, 0] - 1e-6).all()
    assert (tagged[0, 0] > free[0, 0] + 0.01).any()


# -- the claim, on shapes


def shapes(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 64, 64), and their tags."""
    images, tags = [], torch.zeros(count, len(CLASSES))
    for i in range(count):
        drawing = draw(0, start + i)
        images.append(torch.from_numpy(drawing.image).permute(2, 0, 1).float() / 127.5 - 1)
        tags[i, [CLASSES.index(t) for t in drawing.tags]] = 1
    return F.interpolate(torch.stack(images), (64, 64), mode="area"), tags


def equivariance_error(model: Method, images: Tensor, tags: Tensor) -> float:
    view = View(32)
    with torch.inference_mode():
        whole, part = (model(x, "cam").scores.relu() for x in (images, view.of(images)))
    stride, grid = model.backbone.levels[-1].stride, tuple(whole.shape[-2:])
    back, _ = view.back(normalise_min_max(part), 64, grid, stride)  # type: ignore[arg-type]
    return (normalise_min_max(whole) - back).abs()[tags > 0].mean().item()


def test_training_lowers_the_equivariance_error_below_cams():
    images, tags = shapes(64)
    unseen, their_tags = shapes(32, start=1000)
    spec = BackboneSpec(name="test_resnet", pretrained=False, output_stride=8)
    errors = {}
    for name, config in (("cam", {}), ("seam", {"scale": 0.5})):
        torch.manual_seed(0)
        model = build({"name": name, **config}, backbone_factory(spec), len(CLASSES))
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(60):
            rows = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(step))
            terms = model.losses(Batch(images[rows], tags[rows], [""] * 8), step / 60)
            optimiser.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimiser.step()
        errors[name] = equivariance_error(model.eval(), unseen, their_tags)
    assert errors["seam"] < 0.9 * errors["cam"]
