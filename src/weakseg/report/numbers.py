"""Numbers of several runs on one data set as one table: mean and spread of each method's seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from weakseg.data.samples import Collection
from weakseg.recipe import Recipe
from weakseg.report.facts import Facts, Score, gather, number
from weakseg.runfolder import RunFolder
from weakseg.stagefiles import StageRecord

__all__ = [
    "OWN",
    "Cell",
    "Column",
    "Comparison",
    "Entry",
    "Line",
    "Lists",
    "Measured",
    "Table",
    "by_label",
    "choose_lists",
    "image_steps",
    "measure",
    "other_lists",
    "tabulate",
]

OWN = "†"
"""Marks predictions of a method's own network, where no segmenter was trained behind it."""


@dataclass(frozen=True)
class Entry:
    """One run of a comparison.

    Attributes:
        label: A method's name, or that of a variant such as ``cam + walk``.
        seed: Of the run.
        folder: The run folder, finished up to its last stage.
        recipe: What was run.
        warmup: Run folder of the shared training that it went on from, if any.
        step_cost: Time of one of its training steps over that of the first method's, if measured.
    """

    label: str
    seed: int
    folder: Path
    recipe: Recipe
    warmup: Path | None = None
    step_cost: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods on one data set.

    Attributes:
        entries: Finished runs, grouped by label in the order asked for.
        collection: The data.
        planned: How many runs there will be in all.
        equal: What all methods have the same of.
        command: The command line that made it.
    """

    entries: tuple[Entry, ...]
    collection: Collection
    planned: int
    equal: Literal["steps", "time"]
    command: str


@dataclass(frozen=True)
class Lists:
    """On which list each part of the table is measured; empty where nothing is."""

    masks: str = ""
    segmenter: str = ""


@dataclass(frozen=True)
class Measured:
    """An entry with what its folder says."""

    entry: Entry
    facts: Facts

    def score(self, stage: str, split: str, *, oracle: bool = False) -> Score | None:
        """The row of a stage on a list."""
        rows = (r for r in self.facts.scores if (r.stage, r.split) == (stage, split))
        return next((r for r in rows if r.oracle == oracle), None)

    @property
    def refined(self) -> str:
        """The stage of the scores after all steps of refinement; empty where there are none."""
        steps = self.facts.recipe.steps
        return "refined: " + " + ".join(steps) if steps else ""

    @property
    def f1(self) -> float | None:
        """F1 of the classifier on the training images, against their tags."""
        return number(self.facts.result("seeds", "f1"))

    @cached_property
    def estimate(self) -> float | None:
        """Mean of the label-free estimates of the masks' quality."""
        scores = [score for _, score in self.facts.uncertain]
        return fmean(scores) if scores else None

    @property
    def training_seconds(self) -> float | None:
        """Of the method's own training, without a warm-up."""
        record = self.facts.records.get("train")
        return None if record is None else record.seconds

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        records = self.facts.records.values()
        return sum(record.seconds for record in records) if records else None

    @property
    def image_steps(self) -> int | None:
        """Images that the method's training saw, warm-up apart; ``None`` where nothing was trained."""
        return image_steps(self.facts.records.get("train"))

    @property
    def device(self) -> str:
        """What the method was trained on, in words; empty where that was not recorded."""
        return str(self.facts.result("train", "device") or "")

    @cached_property
    def warmup(self) -> StageRecord | None:
        """Record of the training that this one went on from."""
        return None if self.entry.warmup is None else RunFolder(self.entry.warmup).record("train")


def image_steps(record: StageRecord | None) -> int | None:
    """Steps of a training times its batch."""
    settings = record.inputs.get("train") if record is not None else None
    steps = number(record.results.get("steps")) if record is not None else None
    batch = number(settings.get("batch")) if isinstance(settings, dict) else None
    return None if steps is None or batch is None else int(steps * batch)


def measure(comparison: Comparison) -> list[Measured]:
    """Reads the folder of every entry; what is missing there is missing here."""
    return [
        Measured(e, gather(RunFolder(e.folder), comparison.collection, e.recipe, losses=False))
        for e in comparison.entries
    ]


def by_label(runs: Iterable[Measured]) -> dict[str, list[Measured]]:
    """The runs of each label, in order."""
    grouped: dict[str, list[Measured]] = {}
    for run in runs:
        grouped.setdefault(run.entry.label, []).append(run)
    return grouped


# --- lists ----------------------------------------------------------------------------------


def choose_lists(runs: Sequence[Measured]) -> Lists:
    """The lists of the table: what the recipe lists to be evaluated goes before whole splits.

    A list that more runs were measured on goes first of all.
    """
    return Lists(
        next(iter(_known_lists(runs, "mask")), ""),
        next(iter(_known_lists(runs, "segmenter")), ""),
    )


