"""The command line: one short function per command; heavy imports stay inside."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.markup import escape

import weakseg
from weakseg.console import console
from weakseg.errors import UserError
from weakseg.failures import mendable
from weakseg.memory import wait_without_spinning
from weakseg.recipe import Recipe, data_values, load_recipe, shipped_recipes
from weakseg.runfolder import STAGES, RunFolder

if TYPE_CHECKING:
    from weakseg.report.numbers import Comparison

__all__ = ["app", "main"]

app = App(
    name="weakseg",
    version=weakseg.__version__,
    help="From image tags to pixel masks and a segmentation model.\n\n"
    "Start with `weakseg demo`, then `weakseg run IMAGES LABELS.csv`.",
)

app.suppress_keyboard_interrupt = False  # main() says how to go on

Sets = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="A setting of the recipe, such as train.steps=2000; may be repeated.",
    ),
]
Untagged = Literal["drop", "negative"] | None

_ON_THE_PAGE = ("seed best (oracle)", "classifier F1", "minutes training")
"""Columns of a comparison that a terminal has no room for."""


@app.command
def run(
    source: Path,
    labels: Path | None = None,
    /,
    *,
    out: Path = Path("weakseg-run"),
    recipe: str | None = None,
    masks: Path | None = None,
    classes: Path | None = None,
    untagged: Untagged = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    sets: Sets = (),
) -> None:
    """Do everything: check, train, seeds, masks, segmenter, predictions, report.

    Run the same command again after an interruption: it goes on where it stopped.

    Args:
        source: Folder of images, or a recipe (.yaml).
        labels: Table of tags (CSV, TSV, JSONL); without it, one folder per class is expected.
        out: Run folder.
        recipe: Recipe to start from: a file or the name of a shipped one.
        masks: Ground-truth masks, where there are any; they evaluate and nothing else.
        classes: Text file with one class name in each line, in the order of mask ids.
        untagged: What to do with images that have no tags.
        dry_run: Show the stages with their sizes and an estimate of their time, and stop.
    """
    kept = RunFolder(out).recipe_file
    settings = _settings(source, labels, recipe, masks, classes, untagged, sets, kept)
    if dry_run:
        _show_plan(settings)
        return
    from weakseg.pipeline import run_recipe

    _show_summary(run_recipe(settings, out).folder)


@app.command
def demo(*, out: Path = Path("weakseg-demo"), sets: Sets = ()) -> None:
    """Do everything on a built-in data set with a small network: a few minutes on two cores.

    Args:
        out: Run folder.
    """
    from weakseg.pipeline import run_recipe

    _show_summary(run_recipe(load_recipe("demo", sets=sets), out).folder)


@app.command
def compare(
    source: Path,
    labels: Path | None = None,
    /,
    *,
    methods: str = "cam,puzzle,seam,acr,recurseed,recurseed+edgepredictmix",
    seeds: Annotated[int, Parameter(validator=Number(gte=1, lte=1_000))] = 1,
    equal_time: Annotated[bool, Parameter(negative="")] = False,
    out: Path = Path("weakseg-compare"),
    recipe: str | None = None,
    masks: Path | None = None,
    classes: Path | None = None,
    untagged: Untagged = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    sets: Sets = (),
) -> None:
    """Run methods side by side on one data set: one table, one page with pictures.

    All train for as many image steps. Run the same command again after an interruption: finished
    runs are kept, the others go on where they stopped.

    Args:
        source: Folder of images, or a recipe (.yaml), whose section `compare` may give methods
            settings of their own and name variants.
        labels: Table of tags; without it, one folder per class is expected.
        methods: Names of methods or variants, with commas between them; the others are compared
            with the first.
        seeds: Runs of each, with the recipe's seed and those that follow it.
        equal_time: As much training time as the first method needs, instead of as many steps.
        out: Folder of the comparison, with a run folder for each run.
        recipe: Recipe to start from: a file or the name of a shipped one.
        masks: Ground-truth masks, where there are any; they evaluate and nothing else.
        classes: Text file with one class name in each line, in the order of mask ids.
        untagged: What to do with images that have no tags.
        dry_run: Show the runs with an estimate of their time, and stop.
    """
    kept = RunFolder(out).recipe_file
    settings = _settings(source, labels, recipe, masks, classes, untagged, sets, kept)
    if dry_run:
        _show_plans(settings, methods, seeds, equal_time)
        return
    from weakseg.comparison import compare

    _show_comparison(
        compare(
            settings,
            methods,
            out=out,
            seeds=seeds,
            equal_time=equal_time,
            command=shlex.join(["weakseg", *sys.argv[1:]]),
        ),
        out,
    )


@app.command
def check(
    source: Path,
    labels: Path | None = None,
    /,
    *,
    masks: Path | None = None,
    classes: Path | None = None,
    untagged: Untagged = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    page: Annotated[Path | None, Parameter(name="--report")] = None,
    sets: Sets = (),
) -> None:
    """Report every problem of the data before training. Exits with 2 if there are errors.

    Args:
        source: Folder of images, or a recipe (.yaml).
        labels: Table of tags; without it, one folder per class is expected.
        masks: Ground-truth masks to check too.
        classes: Text file with one class name in each line.
        untagged: What to do with images that have no tags.
        as_json: Print the findings as JSON.
        page: HTML file to write, with the findings and charts of the collection.
    """
    from weakseg.stages.check import collect, inspect

    data = _settings(source, labels, None, masks, classes, untagged, sets).data
    collection = collect(data)
    report = inspect(collection, data.train)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1, default=str))
    else:
        for note in collection.notes:
            console.print(f"[dim]{escape(note)}[/dim]")
        console.print(report.class_table())
        console.print(report.table() if report.problems else "no problems found")
    if page is not None:
        from weakseg.report.portrait import write_check_page

        if page.is_dir() or page.suffix.lower() not in (".html", ".htm"):
            raise UserError("is no name of a page", where=page, mend="end it in .html")
        write_check_page(report, page)
        console.print(f"report  {escape(str(page))}")
    if report.errors:
        raise SystemExit(2)


@app.command
def init(path: Path = Path("recipe.yaml"), /, *, like: str | None = None) -> None:
    """Write a recipe in which every key is explained.

    Args:
        path: File to write; an existing one is kept.
        like: Shipped recipe to start from (see `weakseg methods`); default: what `weakseg run`
            takes on this machine.
    """
    from weakseg.api import default_recipe
    from weakseg.recipe import commented_yaml

    if path.exists():
        raise UserError(
            "exists already", where=path, mend="choose another name, or delete it first"
        )
    text = commented_yaml(load_recipe(like or default_recipe()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)


def _until(stage: str, folder: Path, sets: tuple[str, ...]) -> None:
    from weakseg.pipeline import run_recipe

    kept = RunFolder(folder).recipe_file
    if not kept.exists():
        raise UserError(
            "holds no run",
            where=folder,
            mend="start one with `weakseg run IMAGES LABELS --out FOLDER`",
        )
    run_recipe(load_recipe(kept, sets=sets), folder, until=stage)


@app.command
def train(folder: Path, /, *, sets: Sets = ()) -> None:
    """Train the method of a run, with what comes before it. FOLDER holds a recipe.yaml."""
    _until("train", folder, sets)


@app.command
def seeds(folder: Path, /, *, sets: Sets = ()) -> None:
    """Write the score maps of a run, with what comes before them."""
    _until("seeds", folder, sets)


@app.command
def refine(folder: Path, /, *, sets: Sets = ()) -> None:
    """Refine the score maps of a run, with what comes before (--set refine=[affinity,crf])."""
    _until("refine", folder, sets)


@app.command
def masks(folder: Path, /, *, sets: Sets = ()) -> None:
    """Write the masks of a run, with what comes before them (--set masks.rule=constant ...)."""
    _until("masks", folder, sets)
    _show_summary(folder)


@app.command
def segment(folder: Path, /, *, sets: Sets = ()) -> None:
    """Train the segmenter of a run on its masks, with what comes before it.

    Behind a method that segments by itself too.
    """
    # Who asks for it wants it; words of the user come later and win.
    _until("segment", folder, ("segmenter.enabled=true", *sets))
    _show_summary(folder)


@app.command
def predict(
    model: Path,
    images: Path,
    /,
    *,
    out: Path,
    scales: Annotated[tuple[float, ...], Parameter(negative="", consume_multiple=True)] = (),
    flip: bool | None = None,
    max_side: int | None = None,
    tile: int | None = None,
    crf: Literal["none", "soft", "label", "deeplab"] | None = None,
    runtime: Literal["torch", "onnx", "openvino"] = "torch",
) -> None:
    """Predict masks of any images with a trained model.

    Args:
        model: Model folder, a run, or owner/name on the Hugging Face hub.
        images: Folder of images, searched with its sub-folders, or one image.
        out: Folder for the masks; mirrors the sub-folders, and the sizes of the images.
        scales: Factors on the image's size to average over; default: as the model says.
        flip: Add the mirrored image; default: as the model says.
        max_side: Reduce larger images to this longer side first.
        tile: Predict larger images in overlapping tiles of this side, at their full size.
        crf: Dense CRF on the probabilities, by its published widths; default: as the model says.
        runtime: What the network runs on; onnx and openvino use the CPU.
    """
    from weakseg.config import validate
    from weakseg.export.model import load
    from weakseg.recipe import PredictConfig
    from weakseg.stages.batches import pick_device
    from weakseg.stages.predict import images_in, predict_images

    predictor = load(str(model))
    predictor.to(pick_device("auto" if runtime == "torch" else "cpu"))
    settings = {
        "scales": scales or predictor.scales,
        "flip": predictor.flip if flip is None else flip,
        "max_side": max_side if tile or max_side is not None else predictor.max_side,
        "tile": predictor.tile if tile is None and max_side is None else tile,
        "crf": predictor.crf if crf is None else None if crf == "none" else crf,
    }
    config = validate(PredictConfig, settings, where="weakseg predict")
    samples = images_in(images, predictor.reading)
    if any((out / f"{s.id}.png").resolve() == s.image.resolve() for s in samples):
        raise UserError(
            "masks would overwrite the images", where=out, mend="give another folder with --out"
        )
    predict_images(predictor, samples, out, config, resume=False, runtime=runtime)
    (out / "classes.txt").write_text("".join(f"{c}\n" for c in predictor.classes), encoding="utf-8")
    print(f"{len(samples)} masks in {out}")


@app.command
def export(
    source: Path,
    /,
    *,
    to: str,
    out: Path,
    of: Literal["masks", "predict"] = "masks",
    split: Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)] = (),
    objects: Literal["component", "class"] | None = None,
    unsure: Literal["drop", "label"] = "drop",
    scores: Path | None = None,
    image_url: str | None = None,
    copy: Annotated[bool, Parameter(negative="")] = False,
    images: Path | None = None,
    classes: Path | None = None,
    size: Annotated[tuple[int, int] | None, Parameter(negative="")] = None,
) -> None:
    """Write the masks of a run for an annotation tool, or its model for other programs.

    Args:
        source: A run; or, with --images, a folder of masks; onnx: a run or a model folder.
        to: coco, cvat, labelstudio, voc, yolo-seg or fiftyone (docs/annotation.md); or onnx: the
            model as one file with pre- and post-processing inside, checked against PyTorch
            (docs/deployment.md).
        out: Folder to write; it must not exist. onnx: file to write.
        of: masks: those the segmenter is trained on, corrected ones where there are some;
            predict: the segmenter's predictions.
        split: Splits to export; default: all that have such masks.
        objects: What an object is: a connected area of a class, or all of a class in an image;
            default: as the format is used best.
        unsure: Leave unsure pixels (255) without a label, or give them the label 'unsure', in
            formats that cannot hold them.
        scores: CSV table with the columns id and score (0 to 1); the lowest scores come first.
        image_url: Label Studio: what stands before each image's path; default: local files.
        copy: Copy images instead of linking to them (all but cvat and labelstudio).
        images: Folder of the images that the masks mirror, where SOURCE is no run.
        classes: Text file with one class name in each line, where SOURCE is no run.
        size: onnx: height and width of the images, for models that take one size.
    """
    if to == "onnx":
        from weakseg.export.onnx import export_onnx

        export_onnx(str(source), out, size=size)
        print(out)
        return
    from weakseg.export.annotations import Options
    from weakseg.stages.annotation import (
        export_masks,
        folder_masks,
        read_scores_table,
        run_masks,
    )
    from weakseg.stages.check import collect

    if images is not None:
        masks = folder_masks(source, images, classes)
    else:
        recipe = _recipe_of(source)
        masks = run_masks(RunFolder(source), recipe, collect(recipe.data), of, split)
    masks.options = Options(objects, unsure, image_url, copy)
    notes = export_masks(masks, to, out, None if scores is None else read_scores_table(scores))
    for note in notes:
        console.print(f"[dim]{escape(note)}[/dim]")
    print(f"{len(masks.items)} masks in {out}")


@app.command
def import_masks(
    source: Path,
    /,
    *,
    into: Path,
    format: str = "auto",
    empty: Annotated[bool, Parameter(negative="")] = False,
    confirmed: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Bring corrected masks back into a run, for `weakseg segment` to train on.

    Args:
        source: What the annotation tool exported: a file, a zip archive or a folder.
        into: The run; masks land in its folder `corrected`.
        format: auto, masks (indexed PNG files), coco, cvat, labelstudio, voc or yolo-seg.
        empty: Take images without any label as background even where their tags name classes.
        confirmed: Keep unchanged masks too, as looked at and right.
    """
    from weakseg.data.sources import count
    from weakseg.stages.annotation import import_masks as bring_in
    from weakseg.stages.check import collect

    recipe = _recipe_of(into)
    found = bring_in(
        RunFolder(into), recipe, collect(recipe.data), source, format, empty, confirmed
    )
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/dim]")
    masks = count(len(found.ids), "corrected mask")
    print(f"{masks} from {found.format} in {into / 'corrected'}")
    if found.unchanged:
        console.print(f"{count(found.unchanged, 'mask')} left out, as they are unchanged")
    console.print(f"next: weakseg segment {escape(str(into))}")


