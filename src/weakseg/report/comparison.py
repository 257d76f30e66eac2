"""Several methods on one data set: a table as CSV and Markdown, and one HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from weakseg.csvfile import write_csv
from weakseg.data.samples import Sample
from weakseg.errors import UserError
from weakseg.markdown import code_block, plain
from weakseg.methods import Card, methods
from weakseg.report.charts import COLOURS, Chart, Cloud, scatter_chart
from weakseg.report.facts import Score
from weakseg.report.grid import pictures_of, shown
from weakseg.report.numbers import (
    Comparison,
    Line,
    Lists,
    Measured,
    Table,
    by_label,
    choose_lists,
    image_steps,
    measure,
    other_lists,
    tabulate,
)
from weakseg.report.page import Tile, duration, render, write_text
from weakseg.report.pictures import HEAT_STOPS, Picture, chip_colours, photo, thumbnail
from weakseg.report.verdict import conditions, findings, notes

__all__ = ["summary", "write_comparison_page", "write_tables"]

_CSV = (
    "method", "seed", "data", "split", "images", "stage", "head", "rule", "threshold", "scales",
    "flip", "crf", "tags", "miou", "fp", "fn", "precision", "recall", "f1", "estimate", "network",
    "image_steps", "warmup_image_steps", "train_seconds", "seconds", "step_cost", "device",
    "weakseg", "command",
)  # fmt: skip

_ROWS = 10  # images in the grid,
_PICTURES = 140  # fewer where many methods would make the page heavy
_SIDE_BY_SIDE = 8  # pictures beside each other; more go below

_SECTIONS = {
    "shows": "What this shows",
    "table": "Table",
    "charts": "Charts",
    "pictures": "Pictures",
    "classes": "Classes",
    "runs": "Runs",
    "published": "Published numbers",
}


def summary(comparison: Comparison) -> list[Line]:
    """One line for each method, as in the table of the page.

    Returns:
        Lines in the order of the entries. ``Line.cells`` is column -> text (``38.1 ± 0.4``), the
        same columns for all lines, in order; ``Line.best`` names columns to emphasise.
    """
    runs = measure(comparison)
    return tabulate(runs, choose_lists(runs)).lines


def write_tables(comparison: Comparison, out: Path) -> None:
    """Writes ``comparison.csv`` (a row for each number) and ``comparison.md`` (a line for each method).

    Args:
        comparison: Any number of its runs may be missing.
        out: Folder.
    """
    runs = measure(comparison)
    rows = [row for run in runs for row in _rows(comparison, run)]
    write_csv(out / "comparison.csv", _CSV, rows)
    write_text(out / "comparison.md", _markdown(comparison, runs))


def write_comparison_page(comparison: Comparison, out: Path) -> Path:
    """Writes ``comparison.html``, which needs nothing else; it links to the reports of the runs.

    The page rests on the run folders and the collection alone: the same runs give the same bytes.

    Args:
        comparison: Any number of its runs may be missing.
        out: Folder.

    Returns:
        The file.
    """
    file = out / "comparison.html"
    write_text(file, render("comparison.html.j2", _context(comparison, out)))
    return file


# --- CSV ------------------------------------------------------------------------------------


def _rows(comparison: Comparison, run: Measured) -> Iterator[dict[str, Any]]:
    """A row for each row of evaluation; one without numbers where nothing was evaluated."""
    facts, entry = run.facts, run.entry
    versions = [record.versions.get("weakseg", "") for record in facts.records.values()]
    of_run = {
        "method": entry.label,
        "seed": entry.seed,
        "data": comparison.collection.name,
        "estimate": _digits(run.estimate),
        "network": facts.recipe.backbone.name,
        "image_steps": run.image_steps,
        "warmup_image_steps": image_steps(run.warmup),
        "train_seconds": _digits(run.training_seconds, 1),
        "seconds": _digits(run.seconds, 1),
        "step_cost": _digits(entry.step_cost, 3),
        "device": run.device,
        "weakseg": " then ".join(dict.fromkeys(v for v in versions if v)),
        "command": comparison.command,
    }
    f1 = {row.split: row.f1 for row in facts.scores if row.f1 is not None}
    for row in facts.scores:
        yield of_run | _measured(row) | {"f1": _digits(f1.get(row.split))}
    if not facts.scores:
        on = {"split": " ".join(facts.recipe.data.train), "images": len(facts.train_samples)}
        yield of_run | on | {"f1": _digits(run.f1)}


def _measured(row: Score) -> dict[str, Any]:
    return {
        "split": row.split,
        "images": row.images,
        "stage": row.stage,
        "head": row.head,
        "rule": row.rule,
        "threshold": _digits(row.threshold),
        "scales": " ".join(f"{s:g}" for s in row.scales),
        "flip": row.flip,
        "crf": row.crf,
        "tags": row.tags,
        "miou": _digits(row.miou),
        "fp": _digits(row.fp),
        "fn": _digits(row.fn),
        "precision": _digits(row.precision),
        "recall": _digits(row.recall),
    }


def _digits(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# --- Markdown -------------------------------------------------------------------------------


def _markdown(comparison: Comparison, runs: Sequence[Measured]) -> str:
    lists = choose_lists(runs)
    table = tabulate(runs, lists)
    done = len(comparison.entries)
    parts = [f"# {plain(comparison.collection.name)}: methods side by side"]
    if done < comparison.planned:
        missing = comparison.planned - done
        verb = "is" if missing == 1 else "are"
        parts.append(f"**{missing} of {comparison.planned} runs {verb} not there yet.**")
    parts.append(_bullets(conditions(comparison, runs, lists)))
    if table.lines:
        titles = list(table.lines[0].cells)
        rows = [
            ["method", "seeds", *map(plain, titles)],
            ["---"] * (len(titles) + 2),
            *(
                [
                    plain(line.label),
                    str(len(line.seeds)),
                    *(
                        f"**{plain(line.cells[t])}**" if t in line.best else plain(line.cells[t])
                        for t in titles
                    ),
                ]
                for line in table.lines
            ),
        ]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    parts.append(_bullets(notes(runs, table)))
    if comparison.command:
        parts.append(code_block(comparison.command))
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {plain(sentence)}" for sentence in sentences)


# --- page -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Columns of the table that share a name, or one that stands alone."""

    name: str
    titles: list[tuple[str, bool]]


