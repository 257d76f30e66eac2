"""One ONNX file per model: pixels in, class probabilities and masks out, checked against PyTorch.

The file holds what :meth:`weakseg.inference.Predictor.probabilities` does at one scale without
flips: the pixels' normalisation, the padding to what the network needs, the network, the merging
of its maps by their kind, the gating of classes that a classifier does not find, the background,
and the way back to the image's size. Class names, palette and threshold travel in its metadata.

The graph is traced by ``torch.onnx.export`` with an image whose sides are no multiples of any
stride, so that padding and enlarging become part of it, for batches and images of any size.
Vision transformers are the exception: they resize images to whole patches and resample their
position embeddings, which ONNX Runtime does otherwise than PyTorch; theirs is a file for images of
one size.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.data.images import voc_palette
from weakseg.errors import UserError
from weakseg.export.model import load
from weakseg.files import atomic_path
from weakseg.inference import Predictor, multi_scale
from weakseg.networks.tokens import VisionTokens

__all__ = ["TOLERANCE", "export_onnx", "required", "trace"]

_FORMAT = 1

TOLERANCE = 1e-3
"""Largest difference of a probability between PyTorch and the file."""

_SIDES = ((64, 64), (97, 75), (50, 131))  # that a file for any size is checked on
_TRACED = (73, 99)  # odd, so that padding is traced


def export_onnx(
    model: str | Path | Predictor, out: Path, *, size: tuple[int, int] | None = None
) -> None:
    """Writes a model as one ONNX file and compares it with PyTorch.

    The file's input is ``images``, (B, 3, H, W) uint8 RGB. Its outputs are ``probabilities``,
    (B, K + 1, H, W) float32 with the background first, and ``mask``, (B, H, W) uint8 with the
    largest one's id. B, H and W are free, but for vision transformers H and W are fixed.

    Args:
        model: Model folder or run, or a predictor. Scales, flips, tiles, the CRF and ``max_side``
            are not part of the file; its metadata says what the model has of them.
        out: File to write, ``.onnx``.
        size: (H, W) of the images of a vision transformer, multiples of its patch (default: the
            size that it was made for), or of a classifier with TensorFlow's padding. Others take
            any size, and refuse one.

    Raises:
        UserError: No such model; onnx or onnxruntime is not installed; the network cannot be
            traced; or the file's answers differ from PyTorch's by more than 1e-3.
    """
    required("onnx", "onnxscript", "onnxruntime", extra="onnx")
    if out.suffix != ".onnx":
        raise UserError("is no .onnx file", where=out, mend="give a name such as --out model.onnx")
    if out.exists():
        raise UserError("exists already", where=out, mend="choose another name, or delete it first")
    own = model if isinstance(model, Predictor) else load(model)
    predictor = replace(own, scales=(1.0,), flip=False).to("cpu").fast()
    fixed = _fixed_size(predictor, size)
    program = trace(
        _Pixels(predictor), _pixels(2, fixed or _TRACED), ["probabilities", "mask"], fixed
    )
    program.model.metadata_props.update(_metadata(own, predictor, fixed))
    with atomic_path(out) as temporary:
        program.save(str(temporary))
        _check(temporary, predictor, [fixed] if fixed else _SIDES)


class _Pixels(nn.Module):
    """A predictor as a module: (B, 3, H, W) uint8 -> probabilities and mask."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network = predictor.model
        self.predictor = predictor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        p = self.predictor
        found = p.posterior(multi_scale(self.network, images, p.normalise, head=p.head))
        return found, found.argmax(1).to(torch.uint8)


def trace(
    module: nn.Module, images: Tensor, outputs: Sequence[str], fixed: tuple[int, int] | None = None
) -> Any:
    """The graph of a module of images, as ``torch.onnx.export`` returns it.

    Args:
        module: Takes (B, 3, H, W).
        images: An example of at least two images, of the kind that the module takes.
        outputs: Names of what it returns.
        fixed: Only B is free, not H and W.

    Raises:
        UserError: The network cannot be traced.
    """
    free = torch.export.Dim.STATIC if fixed else torch.export.Dim.DYNAMIC
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim.STATIC, 2: free, 3: free},)
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module.eval(),
                (images,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["images"],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"the network cannot be traced: {str(error.__cause__ or error).splitlines()[0]}",
            where="onnx",
            mend="use the model with PyTorch: weakseg predict MODEL IMAGES",
        ) from error
    finally:
        loud.setLevel(level)


