"""Several methods on one data set, with as many image steps, or as much time, for each.

Every run is a run folder of its own, below the folder of the comparison, and resumes like any
other; the tables are written anew after each. No method sees more than the recipe gives all of
them: the same images, tags, seeds of randomness, scales and threshold rule.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from weakseg.console import console
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.estimate import PlannedStage, plan, step_seconds
from weakseg.files import atomic_path, write_json
from weakseg.methods import methods as registered
from weakseg.pipeline import checked, run_recipe, stages_of
from weakseg.recipe import CompareConfig, Recipe, load_recipe
from weakseg.registry import suggest
from weakseg.report.comparison import write_comparison_page, write_tables
from weakseg.report.numbers import Comparison, Entry
from weakseg.runfolder import RunFolder
from weakseg.stagefiles import fingerprint
from weakseg.stages.check import collect
from weakseg.training.config import without_preset

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
    methods: str | Sequence[str] = METHODS,
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
        methods: Names of methods, or of variants in ``compare.methods``, as a list or with commas
            between them; the first one is what the others are compared with.
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
    if seeds < 1:
        raise UserError(f"{seeds} seeds were asked for", where="--seeds", mend="give 1 or more")
    out = Path(out)
    if RunFolder(out).record("check") is not None:
        raise UserError("the folder holds a run", where=out, mend="give another folder with --out")
    collection = collect(recipe.data)
    images = len(collection.split(*recipe.data.train))
    rivals = contestants(recipe, methods, images)
    for rival in rivals:
        checked(rival.recipe)
    out.mkdir(parents=True, exist_ok=True)
    with RunFolder(out).locked():
        with atomic_path(RunFolder(out).recipe_file) as temporary:  # what all have in common
            temporary.write_text(recipe.to_yaml(), encoding="utf-8")
        costs = _step_costs(out / "step-costs.json", rivals, len(collection.classes))
        if equal_time:
            rivals = _in_time(rivals, costs, images)
        return _run(recipe, rivals, collection, costs, out, seeds, equal_time, command)


def _run(
    recipe: Recipe,
    rivals: Sequence[Contestant],
    collection: Collection,
    costs: Mapping[str, float],
    out: Path,
    seeds: int,
    equal_time: bool,
    command: str,
) -> Comparison:
    planned = seeds * len(rivals)
    order = [rival.label for rival in rivals]
    entries: list[Entry] = []
    failures: list[str] = []
    no_cam: set[int] = set()  # seeds whose shared CAM failed

    def comparison() -> Comparison:
        ordered = sorted(entries, key=lambda e: (order.index(e.label), e.seed))
        return Comparison(
            tuple(ordered), collection, planned, "time" if equal_time else "steps", command
        )

    rounds = [(recipe.seed + i, rival) for i in range(seeds) for rival in rivals]
    for number, (seed, rival) in enumerate(rounds, start=1):
        try:
            warmup = None
            if rival.from_cam:
                if seed in no_cam:
                    failures.append(f"{rival.label}, seed {seed}")
                    continue
                no_cam.add(seed)
                warmup = _shared_cam(recipe, seed, out)
                no_cam.remove(seed)
            console.rule(f"{escape(rival.label)}, seed {seed} ({number} of {planned})")
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
    recipe: Recipe, methods: str | Sequence[str], *, seeds: int = 1, equal_time: bool = False
) -> list[tuple[str, list[PlannedStage], int]]:
    """What ``compare`` would run, and how often: stages with estimates, measured on this machine."""
    collection = collect(recipe.data)
    images = len(collection.split(*recipe.data.train))
    rivals = contestants(recipe, methods, images)
    if equal_time:
        rivals = _in_time(rivals, _step_costs(None, rivals, len(collection.classes)), images)
    shared = [("shared CAM", _of_shared_cam(recipe, recipe.seed), "train")]
    runs = [(r.label, checked(r.recipe), None) for r in rivals]
    return [
        (name, plan(own, collection, [n for n, _ in stages_of(own, collection, until)]), seeds)
        for name, own, until in (shared if any(r.from_cam for r in rivals) else []) + runs
    ]


def contestants(recipe: Recipe, labels: str | Sequence[str], images: int) -> list[Contestant]:
    """The recipes that these methods or variants are run by, for so many training images.

    Raises:
        UserError: An unknown name, a name twice, or settings that a recipe refuses.
    """
    if recipe.seeds.given is not None:
        raise UserError(
            "the scores are given, so that no method would be trained",
            where="seeds.given",
            mend="leave it out of a recipe that compares methods",
        )
    labels = labels.split(",") if isinstance(labels, str) else labels
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
    name = own["method"].get("name", label)
    base = recipe.model_dump(mode="json") | {"compare": {}}
    if _base(name) != _base(recipe.method["name"]):
        base["method"] = {}  # it holds settings of another method
    network = own.get("backbone", {}).get("name", recipe.backbone.name)
    after = recipe.compare.after_cam
    from_cam = after is not None and network == recipe.backbone.name
    with _where(f"compare.methods: {label}"):
        if after is not None:
            both = _after_cam(recipe, after)
        if network != recipe.backbone.name:
            base["segmenter"]["backbone"] = base["segmenter"]["backbone"] or base["backbone"]
            base["backbone"] = {}
        if after is not None and from_cam:
            base = both.model_dump(mode="json") | {"compare": {}, "method": base["method"]}
        settings = _over(base, {**own, "method": {**own["method"], "name": name}})
        if after is not None and not from_cam:  # as many image steps as both trainings have
            trainings = (recipe.train, both.train)
            total = sum(t.total_steps(images) * t.batch for t in trainings)
            if "steps" not in own.get("train", {}):
                settings["train"]["steps"] = max(1, round(total / settings["train"]["batch"]))
        return Contestant(label, load_recipe(settings), from_cam)


def _after_cam(recipe: Recipe, after: Mapping[str, Any]) -> Recipe:
    """The recipe with which methods go on from the shared CAM; the method's section is CAM's."""
    with _where("compare.after_cam"):
        _sections(after, (*_COMMON, "method"))
        base = recipe.model_dump(mode="json") | {"compare": {}, "method": {"name": "cam"}}
        both = load_recipe(_over(base, after))
        if both.backbone.name != recipe.backbone.name:
            raise UserError(
                f"backbone.name: {both.backbone.name} cannot go on from {recipe.backbone.name}",
                mend="leave it out",
            )
        return both


def _sections(settings: Mapping[str, Any], common: Sequence[str]) -> None:
    """Refuses what must be the same for all, and sections that hold no keys."""
    for section, value in settings.items():
        if section in common:
            raise UserError(f"{section} is the same for all", mend="set it in the recipe itself")
        if section != "refine" and not isinstance(value, Mapping):
            raise UserError(
                f"{section} = {value!r} holds no keys", mend=f"write {section}: {{key: value}}"
            )


@contextlib.contextmanager
def _where(section: str) -> Iterator[None]:
    """Errors of a recipe that is put together name the section they come from."""
    try:
        yield
    except UserError as error:
        where = error.where if error.where and error.where.startswith("compare") else section
        raise UserError(error.what, where=where, mend=error.mend) from None


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others; unlike those of a command line, null is a value here."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            if key == "train" and "preset" in value:
                inner = without_preset(inner)  # keys that are written out would win over it
            value = _over(inner, value)
        merged[key] = value
    return merged


def _settings(config: CompareConfig, label: str) -> dict[str, Any]:
    """What the recipe says of a method; ``acr+vit`` without words of its own takes those of ``acr``."""
    base = _base(label)
    own = config.methods.get(label)
    if own is None and base in registered:
        own = dict(config.methods.get(base, {}))
        section = _method_of(own)
        if isinstance(section, Mapping):
            own["method"] = {k: v for k, v in section.items() if k != "name"}
    if own is None:
        names = {*registered, *config.methods}
        raise UserError(
            f"no method or variant {label!r}", where="--methods", mend=suggest(label, names)
        )
    own = {**own, "method": _method_of(own)}
    with _where(f"compare.methods: {label}"):
        _sections(own, _COMMON)
    return own


def _method_of(settings: Mapping[str, Any]) -> Any:
    section = settings.get("method", {})
    return {"name": section} if isinstance(section, str) else section


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
    own, folder = _of_shared_cam(recipe, seed), _folder(out, _SHARED, seed)
    if not RunFolder(folder).recipe_file.is_file():
        console.rule(f"shared CAM, seed {seed}")
    return run_recipe(own, folder, until="train").folder


def _of_shared_cam(recipe: Recipe, seed: int) -> Recipe:
    values = recipe.model_dump(mode="json") | {"seed": seed, "compare": {}, "refine": []}
    if recipe.method["name"] != "cam":
        values["method"] = {"name": "cam"}
    return load_recipe(values)


def _in_time(
    rivals: Sequence[Contestant], costs: Mapping[str, float], images: int
) -> list[Contestant]:
    """With as many steps each as fit into the time that the first one's take it."""
    if len({rival.from_cam for rival in rivals}) > 1:
        alone = next(rival.label for rival in rivals if not rival.from_cam)
        raise UserError(
            f"{alone} has a network of its own and shares no CAM with the others, so that their "
            "times cannot be made equal",
            where="--equal-time",
            mend="compare it apart, or leave --equal-time out",
        )
    steps = rivals[0].recipe.train.total_steps(images)
    return [_with_steps(rival, max(1, round(steps / costs[rival.label]))) for rival in rivals]


def _with_steps(rival: Contestant, steps: int) -> Contestant:
    values = rival.recipe.model_dump(mode="json")
    values["train"]["steps"] = steps
    return replace(rival, recipe=load_recipe(values))


def _step_costs(file: Path | None, rivals: Sequence[Contestant], classes: int) -> dict[str, float]:
    """What a training step costs, relative to the first one's: measured once, and then kept in the
    file, so that a comparison that goes on keeps its numbers of steps."""
    keys = {rival.label: _cost_key(rival.recipe, rivals[0].recipe) for rival in rivals}
    known: Any = {}
    if file is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict):
        known = {}
    missing = {
        keys[r.label]: r.recipe for r in rivals if not isinstance(known.get(keys[r.label]), float)
    }
    if missing:
        first = keys[rivals[0].label]
        seconds = step_seconds({first: rivals[0].recipe, **missing}, classes)
        known |= {key: seconds[key] / seconds[first] for key in missing}
        if file is not None:
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
