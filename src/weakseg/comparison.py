"""Several methods on one data set, with as many image steps, or as much time, for each.

Every run is a run folder of its own, below the folder of the comparison, and resumes like any
other; the tables are written anew after each. No method sees more than the recipe gives all of
them: the same images, tags, seeds of randomness, scales and threshold rule.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from weakseg.console import console
from weakseg.errors import UserError
from weakseg.estimate import PlannedStage, plan, step_seconds
from weakseg.files import write_json
from weakseg.methods import methods as registered
from weakseg.pipeline import checked, run_recipe, stages_of
from weakseg.recipe import CompareConfig, Recipe, load_recipe
from weakseg.registry import suggest
from weakseg.report.comparison import write_comparison_page, write_tables
from weakseg.report.numbers import Comparison, Entry
from weakseg.runfolder import fingerprint
from weakseg.stages.check import collect

__all__ = ["METHODS", "Contestant", "compare", "contestants", "plans"]

METHODS = ("cam", "puzzle", "seam", "acr", "recurseed", "recurseed+edgepredictmix")
"""What is compared where nothing is named: every method that runs on any backbone."""

_COMMON = ("seed", "data", "evaluate", "compare")
_SHARED = "shared-cam"


@dataclass(frozen=True)
class Contestant:
    """One method, or variant of one, with the recipe that it is run by.

    Attributes:
        label: The method's name, or the variant's in ``compare.methods``.
        recipe: For the recipe's first seed.
        from_cam: It goes on from the shared CAM.
    """

    label: str
    recipe: Recipe
    from_cam: bool


def compare(
    recipe: Recipe | str | Path | Mapping[str, Any],
    methods: Sequence[str] = METHODS,
    *,
    out: str | Path = "weakseg-compare",
    seeds: int = 1,
    equal_time: bool = False,
    command: str = "",
) -> Comparison:
    """Runs methods side by side and writes ``comparison.csv``, ``.md`` and ``.html``.

    Args:
        recipe: What all have in common, or where it is; its ``compare`` section says what each
            changes.
        methods: Names of methods, or of variants in ``compare.methods``; the first one is what the
            others are compared with.
        out: Folder of the comparison; an interrupted one goes on where it stopped.
        seeds: How many runs of each: the recipe's seed and those that follow it.
        equal_time: Give each method the time that ``train.steps`` take the first one, instead of
            as many steps. A step's cost is measured once, on this machine, and then kept.
        command: The command line, for the tables.

    Raises:
        UserError: Whatever the user can mend. A run that fails leaves the others to go on, and is
            named at the end.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out)
    collection = collect(recipe.data)
    images = len(collection.split(*recipe.data.train))
    rivals = contestants(recipe, methods, images)
    for rival in rivals:
        checked(rival.recipe)
    out.mkdir(parents=True, exist_ok=True)
    costs = _step_costs(out, rivals, len(collection.classes))
    if equal_time:
        rivals = [_in_time(rival, rivals[0], costs[rival.label], images) for rival in rivals]
    planned = seeds * len(rivals)
    entries: list[Entry] = []
    failures: list[str] = []

    def comparison() -> Comparison:
        order = [rival.label for rival in rivals]
        ordered = sorted(entries, key=lambda e: (order.index(e.label), e.seed))
        return Comparison(
            tuple(ordered), collection, planned, "time" if equal_time else "steps", command
        )

    rounds = [(recipe.seed + i, rival) for i in range(seeds) for rival in rivals]
    for number, (seed, rival) in enumerate(rounds, start=1):
        console.rule(f"{escape(rival.label)}, seed {seed} ({number} of {planned})")
        try:
            warmup = _shared_cam(recipe, seed, out) if rival.from_cam else None
            run = run_recipe(_seeded(rival.recipe, seed, warmup), _folder(out, rival.label, seed))
        except UserError as error:  # of one run: hours of others need not wait for it
            failures.append(f"{rival.label}, seed {seed}")
            console.print(f"[red]error[/red] {escape(str(error))}")
            continue
        cost = costs[rival.label]
        entries.append(Entry(rival.label, seed, run.folder, run.recipe, warmup, cost))
        write_tables(comparison(), out)
    if entries:
        write_comparison_page(comparison(), out)
    if failures:
        raise UserError(
            f"{len(failures)} of {planned} runs failed: {'; '.join(failures)}",
            where=out,
            mend="mend what the errors above say, and run the same command again: what is done is kept",
        )
    return comparison()


def plans(
    recipe: Recipe, methods: Sequence[str], seeds: int
) -> list[tuple[str, list[PlannedStage], int]]:
    """What ``compare`` would run, and how often: stages with estimates, measured on this machine."""
    collection = collect(recipe.data)
    rivals = contestants(recipe, methods, len(collection.split(*recipe.data.train)))
    shared = [("shared CAM", _of_shared_cam(recipe, recipe.seed), "train")]
    runs = [(r.label, checked(r.recipe), None) for r in rivals]
    return [
        (name, plan(own, collection, [n for n, _ in stages_of(own, collection, until)]), seeds)
        for name, own, until in (shared if any(r.from_cam for r in rivals) else []) + runs
    ]


