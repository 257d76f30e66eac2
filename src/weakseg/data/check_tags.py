"""What tags alone can say about a collection: spellings, balance, classes that cannot be told apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weakseg.data.samples import Collection

__all__ = ["FEW", "MOST_CLASSES", "check_tags", "known_tags"]

FEW = 5
"""Train images of a class below which nothing is learnt from it."""

MOST_CLASSES = 254
"""As many as the ids of an 8-bit mask tell apart, less 0 for background and 255 for unsure."""

_TOGETHER = 0.9  # share of a class's images that show one other class too
_ALONE = 0.02  # share of a class's images that show it alone
_LONG = 40  # letters; slips are looked for in shorter tags only

Found = Iterator[tuple[str, str | None]]


def check_tags(collection: Collection, train: Sequence[str]) -> Found:
    """Pairs (code, item) of everything that is wrong with the tags.

    Args:
        collection: Its tags need not all be in its class list.
        train: Splits that are trained on.
    """
    yield from _spellings(collection)
    yield from _balance(collection, train)
    if len(collection.classes) <= MOST_CLASSES:
        yield from _companions(collection.split(*train))


def _spellings(collection: Collection) -> Found:
    known = set(collection.classes)
    for sample in collection:
        if sample.tags is None:
            yield "untagged", sample.id
        for tag in sample.tags or ():
            if tag not in known:
                yield "unknown-tag", tag
    uses = Counter(tag for sample in collection for tag in sample.tags or ())
    for rare, frequent in _lookalikes(uses):
        yield "similar-tags", f"{rare} ({uses[rare]:,}) / {frequent} ({uses[frequent]:,})"


def _balance(collection: Collection, splits: Sequence[str]) -> Found:
    train = collection.split(*splits).samples
    if collection.samples and not train:
        yield "no-train-images", None
    uses = Counter(tag for sample in collection for tag in set(sample.tags or ()))
    in_train = Counter(tag for sample in train for tag in set(sample.tags or ()))
    tagged = sum(s.tags is not None for s in train)
    for name in collection.classes:
        if not uses[name]:
            yield "class-without-images", name
        elif train and in_train[name] < FEW:
            yield "few-images", name
        if tagged and in_train[name] == tagged:
            yield "no-negatives", name


def _companions(train: Collection) -> Found:
    """Classes whose images nearly all show another class, always the same one or any."""
    matrix = known_tags(train).astype(np.int64)
    both, alone = matrix.T @ matrix, matrix[matrix.sum(1) == 1].sum(0)
    number = np.diag(both).copy()
    tagged = sum(sample.tags is not None for sample in train)
    names = train.classes
    # A class that all images show is an error of its own; few images say nothing.
    share = np.where(number < tagged, both / np.maximum(number, 1)[:, None], 0.0)
    share[number < FEW] = 0.0
    np.fill_diagonal(share, 0.0)
    for i, j in np.argwhere(share >= _TOGETHER):
        mutual = share[j, i] >= _TOGETHER
        if not mutual:
            yield (
                "always-together",
                f"{names[i]} with {names[j]} in {both[i, j]:,} of its {number[i]:,} images",
            )
        elif i < j:
            yield (
                "always-together",
                f"{names[i]} ({number[i]:,}) and {names[j]} ({number[j]:,}) in {both[i, j]:,}",
            )
    for i in np.flatnonzero((number >= FEW) & (number < tagged) & (alone <= _ALONE * number)):
        if share[i].max() < _TOGETHER:
            yield "never-alone", f"{names[i]} ({alone[i]:,} of {number[i]:,})"


def known_tags(collection: Collection) -> np.ndarray:
    """The tag matrix, whether or not all tags are in the class list."""
    known = set(collection.classes)
    rows = [
        sample
        if known.issuperset(sample.tags or ())
        else replace(sample, tags=tuple(tag for tag in sample.tags or () if tag in known))
        for sample in collection
    ]
    return replace(collection, samples=tuple(rows)).tag_matrix()


def _lookalikes(uses: Counter[str]) -> Iterator[tuple[str, str]]:
    """Pairs (rare, frequent) of tags that may be one class."""
    ordered = sorted(uses, key=lambda tag: (-uses[tag], tag))
    rank = {tag: i for i, tag in enumerate(ordered)}
    letters = {tag: re.sub(r"[\W_]+", "", tag.casefold()) for tag in ordered}
    found = set(_pairs((_singular(letters[tag]), tag) for tag in ordered))
    # Two slips of each other agree once the letters concerned are left out of both.
    for frequent, rare in _pairs((key, tag) for tag in ordered for key in _shortened(letters[tag])):
        if uses[rare] * 10 <= uses[frequent] and _near(letters[rare], letters[frequent]):
            found.add((frequent, rare))
    for frequent, rare in sorted(found, key=lambda pair: (rank[pair[0]], rank[pair[1]])):
        yield rare, frequent


def _pairs(keyed: Iterable[tuple[Any, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of tags that share a key, each in the order given."""
    groups: dict[Any, list[str]] = {}
    for key, tag in keyed:
        for other in groups.setdefault(key, []):
            yield other, tag
        groups[key].append(tag)


def _shortened(word: str) -> set[tuple[str, str]]:
    """The word without up to as many letters as may be wrong in it; each with its digits."""
    if len(word) > _LONG:
        return set()
    digits = " ".join(re.findall(r"\d+", word))
    words = {word}
    for _ in range(1 if len(word) < 8 else 2):
        words |= {w[:i] + w[i + 1 :] for w in words for i in range(len(w))}
    return {(digits, w) for w in words}


def _singular(word: str) -> str:
    """An English word without its plural ending; good enough to compare two."""
    for ending, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word.removesuffix(ending) + singular
    return word


def _near(a: str, b: str) -> bool:
    """Whether one slip of the hand (two in long words) turns one word into the other."""
    shorter = min(len(a), len(b))
    # Short words differ by a letter all the time (car, cat), but not by a swap (cta).
    short = int(sorted(a) == sorted(b))
    allowed = short if shorter < 4 else 1 if shorter < 8 else 2
    # Digits number things: 'class1' and 'class2' are no slips.
    if re.findall(r"\d+", a) != re.findall(r"\d+", b) or abs(len(a) - len(b)) > allowed:
        return False
    return allowed > 0 and _slips(a, b) <= allowed


def _slips(a: str, b: str) -> int:
    """Edit distance with swaps of neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        after = [i]
        for j, y in enumerate(b, start=1):
            best = min(row[j] + 1, after[j - 1] + 1, row[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            after.append(best)
        before, row = row, after
    return row[-1]
