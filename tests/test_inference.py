"""Scales and flips merged by the kind of map; the predictor; modes that are put back."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.inference import Normalise, Predictor, evaluating, multi_scale
from weakseg.methods import Maps, Trainable, build
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.training.segmenter import Segmenter

PLAIN = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # 0..255 becomes 0..1


class Stub(Trainable):
    """Answers with a function of the normalised images, and keeps what it was shown."""

    heads = ("a", "b")

    def __init__(self, answer, kind="logit", logits=None, background=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.kind = answer, kind
        self.logits, self.background = logits, background
        self.seen: list[tuple[Tensor, str | None]] = []

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        self.seen.append((images, head))
        logits = None if self.logits is None else self.logits(images)
        background = None if self.background is None else self.background(images)
        return Maps(self.answer(images), self.kind, background, logits)


def pictures(size: tuple[int, int] = (32, 48), count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def models(tiny_spec: BackboneSpec) -> dict[str, Trainable]:
    torch.manual_seed(0)
    network = DeepLabV3Plus(backbone_factory(tiny_spec)(), 4, channels=8, dilations=(1, 2, 3))
    return {
        "cam": build({"name": "cam"}, backbone_factory(tiny_spec), 3).eval(),
        "segmenter": Segmenter(network).eval(),
    }


# -- multi_scale


@pytest.mark.parametrize("name", ["cam", "segmenter"])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mirrored_images_give_mirrored_maps(models, name: str, size: tuple[int, int]):
    """With flips on, nothing prefers left to right; without them the network does."""
    images = pictures((64, 96))

    def mirrored_differs(flip: bool) -> float:
        with evaluating(models[name]) as model:
            maps = [
                multi_scale(model, given, PLAIN, scales=(1.0, 0.5), flip=flip, size=size)
                for given in (images, images.flip(-1))
            ]
        a, b = (m.scores for m in maps)
        if maps[0].logits is not None and flip:
            torch.testing.assert_close(maps[0].logits, maps[1].logits, atol=1e-4, rtol=1e-3)
        return (a.flip(-1) - b).abs().max().item()

    assert mirrored_differs(flip=True) < 0.02 * mirrored_differs(flip=False)


@pytest.mark.parametrize("kind", ["logit", "unit", "probability"])
def test_a_constant_network_gives_constant_maps(kind):
    model = Stub(lambda x: torch.full((len(x), 2, 4, 4), 0.4), kind)
    maps = multi_scale(model, pictures(), PLAIN, scales=(1.0, 0.5, 2.0), flip=True)
    wanted = {"logit": 1.0, "unit": 0.0, "probability": 0.4}[kind]
    assert maps.scores.shape == (2, 2, 32, 48)
    atol = 0.1 if kind == "unit" else 1e-4  # min-max enlarges the rounding of interpolation
    torch.testing.assert_close(maps.scores, torch.full_like(maps.scores, wanted), atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["logit", "unit", "probability"])
def test_flips_are_merged_as_by_hand(kind):
    row = torch.tensor([-1.0, 0.25, 0.5, 1.0])
    model = Stub(lambda x: row.expand(len(x), 1, 1, 4), kind)  # whatever it sees
    maps = multi_scale(model, pictures((1, 4), 1), PLAIN, flip=True)
    wanted = {
        "logit": torch.tensor([1, 0.75, 0.75, 1]) / 1.00001,  # sums of positive parts / maximum
        # Positive parts sum to 1, .75, .75, 1; the range is .25.
        "unit": torch.tensor([1, 0, 0, 1]) * 0.25 / (0.25 + 1e-5),
        "probability": torch.tensor([0, 0.375, 0.375, 0]),
    }[kind]
    torch.testing.assert_close(maps.scores[0, 0, 0], wanted)
    assert maps.kind == kind


def test_scales_are_merged_as_by_hand():
    def answer(x: Tensor) -> Tensor:
        """At full size one map, at half size another."""
        return torch.full((len(x), 1, *x.shape[-2:]), 0.8 if x.shape[-1] == 8 else 0.2)

    images = pictures((4, 8), 1)
    maps = multi_scale(Stub(answer, "probability"), images, PLAIN, scales=(1.0, 0.5, 0.5))
    torch.testing.assert_close(maps.scores, torch.full((1, 1, 4, 8), 0.4))


def test_the_network_sees_the_scaled_and_mirrored_images():
    model = Stub(lambda x: x[:, :1], "probability")
    images = pictures((20, 31), 1)
    multi_scale(model, images, PLAIN, scales=(1.0, 0.5), flip=True, head="b")
    (full, head), (half, _) = model.seen
    assert head == "b"
    torch.testing.assert_close(full, torch.cat([images, images.flip(-1)]) / 255)
    assert half.shape == (2, 3, 10, 16)
    assert torch.equal(half[0], half[1].flip(-1))
    small = F.interpolate(images.float(), (10, 16), mode="bicubic", antialias=True) / 255
    torch.testing.assert_close(half[:1], small.clamp(0, 1), atol=0.01, rtol=0)


def test_an_identity_network_gives_back_the_image():
    images = pictures()
    model = Stub(lambda x: x, "probability")
    maps = multi_scale(model, images, PLAIN, flip=True)
    torch.testing.assert_close(maps.scores, images / 255)


def test_normalisation_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = Normalise((0.5, 0.2, 0.4), (0.5, 1.0, 0.2))(images)
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 0.0, 3.0]))


def test_logits_and_background_are_averaged():
    model = Stub(
        lambda x: torch.full((len(x), 1, 2, 2), 0.25),
        "probability",
        logits=lambda x: torch.full((len(x), 1), float(x.shape[-1])),
        background=lambda x: torch.full((len(x), 1, 2, 2), 0.75),
    )
    maps = multi_scale(model, pictures((4, 8)), PLAIN, scales=(1.0, 0.5), flip=True)
    assert maps.logits.tolist() == [[6.0], [6.0]]
    torch.testing.assert_close(maps.background, torch.full((2, 1, 4, 8), 0.75))


@pytest.mark.parametrize("place", ["cells", "stretch"])
def test_published_merging_is_of_nearest_probabilities_and_their_mean(place):
    answers = {8: [[0.1, 0.9]], 16: [[0.2, 0.4, 0.6, 0.8]]}
    model = Stub(
        lambda x: torch.tensor(answers[x.shape[-1]]).expand(len(x), 1, 1, -1),
        "probability",
        logits=lambda x: torch.full((len(x), 1), 3.0 if x.shape[-1] == 8 else -2.0),
        background=lambda x: torch.ones(len(x), 1, 1, 2),
    )
    model.published_merging = True
    maps = multi_scale(model, pictures((4, 8), 1), PLAIN, scales=(1.0, 2.0), flip=True, place=place)
    one, two = (torch.tensor(v).repeat_interleave(8 // len(v)) for v in (*answers[8], *answers[16]))
    row = (one + one.flip(0) + two + two.flip(0)) / 4
    torch.testing.assert_close(maps.scores, row.expand(1, 1, 4, 8))
    assert maps.background.eq(1).all()
    mean = (torch.tensor(3.0).sigmoid() + torch.tensor(-2.0).sigmoid()) / 2
    torch.testing.assert_close(maps.logits.sigmoid(), mean.expand(1, 1))
    model.published_merging = False
    plain = multi_scale(model, pictures((4, 8), 1), PLAIN, scales=(1.0, 2.0), place=place)
    torch.testing.assert_close(plain.logits, torch.tensor([[0.5]]))


@pytest.mark.parametrize("name", ["cam", "segmenter"])
def test_images_do_not_see_each_other(models, name: str):
    images = pictures((40, 56), 3)
    with evaluating(models[name]) as model:
        settings = {"scales": (1.0, 0.5), "flip": True, "size": (10, 14)}
        whole = multi_scale(model, images, PLAIN, **settings).scores
        alone = [multi_scale(model, image[None], PLAIN, **settings).scores for image in images]
    assert whole.shape == (3, 3, 10, 14)
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-4, rtol=1e-3)


# -- evaluating


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_also_after_an_error(training: bool, tiny_spec: BackboneSpec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 1).train(training)
    with evaluating(model) as inside:
        assert inside is model
        assert not any(m.training for m in model.modules())
        assert torch.is_inference_mode_enabled()
    assert model.training == training
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training == training
    assert model.backbone.training == training
    assert not torch.is_inference_mode_enabled()


# -- predictor


def predictor(model: Trainable, **settings) -> Predictor:
    return Predictor(model, ("x", "y", "z"), PLAIN, **settings)


@pytest.mark.parametrize("name", ["cam", "segmenter"])
@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_sum_to_one(models, name: str, flip: bool):
    found = predictor(models[name], scales=(1.0, 0.5), flip=flip).probabilities(pictures((33, 47)))
    assert found.shape == (2, 4, 33, 47)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(2, 33, 47))


@pytest.mark.parametrize("name", ["cam", "segmenter"])
def test_tags_leave_no_other_class(models, name: str):
    tags = torch.tensor([[1, 0, 0], [0, 0, 0]])
    found = predictor(models[name]).probabilities(pictures(), tags)
    assert found[0, 1].max() > 0
    assert found[0, 2:].eq(0).all()
    assert found[1, 1:].eq(0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2, 32, 48))


def test_without_tags_a_classifier_gates_its_own_maps():
    model = Stub(
        lambda x: torch.ones(len(x), 3, 4, 4), logits=lambda x: torch.tensor([[3.0, -3.0, 0.1]])
    )
    found = predictor(model).probabilities(pictures(count=1))
    assert found[0, 2].eq(0).all()
    assert found[0, [1, 3]].min() > 0


@pytest.mark.parametrize(("threshold", "wanted"), [(0.45, [0, 1, 1]), (0.95, [0, 0, 1])])
def test_the_threshold_is_the_background(threshold: float, wanted: list[int]):
    row = torch.tensor([0.2, 0.5, 1.0])
    model = Stub(lambda x: torch.stack([row, 0 * row, 0 * row])[None, :, None])
    found = predictor(model, threshold=threshold).predict(np.zeros((1, 3, 3), np.uint8))
    assert found.tolist() == [wanted]
    assert found.dtype == np.uint8


def test_a_background_map_takes_the_place_of_the_threshold():
    model = Stub(
        lambda x: torch.full((len(x), 3, 4, 4), 0.1),
        "probability",
        background=lambda x: torch.full((len(x), 1, 4, 4), 0.7),
    )
    found = predictor(model, threshold=0.01).probabilities(pictures())
    torch.testing.assert_close(found[:, 0], torch.full((2, 32, 48), 0.7))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_wrong_tensors_are_refused(models, images: Tensor):
    with pytest.raises(UserError, match=r"images are \(") as caught:
        predictor(models["cam"]).probabilities(images)
    assert caught.value.mend == "give (B, 3, H, W) uint8 in RGB order"


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_wrong_arrays_are_refused(models, image: np.ndarray):
    with pytest.raises(UserError, match=r"the image is \(8, 8"):
        predictor(models["cam"]).predict(image)


def test_files_and_arrays_give_the_same_mask(models, tmp_path: Path):
    image = pictures((30, 41), 1)[0].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "i.png")
    model = predictor(models["segmenter"], max_side=24)
    masks = [model.predict(given) for given in (image, tmp_path / "i.png", str(tmp_path / "i.png"))]
    assert masks[0].shape == (30, 41)
    assert all(np.array_equal(masks[0], mask) for mask in masks)
    assert set(np.unique(model.predict(image, tags=["y"]))) <= {0, 2}
    with pytest.raises(UserError, match="there is no such image file"):
        model.predict(tmp_path / "gone.png")


def test_unknown_tags_are_named(models):
    with pytest.raises(UserError, match=r"unknown tags \['w'\]") as caught:
        predictor(models["cam"]).predict(np.zeros((8, 8, 3), np.uint8), tags=["x", "w"])
    assert caught.value.mend == "use some of: x, y, z"


@pytest.mark.parametrize("max_side", [24, 48, 1000, None])
def test_large_images_are_reduced_first(max_side: int | None):
    model = Stub(lambda x: x, "probability")
    mask = predictor(model, max_side=max_side).predict_batch(pictures((32, 48)))
    assert mask.shape == (2, 32, 48)
    longer = min(48, max_side or 48)
    assert model.seen[0][0].shape == (2, 3, round(longer * 32 / 48), longer)


@pytest.mark.parametrize("crf", ["soft", "label", "deeplab"])
def test_a_crf_moves_predictions_to_the_edges_of_the_image(crf: str):
    image = torch.zeros(1, 3, 40, 60, dtype=torch.uint8)
    image[..., 30:] = 220
    ramp = torch.linspace(0.3, 0.8, 60).expand(1, 1, 40, 60)  # one half is reached at pixel 23
    model = Stub(lambda _: ramp, "probability", background=lambda _: 1 - ramp)
    one_class = Predictor(model, ("x",), PLAIN, crf=crf)
    blurred = Predictor(model, ("x",), PLAIN).predict_batch(image)
    assert (blurred[0, 20] > 0).argmax() in range(22, 26)
    assert np.array_equal(one_class.predict_batch(image)[0] > 0, image[0, 0].numpy() > 0)


def test_classes_that_are_nowhere_likely_take_no_part_in_the_crf(monkeypatch):
    seen = []

    def crf(pairs, preset):
        for _, probabilities in pairs:
            seen.append((probabilities.amax((0, 2, 3)) > 0).tolist())
            yield probabilities

    monkeypatch.setattr("weakseg.inference.dense_crf_many", crf)
    scores = torch.tensor([0.005, 0.3])[None, :, None, None].expand(1, 2, 8, 8)
    model = Stub(lambda _: scores, "probability", background=lambda _: 1 - scores.sum(1)[:, None])
    Predictor(model, ("x", "y"), PLAIN, crf="soft").predict_batch(pictures((8, 8), 1))
    assert seen == [[True, False, True]]


def test_predicting_leaves_a_training_model_in_training(models):
    models["cam"].train()
    try:
        predictor(models["cam"]).probabilities(pictures())
        assert models["cam"].training
    finally:
        models["cam"].eval()