@dataclass(frozen=True)
class Shown:
    """One image with what each method made of it: heat map above mask."""

    id: str
    tags: Sequence[str]
    image: Picture | None
    truth: Picture | None
    made: list[tuple[str, Picture | None, Picture | None]]


@dataclass(frozen=True)
class RunRow:
    """One run, with links that hold where the folder of the comparison lies."""

    label: str
    seed: int
    name: str
    folder: str
    report: str
    mask: float | None
    segmenter: float | None
    seconds: float | None
    device: str


def _context(comparison: Comparison, out: Path) -> dict[str, Any]:
    runs = measure(comparison)
    lists = choose_lists(runs)
    table = tabulate(runs, lists)
    context: dict[str, Any] = {
        "name": comparison.collection.name,
        "data": comparison.collection,
        "done": len(comparison.entries),
        "planned": comparison.planned,
        "command": comparison.command,
        "labels": len(table.lines),
        "seeds": sorted({seed for line in table.lines for seed in line.seeds}),
        "findings": findings(comparison, runs, table),
        "tiles": list(_tiles(table, runs)),
        "conditions": conditions(comparison, runs, lists),
        "table": table,
        "heads": _heads(table),
        "notes": notes(runs, table),
        "others": list(_others(runs, lists)),
        "charts": list(_charts(table)),
        "pictures": _pictures(runs),
        "side_by_side": _SIDE_BY_SIDE,
        "heat_stops": HEAT_STOPS,
        "chips": chip_colours(comparison.collection.classes),
        "columns": {},
        "classes": _classes(comparison, runs, lists.masks),
        "lists": lists,
        "runs": [_run_row(run, out, lists.masks, lists.segmenter) for run in runs],
        "devices": any(run.device for run in runs),
        "published": _published(runs),
    }
    context["sections"] = {id: title for id, title in _SECTIONS.items() if context.get(id, True)}
    return context


def _tiles(table: Table, runs: Sequence[Measured]) -> Iterator[Tile]:
    for key, label in (("mask", "mIoU, masks"), ("segmenter", "mIoU, predictions")):
        column = next((c for c in table.columns if c.key == key), None)
        known = [line for line in table.lines if key in line.numbers]
        if column is not None and known:
            best = max(known, key=lambda line: line.numbers[key].mean)
            split = table.lists.masks if key == "mask" else table.lists.segmenter
            yield Tile(
                label, column.text(best.numbers[key]), f"the highest, {best.label} on {split}"
            )
    seconds = [run.seconds for run in runs if run.seconds is not None]
    if seconds:
        yield Tile("Time of all runs", duration(sum(seconds)), "warm-up apart")


def _others(runs: Sequence[Measured], lists: Lists) -> Iterator[tuple[str, int, list[Head], Table]]:
    """Name, images and table of every further list."""
    for names in other_lists(runs, lists):
        table, name = tabulate(runs, names, costs=False), names.masks or names.segmenter
        images = max(r.images for run in runs for r in run.facts.scores if r.split == name)
        if table.columns:
            yield name, images, _heads(table), table


def _heads(table: Table) -> list[Head]:
    heads: list[Head] = []
    for column in table.columns:
        grouped = bool(column.group)
        if not (grouped and heads and heads[-1].name == column.group):
            heads.append(Head(column.group, []))
        title = column.title or ("mIoU" if grouped else column.name)
        heads[-1].titles.append((title, column.oracle))
    if table.wins:
        heads.append(Head("", [(table.wins, False)]))
    return heads


