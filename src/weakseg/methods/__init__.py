"""Methods: one file each, behind the contract of :mod:`weakseg.methods.base`."""

from weakseg.methods.base import (
    Batch,
    Card,
    Classifier,
    Maps,
    Method,
    Phase,
    Trainable,
    build,
    methods,
    needs_segmenter,
    resolve,
)

__all__ = [
    "Batch",
    "Card",
    "Classifier",
    "Maps",
    "Method",
    "Phase",
    "Trainable",
    "build",
    "methods",
    "needs_segmenter",
    "resolve",
]
