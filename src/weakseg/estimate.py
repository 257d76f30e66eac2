"""What a run will do, and about how long it will take, measured on the real network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weakseg.console import track
from weakseg.data.loading import MaskBatch
from weakseg.data.samples import Collection
from weakseg.methods import Batch, Trainable, build
from weakseg.mixing import build_mix
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import InferenceConfig, Recipe
from weakseg.stages.batches import pick_device
from weakseg.training.config import TrainConfig
from weakseg.training.module import only
from weakseg.training.segmenter import Segmenter

__all__ = ["PlannedStage", "plan", "step_seconds"]

_ASSUMED_SIDE = 400  # of an image that has no max_side; only the estimate depends on it


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run to come: ``what`` in words, and ``seconds`` where they could be measured."""

    name: str
    what: str
    seconds: float | None


def plan(recipe: Recipe, collection: Collection, names: list[str]) -> list[PlannedStage]:
    """The stages with their sizes and an estimate of their time.

    One forward and backward pass of each network is timed on this machine, with random weights:
    nothing is fetched or written.
    """
    device = pick_device(recipe.runtime.accelerator)
    train = collection.split(*recipe.data.train)
    classes = len(collection.classes)
    given = recipe.seeds.given is not None
    method = build(recipe.method, backbone_factory(_empty(recipe.backbone)), classes).to(device)
    model: Trainable
    stages = []
    for name in names:
        what, seconds = f"{len(collection)} images", None
        if name == "train" and recipe.method.get("from_classifier"):
            file = Path(recipe.method["from_classifier"]).name
            what = f"{file} as it is ({recipe.backbone.name}): nothing is trained"
        elif name == "train":
            what, seconds = _training(
                recipe.train,
                len(train),
                f"{recipe.method['name']} on {recipe.backbone.name}",
                method,
                classes,
                device,
            )
        elif name == "segment":
            spec = recipe.segmenter_backbone
            network = _segmenter(recipe, classes).to(device)
            what, seconds = _training(
                recipe.segmenter.train,
                len(train),
                f"DeepLabV3+ {spec.name}",
                network,
                classes,
                device,
            )
        elif name == "seeds" and given:
            what = f"{len(train)} images, given scores"
        elif name == "seeds":
            what, seconds = _inference(recipe.seeds, len(train), method, device)
        elif name == "predict":
            model = _segmenter(recipe, classes).to(device) if "segment" in names else method
            what, seconds = _inference(recipe.predict, len(collection), model, device)
        elif name == "refine":
            what = f"{len(train)} images, {' + '.join(recipe.steps)}"
        elif name == "masks":
            own = method.segments and recipe.seeds.head in (None, method.heads[0]) and not given
            rule = "by the method's own background" if own else f"rule {recipe.masks.rule}"
            what = f"{len(train)} masks, {rule}"
        elif name == "evaluate":
            what = f"{sum(s.mask is not None for s in collection)} images with ground truth"
        stages.append(PlannedStage(name, what, seconds))
    return stages


def step_seconds(recipes: Mapping[str, Recipe], classes: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of a training step of each recipe's method: the median of ``rounds``.

    They are measured in turns, on a CPU by the processor's time, so that what else the machine
    does matters little: what to trust are their ratios.
    """
    steps: dict[str, tuple[Callable[[], None], torch.device]] = {}
    for name, recipe in recipes.items():
        device = pick_device(recipe.runtime.accelerator)
        factory = backbone_factory(_empty(recipe.backbone))
        model = build(recipe.method, factory, classes).to(device)
        steps[name] = (_step(recipe.train, model, classes, device), device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in track(range(rounds + 1), "step costs"):
        for name, (step, device) in steps.items():
            found = _once(
                step, device, time.process_time if device.type == "cpu" else time.perf_counter
            )
            if i:  # the first one warms up
                seconds[name].append(found * recipes[name].train.accumulate)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _empty(spec: BackboneSpec) -> BackboneSpec:
    return spec.model_copy(update={"pretrained": False, "weights": None})


def _segmenter(recipe: Recipe, classes: int) -> Segmenter:
    config = recipe.segmenter
    backbone = make_backbone(_empty(recipe.segmenter_backbone))
    network = DeepLabV3Plus(backbone, classes + 1, config.channels, config.dilations)
    mix = None if config.mix is None else build_mix(config.mix, classes)
    return Segmenter(network, mix, classify=config.classify)


def _training(
    config: TrainConfig,
    images: int,
    network: str,
    model: Trainable,
    classes: int,
    device: torch.device,
) -> tuple[str, float]:
    steps = config.total_steps(images)
    return (
        f"{network}, {steps} steps of {config.batch} images at {config.crop} px",
        steps * config.accumulate * _time(_step(config, model, classes, device), device),
    )


def _step(
    config: TrainConfig, model: Trainable, classes: int, device: torch.device
) -> Callable[[], None]:
    """Forward and backward pass of one part of a batch, with every term active."""
    part = max(2, config.batch // config.accumulate)
    x = torch.rand(part, 3, config.crop, config.crop, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    ids = [""] * part
    batch: Any
    if isinstance(model, Segmenter):
        batch = MaskBatch(
            x, torch.zeros(part, config.crop, config.crop, dtype=torch.int64, device=device), ids
        )
    else:
        tags = torch.zeros(part, classes, device=device)
        tags[:, :2] = 1  # the operators of some methods cost by the number of tagged classes
        batch = Batch(x, tags, ids)

    def step() -> None:
        for phase in model.phases().values():
            with only(model, phase):
                terms = phase.losses(batch, 0.99)
                if terms:
                    torch.stack(list(terms.values())).sum().backward()

    model.train().to(memory_format=torch.channels_last)  # as training has it
    return step


def _inference(
    config: InferenceConfig, images: int, model: Trainable, device: torch.device
) -> tuple[str, float]:
    side = min(config.max_side or _ASSUMED_SIDE, _ASSUMED_SIDE)
    count = 2 if config.flip else 1
    seconds = 0.0
    model.eval()
    for scale in config.scales:
        x = torch.zeros(
            count,
            3,
            max(32, round(side * scale)),
            max(32, round(0.75 * side * scale)),
            device=device,
        )
        with torch.inference_mode():
            seconds += _time(partial(model, x), device)
    flip = " + flip" if config.flip else ""
    return (
        f"{images} images at scales {' '.join(f'{s:g}' for s in config.scales)}{flip}",
        images * seconds,
    )


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call: the first one warms up."""
    seconds = 0.0
    for _ in range(2):
        seconds = _once(work, device)
    return seconds


def _once(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start
