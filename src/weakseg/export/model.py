"""Model folders: ``model.safetensors`` + ``config.json`` + a card; what users share and load."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    StrictBool,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weakseg.config import Channels, Count, Pixels, Scales, validate
from weakseg.data.depth import Reading
from weakseg.data.images import voc_palette
from weakseg.errors import UserError
from weakseg.export.card import NUMBERS, card
from weakseg.export.hub import download, is_repo_id, upload
from weakseg.files import atomic_path, write_json
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Trainable, build, needs_segmenter, resolve
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.checkpoint import require_finite
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import ReadBands, ReadDepth, Recipe, load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stagefiles import as_made, rewrite
from weakseg.training.footprint import within_memory
from weakseg.training.segmenter import Segmenter

__all__ = [
    "Model",
    "find_model",
    "initialise",
    "load",
    "prediction_settings",
    "read_weights",
    "save",
    "update_models",
]

_FORMAT = 1
_NETWORK = ("task", "backbone", "method", "decoder")
_KEYS = ("task", "backbone", "classes", "preprocessing", "inference", "details")

_Three = tuple[float, float, float]


class _Part(BaseModel):
    """A part of ``config.json``; keys that it does not know are of later versions."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Preprocessing(_Part):
    mean: _Three
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    depth: ReadDepth = None  # older folders do not say
    bands: ReadBands = None


class _Inference(_Part):
    scales: Scales
    flip: StrictBool
    max_side: Pixels | None
    tile: Pixels | None = None  # older folders do not say
    crf: Literal["soft", "label", "deeplab"] | None = None
    head: str | None
    place: Literal["cells", "stretch", "crop"] = "cells"
    threshold: float | None


class _Decoder(_Part):
    channels: Channels
    dilations: tuple[Count, Count, Count]
    classifies: StrictBool = False


class _Config(_Part):
    """What :func:`load` takes from ``config.json``, with its types."""

    task: Literal["method", "segmenter"]
    backbone: dict[str, Any]
    classes: tuple[str, ...] = Field(min_length=1, max_length=254)
    preprocessing: _Preprocessing
    inference: _Inference
    details: dict[str, Any]
    method: dict[str, Any] | None = None
    decoder: _Decoder | None = None

    @model_validator(mode="after")
    def _has_its_network(self) -> _Config:
        if (self.method if self.task == "method" else self.decoder) is None:
            raise ValueError(
                f"a {self.task} needs {'method' if self.task == 'method' else 'decoder'}"
            )
        return self


