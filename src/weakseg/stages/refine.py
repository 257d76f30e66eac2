"""Stage 4: steps that improve the score maps, in the order of the recipe's ``refine``.

Each step reads the scores of the one before it and leaves a folder of its own, so that it can be
looked at, evaluated, and kept when only a later step changes. A step says what it needs beyond
image and scores; the stage provides it. To add one, register a class here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from weakseg.config import Count, Frozen, Pixels, validate
from weakseg.console import Bar
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.export.model import load
from weakseg.files import remove
from weakseg.inference import Predictor, evaluating
from weakseg.methods import Method
from weakseg.networks.affinity import STRIDES
from weakseg.ops import (
    Cells,
    dense_crf,
    dense_crf_from_labels,
    normalise_max,
    pamr,
    random_walk,
    random_walk_from_features,
    self_correlation,
)
from weakseg.recipe import MasksConfig, Recipe
from weakseg.registry import Registry
from weakseg.runfolder import RunFolder, Stage
from weakseg.stagefiles import changed_by_hand
from weakseg.stages.affinity import (
    AffinityConfig,
    network_folder,
    network_stage,
    read_affinity,
    train_affinity,
)
from weakseg.stages.affinity import prepare as prepare_affinity
from weakseg.stages.batches import ahead, pick_device
from weakseg.stages.masks import choose_rule, rule_settings
from weakseg.stages.seeds import scores_path
from weakseg.stages.train import PACE, backbone_inputs

__all__ = ["Given", "Step", "check_settings", "refine", "resolve_steps", "steps"]

_USUAL_SIDE = 500  # longer side of the images that the published number of steps was made for


@dataclass(frozen=True)
class Given:
    """What a step has of one image.

    Attributes:
        image: (1, 3, H, W) uint8, reduced to the step's ``max_side``.
        seed: Its scores, at whatever size the step before left them.
        threshold: The masks' threshold on those scores; 0 where the step does not need it.
        features: Levels of the trained classifier, each (1, C, h, w), where the step needs them.
        cells: Where the cells of ``features`` lie in the image.
        affinity: Boundary probabilities (1, 1, h, w) or features (1, D, h, w), likewise.
    """

    image: Tensor
    seed: ScoreFile
    threshold: float = 0.0
    features: tuple[Tensor, ...] = ()
    cells: tuple[Cells, ...] = ()
    affinity: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image at hand."""
        return (self.image.shape[-2], self.image.shape[-1])

    def maps(self, size: tuple[int, int] | None = None) -> Tensor:
        """(1, n, h, w) foreground scores, resized where a size is given."""
        seed = self.seed if size is None else self.seed.resized(size)
        return torch.from_numpy(seed.foreground()[1])[None].to(self.image.device)

    def result(self, maps: Tensor) -> ScoreFile:
        """The score file with other foreground maps (1, n, h, w), and no background map."""
        return self.seed.with_maps(self.seed.foreground()[0], _numpy(maps))


