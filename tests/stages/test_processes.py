"""Whole processes: killed at any moment, and training together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.stages.conftest import contents
from weakseg.errors import UserError
from weakseg.pipeline import run_recipe
from weakseg.recipe import Recipe
from weakseg.runfolder import RunFolder
from weakseg.stages import train
from weakseg.training.fit import read_losses

pytestmark = pytest.mark.process

# Runs a recipe in a process of its own for each line that it reads, and says that process's number:
# imports take longer than such a run. It writes slowly, so that a kill reliably falls between two
# files of a stage.
SLOWLY = """
import os, sys, time
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe
from weakseg.stages import masks, seeds

def slowed(write):
    def slow(*args, **kwargs):
        time.sleep(0.05)
        return write(*args, **kwargs)
    return slow

seeds.write_scores, masks.write_mask = slowed(seeds.write_scores), slowed(masks.write_mask)
for _ in sys.stdin:
    child = os.fork()
    if not child:
        run_recipe(load_recipe(sys.argv[1]), sys.argv[2], until="masks")
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_killed_three_times_the_result_is_bit_equal(tiny: Recipe, tmp_path: Path):
    tiny = tiny.model_copy(update={"train": tiny.train.model_copy(update={"steps": 20})})
    run_recipe(tiny, tmp_path / "whole", until="masks")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(tiny.to_yaml())
    scores, masks = "3-seeds/scores/**/[!.]*.npz", "5-masks/masks/**/[!.]*.png"
    with _runs(recipe, run) as kill_when:
        kill_when(lambda: (run / "2-train" / "last.ckpt").exists())
        assert RunFolder(run).record("train").status == "running"
        for pattern in (scores, masks):
            kill_when(lambda pattern=pattern: len(list(run.glob(pattern))) > 2)
            assert len(list(run.glob(pattern))) < 24
    run_recipe(tiny, run, until="masks")
    assert RunFolder(run).record("train").starts > 1
    patterns = ("2-train/model/*", scores, masks, "5-masks/rule.json")
    assert contents(run, *patterns) == contents(tmp_path / "whole", *patterns)


@contextmanager
def _runs(recipe: Path, run: Path) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """A function that starts the run in another process, and kills that at a moment."""
    # Bit-equal means: with the same number of threads, and tests run on one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOWLY, str(recipe), str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as starter:

        def kill_when(moment: Callable[[], bool]) -> None:
            starter.stdin.write("\n")
            starter.stdin.flush()
            process = int(starter.stdout.readline())
            deadline = time.monotonic() + 120
            while not moment():
                os.kill(process, 0)  # raises where it ended before it could be killed
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(process, signal.SIGKILL)
            assert starter.stdout.readline() == "ended\n"

        try:
            yield kill_when
        finally:
            starter.kill()


def test_two_processes_train_as_one(tiny: Recipe, tmp_path: Path):
    """The launched stage under gloo, against one process with the same global batch."""
    frozen = tiny.model_copy(
        update={"backbone": tiny.backbone.model_copy(update={"norm": "frozen"})}
    )
    run_recipe(frozen, tmp_path / "one", until="train")
    two = frozen.model_copy(update={"runtime": frozen.runtime.model_copy(update={"devices": 2})})
    run_recipe(two, tmp_path / "two", until="train")
    weights = [
        load_file(tmp_path / n / "2-train" / "model" / "model.safetensors") for n in ("one", "two")
    ]
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(tensor, weights[1][name], atol=2e-5, err_msg=name)
    losses = [dict(read_losses(tmp_path / n / "2-train")["cls"]) for n in ("one", "two")]
    assert losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-4)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train.rank_zero_only, "rank", 1)
    train.save_model(tmp_path, None, None, None, {})
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path), str(tmp_path / "2-train")])
    (tmp_path / "recipe.yaml").write_text("{}")
    monkeypatch.setattr(train, "collect", lambda _: None)
    train.launched(lambda *_: {})
    assert [p.name for p in tmp_path.rglob("*")] == ["recipe.yaml"]


def test_an_error_in_a_launched_training_reaches_the_user(tiny: Recipe, tmp_path: Path):
    hot = tiny.train.model_copy(update={"lr": 1e9, "steps": 20})
    runtime = tiny.runtime.model_copy(update={"devices": 2})
    with pytest.raises(UserError, match="became") as error:
        run_recipe(
            tiny.model_copy(update={"train": hot, "runtime": runtime}),
            tmp_path / "run",
            until="train",
        )
    assert "lower train.lr" in error.value.mend
