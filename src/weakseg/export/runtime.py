"""The forward pass on a CPU through ONNX Runtime or OpenVINO; all else of a prediction stays.

The network is traced once, compared with PyTorch, and kept in the user's cache under the digest
of its weights, so that the next prediction starts at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.export.onnx import TOLERANCE, required, trace
from weakseg.files import atomic_path, cache_folder
from weakseg.inference import Predictor
from weakseg.methods.base import Maps, Method, Trainable
from weakseg.networks.tokens import VisionTokens

__all__ = ["Graph", "Runtime", "on_runtime"]

Runtime = Literal["torch", "onnx", "openvino"]

_FORMAT = 1
_TRACED = (2, 3, 73, 99)  # odd, so that padding is traced
_CHECKED = ((2, 3, 64, 64), (1, 3, 75, 131))

Session = Callable[[np.ndarray], Sequence[np.ndarray]]


def on_runtime(predictor: Predictor, runtime: Runtime, cache: Path | None = None) -> Predictor:
    """The same predictor whose network runs elsewhere, on the CPU.

    Scales, flips, tiles, tags and the CRF are as before; probabilities differ by less than 1e-3.

    Args:
        predictor: Is left alone.
        runtime: ``torch`` changes nothing.
        cache: Folder for traced networks; default: ``weakseg/graphs`` in the user's cache.

    Raises:
        UserError: Unknown runtime; its packages are not installed; or the network cannot be
            traced, or gives other answers there.
    """
    if runtime not in get_args(Runtime):
        raise UserError(
            f"unknown runtime {runtime!r}", mend=f"use one of: {', '.join(get_args(Runtime))}"
        )
    if runtime == "torch":
        return predictor
    extra = "onnx" if runtime == "onnx" else "openvino"
    required("onnx", "onnxscript", "onnxruntime" if runtime == "onnx" else "openvino", extra=extra)
    if isinstance(predictor.model.backbone.network, VisionTokens):
        raise UserError(
            f"the runtime {runtime} takes images of one size from a vision transformer",
            where="runtime",
            mend="use --runtime torch",
        )
    fast = predictor.to("cpu").fast()
    file = (cache or cache_folder() / "graphs") / f"{_digest(fast)}.onnx"
    open_session = _onnx if runtime == "onnx" else _openvino
    if not file.exists():
        with atomic_path(file) as temporary:
            _trace(fast, temporary)
            _check(fast, Graph(fast, temporary, open_session))
    return replace(fast, model=Graph(fast, file, open_session))


class Graph(Trainable):
    """A traced network behind the contract of inference; it cannot be trained or saved.

    Args:
        predictor: What was traced.
        file: The network in ONNX.
        open_session: Makes a function of that file.
    """

    def __init__(
        self, predictor: Predictor, file: Path, open_session: Callable[[Path], Session]
    ) -> None:
        super().__init__()
        traced = predictor.model
        self.heads, self.present = traced.heads, traced.present
        self.published_merging = traced.published_merging
        self.head = predictor.head or traced.heads[0]
        self.backbone = traced.backbone
        self._names, self._kind = _described(file)
        self._level = _level_of_maps(predictor)
        self._run = open_session(file)

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Maps of the head that was traced."""
        if (head or self.heads[0]) != self.head:
            raise ValueError(f"head {head} was not traced, {self.head} was")
        arrays = self._run(np.ascontiguousarray(images.numpy()))
        found = {k: torch.from_numpy(np.array(v)) for k, v in zip(self._names, arrays, strict=True)}
        size = (images.shape[-2], images.shape[-1])
        cells = None if self._level is None else self.backbone.cells(size)[self._level]
        others = (found.get("background"), found.get("logits"))
        return Maps(found["scores"], self._kind, *others, cells)


def _level_of_maps(predictor: Predictor) -> int | None:
    """Which level's cells the maps have; ``None`` where they share the image evenly."""
    with torch.no_grad():
        cells = predictor.model.eval()(torch.zeros(1, 3, 64, 64), predictor.head).cells
    return None if cells is None else predictor.model.backbone.cells((64, 64)).index(cells)


class _Named(nn.Module):
    """A network whose maps are a tuple, in the order of ``names``."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.model, self.head = predictor.model, predictor.head
        with torch.no_grad():
            maps = self.model.eval()(torch.zeros(1, 3, 64, 64), self.head)
        self.kind = maps.kind
        self.names = [n for n in ("scores", "background", "logits") if getattr(maps, n) is not None]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model(images, self.head)
        return tuple(getattr(maps, name) for name in self.names)


def _trace(predictor: Predictor, file: Path) -> None:
    network = _Named(predictor)
    random = torch.Generator().manual_seed(0)
    program = trace(network, torch.randn(_TRACED, generator=random), network.names)
    program.model.metadata_props.update(
        {"weakseg.names": json.dumps(network.names), "weakseg.kind": network.kind}
    )
    program.save(str(file))


def _described(file: Path) -> tuple[list[str], Any]:
    """Names of the outputs and kind of the maps."""
    import onnx

    said = {p.key: p.value for p in onnx.load(str(file)).metadata_props}
    return json.loads(said["weakseg.names"]), said["weakseg.kind"]


def _check(predictor: Predictor, graph: Graph) -> None:
    random = torch.Generator().manual_seed(1)
    for shape in _CHECKED:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        found = replace(predictor, model=graph).probabilities(images)
        differs = float((found - predictor.probabilities(images)).abs().max())
        if not differs <= TOLERANCE:
            raise UserError(
                f"probabilities differ from PyTorch's by {differs:.1g}; at most {TOLERANCE} is "
                "allowed",
                where="runtime",
                mend="use --runtime torch",
            )


def _onnx(file: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def _openvino(file: Path) -> Session:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would take bfloat16
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)

    def run(images: np.ndarray) -> list[np.ndarray]:
        found = compiled([images])
        return [found[output] for output in compiled.outputs]

    return run


def _digest(predictor: Predictor) -> str:
    """Of all that decides the graph."""
    network = predictor.model
    # Settings that the modules' own words leave out, such as which outputs make a class.
    settings = network.config.model_dump(mode="json") if isinstance(network, Method) else None
    kinds = (predictor.head, str(network), predictor.classes, settings)
    said = (_FORMAT, version("weakseg"), torch.__version__, *kinds)
    digest = hashlib.sha256(repr(said).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