def _charts(table: Table) -> Iterator[Chart]:
    costs = (
        ("mask", "training", "masks", "minutes of training"),
        ("segmenter", "total", "predictions", "minutes of all stages"),
    )
    for quality, cost, what, minutes in costs:
        clouds = _clouds(table, cost, quality, 1 / 60)
        ends = [x for cloud in clouds for x, _ in cloud.points]
        svg = scatter_chart(
            clouds,
            x_label=minutes,
            y_label=f"mIoU of {what}",
            x_range=(0.0, 1.2 * max(ends, default=1.0)),
        )
        if svg:
            yield Chart(f"Quality of {what}, and what it costs", svg, note=_faint(clouds))
    clouds = _clouds(table, "fp", "fn")
    svg = scatter_chart(clouds, x_label="FP", y_label="FN", x_percent=True)
    if svg:
        note = "Right: masks spill over. Up: masks miss parts. The nearer to the lower left, the better."
        yield Chart("What the masks get wrong", svg, note=f"{note}{_faint(clouds)}")


def _faint(clouds: Sequence[Cloud]) -> str:
    several = any(len(cloud.points) > 1 for cloud in clouds)
    return " Faint dots are the single seeds." if several else ""


def _clouds(table: Table, x: str, y: str, factor: float = 1.0) -> list[Cloud]:
    clouds = []
    for index, line in enumerate(table.lines):
        if x in line.numbers and y in line.numbers:
            xs, ys = line.numbers[x].values, line.numbers[y].values
            points = [(factor * xs[seed], ys[seed]) for seed in ys if seed in xs]
            clouds.append(Cloud(line.label, points, index % COLOURS))
    return clouds


def _pictures(runs: Sequence[Measured]) -> list[Shown]:
    """The same images for all; of each method its first run."""
    firsts = {label: of_label[0] for label, of_label in by_label(runs).items()}
    if not firsts:
        return []
    count = max(3, min(_ROWS, _PICTURES // (2 + 2 * len(firsts))))
    chosen = shown(next(iter(firsts.values())).facts, count)
    rows = [_shown(sample, firsts) for sample in chosen]
    return rows if any(made[1:] != (None, None) for row in rows for made in row.made) else []


def _shown(sample: Sample, firsts: Mapping[str, Measured]) -> Shown:
    rgb = thumbnail(sample)
    if rgb is None:
        return Shown(sample.id, sample.tags or (), None, None, [])
    made = []
    for label, run in firsts.items():
        found = pictures_of(run.facts, sample, rgb, ("scores", "refined", "overlay"))
        made.append((label, found["refined"] or found["scores"], found["overlay"]))
    truth = pictures_of(next(iter(firsts.values())).facts, sample, rgb, ("truth",))["truth"]
    return Shown(sample.id, sample.tags or (), photo(rgb), truth, made)


def _classes(
    comparison: Comparison, runs: Sequence[Measured], split: str
) -> list[tuple[str, list[tuple[float | None, bool]]]]:
    """Class -> IoU of the masks of each label, mean over its runs, and whether it is the best."""
    names = ("background", *comparison.collection.classes)
    rows = []
    for index, name in enumerate(names):
        means = []
        for of_label in by_label(runs).values():
            scores = [run.score("mask", split) for run in of_label]
            known = [s.iou[index] for s in scores if s is not None and index < len(s.iou)]
            found = [value for value in known if value is not None]
            means.append(fmean(found) if found else None)
        best = max((m for m in means if m is not None), default=None)
        rows.append((name, [(m, m is not None and m == best and len(means) > 1) for m in means]))
    return rows if any(m is not None for _, means in rows for m, _ in means) else []


def _run_row(run: Measured, out: Path, masks: str, segmenter: str) -> RunRow:
    folder = run.facts.run.path
    mask, prediction = run.score("mask", masks), run.score("segmenter", segmenter)
    return RunRow(
        run.entry.label,
        run.entry.seed,
        folder.name,
        _link(folder, out) + "/",
        _link(run.facts.run.report_file, out) if run.facts.run.report_file.is_file() else "",
        None if mask is None else mask.miou,
        None if prediction is None else prediction.miou,
        run.seconds,
        run.device,
    )


def _link(path: Path, out: Path) -> str:
    """Relative, as a URL: names may hold anything, bytes that are no text included."""
    relative = os.path.relpath(path, out.absolute())
    return quote(os.fsencode(relative.replace(os.sep, "/")), safe="/")


def _published(runs: Sequence[Measured]) -> list[tuple[Card, list[tuple[str, float]]]]:
    """Cards of the methods that have published numbers, each once."""
    cards: dict[str, Card] = {}
    for run in runs:
        name = str(run.facts.recipe.method["name"]).partition("+")[0]
        try:
            cards.setdefault(name, methods[name].card)
        except UserError:  # a method that was registered elsewhere when it ran
            continue
    return [(card, list(card.published.items())) for card in cards.values() if card.published]