class Step:
    """A step of ``refine``.

    Attributes:
        idea: One line.
        needs: Of ``threshold``, ``features`` (of the classifier), ``affinity`` (a network trained
            for it).
    """

    idea: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    class Config(Frozen):
        """Settings of the step."""

        max_side: Pixels | None = Field(
            None, description="reduce larger images to this longer side; null = as seeds.max_side"
        )

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, given: Given) -> ScoreFile:
        """The improved scores of one image that has at least one foreground map."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__()")


steps: Registry[type[Step]] = Registry("step of refine")
"""All steps by name."""


@steps.register("pamr")
class PAMRStep(Step):
    """Pixel-adaptive mask refinement: scores are averaged over pixels of like colour."""

    idea = "averages scores over neighbours of like colour, so that they end where the image does"

    class Config(Step.Config):
        """Settings of PAMR."""

        dilations: tuple[Count, ...] = Field(
            (1, 2, 4, 8, 12, 24), min_length=1, description="distances of the neighbours, in pixels"
        )
        iterations: Count = Field(10, description="how often scores are averaged")
        variant: Literal["pamr", "par"] = Field(
            "pamr", description="whose weights of neighbours: PAMR's, or PAR's (AFA)"
        )

    def __call__(self, given: Given) -> ScoreFile:
        """Refines the background map too, where there is one."""
        c = self.config
        maps = torch.from_numpy(given.seed.scores)[None].to(given.image.device)
        refined = pamr(
            given.image.float() / 255, maps, c.dilations, c.iterations, variant=c.variant
        )
        return given.seed.with_maps(given.seed.classes, _numpy(refined))


@steps.register("scg")
class SCGStep(Step):
    """Self-correlation map generation: places whose features are like the sure ones light up."""

    idea = "lights up places whose features resemble the certain foreground, and not the background"
    needs = frozenset({"features"})

    class Config(Step.Config):
        """Settings of SCG."""

        stride: Count = Field(8, description="pixels in one cell of the correlation maps")
        levels: Count | None = Field(
            2, description="how many of the deepest levels; null = all, as published"
        )
        first_threshold: float | None = Field(
            None,
            ge=0,
            lt=1,
            description="least likeness of two cells that counts; null = .5 (code), none (talk)",
        )
        second_threshold: float | None = Field(
            None,
            ge=0,
            description="the same over a cell in between, as a multiple of 1 / cells; null = .1 "
            "(code), none (talk)",
        )
        foreground: float = Field(0.3, gt=0, le=1, description="least score of a sure cell")
        background: float = Field(
            0.05, ge=0, lt=1, description="greatest score of a cell that is surely not of the class"
        )
        form: Literal["code", "talk"] = Field(
            "code",
            description="RecurSeed's first program, or the equations of its talk; the talk's maps "
            "are divided by their maxima",
        )

        @model_validator(mode="after")
        def _thresholds_of_the_form(self) -> Any:
            if self.form == "talk" and (self.first_threshold or self.second_threshold):
                raise ValueError(
                    "form talk has no thresholds: leave first_threshold and second_threshold out, "
                    "or set form: code"
                )
            return self

    def __call__(self, given: Given) -> ScoreFile:
        """Correlates at the step's stride."""
        c = self.config
        height, width = given.size
        grid = (-(-height // c.stride), -(-width // c.stride))
        own = Cells.spanning(given.size, grid)
        maps = self_correlation(
            given.maps(grid),
            list(given.features),
            c.first_threshold,
            c.second_threshold,
            c.foreground,
            c.background,
            form=c.form,
            places=[own, *given.cells] if given.cells else None,
        )
        # The talk's M is the lead of two means, far below 1.
        return given.result(normalise_max(maps) if c.form == "talk" else maps)


@steps.register("affinity")
class AffinityStep(Step):
    """Random walk on affinities that a network learnt from the sure pixels of all images."""

    idea = "walks the scores along what a network learnt to belong together (IRNet, AffinityNet)"
    needs = frozenset({"threshold", "affinity"})

    class Config(AffinityConfig, Step.Config):
        """Settings of the learned walk."""

        max_side: Pixels | None = Field(
            512, description="reduce larger images to this longer side; null = as seeds.max_side"
        )

    def __call__(self, given: Given) -> ScoreFile:
        """Walks on the grid of the affinity network; divided by the maximum over classes.

        With ``place: crop``, as published, psa's scores are averages over the pixels of a cell, and
        walked maps are enlarged by whole factors and cut to the image.
        """
        c, affinity = self.config, given.affinity
        assert affinity is not None
        grid = (affinity.shape[-2], affinity.shape[-1])
        maps = self._on_cells(given, grid)
        # A walk of n steps reaches sqrt(n) cells, so the same share of an image of any size.
        steps = c.steps or max(1, round(256 * (max(given.size) / _USUAL_SIDE) ** 2))
        if c.kind == "irn":
            walked = random_walk(maps, affinity, c.radius, c.beta or 10, steps)
        else:
            walked = random_walk_from_features(maps, affinity, c.radius, c.beta or 8, steps)
        if c.place == "crop":
            walked = F.interpolate(walked, scale_factor=STRIDES[c.kind], mode="bilinear")
            walked = walked[..., : given.size[0], : given.size[1]]
        walked = walked / walked.amax().clamp(min=1e-5)
        ids = given.seed.foreground()[0]
        if c.alpha is not None:
            ids = np.concatenate([[0], ids]).astype(np.int16)
        return given.seed.with_maps(ids, _numpy(walked))

    def _on_cells(self, given: Given, grid: tuple[int, int]) -> Tensor:
        """Scores (1, n, h, w) on the grid, a background map first where there is an alpha."""
        c = self.config
        pooled = c.place == "crop" and c.kind == "psa"
        maps = given.maps(given.size if pooled else grid)
        if c.alpha is not None:
            maps = torch.cat([(1 - maps.amax(1, keepdim=True)) ** c.alpha, maps], 1)
        if not pooled:
            return maps
        stride = STRIDES[c.kind]
        (height, width), (rows, columns) = given.size, grid
        filled = F.pad(maps, (0, stride * columns - width, 0, stride * rows - height))
        return F.avg_pool2d(filled, stride)


@steps.register("crf")
class CRFStep(Step):
    """Dense CRF: the labelling that costs least, given scores and the image's colours."""

    idea = "weighs scores against the colours of all pixels of the image at once (dense CRF)"
    needs = frozenset({"threshold"})

    class Config(Step.Config):
        """Settings of the dense CRF."""

        max_side: Pixels | None = Field(
            1024, description="reduce larger images to this longer side; null = as seeds.max_side"
        )
        preset: Literal["soft", "label", "deeplab"] = Field(
            "label", description="published widths and strengths"
        )
        unary: Literal["soft", "label"] = Field(
            "label", description="scores with the threshold as background, or their labels"
        )
        gt_prob: PositiveFloat = Field(0.7, lt=1, description="label: how sure the labels are")
        iterations: Count = Field(10, description="of the inference by mean fields")

    def __call__(self, given: Given) -> ScoreFile:
        """Probabilities, with a background map of their own."""
        c, maps = self.config, given.maps(given.size)
        background = given.seed.resized(given.size).background()
        if background is None:
            limit = torch.full_like(maps[:, :1], given.threshold)
        else:
            limit = torch.from_numpy(background)[None, None].to(maps.device)
        both = torch.cat([limit, maps], 1)
        if c.unary == "soft":
            both = both / both.sum(1, keepdim=True).clamp(min=1e-8)
            refined = dense_crf(given.image, both, c.iterations, preset=c.preset)
        else:
            refined = dense_crf_from_labels(
                given.image,
                both.argmax(1),
                both.shape[1],
                c.gt_prob,
                c.iterations,
                preset=c.preset,
            )
        ids = np.concatenate([[0], given.seed.foreground()[0]]).astype(np.int16)
        return given.seed.with_maps(ids, _numpy(refined))


def resolve_steps(sections: Iterable[Mapping[str, Any]]) -> list[Step]:
    """The steps that a recipe's ``refine`` names.

    Raises:
        UserError: An unknown step, every wrong setting of one, or two trained walks.
    """
    resolved, names = [], [section["name"] for section in sections]
    for section in sections:
        step = steps[section["name"]]
        settings = {key: value for key, value in section.items() if key != "name"}
        where = f"refine: {section['name']}"
        resolved.append(step(validate(step.Config, settings, where=where, prefix="refine")))
    if names.count("affinity") > 1:
        raise UserError(
            "has two affinity steps", where="refine", mend="keep one: it trains one network"
        )
    return resolved


def check_settings(recipe: Recipe) -> None:
    """Refuses before any work what would fail behind it.

    Raises:
        UserError: Wrong settings of a step, or a step that needs a classifier where scores are
            given and none is trained.
    """
    for step in resolve_steps(recipe.refine):
        if recipe.seeds.given is None:
            continue
        if "features" in step.needs:
            raise UserError(
                "the step scg needs the features of a trained classifier, but the scores are given",
                where="refine",
                mend="leave scg out (pamr and crf need no network), or train a method: "
                "--set seeds.given=null",
            )
        if "affinity" in step.needs and step.config.from_classifier:
            raise UserError(
                "the step affinity starts from a trained classifier, but the scores are given",
                where="refine: affinity.from_classifier",
                mend="let it start from its backbone's own weights: "
                "--set 'refine=[{affinity: {from_classifier: false}}]'",
            )


def refine(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """Runs the steps that are not done yet on the scores of all training images."""
    stage, images = planned(run, recipe, collection), collection.split(*recipe.data.train)
    if stage.finished:
        return stage
    before, scores = run.outcome("seeds"), run.require("seeds") / "scores"
    with stage.working():
        for i, step in enumerate(resolve_steps(recipe.refine)):
            finished = run.scores_folder(recipe.steps, i).parent
            folder = stage.folder / finished.name
            work = _Work(run, recipe, images, folder, scores, step, before)
            work.stage.take_over(finished)
            work.run()
            before, scores = work.stage.record.fingerprint, folder / "scores"
            stage.results[folder.name] = work.stage.results
        _remove_other_steps(run, recipe, stage.folder)
    return stage


def planned(run: RunFolder, recipe: Recipe, collection: Collection) -> Stage:
    """The stage as it would be run now."""
    images, chain = collection.split(*recipe.data.train), resolve_steps(recipe.refine)
    inputs = {
        "seeds": run.outcome("seeds"),
        "steps": [
            {"name": section["name"]} | step.config.model_dump(mode="json", exclude={"train": PACE})
            for section, step in zip(recipe.refine, chain, strict=True)
        ],
        "masks": rule_settings(_masks_rule(recipe)) if _needs("threshold", chain) else None,
        "max_side": recipe.seeds.max_side,
        "train": run.outcome("train") if _needs_classifier(recipe, chain) else None,
        "backbone": backbone_inputs(run, run.stage_folder("refine"), recipe.backbone)
        if _needs("affinity", chain)
        else None,
        "seed": recipe.seed,
        "images": images.fingerprint(),
    }
    return run.stage("refine", inputs, seed=recipe.seed, of_parts=True)


def prepare(run: RunFolder, recipe: Recipe, collection: Collection) -> None:
    """Builds the affinity network, where a step needs it.

    Raises:
        UserError: It cannot be built.
    """
    if "affinity" in recipe.steps:
        prepare_affinity(run, recipe)


def _masks_rule(recipe: Recipe) -> MasksConfig:
    """The rule of the steps that need a threshold.

    Their settings (such as the shares that make a pixel sure) were chosen with the split of least
    cross-entropy, which lies lower than what is best for masks.
    """
    own = recipe.masks.criterion
    kept = "cross-entropy" if own == "auto" else own
    return recipe.masks.model_copy(update={"criterion": kept})


class _Work:
    """One step on all images."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        images: Collection,
        folder: Path,
        scores: Path,
        step: Step,
        before: str | None,
    ) -> None:
        self.run_folder, self.recipe, self.images = run, recipe, images
        self.scores, self.step = scores, step
        self.name = folder.name.partition("-")[2]
        self.rule: str | None = None
        self.threshold = 0.0  # of scores with a background map of their own
        if "threshold" in step.needs:
            rule = choose_rule(_masks_rule(recipe), scores, images)
            self.rule, self.threshold = rule.rule, rule.threshold or 0.0
        inputs: dict[str, Any] = {
            "scores": before,
            "settings": step.config.model_dump(mode="json"),
            "max_side": self._max_side,
            "threshold": self.threshold,
            "images": images.fingerprint(),
        }
        if "features" in step.needs:
            inputs["train"] = run.outcome("train")
        if "affinity" in step.needs:
            self.network = network_stage(
                run, folder.parent, recipe, images, step.config, self.threshold, before
            )
            inputs["network"] = self.network.record.fingerprint
            walk = {"max_side", "place", "flip", "radius", "beta", "steps", "alpha"}
            inputs["settings"] = step.config.model_dump(mode="json", include=walk)
        self.stage = Stage(folder, self.name, inputs, recipe.seed)

    @property
    def _max_side(self) -> int | None:
        own = self.step.config.max_side
        return self.recipe.seeds.max_side if own is None else own

    def run(self) -> None:
        """Does what is not done yet."""
        if self.stage.finished:
            return
        device = pick_device(self.recipe.runtime.accelerator)
        with self.stage.working():
            provide = self._provider(device)
            todo = [s for s in self.images if not self._path(s).exists()]
            done = len(self.images) - len(todo)
            with Bar(self.name, len(self.images), done) as bar:
                for sample, (image, seed) in ahead(self._read, todo):
                    if len(seed.foreground()[0]):
                        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
                        seed = self.step(provide(Given(pixels, seed, self.threshold)))
                    write_scores(self._path(sample), seed, dtype=self.recipe.seeds.dtype)
                    bar.step()
            self.stage.results |= {"images": len(self.images)}
            if self.rule is not None:
                self.stage.results |= {"rule": self.rule, "threshold": round(self.threshold, 4)}

    def _read(self, sample: Sample) -> tuple[np.ndarray, ScoreFile]:
        return (
            sample.pixels(self._max_side),
            read_scores(scores_path(self.scores, sample.id)),
        )

    def _path(self, sample: Sample) -> Path:
        return scores_path(self.stage.folder / "scores", sample.id)

    def _provider(self, device: torch.device) -> Callable[[Given], Given]:
        """What adds to each image's ``Given`` that which the step needs."""
        if "features" in self.step.needs:
            return _features(load(self.run_folder.require("train")).to(device), self.step.config)
        if "affinity" in self.step.needs:
            config = self.step.config
            network = train_affinity(
                self.run_folder,
                self.network,
                self.recipe,
                self.images,
                self.scores,
                config,
                self.threshold,
            ).to(device)
            return lambda given: replace(
                given, affinity=read_affinity(network, given.image, config)
            )
        return lambda given: given


def _features(predictor: Predictor, config: SCGStep.Config) -> Callable[[Given], Given]:
    model = predictor.model
    assert isinstance(model, Method)

    def provide(given: Given) -> Given:
        with evaluating(model):
            levels = model.features(predictor.normalise(given.image))
        first = 0 if config.levels is None else max(0, len(levels) - config.levels)
        cells = model.backbone.cells(given.size)[first:]
        return replace(given, features=tuple(x.clone() for x in levels[first:]), cells=cells)

    return provide


def _numpy(maps: Tensor) -> np.ndarray:
    return maps[0].clamp(0, 1).cpu().numpy()


def _needs(need: str, chain: Iterable[Step]) -> bool:
    return any(need in step.needs for step in chain)


def _needs_classifier(recipe: Recipe, chain: Iterable[Step]) -> bool:
    chain = list(chain)
    trained = recipe.seeds.given is None
    return trained and (_needs("features", chain) or _needs("affinity", chain))


def _remove_other_steps(run: RunFolder, recipe: Recipe, folder: Path) -> None:
    """Folders of steps that the recipe no longer has, where the stage's are made."""
    own = {run.scores_folder(recipe.steps, i).parent.name for i in range(len(recipe.steps))}
    if "affinity" in recipe.steps:
        own.add(network_folder(run).name)
    for step in list(folder.iterdir()):
        if step.is_dir() and step.name not in own and not changed_by_hand(step):
            remove(step)
