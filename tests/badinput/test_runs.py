"""Run folders: a wrong place is refused, a damaged record is work of unknown inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.badinput.conftest import Weakseg, listing
from tests.badinput.corpus import IMAGES, LINKS, World
from weakseg.data.voc import listed_ids
from weakseg.errors import UserError
from weakseg.runfolder import RunFolder
from weakseg.stagefiles import read_record

NETWORK = ("--set", "backbone.name=test_resnet", "--set", "backbone.pretrained=false")


def run(weakseg: Weakseg, world: World, out: Path, *words: str):
    return weakseg("run", world.images, world.table, "--out", out, *NETWORK, *words)


def test_out_is_the_folder_of_images(world: World, weakseg: Weakseg) -> None:
    before = listing(world.root)
    run(weakseg, world, world.images).refused("holds no run")
    assert listing(world.root) == before


def test_out_is_a_file(world: World, weakseg: Weakseg) -> None:
    before = listing(world.root)
    run(weakseg, world, world.table).refused("file|folder")
    run(weakseg, world, world.table / "below").refused("file|folder")
    assert listing(world.root) == before


def test_out_is_a_link_in_a_circle(world: World, weakseg: Weakseg) -> None:
    loop = world.root / "loop"
    loop.symlink_to(loop)
    before = listing(world.root)
    run(weakseg, world, loop).refused("loop")
    assert listing(world.root) == before


def test_out_has_a_name_that_is_too_long(world: World, weakseg: Weakseg) -> None:
    before = listing(world.root)
    run(weakseg, world, world.root / ("n" * 300)).refused("name|write")
    assert listing(world.root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_out_is_read_only(world: World, weakseg: Weakseg) -> None:
    folder = world.root / "out"
    folder.mkdir()
    folder.chmod(0o500)
    run(weakseg, world, folder).refused("write")


@pytest.mark.parametrize(
    "name", ["truncated_jpeg", "pipe", "bomb", "very_long_name", "link_to_itself"]
)
def test_a_run_stops_at_the_check_and_writes_into_its_folder_alone(
    name: str, world: World, weakseg: Weakseg
) -> None:
    from tests.badinput.corpus import TABLES

    next(case for case in [*IMAGES, *TABLES, *LINKS] if case.name == name).spoil(world)
    before = listing(world.root)
    out = world.root / "out"
    run(weakseg, world, out).refused("the data has errors")
    assert listing(world.root, out) == before
    assert {p.name for p in out.iterdir()} == {"recipe.yaml", "1-check", "report.html"}


def test_data_outside_of_the_run_named_by_a_recipe_in_it(world: World, weakseg: Weakseg) -> None:
    """A run folder from elsewhere may name any data, and must say so before it writes."""
    out = world.root / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(f"data: {{root: '{world.outside}'}}")
    before = listing(world.root)
    run(weakseg, world, out).refused("other data")
    assert listing(world.root) == before


def test_the_recipe_of_a_run_is_empty(world: World, weakseg: Weakseg) -> None:
    """A disk that was full leaves such a file; the run's own settings are not to be guessed."""
    out = world.root / "out"
    world.put(b"")
    run(weakseg, world, out).refused("the data has errors")
    (out / "recipe.yaml").write_bytes(b"")
    before = listing(world.root)
    for command in ("train", "masks", "segment", "evaluate", "report", "sweep"):
        result = weakseg(command, out)
        result.refused("is empty")
        assert str(out / "recipe.yaml") in result.err
    assert listing(world.root) == before


RECORDS = {
    "empty": b"",
    "cut": b'{"stage": "check", "sta',
    "list": b"[]",
    "text": b'"done"',
    "nothing": b"null",
    "unknown_key": b'{"stage": "check", "colour": 3}',
    "wrong_types": json.dumps(
        {
            "stage": 3,
            "status": [],
            "fingerprint": {},
            "inputs": "x",
            "seconds": "long",
            "starts": None,
        }
    ).encode(),
    "results_of_text": json.dumps(
        {"stage": "check", "status": "done", "fingerprint": "f", "inputs": {}, "results": "many"}
    ).encode(),
    "not_utf8": b'{"stage": "\xff"}',
    "nul": bytes(100),
    "deep": b"[" * 200_000,
    "huge_number": b'{"stage": "check", "seconds": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_damaged_record_is_none(name: str, world: World, weakseg: Weakseg) -> None:
    out = world.root / "out"
    world.put(b"")
    run(weakseg, world, out).refused("the data has errors")
    record = out / "1-check" / "stage.json"
    record.write_bytes(RECORDS[name])
    assert read_record(out / "1-check") is None
    (world.images / "x.png").unlink()
    world.put((world.images / "1.png").read_bytes()[:500])
    run(weakseg, world, out).refused("the data has errors")
    assert RunFolder(out).record("check").status == "failed"
    weakseg("masks", out).refused("the data has errors")
    assert weakseg("report", out).code == 0


def test_commands_on_what_is_no_run(world: World, weakseg: Weakseg) -> None:
    before = listing(world.root)
    for command in ("train", "seeds", "refine", "masks", "segment", "evaluate", "report", "sweep"):
        weakseg(command, world.images).refused("no run|no recipe")
        weakseg(command, world.table).refused("no run|no recipe")
    weakseg("predict", world.images, world.images, "--out", world.root / "o").refused("no model")
    assert listing(world.root) == before


LISTS = {
    "missing": None,
    "empty": b"",
    "binary": bytes(range(256)),
    "not_utf8": b"2007_000032\nB\xe4r\n",
    "nul": b"a\0b\n",
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_a_list_of_ids(name: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    if LISTS[name] is not None:
        file.write_bytes(LISTS[name])
    with pytest.raises(UserError) as error:
        listed_ids(file)
    assert str(file) in str(error.value) and error.value.mend


@pytest.mark.process
@pytest.mark.parametrize("name", ["bomb", "truncated_png"])
def test_as_a_process(name: str, world: World) -> None:
    next(case for case in IMAGES if case.name == name).spoil(world)
    before = listing(world.root)
    command = [sys.executable, "-m", "weakseg.cli", "check", str(world.images), str(world.table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert listing(world.root) == before
