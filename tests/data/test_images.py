"""Reading images the way the whole project sees them; writing and reading masks."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.data.images import (
    image_size,
    read_image,
    read_mask,
    same_shape,
    voc_palette,
    write_mask,
)
from weakseg.errors import UserError

ORIENTATION = 0x0112
# What a viewer shows for each EXIF orientation, as array operations on the stored pixels.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def picture(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_is_exact(tmp_path: Path, suffix: str) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    read = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read, pixels)
    assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, suffix: str, value: int) -> None:
    pixels = picture(16, 32)
    if suffix == "jpg":  # flat blocks survive the compression
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = value
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    read, wanted = read_image(tmp_path / f"a.{suffix}"), SHOWN[value](pixels)
    assert read.shape == wanted.shape
    assert image_size(tmp_path / f"a.{suffix}") == wanted.shape[:2]
    assert np.abs(read.astype(int) - wanted).max() <= (30 if suffix == "jpg" else 0)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_zero_to_one_or_to_255(tmp_path: Path) -> None:
    for values in ([[0.0, 128 / 255, 1.0]], [[0.0, 128.0, 255.0]]):
        Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "a.tif")
        assert read_image(tmp_path / "a.tif")[0, :, 1].tolist() == [0, 128, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 0, 0], [255] * 3, [204] * 3]]
    Image.fromarray(pixels[..., [0, 3]].copy(), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, :, 2].tolist() == [255, 255, 204]


def test_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    image.save(tmp_path / "t.png", transparency=0)
    assert read_image(tmp_path / "t.png").tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    white.save(tmp_path / ("a.jpg" if mode in {"CMYK", "YCbCr"} else "a.png"))
    read = read_image(next(tmp_path.iterdir()))
    assert read.shape == (8, 8, 3) and read.min() >= 253


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 64)])
def test_max_side_reduces_and_never_enlarges(tmp_path: Path, shape: tuple[int, int]) -> None:
    Image.fromarray(picture(*shape)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", max_side=100)
    assert max(read.shape) == min(100, max(shape))
    assert abs(read.shape[0] / read.shape[1] - shape[0] / shape[1]) < 0.02


def test_reduction_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", max_side=32)
    assert np.abs(read.astype(int) - 127).max() <= 2


def test_cheap_jpeg_decoding_shows_the_same(tmp_path: Path) -> None:
    y, x = np.mgrid[:1024, :768] / 1024
    pixels = (np.stack([y, x, (x + y) / 2], axis=2) * 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    cheap = read_image(tmp_path / "a.jpg", max_side=96)
    full = Image.fromarray(read_image(tmp_path / "a.jpg")).resize(cheap.shape[1::-1], 3)
    assert cheap.shape == (72, 96, 3)
    assert np.abs(cheap.astype(int) - np.asarray(full)).max() <= 6


def damaged(tmp_path: Path) -> dict[str, Path]:
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    files = {
        "missing": tmp_path / "missing.jpg",
        "empty": tmp_path / "empty.jpg",
        "truncated": tmp_path / "truncated.jpg",
        "text": tmp_path / "text.jpg",
        "folder": tmp_path / "folder.jpg",
    }
    files["empty"].write_bytes(b"")
    files["truncated"].write_bytes(content[: len(content) // 2])
    files["text"].write_text("this is no image")
    files["folder"].mkdir()
    return files


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "folder"])
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path)[kind]
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and caught.value.mend
    if kind != "truncated":
        with pytest.raises(UserError):
            image_size(path)


def test_any_truncation_is_a_user_error_or_an_image(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "bmp", "tif", "webp"):
        Image.fromarray(picture(24, 24)).save(tmp_path / f"a.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        for end in np.linspace(0, len(content) - 3, 40).astype(int):
            (tmp_path / "cut").write_bytes(content[:end])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert read_image(tmp_path / "cut").shape == (24, 24, 3)
            except UserError:
                pass


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {i: tuple(palette[i].tolist()) for i in known} == known
    assert len({tuple(c) for c in palette.tolist()}) == 256


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_mask_round_trip(tmp_path: Path, dtype: type) -> None:
    mask = np.random.default_rng(0).integers(0, 256, (7, 5)).astype(dtype)
    write_mask(tmp_path / "deep" / "a.png", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep" / "a.png"), mask)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.mode == "P"
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, voc_palette()[mask.astype(int)])


def test_mask_without_palette_is_read(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 255]], dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "gray.png")
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "wide.png")
    for name in ("gray.png", "wide.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask)


def test_masks_of_colours_or_jpeg_are_refused(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "rgb.png")
    Image.fromarray(picture()[..., 0]).save(tmp_path / "lossy.jpg")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in ("rgb.png", "lossy.jpg", "large.png", "broken.png", "missing.png"):
        with pytest.raises(UserError, match=name) as caught:
            read_mask(tmp_path / name)
        assert caught.value.mend


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2, 3), int), np.zeros((2, 2)), np.array([[256]]), np.array([[-1]])]
)
def test_what_is_no_mask_is_not_written(tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ValueError):
        write_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mask(tmp_path / "a.png", np.ones((2, 2), int))

    def fail(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        write_mask(tmp_path / "a.png", np.zeros((2, 2), int))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert read_mask(tmp_path / "a.png").all()


def test_one_shape_at_two_sizes():
    """Every rounded reduction of an image has its shape; what is turned or cut has not."""
    sizes = [(30, 1200), (1200, 30), (1, 999), (375, 500), (500, 375), (7, 7), (1, 1)]
    for height, width in sizes:
        for side in (1, 2, 17, 256, 900, 2000):
            scale = side / max(height, width)
            other = max(1, round(height * scale)), max(1, round(width * scale))
            assert same_shape(other, (height, width)) and same_shape((height, width), other)
    assert not same_shape((30, 1200), (1200, 30))
    assert not same_shape((256, 7), (30, 1200))
    assert not same_shape((375, 400), (375, 500))
    assert not same_shape((48, 48), (48, 64))
