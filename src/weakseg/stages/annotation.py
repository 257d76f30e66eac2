"""To annotation tools and back: what ``weakseg export`` and ``weakseg import-masks`` do.

Corrected masks land in ``RUN/corrected/<id>.png``, beside the numbered stage folders, so that no
stage ever deletes them. The segmenter is trained on them where there are some and on the masks of
stage 5 elsewhere. They are training data: nothing is ever measured against them.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from weakseg.console import track
from weakseg.csvfile import read_csv
from weakseg.data.images import image_size, read_mask, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import NameIndex, class_list, count, sample_id
from weakseg.errors import UserError
from weakseg.export.annotations import (
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    MisfitError,
    Problems,
    Tree,
    formats,
    open_tree,
)
from weakseg.export.annotations.tree import shorten
from weakseg.files import write_json
from weakseg.methods import needs_segmenter
from weakseg.ops.confusion import IGNORE
from weakseg.recipe import Recipe
from weakseg.registry import suggest
from weakseg.runfolder import CORRECTED, RunFolder
from weakseg.stages.masks import mask_files
from weakseg.stages.predict import images_in

__all__ = [
    "Imported",
    "export_masks",
    "folder_masks",
    "import_masks",
    "read_scores_table",
    "run_masks",
]

RECORD = "corrected.json"
_ORDER = ("cvat", "voc", "yolo-seg", "coco", "labelstudio", "masks")


# --- out ------------------------------------------------------------------------------------


def run_masks(
    run: RunFolder,
    recipe: Recipe,
    collection: Collection,
    of: Literal["masks", "predict"] = "masks",
    splits: Sequence[str] = (),
) -> MaskSet:
    """What there is to export of a run.

    Args:
        run: The run.
        recipe: Its recipe.
        collection: Its collection.
        of: ``masks``: what the segmenter is trained on, so corrected masks where there are some;
            ``predict``: the segmenter's predictions.
        splits: Splits; by default those that have such masks.

    Raises:
        UserError: The stage is not done, or the splits have no such masks.
    """
    run.require(of)
    if of == "predict":
        _require_current(run, recipe)
    unknown = [split for split in splits if split not in collection.splits]
    if unknown:
        raise UserError(
            f"there is no split {unknown[0]!r}", mend=suggest(unknown[0], collection.splits)
        )
    chosen = collection.split(*(splits or collection.splits))
    if of == "masks":
        chosen = chosen.split(*recipe.data.train)
        files = mask_files(run, chosen)
    else:
        files = [run.stage_folder(of) / "masks" / f"{s.id}.png" for s in chosen]
    pairs = zip(chosen, files, strict=True)
    items = tuple(Item(s.id, s.image, mask, s.split) for s, mask in pairs)
    if not items:
        raise UserError(
            f"there are no masks of {', '.join(splits)}",
            where=run.path,
            mend="only the images that are trained on have masks; --of predict exports predictions",
        )
    return MaskSet(collection.classes, items)


def _require_current(run: RunFolder, recipe: Recipe) -> None:
    """Raises a UserError where the network was trained again after it predicted."""
    network = "segment" if needs_segmenter(recipe.method, recipe.segmenter_wanted) else "train"
    trained, predicted = run.outcome(network), run.record("predict")
    assert predicted is not None
    if trained is None or predicted.inputs.get(network) != trained:
        raise UserError(
            "the predictions are older than the network",
            where=run.path,
            mend=f"make them again: weakseg run {run.recipe_file} --out {run.path}",
        )


def folder_masks(masks: Path, images: Path, classes: Path | None) -> MaskSet:
    """Masks of a plain folder with the images that they mirror.

    Without ``classes`` they are those of a ``classes.txt`` in the folder or beside it.

    Raises:
        UserError: No mask has an image, or nobody names the classes.
    """
    beside = (masks / "classes.txt", masks.parent / "classes.txt")
    file = classes or next((f for f in beside if f.is_file()), None)
    names, _ = class_list(file, masks)
    if names is None:
        raise UserError(
            "nothing names the classes of these masks",
            where=masks,
            mend="give a text file with one class name in each line: --classes",
        )
    items = tuple(
        Item(s.id, s.image, mask)
        for s in images_in(images)
        if (mask := masks / f"{s.id}.png").is_file() and mask != s.image
    )
    if not items:
        raise UserError(
            "holds no mask of any of these images",
            where=masks,
            mend=f"masks mirror the images: cat/001.png for {images / 'cat' / '001.jpg'}",
        )
    return MaskSet(names, items)


def read_scores_table(path: Path) -> dict[str, float]:
    """Image id -> score, from a CSV with the columns ``id`` and ``score``.

    Raises:
        UserError: It cannot be read.
    """
    mend = "give a CSV table with the columns id and score (0 to 1)"
    try:
        scores = {row["id"]: float(row["score"]) for row in read_csv(path)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the table cannot be read ({error})", where=path, mend=mend) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"this is no table of scores ({error})", where=path, mend=mend) from None
    wrong = next((key for key, score in scores.items() if not 0 <= score <= 1), None)
    if wrong is not None:
        raise UserError(
            f"the score of {wrong!r} is {scores[wrong]:g}, not in 0 to 1", where=path, mend=mend
        )
    return scores


def export_masks(
    masks: MaskSet, to: str, out: Path, scores: dict[str, float] | None = None
) -> list[str]:
    """Writes masks in a tool's format into a new folder.

    Args:
        masks: What to write.
        to: Name of the format.
        out: The folder; complete when it exists.
        scores: Image id -> score in [0, 1]; the images with the lowest come first.

    Returns:
        What the user should know.

    Raises:
        UserError: ``out`` exists, the format is unknown, or a mask is broken.
    """
    form = _writer(to)
    if scores:
        masks.items = tuple(
            sorted(
                (Item(i.id, i.image, i.mask, i.split, scores.get(i.id)) for i in masks.items),
                key=lambda i: math.inf if i.score is None else i.score,
            )
        )
    with _new_folder(out) as folder:
        return form().write(masks, folder)


def _writer(to: str) -> type[Format]:
    names = [name for name in formats if formats[name].writes]
    if to not in names:
        raise UserError(f"unknown format {to!r}", where="--to", mend=suggest(to, names))
    return formats[to]


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out`` when the block succeeds."""
    out = out.expanduser().absolute()
    if os.path.lexists(out):
        raise UserError("exists already", where=out, mend="choose another name, or delete it first")
    if out.suffix.lower() in (".zip", ".json", ".xml", ".txt"):
        raise UserError(
            f"an export is a folder, and its name ends in {out.suffix}",
            where=out,
            mend=f"write --out {out.with_suffix('').name}; the files in it keep their usual names",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- back in --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        format: How the source was read.
        ids: Images whose masks were imported.
        unchanged: How many masks are as the run has them, and were left out.
        notes: What the user should know.
    """

    format: str
    ids: tuple[str, ...]
    unchanged: int
    notes: tuple[str, ...]


def import_masks(
    run: RunFolder,
    recipe: Recipe,
    collection: Collection,
    source: Path,
    format: str = "auto",
    empty: bool = False,
    confirmed: bool = False,
) -> Imported:
    """Brings corrected masks into ``RUN/corrected``: all of them, or none.

    Tools export whole tasks, so masks that are as the run has them are left out: else nobody's
    masks would stay behind when the run's own get better.

    Args:
        run: The run.
        recipe: Its recipe.
        collection: Its collection.
        source: What the tool exported.
        format: Name of the format, or ``auto``.
        empty: Take images without any label as background even where their tags name classes.
        confirmed: Keep unchanged masks too: somebody has looked at each.

    Raises:
        UserError: Nothing was changed, or anything does not fit; names everything that does not.
    """
    tree = open_tree(source)
    name = _detect(tree) if format == "auto" else _reader(format)
    problems = Problems(source)
    found = formats[name]().read(tree, Labels(collection.classes), problems)
    with run.locked(), _beside(run.path) as folder:
        taken, skipped = _take(found, collection, folder, problems, empty)
        problems.check()
        if not taken:
            raise UserError(
                "holds no corrected mask" + (": no image has a label" if skipped else ""),
                where=source,
                mend="correct and save some images first, and give what the tool exported, not "
                "what weakseg wrote"
                + ("; --empty takes images without labels as background" if skipped else ""),
            )
        same = set() if confirmed else {key for key in taken if _unchanged(run, folder, key)}
        if same == taken:
            raise UserError(
                f"{count(len(same), 'mask')}, and none differs from the run's",
                where=source,
                mend="correct and save some images first; --confirmed keeps masks that are right",
            )
        for key in same:
            (folder / f"{key}.png").unlink()
        taken -= same
        _merge(run.path / CORRECTED, folder, source, name, sorted(taken))
    notes = tuple(_notes(taken, skipped, recipe, collection))
    return Imported(name, tuple(sorted(taken)), len(same), notes)


def _unchanged(run: RunFolder, folder: Path, key: str) -> bool:
    """Whether a mask is the one that the segmenter is trained on already.

    Formats without unsure pixels bring them back as background.
    """
    for kept in (run.path / CORRECTED, run.stage_folder("masks") / "masks"):
        if (kept / f"{key}.png").is_file():
            old, new = read_mask(kept / f"{key}.png"), read_mask(folder / f"{key}.png")
            unsure = (old == IGNORE) & ((new == 0) | (new == IGNORE))
            return old.shape == new.shape and bool(((old == new) | unsure).all())
    return False


def _reader(format: str) -> str:
    names = [name for name in formats if formats[name].reads]
    if format not in names:
        raise UserError(
            f"unknown format {format!r}", where="--format", mend=suggest(format, ["auto", *names])
        )
    return format


def _detect(tree: Tree) -> str:
    for name in _ORDER:
        if formats[name]().fits(tree):
            return name
    raise UserError(
        "nothing in it looks like an export of masks",
        where=tree.where,
        mend=f"give the exported file or folder, and name it with --format: {', '.join(_ORDER)}",
    )


class _Images:
    """Finds the sample that a name means."""

    def __init__(self, collection: Collection) -> None:
        self.samples = {s.id + s.image.suffix: s for s in collection}
        root = Path()
        if self.samples:
            file, sample = next(iter(self.samples.items()))
            root = Path(str(sample.image)[: -len(file)] or ".")
        self._index = NameIndex(self.samples, root)

    def find(self, found: Found, problems: Problems) -> Sample | None:
        """The sample; ``None`` is a problem that was noted."""
        several: tuple[str, ...] = ()
        names = (found.name, *found.other_names)
        # Tools that keep images as JPEG files rename them; an id stands for one image anyway.
        for name in (*names, *map(sample_id, names)):
            match = self._index.find(name)
            files = match.files if match is not None else ()
            if len(files) == 1:
                return self.samples[files[0]]
            several = several or files
        if several:
            what, name = "names that several images of the run have", shorten(several, 3)
            problems.add(what, f"{found.name!r} ({name})", "name images with their folder")
        else:
            problems.add(
                "names that no image of the run has",
                repr(found.name),
                "import into the run that the masks came from; names are relative to its images",
            )
        return None


def _take(
    found: Iterator[Found], collection: Collection, folder: Path, problems: Problems, empty: bool
) -> tuple[set[str], set[str]]:
    """Writes masks into ``folder``: ids that were taken, and ids left out because empty."""
    images = _Images(collection)
    chosen: dict[str, tuple[Sample, Found]] = {}
    skipped: set[str] = set()
    for mask in found:
        sample = images.find(mask, problems)
        if sample is None:
            continue
        if sample.id in chosen or sample.id in skipped:
            problems.add("images with several masks", sample.id, "leave one of them")
        elif mask.empty and sample.tags and not empty:
            skipped.add(sample.id)
        else:
            chosen[sample.id] = sample, mask

    def write(pair: tuple[Sample, Found]) -> str | None:
        sample, mask = pair
        try:
            pixels = mask.load(image_size(sample.image))
        except MisfitError as error:
            return f"{mask.name!r} ({error})"
        write_mask(folder / f"{sample.id}.png", pixels)
        return None

    with ThreadPoolExecutor() as pool:
        for fault in track(pool.map(write, chosen.values()), "import", len(chosen)):
            if fault is not None:
                mend = "export masks at the size of the images, with the run's classes"
                if "colours" in fault:
                    mend = "save them as indexed (palette) PNG files of class ids"
                problems.add("masks that do not fit", fault, mend)
    return set(chosen), skipped


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{CORRECTED}-", dir=path))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _merge(target: Path, new: Path, source: Path, format: str, ids: list[str]) -> None:
    """Puts the new masks over the earlier ones and swaps the folders, so that all come at once."""
    record = read_record(target)
    record.append(
        {
            "source": str(source),
            "format": format,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": len(ids),
            "ids": ids,
        }
    )
    write_json(new / RECORD, {"imports": record})
    if not target.exists():
        new.rename(target)
        return
    for folder, _, files in os.walk(target):
        for name in files:
            old = Path(folder, name)
            kept = new / old.relative_to(target)
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(old, kept)
    aside = Path(tempfile.mkdtemp(prefix=f".{CORRECTED}-", dir=target.parent))
    target.rename(aside / "old")
    try:
        new.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_record(corrected: Path) -> list[dict[str, Any]]:
    """What ``corrected.json`` tells of earlier imports."""
    try:
        imports = json.loads((corrected / RECORD).read_text(encoding="utf-8"))["imports"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return imports if isinstance(imports, list) else []


def _notes(
    taken: set[str], skipped: set[str], recipe: Recipe, collection: Collection
) -> Iterator[str]:
    if skipped:
        yield (
            f"{count(len(skipped), 'image')} left out, because nothing is labelled in them although "
            f"their tags name classes, such as {min(skipped)} (--empty takes them as background)."
        )
    trained = {s.id for s in collection.split(*recipe.data.train)}
    aside = len(taken - trained)
    if aside:
        yield f"{count(aside, 'mask')} of images that are not trained on have no effect."
    if not needs_segmenter(recipe.method, recipe.segmenter_wanted):
        yield (
            "This run trains no segmenter, so nothing uses corrected masks yet: "
            "run it with --set segmenter.enabled=true."
        )