def other_lists(runs: Sequence[Measured], shown: Lists) -> list[Lists]:
    """Every further list that masks or predictions were measured on."""
    masks, segmenter = (_known_lists(runs, stage) for stage in ("mask", "segmenter"))
    others = [Lists(masks=name) for name in masks if name != shown.masks]
    return others + [Lists(segmenter=name) for name in segmenter if name != shown.segmenter]


def _known_lists(runs: Sequence[Measured], stage: str) -> list[str]:
    """Lists of masks lie in the training splits, those of predictions outside of them."""
    of_masks = _counted(runs, "mask")
    counts = _counted(runs, stage)
    if stage == "segmenter":
        trained_on = {split for run in runs for split in run.facts.recipe.data.train}
        unseen = {k: n for k, n in counts.items() if k not in of_masks and k not in trained_on}
        counts = unseen or counts
    splits = {sample.split for run in runs[:1] for sample in run.facts.collection}
    return sorted(counts, key=lambda name: (-counts[name], name in splits))


def _counted(runs: Iterable[Measured], stage: str) -> dict[str, int]:
    """List -> runs with a row of the stage on it, in order of appearance."""
    counts: dict[str, int] = {}
    for run in runs:
        for split in dict.fromkeys(r.split for r in run.facts.scores if r.stage == stage):
            counts[split] = counts.get(split, 0) + 1
    return counts


# --- the table ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One number of a method.

    Attributes:
        values: Seed -> value.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); ``None`` for one seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Column:
    """One number of every method.

    Attributes:
        key: Its name in code.
        group: What it belongs to, such as ``masks``; empty for a number that stands alone.
        title: Its name in the group.
        value: Finds it in a run.
        unit: How it is shown: shares in percent, minutes, counts or ratios.
        better: Which end is the better one, if any.
        oracle: True where ground truth chose something in it.
    """

    key: str
    group: str
    title: str
    value: Callable[[Measured], float | None]
    unit: Literal["share", "estimate", "minutes", "count", "ratio"] = "share"
    better: Literal["high", "low"] | None = "high"
    oracle: bool = False

    @property
    def name(self) -> str:
        """Group and title in one."""
        return f"{self.group} {self.title}".strip() + (" (oracle)" if self.oracle else "")

    def text(self, cell: Cell) -> str:
        """The mean, with the spread of what depends on chance."""
        if self.unit == "minutes":
            return f"{cell.mean / 60:.1f}"
        if self.unit == "count":
            return f"{cell.mean:,.0f}"
        if self.unit == "ratio":
            return f"{cell.mean:.2f}"
        digits, factor = (2, 1) if self.unit == "estimate" else (1, 100)
        spread = "" if cell.spread is None else f" ± {factor * cell.spread:.{digits}f}"
        return f"{factor * cell.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Line:
    """One method of the table.

    Attributes:
        label: The method or variant.
        seeds: Of its finished runs.
        cells: Column -> text such as ``38.1 ± 0.4`` (mean and standard deviation over seeds; shares
            in percent; costs in minutes, without a spread). All lines have the same columns, in
            order; what a method lacks is ``–``.
        best: Columns in which no other method is better.
        numbers: Key of a column -> its number, where there is one.
        own: True where the predictions are those of the method's own network.
    """

    label: str
    seeds: tuple[int, ...]
    cells: Mapping[str, str]
    best: frozenset[str]
    numbers: Mapping[str, Cell]
    own: bool = False


@dataclass(frozen=True)
class Table:
    """Lines with the columns that some run has a number for.

    Attributes:
        columns: In order.
        lines: One for each method.
        wins: Name of the column that counts the seeds on which a method beats the first one;
            empty where there are not several seeds.
    """

    lists: Lists
    columns: list[Column]
    lines: list[Line]
    wins: str = ""


def tabulate(runs: Sequence[Measured], lists: Lists, *, costs: bool = True) -> Table:
    """One line for each method.

    Args:
        runs: Of all methods and seeds.
        lists: What to show.
        costs: With the columns that depend on no list.
    """
    grouped = by_label(runs)
    wanted = [*_of_masks(lists.masks), *_of_predictions(lists.segmenter)]
    if costs:
        wanted += _of_runs(next(iter(grouped), ""))
    truth = any(run.facts.scores for run in runs)
    steps = {run.image_steps for run in runs}
    columns, numbers = [], {label: dict[str, Cell]() for label in grouped}
    for column in wanted:
        found = {label: _cell(of_label, column) for label, of_label in grouped.items()}
        if column.key == "estimate" and truth or column.key == "image_steps" and len(steps) < 2:
            continue
        if any(cell.values for cell in found.values()):
            columns.append(column)
            for label, cell in found.items():
                if cell.values:
                    numbers[label][column.key] = cell
    best = {column.name: _best(column, numbers) for column in columns}
    wins, title = _wins(numbers) if costs else ({}, "")
    lines = []
    for label, of_label in grouped.items():
        own = any(_own_predictions(run, lists.segmenter) for run in of_label)
        cells = {column.name: _text(column, numbers[label], own) for column in columns}
        if title:
            cells[title] = wins.get(label, "–")
        seeds = tuple(run.entry.seed for run in of_label)
        winning = frozenset(name for name, labels in best.items() if label in labels)
        lines.append(Line(label, seeds, cells, winning, numbers[label], own))
    return Table(lists, columns, lines, title)


