"""Versions and devices, and the breakages that are met most often, each with its mend."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

__all__ = ["Finding", "examine"]

_PACKAGES = (
    "weakseg",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "segmentation-models-pytorch",
)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``mend`` is set where something is wrong."""

    name: str
    value: str
    mend: str | None = None


def examine() -> list[Finding]:
    """Examines the installation; imports torch, and survives when that fails."""
    findings = [Finding("python", f"{platform.python_version()} on {platform.platform()}")]
    findings += [_version(name) for name in _PACKAGES]
    findings.append(_torch_pair())
    findings += _devices()
    return findings


def _version(name: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", "install weakseg again: pip install uv && uv sync")
    if name == "lightning" and version in ("2.6.2", "2.6.3"):
        return Finding(
            name,
            version,
            "these releases were compromised: install another one, and change your secrets",
        )
    return Finding(name, version)


def _torch_pair() -> Finding:
    """torch and torchvision are compiled for each other; a mismatched pair fails when imported."""
    name = "torch + torchvision"
    mend = (
        "the two were built for different versions: install both from one place, for example "
        "`uv sync --reinstall-package torch --reinstall-package torchvision`"
    )
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # a broken binary raises anything
        reason = str(error).strip().splitlines()
        return Finding(name, f"broken: {reason[0] if reason else type(error).__name__}", mend)
    return Finding(name, "work together")


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception:  # reported above
        return []
    found = [
        Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            found.append(Finding(f"gpu {i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"))
    elif torch.backends.mps.is_available():
        found.append(Finding("gpu", "Apple (mps)"))
    else:
        found.append(
            Finding(
                "gpu",
                "none: training will run on the CPU; start with a small backbone such as resnet18",
            )
        )
    return found
