"""The recipe: one typed, strict configuration for a whole run; YAML in and out.

Nothing here imports torch. The ``method`` section is kept as written and validated by the
method's own ``Config`` (``weakseg.methods.resolve``), before any data is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from weakseg.config import Channels, Count, Frozen, Images, Pixels, Scale, Scales, validate
from weakseg.errors import UserError
from weakseg.networks.spec import BackboneSpec
from weakseg.registry import suggest
from weakseg.training.config import PAPERS, PRESETS, TrainConfig, without_preset

__all__ = [
    "CompareConfig",
    "DataConfig",
    "EvaluateConfig",
    "InferenceConfig",
    "MasksConfig",
    "PredictConfig",
    "ReadBands",
    "ReadDepth",
    "Recipe",
    "RuntimeConfig",
    "SeedsConfig",
    "SegmenterConfig",
    "SegmenterTrainConfig",
    "commented_yaml",
    "data_values",
    "load_recipe",
    "shipped_recipes",
]


def _rising(depth: Any) -> Any:
    if isinstance(depth, tuple) and not depth[0] < depth[1]:
        raise ValueError("give bits, or [low, high] with low below high")
    return depth


def _three_or_one(bands: Any) -> Any:
    if isinstance(bands, tuple) and len(bands) not in (1, 3):
        raise ValueError("give three bands for red, green and blue, one for gray, or alpha")
    return bands


ReadDepth = Annotated[
    Annotated[int, Field(ge=8, le=32)] | tuple[float, float] | None, AfterValidator(_rising)
]
"""As ``depth`` of :class:`weakseg.data.depth.Reading`."""

ReadBands = Annotated[
    tuple[PositiveInt, ...] | Literal["alpha"] | None, AfterValidator(_three_or_one)
]
"""As ``bands`` of :class:`weakseg.data.depth.Reading`."""


class DataConfig(Frozen):
    """Where images, tags and (for evaluation only) masks come from."""

    source: str = Field("folder", description="folder, voc, coco or shapes")
    root: Path | None = Field(None, description="folder of images, VOC devkit, or cache of shapes")
    labels: str | None = Field(
        None, description="table of tags; voc: xml, masks, a table or an .npy file; coco: a JSON"
    )
    masks: Path | None = Field(
        None, description="ground-truth masks, for evaluation only; coco: the word coco draws them"
    )
    masks_are: Literal["ids", "binary"] = Field(
        "ids",
        description="what pixels of these masks hold; binary = one object in white on black: the "
        "image's class",
    )
    classes: tuple[str, ...] | Path | None = Field(
        None, description="class names in mask order, or a file with one per line"
    )
    untagged: Literal["drop", "negative"] | None = Field(
        None, description="what to do with images that have no tags"
    )
    train: tuple[str, ...] = Field(
        ("train",), description="splits whose images and tags are trained on"
    )
    val: tuple[str, ...] = Field(
        ("val",), description="splits that are predicted and evaluated, never trained on"
    )
    depth: ReadDepth = Field(
        None,
        description="range of images of more than 8 bits: bits (12 = 0 to 4095) or [low, high]; "
        "null = found in the images",
    )
    bands: ReadBands = Field(
        None,
        description="bands to read as RGB, or one as gray, counted from 1; alpha = the last one of "
        "2 or 4 is transparency; null = decided by the images",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="settings of the source itself"
    )


class InferenceConfig(Frozen):
    """How one image becomes maps: scales and flips are averaged."""

    scales: Scales = Field((1.0,), description="factors on the image's size")
    flip: bool = Field(False, description="add the mirrored image")
    max_side: Pixels | None = Field(
        1024, description="reduce larger images to this longer side first; null = never"
    )
    batch: Images = Field(8, description="largest number of images of one size in a forward pass")


class SeedsConfig(InferenceConfig):
    """Score maps of the trained network on the tagged training images."""

    scales: Scales = (1.0, 0.5, 1.5, 2.0)
    flip: bool = True
    head: str | None = Field(
        None, description="head of the method that makes seeds; null = its first"
    )
    place: Literal["cells", "stretch", "crop"] = Field(
        "cells",
        description="where the cells of maps lie: cells = where the network looks; stretch = evenly "
        "over the image; crop = evenly over whole cells, cut to the image (irn, Puzzle-CAM)",
    )
    stride: Count = Field(4, description="pixels of the image in one cell of a stored map")
    dtype: Literal["uint8", "float16"] = "uint8"
    given: Path | None = Field(
        None, description="folder of score files that take the place of a trained method's"
    )
    given_format: Literal[
        "auto", "psa", "psa-crf", "irn", "puzzle", "puzzle-rw", "rs", "weakseg"
    ] = Field("auto", description="what wrote them; it says whether classes count from 0 or 1")

    @field_validator("given")
    @classmethod
    def _absolute(cls, given: Path | None) -> Path | None:
        return None if given is None else given.expanduser().absolute()


class PredictConfig(InferenceConfig):
    """Masks of the trained segmenter."""

    crf: Literal["soft", "label", "deeplab"] | None = Field(
        None, description="dense CRF on its probabilities, by its published widths; null = none"
    )
    tile: Pixels | None = Field(
        None,
        ge=128,
        description="predict larger images in overlapping tiles of this side; needs max_side: null",
    )

    @model_validator(mode="after")
    def _one_way_with_large_images(self) -> Any:
        if self.tile is not None and self.max_side is not None:
            raise ValueError(
                f"images are either reduced to max_side ({self.max_side}) or predicted in tiles "
                f"({self.tile}): set max_side: null, or leave tile out"
            )
        return self


class MasksConfig(Frozen):
    """From score maps to masks: which pixels are background."""

    rule: Literal["label-free", "constant", "power"] = Field(
        "label-free", description="label-free = threshold from images and tags alone"
    )
    criterion: Literal["auto", "cross-entropy", "expected-iou", "evidence", "variance"] = Field(
        "auto",
        description="label-free: what sets it; auto = middle of expected-iou, evidence and colours",
    )
    threshold: float = Field(0.3, ge=0, le=1, description="constant: background score")
    alpha: float = Field(8.0, gt=0, le=1_000, description="power: background score (1 - max)^alpha")
    margin: float = Field(
        0.0, ge=0, lt=0.5, description="scores this close to the threshold become 255 (unsure)"
    )


class SegmenterTrainConfig(TrainConfig):
    """Crops, schedule and optimiser of the segmenter."""

    resize: tuple[Scale, Scale] = Field(
        (0.75, 2.0),
        description="range of the longer side before the crop, as a share of the crop",
    )


class SegmenterConfig(Frozen):
    """The segmentation network trained on the masks (DeepLabV3+)."""

    enabled: bool | None = Field(
        None,
        description="null = unless the method segments itself; true = always; false = stop after the masks",
    )
    backbone: BackboneSpec | None = Field(None, description="null = as the method's")
    from_classifier: bool | None = Field(
        None,
        description="start the backbone from the classifier's; null = where it has no ImageNet weights",
    )
    channels: Channels = Field(256, description="width of the decoder")
    dilations: tuple[Count, Count, Count] = Field((6, 12, 18), description="of the ASPP")
    classify: float = Field(
        0.0,
        ge=0,
        description="weight of an image-level classification loss, whose classes limit the masks of "
        "images without tags; 0 = none",
    )
    mix: dict[str, Any] | None = Field(
        None, description="train on mixed images too: cutmix, or {name: cutmix, beta: 1}"
    )
    mix_start: float = Field(
        0.0, ge=0, lt=1, description="share of the schedule without mixed images"
    )
    train: SegmenterTrainConfig = Field(default_factory=SegmenterTrainConfig)

    @field_validator("mix", mode="before")
    @classmethod
    def _mix_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class EvaluateConfig(Frozen):
    """What is compared with ground truth, where there is any."""

    thresholds: int = Field(
        60, ge=1, le=10_000, description="number of thresholds swept over [0, 1)"
    )
    lists: dict[str, Path] = Field(
        default_factory=dict, description="more lists of ids to report on, by name"
    )
    boxes: Literal["auto", "xml", "coco", "masks"] | None = Field(
        None,
        description="localisation against boxes: of VOC XML, of COCO, of the masks' components; "
        "auto = those of the data, else of the masks; null = none",
    )


class CompareConfig(Frozen):
    """What `weakseg compare` changes for its methods; a single run ignores it."""

    after_cam: dict[str, Any] | None = Field(
        None,
        description="settings with which all go on from one CAM of this recipe; null = each alone",
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="settings of a method, or of a variant by a name of your own, over the recipe's",
    )


class RuntimeConfig(Frozen):
    """Where it runs. Changing these does not make finished stages run again."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Count = Field(1, description="processes on each machine that train together")
    nodes: Count = Field(1, description="machines that train together")
    workers: int | None = Field(
        None, ge=0, le=1_024, description="loader processes; null = by the number of cores"
    )