def _recipe_of(folder: Path) -> Recipe:
    kept = RunFolder(folder).recipe_file
    if not kept.exists():
        raise UserError("holds no run", where=folder, mend="give the folder of a run")
    return load_recipe(kept)


@app.command
def score(
    masks: Path,
    images: Path | None = None,
    /,
    *,
    out: Path | None = None,
    shown: Annotated[int, Parameter(validator=Number(gte=1, lte=10_000))] = 60,
) -> None:
    """Sort masks by how good they probably are, without ground truth: correct the worst first.

    Writes a table (CSV) of all masks and a page (HTML) of the least certain.

    Args:
        masks: Folder of masks (indexed PNG), from any program; or a run.
        images: Folder of their images; not needed for a run.
        out: Table to write; the page stands beside it. Default: quality.csv, in the run if it is one.
        shown: Masks on the page.
    """
    from weakseg.report.quality import write_quality_page
    from weakseg.stages import masks as of_run
    from weakseg.stages.check import collect
    from weakseg.stages.score import class_names, match, score_masks, write_quality

    if out is not None and (out.suffix != ".csv" or out.is_dir()):
        raise UserError("is no .csv file", where=out, mend="give a name such as quality.csv")
    run = RunFolder(masks)
    if images is None:
        if not run.recipe_file.exists():
            raise UserError(
                "the images of these masks are not given",
                where=masks,
                mend="write `weakseg score MASKS IMAGES`, or give a run",
            )
        run.require("masks")
        recipe = load_recipe(run.recipe_file)
        collection = collect(recipe.data).split(*recipe.data.train)
        scored, names = of_run.score(run, collection), collection.classes
    else:
        scored, names = score_masks(match(masks, images)), class_names(masks)
    table = out or (run.path / "quality.csv" if images is None else Path("quality.csv"))
    write_quality(table, scored)
    page = table.with_suffix(".html")
    rows = [(s.masked.sample, s.masked.mask, s.quality) for s in scored[:shown]]
    write_quality_page(page, rows, len(scored), names)
    for item in scored[:10]:
        console.print(f"{item.quality.score:.2f}  {escape(item.masked.id)}")
    print(table)
    print(page)


