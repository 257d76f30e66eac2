"""Images of more than 8 bits and of more bands than colours: none is misread in silence."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tests.rasters import write_png, write_tiff

from weakseg.data.check import check
from weakseg.data.depth import Depth, Reading
from weakseg.data.images import image_size, read_image, read_large_image
from weakseg.data.samples import Collection, Sample
from weakseg.data.survey import find_reading
from weakseg.errors import UserError

SIZE = (24, 36)


def noise(low: float, high: float, dtype: str, bands: int = 1, seed: int = 0) -> np.ndarray:
    """Even noise from low to high, both of which occur."""
    values = np.random.default_rng(seed).uniform(low, high, (*SIZE, bands))
    values[0, 0], values[0, 1] = low, high
    return (np.rint(values) if dtype[0] in "ui" else values).astype(dtype)


def levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(H, W, 3): what the first three bands, or the first, are in 8 bits; by exact arithmetic."""
    colours = values[..., :3] if values.shape[2] >= 3 else values[..., :1].repeat(3, axis=2)
    share = (colours.astype(np.longdouble) - low) / (np.longdouble(high) - low)
    return np.clip(np.rint(share * 255), 0, 255).astype(np.uint8)


def samples(*paths: Path) -> list[Sample]:
    return [Sample(path.stem, path, ("cat",)) for path in paths]


def found(*paths: Path, given: Reading | None = None) -> Reading:
    return find_reading(samples(*paths), given)[0]


# --- the range of values ---------------------------------------------------------------------

RANGES: list[tuple[str, float, float, Depth]] = [
    ("u2", 0, 200, 8),
    ("u2", 3, 1023, 10),
    ("u2", 0, 1100, 12),
    ("u2", 0, 4095, 12),
    ("u2", 100, 16383, 14),
    ("u2", 0, 65535, 16),
    ("i2", 0, 4095, 12),
    ("u4", 0, 65535, 16),
    ("i4", 0, 1000, 10),
    ("f4", 0, 1, (0, 1)),
    ("f4", 0, 255, 8),
    ("f4", 0, 4095, 12),
    ("f8", 0, 0.9, (0, 1)),
    ("f2", 0, 1, (0, 1)),
]


@pytest.mark.parametrize(("dtype", "low", "high", "depth"), RANGES)
@pytest.mark.parametrize("bands", [1, 3])
def test_the_bits_of_a_collection_are_found(
    tmp_path: Path, dtype: str, low: float, high: float, depth: Depth, bands: int
) -> None:
    whole = noise(low, high, dtype, bands)
    # In one image alone the values would look like those of fewer bits: it stays dark.
    dark = noise(low, low + (high - low) / 20, dtype, bands, seed=1)
    paths = [write_tiff(tmp_path / f"{n}.tif", v) for n, v in (("a", whole), ("b", dark))]
    reading, notes = find_reading(samples(*paths))
    assert reading == Reading(depth) and len(notes) == 1
    limits = depth if isinstance(depth, tuple) else (0, 2**depth - 1)
    for path, values in zip(paths, (whole, dark), strict=True):
        read = read_image(path, reading=reading)
        np.testing.assert_array_equal(read, levels(values, *limits))
        np.testing.assert_array_equal(read_large_image(path, reading=reading), read)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_png_files_of_16_bits(tmp_path: Path, bands: int) -> None:
    values = noise(0, 4095, "u2", bands)
    if bands in (2, 4):
        values[..., -1] = 65535
    path = write_png(tmp_path / "a.png", values)
    assert found(path) == Reading(12)
    colours = values[..., :1] if bands < 3 else values
    np.testing.assert_array_equal(read_image(path, reading=Reading(12)), levels(colours, 0, 4095))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("u2", 7000, 9000),  # a thermal camera
        ("i2", -1024, 3000),  # computed tomography
        ("i4", -(10**6), 10**6),
        ("u4", 0, 2**32 - 1),
        ("f4", -3.5, 11.25),
        ("f4", 0.0, 0.1),
        ("f8", 1e6, 1e6 + 5),
        ("i1", -128, 127),
        ("u8", 10**12, 10**12 + 1000),
    ],
)
@pytest.mark.parametrize("bands", [1, 3])
def test_other_values_are_spread_between_their_percentiles(
    tmp_path: Path, dtype: str, low: float, high: float, bands: int
) -> None:
    values = [noise(low, high, dtype, bands, seed) for seed in range(3)]
    paths = [write_tiff(tmp_path / f"{i}.tif", v) for i, v in enumerate(values)]
    reading = found(*paths)
    assert isinstance(reading.depth, tuple)
    near, rounding = (high - low) / 50, (high - low) / 10**4
    assert low - rounding <= reading.depth[0] <= low + near
    assert high - near <= reading.depth[1] <= high + rounding
    for path, own in zip(paths, values, strict=True):
        np.testing.assert_array_equal(
            read_image(path, reading=reading), levels(own, *reading.depth)
        )


