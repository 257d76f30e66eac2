"""FiftyOne: a folder that ``fiftyone.types.ImageSegmentationDirectory`` imports; write only.

::

    data/cat/001.jpg       links to the images, or copies
    labels/cat/001.png     gray PNG: the class ids themselves, 255 unsure
    mask_targets.json      id -> name, for ``dataset.default_mask_targets``
    load.py                the lines that import the folder
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from weakseg.errors import UserError
from weakseg.export.annotations.base import (
    UNSURE,
    UNSURE_ID,
    Format,
    Item,
    MaskSet,
    formats,
    place_image,
)
from weakseg.export.annotations.tree import Tree
from weakseg.export.annotations.voc import write_text
from weakseg.files import atomic_path

__all__ = ["FiftyOne"]

_LOAD = '''\
"""Makes a FiftyOne dataset of this folder: python load.py [NAME]"""

import json
import sys
from pathlib import Path

import fiftyone as fo

folder = Path(__file__).resolve().parent
dataset = fo.Dataset.from_dir(
    dataset_dir=str(folder),
    dataset_type=fo.types.ImageSegmentationDirectory,
    label_field="weakseg",
    name=sys.argv[1] if len(sys.argv) > 1 else None,
)
targets = json.loads((folder / "mask_targets.json").read_text(encoding="utf-8"))
dataset.default_mask_targets = {int(number): name for number, name in targets.items()}
dataset.save()
print(dataset)
'''


@formats.register("fiftyone")
class FiftyOne(Format):
    """See the module's text."""

    reads = False

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """The folder."""
        twice = [key for key, n in Counter(item.id for item in masks.items).items() if n > 1]
        if twice:
            raise UserError("two images have this id", where=twice[0], mend="rename one of them")

        def work(item: Item, mask: np.ndarray) -> None:
            place_image(item, out / "data" / item.file, masks.options.copy)
            with atomic_path(out / "labels" / f"{item.id}.png") as temporary:
                Image.fromarray(mask).save(temporary, format="PNG")

        for _ in masks.each(work, "fiftyone", keep_unsure=True):
            pass
        targets = {0: "background", **dict(enumerate(masks.classes, start=1))}
        if masks.with_unsure:
            targets[UNSURE_ID] = UNSURE
        write_text(out / "mask_targets.json", [json.dumps(targets, indent=1, ensure_ascii=False)])
        write_text(out / "load.py", [_LOAD.rstrip("\n")])
        return []

    def fits(self, tree: Tree) -> bool:
        """Never: its masks are read as a plain folder."""
        return False
