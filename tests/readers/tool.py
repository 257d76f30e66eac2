"""Runs in the second environment (requirements.txt), without weakseg: the tools' own code.

``python tool.py read KIND SOURCE OUT`` reads an export of weakseg as the tool does and writes what
it sees to OUT (npz: one (H, W) array of label ids for each image, and ``labels``, the names by id).
``python tool.py write KIND SOURCE OUT`` writes masks (npz of the same form) as the tool exports them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np


def main(job: str, kind: str, source: str, out: str) -> None:
    logging.disable(logging.WARNING)
    if job == "read":
        labels, masks = READ[kind](Path(source))
        np.savez(out, labels=np.array(labels), **masks)
    else:
        with np.load(source) as file:
            masks = {key: file[key] for key in file.files if key != "labels"}
            WRITE[kind](file["labels"].tolist(), masks, Path(out))


def _datumaro(source: Path, form: str):
    import datumaro as dm

    data = dm.Dataset.import_from(str(source), form)
    labels = [label.name for label in data.categories()[dm.AnnotationType.label]]
    found = {}
    for item in data:
        # Instances carry the label and, with segmentations, no mask overlaps another.
        own = [a for a in item.annotations if a.type == dm.AnnotationType.mask]
        own = [a for a in own if labels[a.label] != "background"]
        size = own[0].image.shape if own else (0, 0)
        mask = np.zeros(size, dtype=np.uint8)
        numbers = np.zeros(size, dtype=np.int32)
        for number, annotation in enumerate(own, start=1):
            inside = np.asarray(annotation.image, dtype=bool)
            assert not mask[inside].any(), "masks overlap"
            mask[inside], numbers[inside] = annotation.label + 1, number
        found[f"mask:{item.id}"], found[f"object:{item.id}"] = mask, numbers
    return ["", *labels], found


def _label_studio(source: Path):
    from label_studio_sdk._extensions.label_studio_tools.core.label_config import parse_config
    from label_studio_sdk.converter import brush

    configuration = parse_config((source / "config.xml").read_text(encoding="utf-8"))
    labels = ["", *configuration["label"]["labels"]]
    found = {}
    for task in json.loads((source / "tasks.json").read_text(encoding="utf-8")):
        (prediction,) = task["predictions"]
        for region in prediction["result"]:
            assert region["from_name"] in configuration and region["type"] == "brushlabels"
            size = region["original_height"], region["original_width"]
            pixels = brush.decode_rle(region["value"]["rle"]).reshape(*size, 4)[:, :, 3]
            mask = found.setdefault(f"mask:{task['data']['weakseg_id']}", np.zeros(size, np.uint8))
            mask[pixels > 128] = labels.index(region["value"]["brushlabels"][0])
    return labels, found


def _fiftyone(source: Path):
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "1")
    from fiftyone.utils.data.importers import ImageSegmentationDirectoryImporter

    targets = json.loads((source / "mask_targets.json").read_text(encoding="utf-8"))
    labels = [targets.get(str(i), "") for i in range(256)]
    found = {}
    # The importer alone: a data set would need a running MongoDB.
    with ImageSegmentationDirectoryImporter(dataset_dir=str(source)) as importer:
        for image, _, segmentation in importer:
            name = Path(image).relative_to(source / "data").with_suffix("").as_posix()
            found[f"mask:{name}"] = segmentation.get_mask()
    return labels, found


def _dataset(labels, masks):
    import datumaro as dm

    items = []
    for name, mask in masks.items():
        found = [
            dm.Mask(mask == i, label=int(i), group=n, id=n)
            for n, i in enumerate(np.unique(mask[mask > 0]), start=1)
        ]
        image = dm.Image.from_numpy(np.zeros((*mask.shape, 3), dtype=np.uint8))
        items.append(dm.DatasetItem(name, subset="default", media=image, annotations=found))
    return dm.Dataset.from_iterable(items, categories=labels, media_type=dm.Image)


def _write_voc(labels, masks, out: Path) -> None:
    """As CVAT exports 'Segmentation mask 1.1': painted, with a label map of the task's colours."""
    colours = {
        name: ((37 * i) % 256, (91 * i) % 256, (53 * i) % 256) for i, name in enumerate(labels)
    }
    label_map = {name: [colour, [], []] for name, colour in colours.items()}
    _dataset(labels, masks).export(
        str(out), "voc_segmentation", label_map=label_map, apply_colormap=True, save_media=False
    )


def _write_coco(labels, masks, out: Path) -> None:
    _dataset(labels, masks).export(str(out), "coco_instances", save_media=False)


def _write_label_studio(labels, masks, out: Path) -> None:
    from label_studio_sdk.converter import brush

    tasks = []
    for name, mask in masks.items():
        regions = [
            {
                "type": "brushlabels",
                "original_width": mask.shape[1],
                "original_height": mask.shape[0],
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": [int(b) for b in brush.mask2rle((255 * (mask == i)).astype(np.uint8))],
                    "brushlabels": [labels[i]],
                },
            }
            for i in np.unique(mask[mask > 0])
        ]
        url = f"/data/upload/1/0123abcd-{name.rpartition('/')[2]}.png"
        tasks.append({"data": {"image": url}, "annotations": [{"result": regions}]})
    out.mkdir()
    (out / "export.json").write_text(json.dumps(tasks), encoding="utf-8")


READ = {
    "cvat": lambda source: _datumaro(source, "voc_segmentation"),
    "voc": lambda source: _datumaro(source, "voc_segmentation"),
    "coco": lambda source: _datumaro(source, "coco_instances"),
    "labelstudio": _label_studio,
    "fiftyone": _fiftyone,
}
WRITE = {"cvat": _write_voc, "coco": _write_coco, "labelstudio": _write_label_studio}

if __name__ == "__main__":
    main(*sys.argv[1:])
