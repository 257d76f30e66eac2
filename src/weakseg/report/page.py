"""Turns the facts of a run into one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from weakseg.data.samples import Collection
from weakseg.files import atomic_path
from weakseg.recipe import Recipe
from weakseg.report import words
from weakseg.report.charts import COLOURS, Chart, Mark, Series, histogram, line_chart
from weakseg.report.facts import Facts, Score, gather, number
from weakseg.report.grid import COLUMNS, PictureGrid, grid, picture_row, shown
from weakseg.report.pictures import HEAT_STOPS, chip_colours
from weakseg.report.portrait import class_bars, portrait, problem_rows, size_words
from weakseg.runfolder import STAGES, RunFolder

__all__ = ["Tile", "duration", "render", "write_report", "write_text"]

_SHOWN = 10  # images in the grid
_WORST = 8  # images in each list of worst cases

_SECTIONS = {
    "shows": "What this shows",
    "data": "Data",
    "pictures": "Pictures",
    "threshold": "Threshold",
    "training": "Training",
    "results": "Results",
    "localised": "Localisation",
    "classes": "Classes",
    "worst": "Worst cases",
    "uncertain": "Least certain masks",
    "stages": "Stages",
    "recipe": "Recipe",
}
"""Those whose name is in the context appear only where that is not empty."""

_STAGE_NAMES = {"seed": "Score maps", "mask": "Masks", "segmenter": "Predictions"}


def write_report(run: RunFolder, collection: Collection, recipe: Recipe) -> Path:
    """Writes ``report.html`` of a run, finished or not.

    The page rests on the run folder and the collection alone; the same run gives the same bytes.

    Args:
        run: The run folder; any of its stages may be missing.
        collection: The data of the run, for names, tags and pictures.
        recipe: Its recipe.

    Returns:
        The file.
    """
    context = _context(gather(run, collection, recipe))
    context["sections"] = {id: title for id, title in _SECTIONS.items() if context.get(id, True)}
    html = render("template.html.j2", context)
    write_text(run.report_file, html)
    return run.report_file


def write_text(path: Path, text: str) -> None:
    """Writes a page or a table, in which file names need not be valid UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def render(template: str, context: dict[str, Any]) -> str:
    """One of the room's templates as HTML; all that it shows is escaped."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("weakseg", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": words.percent, "duration": duration, "prose": prose}
    return environment


def _context(facts: Facts) -> dict[str, Any]:
    bars, hidden = class_bars(facts.collection.classes, _class_counts(facts))
    return {
        "facts": facts,
        "status": words.status(facts),
        "summary": words.summary(facts),
        "truth": words.role_of_truth(facts),
        "findings": words.findings(facts),
        "tiles": list(_tiles(facts)),
        "chips": chip_colours(facts.collection.classes),
        "splits": _splits(facts),
        "bars": bars,
        "hidden_bars": hidden,
        "sizes": size_words(facts.check),
        "problems": problem_rows(facts.check),
        "portrait": portrait(facts.check),
        "columns": COLUMNS,
        "pictures": _picture_grid(facts),
        "heat_stops": HEAT_STOPS,
        "threshold": list(_threshold_charts(facts)),
        "training": list(_trainings(facts)),
        "results": facts.scores,
        "localised": facts.localised,
        "stage_names": _STAGE_NAMES,
        "classes": _class_columns(facts),
        "worst": list(_worst_lists(facts)),
        "uncertain": _uncertain(facts),
        "stages": list(_stages(facts)),
        "versions": _versions(facts),
    }


# --- words and numbers ----------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds in the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def prose(text: str) -> Markup:
    """Escaped text in which backquoted words become code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str
    oracle: bool = False


