"""Prediction in tiles: like that of the whole image where the network is local, and small."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from weakseg.config import validate
from weakseg.data import images
from weakseg.data.images import read_image, read_large_image, read_mask
from weakseg.data.samples import Sample
from weakseg.errors import UserError
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Maps, Trainable, build
from weakseg.networks.backbone import Level, backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import PredictConfig
from weakseg.stages.predict import predict_images
from weakseg.training.segmenter import Segmenter

PLAIN = Normalise((0.45, 0.45, 0.45), (0.25, 0.25, 0.25))


class Local(Trainable):
    """Convolutions at stride 2: a pixel depends on those at most 8 away."""

    heads = ("segmenter",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 7, stride=2, padding=3)
        self.second = nn.Conv2d(6, 3, 3, padding=1)
        self.backbone = nn.Module()
        self.backbone.levels = (Level("C1", 6, 2),)

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        padded = F.pad(images, (0, images.shape[-1] % 2, 0, images.shape[-2] % 2))
        maps = F.interpolate(
            self.second(self.first(padded).relu()), padded.shape[-2:], mode="bilinear"
        )
        found = (5 * maps)[..., : images.shape[-2], : images.shape[-1]].softmax(1)
        return Maps(found[:, 1:], "probability", background=found[:, :1])


def local(**settings) -> Predictor:
    return Predictor(Local().eval(), ("x", "y"), PLAIN, **settings)


def coarse() -> Predictor:
    """A network that costs next to nothing."""
    model = Local()
    model.first, model.second = nn.Conv2d(3, 2, 4, stride=4), nn.Conv2d(2, 3, 1)
    return Predictor(model.eval(), ("x", "y"), PLAIN)


def picture(height: int, width: int) -> np.ndarray:
    coarse = torch.rand(1, 3, height // 9 + 2, width // 9 + 2)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0]).permute(1, 2, 0).to(torch.uint8).numpy()


def tiled_probabilities(predictor: Predictor, image: np.ndarray) -> Tensor:
    """What ``predict_tiled`` takes the largest of."""
    from weakseg.ops import spans, stitch

    side, overlap, blend = predictor._tiling()
    rows, columns = (spans(n, side, overlap, blend) for n in image.shape[:2])

    def result(y: slice, x: slice) -> Tensor:
        return predictor.probabilities(torch.from_numpy(image[y, x]).permute(2, 0, 1)[None])[0]

    joined = torch.empty(len(predictor.classes) + 1, *image.shape[:2])
    for y, x, found in stitch(rows, columns, result):
        joined[:, y, x] = found
    return joined


@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((301, 407), (1.0,)),
        ((128, 500), (1.0,)),
        ((90, 261), (1.0,)),
        ((129, 129), (1.0,)),
        ((300, 408), (1.0, 0.5)),  # the half of an odd size is no half
    ],
)
def test_tiles_of_a_local_network_are_those_of_the_whole(size, scales):
    """Scale .5 sees twice as far and is resized with a filter: within the context of tiles of 256."""
    predictor = local(scales=scales, tile=128 if scales == (1.0,) else 256)
    image = picture(*size)
    whole = predictor.probabilities(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    found = tiled_probabilities(predictor, image)
    assert whole.std() > 0.05  # there is something to be wrong about
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    mask = predictor.predict(image)
    assert (mask != whole.argmax(0).numpy()).mean() < 1e-3
    assert len(np.unique(mask)) == 3


def test_mirrored_tiles_are_nearly_those_of_the_whole():
    predictor = local(flip=True, tile=128)
    image = picture(260, 333)
    whole = predictor.probabilities(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    assert (tiled_probabilities(predictor, image) - whole).abs().mean() < 0.02


def test_a_network_that_looks_at_everything_leaves_no_seams(tiny_spec: BackboneSpec):
    network = DeepLabV3Plus(make_backbone(tiny_spec), 4, channels=8, dilations=(1, 2, 3))
    predictor = Predictor(Segmenter(network).eval(), ("x", "y", "z"), PLAIN, tile=128)
    image = picture(300, 340)
    image[:, :150] //= 3  # so that tiles differ in what they pool
    joined = tiled_probabilities(predictor, image)
    whole = predictor.probabilities(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    steps, normal = joined.diff(dim=2).abs().amax((0, 1)), whole.diff(dim=2).abs().amax((0, 1))
    assert steps.max() < 1.5 * normal.max() + 0.01


def test_images_no_larger_than_a_tile_are_predicted_whole():
    image, predictor = picture(128, 100), local(tile=128)
    assert np.array_equal(predictor.predict(image), replace(predictor, tile=None).predict(image))


def test_tiles_begin_where_cells_do_at_every_scale(tiny_spec: BackboneSpec):
    model = build(
        {"name": "recurseed", "channels": 8, "dilations": (1, 2, 3)}, backbone_factory(tiny_spec), 2
    )
    for scales, step in (((1.0,), 16), ((1.0, 0.5, 1.5), 32), ((1.0, 0.75), 64), ((0.7,), 16)):
        side, overlap, blend = Predictor(
            model, ("x", "y"), PLAIN, scales=scales, tile=900
        )._tiling()
        assert side >= 900 and (side - overlap) % step == 0
        assert 0 < blend < overlap < side / 2


def test_a_crf_works_inside_tiles(monkeypatch):
    seen = []

    def crf(pairs, preset):
        for tile, probabilities in pairs:
            seen.append((tuple(tile.shape[-2:]), tuple(probabilities.shape[-2:]), preset))
            yield torch.zeros_like(probabilities).index_fill(1, torch.tensor(2), 1.0)

    monkeypatch.setattr("weakseg.inference.dense_crf_many", crf)
    assert (local(tile=128, crf="soft").predict(picture(150, 128)) == 2).all()
    assert seen == [((128, 128), (128, 128), "soft"), ((54, 128), (54, 128), "soft")]


def test_classifiers_are_refused(tiny_spec: BackboneSpec):
    model = build({"name": "cam"}, backbone_factory(tiny_spec), 2).eval()
    with pytest.raises(UserError, match="a classifier cannot be used in tiles") as caught:
        Predictor(model, ("x", "y"), PLAIN, tile=128).predict(picture(140, 200))
    assert "max_side" in caught.value.mend


def test_a_tile_and_a_longest_side_contradict_each_other():
    with pytest.raises(UserError, match="set max_side: null"):
        validate(PredictConfig, {"tile": 512}, where="x")
    with pytest.raises(UserError, match="tile"):
        validate(PredictConfig, {"tile": 64, "max_side": None}, where="x")


def test_files_larger_than_pillows_limit_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(images, "LARGE", 10_000)
    samples = []
    for name, size in (("large", (150, 260)), ("small", (40, 50))):
        Image.fromarray(picture(*size)).save(tmp_path / f"{name}.png")
        samples.append(Sample(name, tmp_path / f"{name}.png", None))
    predictor = local()
    tiled = PredictConfig(scales=(1.0,), flip=False, max_side=None, tile=128)
    predict_images(predictor, tuple(samples), tmp_path / "b", tiled)
    assert Image.MAX_IMAGE_PIXELS == 10_000
    for sample in samples:
        mask = read_mask(tmp_path / "b" / f"{sample.id}.png")
        assert np.array_equal(mask, replace(predictor, tile=128).predict(sample.image))


# -- files


def test_predictions_follow_the_recipe_and_go_where_they_belong(tmp_path, monkeypatch):
    samples, seen = [], []
    for i in range(3):
        Image.new("RGB", (40, 30), (i + 1, 0, 0)).save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}", tmp_path / f"{i}.png", None))

    def own_colour(predictor: Predictor, images: Tensor) -> np.ndarray:
        seen.append(predictor)
        return images[:, 0].numpy()

    monkeypatch.setattr(Predictor, "predict_batch", own_colour)
    config = PredictConfig(scales=(1.0, 0.5), flip=True, max_side=20, crf="soft")
    predict_images(local(), tuple(samples), tmp_path / "out", config)
    for key in ("scales", "flip", "max_side", "tile", "crf"):
        assert {getattr(p, key) for p in seen} == {getattr(config, key)}
    assert [read_mask(tmp_path / f"out/{i}.png").max() for i in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F", "I"])
def test_large_files_are_read_like_others(tmp_path: Path, mode: str, monkeypatch):
    monkeypatch.setattr("weakseg.data.images._ROWS", 7)
    image = Image.fromarray(picture(31, 22))
    if mode in ("I;16", "F", "I"):
        values = np.asarray(image.convert("L")).astype(np.uint16) * 200
        kinds = {
            "I;16": values,
            "F": (values / 51_000).astype(np.float32),
            "I": values.astype("i4"),
        }
        image = Image.fromarray(kinds[mode])
    else:
        image = image.convert(mode)
        if "A" in mode:
            image.putalpha(Image.fromarray(picture(31, 22)).convert("L"))
    image.save(tmp_path / "i.tif")
    assert image.mode == mode
    assert np.array_equal(read_large_image(tmp_path / "i.tif"), read_image(tmp_path / "i.tif"))


@pytest.mark.parametrize("turn", range(1, 9))
def test_large_files_are_turned_like_others(tmp_path: Path, turn: int):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(picture(31, 22)).save(tmp_path / "i.jpg", exif=exif)
    found = read_large_image(tmp_path / "i.jpg")
    assert np.array_equal(found, read_image(tmp_path / "i.jpg"))


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_broken_large_files_are_named(tmp_path: Path, keep: int):
    Image.fromarray(picture(60, 60)).save(tmp_path / "i.png")
    (tmp_path / "i.png").write_bytes((tmp_path / "i.png").read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        read_large_image(tmp_path / "i.png")
    assert caught.value.where == str(tmp_path / "i.png")


_CHILD = """
import sys, threading, time
import psutil
import torch
from pathlib import Path
from PIL import Image
from tests.test_tiling import coarse
from weakseg.data.samples import Sample
from weakseg.recipe import PredictConfig
from weakseg.stages.predict import predict_images

