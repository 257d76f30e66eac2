"""Fixtures of the report's tests."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from report_bench import Workbench, make_collection

from weakseg.recipe import load_recipe
from weakseg.runfolder import RunFolder


def _read_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    lines = next(folder.glob("logs/*/metrics.csv")).read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    names = lines[0].split(",")
    return {names[i]: [(int(r[0]), float(r[i])) for r in rows] for i in (2, 3)}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    # The real module imports Lightning, which takes longer than all of these tests.
    module = types.ModuleType("weakseg.training.fit")
    module.read_losses = _read_losses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weakseg.training.fit", module)
    return Workbench(
        RunFolder(tmp_path / "run"), make_collection(tmp_path / "data"), load_recipe({"seed": 3})
    )


@pytest.fixture
def blind(bench: Workbench) -> Workbench:
    """The same without ground truth."""
    samples = tuple(replace(s, mask=None) for s in bench.collection)
    return replace(bench, collection=replace(bench.collection, samples=samples))
