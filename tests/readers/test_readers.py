"""Round trips through the tools' own readers and writers, in an environment of their own.

``WEAKSEG_READERS`` names its interpreter; else ``.venv-readers/bin/python`` of the project is used.
See ``requirements.txt`` for how to make it.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.contract.test_exporters import CLASSES, _mask, build, corrected, new_run
from weakseg.export.annotations import Options
from weakseg.export.annotations.base import instances
from weakseg.stages.annotation import export_masks, import_masks

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("WEAKSEG_READERS") or ROOT / ".venv-readers/bin/python")
NAMES = ("cat/001", "größe 1/a b", "日本/猫")

pytestmark = [
    pytest.mark.readers,
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"no second environment ({PYTHON}); see tests/readers"
    ),
]


def tool(job: str, kind: str, source: Path, out: Path) -> Path:
    words = [
        str(PYTHON),
        str(Path(__file__).with_name("tool.py")),
        job,
        kind,
        str(source),
        str(out),
    ]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def pictures(unsure: bool) -> list[np.ndarray]:
    """Noise, blocks, and rings with holes; without 255 where that is asked for."""
    masks = [_mask(1, 20, 31, "noise"), _mask(2, 40, 33, "blocks"), _mask(3, 24, 30, "ring")]
    if not unsure:
        for mask in masks:
            mask[mask == 255] = 0
        masks[2][9:15, 9:20] = 2
    return masks


@pytest.mark.parametrize("kind", ["cvat", "voc", "coco", "labelstudio", "fiftyone"])
def test_the_tool_sees_what_was_exported(kind, tmp_path):
    unsure = kind != "voc"  # datumaro's VOC reader knows no pixel without a label
    masks = pictures(unsure)
    _, made = build(tmp_path, masks, NAMES)
    made.options = Options(unsure="label", copy=True)  # datumaro follows no links
    export_masks(made, kind, tmp_path / "out")
    source = tmp_path / "out"
    if kind == "cvat":
        source = tmp_path / "unpacked"
        with zipfile.ZipFile(tmp_path / "out/masks.zip") as archive:
            archive.extractall(source)
    with np.load(tool("read", kind, source, tmp_path / "seen.npz")) as seen:
        labels = seen["labels"].tolist()
        for name, mask in zip(NAMES, masks, strict=True):
            ids = seen[f"mask:{name}"]
            for label, title in enumerate((*CLASSES, "unsure"), start=1):
                own = mask == (label if label <= len(CLASSES) else 255)
                if own.any():
                    assert ((ids == labels.index(title)) == own).all(), (name, title)
            if kind in ("cvat", "coco"):
                whole = np.where(mask == 255, len(CLASSES) + 1, mask)
                assert _same_parts(seen[f"object:{name}"], instances(whole, "component")[0])


def _same_parts(a: np.ndarray, b: np.ndarray) -> bool:
    """True where two numberings cut an image into the same parts."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return bool(len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1])


@pytest.mark.parametrize("kind", ["cvat", "coco", "labelstudio"])
def test_what_the_tool_exports_comes_back(kind, tmp_path):
    masks = pictures(unsure=False)
    collection, _ = build(tmp_path, masks, NAMES)
    labels = np.array(["background", "no", "cat", "traffic light", "größter Hund"])
    order = [0, *(labels.tolist().index(name) for name in CLASSES)]
    given = {name: np.array(order)[mask] for name, mask in zip(NAMES, masks, strict=True)}
    np.savez(tmp_path / "given.npz", labels=labels, **given)
    tool("write", kind, tmp_path / "given.npz", tmp_path / "exported")
    run, recipe = new_run(tmp_path)
    found = import_masks(run, recipe, collection, tmp_path / "exported", confirmed=True)
    assert found.format == kind
    back = corrected(run)
    for name, mask in zip(NAMES, masks, strict=True):
        assert (back[name] == mask).all(), name
