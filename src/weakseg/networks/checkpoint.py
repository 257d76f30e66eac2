"""Weights of classifiers from files: state dicts as people save them, without running any code.

A ``.pth`` file is read by torch's unpickler for weights alone. The one class that it may build
besides tensors is ``argparse.Namespace``, plain data, in which the training scripts of timm and
torchvision keep their settings.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weakseg.errors import UserError

__all__ = ["Checkpoint", "files_of", "read_checkpoint", "require_finite"]

_NESTS = ("state_dict", "model", "model_state_dict", "model_state", "net", "module")
_DEPTH = 3  # of nests in each other
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a model folder of timm


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a network.

    Attributes:
        file: Where it was read.
        state: Its tensors, under the file's names.
        architecture: Name of the backbone in recipes, where the file says it.
        options: Arguments of the network that go with it.
        labels: Names of each output in order, synonyms together; empty where the file has none.
        mean: RGB mean of the inputs, where the file says it.
        std: RGB standard deviation, likewise.
    """

    file: Path
    state: dict[str, Tensor]
    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    labels: tuple[tuple[str, ...], ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def under(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors without the prefix (``module.``, ``model.``, ...) that hides ``names`` best."""
        own = {n for n in names if not n.endswith("num_batches_tracked")}
        ends = {n.rpartition(".")[2] for n in own}
        prefixes: dict[str, int] = {}
        for key in self.state:
            if key.rpartition(".")[2] not in ends:
                continue
            parts = key.split(".")
            for i in range(min(len(parts), 5)):
                if ".".join(parts[i:]) in own:
                    prefix = "".join(p + "." for p in parts[:i])
                    prefixes[prefix] = prefixes.get(prefix, 0) + 1
        best = max(prefixes, key=lambda p: (prefixes[p], -len(p)), default="")
        return {k.removeprefix(best): v for k, v in self.state.items() if k.startswith(best)}


def files_of(path: Path) -> list[Path]:
    """The files that decide what ``read_checkpoint`` returns, the weights first.

    Raises:
        UserError: There is nothing, or a folder that is no model folder.
    """
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"no file {str(path)!r}",
            where="method.from_classifier",
            mend="give the path of a .pth, .pt or .safetensors file, or of a timm model folder",
        )
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / "config.json").is_file():
        raise UserError(
            "is no model folder of timm (config.json and model.safetensors)",
            where=path,
            mend="give the file of the weights itself, and name the network with backbone.name",
        )
    return [weights, path / "config.json"]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a state dict, a training checkpoint or a timm model folder.

    Args:
        path: ``.safetensors``; ``.pth`` or ``.pt`` of a state dict, alone or under ``state_dict``
            or ``model``; or a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: Nothing is there, or it holds no tensors that can be read without running code.
    """
    weights, *described = files_of(path)
    if weights.suffix == ".safetensors":
        try:
            values: Any = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot be read ({error})", where=weights, mend="copy the file again"
            ) from None
    else:
        values = _unpickled(weights)
    state = _state(values)
    if not state:
        raise UserError(
            "holds no state dict",
            where=weights,
            mend="save one: torch.save(model.state_dict(), 'weights.pth')",
        )
    require_finite(state, weights)
    architecture = _trained_as(values) if isinstance(values, Mapping) else None
    if described:
        return _described(weights, described[0], state)
    return Checkpoint(weights, state, architecture)


def require_finite(state: Mapping[str, Any], where: Path) -> None:
    """Refuses weights that can only give maps without any numbers in them.

    Args:
        state: Tensors by name; what is no tensor is left aside.
        where: The file that they are from.

    Raises:
        UserError: A tensor holds NaN or an infinite number, or a BatchNorm a negative variance.
    """
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        values = tensor if tensor.is_complex() else tensor.float()
        if not bool(values.isfinite().all()):
            reason = "values that are not finite"
        elif key.endswith("running_var") and bool((values < 0).any()):
            reason = "negative variances"
        else:
            continue
        raise UserError(
            f"the weights are damaged: {key} holds {reason}",
            where=where,
            mend="copy the file again; if it was saved so, its training failed: train again "
            "with a lower learning rate",
        )


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol: what cannot be read is said
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise many kinds on a file of others
        reason = str(error).strip().splitlines()
        whole = "weights_only" in str(error) or "Unsupported" in str(error)
        raise UserError(
            "holds more than tensors, which could run any code when it is opened"
            if whole
            else f"cannot be read ({reason[0] if reason else type(error).__name__})",
            where=file,
            mend="open it where it was made and save the tensors alone: "
            "torch.save(model.state_dict(), 'weights.pth')",
        ) from None


def _state(values: Any) -> dict[str, Tensor]:
    """The state dict itself, or the first one nested in a training checkpoint."""
    for _ in range(_DEPTH):
        nested = (values.get(n) for n in _NESTS) if isinstance(values, Mapping) else ()
        inner = next((n for n in nested if isinstance(n, Mapping)), None)
        if inner is None:
            break
        values = inner
    if not isinstance(values, Mapping):
        return {}
    return {str(k): v.float() for k, v in values.items() if isinstance(v, Tensor)}


def _trained_as(values: Mapping[str, Any]) -> str | None:
    """The network's name, as timm's (``arch``) and torchvision's (``args.model``) scripts keep it."""
    arch = values.get("arch")
    if isinstance(arch, str):
        return arch
    model = getattr(values.get("args"), "model", None)
    return f"torchvision/{model}" if isinstance(model, str) else None


def _described(weights: Path, config: Path, state: dict[str, Tensor]) -> Checkpoint:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        architecture = values["architecture"]
        details = values.get("pretrained_cfg", values)
        names = details.get("label_names") or values.get("label_names") or ()
        described = details.get("label_descriptions") or values.get("label_descriptions") or {}
        labels = tuple(_synonyms(str(n), described.get(n)) for n in names)
        return Checkpoint(
            weights,
            state,
            str(architecture),
            dict(values.get("model_args") or {}),
            labels,
            _rgb(details.get("mean")),
            _rgb(details.get("std")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"is no config.json of a timm model ({type(error).__name__}: {error})",
            where=config,
            mend="give the file of the weights itself, and name the network with backbone.name",
        ) from None


def _rgb(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(v) for v in values)


def _synonyms(name: str, description: Any) -> tuple[str, ...]:
    if isinstance(description, Mapping):
        description = description.get("name") or description.get("definition")
    return (name,) if description is None else (name, str(description))