def test_one_hot_pixel_darkens_nothing(tmp_path: Path) -> None:
    values = noise(0, 900, "u2")
    values[5, 5] = 65535
    reading = found(write_tiff(tmp_path / "a.tif", values))
    assert isinstance(reading.depth, tuple) and reading.depth[1] < 1000


def test_without_a_collection_an_image_has_its_own_range(tmp_path: Path) -> None:
    """Never black: neither a single image, nor one that a model of 8-bit images sees."""
    for high, depth in ((900, 10), (4000, 12), (60000, 16)):
        values = noise(0, high, "u2", 3)
        path = write_tiff(tmp_path / "a.tif", values)
        np.testing.assert_array_equal(read_image(path), levels(values, 0, 2**depth - 1))


def test_the_smallest_value_may_be_white(tmp_path: Path) -> None:
    values = noise(0, 4095, "u2")
    path = write_tiff(tmp_path / "a.tif", values, photometric=0)
    np.testing.assert_array_equal(
        read_image(path, reading=Reading(12)), 255 - levels(values, 0, 4095)
    )


def test_no_data_and_no_numbers_are_black_and_do_not_count(tmp_path: Path) -> None:
    values = noise(2, 3, "f4")
    values[:4], values[4, 0], values[4, 1] = -9999, np.nan, np.inf
    path = write_tiff(tmp_path / "a.tif", values, ascii_tags={42113: "-9999"})
    reading = found(path)
    assert isinstance(reading.depth, tuple) and 2 <= reading.depth[0] < reading.depth[1] <= 3
    read = read_image(path, reading=reading)
    assert (read[:4] == 0).all() and read[4, 0, 0] == 0 and read[4, 1, 0] == 255
    np.testing.assert_array_equal(read[5:], levels(values[5:], *reading.depth))


def test_images_of_one_value(tmp_path: Path) -> None:
    for value in (0, 300, 70000):
        path = write_tiff(tmp_path / "a.tif", np.full(SIZE, value, "u4"))
        assert len(np.unique(read_image(path, reading=found(path)))) == 1


def test_floats_and_whole_numbers_of_other_ranges_do_not_mix(tmp_path: Path) -> None:
    a = write_tiff(tmp_path / "a.tif", noise(0, 1, "f4"))
    b = write_tiff(tmp_path / "b.tif", noise(0, 4095, "u2"))
    with pytest.raises(UserError) as caught:
        find_reading(samples(a, b))
    assert caught.value.where == "data.depth" and caught.value.mend
    c = write_tiff(tmp_path / "c.tif", noise(0, 4095, "f4"))
    assert found(b, c) == Reading(12)


def test_a_range_that_is_given_is_taken(tmp_path: Path) -> None:
    values = noise(0, 4095, "u2")
    path = write_tiff(tmp_path / "a.tif", values)
    for depth, limits in ((16, (0, 65535)), ((100.0, 300.0), (100, 300))):
        reading, notes = find_reading(samples(path), Reading(depth))
        assert reading == Reading(depth) and notes == []
        np.testing.assert_array_equal(read_image(path, reading=reading), levels(values, *limits))


def test_a_reduced_image_is_reduced_after_scaling(tmp_path: Path) -> None:
    values = noise(0, 4095, "u2", 3)
    path = write_tiff(tmp_path / "a.tif", values)
    wanted = cv2.resize(levels(values, 0, 4095), (12, 8), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(read_image(path, max_side=12, reading=Reading(12)), wanted)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 8])
