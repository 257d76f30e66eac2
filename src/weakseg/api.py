"""The main job as one function."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weakseg.console import console
from weakseg.errors import UserError
from weakseg.methods import resolve
from weakseg.pipeline import Run, run_recipe
from weakseg.recipe import Recipe, data_values, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.batches import pick_device

__all__ = ["default_recipe", "run", "starting_recipe"]


_DEFAULTS = ("default/cpu", "default/gpu", "default/trained")


def default_recipe(accelerator: str = "auto") -> str:
    """Name of the shipped recipe for this machine: what a run starts from that names none.

    docs/choosing.md says how the two were chosen.
    """
    return "default/gpu" if pick_device(accelerator).type == "cuda" else "default/cpu"


def _fits(recipe: Recipe) -> bool:
    """Whether a frozen backbone does for the recipe's method."""
    method, config = resolve(recipe.method)
    return not recipe.backbone.is_frozen or method.pools(config)


def starting_recipe(
    overrides: Mapping[str, Any], sets: Sequence[str], kept: Path | None = None
) -> Recipe:
    """The recipe of a run that names none: the default of this machine.

    A run that was started with another one of the defaults, on another machine or by an earlier
    version, keeps it, so that the same command, or one with another setting, goes on with it
    anywhere. A classifier that is given needs no method's recipe.

    Args:
        overrides: Nested values that win over the recipe.
        sets: Assignments such as ``"train.steps=2000"``, which win over all.
        kept: Recipe that was used in the folder before; it need not exist.
    """

    def start(name: str | None) -> Recipe:
        return load_recipe(name, overrides=overrides, sets=sets)

    defaults = {name: start(name) for name in _DEFAULTS}
    if defaults["default/cpu"].method.get("from_classifier") is not None:
        return start(None)
    name = default_recipe(defaults["default/cpu"].runtime.accelerator)
    if not _fits(defaults[name]):
        name = "default/trained"
    chosen = defaults[name]
    before = None if kept is None else _kept(kept)
    if before is None:
        console.print(f"  No recipe was named: {name}, for this machine (docs/choosing.md).")
        return chosen
    candidates = list(defaults.values())
    with contextlib.suppress(UserError):  # settings of the default method, without its name
        candidates.append(start(None))  # what earlier versions started from
    alike = [c for c in candidates if _trains_alike(c, before)]
    return alike[0] if len(alike) == 1 else chosen


def _trains_alike(recipe: Recipe, other: Recipe) -> bool:
    """Whether they agree in most of what a training depends on."""
    keys = ("method", "backbone", "train")
    return sum(getattr(recipe, key) == getattr(other, key) for key in keys) >= 2


def _kept(file: Path) -> Recipe | None:
    if file.is_file():
        with contextlib.suppress(UserError):  # of another version
            return load_recipe(file)
    return None


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
        recipe: Settings: a YAML file, the name of a shipped recipe, or plain values; default: the
            shipped ``default/gpu`` or ``default/cpu``, whichever suits this machine.
        masks: Ground-truth masks, where there are any: for evaluation only.
        classes: Class names in mask order; default: sorted tags.
        sets: More settings, such as ``"train.steps=2000"``.

    Returns:
        The finished run: ``run.masks``, ``run.model``, ``run.report``.

    Raises:
        UserError: Whatever you can mend; its text says how.
    """
    over = {"data": data_values(images, labels, masks, classes)}
    if recipe is None:
        kept = RunFolder(out).recipe_file
        return run_recipe(starting_recipe(over, sets, kept), out)
    return run_recipe(load_recipe(recipe, overrides=over, sets=sets), out)
