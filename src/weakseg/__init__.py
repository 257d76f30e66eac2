"""weakseg turns image tags into pixel masks and a segmentation model.

>>> import weakseg
>>> run = weakseg.run("photos/", "labels.csv")          # doctest: +SKIP
>>> run.masks, run.report                                # doctest: +SKIP
>>> mask = run.model.predict("photos/001.jpg")           # doctest: +SKIP

Importing the package is light: torch is loaded when something that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Collection": "weakseg.data.samples",
    "Model": "weakseg.export.model",
    "Predictor": "weakseg.inference",
    "Recipe": "weakseg.recipe",
    "Run": "weakseg.pipeline",
    "UserError": "weakseg.errors",
    "compare": "weakseg.comparison",
    "load": "weakseg.export.model",
    "load_recipe": "weakseg.recipe",
    "run": "weakseg.api",
    "run_recipe": "weakseg.pipeline",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604

if TYPE_CHECKING:
    from weakseg.api import run as run
    from weakseg.comparison import compare as compare
    from weakseg.data.samples import Collection as Collection
    from weakseg.errors import UserError as UserError
    from weakseg.export.model import Model as Model
    from weakseg.export.model import load as load
    from weakseg.inference import Predictor as Predictor
    from weakseg.pipeline import Run as Run
    from weakseg.pipeline import run_recipe as run_recipe
    from weakseg.recipe import Recipe as Recipe
    from weakseg.recipe import load_recipe as load_recipe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'weakseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