class Recipe(Frozen):
    """Everything that decides the result of a run."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    data: DataConfig = Field(default_factory=DataConfig)
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "cam"}, description="`name` and the method's own settings"
    )
    backbone: BackboneSpec = Field(default_factory=BackboneSpec)
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: SeedsConfig = Field(default_factory=SeedsConfig)
    refine: tuple[dict[str, Any], ...] = Field(
        (), description="steps that improve the scores in order, such as [pamr] or [affinity, crf]"
    )
    masks: MasksConfig = Field(default_factory=MasksConfig)
    segmenter: SegmenterConfig = Field(default_factory=SegmenterConfig)
    predict: PredictConfig = Field(default_factory=PredictConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="before")
    @classmethod
    def _as_a_given_classifier_was_trained(cls, values: Any) -> Any:
        """Without training, a network whose stride is taken away is not the same one any more."""
        method = values.get("method") if isinstance(values, Mapping) else None
        backbone = values.get("backbone") or {} if isinstance(values, Mapping) else None
        given = isinstance(method, Mapping) and method.get("from_classifier") is not None
        if given and isinstance(backbone, Mapping):
            return {**values, "backbone": {"output_stride": 32, **backbone}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, values: Any) -> Any:
        """``train.preset: paper`` is what the method's own paper used."""
        train = values.get("train") if isinstance(values, Mapping) else None
        if not isinstance(train, Mapping) or train.get("preset") != "paper":
            return values
        given = {key: value for key, value in train.items() if key != "preset"}
        return {**values, "train": _published(values.get("method", "cam")) | given}

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _has_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("name"), str):
            raise ValueError("needs a `name`, such as {name: cam}; `weakseg methods` lists them")
        return value

    @field_validator("refine", mode="before")
    @classmethod
    def _step_names_alone(cls, value: Any) -> Any:
        if value is None:
            return ()
        steps = value if isinstance(value, (list, tuple)) else [value]
        return [_step(step) for step in steps]

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps of ``refine``."""
        return tuple(step["name"] for step in self.refine)

    @property
    def segmenter_wanted(self) -> bool | None:
        """``segmenter.enabled``; behind given scores there is no other network, so null is true."""
        enabled = self.segmenter.enabled
        return True if enabled is None and self.seeds.given is not None else enabled

    @property
    def segmenter_starts_from_classifier(self) -> bool:
        """True where the segmenter's backbone starts from the trained classifier's weights."""
        wanted = self.segmenter.from_classifier
        if self.seeds.given is not None:
            return bool(wanted)
        same = self.segmenter.backbone in (None, self.backbone)
        return same and self.backbone.from_scratch if wanted is None else wanted

    @property
    def segmenter_backbone(self) -> BackboneSpec:
        """The segmenter's backbone: its own, or the method's, all of which learns.

        A stride of 32, which a classifier's maps may have, is too coarse for the decoder.
        """
        if self.segmenter.backbone is not None:
            return self.segmenter.backbone
        stride = 16 if self.backbone.output_stride == 32 else self.backbone.output_stride
        return self.backbone.model_copy(update={"output_stride": stride, "train": "all"})

    @property
    def idle_settings(self) -> tuple[str, ...]:
        """Settings that were given but have no effect beside the others, each with the reason."""
        method, found = self.method, []
        if method.get("mix") is None and "+" not in method["name"]:
            found += [f"method.{k} (no method.mix)" for k in method if k.startswith("mix_")]
        if method.get("from_classifier") is None and "classifier_loss" in method:
            found.append("method.classifier_loss (no method.from_classifier)")
        if self.segmenter.mix is None and self.segmenter.mix_start:
            found.append("segmenter.mix_start (no segmenter.mix)")
        return tuple(found)

    def to_yaml(self) -> str:
        """The complete recipe as YAML; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name (``voc12/cam_r50``)."""
    root = Path(str(resources.files("weakseg") / "recipes"))
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        source: YAML file, name of a shipped recipe, plain values, or ``None`` for the defaults.
        overrides: Nested values that win over the file; ``None`` values are ignored.
        sets: Assignments such as ``"train.lr=0.01"``; the right side is YAML. They win over all.
            Another ``method.name`` leaves the recipe's settings of its own method behind.

    Raises:
        UserError: Everything that is wrong, one line per key.
    """
    values, where = _read(source)
    values = _of_today(values)
    values = _merge(values, overrides or {})
    values = {key: value for key, value in values.items() if value is not None}  # an empty section
    values = _of_one_method(values, sets)
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"{assignment!r} is not an assignment",
                where="--set",
                mend="write --set key.sub=value",
            )
        path = key.strip().split(".")
        if path[-2:] == ["train", "preset"]:  # keys that are written out would win over it
            values = _released(values, path[:-1])
        values = _assign(values, path, _parsed(text, assignment), key)
    return validate(Recipe, values, where=where)


