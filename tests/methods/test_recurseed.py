"""RecurSeed's claims: targets grow by features and colours, and short runs do not collapse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.data.drawing import CLASSES, draw
from weakseg.errors import UserError
from weakseg.methods import Batch, build, needs_segmenter, resolve
from weakseg.methods.recurseed import PRESETS, RecurSeed
from weakseg.mixing import Scene, mixes, present, settle_mix
from weakseg.mixing.edgepredictmix import PRESETS as EDGEPREDICTMIX
from weakseg.networks.backbone import Level, backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells, gate, normalise_max
from weakseg.recipe import load_recipe, shipped_recipes

K = 3
IGNORE = 255


class Fake(nn.Module):
    """A backbone whose levels are the colours of the image, at strides 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = (Level("C1", 3, 4), Level("C2", 3, 8))
        self.weight = nn.Parameter(torch.eye(3)[..., None, None])

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        return tuple(Cells.spanning(size, (size[0] // s, size[1] // s)) for s in (4, 8))

    def pictures(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(images * 0.25 + 0.5, size)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [F.conv2d(F.avg_pool2d(images, s), self.weight) for s in (4, 8)]


def recurseed(fake: bool = True, **config: object) -> RecurSeed:
    spec = BackboneSpec(name="test_resnet", pretrained=False, options={"zero_init_last": False})
    make = Fake if fake else backbone_factory(spec)
    section = {"name": "recurseed", "channels": 8, "dilations": (1, 2, 3), **config}
    model = build(section, make, K)  # type: ignore[arg-type]
    assert isinstance(model, RecurSeed)
    return model


def two_tones(side: int = 64) -> Tensor:
    """Grey, and a red bar over three quarters of its width; normalised as Fake expects."""
    image = torch.full((3, side, side), 0.3)
    image[:, 16:48, 8:56] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return ((image - 0.5) / 0.25)[None]


def seen_at_its_end(side: int = 64) -> Tensor:
    """A CAM at stride 8 that lights up the left end of the bar alone."""
    cam = torch.full((1, K, side // 8, side // 8), -1.0)
    cam[0, 1, 2:6, 1:3] = 4.0
    return cam


def tags_of(*present: int, count: int = 1) -> Tensor:
    tags = torch.zeros(count, K)
    tags[:, list(present)] = 1
    return tags


def target_of(model: RecurSeed, cams: Tensor, tags: Tensor) -> Tensor:
    images = two_tones()
    size = 64 // model.config.detail
    return model._target(
        cams, tags, model.backbone(images), model.backbone.pictures(images, (size, size)), (64, 64)
    )


BAR = (slice(8, 24), slice(4, 28))  # the bar on the grid of labels, 2 pixels in a cell


def test_the_target_spreads_over_the_whole_object_and_ends_with_it():
    model = recurseed(levels=1)
    with torch.no_grad():
        target = target_of(model, seen_at_its_end(), tags_of(1))
        labels = model._labels(target)[0]
    assert target.shape == (1, K, 32, 32)
    assert (labels[BAR] == 2).float().mean() > 0.9
    outside = labels.clone()
    outside[BAR] = 0
    assert (outside == 2).float().mean() < 0.02
    assert not target[:, [0, 2]].any()


def test_without_operators_the_target_is_the_cam_at_another_size():
    model = recurseed(scg=False, pamr=False, detail=8)
    with torch.no_grad():
        target = target_of(model, seen_at_its_end(), tags_of(1))
    expected = (seen_at_its_end().relu() / 4)[:, 1]
    torch.testing.assert_close(target[:, 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("renormalise", [True, False])
def test_refined_targets_reach_one_again(renormalise: bool):
    model = recurseed(scg=False, renormalise=renormalise)
    with torch.no_grad():
        target = target_of(model, seen_at_its_end(), tags_of(1))
    assert (target.max() > 0.999) == renormalise


def test_more_tagged_classes_in_one_image_than_in_another():
    """Only as many maps as the most tagged image has are refined: they come back to their places."""
    model = recurseed(scg=False, pamr=False, detail=8)
    torch.manual_seed(0)
    cams, images = torch.rand(3, K, 8, 8), two_tones().expand(3, -1, -1, -1)
    tags = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 0, 0]])
    with torch.no_grad():
        pictures = model.backbone.pictures(images, (8, 8))
        target = model._target(cams, tags, model.backbone(images), pictures, (64, 64))
    expected = cams / (cams.amax((2, 3), keepdim=True) + 1e-5) * tags[..., None, None]
    torch.testing.assert_close(target, expected, atol=1e-4, rtol=0)


def test_labels_are_certain_foreground_certain_background_or_unsure():
    target = torch.zeros(1, K, 1, 5)
    target[0, 0, 0] = torch.tensor([0.56, 0.54, 0.3, 0.21, 0.19])
    target[0, 2, 0] = torch.tensor([0.7, 0.2, 0.56, 0.0, 0.0])
    assert recurseed()._labels(target).tolist() == [[[3, IGNORE, 3, IGNORE, 0]]]
    assert recurseed()._labels(torch.zeros(1, K, 2, 2)).eq(0).all()


def test_cross_entropy_weighs_foreground_and_background_alike():
    logits = torch.zeros(1, K + 1, 1, 5)
    logits[0, 0] = torch.tensor([2.0, 2, 2, 2, 9])
    labels = torch.tensor([[[0, 0, 0, 1, IGNORE]]])
    right, wrong = F.cross_entropy(logits[..., :4], labels[..., :4], reduction="none")[0, 0, 2:]
    balanced = recurseed(among="all")._cross_entropy(logits, labels, tags_of(0))
    torch.testing.assert_close(balanced, (right + wrong) / 2)
    plain = recurseed(balance=False, among="all")._cross_entropy(logits, labels, tags_of(0))
    torch.testing.assert_close(plain, (3 * right + wrong) / 4)
    assert recurseed()._cross_entropy(logits, torch.full_like(labels, IGNORE), tags_of(0)) == 0


def test_cross_entropy_is_among_the_classes_of_the_image():
    torch.manual_seed(0)
    logits = torch.randn(1, K + 1, 1, 6)
    labels = torch.tensor([[[0, 0, 2, 2, 0, IGNORE]]])
    model = recurseed(balance=False)
    own = F.cross_entropy(logits[:, [0, 2]], labels.clamp(max=1).where(labels < 9, IGNORE),
                          ignore_index=IGNORE)  # fmt: skip
    torch.testing.assert_close(model._cross_entropy(logits, labels, tags_of(1)), own)
    # A class that is labelled but not tagged takes part too: its loss is no penalty of the mask.
    torch.testing.assert_close(model._cross_entropy(logits, labels, tags_of()), own)
    more = model._cross_entropy(logits, labels, tags_of(0, 1, 2))
    assert more > own
    torch.testing.assert_close(more, F.cross_entropy(logits, labels, ignore_index=IGNORE))


def test_a_cam_that_is_its_target_has_nothing_to_learn():
    model = recurseed()
    cams = seen_at_its_end()
    maps = {"rs": (cams.relu() / 4)}
    scene = Scene(two_tones(), tags_of(1), torch.zeros(1, 8, 8, dtype=torch.long), maps)
    terms = model._of_targets(cams, torch.zeros(1, K + 1, 16, 16), scene)
    assert terms["rec"] < 1e-4
    more = cams.clone()
    more[0, 1] = 4.0
    assert model._of_targets(more, torch.zeros(1, K + 1, 16, 16), scene)["rec"] > 0.5


@pytest.mark.parametrize("mix", [None, "edgepredictmix"])
def test_terms_start_when_their_time_has_come(mix: str | None):
    model = recurseed(False, mix=mix, start=0.2, mix_start=0.6)
    batch = Batch(two_tones().repeat(2, 1, 1, 1), tags_of(1, count=2), ["a", "b"])
    assert set(model.losses(batch, 0.19)) == {"cls"}
    assert set(model.losses(batch, 0.2)) == {"cls", "seg", "rec"}
    late = {"cls", "seg", "rec"} | ({"mix_seg", "mix_rec"} if mix else set())
    assert set(model.losses(batch, 0.6)) == late


@pytest.mark.parametrize("side", [42, 49])
def test_crops_that_the_stride_does_not_divide_train_too(side: int):
    model = recurseed(fake=False, teacher=0.9)
    batch = Batch(torch.randn(2, 3, side, side), tags_of(0, count=2), [""] * 2)
    terms = model.losses(batch, 0.9)
    assert set(terms) == set(model.terms)
    assert all(term.isfinite() for term in terms.values())
    assert batch.images.shape[-1] == side


def test_a_class_without_evidence_is_no_target():
    """Its map is all negative: an empty seed, so nothing is asked of the CAM, nor of the decoder."""
    model = recurseed()
    cams = torch.full((1, K, 8, 8), -1.0)
    with torch.no_grad():
        target = target_of(model, cams, tags_of(0, 1))
    assert not target.any()
    assert target.isfinite().all()


def test_targets_are_made_in_full_precision():
    model = recurseed(False, levels=1)
    images = two_tones()
    batch = Batch(images, tags_of(1), ["a"])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        levels = model.backbone(images)
        cams = model.head(levels[-1])
        scene = model._scene(batch, cams, levels, model.decoder.decode(images, levels))
    assert scene.maps["rs"].dtype == scene.probabilities.dtype == torch.float32


def test_a_short_run_on_shapes_does_not_collapse():
    """Three groups of shapes-v1 by their bodies; targets that are mostly background, and sparse.

    The decoder must not predict background alone, and the CAM must not shrink to points.
    """
    drawings = [draw(0, i, 64) for i in range(24)]
    group = torch.tensor([0] + [1 + i // 3 for i in range(len(CLASSES))])
    masks = torch.stack([group[torch.from_numpy(d.mask).long()] for d in drawings])
    tags = torch.stack([present(m[None], K)[0, 1:].float() for m in masks])
    pixels = torch.stack([torch.from_numpy(d.image) for d in drawings]).permute(0, 3, 1, 2) / 255
    torch.manual_seed(0)
    model = recurseed(False, start=0.5, foreground=0.55, background=0.1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.backbone.mean, model.backbone.std))
    images = (pixels - mean) / std
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wide = []
    for step in range(80):
        chosen = torch.randint(len(images), (12,))
        optimiser.zero_grad()
        batch = Batch(images[chosen], tags[chosen], [""] * 12)
        torch.stack(list(model.losses(batch, step / 80).values())).sum().backward()
        optimiser.step()
        if step in (39, 79):
            with torch.no_grad():
                cams = gate(normalise_max(model(images, "cam").scores), tags)
            wide.append((cams.amax(1) > 0.3).float().mean())
    model.eval()
    with torch.no_grad():
        maps = model(images)
    scores = gate(maps.scores, tags)
    found = scores.amax(1) > maps.background[:, 0]
    right = found & (scores.argmax(1) + 1 == masks)
    assert right[masks > 0].float().mean() > 0.5
    assert 0.05 < found.float().mean() < 0.8
    assert wide[1] > 0.5 * wide[0]


@pytest.mark.parametrize("among", ["tagged", "all"])
def test_mixes_choose_by_the_probabilities_that_the_decoder_is_trained_to_give(among: str):
    torch.manual_seed(0)
    model, images = recurseed(False, among=among), two_tones()
    with torch.no_grad():
        levels = model.backbone(images)
        logits = model.decoder.decode(images, levels)
        logits[:, 1] += 9  # a class that is not tagged, and that nothing has taught
        scene = model._scene(
            Batch(images, tags_of(1), ["a"]), model.head(levels[-1]), levels, logits
        )
    own = scene.probabilities[:, [0, 2]].sum(1)
    assert own.allclose(torch.ones(())) == (among == "tagged")


# -- where cells lie


class Shifted(Fake):
    """Its cells look at the first pixel of those that they cover, as with zero padding."""

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        return tuple(Cells((s, s), (0, 0)) for s in (4, 8))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [F.conv2d(images[..., ::s, ::s], self.weight) for s in (4, 8)]


def middle(maps: Tensor) -> tuple[float, float]:
    """Row and column of the centre of mass, in cells."""
    rows, columns = (maps.sum(axis) for axis in (1, 0))
    pairs = ((rows, torch.arange(len(rows))), (columns, torch.arange(len(columns))))
    return tuple(float((m * n).sum() / m.sum()) for m, n in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize("place", ["cells", "stretch"])
@pytest.mark.parametrize("scg", [False, True])
def test_targets_and_what_is_compared_with_them_lie_where_the_cells_look(place: str, scg: bool):
    section = {"name": "recurseed", "channels": 8, "dilations": (1, 2, 3), "place": place}
    model = build({**section, "scg": scg, "pamr": False, "detail": 1}, Shifted, K)
    assert isinstance(model, RecurSeed)
    images = torch.full((1, 3, 64, 64), -1.0)
    images[:, 0, 30:35, 38:43] = 2.0  # around the pixel that cell (4, 5) of the last level looks at
    cams = torch.full((1, K, 8, 8), -1.0)
    cams[0, 1, 4, 5] = 4.0
    tags = tags_of(1)
    with torch.no_grad():
        pictures = model.backbone.pictures(images, (64, 64))
        levels = model.backbone(images)
        target = model._target(cams, tags, levels, pictures, (64, 64))
    shift = 0 if place == "cells" else 3.5
    assert middle(target[0, 1]) == pytest.approx((32 + shift, 40 + shift), abs=1e-3)
    # A CAM that is its target has little to learn, and of the decoder's cells the same holds.
    logits = torch.zeros(1, K + 1, 16, 16)
    logits[0, 2, 8, 10] = 1.0
    scene = Scene(images, tags, model._labels(target), {"rs": target})
    assert middle(model._logits(logits, images, target)[0, 2]) == pytest.approx(
        (32 + (shift and 1.5), 40 + (shift and 1.5)), abs=1e-3
    )
    wrong = [
        model._of_targets(cams.roll((by, by), (2, 3)), logits, scene)["rec"] for by in (0, -1, 1)
    ]
    assert wrong[0] < 0.5 * min(wrong[1:])
    assert wrong[1] == pytest.approx(float(wrong[2]), rel=1e-4)


# -- the talk


def scg_of_the_talk(cam: np.ndarray, levels: list[np.ndarray]) -> np.ndarray:
    """M of one image, (K, h, w), from maps in [0, 1] and levels (C, h, w) of their size."""
    hsc = 0
    for level in levels:
        unit = level.reshape(len(level), -1)
        unit = unit / np.linalg.norm(unit, axis=0)
        cosine = unit.T @ unit
        second = cosine @ cosine / len(cosine)
        second = second - second.min(1, keepdims=True)
        hsc = hsc + np.maximum(np.maximum(cosine, 0), second / second.max(1, keepdims=True))
    hsc, found = hsc / len(levels), []
    for scores in cam.reshape(len(cam), -1):
        lead = np.zeros(len(hsc))
        if (scores > 0.3).any():
            lead = hsc[scores > 0.3].mean(0) - hsc[scores < 0.05].mean(0)
        found.append(np.maximum(lead, 0))
    return np.stack(found).reshape(cam.shape)


def pamr_by_definition(picture: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """PAMR of one image on whole arrays: (3, h, w), (K, h, w)."""
    shifts = [(d * y, d * x) for d in (1, 2, 4, 8, 12, 24) for y in (-1, 0, 1) for x in (-1, 0, 1)]

    def shifted(array: np.ndarray, by: tuple[int, int]) -> np.ndarray:
        (height, width), (y, x) = array.shape[1:], by
        rows = np.arange(height).__add__(y).clip(0, height - 1)
        return array[:, rows][:, :, (np.arange(width) + x).clip(0, width - 1)]

    sigma = np.std([shifted(picture, s) for s in shifts], axis=0, ddof=1)
    around = [s for s in shifts if s != (0, 0)]
    weights = np.stack(
        [-(np.abs(picture - shifted(picture, s)) / (0.1 * sigma + 1e-8)).mean(0) for s in around]
    )
    weights = np.exp(weights - weights.max(0))
    weights /= weights.sum(0)
    for _ in range(10):
        maps = sum(w * shifted(maps, s) for w, s in zip(weights, around, strict=True))
    return maps


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    found = F.interpolate(torch.from_numpy(maps)[None], size, mode="bilinear", align_corners=False)
    return found[0].numpy()


def over_maximum(maps: np.ndarray) -> np.ndarray:
    return maps / (maps.max((1, 2), keepdims=True) + 1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_the_talks_terms_in_float64(given: bool, monkeypatch):
    """Every equation by itself: M, the certain pixels, the plain means of cross-entropy and rec."""
    torch.manual_seed(3)
    model = recurseed(preset="talk", dilations=(1, 2, 3)).eval()
    images = F.interpolate(torch.randn(2, 3, 6, 6), (48, 40), mode="bicubic")
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    cams = F.interpolate(torch.randn(2, K, 4, 4) * 2, (6, 5), mode="bicubic")
    logits = torch.randn(2, K + 1, 48, 40)
    targets = torch.rand(2, K, 48, 40).square() * tags[..., None, None]
    monkeypatch.setattr(model.head, "forward", lambda _: cams)
    monkeypatch.setattr(model.decoder, "decode", lambda *_: logits)
    if given:
        monkeypatch.setattr(model, "_target", lambda *_: targets)
    with torch.no_grad():
        levels = model.backbone(images)
    terms = model.losses(Batch(images, tags, ["a", "b"]), 0.5)

    certain, entropies, differences, unsure = [], [], [], 0
    for b in range(2):
        own = over_maximum(cams[b].double().relu().numpy()) * tags[b, :, None, None].numpy()
        if given:
            target = targets[b].double().numpy()
        else:
            of_levels = [resized(level[b].double().numpy(), (6, 5)) for level in levels]
            target = over_maximum(scg_of_the_talk(own, of_levels))
            picture = (images[b].double() * 0.25 + 0.5).numpy()
            target = pamr_by_definition(picture, resized(target, (48, 40)))
        best, labels = target.max(0), 1 + target.argmax(0)
        labels[best <= 0.55], labels[best < 0.10] = IGNORE, 0
        unsure += (labels == IGNORE).sum()
        log = logits[b].double().log_softmax(0).numpy()
        for y, x in zip(*np.nonzero(labels != IGNORE), strict=True):
            certain.append(labels[y, x])
            entropies.append(-log[labels[y, x], y, x])
        cells = target.reshape(K, 6, 8, 5, 8).mean((2, 4))
        differences.append(np.abs(own - cells))
    assert unsure and {0, 1, 2} <= set(certain)
    expected = {
        "cls": F.multilabel_soft_margin_loss(cams.double().mean((2, 3)), tags.double()),
        "seg": np.mean(entropies),
        "rec": np.mean(differences),
    }
    assert set(terms) == set(expected)
    for name, term in expected.items():
        assert float(terms[name]) == pytest.approx(float(term), rel=2e-4), name


def test_the_talk_has_no_departure_of_ours():
    _, config = resolve({"name": "recurseed+edgepredictmix", "preset": "talk"})
    default = resolve({"name": "recurseed+edgepredictmix"})[1].model_dump()
    found = config.model_dump()
    changed = {k: v for k, v in found.items() if v != default[k] and k not in ("preset", "mix")}
    assert changed == PRESETS["talk"]
    assert {k: v for k, v in found["mix"].items() if v != default["mix"][k]} == {
        "preset": "talk",
        **EDGEPREDICTMIX["talk"],
    }
    assert resolve({"name": "recurseed", **found})[1] == config


def test_keys_beside_the_preset_win():
    section = {"name": "recurseed", "preset": "talk", "detail": 2}
    _, config = resolve({**section, "mix": {"name": "edgepredictmix", "below": "given"}})
    assert config.detail == 2 and config.over == "all"  # type: ignore[attr-defined]
    assert config.mix["below"] == "given" and config.mix["vote"] == "all"  # type: ignore[attr-defined]
    for mix in ("cutmix", {"name": "cutmix"}, None):
        _, config = resolve({**section, "mix": mix})
        assert "preset" not in (config.mix or {})  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if "/rs_" in n])
def test_recipes_of_the_paper_are_the_talk(name: str):
    section = load_recipe(name).method
    assert section == {"name": section["name"], "preset": "talk"}


def test_published_probabilities_are_enlarged_by_nearest_neighbours():
    model, images = recurseed(False, preset="talk").eval(), torch.randn(1, 3, 44, 50)
    assert model.published_merging and not recurseed(False).published_merging
    with torch.no_grad():
        maps, padded = model(images), model.decoder.padded(images)
        logits = model.decoder.decode(padded, model.backbone(padded))
    blocks = logits.softmax(1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(maps.background, blocks[:, :1, :44, :50])
    torch.testing.assert_close(maps.scores, blocks[:, 1:, :44, :50])


# -- teacher and state


def test_a_teacher_makes_the_targets():
    model, images = recurseed(False, teacher=0.9, start=0), two_tones()
    model.eval().after_step(0.5)  # a copy of the start
    batch, scenes = Batch(images, tags_of(1), ["a"]), []
    with torch.no_grad():
        levels = model.backbone(images)
        cams, logits = model.head(levels[-1]), model.decoder.decode(images, levels)
        for factor in (1, 0):  # what the network itself says does not count
            scenes.append(model._scene(batch, factor * cams, levels, factor * logits))
    assert scenes[0].maps["rs"].any()
    assert torch.equal(scenes[0].maps["rs"], scenes[1].maps["rs"])
    assert torch.equal(scenes[0].probabilities, scenes[1].probabilities)


def test_a_teacher_moves_slowly():
    torch.manual_seed(0)
    model = recurseed(False, teacher=0.9, start=0)
    model.after_step(0.5)  # a copy of the start
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    model.after_step(0.5)
    own, teacher = model.head.classifier.weight, model._averaged().module.head.classifier.weight
    torch.testing.assert_close(own - teacher, torch.full_like(own, 0.9))
    assert not any("teacher" in name for name in model.state_dict())
    assert not any(p.requires_grad for p in model._averaged().parameters())


def test_the_teacher_waits_for_the_targets():
    model = recurseed(False, teacher=0.9, start=0.5)
    model.after_step(0.4)
    assert not model._teacher


@pytest.mark.parametrize("mix", [None, "cda"])
def test_training_state_goes_on(mix: str | None):
    torch.manual_seed(0)
    model, other = (recurseed(False, teacher=0.9, start=0, mix=mix, mix_start=0) for _ in range(2))
    batch = Batch(two_tones().repeat(2, 1, 1, 1), tags_of(1, count=2), ["a", "b"])
    model.losses(batch, 0.5)
    model.after_step(0.5)
    other.load_state_dict(model.state_dict())
    other.load_training_state(model.training_state())
    losses = []
    for one in (model, other):
        torch.manual_seed(1)
        losses.append(one.losses(batch, 0.6))
    assert losses[0] == losses[1]


def test_a_resumed_teacher_follows_the_network_to_its_device():
    """Checkpoints are read before the network is moved; the copy is no part of its modules."""
    model = recurseed(False, teacher=0.9, start=0)
    model.after_step(0.5)
    other = recurseed(False, teacher=0.9, start=0)
    other.load_training_state(model.training_state())
    other.to("meta")
    assert {p.device.type for p in other._averaged().parameters()} == {"meta"}


# -- names and settings


@pytest.mark.parametrize("mix", sorted(mixes))
def test_a_part_of_the_name_is_the_mix(mix: str):
    method, config = resolve({"name": f"recurseed+{mix}", "rec": 0.5})
    assert method is RecurSeed
    assert config.mix["name"] == mix and config.rec == 0.5  # type: ignore[attr-defined]


def test_a_part_can_be_tuned():
    _, config = resolve({"name": "recurseed+cda", "mix": {"capacity": 3}})
    assert config.mix["name"] == "cda" and config.mix["capacity"] == 3  # type: ignore[attr-defined]


def test_every_setting_of_the_mix_is_kept():
    """Else another default of the mix would pass for the training that is already there."""
    _, config = resolve({"name": "recurseed+edgepredictmix"})
    assert config.mix == settle_mix("edgepredictmix")  # type: ignore[attr-defined]
    assert {"name", "below", "order", "foreground"} <= set(config.mix)  # type: ignore[attr-defined]
    again = resolve({"name": "recurseed+edgepredictmix", **config.model_dump(mode="json")})[1]
    assert again == config


def test_unknown_parts_and_contradictions_are_refused():
    with pytest.raises(UserError, match="recurseed has no part 'cutmx'") as caught:
        resolve({"name": "recurseed+cutmx"})
    assert "cutmix" in str(caught.value.mend)
    for name in ("cam+vit", "cam+", "recurseed+"):
        with pytest.raises(UserError, match="has no part") as caught:
            resolve({"name": name})
        assert "(none)" not in str(caught.value.mend)
    for other in ("classmix", {"name": "classmix"}, None):
        with pytest.raises(UserError, match="contradict each other"):
            resolve({"name": "recurseed+cutmix", "mix": other})
    for wrong, message in (
        ({"foreground": 0.1, "background": 0.2}, "below foreground"),
        ({"seg": 0}, "learns from seg alone"),
        ({"mix": {"beta": 1}}, "needs a name"),
        ({"mix": {"name": "cutmix", "bta": 1}}, "mix.bta"),
        ({"mix": "cutmix", "mix_seg": 0, "mix_rec": 0}, "a mix needs"),
    ):
        with pytest.raises(UserError, match=message):
            resolve({"name": "recurseed", **wrong})


def test_it_is_its_own_segmenter():
    assert not needs_segmenter({"name": "recurseed"}, None)
    assert needs_segmenter({"name": "recurseed"}, True)
    assert needs_segmenter({"name": "cam"}, None)
    assert not needs_segmenter({"name": "cam"}, False)
