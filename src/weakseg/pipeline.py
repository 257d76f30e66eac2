"""The whole way from images and tags to a segmentation model: read this file first.

Each stage takes the run folder and leaves a folder of its own in it. A stage whose inputs have not
changed is skipped; one that was interrupted goes on where it stopped. Whatever can be refused is
refused before the first stage begins, and leaves no trace; an earlier result stays until the stage
that replaces it is done. Masks of the user, where there are any, are opened by the check (do they
fit?), the evaluation and the report alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape

from weakseg.console import console
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.export.model import load, update_models
from weakseg.failures import mendable
from weakseg.files import atomic_path
from weakseg.inference import Predictor
from weakseg.methods import needs_segmenter, resolve
from weakseg.outputs import set_aside, visible
from weakseg.recipe import Recipe, load_recipe
from weakseg.registry import suggest
from weakseg.report import write_report
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages import check, evaluate, masks, predict, project, refine, seeds, segment, train
from weakseg.stages.batches import pick_device
from weakseg.stages.check import collect, with_reading
from weakseg.stages.localise import box_source, has_boxes

__all__ = ["Run", "checked", "run_recipe", "stages_of", "write_recipe"]

_WANTING = {
    "train": "train a method instead of using given scores: --set seeds.given=null",
    "evaluate": "give ground-truth masks: --set data.masks=FOLDER, or boxes: --boxes auto",
    "refine": "name its steps: --set refine=[pamr]",
    "segment": "switch the segmenter on: --set segmenter.enabled=true",
    "predict": "switch predictions on: --set segmenter.enabled=null",
}

StageFunction = Callable[[RunFolder, Recipe, Collection], Stage]

_PLANNED: dict[str, StageFunction] = {
    "check": check.planned,
    "train": train.planned,
    "seeds": seeds.planned,
    "refine": refine.planned,
    "masks": masks.planned,
    "segment": segment.planned,
    "predict": predict.planned,
    "evaluate": evaluate.planned,
}
_PREPARE: dict[str, Callable[[RunFolder, Recipe, Collection], None]] = {
    "train": train.prepare,
    "refine": refine.prepare,
    "segment": segment.prepare,
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        recipe: What was run.
        collection: What it was run on.
    """

    folder: Path
    recipe: Recipe
    collection: Collection

    @property
    def masks(self) -> Path:
        """Folder of the masks of the training images."""
        return RunFolder(self.folder).stage_folder("masks") / "masks"

    @property
    def report(self) -> Path:
        """The report."""
        return RunFolder(self.folder).report_file

    @cached_property
    def model(self) -> Predictor:
        """The trained segmenter, or the method's network where the recipe trains no segmenter."""
        wanted = needs_segmenter(self.recipe.method, self.recipe.segmenter_wanted)
        # An earlier recipe may have left a segmenter in the folder.
        return load(self.folder if wanted else RunFolder(self.folder).stage_folder("train"))


def run_recipe(recipe: Recipe, folder: str | Path, *, until: str | None = None) -> Run:
    """Runs a recipe from images to the report.

    Args:
        recipe: What to do.
        folder: The run folder; made when absent, gone on with when it holds an earlier start.
        until: Last stage to run; default all.

    Raises:
        UserError: Whatever the user can mend. What is done stays done.
    """
    recipe = checked(recipe)  # what would fail after hours fails now, before any data is touched
    run = RunFolder(folder)
    _refuse_other_content(run)
    collection = collect(recipe.data)
    recipe = with_reading(recipe, collection.reading)
    box_source(recipe, collection)  # refuses boxes that the data do not have
    stages = stages_of(recipe, collection, until)
    _refuse_other_data(run, recipe, collection)
    with run.locked():
        _say_changes(run, recipe)
        _refuse_what_cannot_be(run, recipe, collection, [name for name, _ in stages])
        if recipe.idle_settings:
            console.print(f"  without effect: {escape(', '.join(recipe.idle_settings))}")
        write_recipe(run, recipe)
        _run_stages(run, recipe, collection, stages)
    return Run(run.path, recipe, collection)


def checked(recipe: Recipe) -> Recipe:
    """The recipe, once every setting was checked that no data is needed for.

    A given classifier (``method.from_classifier``) says which network it is.

    Raises:
        UserError: Settings of the method, a refinement step, the segmenter or the devices are wrong.
    """
    resolve(recipe.method)
    seeds.check_settings(recipe)
    refine.check_settings(recipe)
    segment.check_settings(recipe)
    pick_device(recipe.runtime.accelerator, recipe.runtime.devices)
    return project.with_classifier(recipe)


def _refuse_what_cannot_be(
    run: RunFolder, recipe: Recipe, collection: Collection, names: list[str]
) -> None:
    """Goes through the stages without doing any: networks that are to be trained are built, and
    nothing that cannot be made again may be in the way of a stage that runs.

    Raises:
        UserError: Of the first stage that could not run.
    """
    plan = RunFolder(run.path)
    for name in names:
        stage = _PLANNED[name](plan, recipe, collection)
        if stage.finished:
            continue
        stage.refuse_to_lose()
        if name in _PREPARE:
            _PREPARE[name](plan, recipe, collection)
        if not stage.faults:  # what is missing is made again, and nothing follows from it
            plan.expected[name] = stage.record.fingerprint


