"""Stage 8: compare with ground truth, where there is any.

What is computed here never flows back into a run: thresholds found here are *oracle* numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.console import track
from weakseg.csvfile import write_csv
from weakseg.data.images import read_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.errors import UserError
from weakseg.files import write_json
from weakseg.methods import needs_segmenter, resolve
from weakseg.ops import Metrics, ThresholdSweep, confusion_matrix, metrics
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder, Stage
from weakseg.stages.check import truths
from weakseg.stages.localise import RULE, BoxSource, box_source, localise, write_boxes_table
from weakseg.stages.seeds import classification_f1, scores_path

__all__ = ["Judged", "evaluate", "judge_masks", "planned", "read_list", "sweep"]

_WORST = 12


@dataclass(frozen=True)
class Judged:
    """A set of masks compared with ground truth.

    Attributes:
        metrics: Dataset-level numbers.
        images: How many images.
        worst: (id, mean IoU of the classes in the image), the worst first.
    """

    metrics: Metrics
    images: int
    worst: list[tuple[str, float]]


def judge_masks(
    samples: Sequence[Sample], folder: Path, num_classes: int, title: str = "evaluate"
) -> Judged:
    """Compares ``folder/<id>.png`` with the samples' ground truth."""

    def one(sample: Sample) -> np.ndarray:
        prediction, truth = read_mask(folder / f"{sample.id}.png"), sample.truth()
        return _compared(sample, lambda: confusion_matrix(prediction, truth, num_classes))

    total = np.zeros((num_classes + 1, num_classes + 2), dtype=np.int64)
    worst: list[tuple[str, float]] = []
    with ThreadPoolExecutor() as pool:
        for sample, counts in zip(
            samples, track(pool.map(one, samples), title, len(samples)), strict=True
        ):
            total += counts
            worst.append((sample.id, metrics(counts).miou))
    worst.sort(key=lambda pair: (pair[1], pair[0]))
    return Judged(metrics(total), len(samples), worst[:_WORST])