torch.set_num_threads(1)
folder, side = Path(sys.argv[1]), int(sys.argv[2])
def predict(name, tile):
    config = PredictConfig(max_side=None, tile=tile)
    sample = Sample(name, folder / f"{name}.png", None)
    predict_images(coarse(), (sample,), folder / "out", config)
def watch():
    while True:
        peak[0] = max(peak[0], psutil.Process().memory_info().rss / 2**20)
        time.sleep(0.005)
peak = [0.0]
threading.Thread(target=watch, daemon=True).start()
predict("small", 1024)
before = peak[0]
predict("large", 1024)
print(before, peak[0])
"""


@pytest.mark.process
def test_memory_is_that_of_the_image_and_its_mask(tmp_path: Path):
    """8 bytes for each pixel (Pillow's 4, ours 3, the mask's 1) and a few rows of probabilities."""
    side = 2500
    for name, size in (("small", 1100), ("large", side)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(
            tmp_path / f"{name}.png", compress_level=1
        )
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), str(side)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, after = map(float, child.stdout.split())
    pixels = side * side / 2**20
    # The allocator adds up to 75 MiB of its own; all probabilities at once would add 12 bytes a pixel
    # to that.
    assert after - before < 9 * pixels + 105
    assert after - before > 4 * pixels  # the image was there
