"""What a comparison was made under and what it shows, in plain language.

Words stay as careful as the numbers allow: a method is called better than another where it was so
on every seed and by more than the spread over seeds; nothing is called so on one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from weakseg.report.facts import Score
from weakseg.report.numbers import (
    OWN,
    Cell,
    Comparison,
    Lists,
    Measured,
    Table,
    by_label,
    image_steps,
)
from weakseg.report.words import Finding, counted

__all__ = ["ESTIMATE", "Margin", "conditions", "findings", "margin", "notes"]

ESTIMATE = (
    "The mask estimate is the mean of a number between 0 and 1 that says, without ground truth, how "
    "well a mask agrees with its image. It sorts the masks of one method: its rank correlation with "
    "the true IoU of images was .6 to .9 (`docs/thresholds.md`). Whether it ranks methods was not "
    "tested, and it favours masks that follow colours, as PAMR and CRF make them. Use it to find "
    "what to look at, not to choose a method."
)

_LOSS = 0.02  # of mIoU by a threshold, worth speaking of
_WEAK = 0.1  # of F1 below the best classifier


@dataclass(frozen=True)
class Margin:
    """How far one method is ahead of another.

    Attributes:
        gain: Mean difference, over the seeds that both have where there are some.
        won: Seeds on which it is ahead.
        lost: Seeds on which it is behind; on the rest both have the same value.
        seeds: Seeds that both have.
        spread: The larger of their standard deviations, where they have one.
    """

    gain: float
    won: int
    lost: int
    seeds: int
    spread: float | None

    @property
    def clear(self) -> bool:
        """On every one of several seeds, and by more than the spread over seeds."""
        ahead = self.won if self.gain > 0 else self.lost
        return (
            self.seeds > 1
            and ahead == self.seeds
            and self.spread is not None
            and abs(self.gain) > self.spread
        )

    @property
    def level(self) -> bool:
        """The same value on every seed."""
        return self.gain == 0 and self.won == self.lost == 0


def margin(one: Cell, other: Cell) -> Margin:
    """How far ``one`` is ahead of ``other``."""
    common = sorted(one.values.keys() & other.values.keys())
    gains = [one.values[seed] - other.values[seed] for seed in common]
    spreads = [cell.spread for cell in (one, other) if cell.spread is not None]
    return Margin(
        fmean(gains) if gains else one.mean - other.mean,
        sum(gain > 0 for gain in gains),
        sum(gain < 0 for gain in gains),
        len(common),
        max(spreads, default=None),
    )


# --- conditions -----------------------------------------------------------------------------


def conditions(comparison: Comparison, runs: Sequence[Measured], lists: Lists) -> list[str]:
    """What every number of the table was made under, one sentence each."""
    return [
        *_data(comparison, runs),
        *_measured_on(runs, lists),
        *_equal(comparison, runs),
        *_warmup(runs),
        _spread(runs),
        *_where(runs),
    ]


def _data(comparison: Comparison, runs: Sequence[Measured]) -> Iterator[str]:
    data = comparison.collection
    for run in runs[:1]:
        yield (
            f"Data: {data.name}, {counted(len(run.facts.train_samples), 'training image')} of "
            f"{counted(len(data.classes), 'class', 'es')}; tags: {data.tag_source}."
        )
    networks = _shared(runs, lambda r: f"{r.facts.recipe.backbone.name} at {_crop(r)}")
    if networks:
        yield f"Network: {networks}."


def _crop(run: Measured) -> str:
    return f"{run.facts.recipe.train.crop} px"


def _measured_on(runs: Sequence[Measured], lists: Lists) -> Iterator[str]:
    for what, stage, split in (
        ("Seeds and masks", "mask", lists.masks),
        ("Predictions", "segmenter", lists.segmenter),
    ):
        rows = {id(run): run.score(stage, split) for run in runs}
        found = [row for row in rows.values() if row is not None]
        if not found:
            continue
        images = " or ".join(sorted({f"{row.images:,}" for row in found}))
        how = _shared(runs, lambda run, rows=rows: _how(rows[id(run)]))  # type: ignore[misc]
        yield f"{what}: measured on {split} ({images} images), {how}."
    if lists.masks:
        rules = _shared(runs, lambda run: _rule(run.score("mask", lists.masks)))
        yield f"Threshold: {rules}."


def _how(row: Score | None) -> str:
    if row is None:
        return ""
    scales = ", ".join(f"{s:g}" for s in row.scales)
    words = [f"scales {scales}{' + flip' if row.flip else ''}"] if scales else []
    words.append("no CRF" if row.crf == "none" else f"CRF ({row.crf})")
    words.append("no tags used" if row.tags == "none" else f"tags {row.tags}")
    return ", ".join(words)


def _rule(row: Score | None) -> str:
    if row is None:
        return ""
    return {"map": "none, by the method's own background map"}.get(row.rule, row.rule)


def _equal(comparison: Comparison, runs: Sequence[Measured]) -> Iterator[str]:
    steps = {run.image_steps for run in runs} - {None}
    whole = {_whole_steps(run) for run in runs if run.image_steps is not None}
    alone = _alone(runs)
    batches = _shared(runs, lambda run: f"batches of {run.facts.recipe.train.batch}")
    if comparison.equal == "time":
        yield "Equal for all: the time that training was given, so that image steps differ."
    elif not alone and len(steps) == 1:
        yield f"Equal for all: {steps.pop():,} image steps of training, in {batches}."
    elif alone and len(whole) == 1 and None not in whole:
        yield (
            f"Equal for all: {whole.pop():,} image steps of training, with those of the shared start "
            f"where a method has one, in {batches}."
        )
    elif steps:
        yield "Image steps of training were to be equal, but differ: see their column."


def _whole_steps(run: Measured) -> int | None:
    """Image steps of a training and of the one that it went on from."""
    before = 0 if run.entry.warmup is None else image_steps(run.warmup)
    return None if run.image_steps is None or before is None else run.image_steps + before


def _alone(runs: Sequence[Measured]) -> list[str]:
    """Labels that trained from their own beginning, where others share a start."""
    if all(run.entry.warmup is None for run in runs):
        return []
    trained = [run for run in runs if run.image_steps is not None]
    return list(dict.fromkeys(run.entry.label for run in trained if run.entry.warmup is None))


def _warmup(runs: Sequence[Measured]) -> Iterator[str]:
    def words(run: Measured) -> str:
        record, steps = run.warmup, image_steps(run.warmup)
        if run.entry.warmup is None:
            return "none"
        if record is None or steps is None:
            return "yes"
        name = record.inputs.get("method")
        kind = name.get("name", "network") if isinstance(name, dict) else "network"
        return f"weights of a `{kind}` trained for {steps:,} image steps"

    if any(run.entry.warmup is not None for run in runs):
        seconds = [r.seconds for r in {run.entry.warmup: run.warmup for run in runs}.values() if r]
        cost = f", {fmean(seconds) / 60:.1f} minutes each" if seconds else ""
        yield (
            f"Start of every training: {_shared(runs, words)}, made once for each seed and shared"
            f"{cost}, which the costs below leave out."
        )
    if alone := _alone(runs):
        yield (
            f"{_named(alone)}: no shared start, so the minutes include all of the training, also "
            "what the start took for the others."
        )


def _spread(runs: Sequence[Measured]) -> str:
    if max((len(of_label) for of_label in by_label(runs).values()), default=0) > 1:
        return (
            "± is the standard deviation over seeds (n − 1); numbers are means, shares in percent."
        )
    return "One seed for each method, so no spread is known. Shares are in percent."


def _where(runs: Sequence[Measured]) -> Iterator[str]:
    devices = _shared(runs, lambda run: run.device)
    if devices:
        yield f"Trained on {devices}."


def _shared(runs: Sequence[Measured], words: Callable[[Measured], str]) -> str:
    """What all have in common, or what each label has, where they differ."""
    of: dict[str, list[str]] = {}
    for label, of_label in by_label(runs).items():
        said = list(dict.fromkeys(text for text in map(words, of_label) if text))
        if said:
            of.setdefault(" or ".join(said), []).append(label)
    if len(of) < 2:
        return next(iter(of), "")
    most = max(of, key=lambda text: len(of[text]))
    others = [f"{', '.join(labels)}: {text}" for text, labels in of.items() if text != most]
    return f"{most} ({'; '.join(others)})"


def notes(runs: Sequence[Measured], table: Table) -> list[str]:
    """What a reader must know to read the table right, one sentence each."""
    return list(_notes(runs, table))


def _notes(runs: Sequence[Measured], table: Table) -> Iterator[str]:
    keys = {column.key for column in table.columns}
    lines = table.lines
    if any(column.oracle for column in table.columns):
        yield (
            "Best: at the threshold that ground truth finds best on these images (oracle), for all "
            "else the threshold was chosen as said above."
        )
    mapped = _mapped(runs, table.lists.masks)
    if mapped and keys & {"seed", "refined"}:
        yield (
            f"{_named(mapped)}: the scores have a background map, so no threshold stands between "
            "them and the masks."
        )
    if "refined" in keys and "seed_oracle" in keys:
        yield "Scores that were refined are measured at their masks' threshold after refinement."
    own = [line.label for line in lines if line.own and "segmenter" in line.numbers]
    if own:
        yield (
            f"{OWN} Predictions of the method's own network, for classes that it finds; nothing was "
            "trained behind it."
        )
    if "fp" in keys:
        yield "FP: share of the union that spilled over; FN: share that was missed (foreground)."
    cells = ((line, cell) for line in lines for cell in line.numbers.values())
    if any(len(cell.values) < len(line.seeds) for line, cell in cells):
        yield "What was not measured for every seed of a method is the mean of those that have it."
    if "f1" in keys:
        yield "Classifier F1: on the training images, against their tags."
    if "estimate" in keys:
        yield ESTIMATE
    if "training" in keys:
        yield (
            "Minutes are those of this machine, with whatever else ran on it: training of the "
            "method alone, and all stages to the end."
        )
    if "step" in keys:
        yield f"Step: measured time of one training step, over that of {lines[0].label}."


def _mapped(runs: Sequence[Measured], split: str) -> list[str]:
    """Labels whose masks come from a background map of their own."""
    rows = {label: [r.score("mask", split) for r in of] for label, of in by_label(runs).items()}
    return [label for label, of in rows.items() if any(r and r.rule == "map" for r in of)]


# --- findings -------------------------------------------------------------------------------

_WHAT = {"mask": "masks", "segmenter": "predictions"}


def findings(comparison: Comparison, runs: Sequence[Measured], table: Table) -> list[Finding]:
    """Everything worth saying, the most important first."""
    return [
        *_missing(comparison),
        *_leader(table, "mask"),
        *_leader(table, "segmenter"),
        *_against_first(table),
        *_cost(table),
        *_thresholds(runs, table),
        *_errors(table),
        *_classifiers(table),
        *_blind(runs),
    ]


def _missing(comparison: Comparison) -> Iterator[Finding]:
    done, planned = len(comparison.entries), comparison.planned
    if done < planned:
        verb = "is" if planned - done == 1 else "are"
        yield Finding(
            "warn",
            f"{planned - done} of {counted(planned, 'run')} {verb} not there yet",
            f"The same {'command' if comparison.command else 'call'} goes on where it stopped. Means are over the runs that are there, so "
            "methods may have different seeds.",
            "runs",
        )


def _ranked(table: Table, key: str) -> list[tuple[str, Cell]]:
    """Methods by how many others are above them on the seeds that both have, the fewest first.

    Means alone would put a method first for a lucky seed that its rivals lack.
    """
    known = [(line.label, line.numbers[key]) for line in table.lines if key in line.numbers]

    def place(pair: tuple[str, Cell]) -> tuple[int, int, float]:
        gains = [margin(pair[1], cell).gain for _, cell in known]
        return sum(gain < 0 for gain in gains), -sum(gain > 0 for gain in gains), -pair[1].mean

    return sorted(known, key=place)


def _leader(table: Table, key: str) -> Iterator[Finding]:
    """Which method is ahead, and whether that is more than chance."""
    ranked, what = _ranked(table, key), _WHAT[key]
    if len(ranked) < 2:
        return
    first, best = ranked[0]
    cells = dict(ranked[1:])
    margins = {label: margin(best, cell) for label, cell in cells.items()}
    level = [label for label, m in margins.items() if m.level]
    rivals = {label: m for label, m in margins.items() if not m.level}
    second = min(rivals, key=lambda label: rivals[label].gain, default="")
    networks = _networks(table) if key == "segmenter" else ""
    ahead = rivals[second] if second else margins[level[0]]
    numbers = _above(best, second, cells[second]) if second else ""
    if level and (not second or (ahead.gain > 0 and (ahead.seeds < 2 or ahead.clear))):
        seeds = min(margins[label].seeds for label in level)
        on = (f"on each of {seeds} seeds" if seeds > 1 else "on one seed") if seeds else "as means"
        yield Finding(
            "info",
            f"The {what} of {_named([first, *level])} have the same mIoU",
            f"{numbers or f'{_points(best)} mIoU'}. {_named(level)} "
            f"{'has' if len(level) == 1 else 'have'} the same as {first} {on}.{networks}",
            "table",
        )
    elif ahead.gain < 0:
        yield Finding(
            "info",
            f"Which {what} are the best cannot be said",
            "The methods have different seeds, and on those that two have in common each one is "
            f"behind another. Run the same seeds for all.{networks}",
            "table",
        )
    elif not ahead.seeds:
        yield Finding(
            "info",
            f"The {what} of {first} have the highest mIoU, on other seeds than {second}",
            f"{numbers}. They have no seed in common, so how much of that is chance cannot be said: "
            f"run the same seeds for both.{networks}",
            "table",
        )
    elif ahead.seeds == 1:
        yield Finding(
            "info",
            f"The {what} of {first} have the highest mIoU, on one seed",
            f"{numbers}. How much of that is chance, one seed cannot say: run it with `--seeds 3`."
            f"{networks}",
            "table",
        )
    elif ahead.clear:
        yield Finding(
            "good",
            f"The {what} of {first} are the best",
            f"{numbers}. It is ahead on each of {ahead.seeds} seeds, and by more "
            f"than the spread over seeds ({100 * (ahead.spread or 0):.1f}).{networks}",
            "table",
        )
    else:
        close = [label for label in cells if not margins[label].clear]
        yield Finding(
            "info",
            f"The {what} of {_named([first, *close])} cannot be told apart",
            f"{first} has {numbers}. It is ahead of {second} on {ahead.won} of "
            f"{ahead.seeds} seeds, with a spread over seeds of {100 * (ahead.spread or 0):.1f}."
            f"{networks}",
            "table",
        )


def _above(best: Cell, second: str, other: Cell) -> str:
    """The numbers of two methods, on the seeds that both have where there are some."""
    common = best.values.keys() & other.values.keys()
    where = ""
    if common and best.values.keys() != other.values.keys():
        best, other = (Cell({s: cell.values[s] for s in sorted(common)}) for cell in (best, other))
        where = f" on the {counted(len(common), 'seed')} that both have"
    gain = 100 * (best.mean - other.mean)
    return f"{_points(best)} mIoU, {gain:.1f} points above {second} ({_points(other)}){where}"


def _networks(table: Table) -> str:
    """Where some predict with their own network and others with one that was trained behind them."""
    own = [line.label for line in table.lines if line.own and "segmenter" in line.numbers]
    behind = [line.label for line in table.lines if not line.own and "segmenter" in line.numbers]
    if not own or not behind:
        return ""
    verb = "predicts with its" if len(own) == 1 else "predict with their"
    return f" {_named(own)} {verb} own network, the others with a segmenter trained on the masks."


def _against_first(table: Table) -> Iterator[Finding]:
    """Every method against the first one, which is the plain one as a rule."""
    key = next((k for k in _WHAT if any(c.key == k for c in table.columns)), "")
    if len(table.lines) < 3 or key not in table.lines[0].numbers:
        return
    base = table.lines[0]
    margins = {
        line.label: margin(line.numbers[key], base.numbers[key])
        for line in table.lines[1:]
        if key in line.numbers
    }
    several = any(m.seeds > 1 for m in margins.values())
    groups = {
        "above it": [k for k, m in margins.items() if m.gain > 0 and (m.clear or not several)],
        "below it": [k for k, m in margins.items() if m.gain < 0 and (m.clear or not several)],
        "equal to it": [k for k, m in margins.items() if m.level],
        "not told apart from it": [
            k for k, m in margins.items() if several and not m.clear and not m.level
        ],
    }
    said = [
        f"{words}: " + ", ".join(f"{k} ({_signed(margins[k].gain)})" for k in labels)
        for words, labels in groups.items()
        if labels
    ]
    if said:
        text = "; ".join(said)
        seeds = "One seed" if any(m.seeds for m in margins.values()) else "No seed in common"
        yield Finding(
            "info",
            f"Against {base.label}, by the {_WHAT[key]}",
            f"{text[0].upper()}{text[1:]}."
            + ("" if several else f" {seeds}, so small differences mean nothing."),
            "table",
        )


def _cost(table: Table) -> Iterator[Finding]:
    """What the best masks cost, and whether something as good costs less."""
    ranked = _ranked(table, "mask") or _ranked(table, "segmenter")
    costs = {
        line.label: line.numbers["training"].mean
        for line in table.lines
        if "training" in line.numbers
    }
    if len(ranked) < 2 or not all(costs.get(label) for label, _ in ranked):
        return
    (first, best), base = ranked[0], table.lines[0]
    cheaper = [
        label
        for label, cell in ranked[1:]
        if (m := margin(best, cell)).seeds > 1 and not m.clear and costs[label] < 0.8 * costs[first]
    ]
    if cheaper:
        label = min(cheaper, key=lambda name: costs[name])
        yield Finding(
            "good",
            f"{label} is not told apart from {first} and costs less",
            f"{costs[label] / 60:.1f} minutes of training, where {first} takes "
            f"{costs[first] / 60:.1f}.",
            "charts",
        )
    elif base.label in costs and base.label != first:
        step = next(line for line in table.lines if line.label == first).numbers.get("step")
        measured = "" if step is None else f" One step was measured at {step.mean:.2f} times."
        yield Finding(
            "info",
            f"Training {first} takes {costs[first] / costs[base.label]:.1f} times as long as "
            f"{base.label}",
            f"{costs[first] / 60:.1f} minutes, where {base.label} takes "
            f"{costs[base.label] / 60:.1f}.{measured}",
            "charts",
        )


def _thresholds(runs: Sequence[Measured], table: Table) -> Iterator[Finding]:
    """How much is lost between scores and masks."""
    mapped = _mapped(runs, table.lists.masks)
    losses, best = {}, {}
    for line in table.lines:
        oracle = line.numbers.get("refined_oracle") or line.numbers.get("seed_oracle")
        if oracle is not None and "mask" in line.numbers:
            best[line.label] = oracle.mean
            losses[line.label] = oracle.mean - line.numbers["mask"].mean
    if not losses:
        return
    worst = max(losses, key=lambda label: losses[label])
    leader, at_best = _ranked(table, "mask")[0][0], max(best, key=lambda label: best[label])
    if losses[worst] > _LOSS:
        other = (
            f" At the best thresholds {at_best} would come first, not {leader}."
            if at_best != leader
            else ""
        )
        yield Finding(
            "warn",
            f"{worst} loses {100 * losses[worst]:.1f} points to its "
            + ("background map" if worst in mapped else "threshold"),
            f"Its scores reach {100 * best[worst]:.1f} at the best threshold (oracle), which nobody "
            f"knows without ground truth.{other}",
            "table",
        )
    elif at_best != leader:
        yield Finding(
            "info",
            f"At the best thresholds (oracle) {at_best} would come first",
            f"{100 * best[at_best]:.1f} mIoU, by a threshold that nobody knows without ground truth.",
            "table",
        )


def _errors(table: Table) -> Iterator[Finding]:
    spilled, missed = _ranked(table, "fp"), _ranked(table, "fn")
    if len(spilled) > 1 and len(missed) > 1 and spilled[0][0] != missed[0][0]:
        (most, fp), (least, fn) = spilled[0], missed[0]
        yield Finding(
            "info",
            f"The masks of {most} spill over most, those of {least} miss most",
            f"FP {_points(fp)} % of the union with {most}, FN {_points(fn)} % with {least}. Masks "
            "that spill over are trimmed by a higher threshold, masks that miss by a lower one.",
            "charts",
        )


def _classifiers(table: Table) -> Iterator[Finding]:
    ranked = _ranked(table, "f1")
    weak = [(k, cell) for k, cell in ranked[1:] if cell.mean < ranked[0][1].mean - _WEAK]
    if weak:
        listed = ", ".join(f"{label} ({_points(cell)})" for label, cell in weak)
        yield Finding(
            "warn",
            f"{_named([label for label, _ in weak])} "
            f"know{'s' if len(weak) == 1 else ''} the classes less well than the others",
            f"F1 of the classifier: {listed}, where {ranked[0][0]} has {_points(ranked[0][1])}. Maps "
            "cannot be better than the classification behind them: look at its losses, or train "
            "longer, before the method is judged.",
            "table",
        )


def _blind(runs: Sequence[Measured]) -> Iterator[Finding]:
    if runs and not any(run.facts.scores for run in runs):
        yield Finding(
            "info",
            "Nothing here is measured against ground truth",
            "Without masks no mIoU is known: compare the pictures, the costs and the classifiers. A "
            "few dozen hand-drawn masks (`data.masks`) turn this page into a measurement.",
            "pictures",
        )


def _points(cell: Cell) -> str:
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.1f}"
    return f"{100 * cell.mean:.1f}{spread}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _named(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