@app.command
def evaluate(
    folder: Path,
    /,
    *,
    boxes: Literal["auto", "xml", "coco", "masks"] | None = None,
    sets: Sets = (),
) -> None:
    """Compare a run with ground-truth masks (--set data.masks=FOLDER), and its scores with boxes.

    Args:
        folder: The run.
        boxes: Localisation against true boxes: of VOC XML or COCO where the data have them, or
            of the masks' components; auto = the data's own, else of the masks.
    """
    _until("evaluate", folder, (*sets, *([f"evaluate.boxes={boxes}"] if boxes else [])))
    _show_summary(folder)


@app.command
def sweep(
    folder: Path,
    /,
    *,
    thresholds: Annotated[int, Parameter(validator=Number(gte=1, lte=10_000))] = 60,
) -> None:
    """mIoU, FP and FN of a run's scores at every threshold: oracle numbers, for a look only."""
    from weakseg.ops import metrics
    from weakseg.stages.check import collect
    from weakseg.stages.evaluate import sweep as sweep_scores

    run = RunFolder(folder)
    recipe = load_recipe(run.recipe_file)
    run.require("refine" if recipe.steps else "seeds")
    scores = run.scores_folder(recipe.steps)
    images = collect(recipe.data).split(*recipe.data.train)
    known = [s for s in images if s.mask is not None]
    if not known:
        raise UserError(
            "has no ground-truth masks",
            where=folder,
            mend="give them: weakseg masks RUN --set data.masks=FOLDER",
        )
    swept = sweep_scores(known, scores, len(images.classes), thresholds)
    print("threshold,miou,fp,fn")
    for threshold, confusion in zip(swept.thresholds, swept.confusions(), strict=True):
        found = metrics(confusion)
        print(f"{threshold:.3f},{found.miou:.4f},{found.fp:.4f},{found.fn:.4f}")
    console.print(
        f"oracle: {swept.best()[1].miou:.4f} mIoU at {swept.best()[0]:.3f} on {len(known)} images"
    )


