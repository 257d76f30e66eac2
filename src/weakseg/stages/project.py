"""Stage 2 without training: a classifier that the user has already becomes the model of the run.

Which of its outputs stand for which class is settled here, by order, by names, or as the recipe
says; ``networks/classifier.py`` takes the network apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from weakseg.config import validate
from weakseg.console import console
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.export.model import prediction_settings, save
from weakseg.inference import Normalise, Predictor
from weakseg.methods import build, resolve
from weakseg.methods.cam import CAM
from weakseg.networks.backbone import backbone_factory
from weakseg.networks.checkpoint import files_of, read_checkpoint
from weakseg.networks.classifier import take_apart
from weakseg.networks.heads import ProjectedHead
from weakseg.networks.spec import BackboneSpec, Projection
from weakseg.recipe import Recipe
from weakseg.registry import suggest

__all__ = ["OutputMapping", "map_outputs", "project", "projected_inputs", "with_classifier"]

_WHERE = "method.classifier_classes"
_IMAGENET = 1000


class OutputMapping(NamedTuple):
    """For each class the outputs that stand for it, and how that was found, in words."""

    outputs: tuple[tuple[int, ...], ...]
    how: str


def with_classifier(recipe: Recipe) -> Recipe:
    """The recipe with the backbone that a given classifier names; without one, as it is.

    The backbone's weights come from the classifier, so none are fetched for it, and its BatchNorm
    stays as it was trained.

    Raises:
        UserError: The file cannot be read, it is of another network than the recipe says, or other
            weights are given beside it.
    """
    path = _given(recipe)
    if path is None:
        return recipe
    spec = recipe.backbone
    if spec.weights is not None:
        raise UserError(
            "both it and method.from_classifier give the backbone's weights",
            where="backbone.weights",
            mend="leave backbone.weights out",
        )
    checkpoint = read_checkpoint(path)
    values: dict[str, Any] = {"pretrained": False}
    values["norm"] = "frozen" if spec.norm == "auto" else spec.norm
    values["mean"], values["std"] = spec.mean or checkpoint.mean, spec.std or checkpoint.std
    named, own = checkpoint.architecture, spec.name.partition(".")[0]
    if named is not None:
        if spec.name == BackboneSpec().name:
            values["name"] = named
        elif own.rpartition("/")[2] != named.partition(".")[0].rpartition("/")[2]:
            raise UserError(
                f"the recipe says {spec.name}, and the classifier says that it is a {named}",
                where="backbone.name",
                mend="leave backbone.name out",
            )
        values["options"] = {**checkpoint.options, **spec.options}
    method = {**recipe.method, "from_classifier": str(path.expanduser().absolute())}
    names = method.get("classifier_classes")
    if isinstance(names, str):
        method["classifier_classes"] = str(_existing(Path(names)).absolute())
    named_spec = validate(  # what the file says of itself is checked like a recipe
        BackboneSpec, {**spec.model_dump(), **values}, where=checkpoint.file, prefix="backbone"
    )
    return recipe.model_copy(update={"backbone": named_spec, "method": method})


def projected_inputs(recipe: Recipe, images: Collection) -> dict[str, Any] | None:
    """Everything that decides the model; ``None`` where the recipe gives no classifier."""
    path = _given(recipe)
    if path is None:
        return None
    names = recipe.method.get("classifier_classes")
    _, config = resolve(recipe.method)
    return {
        "method": {
            "name": recipe.method["name"],
            **config.model_dump(mode="json", exclude={"from_classifier", "classifier_classes"}),
        },
        "classifier": [_digest(file) for file in files_of(path)],
        "outputs": _digest(_existing(Path(names))) if isinstance(names, str | Path) else names,
        "backbone": recipe.backbone.model_dump(mode="json"),
        "classes": list(images.classes),
    }


def project(folder: Path, recipe: Recipe, images: Collection) -> dict[str, Any]:
    """Writes the model folder of a given classifier; returns the stage's results."""
    _, config = resolve(recipe.method)
    assert isinstance(config, CAM.Config) and config.from_classifier is not None
    checkpoint = read_checkpoint(config.from_classifier)
    parts = take_apart(checkpoint, recipe.backbone)
    count = len(parts.weight)
    mapping = map_outputs(images.classes, count, config.classifier_classes, checkpoint.labels)
    section = {
        "name": recipe.method["name"],
        "projection": Projection(
            outputs=count,
            channels=parts.weight.shape[1],
            classes=mapping.outputs,
            loss=config.classifier_loss,
            neck=parts.neck_names,
        ).model_dump(mode="json"),
    }
    model = build(section, backbone_factory(recipe.backbone), len(images.classes))
    assert isinstance(model, CAM) and isinstance(model.head, ProjectedHead)
    parts.load_into(model.backbone, model.head)
    backbone, file = model.backbone, config.from_classifier
    own = recipe.backbone.model_dump(mode="json")
    own |= {"norm": "frozen", "mean": list(backbone.mean), "std": list(backbone.std)}
    predictor = Predictor(
        model.eval(),
        images.classes,
        Normalise(tuple(backbone.mean), tuple(backbone.std)),
        reading=images.reading,
        **prediction_settings(recipe, segments=False),
    )
    details = {
        "data": images.name,
        "method": recipe.method["name"],
        "backbone": backbone.spec.name,
        "classifier": f"{file.name}, given and not trained here",
        "outputs": f"{count}, as classes {mapping.how}",
    }
    network = {"task": "method", "method": section, "backbone": own}
    save(folder / "model", predictor, network, details)
    console.print(
        f"  {file.name} is taken as it is, nothing is trained; its {count} outputs became "
        f"{len(images.classes)} classes {mapping.how}",
        highlight=False,
        markup=False,
    )
    return {
        "classifier": f"{file.name}, not trained",
        "outputs": count,
        "classes": mapping.how,
        "loss": config.classifier_loss,
    }


