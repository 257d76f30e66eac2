"""Stage 1: gather the collection, and report every problem of the data before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from weakseg.console import Bar, console
from weakseg.data.check import CheckReport
from weakseg.data.check import check as check_collection
from weakseg.data.depth import Reading
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import sources
from weakseg.data.survey import find_reading
from weakseg.digests import contents
from weakseg.errors import UserError
from weakseg.files import write_json
from weakseg.recipe import DataConfig, Recipe
from weakseg.runfolder import RunFolder, Stage

__all__ = ["check", "collect", "inspect", "planned", "truths", "with_reading"]


def collect(data: DataConfig) -> Collection:
    """The collection that a recipe's ``data`` section describes, and how its images are read.

    Raises:
        UserError: Something in it is missing or contradictory; says how to mend it.
    """
    source = sources[data.source]
    common = {
        "root": data.root,
        "labels": data.labels,
        "masks": data.masks,
        "classes": data.classes,
        "untagged": data.untagged,
    }
    twice = next((name for name in data.options if name in common), None)
    if twice is not None:
        raise UserError(
            f"{twice!r} is a setting of every source, not an option of {data.source!r}",
            where=f"data.options.{twice}",
            mend=f"write data.{twice}",
        )
    collection = source(**common, **data.options)
    given = Reading(data.depth, data.bands)
    reading, notes = find_reading(collection.samples, given)
    collection = replace(collection.read_as(reading), notes=(*collection.notes, *notes))
    return collection if data.masks_are == "ids" else collection.with_binary_masks()


def with_reading(recipe: Recipe, reading: Reading) -> Recipe:
    """The recipe with what was found of its images: range of values and bands.

    Later commands on a run read its images as it did, whatever has come to them since.
    """
    found = {"depth": reading.depth, "bands": reading.bands}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=found)})


def inspect(collection: Collection, train: Sequence[str]) -> CheckReport:
    """All problems of the collection at once, with a progress bar."""
    with Bar("check", len(collection)) as bar:
        return check_collection(collection, train=train, progress=lambda done, total: bar.to(done))


def check(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Checks the data; warnings are shown, errors stop.

    Raises:
        UserError: The data has errors; the table of all of them is shown first.
    """
    stage = planned(run, recipe, collection)
    if stage.finished:
        return stage
    with stage.working():
        report = inspect(collection, recipe.data.train)
        write_json(stage.folder / "check.json", report.to_dict())
        stage.results |= {
            "images": len(collection),
            "errors": len(report.errors),
            "warnings": len(report.warnings),
        }
        if report.problems:
            console.print(report.table())
        if report.errors:
            raise UserError(
                "the data has errors (table above)",
                where=collection.name,
                mend="mend them and run the same command again; `weakseg check` shows them alone",
            )
    return stage


def truths(samples: Iterable[Sample]) -> str:
    """Digest of all ground-truth masks, and of what their pixels mean."""
    there = [s for s in samples if s.mask is not None]
    meant = {s.id if s.mask_id is None else f"{s.id} = {s.mask_id}": s.mask for s in there}
    return contents({name: mask for name, mask in meant.items() if mask is not None})


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    inputs = {
        "collection": collection.fingerprint(),
        "train": recipe.data.train,
        "masks": truths(collection),
    }
    return run.stage("check", inputs, keeps=False)