@app.command
def report(folder: Path, /) -> None:
    """Write the report of a run again."""
    from weakseg.report import write_report
    from weakseg.stages.check import collect

    run = RunFolder(folder)
    if not run.recipe_file.exists():
        raise UserError("holds no run", where=folder, mend="give the folder of a run")
    recipe = load_recipe(run.recipe_file)
    print(write_report(run, collect(recipe.data), recipe))


@app.command(name="methods")
def list_methods() -> None:
    """List the methods, the mixes, the steps of refinement, and the shipped recipes."""
    from rich.table import Table

    from weakseg.methods import methods
    from weakseg.mixing import mixes
    from weakseg.stages.refine import steps

    table = Table("method", "paper", "idea", box=None)
    for name in methods:
        card = methods[name].card
        table.add_row(name, card.paper, card.idea)
        for part, settings in methods[name].parts.items():
            if part not in mixes:
                words = ", ".join(f"{key}: {value['name']}" for key, value in settings.items())
                table.add_row(f"{name}+{part}", "", f"{name} with {words}")
    console.print(table)
    table = Table("mix", "paper", "idea", box=None)
    for name in mixes:
        table.add_row(name, mixes[name].paper, mixes[name].idea)
    console.print("")
    console.print(table)
    with_parts = ", ".join(f"{n}+<mix>" for n in methods if set(mixes) & set(methods[n].parts))
    console.print(f"use a mix as {with_parts} or in segmenter.mix", style="dim", highlight=False)
    table = Table("step of refine", "idea", box=None)
    for name in steps:
        table.add_row(name, steps[name].idea)
    console.print("")
    console.print(table)
    console.print(f"\nrecipes: {', '.join(shipped_recipes())}")


