"""The notebooks: kept without outputs, and executed with settings of a second."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.docs.sandbox import NETWORK

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

_SMALL = {
    "steps": 6,
    "segmenter_steps": 2,
    "network": {"name": NETWORK["backbone.name"], "pretrained": False},
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "own_data": _SMALL | {"images": 20, "size": 48},
    "compare_methods": _SMALL
    | {
        "methods": ["cam", "recurseed"],
        "images": {"train": 12, "val": 4, "size": 48, "seed": 3},
        "own": {"recurseed": {"method": {"channels": 8, "dilations": [1, 2, 3]}}},
    },
}
"""What takes the place of the settings in the cell that is tagged ``parameters``."""


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_every_notebook_is_executed():
    assert {notebook.stem for notebook in NOTEBOOKS} == set(PARAMETERS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs(notebook: Path):
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "clear all outputs"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_settings_stand_in_the_first_cell_of_code(notebook: Path):
    first = next(cell for cell in cells(notebook) if cell["cell_type"] == "code")
    assert first["metadata"]["tags"] == ["parameters"]
    names = {line.partition(" = ")[0] for line in "".join(first["source"]).splitlines()}
    assert set(PARAMETERS[notebook.stem]) <= names, "these are not settings any more"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of the interpreter that runs the tests, whatever else is installed."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "these tests",
        "language": "python",
    }
    folder = tmp_path / "jupyter" / "kernels" / "these-tests"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "cache"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return folder.name


@pytest.mark.notebooks
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, kernel: str, tmp_path: Path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    content = nbformat.read(notebook, as_version=4)
    (settings,) = [c for c in content.cells if "parameters" in c.metadata.get("tags", ())]
    changed = [f"{name} = {value!r}" for name, value in PARAMETERS[notebook.stem].items()]
    settings.source = "\n".join([settings.source, *changed])
    work = tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        content, timeout=280, kernel_name=kernel, resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    shown = [
        output
        for cell in content.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    assert any("image/png" in output.data for output in shown), "it shows no picture"
    assert not any(
        output.get("ename") for cell in content.cells for output in cell.get("outputs", ())
    )
