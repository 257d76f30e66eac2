"""The main job as one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weakseg.pipeline import Run, run_recipe
from weakseg.recipe import data_values, load_recipe

__all__ = ["run"]


def run(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    out: str | Path = "weakseg-run",
    recipe: str | Path | Mapping[str, Any] | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | str | Path | None = None,
    sets: Sequence[str] = (),
) -> Run:
    """From a folder of images and a table of tags to masks, a segmentation model and a report.

    Args:
        images: Folder of images.
        labels: Table of tags (CSV, TSV, JSONL); without it, one folder per class is expected.
        out: Run folder. An interrupted run goes on where it stopped.
        recipe: Settings: a YAML file, the name of a shipped recipe, or plain values.
        masks: Ground-truth masks, where there are any: for evaluation only.
        classes: Class names in mask order; default: sorted tags.
        sets: More settings, such as ``"train.steps=2000"``.

    Returns:
        The finished run: ``run.masks``, ``run.model``, ``run.report``.

    Raises:
        UserError: Whatever you can mend; its text says how.
    """
    data = data_values(images, labels, masks, classes)
    return run_recipe(load_recipe(recipe, overrides={"data": data}, sets=sets), out)
