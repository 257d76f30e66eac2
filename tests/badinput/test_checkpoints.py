"""Checkpoints of another training, or of none: named, and never executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.badinput.conftest import Weakseg, listing
from tests.badinput.corpus import World
from tests.training.test_module import AUGMENT, PLAIN, Toy
from weakseg.data.loading import TrainingImages
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, fit


class Attack:
    """What a hostile checkpoint may hold."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def _saved(value: Any) -> Any:
    return lambda file: torch.save(value, file)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no checkpoint"),
    "code": lambda file: file.write_bytes(pickle.dumps(Attack(file.parent / "owned"))),
    "code_in_a_zip": lambda file: torch.save(Attack(file.parent / "owned"), file),
    "nothing": _saved(None),
    "list": _saved([1, 2]),
    "no_keys": _saved({}),
    "of_another_network": _saved(
        {"state_dict": {"model.other.weight": torch.zeros(3)}, "weakseg": {"steps_done": 1}}
    ),
    "weights_of_text": _saved({"state_dict": "weights", "weakseg": {}}),
    "cut": lambda file: (torch.save({"a": torch.zeros(999)}, file), _cut(file)),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:700])


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_resume(name: str, tmp_path: Path, tiny_collection: Collection) -> None:
    run = tmp_path / "run"
    run.mkdir()
    DAMAGE[name](run / "last.ckpt")
    with pytest.raises(UserError, match=r"checkpoint") as error:
        fit(
            run,
            lambda: Toy(4),
            lambda _: TrainingImages(tiny_collection, AUGMENT, 0),
            TrainConfig(**PLAIN | {"steps": 4}),
            Placement("cpu", workers=0),
            0,
        )
    assert "last.ckpt" in str(error.value) and "delete it" in str(error.value)
    assert [p.name for p in run.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["images", "table", "missing"])
def test_init_from_what_is_no_model(kind: str, world: World, weakseg: Weakseg) -> None:
    given = {"images": world.images, "table": world.table, "missing": world.root / "none"}[kind]
    before = listing(world.root)
    out = world.root / "out"
    words = ("backbone.name=test_resnet", "backbone.pretrained=false", f"train.init_from={given}")
    sets = [word for text in words for word in ("--set", text)]
    weakseg("run", world.images, world.table, "--out", out, *sets).refused("holds no model")
    assert listing(world.root, out) == before
