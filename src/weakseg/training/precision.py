"""Which precision suits a network on this machine: measured once, and kept.

bfloat16 halves the time of many networks on processors with AVX512-BF16 or AMX, and doubles it on
older ones. So ``precision: auto`` asks this network on this machine, and the answer is kept beside
the training's checkpoints: a training that is stopped goes on in the precision that it began in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from weakseg.console import console
from weakseg.files import write_json
from weakseg.training.config import Precision

__all__ = ["autocast", "chosen_precision"]

_FILE = "precision.json"
_SECONDS = 2.0  # for both together, about


def chosen_precision(
    folder: Path, wanted: Precision, device: torch.device, work: Callable[[], object]
) -> Precision:
    """The precision that a training in ``folder`` uses: as wanted, or the faster one of two.

    Args:
        folder: Keeps the answer.
        wanted: As the recipe says.
        device: A CUDA device takes bfloat16 where it has it, else float16 with scaled losses.
        work: A part of the training to be timed, a few images forward (and backward).
    """
    if wanted != "auto":
        return wanted
    file = folder / _FILE
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["precision"]
    times: dict[str, float] = {}
    if device.type == "cuda":
        found: Precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    elif device.type != "cpu":
        found = "32-true"
    else:
        kinds: tuple[Precision, ...] = ("32-true", "bf16-mixed")
        for kind in kinds:  # the first pass of each prepares its kernels
            with autocast(kind, device):
                work()
        end = time.perf_counter() + _SECONDS
        while not times or time.perf_counter() < end:  # in turns: others may use the machine too
            for kind in kinds:
                start = time.process_time()
                with autocast(kind, device):
                    work()
                times[kind] = min(times.get(kind, float("inf")), time.process_time() - start)
        found = min(kinds, key=lambda kind: times[kind])
        ratio = times["32-true"] / times["bf16-mixed"]
        console.print(f"  precision {found}: bfloat16 is {ratio:.1f} times as fast as float32 here")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"precision": found, "seconds": times})
    return found


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context that a forward pass in this precision runs in."""
    dtype = torch.float16 if precision == "16-mixed" and device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "32-true")