def test_bands_of_every_type_are_read_as_stored(
    tmp_path: Path, bands: int, planar: bool, order: str
) -> None:
    for dtype, high in (("u1", 255), ("u2", 4095), ("i4", 4095), ("f4", 1), ("f8", 1)):
        values = noise(0, high, dtype, bands)
        extra = None if bands in (1, 3) else [0] * (bands - (3 if bands > 3 else 1))
        path = write_tiff(
            tmp_path / "a.tif", values, extra=extra, planar=planar and bands > 1, order=order
        )
        np.testing.assert_array_equal(read_image(path), levels(values, 0, high))
        if bands >= 4:
            reading = Reading(found(path).depth, (4, 3, 2))
            wanted = levels(values[..., [3, 2, 1]], 0, high)
            np.testing.assert_array_equal(read_image(path, reading=reading), wanted)
        if bands > 1:
            wanted = levels(values[..., 1:2], 0, high)
            np.testing.assert_array_equal(read_image(path, reading=Reading(None, (2,))), wanted)


@pytest.mark.parametrize(("scheme", "predictor"), [(5, 2), (5, 1), (8, 2), (32946, 1), (32773, 1)])
@pytest.mark.parametrize("bands", [1, 3])
def test_compressed_files(tmp_path: Path, scheme: int, predictor: int, bands: int) -> None:
    values = noise(0, 4095, "u2", bands).cumsum(axis=1, dtype=np.uint16) % 4096
    values = values.astype(np.uint16)
    values[0, 0, 0] = 4095
    options = [cv2.IMWRITE_TIFF_COMPRESSION, scheme, cv2.IMWRITE_TIFF_PREDICTOR, predictor]
    options += [cv2.IMWRITE_TIFF_ROWSPERSTRIP, 5]
    cv2.imwrite(str(tmp_path / "a.tif"), values[..., ::-1], options)
    read = read_image(tmp_path / "a.tif", reading=Reading(12))
    np.testing.assert_array_equal(read, levels(values, 0, 4095))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(tmp_path: Path, orientation: int) -> None:
    values = noise(0, 4095, "u2", 3)
    upright = write_tiff(tmp_path / "a.tif", values)
    turned = write_tiff(tmp_path / "b.tif", values, orientation=orientation)
    plain = levels(values, 0, 4095)
    Image.fromarray(plain).save(tmp_path / "c.tif", exif=_exif(orientation))
    wanted = read_image(tmp_path / "c.tif")
    np.testing.assert_array_equal(read_image(turned), wanted)
    np.testing.assert_array_equal(read_large_image(turned), wanted)
    assert image_size(turned) == wanted.shape[:2]
    assert image_size(upright) == SIZE


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["gray.tif", "rgb.tif", "float.tif", "planar.tif", "rgb.png"])
def test_files_that_end_early_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind.endswith("png"):
        write_png(path, noise(0, 4095, "u2", 3))
    else:
        bands = 1 if kind in ("gray.tif", "float.tif") else 3
        dtype = "f4" if kind == "float.tif" else "u2"
        write_tiff(path, noise(0, 4095, dtype, bands), planar=kind == "planar.tif")
    content = path.read_bytes()
    for end in np.linspace(0, len(content) - 20, 12).astype(int):
        path.write_bytes(content[:end])
        with pytest.raises(UserError) as caught:
            read_image(path)
        assert caught.value.where == str(path) and caught.value.mend
        find_reading(samples(path))  # leaves it to the check
        assert check(Collection("c", ("cat",), tuple(samples(path)), "t")).errors


def test_further_pages_are_said(tmp_path: Path) -> None:
    """As those of 8-bit files: the first one is what is read."""
    pages = [Image.fromarray(noise(0, 4095, "u2", 1, seed)[..., 0]) for seed in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.tif")
    seen = codes(tmp_path / "a.tif", tmp_path / "b.tif", reading=Reading(12))
    assert seen["animated"] == ("a",)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "b.tif"))


def test_what_no_reader_knows_is_no_black_image(tmp_path: Path) -> None:
    """Complex numbers, and a byte order that is not read: an error, and not 'no image'."""
    path = write_tiff(tmp_path / "a.tif", noise(0, 1, "f8"))
    content = bytearray(path.read_bytes())
    place = content.index((339).to_bytes(2, "little"))
    content[place + 8] = 6  # the sample format of complex numbers
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert "64" in caught.value.what
    report = check(Collection("c", ("cat",), tuple(samples(path)), "t"))
    assert "unreadable-file" in {p.code for p in report.errors}


