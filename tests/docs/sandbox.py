"""A folder that holds what the docs talk about: photos, tables, published data, a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from weakseg.cli import app
from weakseg.data.images import read_mask, write_mask

__all__ = ["NETWORK", "TINY", "build", "call", "sets"]

CLASSES = ("cat", "sofa")
COLOURS = {"cat": (220, 40, 40), "sofa": (40, 200, 60)}
SIDE = 48

TINY = (
    "train.steps=4",
    "train.batch=4",
    "train.crop=48",
    "train.resize=[1.0, 1.2]",
    "seeds.scales=[1.0]",
    "segmenter.channels=8",
    "segmenter.train.steps=2",
    "segmenter.train.batch=4",
    "segmenter.train.crop=48",
    "runtime.accelerator=cpu",
    "runtime.workers=0",
)
"""Settings of the seconds that a test has; what a page sets itself wins over them."""

NETWORK = {"backbone.name": "test_resnet", "backbone.pretrained": "false"}
"""Wins over the page: weights would have to be fetched."""


def call(*words: object) -> int:
    """Runs a command in this process; returns its exit code."""
    try:
        app([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def sets(*assignments: str) -> list[str]:
    """The words of ``--set`` for each of these."""
    return [word for assignment in assignments for word in ("--set", assignment)]


def build(root: Path) -> None:
    """Fills the folder, the working directory, with everything but what a command there makes."""
    rng = np.random.default_rng(0)
    for index in range(12):
        tag = CLASSES[index % 2]
        _photo(rng, f"photos/{tag}/{index:03}.png", tag, Path(f"truth/{tag}/{index:03}.png"))
    photos = sorted(Path("photos").rglob("*.png"))
    table = ["image,labels", *(f"{p.relative_to('photos')},{p.parent.name}" for p in photos)]
    Path("labels.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    Path("classes.txt").write_text("".join(f"{c}\n" for c in CLASSES), encoding="utf-8")
    for name in ("new_photos/a/one.jpg", "new_photos/two.png", "new.jpg", "image.jpg"):
        _photo(rng, name, "cat")
    _photo(rng, "slide.tif", "sofa", size=(400, 300))
    _photo(rng, "slides/slide.png", "sofa", size=(400, 300))
    _weights()
    _voc(rng)
    _coco(rng, photos)
    _scores(photos)
    shutil.copytree("truth", "masks")
    shutil.copy("classes.txt", "masks")
    words = ("photos", "labels.csv", "--masks", "truth", "--classes", "classes.txt")
    network = [f"{key}={value}" for key, value in NETWORK.items()]
    network.append("method.name=cam")  # so that a segmenter follows, as the pages tell it
    assert call("run", *words, "--out", "run", *sets(*TINY, *network)) == 0
    shutil.copytree("run", "weakseg-run")
    _corrected()


def _photo(
    rng: np.random.Generator,
    name: str,
    tag: str,
    truth: Path | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
) -> None:
    """A square of the class's colour on grey noise, and its mask where one is wanted."""
    width, height = size
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    y, x = rng.integers(0, (height - 20, width - 20))
    image[y : y + 20, x : x + 20] = COLOURS[tag]
    mask[y : y + 20, x : x + 20] = CLASSES.index(tag) + 1
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(name)
    if truth is not None:
        write_mask(truth, mask)


def _weights() -> None:
    """A classifier of the tiny network, alone and as the weights of a backbone."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=len(CLASSES))
    torch.save(network.state_dict(), "weights.pth")
    save_file(network.state_dict(), "resnet50.safetensors")


def _voc(rng: np.random.Generator) -> None:
    """PASCAL VOC with eight images, at both places where the docs have it."""
    root = Path("VOCdevkit/VOC2012")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "Annotations").mkdir()
    ids = [f"2007_{i:06}" for i in range(8)]
    for i, key in enumerate(ids):
        tag = CLASSES[i % 2]
        _photo(rng, f"{root}/JPEGImages/{key}.jpg", tag)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:20, :20] = {"cat": 8, "sofa": 18}[tag]  # as VOC counts
        write_mask(root / "SegmentationClass" / f"{key}.png", mask)
        (root / "Annotations" / f"{key}.xml").write_text(
            f"<annotation><object><name>{tag}</name></object></annotation>"
        )
    for name, members in {"train": ids[:4], "train_aug": ids[:6], "val": ids[6:]}.items():
        (lists / f"{name}.txt").write_text("".join(f"{key}\n" for key in members))
    Path("VOC2012").symlink_to(root, target_is_directory=True)


def _coco(rng: np.random.Generator, photos: list[Path]) -> None:
    """COCO in its usual layout, and one JSON for the photos."""
    for i in range(6):
        _photo(rng, f"coco2014/train2014/COCO_train2014_{i:012}.png", CLASSES[i % 2])
    images = sorted(Path("coco2014/train2014").iterdir())
    _instances(Path("coco2014/annotations/instances_train2014.json"), images, "coco2014/train2014")
    _instances(Path("instances.json"), photos, "photos")


def _instances(path: Path, images: list[Path], root: str) -> None:
    """One square outline for each image, of the two classes in turn."""
    described, annotations = [], []
    for i, image in enumerate(images):
        name = image.relative_to(root).as_posix()
        described.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
        tag = image.parent.name if image.parent.name in CLASSES else CLASSES[i % 2]
        thing = {"id": i, "image_id": i, "category_id": 1 + CLASSES.index(tag), "iscrowd": 0}
        outline = [4, 4, 30, 4, 30, 30, 4, 30]
        annotations.append({**thing, "segmentation": [outline], "bbox": [4, 4, 26, 26]})
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": described, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content), encoding="utf-8")


def _scores(photos: list[Path]) -> None:
    """The photos' true masks as score maps of irn."""
    for photo in photos:
        k = CLASSES.index(photo.parent.name)
        truth = read_mask(Path("truth", photo.parent.name, photo.name))
        maps = (truth == k + 1)[None].astype(np.float32)
        file = Path("cams", photo.parent.name, f"{photo.stem}.npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, {"keys": np.array([k]), "high_res": maps}, allow_pickle=True)


def _corrected() -> None:
    """What CVAT and Label Studio give back when somebody has drawn the true masks."""
    given = ("masks", "--images", "photos", "--classes", "classes.txt")
    assert call("export", *given, "--to", "cvat", "--out", "made") == 0
    shutil.move("made/masks.zip", "task.zip")
    shutil.rmtree("made")
    assert call("export", *given, "--to", "labelstudio", "--out", "made") == 0
    tasks = json.loads(Path("made/tasks.json").read_text(encoding="utf-8"))
    for i, task in enumerate(tasks):
        task |= {"id": i, "annotations": task.pop("predictions")}
    Path("project.json").write_text(json.dumps(tasks), encoding="utf-8")
    shutil.rmtree("made")
