"""docs/adding-a-method.md: its method, as it stands there, and the tests that it shows."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.docs.worked import installed, written
from tests.stages.conftest import shapes_root, tiny  # noqa: F401
from weakseg.cli import app
from weakseg.methods import methods
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe
from weakseg.training.fit import read_losses

with tempfile.TemporaryDirectory() as _folder:
    _files = written(Path(_folder))
    _TESTS = _files["test_hide_and_seek.py"].read_text(encoding="utf-8")
    with installed(Path(_folder)):
        list(methods)
        exec(compile(_TESTS, "docs/adding-a-method.md", "exec"))  # its tests become tests here


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files; its method is installed during this module and at no other time."""
    folder = tmp_path_factory.mktemp("hide-and-seek")
    written(folder)
    with installed(folder):
        yield folder


def test_the_page_has_tests_of_its_own():
    assert "TestHideAndSeek" in globals()
    assert "test_the_faint_part_is_learnt_too" in globals()


def test_it_trains_in_a_whole_run(tiny: Recipe, tmp_path: Path):  # noqa: F811
    seek = tiny.model_copy(update={"method": {"name": "hide-and-seek", "patches": 4}})
    run = run_recipe(seek, tmp_path / "run", until="masks")
    assert len(read_losses(run.folder / "2-train")["cls"]) == seek.train.steps
    assert len(list(run.masks.rglob("*.png"))) == 24
    plain = run_recipe(tiny, tmp_path / "plain", until="train")
    assert read_losses(run.folder / "2-train") != read_losses(plain.folder / "2-train")


def test_the_command_line_lists_it(capsys):
    with pytest.raises(SystemExit):
        app(["methods"])
    assert "hide-and-seek" in capsys.readouterr().err


def test_its_files_are_as_tidy_as_ours(folder: Path):
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    config = ("--config", str(ROOT / "pyproject.toml"))
    for words in (("format", "--check"), ("check", "--ignore", "D1")):
        done = subprocess.run(
            (ruff, *words, *config, "."), cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
