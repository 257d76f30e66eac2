"""Annotation tools, out and back in: one file per format behind the contract of ``base``."""

from weakseg.export.annotations.base import (
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    MisfitError,
    Options,
    formats,
)
from weakseg.export.annotations.tree import Problems, Tree, open_tree

__all__ = [
    "Format",
    "Found",
    "Item",
    "Labels",
    "MaskSet",
    "MisfitError",
    "Options",
    "Problems",
    "Tree",
    "formats",
    "open_tree",
]