@dataclass
class Model(Predictor):
    """A predictor that came from a model folder: it can be saved again, and shared.

    Attributes:
        network: What rebuilds it, as in ``config.json``.
        source: The folder that it came from.
    """

    network: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Loads a model folder, a run, or a model of the Hugging Face hub.

        Args:
            name: Path, or ``owner/name`` on the hub where no such path exists.
            revision: Branch, tag or commit on the hub.
            token: Of a private model; default: that of ``hf auth login``.
            cache_dir: Folder of downloads; default: the hub's own.
            local_files_only: Take what was downloaded before and do not ask the hub.

        Raises:
            UserError: No such model, no access or no network; or its files do not fit together.
        """
        if is_repo_id(name):
            name = download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return _load(Path(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a model folder with a card, and the run's own numbers of it where there are any.

        Args:
            folder: Made when absent; files of the same names are replaced.
        """
        numbers = self.details.get("numbers") or _numbers_of_run(self.source, self.network["task"])
        details = {**self.details, **({"numbers": numbers} if numbers else {})}
        save(Path(folder), self, self.network, details)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Model trained by weakseg",
    ) -> str:
        """Uploads the model folder to the Hugging Face hub.

        Args:
            repo_id: ``owner/name``; made if need be.
            private: Of a new repository; default: as the owner's account says.
            token: Default: that of ``hf auth login``.
            commit_message: Of the upload.

        Returns:
            The repository's address.

        Raises:
            UserError: No token, no access, or no network.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(
                Path(folder), repo_id, private=private, token=token, commit_message=commit_message
            )

    def fast(self) -> Predictor:
        """As of every predictor; what is folded cannot be saved, so it is no ``Model``."""
        fast = super().fast()
        return Predictor(**{f.name: getattr(fast, f.name) for f in fields(Predictor)})


def save(
    folder: Path, predictor: Predictor, network: Mapping[str, Any], details: Mapping[str, Any]
) -> None:
    """Writes a model folder.

    Args:
        folder: Made when absent.
        predictor: The trained model and how to use it.
        network: What rebuilds it: ``task`` ("method" or "segmenter"), ``backbone`` and either
            ``method`` or ``decoder``.
        details: Numbers and settings worth keeping, for the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in predictor.model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:  # its errors of the disk are no OSErrors
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), str(error), str(folder)) from None
    config = {
        "format": _FORMAT,
        **network,
        "classes": list(predictor.classes),
        "palette": voc_palette()[: len(predictor.classes) + 1].tolist(),
        "preprocessing": {
            "mean": list(predictor.normalise.mean),
            "std": list(predictor.normalise.std),
            "depth": predictor.reading.depth,
            "bands": predictor.reading.bands,
        },
        "inference": {
            "scales": list(predictor.scales),
            "flip": predictor.flip,
            "max_side": predictor.max_side,
            "tile": predictor.tile,
            "crf": predictor.crf,
            "head": predictor.head,
            "place": predictor.place,
            "threshold": predictor.threshold,
        },
        "details": dict(details),
    }
    write_json(folder / "config.json", config)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card(config), encoding="utf-8")


def prediction_settings(recipe: Recipe, *, segments: bool) -> dict[str, Any]:
    """The settings of a :class:`~weakseg.inference.Predictor` that a recipe's ``predict`` names.

    Tiles are for networks that segment: a classifier's maps are divided by their maximum.
    """
    config = recipe.predict
    return {
        "scales": config.scales,
        "flip": config.flip,
        "max_side": config.max_side,
        "tile": config.tile if segments else None,
        "crf": config.crf,
        "place": "cells" if segments else recipe.seeds.place,
    }


def update_models(run: RunFolder, recipe: Recipe) -> None:
    """Writes into a run's model folders what was decided after their training.

    That is the threshold of the run's masks, where it was chosen for the maps of this model, and
    the settings of ``predict``: so a folder answers the same when it is copied elsewhere.
    """
    for stage in ("train", "segment"):
        folder = run.stage_folder(stage) / "model"
        record = run.record(stage)
        done = record is not None and record.status == "done"
        if not (done and (folder / "config.json").is_file()):
            continue
        if not as_made(folder.parent, "model/config.json"):  # somebody knows better
            continue
        before = _read_config(folder)
        method = before["task"] == "method"
        segments = not method or resolve(before["method"])[0].segments
        threshold, rule = _rule_of_run(folder, _first_head(folder, recipe)) if method else _NO_RULE
        details = {k: v for k, v in before["details"].items() if k != "threshold rule"}
        now = {
            **before,
            "inference": {
                **before["inference"],
                **prediction_settings(recipe, segments=segments),
                "threshold": threshold,
            },
            "details": details if rule is None else {**details, "threshold rule": rule},
        }
        now = json.loads(json.dumps(now))  # tuples become lists, as in the file
        if now != before:
            card_file = folder / "README.md"
            own = card_file.is_file() and card_file.read_text(encoding="utf-8") == card(before)
            rewrite(folder.parent, "model/config.json", json.dumps(now, indent=1) + "\n")
            if own:  # a licence that somebody has added stays
                rewrite(folder.parent, "model/README.md", card(now))


def _first_head(folder: Path, recipe: Recipe) -> str | None:
    """The head that the model's maps are of; None where the recipe's seeds are of no other."""
    return None if recipe.seeds.head is None else load(folder).model.heads[0]