def _tiles(facts: Facts) -> Iterator[Tile]:
    data = facts.recipe.data
    for row in (
        facts.best_row("segmenter", data.val),
        facts.best_row("mask", data.train),
        facts.best_row("seed", data.train, oracle=True),
    ):
        if row is not None and row.miou is not None:
            name = _STAGE_NAMES.get(row.stage, row.stage)
            yield Tile(f"mIoU, {name.lower()}", words.percent(row.miou), _where(row), row.oracle)
    f1 = number(facts.result("seeds", "f1"))
    if f1 is not None:
        yield Tile("F1, classifier", words.percent(f1), "train images and tags")
    rule = facts.threshold
    if rule is not None and rule.value is not None:
        yield Tile("Threshold", f"{rule.value:.2f}", rule.rule)
    images, classes = len(facts.train_samples), len(facts.collection.classes)
    yield Tile("Training images", f"{images:,}", f"{classes:,} classes")
    seconds = sum(record.seconds for record in facts.records.values())
    if seconds:
        stages = len(facts.records)
        yield Tile("Time", duration(seconds), f"in {stages} stage{'' if stages == 1 else 's'}")


def _where(row: Score) -> str:
    return f"{row.split}, {row.images:,} images"


# --- data -----------------------------------------------------------------------------------


def _splits(facts: Facts) -> list[tuple[str, int, int, int]]:
    """Split, images, confirmed negatives, images with ground truth."""
    rows = []
    for split in facts.collection.splits:
        samples = facts.collection.split(split).samples
        negative = sum(s.tags == () for s in samples)
        rows.append((split, len(samples), negative, sum(s.mask is not None for s in samples)))
    return rows


def _class_counts(facts: Facts) -> dict[str, dict[str, int]]:
    """Split -> class -> images, whether or not the check has run."""
    counts = {split: Counter[str]() for split in facts.collection.splits}
    for sample in facts.collection:
        counts[sample.split].update(set(sample.tags or ()))
    return {split: dict(counter) for split, counter in counts.items()}


# --- pictures -------------------------------------------------------------------------------


def _picture_grid(facts: Facts) -> PictureGrid | None:
    rows = [picture_row(facts, sample, tuple(COLUMNS)) for sample in shown(facts, _SHOWN)]
    return grid(rows)


def _worst_lists(facts: Facts) -> Iterator[tuple[str, PictureGrid]]:
    samples = {s.id: s for s in facts.collection if s.mask is not None}
    kinds = {"mask": ("Masks", "mask"), "segmenter": ("Predictions", "prediction")}
    for stage, (title, column) in kinds.items():
        rows = [
            picture_row(facts, samples[key], ("image", column, "truth"), words.percent(iou))
            for key, iou in facts.worst.get(stage, ())[:_WORST]
            if key in samples
        ]
        found = grid(rows)
        if found is not None:
            yield title, found


def _uncertain(facts: Facts) -> PictureGrid | None:
    samples = {s.id: s for s in facts.train_samples}
    chosen = [pair for pair in facts.uncertain if pair[0] in samples][:_WORST]
    return grid(
        [
            picture_row(facts, samples[key], ("image", "overlay"), f"estimate {score:.2f}")
            for key, score in chosen
        ]
    )


# --- charts ---------------------------------------------------------------------------------


def _threshold_charts(facts: Facts) -> Iterator[Chart]:
    rule, sweep = facts.threshold, facts.sweep
    chosen = (
        [Mark(rule.value, f"chosen {rule.value:.2f}")] if rule and rule.value is not None else []
    )
    if rule is not None and any(rule.histogram):
        svg = histogram(
            rule.histogram, x_label="best score of a pixel", y_label="share of pixels", marks=chosen
        )
        note = "Left of the line is background. A threshold in a valley is a safe one."
        yield Chart("How the scores are distributed", svg, note=note)
    if rule is not None and rule.criterion:
        line = Series(rule.criterion_name, rule.criterion)
        svg = line_chart(
            [line],
            x_label="threshold",
            y_label=rule.criterion_name,
            x_range=(0.0, 1.0),
            marks=chosen,
        )
        yield Chart(
            "What the rule looked at",
            svg,
            note="The one of its criteria that has a curve over all thresholds, or the only one. No "
            "mask was looked at.",
        )
    if sweep is not None:
        yield _sweep_chart(facts, chosen)