def map_outputs(
    classes: Sequence[str],
    count: int,
    given: Path | Sequence[str] | dict[str, Any] | None,
    labels: Sequence[Sequence[str]] = (),
) -> OutputMapping:
    """Which outputs of a classifier stand for which class.

    Args:
        classes: K names of the collection's classes.
        count: N, the classifier's outputs.
        given: Names of all outputs in order; or class -> outputs, each by number (from 0) or name;
            or a file of either (.json, .yaml, or text with one name in each line).
        labels: What the weights call each output, synonyms together.

    Returns:
        By the names where there are any, else in order where there are as many outputs as
        classes. 1000 outputs without names are ImageNet's.

    Raises:
        UserError: Classes without an output, all of them at once, or names that are not unique.
    """
    if isinstance(given, Path):
        return map_outputs(classes, count, _read(_existing(given)), labels)
    if isinstance(given, dict):
        return _mapped(classes, count, given, labels or _imagenet(count))
    if given is not None:
        if len(given) != count:
            raise UserError(
                f"{len(given)} names are given, and the classifier has {count} outputs",
                where=_WHERE,
                mend="give one name for each output in order, or class: outputs",
            )
        return _named(classes, [(str(name),) for name in given], "by the given names")
    if labels and len(labels) == count:
        known = _Names(labels)
        if count != len(classes) or any(known.find(name) for name in classes):
            return _named(classes, labels, "by the names in the weights")
    if count == len(classes):
        first = ", ".join(classes[:3]) + (", ..." if count > 3 else "")
        return OutputMapping(tuple((i,) for i in range(count)), f"in order ({first})")
    if count == _IMAGENET:
        return _named(classes, _imagenet(count), "by ImageNet's names")
    raise UserError(
        f"the classifier has {count} outputs, and the collection {len(classes)} classes",
        where=_WHERE,
        mend="name the outputs in order: a list, or a text file with one name in each line",
    )