def load(folder: str | Path) -> Model:
    """Loads a model folder, the best model of a run folder, or a model of the Hugging Face hub.

    Args:
        folder: A model folder; or a run, whose segmenter is taken, else its classifier; or
            ``owner/name`` on the hub, where no such path exists.

    Returns:
        A predictor: ``probabilities(images)`` and ``predict(image)``. The threshold of a run's
        classifier is that of the run's masks.

    Raises:
        UserError: Not a model folder, or its files do not fit together.
    """
    return Model.from_pretrained(folder)


def _load(folder: Path) -> Model:
    folder = find_model(folder)
    config = _read_config(folder)
    spec = _own_tensors(
        validate(BackboneSpec, config["backbone"], where=folder / "config.json", prefix="backbone")
    )
    classes = tuple(config["classes"])
    state = read_weights(folder)
    try:
        with within_memory(None, "copy the model folder again"):
            model = _network(config, spec, len(classes))
    except UserError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        raise UserError(what, where=folder / "config.json", mend=error.mend) from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit the configuration: {str(error).splitlines()[0]}",
            where=folder,
            mend="copy the whole model folder again; its files belong together",
        ) from None
    inference, details = config["inference"], config["details"]
    if inference["head"] is not None and inference["head"] not in model.heads:
        raise UserError(
            f"inference.head = {inference['head']!r}: the network has {', '.join(model.heads)}",
            where=folder / "config.json",
            mend="copy the model folder again",
        )
    threshold = inference["threshold"]
    if threshold is None and config["task"] == "method":  # of a run of an earlier version
        threshold, rule = _rule_of_run(folder.absolute(), model.heads[0])
        details = details if rule is None else {**details, "threshold rule": rule}
    return Model(
        model.eval(),
        classes,
        Normalise(tuple(config["preprocessing"]["mean"]), tuple(config["preprocessing"]["std"])),
        scales=tuple(inference["scales"]),
        flip=inference["flip"],
        max_side=inference["max_side"],
        tile=inference.get("tile"),  # older folders do not say
        crf=inference.get("crf"),
        threshold=threshold,
        head=inference["head"],
        place=inference.get("place", "cells"),
        reading=_reading(config["preprocessing"]),
        details=details,
        network={key: config[key] for key in _NETWORK if key in config},
        source=folder,
    )


def _network(config: Mapping[str, Any], spec: BackboneSpec, classes: int) -> Trainable:
    if config["task"] == "method":
        return build(config["method"], backbone_factory(spec), classes)
    decoder = config["decoder"]
    backbone = backbone_factory(spec)()
    return Segmenter(
        DeepLabV3Plus(backbone, classes + 1, decoder["channels"], decoder["dilations"]),
        classify=float(decoder.get("classifies", False)),
    )


def _own_tensors(spec: BackboneSpec) -> BackboneSpec:
    """The same network without any weights: whatever a folder asks for, it loads its own tensors."""
    update = {"pretrained": False, "weights": None, "norm": spec.resolved_norm}
    return spec.model_copy(update=update)


def _reading(preprocessing: Mapping[str, Any]) -> Reading:
    depth, bands = preprocessing.get("depth"), preprocessing.get("bands")
    return Reading(
        (depth[0], depth[1]) if isinstance(depth, list) else depth,
        tuple(bands) if isinstance(bands, list) else bands,
    )


_NO_RULE: tuple[float | None, str | None] = (None, None)