def _eight_bit(folder: Path) -> list[Path]:
    """A file of every 8-bit mode and format."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (*SIZE, 4), dtype=np.uint8))
    paths = []
    modes = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "LAB", "RGBA", "LA")
    for mode, suffix in itertools.product(modes, ("png", "tif", "bmp", "webp", "jpg")):
        image = (rgba if "A" in mode and mode != "LAB" else rgb).convert(mode)
        path = folder / f"{mode}.{suffix}"
        try:
            image.save(path, lossless=True)
            paths.append(path)
        except (OSError, KeyError):
            path.unlink(missing_ok=True)
    rgb.convert("P").save(folder / "clear.png", transparency=3)
    rgb.convert("L").save(folder / "clear-gray.png", transparency=3)
    return [*paths, folder / "clear.png", folder / "clear-gray.png"]


def test_files_of_8_bits_are_read_as_ever(tmp_path: Path) -> None:
    """As Pillow converts them, whatever the range of a collection is."""
    paths = _eight_bit(tmp_path)
    assert len(paths) > 20
    for path in paths:
        with Image.open(path) as image:
            if "transparency" in image.info or image.mode in ("RGBA", "LA"):
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            wanted = np.asarray(image.convert("RGB"))
        for reading in (Reading(), Reading(12), Reading((3.0, 4.0), "alpha")):
            np.testing.assert_array_equal(read_image(path, reading=reading), wanted, str(path))
            np.testing.assert_array_equal(read_large_image(path, reading=reading), wanted)
    assert found(*(p for p in paths if "A" not in p.stem)) == Reading()


# --- bands ------------------------------------------------------------------------------------


def cut_out(seed: int) -> np.ndarray:
    """Transparency of a photograph: an opaque disc with a soft edge, in 0 to 1."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.clip(9 + seed - np.hypot(y - 12, x - 14), 0, 1)


def sensor(seed: int) -> np.ndarray:
    """A further channel of a sensor."""
    return np.clip(np.random.default_rng(seed).normal(0.5, 0.2, SIZE), 0, 1)


def nothing(seed: int) -> np.ndarray:
    return np.zeros(SIZE)


def labels(seed: int) -> np.ndarray:
    """Ids of a mask."""
    return np.random.default_rng(seed).integers(0, 3, SIZE) / 255


def four(folder: Path, band, dtype: str, suffix: str, colours: int = 3) -> list[Path]:
    paths = []
    most = 255 if dtype == "u1" else 65535
    for seed in range(5):
        values = noise(0, most, dtype, colours, seed)
        last = np.rint(band(seed) * most).astype(dtype)[..., None]
        values = np.concatenate([values, last], axis=2)
        path = folder / f"{seed}.{suffix}"
        if suffix == "tif":
            write_tiff(path, values, extra=[2])
        elif dtype == "u2":
            write_png(path, values)
        else:
            Image.fromarray(values, "RGBA" if colours == 3 else "LA").save(path)
        paths.append(path)
    return paths


KINDS = [("u1", "tif"), ("u2", "tif"), ("u1", "png"), ("u2", "png")]


@pytest.mark.parametrize(("dtype", "suffix"), KINDS)
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("band", [sensor, nothing, labels])
def test_a_further_band_of_data_is_not_transparency(
    tmp_path: Path, band, dtype: str, suffix: str, colours: int
) -> None:
    paths = four(tmp_path, band, dtype, suffix, colours)
    reading, notes = find_reading(samples(*paths))
    assert isinstance(reading.bands, tuple) and len(notes) == 1 + (dtype == "u2")
    most = 255 if dtype == "u1" else 65535
    for seed, path in enumerate(paths):
        wanted = levels(noise(0, most, dtype, colours, seed), 0, most)
        np.testing.assert_array_equal(read_image(path, reading=reading), wanted)
    clear = Reading(reading.depth, "alpha")
    assert find_reading(samples(*paths), clear)[0] == clear
    assert np.abs(read_image(paths[0], reading=clear).astype(int) - levels_of(paths[0])).max() > 9


def levels_of(path: Path) -> np.ndarray:
    return read_image(path, reading=Reading(None, (1, 2, 3))).astype(int)


@pytest.mark.parametrize(("dtype", "suffix"), KINDS)
@pytest.mark.parametrize("colours", [1, 3])
def test_the_transparency_of_photographs_is_honoured(
    tmp_path: Path, dtype: str, suffix: str, colours: int
) -> None:
    paths = four(tmp_path, cut_out, dtype, suffix, colours)
    reading, notes = find_reading(samples(*paths))
    assert reading.bands == "alpha" and len(notes) == 1 + (dtype == "u2")
    most = 255 if dtype == "u1" else 65535
    for seed, path in enumerate(paths):
        plain = levels(noise(0, most, dtype, colours, seed), 0, most).astype(float)
        share = cut_out(seed)[..., None]
        wanted = plain * share + 255 * (1 - share)
        read = read_image(path, reading=reading)
        assert np.abs(read - wanted).max() <= 1.6
        assert (read[share[..., 0] == 0] == 255).all()
        np.testing.assert_array_equal(read, read_image(path))  # also without a collection
        given = Reading(reading.depth, (1, 2, 3))
        np.testing.assert_array_equal(read_image(path, reading=given), plain)