def _of_masks(split: str) -> Iterator[Column]:
    if not split:
        return

    def mask(run: Measured) -> Score | None:
        return run.score("mask", split)

    def of(stage: Callable[[Measured], str], oracle: bool) -> Callable[[Measured], float | None]:
        return lambda run: _share(run.score(stage(run), split, oracle=oracle))

    for group, stage in (("seed", lambda run: "seed"), ("refined", lambda run: run.refined)):
        yield Column(group, group, "", of(stage, False))
        yield Column(f"{group}_oracle", group, "best", of(stage, True), oracle=True)
    yield Column("mask", "masks", "", lambda run: _share(mask(run)))
    yield Column("fp", "masks", "FP", lambda run: _share(mask(run), "fp"), better="low")
    yield Column("fn", "masks", "FN", lambda run: _share(mask(run), "fn"), better="low")


def _of_predictions(split: str) -> Iterator[Column]:
    if split:
        yield Column(
            "segmenter", "segmenter", "", lambda run: _share(run.score("segmenter", split))
        )


def _of_runs(first: str) -> Iterator[Column]:
    yield Column("f1", "", "classifier F1", lambda run: run.f1)
    yield Column(
        "estimate", "", "mask estimate", lambda run: run.estimate, unit="estimate", better=None
    )
    yield Column(
        "image_steps", "", "image steps", lambda run: run.image_steps, unit="count", better=None
    )
    yield Column(
        "training", "minutes", "training", lambda run: run.training_seconds, "minutes", "low"
    )
    yield Column("total", "minutes", "all stages", lambda run: run.seconds, "minutes", "low")
    yield Column(
        "step", "", f"step, × {first}", lambda run: number(run.entry.step_cost), "ratio", "low"
    )


def _own_predictions(run: Measured, split: str) -> bool:
    row = run.score("segmenter", split)
    return row is not None and row.head not in ("", "segmenter")


def _share(row: Score | None, name: Literal["miou", "fp", "fn"] = "miou") -> float | None:
    return None if row is None else {"miou": row.miou, "fp": row.fp, "fn": row.fn}[name]


def _cell(runs: Iterable[Measured], column: Column) -> Cell:
    values = {run.entry.seed: column.value(run) for run in runs}
    return Cell({seed: float(v) for seed, v in values.items() if v is not None})


def _text(column: Column, numbers: Mapping[str, Cell], own: bool) -> str:
    if column.key not in numbers:
        return "–"
    return column.text(numbers[column.key]) + (
        f" {OWN}" if own and column.key == "segmenter" else ""
    )


def _best(column: Column, numbers: Mapping[str, Mapping[str, Cell]]) -> set[str]:
    """Labels whose mean is the best one to the digit that is shown; none where there is no rival."""
    known = {label: cells[column.key] for label, cells in numbers.items() if column.key in cells}
    if column.better is None or len(known) < 2:
        return set()
    end = max if column.better == "high" else min
    best = end(cell.mean for cell in known.values())
    mean_alone = column.text(Cell({0: best}))
    return {k for k, cell in known.items() if column.text(Cell({0: cell.mean})) == mean_alone}


def _wins(numbers: Mapping[str, Mapping[str, Cell]]) -> tuple[dict[str, str], str]:
    """On how many seeds each label beats the first one, and the title of such a column."""
    first = next(iter(numbers), "")
    for key, what in (("mask", "masks"), ("segmenter", "predictions")):
        base = numbers.get(first, {}).get(key)
        if base is None:
            continue
        counts = {}
        for label, cells in numbers.items():
            common = base.values.keys() & cells[key].values.keys() if key in cells else set()
            if label != first and common:
                won = sum(cells[key].values[seed] > base.values[seed] for seed in common)
                counts[label] = (won, len(common))
        if any(n > 1 for _, n in counts.values()):
            words = {label: f"{won} of {n} seeds" for label, (won, n) in counts.items()}
            return words, f"better {what} than {first}"
    return {}, ""
