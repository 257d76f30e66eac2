"""What a run shows and what to do next, in plain language.

Each rule looks at the facts and says one thing, or nothing. A rule that gives advice names the
number it rests on, so that a reader can disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from weakseg.report.facts import Curve, Facts, entries, number

__all__ = ["Finding", "counted", "findings", "percent", "role_of_truth", "status", "summary"]

FEW = 20
"""Train images of a class below which the report speaks of it."""

Level = Literal["bad", "warn", "info", "good"]
_ORDER: dict[Level, int] = {"bad": 0, "warn": 1, "info": 2, "good": 3}

_NAMES = {"seed": "score maps", "mask": "masks", "segmenter": "predictions"}


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing; ``link`` is the section that shows it."""

    level: Level
    title: str
    text: str
    link: str = ""


def percent(share: float | None) -> str:
    """A share as percent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f} %"


def status(facts: Facts) -> tuple[Level, str]:
    """Level and words for the state of the whole run."""
    states = {name: record.status for name, record in facts.records.items()}
    failed = [name for name in facts.expected if states.get(name) == "failed"]
    if failed:
        return "bad", f"failed in {failed[0]}"
    running = [name for name in facts.expected if states.get(name) == "running"]
    if running:
        return "warn", f"{running[0]} running or interrupted"
    missing = [name for name in facts.expected if name not in states]
    if not missing:
        return "good", "complete"
    done = len(facts.expected) - len(missing)
    return "info", f"{done} of {len(facts.expected)} stages done"


def summary(facts: Facts) -> list[str]:
    """What happened, in a few sentences."""
    return [*_what_was_done(facts), *_what_came_out(facts)]


def role_of_truth(facts: Facts) -> str:
    """Where ground truth was seen, in one or two sentences."""
    if not facts.has_truth and facts.has_boxes:
        return (
            "This collection has no ground-truth masks. Its boxes are read to evaluate the score maps "
            "and for nothing else; where they chose a threshold, the number carries the word oracle."
        )
    if not facts.has_truth:
        return (
            "This collection has no ground-truth masks. Training, checkpoints and the threshold "
            "rest on images and tags alone, and nothing here is measured against truth."
        )
    text = (
        "Ground-truth masks are opened to check their format and to evaluate, nowhere else: no "
        "training step and no checkpoint of this run saw them. Numbers in which they chose something, "
        "such as the best threshold, carry the word oracle."
    )
    if facts.threshold is not None and facts.threshold.rule == "constant":
        text += (
            " The threshold was set by hand in the recipe; whether somebody looked at ground truth "
            "for it, this page cannot know."
        )
    elif facts.threshold is not None and facts.threshold.rule != "map":
        text += f" The {facts.threshold.rule} threshold did not see them either."
    if "mask" in facts.collection.tag_source.lower():
        text += f" But the tags themselves come from {facts.collection.tag_source}."
    return text


def findings(facts: Facts) -> list[Finding]:
    """Everything worth saying, the most urgent first."""
    rules: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
        _stages,
        _problems,
        _few_images,
        _companions,
        _classifier,
        _schedule,
        _terms,
        _threshold,
        _distance_to_oracle,
        _balance,
        _gain,
        _weak_classes,
        _next,
    )
    found = [finding for rule in rules for finding in rule(facts)]
    return sorted(found, key=lambda f: _ORDER[f.level])


# --- summary --------------------------------------------------------------------------------


def _what_was_done(facts: Facts) -> Iterator[str]:
    data, method = facts.collection, facts.recipe.method.get("name", "")
    images = f"{len(facts.train_samples):,} images of {counted(len(data.classes), 'class', 'es')}"
    if facts.done("train") and facts.given_classifier is not None:
        yield (
            f"Nothing was trained for the score maps: they are those of the classifier "
            f"`{facts.given_classifier}`, by method `{method}`, on {images} whose tags (source: "
            f"{data.tag_source}) say which classes are there."
        )
    elif facts.done("train"):
        yield (
            f"The method `{method}` was trained on {images}, from tags alone "
            f"(source: {data.tag_source})."
        )
    elif facts.recipe.seeds.given is not None:
        yield (
            f"Score maps of {images} were given ({facts.recipe.seeds.given.name}) and limited to the "
            f"tags from {data.tag_source}."
        )
    else:
        yield f"The data have {images} to train on, with tags from {data.tag_source}."
    rule, steps = facts.threshold, facts.recipe.steps
    if steps and facts.done("refine"):
        yield f"Its score maps were refined: {', then '.join(steps)}."
    if facts.done("masks") and rule is not None and rule.rule == "map":
        yield (
            "The scores have a background map of their own, so no threshold stood between them "
            "and the masks."
        )
    elif facts.done("masks") and rule is not None and rule.value is not None:
        yield (
            f"The scores became one mask for each training image, with the {rule.rule} "
            f"threshold {rule.value:.2f}."
        )
    if facts.done("segment"):
        yield "A segmentation network was then trained on those masks."
        corrected = _corrected(facts)
        if corrected:
            yield (
                f"{corrected:,} of these masks were corrected by hand. Whatever is said of the masks "
                "here is of those that were made from scores, not of the corrected ones."
            )
    elif facts.done("predict"):
        yield (
            "The method is a segmentation network itself: its predictions, for classes that it "
            "finds present, stand where those of a segmenter would."
        )


def _what_came_out(facts: Facts) -> Iterator[str]:
    mask = facts.best_row("mask", facts.recipe.data.train)
    segmenter = facts.best_row("segmenter", facts.recipe.data.val)
    parts = [
        f"the {_NAMES[row.stage]} reach "
        f"{percent(row.miou)} mIoU ({row.split}, {row.images:,} images)"
        for row in (mask, segmenter)
        if row is not None
    ]
    if parts:
        yield f"Compared with ground truth, {' and '.join(parts)}."
    elif facts.done("masks") and not facts.has_truth:
        yield "There are no ground-truth masks to measure them with: judge the masks by the pictures."


# --- stages and data ------------------------------------------------------------------------


def _stages(facts: Facts) -> Iterator[Finding]:
    for name, record in facts.records.items():
        if record.status == "failed":
            yield Finding(
                "bad", f"Stage {name} failed", record.message or "It left no message.", "stages"
            )
        if record.status == "running":
            yield Finding(
                "warn",
                f"Stage {name} is not finished",
                "It is running, or was interrupted. The same command goes on where it stopped.",
                "stages",
            )


def _problems(facts: Facts) -> Iterator[Finding]:
    problems = entries(facts.check, "problems")
    kinds = [p.get("severity") for p in problems if isinstance(p, dict)]
    errors, warnings = kinds.count("error"), kinds.count("warning")
    if errors:
        yield Finding(
            "bad",
            f"{counted(errors, 'kind')} of errors in the data",
            "They spoil a run. The table of problems says how to mend each of them.",
            "data",
        )
    if warnings:
        yield Finding(
            "warn",
            f"{counted(warnings, 'warning')} about the data",
            "They may be intended; the table of problems lists the items.",
            "data",
        )


def _few_images(facts: Facts) -> Iterator[Finding]:
    counts = dict.fromkeys(facts.collection.classes, 0)
    for sample in facts.train_samples:
        for tag in set(sample.tags or ()):
            counts[tag] = counts.get(tag, 0) + 1
    few = sorted((n, name) for name, n in counts.items() if 0 < n < FEW)
    if few:
        named = ", ".join(f"{name} ({n})" for n, name in few[:6])
        more = f" and {len(few) - 6} more" if len(few) > 6 else ""
        yield Finding(
            "warn",
            f"{counted(len(few), 'class', 'es')} with few training images",
            f"{named}{more}. Fewer than {FEW} images seldom teach what a class looks like: tag more "
            "of them, or leave the class out.",
            "data",
        )


def _companions(facts: Facts) -> Iterator[Finding]:
    """Pairs of classes that tags cannot tell apart."""
    matrix, names = entries(facts.check, "cooccurrence"), facts.collection.classes
    if len(matrix) != len(names):
        return
    pairs = []
    for i, row in enumerate(matrix):
        alone = number(row[i]) if isinstance(row, list) and len(row) == len(names) else None
        for j, both in enumerate(row if alone and alone >= 5 else ()):
            share = (number(both) or 0.0) / (alone or 1.0)
            if i != j and share >= 0.9:
                pairs.append((-share, names[i], names[j]))
    if pairs:
        shown = "; ".join(
            f"{100 * -s:.0f} % of the images of {a} show {b}" for s, a, b in sorted(pairs)[:3]
        )
        yield Finding(
            "warn",
            "Classes that nearly always come together",
            f"{shown}. Tags cannot say which pixels belong to which of the two: add images where "
            "they appear apart.",
            "data",
        )


# --- training -------------------------------------------------------------------------------


def _classifier(facts: Facts) -> Iterator[Finding]:
    f1 = number(facts.result("seeds", "f1"))
    if f1 is None:
        return
    if facts.given_classifier is not None:
        how = facts.result("train", "classes") or "as the recipe says"
        yield Finding(
            "info" if f1 >= 0.8 else "warn",
            f"The given classifier finds the tagged classes with F1 {percent(f1)}",
            f"Its outputs stand for the classes {how}, trained with {facts.result('train', 'loss')}. "
            "One that was trained with a softmax finds one class in an image. Where the number is "
            "low, look at `method.classifier_classes` and `backbone.mean`; to train it further, "
            "give this run to another as `train.init_from`.",
            "training",
        )
    elif f1 < 0.8:
        yield Finding(
            "warn",
            f"The classifier does not know the classes well yet (F1 {percent(f1)})",
            "Score maps cannot be better than the classification behind them. Train longer "
            "(`train.steps`), start from better weights, or look for wrong tags.",
            "training",
        )
    else:
        yield Finding(
            "good",
            f"The classifier knows the classes (F1 {percent(f1)})",
            "Measured on the training images against their tags.",
            "training",
        )


def _schedule(facts: Facts) -> Iterator[Finding]:
    for stage, curves in facts.losses.items():
        falling = [term for term, curve in curves.items() if term != "lr" and _still_falls(curve)]
        if facts.done(stage) and falling:
            yield Finding(
                "info",
                f"The loss was still falling at the end ({stage})",
                f"{', '.join(falling)}: more than a tenth lower in the last tenth of the steps than "
                "in the tenth before. A longer schedule may help.",
                "training",
            )


def _still_falls(curve: Curve) -> bool:
    tenth = len(curve) // 10
    if tenth < 3:
        return False
    last = sum(v for _, v in curve[-tenth:]) / tenth
    before = sum(v for _, v in curve[-2 * tenth : -tenth]) / tenth
    return before > 0 and last < 0.9 * before


def _terms(facts: Facts) -> Iterator[Finding]:
    for stage in ("train", "segment"):
        active = facts.result(stage, "active_steps")
        idle = [term for term, n in active.items() if not n] if isinstance(active, dict) else []
        if idle and facts.done(stage):
            yield Finding(
                "warn",
                f"Loss terms that were never active ({stage})",
                f"{', '.join(idle)}. The schedule may be too short for terms that start late.",
                "training",
            )


# --- threshold and results ------------------------------------------------------------------


def _threshold(facts: Facts) -> Iterator[Finding]:
    rule = facts.threshold
    near, above = (rule.share_near(0.05), rule.share_above()) if rule else (None, None)
    if rule is None or rule.value is None or near is None or above is None:
        return
    if near > 0.1:
        yield Finding(
            "warn",
            "Much depends on the threshold",
            f"{percent(near)} of all pixels score within 0.05 of {rule.value:.2f}. Look at the "
            "white lines on the score maps. To try another value without training again: "
            f"`weakseg masks {facts.run.path.name} --set masks.rule=constant "
            f"--set masks.threshold={min(rule.value + 0.1, 0.95):.2f}`.",
            "threshold",
        )
    if above < 0.03 or above > 0.7:
        extent = "hardly anything" if above < 0.03 else "most of every image"
        yield Finding(
            "warn",
            f"The threshold keeps {extent}",
            f"{percent(above)} of all pixels became foreground. If the objects are larger or "
            "smaller than that in the pictures, set `masks.threshold`.",
            "threshold",
        )


def _distance_to_oracle(facts: Facts) -> Iterator[Finding]:
    sweep, rule = facts.sweep, facts.threshold
    if sweep is None or rule is None or rule.value is None or sweep.best is None:
        return
    at, best = sweep.at(rule.value), sweep.best
    if at is None:
        return
    lost = best[1] - at
    if lost > 0.02:
        side = "lower" if best[0] < rule.value else "higher"
        yield Finding(
            "warn",
            f"Another threshold would give {100 * lost:.1f} points more",
            f"{percent(at)} mIoU at {rule.value:.2f}, {percent(best[1])} at the oracle's "
            f"{best[0]:.2f}, which is {side}. The oracle has seen ground truth: what it finds on "
            "these images is a bound, and must be confirmed on others.",
            "threshold",
        )
    else:
        yield Finding(
            "good",
            f"The threshold is within {100 * lost:.1f} points of the best one",
            f"{percent(at)} mIoU at {rule.value:.2f}; the oracle's {best[0]:.2f} gives "
            f"{percent(best[1])}.",
            "threshold",
        )


def _balance(facts: Facts) -> Iterator[Finding]:
    row = facts.best_row("mask", facts.recipe.data.train)
    if row is None or row.fp is None or row.fn is None or abs(row.fp - row.fn) < 0.05:
        return
    if row.fp > row.fn:
        what, why = (
            "spill over the objects",
            "scenery that always comes with a class, or a low threshold",
        )
    else:
        what, why = (
            "cover only parts of the objects",
            "a classifier content with one telling part, or a high threshold",
        )
    yield Finding(
        "info",
        f"The masks {what}",
        f"FP {percent(row.fp)}, FN {percent(row.fn)}, as shares of the union. The usual cause is {why}.",
        "results",
    )


def _gain(facts: Facts) -> Iterator[Finding]:
    if not facts.done("segment"):
        return
    masks = {r.split: r for r in facts.scores if r.stage == "mask" and not r.oracle}
    for row in facts.scores:
        mask = masks.get(row.split)
        if row.stage != "segmenter" or mask is None or row.miou is None or mask.miou is None:
            continue
        gain = 100 * (row.miou - mask.miou)
        better = gain >= 0
        yield Finding(
            "good" if better else "warn",
            f"The segmenter is {abs(gain):.1f} points {'above' if better else 'below'} "
            + ("the masks as they were made" if _corrected(facts) else "its own masks"),
            f"On {row.split}: {percent(row.miou)} after {percent(mask.miou)}. "
            + (
                "Its predictions are the better masks."
                if better
                else "It may be trained too briefly: look at its loss, and set `segmenter.train.steps`."
            ),
            "results",
        )
        return


def _corrected(facts: Facts) -> int:
    """How many masks the segmenter was trained on were corrected by hand."""
    return int(number(facts.result("segment", "corrected")) or 0)


def _weak_classes(facts: Facts) -> Iterator[Finding]:
    row = facts.best_row("segmenter", facts.recipe.data.val) or facts.best_row("mask", ())
    if row is None or row.miou is None:
        return
    named = zip(facts.collection.classes, row.iou[1:], strict=False)
    weak = sorted((iou, name) for name, iou in named if iou is not None and iou < 0.5 * row.miou)
    if weak:
        listed = ", ".join(f"{name} ({percent(iou)})" for iou, name in weak[:5])
        more = f" and {len(weak) - 5} more" if len(weak) > 5 else ""
        yield Finding(
            "warn",
            f"{counted(len(weak), 'class', 'es')} far below the others",
            f"{listed}{more}: less than half of the mean, {_NAMES.get(row.stage, row.stage)} on "
            f"{row.split}. Look for them among the worst cases, and at their numbers of images.",
            "classes",
        )


def _next(facts: Facts) -> Iterator[Finding]:
    if facts.done("masks") and not facts.has_truth:
        yield Finding(
            "info",
            "Look before you trust",
            "Go through the pictures: masks larger than the objects ask for a higher threshold, "
            "masks of single parts for a lower one or another method. A few dozen hand-drawn "
            "masks (`data.masks`) turn this page into a measurement.",
            "pictures",
        )
    missing = [n for n in facts.expected if n not in facts.records]
    if missing and facts.records and all(r.status == "done" for r in facts.records.values()):
        yield Finding(
            "info",
            f"Next stage: {missing[0]}",
            "The same `weakseg run` goes on from here; finished stages are kept.",
            "stages",
        )


def counted(number_of: int, word: str, plural: str = "s") -> str:
    """A number with its word, in the plural where it is one."""
    return f"{number_of:,} {word}{'' if number_of == 1 else plural}"