def contestants(recipe: Recipe, labels: Sequence[str], images: int) -> list[Contestant]:
    """The recipes that these methods or variants are run by, for so many training images.

    Raises:
        UserError: An unknown name, a name twice, or settings that a recipe refuses.
    """
    labels = [label.strip() for label in labels if label.strip()]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if not labels or twice:
        raise UserError(
            f"{twice!r} stands twice" if twice else "no method is named",
            where="--methods",
            mend="name each once, such as --methods cam,seam",
        )
    taken = {_SHARED: "the shared CAM"}
    for label in labels:
        other = taken.setdefault(_file_name(label), label)
        if other != label:
            raise UserError(
                f"{label!r} and {other!r} would share a folder",
                where="compare.methods",
                mend="give one of them another name",
            )
    return [_contestant(recipe, label, images) for label in labels]


def _contestant(recipe: Recipe, label: str, images: int) -> Contestant:
    own = _settings(recipe.compare, label)
    for section in _COMMON:
        if section in own:
            raise UserError(
                f"{section} is the same for all",
                where=f"compare.methods: {label}",
                mend="set it in the recipe itself",
            )
    name = own["method"].get("name", label)
    base = recipe.model_dump(mode="json") | {"compare": {}}
    if _base(name) != _base(recipe.method["name"]):
        base["method"] = {}  # it holds settings of another method
    network = own.get("backbone", {}).get("name", recipe.backbone.name)
    after = recipe.compare.after_cam
    from_cam = after is not None and network == recipe.backbone.name
    try:
        if after is not None and from_cam:
            base |= _laid_over(base | {"method": {"name": "cam"}}, after) | {
                "method": base["method"]
            }
        elif after is not None:  # on a network of its own: as many steps as both trainings have
            both = load_recipe(base | {"method": {"name": "cam"}}, overrides=after).train
            base["train"]["steps"] = sum(t.total_steps(images) for t in (recipe.train, both))
        if network != recipe.backbone.name:
            base["segmenter"]["backbone"] = base["segmenter"]["backbone"] or base["backbone"]
            base["backbone"] = {}
        settings = {**own, "method": {**own["method"], "name": name}}
        return Contestant(label, load_recipe(base, overrides=settings), from_cam)
    except UserError as error:
        where = f"compare.methods: {label}"
        raise UserError(error.what, where=where, mend=error.mend) from None


def _laid_over(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return load_recipe(values, overrides=over).model_dump(mode="json")


def _settings(config: CompareConfig, label: str) -> dict[str, Any]:
    """What the recipe says of a method; ``acr+vit`` without words of its own takes those of ``acr``."""
    base = _base(label)
    own = config.methods.get(label)
    if own is None and base in registered:
        own = dict(config.methods.get(base, {}))
        own["method"] = {k: v for k, v in _method_of(own).items() if k != "name"}
    if own is None:
        names = {*registered, *config.methods}
        raise UserError(
            f"no method or variant {label!r}", where="--methods", mend=suggest(label, names)
        )
    return {**own, "method": _method_of(own)}


def _method_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    section = settings.get("method", {})
    return {"name": section} if isinstance(section, str) else dict(section)


def _base(name: str) -> str:
    """The method of ``recurseed+cutmix``."""
    return name.partition("+")[0]


def _file_name(label: str) -> str:
    return re.sub(r"[^\w+.-]+", "-", label).lower()


def _folder(out: Path, label: str, seed: int) -> Path:
    return out / f"{_file_name(label)}-{seed}"


def _seeded(recipe: Recipe, seed: int, warmup: Path | None) -> Recipe:
    train: dict[str, Any] = {} if warmup is None else {"init_from": str(warmup.absolute())}
    return load_recipe(recipe.model_dump(mode="json"), overrides={"seed": seed, "train": train})


def _shared_cam(recipe: Recipe, seed: int, out: Path) -> Path:
    """The run of the CAM that methods go on from; trained where it is not there yet."""
    own = _of_shared_cam(recipe, seed)
    return run_recipe(own, _folder(out, _SHARED, seed), until="train").folder


def _of_shared_cam(recipe: Recipe, seed: int) -> Recipe:
    values = recipe.model_dump(mode="json") | {"seed": seed, "compare": {}, "refine": []}
    if recipe.method["name"] != "cam":
        values["method"] = {"name": "cam"}
    return load_recipe(values)


def _in_time(rival: Contestant, first: Contestant, cost: float, images: int) -> Contestant:
    """With as many steps as fit into the time that the first one's take it."""
    steps = max(1, round(first.recipe.train.total_steps(images) / cost))
    values = rival.recipe.model_dump(mode="json")
    values["train"]["steps"] = steps
    return replace(rival, recipe=load_recipe(values))


def _step_costs(out: Path, rivals: Sequence[Contestant], classes: int) -> dict[str, float]:
    """What a training step costs, relative to the first one's: measured once, and then kept, so
    that a comparison that goes on keeps its numbers of steps."""
    file = out / "step-costs.json"
    keys = {rival.label: _cost_key(rival.recipe, rivals[0].recipe) for rival in rivals}
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    missing = {keys[r.label]: r.recipe for r in rivals if keys[r.label] not in known}
    if missing:
        first = keys[rivals[0].label]
        seconds = step_seconds({first: rivals[0].recipe, **missing}, classes)
        known |= {key: seconds[key] / seconds[first] for key in missing}
        write_json(file, known)
    return {label: known[key] for label, key in keys.items()}


def _cost_key(recipe: Recipe, first: Recipe) -> str:
    """What decides the cost of a step, of a method and of the one it is measured by."""
    parts = [
        {
            **r.model_dump(mode="json", include={"method", "backbone"}),
            "images": r.train.crop,
            "batch": r.train.batch,
            "accelerator": r.runtime.accelerator,
        }
        for r in (recipe, first)
    ]
    return fingerprint(parts)