def test_colours_that_are_multiplied_with_their_transparency(tmp_path: Path) -> None:
    colours, share = noise(0, 65535, "u2", 3), cut_out(0)[..., None]
    values = np.concatenate([np.rint(colours * share), share * 65535], axis=2).astype("u2")
    path = write_tiff(tmp_path / "a.tif", values, extra=[1])
    wanted = levels(colours, 0, 65535) * share + 255 * (1 - share)
    assert np.abs(read_image(path, reading=Reading(16)) - wanted).max() <= 1.6


def test_opaque_images_say_nothing(tmp_path: Path) -> None:
    paths = four(tmp_path, lambda _: np.ones(SIZE), "u1", "png")
    assert find_reading(samples(*paths)) == (Reading(), [])
    cut = four(tmp_path / "more", cut_out, "u1", "tif")[:2]
    assert found(*paths, *cut).bands == "alpha"


def test_a_band_that_is_not_tagged_as_transparency_is_ignored(tmp_path: Path) -> None:
    for dtype in ("u1", "u2"):
        values = noise(0, 255 if dtype == "u1" else 65535, dtype, 4)
        path = write_tiff(tmp_path / "a.tif", values, extra=[0])
        assert found(path).bands is None
        wanted = levels(values, 0, 255 if dtype == "u1" else 65535)
        np.testing.assert_array_equal(read_image(path), wanted)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_bands_in_another_order(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(noise(0, 255, "u1", 3)).save(tmp_path / f"a.{suffix}")
    plain = read_image(tmp_path / f"a.{suffix}")
    swapped = read_image(tmp_path / f"a.{suffix}", reading=Reading(None, (3, 1, 2)))
    np.testing.assert_array_equal(swapped, plain[..., [2, 0, 1]])
    alone = read_image(tmp_path / f"a.{suffix}", reading=Reading(None, (2,)))
    np.testing.assert_array_equal(alone, plain[..., [1, 1, 1]])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_band_that_is_not_there_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(0, 255, "u1", 3)).save(path)
    reading = Reading(None, (4, 3, 2))
    with pytest.raises(UserError) as caught:
        read_image(path, reading=reading)
    assert caught.value.where == str(path) and "data.bands" in str(caught.value.mend)
    collection = Collection("c", ("cat",), tuple(samples(path)), "t").read_as(reading)
    assert "missing-band" in {p.code for p in check(collection).errors}


# --- the collection ----------------------------------------------------------------------------


def test_a_collection_of_8_bits_is_the_same_as_ever(tmp_path: Path) -> None:
    Image.fromarray(noise(0, 255, "u1", 3)).save(tmp_path / "a.png")
    collection = Collection("c", ("cat",), tuple(samples(tmp_path / "a.png")), "t")
    before = collection.fingerprint()
    assert collection.read_as(found(tmp_path / "a.png")) is collection
    assert collection.read_as(Reading(None, "alpha")).fingerprint() == before
    other = {collection.read_as(r).fingerprint() for r in (Reading(12), Reading(None, (3, 2, 1)))}
    assert len(other | {before}) == 3


def codes(*paths: Path, reading: Reading) -> dict[str, tuple[str, ...]]:
    collection = Collection("c", ("cat",), tuple(samples(*paths)), "t").read_as(reading)
    return {p.code: p.items for p in check(collection).problems}


def test_the_check_names_images_that_do_not_suit_the_range(tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 4096, (3, 64, 64, 3)).astype(np.uint16)
    good = write_tiff(tmp_path / "good.tif", big[0])
    bright = write_tiff(tmp_path / "bright.tif", big[1] * 4)
    dark = write_tiff(tmp_path / "dark.tif", big[2] // 32)
    seen = codes(good, bright, dark, reading=Reading(12))
    assert seen["beyond-depth"] == ("bright",)
    assert seen["faint-image"] == ("dark",)
    assert set(seen["converted"]) == {"good", "bright", "dark"}
