"""What every source must hold. A new one inherits ``SourceContract`` and gives its arguments."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weakseg.data.images import write_mask
from weakseg.data.samples import Collection
from weakseg.data.sources import Source, sources
from weakseg.errors import UserError

TAGS = {"001": ["dog", "cat"], "002": ["cat"], "003": ["dog"], "004": ["fox 2"], "005": ["fox 10"]}


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value * 40, 0, 0)).save(path)
    return path


class SourceContract:
    """The suite; ``build`` writes data into an empty folder and returns the arguments."""

    source: str

    def build(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @pytest.fixture
    def member(self) -> Source:
        __import__("weakseg.data.folder"), __import__("weakseg.data.voc")
        __import__("weakseg.data.coco")
        return sources[self.source]

    @pytest.fixture
    def given(self, tmp_path: Path) -> dict[str, Any]:
        keys = ("labels", "masks", "classes", "untagged")
        return {**dict.fromkeys(keys), **self.build(tmp_path / "data")}

    @pytest.fixture
    def found(self, member: Source, given: dict[str, Any]) -> Collection:
        return member(**given)

    def test_same_collection_twice(self, member, given, found) -> None:
        again = member(**given)
        assert again == found and again.fingerprint() == found.fingerprint()

    def test_ids_are_unique_and_mirror_paths(self, found) -> None:
        ids = [sample.id for sample in found]
        assert len(set(ids)) == len(ids) > 0 and ids == sorted(ids)
        for sample in found:
            path = sample.image.as_posix()
            assert path.removesuffix(sample.image.suffix).endswith("/" + sample.id)
            assert not sample.id.startswith(("/", ".")) and sample.image.is_file()

    def test_tags_are_classes_in_order(self, found) -> None:
        assert found.classes and len(set(found.classes)) == len(found.classes)
        for sample in found:
            assert sample.tags is not None
            assert sample.tags == tuple(c for c in found.classes if c in sample.tags)
        assert found.tag_matrix().sum() == sum(len(s.tags or ()) for s in found)

    def test_it_says_where_tags_come_from(self, found) -> None:
        assert found.name and found.tag_source
        assert all(note.endswith(".") for note in found.notes)

    def test_fingerprint_ignores_masks_and_sees_tags(self, found) -> None:
        bare = replace(found, samples=tuple(replace(s, mask=None) for s in found))
        assert bare.fingerprint() == found.fingerprint()
        other = (replace(found[0], tags=()), *found.samples[1:])
        assert replace(found, samples=other).fingerprint() != found.fingerprint()

    def test_masks_are_files(self, found) -> None:
        for sample in found:
            assert sample.mask is None or sample.mask.is_file()

    def test_unknown_options_are_refused(self, member, given) -> None:
        with pytest.raises(UserError, match="no_such_option") as caught:
            member(**given, no_such_option=1)
        assert caught.value.mend

    def test_bad_choice_of_untagged(self, member, given) -> None:
        with pytest.raises(UserError, match="maybe") as caught:
            member(**{**given, "untagged": "maybe"})
        assert "negative" in (caught.value.mend or "")

    def test_missing_root(self, member, given, tmp_path) -> None:
        for root in (tmp_path / "none", None):
            with pytest.raises(UserError) as caught:
                member(**{**given, "root": root})
            assert caught.value.mend


class TestFolderWithTable(SourceContract):
    """Images in sub-folders, a CSV table, some masks."""

    source = "folder"

    def build(self, folder: Path) -> dict[str, Any]:
        for i, name in enumerate(TAGS):
            put(folder / "images" / f"part {i % 2}" / f"{name}.jpg", i)
        with (folder / "tags.csv").open("w", newline="") as file:
            rows = ([name, ";".join(tags)] for name, tags in TAGS.items())
            csv.writer(file).writerows([["image", "labels"], *rows])
        write_mask(folder / "masks" / "part 0" / "001.png", np.zeros((6, 8), int))
        root = folder / "images"
        return {"root": root, "labels": folder / "tags.csv", "masks": folder / "masks"}


class TestFolderWithJsonLines(SourceContract):
    """JSON lines and a class list."""

    source = "folder"

    def build(self, folder: Path) -> dict[str, Any]:
        lines = []
        for i, (name, tags) in enumerate(TAGS.items()):
            put(folder / f"{name}.png", i)
            lines.append(json.dumps({"image": f"{name}.png", "labels": tags, "split": "train"}))
        (folder / "labels.jsonl").write_text("\n".join(lines))
        return {"root": folder, "classes": ["fox 10", "fox 2", "owl", "dog", "cat"]}


class TestFolderWithClassFolders(SourceContract):
    """One folder for each class, one image in two of them."""

    source = "folder"

    def build(self, folder: Path) -> dict[str, Any]:
        for i, (name, tags) in enumerate(TAGS.items()):
            for tag in tags:
                put(folder / tag / f"{name}.jpg", i)
        return {"root": folder}

    def test_known_answer(self, found) -> None:
        assert found.classes == ("cat", "dog", "fox 2", "fox 10")
        assert found[0].tags == ("cat", "dog") and len(found) == 5


class TestVoc(SourceContract):
    """A devkit tree with XML annotations."""

    source = "voc"

    def build(self, folder: Path) -> dict[str, Any]:
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True), (folder / "Annotations").mkdir()
        for i, name in enumerate(TAGS):
            put(folder / "JPEGImages" / f"{name}.jpg", i)
            names = "".join(f"<object><name>{n}</name></object>" for n in ("dog", "boat")[: i + 1])
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{names}</annotation>")
        (lists / "train.txt").write_text("\n".join([*TAGS][:3]))
        (lists / "val.txt").write_text("\n".join([*TAGS][3:]))
        write_mask(folder / "SegmentationClass" / "001.png", np.zeros((6, 8), int))
        return {"root": folder}


class TestCoco(SourceContract):
    """Two instances files in the usual layout, and drawn masks."""

    source = "coco"

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "cache"))

    def build(self, folder: Path) -> dict[str, Any]:
        (folder / "annotations").mkdir(parents=True)
        names = {1: "dog", 7: "cat", 90: "fox 2", 91: "fox 10"}
        numbers = {name: number for number, name in names.items()}
        categories = [{"id": number, "name": name} for number, name in names.items()]
        for split, keys in (("train", [*TAGS][:3]), ("val", [*TAGS][3:])):
            images, annotations = [], []
            for i, key in enumerate(keys):
                put(folder / f"{split}2017" / f"{key}.jpg", i)
                size = {"height": 6, "width": 8}
                images.append({"id": i, "file_name": f"{key}.jpg", **size})
                for tag in TAGS[key]:
                    outline = {"bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}
                    owner = {"image_id": i, "category_id": numbers[tag], "iscrowd": 0}
                    annotations.append({"id": len(annotations), **owner, **outline})
            content = {"images": images, "annotations": annotations, "categories": categories}
            file = folder / "annotations" / f"instances_{split}2017.json"
            file.write_text(json.dumps(content))
        return {"root": folder, "masks": "coco"}

    def test_known_answer(self, found) -> None:
        assert found.classes == ("dog", "cat", "fox 2", "fox 10")
        assert found[0].id == "train2017/001" and found[0].tags == ("dog", "cat")


def test_sources_need_no_torch() -> None:
    code = (
        "import sys, weakseg.data.check, weakseg.data.voc, weakseg.data.folder, weakseg.data.coco, "
        "weakseg.data.images; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