@app.command
def doctor() -> None:
    """Examine the installation: versions, devices, and what is broken with its mend."""
    from weakseg.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "[red]x[/red]" if finding.mend else "[green]ok[/green]"
        console.print(f"{mark:<16} {finding.name}: {finding.value}")
        if finding.mend:
            console.print(f"     mend: {finding.mend}")
    if any(f.mend for f in findings):
        raise SystemExit(2)


def _settings(
    source: Path,
    labels: Path | None,
    recipe: str | None,
    masks: Path | None,
    classes: Path | None,
    untagged: Untagged,
    sets: tuple[str, ...],
    kept: Path | None = None,
) -> Recipe:
    """The recipe that arguments stand for. With ``kept``, the recipe that a run keeps, this
    machine's default takes the place of one that is not named."""
    if source.suffix in (".yaml", ".yml") or (
        str(source) in shipped_recipes() and not source.exists()
    ):
        if recipe is not None:
            raise UserError(
                "two recipes were given",
                where=source,
                mend="give the images first, or leave --recipe out",
            )
        data = data_values(None, labels, masks, classes)
        return load_recipe(
            str(source), overrides={"data": data | {"untagged": untagged}}, sets=sets
        )
    over = {"data": data_values(source, labels, masks, classes) | {"untagged": untagged}}
    if recipe is None and kept is not None:
        load_recipe("default/cpu", overrides=over, sets=sets)  # mistakes show without torch
        from weakseg.api import starting_recipe

        return starting_recipe(over, sets, kept)
    return load_recipe(recipe, overrides=over, sets=sets)


