"""What every annotation format must hold: what goes out comes back pixel by pixel."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from weakseg.data.images import read_mask, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.errors import UserError
from weakseg.export.annotations import Item, MaskSet, Options, formats
from weakseg.recipe import Recipe, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.annotation import export_masks, import_masks

CLASSES = ("cat", "größter Hund", "traffic light", "no")
NAMES = (
    "cat/001",
    "dog/001",
    "größe 1/a b",
    "日本/猫",
    "x.y.z",
    "it's 100%_#1&co",
    "deep/er/and/deeper",
)
WRITERS = [name for name in formats if formats[name].writes]
BOTH = [name for name in WRITERS if formats[name].reads]
OTHER_OBJECTS = {"coco": "class", "cvat": "class", "labelstudio": "component"}
NATIVE = {"voc"}  # holds 255 as it is

masks_of_any_kind = st.builds(
    lambda seed, height, width, kind: _mask(seed, height, width, kind),
    st.integers(0, 2**32 - 1),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(["noise", "blocks", "ring", "empty", "full"]),
)


def _mask(seed: int, height: int, width: int, kind: str) -> np.ndarray:
    """Ids 0 to 4 and 255; rings have a hole with an object in it, noise touches at corners."""
    rng = np.random.default_rng(seed)
    ids = np.array([0, 1, 2, 3, 4, 255], dtype=np.uint8)
    if kind == "noise":
        return rng.choice(ids, (height, width))
    if kind == "blocks":
        small = rng.choice(ids, (-(-height // 4), -(-width // 4)))
        return np.kron(small, np.ones((4, 4), dtype=np.uint8))[:height, :width]
    mask = np.full((height, width), rng.choice(ids) if kind == "full" else 0, dtype=np.uint8)
    if kind == "ring":
        for step, label in enumerate(rng.permutation(ids)):
            mask[step * 2 : height - step * 2, step * 2 : width - step * 2] = label
    return mask


def build(folder: Path, masks: list[np.ndarray], names=NAMES) -> tuple[Collection, MaskSet]:
    """A collection on disk, without tags, and its masks."""
    samples, items = [], []
    for name, mask in zip(names, masks, strict=False):
        image, file = folder / "photos" / f"{name}.png", folder / "made" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (mask.shape[1], mask.shape[0])).save(image)
        write_mask(file, mask)
        samples.append(Sample(name, image, ()))
        items.append(Item(name, image, file))
    return Collection("made", CLASSES, tuple(samples), "made up"), MaskSet(CLASSES, tuple(items))


def new_run(folder: Path) -> tuple[RunFolder, Recipe]:
    run = RunFolder(folder / "run")
    run.path.mkdir()
    return run, load_recipe({"data": {"source": "shapes"}})


def exported(name: str, out: Path) -> Path:
    """What comes out of the tool where a person accepts everything as it is."""
    if name == "cvat":
        return out / "masks.zip"
    if name == "labelstudio":
        tasks = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
        for task in tasks:
            task["annotations"] = [{"result": p["result"]} for p in task.pop("predictions")]
        (out / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
        return out / "export.json"
    return out


def corrected(run: RunFolder) -> dict[str, np.ndarray]:
    folder = run.path / "corrected"
    return {
        p.relative_to(folder).with_suffix("").as_posix(): read_mask(p)
        for p in folder.rglob("*.png")
    }


@pytest.mark.parametrize(
    ("name", "objects"),
    [*((name, None) for name in BOTH), *((n, o) for n, o in OTHER_OBJECTS.items())],
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(masks=st.lists(masks_of_any_kind, min_size=1, max_size=len(NAMES)))
def test_masks_come_back_pixel_by_pixel(name, objects, masks):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        collection, made = build(folder, masks)
        made.options = Options(objects=objects, unsure="label")
        export_masks(made, name, folder / "out")
        run, recipe = new_run(folder)
        found = import_masks(
            run, recipe, collection, exported(name, folder / "out"), name, confirmed=True
        )
        back = corrected(run)
        assert set(back) == set(found.ids) == {s.id for s in collection}
        for item, mask in zip(made.items, masks, strict=True):
            assert (back[item.id] == mask).all()


@pytest.mark.parametrize("name", BOTH)
def test_the_format_is_recognised(name, tmp_path):
    collection, made = build(tmp_path, [_mask(i, 20, 30, "blocks") for i in range(3)])
    made.options = Options(unsure="label")
    export_masks(made, name, tmp_path / "out")
    run, recipe = new_run(tmp_path)
    found = import_masks(run, recipe, collection, exported(name, tmp_path / "out"), confirmed=True)
    # VOC's tree with a label map is what CVAT writes too; both are read by the same function.
    assert found.format == ("cvat" if name == "voc" else name)
    assert len(found.ids) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_unsure_pixels_are_kept_or_dropped_and_said(name, tmp_path):
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[2:4], mask[5:7] = 1, 255
    collection, made = build(tmp_path, [mask, np.ones((4, 4), dtype=np.uint8)])
    notes = export_masks(made, name, tmp_path / "out")
    text = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*.*") if p.suffix != ".png")
    if name == "fiftyone":
        assert read_mask(tmp_path / "out/labels/cat/001.png")[5, 0] == 255
        return
    said = [note for note in notes if "1 of 2 masks have unsure pixels" in note]
    assert bool(said) == (name not in NATIVE)
    assert b"unsure" not in text, "no label is made up"
    run, recipe = new_run(tmp_path)
    import_masks(run, recipe, collection, exported(name, tmp_path / "out"), name, confirmed=True)
    expected = mask if name in NATIVE else np.where(mask == 255, 0, mask)
    assert (corrected(run)["cat/001"] == expected).all()


@pytest.mark.parametrize("name", WRITERS)
def test_an_export_is_whole_or_not_there(name, tmp_path):
    _, made = build(tmp_path, [_mask(i, 9, 9, "blocks") for i in range(4)])
    made.items[3].mask.write_bytes(b"no mask")
    with pytest.raises(UserError, match="mask cannot be read"):
        export_masks(made, name, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "photos"]


@pytest.mark.parametrize("name", WRITERS)
def test_it_never_writes_over_anything(name, tmp_path):
    _, made = build(tmp_path, [_mask(0, 9, 9, "blocks")])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_masks(made, name, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_masks_that_do_not_fit_are_refused(name, tmp_path):
    _, made = build(tmp_path, [_mask(0, 9, 9, "blocks")])
    write_mask(made.items[0].mask, np.zeros((9, 8), dtype=np.uint8))
    with pytest.raises(UserError, match="8 x 9, its image 9 x 9"):
        export_masks(made, name, tmp_path / "out")
    write_mask(made.items[0].mask, np.full((9, 9), 5, dtype=np.uint8))
    with pytest.raises(UserError, match="class id 5, there are 4 classes"):
        export_masks(made, name, tmp_path / "out")


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_masks_give_the_same_files(name, tmp_path):
    _, made = build(tmp_path, [_mask(i, 20, 30, "noise") for i in range(3)])
    made.options = Options(image_url="https://host/")
    for out in ("one", "two"):
        export_masks(replace(made, with_unsure=0), name, tmp_path / out)
    one, two = (
        {
            p.relative_to(tmp_path / out): p.read_bytes()
            for p in (tmp_path / out).rglob("*.*")
            if p.is_file()
        }
        for out in ("one", "two")
    )
    assert one == two and one


@pytest.mark.parametrize("name", sorted(set(WRITERS) - NATIVE - {"fiftyone"}))
def test_a_class_named_unsure_keeps_its_name(name, tmp_path):
    _, made = build(tmp_path, [np.ones((4, 4), dtype=np.uint8)])
    made = replace(made, classes=("cat", "Unsure"), options=Options(unsure="label"))
    with pytest.raises(UserError, match="a class is named 'unsure'"):
        export_masks(made, name, tmp_path / "out")


@pytest.mark.parametrize("name", WRITERS)
def test_images_are_linked_or_copied(name, tmp_path):
    _, made = build(tmp_path, [np.ones((4, 4), dtype=np.uint8)])
    export_masks(made, name, tmp_path / "links")
    export_masks(replace(made, options=Options(copy=True)), name, tmp_path / "copies")
    links = [p for p in (tmp_path / "links").rglob("*") if p.is_symlink()]
    assert [p.resolve() for p in links] == [made.items[0].image.resolve()] * len(links)
    assert len(links) == (name not in ("cvat", "labelstudio"))
    for link in links:
        copy = tmp_path / "copies" / link.relative_to(tmp_path / "links")
        assert not copy.is_symlink() and copy.read_bytes() == link.read_bytes()


def test_an_unknown_format_names_the_nearest(tmp_path):
    _, made = build(tmp_path, [np.ones((4, 4), dtype=np.uint8)])
    with pytest.raises(UserError, match="'label-studio'") as caught:
        export_masks(made, "label-studio", tmp_path / "out")
    assert "did you mean 'labelstudio'" in (caught.value.mend or "")
    with pytest.raises(UserError, match="unknown format 'masks'"):
        export_masks(made, "masks", tmp_path / "out")


def test_the_lowest_scores_come_first(tmp_path):
    _, made = build(tmp_path, [_mask(i, 8, 8, "full") for i in range(3)])
    export_masks(made, "labelstudio", tmp_path / "out", {"dog/001": 0.25, "cat/001": 0.5})
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [t["data"]["weakseg_id"] for t in tasks] == ["dog/001", "cat/001", "größe 1/a b"]
    assert [t["predictions"][0].get("score") for t in tasks] == [0.25, 0.5, None]


def test_formats_need_no_torch():
    code = (
        "import sys; from weakseg.export.annotations import formats; list(formats); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
