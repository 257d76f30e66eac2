"""The check: each kind of damage is found, all at once, and sound data raises nothing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from weakseg.data.check import CheckReport, Problem, check
from weakseg.data.images import write_mask
from weakseg.data.samples import Collection, Sample

SIZE = (12, 16)  # height, width


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
    image = picture(tmp_path / "a.png", 0)
    samples = [Sample(f"{i}", image, (("horse", "house")[i % 2],)) for i in range(20)]
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