def _show_plan(recipe: Recipe) -> None:
    from rich.table import Table

    from weakseg.estimate import plan
    from weakseg.methods import resolve
    from weakseg.pipeline import stages_of
    from weakseg.stages.check import collect
    from weakseg.stages.project import with_classifier

    resolve(recipe.method)
    recipe = with_classifier(recipe)
    collection = collect(recipe.data)
    names = [name for name, _ in stages_of(recipe, collection)]
    table = Table(
        "stage",
        "what",
        "about",
        title=f"{collection.name}: {len(collection)} images, {len(collection.classes)} classes",
    )
    total = 0.0
    for stage in plan(recipe, collection, names):
        total += stage.seconds or 0.0
        table.add_row(stage.name, stage.what, _duration(stage.seconds))
    table.add_row("", "all", _duration(total))
    console.print(table)


def _show_plans(recipe: Recipe, methods: str, seeds: int, equal_time: bool) -> None:
    from rich.table import Table

    from weakseg.comparison import plans

    table = Table("run", "what is trained", "about, each", "seeds", "all")
    total = 0.0
    for name, stages, runs in plans(recipe, methods, seeds=seeds, equal_time=equal_time):
        each = sum(stage.seconds or 0.0 for stage in stages)
        trained = "; ".join(s.what for s in stages if s.name in ("train", "segment"))
        table.add_row(name, trained, _duration(each), str(runs), _duration(each * runs))
        total += each * runs
    table.add_row("", "", "", "", _duration(total))
    console.print(table)