def data_values(
    root: str | Path | None,
    labels: str | Path | None,
    masks: str | Path | None,
    classes: Sequence[str] | str | Path | None,
) -> dict[str, Any]:
    """The ``data`` section that arguments stand for.

    Paths become absolute, so that the run folder can be used from any working directory; what is
    not there stays as it is: it may be a word, or relative to ``root``.
    """
    if isinstance(classes, str | Path):
        classes = _absolute(classes)
    return {
        "root": None if root is None else str(Path(root).expanduser().absolute()),
        "labels": None if labels is None else _absolute(labels),
        "masks": None if masks is None else _absolute(masks, folder=True),
        "classes": classes,
    }


def _absolute(path: str | Path, *, folder: bool = False) -> str:
    found = Path(path).expanduser()
    exists = found.is_dir() if folder else found.is_file()
    return str(found.absolute() if exists else path)


def commented_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key explained, to be edited by hand."""
    lines = [
        "# A weakseg recipe. Delete what you do not change: these are the values in force.",
        "",
    ]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, Frozen):
            lines.append(f"{name}:  # {_sentence(type(value))}")
            lines += _commented(value, "  ")
        else:
            lines.append(_commented_line(name, value, field.description, ""))
        lines.append("")
    return "\n".join(lines)


def _commented(config: Frozen, indent: str) -> list[str]:
    lines = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Frozen):
            lines.append(f"{indent}{name}:")
            lines += _commented(value, indent + "  ")
        else:
            lines.append(_commented_line(name, value, field.description, indent))
    return lines


def _commented_line(name: str, value: Any, description: str | None, indent: str) -> str:
    text = (
        yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6)
        .strip()
        .removesuffix("...")
        .strip()
    )
    comment = f"  # {description}" if description else ""
    return f"{indent}{name}: {text}{comment}"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _step(value: Any) -> dict[str, Any]:
    """A step of ``refine`` as ``{name: pamr, iterations: 5}``; ``pamr`` and ``{pamr: {iterations: 5}}``
    say the same."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        if isinstance(value.get("name"), str):
            return dict(value)
        if len(value) == 1:
            (name, settings), *_ = value.items()
            if isinstance(name, str) and isinstance(settings, Mapping | None):
                return {"name": name, **(settings or {})}
    raise ValueError(
        f"{value!r} is no step: write a name such as pamr, or {{pamr: {{iterations: 5}}}}"
    )