def sweep(
    samples: Sequence[Sample], scores: Path, num_classes: int, thresholds: int = 60
) -> ThresholdSweep:
    """All thresholds on the stored score maps, in one pass over the files."""

    def one(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = read_scores(scores_path(scores, sample.id)).full_size()
        return *seed.best(), sample.truth()

    result = ThresholdSweep(num_classes, thresholds)
    with ThreadPoolExecutor() as pool:
        for sample, parts in zip(
            samples, track(pool.map(one, samples), "sweep", len(samples)), strict=True
        ):
            _compared(sample, partial(result.update, *parts))
    return result


def evaluate(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Evaluates seeds, masks and the segmenter's predictions on every split with ground truth."""
    stage = planned(run, recipe, collection)
    if stage.finished:
        return stage
    boxes = box_source(recipe, collection)
    if boxes is None and all(s.mask is None for s in collection):
        raise UserError(
            "the collection has no ground-truth masks",
            where=collection.name,
            mend="give them with data.masks (--masks FOLDER)",
        )
    with stage.working():
        evaluation = _Evaluation(run, recipe, collection, _present(run, recipe))
        results = evaluation.results()
        write_json(stage.folder / "results.json", results)
        _write_table(stage.folder / "results.csv", results["rows"])
        stage.results |= {"rows": len(results["rows"])}
        if boxes is not None:
            rows = evaluation.localisation(boxes)
            write_json(stage.folder / "boxes.json", {"rows": rows})
            write_boxes_table(stage.folder / "boxes.csv", rows)
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now.

    Raises:
        UserError: A list cannot be read, or holds no image of the collection.
    """
    boxes = box_source(recipe, collection)
    ids = {s.id for s in collection}
    lists = {name: read_list(path) for name, path in recipe.evaluate.lists.items()}
    for name, listed in lists.items():
        if ids.isdisjoint(listed):
            raise UserError(
                f"no id of the list {name!r} is in the collection, such as "
                f"{min(listed, default='')!r}",
                where=recipe.evaluate.lists[name],
                mend="list ids as paths relative to the image folder, without suffix",
            )
    inputs = {
        "stages": _present(run, recipe),
        "evaluate": recipe.evaluate.model_dump(mode="json", exclude={"boxes", "lists"}),
        "splits": [recipe.data.train, recipe.data.val],
        "lists": lists,
        "masks": truths(collection),
    }
    if boxes is not None:
        inputs["boxes"] = [boxes.words, boxes.fingerprint]
    return run.stage("evaluate", inputs, seed=recipe.seed)


def _present(run: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Outcomes of the stages that there is something to compare of."""
    wanted = ["seeds", "masks"]
    wanted += ["refine"] if recipe.refine else []
    wanted += ["predict"] if recipe.segmenter.enabled is not False else []
    found = {}
    for name in wanted:
        record = run.record(name)
        if name in run.expected or (record is not None and record.status == "done"):
            found[name] = str(run.outcome(name))
    return found


def read_list(path: Path) -> list[str]:
    """Ids of a list file, one in each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the list cannot be read ({error})",
            where=path,
            mend="give a text file with one image id in each line",
        ) from None


class _Evaluation:
    """Everything of one run that can be compared with ground truth."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, collection: Collection, present: dict[str, str]
    ) -> None:
        self.run, self.recipe, self.collection, self.present = run, recipe, collection, present
        self.classes = len(collection.classes)
        self._segmenter = needs_segmenter(recipe.method, recipe.segmenter_wanted)
        self.rows: list[dict[str, Any]] = []
        self.worst: dict[str, list[tuple[str, float]]] = {}
        self.sweep: dict[str, Any] | None = None

    def results(self) -> dict[str, Any]:
        train, val = self.recipe.data.train, self.recipe.data.val
        for name, samples in self._lists(train).items():
            for stage, folder in self._score_folders().items():
                self._judge_scores(stage, name, samples, folder)
            if "masks" in self.present:  # as they were made; corrected ones are training data
                self._judge("mask", name, samples, self.run.stage_folder("masks") / "masks")
        if "predict" in self.present:
            for name, samples in self._lists((*train, *val)).items():
                self._judge("segmenter", name, samples, self.run.stage_folder("predict") / "masks")
        return {"rows": self.rows, "sweep": self.sweep, "worst": self.worst}

    def localisation(self, source: BoxSource) -> list[dict[str, Any]]:
        """One row for each kind of scores and each list, with what it was measured under."""
        rows = []
        made_by, seeds = self.recipe.seeds, self.run.record("seeds")
        given = made_by.given is not None
        for name, samples in self._lists(self.recipe.data.train, source.known).items():
            for stage, folder in self._score_folders().items():
                title = f"boxes {stage} {name}"
                found = localise(samples, folder, source, self.recipe.evaluate.thresholds, title)
                if found is None:
                    continue
                conditions = {
                    "stage": stage,
                    "split": name,
                    "head": seeds.results.get("head") if seeds is not None else None,
                    "scales": [] if given else list(made_by.scales),
                    "flip": made_by.flip and not given,
                    "crf": self._crf(stage),
                    "tags": "given",
                    "max_box_acc_rule": "oracle: the best threshold of each IoU",
                    "rule": f"largest component above {RULE:g} of the maximum",
                }
                rows.append(conditions | found)
        return rows

    def _lists(
        self, splits: Iterable[str], has_truth: Callable[[Sample], bool] | None = None
    ) -> dict[str, list[Sample]]:
        """Samples with ground truth by split, and by the recipe's lists inside those splits."""
        has_truth = has_truth or (lambda s: s.mask is not None)
        known = [s for s in self.collection.split(*splits) if has_truth(s)]
        lists = {split: [s for s in known if s.split == split] for split in splits}
        for name, path in self.recipe.evaluate.lists.items():
            ids = set(read_list(path))
            lists[name] = [s for s in known if s.id in ids]
        return {name: samples for name, samples in lists.items() if samples}

    def _score_folders(self) -> dict[str, Path]:
        """Score files of the network, and after each step of refinement."""
        if "seeds" not in self.present:
            return {}
        folders, steps = {"seed": self.run.scores_folder()}, self.recipe.steps
        for i in range(len(steps) if "refine" in self.present else 0):
            name = "refined: " + " + ".join(steps[: i + 1])
            folders[name] = self.run.scores_folder(steps, i)
        return folders

    def _judge_scores(self, stage: str, name: str, samples: list[Sample], scores: Path) -> None:
        """The sweep, and the masks' threshold on the scores that the masks were made from."""
        f1 = classification_f1(self.collection.only(s.id for s in samples), scores)
        swept = sweep(samples, scores, self.classes, self.recipe.evaluate.thresholds)
        results = [metrics(m) for m in swept.confusions()]
        oracle, best = swept.best()
        self._row(stage, name, len(samples), best, "oracle", oracle, f1)
        last = scores == self.run.scores_folder(self.recipe.steps)
        masks = self.run.record("masks")
        by_threshold = masks is not None and masks.results.get("rule") != "map"
        if last and "masks" in self.present and by_threshold:
            rule, threshold = self._rule()
            nearest = int(np.abs(swept.thresholds - threshold).argmin())
            at = float(swept.thresholds[nearest])
            self._row(stage, name, len(samples), results[nearest], rule, at, f1)
        if last and self.sweep is None:
            self.sweep = {
                "split": name,
                "thresholds": swept.thresholds.tolist(),
                "miou": [r.miou for r in results],
                "fp": [r.fp for r in results],
                "fn": [r.fn for r in results],
            }

    def _judge(self, stage: str, name: str, samples: list[Sample], folder: Path) -> None:
        judged = judge_masks(samples, folder, self.classes, f"{stage} {name}")
        own = stage == "segmenter" and not self._segmenter
        rule = ("map", float("nan")) if own else self._rule()
        self._row(stage, name, judged.images, judged.metrics, *rule)
        self.worst.setdefault(stage, judged.worst)

    def _rule(self) -> tuple[str, float]:
        """Kind and threshold of the rule that made the masks."""
        record = self.run.record("masks")
        results = record.results if record is not None else {}
        if results.get("rule") == "map":
            results = self._rule_of_background() or results
        rule, threshold = results.get("rule", "constant"), results.get("threshold")
        kind = rule if rule in ("label-free", "map") else "fixed"
        return kind, float("nan") if threshold is None else float(threshold)

    def _rule_of_background(self) -> dict[str, Any] | None:
        """Results of the step of refinement that made the background map, where one did."""
        refined = self.run.record("refine") if self.recipe.refine else None
        for results in reversed(list(refined.results.values()) if refined else []):
            if results.get("rule") not in (None, "map"):
                return dict(results)
        return None

    def _steps(self, stage: str) -> list[str]:
        """Names of the steps of refinement that a row's scores or masks went through."""
        if stage == "mask":
            return list(self.recipe.steps)
        return stage.partition(": ")[2].split(" + ")

    def _crf(self, stage: str) -> str:
        if stage == "segmenter":
            return self.recipe.predict.crf or "none"
        return "yes" if "crf" in self._steps(stage) else "none"

    def _row(
        self,
        stage: str,
        name: str,
        images: int,
        found: Metrics,
        rule: str,
        threshold: float,
        f1: float | None = None,
    ) -> None:
        """Adds a row that says everything a number must be reported with."""
        segmenter = stage == "segmenter"
        made_by = self.recipe.predict if segmenter else self.recipe.seeds
        seeds = self.run.record("seeds")
        method = resolve(self.recipe.method)[0]
        scales, flip = list(made_by.scales), made_by.flip
        head: str | None = "segmenter" if self._segmenter else method.heads[0]
        if not segmenter and seeds is not None:
            head = seeds.results.get("head")
        if not segmenter and self.recipe.seeds.given is not None:
            scales, flip = [], False  # whoever made the scores knows
        self.rows.append(
            {
                "stage": stage,
                "split": name,
                "images": images,
                "head": head,
                "scales": scales,
                "flip": flip,
                "crf": self._crf(stage),
                "tags": "given" if not segmenter else "none" if self._segmenter else "predicted",
                "rule": rule,
                "threshold": threshold,
                "miou": found.miou,
                "fp": found.fp,
                "fn": found.fn,
                "precision": found.precision,
                "recall": found.recall,
                "f1": f1,
                "iou": _plain(found.iou),
                "class_fp": _plain(found.class_fp),
                "class_fn": _plain(found.class_fn),
            }
        )


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def _compared(sample: Sample, compare: Callable[[], Any]) -> Any:
    try:
        return compare()
    except (ValueError, IndexError) as error:
        raise UserError(
            f"cannot be compared with its ground truth: {error}",
            where=sample.id,
            mend="run `weakseg check`: it lists masks that do not fit",
        ) from None


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = (
        [key for key, value in rows[0].items() if not isinstance(value, list) or key == "scales"]
        if rows
        else []
    )
    scales = (row | {"scales": " ".join(f"{s:g}" for s in row["scales"])} for row in rows)
    write_csv(path, columns, scales)