def _show_comparison(comparison: Comparison, out: Path) -> None:
    from rich.table import Table

    from weakseg.report.comparison import summary

    lines = summary(comparison)
    titles = [t for t in lines[0].cells if t not in _ON_THE_PAGE] if lines else []
    table = Table()
    table.add_column("method", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")
    for line in lines:
        cells = [escape(line.cells[title]) for title in titles]
        strong = [
            f"[bold]{c}[/bold]" if t in line.best else c for t, c in zip(titles, cells, strict=True)
        ]
        table.add_row(escape(line.label), *strong)
    console.print(table)
    for name in ("comparison.csv", "comparison.md", "comparison.html"):
        print(out / name)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_summary(folder: Path) -> None:
    from rich.table import Table

    run = RunFolder(folder)
    kept = run.recipe_file
    given = kept.exists() and load_recipe(kept).seeds.given is not None
    done = Table("stage", "result", "time")
    for name in STAGES:
        record = run.record(name)
        if name == "train" and given:  # left by an earlier recipe
            continue
        if record is not None and record.status == "done":
            done.add_row(name, _result(record.results), _duration(record.seconds))
    console.print(done)
    file = run.stage_folder("evaluate") / "results.json"
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        table = Table("what", "images", "rule", "threshold", "mIoU %", "FP %", "FN %")
        for row in rows:
            shares = [f"{100 * row[key]:.1f}" for key in ("miou", "fp", "fn")]
            threshold = "" if row["threshold"] is None else f"{row['threshold']:.2f}"
            images = f"{row['images']} {row['split']}"
            table.add_row(row["stage"], images, row["rule"], threshold, *shares)
        if rows:
            console.print(table)
            console.print(_distance(rows))
    _show_boxes(run.stage_folder("evaluate") / "boxes.json")
    for name, path in (
        ("masks", run.stage_folder("masks") / "masks"),
        ("model", _model(run)),
        ("report", run.report_file),
    ):
        if path.exists():
            console.print(f"{name:<7}", end="")
            print(path)


def _show_boxes(file: Path) -> None:
    from rich.table import Table

    if not file.exists():
        return
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    columns = ("GT-known", "top-1 err.", "top-5 err.", "MaxBoxAcc", "V2")
    table = Table("boxes, %", "images", *columns)
    for row in rows:
        shares = [row["gt_known"], row["top1_error"], row["top5_error"]]
        shares += [row["max_box_acc"][1], row["max_box_acc_v2"]]
        words = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        images = f"{row['images']} {row['split']}"
        table.add_row(row["stage"], images, *words)
    if rows:
        console.print(table)
        console.print(
            f"Localisation against {rows[0]['boxes']}: {rows[0]['rule']}, IoU .5. GT-known is of "
            f"{rows[0]['pairs']} pairs of an image and a class in {rows[0]['split']}. MaxBoxAcc (IoU .5) "
            "and V2 (mean of IoU .3, .5, .7) are oracles: the best of all thresholds.",
            highlight=False,
        )


def _model(run: RunFolder) -> Path:
    """The model folder that `weakseg predict` would take; the run itself where there is none."""
    from weakseg.export.model import find_model

    try:
        return find_model(run.path)
    except UserError:
        return run.stage_folder("train") / "model"


def _result(results: dict[str, Any]) -> str:
    """The few results of a stage that fit in a line."""
    shown = []
    for key in (
        "classifier",
        "images",
        "corrected",
        "steps",
        "errors",
        "warnings",
        "rule",
        "threshold",
        "f1",
        "rows",
    ):
        value = results.get(key)
        if value is not None and not (key in ("corrected", "errors", "warnings") and value == 0):
            shown.append(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(shown)


def _distance(rows: list[dict[str, Any]]) -> str:
    """How far the threshold that saw no masks is from the one that did."""
    scores = [r for r in rows if r["stage"] not in ("mask", "segmenter")]
    ours = next((r for r in scores if r["rule"] != "oracle"), None)
    if ours is None:  # the scores have a background map of their own
        return ""
    oracle = next(r for r in scores if r["stage"] == ours["stage"] and r["rule"] == "oracle")
    gap = 100 * (oracle["miou"] - ours["miou"])
    return (
        f"The {ours['rule']} threshold {ours['threshold']:.2f} is {gap:.1f} mIoU below the best one "
        f"({oracle['threshold']:.2f}, oracle: it saw the masks)."
    )


def _stopped(code: int) -> NoReturn:
    console.print("stopped; run the same command again to go on")
    sys.exit(code)


def main() -> None:
    """Entry point: user errors are shown without a traceback, and end with code 2."""
    wait_without_spinning()
    try:
        app()
    except KeyboardInterrupt:
        _stopped(130)
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, which would end with 0
            _stopped(143)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as raised:
        error = mendable(raised, Path.cwd())
        if error is None:
            raise
        where = f"{error.where}: " if error.where else ""
        console.print(f"[red]error[/red] {escape(where + error.what)}")
        if error.mend:
            console.print(f"  [green]mend[/green] {escape(error.mend)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