def _published(method: Any) -> dict[str, Any]:
    """Settings of a training as in the paper of a method, which is the section of the recipe."""
    section = {"name": method} if isinstance(method, str) else method
    name = section.get("name", "cam") if isinstance(section, Mapping) else None
    if not isinstance(name, str):
        return {}  # the section has an error of its own
    inner = section.get("classifier")
    inner = inner.get("name") if isinstance(inner, Mapping) else inner
    if name == "acr" and inner == "mctformer":
        name = "acr+vit"
    found = PAPERS.get(name) or PAPERS.get(name.partition("+")[0])
    if found is None:
        raise UserError(
            f"preset 'paper': of the method {name} no published optimiser is known",
            where="train.preset",
            mend=f"name one ({', '.join(PRESETS)}), or leave the preset out",
        )
    return dict(found)


def _sentence(config: type[Frozen]) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], object]:
    if source is None:
        return {}, "recipe"
    if isinstance(source, Mapping):
        return dict(source), "recipe"
    shipped = shipped_recipes()
    path = Path(source)
    if not path.exists() and str(source) in shipped:
        path = shipped[str(source)]
    if not path.is_file():
        raise UserError(
            f"no recipe {str(source)!r}",
            mend=f"give a YAML file or a shipped recipe; {suggest(str(source), shipped)}",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = _loaded(text)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})", where=path, mend="change its permissions"
        ) from None
    except _NOT_YAML as error:
        raise UserError(
            f"is not readable YAML: {error}", where=path, mend="correct the syntax"
        ) from None
    if not text.strip():  # comments alone are the default recipe; a full disk leaves nothing
        raise UserError(
            "is empty",
            where=path,
            mend="take it back from a copy; `weakseg init` writes a recipe with every key "
            "explained, and `weakseg run IMAGES LABELS --out FOLDER` writes that of a run again",
        )
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError("must hold keys and values", where=path, mend="see `weakseg init`")
    return values, path