def _run_stages(
    run: RunFolder,
    recipe: Recipe,
    collection: Collection,
    stages: list[tuple[str, StageFunction]],
) -> None:
    for note in collection.notes:
        console.print(f"  [dim]{escape(note)}[/dim]")
    try:
        for name, work in stages:
            stage = work(run, recipe, collection)
            if name in ("train", "masks", "segment"):
                update_models(run, recipe)
            _say(name, stage)
    except UserError:
        _report_of_failure(run, collection, recipe)
        raise
    write_report(run, collection, recipe)


def _report_of_failure(run: RunFolder, collection: Collection, recipe: Recipe) -> None:
    """The report as far as the run came. Its own failure is one line: the first error counts."""
    try:
        write_report(run, collection, recipe)
    except Exception as error:
        said = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        line = f"  the report could not be written ({' '.join(said.split())})"
        console.print(escape(line), soft_wrap=True)


def stages_of(
    recipe: Recipe, collection: Collection, until: str | None = None
) -> list[tuple[str, StageFunction]]:
    """The stages that this recipe and collection ask for, in order."""
    stages: list[tuple[str, StageFunction]] = [
        ("check", check.check),
        ("train", train.train),
        ("seeds", seeds.seeds),
    ]
    if recipe.seeds.given is not None:
        stages.pop(1)
    if recipe.refine:
        stages.append(("refine", refine.refine))
    stages.append(("masks", masks.masks))
    if needs_segmenter(recipe.method, recipe.segmenter_wanted):
        stages.append(("segment", segment.segment))
    if recipe.segmenter.enabled is not False:
        stages.append(("predict", predict.predict))
    if any(s.mask is not None for s in collection) or has_boxes(recipe, collection):
        stages.append(("evaluate", evaluate.evaluate))
    names = [name for name, _ in stages]
    if until is None:
        return stages
    if until not in names:
        raise UserError(
            f"this run has no stage {until!r}", mend=_WANTING.get(until) or suggest(until, names)
        )
    return stages[: names.index(until) + 1]


def _say_changes(run: RunFolder, recipe: Recipe) -> None:
    """Settings that differ from those of the run so far: a forgotten --set shows itself here."""
    if not run.recipe_file.exists():
        return
    try:
        before = _flat(load_recipe(run.recipe_file).model_dump(mode="json"))
    except UserError:  # of another version
        return
    now = _flat(recipe.model_dump(mode="json"))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        console.print(f"  settings that differ from this run's: {escape(shown)}{more}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _refuse_other_data(run: RunFolder, recipe: Recipe, collection: Collection) -> None:
    """A run on other images would train for hours in the place of a finished one: that is never
    meant. The same images elsewhere are not other ones.
    """
    if not run.recipe_file.exists():
        return
    try:
        kept = load_recipe(run.recipe_file).data
    except UserError:  # of another version: its stages decide for themselves
        return
    if (kept.source, kept.root) == (recipe.data.source, recipe.data.root):
        return
    checked = run.record("check")
    if checked is None or checked.inputs.get("collection") != collection.fingerprint():
        raise UserError(
            f"the folder holds a run on other data ({kept.root or kept.source})",
            where=run.path,
            mend="give another folder with --out, or delete this one first",
        )
    console.print(f"  the data are those of {escape(str(kept.root or kept.source))}, elsewhere")


def _refuse_other_content(run: RunFolder) -> None:
    if visible(run.path) and not run.recipe_file.exists():
        raise UserError(
            "the folder is not empty and holds no run",
            where=run.path,
            mend="give a new or empty folder with --out",
        )


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Keeps the resolved recipe in the run folder.

    A file that says the same stays as it is; one that says something else in somebody's own words
    is kept under another name.

    Raises:
        UserError: The folder cannot be written to.
    """
    file, text = run.recipe_file, recipe.to_yaml()
    try:
        if file.is_file():
            before = _recipe_in(file)
            if before == recipe:
                return
            if before is None or before.to_yaml() != file.read_text(encoding="utf-8"):
                console.print(f"  {file.name} was written by hand: kept as {set_aside(file).name}")
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise mendable(error, run.path) or error from None


def _recipe_in(file: Path) -> Recipe | None:
    with contextlib.suppress(UserError):  # of another version, or damaged
        return load_recipe(file)
    return None


def _say(name: str, stage: Stage) -> None:
    for note in stage.notes:
        console.print(f"  {escape(note)}")
    if stage.skipped:
        console.print(f"[dim]{name:<9} done before with the same inputs, skipped[/dim]")
        return
    changed = stage.changed
    because = f" (again, because of {', '.join(changed[:3])})" if changed else ""
    console.print(f"{name:<9} done in {stage.record.seconds:.0f} s{because}")