class _Names:
    """Finds outputs by any of their names; case, ``_`` and ``-`` make no difference."""

    def __init__(self, labels: Sequence[Sequence[str]]) -> None:
        self.found: dict[str, set[int]] = {}
        for i, names in enumerate(labels):
            for name in names:
                for part in (name, *name.split(",")):
                    self.found.setdefault(_plain(part), set()).add(i)

    def find(self, name: str) -> list[int]:
        return sorted(self.found.get(_plain(name), ()))


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _named(classes: Sequence[str], labels: Sequence[Sequence[str]], how: str) -> OutputMapping:
    return _by_names({name: [name] for name in classes}, labels, len(labels), how)


def _mapped(
    classes: Sequence[str], count: int, given: dict[str, Any], labels: Sequence[Sequence[str]]
) -> OutputMapping:
    wrong = [name for name in classes if not _listed(given.get(name, []))]
    unknown = [name for name in given if name not in classes]
    if wrong or unknown:
        raise UserError(
            f"it names no outputs of {_few(wrong)}"
            if wrong
            else f"the collection has no class {_few(unknown)}",
            where=_WHERE,
            mend="give class: outputs for each class of the collection; "
            + (f"leave {_few(unknown)} out" if unknown else "see `weakseg check` for their names"),
        )
    wanted = {name: _listed(given[name]) for name in classes}
    return _by_names(wanted, labels, count, "as the recipe says")


def _by_names(
    wanted: dict[str, list[Any]], labels: Sequence[Sequence[str]], count: int, how: str
) -> OutputMapping:
    names = _Names(labels)
    outputs, missing, several = [], [], []
    for outputs_of in wanted.values():
        own: list[int] = []
        for output in outputs_of:
            if isinstance(output, int):
                found = [output] if 0 <= output < count else []
            else:
                found = names.find(str(output))
            missing += [] if found else [str(output)]
            several += [f"{output} ({', '.join(map(str, found))})"] if len(found) > 1 else []
            own += found
        outputs.append(tuple(dict.fromkeys(own)))
    if missing or several:
        raise UserError(
            f"{len(missing)} names are of no output: {_few(missing)}"
            if missing
            else f"{len(several)} names are of several outputs: {_few(several)}",
            where=_WHERE,
            mend="write the outputs' numbers, counted from 0"
            if several or not labels
            else f"{suggest(_plain(missing[0]), names.found)}; or give class: outputs",
        )
    return OutputMapping(tuple(outputs), how)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _imagenet(count: int) -> list[tuple[str, ...]]:
    """Names of ImageNet's 1000 classes: the synset, and the words for it."""
    if count != _IMAGENET:
        return []
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return list(zip(info.label_names(), info.label_descriptions(), strict=True))


def _read(file: Path) -> Any:
    """Names or a mapping; ``{"0": "cat", ...}`` and ``{"0": ["n02", "cat"]}`` are names in order."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix not in (".json", ".yaml", ".yml"):
            return [line.strip() for line in text.splitlines() if line.strip()]
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot be read ({str(error).splitlines()[0]})", where=file, mend="correct the file"
        ) from None
    if isinstance(values, dict) and {str(k) for k in values} == set(map(str, range(len(values)))):
        by_number = {int(k): v for k, v in values.items()}
        return [_listed(by_number[i])[-1] for i in range(len(values))]
    if isinstance(values, dict):
        return {str(k): v for k, v in values.items()}
    if isinstance(values, list):
        return [str(v) for v in values]
    raise UserError(
        "holds neither names nor class: outputs", where=file, mend="give one name for each output"
    )


def _given(recipe: Recipe) -> Path | None:
    path = recipe.method.get("from_classifier")
    return None if path is None else Path(path)


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            f"no file {str(path)!r}",
            where=_WHERE,
            mend="give a list, class: outputs, or the path of a file with either",
        )
    return path


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