# ValueError: numbers of thousands of digits; bytes that are no UTF-8.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
_NODES = 10_000


def _loaded(text: str) -> Any:
    """The value of a YAML document, in which no key stands twice and aliases stay small."""
    _count(yaml.compose(text, Loader=yaml.SafeLoader), {}, set())
    return yaml.safe_load(text)


def _count(node: yaml.Node | None, known: dict[int, int], above: set[int]) -> int:
    """Nodes below a node once every alias is written out: few lines can stand for billions."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError(f"an alias stands inside its own anchor{node.start_mark}")
    if id(node) not in known:
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise yaml.YAMLError(f"the key {twice!r} stands twice{node.start_mark}")
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known, above | {id(node)}) for part in inner)
        if known[id(node)] > _NODES:
            raise yaml.YAMLError(f"aliases stand for more than {_NODES:,} values{node.start_mark}")
    return known[id(node)]


def _of_today(values: dict[str, Any]) -> dict[str, Any]:
    """A complete recipe of a version without ``masks.criterion`` meant the only one there was."""
    section = values.get("masks")
    older = set(MasksConfig.model_fields) - {"criterion"}
    if isinstance(section, Mapping) and set(section) == older:
        return {**values, "masks": {**section, "criterion": "cross-entropy"}}
    return values


def _of_one_method(values: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """Another method's name leaves the settings of the first behind, which it would not know."""
    section = values.get("method")
    if not isinstance(section, Mapping):
        return values
    for assignment in sets:
        key, _, name = assignment.partition("=")
        kept = str(section.get("name", "cam")).partition("+")[0]
        if key.strip() == "method.name" and name.strip().partition("+")[0] != kept:
            return {**values, "method": {}}
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            continue
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            if key == "train" and "preset" in value:
                inner = without_preset(inner)  # keys that are written out would win over it
            merged[key] = _merge(inner, value)
        elif isinstance(value, Mapping):
            merged[key] = _merge({}, value)
        else:
            merged[key] = value
    return merged


def _parsed(text: str, assignment: str) -> Any:
    try:
        return _loaded(text)
    except _NOT_YAML as error:
        raise UserError(
            f"the right side of {assignment!r} is not YAML: {str(error).splitlines()[0]}",
            where="--set",
            mend="quote text that holds : [ ] { } or a comma",
        ) from None


def _released(values: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """The values with what presets set left out of the training at ``path``."""
    if not path:
        return without_preset(values)
    inner = values.get(path[0])
    if not isinstance(inner, Mapping):
        return dict(values)
    return {**values, path[0]: _released(inner, path[1:])}


def _assign(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**values, head: value}
    inner = values.get(head) or {}
    if isinstance(inner, str) and head == "method":
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise UserError(
            f"{key!r}: {head!r} holds a value, not keys", where="--set", mend="check the key"
        )
    return {**values, head: _assign(inner, rest, value, key)}