def _rule_of_run(folder: Path, head: str | None) -> tuple[float | None, str | None]:
    """Threshold of a run's masks and the rule that chose it, where it was chosen for these maps.

    That of refined or given maps, of another head or of another training says nothing of them.
    """
    run = RunFolder(folder.parent.parent)
    if not run.recipe_file.is_file():
        return None, None
    try:
        recipe = load_recipe(run.recipe_file)
        said = json.loads((run.stage_folder("masks") / "rule.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):  # of another version
        return None, None
    own = not recipe.steps and recipe.seeds.given is None and recipe.seeds.head in (None, head)
    if not (own and isinstance(said, dict) and _follow(run, "train", "seeds", "masks")):
        return None, None
    return said.get("threshold"), said.get("rule")


def _numbers_of_run(folder: Path | None, task: str) -> list[dict[str, Any]]:
    """What the run that a model folder lies in has measured of that very network."""
    if folder is None:
        return []
    run = RunFolder(folder.absolute().parent.parent)
    network = "segment" if task == "segmenter" else "train"
    predicts = _follow(run, network, "predict", "evaluate")
    if not predicts and not _follow(run, network, "seeds", "evaluate"):
        return []
    file = run.stage_folder("evaluate") / "results.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
    stage = "segmenter" if predicts else "seed"
    return [{key: row[key] for key in NUMBERS} for row in rows if row["stage"] == stage]


def _follow(run: RunFolder, *stages: str) -> bool:
    """Whether these stages are done, each with the result of the one before it."""
    records = [run.record(name) for name in stages]
    done = [r for r in records if r is not None and r.status == "done"]
    if len(done) < len(stages):
        return False
    return all(
        run.outcome(before) in set(_strings(after.inputs))
        for before, after in zip(stages, done[1:], strict=False)
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)


def find_model(folder: Path) -> Path:
    """The model folder itself, or that of a run: the segmenter's, else the method's."""
    stages = _model_stages(folder)
    for candidate in (
        folder,
        folder / "model",
        *(RunFolder(folder).stage_folder(stage) / "model" for stage in stages),
    ):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    raise UserError(
        "holds no model (config.json and model.safetensors)",
        where=folder,
        mend="give a model folder, such as RUN/2-train/model, or a finished run",
    )


def _model_stages(folder: Path) -> tuple[str, ...]:
    """Stages of a run that have a model, less what an earlier recipe left and its own does not."""
    file = RunFolder(folder).recipe_file
    if not file.is_file():
        return ("segment", "train")
    try:
        recipe = load_recipe(file)
        segmenter = needs_segmenter(recipe.method, recipe.segmenter_wanted)
    except UserError:  # of another version
        return ("segment", "train")
    trained = ("train",) if recipe.seeds.given is None else ()
    return ("segment", *trained) if segmenter else trained


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder.

    Raises:
        UserError: The file is damaged, or holds values that are not finite.
    """
    file = folder / "model.safetensors"
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read ({error})", where=file, mend="copy the model folder again"
        ) from None
    require_finite(state, file)
    return state


def initialise(model: Trainable, folder: Path) -> list[str]:
    """Starts ``model`` from the weights of another run or model folder.

    Tensors are matched by name and shape; what has no match keeps its own start.

    Returns:
        Names of the tensors that were not found, so that callers can say so.

    Raises:
        UserError: Nothing matches: another backbone, most likely.
    """
    given = model.adopted(read_weights(find_model(folder)))
    own = model.state_dict()
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if not any(tensor.ndim for tensor in fitting.values()):  # counters fit every network
        raise UserError(
            "no tensor of this model fits the network",
            where=folder,
            mend="use the same backbone as that run",
        )
    model.load_state_dict(fitting, strict=False)
    return [k for k in own if k not in fitting]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"is not JSON ({error})",
            where=folder / "config.json",
            mend="copy the model folder again",
        ) from None
    given = config if isinstance(config, dict) else {}
    if given.get("format") != _FORMAT:
        raise UserError(
            f"has format {given.get('format')!r}, this version reads {_FORMAT}",
            where=folder / "config.json",
            mend="use the version of weakseg that wrote it (see README.md beside it)",
        )
    missing = [key for key in _KEYS if key not in given]
    if missing:
        raise UserError(
            f"lacks {', '.join(missing)}",
            where=folder / "config.json",
            mend="copy the model folder again",
        )
    try:
        _Config.model_validate(given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(
            f"holds values that cannot be: {'; '.join(lines[:5])}",
            where=folder / "config.json",
            mend="copy the model folder again",
        ) from None
    return config