def required(*packages: str, extra: str) -> list[Any]:
    """Optional packages, imported.

    Raises:
        UserError: One is not installed; names the extra that installs it.
    """
    try:
        return [import_module(package) for package in packages]
    except ImportError as error:
        raise UserError(
            f"needs packages that are not installed ({error.name or error})",
            where=f"weakseg[{extra}]",
            mend=f"install them: pip install 'weakseg[{extra}]'",
        ) from None


def _fixed_size(predictor: Predictor, size: tuple[int, int] | None) -> tuple[int, int] | None:
    backbone, network = predictor.model.backbone, predictor.model.backbone.network
    if not isinstance(network, VisionTokens):
        if backbone.padded_by_size and not _has_background(predictor):
            if size is None:  # a decoder's images are whole cells, a classifier's are not
                raise UserError(
                    f"{backbone.spec.name} pads by the size of its images, which says where its "
                    "maps lie",
                    where="size",
                    mend="give the size of the images: size=(512, 512)",
                )
            return size
        if size is not None:
            raise UserError(
                f"a size {size} was given, but this network takes any",
                where="size",
                mend="leave it out",
            )
        return None
    own = network.transformer.patch_embed.img_size
    height, width = size or own
    if height % network.patch or width % network.patch:
        raise UserError(
            f"{height} x {width} pixels are no whole patches of {network.patch}",
            where="size",
            mend=f"give multiples of {network.patch}",
        )
    return height, width


def _has_background(predictor: Predictor) -> bool:
    with torch.no_grad():
        return predictor.model.eval()(torch.zeros(1, 3, 64, 64)).background is not None


def _metadata(
    own: Predictor, predictor: Predictor, fixed: tuple[int, int] | None
) -> dict[str, str]:
    has_map = _has_background(predictor)
    rule = "map" if has_map else own.details.get("threshold rule", "constant")
    values: Mapping[str, Any] = {
        "format": _FORMAT,
        "version": version("weakseg"),
        "classes": ["background", *predictor.classes],
        "palette": voc_palette()[: len(predictor.classes) + 1].tolist(),
        "threshold": {"rule": rule, "value": None if has_map else predictor.background_score},
        "present": predictor.model.present,
        "preprocessing": {
            "input": "uint8 RGB, (B, 3, H, W)",
            "size": list(fixed) if fixed else "any",
            "normalised inside": True,
            "mean": list(predictor.normalise.mean),
            "std": list(predictor.normalise.std),
            "depth": own.reading.depth,
            "bands": own.reading.bands,
        },
        "left out": {
            "scales": list(own.scales),
            "flip": own.flip,
            "max_side": own.max_side,
            "tile": own.tile,
            "crf": own.crf,
        },
        "head": predictor.head,
        "details": own.details,
    }
    return {
        f"weakseg.{k}": json.dumps(v, ensure_ascii=False, default=str) for k, v in values.items()
    }


def _pixels(count: int, size: tuple[int, int]) -> Tensor:
    """Noise: what differs anywhere differs here."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=random)


def _scene(size: tuple[int, int]) -> Tensor:
    """Smooth regions with edges, like a photo."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 4, 5, generator=random)
    smooth = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    smooth[..., size[0] // 3 :, : size[1] // 2] *= 0.4
    return (255 * smooth).to(torch.uint8)


def _check(file: Path, predictor: Predictor, sizes: Sequence[tuple[int, int]]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in sizes:
        for images in (_pixels(3, size), _scene(size)):
            found, mask = session.run(None, {"images": images.numpy()})
            wanted = predictor.probabilities(images).numpy()
            differs = float(np.abs(found - wanted).max())
            # Where two classes are as likely, either may be the larger one.
            chosen = np.take_along_axis(wanted, mask[:, None].astype(np.int64), 1)[:, 0]
            behind = float((wanted.max(1) - chosen).max())
            if not (differs <= TOLERANCE and behind <= 2 * TOLERANCE):
                raise UserError(
                    f"ONNX Runtime's probabilities differ from PyTorch's by {differs:.1g} on an "
                    f"image of {size[0]} x {size[1]}; at most {TOLERANCE} is allowed",
                    where="onnx",
                    mend="nothing was written: use the model with PyTorch (weakseg predict), and "
                    "try other versions of torch and onnxruntime",
                )