def _sweep_chart(facts: Facts, chosen: list[Mark]) -> Chart:
    sweep = facts.sweep
    assert sweep is not None
    best = sweep.best
    oracle = (
        [Mark(best[0], f"oracle {best[0]:.2f}: {words.percent(best[1])}", "oracle")] if best else []
    )
    lines = [Series("mIoU", sweep.miou), Series("FP", sweep.fp), Series("FN", sweep.fn)]
    svg = line_chart(
        lines,
        x_label="threshold",
        y_label="share",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        marks=[*chosen, *oracle],
        percent=True,
    )
    note = (
        f"Score maps on {sweep.split}. FP: spilled over; FN: missed. The curve needs ground truth; "
        "it did not choose the threshold."
    )
    return Chart("Quality at every threshold", svg, _legend(lines), note, oracle=True)


def _legend(lines: Sequence[Series]) -> list[tuple[str, int]]:
    return [(line.name, i % COLOURS) for i, line in enumerate(lines) if line.points]


def _trainings(facts: Facts) -> Iterator[tuple[str, list[Chart]]]:
    titles = {"train": "Method", "refine": "Affinity network", "segment": "Segmenter"}
    for stage, title in titles.items():
        curves = facts.losses.get(stage, {})
        lines = [Series(term, points) for term, points in curves.items() if term != "lr"]
        if not any(line.points for line in lines):
            continue
        until = (0.0, max(x for line in lines for x, _ in line.points))
        loss = line_chart(lines, x_label="step", y_label="loss", x_range=until, smooth=True)
        charts = [Chart(f"{title}: loss", loss, _legend(lines), _active(facts, stage))]
        if curves.get("lr"):
            rate = line_chart(
                [Series("learning rate", curves["lr"])],
                x_label="step",
                y_label="learning rate",
                x_range=until,
            )
            charts.append(Chart(f"{title}: learning rate", rate))
        yield title, charts


def _active(facts: Facts, stage: str) -> str:
    active, steps = facts.result(stage, "active_steps"), facts.result(stage, "steps")
    if not isinstance(active, dict) or not active:
        return ""
    parts = [f"{term} in {n:,}" for term, n in active.items() if isinstance(n, int)]
    total = f" of {steps:,}" if isinstance(steps, int) else ""
    return f"Active: {', '.join(parts)}{total} steps." if parts else ""


# --- tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassColumns:
    """The per-class table: one column for each row of results."""

    heads: list[Score]
    rows: list[tuple[str, int | None, list[tuple[float | None, float | None, float | None]]]]


def _class_columns(facts: Facts) -> ClassColumns | None:
    """IoU, FP and FN of each class; the oracle's column only where there is no other."""
    heads: dict[tuple[str, str], Score] = {}
    for row in sorted(facts.scores, key=lambda r: r.oracle):
        if row.iou:
            heads.setdefault((row.stage, row.split), row)
    columns = [row for row in facts.scores if row in heads.values()]
    if not columns:
        return None
    tagged = Counter(tag for s in facts.train_samples for tag in set(s.tags or ()))
    names = ("background", *facts.collection.classes)
    counts = (None, *(tagged[name] for name in facts.collection.classes))
    rows = [
        (
            name,
            counts[i],
            [(_at(c.iou, i), _at(c.class_fp, i), _at(c.class_fn, i)) for c in columns],
        )
        for i, name in enumerate(names)
    ]
    return ClassColumns(columns, rows)


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _stages(facts: Facts) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(STAGES, start=1):
        record = facts.records.get(name)
        if record is None and name not in facts.expected:
            continue
        state = record.status if record is not None else "not run"
        yield {
            "index": index,
            "name": name,
            "status": state,
            "level": {"done": "good", "failed": "bad", "running": "warn"}.get(state, "info"),
            "seconds": record.seconds if record is not None else None,
            "starts": record.starts if record is not None else None,
            "message": record.message if record is not None else "",
            "results": _plain_results(record.results) if record is not None else "",
        }


def _plain_results(results: dict[str, Any]) -> str:
    return " · ".join(f"{key} {_plain(value)}" for key, value in results.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _versions(facts: Facts) -> str:
    """Of all stages; a library that was changed between them shows both versions."""
    found: dict[str, list[str]] = {}
    for record in facts.records.values():
        for name, version in record.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return ", ".join(f"{name} {' then '.join(versions)}" for name, versions in found.items())
