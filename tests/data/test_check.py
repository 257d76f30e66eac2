"""The check: each kind of damage is found, all at once, and sound data raises nothing."""

import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from weakseg.data import check_files, images
from weakseg.data.check import CheckReport, Problem, check
from weakseg.data.images import read_image, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.errors import UserError

SIZE = (36, 48)  # height, width


def picture(path: Path, seed: int, mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def collection(samples: list[Sample], classes: tuple[str, ...] = ("cat", "dog")) -> Collection:
    return Collection("toy", classes, tuple(samples), "table labels.csv", ("A note.",))


def sound(root: Path, number: int = 12) -> list[Sample]:
    return [
        Sample(f"s/{i}", picture(root / "s" / f"{i}.png", i), (("cat", "dog")[i % 2],))
        for i in range(number)
    ]


def problem(report: CheckReport, code: str) -> Problem:
    found = [p for p in report.problems if p.code == code]
    assert len(found) == 1, [p.code for p in report.problems]
    assert found[0].mend and found[0].message
    return found[0]


def items(report: CheckReport, code: str) -> tuple[str, ...]:
    return problem(report, code).items


def test_sound_data_has_no_problem(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = check(collection(sound(tmp_path)), progress=lambda *c: calls.append(c))
    assert report.problems == () and calls == [(i, 12) for i in range(1, 13)]
    assert report.sizes == {f"s/{i}": SIZE for i in range(12)}
    assert report.images_per_class == {"train": {"cat": 6, "dog": 6}}


def test_every_damaged_file_at_once(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    whole = picture(tmp_path / "whole.jpg", 99).read_bytes()
    damage = {
        "missing-file": None,
        "empty-file": b"",
        "truncated-file": whole[:-60],
        "not-an-image": b"<html>404</html>",
    }
    for code, content in damage.items():
        path = tmp_path / f"{code}.jpg"
        if content is not None:
            path.write_bytes(content)
        samples.append(Sample(code, path, ("cat",)))
    (tmp_path / "folder.jpg").mkdir()
    samples.append(Sample("unreadable-file", tmp_path / "folder.jpg", ("cat",)))
    report = check(collection(samples))
    for code in (*damage, "unreadable-file"):
        assert items(report, code) == (code,) and problem(report, code).severity == "error"
        assert code not in report.sizes
    assert len(report.errors) == 5 and not report.warnings


def test_truncated_png(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    path = samples[0].image
    path.write_bytes(path.read_bytes()[:200])
    assert items(check(collection(samples)), "truncated-file") == ("s/0",)


def test_conversions_and_rotations_are_said(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "1"):
        suffix = "tif" if mode == "CMYK" else "png"
        samples.append(Sample(mode, picture(tmp_path / f"{mode}.{suffix}", 50, mode), ("cat",)))
    wide = tmp_path / "wide.png"
    Image.fromarray(np.full(SIZE, 5000, np.uint16)).save(wide)
    samples.append(Sample("wide", wide, ("cat",)))
    exif = Image.Exif()
    exif[0x0112] = 6
    samples.append(Sample("turned", picture(tmp_path / "t.jpg", 51, exif=exif), ("cat",)))
    report = check(collection(samples))
    assert items(report, "converted") == ("L", "P", "RGBA", "LA", "CMYK", "1", "wide")
    assert items(report, "rotated") == ("turned",)
    assert report.sizes["turned"] == SIZE[::-1] and not report.errors


def test_duplicate_ids(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    samples.append(Sample("s/0", picture(tmp_path / "s/0.jpg", 40), ("cat",)))
    samples.append(Sample("S/1", picture(tmp_path / "S2/1.jpg", 41), ("cat",)))
    report = check(collection(samples))
    assert items(report, "duplicate-id") == ("s/0", "s/1", "S/1")


def test_same_file_in_two_splits(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    copy = tmp_path / "copy.png"
    copy.write_bytes(samples[3].image.read_bytes())
    samples.append(Sample("copy", copy, ("dog",), "val"))
    assert items(check(collection(samples)), "same-image-in-splits") == ("s/3", "copy")


def test_untagged_images_name_two_mends(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    samples[0] = Sample("s/0", samples[0].image, None)
    samples[1] = Sample("s/1", samples[1].image, ())
    report = check(collection(samples))
    assert items(report, "untagged") == ("s/0",) and report.negatives == {"train": 1}
    assert "untagged: drop" in report.errors[0].mend
    assert "untagged: negative" in report.errors[0].mend


def test_unknown_tags(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    samples[0] = Sample("s/0", samples[0].image, ("fox", "cat"))
    report = check(collection(samples))
    assert items(report, "unknown-tag") == ("fox",)
    assert report.images_per_class["train"] == {"cat": 6, "dog": 6}


def test_counts(tmp_path: Path) -> None:
    samples = sound(tmp_path, 4)
    tags = [("cat", "dog"), ("cat",), (), ("fox",)]
    splits = ["train", "train", "val", "val"]
    samples = [Sample(s.id, s.image, t, p) for s, t, p in zip(samples, tags, splits, strict=True)]
    report = check(collection(samples, ("cat", "dog", "fox", "owl")))
    assert report.images_per_class == {
        "train": {"cat": 2, "dog": 1, "fox": 0, "owl": 0},
        "val": {"cat": 0, "dog": 0, "fox": 1, "owl": 0},
    }
    assert report.cooccurrence.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0] * 4]
    assert report.images_per_split == {"train": 2, "val": 2}
    assert report.negatives == {"train": 0, "val": 1}
    assert items(report, "few-images") == ("cat", "dog", "fox")
    assert items(report, "class-without-images") == ("owl",)
    assert items(report, "no-negatives") == ("cat",)
    assert problem(report, "no-negatives").severity == "error"
    assert {p.severity for p in report.problems if p.code.startswith(("few", "class"))} == {
        "warning"
    }


def test_confirmed_negatives_are_negatives(tmp_path: Path) -> None:
    samples = [Sample(s.id, s.image, ("cat",)) for s in sound(tmp_path)]
    assert items(check(collection(samples, ("cat",))), "no-negatives") == ("cat",)
    samples[0] = Sample("s/0", samples[0].image, ())
    assert not check(collection(samples, ("cat",))).problems


def test_nothing_to_train_on(tmp_path: Path) -> None:
    assert problem(check(collection([])), "no-images").severity == "error"
    samples = [Sample(s.id, s.image, s.tags, "val") for s in sound(tmp_path)]
    assert [p.code for p in check(collection(samples)).errors] == ["no-train-images"]


@pytest.mark.parametrize(
    ("rare", "frequent", "alike"),
    [
        ("Cat", "cat", True), ("cats", "cat", True), ("potted plant", "potted-plant", True),
        ("berries", "berry", True), ("hrose", "horse", True), ("aeroplne", "aeroplane", True),
        ("hous", "house", True), ("cow", "cat", False), ("car", "cat", False),
        ("cta", "cat", True),
        ("class 1", "class 2", False), ("bus", "sofa", False), ("grass", "gras", True),
    ],
)  # fmt: skip
def test_tags_like_typos(tmp_path: Path, rare: str, frequent: str, alike: bool) -> None:
    image = picture(tmp_path / "a.png", 0)
    samples = [Sample(f"{i}", image, (frequent,)) for i in range(20)]
    samples.append(Sample("x", image, (rare,)))
    report = check(collection(samples, (rare, frequent)))
    found = [p.items for p in report.warnings if p.code == "similar-tags"]
    assert found == ([(f"{rare} (1) / {frequent} (20)",)] if alike else [])


def test_two_frequent_neighbours_are_no_typo(tmp_path: Path) -> None:
    tags = ("horse", "house")
    samples = [replace(s, tags=(tags[i % 2],)) for i, s in enumerate(sound(tmp_path, 20))]
    assert not check(collection(samples, ("horse", "house"))).problems


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    good = np.zeros(SIZE, int)
    good[0], good[1], good[2] = 1, 2, 255
    masks = {"mask-ids": good + (good == 2), "mask-size": good[:-1], "fine": good}
    for name, mask in masks.items():
        write_mask(tmp_path / "m" / f"{name}.png", mask)
    picture(tmp_path / "m" / "mask-colours.png", 0)
    (tmp_path / "m" / "mask-unreadable.png").write_bytes(b"no")
    names = [*masks, "mask-colours", "mask-unreadable", "mask-missing-file"]
    samples[: len(names)] = [
        Sample(name, s.image, s.tags, mask=tmp_path / "m" / f"{name}.png")
        for name, s in zip(names, samples, strict=False)
    ]
    samples.append(Sample("v", picture(tmp_path / "v.png", 60), ("cat",), "val"))
    report = check(collection(samples))
    for code in set(names) - {"fine"}:
        assert items(report, code) == (code,)
    assert items(report, "masks-incomplete") == tuple(s.id for s in samples[6:12])
    assert {p.code for p in report.warnings} == {"masks-incomplete"}


def test_masks_follow_the_rotated_image(tmp_path: Path) -> None:
    samples = sound(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 8
    for name, shape in (("good", SIZE[::-1]), ("bad", SIZE)):
        write_mask(tmp_path / f"{name}.png", np.zeros(shape, int))
        image = picture(tmp_path / f"{name}.jpg", 70, exif=exif)
        samples.append(Sample(name, image, ("cat",), mask=tmp_path / f"{name}.png"))
    assert items(check(collection(samples)), "mask-size") == ("bad",)


def test_report_is_json_and_prints(tmp_path: Path) -> None:
    samples = sound(tmp_path, 6)
    samples.append(Sample("odd [red]name[/x]", tmp_path / "gone.jpg", ("cat",)))
    report = check(collection(samples))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["problems"][0]["code"] == "missing-file"
    assert read["sizes"]["s/0"] == list(SIZE) and read["notes"] == ["A note."]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    console.print(report.class_table())
    text = console.export_text()
    assert "odd [red]name[/x]" in text and "labels.csv" in text and "dog" in text


def test_check_is_deterministic(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", tmp_path / f"{i}.jpg", ("cat",)) for i in range(50)]
    first, second = (check(collection(samples)).to_dict() for _ in range(2))
    assert first == second and first["problems"][0]["items"] == [s.id for s in samples]


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes that declares side x side gray pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])  # below, at and above Pillow's limits
def test_a_decompression_bomb_is_not_decoded(tmp_path, side, recwarn) -> None:
    samples = [*sound(tmp_path), Sample("bomb", bomb(tmp_path / "bomb.png", side), ("cat",))]
    report = check(collection(samples))
    assert items(report, "decompression-bomb") == ("bomb",) and len(report.problems) == 1
    assert problem(report, "decompression-bomb").severity == "error"
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(samples[-1].image)


def test_a_large_plausible_image_is_a_warning(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(check_files, "LARGE", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # so that Pillow alone would refuse it
    samples = sound(tmp_path)
    report = check(collection(samples))
    assert len(items(report, "large-image")) == 12 and not report.errors
    assert read_image(samples[0].image).shape == (*SIZE, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("suffix", ["webp", "tif", "png"])
def test_images_of_several_frames(tmp_path, suffix) -> None:
    frames = [Image.open(s.image).convert("RGB") for s in sound(tmp_path, 3)]
    moving = tmp_path / f"moving.{suffix}"
    frames[0].save(moving, save_all=True, append_images=frames[1:], lossless=True)
    samples = [*sound(tmp_path), Sample("moving", moving, ("cat",), "val")]
    assert items(check(collection(samples)), "animated") == ("moving",)
    assert (read_image(moving) == np.asarray(frames[0])).all()


def test_a_photograph_with_a_preview_is_not_animated(tmp_path) -> None:
    frames = [Image.open(s.image) for s in sound(tmp_path, 2)]
    file = tmp_path / "camera.jpg"
    frames[0].save(file, format="MPO", save_all=True, append_images=frames[1:])
    report = check(collection([*sound(tmp_path)[1:], Sample("camera", file, ("cat",))]))
    assert not report.problems


def test_tiny_and_elongated_images(tmp_path) -> None:
    samples = sound(tmp_path)
    rng = np.random.default_rng(0)
    for name, shape in {"small": (31, 60), "strip": (40, 321), "fine": (40, 320)}.items():
        file = tmp_path / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(file)
        samples.append(Sample(name, file, ("cat",)))
    report = check(collection(samples))
    assert items(report, "tiny-image") == ("small",)
    assert items(report, "elongated") == ("strip",)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind) -> None:
    path = tmp_path / "x.jpg"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    report = check(collection([*sound(tmp_path), Sample("x", path, ("cat",), mask=path)]))
    assert items(report, "unreadable-file") == items(report, "mask-unreadable") == ("x",)


def blurred(path: Path, seed: int) -> Path:
    """A scene of smooth blobs, as unlike others as photographs are."""
    rng = np.random.default_rng(seed)
    pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (160, 120))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


COPIES = {
    "jpeg": lambda i, f: i.save(f, "JPEG", quality=20),
    "half": lambda i, f: i.resize((80, 60)).save(f, "PNG"),
    "square": lambda i, f: i.resize((64, 64)).save(f, "PNG"),
    "gray": lambda i, f: i.convert("L").save(f, "PNG"),
    "darker": lambda i, f: i.point(lambda v: int(0.8 * v)).save(f, "PNG"),
    "cropped": lambda i, f: i.crop((2, 2, 158, 118)).save(f, "PNG"),
    "turned": lambda i, f: i.transpose(Image.Transpose.ROTATE_90).save(f, "JPEG", exif=turn(6)),
}


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", sorted(COPIES))
def test_near_copies_across_splits(tmp_path, kind) -> None:
    samples = [
        Sample(f"s/{i}", blurred(tmp_path / f"{i}.png", i), (("cat", "dog")[i % 2],))
        for i in range(40)
    ]
    file = tmp_path / "copy.png"
    with Image.open(samples[7].image) as image:
        COPIES[kind](image, file)
    samples.append(Sample("copy", file, ("dog",), "val"))
    report = check(collection(samples))
    assert items(report, "near-copy-in-splits") == ("s/7 (train) / copy (val)",)
    assert "copies-with-other-tags" not in [p.code for p in report.problems]
    # In one split they are no leak, but their tags must not contradict each other.
    samples[-1] = Sample("copy", file, ("cat",))
    report = check(collection(samples))
    assert [p.code for p in report.warnings if "cop" in p.code] == ["copies-with-other-tags"]
    assert items(report, "copies-with-other-tags") == ("s/7 (dog) / copy (cat)",)


def test_blank_images_are_no_copies(tmp_path) -> None:
    samples = sound(tmp_path)
    for i, colour in enumerate(("white", "#fefefe", "black")):
        file = tmp_path / f"blank{i}.png"
        Image.new("RGB", (40, 40), colour).save(file)
        samples.append(Sample(f"blank{i}", file, ("cat",), ("train", "val")[i % 2]))
    assert not check(collection(samples)).problems


def test_classes_that_always_come_together(tmp_path) -> None:
    tags = [("cat", "dog")] * 9 + [("cat",)] + [("owl",), ("owl", "fox"), ("owl", "cow")] * 6
    image = picture(tmp_path / "a.png", 0)
    samples = [Sample(f"{i}", image, t) for i, t in enumerate(tags)]
    report = check(collection(samples, ("cat", "dog", "fox", "owl", "cow")))
    assert items(report, "always-together") == (
        "cat (10) and dog (9) in 9",
        "fox with owl in 6 of its 6 images",
        "cow with owl in 6 of its 6 images",
    )
    assert "never-alone" not in [p.code for p in report.problems]


def test_a_class_that_is_never_alone(tmp_path) -> None:
    tags = [("cat",), ("dog",), ("cat", "fox"), ("dog", "fox"), ()] * 5
    image = picture(tmp_path / "a.png", 0)
    samples = [Sample(f"{i}", image, t) for i, t in enumerate(tags)]
    report = check(collection(samples, ("cat", "dog", "fox")))
    assert items(report, "never-alone") == ("fox (0 of 10)",)
    assert "always-together" not in [p.code for p in report.problems]
    samples.append(Sample("once", image, ("fox",)))
    report = check(collection(samples, ("cat", "dog", "fox")))
    assert "never-alone" not in [p.code for p in report.problems]
